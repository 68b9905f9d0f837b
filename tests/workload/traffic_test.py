"""Fits, mixtures, rates that change, prefixes that are shared."""

import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax import workload
from dsjax.config.checks import InputError
from dsjax.workload import Entry, traffic
from dsjax.workload.traffic import Lengths, Mixture

TRACES = pathlib.Path(__file__).parents[3] / 'shared' / 'traces'
needs_traces = pytest.mark.skipif(not TRACES.exists(),
                                  reason='no ../shared/traces here')


def gaps(times):
  return np.diff(np.array(times))


def close(sample, mean, errors=5):
  """The sample's mean is `mean` within so many standard errors."""
  sample = np.asarray(sample, float)
  return abs(sample.mean() - mean) < errors * sample.std() / len(sample)**0.5


@settings(deadline=None, max_examples=15)
@given(st.floats(0.1, 50), st.floats(0.4, 3), st.integers(0, 2**30))
def test_fit_finds_rate_and_burstiness(rate, cv, seed):
  times = workload.arrivals('gamma', rate, 20000, seed, cv)
  arrived = traffic.fit([Entry(t, 5, 2) for t in times])
  assert arrived.rate_per_s == pytest.approx(rate, rel=0.15)
  assert arrived.cv == pytest.approx(cv, rel=0.2)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**30))
def test_resampling_keeps_pairs_rate_and_burstiness(seed):
  pairs = ((10, 100), (1000, 5), (50, 50))
  times = workload.arrivals('gamma', 4.0, 3000, seed, 2.0)
  history = traffic.fit([Entry(t, *pairs[i % 3])
                         for i, t in enumerate(times)])
  requests, clipped = traffic.resample(history, 3000, seed=seed)
  again, _ = traffic.resample(history, 3000, seed=seed)
  assert requests == again and clipped == 0
  shapes = [(len(r.prompt), r.sampling.max_tokens) for r in requests]
  assert set(shapes) == set(pairs)
  assert close([p for p, _ in shapes], np.mean([p for p, _ in pairs]))
  arrived = gaps([r.arrival_s for r in requests])
  assert close(arrived, 1 / history.rate_per_s)
  assert arrived.std() / arrived.mean() == pytest.approx(history.cv, rel=0.3)
  # Another rate: the same lengths, the same arrivals in another unit.
  fast, _ = traffic.resample(history, 3000, 2 * history.rate_per_s, seed)
  assert [len(r.prompt) for r in fast] == [p for p, _ in shapes]
  assert [2 * r.arrival_s for r in fast] == pytest.approx(
      [r.arrival_s for r in requests])


@pytest.mark.parametrize('entries', [
    [], [Entry(0.0, 1, 1)] * 2, [Entry(1.0, 1, 1)] * 5,
    [Entry(None, 1, 1)] * 5])
def test_fit_refuses(entries):
  with pytest.raises(InputError, match='fit.entries'):
    traffic.fit(entries)


@pytest.mark.parametrize('name', sorted(traffic.MIXTURES))
def test_mixtures_have_the_published_means(name):
  entries = traffic.draw(name, 50_000, seed=3)
  assert entries == traffic.draw(name, 50_000, seed=3)
  assert entries[:9] != traffic.draw(name, 9, seed=4)
  for field in ('prompt', 'output'):
    lengths = getattr(traffic.MIXTURES[name], field)
    sample = [getattr(e, f'{field}_len') for e in entries]
    assert close(sample, lengths.mean)
    assert 1 <= min(sample) and max(sample) <= lengths.high


@needs_traces
def test_sharegpt_like_percentiles():
  real = workload.read_lengths(
      TRACES / 'lengths' / 'sharegpt_lengths_distserve.csv')
  ours = traffic.draw('sharegpt', 50_000)
  for field in ('prompt_len', 'output_len'):
    q = (10, 25, 50, 75, 90, 99)
    a, b = (np.percentile([getattr(e, field) for e in x], q)
            for x in (ours, real))
    assert a == pytest.approx(b, rel=0.2, abs=2)


@settings(deadline=None)
@given(st.floats(0.1, 0.9), st.floats(1, 500), st.floats(0.1, 2),
       st.floats(20, 900), st.integers(0, 2**30))
def test_any_mixture_has_its_mean(share, median, sigma, mean, seed):
  lengths = Lengths(((share, median, sigma), (1 - share, 300.0, 0.5)), 1000,
                    mean)
  one = Mixture(lengths, Lengths(((1.0, 5.0, 0.2),), 50, 10.0))
  sample = [e.prompt_len for e in traffic.draw(one, 4000, seed)]
  slack = 0.5  # rounding to whole tokens, at most
  low = mean - slack - 6 * np.std(sample) / 4000**0.5
  assert low <= np.mean(sample) <= 2 * mean - low


@pytest.mark.parametrize('lengths, part', [
    (Lengths(((0.5, 9, 1),), 100, 20), 'Lengths.pieces'),
    (Lengths(((1.0, -9, 1),), 100, 20), 'Lengths.pieces'),
    (Lengths(((1.0, 9, 1),), 100, 200), 'Lengths.mean')])
def test_mixtures_that_cannot_be(lengths, part):
  with pytest.raises(InputError, match=part):
    traffic.draw(Mixture(lengths, lengths), 5)
  with pytest.raises(InputError, match="one of .*'sharegpt'"):
    traffic.draw('sharegbt', 5)


SEGMENTS = st.lists(st.tuples(st.floats(0.5, 20), st.one_of(
    st.just(0), st.floats(0.1, 20))), min_size=1, max_size=5).filter(
        lambda s: any(r for _, r in s))


def integral(segments, t):
  """Arrivals expected up to t."""
  span = sum(s for s, _ in segments)
  total = (t // span) * sum(s * r for s, r in segments)
  t %= span
  for seconds, rate in segments:
    total += rate * min(seconds, t)
    t = max(0.0, t - seconds)
  return total


@settings(deadline=None)
@given(SEGMENTS, st.lists(st.floats(0, 300), min_size=1, max_size=30))
def test_varied_times_undo_the_integral_of_the_rate(segments, units):
  units = sorted(units)
  times = traffic.vary(units, segments)
  assert list(times) == sorted(times)
  assert [integral(segments, t) for t in times] == pytest.approx(
      units, rel=1e-6, abs=1e-6)


def test_varied_poisson_has_each_segments_rate():
  unit = workload.arrivals('poisson', 1.0, 30_000, seed=1)
  times = np.array(traffic.vary(unit, ((10.0, 2.0), (5.0, 0.0),
                                       (10.0, 8.0))))
  at, cycles = times % 25, times[-1] / 25
  assert not ((at > 10) & (at < 15)).any()
  for low, high, count in ((0, 10, 20), (15, 25, 80)):
    arrived = ((at >= low) & (at < high)).sum()
    assert abs(arrived - count * cycles) < 5 * (count * cycles)**0.5
  constant = traffic.vary(unit[:50], ((7.0, 4.0),))
  assert constant == pytest.approx([t / 4 for t in unit[:50]])


@given(st.floats(0, 100), st.floats(0.1, 100), st.sampled_from(
    sorted(traffic.WAVES)))
def test_a_wave_has_its_mean_and_its_limits(low, more, kind):
  wave = traffic.Wave(kind, low, low + more, 86400.0)
  segments = wave.segments()
  assert sum(s for s, _ in segments) == pytest.approx(86400)
  assert sum(s * r for s, r in segments) == pytest.approx(
      86400 * wave.mean_per_s, rel=1e-3)
  assert all(low <= r <= (low + more) * (1 + 1e-9) for _, r in segments)


@pytest.mark.parametrize('segments', [
    (), ((1.0, 0.0),), ((0.0, 1.0),), ((1.0, -1.0),), ((1.0, math.nan),)])
def test_rates_that_cannot_be(segments):
  with pytest.raises(InputError, match='vary.segments'):
    traffic.vary((1.0,), segments)
