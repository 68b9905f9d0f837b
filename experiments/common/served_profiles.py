"""What predicts the steps and copies of a server, and how far from real it is.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsjax.analysis import pairing
from dsjax.analysis.record import Record
from dsjax.config.request import Request
from dsjax.scheduling import scheduler
from dsjax.simulation import calibration, fitting, simulator
from dsjax.simulation.contention import Contention
from dsjax.simulation.latency import Affine, Link
from experiments.common import pace


class Profiles:
  """A latency for each instance, a link, and how instances slow each other:
  what simulate takes."""

  def __init__(self, latencies: Sequence[Affine], link: Link | None,
               contention: Contention | None = None,
               typical_s: Mapping[str, float] | None = None) -> None:
    """typical_s: what pace.of told when they were found; None: not known."""
    self.latencies, self.link = latencies, link
    self.contention, self.typical_s = contention, typical_s or {}

  def at(self, now_s: Mapping[str, float],
         beside: Mapping[tuple[str, str], float] | None = None) -> 'Profiles':
    """These where typical steps take so long, and beside others so many times
    as long; what is not given stays."""
    times, contention = pace.times(now_s, self.typical_s), self.contention
    if contention and beside:
      contention = dataclasses.replace(
          contention, factors={**contention.factors, **beside})
    return Profiles([pace.scaled(m, times) for m in self.latencies],
                    self.link, contention, now_s)

  def simulate(self, plan: scheduler.Config, sent: Iterable[Request]
               ) -> list[Record]:
    return simulator.simulate(plan, sent, self.latencies, self.link,
                              contention=self.contention).records

  def calibrated(self, log: pairing.Log) -> 'Profiles':
    """These on the steps of a served run; like roles share their steps."""
    steps, copies = calibration.observe(log)
    apart = bool(copies)  # else instances are alike
    contention = calibration.fit_contention(self.latencies, steps)
    models = tuple(calibration.calibrate(m, [
        s for s in steps if s.instance == i or not apart], contention)
        for i, m in enumerate(self.latencies))
    link = self.link and calibration.calibrate_link(self.link, copies,
                                                    self.latencies[0].host_s)
    return Profiles(models, link, contention, self.typical_s)


def step_times(profiles: Profiles, logs: Iterable[pairing.Log]
               ) -> list[dict[str, Any]]:
  """Rows that compare the own steps of real runs with what profiles predict.

  Returns:
    [{what, count, real_s, predicted_s: mean seconds; ratio: of the sums;
    overlap: share of the time with another instance at work; alone, together:
    the ratio of steps that overlap less or more than half; nan: none}].
  """
  observed = [calibration.observe(log) for log in logs]
  steps = [step for own, _ in observed for step in own]
  copies = [copy for _, own in observed for copy in own]
  rows = []

  def add(what, compared):
    def ratio(chosen):
      expected = sum(p for _, p, _ in chosen)
      return sum(s for s, _, _ in chosen) / expected if chosen else None
    rows.append({
        'what': what, 'count': len(compared),
        'real_s': statistics.mean(s for s, _, _ in compared),
        'predicted_s': statistics.mean(p for _, p, _ in compared),
        'ratio': ratio(compared),
        'overlap': statistics.mean(o for _, _, o in compared),
        'alone': ratio([f for f in compared if f[2] < 0.5]),
        'together': ratio([f for f in compared if f[2] >= 0.5])})
  for kind in ('prefill', 'mixed', 'decode'):
    compared = []
    for step in (s for s in steps if s.cell.kind == kind):
      model = profiles.latencies[step.instance]
      compared.append((step.cell.seconds,
                       fitting.predict_s(model, step.cell)
                       + step.idle * model.host_s, step.overlap))
    if compared:
      add(kind, compared)
  if copies and profiles.link:
    add('migrate', [(c.seconds, profiles.link.migrate_s(c.num_tokens)
                     + profiles.latencies[0].host_s, float(c.behind))
                    for c in copies])
  return rows
