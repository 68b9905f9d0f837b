"""What the papers of the shipped policies claim."""

import dataclasses
import itertools
import random

import pytest

from dsjax.analysis import metrics
from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement.api import simulate
from dsjax.policies.named import named
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Flip, Migrate, Reject, RunPrefill
from dsjax.scheduling.policy import PolicyError
from dsjax.simulation import simulator
from tests.common.policy_runs import (
  FOUR,
  LINK,
  SLO,
  STEP,
  attainment,
  commands,
  late_flips,
  served,
)


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


@pytest.mark.parametrize('name', (
    'arrow', 'planner', 'planner:by=reactive', 'replan',
    pytest.param('adaptive', marks=pytest.mark.slow)))
def test_none_swings_at_a_constant_load(name):
  assert len(late_flips(served(name, 60, requests=900), 12)) <= 1


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
