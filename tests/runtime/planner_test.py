"""A policy whose roles are searched for beside the serving loop."""

import dataclasses
import logging
import pickle
from concurrent.futures import Executor, Future

import pytest

from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.policies.named import named
from dsjax.runtime.planner import check_planner, planner_process
from dsjax.scheduling import event_log, planning
from dsjax.scheduling.events import Flip, Tick
from dsjax.scheduling.policy import DISTSERVE, Policy, PolicyError
from dsjax.simulation.latency import Link
from experiments.common import policies
from tests.common import serving

pytestmark = pytest.mark.usefixtures('no_hang')
PROMPTS = [[5] * n for n in (3, 9, 6, 12, 4, 7)]


class Held(Executor):
  """Questions wait until they are answered by hand."""

  def __init__(self):
    self.asked = []

  def submit(self, function, /, *args):
    self.asked.append((function, args, Future()))
    return self.asked[-1][2]

  def answer(self):
    """Answers the newest question, as another process would: from copies."""
    function, args, future = self.asked[-1]
    config, state, time_s = args
    assert pickle.loads(pickle.dumps(state)) == state
    try:
      future.set_result(function(config, state, time_s))
    except PolicyError as error:
      future.set_exception(error)


def swap(view):
  """At the start, and then each to what the other does."""
  if view.time_s == 0:
    return {0: 'prefill', 1: 'decode'}
  return {0: view.instances[1].role, 1: view.instances[0].role}


def server_of(planner, resize=swap):
  return serving.fake_server_of(
      '2flexible', planner=planner, policy=dataclasses.replace(
          DISTSERVE, name='swap', tick_s=1e-6, resize=resize))


def flips(server):
  return [command for _, commands in server.log for command in commands
          if isinstance(command, Flip)]


def ticks(server):
  return [event for event, _ in server.log if isinstance(event, Tick)]


def test_the_loop_goes_on_while_an_answer_is_searched_for():
  held = Held()
  with server_of(held) as server:
    outputs = server.generate_all(PROMPTS, max_tokens=6, ignore_eos=True)
    assert [len(output.tokens) for output in outputs] == [6] * len(PROMPTS)
    assert len(held.asked) == 1  # one question at a time
    assert len(flips(server)) == 2  # the start is asked in the loop
    assert ticks(server)[0] == Tick(0.0)
    assert {tick.roles for tick in ticks(server)[1:]} == {()}


def test_an_answer_enters_with_a_tick_and_the_log_replays():
  held = Held()
  with server_of(held) as server:
    server.generate_all(PROMPTS, max_tokens=4, ignore_eos=True)
    held.answer()
    server.generate_all(PROMPTS, max_tokens=4, ignore_eos=True)
    assert ((0, 'decode'), (1, 'prefill')) in {
        tick.roles for tick in ticks(server)}
    assert [flip.role for flip in flips(server)] == [
        'prefill', 'decode', 'decode', 'prefill']
    assert len(held.asked) == 2
    # Whoever replays has no planner, and asks nobody.
    nobody = dataclasses.replace(
        server.scheduler_config, policy=dataclasses.replace(
            server.scheduler_config.policy, resize=lambda view: {0: (
                'prefill'), 1: 'decode'}))
    log = event_log.decode(event_log.encode(tuple(server.log)))
    assert event_log.replay(nobody, log) is None


@pytest.mark.parametrize('resize', [
    lambda view: {} if view.time_s == 0 else {0: 'sleep'},
    lambda view: {} if view.time_s == 0 else 1 / 0])
def test_a_planner_that_fails_is_told_once_and_roles_stay(resize, caplog):
  held = Held()
  with server_of(held, resize) as server:
    with caplog.at_level(logging.ERROR, 'dsjax'):
      server.generate_all(PROMPTS, max_tokens=4, ignore_eos=True)
      held.answer()
      server.generate_all(PROMPTS, max_tokens=4, ignore_eos=True)
    told = [r for r in caplog.records if 'planner failed' in r.message]
    assert len(told) == 1 and 'resize' in told[0].message
    assert not server.closed and not flips(server)


def test_without_a_planner_the_policy_is_asked_in_the_loop():
  with server_of(None) as server:
    server.generate_all(PROMPTS, max_tokens=4, ignore_eos=True)
    assert {tick.roles for tick in ticks(server)} == {None}
    assert len(flips(server)) > 4


def test_a_question_travels_with_a_shipped_policy():
  """What a planner_process is sent, and what it answers from."""
  slo = Slo(0.2, 0.022)
  with serving.fake_server_of('2flexible', policy=policies.load(
      'static:prefills=1', slo)) as server:
    server.generate_all(PROMPTS, max_tokens=4, ignore_eos=True)
    question = pickle.loads(pickle.dumps(
        (server.scheduler_config, server.state)))
    assert planning.roles_of(*question, 3.0) == ()
    config = dataclasses.replace(question[0], policy=named(
        'colocated', slo))
    assert planning.roles_of(config, question[1], 3.0) == (
        (0, 'colocated'), (1, 'colocated'))


@pytest.mark.parametrize('shut', ['asked', 'between', 'before'])
def test_an_executor_that_is_shut_down_ends_no_serving(shut, caplog):
  """Its answer is cancelled, or it takes no question any more."""
  planner = Held()

  def refuse(function, /, *args):
    raise RuntimeError('cannot schedule new futures after shutdown')

  if shut == 'before':
    planner.submit = refuse
  with server_of(planner) as server:
    ids = [server.submit(prompt, max_tokens=8) for prompt in PROMPTS]
    while shut != 'before' and not planner.asked:
      server.poll()
    if shut == 'asked':
      assert planner.asked[-1][2].cancel()
    elif shut == 'between':
      planner.submit = refuse
      planner.answer()
    serving.drain(server)
    assert {server.output(id).reason for id in ids} <= {'stop', 'length'}
  assert caplog.text.count('the planner failed') == 1


@pytest.mark.parametrize('text', [
    'adaptive', 'adaptive:rejects=True', 'replan', 'planner',
    'static:prefills=2+deadlines', 'distserve+deadlines', 'distserve'])
def test_a_shipped_policy_may_be_sent_to_a_process(text):
  slo = Slo(0.3, 0.03)
  policy = named(text, slo)
  again = pickle.loads(pickle.dumps(policy))
  assert isinstance(again, Policy) and again.name == policy.name
  if policy is DISTSERVE:
    return
  assert again.again == policy.again == (named, text, slo)
  changed = dataclasses.replace(policy, tick_s=9.0, resize=swap)
  if 'adaptive' in text or '+' in text:  # it has functions within functions
    with pytest.raises(Exception, match='pickle'):
      pickle.dumps(changed)
  else:
    hooks = {f.name: getattr(DISTSERVE, f.name)
             for f in dataclasses.fields(Policy)}
    hooks |= dict(resize=swap, tick_s=9.0)
    whole = dataclasses.replace(changed, **hooks)
    again = pickle.loads(pickle.dumps(whole))
    assert again.resize is swap and again.tick_s == 9.0


def test_a_policy_that_cannot_be_sent_to_the_planner_is_refused():
  """At the start: else it failed at the first tick, and roles stayed."""
  class Own(Link):
    pass

  with planner_process() as planner:
    with pytest.raises(InputError, match="policy='swap' cannot be sent .*must"):
      server_of(planner, lambda view: swap(view))
    with pytest.raises(InputError, match="latency='Own' cannot be sent"):
      check_planner(planner, dataclasses.replace(
          DISTSERVE, tick_s=1.0, resize=swap), Own(1e-3, 1e9, 1), None)


@pytest.mark.parametrize('planner', [5, 'process'])
def test_a_planner_is_an_executor(planner):
  with pytest.raises(InputError, match='planner=.*Executor'):
    server_of(planner)


def test_a_planner_is_for_a_policy_that_changes_roles():
  with pytest.raises(InputError, match="None with policy 'distserve'"):
    serving.fake_server_of('2flexible', planner=Held())
