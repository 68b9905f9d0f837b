"""Placements simulated over rates, or over scales of the objectives.

What experiments.simulate asks for, run after run: each is a Point, and those
that differ only in the seed of their workload are pooled into one.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import statistics
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.progress import Progress

from dsjax.analysis import attribution, metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.placement import Placement, Slo
from dsjax.placement import candidates
from dsjax.placement.api import build, no_load, simulated
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Finish, Reject
from dsjax.simulation import simulator
from experiments.common import children, seeds

POLL_S = 0.2  # between two looks at Ctrl-C while processes are at work


@dataclasses.dataclass(frozen=True)
class Point:
  """One placement at one rate and one scale of the objectives.

  Attributes:
    x: where it is drawn: the rate (for each device with --per_device), or
      the scale. rate_per_s: of the whole placement; None: the trace's own.
    records: of the whole run; kept: those after the warm-up, of which
      summary and attribution speak. unsteady: why the run was not steady,
      or ''.
    batch: tokens at which a prefill batch (or a chunked step) stops.
    tried: {token budget: share that attained} of a chunked placement.
    policy: '' where there is one for all. seed: of the workload. scale: of
      the objectives.
  """

  placement: str
  x: float
  rate_per_s: float | None
  slo: Slo
  records: list
  kept: list
  summary: metrics.Summary
  attribution: attribution.Attribution
  unsteady: str
  batch: int = 0
  tried: dict[int, float] = dataclasses.field(default_factory=dict)
  policy: str = ''
  seed: int = 0
  scale: float = 1.0

  @property
  def system(self) -> str:
    """What is simulated, in words."""
    return self.placement + (f' under {self.policy}' if self.policy else '')


def _check_floor(built, records, slo, target):
  """Raises InputError where no placement can meet an objective when idle."""
  floors = []
  for config, latencies, _ in built:
    alone_s = [*map(no_load(config, latencies), records)]
    floors.append([sorted(phase_s)[math.ceil(target * len(alone_s)) - 1]
                   for phase_s in zip(*alone_s, strict=True)])
  for field, limit, all_s in zip(('--ttft_s', '--tpot_s'), (slo.ttft_s,
                                 slo.tpot_s), zip(*floors, strict=True),
                                 strict=True):
    require(limit >= min(all_s), field, limit,
            f'{min(all_s):.3g} s or more (after --scales): on an empty '
            f'system {target:.0%} of the requests take up to that long')


def _run(built, requests, halt, tick, log):
  """Simulates: (records, Parts of each).

  Args:
    built: what api.build returned.
    halt: called at each event; raises KeyboardInterrupt to stop.
    tick: called with the requests that ended at an event.
    log: None, or a list that takes the event log.
  """
  config, latencies, link = built
  fold = attribution.Fold(latencies)

  def on_event(_, event, commands):
    halt()
    fold.observe(event, commands)
    tick(sum(isinstance(command, (Finish, Reject)) for command in commands))
    if log is not None:
      log.append((event, commands))

  result = simulator.simulate(config, requests, latencies, link,
                              on_event=on_event)
  return result.records, fold.parts()


def _point(placement, x, rate, slo, outcome, built):
  """The Point of a finished run.

  Args:
    outcome: what _run returned. built: what api.build did.
  """
  records, parts = outcome
  config, latencies, _ = built
  done = simulated(placement, slo, records, config, latencies)
  return Point(
      str(placement), x, rate, slo, records, done.kept, done.summary,
      attribution.attribute(done.kept, parts, slo, no_load(config, latencies)),
      done.unsteady, max(
          instance.prefill_tokens for instance in config.instances
          if instance.prefills))


def interval_of_runs(hits: Sequence[Sequence[bool]]
                     ) -> tuple[float, float, float]:
  """(share, low, high) of independent runs, whether each request attained.

  Student's t over the runs' shares, or the interval of all requests where that
  is wider: runs in which all attain do not differ.
  """
  shares = [statistics.fmean(run) for run in hits]
  share, low, high = metrics.interval([hit for run in hits for hit in run])
  half = seeds.half_width(shares)
  return share, max(0.0, min(low, share - half)), min(1.0, max(
      high, share + half))


def pooled(points: Sequence[Point]) -> Point:
  """The Points of one system at one x, a seed each, as one.

  Its interval is of the seeds' shares; its percentiles are of all requests.
  """
  first, *others = points
  if not others:
    return first
  kept = [record for point in points for record in point.kept]
  summary = dataclasses.replace(
      metrics.summarize(kept, first.slo, first.summary.num_devices),
      attainment=interval_of_runs([
          [metrics.attains(record, point.slo) for record in point.kept]
          for point in points]))
  return dataclasses.replace(
      first, kept=kept, summary=summary,
      attribution=attribution.together(point.attribution for point in points),
      unsteady=next((point.unsteady for point in points if point.unsteady),
                    ''),
      tried={size: statistics.fmean(point.tried[size] for point in points)
             for size in first.tried})


def by_system(points: Iterable[Point], kind: str) -> list[Point]:
  """The Points of all seeds, pooled, by system and x."""
  groups = {}
  for point in points:
    x = point.x if kind == 'scale' or point.rate_per_s else None
    groups.setdefault((point.system, x), []).append(point)
  return [pooled(group) for group in groups.values()]


def _best(points):
  """Of Points of one chunked placement with several budgets, the one that
  attains most."""
  shares = {point.batch: point.summary.attainment[0] for point in points}
  chosen = max(points, key=lambda point: shares[point.batch])
  return dataclasses.replace(chosen, tried=shares if len(points) > 1 else {})


class Task(NamedTuple):
  """A placement at one rate, with every budget of a chunked one.

  rate: requests a second, None for a trace's own. scales: of the objectives.
  kind: what varies, 'rate' or 'scale'. logs: whether event logs are kept.
  label: what else tells a run from others, ' seed 1'. told: of its Points, by
  field.
  """

  asked: candidates.SearchProblem
  placement: Placement
  rate: float | None
  scales: tuple[float, ...]
  kind: str
  logs: bool
  label: str
  told: dict[str, Any]
  options: types.SimpleNamespace

  @property
  def total(self) -> float | None:
    """Requests a second of the whole placement."""
    return self.rate and self.rate * (
        self.placement.num_devices if self.options.per_device else 1)

  @property
  def requests(self) -> int:
    """Of all its runs."""
    return self.options.requests * (
        len(self.asked.chunks) if self.placement.chunked else 1)

  def __str__(self) -> str:
    return f'{self.placement}{self.label} at ' + (
        f'{self.total:g} requests/s' if self.total else 'its times')


class Answer(NamedTuple):
  """What came of a Task. logs: (name, Config, event log) of each run."""

  points: list[Point]
  logs: list[tuple[str, scheduler.Config, list]]


# Options of experiments.simulate that its tasks go by.
_OPTIONS = ('aligned', 'depth', 'run_ahead', 'requests', 'ttft_s', 'tpot_s',
            'per_device')


def _variants(asked, placement, options):
  """What api.build makes of a placement: with each budget of a chunked one."""
  return [build(asked, placement, chunk, options.aligned, options.depth,
                options.run_ahead)
          for chunk in (asked.chunks if placement.chunked
                        else (candidates.CHUNK,))]


def tasks(options: Any, asked: candidates.SearchProblem,
          placements: Sequence[Placement],
          settings: Sequence[tuple[float | None, float]], kind: str,
          logs: bool, label: str, told: dict[str, Any]) -> list[Task]:
  """The Tasks of every placement, in order.

  Args:
    options: of experiments.simulate. asked: the SearchProblem.
    settings: ((requests a second, scale of the objectives), ...).
    kind, logs, label, told: see Task.

  Raises:
    InputError: a placement does not fit, or cannot meet an objective.
  """
  own = types.SimpleNamespace(
      **{name: getattr(options, name) for name in _OPTIONS})
  rates = list(dict.fromkeys(rate for rate, _ in settings))
  sample = [Record(request.id, 0.0, len(request.prompt), 1) for request in
            asked.workload(rates[0] or None, options.requests)]
  widest = max(scale for _, scale in settings)
  _check_floor([built for placement in placements
                for built in _variants(asked, placement, own)], sample,
               Slo(widest * options.ttft_s, widest * options.tpot_s),
               options.target)
  return [Task(asked, placement, rate, tuple(
      [scale for other, scale in settings if other == rate]), kind, logs,
               label, told, own)
          for placement, rate in itertools.product(placements, rates)]


def simulate(task: Task, halt: Callable[[], object] = bool,
             tick: Callable[[int], object] = bool) -> Answer:
  """Simulates a Task.

  Args:
    halt: called at each event; raises KeyboardInterrupt to stop.
    tick: called with the requests that ended at an event.
  """
  asked, placement, options = task.asked, task.placement, task.options
  outcomes, logs = [], []
  variants = _variants(asked, placement, options)
  for built in variants:
    log: list[Any] | None = [] if task.logs else None
    outcomes.append(_run(built, asked.workload(task.total, options.requests),
                         halt, tick, log))
    if log is not None:
      config = built[0]
      logs.append((f'{placement}{task.label}' + (
          f' at {task.total:g}' if task.total else '') + (
              f' chunk {config.instances[0].prefill_tokens}'
              if len(variants) > 1 else ''), config, log))
  records = outcomes[0][0]
  last_s = max(record.arrival_s for record in records)
  devices = placement.num_devices if options.per_device else 1
  # A trace at its own times; 0 where all come at once.
  seen = task.rate or (len(records) / last_s / devices if last_s else 0.0)
  points = []
  for scale in task.scales:
    slo = Slo(scale * options.ttft_s, scale * options.tpot_s)
    points.append(dataclasses.replace(_best([
        _point(placement, scale if task.kind == 'scale' else seen, task.total,
               slo, outcome, built)
        for built, outcome in zip(variants, outcomes, strict=True)]),
                                      scale=scale, **task.told))
  return Answer(points, logs)


def simulate_all(asked: Sequence[Task], processes: int, progress: Progress,
                 halt: Callable[[], object]) -> Iterator[tuple[Task, Answer]]:
  """The Tasks with their Answers, in order.

  Args:
    processes: beside each other. halt: raises KeyboardInterrupt to stop.
  """
  bar = progress.add_task('', total=sum(task.requests for task in asked))
  if processes == 1:
    for task in asked:
      progress.update(bar, description=str(task))
      yield task, simulate(task, halt,
                           lambda ended: progress.advance(bar, ended))
    return
  with children.simulating(processes) as pool:
    futures = [pool.submit(simulate, task) for task in asked]
    for task, future in zip(asked, futures, strict=True):
      progress.update(bar, description=str(task))
      while not concurrent.futures.wait([future], POLL_S).done:
        halt()
      yield task, future.result()
      progress.advance(bar, task.requests)
