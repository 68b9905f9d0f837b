"""Shipped policies: names, safety, progress, and what their papers claim."""

import ast
import dataclasses
import functools
import itertools
import pathlib
import random
import tokenize
import types

import pytest

import dsjax
from dsjax.analysis import metrics
from dsjax.config.checks import InputError
from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement.api import simulate
from dsjax.policies import adaptive, rollouts, static
from dsjax.policies.deadlines import with_deadlines
from dsjax.policies.named import NAMES, named
from dsjax.policies.roles import leave_prefills
from dsjax.policies.rollouts import rounded
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.events import Flip, Migrate, Reject, RunPrefill
from dsjax.scheduling.pace import Paced, steps_s
from dsjax.scheduling.policy import (
  DISTSERVE,
  Load,
  PolicyError,
  PrefillBudget,
)
from dsjax.simulation import latency, simulator
from experiments.common import policies
from experiments.explore import large_world
from experiments.verify import schedules
from experiments.verify.worlds import Rules

SLO = Slo(0.2, 0.022)
STEP = latency.Affine((0.01, 1e-4, 0.0), (0.01, 1e-6, 1e-4), host_s=0.001,
                      mixed=(0.01, 1e-4, 0.0, 1e-6))
LINK = latency.Link(1e-3, 1e6, 100)
FOUR = 'flexible=1x1,1x1,1x1,1x1'
EACH = pytest.mark.parametrize('name', NAMES)


@functools.cache
def served(text, rate_per_s, requests=600, slo=SLO, placement=FOUR):
  """A run of Llama-3-8B on four H100, published tables, ShareGPT lengths."""
  return simulate(placement, 'llama-3-8b', latency='tables:h100-80g',
                  rate_per_s=rate_per_s, slo=slo, requests=requests, cut=True,
                  max_len=8192, policy=named(text, slo), log=True)


def attainment(*args, **options):
  return served(*args, **options).summary.attainment[0]


def commands(run, kind):
  return [c for _, commands in run.log for c in commands if type(c) is kind]


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
  assert (again.name, again.source, again.slo) == (policy.name, name, SLO)


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


def test_replan_searches_with_the_order_that_serves(monkeypatch):
  seen = []
  monkeypatch.setattr(rollouts, 'played', lambda policy, *args: (
      seen.append(policy.order), rollouts.Played(1.0, 0.5))[1])
  served.__wrapped__('replan:tick_s=1', 60, 200)
  assert set(seen) == {None}
  seen.clear()
  served.__wrapped__('replan:tick_s=1+deadlines', 60, 200)
  assert seen and None not in seen


# --- what their papers claim -------------------------------------------------


def test_static_has_as_many_prefill_instances_as_asked_for():
  run = served('static:prefills=2', 40)
  assert {c.instance for c in commands(run, RunPrefill)} == {0, 1}
  assert {c.target for c in commands(run, Migrate)} == {2, 3}


def test_chunked_keeps_tpot_where_colocated_stalls_rows():
  """Sarathi-Serve: no row waits behind a whole prompt."""
  chunked, colocated = (served(name, 80).summary.tpot_s[2]
                        for name in ('chunked', 'colocated'))
  assert chunked < SLO.tpot_s < colocated


def ahead(ours, other, rate_per_s, requests=600, slo=SLO):
  """What one attains more than another, and its interval, on the same
  requests."""
  return metrics.difference(*(
      [metrics.attains(r, slo) for r in metrics.by_arrival(
          served(name, rate_per_s, requests, slo).kept)]
      for name in (ours, other)))


@pytest.mark.parametrize('ours, parent, rate_per_s', [
    ('static:prefills=2', 'colocated', 100),  # DistServe: phases apart
    ('chunked', 'colocated', 80),  # Sarathi-Serve: no stalls
    ('splitwise', 'static', 90),  # the mixed pool takes what piles up
    ('mooncake', 'mooncake:rejects=False', 120),  # early rejection
    ('planner:by=reactive:tick_s=1', 'static', 90)])  # Dynamo: by misses
def test_each_is_above_its_parent_beyond_the_interval(ours, parent, rate_per_s):
  assert ahead(ours, parent, rate_per_s, 1200)[1] > 0.01


def test_mooncake_refuses_early_and_the_others_attain():
  """Mooncake: what it lets in meets TTFT; without refusals nothing does."""
  run = served('mooncake', 120)
  refused = len(commands(run, Reject))
  assert refused > 100
  kept = [r for r in run.kept if r.status == 'length']
  on_time = sum(r.ttft_s <= SLO.ttft_s for r in kept) / len(kept)
  assert on_time > 0.75
  assert attainment('mooncake:rejects=False', 120) < 0.1


@pytest.mark.parametrize('name', ('static', 'arrow', 'mooncake', 'ppd'))
def test_more_prefill_instances_than_there_are(name):
  with pytest.raises(PolicyError, match='prefills=9: must be 0 to 4, the flex'):
    served(f'{name}:prefills=9', 30)


def test_llm_d_is_its_limits():
  """llm-d: 0 never hands off; 1 always does, as the static split."""
  assert not commands(served('llm_d:least=0', 30, 300), Migrate)
  always, split = served('llm_d:least=1', 30, 300), served('static', 30, 300)
  assert [r.token_s for r in always.records] == [
      r.token_s for r in split.records]


def test_dynamo_is_its_limits():
  """Dynamo: with nothing short and nobody busy it is the static split."""
  never = served('dynamo:shortest=0:busy=1e9', 30, 300)
  assert [r.token_s for r in never.records] == [
      r.token_s for r in served('static', 30, 300).records]
  assert not commands(served('dynamo:shortest=100000', 30, 300), Migrate)


def test_dynaserve_splits_prompts_and_outlasts_both_parents():
  """DynaServe: more goodput than disaggregation and than colocation."""
  draw, slo, now_s, sent = random.Random(0), Slo(1.0, 0.1), 0.0, []
  for id in range(300):
    now_s += draw.expovariate(12)
    sent.append(Request(id, now_s, [1] * draw.randint(500, 7500),
                        Sampling(max_tokens=draw.randint(2, 16))))
  ours, split, together = (
      simulate('flexible=1x1,1x1', 'llama-3-8b', latency='tables:h100-80g',
               slo=slo, lengths=sent, max_len=8192, policy=named(name, slo),
               log=True) for name in ('dynaserve', 'static', 'colocated'))
  assert len(commands(ours, Migrate)) > 60  # rows stay: these are parts
  assert ours.summary.attainment[1] > split.summary.attainment[2]
  assert ours.summary.attainment[0] > together.summary.attainment[0]


def test_arrow_flips_towards_the_load_and_keeps_one_of_each_role():
  run = served('arrow', 90)
  roles = ['chunked'] * 4
  flips = 0
  for event, answer in run.log:
    for command in answer:
      if isinstance(command, Flip):
        roles[command.instance] = command.role
        flips += event.time_s > 0
    if flips:
      assert {'prefill', 'decode'} == set(roles)
  assert flips and attainment('arrow', 90) > attainment('static', 90)


def test_taichi_is_its_parents_at_the_ends():
  """TaiChi: with no small chunks prompts go apart; with all large, nowhere."""
  apart = served('taichi:small=0', 30, 200)
  assert {c.instance for c in commands(apart, RunPrefill)} == {0}
  together = served('taichi:prefills=4', 30, 200)
  assert not commands(together, Migrate)


@pytest.mark.parametrize('parent', ['static:prefills=2', 'chunked:chunk=512'])
def test_taichi_is_no_less_than_its_parents(parent):
  """TaiChi: at balanced objectives, where neither parent holds any more. The
  interval of what it attains above the other, on the same requests."""
  mean, low, high = ahead('taichi:prefills=1:small=512', parent, 114, 2400)
  assert mean > 0 and low > -0.1 and high > 0.1


def test_ecoserve_fills_one_member_after_another():
  """EcoServe: prompts come to one in turn, where they would take turns."""
  targets = [c.instance for c in commands(served('ecoserve', 20), RunPrefill)]
  pairs = list(itertools.pairwise(targets))
  same = sum(a == b for a, b in pairs) / len(pairs)
  following = sum((b - a) % 4 == 1 for a, b in pairs) / len(pairs)
  assert same > 0.6 and same + following > 0.95


def test_llumnix_moves_rows_until_loads_are_even():
  """And no further: the least loaded never becomes the most."""
  assert commands(served('llumnix', 60), Migrate)
  policy = dataclasses.replace(named('llumnix', SLO),
                               route=lambda view, request: 0)
  config = scheduler.Config(
      (InstanceConfig('flexible', 400, 16, 16, 512, 16),) * 2, 1024, depth=1,
      policy=policy)
  sent = [Request(i, 0.01 * i, [1] * 90, Sampling(max_tokens=500))
          for i in range(8)]
  run = simulator.simulate(config, sent, STEP, LINK, log=True)
  assert [c.target for c in commands(run, Migrate)] == [1] * 4


def late_flips(run, after_s):
  """Seconds of the flips after so many, while requests still come."""
  last_s = run.records[-1].arrival_s
  return [event.time_s for event, answer in run.log for c in answer
          if isinstance(c, Flip) and after_s < event.time_s < last_s]


@pytest.mark.parametrize('name', (
    'arrow', 'planner', 'planner:by=reactive', 'replan',
    pytest.param('adaptive', marks=pytest.mark.slow)))
def test_none_swings_at_a_constant_load(name):
  assert len(late_flips(served(name, 60, requests=900), 12)) <= 1


INSTANCE = InstanceConfig('chunked', 500, 16, 4, 2048, 16)


def choice(monkeypatch, known):
  """What two that mix become where rollouts tell {roles: (share, scale)}, and
  what was played."""
  played = []
  monkeypatch.setattr(rollouts, 'played', lambda *args: (
      played.append(args[-2]), rollouts.Played(*known[args[-2]]))[1])
  instances = [types.SimpleNamespace(
      index=index, role='chunked', config=INSTANCE, latency=Paced(STEP))
      for index in (0, 1)]
  view = types.SimpleNamespace(load=Load(9.0, 100.0, 300.0, 50.0), link=LINK)
  return rollouts.better(DISTSERVE, SLO, view, instances, list(known)), played


@pytest.mark.parametrize('now, other, flips', [
    (.8, .75, False), (.8, .84, False), (.8, .86, True), (.94, .98, False),
    (.96, 1.0, False), (0.0, .1, True)])
def test_roles_change_for_what_attains_clearly_more(now, other, flips,
                                                    monkeypatch):
  """By more than the noise of a rollout; and none is played in vain."""
  answer, played = choice(monkeypatch, {
      ('chunked',) * 2: (now, .9), ('prefill', 'decode'): (other, .9)})
  assert answer == ({0: 'prefill', 1: 'decode'} if flips else {})
  assert (len(played) == 1) == (now > 1 - rollouts.NOISE)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('split, mixing, chosen', [
    ((.9, .8), (.9, .9), 'decode'), ((.9, .9), (.9, .8), 'chunked'),
    ((.895, .8), (.9, .9), 'decode'), ((.88, .8), (.9, .9), 'chunked'),
    ((.9, .8), (.905, .9), 'decode')])
def test_of_equal_choices_the_one_furthest_from_missing_is_taken(
    split, mixing, chosen, reverse, monkeypatch):
  """Wherever it is in the list."""
  known = [(('prefill', 'decode'), split), (('prefill', 'chunked'), mixing)]
  answer, _ = choice(monkeypatch, {
      ('chunked',) * 2: (.5, 2.0),
      **dict(known[::-1] if reverse else known)})
  assert answer == {0: 'prefill'} | (
      {1: 'decode'} if chosen == 'decode' else {})


LENGTHS = Load(8.0, 300.0, 900.0, 100.0)


def played(roles, least, load=LENGTHS):
  """A rollout of the static split on two instances."""
  config = dataclasses.replace(INSTANCE, role='flexible', num_pages=4000,
                               max_seqs=64)
  return rollouts.played(DISTSERVE, SLO, (config,) * 2, (STEP,) * 2, LINK,
                         load, roles, least)


def test_a_rollout_ends_once_it_cannot_win(monkeypatch):
  """And tells the same as one that is played to its end, where it can."""
  seen = []

  def stream(*args):
    for record in simulator.stream(*args):
      seen.append(record)
      yield record

  monkeypatch.setattr(rollouts, 'simulator', types.SimpleNamespace(
      stream=stream))
  roles = ('prefill', 'decode')
  rollouts.played.cache_clear()
  whole, count = played(roles, 0.0), len(seen)
  assert 0.1 < whole.share < 0.9
  assert played(roles, whole.share - 0.01) == whole and len(seen) == 2 * count
  assert played(roles, whole.share + 0.05).share < whole.share + 0.05
  assert len(seen) < 3 * count - 10


def test_a_rollout_tells_how_near_its_requests_came():
  """At twice the load the same roles come nearer to missing."""
  light, heavy = (played(('prefill', 'decode'), 0.0, LENGTHS._replace(
      rate_per_s=rate)) for rate in (1.0, 4.0))
  assert light.share == 1 and light.scale < min(1.0, heavy.scale)


def test_a_rollout_begins_with_the_rows_of_a_full_system(monkeypatch):
  """So it tells what comes of a load in the long run, not of its start."""
  load = Load(7.0, 300.0, 900.0, 300.0)
  sent, rows = rollouts.requests_like(load, SLO)
  assert rows == int(7.0 * 300 * SLO.tpot_s) == 46
  assert {(r.arrival_s, len(r.prompt)) for r in sent[:rows]} == {(0.0, 1)}
  left, whole = (sum(r.sampling.max_tokens for r in part) / len(part)
                 for part in (sent[:rows], sent[rows:]))
  assert 0.6 * whole < left < 1.3 * whole
  full = played(('chunked',) * 2, 0.0, load)
  rollouts.played.cache_clear()
  monkeypatch.setattr(rollouts, 'requests_like',
                      lambda load, slo: (sent[rows:], 0))
  assert played(('chunked',) * 2, 0.0, load).share > full.share + 0.03


def test_requests_that_run_for_too_long_have_missed_in_a_rollout(monkeypatch):
  """So one of slow rows ends before they do."""
  seen = []

  def stream(*args):
    for record in simulator.stream(*args):
      seen.append(record.id)
      yield record

  monkeypatch.setattr(rollouts, 'simulator', types.SimpleNamespace(
      stream=stream))
  load = Load(20.0, 300.0, 900.0, 300.0)
  sent, rows = rollouts.requests_like(load, SLO)
  counted = (len(sent) - rows) * 4 // 5
  first = len(sent) - counted
  assert played(('prefill', 'decode'), 0.5, load).share < 0.5
  assert sum(id >= first for id in seen) < 0.5 * counted


def test_a_change_is_played_with_the_load_as_it_is(monkeypatch):
  """What is better under the rounded load only is not taken."""
  now, other = ('chunked',) * 2, ('prefill', 'decode')
  shares = {(True, now): .8, (True, other): .9, (False, now): .85}
  for exact, flips in ((.89, False), (.91, True)):
    known = {**shares, (False, other): exact}
    monkeypatch.setattr(rollouts, 'played', lambda *args, known=known: (
        rollouts.Played(known[args[-3] == rounded(args[-3]), args[-2]], .9)))
    instances = [types.SimpleNamespace(
        index=index, role='chunked', config=INSTANCE, latency=Paced(STEP))
        for index in (0, 1)]
    view = types.SimpleNamespace(load=Load(9.0, 100.0, 300.0, 50.0), link=LINK)
    answer = rollouts.better(DISTSERVE, SLO, view, instances, [now, other])
    assert answer == ({0: 'prefill', 1: 'decode'} if flips else {})


def test_arrow_fills_a_decode_instance_up_to_its_places():
  """And no further, however short its steps are."""
  config = scheduler.Config(tuple(
      InstanceConfig(role, 500, 16, 4, 2048, 16)
      for role in ('prefill', 'decode', 'decode')), max_len=512,
      policy=named('arrow', Slo(1.0, 1.0)))
  sent = [Request(id, id / 50, [1] * 20, Sampling(max_tokens=400))
          for id in range(7)]
  records = simulator.simulate(config, sent, STEP, LINK).records
  assert [r.instances[-1] for r in records] == [1] * 4 + [2] * 3


def test_arrow_adds_a_decode_instance_where_places_run_out():
  """However short the steps of the one that is full are."""
  config = scheduler.Config(
      (InstanceConfig('flexible', 500, 16, 4, 2048, 16),) * 3, max_len=512,
      policy=named('arrow:prefills=2', Slo(1.0, 1.0)))
  sent = [Request(id, id / 2, [1] * 20, Sampling(max_tokens=400))
          for id in range(7)]
  run = simulator.simulate(config, sent, STEP, LINK, log=True)
  assert [(c.instance, c.role) for event, answer in run.log for c in answer
          if isinstance(c, Flip) and event.time_s > 0] == [(0, 'decode')]
  assert {r.instances[-1] for r in run.records} == {0, 2}


@pytest.mark.parametrize('prefills', (1, 2, 3))
def test_arrow_is_above_each_split_at_a_tight_ttft(prefills):
  """Arrow: more within the objectives than roles that stay. The interval of
  what it attains above the split, on the same requests."""
  assert ahead('arrow', f'static:prefills={prefills}', 120, 1200,
               Slo(0.106, 0.0448))[1] > 0


@pytest.mark.slow
def test_replanning_follows_a_load_that_steps_up():
  """DistServe: the split of the light load fails the heavy one."""
  process = 'step:low=10:high=90:period_s=24'
  runs = [simulate(FOUR, 'llama-3-8b', latency='tables:h100-80g', slo=SLO,
                   process=process, requests=1100, cut=True, max_len=8192,
                   policy=named(name, SLO), log=True)
          for name in ('replan', 'static:prefills=1')]
  replanned, kept = (metrics.by_phase(run.kept, SLO, 24.0, ('low', 'high'))
                     for run in runs)
  assert late_flips(runs[0], 12)
  assert replanned['high'][1] > kept['high'][2] + 0.1  # beyond the intervals


def test_the_planner_reacts_to_misses_where_the_other_role_can_spare_one():
  """Dynamo: up where every instance of a role misses its objective."""
  name = 'planner:by=reactive:tick_s=1'
  flips = [c for event, answer in served(name, 90).log if event.time_s > 0
           for c in answer if isinstance(c, Flip)]
  assert flips and flips[0].role == 'prefill'
  assert not late_flips(served(name, 30), 0)


def test_ecoserve_is_no_weaker_than_its_parent():
  """EcoServe: taking turns beats prompts first everywhere, as both mix."""
  assert attainment('ecoserve', 60) >= attainment('colocated', 60) - 0.02


def test_deadlines_put_back_what_cannot_attain():
  """The order alone lifts a baseline beyond its capacity."""
  assert (attainment('chunked:chunk=512+deadlines', 160)
          > attainment('chunked:chunk=512', 160) + 0.1)


def test_deadlines_find_who_is_on_time_behind_hundreds_that_are_late():
  """Where all that is looked at is late, whoever comes after is late too."""
  order = with_deadlines(DISTSERVE, SLO).order
  instance = types.SimpleNamespace(
      latency=STEP, turn_rows=0, hits=lambda request: (0, 0),
      load_s=lambda tokens: 0.0)
  waiting = [types.SimpleNamespace(
      order=i, arrival_s=0.0 if i < 300 else 0.95, stage='queued', done=0,
      prompt_len=100) for i in range(302)]
  answer = order(types.SimpleNamespace(time_s=1.0), instance, waiting)
  assert [r.order for r in answer] == [300, 301, *range(300)]


def waiting_at(age_s, served_ages=()):
  """Where requests of these ages that wait come in the order, of objectives of
  1 s; served_ages: of those whose prompts are being prefilled."""
  def requests(ages):
    return [types.SimpleNamespace(
        order=n, arrival_s=1000.0 - age, stage='queued', done=0, first_s=None,
        prompt_len=100) for n, age in enumerate(ages)]

  served = requests(served_ages)
  instance = types.SimpleNamespace(
      latency=STEP, turn_rows=0, hits=lambda request: (0, 0),
      load_s=lambda tokens: 0.0,
      prefilling=lambda: served, pulls=lambda: (), rows=lambda: ())
  view = types.SimpleNamespace(time_s=1000.0, instances=(instance,))
  order = with_deadlines(DISTSERVE, Slo(1.0, 1.0)).order
  return [r.order for r in order(view, instance, requests(age_s))]


def test_of_those_that_have_waited_for_long_one_goes_first():
  """Others when few of what is being served are such."""
  ages = (300, 200, 50, .5, .4)
  assert waiting_at(ages) == [0, 3, 4, 1, 2]
  assert waiting_at(ages, [200]) == [3, 4, 0, 1, 2]
  assert waiting_at(ages, [200] + [.5] * 30) == [3, 4, 0, 1, 2]
  assert waiting_at(ages, [200] + [.5] * 31) == [0, 3, 4, 1, 2]
  assert waiting_at(ages[:3], [200]) == [0, 1, 2]


@pytest.mark.parametrize('rows, expected', [(0, [0, 1, 2]), (8, [1, 2, 0])])
def test_deadlines_know_what_rows_leave_of_a_step(rows, expected):
  """400 tokens are done in time alone, and not in steps of 20 tokens."""
  policy = dataclasses.replace(
      DISTSERVE, batch=lambda view, instance: PrefillBudget(20, False, True))
  instance = types.SimpleNamespace(
      latency=STEP, turn_rows=rows, context=100 * rows, load_s=lambda _: 0.0,
      hits=lambda request: (0, 0), hit_tokens=lambda request: 0)
  waiting = [types.SimpleNamespace(
      order=n, arrival_s=1.0, stage='queued', done=0, prompt_len=tokens)
      for n, tokens in enumerate((400, 100, 100))]
  order = with_deadlines(policy, Slo(0.2, 1.0)).order
  answer = order(types.SimpleNamespace(time_s=1.0), instance, waiting)
  assert [r.order for r in answer] == expected


def test_deadlines_hold_where_more_comes_than_can_attain():
  """What was put back must not take the place of what is on time, all at once,
  once it has waited for long: no share of requests would attain any more."""
  slo = Slo(0.1, 1.0)
  config = scheduler.Config(
      (InstanceConfig('colocated', 2000, 16, 64, 512, 16),), 2048, depth=1,
      policy=with_deadlines(named('colocated', slo), slo, most_wait=40))
  sent = [Request(i, 0.04 * i, [1] * 400, Sampling(max_tokens=2))
          for i in range(400)]
  records = simulator.simulate(config, sent, STEP).records
  before, after = (
      sum(r.ttft_s <= slo.ttft_s for r in records if low <= r.arrival_s < high)
      for low, high in ((0, 4), (12, 16)))
  assert 30 < before < 90 and after > 0.8 * before


def test_deadlines_let_nothing_wait_for_ever():
  slo = Slo(0.05, 1.0)
  policy = with_deadlines(named('colocated', slo), slo, most_wait=10)
  run = simulate('colocated=1x1', 'llama-3-8b', latency='tables:h100-80g',
                 rate_per_s=40, slo=slo, requests=400, cut=True, max_len=8192,
                 policy=policy)
  waits = [r.ttft_s for r in run.records]
  assert max(waits) < 10 * slo.ttft_s + 2 * sorted(waits)[len(waits) // 2] + 5


# --- adaptive -----------------------------------------------------------------


def flipped(pages):
  """Three that mix, of so many pages, of which at 1 s one becomes an instance
  that prefills: the run, and the seconds at which it handed rows over."""
  policy = dataclasses.replace(
      DISTSERVE, name='flipped', tick_s=1.0, rebalance=leave_prefills,
      resize=lambda view: {0: 'prefill', 1: 'decode', 2: 'decode'}
      if view.time_s else {})
  config = scheduler.Config(
      (InstanceConfig('flexible', pages, 16, 16, 512, 16),) * 3, 1024,
      depth=1, policy=policy)
  sent = [Request(i, 0.05 * i, [1] * 90, Sampling(max_tokens=100))
          for i in range(12)]
  run = simulator.simulate(config, sent, STEP, LINK, log=True)
  return run, [event.time_s for event, answer in run.log for c in answer
               if isinstance(c, Migrate)]


def test_rows_leave_an_instance_that_becomes_one_that_prefills():
  run, moved_s = flipped(400)
  assert moved_s and all(1 <= second < 1.1 for second in moved_s)
  homes, ends = ([r.instances[end] for r in run.records] for end in (0, -1))
  assert [homes.count(i) for i in range(3)] == [4, 4, 4]
  assert len(moved_s) == 4 and [ends.count(i) for i in range(3)] == [0, 6, 6]


def test_rows_stay_where_the_others_have_no_room():
  run, moved_s = flipped(50)
  assert len(moved_s) < 4
  assert {len(r.token_s) for r in run.records} == {100}


@pytest.mark.deep
def test_adaptive_is_not_below_the_others_with_the_same_order():
  others = ('static:prefills=2+deadlines', 'colocated+deadlines',
            'chunked:chunk=512+deadlines')
  best = max(attainment(name, 130, 1500) for name in others)
  assert attainment('adaptive', 130, 1500) > best


@pytest.mark.deep
def test_adaptive_outlasts_every_split_on_a_sine():
  """Dynamo's claim, for ours: a fifth more than the best static split."""
  def run(text, mean_per_s):
    process = 'sine:low=5:high=45:period_s=60'
    made = simulate(FOUR, 'llama-3-8b', latency='tables:h100-80g', slo=SLO,
                    process=process, rate_per_s=mean_per_s, cut=True,
                    requests=int(75 * mean_per_s), max_len=8192,
                    policy=named(text, SLO), log=True)
    names = ('rising high', 'falling high', 'falling low', 'rising low')
    return made, metrics.by_phase(made.kept, SLO, 60.0, names)

  ours, phases = run('adaptive', 80)
  assert ours.summary.attainment[0] > 0.9
  assert min(share for share, *_ in phases.values()) > 0.7  # none sacrificed
  assert len(late_flips(ours, 60)) <= 1
  for prefills in (1, 2, 3):
    split, _ = run(f'static:prefills={prefills}', 80 / 1.2)
    assert split.summary.attainment[0] < 0.9


def fixed(slo, role):
  """adaptive's steps, every instance in a role."""
  return dataclasses.replace(
      named('adaptive', slo), tick_s=static.ONCE_S,
      resize=lambda view: {i.index: role for i in view.instances})


@pytest.mark.parametrize('role, times', [('colocated', .75), ('chunked', 1.0)])
def test_adaptive_has_a_role_of_short_steps(role, times):
  run = simulate(FOUR, 'llama-3-8b', latency='tables:h100-80g', rate_per_s=110,
                 slo=SLO, requests=300, cut=True, max_len=8192,
                 policy=fixed(SLO, role), log=True)
  seconds = sorted(sum(steps_s(run.latencies[c.instance], c))
                   for c in commands(run, RunPrefill) if len(c.rows) > 1)
  beside = seconds[len(seconds) * 9 // 10]  # of nine steps in ten, at most
  assert (beside <= 1.05 * 0.75 * 0.95 * SLO.tpot_s) == (times < 1)


def test_late_prompts_of_adaptive_leave_rows_alone():
  """At a tight TPOT: a few tokens of them in every step would be too many."""
  slo = Slo(0.43, 0.0115)
  run = simulate(FOUR, 'llama-3-8b', latency='tables:h100-80g', rate_per_s=70,
                 slo=slo, requests=600, cut=True, max_len=8192,
                 policy=fixed(slo, 'chunked'))
  rows = [r for r in run.records if r.tpot_s is not None]
  assert sum(r.ttft_s > slo.ttft_s for r in rows) > 0.2 * len(rows)
  assert sum(r.tpot_s <= slo.tpot_s for r in rows) > 0.8 * len(rows)


@pytest.mark.parametrize('tpot_s', [0.011, 0.015, 0.03])
def test_adaptive_keeps_back_a_share_of_what_prompts_may_take(tpot_s):
  """Not of TPOT: where rows alone take most of it that would be too much."""
  row = types.SimpleNamespace(first_s=0.0, num_out=1, arrival_s=0.0)
  instance = types.SimpleNamespace(
      config=dataclasses.replace(INSTANCE, prefill_tokens=30_000), num_rows=1,
      turn_rows=1, context=0, role='chunked', rows=lambda: (row,),
      latency=latency.Affine((0.01, 1e-6, 0.0), (0.01, 0.0, 1e-6),
                             mixed=(0.01, 1e-6, 0.0, 0.0)))
  tokens = named('adaptive', Slo(1.0, tpot_s)).batch(
      types.SimpleNamespace(time_s=0.0), instance).tokens
  assert 0.9 < tokens * 1e-6 / (tpot_s - 0.01) < 0.93


@pytest.mark.parametrize('now, asked', [
    ('CCCC', '12'), ('PCCC', '12'), ('PPDD', '123'), ('PPPD', '123')])
def test_adaptive_asks_for_one_prefill_instance_more_or_less_and_for_half(
    now, asked, monkeypatch):
  names = {'P': 'prefill', 'D': 'decode', 'C': 'chunked'}
  monkeypatch.setattr(adaptive, 'better', lambda *args: args[-1])
  view = types.SimpleNamespace(may_prefill=[types.SimpleNamespace(
      flips=True, role=names[role]) for role in now])
  choices = named('adaptive', SLO).resize(view)
  assert {str(roles.count('prefill')) for roles in choices} == {'0', *asked}
  assert len(choices) == 2 + 2 * len(asked)


def test_adaptive_stays_where_nothing_is_better():
  run = served('adaptive', 40, 300)
  assert run.summary.attainment[0] > 0.98
  assert not late_flips(run, 5)


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


def test_a_load_is_rounded_so_that_little_changes_ask_nothing_new():
  load = Load(100.0, 300.0, 900.0, 200.0)
  near = Load(101.0, 305.0, 890.0, 199.0)
  assert rounded(load) == rounded(near)
  assert rounded(load) != rounded(load._replace(rate_per_s=150.0))


@pytest.mark.parametrize('factor', [0.8, 1.2])
def test_wrong_latencies_are_corrected_by_what_steps_took(factor):
  instances = (InstanceConfig('flexible', 4096, 16, 64, 2048, 16),) * 2
  config = scheduler.Config(
      instances, 4096, depth=1, policy=named('adaptive', Slo(0.3, 0.03)),
      latencies=(Paced(STEP, factor, factor),) * 2, link=LINK)
  sent = [Request(i, 0.03 * i, range(50 + 37 * i % 300), Sampling(
      max_tokens=20 + 11 * i % 60)) for i in range(150)]
  state = simulator.simulate(config, sent, STEP, LINK, log=True).state
  for instance in state.instances:
    assert instance.pace == pytest.approx((1 / factor, 1 / factor), rel=0.05)
