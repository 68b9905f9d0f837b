"""Served on this device, and simulated from what `measure` found: how near?

Colocated and chunked, at four rates each, as many seconds a rate as there are.
Aims: attainment within 3 points (or inside the real interval), mean TTFT and
TPOT within 10 %. What is profiled, served and simulated is one EngineConfig.
"""

import pathlib
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.runtime import orchestrator
from dsjax.simulation import profiles
from experiments import validate
from experiments.common import served_profiles, served_runs
from experiments.gpu import card, child, lines, measure

MODES = {'colocated': 'colocated=1x1', 'chunked': 'chunked=1x1'}
SHARES = (0.3, 0.6, 0.85, 1.1)  # of a burst's throughput
BURST = 32  # requests
POINTS, RELATIVE = 3.0, 0.10


def profile(path: pathlib.Path) -> profiles.Profile | None:
  """The Profile in the file of the part `measure`; None: there is none."""
  texts = [row['profile'] for row in lines.read(path) if 'profile' in row]
  if not texts:
    return None
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, 'profile.json')
    file.write_text(texts[-1])
    return profiles.load(file)


def run(target: lines.Target, file: lines.Lines) -> None:
  """Serves and simulates; a line a mode and rate."""
  measured = profile(target.path.with_name('measure.jsonl'))
  if measured is None:
    file.write('profile', False, says='no profile: run the part measure')
    return
  config, model = measure.engine(target.tiny), measure.model(target.tiny)
  simulated = served_profiles.Profiles((measured.latencies[Plan()],), None)
  rows = []
  for number, (mode, text) in enumerate(MODES.items()):
    with orchestrator.serve(
        model, Placement.parse(text), config, devices=card.device_twice(),
        report=lambda done, total, what: print(what, done, total, flush=True)
    ) as server:
      rows += serve(mode, server, simulated, config, model, file, target,
                    (number + 1) / len(MODES))
  if rows:
    worst = [max(abs(row['errors'][name]['mean']) for row in rows)
             for name in ('ttft_s', 'tpot_s')]
    points = max(abs(row['errors']['attainment']) for row in rows)
    file.write('all', figure=f'{sum(r["near"] for r in rows)} of {len(rows)} '
               f'near; at most {points:.1f} points, TTFT {worst[0]:.0%}, '
               f'TPOT {worst[1]:.0%}')


def serve(mode: str, server: orchestrator.Orchestrator,
          simulated: served_profiles.Profiles, config: EngineConfig,
          model: Model, file: lines.Lines, target: lines.Target, until: float
          ) -> list[dict[str, Any]]:
  """The rows of a mode. until: share of the task's time that may be gone."""
  def sent(rate_per_s, count, seed):
    return served_runs.requests(config, model.config.vocab_size, rate_per_s,
                                count, seed)

  count = 8 if target.tiny else BURST
  served_runs.serve(server, sent(None, count, 1))  # what is slow once
  burst = served_runs.serve(server, sent(None, count, 1)).records
  capacity_per_s = count / (max(r.finish_s for r in burst)
                            - burst[0].arrival_s)
  slo, rows = None, []
  for number, share in enumerate(SHARES):
    left_s = (0.95 * until * target.seconds - file.gone_s()) / (
        len(SHARES) - number)
    rate = share * capacity_per_s
    wanted = sent(rate, int(min(max(8, rate * min(left_s, 40.0) * 0.8), 16 if
                                target.tiny else 4000)), 2)
    if left_s < 1:
      file.write(f'{mode}, {rate:.2f}/s', None, skipped='out of time')
      continue
    real = served_runs.serve(server, wanted)
    slo = slo or Slo(*(factor * statistics.median(
        getattr(r, name) for r in real.records) for name, factor in (
            ('ttft_s', validate.TTFT_TIMES), ('tpot_s', validate.TPOT_TIMES))))
    truth = served_runs.stats([real.records], slo)
    ours = served_runs.stats([simulated.simulate(
        server.scheduler_config, wanted)], slo)
    rows.append(judged(truth, ours))
    file.write(
        f'{mode}, {rate:.2f}/s', None, mode=mode, rate_per_s=rate,
        requests=len(wanted), real=truth, simulated=ours,
        steps=served_profiles.step_times(simulated, [real.log]),
        host_s_per_step=real.host_s, **rows[-1])
  return rows


def judged(truth: Mapping[str, Any], ours: Mapping[str, Any]
           ) -> dict[str, Any]:
  """The errors, and whether they are as near as is aimed at."""
  errors = served_runs.errors(truth, ours)
  _, low, high = truth['attainment']
  return {'errors': errors, 'near': (
      (abs(errors['attainment']) <= POINTS
       or low <= ours['attainment'][0] <= high)
      and all(abs(errors[name]['mean']) <= RELATIVE
              for name in ('ttft_s', 'tpot_s')))}


if __name__ == '__main__':
  child.main(run)
