"""A cell of experiments.equal_rates: what is asked, and how it is measured."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dsjax.analysis import metrics
from dsjax.config.placement import Placement, Slo
from dsjax.placement import goodput, judging
from dsjax.scheduling.events import Flip
from experiments.common import policies, policies_report, policy_cells, seeds
from experiments.common.equal_rates_report import (
  JOIN,
  Line,
  name_of,
  verdict,
)

SETTINGS = ('all', 'best')
SHORT, FAR = 4, 0.2  # see contenders


class Effort(NamedTuple):
  """How a cell is measured; see FLAGS."""

  requests: int
  seconds: float
  warmup: float
  seeds: tuple[int, ...]

  def __str__(self) -> str:
    return (f'requests={self.requests} seconds={self.seconds:g} '
            f'warmup={self.warmup:g} seeds={"+".join(map(str, self.seeds))}')


class Cell(NamedTuple):
  """A Line's question, and the lengths as make_problem takes them."""

  model: str
  cluster: str
  workload: str
  objective: str
  ttft_s: float
  tpot_s: float
  rate_per_s: float
  policy: str
  rivals: str
  effort: Effort
  lengths: str

  @property
  def key(self) -> tuple[object, ...]:
    """That of its Line."""
    return *self[:-2], str(self.effort)


class Served(NamedTuple):
  """Whether each request that counts attained, by arrival; flips meanwhile."""

  hits: list[bool]
  flips: int


def cells(lines: Sequence[policies_report.Line], tested: Sequence[str],
          there: Mapping[str, str], effort: Effort, settings: str = 'all'
          ) -> Iterator[Cell]:
  """What the rivals' lines ask of each policy under test; settings: of the
  rivals, of SETTINGS."""
  groups = collections.defaultdict(list)
  for line in lines:
    if line.workload in there:
      groups[line.model, line.cluster, line.workload, line.objective,
             line.ttft_s, line.tpot_s].append(line)
  for place, own in groups.items():
    instances, plan, _ = policy_cells.cluster_of(own[0].cluster)
    rate_per_s = (max(line.goodput_per_device for line in own)
                  * instances * plan.num_devices)
    rivals = JOIN.join(dict.fromkeys(
        text for line in own for text in (
            [line.variant] if settings == 'best' else
            policy_cells.variants(line.policy, instances))))
    for policy in tested:
      yield Cell(*place, round(rate_per_s, 4), policy, rivals, effort,
                 there[own[0].workload])


def serve(cell: Cell, text: str, seed: int) -> Served:
  """A run of a cell under a policy."""
  instances, plan, latency = policy_cells.cluster_of(cell.cluster)
  slo = Slo(cell.ttft_s, cell.tpot_s)
  problem = dataclasses.replace(
      policy_cells.problem_of(cell.model, latency, cell.lengths, 'poisson',
                              seed),
      slo=slo, policy=policies.load(text, slo))
  flips = []

  def on_event(_, event, commands):
    flips.extend(event.time_s for c in commands if isinstance(c, Flip))

  system = judging.setup(problem, judging.Candidate(
      Placement(flexible=[plan] * instances), None, True, 0.0))
  sent = max(cell.effort.requests,
             math.ceil(cell.effort.seconds * cell.rate_per_s))
  records = judging.run(problem, system, cell.rate_per_s, sent, on_event)
  kept = goodput.steady(metrics.by_arrival(records), cell.effort.warmup)
  return Served([metrics.attains(r, slo) for r in kept],
                sum(kept[0].arrival_s <= time_s <= kept[-1].arrival_s
                    for time_s in flips))


def share(run: Served) -> float:
  """That attained."""
  return metrics.interval(run.hits)[0]


def contenders(cell: Cell) -> list[str]:
  """The rivals that are run in full: of each policy the best setting in one run
  of a SHORT-th of the length, and those less than FAR below the best of all
  there. Others are overloaded, which takes most of the time."""
  rivals, effort = cell.rivals.split(JOIN), cell.effort
  if len(set(map(name_of, rivals))) == len(rivals):
    return rivals
  short = cell._replace(effort=effort._replace(
      requests=effort.requests // SHORT, seconds=effort.seconds / SHORT))
  shares = {text: share(serve(short, text, effort.seeds[0]))
            for text in rivals}
  least: dict[str, float] = {}
  for text in rivals:
    name = name_of(text)
    least[name] = max(least.get(name, 0.0), shares[text])
  near = max(shares.values()) - FAR
  return [text for text in rivals
          if shares[text] >= min(near, least[name_of(text)])]


def measure(cell: Cell) -> Line:
  """A cell's line. A pure function: any process may run it."""
  rivals, drawn = contenders(cell), cell.effort.seeds
  runs = {text: [serve(cell, text, seed) for seed in drawn]
          for text in (*rivals, cell.policy)}
  shares = {text: round(statistics.fmean(map(share, own)), 4)
            for text, own in runs.items()}
  rival, own = max(rivals, key=shares.__getitem__), runs[cell.policy]
  each = [metrics.difference(a.hits, b.hits)
          for a, b in zip(own, runs[rival], strict=True)]
  ahead, low, high = (round(x, 5) for x in seeds.together(each))
  of_seeds = [f'{seed}: {mean:+.4f} [{least:+.4f}, {most:+.4f}]'
              for seed, (mean, least, most) in zip(drawn, each, strict=True)]
  return Line(
      *cell[:-2], str(cell.effort), shares[cell.policy], rival, ahead, low,
      high, verdict(low, high), sum(run.flips for run in own),
      JOIN.join(of_seeds), JOIN.join(str(shares.get(text, math.nan))
                                     for text in cell.rivals.split(JOIN)))
