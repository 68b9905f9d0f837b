"""The order by deadlines."""

import dataclasses
import types

import pytest

from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement.api import simulate
from dsjax.policies.deadlines import with_deadlines
from dsjax.policies.named import named
from dsjax.scheduling import scheduler
from dsjax.scheduling.policy import DISTSERVE, PrefillBudget
from dsjax.simulation import simulator
from tests.common.policy_runs import SLO, STEP, attainment


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
      first_s=None, prompt_len=100) for i in range(302)]
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
      hits=lambda request: (0, 0), hit_tokens=lambda request: 0,
      prefilling=lambda: ())
  waiting = [types.SimpleNamespace(
      order=n, arrival_s=1.0, stage='queued', done=0, first_s=None,
      prompt_len=tokens)
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
