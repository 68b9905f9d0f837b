"""Policies side by side: goodput per device, on the same requests.

  python -m experiments.policies --out=out/policies
  python -m experiments.policies --workloads=sharegpt --only=static,arrow
  python -m experiments.policies --model=llama-3-70b --plan=4x1 --instances=2

Each cell is a workload and a pair of objectives, on --instances flexible
instances of one --plan. Objectives follow the model: TTFT is f times the
prefill of a prompt of the 9th decile and 20 ms, TPOT g times a decode step of
one row, with (f, g) of OBJECTIVES. A policy with settings is measured with
each of VARIANTS, and the best one counts; with --orders=deadlines also with
prompts ordered by deadline, as most of what a policy wins over first come
first served may be its order. All of them see the same requests.

Where the rate shifts (--process=sine:low=5:high=45:period_s=60, step:...) or
the lengths do (--workloads=shift:60:sharegpt+longbench), the goodput is the
mean rate at which the target attains over a whole period, after one of warm-up,
and column phases says what attains in each part of it: no phase is to be
sacrificed. --real serves one row on this machine's CPU devices instead (see
experiments/common/real_row.py).

It prints a table an objective and writes policies.csv as it goes: model,
cluster, workload, ttft_s, tpot_s, policy, goodput_per_device, low, high, binds
(what ended the search, see goodput.Goodput), and policies.png and .pdf. Rows
that are there already are kept and not measured again, so a run that was ended
by --minutes or Ctrl-C goes on. Exit codes: 0; 2 for bad input; 130 by Ctrl-C.
"""

import csv
import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.placement import candidates, goodput, judging
from dsjax.placement.api import make_problem
from dsjax.policies.named import DEADLINES as DEADLINES_END
from experiments.common import (
  cli,
  pictures,
  policies,
  provenance,
  real_row,
  terminal,
)
from experiments.place import processes

OBJECTIVES = {'balanced': (5.0, 3.5), 'ttft': (2.5, 7.0), 'tpot': (12.0, 1.8)}
CHUNKS = ('', ':chunk=256', ':chunk=512', ':chunk=1024', ':chunk=2048')
# What is tried of a policy; {k} stands for 1 to all instances but one.
VARIANTS = {
    'static': ('static:prefills={k}',),
    'colocated': ('colocated',),
    'chunked': tuple(f'chunked{chunk}' for chunk in CHUNKS),
    'splitwise': ('splitwise:prefills={k}',),
    'mooncake': ('mooncake:prefills={k}',),
    'llm_d': ('llm_d:prefills={k}:least=256', 'llm_d:prefills={k}:least=1024'),
    'dynamo': ('dynamo:prefills={k}',),
    'arrow': ('arrow:prefills={k}',),
    'taichi': ('taichi:prefills={k}:small=256',
               'taichi:prefills={k}:small=512'),
    'ecoserve': ('ecoserve',),
    'llumnix': ('llumnix',),
    'planner': ('planner:prefills={k}',),
    'replan': ('replan',),
    'adaptive': ('adaptive',),
}
PERIODS = 2  # of a load that shifts, the first of which is no part of it
FIFO, DEADLINES = 'fifo', 'deadlines'
ORDERED = {('adaptive', DEADLINES)}  # it has this order already
FLAGS = {
    'model': cli.Flag('llama-3-8b', 'A name of dsjax.config.zoo.'),
    'latency': 'tables:h100-80g',
    'plan': cli.Flag('1x1', 'TPxPP of each instance.'),
    'instances': cli.Flag(4, 'Flexible instances.', low=2, high=64),
    'workloads': cli.Flag(['sharegpt', 'humaneval', 'longbench'],
                          'Names or files, as experiments.place --lengths.'),
    'process': 'poisson',
    'objectives': cli.Flag(list(OBJECTIVES), f'Of {list(OBJECTIVES)}.'),
    'only': cli.Flag([], f'Policies; of {list(VARIANTS)}, or path.py:name.'),
    'orders': cli.Flag([FIFO, DEADLINES], 'Orders of each policy.'),
    'requests': cli.Flag(800, 'Of a run, at least.', low=50),
    'tolerance': cli.Flag(0.05, 'As experiments.place --tolerance.'),
    'target': cli.Flag(0.9, 'Share that must attain.'),
    'seed': 0,
    'real': cli.Flag(False, 'Serve one row on CPU devices: seconds of this '
                     'machine.'),
    'rate': cli.Flag(None, 'With --real: requests a second.', float),
    'ttft_s': 2.0, 'tpot_s': 0.15,
    'minutes': cli.Flag(600.0, 'At most.', low=0.0),
    'processes': cli.Flag(os.cpu_count() or 1, 'Beside each other.', low=1),
    'out': 'out/policies',
}


class Cell(NamedTuple):
  """A line's question. objective: of OBJECTIVES. order: fifo or deadlines."""

  model: str
  latency: str
  plan: str
  instances: int
  workload: str
  process: str
  objective: str
  policy: str
  order: str

  @property
  def load(self) -> str:
    """The workload's name in tables."""
    name = pathlib.Path(self.workload).stem
    return name + ('' if self.process == 'poisson' else f' {self.process}')


class Line(NamedTuple):
  """A line of policies.csv; variant: of the policy, the best. phases: of a
  load that shifts, what attains in each."""

  model: str
  cluster: str
  workload: str
  ttft_s: float
  tpot_s: float
  policy: str
  goodput_per_device: float
  low: float
  high: float
  binds: str
  objective: str
  variant: str
  phases: str = ''


class Effort(NamedTuple):
  """How a goodput is measured; see FLAGS."""

  requests: int
  tolerance: float
  target: float
  seed: int


def label(cell: Cell) -> str:
  """The policy's name in tables."""
  return cell.policy + (DEADLINES_END if cell.order == DEADLINES else '')


def cluster(cell: Cell) -> str:
  return f'{cell.instances} x {cell.plan} {cell.latency}'


@functools.lru_cache
def problem_of(model: str, latency: str, workload: str, process: str,
               effort: Effort) -> candidates.SearchProblem:
  """The SearchProblem of a workload, without objectives."""
  return make_problem(
      model, Slo(1.0, 1.0), workload, latency, cut=True, max_len=8192,
      process=process, seed=effort.seed, requests=effort.requests,
      most_requests=4 * effort.requests, tolerance=effort.tolerance)


def objectives(problem: candidates.SearchProblem, plan: Plan, name: str
               ) -> Slo:
  """The objectives of a name, for a model, its plan and a workload."""
  seconds = problem.latency_of(plan)
  require(seconds is not None, '--plan', plan, 'a plan with latencies: '
          f'{candidates.names(candidates.measured(problem))}')
  prompts = sorted(p for p, _ in candidates.lengths(problem, 1000))
  times, steps = OBJECTIVES[name]
  longest = prompts[len(prompts) * 9 // 10]
  mean = sum(prompts) / len(prompts)
  return Slo(round(times * seconds.prefill_s(((0, longest),)) + 0.02, 4),
             round(steps * seconds.decode_s(1, mean), 5))


def variants(cell: Cell) -> list[str]:
  """The policies, as policies.load takes them, that a cell tries."""
  texts = VARIANTS.get(cell.policy, (cell.policy,))
  end = DEADLINES_END if cell.order == DEADLINES else ''
  return [text.format(k=k) + end for text in texts
          for k in (range(1, cell.instances) if '{k}' in text else (1,))]


def measure(effort: Effort, cell: Cell) -> Line:
  """The best of a cell's variants. A pure function: any process may run it."""
  plan = Plan.parse(cell.plan, '--plan')
  problem = problem_of(cell.model, cell.latency, cell.workload, cell.process,
                       effort)
  slo = objectives(problem, plan, cell.objective)
  problem = dataclasses.replace(problem, slo=slo)
  placement = Placement(flexible=[plan] * cell.instances)
  seconds = problem.latency_of(plan)
  batch = candidates.batch_tokens(problem, seconds)
  prompts = [p for p, _ in candidates.lengths(problem, 1000)]
  # No faster than every device prefilling the largest batches.
  bound_per_s = (cell.instances * batch / seconds.prefill_s(((0, batch),))
                 / (sum(prompts) / len(prompts)))
  best, chosen = goodput.Goodput(0.0, 0.0, 0.0, 'floor', 0.0, 0), ''
  for text in variants(cell):
    candidate = judging.Candidate(placement, batch, True, bound_per_s,
                                  guess_per_s=bound_per_s / 4)
    rates = _goodput(
        dataclasses.replace(problem, policy=policies.load(text, slo)),
        judging.Task(candidate, effort.target,
                     best.rate_per_s * (1 + effort.tolerance) or None))
    if rates.rate_per_s > best.rate_per_s:
      best, chosen = rates, text
  phases = ''
  if problem.workload.phases and chosen:
    records = whole_periods(dataclasses.replace(
        problem, policy=policies.load(chosen, slo)), candidate,
        best.rate_per_s)
    phases = ', '.join(f'{name} {share:.0%}' for name, (share, *_) in
                       metrics.by_phase(records, slo, *problem.workload.phases
                                        ).items())
  devices = placement.num_devices
  return Line(cell.model, cluster(cell), cell.load,
              slo.ttft_s, slo.tpot_s, label(cell),
              round(best.rate_per_s / devices, 4),
              round(best.low_per_s / devices, 4),
              round(best.high_per_s / devices, 4), best.binds, cell.objective,
              chosen, phases)


def whole_periods(problem: candidates.SearchProblem,
                  candidate: judging.Candidate, rate_per_s: float
                  ) -> list[Record]:
  """The records of a whole period of a load that shifts, after one that warms
  up, at this mean rate."""
  period_s = problem.workload.phases.period_s
  n = math.ceil(PERIODS * period_s * rate_per_s) + 1
  records = judging.run(problem, judging.setup(problem, candidate),
                        rate_per_s, n)
  return [r for r in records
          if period_s <= r.arrival_s < PERIODS * period_s]


def _goodput(problem: candidates.SearchProblem, task: judging.Task
             ) -> goodput.Goodput:
  """judging.measure; of a load that shifts, over whole periods: a part of one
  says nothing of the whole."""
  if not problem.workload.phases:
    return judging.measure(problem, task)

  def hits_at(rate_per_s: float, n: int) -> list[bool]:
    del n
    return goodput.steady_hits(whole_periods(
        problem, task.candidate, rate_per_s), problem.slo, 0.0)

  most_per_s = task.candidate.bound_per_s
  return goodput.search(
      hits_at, task.target, task.candidate.guess_per_s, 1 + problem.tolerance,
      1, 1, goodput.Bisection(
          stride=1.4, least_per_s=most_per_s / 4**6, most_per_s=most_per_s,
          beat_per_s=task.beat_per_s))


def cells(options: Any) -> Iterator[Cell]:
  """What is asked for, workload by workload."""
  for workload in options.workloads:
    for objective in options.objectives:
      for order in options.orders:
        for policy in options.only or VARIANTS:
          if (policy, order) in ORDERED and FIFO in options.orders:
            continue
          yield Cell(options.model, options.latency, options.plan,
                     options.instances, workload, options.process, objective,
                     policy, order)


def place_of(cell: Cell) -> tuple[str, ...]:
  """Of a cell, what `key` is of its line."""
  return (cell.model, cluster(cell), cell.load, cell.objective, label(cell))


def key(line: Line) -> tuple[str, ...]:
  """What tells a line from every other."""
  return (line.model, line.cluster, line.workload, line.objective, line.policy)


def read(path: pathlib.Path) -> list[Line]:
  """The lines of a policies.csv; none where there is no file."""
  if not path.exists():
    return []
  with path.open(newline='') as file:
    rows = list(csv.DictReader(file))
  require(all(set(row) == set(Line._fields) for row in rows), '--out', path,
          f'a folder whose policies.csv has the columns {Line._fields}')
  numbers = ('ttft_s', 'tpot_s', 'goodput_per_device', 'low', 'high')
  return [Line(**{name: float(value) if name in numbers else value
                  for name, value in row.items()}) for row in rows]


def table(lines: Iterable[Line], objective: str) -> Table:
  """Policies down, workloads across; the best of each column in bold."""
  lines = [line for line in lines if line.objective == objective]
  workloads = list(dict.fromkeys(line.workload for line in lines))
  known = {(line.policy, line.workload): line for line in lines}
  slos = {line.workload: f'{1e3 * line.ttft_s:.0f}/{1e3 * line.tpot_s:.1f}'
          for line in lines}
  out = Table(title=f'{objective}: requests/s a device')
  out.add_column('policy')
  for workload in workloads:
    out.add_column(f'{workload[:12]}\n{slos[workload]} ms', justify='right')
  best = {w: max(line.goodput_per_device for line in lines
                 if line.workload == w) for w in workloads}
  for policy in dict.fromkeys(line.policy for line in lines):
    row = []
    for workload in workloads:
      line = known.get((policy, workload))
      text = f'{line.goodput_per_device:.3g}' if line else '-'
      row.append(f'[bold]{text}[/bold]' if line and
                 line.goodput_per_device >= best[workload] else text)
    out.add_row(policy, *row)
  return out


def draw(out: pathlib.Path, lines: list[Line]) -> None:
  """A panel a workload: each policy's goodput over that of the best static
  split, a marker an objective."""
  workloads = list(dict.fromkeys(line.workload for line in lines))
  names = list(dict.fromkeys(line.policy for line in lines))[::-1]
  figure = Figure(figsize=(2.4 + 2.4 * len(workloads),
                           1.4 + 0.2 * len(names)), layout='constrained')
  axes = figure.subplots(1, len(workloads), sharey=True, squeeze=False)
  for panel, workload in zip(axes[0], workloads, strict=True):
    for number, objective in enumerate(OBJECTIVES):
      own = {line.policy: line.goodput_per_device for line in lines
             if (line.workload, line.objective) == (workload, objective)}
      base = own.get('static')
      if base:
        shown = [name for name in names if name in own]
        panel.plot([own[name] / base for name in shown],
                   [names.index(name) for name in shown], label=objective,
                   fillstyle='none', **pictures.look(number) | {
                       'linestyle': ''})
    panel.axvline(1.0, color='0.7', linewidth=0.8)
    panel.set_title(workload, fontsize=9)
    panel.set_xlabel('times the best static split', fontsize=8)
  axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
  handles, texts = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, texts, fontsize=8, ncols=3,
                loc='outside upper right')
  pictures.save(figure, out / 'policies.png')


def run(options: Any, console: Any) -> int:
  """Measures, shows and writes."""
  for name in options.objectives:
    require(name in OBJECTIVES, '--objectives', name, f'of {list(OBJECTIVES)}')
  for name in options.orders:
    require(name in (FIFO, DEADLINES), '--orders', name,
            f'of {[FIFO, DEADLINES]}')
  if options.real:
    return real_row.run(options, console, [
        variants(cell)[0] for cell in cells(options)
        if cell.objective == options.objectives[0]],
                        cli.asked(options, FLAGS))
  effort = Effort(options.requests, options.tolerance, options.target,
                  options.seed)
  asked = list(cells(options))
  for cell in asked:
    for text in variants(cell):
      policies.load(text)  # a bad one is said here, once
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  path = out / 'policies.csv'
  lines = read(path)
  known = set(map(key, lines))
  todo = [cell for cell in asked if place_of(cell) not in known]
  end_s, stopped = time.monotonic() + 60 * options.minutes, ''
  bar = Progress(TextColumn('{task.description}'), BarColumn(),
                 TextColumn('{task.completed}/{task.total}'),
                 TimeElapsedColumn(), console=console, transient=True)
  if not console.is_terminal:
    console.print(f'{len(todo)} of {len(asked)} cells to measure')
  try:
    with processes(options.processes) as run_map, bar:
      task = bar.add_task('cells', total=len(todo))
      for line in run_map(functools.partial(measure, effort), todo):
        lines.append(line)
        provenance.save_csv(path, Line._fields, lines)
        bar.advance(task)
        if not console.is_terminal:
          console.print(f'{line.workload} {line.objective} {line.policy}: '
                        f'{line.goodput_per_device:.3g}')
        if time.monotonic() > end_s and len(lines) < len(known) + len(todo):
          stopped = '--minutes'
          break
  except KeyboardInterrupt:
    stopped = 'Ctrl-C'
  here = {cluster(cell) for cell in asked}
  shown = [line for line in lines
           if line.model == options.model and line.cluster in here]
  for objective in dict.fromkeys(line.objective for line in shown):
    console.print(table(shown, objective))
  provenance.save_json(out / 'policies.json', {'stopped': stopped},
                       cli.asked(options, FLAGS),
                       [*options.workloads, options.latency])
  if shown:
    draw(out, shown)
  if stopped:
    console.print(f'Stopped by {stopped}: this is what was known.')
  terminal.written(console, out, 'policies.csv', 'policies.json',
                   *['policies.png'] * bool(shown))
  return 130 if stopped == 'Ctrl-C' else 0


if __name__ == '__main__':
  cli.main(run, FLAGS)
