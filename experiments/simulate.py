r"""One placement, or several, simulated over rates or over scales of the SLO.

  python -m experiments.simulate --model=opt-13b \
    --placement=prefill=2x1,decode=1x1/colocated=1x1,1x1,1x1 \
    --rates=1,2,3,4,5,6 --ttft_s=0.25 --tpot_s=0.1 --lengths=sharegpt \
    --out=out/simulate
  python -m experiments.simulate --scales=0.5,0.75,1,1.5,2 --rate=4
  python -m experiments.simulate --lengths=TRACE.csv --process=trace

It prints, for each point, the share of requests that met both objectives (the
first fifth left out as warm-up) with its 95 % interval, latencies, and why
requests missed. Columns: `!` after a rate says that the run was not steady;
TTFT is from arrival to the first token, TPOT the mean time of each token after
it, ITL each gap between two tokens, 1st-2nd the gap after the first token;
preempted counts how often pages were taken from a request. Of misses, the most
frequent cause: prefill_queue (waited for prefill), prefill, transfer (of KV),
decode_queue (waited for pages or a place in a batch), interference (of the
other phase on the same instance), preemption, decode, alone (misses on an
empty system too), rejected, refused (by the policy) or failed (see
dsjax.analysis.attribution).

Placements with '/' between are drawn together, and so are several policies.
With several --seeds, table and picture show their mean with an interval of the
seeds' shares. A chunked placement runs at each point with every budget of
--chunks, and the one that attains most is shown; prefill batches of the others
stop where they saturate the plan (column batch). --per_device multiplies rates
by their devices. --latency and --machines=FILE are as in experiments.place; on
devices of several kinds a placement is role=TPxPP@KIND, .... --process=trace
without a rate uses the trace's own times,
sine:low=5:high=45:period_s=60 and step:... their own rates (a rate is their
mean); with these, and with lengths that shift, each phase's share is printed
too.
Files in --out: records.jsonl, points.csv (a line a placement, policy, seed and
rate, with intervals), summary.json, simulate.png and, with --timeline,
timeline.json (for ui.perfetto.dev) and events-NAME.jsonl, which replays.
"""

import csv
import math
import pathlib
import re
import types
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dsjax import workload
from dsjax.analysis import metrics, timeline
from dsjax.checkpoints import hf_config
from dsjax.config.checks import require
from dsjax.config.placement import Placement, Slo
from dsjax.placement import candidates, clusters
from dsjax.placement.api import make_problem, note
from dsjax.placement.clusters import AnyCluster, Cluster
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.policy import Policy
from dsjax.simulation import profiles
from experiments.common import (
  cli,
  policies,
  provenance,
  report,
  sweep,
  sweep_report,
  terminal,
)

FLAGS = {
    'model': cli.Flag('opt-13b', 'A name in dsjax.config.zoo, or a folder '
                      'with a config.json.'),
    'placement': cli.Flag('prefill=2x1,decode=1x1', "role=TPxPP, ...; several "
                          "with '/' between."),
    'rates': None,
    'scales': cli.Flag(None, 'Factors on both objectives, with commas, at '
                       '--rate.', str),
    'rate': cli.Flag(None, 'Requests a second, with --scales or alone.',
                     float),
    'per_device': cli.Flag(False, 'Rates are for each device.'),
    'ttft_s': 0.25, 'tpot_s': 0.1, 'target': 0.9, 'lengths': 'sharegpt',
    'process': 'poisson', 'cv': 1.0, 'latency': 'published', 'host_ms': 2.0,
    'machines': cli.machines_flag(cli.CLUSTER), **dict.fromkeys(cli.CLUSTER),
    'policy': cli.Flag('distserve', 'A shipped one (docs/policies.md), or '
                       'path.py:name; several with commas between.'),
    'aligned': cli.Flag(True, 'KV moves inside a node.'),
    'cut': cli.Flag(False, 'Cut requests beyond the context of the model, '
                    'which are refused otherwise.'),
    'chunks': list(map(str, candidates.CHUNKS)),
    'depth': cli.Flag(None, 'Commands in flight; see scheduler.Config.', int,
                      low=1),
    'run_ahead': cli.Flag(None, 'Most decode steps of a command, while a '
                          'prompt may have to wait for them; see '
                          'scheduler.Config.', int, low=1),
    'requests': cli.Flag(400, 'Simulated at each point.', low=20),
    'seeds': cli.Flag(['0'], 'Of workloads: every point is simulated with '
                      'each; with commas between.'),
    'processes': cli.Flag(1, 'Beside each other.', low=1),
    'timeline': cli.Flag(False, 'Write timelines and event logs.'),
    'out': None,
}


# --- what is asked ------------------------------------------------------------


def settings(options: types.SimpleNamespace
             ) -> tuple[list[tuple[float | None, float]], str]:
  """((rate, scale), ...), and what varies: 'rate' or 'scale'."""
  require(not (options.rates and options.scales), '--scales', options.scales,
          'given with --rate, not with --rates')
  require(not (options.rates and options.rate is not None), '--rate',
          options.rate, 'given without --rates')
  rate = options.rate
  require(rate is None or 0 < rate < math.inf, '--rate', rate,
          'a number above 0')
  if options.rates:
    return [(each, 1.0)
            for each in cli.numbers('--rates', options.rates)], 'rate'
  require(rate is not None or options.process == 'trace'
          or workload.wave_of(options.process), '--rate', rate,
          'given, or --rates, unless --process=trace, sine or step')
  if options.scales:
    return [(rate, scale)
            for scale in cli.numbers('--scales', options.scales)], 'scale'
  return [(rate, 1.0)], 'rate'


def _cluster(options):
  """(the cluster, the placements) of a command line."""
  cluster = cli.machines(options, cli.CLUSTER)
  placements = [
      Placement.parse(text, '--placement', cluster.kinds if cluster else ('',))
      for text in options.placement.split('/')]
  require(len(set(placements)) == len(placements), '--placement',
          options.placement, 'different placements')
  cluster = cluster or Cluster.of(
      options.latency,
      devices_per_node=max(each.num_devices for each in placements),
      **cli.fields(options, cli.CLUSTER))
  for placement in placements:
    require(clusters.fits(cluster, placement), '--placement', str(placement),
            f'of devices that the cluster has: {clusters.holds(cluster)}')
  return cluster, placements


def problem(options: types.SimpleNamespace, cluster: AnyCluster,
            policy: Policy, seed: int) -> candidates.SearchProblem:
  """The SearchProblem of a command line.

  Raises:
    InputError.
  """
  return make_problem(
      hf_config.named(options.model), Slo(options.ttft_s, options.tpot_s),
      options.lengths, options.latency, process=options.process, cv=options.cv,
      seed=seed, host_ms=options.host_ms, target=options.target,
      cut=options.cut, chunks=cli.token_budgets(
          '--chunks', options.chunks, candidates.SearchProblem.max_seqs),
      policy=policy, cluster=cluster)


def _policies(text, slo):
  """{what it is called: Policy} of the flag; one alone needs no name."""
  texts = text.split(',')
  require(len(set(texts)) == len(texts), '--policy', text,
          'different policies')
  loaded = [policies.load(each, slo) for each in texts]
  names = [policy.name for policy in loaded]
  if len(texts) == 1:
    names = ['']
  elif len(set(names)) < len(names):
    names = texts
  return dict(zip(names, loaded, strict=True))


# --- files --------------------------------------------------------------------


def _made_by(options, latencies):
  """(options, data) as provenance.save_json takes them."""
  return cli.asked(options, FLAGS), [
      options.lengths, *(x for x in latencies if isinstance(x, str)),
      options.machines]


def write(out: pathlib.Path, points: Sequence[sweep.Point], stopped: bool,
          options: types.SimpleNamespace, latencies: Sequence[Any]) -> None:
  """Writes records.jsonl (a run once), points.csv and summary.json."""
  runs = {(point.system, point.seed, point.rate_per_s, point.batch): point
          for point in points}
  report.save_records(
      out / 'records.jsonl',
      [record for point in runs.values() for record in point.records],
      [point.system + (f' at {point.rate_per_s:g}' if point.rate_per_s else '')
       + (f' chunk {point.batch}' if point.tried else '')
       + (f' seed {point.seed}' if len(options.seeds) > 1 else '')
       for point in runs.values() for _ in point.records])
  rows = list(map(sweep_report.row, points))
  with open(out / 'points.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  provenance.save_json(out / 'summary.json', {
      'stopped': stopped, 'points': list(map(sweep_report.facts, points))},
                       *_made_by(options, latencies))


class Traces:
  """Writes the event log of each run, and all of them as one timeline."""

  def __init__(self, out: pathlib.Path, options: types.SimpleNamespace,
               latencies: Sequence[Any]) -> None:
    self.out, self.traces = out, []
    self.made_by = _made_by(options, latencies)
    for old in out.glob('events-*.jsonl'):
      old.unlink()

  def save(self, name: str, placed: Placement, config: scheduler.Config,
           log: list[report.Entry]) -> None:
    assert event_log.replay(config, log) is None, f'{name}: no replay'
    stem = re.sub('[^a-z0-9.]+', '-', name)
    report.save_log(self.out / f'events-{stem}.jsonl', log)
    self.traces.append((name, timeline.timeline(log, placed.names)))

  def close(self) -> None:
    provenance.save_trace(self.out / 'timeline.json',
                          timeline.merge(self.traces), *self.made_by)


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Simulates, shows and writes; returns the exit code."""
  varied, kind = settings(options)
  cluster, placements = _cluster(options)
  drawn, named = cli.seeds(options.seeds), _policies(
      options.policy, Slo(options.ttft_s, options.tpot_s))
  problems = {(name, seed): problem(options, cluster, policy, seed)
              for name, policy in named.items() for seed in drawn}
  require(options.out or not options.timeline, '--timeline', True,
          'given with --out')
  out = pathlib.Path(options.out) if options.out else None
  if out:
    out.mkdir(parents=True, exist_ok=True)
  latencies = clusters.latencies(cluster, options.latency)
  traces = Traces(out, options, latencies) if out and options.timeline else None
  asked = [task for (policy, seed), each in problems.items()
           for task in sweep.tasks(
               options, each, placements, varied, kind, bool(traces),
               (f' under {policy}' if policy else '') + (
                   f' seed {seed}' if len(drawn) > 1 else ''),
               {'policy': policy, 'seed': seed})]
  done, stopped = [], False
  with terminal.Interrupts() as interrupts, Progress(
      console=console, transient=True) as progress:
    try:
      for task, answer in sweep.simulate_all(
          asked, min(options.processes, len(asked)), progress,
          interrupts.halt):
        if traces:
          for name, config, log in answer.logs:
            traces.save(name, task.placement, config, log)
        for point in answer.points:
          done.append(point)
          if not console.is_terminal:
            where = sweep_report.where(point, kind)
            console.print(
                f'{point.placement}{task.label}'
                f'{"" if where == "at once" else " at"} {where}: '
                f'{point.summary.attainment[0]:.0%} met both')
    except KeyboardInterrupt:
      stopped = True
  shown = sweep.by_system(done, kind)
  first = next(iter(problems.values()))
  _show(console, shown, kind, options.target,
        getattr(first.workload, 'phases', None))
  for words in filter(None, (note(first), *(
      profiles.caveat(each) for each in latencies if isinstance(each, str)))):
    console.print(words, soft_wrap=True)
  if stopped:
    console.print(f'Stopped by Ctrl-C: {len(done)} of '
                  f'{len(varied) * len(placements) * len(problems)} points.')
  if out and done:
    _save(options, latencies, out, done, shown, kind, stopped, traces, console)
  return 130 if stopped else 0


def _show(console, points, kind, target, phases):
  for system in dict.fromkeys(point.system for point in points):
    own = [point for point in points if point.system == system]
    console.print(*sweep_report.tables(own, kind), sep='\n')
    for line in sweep_report.told(own, kind, target):
      console.print(f'  {line}', soft_wrap=True, highlight=False)
    for point in own if phases else ():
      shares = metrics.by_phase(point.kept, point.slo, *phases)
      console.print(
          f'  {sweep_report.where(point, kind)}: ' + ', '.join(
              f'{name} {share:.0%} [{low:.0%}, {high:.0%}]'
              for name, (share, low, high) in shares.items()),
          soft_wrap=True, highlight=False)


def _save(options, latencies, out, done, shown, kind, stopped, traces,
          console):
  write(out, done, stopped, options, latencies)
  label = ('objectives, as a multiple of those in the title'
           if kind == 'scale' else 'requests a second'
           + (' and device' if options.per_device else ''))
  fixed = (f', {options.rate:g} requests/s'
           if kind == 'scale' and options.rate else '')
  sweep_report.draw(
      out / 'simulate.png', shown, kind, label, options.target,
      f'{options.model}, {pathlib.Path(options.lengths).name}, '
      f'{options.process} arrivals{fixed}; TTFT {options.ttft_s:g} s, TPOT '
      f'{options.tpot_s:g} s\nsimulated, {options.requests} requests a point'
      + (f' and seed, {len(options.seeds)} seeds' if len(options.seeds) > 1
         else '') + ', 95 % intervals\nlatencies: ' + ', '.join(
             each if isinstance(each, str) else each.name
             for each in latencies))
  names = ['records.jsonl', 'points.csv', 'summary.json', 'simulate.png']
  if traces:
    traces.close()
    names += ['timeline.json', *sorted(
        file.name for file in out.glob('events-*.jsonl'))]
  terminal.written(console, out, *names)


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
