"""KV that leaves chunk by chunk: tokens as without, nothing written late."""

import dataclasses

import pytest

from dsjax.analysis import timeline
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.request import Sampling
from dsjax.scheduling import event_log
from dsjax.scheduling.events import Migrate, Migrated, MigrateFailed, Timer
from experiments.verify.faults import COPY, Injector
from tests.common import tiny
from tests.common.fake_engine import PAGE_BYTES
from tests.common.samples import deep
from tests.common.serving import (
  HOT,
  PAGES_4,
  PAGES_16,
  check_tokens,
  compilations,
  drain,
  expected_of_fakes,
  fake_server_of,
  job,
  play,
  server_of,
)

pytestmark = pytest.mark.usefixtures('no_hang')

# Compiled by other tests too. In two chunks; some are short, one ends with its
# first token.
CHUNKS = {'prefill_tokens': 32, 'stream_kv': True}
WORK = (job(40, 9), job(5, 12), job(50, 8, **HOT, seed=3), job(33, 1),
        job(37, 10, 1), job(48, 12, 2, **HOT, seed=1), job(16, 6))
PAGES_2 = dataclasses.replace(PAGES_4, page_size=2, num_pages=40)


def config_of(config=PAGES_4, **changes):
  return dataclasses.replace(config, **CHUNKS | changes)


def migrates(server):
  return [c for _, commands in server.log for c in commands
          if isinstance(c, Migrate)]


# --- on the real engine -------------------------------------------------------


@pytest.mark.parametrize('mode, config', [
    ('1p1d', dataclasses.replace(PAGES_4, checksum=True, prefix_cache=True)),
    ('pp2_tp3', PAGES_4),
    ('1p1d', dataclasses.replace(PAGES_4, decode_page_size=2, num_pages=40)),
    *deep(('1p1d', PAGES_16),
          ('1p1d', dataclasses.replace(PAGES_2, decode_page_size=4)))])
def test_tokens_are_those_of_whole_hand_offs(mode, config):
  with server_of(mode, config_of(config)) as server:
    with compilations() as names:
      answers = [play(server, WORK, between=between) for between in (0, 6)]
    assert not names
    for outputs in answers:
      check_tokens(WORK, outputs)
    moves = migrates(server)
  assert any(c.more for c in moves)
  ends = {}
  for c in moves:  # what follows a part goes on where it ended
    assert c.sent == 0 or c.hit == ends[c.id, c.epoch]
    ends[c.id, c.epoch] = c.hit + c.num_tokens


def test_tokens_of_a_cache_in_bytes_are_those_of_whole_hand_offs():
  answers = []
  for stream in (False, True):
    config = config_of(kv_dtype='int8', stream_kv=stream, checksum=True)
    with server_of('tp1_tp2', config) as server:
      answers.append([o.tokens for o in play(server, WORK, between=6)])
      assert any(c.more for c in migrates(server)) == stream
  assert answers[0] == answers[1]


@pytest.mark.parametrize('kind', ('raise', 'unreadable', 'damage', 'stall'))
def test_a_part_that_goes_wrong_goes_over_with_the_whole(kind, monkeypatch):
  config = config_of(tries=1, checksum=True)  # the prompt may have ended first
  with server_of('1p1d', config) as server, Injector(server) as injector:
    injector.arm(1, 'scatter' if kind == 'damage' else COPY, kind)
    if kind == 'stall':
      monkeypatch.setattr(server.fleet, 'config',
                          dataclasses.replace(config, lease_s=0.2))
    outputs = play(server, WORK[:1], faulty=True)
    check_tokens(WORK[:1], outputs)
    assert injector.fired and server.faults
    first, *_, whole = migrates(server)
    assert first.more and not (whole.more or whole.sent)
    assert whole.epoch == first.epoch + 1
    kinds = {type(event) for event, _ in server.log}
    assert kinds & {MigrateFailed, Timer}


# --- on fake engines ----------------------------------------------------------


def fakes(**changes):
  """A server of fake engines whose prompts run in chunks of 8."""
  return fake_server_of(config=config_of(
      prefill_tokens=8, num_pages=40, **changes))


def poll_until(server, ready):
  for _ in range(200):
    if ready():
      return
    server.poll()
  raise AssertionError('it never came to that')


def test_a_hand_off_is_over_when_every_part_has_landed():
  late, transfers = [], []
  with fakes() as server:
    (route,) = server.routes.values()
    start = route.start

    def slow(command, checksum=False):
      transfer = start(command, checksum)
      transfers.append(transfer)
      if len(transfers) == 1:  # the first part is later than the rest
        transfer.has_arrived = lambda: bool(late)
      return transfer

    route.start = slow
    id = server.submit(tiny.prompt(20), max_tokens=5)
    poll_until(server, lambda: len(transfers) == 3 and transfers[2].landed)
    for _ in range(20):
      server.poll()
    landed, seq = [t.landed for t in transfers], server.state.seqs.get(id)
    late.append(True)
    assert landed == [False, True, True] and seq.stage == 'migrating'
    drain(server)
    ends = [event for event, _ in server.log if isinstance(event, Migrated)]
    assert len(ends) == 1
    output = server.output(id)
    assert output.record.migrated_tokens == 20
    assert server.copied_bytes == PAGE_BYTES * 5
    assert output.tokens == expected_of_fakes(
        tiny.prompt(20), Sampling(max_tokens=5))


@pytest.mark.parametrize('end', ('cancel', 'kill source', 'kill target'))
def test_what_ends_a_stream_takes_back_its_pages(end):
  with fakes() as server:
    id = server.submit(tiny.prompt(30), max_tokens=5)
    poll_until(server, lambda: server.state.instances[1].streams)
    assert server.fleet.transfers
    if end == 'cancel':
      server.cancel(id)
    else:
      server.kill(0 if 'source' in end else 1, 0.0)
    assert not server.state.instances[1].streams
    assert not server.fleet.transfers
    assert server.state.instances[1].residents == 0
    drain(server, faulty=True)
    output = server.output(id)
    if end != 'cancel':
      assert output.tokens == expected_of_fakes(
          tiny.prompt(30), Sampling(max_tokens=5))


def test_a_log_with_streams_is_read_back():
  with fakes() as server:
    play(server, WORK)
    log = [tuple(event_log.decode(event_log.encode(part)) for part in entry)
           for entry in server.log]
    assert log == list(server.log)
    assert event_log.replay(server.scheduler_config, log) is None
    flows = [e for e in timeline.timeline(log)['traceEvents']
             if e.get('cat') == 'migrate' and e['ph'] == 's']
    handed = {c.id for c in migrates(server) if not c.more}
    assert {f['id'].split('.')[0] for f in flows} == set(map(str, handed))
    assert any(f['args']['sent'] for f in flows)


@pytest.mark.parametrize('value', (1, 'yes', None))
def test_a_bad_setting_is_named(value):
  with pytest.raises(InputError, match='EngineConfig.stream_kv.*True'):
    EngineConfig(stream_kv=value)
