"""What the best placements mean: what binds them, whether to disaggregate."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence

from dsjax.config.placement import Placement
from dsjax.placement import clusters, judging
from dsjax.placement.candidates import SearchProblem
from dsjax.placement.goodput import Goodput, steady
from dsjax.placement.judging import Candidate
from dsjax.scheduling.page_pool import num_free
from dsjax.scheduling.state import room

# A bottleneck is looked for at this many times the goodput: enough misses to
# count, and what binds first still binds alone.
OVERLOAD = 1.1
# Memory is short if something waits for pages or a place at least this share
# of the time. Near capacity a burst is refused now and then under any memory.
SHORT_SHARE = 0.2
# A link is to blame for a request's slow transfer if the copy itself takes at
# least this part of it: the rest is waiting behind other copies and steps.
OWN_SHARE = 1 / 3
# Or if it is busy this share of the time: copies of equal length that arrive
# at random then wait two of their own durations on average (M/D/1).
BUSY_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class RankedPlacement:
  """A placement and what it serves: a line of the answer's table.

  goodput: of the whole placement. aligned: KV moves inside a node.
  prefill_tokens: of a batch; None: see batch_tokens. price: of its devices,
  where these count by their prices; None: their number.
  """

  placement: Placement
  goodput: Goodput
  aligned: bool = False
  prefill_tokens: int | None = None
  price: float | None = None

  @property
  def to_serve(self) -> Placement:
    """The placement, with what `aligned` says, as dsjax.serve takes it."""
    return dataclasses.replace(self.placement, aligned=self.aligned and (
        self.placement.mode == 'disaggregated'))

  @property
  def devices(self) -> float:
    """How many devices it counts as."""
    return self.price or self.placement.num_devices

  @property
  def per_device(self) -> float:
    """Its goodput, requests/s."""
    return self.goodput.rate_per_s / self.devices

  @property
  def interval_per_device(self) -> tuple[float, float]:
    """Rates that surely attain and surely do not, requests/s: a 95 % interval
    where the goodput is tight."""
    n = self.devices
    return self.goodput.low_per_s / n, self.goodput.high_per_s / n


def bottleneck(problem: SearchProblem, row: RankedPlacement) -> str:
  """What binds a placement at OVERLOAD times its goodput, in words.

  The objective that more requests miss, and what they would have met it
  without: waiting for pages, the copy of KV, or neither.
  """
  rate_per_s = OVERLOAD * row.goodput.rate_per_s
  if not rate_per_s:
    return 'nothing is served'
  system = judging.setup(problem, Candidate(
      row.placement, row.prefill_tokens, row.aligned, math.inf))
  judge = judging.Judge(problem, system, rate_per_s)
  n = min(judge.length(rate_per_s), 4 * problem.most_requests)
  shortage = _Shortage(system.config.instances)
  records = steady(judging.run(problem, system, rate_per_s, n, shortage))
  slo = judge.objectives(rate_per_s)
  late = [r for r in records if (r.ttft_s or 0.0) > slo.ttft_s]
  slow = [r for r in records if (r.tpot_s or 0.0) > slo.tpot_s]
  short = shortage.short_s > SHORT_SHARE * shortage.now_s
  if not late and not slow:
    return f'nothing up to {OVERLOAD} times its goodput'
  if len(late) >= len(slow):
    return 'KV memory (prompts wait for pages)' if short else 'prefill compute'
  if row.placement.mode != 'disaggregated':
    preemptions = sum(r.preemptions for r in slow)
    return ('KV memory (preemptions)' if preemptions > len(slow) / 2 else
            'decode steps and the prefills between them (TPOT)')
  if _most_meet(slow, 'migrate', slo) and _link_binds(
      system.link, records, slow,
      len(row.placement.prefill) * len(row.placement.decode)):
    return 'link'
  if _most_meet(slow, 'decode_queue', slo):
    return ('KV memory (finished prefills wait for pages)' if short
            else 'decode batch')
  return 'decode steps (TPOT)'


def _most_meet(slow, stage, slo):
  """Whether most slow requests would meet TPOT without a stage."""
  return sum(r.tpot_s - r.stage_s[stage] / (len(r.token_s) - 1)
             <= slo.tpot_s for r in slow) > len(slow) / 2


def _link_binds(link, records, slow, links):
  """Whether copies are long themselves, or leave their links little time."""
  own_s = sum(link.migrate_s(r.prompt_len) for r in slow)
  transfer_s = sum(r.stage_s['migrate'] for r in slow)
  busy_s = sum(link.migrate_s(r.prompt_len) for r in records) / links
  span_s = records[-1].arrival_s - records[0].arrival_s
  return own_s > OWN_SHARE * transfer_s or busy_s > BUSY_SHARE * span_s


class _Shortage:
  """Seconds of a run, and of them those in which something waits for pages or
  a place on an instance; told of each event."""

  def __init__(self, configs):
    self.configs, self.now_s, self.short_s = configs, 0.0, 0.0
    self.short = False

  def __call__(self, run, event, commands):
    del commands
    self.short_s += (event.time_s - self.now_s) * self.short
    self.now_s = event.time_s
    self.short = any(
        _refused(run, instance, config) for instance, config in zip(
            run.instances, self.configs, strict=True))


def _refused(run, instance, config):
  """Whether something waits for pages or a place on an instance."""
  waiting = instance.queue if config.prefills else instance.pulls
  if not waiting:
    return False
  # As policy.leave_room_to_grow.
  need = room(instance, config, run.seqs[waiting[0]].prompt_len + 1)
  spare = instance.residents if config.decodes else 0
  return not need or num_free(instance.pool) < need + spare


def name(row: RankedPlacement) -> str:
  """A placement's mode, with the tokens of its batches where it has some."""
  return row.placement.mode + (f' ({row.prefill_tokens} tokens)'
                               if row.prefill_tokens else '')


def best_of(rows: Iterable[RankedPlacement],
            kind: Callable[[RankedPlacement], Hashable]
            ) -> dict[Hashable, RankedPlacement]:
  """The best line of each kind: one with an interval, where the kind has one.

  Args:
    rows: best first.
  """
  best: dict[Hashable, RankedPlacement] = {}
  for row in sorted(rows, key=lambda row: not row.goodput.tight):
    best.setdefault(kind(row), row)
  return best


def verdict(rows: Sequence[RankedPlacement],
            problem: SearchProblem | None = None) -> str:
  """Disaggregate or not, by how much, and how sure that is.

  The ratio's interval is at least as wide as 95 %: it goes from the lower end
  of one placement over the upper end of the other, to the reverse.

  Args:
    rows: best first. See best_of.
  """
  best = best_of((row for row in rows if row.goodput.rate_per_s),
                 lambda row: row.placement.mode == 'disaggregated')
  split, together = best.get(True), best.get(False)
  first, *others = sorted(
      (row for row in (together, split) if row is not None),
      key=lambda row: -row.per_device) or (None,)
  unit = clusters.unit(problem.cluster) if problem else 'device'
  if first is None:
    return 'No placement meets the objectives at any rate.'
  if not others:
    only = first
    if len({r.placement.mode == 'disaggregated' for r in rows}) == 1:
      return (f'Only {only.placement.mode} placements were judged: '
              f'{only.per_device:.3g} requests/s per {unit}.'
              + _copies(only, problem))
    return (f'Only {only.placement.mode} placements meet the objectives.'
            + _copies(only, problem))
  second, = others
  ratio = first.per_device / second.per_device
  (low, high), (other_low, other_high) = (first.interval_per_device,
                                          second.interval_per_device)
  between = (low / other_high if other_high else 0.0,
             high / other_low if other_low else math.inf)
  spread = f'[{between[0]:.2f}, {between[1]:.2f}]'
  if between[0] <= 1:
    text = (f'No clear winner: {name(first)} serves {ratio:.2f} {spread} '
            f'times what {name(second)} does per {unit}, within the '
            'intervals.')
  else:
    what = 'Disaggregate' if first is split else 'Do not disaggregate'
    text = (f'{what}: {name(first)} serves {ratio:.2f} {spread} times what '
            f'{name(second)} does per {unit} ({first.per_device:.3g} against '
            f'{second.per_device:.3g} requests/s).')
  return text + _copies(first, problem)


def _copies(row, problem):
  """How many copies serve the rate that is asked for, if one is."""
  if problem is None or not problem.rate_per_s:
    return ''
  copies = math.ceil(problem.rate_per_s / row.goodput.rate_per_s)
  need, have = copies * row.placement.num_devices, problem.cluster.num_devices
  enough = clusters.fits(problem.cluster, row.placement, copies)
  return (f' {problem.rate_per_s:.4g} requests/s take {copies} of it: {need} '
          f'devices of {have}' + ('.' if enough else ', too many.'))
