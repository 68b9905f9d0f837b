"""Requests that validation serves, a run of them, and what runs say together.
"""

import dataclasses
import statistics
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dsjax import workload
from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.runtime import orchestrator
from experiments.common import machine
from experiments.common.seeds import half_width
from experiments.common.validate_report import STATS


def requests(config: EngineConfig, vocab_size: int, rate_per_s: float | None,
             n: int, seed: int) -> list[Request]:
  """n requests of seeded lengths; rate None: all at once."""
  rng = np.random.default_rng([seed, 7])
  top = config.max_len
  prompts = np.clip(rng.lognormal(np.log(top / 5), 0.6, n), 4,
                    top * 5 // 8).astype(int)
  outputs = np.clip(rng.lognormal(np.log(top / 12), 0.5, n), 4,
                    top // 4).astype(int)
  times = workload.arrivals('poisson' if rate_per_s else 'burst', rate_per_s, n,
                         seed)
  ids = [tuple(rng.integers(3, vocab_size, p).tolist()) for p in prompts]
  return [Request(i, t, p, Sampling(max_tokens=int(o),
                                    ignore_eos=True))
          for i, (t, p, o) in enumerate(zip(times, ids, outputs, strict=True))]


class Served(types.SimpleNamespace):
  """A real run: records, log, cores of other programs, host_s a step."""


def serve(server: orchestrator.Orchestrator, sent: Iterable[Request],
          tick: Callable[[], object] | None = None) -> Served:
  """Runs requests on a server that may have run others: a Served."""
  server.log.clear()
  first, host, steps = server.next_id, server.host_s, server.steps
  others = machine.Others()
  with machine.settled():
    records = server.run([dataclasses.replace(r, id=first + r.id)
                          for r in sent], on_poll=tick)
  return Served(records=records, log=list(server.log), cores=others.cores(),
                host_s=(server.host_s - host) / max(1, server.steps - steps))


def stats(runs: Sequence[Sequence[Record]], slo: Slo) -> dict[str, Any]:
  """What runs of different seeds, each a list of records, say together.

  Returns:
    {attainment: (share, low, high), shares: one a run, ttft_s: {...}, tpot_s,
    stage_s}.
  """
  records = [r for run in runs for r in run]
  summary = metrics.summarize(records, slo, 2)
  attainment = summary.attainment
  shares = [statistics.mean(metrics.attains(r, slo) for r in run)
            for run in runs]
  if len(runs) > 1:
    half = half_width(shares)
    attainment = (attainment[0], max(0.0, attainment[0] - half),
                  min(1.0, attainment[0] + half))

  def of(values, percentiles):
    return dict(zip(STATS, (statistics.mean(values), *percentiles),
                    strict=True))
  return {'attainment': attainment, 'shares': shares,
          'ttft_s': of([r.ttft_s for r in records], summary.ttft_s),
          'tpot_s': of([r.tpot_s for r in records], summary.tpot_s),
          'stage_s': summary.stage_s}


def errors(real: Mapping[str, Any], simulated: Mapping[str, Any]
           ) -> dict[str, Any]:
  """attainment and half_width (of the runs' differences; None: one run) in
  points, and {ttft_s, tpot_s: {statistic: relative}}."""
  apart = [100 * (s - r) for s, r in zip(simulated['shares'], real['shares'],
                                         strict=True)]
  return {'attainment': 100 * (simulated['attainment'][0]
                               - real['attainment'][0]),
          'half_width': half_width(apart) if len(apart) > 1 else None} | {
      name: {k: simulated[name][k] / real[name][k] - 1 for k in STATS}
      for name in ('ttft_s', 'tpot_s')}
