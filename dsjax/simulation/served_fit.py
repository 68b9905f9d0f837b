"""Latencies from what clients saw of a served run.

No step is seen, only when requests arrive and when their first and last
tokens do. So the same requests are simulated on the placement that served
them. Of each, the simulation tells which steps its seconds were spent on, what
they held, and what else it waited for: its times are linear in the constants
of the steps, as long as the schedule stays. The constants nearest to the
measured times are solved for, simulated again, and so on.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from dsjax.analysis import pairing
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.placement import Plan
from dsjax.scheduling import scheduler
from dsjax.simulation import calibration, fitting, latency, simulator
from dsjax.simulation.latency import Affine, LinkLike
from dsjax.workload import files, requests
from dsjax.workload.served import Served

# Requests that a fit needs; the share of them, the last ones, that it does
# not see; how often constants are solved for.
LEAST, HELD_OUT, ROUNDS = 40, 0.3, 12
PERCENTILES = 50, 90, 95
_PHASES = 'prefill', 'decode'


class ServedFit(NamedTuple):
  """latencies: of each plan. errors: {'TTFT', 'TPOT': {percentile:
  (measured, simulated) seconds}} of the requests held out. unseen: plans and
  the phase that they did not run, whose constants are another plan's."""

  latencies: dict[Plan, Affine]
  errors: dict[str, dict[int, tuple[float, float]]]
  unseen: tuple[tuple[Plan, str], ...]


def replay(config: scheduler.Config, latencies: Sequence[Affine],
           link: LinkLike, served: Sequence[Served],
           log: bool = False) -> simulator.Result:
  """A served run's requests, simulated."""
  entries = [files.Entry(s.arrival_s, s.prompt_len, s.output_len)
             for s in served]
  work, _ = requests.from_lengths(
      entries, len(served), [s.arrival_s for s in served], in_order=True)
  return simulator.simulate(config, work, latencies, link, log=log)


def in_order(result: simulator.Result) -> list[Record]:
  """The records of a replay, one for each of what was served."""
  return sorted(result.records, key=lambda record: record.id)


def _start(served: Sequence[Served], config: scheduler.Config
           ) -> dict[str, np.ndarray]:
  """Constants to begin with, by phase: TTFT of those that met the fewest
  others before their first token, and TPOT against the rows and context that
  decoded meanwhile, dealt evenly over the instances."""
  decodes = sum(instance.decodes for instance in config.instances)
  arrival, first, last = (np.array([getattr(s, field) for s in served])
                          for field in ('arrival_s', 'first_s', 'last_s'))
  prompt = np.array([s.prompt_len for s in served], float)
  output = np.array([s.output_len for s in served], float)
  ahead = np.searchsorted(arrival, arrival) - np.array(
      [(first[:i] <= arrival[i]).sum() for i in range(len(served))])
  calm = np.flatnonzero(ahead <= np.quantile(ahead, 0.3))
  prefill, _ = fitting.nonnegative([(1.0, n, n * n) for n in prompt[calm]],
                                   (first - arrival)[calm].tolist())
  rows, seconds = [], []
  for i in np.flatnonzero(output > 1):
    beside = np.maximum(0.0, np.minimum(last, last[i])
                        - np.maximum(first, first[i])) / max(
                            last[i] - first[i], 1e-9)
    batch = max(1.0, beside.sum() / decodes)
    context = max(prompt[i] + output[i] / 2,
                  (beside @ (prompt + output / 2)) / decodes)
    rows.append((1.0, context, batch))
    seconds.append(max((last[i] - first[i]) / (output[i] - 1), 1e-9))
  require(rows, 'requests', 0, 'some with two tokens or more')
  decode, _ = fitting.nonnegative(rows, seconds)
  return {'prefill': prefill, 'decode': decode}


def _affines(plans: Sequence[Plan], constants: Mapping[tuple[Plan, str],
                                                       np.ndarray]
             ) -> dict[Plan, Affine]:
  """{plan: Affine}; of a phase that a plan did not run, another plan's."""
  def of(plan: Plan, phase: str) -> tuple[float, ...]:
    own = [x for slot, x in constants.items() if slot == (plan, phase)]
    others = [x for (_, also), x in constants.items() if also == phase]
    return tuple((own or others)[0].tolist())

  return {plan: Affine(of(plan, 'prefill'), of(plan, 'decode'), pp=plan.pp)
          for plan in plans}


def _features(model: Affine, cell: fitting.Cell) -> np.ndarray:
  """[2, 3]: what a step's prefill and decode constants multiply."""
  tokens, squares = latency.sums(cell.pieces)
  n, out = tokens + cell.batch, np.zeros((2, 3))
  if cell.kind != 'mixed':
    out[0] = (bool(tokens), tokens, squares)
    out[1] = (not tokens, cell.context, cell.batch) if cell.batch else 0.0
    return out
  (a, b, _), (a_d, _, c_d) = model.prefill, model.decode
  both = model.prefill_s(cell.pieces) + model.decode_s(cell.batch, cell.context)
  if model.mixed_s(cell.pieces, cell.batch, cell.context) >= both:
    return np.array([[1, tokens, squares], [1, cell.context, cell.batch]])
  line = a + b * n >= a_d + c_d * n  # see Affine.mixed
  return np.array([[line, line * n, squares],
                   [not line, cell.context, (not line) * n]])


class _Spent:
  """What the steps of an instance held, summed up to any moment."""

  def __init__(self, model: Affine, steps: Sequence[calibration.Step]) -> None:
    cells = [_features(model, step.cell).ravel() for step in steps]
    each = np.array(cells).reshape(-1, 6) / model.pp
    start = np.array([step.start_s for step in steps])
    ends = start + [step.cell.seconds for step in steps]
    # Steps of a pipeline overlap: what they hold is dealt out to both sides.
    order = np.argsort(np.concatenate([start, ends]), kind='stable')
    self.times_s = np.concatenate([start, ends])[order]
    half = np.concatenate([np.zeros_like(each), each])[order]
    self.sums = np.cumsum(half, axis=0)

  def between(self, since_s: np.ndarray, until_s: np.ndarray) -> np.ndarray:
    """[requests, 6]: between these moments."""
    return np.stack([np.interp(until_s, self.times_s, column)
                     - np.interp(since_s, self.times_s, column)
                     for column in self.sums.T], 1)


def _spans(records: Sequence[Record],
           link: LinkLike) -> list[tuple[np.ndarray, ...]]:
  """Before and after the first token: (since, until, instance) of each
  request. A bare copy of KV is spent on no step; a wait for pages is."""
  first = np.array([r.token_s[0] for r in records])
  last = np.array([r.token_s[-1] for r in records])
  copy_s = [link.migrate_s(r.prompt_len) if r.migrated_tokens else 0.0
            for r in records]
  arrival = np.array([r.arrival_s for r in records])
  where = [np.array([r.instances[end] for r in records]) for end in (0, -1)]
  return [(arrival, first, where[0]),
          (np.minimum(first + copy_s, last), last, where[1])]


def _solve(result: simulator.Result, models: Sequence[Affine], link: LinkLike,
           served: Sequence[Served],
           slots: Sequence[Mapping[str, int]],
           count: int) -> np.ndarray:
  """The constants nearest to the measured seconds, [slots, 3], 0 or more.

  Args:
    served: those to fit to, of the first records. slots: of each instance,
      those of its constants, by phase.
  """
  log, records = result.log or [], in_order(result)
  records = records[:len(served)]
  steps: list[list[calibration.Step]] = [[] for _ in models]
  for ended in pairing.ended(log):
    if ended.done and isinstance(ended, pairing.Execution):
      for step in calibration.steps_of(ended):
        steps[step.instance].append(step)
  x, y = [], []
  for n, (since, until, where) in enumerate(_spans(records, link)):
    seen = np.array([(s.ttft_s, s.last_s - s.first_s)[n] for s in served])
    told = np.array([(r.ttft_s or 0.0, r.token_s[-1] - r.token_s[0])[n]
                     for r in records])
    for index, model in enumerate(models):
      own = (where == index) & (told > 0) & (seen > 0)
      if not own.any():
        continue
      held = _Spent(model, steps[index]).between(since[own], until[own])
      now = held @ np.concatenate([model.prefill, model.decode])
      row = np.zeros((own.sum(), count * 3))
      for phase, slot in slots[index].items():
        first = 3 * _PHASES.index(phase)
        row[:, 3 * slot:3 * slot + 3] = held[:, first:first + 3]
      x.append(row / told[own, None])
      y.append((seen[own] - (told[own] - now)) / told[own])
  features, seconds = np.concatenate(x), np.concatenate(y)
  size = np.maximum(np.linalg.norm(features, axis=0), 1e-300)
  constants, _ = optimize.nnls(features / size, seconds)
  return (constants / size).reshape(count, 3)


def _error(served: Sequence[Served], records: Sequence[Record]) -> float:
  """Of the logarithms of both times, the mean distance."""
  return float(np.mean([
      np.mean(np.abs(np.log(np.maximum(1e-9, told) / seen)))
      for seen, told in (np.array(own).T for own in _pairs(
          served, records).values() if own)]))


def _pairs(served: Sequence[Served], records: Sequence[Record]
           ) -> dict[str, list[tuple[float, float]]]:
  """{'TTFT', 'TPOT': (measured, simulated) seconds of each of `served`, the
  first of the records}."""
  pairs: dict[str, list[tuple[float, float]]] = {'TTFT': [], 'TPOT': []}
  for s, record in zip(served, records[:len(served)], strict=True):
    pairs['TTFT'].append((s.ttft_s, record.ttft_s or 0.0))
    if s.tpot_s:
      pairs['TPOT'].append((s.tpot_s, record.tpot_s or 0.0))
  return pairs


def percentiles(served: Sequence[Served], records: Sequence[Record]
                ) -> dict[str, dict[int, tuple[float, float]]]:
  """{'TTFT', 'TPOT': {percentile: (measured, simulated) seconds}}."""
  out: dict[str, dict[int, tuple[float, float]]] = {}
  for name, pairs in _pairs(served, records).items():
    if pairs:
      both = np.percentile(np.array(pairs), PERCENTILES, axis=0)
      out[name] = {q: (float(seen), float(told))
                   for q, (seen, told) in zip(PERCENTILES, both, strict=True)}
  return out


def fit_served(config: scheduler.Config, plans: Sequence[Plan],
               link: LinkLike, served: Sequence[Served]) -> ServedFit:
  """The latencies of a placement's plans that a served run shows.

  Args:
    config: of the instances that served. plans: theirs. link: between them;
      taken as it is. served: by arrival. The last HELD_OUT of them are
      simulated, but not fitted to.

  Raises:
    InputError: fewer than LEAST requests, or none of two tokens or more.
  """
  require(len(served) >= LEAST, 'requests', len(served), f'{LEAST} or more')
  known = served[:len(served) - int(HELD_OUT * len(served))]
  runs = [[(plan, phase) for phase in _PHASES] for plan in plans]
  used = list(dict.fromkeys(
      slot for own, instance in zip(runs, config.instances, strict=True)
      for slot in own if getattr(instance, slot[1] + 's')))
  start = _start(known, config)
  constants = np.stack([start[phase] for _, phase in used])
  slots = [{phase: used.index((plan, phase)) for plan, phase in own
            if (plan, phase) in used} for own in runs]
  best = solved = constants
  step, error, latencies = 1.0, math.inf, {}
  for _ in range(ROUNDS):
    tried = _affines(list(dict.fromkeys(plans)),
                     dict(zip(used, constants, strict=True)))
    models = [tried[plan] for plan in plans]
    result = replay(config, models, link, served, log=True)
    now = _error(known, in_order(result))
    if now < error:
      best, error, latencies = constants, now, tried
      solved = _solve(result, models, link, known, slots, len(used))
      step = min(1.0, 2 * step)
    else:
      step /= 3  # where queues are long, they answer by more than they held
    constants = best + step * (solved - best)
  later = in_order(replay(config, [latencies[plan] for plan in plans], link,
                           served))[len(known):]
  return ServedFit(latencies, percentiles(served[len(known):], later), tuple(
      slot for slot in dict.fromkeys(sum(runs, [])) if slot not in used))
