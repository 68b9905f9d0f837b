"""The highest rate that meets the objectives: bisection over runs."""

import dataclasses
import math

from dsjax.analysis import metrics
from dsjax.config.checks import require


def steady_hits(records, slo, warmup=0.2):
  """Whether each request attained, in order of arrival, after the warm-up.

  The first share `warmup` of the requests saw an emptier system.
  """
  sent = metrics.by_arrival(records)
  return [metrics.attains(r, slo) for r in sent[int(warmup * len(sent)):]]


@dataclasses.dataclass(frozen=True)
class Goodput:
  """The highest rate at which the target share of requests attains.

  Attributes:
    rate_per_s: the estimate, where the line between the two nearest rates
      crosses the target. low_per_s, high_per_s: the highest rate that
      surely attains and the lowest that surely does not (95 % each).
    binds: what ended the search: 'target' (both neighbours are known),
      'samples' (more requests at one rate would narrow the interval),
      'horizon' (attainment still fell at the end of the longest run), 'cap'
      (the highest rate asked for attains), 'floor' (no rate does) or
      'beaten' (it fails at beat_per_s; rate_per_s is 0, high_per_s says
      what is known).
    attained: share at the highest rate that attains; 'beaten': at beat_per_s.
    runs: simulations.
  """

  rate_per_s: float
  low_per_s: float
  high_per_s: float
  binds: str
  attained: float
  runs: int


def search(hits_at, target, start_per_s, ratio=1.02, requests=400,
           most_requests=6400, most_per_s=1e5, least_per_s=1e-4, stride=4.0,
           full=None, beat_per_s=None, tight=False):
  """Bisects the rate, sampling each until its interval excludes the target.

  Args:
    hits_at: (rate_per_s, n) -> hits of n requests of a steady run, for
      equal seeds at every rate (common random numbers); fewer requests are a
      prefix of more.
    target: share of requests that must attain.
    start_per_s: the first rate tried. stride: ratio of the next.
    ratio: of rates, above 1, at which bisection ends.
    requests, most_requests: n at first, and at most.
    full: rate -> n that a run must have before it may pass (queues of an
      overloaded system need time to grow). A prefix that surely fails is
      enough to fail: the run begins empty. None: `requests`.
    beat_per_s: None, or a rate to attain first; where it fails, that is all.
    tight: look on between the unsure rates until low_per_s and high_per_s
      are within `ratio` of them.

  Returns:
    a Goodput.
  """
  require(0 < target < 1, 'target', target, 'a share in (0, 1)')
  require(start_per_s > 0, 'start_per_s', start_per_s, 'above 0')
  judge = _Judge(hits_at, target, requests, most_requests,
                 full or (lambda rate: requests))
  if beat_per_s is not None:
    if beat_per_s > most_per_s or not judge(beat_per_s):
      side, share, _ = judge.tried.get(beat_per_s, (-1, 0.0, False))
      return Goodput(0.0, 0.0, min(most_per_s, beat_per_s if side < 0
                                   else math.inf), 'beaten', share, judge.runs)
    start_per_s = min(beat_per_s * math.sqrt(stride), most_per_s)
  low, high = _bracket(judge, start_per_s, stride, least_per_s, most_per_s,
                       beat_per_s)
  while low and high and high / low > ratio:
    middle = math.sqrt(low * high)
    low, high = (middle, high) if judge(middle) else (low, middle)
  if tight and low and high:
    _tighten(judge, ratio, stride, least_per_s, most_per_s)
  return _answer(judge, low, high, least_per_s)


class _Judge:
  """Says whether a rate attains; remembers what it found.

  tried: rate -> (+1 surely attains, -1 surely not, 0 cannot tell; the share;
  whether it still fell).
  """

  def __init__(self, hits_at, target, requests, most_requests, full):
    self.hits_at, self.target, self.full = hits_at, target, full
    self.requests, self.most, self.runs = requests, most_requests, 0
    self.tried = {}

  def __call__(self, rate):
    if rate not in self.tried:
      self.tried[rate] = self.sample(rate)
    return self.tried[rate][1] >= self.target

  def sample(self, rate):
    full, n = self.full(rate), self.requests
    most = max(self.most, full)
    while True:
      hits = self.hits_at(rate, n)
      self.runs += 1
      share, low, high = metrics.interval(hits)
      if high < self.target:
        return -1, share, False
      first, second = (metrics.interval(half) for half in (
          hits[:len(hits) // 2], hits[len(hits) // 2:]))
      falls = second[2] < first[1]
      # What passes for now may still sink: only the second half counts then.
      passes = low >= self.target and second[0] >= self.target
      if passes and n >= full and not falls:
        return 1, share, False
      if n >= most:
        return 0, second[0] if falls else share, falls
      n = min(most, max(2 * n, full if passes else 0))


def _bracket(judge, rate, stride, least, most, low=None):
  """(highest rate that attains, lowest that does not), None where unknown."""
  high = None
  while True:
    if judge(rate):
      low = rate
    else:
      high = rate
    if low is not None and high is not None:
      return low, high
    if low is not None and rate >= most or high is not None and rate <= least:
      return low, high
    rate = min(rate * stride, most) if high is None else max(
        rate / stride, least)


def _tighten(judge, ratio, stride, least, most):
  """Tries rates until the sure ones on either side are near the unsure."""
  while True:
    tried = sorted(judge.tried)
    low = max((r for r in tried if judge.tried[r][0] > 0), default=None)
    if low is None:
      if tried[0] <= least:
        break
      judge(max(tried[0] / math.sqrt(stride), least))
      continue
    above = min((r for r in tried if r > low), default=low)
    if above / low <= ratio:
      break
    judge(math.sqrt(low * above))
  while True:
    tried = sorted(judge.tried)
    high = min((r for r in tried if judge.tried[r][0] < 0), default=None)
    if high is None:
      if tried[-1] >= most:
        break
      judge(min(tried[-1] * math.sqrt(stride), most))
      continue
    below = max((r for r in tried if r < high), default=high)
    if high / below <= ratio:
      break
    judge(math.sqrt(high * below))


def _answer(judge, low, high, least):
  """The Goodput of what a judge has tried."""
  tried, target = judge.tried, judge.target
  sure = max((r for r, t in tried.items() if t[0] > 0), default=0.0)
  never = min((r for r, t in tried.items() if t[0] < 0 and r > sure),
              default=math.inf if low else least)
  if low is None:
    return Goodput(0.0, 0.0, never, 'floor', 0.0, judge.runs)
  if high is None:
    return Goodput(low, sure, never, 'cap', tried[low][1], judge.runs)
  (low_side, above, _), (high_side, below, falls) = tried[low], tried[high]
  part = (above - target) / (above - below)
  rate = low * (high / low) ** part
  binds = ('target' if low_side and high_side else 'horizon' if falls
           else 'samples')
  return Goodput(rate, min(sure, rate), max(never, rate), binds, above,
                 judge.runs)
