"""Interrupts and errors at any point: the server is whole and serves on.

A Ctrl-C is raised at every line that the client's thread runs, and every call
that the server's thread makes to an engine, a hook or an observer raises in
turn. On fake engines, but for the last test.
"""

import dataclasses
import functools
import gc
import itertools
import random
import signal
import sys
import threading

import jax
import pytest

from dsjax.config.checks import InputError
from dsjax.config.request import Request, Sampling
from dsjax.runtime.loop import MOST_ASKED
from dsjax.runtime.output import Interrupted, RequestFailed
from dsjax.scheduling.events import Finish
from dsjax.scheduling.policy import DISTSERVE, PolicyError
from tests.common import fake_engine, serving, tiny
from tests.common.serving import PAGES_4, drain, job

pytestmark = pytest.mark.usefixtures('no_hang')
CONFIG = dataclasses.replace(PAGES_4, tries=50, restarts=50, restart_s=0.0)
server_of = functools.partial(serving.fake_server_of, config=CONFIG)
PROMPT, PARAMS = job(6, 5, ignore_eos=True)


def greedy(prompt, count=5):
  return serving.expected_of_fakes(
      prompt, Sampling(max_tokens=count, ignore_eos=True))


def serves_on(server, oracle=greedy):
  """Nothing is left of what went wrong, and the next request is served."""
  drain(server, faulty=True)
  assert not server.requests
  output = server.generate(tiny.prompt(9), max_tokens=5, ignore_eos=True)
  assert output.tokens == oracle(tiny.prompt(9), 5)
  drain(server, faulty=True)


def tidy_up(server):
  """Takes what `run` and `submit` leave to their clients."""
  for id in server.call(lambda: list(server.requests)):
    server.cancel(id)
    server.output(id)


def run(server):
  return server.run([Request(server.next_id + i, 0.0, PROMPT, Sampling(
      **PARAMS)) for i in range(2)])


CALLS = {
    'generate': lambda server: server.generate(PROMPT, **PARAMS),
    'stream': lambda server: list(server.stream(PROMPT, **PARAMS)),
    'generate_all': lambda server: server.generate_all(
        [PROMPT, tiny.prompt(9)], **PARAMS),
    'run': run,
    'submit': lambda server: server.submit(PROMPT, **PARAMS)}


# --- in the client's thread --------------------------------------------------


class Stop(BaseException):
  """What no `except Exception` stops."""


def at_line(count, call, folder='/dsjax/runtime/'):
  """Calls it, and raises Stop at the line of this number that it runs in a
  folder of the library; whether there was one."""
  left = [count]

  def trace(frame, event, _):
    if folder not in frame.f_code.co_filename:
      return None
    if event == 'line' and left[0] >= 0:
      left[0] -= 1
      if left[0] < 0:
        raise Stop
    return trace

  before = sys.gettrace()
  sys.settrace(trace)
  try:
    call()
  except Stop:
    return True
  finally:
    sys.settrace(before)
  return False


@pytest.mark.parametrize('name', CALLS)
def test_an_interrupt_at_any_line_of_a_client(name):
  statuses, stopped = set(), True
  for count in range(1000):
    with server_of('1p1d') as server:
      stopped = at_line(count, lambda: CALLS[name](server))
      left = server.call(lambda: list(server.requests.values()))
      assert not (stopped and left) or name == 'run'
      assert all(state.finished for state in left) or not stopped
      tidy_up(server)
      statuses |= {r.status for r in server.records}
      serves_on(server)
    if not stopped:
      break
  assert count > 20 and 'cancelled' in statuses


@pytest.mark.parametrize('name', CALLS)
def test_ctrl_c_at_random_moments(name):
  rng, interrupted = random.Random(name), 0
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with server_of('1p1d') as server:
      for _ in range(20):
        timer = threading.Timer(
            rng.uniform(0, 0.01), signal.pthread_kill,
            (threading.main_thread().ident, signal.SIGINT))
        try:
          timer.start()
          while True:  # until it comes
            CALLS[name](server)
            tidy_up(server)
        except KeyboardInterrupt:
          interrupted += 1
        timer.join()
        tidy_up(server)
        serves_on(server)
  finally:
    signal.signal(signal.SIGINT, before)
  assert interrupted == 20


# --- in the server's thread --------------------------------------------------


def raise_at(owner, name, count, error, monkeypatch):
  """The call of this number raises, before or after it is done; a list that
  says whether it has."""
  call, calls, raised = getattr(owner, name), itertools.count(), []

  def wrapped(*args, **kwargs):
    number = next(calls)
    if number == count:
      raised.append(name)
      if count % 2:
        call(*args, **kwargs)
      raise error
    return call(*args, **kwargs)
  monkeypatch.setattr(owner, name, wrapped)
  return raised


ENGINE = [(fake_engine.FakeEngine, name) for name in (
    'prefill', 'decode', 'admit', 'forget', 'is_sound')]
COPY = [(fake_engine.FakeRoute, 'start'), *(
    (fake_engine.FakeTransfer, name) for name in (
        'has_arrived', 'land', 'is_ready'))]


@pytest.mark.parametrize('error', (KeyboardInterrupt, SystemExit, OSError))
@pytest.mark.parametrize('owner, name', [
    *ENGINE, *COPY, (fake_engine.Late, 'is_ready')])
def test_any_call_of_an_engine_may_raise_anything(
    owner, name, error, monkeypatch):
  for count in range(6):
    with monkeypatch.context() as patch, server_of('2p2d') as server:
      raised = raise_at(owner, name, count, error('here'), patch)
      try:
        outputs = server.generate_all([PROMPT] * 3, **PARAMS)
      except (KeyboardInterrupt, SystemExit):
        assert raised and error is not OSError
      else:
        assert not raised or error is OSError or name == 'is_sound'
        assert [o.tokens for o in outputs] == [greedy(PROMPT)] * 3
      patch.undo()
      serves_on(server)


@pytest.mark.parametrize('error', (KeyboardInterrupt, SystemExit))
@pytest.mark.parametrize('hook', ('route', 'batch', 'hand_off', 'admit',
                                  'order', 'victim'))
def test_a_hook_that_raises_what_is_no_exception_is_asked_again(hook, error):
  for count in range(3):
    calls = itertools.count()

    def raises(*args, calls=calls, count=count):
      if next(calls) == count:
        raise error('here')
      good = getattr(DISTSERVE, hook)
      return good(*args) if good else args[-1]

    policy = dataclasses.replace(DISTSERVE, **{hook: raises})
    with server_of('2p2d', policy=policy) as server:
      work = [tiny.prompt(30, i) for i in range(6)]
      try:
        server.generate_all(work, max_tokens=30, ignore_eos=True)
      except error as seen:
        assert str(seen) == 'here' or error is KeyboardInterrupt
      assert next(calls) > count
      serves_on(server)


@pytest.mark.parametrize('name', CALLS)
@pytest.mark.parametrize('error', (KeyError, KeyboardInterrupt, SystemExit))
def test_an_observer_may_raise_at_any_event(name, error):
  for count in itertools.count():
    with server_of('1p1d') as server:
      heard, others = [], []

      def observe(event, _, heard=heard, count=count):
        heard.append(event)
        if len(heard) == count + 1:
          raise error('observer')
      server.observers += [observe, lambda event, _, others=others: (
          others.append(event))]
      try:
        CALLS[name](server)
        tidy_up(server)
        drain(server)
      except error:
        pass
      assert heard == others  # everybody hears it all the same
      server.observers.clear()
      tidy_up(server)
      serves_on(server)
    if len(heard) <= count:
      break


@pytest.mark.parametrize('error', (ValueError, KeyboardInterrupt, SystemExit))
@pytest.mark.parametrize('name', CALLS)
def test_what_observers_raise_while_a_call_ends_is_not_told_later(name, error):
  def observe(event, _):
    raise error('observer')
  with server_of('1p1d') as server:
    server.observers.append(observe)
    with pytest.raises(error):
      CALLS[name](server)
    server.call(server.observers.clear)
    assert server.generate(PROMPT, **PARAMS).tokens == greedy(PROMPT)
    # Refused, by the scheduler and so not before an observer has heard it.
    server.observers.append(observe)
    with pytest.raises(InputError):
      server.submit(tiny.prompt(60), max_tokens=1000)
    server.call(server.observers.clear)
    serves_on(server)


def test_an_observer_that_always_waits_for_its_server_is_refused():
  errors = []
  with server_of('1p1d') as server:
    def asks(event, _):
      for name in ('generate', 'stream', 'generate_all', 'run'):
        with pytest.raises(RuntimeError, match='cannot wait') as refused:
          CALLS[name](server)
        errors.append(refused)
    server.observers.append(asks)
    assert server.generate(PROMPT, **PARAMS).tokens == greedy(PROMPT)
    drain(server)
    server.observers.clear()
    assert errors and len(server.records) == 1
    serves_on(server)


def test_a_list_of_observers_may_be_replaced():
  heard = []
  with server_of('1p1d') as server:
    server.observers.append(None)
    server.observers = (lambda event, _: heard.append(event),)
    serves_on(server)
  assert heard == [event for event, _ in server.log]


def test_what_an_observer_asks_for_comes_after_what_it_hears(monkeypatch):
  performed, asked = [], []
  with server_of('2colocated') as server:
    def perform(command, real=server.fleet.perform):
      performed.append(command)
      return real(command)
    monkeypatch.setattr(server.fleet, 'perform', perform)

    def asks(event, _):
      server.observers.clear()
      asked.append(server.submit(PROMPT, **PARAMS))
      server.cancel(0)
      with pytest.raises(RuntimeError, match='cannot wait for its own server'):
        server.generate(PROMPT, **PARAMS)
    server.observers.append(asks)
    assert server.generate(PROMPT, **PARAMS).reason == 'cancelled'
    drain(server)
    assert server.output(asked[0]).tokens == greedy(PROMPT)
    assert [type(event).__name__ for event, _ in server.log][:3] == [
        'Arrived', 'Arrived', 'Cancelled']
    # Another instance's, and after all commands of the first event.
    assert {c.instance for c in performed} == {0, 1}
    assert performed == [c for _, commands in server.log for c in commands
                         if not isinstance(c, Finish)]
    serves_on(server)


def test_what_on_poll_raises_cancels_the_workload():
  def stop():
    raise Stop
  with server_of('1p1d') as server:
    work = [Request(i, float(i), PROMPT, Sampling(**PARAMS))
            for i in range(3)]
    with pytest.raises(Stop):
      server.run(work, on_poll=stop)
    assert [r.status for r in server.records] == ['cancelled']
    serves_on(server)


def test_a_stop_or_a_start_that_raises_loses_no_request(monkeypatch):
  for name in ('stop', 'start'):
    with monkeypatch.context() as patch, server_of('2p2d') as server:
      ids = [server.submit(PROMPT, **PARAMS) for _ in range(4)]
      raised = raise_at(server.engines[0], name, 0, SystemExit(name), patch)
      with pytest.raises(SystemExit):
        server.kill(0, back_s=0.0)
        while True:
          server.poll()
      assert raised
      drain(server, faulty=True)
      assert [server.output(id).tokens for id in ids] == [greedy(PROMPT)] * 4
      serves_on(server)


# --- a hook that does not answer ---------------------------------------------


def test_a_hook_that_never_answers_is_an_error_and_no_hang():
  go = threading.Event()

  def waits(view, request):
    go.wait()
    return DISTSERVE.route(view, request)
  server = server_of(
      '1p1d', config=dataclasses.replace(CONFIG, stall_s=0.2),
      policy=dataclasses.replace(DISTSERVE, name='waits', route=waits))
  for name in ('generate', 'stream', 'run'):
    with pytest.raises(PolicyError, match="policy 'waits': no answer for"):
      CALLS[name](server)
  with pytest.raises(PolicyError, match='no answer'):
    server.close()
  assert server.closed
  with pytest.raises(InputError, match='server='):
    server.generate(PROMPT)
  go.set()
  server.thread.join()


def test_an_engine_that_never_returns_is_an_error_and_no_hang(monkeypatch):
  go = threading.Event()
  config = dataclasses.replace(CONFIG, stall_s=0.2)
  with server_of('1p1d', config=config) as server:
    prefill = server.engines[0].prefill
    monkeypatch.setattr(server.engines[0], 'prefill',
                        lambda command: go.wait() and prefill(command))
    with pytest.raises(RuntimeError, match='the server is stuck: no answer'):
      server.generate(PROMPT, **PARAMS)
    go.set()
    serves_on(server)


def test_a_dropped_server_ends_its_thread():
  gc.freeze()  # what other tests have left is not looked through
  server = server_of('1p1d')
  server.generate(PROMPT, **PARAMS)
  thread = server.thread
  del server
  gc.collect()
  thread.join(60)
  assert not thread.is_alive()


# --- on the tiny model -------------------------------------------------------


@pytest.mark.parametrize('interrupts', [
    30, pytest.param(300, marks=pytest.mark.deep)])
def test_interrupts_on_a_real_engine(monkeypatch, interrupts):
  rng, interrupted, dropped = random.Random(0), 0, []
  work, params = [PROMPT, tiny.prompt(9)], {
      'max_tokens': 8, 'ignore_eos': True}
  tokens = [serving.greedy(prompt, 8) for prompt in work]
  calls = (
      lambda server: [server.generate(work[0], **params).tokens] == tokens[:1],
      lambda server: ''.join(server.stream(work[1], **params)) == (
          serving.Letters().decode(tokens[1])),
      lambda server: [output.tokens for output in server.generate_all(
          work, **params)] == tokens)
  # Python drops one that comes while it collects garbage.
  monkeypatch.setattr(sys, 'unraisablehook', dropped.append)
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with serving.server_of('1p1d', PAGES_4) as server:
      assert all(call(server) for call in calls)
      arrays, threads = len(jax.live_arrays()), threading.active_count()
      for count in range(interrupts):
        timer = threading.Timer(
            rng.uniform(0, 0.02), signal.pthread_kill,
            (threading.main_thread().ident, signal.SIGINT))
        try:
          timer.start()
          while timer.is_alive():
            assert calls[count % 3](server), 'wrong tokens'
          timer.join()
        except Interrupted as error:
          interrupted += 1
          for output, whole in zip(error.outputs, tokens, strict=False):
            assert output.tokens == whole[:len(output.tokens)]
        except KeyboardInterrupt:
          interrupted += 1
        timer.join()
        drain(server)
        assert not server.requests and not server.faults
      assert interrupted + len(dropped) == interrupts
      assert all(call(server) for call in calls)
      gc.collect()
      assert len(jax.live_arrays()) <= arrays
      assert threading.active_count() <= threads
  finally:
    signal.signal(signal.SIGINT, before)
  assert all(isinstance(lost.exc_value, KeyboardInterrupt) for lost in dropped)


def test_a_failed_request_says_what_came_of_it():
  config = dataclasses.replace(CONFIG, restarts=0)
  with server_of('1p1d', config=config) as server:
    server.engines[1].pace.left = 2
    stream = server.stream(PROMPT, max_tokens=20, ignore_eos=True)
    next(stream)
    server.engines[1].pace.left = None
    server.kill(1)
    with pytest.raises(RequestFailed, match='no decode instance') as failed:
      list(stream)
    output, = failed.value.outputs
    assert output.tokens == greedy(PROMPT, 20)[:len(output.tokens)] != ()


FLOODS = {
    'submit': lambda server: server.submit(PROMPT, **PARAMS),
    'drain': lambda server: server.drain(1),
    'restore': lambda server: server.restore(0),
    'poll': lambda server: server.poll(),
    'kill': lambda server: server.kill(1, back_s=0.0)}


@pytest.mark.parametrize('name', FLOODS)
def test_an_observer_that_asks_at_every_event_does_not_stop_the_server(name):
  with server_of('2colocated') as server:
    server.observers.append(lambda event, _: FLOODS[name](server))
    output = server.generate(PROMPT, **PARAMS)
    assert output.tokens == greedy(PROMPT)
    server.call(server.observers.clear)
    drain(server, faulty=True)
    tidy_up(server)
    server.restore(1)
    serves_on(server)


def test_an_observer_that_asks_for_two_at_every_event_is_refused():
  def asks(event, _):
    server.cancel(server.submit(PROMPT, **PARAMS))
  with server_of('2colocated') as server:
    server.observers.append(asks)
    with pytest.raises(RuntimeError, match='may not ask for more'):
      for _ in range(100):
        server.generate(PROMPT, **PARAMS)
    server.call(server.observers.clear)
    drain(server)
    tidy_up(server)
    serves_on(server)


def test_an_observer_that_catches_it_is_bounded_too():
  refused = []

  def asks(event, _):
    try:
      for _ in range(3):
        server.submit(PROMPT, **PARAMS)
    except RuntimeError as error:
      refused.append(str(error))
  with server_of('2colocated') as server:
    server.observers.append(asks)
    server.submit(PROMPT, **PARAMS)
    for _ in range(10):
      server.poll()
    server.call(server.observers.clear)
    assert len(server.call(lambda: list(server.requests))) <= 11 * MOST_ASKED
    assert 'may not ask for more' in refused[0]
    tidy_up(server)
    serves_on(server)
