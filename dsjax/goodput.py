"""The highest rate that meets the objectives: bisection over runs."""

import dataclasses
import math

from dsjax import metrics
from dsjax.base import require


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
    rate_per_s: the estimate; low_per_s, high_per_s: the highest rate that
      surely attains and the lowest that surely does not (95 % each).
    binds: what ended the search: 'target' (both neighbours are known),
      'samples' (more requests at one rate would narrow the interval), 'cap'
      (the highest rate asked for attains) or 'floor' (no rate does).
    attained: share at rate_per_s.
    runs: simulations.
  """

  rate_per_s: float
  low_per_s: float
  high_per_s: float
  binds: str
  attained: float
  runs: int


def search(hits_at, target, start_per_s, ratio=1.02, requests=400,
            most_requests=6400, most_per_s=1e5, least_per_s=1e-4):
  """Bisects the rate, sampling each until its interval excludes the target.

  Args:
    hits_at: (rate_per_s, n) -> hits of about n requests of a steady run, for
      equal seeds at every rate (common random numbers).
    target: share of requests that must attain.
    start_per_s: the first rate tried.
    ratio: of rates, above 1, at which bisection ends.
    requests, most_requests: n at first, and at most.

  Returns:
    a Goodput.
  """
  require(0 < target < 1, 'target', target, 'a share in (0, 1)')
  require(start_per_s > 0, 'start_per_s', start_per_s, 'above 0')
  runs, tried = 0, {}

  def judge(rate):
    """+1: surely attains, -1: surely not, 0: cannot tell; and the share."""
    nonlocal runs
    n = requests
    while True:
      share, low, high = metrics.interval(hits_at(rate, n))
      runs += 1
      sure = (low >= target) - (high < target)
      if sure or n >= most_requests:
        tried[rate] = sure, share
        return share >= target
      n = min(2 * n, most_requests)

  low, high, rate = None, None, start_per_s
  while low is None or high is None:
    if judge(rate):
      low = rate
    else:
      high = rate
    if rate >= most_per_s and high is None:
      break
    if rate <= least_per_s and low is None:
      break
    if low is None:
      rate = max(rate / 4, least_per_s)
    elif high is None:
      rate = min(rate * 4, most_per_s)
  while low and high and high / low > ratio:
    rate = math.sqrt(low * high)
    if judge(rate):
      low = rate
    else:
      high = rate
  sure = [r for r, (side, _) in tried.items() if side > 0]
  never = [r for r, (side, _) in tried.items() if side < 0]
  binds = ('floor' if low is None else 'cap' if high is None else
           'target' if tried[low][0] and tried[high][0] else 'samples')
  return Goodput(
      low or 0.0, max(sure, default=0.0),
      min((r for r in never if r > max(sure, default=0.0)),
          default=math.inf if low else least_per_s),
      binds, tried[low][1] if low else 0.0, runs)
