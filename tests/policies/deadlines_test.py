"""The order by deadlines."""

import dataclasses
import types

import pytest

from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement.api import simulate
from dsjax.policies.deadlines import (
  attained,
  due_s,
  fitting_tokens,
  punctual_tokens,
  with_deadlines,
)
from dsjax.policies.named import named
from dsjax.scheduling import scheduler
from dsjax.scheduling.policy import DISTSERVE, PrefillBudget
from dsjax.simulation import latency, simulator
from tests.common.policy_runs import SLO, STEP, attainment

# An instance without rows.
IDLE = types.SimpleNamespace(
    latency=STEP, turn_rows=0, hits=lambda request: (0, 0),
    load_s=lambda tokens: 0.0)


def test_deadlines_put_back_what_cannot_attain():
  """The order alone lifts a baseline beyond its capacity."""
  assert (attainment('chunked:chunk=512+deadlines', 160)
          > attainment('chunked:chunk=512', 160) + 0.1)


def test_deadlines_find_who_is_on_time_behind_hundreds_that_are_late():
  """Where all that is looked at is late, whoever comes after is late too."""
  order = with_deadlines(DISTSERVE, SLO).order
  waiting = [types.SimpleNamespace(
      order=i, arrival_s=0.0 if i < 300 else 0.95, stage='queued', done=0,
      first_s=None, prompt_len=100) for i in range(302)]
  answer = order(types.SimpleNamespace(time_s=1.0), IDLE, waiting)
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


def request_of(age_s, **changes):
  """One of 100 tokens that waits at 1,000 s, so old."""
  fields = dict(order=0, arrival_s=1000.0 - age_s, stage='queued', done=0,
                stop=100, first_s=None, input_len=100, prompt_len=100,
                num_out=0)
  return types.SimpleNamespace(**fields | changes)


@pytest.mark.parametrize('first_s, emitted, due', [
    (None, 0, 992.0),  # when its first token must be there
    (991.5, 40, 995.5),  # a preempted one: when its 41st must
    (993.0, 40, -float('inf'))])  # that was late already
def test_a_preempted_request_is_due_when_its_next_token_is(
    first_s, emitted, due):
  request = request_of(10, first_s=first_s, prompt_len=100 + emitted)
  assert due_s(request, Slo(2.0, 0.1)) == pytest.approx(due)


def test_a_preempted_request_that_is_on_time_goes_before_what_is_late():
  order = with_deadlines(DISTSERVE, Slo(2.0, 0.1)).order
  waiting = [request_of(10, order=0), request_of(
      9, order=1, first_s=992.0, prompt_len=190),
      request_of(0.5, order=2), request_of(9, order=3, first_s=992.0,
                                           prompt_len=170)]
  view = types.SimpleNamespace(time_s=1000.0)
  # Due at 992, 1001, 1001.5 and 999.
  assert [r.order for r in order(view, IDLE, waiting)] == [1, 2, 0, 3]


@pytest.mark.parametrize('ages, expected', [
    # Preempted, due at 1,000.5 s; arrived before it, due at 1,001 s.
    ([(1.0, None), (0.9, 999.5)], [1, 0]),
    ([(9.0, None), (1.0, None), (8.0, None)], [1, 0, 2])])
def test_what_is_on_time_goes_by_its_deadline_and_what_is_late_by_arrival(
    ages, expected):
  order = with_deadlines(DISTSERVE, Slo(2.0, 0.1)).order
  waiting = [request_of(age_s, order=n, first_s=first_s, prompt_len=(
      110 if first_s else 100)) for n, (age_s, first_s) in enumerate(ages)]
  answer = order(types.SimpleNamespace(time_s=1000.0), IDLE, waiting)
  assert [r.order for r in answer] == expected


def test_what_is_put_back_is_late_in_its_place_by_arrival():
  order = with_deadlines(DISTSERVE, Slo(2.0, 0.1)).order
  waiting = [request_of(0.5, order=0, prompt_len=10**5),
             request_of(9.0, order=1), request_of(0.5, order=2)]
  answer = order(types.SimpleNamespace(time_s=1000.0), IDLE, waiting)
  assert [r.order for r in answer] == [2, 0, 1]


@pytest.mark.parametrize('ages, tokens', [
    ((0.1,), 128), ((0.1, 0.1), 128),  # what is left of TTFT takes 128 tokens
    ((0.17,), 100), ((0.17, 0.1), 100),  # the first one is late in any case
    ((0.3,), 512), ((), 512), ((0.3, 0.1), 128)])  # late ones wait for nobody
def test_a_step_leaves_the_prompt_that_is_due_first_on_time(ages, tokens):
  """Prompts of 100 tokens, a millisecond each."""
  assert punctual(ages, token_s=1e-3) == tokens


@pytest.mark.parametrize('ages, token_s, tokens', [
    # A prompt takes 9 ms, a step of the rows 10; one is left out, or two.
    ((0.19, 0.1), 9e-5, 200), ((0.19, 0.1, 0.1), 9e-5, 300),
    # It takes 11 ms, and what is left out of two 4.4 ms, or 7.9 ms.
    ((0.1715, 0.1), 1.1e-4, 200), ((0.175, 0.1), 1.1e-4, 128)])
def test_prompts_go_together_where_that_costs_less_than_a_step_of_rows(
    ages, token_s, tokens):
  assert punctual(ages, token_s) == tokens


def test_what_is_done_of_a_prompt_takes_no_step():
  assert punctual((0.19,), token_s=1e-4, done=60) == 40
  assert punctual((0.19,), token_s=1e-4, hit=80) == 20


@pytest.mark.parametrize('limit', [16, 64, 96, 112, 512])
def test_no_more_tokens_are_looked_for_than_rows_allow(limit):
  for ages in ((0.2,), (0.24, 0.2), (0.15,), ()):
    assert punctual(ages, 1e-3, limit=limit) == min(
        limit, punctual(ages, 1e-3))
  assert punctual((0.19, 0.1), 9e-5, limit=limit) == min(limit, 200)


def punctual(ages, token_s, done=0, hit=0, limit=512):
  """Tokens of the next step where prompts of these ages wait beside a row;
  TTFT is .25 s, or .2 where steps are short."""
  row_s = 0.01
  steps = latency.Affine((row_s, token_s, 0.0), (row_s, 0.0, 0.0),
                         mixed=(row_s, token_s, 0.0, 0.0))
  instance = types.SimpleNamespace(
      latency=steps, turn_rows=1, context=100, prefilling=lambda: (),
      config=InstanceConfig('flexible', 400, 16, 16, 512, 16),
      hit_tokens=lambda request: hit,
      newest=lambda most: [request_of(age_s, done=done) for age_s in ages])
  slo = Slo(0.25 if token_s == 1e-3 else 0.2, 0.1)
  return punctual_tokens(types.SimpleNamespace(time_s=1000.0), instance, slo,
                         limit)


@pytest.mark.parametrize('changes, met', [
    ({}, 1), ({'arrival_s': 997.9}, 0),  # waits: 2 s are TTFT
    ({'first_s': 999.9}, 1), ({'first_s': 999.8}, 0),  # its second token
    ({'first_s': 996.1, 'arrival_s': 995.0, 'num_out': 40}, 1),
    ({'first_s': 995.9, 'arrival_s': 995.0, 'num_out': 40}, 0),
    ({'first_s': 998.0, 'arrival_s': 995.9, 'num_out': 40}, 0),
    # Preempted after 40 tokens.
    ({'first_s': 996.1, 'arrival_s': 995.0, 'prompt_len': 140}, 1),
    ({'first_s': 995.9, 'arrival_s': 995.0, 'prompt_len': 140}, 0)])
@pytest.mark.parametrize('place', ['waiting', 'prefilling', 'pulls', 'rows'])
def test_what_attains_now_is_told_by_what_is_there(changes, met, place):
  def instance(**requests):
    return types.SimpleNamespace(**{
        name: lambda name=name: requests.get(name, ())
        for name in ('waiting', 'prefilling', 'pulls', 'rows')})

  view = types.SimpleNamespace(time_s=1000.0, instances=[
      instance(), instance(**{place: [request_of(
          0.0, **{'arrival_s': 998.1, 'num_out': 1} | changes)]})])
  assert attained(view, Slo(2.0, 0.101)) == met
  view.instances.append(instance(rows=[request_of(0.0, num_out=1)]))
  assert attained(view, Slo(2.0, 0.101)) == (1 + met) / 2
  view.instances[:] = [instance()]
  assert attained(view, Slo(2.0, 0.101)) == 1.0


@pytest.mark.parametrize('room, tokens, kept', [
    (-1, 70, 0), (0, 70, 0), (1, 71, 0), (2, 73, 0), (3, 77, 0), (4, 85, 0),
    (9, 85, 0), (1, 70, 1), (2, 71, 1), (9, 81, 1)])
def test_as_many_prompts_begin_as_there_is_room_for_and_late_ones_last(
    room, tokens, kept):
  """What has begun goes on: 100 tokens, of which 30 are done. What is kept of
  others need not be computed."""
  waiting = [request_of(age_s, stop=stop) for age_s, stop in (
      (0.4, 4), (0.3, 8), (0.1, 1), (0.05, 2))]
  instance = types.SimpleNamespace(
      prefilling=lambda: (request_of(0.3, done=30),),
      waiting=lambda most: waiting[:most],
      newest=lambda most: waiting[-most:], hit_tokens=lambda request: kept)
  view = types.SimpleNamespace(time_s=1000.0)
  assert fitting_tokens(view, instance, SLO, room) == tokens


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
