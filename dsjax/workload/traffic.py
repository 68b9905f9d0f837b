"""Workloads made from others: fits, mixtures, changing rates, shared prefixes.

`workload` reads traces and makes requests; this module says what the traffic
is like. Everything is seeded, with random streams of its own, and reads no
clock.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dsjax.config.checks import (
  InputError,
  is_integer,
  is_positive,
  is_positive_int,
  require,
)
from dsjax.config.request import Request
from dsjax.workload.files import Entry, Path, Row, json_lines
from dsjax.workload.requests import arrivals, from_lengths

_DRAWS = 3  # a stream of a seed; workload has those below


def _rng(seed, *stream):
  require(is_integer(0, math.inf)(seed), 'seed', seed, 'an integer, 0 or more')
  return np.random.default_rng((seed, _DRAWS, *stream))


# --- fit and resample -------------------------------------------------------


class Fit(NamedTuple):
  """What a history of requests was like.

  entries: its (prompt, output) pairs, drawn together so that what goes with
  what is kept. rate_per_s: requests a second. cv: standard deviation of the
  gaps over their mean: 1 for Poisson, above it bursty; a rate that drifts
  over the history counts as burstiness.
  """

  entries: tuple[Entry, ...]
  rate_per_s: float
  cv: float


def fit(entries: Iterable[Entry]) -> Fit:
  """The Fit of a trace with arrivals.

  Raises:
    InputError: fewer than 3 entries, or none of them has a gap before it.
  """
  entries = tuple(entries)
  times = [e.arrival_s for e in entries if e.arrival_s is not None]
  require(len(entries) == len(times) >= 3, 'fit.entries',
          len(entries), '3 or more with arrival times')
  gaps = np.diff(np.sort(times))
  require(gaps.mean() > 0, 'fit.entries', 'at one time',
          'at different times')
  cv = float(gaps.std() / gaps.mean())
  return Fit(entries, float(1 / gaps.mean()), min(100.0, max(0.01, cv)))


def resample(history: Fit, n: int, rate_per_s: float | None = None,
             seed: int = 0, vocab_size: int | None = None,
             max_prompt: int | None = None,
             max_output: int | None = None) -> tuple[list[Request], int]:
  """n requests like those of a Fit (DistServe 4.1: fit, then resample).

  Gaps are gamma with the history's cv; pairs of lengths are drawn with
  replacement.

  Args:
    rate_per_s: None for the history's.

  Returns:
    (requests, clipped), as workload.from_lengths.
  """
  times = arrivals('gamma', rate_per_s or history.rate_per_s, n, seed,
                   history.cv)
  return from_lengths(history.entries, n, times, vocab_size, seed, max_prompt,
                      max_output)


# --- mixtures ---------------------------------------------------------------


class Lengths(NamedTuple):
  """Lognormal pieces, cut at `high` tokens and scaled to a mean.

  pieces: (share, median, sigma) each; shares add up to 1. mean: of the
  lengths as cut; the medians are multiplied by one factor that gives it.
  """

  pieces: tuple[tuple[float, float, float], ...]
  high: int
  mean: float


class Mixture(NamedTuple):
  """Prompt and output lengths, independent of each other."""

  prompt: Lengths
  output: Lengths


# The means are the paper's (DistServe Fig. 7). sharegpt: shares and sigmas
# were searched so that the 1st, 10th, ..., 99th percentiles are near those of
# the 1,600 requests as its benchmark sampled them (prompt: 10, 89, 311, 680,
# 1147, 1543, 1922; output: 2, 9, 18, 76, 304, 507, 968). For the other two
# only means are published: sigma and high are assumptions, high such that an
# OPT model's context of 2,048 tokens holds them.
MIXTURES = {
    'sharegpt': Mixture(
        Lengths(((0.425, 257.7, 1.635), (0.575, 834.6, 0.456)), 2030, 755.5),
        Lengths(((0.596, 23.8, 1.153), (0.404, 362.2, 0.506)), 1800, 200.3)),
    'humaneval': Mixture(Lengths(((1.0, 150.0, 0.5),), 1024, 171.3),
                         Lengths(((1.0, 80.0, 0.6),), 512, 98.2)),
    'longbench': Mixture(Lengths(((1.0, 2000.0, 0.6),), 1948, 1738.3),
                         Lengths(((1.0, 75.0, 0.6),), 512, 90.7)),
}


def _normal(x):
  return 0.5 * math.erfc(-x / math.sqrt(2))


def _cut_mean(median, sigma, high):
  """E[min(X, high)] of a lognormal X."""
  z = math.log(high / median) / sigma
  return (median * math.exp(sigma**2 / 2) * _normal(z - sigma)
          + high * (1 - _normal(z)))


def factor(lengths: Lengths) -> float:
  """What the medians of Lengths are multiplied by for their mean.

  Raises:
    InputError: shares do not add up to 1, or no factor gives the mean.
  """
  shares = sum(p[0] for p in lengths.pieces)
  require(all(len(p) == 3 and all(map(is_positive, p)) for p in lengths.pieces)
          and math.isclose(shares, 1), 'Lengths.pieces', lengths.pieces,
          '(share, median, sigma), all above 0, shares adding up to 1')
  require(is_positive(lengths.mean) and 1 < lengths.mean < lengths.high,
          'Lengths.mean', lengths.mean, f'between 1 and high={lengths.high}')
  low, high = -30.0, 30.0  # of the factor's logarithm
  for _ in range(100):
    middle = (low + high) / 2
    mean = sum(share * _cut_mean(median * math.exp(middle), sigma,
                                 lengths.high)
               for share, median, sigma in lengths.pieces)
    low, high = (middle, high) if mean < lengths.mean else (low, middle)
  return math.exp(low)


def _draw(lengths, n, seed, part):
  pieces, sizes = _rng(seed, part, 0), _rng(seed, part, 1)
  shares, medians, sigmas = np.array(lengths.pieces).T
  piece = np.searchsorted(np.cumsum(shares)[:-1], pieces.random(n), 'right')
  x = (medians[piece] * factor(lengths)
       * np.exp(sigmas[piece] * sizes.standard_normal(n)))
  return np.clip(np.rint(x), 1, lengths.high).astype(int).tolist()


def draw(mixture: Mixture | str, n: int, seed: int = 0) -> tuple[Entry, ...]:
  """n entries without arrivals, for workload.from_lengths(in_order=True).

  Of one seed, fewer are a prefix of more.

  Args:
    mixture: a Mixture, or a name of MIXTURES.

  Raises:
    InputError.
  """
  if not isinstance(mixture, Mixture):
    require(mixture in MIXTURES, 'mixture', mixture,
            f'a Mixture or one of {sorted(MIXTURES)}')
    mixture = MIXTURES[mixture]
  require(is_positive_int(n), 'draw.n', n, 'an integer of 1 or more')
  return tuple(Entry(None, *pair) for pair in zip(
      _draw(mixture.prompt, n, seed, 0), _draw(mixture.output, n, seed, 1),
      strict=True))


# --- rates that change ------------------------------------------------------


def vary(unit_times: Iterable[float],
         segments: Iterable[tuple[float, float]]) -> tuple[float, ...]:
  """Arrival times at a rate that changes, from arrivals at rate 1.

  Time is stretched so that the arrivals' number grows as the integral of the
  rate: Poisson arrivals stay Poisson, and two profiles share their
  randomness.

  Args:
    unit_times: not decreasing, such as workload.arrivals(kind, 1.0, n, seed).
    segments: ((seconds, rate_per_s), ...), repeated for ever; a rate may
      be 0, but not all.

  Returns:
    A tuple of seconds.

  Raises:
    InputError.
  """
  segments = tuple(segments)
  require(segments and all(
      len(s) == 2 and is_positive(s[0]) and (s[1] == 0 or is_positive(s[1]))
      for s in segments) and any(s[1] for s in segments), 'vary.segments',
      segments, '(seconds, rate_per_s) pairs, not all rates 0')
  starts = [0.0, *itertools.accumulate(s for s, _ in segments)]
  counts = [0.0, *itertools.accumulate(s * r for s, r in segments)]
  times = []
  for u in unit_times:
    cycle, rest = divmod(u, counts[-1])
    # Of segments that end at one count (rate 0), the last: its start is
    # where the count grows again.
    segment = min(bisect_right(counts, rest), len(segments)) - 1
    rate = segments[segment][1]
    late = (rest - counts[segment]) / rate if rate else segments[segment][0]
    times.append(cycle * starts[-1] + starts[segment] + late)
  return tuple(times)


LEAST_S = 0.1  # of a period, of lengths before they shift
WAVES = {'sine': ('rising high', 'falling high', 'falling low', 'rising low'),
         'step': ('low', 'high')}  # kind: names of its phases, equally long
_SINE_STEPS = 48  # in which the rate is even


class Wave(NamedTuple):
  """A Poisson process whose rate goes between low and high, for ever.

  kind: sine: from the mean upwards; step: low, then high, half a period each.
  low, high: requests a second. period_s: of the whole.
  """

  kind: str
  low: float
  high: float
  period_s: float

  @property
  def mean_per_s(self) -> float:
    """Requests a second of a whole period."""
    return (self.low + self.high) / 2

  def segments(self) -> tuple[tuple[float, float], ...]:
    """(seconds, rate) of a period, as vary takes them."""
    if self.kind == 'step':
      return ((self.period_s / 2, self.low), (self.period_s / 2, self.high))
    # A step has the mean rate of its span: the difference of two cosines.
    swing, steps = self.high - self.mean_per_s, _SINE_STEPS
    edges = [math.cos(2 * math.pi * i / steps) for i in range(steps + 1)]
    return tuple(
        (self.period_s / steps, max(self.low, self.mean_per_s
                                    + swing * (a - b) * steps / (2 * math.pi)))
        for a, b in itertools.pairwise(edges))


def wave(text: str) -> Wave | None:
  """The Wave of 'sine:low=5:high=45:period_s=60'; None of another word.

  Raises:
    InputError: of a kind of WAVES, but not such a text.
  """
  kind, *given = text.split(':')
  if kind not in WAVES:
    return None
  pairs = [part.partition('=')[::2] for part in given]
  names = Wave._fields[1:]
  require(sorted(name for name, _ in pairs) == sorted(names), 'process', text,
          f'{kind}:low=5:high=45:period_s=60, each of {names} once')
  values: dict[str, float] = {}
  for name, number in pairs:
    try:
      values[name] = float(number)
    except ValueError:
      values[name] = math.nan
    require(is_positive(values[name]) or name == 'low' and values[name] == 0,
            f'process {kind}: {name}', number, 'a number above 0')
  require(values['period_s'] >= LEAST_S, f'process {kind}: period_s',
          values['period_s'], f'{LEAST_S} or more')
  require(values['low'] < values['high'], f'process {kind}: low',
          values['low'], f'below high={values["high"]:g}')
  return Wave(kind, **values)


# --- shared prefixes --------------------------------------------------------

BLOCK = 512  # tokens of a Mooncake block


def read_hash_ids(path: Path) -> list[list[int]]:
  """Those of each row of a trace in Mooncake's format, by arrival.

  Raises:
    InputError naming the file, the line and the field.
  """
  rows = []
  for line, row in json_lines(path):
    try:
      time = float(row['timestamp'])
    except (KeyError, TypeError, ValueError) as error:
      raise InputError(f'{path}, line {line}: timestamp='
                       f'{row.get("timestamp")!r}: must be milliseconds'
                       ) from error
    rows.append((time, _hash_ids(path, line, row)))
  return [ids for _, ids in sorted(rows, key=lambda row: row[0])]


def _hash_ids(path: Path, line: int, row: Row) -> list[int]:
  ids = row.get('hash_ids')
  if not isinstance(ids, list) or not all(
      isinstance(i, int) and not isinstance(i, bool) for i in ids):
    raise InputError(f'{path}, line {line}: hash_ids={str(ids)[:60]}: must '
                     'be a list of integers')
  try:
    most = -(-int(float(row['input_length'])) // BLOCK)
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise InputError(f'{path}, line {line}: input_length='
                     f'{row.get("input_length")!r}: must be tokens'
                     ) from error
  if len(ids) > most:
    raise InputError(f'{path}, line {line}: hash_ids of length {len(ids)}: '
                     f'must be at most {most}, a block for every {BLOCK} '
                     'tokens')
  return ids
