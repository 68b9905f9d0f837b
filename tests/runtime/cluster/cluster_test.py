"""Instances as processes: the same tokens, logs and records; real deaths.

A process takes seconds to start, so servers are shared: each test leaves its
own as it found it, all up and idle. No test waits for a time that passes: what
is slow is late, and a hang ends by its limit.
"""

import collections
import dataclasses
import itertools
import os
import signal
import time

import pytest

from dsjax.config.placement import Placement, Plan
from dsjax.runtime.cluster import messages, remote, stamps, watch
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  InstanceDown,
  InstanceUp,
  Migrated,
  MigrateFailed,
  Timer,
)
from tests.common import fake_engine, serving
from tests.common.losses import AT
from tests.common.processes import CONFIG, WORK, alive, start
from tests.common.serving import (
  LONG,
  MIXED,
  PAGES_4,
  check_held,
  check_tidy,
  check_tokens,
  expected_of_fakes,
  play,
  server_of,
  until,
  want,
)
from tests.runtime import host_tier_test, stream_test

pytestmark = pytest.mark.usefixtures('no_hang')


@pytest.fixture(scope='module')
def shared():
  """Servers by name; a test that fails leaves none behind."""
  servers = {}
  yield servers
  for server in servers.values():
    server.close()


def lend(shared, name, make):
  """A server that is all up and idle; at the end it is so again."""
  server = shared.pop(name, None) or make()
  server.log.clear()
  server.fleet.faults.clear()
  before = server.state
  yield server
  for index in range(len(server.engines)):
    server.restore(index)
  check_tidy(server, faulty=True)
  state = before
  for event, commands in server.log:
    state, again = scheduler.step(server.scheduler_config, state,
                                            event)
    assert again == commands
  check_held(server)
  server.requests.clear()
  shared[name] = server


@pytest.fixture
def pair(shared):
  yield from lend(shared, 'pair', lambda: start(
      config=dataclasses.replace(CONFIG, checksum=True)))


@pytest.fixture
def fakes(shared):
  yield from lend(shared, 'fakes', lambda: start(
      Placement(colocated=[Plan()] * 2), make_engine=fake_engine.FakeEngine))


# --- as in one process -------------------------------------------------------


def untimed(log):
  """Events and commands without times, of requests counted from 0."""
  first = min(event.id for event, _ in log if hasattr(event, 'id'))

  def plain(name, value):
    if name in ('steps_s', 'stages_s'):
      return len(value)
    return 0 if name == 'time_s' else value

  kinds = []
  for event, commands in log:
    fields = {name: plain(name, value) for name, value in zip(
        event._fields, event, strict=True)}
    if 'id' in fields:
      fields['id'] -= first
    kinds.append((type(event), fields, [type(c) for c in commands]))
  return kinds


def one_by_one(server, work):
  """Outputs of requests of which each waits for the one before, and what was
  logged, without times."""
  outputs, log = [], []
  for prompt, params in work:
    before = len(server.log)
    outputs.append(server.generate(prompt, **params))
    until(lambda: not server.busy, server)
    log.append(untimed(server.log[before:]))
  return outputs, log


def check_equal(ours, theirs):
  """Two servers gave, said and recorded the same."""
  (outputs, log), (others, other_log) = ours, theirs
  for one, other in zip(outputs, others, strict=True):
    assert (one.tokens, one.text, one.reason) == (
        other.tokens, other.text, other.reason)
    for (p, top), (q, tops) in zip(one.logprobs, other.logprobs, strict=True):
      assert p == pytest.approx(q, abs=1e-4)
      assert [i for i, _ in top] == [i for i, _ in tops]
    assert recorded(one) == recorded(other)
  assert log == other_log


def recorded(output):
  """A record without times."""
  record = output.record
  return (record.status, record.prompt_len, record.instances, record.retries,
          record.preemptions, list(record.stage_s), len(record.token_s))


@pytest.fixture
def one_process(mode):
  """What a server of one process gives, says and records."""
  with server_of(mode, CONFIGS[mode]) as server:
    yield one_by_one(server, JOBS)


# Few steps to compile: of one or two rows and 32 tokens.
SMALL = dataclasses.replace(PAGES_4, max_seqs=2, prefill_tokens=32,
                            prefill_seqs=1)
CONFIGS = {
    '1p1d': PAGES_4, 'colocated': SMALL, 'chunked': SMALL,
    'tp2_pp2': dataclasses.replace(
        SMALL, max_seqs=1, decode_page_size=16, num_pages=12,
        decode_kv_dtype='int8', checksum=True, prefix_cache=True),
    'pp2_tp3': dataclasses.replace(SMALL, page_size=16, num_pages=20,
                                   decode_page_size=4, checksum=True),
    'tp1_tp2': dataclasses.replace(SMALL, kv_dtype='bfloat16'),
    'colocated_pp2': dataclasses.replace(SMALL, kv_dtype='int8'),
    'chunked_pp2': dataclasses.replace(SMALL, page_size=16, num_pages=5,
                                       prefix_cache=True)}
# The last begins as the one before: with a prefix cache less of it moves.
JOBS = [MIXED[0], MIXED[5], MIXED[10], MIXED[1], MIXED[1]]


@pytest.mark.parametrize('mode', ['1p1d'])
def test_tokens_log_and_records_are_those_of_one_process(pair, one_process):
  check_equal(one_by_one(pair, JOBS), one_process)


@pytest.mark.parametrize('mode', [pytest.param(
    'chunked', marks=pytest.mark.slow), *(
    pytest.param(mode, marks=pytest.mark.deep)
    for mode in ('colocated', 'colocated_pp2', 'chunked_pp2'))])
def test_so_they_are_without_hand_offs(mode, one_process):
  with start(serving.MODES[mode][0], CONFIGS[mode]) as server:
    check_equal(one_by_one(server, JOBS), one_process)
    outputs = play(server, MIXED[:6])
    if server.config.kv_dtype is None:
      check_tokens(MIXED[:6], outputs)
    check_held(server)


@pytest.mark.parametrize('mode', [pytest.param(
    'tp2_pp2', marks=pytest.mark.slow), *(
    pytest.param(mode, marks=pytest.mark.deep)
    for mode in ('pp2_tp3', 'tp1_tp2'))])
def test_so_they_are_with_any_plans_page_sizes_and_dtypes(mode, one_process):
  """From tp=2 to pp=2, pages of 4 to 16, float32 to int8, with checksums."""
  config = CONFIGS[mode]
  with start(serving.MODES[mode][0], config) as server:
    check_equal(one_by_one(server, JOBS), one_process)
    assert server.copied_bytes
    assert bool(server.records[-1].cached_tokens) == config.prefix_cache
    check_held(server)


@pytest.mark.slow
def test_so_they_are_with_streams_and_host_memory():
  """Parts of prompts go over as they are made; what is evicted comes back from
  the memory of the process's host. Also where processes die."""
  config = host_tier_test.tiered(stream_test.config_of(CONFIG), checksum=True)
  with start(config=config) as server:
    for between in (0, 6):
      check_tokens(stream_test.WORK, play(server, stream_test.WORK,
                                          between=between))
    said = host_tier_test.by_turns(server)
    asked = [(prompt, {'max_tokens': 4}) for prompt, _ in said]
    check_tokens(asked, [output for _, output in said])
    kinds = collections.Counter(
        type(c).__name__ + '+' * getattr(c, 'more', False)
        for _, commands in server.log for c in commands)
    assert kinds['Migrate+'] and kinds['Load'] and kinds['Offload']
    assert server.host_bytes and not server.faults
    check_held(server)
    ids = [server.submit(prompt, **params)
           for prompt, params in (*stream_test.WORK, *asked)]
    for index in (0, 1):
      until(lambda: server.steps % 7 == 0 or not server.busy, server)
      kill(server, index)
      until(lambda: server.faults and not server.fleet.down, server)
    until(lambda: not server.busy, server)
    check_tokens((*stream_test.WORK, *asked), map(server.output, ids))
    check_tidy(server, faulty=True)
    check_held(server)


def test_it_serves_many_at_a_time(pair):
  check_tokens(MIXED + LONG, play(pair, MIXED + LONG))
  assert not pair.faults


def test_each_step_and_hand_off_is_stamped_where_it_happens(pair):
  """On the server's clock, between its command and the answer to it."""
  for engine in pair.engines:
    engine.stamps.clear()
  check_tokens(WORK, play(pair, WORK))
  until(lambda: all(engine.clock.fastest_s < 10 for engine in pair.engines),
        pair)
  done = {(e.instance, e.number): len(getattr(e, 'steps_s', (0,)))
          for e, _ in pair.log if hasattr(e, 'number')}
  stamped = collections.Counter()
  for index, own in pair.stamps.items():
    steps = [s for s in own if s.what == 'step']
    stamped.update((index, s.number) for s in steps)
    assert all(s.began_s <= s.wall_s for s in own)
    for before, after in itertools.pairwise(steps):
      assert before.wall_s <= after.wall_s and before.cpu_s <= after.cpu_s
    kind, = {s.what for s in own} - {'step'}
    assert kind == ('offered', 'landed')[index]
  assert stamped == done
  landed = [(s.number, s.wall_s) for s in pair.stamps[1] if s.what == 'landed']
  moved = [(e.id, e.time_s) for e, _ in pair.log if type(e) is Migrated]
  for (id, there_s), (same, here_s) in zip(sorted(landed), sorted(moved),
                                           strict=True):
    assert id == same and there_s <= here_s


def test_clocks_of_other_hosts_are_set_by_the_fastest_answer():
  clock, now_s = stamps.Clock(), time.perf_counter
  clock.hear(now_s(), now_s() - 1000)
  assert clock.offset_s == pytest.approx(1000, abs=60)
  assert clock.stamp('step', 1, 5.0, 6.0, 7.0) == stamps.Stamp(
      'step', 1, 5.0 + clock.offset_s, 6.0 + clock.offset_s, 7.0)
  first = clock.offset_s
  clock.hear(now_s() - 60, 7.0)  # a slow one changes nothing
  assert clock.offset_s == first
  clock.fastest_s = 1e9
  clock.hear(now_s() - 1, now_s() - 0.5)
  assert clock.offset_s == 0.0  # the same clock, as far as one can tell


# --- real deaths -------------------------------------------------------------


def kill(server, index):
  os.kill(server.engines[index].pid, signal.SIGKILL)


def stop(server, index):
  os.kill(server.engines[index].pid, signal.SIGSTOP)


def cut(server, index):
  server.engines[index].cut()


def garble(server, index):
  server.engines[index]._channel.put(b'[9]')


def lose(server, index):
  """The next message to it is lost: the one after it has a wrong number."""
  server.engines[index]._channel._sent += 1


def double(server, index):
  """The next message has the number of one that came before."""
  server.engines[index]._channel._sent -= 1


@pytest.mark.parametrize('stage', [pytest.param(
    stage, marks=[pytest.mark.slow] * (stage != 'target'))
    for stage in AT])
def test_nobody_loses_by_a_process_that_is_killed(pair, stage):
  ids = [pair.submit(prompt, **params) for prompt, params in WORK]
  lost = None
  while lost is None:
    pair.poll()
    lost = AT[stage](pair.state)
  before = pair.engines[lost].pid
  kill(pair, lost)
  until(lambda: not pair.busy, pair)
  check_tokens(WORK, [pair.output(id) for id in ids])
  until(lambda: not pair.fleet.down and pair.engines[lost].pid != before, pair)
  assert not alive(before)
  told = [type(event) for event, _ in pair.log]
  assert InstanceDown in told and InstanceUp in told


def test_a_client_may_leave_in_any_stage(pair):
  """Of each one leaves; the others have their tokens, nothing is held."""
  todo = {'queued', 'prefilling', 'prefilled', 'migrating', 'decoding'}
  for _ in range(20):
    if not todo:
      break
    ids, left = [pair.submit(prompt, **params) for prompt, params in WORK], []
    while pair.busy:
      pair.poll()
      for seq in list(pair.state.seqs.values()):
        if seq.stage in todo and seq.id in ids:
          todo.discard(seq.stage)
          pair.cancel(seq.id)
          left.append(seq.id)
    outputs = [pair.output(id) for id in ids]
    kept = [n for n, id in enumerate(ids) if id not in left]
    check_tokens([WORK[n] for n in kept], [outputs[n] for n in kept])
    check_held(pair)
  assert not todo - {'prefilled'} and not pair.faults


@pytest.mark.parametrize('harm, index', [
    pytest.param(*harm, marks=pytest.mark.slow) for harm in (
        (stop, 0), (cut, 1), (garble, 0), (lose, 1), (double, 0))])
def test_what_hangs_or_is_cut_off_is_lost(pair, harm, index, monkeypatch):
  ids = [pair.submit(prompt, **params) for prompt, params in WORK]
  until(lambda: any(type(event) is Migrated for event, _ in pair.log), pair)
  before = pair.engines[index].pid
  with monkeypatch.context() as patch:
    patch.setattr(pair.engines[index], 'config', dataclasses.replace(
        CONFIG, silent_s=1.0 if harm is stop else 30.0))
    harm(pair, index)
    until(lambda: any(type(event) is InstanceDown for event, _ in pair.log),
          pair)
  until(lambda: not pair.busy, pair)
  check_tokens(WORK, [pair.output(id) for id in ids])
  until(lambda: not pair.fleet.down, pair)
  until(lambda: not alive(before))


def test_a_device_that_hangs_is_lost(pair, monkeypatch):
  """It answers pings, and no step comes."""
  with monkeypatch.context() as patch:
    patch.setattr(pair.fleet, 'config', dataclasses.replace(
        CONFIG, stall_s=0.5))
    patch.setitem(remote._HEAR, messages.Stepped, lambda *_: None)
    id = pair.submit(MIXED[0][0], **MIXED[0][1])
    until(lambda: pair.faults, pair)
    assert 'no step for' in pair.faults[0][1]
  until(lambda: not pair.busy, pair)
  assert pair.output(id).tokens == want(MIXED[0])


@pytest.mark.parametrize('side, name, kind', [
    (0, 'send', messages.Offer), (1, 'send_if_there', messages.Pull)])
def test_a_copy_that_takes_too_long_gives_its_pages_back(
    pair, monkeypatch, side, name, kind):
  """Its source or its target is stopped for a while, and late: the offer is
  taken back."""
  source, late, stopped = pair.engines[0], pair.engines[side], []
  real, before = getattr(late, name), source.address

  def stop_at(message):
    if isinstance(message, kind) and not stopped:
      stopped.append(late.pid)
      stop(pair, side)
    real(message)

  with monkeypatch.context() as patch:
    patch.setattr(late, name, stop_at)
    patch.setattr(pair.fleet, 'config', dataclasses.replace(
        CONFIG, lease_s=0.2))
    ids = [pair.submit(prompt, **params) for prompt, params in WORK]
    until(lambda: any(type(event) is Timer for event, _ in pair.log), pair)
    patch.setattr(pair.fleet, 'config', CONFIG)
    os.kill(late.pid, signal.SIGCONT)
    until(lambda: not pair.busy, pair)
  check_tokens(WORK, [pair.output(id) for id in ids])
  assert stopped == [late.pid]  # it was not lost
  assert not [text for _, text in pair.faults if 'after 30' in text]
  assert source.address not in ('', before)  # its server may be stuck


def _spoiled(said, **changes):
  """Messages of a type, the first of them with another content."""
  todo, hear = [changes], remote._HEAR[said]

  def spoiled(engine, message):
    hear(engine, message._replace(**todo.pop()) if todo else message)
  return {said: spoiled}


@pytest.mark.parametrize('spoiled, why', [
    (_spoiled(messages.Landed, checksum=1), 'KV checksum 0x1 arrived'),
    (_spoiled(messages.Offered, kind=1), 'shapes or dtypes'),
    (None, "KeyError: 77")], ids=['checksum', 'kind', 'pull'])
def test_a_hand_off_that_breaks_is_tried_again(pair, monkeypatch, spoiled,
                                               why):
  target, todo = pair.engines[1], [77]
  real = target.send_if_there

  def lost_on_the_way(message):
    """A Pull from a source that there is not."""
    if isinstance(message, messages.Pull) and todo:
      message = message._replace(source=todo.pop())
    real(message)

  with monkeypatch.context() as patch:
    if spoiled:
      patch.setattr(remote, '_HEAR', remote._HEAR | spoiled)
    else:
      patch.setattr(target, 'send_if_there', lost_on_the_way)
    check_tokens(WORK, play(pair, WORK, faulty=True))
  told = [event for event, _ in pair.log]
  failed = [event for event in told if isinstance(event, MigrateFailed)]
  assert len(failed) == 1 and why in failed[0].reason
  assert InstanceDown not in map(type, told)


def test_any_process_may_die_at_any_moment(fakes):
  """Again and again, and what is starting too."""
  work = [serving.job(4 + n % 9, 8 + n % 7, n) for n in range(60)]
  ids = []
  for n, (prompt, params) in enumerate(work):
    ids.append(fakes.submit(prompt, **params))
    fakes.poll()
    pid = fakes.engines[n % 2].pid
    if n % 7 == 3 and pid:
      os.kill(pid, signal.SIGKILL)
  until(lambda: not fakes.busy, fakes)
  check_tokens(work, [fakes.output(id) for id in ids], expected_of_fakes)
  assert InstanceDown in {type(event) for event, _ in fakes.log}


def test_one_that_dies_idle_is_started_again(fakes):
  before = fakes.engines[1].pid
  kill(fakes, 1)
  until(lambda: fakes.faults and not fakes.fleet.down, fakes)
  assert not alive(before) and alive(fakes.engines[1].pid)
  assert not fakes.busy


def test_one_that_is_stopped_while_it_starts_is_begun_again(
    fakes, monkeypatch):
  """It says nothing before it has come, where one that loads does."""
  engine = fakes.engines[1]
  with monkeypatch.context() as patch:
    patch.setattr(watch, 'LEAST_S', 0.5)
    patch.setattr(engine, 'config', dataclasses.replace(CONFIG, silent_s=0.5))
    kill(fakes, 1)
    until(lambda: fakes.fleet.starting and engine.pid, fakes)
    stopped = engine.pid
    stop(fakes, 1)
    until(lambda: any('silent' in text for _, text in fakes.faults), fakes)
  until(lambda: not fakes.fleet.down, fakes)
  assert not alive(stopped)


def test_one_whose_end_was_seen_has_no_pid(fakes):
  """Its number may be another's by then."""
  process = fakes.engines[1]._process
  kill(fakes, 1)
  until(lambda: fakes.faults and not fakes.fleet.down, fakes)
  assert process.exit_code() == -signal.SIGKILL
  assert process.pid is None


def test_an_instance_that_is_killed_by_hand_comes_back(fakes):
  fakes.kill(0)
  assert fakes.engines[0].pid is None and fakes.fleet.down == {0: None}
  work = serving.job(5, 9, 1)
  assert fakes.generate(work[0], **work[1]).tokens == want(
      work, expected_of_fakes)
  fakes.restore(0)
  assert fakes.state.instances[0].status == 'up' and fakes.engines[0].pid


def test_one_that_is_away_joins():
  with start(Placement(colocated=[Plan()] * 2), dataclasses.replace(
      CONFIG, away=(1,)), make_engine=fake_engine.FakeEngine) as server:
    assert server.engines[1].pid is None
    server.restore(1)
    assert alive(server.engines[1].pid) and server.state.instances[
        1].status == 'up'


def test_one_that_does_not_start_again_stays_lost(fakes, monkeypatch):
  engine = fakes.engines[1]
  with monkeypatch.context() as patch:
    patch.setitem(engine._fields, 'engine', 'tests.common.fake_engine:Nothing')
    fakes.kill(1)
    with pytest.raises(RuntimeError, match='Nothing'):
      fakes.restore(1)
  assert 1 in fakes.fleet.down


def test_two_servers_know_nothing_of_each_other(fakes):
  """Each has its own ports and keys; what ends one leaves the other."""
  work = [serving.job(4 + n % 9, 8 + n % 7, n) for n in range(12)]
  ids = [fakes.submit(prompt, **params) for prompt, params in work]
  with start(Placement(colocated=[Plan()]),
             make_engine=fake_engine.FakeEngine) as other:
    check_tokens(work, play(other, work), expected_of_fakes)
    kill(other, 0)
  until(lambda: not fakes.busy, fakes)
  check_tokens(work, [fakes.output(id) for id in ids], expected_of_fakes)
  assert not fakes.faults
