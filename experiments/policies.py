"""Policies side by side: goodput per device, on the same requests.

  python -m experiments.policies --out=out/policies
  python -m experiments.policies --lengths=sharegpt --only=static,arrow
  python -m experiments.policies --model=llama-3-70b --plan=4x1 --instances=2
  python -m experiments.policies --grid --minutes=60

Each cell is a workload and a pair of objectives, on --instances flexible
instances of one --plan. Objectives follow the model: TTFT is f times the
prefill of a prompt of the 9th decile and 20 ms, TPOT g times a decode step of
one row, with (f, g) of OBJECTIVES. A policy with settings is measured with
each of VARIANTS, and the best one counts; with --orders=deadlines also with
prompts ordered by deadline, as most of what a policy wins over first come
first served may be its order. All of them see the same requests. --grid
measures each of GRID, a model and its instances, into the same files; traces
are read from --traces, and left out, with a word, where they are not there.

Where the rate shifts (--process=sine:low=5:high=45:period_s=60, step:...) or
the lengths do (--lengths=shift:60:sharegpt+longbench), the goodput is the
mean rate at which the target attains over a whole period, after one of warm-up,
and what attains in each part of it is told too (column phases): no phase is to
be sacrificed. --real serves one row on this machine's CPU devices instead (see
experiments/common/real_row.py).

It prints a table an objective, in each cell the goodput, what ended its search
(see goodput.Goodput) and the rates between which it is sure. It writes
policies.csv as it goes (model, cluster, workload, ttft_s, tpot_s, policy,
goodput_per_device, low, high, binds and more), and policies.png and .pdf. Rows
that are there already are kept and not measured again, so a run that was ended
by --minutes or Ctrl-C goes on. Exit codes: 0; 2 for bad input; 130 by Ctrl-C.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.placement import candidates, goodput, judging
from dsjax.policies.named import DEADLINES as DEADLINES_END
from dsjax.workload import source
from experiments.common import (
  cli,
  policies,
  policy_cells,
  provenance,
  real_row,
  terminal,
)
from experiments.common.policies_report import (
  Line,
  draw,
  key,
  read,
  table,
  title_of,
  words,
)
from experiments.common.policy_cells import (
  VARIANTS,
  cluster_name,
  measure_all,
  workloads,
)

OBJECTIVES = {'balanced': (5.0, 3.5), 'ttft': (2.5, 7.0), 'tpot': (12.0, 1.8)}
# (model, latency, plan, instances): of --grid.
GRID = (('llama-3-8b', 'tables:h100-80g', '1x1', 4),
        ('llama-3-70b', 'tables:h100-80g', '4x1', 2),
        ('opt-13b', 'published', '1x1', 4),
        ('opt-66b', 'published', '4x1', 2))
PERIODS = 2  # of a load that shifts, the first of which is no part of it
FIFO, DEADLINES = 'fifo', 'deadlines'
ORDERED = {('adaptive', DEADLINES)}  # it has this order already
FLAGS = {
    'model': cli.Flag('llama-3-8b', 'A name of dsjax.config.zoo.'),
    'latency': 'tables:h100-80g',
    'plan': cli.Flag('1x1', 'TPxPP of each instance.'),
    'instances': cli.Flag(4, 'Flexible instances.', low=2, high=64),
    'grid': cli.Flag(False, 'Of GRID instead of these four.'),
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
    'out': 'out/policies',
    **policy_cells.FLAGS,
}


class Cell(NamedTuple):
  """A line's question. workload: in tables; lengths: as make_problem takes
  them. objective: of OBJECTIVES. order: fifo or deadlines."""

  model: str
  latency: str
  plan: str
  instances: int
  workload: str
  lengths: str
  process: str
  objective: str
  policy: str
  order: str

  @property
  def load(self) -> str:
    """The workload's name in tables."""
    return self.workload + (
        '' if self.process == 'poisson' else f' {self.process}')


class Effort(NamedTuple):
  """How a goodput is measured; see FLAGS."""

  requests: int
  tolerance: float
  target: float
  seed: int

  def __str__(self) -> str:
    return ' '.join(f'{name}={value:g}'
                    for name, value in self._asdict().items())


def label(cell: Cell) -> str:
  """The policy's name in tables."""
  return cell.policy + (DEADLINES_END if cell.order == DEADLINES else '')


def cluster(cell: Cell) -> str:
  return cluster_name(cell.instances, cell.plan, cell.latency)


def problem_of(model: str, latency: str, lengths: str, process: str,
               effort: Effort) -> candidates.SearchProblem:
  """The SearchProblem of a workload, without objectives."""
  return policy_cells.problem_of(
      model, latency, lengths, process, effort.seed, requests=effort.requests,
      most_requests=4 * effort.requests, tolerance=effort.tolerance)


def objectives(problem: candidates.SearchProblem, plan: Plan, name: str
               ) -> Slo:
  """The objectives of a name, for a model, its plan and a workload."""
  seconds = problem.latency_of(plan)
  require(seconds is not None, '--plan', plan, 'a plan with latencies: '
          f'{candidates.names(candidates.measured(problem))}')
  assert seconds
  prompts = sorted(p for p, _ in candidates.lengths(problem, 1000))
  times, steps = OBJECTIVES[name]
  longest = prompts[len(prompts) * 9 // 10]
  mean = sum(prompts) / len(prompts)
  return Slo(round(times * seconds.prefill_s(((0, longest),)) + 0.02, 4),
             round(steps * seconds.decode_s(1, mean), 5))


def variants(cell: Cell) -> list[str]:
  """The policies, as policies.load takes them, that a cell tries."""
  return policy_cells.variants(label(cell), cell.instances)


def measure(effort: Effort, cell: Cell) -> Line:
  """The best of a cell's variants. A pure function: any process may run it."""
  plan = Plan.parse(cell.plan, '--plan')
  problem = problem_of(cell.model, cell.latency, cell.lengths, cell.process,
                       effort)
  slo = objectives(problem, plan, cell.objective)
  problem = dataclasses.replace(problem, slo=slo)
  placement = Placement(flexible=[plan] * cell.instances)
  seconds = problem.latency_of(plan)
  assert seconds  # or there were no objectives
  batch = candidates.batch_tokens(problem, seconds)
  prompts = [p for p, _ in candidates.lengths(problem, 1000)]
  # No faster than every device prefilling the largest batches.
  bound_per_s = (cell.instances * batch / seconds.prefill_s(((0, batch),))
                 / (sum(prompts) / len(prompts)))
  best, chosen = goodput.Goodput(0.0, 0.0, 0.0, 'floor', 0.0, 0), ''
  candidate = judging.Candidate(placement, batch, True, bound_per_s,
                                guess_per_s=bound_per_s / 4)
  for text in variants(cell):
    rates = _goodput(
        dataclasses.replace(problem, policy=policies.load(text, slo)),
        judging.Task(candidate, effort.target,
                     best.rate_per_s * (1 + effort.tolerance) or None))
    if rates.rate_per_s > best.rate_per_s:
      best, chosen = rates, text
  phases = ''
  if phases_of(problem) and chosen:
    records = whole_periods(dataclasses.replace(
        problem, policy=policies.load(chosen, slo)), candidate,
        best.rate_per_s)
    phases = ', '.join(f'{name} {share:.0%}' for name, (share, *_) in
                       metrics.by_phase(records, slo, *phases_of(problem)
                                        ).items())
  devices = placement.num_devices
  return Line(cell.model, cluster(cell), cell.load,
              slo.ttft_s, slo.tpot_s, label(cell),
              round(best.rate_per_s / devices, 4),
              round(best.low_per_s / devices, 4),
              round(best.high_per_s / devices, 4), best.binds, cell.objective,
              chosen, phases, str(effort))


def phases_of(problem: candidates.SearchProblem) -> Any:
  """The Phases of a load that shifts; None of any other."""
  return getattr(problem.workload, 'phases', None)


def whole_periods(problem: candidates.SearchProblem,
                  candidate: judging.Candidate, rate_per_s: float
                  ) -> list[Record]:
  """The records of a whole period of a load that shifts, after one that warms
  up, at this mean rate."""
  period_s = phases_of(problem).period_s
  n = math.ceil(PERIODS * period_s * rate_per_s) + 1
  records = judging.run(problem, judging.setup(problem, candidate),
                        rate_per_s, n)
  return [r for r in records
          if period_s <= r.arrival_s < PERIODS * period_s]


def _goodput(problem: candidates.SearchProblem, task: judging.Task
             ) -> goodput.Goodput:
  """judging.measure; of a load that shifts, over whole periods: a part of one
  says nothing of the whole."""
  if not phases_of(problem):
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
  """What is asked for, objective by objective."""
  systems = GRID if options.grid else [
      (options.model, options.latency, options.plan, options.instances)]
  for objective, system, (workload, lengths), order, policy in (
      itertools.product(
          options.objectives, systems, workloads(options)[0].items(),
          options.orders, options.only or VARIANTS)):
    if (policy, order) not in ORDERED or FIFO not in options.orders:
      yield Cell._make((*system, workload, lengths, options.process, objective,
                        policy, order))


def place_of(effort: Effort, cell: Cell) -> tuple[str, ...]:
  """Of a cell, what `key` is of its line."""
  return (cell.model, cluster(cell), cell.load, cell.objective, label(cell),
          str(effort))


def run(options: Any, console: Any) -> int:
  """Measures, shows and writes."""
  for name in options.objectives:
    require(name in OBJECTIVES, '--objectives', name, f'of {list(OBJECTIVES)}')
  for name in options.orders:
    require(name in (FIFO, DEADLINES), '--orders', name,
            f'of {[FIFO, DEADLINES]}')
  there, absent = workloads(options)
  for text in absent:
    console.print(f'{text}: left out', soft_wrap=True, highlight=False)
  require(there, '--lengths', options.lengths, 'one that is there')
  for lengths in there.values():
    source(lengths, options.seed, options.process)  # a bad one is said here
  asked, told = list(cells(options)), cli.asked(options, FLAGS)
  if options.real:
    return real_row.run(options, console, [
        variants(cell)[0] for cell in asked if (cell.objective, cell.workload)
        == (options.objectives[0], next(iter(there)))],
                        told, next(iter(there.values())))
  effort = Effort(options.requests, options.tolerance, options.target,
                  options.seed)
  for cell in asked:
    for text in variants(cell):
      policies.load(text)  # a bad one is said here, once
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  lines = read(out / 'policies.csv')
  known = set(map(key, lines))
  stopped = measure_all(
      options, console, functools.partial(measure, effort),
      [cell for cell in asked if place_of(effort, cell) not in known],
      len(asked), lines, out / 'policies.csv', words)
  here = {(cell.model, cluster(cell), str(effort)) for cell in asked}
  shown = [line for line in lines
           if (line.model, line.cluster, line.effort) in here]
  for place in dict.fromkeys(map(title_of, shown)):
    console.print(table([line for line in shown if title_of(line) == place]))
  for line in shown:
    if line.phases:
      console.print(words(line), soft_wrap=True, highlight=False)
  provenance.save_json(out / 'policies.json', {'stopped': stopped}, told, [
      *there.values(), *dict.fromkeys(cell.latency for cell in asked)])
  if shown:
    draw(out, shown)
  terminal.stopped(console, stopped)
  terminal.written(console, out, 'policies.json', *[
      'policies.csv', 'policies.png'] * bool(shown))
  return 130 if stopped == 'Ctrl-C' else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
