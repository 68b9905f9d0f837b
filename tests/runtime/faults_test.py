"""Faults on the real engine: nothing lost, leaked, repeated or compiled.

Tokens are compared with `expected` of tests/serving.py, which knows of no
instance. Servers are shared by tests: each leaves its own as it found it.
Modes that end with `, processes` are the same tests over the other fleet,
where calls go wrong inside the processes.
"""

import collections
import contextlib
import dataclasses
import functools
import random
import time
import types

import jax
import pytest

import dsjax
from dsjax.analysis import timeline
from dsjax.checkpoints.checkpoint import Recipe
from dsjax.config.checks import InputError
from dsjax.runtime import fleet
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  Abort,
  Arrived,
  InstanceDown,
  InstanceUp,
  MigrateFailed,
  Timer,
)
from experiments.verify import faults
from experiments.verify.faults import COPY, KINDS, Injected, inject
from tests.common import fake_engine, serving
from tests.common.losses import AT
from tests.common.serving import (
  LONG,
  MIXED,
  PAGES_4,
  check_held,
  check_survivors,
  check_tokens,
  expected,
  job,
  server_of,
  until,
  want,
)

pytestmark = pytest.mark.usefixtures('no_hang')

# Faults of a test must not run out of tries, nor wait.
CONFIG = dataclasses.replace(PAGES_4, tries=50, restarts=50, restart_s=0.0)
WORK = MIXED[:6] + LONG[:2]
check_tidy, drain, play = (functools.partial(f, faulty=True) for f in (
    serving.check_tidy, serving.drain, serving.play))
LOST, FAILED = InstanceDown, MigrateFailed


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  faults.orders_in(tmp_path_factory.mktemp('orders'))  # of all of them
  servers = {}
  yield servers
  for server in servers.values():
    server.close()


PROCESSES = ', processes'  # behind a mode


def started(mode):
  """A server of a mode, in one process or many."""
  name = mode.removesuffix(PROCESSES)
  config = dataclasses.replace(CONFIG, checksum=name == '1p1d')
  if name == mode:
    return server_of(mode, config)
  return dsjax.serve(
      dataclasses.replace(serving.MODEL, recipe=Recipe(config=serving.CONFIG)),
      serving.MODES[name][0], config, cluster='local',
      make_engine=faults.engine)


@pytest.fixture
def server(shared, mode):
  """A server of `mode`, all up and idle; at the end it is so again."""
  if mode not in shared:
    shared[mode] = started(mode)
  one = shared.pop(mode)  # a test that fails leaves none behind
  one.log.clear()
  one.fleet.faults.clear()
  one.start_state = one.state
  yield one
  settle(one)
  assert replay(one) is None
  if mode.endswith(PROCESSES):
    check_held(one)
  one.requests.clear()
  shared[mode] = one


def settle(server):
  """All that is lost has started again; everything has come back."""
  for i in range(len(server.engines)):
    server.restore(i)
  drain(server)
  assert not server.fleet.down
  assert all(i.status == 'up' for i in server.state.instances)


def replay(server):
  state = server.start_state
  for index, (event, commands) in enumerate(server.log):
    state, again = scheduler.step(server.scheduler_config, state, event)
    if again != commands:
      return index
  return None


def kinds(server):
  """Types of the events so far."""
  return {type(event) for event, _ in server.log}


def submit(server, work):
  return [server.submit(prompt, **params) for prompt, params in work]


def outputs(server, ids):
  return [server.output(id) for id in ids]


# --- an instance is lost -----------------------------------------------------

# Instances that prefill and decode, each kind compiled apart.
DEEP_2COLOCATED = pytest.param('2colocated', marks=pytest.mark.deep)
CHUNKED_PROCESSES = '2chunked, processes'
DEEP_PROCESSES = [pytest.param(mode, marks=pytest.mark.deep)
                  for mode in (CHUNKED_PROCESSES, '2p2d, processes')]
SLOW_PROCESSES = pytest.param('1p1d, processes', marks=pytest.mark.slow)
IN_ONE = ('idle', 'queued', 'prefilling', 'decoding', 'finishing')


@pytest.mark.parametrize('mode, stage', [
    *(('2p2d', stage) for stage in AT),
    *(pytest.param(mode, stage, marks=[pytest.mark.deep] * (
        mode != '2chunked')) for mode in (
            '2colocated', '2chunked', CHUNKED_PROCESSES) for stage in IN_ONE),
    *(pytest.param('2p2d, processes', stage, marks=pytest.mark.deep)
      for stage in AT)])
def test_nobody_loses_by_the_loss_of_an_instance(server, stage):
  if stage == 'idle':
    lost = AT[stage](server.state)
    server.kill(lost)
  ids = submit(server, WORK)
  while stage != 'idle' and (lost := AT[stage](server.state)) is None:
    assert server.busy, f'no request was ever {stage}'
    server.poll()
  victims = {seq.id for seq in server.state.seqs.values()
             if seq.instance == lost and seq.stage != 'queued'
             or seq.target == lost and seq.stage == 'migrating'}
  if stage != 'idle':
    server.kill(lost)
    assert not server.engines[lost].slot_of
  drain(server)
  found = outputs(server, ids)
  check_tokens(WORK, found)
  for o in found:
    assert (o.record.retries > 0) == (o.id in victims), o.record
    assert len(o.record.token_s) == len(o.tokens)
    assert sum(o.record.stage_s.values()) == pytest.approx(
        o.record.finish_s - o.record.arrival_s)
  server.restore(lost)
  server.log.clear()
  server.start_state = server.state
  again = play(server, WORK)
  check_tokens(WORK, again)
  assert lost in {i for o in again for i in o.record.instances}


@pytest.mark.parametrize('mode', ('2p2d', DEEP_2COLOCATED, '2chunked',
                                  *DEEP_PROCESSES))
def test_any_instance_may_be_lost_at_any_moment(server, mode):
  """And the same again and again, whatever is in flight."""
  rng = random.Random(mode)
  for _ in range(2 if mode == CHUNKED_PROCESSES else 6):
    ids = submit(server, rng.sample(MIXED, 4))
    work = [server.requests[id].request for id in ids]
    left = 3
    while server.busy:
      server.poll()
      if left and rng.random() < .15:
        left -= 1
        server.kill(rng.randrange(len(server.engines)), back_s=0.01)
    for one, o in zip(work, outputs(server, ids), strict=True):
      assert o.tokens == expected(one.prompt, one.sampling), one
    settle(server)
  assert LOST in kinds(server)


@pytest.mark.parametrize('mode, stop', [
    ('2p2d', False), ('2p2d', True), *(
        pytest.param('2p2d, processes', stop, marks=pytest.mark.deep)
        for stop in (False, True))])
def test_what_was_told_of_a_command_is_not_told_again(server, stop):
  """The instance is lost between two steps of one command."""
  prompt, params = job(8, 12, ignore_eos=True)
  tokens = want((prompt, params))
  if stop:
    assert tokens.index(tokens[1]) == 1
    params = params | {'stop_token_ids': (tokens[1],)}
  with inject(server) as injector:
    for side, config in enumerate(server.fleet.capacities):
      if config.decodes:
        injector.arm(side, 'decode', 'stall')
    id = server.submit(prompt, **params)
    while not any(queue and len(queue[0].times) >= 2
                  for queue in server.fleet.running):
      server.poll()
    lost = server.state.seqs[id].instance
    running = server.fleet.running[lost][0]
    assert running.outputs and bool(server.loop._ended.get(lost)) == stop
    server.kill(lost)
  drain(server)
  found = server.output(id)
  assert found.tokens == (tokens[:2] if stop else tokens)
  assert found.reason == ('stop' if stop else 'length')
  assert found.record.retries == (not stop)
  assert len(found.record.token_s) == len(found.tokens)


@pytest.mark.parametrize('mode', ('2p2d', DEEP_PROCESSES[0]))
def test_a_stream_has_no_gap_and_no_repeat(server):
  prompt, params = MIXED[1]
  params = params | {'logprobs': 2}
  whole = server.generate(prompt, **params)
  pieces, lost = [], []
  for piece in server.stream(prompt, **params):
    pieces.append(piece)
    seq = next(iter(server.state.seqs.values()), None)
    if len(pieces) in (2, 5, 9) and seq and seq.instance >= 0:
      lost.append(seq.instance)
      server.kill(seq.instance, back_s=0.0)
  assert ''.join(pieces) == whole.text and len(lost) == 3
  id = server.submit(prompt, **params)
  while len(server.requests[id].tokens) < 5:
    server.poll()
  server.kill(server.state.seqs[id].instance, back_s=0.0)
  drain(server)
  again = server.output(id)
  assert again.tokens == whole.tokens and again.record.retries == 1
  for (p, top), (q, others) in zip(again.logprobs, whole.logprobs,
                                   strict=True):
    assert p == pytest.approx(q, abs=1e-4)
    assert [i for i, _ in top] == [i for i, _ in others]


# --- a call goes wrong -------------------------------------------------------

# Which event tells of it; None: it does no harm.
TOLD = {('gather', 'raise'): FAILED, ('admit', 'raise'): LOST,
        ('scatter', 'raise'): FAILED, ('scatter', 'damage'): FAILED,
        ('scatter', 'raise after'): FAILED, ('checksum', 'raise'): FAILED,
        (COPY, 'raise'): FAILED, (COPY, 'unreadable'): FAILED}
CALLS = [(method, kind) for method, every in KINDS.items() for kind in every
         if kind != 'stall']


# Those of which a process is lost cost it a start each, and are deep.
QUICK = {('prefill', 'raise'), ('decode', 'twice'),
         ('gather', 'raise'), ('scatter', 'raise'), ('scatter', 'twice'),
         ('scatter', 'damage'), ('checksum', 'raise'), (COPY, 'raise'),
         (COPY, 'unreadable')}


@pytest.mark.parametrize('mode, method, kind', [
    *(('1p1d', *call) for call in CALLS),
    *(pytest.param('1p1d, processes', *call, marks=pytest.mark.slow
                   if call in QUICK else pytest.mark.deep)
      for call in CALLS)])
def test_any_call_may_go_wrong(server, method, kind):
  sides = (0,) if method in ('prefill', 'gather') else (
      0, 1) if method in ('admit', 'checksum') else (1,)
  for side in sides:
    with inject(server) as injector:
      for nth in (1, 3):
        injector.arm(side, method, kind, nth)
      found = play(server, WORK)
      check_tokens(WORK, found)
      assert injector.fired == [(side, method, kind)] * 2
    settle(server)
  told = kinds(server) & {LOST, FAILED}
  if kind == 'twice':
    assert not told
  else:
    wanted = TOLD.get((method, kind), LOST)
    assert wanted in told
    assert len(server.faults) >= 2


@pytest.mark.parametrize('mode, kind', [
    *(pytest.param(mode, kind, marks=[pytest.mark.deep] * (mode != '2chunked'))
      for mode in ('2chunked', '2colocated', CHUNKED_PROCESSES)
      for kind in ('raise after', 'delete', 'unreadable'))])
def test_a_step_of_mixed_work_may_go_wrong(server, kind):
  with inject(server) as injector:
    for side in (0, 1):
      injector.arm(side, 'prefill', kind, 2)
      injector.arm(side, 'decode', kind, 4)
    check_tokens(WORK, play(server, WORK, between=3))
    assert len(injector.fired) >= 2
  settle(server)
  assert LOST in kinds(server)


@pytest.mark.parametrize('mode', ('2p2d', DEEP_PROCESSES[1]))
def test_a_stalled_copy_gives_its_pages_back(server, monkeypatch):
  """It comes in the end, and writes nothing."""
  monkeypatch.setattr(server.fleet, 'config', dataclasses.replace(
      CONFIG, lease_s=0.3))
  with inject(server) as injector:
    for side in (2, 3):
      injector.arm(side, COPY, 'stall')
    check_tokens(WORK, play(server, WORK))
    assert len(injector.fired) == 2
    assert Timer in kinds(server)
    injector.released = True
    check_tokens(WORK, play(server, WORK))
  moves = [c for _, commands in server.log for c in commands]
  assert sum(isinstance(c, Abort) for c in moves) >= 2


@pytest.mark.parametrize('mode', ('2p2d', DEEP_PROCESSES[1]))
def test_a_copy_to_an_instance_that_was_lost_never_lands(server):
  """Its pages are somebody else's by then."""
  with inject(server) as injector:
    injector.arm(2, COPY, 'stall')
    ids = submit(server, WORK)
    while not injector.fired:
      server.poll()
    late = [t for t in server.fleet.transfers
            if t.command.target == 2 and not t.landed]
    server.kill(2, back_s=0.0)
    injector.released = True
    drain(server)
  check_tokens(WORK, outputs(server, ids))
  assert late and not any(t.landed for t in late)


@pytest.mark.parametrize('mode', ('2p2d', DEEP_2COLOCATED, SLOW_PROCESSES))
def test_a_stalled_step_loses_its_instance(server, monkeypatch):
  monkeypatch.setattr(server.fleet, 'config', dataclasses.replace(
      CONFIG, stall_s=1.0))
  last = len(server.engines) - 1
  with inject(server) as injector:
    injector.arm(last, 'decode', 'stall', 3)
    check_tokens(WORK, play(server, WORK))
    assert injector.fired and LOST in kinds(server)
    injector.released = True
    check_tokens(WORK, play(server, WORK))
  assert any('no step for' in text for _, text in server.faults)


@pytest.mark.parametrize('mode', ('1p1d', SLOW_PROCESSES))
def test_what_is_damaged_never_decodes(server):
  """Nor does it without a fault elsewhere: only the copy is done again."""
  with inject(server) as injector:
    injector.arm(1, 'scatter', 'damage')
    found = play(server, WORK)
    check_tokens(WORK, found)
  assert 'KV checksum' in server.faults[-1][1]
  assert LOST not in kinds(server)
  assert sum(o.record.retries for o in found) == 1


def test_damage_goes_unseen_without_checksums():
  """So the test above sees something."""
  with server_of('1p1d', CONFIG) as server, inject(server) as injector:
    injector.arm(1, 'scatter', 'damage')
    found = play(server, WORK)
  assert any(o.tokens != want(one) for o, one in zip(found, WORK,
                                                     strict=True))


@pytest.mark.parametrize('mode', ('2p2d', DEEP_PROCESSES[1]))
def test_a_completion_told_twice_or_late_changes_nothing(server):
  """Each is told once more, when four others have come."""
  ids, looked, ours = submit(server, WORK), 0, set()
  again = collections.Counter()
  while server.busy:
    while looked < len(server.log) - 5:
      event, _ = server.log[looked]
      if looked not in ours and not isinstance(event, Arrived | LOST
                                               | InstanceUp):
        ours.add(len(server.log))
        again[type(event)] += 1
        server.loop.event(event)
      looked += 1
    server.poll()
    if len(again) >= 3 and LOST not in kinds(server):
      server.kill(2, back_s=0.0)
  check_tokens(WORK, outputs(server, ids))
  assert LOST in kinds(server) and again.total() >= 20


# --- where nobody else can serve ---------------------------------------------


def test_more_faults_than_tries_end_a_request_and_no_other():
  config = dataclasses.replace(CONFIG, tries=2)
  with server_of('1p1d', config) as server, inject(server) as injector:
    ids = submit(server, WORK)
    injector.arm(1, COPY, 'raise', when=lambda c, _: c.id == ids[1])
    drain(server)
    assert len(injector.fired) == 3
    found = outputs(server, ids)
    check_tokens(WORK[:1] + WORK[2:], found[:1] + found[2:])
    failed = found[1]
    assert failed.reason == failed.record.status == 'failed'
    assert failed.record.reason == (
        'given up after 3 faults; the last: its hand-off failed: copy of '
        'instance 1 raises')
    assert failed.tokens == want(WORK[1])[:1]
    assert failed.record.retries == 2
    injector.disarm()
    injector.arm(1, COPY, 'raise', when=lambda c, _: True)
    with pytest.raises(dsjax.RequestFailed, match='given up after 3 faults'):
      server.generate(*WORK[1][:1], **WORK[1][1])
    with pytest.raises(dsjax.RequestFailed, match='given up after 3 faults'):
      list(server.stream(*WORK[1][:1], **WORK[1][1]))
    check_tidy(server)


def test_an_instance_that_keeps_failing_is_given_up():
  config = dataclasses.replace(CONFIG, restarts=2)
  with server_of('1p1d', config) as server, inject(server) as injector:
    injector.arm(1, 'decode', 'raise', when=lambda c: True)
    work = (*WORK, job(30, 1))
    ids = submit(server, work)
    drain(server)
    assert len(injector.fired) == 3
    for one, o in zip(work, outputs(server, ids), strict=True):
      if len(want(one)) == 1:
        assert o.tokens == want(one)
      else:
        assert o.reason == 'failed'
        assert 'no decode instance is left' in o.record.reason
        assert o.tokens == want(one)[:len(o.tokens)] and len(o.tokens) >= 1
    assert server.fleet.down == {1: None}
    server.kill(0)
    with pytest.raises(dsjax.RequestFailed, match='no prefill instance'):
      server.submit([3, 4], max_tokens=4)
    injector.disarm()
    for i in (0, 1):
      server.restore(i)
    check_tokens(WORK, play(server, WORK))


def test_an_instance_that_works_in_between_is_never_given_up():
  config = dataclasses.replace(CONFIG, restarts=1)
  with server_of('1p1d', config) as server, inject(server) as injector:
    for _ in range(4):
      injector.arm(1, 'decode', 'unreadable', 6)
      check_tokens(WORK, play(server, WORK))
    assert len(injector.fired) == 4
    while server.fleet.down:
      server.poll()


@pytest.mark.parametrize('mode', ('1p1d', SLOW_PROCESSES))
def test_who_needs_a_lost_instance_waits_for_it(server):
  server.kill(1, back_s=0.2)
  ids = submit(server, WORK)
  began = server.now
  drain(server)
  check_tokens(WORK, outputs(server, ids))
  assert server.now - began > 0.15


def test_an_instance_that_cannot_start_is_tried_again_and_given_up(
    monkeypatch):
  config = dataclasses.replace(CONFIG, restarts=3)
  with server_of('2chunked', config) as server:
    starts, start = [], server.engines[0].start

    def refuse(*_):
      starts.append(server.now)
      if len(starts) < 3:
        raise Injected('no memory')
      return start()
    monkeypatch.setattr(server.engines[0], 'start', refuse)
    server.kill(0, back_s=0.0)
    check_tokens(WORK, play(server, WORK))
    while server.fleet.down:
      server.poll()
    assert len(starts) == 3 and server.state.instances[0].status == 'up'
    starts.clear()
    server.kill(0)
    with pytest.raises(RuntimeError, match='no memory'):
      server.restore(0)
    check_tokens(WORK, play(server, WORK))
    check_tidy(server)


# --- drain, cancel, close ----------------------------------------------------


@pytest.mark.parametrize('mode', ('2p2d', DEEP_2COLOCATED,
                                  *DEEP_PROCESSES))
def test_a_drained_instance_ends_what_it_has_and_takes_no_more(server):
  last = len(server.engines) - 1
  ids = submit(server, WORK)
  while not server.state.instances[last].rows:
    server.poll()
  server.drain(last)
  elsewhere = {s.id for s in server.state.seqs.values()
               if last not in (s.instance, s.target)}  # and not ended
  drain(server)
  answers = outputs(server, ids)
  check_tokens(WORK, answers)
  assert not any(last in a.record.instances for a in answers
                 if a.id in elsewhere)
  assert not any(a.record.retries for a in answers)
  later = play(server, WORK)
  assert all(last not in o.record.instances for o in later)
  server.restore(last)
  assert any(last in o.record.instances for o in play(server, WORK))


@pytest.mark.parametrize('seed', range(2))
@pytest.mark.parametrize('mode', ('2p2d', DEEP_2COLOCATED, '2chunked',
                                  *DEEP_PROCESSES))
def test_faults_cancels_and_arrivals_in_any_order(server, mode, seed):
  rng = random.Random(f'{mode}{seed}')
  work = [rng.choice(MIXED + LONG) for _ in range(16)]
  methods = [m for m in KINDS if (m, mode[:2]) != ('checksum', '2p')
             and m != 'checksum']
  with inject(server) as injector:
    ids, left = [], list(work)
    while left or server.busy:
      if left and rng.random() < .3:
        prompt, params = left.pop(0)
        ids.append(server.submit(prompt, **params))
      disturb(server, injector, rng, methods, ids)
      server.poll()
      if len(ids) == 8 and LOST not in kinds(server):
        server.kill(rng.randrange(len(server.engines)), back_s=0.0)
    check_survivors(server, ids, work)
  settle(server)
  trace = timeline.timeline(server.log)['traceEvents']
  assert {e['name'] for e in trace if e.get('cat') == 'fault'} >= {
      'lost', 'there again'}


def disturb(server, injector, rng, methods, ids):
  """Perhaps does something to a server."""
  draw, one = rng.random(), rng.randrange(len(server.engines))
  if draw < .01 and ids:
    server.cancel(rng.choice(ids))
  elif draw < .02:
    server.kill(one, back_s=rng.choice((0.0, 0.02)))
  elif draw < .03:
    server.drain(one)
  elif draw < .05:
    with contextlib.suppress(RuntimeError):  # a process may be lost at once
      server.restore(one)
  elif draw < .08:
    method = rng.choice(methods)
    kind = rng.choice([k for k in KINDS[method] if k not in (
        'stall', 'damage')])
    injector.arm(one, method, kind, rng.randint(1, 3))


def test_closing_does_not_wait_for_what_is_lost_or_stuck():
  config = dataclasses.replace(CONFIG, lease_s=0.2)
  with server_of('2p2d', config) as server, inject(server) as injector:
    for side in (2, 3):
      injector.arm(side, COPY, 'stall')
      injector.arm(side, 'decode', 'stall')
    submit(server, WORK)
    while len(injector.fired) < 4:
      server.poll()
    server.kill(0)
    began = server.now
  check_tidy(server)
  assert server.now - began < 10 < server.config.stall_s
  assert {r.status for r in server.records} <= {'cancelled', 'stop', 'length'}


# --- what holds all the while ------------------------------------------------


def test_a_lost_instance_lets_its_memory_go():
  with server_of('2chunked', CONFIG) as server:
    one = server.engines[0]
    held = jax.tree.leaves([(s.cache, s.slots) for s in one.stages])
    pages = sum(x.nbytes for x in held)
    del held
    before = sum(x.nbytes for x in jax.live_arrays())
    server.kill(0)
    after = sum(x.nbytes for x in jax.live_arrays())
    assert before - after >= pages
    server.restore(0)
    assert sum(x.nbytes for x in jax.live_arrays()) == pytest.approx(
        before, rel=0.01)


def test_nobody_is_stuck_for_as_long_as_nobody_looked(monkeypatch):
  """A server that was stopped for an hour loses no instance and no hand-off; a
  step that does not come while it looks does."""
  config = dataclasses.replace(CONFIG, stall_s=5.0, restart_s=60.0)
  away_s = [0.0]
  for module in (fleet, fake_engine):
    monkeypatch.setattr(module, 'time', types.SimpleNamespace(
        perf_counter=lambda: time.perf_counter() + away_s[0]))
  with serving.fake_server_of('1p1d', config) as server:
    with monkeypatch.context() as patch:
      patch.setattr(fake_engine.FakeTransfer, 'has_arrived', lambda _: False)
      id = server.submit([3, 4], max_tokens=4)
      until(lambda: server.fleet.transfers, server)
      for _ in range(3):
        away_s[0] += 3600
        server.loop.origin -= 3600
        server.poll()
        assert server.fleet.transfers
      away_s[0] += config.lease_s + 1  # while it looks
      server.poll()
      assert Timer in kinds(server)
    until(lambda: not server.busy, server)
    assert server.output(id).record.retries == 1 and not server.fleet.down
    server.fleet.faults.clear()
    for engine in server.engines:
      engine.pace.left = 0
    server.submit([3, 4], max_tokens=4)
    server.poll()
    for _ in range(3):
      server.loop.origin -= 3600  # of its clock: it is later by so much
      server.poll()
      assert not server.faults
    looks = 0
    while not server.faults:
      server.loop.origin -= 0.9
      server.poll()
      looks += 1
    assert looks <= 6 and 'no step for' in server.faults[0][1]
    for engine in server.engines:
      engine.pace.left = None


@pytest.mark.parametrize('field, value, message', (
    ('tries', -1, 'EngineConfig.tries=-1: must be an integer of 0'),
    ('restarts', 1.5, 'EngineConfig.restarts=1.5'),
    ('lease_s', 0, 'EngineConfig.lease_s=0: must be seconds above 0'),
    ('stall_s', float('nan'), 'EngineConfig.stall_s=nan'),
    ('restart_s', -1, 'EngineConfig.restart_s=-1: must be seconds, 0 or')))
def test_bad_limits_are_refused(field, value, message):
  with pytest.raises(InputError, match=message):
    dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize('mode', ('2chunked',))
def test_bad_instances_are_refused(server):
  for call in (server.kill, server.drain, server.restore):
    for instance in (-1, 2, 'a', None):
      with pytest.raises(InputError, match='instance=.*: must be 0 to 1'):
        call(instance)
  for back_s in (-1, 'x', float('nan'), [1], True):
    with pytest.raises(InputError, match='back_s='):
      server.kill(0, back_s=back_s)
