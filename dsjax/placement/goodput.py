"""The highest rate that meets the objectives: bisection over runs."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.placement import Slo

# (rate_per_s, n) -> whether each of the first n requests of a steady run at
# this rate attained.
HitsAt = Callable[[float, int], list[bool]]
_Request = TypeVar('_Request')  # a record, or what is known of one
WARMUP = 0.2  # share of the requests that see an emptier system
# A tight search looks at a run many times; to end it in between, an interval so
# many times as wide must fail.
LOOKS = 2
# Rates that fail one below the other, before steps down grow: perhaps none
# attains.
FALLS = 6


def steady(requests: list[_Request], warmup: float = WARMUP
           ) -> list[_Request]:
  """Of requests in order of arrival, those after the warm-up."""
  return requests[int(warmup * len(requests)):]


def steady_hits(records: Iterable[Record], slo: Slo,
                warmup: float = WARMUP) -> list[bool]:
  """Whether each request attained, in order of arrival, after the warm-up."""
  return [metrics.attains(r, slo)
          for r in steady(metrics.by_arrival(records), warmup)]


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
    runs: rates that were simulated.
    tight: low_per_s and high_per_s are a 95 % interval of the goodput.
      Otherwise runs were too short to show the queues that come now and then,
      and they say what these runs saw.
  """

  rate_per_s: float
  low_per_s: float
  high_per_s: float
  binds: str
  attained: float
  runs: int
  tight: bool = False


@dataclasses.dataclass(frozen=True)
class Bisection:
  """Which rates a search tries, and what it asks of them.

  Attributes:
    stride: ratio of successive rates, until one attains and one does not.
    least_per_s, most_per_s: no rates beyond these.
    full: rate -> requests that a run must have before it may pass (queues of
      an overloaded system need time to grow). A prefix that surely fails is
      enough to fail: the run begins empty. None: as many as at first.
    beat_per_s: None, or a rate to attain first; where it fails, that is all.
    tight: no rate passes before it has had the most requests, and rates are
      tried until low_per_s and high_per_s are within `ratio` of those that
      cannot be told.
    looks_from: tight: a rate may fail from so many requests on, if it is
      LOOKS times as sure where it has neither `requests` nor the most.
  """

  stride: float = 4.0
  least_per_s: float = 1e-4
  most_per_s: float = 1e5
  full: Callable[[float], int] | None = None
  beat_per_s: float | None = None
  tight: bool = False
  looks_from: int | None = None


def search(hits_at: HitsAt, target: float, start_per_s: float,
           ratio: float = 1.02, requests: int = 400,
           most_requests: int = 6400,
           bisection: Bisection = Bisection()) -> Goodput:
  """Bisects the rate, sampling each until its interval excludes the target.

  Args:
    hits_at: of equal seeds at every rate (common random numbers); fewer
      requests are a prefix of more.
    target: share of requests that must attain.
    start_per_s: the first rate tried, if none is to be beaten.
    ratio: of rates, above 1, at which bisection ends.
    requests, most_requests: of a run at first, and at most.

  Raises:
    InputError: a target outside (0, 1), a start_per_s of 0 or less.
  """
  require(0 < target < 1, 'target', target, 'a share in (0, 1)')
  require(start_per_s > 0, 'start_per_s', start_per_s, 'above 0')
  least = most_requests if bisection.tight else requests
  full = bisection.full or (lambda rate: least)
  judge = _Judge(hits_at, target, requests, most_requests,
                 lambda rate: max(least, full(rate)), bisection)
  beat_per_s, most_per_s = bisection.beat_per_s, bisection.most_per_s
  if beat_per_s is not None:
    if beat_per_s > most_per_s or not judge(beat_per_s):
      verdict = judge.tried.get(beat_per_s, _Verdict(-1, 0.0, False))
      high_per_s = beat_per_s if verdict.side < 0 else math.inf
      return Goodput(0.0, 0.0, min(most_per_s, high_per_s), 'beaten',
                     verdict.share, judge.runs)
    start_per_s = min(beat_per_s * math.sqrt(bisection.stride), most_per_s)
  low, high = _bracket(judge, start_per_s, bisection)
  while low and high and high / low > ratio:
    middle = math.sqrt(low * high)
    low, high = (middle, high) if judge(middle) else (low, middle)
  if bisection.tight and low and high:
    _tighten(judge, ratio, bisection)
  return dataclasses.replace(
      _goodput(judge, low, high, bisection.least_per_s), tight=bisection.tight)


class _Verdict(NamedTuple):
  """side: +1 surely attains, -1 surely does not, 0 cannot tell. share: that
  attains. falls: whether it still fell at the end of the longest run."""

  side: int
  share: float
  falls: bool


class _Judge:
  """Says whether a rate attains; remembers in `tried` its _Verdict of each."""

  def __init__(self, hits_at, target, requests, most_requests, full,
               bisection):
    self.hits_at, self.target, self.full = hits_at, target, full
    self.tight = bisection.tight
    self.first = self.tight and bisection.looks_from or requests
    self.requests, self.most, self.runs = requests, most_requests, 0
    self.tried = {}

  def __call__(self, rate):
    if rate not in self.tried:
      self.tried[rate] = self.sample(rate)
    return self.tried[rate].share >= self.target

  def sample(self, rate):
    full, n = self.full(rate), self.first
    most = max(self.most, full)
    stops = (self.requests, most) if self.tight else (most,)
    self.runs += 1
    while True:
      hits = self.hits_at(rate, n)
      share, low, high = metrics.interval(hits)
      wide = LOOKS if self.tight and n not in stops else 1
      if share + wide * (high - share) < self.target:
        return _Verdict(-1, share, False)
      first, second = (metrics.interval(half) for half in (
          hits[:len(hits) // 2], hits[len(hits) // 2:]))
      falls = second[2] < first[1]
      # What passes for now may still sink: only the second half counts then.
      passes = low >= self.target and second[0] >= self.target
      if passes and n >= full and not falls:
        return _Verdict(1, share, False)
      if n >= most:
        return _Verdict(0, second[0] if falls else share, falls)
      n = min(2 * n, *(stop for stop in stops if stop > n))


def _bracket(judge, rate, bisection):
  """(highest rate that attains, lowest that does not), None where unknown."""
  low, high, fell, stride = bisection.beat_per_s, None, 0, bisection.stride
  while True:
    if judge(rate):
      low = rate
    else:
      high, fell = rate, fell + 1
      if fell > FALLS:
        stride *= stride
    if low is not None and high is not None:
      return low, high
    if (low is not None and rate >= bisection.most_per_s
        or high is not None and rate <= bisection.least_per_s):
      return low, high
    rate = (min(rate * bisection.stride, bisection.most_per_s)
            if high is None else
            max(rate / stride, bisection.least_per_s))


def _tighten(judge, ratio, bisection):
  """Tries rates until the sure ones on either side are near the unsure.

  Away from what was tried in steps that double, then back by halves.
  """
  for side, limit_per_s in ((1, bisection.least_per_s),
                            (-1, bisection.most_per_s)):
    step = ratio
    while True:
      tried = sorted(judge.tried, reverse=side < 0)
      sure = [i for i, r in enumerate(tried) if judge.tried[r].side == side]
      if not sure:
        if side * tried[0] <= side * limit_per_s:
          break
        rate = tried[0] / step**side
        judge(max(rate, limit_per_s) if side > 0 else min(rate, limit_per_s))
        step *= step
        continue
      if sure[-1] == len(tried) - 1:
        break
      edge, beyond = tried[sure[-1]], tried[sure[-1] + 1]
      if max(edge, beyond) / min(edge, beyond) <= ratio:
        break
      judge(math.sqrt(edge * beyond))


def _goodput(judge, low, high, least_per_s):
  """The Goodput of what a judge has tried."""
  tried, target = judge.tried, judge.target
  passed = [r for r, verdict in tried.items() if verdict.side > 0]
  failed = [r for r, verdict in tried.items() if verdict.side < 0]
  # Where they are not in order, what is between them is not known.
  sure = max((r for r in passed if r < min(failed, default=math.inf)),
             default=0.0)
  never = min((r for r in failed if r > max(passed, default=0.0)),
              default=math.inf if low else least_per_s)
  if low is None:
    return Goodput(0.0, 0.0, never, 'floor', 0.0, judge.runs)
  at_low = tried[low]
  if high is None:
    return Goodput(low, sure, never, 'cap', at_low.share, judge.runs)
  at_high = tried[high]
  part = (at_low.share - target) / (at_low.share - at_high.share)
  rate = low * (high / low) ** part
  binds = ('target' if at_low.side and at_high.side else 'horizon'
           if at_high.falls else 'samples')
  return Goodput(rate, min(sure, rate), max(never, rate), binds, at_low.share,
                 judge.runs)
