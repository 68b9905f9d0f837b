"""The load that policies are told."""

import bisect
import random

import pytest

from dsjax.scheduling.recent import (
  COHORT,
  COHORTS,
  LEAST,
  MOST,
  Recent,
  _spread,
  alike,
)

SHORT, LONG = 20, 380  # tokens of every other output
MEAN = (SHORT + LONG) / 2


def after(recent, sent, rows_at_once, length_of=lambda n: (SHORT, LONG)[n % 2]):
  """What `recent` tells of `sent` requests, one a tick, each of whose tokens
  takes as many ticks as make so many of them run at once."""
  token = rows_at_once / MEAN
  ends = sorted((n + token * length_of(n), n) for n in range(sent))
  for _, n in ends[:bisect.bisect(ends, (sent, -1))]:
    recent.add_ended(n, length_of(n))
  return recent.load(float(sent), [
      (n, int((sent - n) / token)) for end, n in ends if end > sent])


@pytest.mark.parametrize('rows', [10, 100, 400, 1800])
def test_outputs_are_told_however_many_run(rows):
  load = after(Recent((), ()), 20 * max(rows, LEAST), rows)
  assert load.output_len == pytest.approx(MEAN, rel=0.15)


def test_outputs_are_not_told_too_short_while_the_first_run():
  rows = 1000
  load = after(Recent((), ()), rows, rows)  # only short ones have ended
  assert load.output_len > 5 * SHORT
  assert load.lives < 0.1  # and that little is known is told


def test_outputs_that_run_are_not_told_twice():
  """All are as long: those that run have had half of it, on average."""
  load = after(Recent((), ()), 3000, 300, lambda n: int(MEAN))
  assert load.output_len == pytest.approx(MEAN, rel=0.03)
  assert load.output_cv < 0.4


@pytest.mark.parametrize('before, since', [(10, 90), (90, 10)])
def test_a_rate_that_shifts_is_told_soon(before, since):
  """And one that does not by many requests."""
  recent = Recent((), ())
  time_s = 0.0
  for n in range(2000):
    time_s += 1 / before
    recent.add_arrived(n, time_s, 100)
  load = recent.load(time_s, [])
  assert load.rate_per_s == pytest.approx(before, rel=0.01)
  for n in range(2000, 2000 + 6 * COHORT):
    time_s += 1 / since
    recent.add_arrived(n, time_s, 100)
  load = recent.load(time_s, [])
  assert load.rate_per_s == pytest.approx(since, rel=0.25)


def test_prompts_that_become_longer_are_told_soon():
  recent = Recent((), ())
  for n in range(2000):
    recent.add_arrived(n, n / 10, 100 + n % 50)
  for n in range(2000, 2000 + 6 * COHORT):
    recent.add_arrived(n, n / 10, 1000 + n % 500)
  assert recent.load(220.0, []).prompt_len > 900


def test_an_even_load_is_told_by_many_requests():
  recent = Recent((), ())
  rng = random.Random(0)
  time_s = 0.0
  for n in range(4000):
    time_s += rng.expovariate(20)
    recent.add_arrived(n, time_s, 100)
  assert len(alike(recent.arrived, time_s)) == MOST


def test_outputs_of_before_are_forgotten():
  recent = Recent((), ())
  after(recent, 4000, 100)
  for n in range(4000, 4000 + LEAST + 2 * COHORT):
    recent.add_ended(n, 7)
  assert recent.load(0.0, []).output_len == 7


def test_a_few_cohorts_are_remembered_and_old_ones_do_not_come_back():
  recent = Recent((), ())
  for n in range(0, 3 * COHORT * COHORTS, COHORT):
    recent.add_ended(n, 5)
  recent.add_ended(0, 5000)
  assert min(recent.ended).place == 2 * COHORTS
  assert len(recent.ended) == COHORTS
  again = Recent((), recent.ended)
  assert again.ended == recent.ended
  assert again.load(0.0, []) == recent.load(0.0, [])


def test_nothing_is_known_of_outputs_before_one_has_ended():
  assert Recent((), ()).load(1.0, [(0, 50)]).output_len == 1
  recent = Recent((), ())
  recent.add_ended(0, 9)
  assert recent.load(1.0, [(40 * COHORT, 50)]).output_len == 1


def test_the_spread_of_outputs_is_told():
  load = after(Recent((), ()), 6000, 100)
  assert load.output_cv == pytest.approx((LONG - SHORT) / 2 / MEAN, rel=0.2)
  assert load.lives == pytest.approx(5, rel=0.3)
  assert after(Recent((), ()), 20, 4).output_cv == 1  # of too few
  assert after(Recent((), ()), 1000, 1000).lives < 1


def test_the_spread_of_outputs_is_not_told_by_the_longest_one():
  """Lengths of cv 1.3, and one that is as long as 100 others."""
  rng = random.Random(0)
  lengths = [max(1, int(rng.lognormvariate(3.0, 1.0))) for _ in range(400)]
  told = []
  for last in (20, 4000):
    recent = Recent((), ())
    for n, tokens in enumerate([*lengths, last]):
      recent.add_ended(n, tokens)
    told.append(recent.load(0.0, []).output_cv)
  assert 0.9 < told[0] < told[1] < 1.7


@pytest.mark.parametrize('ended', [COHORT, 2000])
def test_the_spread_of_outputs_is_told_where_many_run(ended):
  """Of those that run the half is over, on average."""
  rng = random.Random(0)
  lengths = [rng.lognormvariate(7.0, 0.6) for _ in range(4000)]
  recent = Recent((), ())
  for n, tokens in enumerate(lengths[:ended]):
    recent.add_ended(n, int(tokens))
  begun = [max(1, int(rng.random() * tokens)) for tokens in lengths[ended:]]
  assert _spread(recent.ended, begun) == pytest.approx(0.66, rel=0.15)


def test_the_rate_is_of_now_so_it_falls_when_requests_stop():
  recent = Recent((), ())
  for n in range(4 * LEAST):
    recent.add_arrived(n, n / 100, 100 if n % 10 else 1000)
  last_s = (4 * LEAST - 1) / 100
  load = recent.load(last_s, [])
  assert load.rate_per_s == pytest.approx(100, rel=0.01)
  assert load.prompt_len == pytest.approx(190, rel=0.01)
  assert load.prompt_cv == pytest.approx(270 / 190, rel=0.01)
  assert recent.load(2 * last_s, []).rate_per_s < 35
  again = Recent(recent.arrived, ())
  assert again.load(last_s, []) == load


@pytest.mark.parametrize('rate, later', [(10, LEAST), (100, 1200)])
def test_arrivals_of_before_are_forgotten(rate, later):
  """After ten seconds, and as many requests as are looked at."""
  recent = Recent((), ())
  for n in range(3000):
    recent.add_arrived(n, n / rate, 7 if n < 3000 - later - 2 * COHORT else 50)
  assert recent.load(3000 / rate, []).prompt_len == 50
  assert recent.load(3000 / rate, []).rate_per_s == pytest.approx(
      rate, rel=0.01)


def test_before_the_second_request_there_is_no_rate():
  recent = Recent((), ())
  assert recent.load(1.0, []).rate_per_s == 0
  recent.add_arrived(0, 1.0, 5)
  assert recent.load(1.0, []).rate_per_s == 0


def test_the_longest_prompt_is_that_of_the_newest():
  """Not of those that came before the load shifted."""
  recent = Recent((), ())
  assert recent.load(0.0, ()).longest_prompt == 0
  for n in range(20 * COHORT):
    recent.add_arrived(n, float(n), 5000 if n < 10 * COHORT else 100 + n % 7)
  load = recent.load(20.0 * COHORT, ())
  assert load.longest_prompt == 106 and load.arrived == 8 * COHORT
