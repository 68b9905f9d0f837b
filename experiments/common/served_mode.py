"""One mode of a server: its runs, and what its profiles simulate of them."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import Progress

from dsjax.analysis import pairing
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request
from dsjax.runtime import orchestrator
from dsjax.simulation import contention, profiles
from experiments.common import pace, report
from experiments.common.served_profiles import Profiles, step_times
from experiments.common.served_runs import (
  Served,
  errors,
  requests,
  serve,
  stats,
)

PLACEMENTS = {'disaggregated': 'prefill=1x1,decode=1x1',
              'colocated': 'colocated=1x1,1x1', 'chunked': 'chunked=1x1,1x1'}
CALIBRATION = 0.75  # of a burst's throughput
MOST_CALIBRATION = 150  # requests of a calibration run
LEAST = 8  # requests of a run
PACE_S = 15.0  # for which the pace of a machine is taken to hold
UNSEEN = 2 ** 20  # seed of the burst, next to the calibration's


class Mode:
  """A server of one mode, its runs, and its profiles."""

  def __init__(self, name: str, loaded: Model, config: EngineConfig,
               profile: profiles.Profile, seeds: Sequence[int], bar: Progress,
               cluster: str | None) -> None:
    self.name, self.loaded, self.config = name, loaded, config
    self.seeds = seeds
    self.bar = bar
    placement = Placement.parse(PLACEMENTS[name])
    task = bar.add_task(f'{name}: compiling')
    self.server = orchestrator.serve(
        loaded, placement, config, report=lambda done, total, _: bar.update(
            task, completed=done, total=total), cluster=cluster)
    measured = profile.latencies[Plan()]
    link = profile.links.get((Plan(), Plan()))
    self.paced_s = -math.inf
    self.profiles = {'bench': Profiles(
        (measured,) * 2, link if placement.decode else None,
        profile.contention, profile.typical_s)}

  def sent(self, rate_per_s: float | None, n: int, seed: int
           ) -> list[Request]:
    return requests(self.config, self.loaded.config.vocab_size, rate_per_s, n,
                    seed)

  def pace(self) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """(seconds of typical steps of the idle instances now, how many times as
    long they take beside each other); what they told a moment ago counts."""
    if time.monotonic() > self.paced_s + PACE_S:
      engines = self.server.engines
      self.last_pace = (
          self.server.call(pace.of, engines, self.config),
          self.server.call(pace.beside, engines, self.config)
          if self.profiles['bench'].contention else {})
      self.paced_s = time.monotonic()
    return self.last_pace

  def serve(self, label: str, sent: Sequence[Request],
            halt: Callable[[], object]) -> Served:
    """A Served with progress."""
    task = self.bar.add_task(f'{self.name}: {label}', total=len(sent))
    first = self.server.next_id

    def tick():
      halt()
      done = sum(r.finish_s is not None
                 for r in self.server.records[-len(sent):] if r.id >= first)
      self.bar.update(task, completed=done)
    served = serve(self.server, sent, tick)
    self.bar.update(task, completed=len(sent))
    return served

  def prepare(self, n: int, size: Callable[[float], int],
              halt: Callable[[], object], capacity_per_s: float | None
              ) -> None:
    """A burst for the throughput, unless it is known; then a calibration run.
    """
    if capacity_per_s is None:
      burst = self.serve('burst', self.sent(None, n, UNSEEN), halt)
      span = (max(r.finish_s for r in burst.records)
              - burst.records[0].arrival_s)
      capacity_per_s = n / span
    self.capacity_per_s = capacity_per_s
    rate, before = CALIBRATION * self.capacity_per_s, self.pace()
    self.calibration = self.serve(f'calibration {rate:.2f}/s', self.sent(
        rate, min(size(rate), MOST_CALIBRATION), UNSEEN + 1), halt)
    self.profiles['calibrated'] = self.profiles['bench'].at(
        pace.mean([before[0], self.pace()[0]])).calibrated(
            self.calibration.log)

  def row(self, rate_per_s: float, n: int, slo: Slo,
          halt: Callable[[], object],
          logged: Callable[[int, list[report.Entry]], object]
          ) -> dict[str, Any]:
    """A row of summary.json: n requests of all seeds at one rate.

    Args:
      logged: called with (seed, log) of each run.
    """
    each = max(LEAST, math.ceil(n / len(self.seeds)))
    workloads = self.workloads(rate_per_s, each)
    runs, paces = [], [self.pace()]
    for seed, sent in zip(self.seeds, workloads, strict=True):
      runs.append(self.serve(f'{rate_per_s:.2f}/s, seed {seed}', sent, halt))
      logged(seed, runs[-1].log)
      paces.append(self.pace())
    cores = [run.cores for run in runs if run.cores is not None]
    return self.compared({
        'mode': self.name, 'rate_per_s': rate_per_s,
        'requests': each * len(runs), 'seeds': self.seeds,
        'typical_s': pace.mean([steps for steps, _ in paces]),
        'beside': contention.by_name(pace.mean(
            [beside for _, beside in paces])),
        'real': stats([run.records for run in runs], slo),
        'others_cores': max(cores, default=None),
        'host_s_per_step': statistics.mean(run.host_s for run in runs)},
        workloads, [run.log for run in runs], slo)

  def again(self, row: dict[str, Any], logs: Sequence[pairing.Log], slo: Slo
            ) -> dict[str, Any]:
    """A row of summary.json and the logs of its runs, simulated once more."""
    return self.compared(row, self.workloads(
        row['rate_per_s'], row['requests'] // len(self.seeds)), logs, slo)

  def workloads(self, rate_per_s: float, n: int) -> list[list[Request]]:
    """n requests of each seed."""
    return [self.sent(rate_per_s, n, seed) for seed in self.seeds]

  def compared(self, row: dict[str, Any],
               workloads: Sequence[Sequence[Request]],
               logs: Sequence[pairing.Log], slo: Slo) -> dict[str, Any]:
    """A row of summary.json: `row`, which has what is real, beside what each
    profile simulates and what it says of the steps in the logs."""
    beside = contention.by_pair(row.get('beside', {}))
    own = {name: p.at(row.get('typical_s', {}),
                      beside if name == 'bench' else None)
           for name, p in self.profiles.items()}
    simulated = {name: stats([p.simulate(self.server.scheduler_config, sent)
                              for sent in workloads], slo)
                 for name, p in own.items()}
    return row | simulated | {
        'errors': {k: errors(row['real'], v) for k, v in simulated.items()},
        'steps': {k: step_times(p, logs) for k, p in own.items()}}
