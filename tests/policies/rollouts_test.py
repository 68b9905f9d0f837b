"""Rollouts: what one tells, when it ends, and which roles win."""

import dataclasses
import statistics
import types

import pytest

from dsjax.config.placement import ROLES as DOES
from dsjax.config.placement import Slo
from dsjax.policies import rollouts
from dsjax.policies.roles import choices
from dsjax.policies.rollouts import rounded
from dsjax.scheduling.pace import Paced
from dsjax.scheduling.policy import DISTSERVE, Load
from dsjax.simulation import simulator
from tests.common.policy_runs import INSTANCE, LINK, SLO, STEP

LOAD, ROLES = 5, 6  # places of them in the arguments of rollouts.played


def view_of(load, roles=('flexible',) * 2):
  """Of instances that hold nothing; those that are flexible mix."""
  instances = [types.SimpleNamespace(
      index=index, role='chunked' if role == 'flexible' else role,
      flips=role == 'flexible', latency=Paced(STEP),
      config=dataclasses.replace(INSTANCE, role=role))
      for index, role in enumerate(roles)]
  return types.SimpleNamespace(
      load=load, link=LINK, may_decode=[
          i for i in instances if i.role != 'prefill'],
      may_prefill=[i for i in instances if i.role != 'decode'])


def choice(monkeypatch, known, lives=2.0, **more):
  """What two that mix become where rollouts tell {roles: (share, scale)}, and
  what was played."""
  played = []
  monkeypatch.setattr(rollouts, 'played', lambda *args, seed=0: (
      played.append(args[ROLES]), rollouts.Played(*known[args[ROLES]]))[1])
  view = view_of(Load(9.0, 100.0, 50.0, lives=lives))
  return rollouts.better(DISTSERVE, SLO, view, list(known), **more), played


@pytest.mark.parametrize('now, other, flips', [
    (.8, .75, False), (.8, .84, False), (.8, .86, True), (.94, .98, False),
    (.96, 1.0, False), (0.0, .1, True)])
def test_roles_change_for_what_attains_clearly_more(now, other, flips,
                                                    monkeypatch):
  """By more than the noise of a rollout; and none is played in vain."""
  answer, played = choice(monkeypatch, {
      ('chunked',) * 2: (now, .9), ('prefill', 'decode'): (other, .9)})
  assert answer == ({0: 'prefill', 1: 'decode'} if flips else {})
  assert (set(played) == {('chunked',) * 2}) == (now > 1 - rollouts.NOISE)


def test_where_nothing_is_ahead_it_is_not_played_on(monkeypatch):
  """Two loads under the roles of now and under the others, each once."""
  assert len(choice(monkeypatch, {
      ('chunked',) * 2: (.8, .9), ('prefill', 'decode'): (.7, .9)})[1]) == 4


@pytest.mark.parametrize('attained, flips', [
    (0.0, True), (.6, True), (.86, True), (.88, False), (1.0, False)])
def test_what_is_seen_of_the_roles_of_now_counts_where_it_is_more(
    attained, flips, monkeypatch):
  """A third: .6 that is told and .87 that is seen are .69; .74 is 5 more."""
  answer, _ = choice(monkeypatch, {
      ('chunked',) * 2: (.6, .9), ('prefill', 'decode'): (.741, .9)},
      attained=attained)
  assert bool(answer) == flips


@pytest.mark.parametrize('arrived, error', [(400, .05), (2500, .02), (0, .1)])
def test_a_change_is_played_at_rates_as_far_apart_as_little_is_known(
    arrived, error, monkeypatch):
  """One standard error to either side: at the rate that is told alone, roles
  would swing where a little less or more of it decides."""
  rates = {}

  def tell(*args, seed=0):
    rates.setdefault(seed, []).append(args[LOAD].rate_per_s)
    return rollouts.Played(.9 if args[ROLES][0] == 'prefill' else .8, .9)

  monkeypatch.setattr(rollouts, 'played', tell)
  load = Load(9.0, 100.0, 50.0, lives=2.0, arrived=arrived)
  assert rollouts.better(DISTSERVE, SLO, view_of(load), choices(2, 0))
  for seed, rate_per_s in enumerate((9.0, 9.0 * (1 - error),
                                     9.0 * (1 + error))):
    light, heavy, _ = rounded(load._replace(rate_per_s=rate_per_s))
    assert {light.rate_per_s, heavy.rate_per_s} == set(rates[seed]) - {9.0}


def test_nothing_changes_before_outputs_are_known(monkeypatch):
  """At first those that have ended are few and tell little."""
  assert choice(monkeypatch, {
      ('chunked',) * 2: (.1, .9), ('prefill', 'decode'): (.9, .9)},
      lives=0.2) == ({}, [])


def test_where_there_is_no_choice_nothing_is_played(monkeypatch):
  monkeypatch.setattr(rollouts, 'played', None)
  view = view_of(LENGTHS._replace(lives=9.0), ('flexible',))
  assert choices(1, 0) == []
  assert rollouts.better(DISTSERVE, SLO, view, []) == {}


@pytest.mark.parametrize('slo, asks', [
    (SLO, True), (Slo(1e-6, 1.0), False), (Slo(1.0, 1e-6), False),
    (Slo(0.0102, 0.0112), True)])
@pytest.mark.parametrize('output_len', [50.0, 1.0])
def test_where_nothing_can_attain_nothing_is_played(
    slo, asks, output_len, monkeypatch):
  """Not even a lone request; else all choices were played to their ends.
  Outputs of one token miss no TPOT."""
  played = []
  monkeypatch.setattr(rollouts, 'played', lambda *args, seed=0: (
      played.append(args[ROLES]), rollouts.Played(.5, .9))[1])
  view = view_of(Load(9.0, 100.0, output_len, lives=2.0))
  rollouts.better(DISTSERVE, slo, view, choices(2, 0))
  assert bool(played) == (asks or output_len == 1 and slo.tpot_s < SLO.tpot_s)


def test_what_only_a_split_attains_is_played(monkeypatch):
  """One instance is fast enough for prompts, the other for rows."""
  monkeypatch.setattr(rollouts, 'played', lambda *args, seed=0: rollouts.Played(
      .9 if args[ROLES] == ('prefill', 'decode') else .1, .9))
  view = view_of(Load(9.0, 100.0, 50.0, lives=2.0))
  for instance, prompt_s, step_s in zip(view.may_prefill, (.01, .3), (.05, .01),
                                        strict=True):
    instance.latency = Paced(dataclasses.replace(
        STEP, prefill=(prompt_s, 1e-4, 0.0), decode=(step_s, 1e-6, 1e-4)))
  answer = rollouts.better(DISTSERVE, SLO, view, choices(2, 0))
  assert answer == {0: 'prefill', 1: 'decode'}


def test_where_those_that_decode_are_lost_rows_are_where_they_may_be():
  """Not on an instance that can only prefill."""
  roles = ('prefill', 'prefill')
  configs = tuple(dataclasses.replace(
      INSTANCE, role=role, num_pages=4000, max_seqs=64)
                  for role in ('prefill', 'flexible'))
  load = Load(4.0, 100.0, 50.0, longest_prompt=800)
  assert rollouts.homes_of(roles, configs) == [1]
  assert rollouts.rows_like(load, 0, SLO.tpot_s, [1])
  assert rollouts.played(DISTSERVE, SLO, configs, (STEP,) * 2, LINK, load,
                         roles, 0.0).share > 0.5


def test_instances_of_a_fixed_role_are_played_beside_the_flexible_ones(
    monkeypatch):
  """In their role, whatever is chosen for the others; they are not told."""
  given = []

  def tell(*args, seed=0):
    given.append((args[ROLES], [config.role for config in args[2]]))
    return rollouts.Played(.9 if args[ROLES][1] == 'decode' else .5, .9)

  monkeypatch.setattr(rollouts, 'played', tell)
  there = ('prefill', 'flexible', 'decode')
  view = view_of(Load(9.0, 100.0, 50.0, lives=2.0), there)
  known = choices(1, 0, ('prefill', 'decode'))
  assert known == [('chunked',), ('colocated',), ('decode',), ('prefill',)]
  assert rollouts.better(DISTSERVE, SLO, view, known) == {1: 'decode'}
  assert {roles for roles, _ in given} == {
      ('prefill', role, 'decode') for (role,) in known}
  assert all(configs == list(there) for _, configs in given)


@pytest.mark.parametrize('roles', [
    ('prefill', 'decode', 'chunked'), ('prefill', 'prefill', 'decode')])
def test_a_rollout_leaves_fixed_roles_alone(roles):
  """The scheduler takes no role for an instance that is not flexible."""
  configs = [dataclasses.replace(
      INSTANCE, role=role, num_pages=4000, max_seqs=64)
      for role in ('prefill', 'decode', 'flexible')]
  order = [0, 1, 2] if roles[2] == 'chunked' else [0, 2, 1]
  own = tuple(configs[place] for place in order)
  load = Load(8.0, 100.0, 50.0, longest_prompt=800)
  outcome = rollouts.played(DISTSERVE, SLO, own, (STEP,) * 3, LINK, load, roles,
                            0.0)
  assert 0 < outcome.share <= 1


@pytest.mark.parametrize('count, now, fixed, some', [
    (0, 0, (), None), (1, 0, (), None), (0, 0, ('prefill', 'decode'), None),
    (1, 0, ('prefill',), {('chunked',), ('decode',)}),
    (1, 0, ('decode',), {('chunked',), ('prefill',)}),
    (2, 2, ('decode',), {('prefill', 'prefill'), ('prefill', 'decode')}),
    (4, 0, (), {('prefill', 'decode', 'decode', 'decode'),
                ('prefill',) * 3 + ('chunked',)})])
def test_choices_prefill_and_decode_somewhere(count, now, fixed, some):
  known = choices(count, now, fixed)
  assert len(set(known)) == len(known)
  if some is None:
    assert known == []
  else:
    assert some <= set(known)
  for roles in known:
    does = [DOES[role] for role in (*roles, *fixed)]
    assert len(roles) == count
    assert any(d.prefills for d in does) and any(d.decodes for d in does)


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


LENGTHS = Load(8.0, 300.0, 100.0)


def played(roles, least, load=LENGTHS):
  """A rollout of the static split on two instances."""
  config = dataclasses.replace(INSTANCE, role='flexible', num_pages=4000,
                               max_seqs=64)
  return rollouts.played(DISTSERVE, SLO, (config,) * 2, (STEP,) * 2, LINK,
                         load, roles, least)


def test_a_rollout_ends_once_it_cannot_win(monkeypatch):
  """And tells the same as one that is played to its end, where it can."""
  seen = []

  def stream(*args, rows):
    for record in simulator.stream(*args, rows=rows):
      seen.append(record)
      yield record

  monkeypatch.setattr(rollouts, 'simulator', types.SimpleNamespace(
      stream=stream))
  roles = ('prefill', 'decode')
  rollouts.remembered.cache_clear()
  whole, count = played(roles, 0.0), len(seen)
  assert 0.1 < whole.share < 0.9
  seen.clear()
  rollouts.remembered.cache_clear()
  more = whole.share + 0.05
  assert played(roles, more) is rollouts.LOST and 0 < len(seen) < count - 10
  before = len(seen)  # what is known is not played again
  assert played(roles, more + 0.05) is rollouts.LOST and len(seen) == before
  assert played(roles, whole.share - 0.01) == whole
  assert len(seen) == before + count
  assert played(roles, 0.0) == whole and played(roles, more) is rollouts.LOST
  assert len(seen) == before + count


def test_a_rollout_tells_how_near_its_requests_came():
  """At twice the load the same roles come nearer to missing."""
  light, heavy = (played(('prefill', 'decode'), 0.0, LENGTHS._replace(
      rate_per_s=rate)) for rate in (1.0, 4.0))
  assert light.share > 0.98 and light.scale < min(1.0, heavy.scale)


def test_a_rollout_begins_with_the_rows_of_a_full_system(monkeypatch):
  """So it tells what comes of a load in the long run, not of its start."""
  load = Load(4.0, 300.0, 300.0)
  rows = rollouts.rows_like(load, 0, 2 * SLO.tpot_s, [1, 2])
  assert len(rows) == int(4.0 * 299 * 2 * SLO.tpot_s) == 52
  assert [row.instance for row in rows] == [1, 2] * 26
  assert min(row.id for row in rows) >= rollouts.MOST
  so_far, more, prompt_len = (
      sum(getattr(row, name) for row in rows) / len(rows)
      for name in ('so_far', 'more', 'prompt_len'))
  # Of lengths whose cv is 1 the mean of those that run at a time is twice that
  # of all, and half of it is over.
  assert 180 < so_far < 450 and 180 < more < 450 and 200 < prompt_len < 450
  assert all(row.first_s == -row.so_far * 2 * SLO.tpot_s for row in rows)
  full = played(('chunked',) * 2, 0.0, load)
  rollouts.remembered.cache_clear()
  monkeypatch.setattr(rollouts, 'rows_like', lambda *args: [])
  assert played(('chunked',) * 2, 0.0, load).share > full.share + 0.03


@pytest.mark.parametrize('mean', [1.4, 4.0, 30.0])
def test_outputs_of_a_rollout_are_as_long_as_told(mean):
  """All of their tokens, the first one too, as Load counts them; a row has had
  that one."""
  load = Load(40.0, 300.0, mean, output_cv=0.8, longest_prompt=900)
  sent = rollouts.requests_like(load, Slo(5.0, 0.1), 0)
  told = statistics.fmean(r.sampling.max_tokens for r in sent)
  assert len(sent) == rollouts.MOST
  assert told == pytest.approx(mean, rel=0.01, abs=0.15)
  rows = rollouts.rows_like(load, 0, 0.1, [0])
  assert len(rows) == int(4.0 * (mean - 1))
  assert all(row.so_far >= 1 <= row.more for row in rows)


def test_instances_that_all_prefill_decode_as_well():
  """So it is where those that decoded are lost."""
  none = played(('prefill',) * 2, 0.0)
  assert 0 < none.share < played(('chunked',) * 2, 0.0).share


def test_some_of_the_requests_of_a_rollout_wait_already():
  slo = Slo(10.0, SLO.tpot_s)
  sent = rollouts.requests_like(LENGTHS, slo, 0)
  at_once = [r for r in sent if r.arrival_s == 0]
  assert len(at_once) == pytest.approx(
      8.0 * rollouts.QUEUED * slo.ttft_s, abs=12)
  assert [r.arrival_s for r in sent] == sorted([r.arrival_s for r in sent])
  assert sent != rollouts.requests_like(LENGTHS, slo, 1)
  # With any objective those that count come later.
  sent = rollouts.requests_like(LENGTHS, Slo(1e4, SLO.tpot_s), 0)
  assert sum(r.arrival_s == 0 for r in sent) == len(sent) // 5 + 1


def test_requests_that_run_for_too_long_have_missed_in_a_rollout(monkeypatch):
  """So one of slow rows ends before they do."""
  seen = []

  def stream(*args, rows):
    for record in simulator.stream(*args, rows=rows):
      seen.append(record.id)
      yield record

  monkeypatch.setattr(rollouts, 'simulator', types.SimpleNamespace(
      stream=stream))
  load = Load(20.0, 300.0, 300.0)
  count = len(rollouts.requests_like(load, SLO, 0))
  first = count // 5
  assert played(('prefill', 'decode'), 0.5, load).share < 0.5
  assert sum(first <= id < count for id in seen) < 0.5 * (count - first)


@pytest.mark.parametrize('draws, exact, lives, flips', [
    ((.88, .88, .9), .91, 2.0, True), ((.88, .88, .81), .91, 2.0, True),
    ((.84, .88, .9), .91, 2.0, True),  # little is won with the first requests
    ((.88, .88, .8), .91, 2.0, False),  # nothing with some
    ((.88, .88, .9), .85, 2.0, False),  # or at this very load
    ((.88, .88, .81), .86, 2.0, False),  # less than NOISE on average
    ((.88, .88, .9), .91, 0.7, True), ((.88, .88, .9), .91, 0.3, False),
    ((.88, .88, 1.0), 1.0, 0.3, True), ((.88, .88, 1.0), 1.0, 0.2, False)])
def test_a_change_is_played_with_the_load_as_it_is_and_other_requests(
    draws, exact, lives, flips, monkeypatch):
  """What is better under the rounded load only is not taken, nor what is
  better with some requests only. The less is known, the more must it win."""
  now, other = ('chunked',) * 2, ('prefill', 'decode')
  load = Load(9.0, 100.0, 50.0, lives=lives)

  def tell(*args, seed=0):
    of_now = args[ROLES] == now
    if args[LOAD] != load:
      return rollouts.Played(.8 if of_now else draws[seed], .9)
    return rollouts.Played(.85 if of_now else exact, .9)

  monkeypatch.setattr(rollouts, 'played', tell)
  answer = rollouts.better(DISTSERVE, SLO, view_of(load), [now, other])
  assert answer == ({0: 'prefill', 1: 'decode'} if flips else {})


def test_a_load_is_between_two_so_that_little_changes_ask_nothing_new():
  load = Load(100.0, 300.0, 200.0)
  light, heavy, weight = rounded(load)
  near = rounded(Load(101.0, 301.0, 200.5))
  assert near[:2] == (light, heavy) and near[2] > weight
  assert light.rate_per_s < heavy.rate_per_s < 1.2 * light.rate_per_s
  assert rounded(load._replace(rate_per_s=150.0))[0] != light
  for lengths in ((300.0, 200.0), (280.0, 220.0), (330.0, 210.0)):
    light, heavy, weight = rounded(Load(100.0, *lengths))
    rate_per_s = light.rate_per_s**(1 - weight) * heavy.rate_per_s**weight
    assert (rate_per_s**2 * light.prompt_len * light.output_len
            == pytest.approx(100.0**2 * lengths[0] * lengths[1]))


@pytest.mark.parametrize('weight, share', [(0.0, .9), (0.25, .8), (0.9, .54)])
def test_what_comes_of_a_load_is_between_what_comes_of_two(weight, share):
  loads = (Load(8.0, 300.0, 100.0), Load(9.0, 300.0, 100.0))
  shares, asked = dict(zip(loads, (.9, .5), strict=True)), []

  def play(load, roles, least):
    asked.append((load, roles, least))
    return rollouts.Played(shares[load], 1 - shares[load])

  outcome = rollouts.between(play, *loads, weight, ('chunked',), 0.0)
  assert outcome == pytest.approx((share, 1 - share))
  assert {least for *_, least in asked} == {0.0}
  asked.clear()
  rollouts.between(play, *loads, 0.5, ('chunked',), 0.8)
  # If all of the lighter load attains, 60 % of the heavier must; as 50 do, so
  # must more than all.
  assert [least for *_, least in asked] == pytest.approx([0.55, 1.0], abs=0.06)


@pytest.mark.parametrize('cv', [0.2, 1.0, 2.0])
def test_lengths_of_a_rollout_have_the_mean_and_the_spread_of_the_load(cv):
  sent = rollouts.requests_like(Load(50.0, 400.0, 400.0, cv, cv), SLO, 0)
  for lengths in ([len(r.prompt) for r in sent],
                  [r.sampling.max_tokens for r in sent]):
    assert statistics.mean(lengths) == pytest.approx(400, rel=0.25)
    assert (statistics.pstdev(lengths) / statistics.mean(lengths)
            == pytest.approx(cv, rel=0.3))


@pytest.mark.parametrize('longest', [400, 500, 2000])
def test_no_prompt_of_a_rollout_is_longer_than_those_of_the_load(longest):
  """The others are longer for it, so that the mean is that of the load."""
  load = Load(50.0, 400.0, 400.0, 1.0, 1.0, longest_prompt=longest)
  lengths = [len(r.prompt) for r in rollouts.requests_like(load, SLO, 0)]
  assert max(lengths) <= longest
  assert statistics.mean(lengths) == pytest.approx(400, rel=0.1)
  lighter, heavier, _ = rounded(load)
  assert lighter.longest_prompt == heavier.longest_prompt
  assert longest <= lighter.longest_prompt <= 1.16 * longest


@pytest.mark.parametrize('rate, rows', [(1.0, 3), (6.0, 39)])
def test_rows_of_a_rollout_are_those_of_the_steps_that_they_take(rate, rows):
  """At 6/s they are more than meet TPOT: then those of TPOT."""
  load = Load(rate, 300.0, 300.0)
  roles = ('prefill', 'decode')
  token_s = rollouts.settled_token_s(load, SLO, (STEP,) * 2, roles, [1])
  assert len(rollouts.rows_like(load, 0, token_s, [1])) == rows


def test_rows_of_a_rollout_take_longer_beside_prompts():
  load = Load(1.0, 300.0, 300.0)
  alone_s, mixed_s = (
      rollouts.settled_token_s(load, SLO, (STEP,) * 2, ('prefill', role),
                               [1])
      for role in ('decode', 'chunked'))
  assert alone_s < mixed_s < SLO.tpot_s
