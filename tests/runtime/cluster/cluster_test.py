"""Instances as processes: the same tokens, logs and records; real deaths.

A process takes seconds to start, so servers are shared: each test leaves its
own as it found it, all up and idle. No test waits for a time that passes: what
is slow is late, and a hang ends by its limit.
"""

import dataclasses
import os
import signal
import socket
import time

import pytest

import dsjax
from dsjax.checkpoints.checkpoint import Recipe
from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan
from dsjax.runtime.cluster import channel, messages
from dsjax.runtime.cluster.channel import Door
from dsjax.scheduling import event_log
from dsjax.scheduling.events import (
  InstanceDown,
  InstanceUp,
  Migrated,
  MigrateFailed,
  RunPrefill,
)
from tests.common import fake_engine, serving
from tests.common.serving import (
  LONG,
  MIXED,
  PAGES_4,
  check_tidy,
  check_tokens,
  expected,
  expected_of_fakes,
  play,
  server_of,
  want,
)

pytestmark = pytest.mark.usefixtures('no_hang')

MODEL = dataclasses.replace(serving.MODEL, recipe=Recipe(
    config=serving.CONFIG))
CONFIG = dataclasses.replace(PAGES_4, tries=50, restarts=50, restart_s=0.0)
WORK = MIXED[:6] + LONG[:2]
PAIR = Placement(prefill=[Plan()], decode=[Plan()])


def start(placement=PAIR, config=CONFIG, model=MODEL, **options):
  return dsjax.serve(model, placement, config, cluster='local', **options)


def alive(pid):
  """Whether a process is there, and no zombie."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rsplit(') ', 1)[1][0] not in 'ZX'
  except FileNotFoundError:
    return False


def children():
  """Processes that this one has started and that run."""
  found = set()
  for name in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{name}/stat') as file:
        state, parent = file.read().rsplit(') ', 1)[1].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
      continue
    if int(parent) == os.getpid() and state != 'Z':
      found.add(int(name))
  return found


def until(true, server=None):
  """The value of `true` once it is; a server goes on meanwhile."""
  while not (value := true()):
    if server:
      server.poll()
    time.sleep(1e-3)
  return value


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
    state, again = event_log.scheduler.step(server.scheduler_config, state,
                                            event)
    assert again == commands
  check_held(server)
  server.requests.clear()
  shared[name] = server


def check_held(server):
  """No process holds anything, nor has it compiled since it was ready."""
  def answers():
    return [engine.held for engine in server.engines]

  for engine in server.engines:
    engine.held = None
    engine._send(messages.Ping())
  until(lambda: all(answers()), server)
  assert answers() == [messages.Pong(0, 0, 0, 0)] * len(server.engines)


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
  """Events without times, and their commands."""
  timed = ('time_s', 'steps_s', 'stages_s')
  return [(type(event), [
      len(value) if isinstance(value, tuple) and name in timed else value
      for name, value in zip(event._fields, event, strict=True)
      if name != 'time_s'], commands) for event, commands in log]


def one_by_one(server, work):
  """Outputs of requests of which each waits for the one before, and what was
  logged and recorded, without times."""
  server.log.clear()
  outputs = [server.generate(prompt, **params) for prompt, params in work]
  until(lambda: not server.busy, server)
  # How far decoding runs ahead of the host, and so how steps are cut, is the
  # same, as it hangs on nothing but what has completed.
  return outputs, untimed(server.log), [
      (o.record.status, o.record.instances, o.record.retries,
       o.record.preemptions, len(o.record.token_s)) for o in outputs]


def check_equal(ours, theirs):
  """Two servers' one_by_one; ids count from another number."""
  (outputs, log, records), (others, other_log, other_records) = ours, theirs
  for one, other in zip(outputs, others, strict=True):
    assert (one.tokens, one.text, one.reason) == (
        other.tokens, other.text, other.reason)
    for (p, top), (q, tops) in zip(one.logprobs, other.logprobs, strict=True):
      assert p == pytest.approx(q, abs=1e-4)
      assert [i for i, _ in top] == [i for i, _ in tops]
  assert records == other_records
  assert [kind for kind, *_ in log] == [kind for kind, *_ in other_log]


@pytest.mark.parametrize('mode', ['1p1d', 'colocated', 'chunked'])
def test_tokens_log_and_records_are_those_of_one_process(mode):
  placement, _ = serving.MODES[mode]
  config = dataclasses.replace(PAGES_4, checksum=mode == '1p1d')
  work = [MIXED[0], MIXED[5], MIXED[10], LONG[0]]
  with server_of(mode, config) as one:
    wanted = one_by_one(one, work)
  with start(placement, config) as server:
    found = one_by_one(server, work)
    check_equal(found, wanted)
    assert [entry[1:] for entry in found[1]] == [
        entry[1:] for entry in wanted[1]]
    check_tokens(MIXED, play(server, MIXED))
    check_held(server)
    assert len({engine.pid for engine in server.engines}) == len(
        server.engines)
    assert all(engine.stamps for engine in server.engines)


def test_any_plans_page_sizes_and_dtypes():
  """From tp=2 to pp=2, pages of 4 to 16, float32 to int8, with checksums."""
  placement = Placement(prefill=[Plan(2)], decode=[Plan(1, 2)])
  config = dataclasses.replace(PAGES_4, decode_page_size=16, num_pages=8,
                               decode_kv_dtype='int8', checksum=True)
  work = [MIXED[0], MIXED[5], MIXED[10]]
  with server_of('tp2_pp2', config) as one:
    wanted = one_by_one(one, work)
  with start(placement, config) as server:
    check_equal(one_by_one(server, work), wanted)
    assert any(event.stages_s for event, _ in server.log
               if hasattr(event, 'stages_s'))
    assert server.copied_bytes
    check_held(server)


def test_it_serves_many_at_a_time(pair):
  check_tokens(MIXED + LONG, play(pair, MIXED + LONG))
  assert not pair.faults


# --- real deaths -------------------------------------------------------------


def kill(server, index):
  os.kill(server.engines[index].pid, signal.SIGKILL)


def stop(server, index):
  os.kill(server.engines[index].pid, signal.SIGSTOP)


def cut(server, index):
  server.engines[index]._channel._socket.shutdown(socket.SHUT_RDWR)


def garble(server, index):
  server.engines[index]._channel._out.put(b'[9]')


def _where(state, stage, side):
  return next((getattr(seq, side) for seq in state.seqs.values()
               if seq.stage == stage), None)


# Where a request is -> the instance that dies.
AT = {
    'idle': lambda state: 1,
    'prefilling': lambda state: next((
        i for i, instance in enumerate(state.instances)
        if any(isinstance(c, RunPrefill) for c, _ in instance.inflight)),
        None),
    'source': lambda state: _where(state, 'migrating', 'instance'),
    'target': lambda state: _where(state, 'migrating', 'target'),
    'decoding': lambda state: _where(state, 'decoding', 'instance'),
}


@pytest.mark.parametrize('stage', AT)
def test_nobody_loses_by_a_process_that_is_killed(pair, stage):
  ids = [] if stage == 'idle' else [
      pair.submit(prompt, **params) for prompt, params in WORK]
  lost = None
  while lost is None:
    pair.poll()
    lost = AT[stage](pair.state)
  before = pair.engines[lost].pid
  kill(pair, lost)
  ids = ids or [pair.submit(prompt, **params) for prompt, params in WORK]
  until(lambda: not pair.busy, pair)
  check_tokens(WORK, [pair.output(id) for id in ids])
  until(lambda: not pair.fleet.down and pair.engines[lost].pid != before, pair)
  assert not alive(before)
  told = [type(event) for event, _ in pair.log]
  assert InstanceDown in told and InstanceUp in told


@pytest.mark.parametrize('harm', [stop, cut, garble])
@pytest.mark.parametrize('index', [0, 1])
def test_what_hangs_or_is_cut_off_is_lost(pair, harm, index, monkeypatch):
  if harm is stop:
    monkeypatch.setattr(pair.engines[index], 'config', dataclasses.replace(
        CONFIG, silent_s=1.0))
  ids = [pair.submit(prompt, **params) for prompt, params in WORK]
  until(lambda: any(type(event) is Migrated for event, _ in pair.log), pair)
  before = pair.engines[index].pid
  harm(pair, index)
  until(lambda: any(type(event) is InstanceDown for event, _ in pair.log),
        pair)
  monkeypatch.undo()
  until(lambda: not pair.busy, pair)
  check_tokens(WORK, [pair.output(id) for id in ids])
  until(lambda: not pair.fleet.down, pair)
  until(lambda: not alive(before))


def test_a_device_that_hangs_is_lost(pair, monkeypatch):
  """It answers pings, and no step comes: stall_s."""
  engine = pair.engines[1]
  monkeypatch.setattr(type(engine), '_on_step', lambda *_: None)
  with monkeypatch.context() as patch:
    patch.setattr(pair.fleet, 'config', dataclasses.replace(
        CONFIG, stall_s=0.5))
    from dsjax.runtime.cluster import remote
    patch.setitem(remote._HEAR, messages.Stepped, lambda *_: None)
    id = pair.submit(*MIXED[:1][0][:1], **MIXED[0][1])
    until(lambda: pair.faults, pair)
    assert 'no step for' in pair.faults[0][1]
  until(lambda: not pair.busy, pair)
  assert pair.output(id).tokens == want(MIXED[0])


def test_a_hand_off_that_breaks_is_tried_again(pair):
  """The source takes its offer back before it is pulled."""
  from dsjax.runtime.cluster.remote import RemoteRoute
  route, = pair.routes.values()
  start_one, broken = route.start, []

  def start_broken(command, checksum=False):
    if not broken:
      uuid = next(RemoteRoute._uuids)
      broken.append(uuid)
      RemoteRoute._uuids = iter([uuid + 1, *range(uuid + 2, uuid + 10**6)])
      route.source._send(messages.Pull(  # of no use to anyone
          uuid, 99, 'nowhere', command, checksum))
    return start_one(command, checksum)

  del start_broken
  target = pair.engines[1]
  real = target._send

  def lost_in_between(message):
    """A page list that the target cannot write."""
    if isinstance(message, messages.Pull) and not broken:
      broken.append(message.uuid)
      message = message._replace(source=77)  # knows of no such peer
    real(message)

  target._send = lost_in_between
  try:
    check_tokens(WORK, play(pair, WORK, faulty=True))
  finally:
    del target._send
  told = [type(event) for event, _ in pair.log]
  assert MigrateFailed in told and InstanceDown not in told


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


def test_an_instance_that_is_killed_by_hand_comes_back(fakes):
  fakes.kill(0)
  assert fakes.engines[0].pid is None and fakes.fleet.down == {0: None}
  work = serving.job(5, 9, 1)
  assert fakes.generate(work[0], **work[1]).tokens == want(
      work, expected_of_fakes)
  fakes.restore(0)
  assert fakes.state.instances[0].status == 'up' and fakes.engines[0].pid


def test_one_that_does_not_start_again_stays_lost(fakes, monkeypatch):
  engine = fakes.engines[1]
  with monkeypatch.context() as patch:
    patch.setitem(engine._fields, 'engine', 'tests.common.fake_engine:Nothing')
    fakes.kill(1)
    with pytest.raises(RuntimeError, match='Nothing'):
      fakes.restore(1)
  assert 1 in fakes.fleet.down


# --- start and end -----------------------------------------------------------


def broken_engine(*_):
  raise RuntimeError('the device is on fire')


def gone_engine(*_):
  os._exit(7)


@pytest.mark.parametrize('make, error', [
    (broken_engine, 'instance 0 .prefill. did not start: .*on fire'),
    (gone_engine, 'instance 0 .prefill. did not start: .*exit code 7')])
def test_an_instance_that_fails_at_start_is_one_clear_error(make, error):
  before = children()
  with pytest.raises(RuntimeError, match=error):
    start(make_engine=make)
  assert children() <= before


def test_bad_input_that_an_instance_finds_is_bad_input():
  before = children()
  with pytest.raises(InputError, match='EngineConfig.dtype'):
    start(config=dataclasses.replace(CONFIG, dtype='bfloat16'))
  assert children() <= before


def test_an_interrupt_at_start_leaves_no_process():
  before = children()

  def interrupt(done, total, name):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    start(make_engine=fake_engine.FakeEngine, report=interrupt,
          placement=Placement(colocated=[Plan()]))
  assert children() <= before


@pytest.mark.parametrize('options, error', [
    ({'cluster': 'ray'}, "cluster='ray'.*not there yet"),
    ({'cluster': 'local', 'devices': []}, 'devices=.*have their own'),
    ({'cluster': 'local', 'make_engine': lambda *_: None}, 'make_engine='),
])
def test_what_is_not_there_is_refused(options, error):
  before = children()
  with pytest.raises(InputError, match=error):
    dsjax.serve(MODEL, PAIR, CONFIG, **options)
  assert children() <= before


def test_a_model_that_no_other_process_has_is_refused():
  with pytest.raises(InputError, match='loads it again'):
    start(model=serving.MODEL)


def test_close_leaves_nothing():
  """No process, no thread, no open port or file."""
  before, files = children(), len(os.listdir('/proc/self/fd'))
  server = start(Placement(colocated=[Plan()] * 2),
                 make_engine=fake_engine.FakeEngine)
  doors = [engine._process._door.address for engine in server.engines]
  pids = [engine.pid for engine in server.engines]
  server.submit(*serving.job(5, 40)[:1], max_tokens=40)
  server.close()
  server.close()
  assert children() <= before and not any(map(alive, pids))
  for address in doors:
    host, port = address.rsplit(':', 1)
    with pytest.raises(ConnectionRefusedError):
      socket.create_connection((host, int(port)))
  until(lambda: len(os.listdir('/proc/self/fd')) <= files)


def test_a_key_is_in_no_command_line_nor_environment():
  """Of another process than the instance's own, that is."""
  with start(Placement(colocated=[Plan()]),
             make_engine=fake_engine.FakeEngine) as server:
    key = server.engines[0]._process._door.key.hex()
    with open(f'/proc/{server.engines[0].pid}/cmdline') as file:
      assert key not in file.read()
    assert key not in os.environ.values()
  assert isinstance(server.engines[0]._process, type(None))
  assert Door is channel.Door and expected
