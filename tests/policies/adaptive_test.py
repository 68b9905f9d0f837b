"""Our policy `adaptive`: roles, steps and what it knows."""

import dataclasses
import math
import types

import pytest

from dsjax.analysis import metrics
from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement.api import simulate
from dsjax.policies import adaptive, replan, static
from dsjax.policies.named import named
from dsjax.policies.predict import TOO_LATE, least_output
from dsjax.policies.roles import leave_prefills
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Migrate, Reject
from dsjax.scheduling.pace import Paced
from dsjax.scheduling.policy import DISTSERVE, Load, Refuse
from dsjax.simulation import latency, simulator
from tests.common.policy_runs import (
  FOUR,
  INSTANCE,
  LINK,
  SLO,
  STEP,
  attainment,
  commands,
  late_flips,
  served,
)


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


@pytest.mark.parametrize('roles, fixed_as, slo, places', [
    (('chunked',) * 2, None, SLO, 16),  # nothing is handed off: no link
    (('flexible',) * 2, ('chunked',) * 2, SLO, 1),
    (('flexible',) * 2, ('prefill', 'decode'), Slo(0.2, 0.0105), 16),
    (('flexible',) * 2, ('prefill', 'decode'), Slo(0.2, math.inf), 64)])
def test_no_configuration_ends_a_run_of_adaptive(roles, fixed_as, slo, places):
  """With steps that take the host no time."""
  policy = named('adaptive', slo)
  if fixed_as:
    policy = dataclasses.replace(
        policy, tick_s=static.ONCE_S,
        resize=lambda view: dict(enumerate(fixed_as)))
  config = scheduler.Config(tuple([
      InstanceConfig(role, 500, 16, places, 512, 16) for role in roles]), 1024,
                            depth=1, policy=policy)
  sent = [Request(i, 0.02 * i, [1] * 90, Sampling(max_tokens=50))
          for i in range(40)]
  run = simulator.simulate(config, sent, dataclasses.replace(STEP, host_s=0.0),
                           LINK if fixed_as else None)
  assert {len(r.token_s) for r in run.records} == {50}
  if slo.tpot_s == math.inf:  # as many rows as there are places
    assert max(r.ttft_s for r in run.records) < slo.ttft_s


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
      prefilling=lambda: (), waiting=lambda most: (), newest=lambda most: (),
      latency=latency.Affine((0.01, 1e-6, 0.0), (0.01, 0.0, 1e-6),
                             mixed=(0.01, 1e-6, 0.0, 0.0)))
  tokens = named('adaptive', Slo(1.0, tpot_s)).batch(
      types.SimpleNamespace(time_s=0.0), instance).tokens
  assert 0.97 < tokens * 1e-6 / (tpot_s - 0.01) < 0.995


@pytest.mark.parametrize('now, asked', [
    ('CCCC', '123'), ('PCCC', '123'), ('PPPD', '123'), ('CC', '1'),
    ('C' * 8, '1246'), ('PPP' + 5 * 'D', '12346')])
def test_adaptive_asks_for_one_prefill_instance_more_or_less_and_for_quarters(
    now, asked, monkeypatch):
  names = {'P': 'prefill', 'D': 'decode', 'C': 'chunked'}
  monkeypatch.setattr(adaptive, 'better', lambda *args: args[-2])
  view = types.SimpleNamespace(
      time_s=0.0, instances=(), may_decode=(), may_prefill=[
          types.SimpleNamespace(index=index, flips=True, role=names[role])
          for index, role in enumerate(now)])
  choices = named('adaptive', SLO).resize(view)
  assert {str(roles.count('prefill')) for roles in choices} == {'0', *asked}
  assert len(choices) == 2 + 2 * len(asked)


@pytest.mark.parametrize('text, seen', [
    ('adaptive', 0.5), ('adaptive:rejects=True', 0.0)])
def test_where_some_are_refused_those_that_are_there_tell_nothing(
    text, seen, monkeypatch):
  """They are what was not refused."""
  given = []
  monkeypatch.setattr(adaptive, 'better', lambda *args: given.append(args[-1]))
  monkeypatch.setattr(adaptive, 'attained', lambda view, slo: 0.5)
  named(text, SLO).resize(types.SimpleNamespace(
      time_s=0.0, instances=(), may_decode=(), may_prefill=()))
  assert given == [seen]


@pytest.mark.parametrize('kept', [True, False])
def test_prompts_that_are_kept_are_soon_done(kept):
  """Beside rows too, so that they are neither refused nor sent elsewhere."""
  config = scheduler.Config(
      (InstanceConfig('flexible', 4000, 16, 64, 2048, 16),), 8192, depth=1,
      policy=named('adaptive:rejects=True', Slo(0.45, 0.022)),
      prefix_cache=True)
  own = tuple(range(1, 251))

  def conversation(id, second, tokens, blocks):
    return Request(id, second, range(tokens), Sampling(max_tokens=2), blocks,
                   16)

  first = conversation(0, 0.0, 4000, own)
  rows = [Request(1 + i, 0.6 + 0.05 * i, range(50), Sampling(max_tokens=400))
          for i in range(24)]
  later = [conversation(100 + i, 4.0 + 0.4 * i, 4010, own if kept else tuple(
      10**6 * i + block for block in own)) for i in range(1, 6)]
  records = simulator.simulate(config, [first, *rows, *later], STEP, LINK
                               ).records
  told = [r.status for r in records if r.id > 100]
  assert ('refused' in told) == (not kept)


def test_adaptive_stays_where_nothing_is_better():
  run = served('adaptive', 40, 300)
  assert run.summary.attainment[0] > 0.98
  assert not late_flips(run, 5)


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


def _step(rows, waited_s, role='chunked', now_s=100.0, size=496):
  """What adaptive lets into the next step of an instance whose rows have had
  so many tokens and have saved so many seconds, beside a prompt that waits."""
  steps = latency.Affine((0.01, 1e-4, 0.0), (0.015, 1e-6, 1e-4), host_s=0.001,
                         mixed=(0.02, 1e-5, 0.0, 1e-6))

  def waiting(most):
    return (types.SimpleNamespace(
        arrival_s=now_s - waited_s, first_s=None, done=0, stop=size),)

  instance = types.SimpleNamespace(
      latency=steps, role=role, config=InstanceConfig(
          'flexible', 400, 16, 16, 512, 16), num_rows=len(rows),
      turn_rows=len(rows), context=100 * len(rows),
      rows=lambda: [types.SimpleNamespace(
          num_out=tokens, first_s=now_s + saved_s - tokens * SLO.tpot_s)
          for tokens, saved_s in rows],
      prefilling=lambda: (), hit_tokens=lambda request: 0,
      waiting=waiting, newest=waiting)
  return named('adaptive', SLO).batch(
      types.SimpleNamespace(time_s=now_s, load=Load(1.0, 100.0, 100.0)),
      instance).tokens


AGED_S = 101 * SLO.ttft_s


@pytest.mark.parametrize('rows, waited_s, tokens', [
    ([(50, 0.9)], 0.1, 496),  # the row has saved a lot
    ([(50, 0.9), (1, 0.0)], 0.1, 0),  # one that has just begun: nothing
    ([(50, 0.9), (1, 0.0)], AGED_S, 496),  # it makes up for one step
    ([(50, -0.05), (1, 0.0)], AGED_S, 0),  # nothing is saved
    ([(50, -0.05), (1, 0.0)], 4 * AGED_S, adaptive.LEAST),
    ([(50, -0.3), (50, 0.9)], 0.1, 496)])  # one that will miss holds up none
def test_an_old_prompt_takes_what_rows_that_have_run_for_some_time_have_saved(
    rows, waited_s, tokens):
  assert _step(rows, waited_s) == tokens


@pytest.mark.parametrize('size, tokens', [(100, 100), (5, adaptive.LEAST)])
def test_a_step_is_no_longer_than_the_prompt_that_is_due_first_can_bear(
    size, tokens):
  assert _step([(50, 0.9)], 0.19, size=size) == tokens


@pytest.mark.parametrize('rows, token_s, ages, residents, chosen', [
    ((3, 3), 1e-5, (), (5, 2), 1),  # of equal ones the one with fewer
    ((0, 3), 1e-3, (), (5, 2), 0),  # beside rows few of its tokens go
    ((3, 0), 1e-5, (0.1,), (5, 5), 0),  # or many: sooner than behind another
    ((3, 0), 1e-3, (0.3,), (5, 5), 1),  # which does not come first if late
    ((0, 0), 1e-5, (0.3,), (9, 1), 0)])  # of equal ones with fewer tokens
@pytest.mark.parametrize('begun', [False, True])
def test_a_prompt_goes_where_it_is_done_first(
    rows, token_s, ages, residents, chosen, begun):
  """Beside one of 100 tokens that waits at the second instance, and perhaps
  one that has begun there, however late."""
  steps = latency.Affine((0.01, 1e-4, 0.0), (0.01, 0.0, 0.0),
                         mixed=(0.01, token_s, 0.0, 0.0))
  queue = [types.SimpleNamespace(done=0, stop=100, first_s=None,
                                 arrival_s=10.0 - age_s) for age_s in ages]
  first = [types.SimpleNamespace(done=0, stop=900)] * begun
  prefills = [types.SimpleNamespace(
      index=n, latency=steps, num_rows=rows[n], turn_rows=rows[n], context=0,
      config=InstanceConfig('flexible', 400, 16, 16, 512, 16), pieces=(),
      prefilling=lambda n=n: first * n, newest=lambda most, n=n: queue * n,
      hits=lambda request: (0, 0), hit_tokens=lambda request: 0,
      backlog=100 * n * len(queue), residents=residents[n]) for n in (0, 1)]
  request = types.SimpleNamespace(done=0, stop=0, first_s=None,
                                  prompt_len=100, arrival_s=10.0)
  assert named('adaptive', SLO).route(types.SimpleNamespace(
      time_s=10.0, prefills=prefills), request) == (
          0 if begun and token_s < 1e-3 else chosen)


@pytest.mark.parametrize('age_s, first_s, refused', [
    (0.0, None, False), (0.179, None, False), (0.181, None, True),
    (0.3, 9.9, False)])  # a preempted one has its first token
def test_what_would_miss_ttft_is_refused_where_this_is_asked_for(
    age_s, first_s, refused):
  """A prompt of 100 tokens takes 20 ms there; TTFT is .2 s."""
  steps = latency.Affine((0.01, 1e-4, 0.0), (0.01, 0.0, 0.0))
  instance = types.SimpleNamespace(
      index=3, latency=steps, num_rows=0, turn_rows=0, context=0, backlog=0,
      config=InstanceConfig('flexible', 400, 16, 16, 512, 16), pieces=(),
      prefilling=lambda: (), newest=lambda most: (), residents=0,
      hits=lambda request: (0, 0), hit_tokens=lambda request: 0)
  view = types.SimpleNamespace(time_s=10.0, prefills=(instance,))
  request = types.SimpleNamespace(
      done=0, stop=0, prompt_len=100, input_len=100, first_s=first_s,
      arrival_s=10.0 - age_s)
  slo = Slo(0.2, 0.05)
  answer = named('adaptive:rejects=True', slo).route(view, request)
  assert answer == (Refuse(TOO_LATE) if refused else 3)
  assert named('adaptive', slo).route(view, request) == 3


@pytest.mark.parametrize('kept, rows, refused', [
    (0, 1, True), (960, 1, False), (0, 0, False)])
def test_beside_rows_what_is_computed_of_a_prompt_takes_steps(
    kept, rows, refused):
  """1,000 tokens: .11 s alone, three steps beside a row."""
  instance = types.SimpleNamespace(
      index=3, num_rows=rows, turn_rows=rows, context=0, backlog=0,
      latency=latency.Affine((0.01, 1e-4, 0.0), (0.01, 0.0, 0.0),
                             mixed=(0.01, 1e-4, 0.0, 0.0)),
      config=InstanceConfig('flexible', 400, 16, 16, 4096, 16), pieces=(),
      prefilling=lambda: (), newest=lambda most: (), residents=0,
      hits=lambda request: (kept, 0), hit_tokens=lambda request: kept)
  request = types.SimpleNamespace(
      done=0, stop=0, prompt_len=1000, input_len=1000, first_s=None,
      arrival_s=9.92)
  answer = named('adaptive:rejects=True', Slo(0.2, 0.05)).route(
      types.SimpleNamespace(time_s=10.0, prefills=(instance,)), request)
  assert answer == (Refuse(TOO_LATE) if refused else 3)


@pytest.mark.parametrize('text', ['adaptive', 'replan'])
def test_instances_of_a_fixed_role_are_told_to_what_chooses(text, monkeypatch):
  """One that is flexible, beside one that prefills and one that decodes: it
  may do either."""
  given = []
  for module in (adaptive, replan):
    monkeypatch.setattr(module, 'better', lambda *args: given.append(args[3]))
  prefill, decode, flexible = [
      types.SimpleNamespace(index=index, flips=role == 'chunked', role=role)
      for index, role in enumerate(('prefill', 'decode', 'chunked'))]
  named(text, SLO).resize(types.SimpleNamespace(
      time_s=5.0, instances=(), may_prefill=[prefill, flexible],
      may_decode=[decode, flexible]))
  assert set(given[0]) == {('prefill',), ('decode',), ('chunked',),
                           ('colocated',)}


def test_of_more_than_can_attain_some_are_refused_where_this_is_asked_for():
  """More of the others attain then, and of all."""
  slo = Slo(0.1, 0.045)
  alone, rejects = [served(text, 300, 900, slo)
                    for text in ('adaptive', 'adaptive:rejects=True')]
  assert not commands(alone, Reject) and len(commands(rejects, Reject)) > 50
  assert rejects.summary.attainment[0] > alone.summary.attainment[0]
  late = [sum(r.ttft_s > slo.ttft_s for r in run.kept if r.token_s)
          for run in (alone, rejects)]
  assert late[1] < 0.9 * late[0]


def test_rows_of_a_colocated_instance_lend_what_nearly_all_will_save():
  """Of outputs of 100 tokens, cv 1, all but one of twenty have 18."""
  begun, longer = [(1, 0.0)], [(20, 0.0)]
  assert _step(begun, 0.1) == _step(longer, 0.1, 'colocated')
  assert _step(begun, 0.1, 'colocated') > 10 * _step(begun, 0.1)
  assert least_output(Load(1.0, 100.0, 100.0)) == pytest.approx(18, rel=0.02)


@pytest.mark.parametrize('rows, lone_s, tokens', [
    (0, 0.01, 230), (10, 0.01, 230),  # room for their rows
    (0, 1.0, 230), (1, 1.0, 230),  # a lone row misses: nothing is won
    (200, 0.01, 100),  # none: what has begun
    (102, 0.01, 120)])  # for one more, which is on time
def test_prompts_wait_while_rows_have_no_room(rows, lone_s, tokens):
  steps = latency.Affine((0.01, 1e-6, 0.0), (lone_s, 0.0, 1e-4), host_s=0.001)
  waiting = [types.SimpleNamespace(
      arrival_s=100 - waited_s, done=0, stop=size, first_s=None)
             for waited_s, size in ((0.3, 110), (0.1, 20))]
  prefills, decodes = [types.SimpleNamespace(
      latency=steps, role=role, index=index, num_rows=rows * index, context=0,
      config=dataclasses.replace(INSTANCE, prefill_tokens=512, max_seqs=400),
      waiting=lambda most: waiting[:most], newest=lambda most: waiting[-most:],
      pulls=lambda: (), num_last=0, residents=rows * index,
      prefilling=lambda index=index: [
          types.SimpleNamespace(stop=150, done=50)] * (1 - index),
      hit_tokens=lambda request: 0)
      for index, role in enumerate(('prefill', 'decode'))]
  view = types.SimpleNamespace(
      time_s=100.0, instances=(prefills, decodes), decodes=(decodes,),
      link=LINK, knows_link=True, load=Load(1.0, 100.0, 1e4))
  assert named('adaptive', SLO).batch(view, prefills).tokens == tokens
