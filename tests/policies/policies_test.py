"""Shipped policies: names, safety, progress, and what they are told."""

import ast
import dataclasses
import pathlib
import tokenize

import pytest

import dsjax
from dsjax.config.checks import InputError
from dsjax.config.engine import InstanceConfig
from dsjax.config.request import Request, Sampling
from dsjax.placement.api import simulate
from dsjax.policies import rollouts, static
from dsjax.policies.named import NAMES, named
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.policy import DISTSERVE
from dsjax.simulation import latency, simulator
from experiments.common import policies
from experiments.explore import large_world
from experiments.verify import schedules
from experiments.verify.worlds import Rules
from tests.common.policy_runs import FOUR, LINK, SLO, STEP, served

NO_TIME = latency.Affine((0.0,) * 3, (0.0,) * 3, mixed=(0.0,) * 4)
EACH = pytest.mark.parametrize('name', NAMES)


# --- names -------------------------------------------------------------------


def test_every_policy_of_the_folder_has_a_name():
  folder = pathlib.Path(static.__file__).parent
  files = {path.stem for path in folder.glob('*.py')}
  assert set(NAMES) == files - {'__init__', 'deadlines', 'named', 'predict',
                                'roles', 'rollouts'}


def test_a_text_gives_options_and_the_order():
  policy = named('chunked:chunk=64+deadlines', SLO)
  assert policy.name == 'chunked 64 + deadlines' and policy.order
  assert named('', SLO) is DISTSERVE
  assert named('dynamo:by=load', SLO).name == 'dynamo 1'


def code_lines(path):
  """Lines of code of a file: no docstring, comment, blank line or import."""
  tree = ast.parse(path.read_text())
  left = {(node.lineno, node.end_lineno) for node in ast.walk(tree)
          if isinstance(node, ast.Import | ast.ImportFrom)
          or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
          and isinstance(node.value.value, str)}
  ignored = {line for first, last in left for line in range(first, last + 1)}
  with path.open() as file:
    tokens = tokenize.generate_tokens(file.readline)
    lines = {line for token in tokens if token.string.strip()
             and token.type != tokenize.COMMENT
             for line in range(token.start[0], token.end[0] + 1)}
  return len(lines - ignored)


@EACH
def test_each_is_tens_of_lines(name):
  assert code_lines(pathlib.Path(static.__file__).with_name(
      f'{name}.py')) <= 60


@pytest.mark.parametrize('text, error', [
    ('nothing', "policy='nothing': must be one of"),
    ('static:prefil=2', "option=value with options of .'prefills'"),
    ('static:slo=2', 'option=value with options'),
    ('static:prefills', "prefills='': must be an integer of 0 or more"),
    ('static:prefills=1.5', "='1.5': must be an integer of 0 or more"),
    ('arrow:prefills=-1', "='-1': must be an integer"),
    ('chunked:chunk=x', "chunk='x': must be an integer"),
    ('adaptive:margin=x', "margin='x': must be a number of 0 or more"),
    ('taichi:low=nan', "low='nan': must be a number"),
    ('mooncake:rejects=1', "rejects='1': must be True or False"),
    ('static:prefills=1:prefills=2', 'each once'),
    ('dynamo:by=luck', "'length', 'load' or 'either'"),
    ('planner:by=luck', "by='luck': must be 'floor' or 'reactive'"),
    ('distserve:x=1', 'without options'), ('+dead', 'must be one of'),
    ('static+deadlines:prefills=2', r'\+deadlines comes last'),
    ('static+deadlines+deadlines', r'\+deadlines comes last'),
    ('replan:deadlines=False+deadlines', 'each once')])
def test_a_name_that_is_none_is_one_clear_error(text, error):
  with pytest.raises(InputError, match=error):
    named(text, SLO)


@pytest.mark.parametrize('name, roles, link, words', [
    ('taichi', ('prefill', 'decode'), LINK, "'taichi 1': must be given flex"),
    ('chunked:chunk=64', ('colocated',), None, 'chunked 64.*flexible or chun'),
    ('dynaserve', ('colocated',) * 2, None, 'dynaserve.*flexible or chunked'),
    ('dynaserve', ('flexible',) * 2, None, 'dynaserve.*the link'),
    ('ppd', ('flexible',) * 2, None, "'ppd 1': must be given the link"),
    ('adaptive', ('prefill', 'decode'), None, 'adaptive.*the link')])
def test_what_a_policy_needs_is_said_at_the_start(name, roles, link, words):
  policy = named(name, SLO)
  with pytest.raises(InputError, match=words):
    policy.check(roles, (STEP,) * len(roles), link)
  policy.check(('flexible',) * 2, (STEP,) * 2, LINK)
  policy.check(('chunked',), (STEP,), None)


def test_a_run_asks_what_its_policy_needs():
  config = scheduler.Config((InstanceConfig('colocated', 16, 4, 4, 16, 4),),
                            32, policy=named('taichi', SLO))
  with pytest.raises(InputError, match='taichi 1.*flexible or chunked'):
    simulator.simulate(config, [], STEP)
  with pytest.raises(InputError, match='mooncake 1.*latencies'):
    dsjax.serve(dsjax.load('tiny'), 'prefill=1x1,decode=1x1',
                policy=named('mooncake', SLO))
  with pytest.raises(InputError, match='Policy.needs=.*latencies'):
    dataclasses.replace(dsjax.DISTSERVE, needs=('luck',))


def test_a_policy_that_predicts_says_what_it_lacks():
  config = scheduler.Config(
      (InstanceConfig('flexible', 16, 4, 4, 16, 4),) * 2, 32,
      policy=named('mooncake', SLO))
  state = scheduler.init(config)
  with pytest.raises(dsjax.PolicyError, match='latencies must be given'):
    scheduler.step(config, state, scheduler.Arrived(0.0, 0, 4, 4))


@EACH
def test_each_travels_to_other_processes(name):
  import pickle
  policy = policies.load(name, SLO)
  again = pickle.loads(pickle.dumps(policy))
  assert again.name == policy.name
  assert again.again == policy.again == (named, name, SLO)


# --- safety and progress -----------------------------------------------------


@EACH
def test_each_is_explored_with_faults(name):
  """Large random worlds: pages, requests and progress, whatever it answers."""
  flexible = [seed for seed in range(60) if large_world(
      seed)[0].config.instances[0].role == 'flexible'][:2]
  for seed in flexible:
    rules, faults = large_world(seed)
    config = dataclasses.replace(
        rules.config, policy=named(name, SLO), latencies=tuple(
            dataclasses.replace(STEP, pp=instance.pp)
            for instance in rules.config.instances), link=LINK)
    schedules.walk(Rules(config, rules.requests), faults, seed)


@EACH
def test_each_is_explored_where_no_role_may_change(name):
  """Rows of such instances may not move, and there is nothing to resize."""
  done = 0
  for seed in (0, 4):
    rules, faults = large_world(seed)
    try:
      rules = schedules.under(rules, named(name, SLO))
    except InputError:
      continue  # it needs instances that mix
    done += schedules.walk(rules, faults, seed)
  assert done > 100


@EACH
def test_each_serves_a_heavy_load_to_its_end_and_replays(name):
  """Nobody waits for ever, and the log alone says what happens again."""
  instances = (InstanceConfig('flexible', 64, 16, 8, 256, 8),) * 3
  config = scheduler.Config(instances, 600, depth=1, policy=named(name, SLO),
                            latencies=(STEP,) * 3, link=LINK)
  sent = [Request(i, 0.02 * i, range(20 + 37 * i % 300), Sampling(
      max_tokens=1 + 11 * i % 60)) for i in range(70)]
  result = simulator.simulate(config, sent, STEP, LINK, log=True)
  assert {r.status for r in result.records} <= {'length', 'refused'}
  assert all(len(r.token_s) == r.max_tokens for r in result.records
             if r.status == 'length')
  assert event_log.replay(config, result.log) is None


@EACH
def test_each_serves_by_deadlines_as_well(name):
  """Some prompts go ahead of earlier ones, and the run ends and replays."""
  options = ':rejects=False' if name == 'mooncake' else ''
  policy = named(f'{name}{options}+deadlines', SLO)
  assert policy.name.count('deadlines') == (name != 'adaptive')
  moved = 0

  def order(view, instance, waiting):
    nonlocal moved
    answer = policy.order(view, instance, waiting)
    moved += list(answer) != list(waiting)
    return answer

  config = scheduler.Config(
      (InstanceConfig('flexible', 64, 16, 8, 256, 8),) * 3, 600, depth=1,
      policy=dataclasses.replace(policy, order=order),
      latencies=(STEP,) * 3, link=LINK)
  sent = [Request(i, 0.02 * i, range(20 + 37 * i % 300), Sampling(
      max_tokens=1 + 11 * i % 60)) for i in range(70)]
  result = simulator.simulate(config, sent, STEP, LINK, log=True)
  assert {r.status for r in result.records} == {'length'} and moved
  config = dataclasses.replace(config, policy=policy)
  assert event_log.replay(config, result.log) is None


@EACH
@pytest.mark.parametrize('requests, gap_s, step', [
    (1, 1.0, STEP), (3, 100.0, STEP), (60, 0.02, NO_TIME)])
def test_each_serves_a_load_of_next_to_nothing(name, requests, gap_s, step):
  """One request has no rate, and steps may take no time at all."""
  config = scheduler.Config(
      (InstanceConfig('flexible', 64, 16, 8, 256, 8),) * 3, 600, depth=1,
      policy=named(name, SLO))
  sent = [Request(i, gap_s * i, range(20), Sampling(max_tokens=550))
          for i in range(requests)]
  records = simulator.simulate(config, sent, step, LINK).records
  assert {r.status for r in records} == {'length'}


def test_replan_searches_with_the_order_that_serves(monkeypatch):
  seen = []
  monkeypatch.setattr(rollouts, 'played', lambda policy, *args, seed=0: (
      seen.append(policy.order), rollouts.Played(1.0, 0.5))[1])
  served.__wrapped__('replan:tick_s=1', 60, 200)
  assert set(seen) == {None}
  seen.clear()
  served.__wrapped__('replan:tick_s=1+deadlines', 60, 200)
  assert seen and None not in seen


# --- what they are told ------------------------------------------------------


def test_outputs_are_not_told_too_long_where_many_rows_run():
  told = []

  def watch(view):
    told.append((view.time_s, view.load.output_len))
    return static.policy(SLO, 2).resize(view)

  run = simulate(FOUR, 'llama-3-8b', latency='tables:h100-80g', rate_per_s=110,
                 slo=SLO, requests=1600, cut=True, max_len=8192,
                 policy=dataclasses.replace(DISTSERVE, tick_s=1.0,
                                            resize=watch))
  mean = sum(r.max_tokens for r in run.records) / len(run.records)
  last_s = run.records[-1].arrival_s
  seen = [output_len for time_s, output_len in told if 5 < time_s < last_s]
  assert seen and 0.7 * mean < min(seen) and max(seen) < 1.25 * mean
