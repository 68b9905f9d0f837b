"""What requests experienced: statistics of records.

Definitions: Record (record.py) defines TTFT, TPOT and ITL. A request *attains*
when it ended by itself (stop or length) and met both objectives. Shares are of
all requests sent, rejected, failed and unfinished ones included; only those
that their client cancelled are left out.
"""

import collections
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from dsjax.analysis.record import STAGES, Record
from dsjax.config.checks import is_nonnegative, is_positive_int, require
from dsjax.config.placement import Slo

QUANTILES = (50, 90, 99)
# Numbers of batches, and for each the 97.5 % point of Student's t with one
# degree of freedom less; and that of the normal.
_BATCHES = {5: 2.776445, 10: 2.262157, 20: 2.093024, 40: 2.022691}
_LEAST_BATCH = 20  # requests
_Z = 1.959964


def percentiles(values: Sequence[float] | np.ndarray,
                quantiles: Sequence[float] = QUANTILES) -> tuple[float, ...]:
  """Percentiles by linear interpolation; nan of no values.

  Args:
    quantiles: 0 to 100.
  """
  if len(values) == 0:
    return (math.nan,) * len(quantiles)
  return tuple(np.percentile(np.asarray(values, float), quantiles).tolist())


def slo_scale(record: Record, slo: Slo) -> float:
  """The least factor on both objectives at which the record attains.

  inf for a request that did not end by itself; 0 for one of no delay.
  """
  ttft_s, tpot_s = record.ttft_s, record.tpot_s
  if (record.status not in ('stop', 'length') or ttft_s is None
      or tpot_s is None):
    return math.inf
  return max(ttft_s / slo.ttft_s, tpot_s / slo.tpot_s)


def attains(record: Record, slo: Slo) -> bool:
  """True where a request ended by itself and met both objectives."""
  ttft_s, tpot_s = record.ttft_s, record.tpot_s
  return (record.status in ('stop', 'length') and ttft_s is not None
          and tpot_s is not None and ttft_s <= slo.ttft_s
          and tpot_s <= slo.tpot_s)


def by_arrival(records: Iterable[Record]) -> list[Record]:
  """What counts, in order of arrival: all but the cancelled."""
  return sorted((r for r in records if r.status != 'cancelled'),
                key=lambda r: r.arrival_s)


def interval(hits: Sequence[bool]) -> tuple[float, float, float]:
  """95 % interval of the mean of 0s and 1s in order of time.

  Wilson's interval, which supposes independent requests. Those of one run are
  not: they share queues, for hundreds of requests near saturation. The means
  of successive batches give more intervals (batch means, Student's t), each
  right where its batches are long enough to be independent; long batches are
  few, so there are several numbers of them, each of 20 requests or more. The
  answer is the widest on either side. A run shorter than the memory of its
  queues shows none of this: see goodput.search.

  Returns:
    (share, low, high), low <= share <= high in [0, 1]; (nan, 0, 1) of none.
  """
  n = len(hits)
  if not n:
    return math.nan, 0.0, 1.0
  share = sum(hits) / n
  middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
  half = _Z / (1 + _Z**2 / n) * math.sqrt(
      share * (1 - share) / n + _Z**2 / (4 * n * n))
  low, high = middle - half, middle + half
  for half in _halves(hits):
    low, high = min(low, share - half), max(high, share + half)
  # Rounding may put a bound past a share of 0 or 1.
  return share, max(0.0, min(low, share)), min(1.0, max(high, share))


def _halves(values: Sequence[float] | np.ndarray) -> list[float]:
  """Half a 95 % interval of a mean, by each number of batches."""
  each = np.asarray(values, float)
  halves = []
  for count, t in _BATCHES.items():
    if len(each) >= _LEAST_BATCH * count:
      means = [b.mean() for b in np.array_split(each, count)]
      halves.append(t * float(np.std(means, ddof=1)) / math.sqrt(count))
  return halves


def difference(hits: Sequence[bool], others: Sequence[bool]
               ) -> tuple[float, float, float]:
  """95 % interval of what one run attains more than another.

  Args:
    hits, others: of the same requests, in order of time. What one and the
      other have in common cancels, so it is narrower than of two shares.

  Returns:
    (mean of hits - others, low, high), in [-1, 1]; (nan, -1, 1) of none.

  Raises:
    InputError: not as many.
  """
  require(len(hits) == len(others), 'difference', len(others),
          f'as many as {len(hits)}')
  if not len(hits):
    return math.nan, -1.0, 1.0
  each = np.asarray(hits, float) - np.asarray(others, float)
  mean = float(each.mean())
  # As if one more differed: that none did is not sure of the next.
  spread = (float((each**2).sum()) + 1) / len(each) - mean**2
  half = max([_Z * math.sqrt(spread / len(each)), *_halves(each.tolist())])
  return mean, max(-1.0, mean - half), min(1.0, mean + half)


def attainment(records: Iterable[Record],
               slo: Slo) -> tuple[float, float, float]:
  """Share of the requests sent that met both objectives, and its interval.

  Rejected, failed and unfinished requests are misses; cancelled ones do not
  count. See interval().

  Returns:
    (share, low, high).
  """
  return interval([attains(r, slo) for r in by_arrival(records)])


def by_phase(records: Iterable[Record], slo: Slo, period_s: float,
             names: Sequence[str]) -> dict[str, tuple[float, float, float]]:
  """{phase: its attainment} where a period has equal phases of these names:
  what holds over all of a load that changes may be bought with one of them."""
  parts: dict[str, list[Record]] = {name: [] for name in names}
  for record in records:
    phase = record.arrival_s % period_s / period_s * len(names)
    parts[names[min(int(phase), len(names) - 1)]].append(record)
  return {name: attainment(part, slo) for name, part in parts.items()}


@dataclasses.dataclass(frozen=True)
class Summary:
  """Statistics of one run. nan where there was nothing to measure.

  Attributes:
    counts: {status: requests}, of all records after the warm-up.
    ttft_s, tpot_s, itl_s, second_s: p50, p90, p99. tpot_s is of requests of
      two tokens or more; second_s is the gap from the first token to the
      second, where disaggregation puts its stall.
    attainment: joint (share, low, high). ttft_share, tpot_share: of each
      objective alone. halves: joint shares of the earlier and of the later
      half of the requests; a fall says the run was not steady.
    span_s: first arrival to last finish. sent_per_s: requests sent over it.
      goodput_per_s: those that attained; goodput_per_s_device: by device.
    tokens_per_s: output tokens over span_s.
    stage_s: mean seconds in each of STAGES of the requests that ended by
      themselves.
  """

  num_devices: int
  counts: dict[str, int]
  ttft_s: tuple[float, ...]
  tpot_s: tuple[float, ...]
  itl_s: tuple[float, ...]
  second_s: tuple[float, ...]
  attainment: tuple[float, float, float]
  ttft_share: float
  tpot_share: float
  halves: tuple[float, float]
  span_s: float
  sent_per_s: float
  goodput_per_s: float
  tokens_per_s: float
  stage_s: dict[str, float]
  preemptions: int
  retries: int = 0

  @property
  def goodput_per_s_device(self) -> float:
    return self.goodput_per_s / self.num_devices

  @property
  def goodput_interval_per_s_device(self) -> tuple[float, float]:
    """The interval of attainment, carried over to goodput."""
    _, low, high = self.attainment
    return (self.sent_per_s * low / self.num_devices,
            self.sent_per_s * high / self.num_devices)


def _mean(values):
  return sum(values) / len(values) if values else math.nan


def _gaps(times: Sequence[Sequence[float]]) -> np.ndarray:
  """Between successive tokens, of all requests; times: of a token or more of
  each."""
  counts = [len(each) for each in times]
  gaps = np.diff(np.fromiter(itertools.chain.from_iterable(times), float,
                             sum(counts)))
  # From the last token of a request to the first of the next is none.
  return np.delete(gaps, np.cumsum(counts, dtype=int)[:-1] - 1)


def summarize(records: Sequence[Record], slo: Slo, num_devices: int,
              warmup_s: float = 0.0) -> Summary:
  """Summary of a run.

  Args:
    records: of one run, in any order.
    num_devices: devices that the run used, of all instances.
    warmup_s: requests that arrived in this many seconds after the first are
      left out.

  Raises:
    InputError.
  """
  require(is_positive_int(num_devices), 'num_devices', num_devices,
          'an integer of 1 or more')
  require(is_nonnegative(warmup_s), 'warmup_s', warmup_s, 'seconds, 0 or more')
  start_s = min((r.arrival_s for r in records), default=0.0) + warmup_s
  records = [r for r in records if r.arrival_s >= start_s]
  sent = by_arrival(records)
  seen = [r for r in sent if r.token_s]
  done = [r for r in seen if r.status in ('stop', 'length')]
  hits = [attains(r, slo) for r in sent]
  span_s = (max((r.finish_s for r in sent if r.finish_s is not None),
                default=math.nan) - sent[0].arrival_s) if sent else math.nan

  only_ttft = dataclasses.replace(slo, tpot_s=sys.float_info.max)
  only_tpot = dataclasses.replace(slo, ttft_s=sys.float_info.max)

  def per_s(count):
    return count / span_s if span_s > 0 else math.nan

  return Summary(
      num_devices=num_devices,
      counts=dict(collections.Counter(r.status for r in records)),
      ttft_s=percentiles([r.token_s[0] - r.arrival_s for r in seen]),
      tpot_s=percentiles([r.tpot_s or 0.0 for r in seen
                          if len(r.token_s) > 1]),
      itl_s=percentiles(_gaps([r.token_s for r in seen])),
      second_s=percentiles([r.token_s[1] - r.token_s[0] for r in seen
                            if len(r.token_s) > 1]),
      attainment=interval(hits),
      ttft_share=_mean([attains(r, only_ttft) for r in sent]),
      tpot_share=_mean([attains(r, only_tpot) for r in sent]),
      halves=(_mean(hits[:len(hits) // 2]), _mean(hits[len(hits) // 2:])),
      span_s=span_s,
      sent_per_s=per_s(len(sent)),
      goodput_per_s=per_s(sum(hits)),
      tokens_per_s=per_s(sum(len(r.token_s) for r in sent)),
      stage_s={s: _mean([r.stage_s[s] for r in done]) for s in STAGES},
      preemptions=sum(r.preemptions for r in sent),
      retries=sum(r.retries for r in sent),
  )
