"""What no placement can pass: rates and shares that need no simulation.

A rate above an instance's capacity cannot last: its work per request, at the
largest batches that its memory allows, takes more than the time there is. A
request whose bare prefill or decode steps exceed an objective misses it at
any rate. The search discards by these bounds only what is surely worse.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.simulation import latency

Lengths = Sequence[tuple[int, int]]  # (prompt, output) tokens of requests
LEAST_S = 1e-9  # no request and no step is taken to cost less


def mean_context(lengths: Lengths) -> float:
  """Tokens attended to by a mean decode step of a row; where every output is
  one token nothing decodes, and it is the mean prompt."""
  steps = sum(o - 1 for _, o in lengths)
  if not steps:
    return sum(i for i, _ in lengths) / len(lengths)
  return sum((o - 1) * (i + o / 2) for i, o in lengths) / steps


@functools.lru_cache(1024)
def _decode_share(seconds, most_rows, rows):
  """(fixed seconds of a row's step, least slope of its context).

  The batches of an instance hold `rows` rows on average at most, so its steps
  cost no less than the lower convex envelope of their cost over the batch
  size. most_rows: of one batch.
  """
  sizes = np.arange(1, most_rows + 1)
  fixed, slope = np.array([seconds.decode_line(int(b)) for b in sizes]).T
  rows = min(max(rows, 1.0), most_rows)
  below, above = sizes <= rows, sizes >= rows
  left, right = sizes[below][:, None], sizes[above][None]
  gap = np.where(right > left, right - left, 1)
  chords = (fixed[below][:, None] * (right - rows)
            + fixed[above][None] * (rows - left)) / gap
  chords = np.where(right > left, chords, fixed[below][:, None])
  return (min(chords.min() / rows, (fixed / sizes)[below].min()),
          slope.min())


def decode_share(seconds: latency.Latency, instance: InstanceConfig,
                 lengths: Lengths) -> tuple[float, float]:
  """(fixed seconds of a row's step, least slope of its context).

  Of batches as large as the tokens that an instance holds allow on average
  (Little's law).
  """
  held = instance.num_pages * instance.page_size / mean_context(lengths)
  return _decode_share(seconds, instance.max_seqs,
                       min(held, instance.max_seqs) / instance.pp)


def decode_work_s(seconds: latency.Latency, instance: InstanceConfig,
                  lengths: Lengths) -> float:
  """Least seconds of decode steps of a mean request."""
  share, slope = decode_share(seconds, instance, lengths)
  return sum((o - 1) * (share + slope * (i + o / 2))
             for i, o in lengths) / len(lengths)


def _start_s(seconds):
  """What a prefill batch costs before its first token, 0 if not known."""
  return seconds.prefill[0] if isinstance(seconds, latency.Affine) else 0.0


def prefill_work_s(seconds: latency.Latency, instance: InstanceConfig,
                   lengths: Lengths) -> float:
  """Least seconds of prefill batches of a mean request.

  The fixed cost of a batch is shared by prefill_seqs prompts at most; that of
  an affine latency by prefill_tokens tokens at most too.
  """
  most, start_s = instance.prefill_seqs, _start_s(seconds)
  total = 0.0
  for i, _ in lengths:
    total += seconds.prefill_s(((0, i),) * most) / most
    total += start_s * max(0.0, i / instance.prefill_tokens - 1 / most)
  return total / len(lengths)


def chunked_work_s(seconds: latency.Latency, instance: InstanceConfig,
                   lengths: Lengths) -> float:
  """Least seconds of a mean request where prompts and rows share steps.

  A row in a mixed step costs a token of prefill, in a decode step its share;
  its context costs the same in both.
  """
  if not isinstance(seconds, latency.Affine) or seconds.mixed:
    return min(prefill_work_s(seconds, instance, lengths),
               decode_work_s(seconds, instance, lengths))
  share, slope = decode_share(seconds, instance, lengths)
  row_s = min(share, seconds.prefill[1])
  return prefill_work_s(seconds, instance, lengths) + sum(
      (o - 1) * (row_s + slope * (i + o / 2)) for i, o in lengths
  ) / len(lengths)


def capacity_per_s(seconds: latency.Latency, instance: InstanceConfig,
                   lengths: Lengths) -> float:
  """Requests a second that an instance can serve at most."""
  work_s = 0.0
  if instance.mixes:
    work_s = chunked_work_s(seconds, instance, lengths)
  else:
    if instance.prefills:
      work_s += prefill_work_s(seconds, instance, lengths)
    if instance.decodes:
      work_s += decode_work_s(seconds, instance, lengths)
  return float(instance.pp / max(work_s, LEAST_S))


def ttft_guess_per_s(seconds: latency.Latency, instance: InstanceConfig,
                     lengths: Lengths, ttft_s: float, target: float) -> float:
  """A rate at which about the target share starts within ttft_s: no bound.

  A queue of prompts one by one (Lindley's recursion), behind one decode step
  where both phases share the instance. It says what to simulate first.
  """
  service_s = np.array([seconds.prefill_s(((0, i),)) for i, _ in lengths])
  idle_s = service_s + seconds.host_s
  if instance.prefills and instance.decodes:
    fixed, slope = seconds.decode_line(min(32, instance.max_seqs))
    idle_s = idle_s + fixed + slope * instance.num_pages * (
        instance.page_size / 3)
  service_s = (service_s + seconds.host_s) / instance.pp
  gaps = np.random.default_rng(0).standard_exponential(len(lengths))
  low, high = 0.0, 1 / service_s.mean()
  for _ in range(12):
    rate = (low + high) / 2
    path = np.cumsum(np.append(0.0, service_s[:-1] - gaps[1:] / rate))
    wait_s = path - np.minimum.accumulate(path)
    met = np.mean(wait_s + idle_s <= ttft_s) >= target
    low, high = (rate, high) if met else (low, rate)
  return float(low)


def tpot_guess_per_s(seconds: latency.Latency, instance: InstanceConfig,
                     lengths: Lengths, tpot_s: float) -> float:
  """A rate at which decode steps take tpot_s, or memory is full: no bound.

  Of steps of equal rows with a mean context each. It says what to simulate
  first.
  """
  steps = sum(o - 1 for _, o in lengths) / len(lengths)
  if not steps:
    return math.inf
  context = mean_context(lengths)
  held = instance.num_pages * instance.page_size / context
  rows_per_s = 0.0
  for rows in range(1, max(1, int(
      min(held, instance.max_seqs) / instance.pp)) + 1):
    fixed, slope = seconds.decode_line(rows)
    step_s = fixed + slope * rows * context + seconds.host_s
    if step_s <= tpot_s:
      rows_per_s = max(rows_per_s, rows / max(step_s, LEAST_S))
  return instance.pp * rows_per_s / steps


def link_per_s(link: latency.LinkLike, pairs: int,
               lengths: Lengths) -> float:
  """Requests a second that `pairs` links can move at most."""
  mean_s = sum(link.migrate_s(i) for i, _ in lengths) / len(lengths)
  return pairs / max(mean_s, LEAST_S)


def _prefill_floor_s(seconds, instance, tokens):
  """Least seconds of a prompt's prefill on an idle instance."""
  whole_s = seconds.prefill_s(((0, tokens),))
  if tokens <= instance.prefill_tokens and not instance.mixes:
    return whole_s
  if not isinstance(seconds, latency.Affine) or seconds.buckets.tokens:
    return seconds.prefill_s(((0, 1),))
  return whole_s / instance.pp  # pieces may be in several stages at a time


def idle_share(slo: Slo, prefill: tuple[latency.Latency, InstanceConfig],
               decode: tuple[latency.Latency, InstanceConfig],
               link: latency.LinkLike | None, lengths: Lengths) -> float:
  """Share of requests that can meet both objectives at any rate.

  Args:
    prefill, decode: the instance of each phase and its seconds.
    link: between them, None where they are one.
  """
  seconds, instance = decode
  lines = [seconds.decode_line(b) for b in range(1, instance.max_seqs + 1)]
  fixed, slope = (min(x) for x in zip(*lines, strict=True))
  attained = 0
  for i, o in lengths:
    tpot_s = fixed + slope * (i + o / 2) if o > 1 else 0.0
    if link and o > 1:
      tpot_s += link.migrate_s(i) / (o - 1)
    attained += (tpot_s <= slo.tpot_s
                 and _prefill_floor_s(*prefill, i) <= slo.ttft_s)
  return attained / len(lengths)


def out_of_reach(share: float, target: float, count: int) -> bool:
  """Whether a share seen in `count` requests is surely below the target."""
  spread = 3 * math.sqrt(target * (1 - target) / count)
  return share < target - spread
