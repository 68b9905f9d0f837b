"""Bisection of the rate."""

import math

import numpy as np
import pytest

from dsjax.analysis.record import Record
from dsjax.config.placement import Slo
from dsjax.placement import goodput
from dsjax.placement.goodput import Bisection


def coin(knee, width=0.02, seed=0):
  """hits_at of independent requests: share 0.9 at the rate `knee`."""
  def hits_at(rate, n):
    share = min(1.0, max(0.0, 0.9 - (rate / knee - 1) / width * 0.1))
    draws = np.random.default_rng(seed).random(n)  # common random numbers
    return (draws < share).tolist()
  return hits_at


@pytest.mark.parametrize('knee', (0.003, 0.7, 1.0, 42.0, 3e4))
def test_goodput_finds_the_knee(knee):
  best = goodput.search(coin(knee), 0.9, 1.0)
  assert best.low_per_s <= knee <= best.high_per_s
  assert best.rate_per_s == pytest.approx(knee, rel=0.05)
  assert best.low_per_s <= best.rate_per_s <= best.high_per_s
  assert best.binds in ('target', 'samples')


def test_goodput_samples_more_where_it_is_close():
  sizes = []

  def hits_at(rate, n):
    sizes.append((rate, n))
    return coin(10.0, width=0.5)(rate, n)

  goodput.search(hits_at, 0.9, 10.0, requests=100, most_requests=1600)
  assert max(n for _, n in sizes) == 1600
  assert all(n == 100 for rate, n in sizes if not 4 < rate < 20)


def test_goodput_says_when_nothing_or_everything_attains():
  never = goodput.search(lambda rate, n: [False] * n, 0.9, 1.0)
  assert (never.rate_per_s, never.binds) == (0.0, 'floor')
  always = goodput.search(lambda rate, n: [True] * n, 0.9, 1.0,
                          bisection=Bisection(most_per_s=50.0))
  assert (always.rate_per_s, always.binds) == (50.0, 'cap')
  assert always.high_per_s == math.inf


def test_that_no_rate_attains_is_found_in_a_few_runs():
  bounds = Bisection(stride=1.4, least_per_s=1e-4)
  never = goodput.search(lambda rate, n: [False] * n, 0.9, 1.0,
                         bisection=bounds)
  assert (never.binds, never.high_per_s) == ('floor', 1e-4)
  assert never.runs <= 11  # 29 in steps of 1.4
  far = goodput.search(coin(0.003), 0.9, 1.0, bisection=bounds)
  assert far.rate_per_s == pytest.approx(0.003, rel=0.05)


def test_one_rate_is_enough_to_be_beaten():
  calls = []

  def hits_at(rate, n):
    calls.append(rate)
    return coin(10.0)(rate, n)

  lost = goodput.search(hits_at, 0.9, 1.0,
                        bisection=Bisection(beat_per_s=14.0))
  assert (lost.binds, lost.rate_per_s, lost.high_per_s) == ('beaten', 0, 14.0)
  assert calls == [14.0] and lost.runs == 1
  won = goodput.search(hits_at, 0.9, 1.0,
                       bisection=Bisection(beat_per_s=8.0))
  assert won.rate_per_s == pytest.approx(
      goodput.search(coin(10.0), 0.9, 1.0).rate_per_s, rel=0.03)
  # A bound below the rate to beat needs no run.
  assert goodput.search(hits_at, 0.9, 1.0, bisection=Bisection(
      most_per_s=5.0, beat_per_s=8.0)).runs == 0


def test_tight_intervals_end_at_the_rates_that_cannot_be_told():
  wide = goodput.search(coin(10.0, 0.3), 0.9, 1.0, 1.05, 200, 1600)
  tight = goodput.search(coin(10.0, 0.3), 0.9, 1.0, 1.05, 200, 1600,
                         Bisection(tight=True))
  assert wide.low_per_s < tight.low_per_s <= 10.0 <= tight.high_per_s
  assert tight.high_per_s <= wide.high_per_s
  assert tight.high_per_s < 1.6 * tight.low_per_s


def test_a_rate_that_sinks_in_the_end_is_not_sustained():
  """Above 5 requests/s a queue grows: after 1,000 requests all miss."""
  def hits_at(rate, n):
    return [rate <= 5.0 or i < 1000 for i in range(n)]

  below_20 = Bisection(most_per_s=20.0)
  short = goodput.search(hits_at, 0.9, 1.0, 1.1, 400, 800, below_20)
  assert short.binds == 'cap'  # runs too short to see it
  longer = goodput.search(hits_at, 0.9, 1.0, 1.1, 400, 800, Bisection(
      most_per_s=20.0, full=lambda rate: 4000))
  assert longer.rate_per_s == pytest.approx(5.0, rel=0.1)
  # Overall 92 % attain, but a sixth of the second half misses.
  late = goodput.search(
      lambda rate, n: [rate <= 5.0 or i < n / 2 or i % 6 > 0
                       for i in range(n)], 0.9,
      1.0, 1.1, 2000, 4000, below_20)
  assert late.rate_per_s < 6.0


def test_steady_hits_leave_the_warm_up_out():
  slo = Slo(1.0, 1.0)
  records = [Record(i, float(i), 1, 1, token_s=[i + (2.0 if i < 2 else 0.5)],
                    finish_s=i + 2.0, status='length') for i in range(10)]
  assert goodput.steady_hits(records[::-1], slo) == [True] * 8
  assert goodput.steady_hits(records, slo, 0.1) == [False] + [True] * 8


def queues(knee, memory, seed):
  """hits_at of a system that misses in spells of about `memory` requests,
  longer ones at higher rates: 10 % of the time at the rate `knee`."""
  draws = np.random.default_rng(seed)
  ends, starts = draws.random((2, 20000))

  def hits_at(rate, n):
    share = min(0.99, 0.1 * (rate / knee)**6)
    leave = 1 / memory
    fail = leave * share / (1 - share)
    missing, hits = False, []
    for i in range(n):
      missing = ends[i] > leave if missing else starts[i] < fail
      hits.append(not missing)
    return hits[n // 5:]
  return hits_at


def test_tight_intervals_cover_though_misses_come_in_spells():
  covered, rough = 0, 0
  for seed in range(40):
    hits_at = queues(10.0, 100, seed)
    for tight in (True, False):
      best = goodput.search(hits_at, 0.9, 9.0, 1.05, 400, 6400, Bisection(
          stride=1.1, tight=tight))
      assert best.tight == tight
      inside = best.low_per_s <= 10.0 <= best.high_per_s
      covered, rough = covered + (inside and tight), rough + (
          inside and not tight)
  assert 36 <= covered and rough < covered


def test_no_rate_passes_a_tight_search_on_its_first_requests():
  sizes = []

  def hits_at(rate, n):
    sizes.append(n)
    return [rate < 5.0 or i < 1000 for i in range(n)]

  best = goodput.search(hits_at, 0.9, 6.0, 1.05, 400, 6400, Bisection(
      stride=1.1, tight=True))
  assert best.low_per_s <= 5.0 <= best.high_per_s < 6.0
  assert set(sizes) == {400, 800, 1600, 3200, 6400}


def test_a_look_before_the_end_must_be_surer_in_a_tight_search():
  """Of 400 requests 85 % attain, of all that follow all."""
  sizes = []

  def hits_at(rate, n):
    sizes.append(n)
    return [i >= 400 or i % 20 > 2 for i in range(n)] if rate < 5 else (
        [False] * n)

  best = goodput.search(hits_at, 0.9, 4.0, 1.05, 1600, 3200, Bisection(
      stride=1.1, tight=True, looks_from=400))
  assert best.low_per_s > 4.6
  # What fails beyond doubt ends at once.
  assert sizes.count(400) > sizes.count(800) == sizes.count(3200) > 0


@pytest.mark.parametrize('start, bounds, misses', [
    (1e-5, dict(least_per_s=1e-4), (10, 1)),
    (80.0, dict(most_per_s=50.0), (100, 9))])
def test_a_start_beyond_the_bounds_ends(start, bounds, misses, no_hang):
  """Nothing is sure on the side on which no more rates may be tried.

  misses: one request in so many below 20 a second, and above.
  """
  def hits_at(rate, n):
    every = misses[rate >= 20.0]
    return [i % every > 0 for i in range(n)]

  best = goodput.search(hits_at, 0.9, start, 1.05, 100, 400, Bisection(
      stride=1.4, tight=True, **bounds))
  assert best.low_per_s <= best.rate_per_s <= best.high_per_s
