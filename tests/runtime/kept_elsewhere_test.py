"""KV that comes back: preempted rows, and what other instances have kept."""

import dataclasses

import pytest

from dsjax.scheduling.events import (
  Load,
  LoadFailed,
  Migrate,
  MigrateFailed,
  Offload,
  Offloaded,
  Preempt,
  Timer,
)
from dsjax.scheduling.policy import Fetch, PolicyError
from experiments.verify.anything import FETCHING
from experiments.verify.faults import Injector
from tests.common import tiny
from tests.common.samples import deep
from tests.common.serving import (
  LONG,
  MIXED,
  PAGES_4,
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

# Prompts of more than 32 tokens go in chunks, and leave so.
ALL = dataclasses.replace(PAGES_4, prefill_tokens=32, stream_kv=True,
                          host_bytes=2**20, checksum=True)
STEM = tiny.prompt(14, 3)
WORK = [((*STEM[:n], *prompt[:30]), params) for n, (prompt, params) in zip(
    (14, 9, 12, 14, 3, 14, 8, 14, 12, 4, 14, 8), MIXED, strict=True)]
WORK = [(prompt, params | {'max_tokens': min(16, params['max_tokens'])})
        for prompt, params in WORK] + list(LONG)


def commands(server, kind):
  return [c for _, commands in server.log for c in commands
          if isinstance(c, kind)]


def swaps(server):
  return [c for c in commands(server, Preempt) if c.cause == 'swap']


def fetches(server):
  return [c for c in commands(server, Migrate) if c.kept]


@pytest.mark.parametrize('mode, config', [
    ('2p2d', ALL),
    ('1p1d', dataclasses.replace(ALL, page_size=2, num_pages=32,
                                 decode_page_size=4)),
    *deep(('2flexible', ALL),
          ('tp1_tp2', dataclasses.replace(ALL, kv_dtype='int8')))])
def test_tokens_are_equal_with_all_of_it(mode, config):
  if config.kv_dtype:
    plain = dataclasses.replace(config, prefix_cache=False, stream_kv=False,
                                host_bytes=0)
    with server_of(mode, plain) as server:
      wanted = [o.tokens for o in play(server, WORK)]
  with server_of(mode, config, policy=FETCHING) as server:
    with compilations() as names:
      play(server, [job(50, 4)])  # alone, so nothing has the place of a stream
      answers = [play(server, WORK, between=between) for between in (0, 7)]
    assert not names
    for outputs in answers:
      if config.kv_dtype:
        assert [o.tokens for o in outputs] == wanted
      else:
        check_tokens(WORK, outputs)
    assert swaps(server) and any(c.row for c in commands(server, Load))
    if 'flexible' not in mode:
      assert any(c.more for c in commands(server, Migrate))
    assert fetches(server) or mode != '2p2d'
    for inst in server.state.instances:
      assert not inst.loading and not inst.host.swapped


@pytest.mark.parametrize('mode', ['1p1d', '2p2d', 'colocated', 'chunked',
                                  '2flexible', 'mixed'])
@pytest.mark.parametrize('config', [
    ALL, dataclasses.replace(ALL, prefix_cache=False)])
def test_any_load_of_fakes(mode, config):
  with fake_server_of(mode, config, policy=FETCHING) as server:
    for order in (None, list(range(len(WORK)))[::-1]) * 2:
      outputs = play(server, WORK, order, between=3)
      check_tokens(WORK, outputs, expected_of_fakes)
    if 'flexible' not in mode:
      assert swaps(server)
      rows = [c for c in commands(server, Load) if c.row]
      assert len(rows) == len(swaps(server))
    lost = sum(o.record.retries for o in outputs)
    assert not lost


def preempted(server):
  """Serves what preempts until one of them is in host memory."""
  ids = [server.submit(prompt, **params) for prompt, params in LONG]
  while not any(i.host and i.host.swapped for i in server.state.instances):
    server.poll()
  index, = [n for n, i in enumerate(server.state.instances)
            if i.host and i.host.swapped]
  return ids, index, server.state.instances[index].host.swapped[0]


@pytest.mark.parametrize('what', ['fails', 'fails to come back', 'cancelled',
                                  'lost'])
def test_a_swap_that_ends_otherwise(what):
  with fake_server_of('1p1d', dataclasses.replace(ALL, restart_s=0.0)
                      ) as server:
    if what.startswith('fails'):
      server.fleet.hosts[1].fails = Load if 'back' in what else Offload
    ids, index, (id, slots, _) = preempted(server)
    assert server.state.seqs[id].stage == 'swapped' and index == 1
    if what == 'cancelled':
      server.cancel(id)
    elif what == 'lost':
      server.kill(1, 0.0)
    drain(server, faulty=True)
    outputs = {i: server.output(i) for i in ids}
    if what == 'cancelled':
      assert outputs.pop(id).reason == 'cancelled'
    for i, output in outputs.items():
      check_tokens(LONG[ids.index(i):][:1], [output], expected_of_fakes)
    ended = {'fails': Offloaded, 'fails to come back': LoadFailed}.get(what)
    if ended:
      assert outputs[id].record.retries > 0
      assert any(isinstance(event, ended) and (
          ended is LoadFailed or event.failed) for event, _ in server.log)
    assert slots


def test_a_swapped_row_waits_where_a_record_says_so():
  with fake_server_of('1p1d', dataclasses.replace(ALL, stream_kv=False)
                      ) as server:
    outputs = play(server, LONG)
    check_tokens(LONG, outputs, expected_of_fakes)
    prompts = len(LONG)
    assert sum(o.record.preemptions for o in outputs) == len(
        swaps(server)) > 0
    # None is prefilled again: each prompt was, once.
    chunks = [chunk.id for _, made in server.log for c in made
              for chunk in getattr(c, 'chunks', ()) if chunk.last]
    assert sorted(chunks) == sorted(set(chunks)) and len(chunks) == prompts
    assert server.host_bytes > 0


def fetched(server):
  """Serves a turn, and another one where its beginning is not kept."""
  prompt = tiny.prompt(21, 5)
  first, = play(server, [(prompt, {'max_tokens': 12})])
  id = server.submit((*prompt, *first.tokens, 5, 6, 7), max_tokens=6)
  return id, (*prompt, *first.tokens, 5, 6, 7)


def test_an_answer_goes_back_to_a_prefill_instance():
  with fake_server_of('1p1d', PAGES_4, policy=FETCHING) as server:
    id, prompt = fetched(server)
    drain(server)
    record = server.output(id).record
    fetch, = fetches(server)
  # All that the decode instance has kept: prompt and answer, whole pages.
  assert (fetch.source, fetch.target, fetch.hit) == (1, 0, 20)
  assert record.fetched_tokens == fetch.num_tokens == 32 - 20
  assert record.cached_tokens == 32 and record.prompt_len == len(prompt)


@pytest.mark.parametrize('kind', ('raise', 'stall', 'source',
                                  'cancel', 'target'))
def test_a_fetch_that_ends_otherwise(kind, monkeypatch):
  config = dataclasses.replace(PAGES_4, restart_s=0.0)
  with fake_server_of('1p1d', config, policy=FETCHING) as server:
    if kind in ('raise', 'stall'):
      (_, back), = [(t, r) for (_, t), r in server.routes.items()
                    if t is server.engines[0]]
      start = back.start

      def broken(command, checksum=False):
        if kind == 'raise':
          raise RuntimeError('a fake fault')
        monkeypatch.setattr(server.fleet, 'config', dataclasses.replace(
            config, lease_s=1e-9))
        transfer = start(command, checksum)
        transfer.has_arrived = lambda: False
        return transfer

      back.start = broken
    id, prompt = fetched(server)
    if kind == 'stall':
      for _ in range(100):
        if any(isinstance(e, Timer) for e, _ in server.log):
          break
        server.poll()
      monkeypatch.setattr(server.fleet, 'config', config)
    if kind == 'source':
      server.kill(1, 0.0)
    elif kind == 'target':
      server.kill(0, 0.0)
    elif kind == 'cancel':
      server.cancel(id)
    drain(server, faulty=True)
    output = server.output(id)
    if kind == 'cancel':
      assert output.reason == 'cancelled'
      return
    check_tokens([(prompt, {'max_tokens': 6})], [output], expected_of_fakes)
    if kind != 'target':  # it fetches again
      assert output.record.fetched_tokens == 0
    assert output.record.retries == (kind == 'target')


def test_a_damaged_fetch_is_computed():
  config = dataclasses.replace(PAGES_4, checksum=True)
  with server_of('1p1d', config, policy=FETCHING) as server:
    with Injector(server) as injector:
      first, = play(server, [(tiny.prompt(21, 5), {'max_tokens': 12})])
      injector.arm(0, 'scatter', 'damage')
      prompt = (*tiny.prompt(21, 5), *first.tokens, 5, 6, 7)
      output, = play(server, [(prompt, {'max_tokens': 6})], faulty=True)
      assert injector.fired
    failed = [e for e, _ in server.log if isinstance(e, MigrateFailed)]
    assert len(failed) == 1 and 'KV checksum' in failed[0].reason
    check_tokens([(prompt, {'max_tokens': 6})], [output])
    assert output.record.fetched_tokens == output.record.retries == 0


@pytest.mark.parametrize('lender, changes', [
    (0, {}), (7, {}), (None, {}), (1, {'decode_kv_dtype': 'int8'})])
def test_a_fetch_that_cannot_be_is_named(lender, changes):
  policy = dataclasses.replace(
      FETCHING, route=lambda view, request: Fetch(0, lender))
  config = dataclasses.replace(PAGES_4, **changes)
  with fake_server_of('1p1d', config, policy=policy) as server:
    with pytest.raises(PolicyError, match='fetches=True, from an instance wi'):
      server.generate(tiny.prompt(5), max_tokens=2)
