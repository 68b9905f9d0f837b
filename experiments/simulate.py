"""One placement, or several, simulated over rates or over scales of the SLO.

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
empty system too), rejected or failed (see dsjax.analysis.attribution).

Placements with '/' between are drawn together, and so are several policies.
With several --seeds, table and picture show their mean with an interval of the
seeds' shares. A chunked placement runs at each point with every budget of
--chunks, and the one that attains most is shown; prefill batches of the others
stop where they saturate the plan (column batch). --per_device multiplies rates
by their devices. --latency is as in experiments.place. --process=trace without
a rate uses the trace's own times.
Files in --out: records.jsonl, points.csv (a line a placement, policy, seed and
rate, with intervals), summary.json, simulate.png and, with --timeline,
timeline.json (for ui.perfetto.dev) and events-NAME.jsonl, which replays.
"""

import csv
import dataclasses
import math
import pathlib
import re
import statistics

from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from dsjax.analysis import attribution, metrics, timeline
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.placement import Placement, Slo
from dsjax.placement import candidates
from dsjax.placement.api import build, make_problem, no_load, note, simulated
from dsjax.placement.clusters import Cluster
from dsjax.scheduling import event_log
from dsjax.scheduling.events import Finish, Reject
from dsjax.simulation import profiles, simulator
from experiments.common import (
  cli,
  pictures,
  policies,
  provenance,
  report,
  seeds,
  terminal,
)

# Colour and hatch of each cause: told apart in grey too.
LOOKS = dict(zip(attribution.ALL, (
    ('#4e79a7', ''), ('#a0cbe8', '//'), ('#59a14f', '..'), ('#f28e2b', 'xx'),
    ('#e15759', '\\\\'), ('#b07aa1', 'oo'), ('#ffbe7d', '--'),
    ('#edc948', '||'), ('#9c755f', '++'), ('#bab0ac', '**')), strict=True))


FLAGS = {
    'model': cli.Flag('opt-13b', 'A name in dsjax.config.zoo.'),
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
    **dict.fromkeys(cli.CLUSTER),
    'policy': cli.Flag('distserve', 'path.py:name, a dsjax.Policy of your own; '
                       'several with commas between.'),
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
    'timeline': cli.Flag(False, 'Write timelines and event logs.'),
    'out': None,
}


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


# --- what is asked ------------------------------------------------------------


def sweep(options):
  """((rate, scale), ...), and what varies: 'rate' or 'scale'."""
  require(not (options.rates and options.scales), '--scales', options.scales,
          'given with --rate, not with --rates')
  require(not (options.rates and options.rate is not None), '--rate',
          options.rate, 'given without --rates')
  rate = options.rate
  require(rate is None or 0 < rate < math.inf, '--rate', rate,
          'a number above 0')
  if options.rates:
    return [(r, 1.0) for r in cli.numbers('--rates', options.rates)], 'rate'
  require(rate is not None or options.process == 'trace', '--rate', rate,
          'given, or --rates, unless --process=trace')
  if options.scales:
    return [(rate, s) for s in cli.numbers('--scales', options.scales)], 'scale'
  return [(rate, 1.0)], 'rate'


def problem(options, placements, policy, seed):
  """The SearchProblem of a command line.

  Raises:
    InputError.
  """
  most = max(p.num_devices for p in placements)
  return make_problem(
      options.model, Slo(options.ttft_s, options.tpot_s), options.lengths,
      options.latency, process=options.process, cv=options.cv,
      seed=seed, host_ms=options.host_ms, target=options.target,
      cut=options.cut, chunks=cli.token_budgets(
          '--chunks', options.chunks, candidates.SearchProblem.max_seqs),
      policy=policy,
      cluster=Cluster.of(options.latency, devices_per_node=most,
                         **cli.fields(options, cli.CLUSTER)))


def check_floor(built, records, slo, target):
  """Raises InputError where no placement can meet an objective when idle."""
  floors = []
  for config, latencies, _ in built:
    each = no_load(config, latencies)
    alone = [each(r) for r in records]
    floors.append([sorted(x)[math.ceil(target * len(alone)) - 1]
                   for x in zip(*alone, strict=True)])
  for field, limit, all_s in zip(('--ttft_s', '--tpot_s'), (slo.ttft_s,
                                 slo.tpot_s), zip(*floors, strict=True),
                                 strict=True):
    require(limit >= min(all_s), field, limit,
            f'{min(all_s):.3g} s or more (after --scales): on an empty '
            f'system {target:.0%} of the requests take up to that long')


def _seeds(texts):
  """The seeds of the flag, each once."""
  require(texts and all(text.isdecimal() for text in texts)
          and len(set(texts)) == len(texts), '--seeds', ','.join(texts),
          'different integers, 0 or more, with commas between')
  return [int(text) for text in texts]


def _policies(text):
  """{what it is called: Policy} of the flag; one alone needs no name."""
  texts = text.split(',')
  require(len(set(texts)) == len(texts), '--policy', text,
          'different policies')
  loaded = [policies.load(each) for each in texts]
  names = [policy.name for policy in loaded]
  if len(texts) == 1:
    names = ['']
  elif len(set(names)) < len(names):
    names = texts
  return dict(zip(names, loaded, strict=True))


# --- runs ---------------------------------------------------------------------


def run(built, requests, halt, tick, log=None):
  """Simulates: (records, Parts of each).

  Args:
    built: what placement.build returned.
    halt: called at each event; raises KeyboardInterrupt to stop.
    tick: called with the requests that ended at an event.
    log: None, or a list that takes the event log.
  """
  config, latencies, link = built
  fold = attribution.Fold(latencies)

  def on_event(_, event, commands):
    halt()
    fold.observe(event, commands)
    tick(sum(isinstance(c, (Finish, Reject)) for c in commands))
    if log is not None:
      log.append((event, commands))

  result = simulator.simulate(config, requests, latencies, link,
                              on_event=on_event)
  return result.records, fold.parts()


def point(placement, x, rate, slo, outcome, made):
  """The Point of a finished run.

  Args:
    outcome: what `run` returned. made: what api.build did.
  """
  records, parts = outcome
  config, latencies, _ = made
  done = simulated(placement, slo, records, config, latencies)
  return Point(
      str(placement), x, rate, slo, records, done.kept, done.summary,
      attribution.attribute(done.kept, parts, slo, no_load(config, latencies)),
      done.unsteady, max(i.prefill_tokens for i in config.instances
                         if i.prefills))


def interval_of_runs(hits):
  """(share, low, high) of independent runs, whether each request attained.

  Student's t over the runs' shares, or the interval of all requests where that
  is wider: runs in which all attain do not differ.
  """
  shares = [statistics.fmean(run) for run in hits]
  share, low, high = metrics.interval([hit for run in hits for hit in run])
  half = seeds.half_width(shares)
  return share, max(0.0, min(low, share - half)), min(1.0, max(
      high, share + half))


def pooled(points):
  """The Points of one system at one x, a seed each, as one.

  Its interval is of the seeds' shares; its percentiles are of all requests.
  """
  first, *others = points
  if not others:
    return first
  kept = [record for p in points for record in p.kept]
  summary = dataclasses.replace(
      metrics.summarize(kept, first.slo, first.summary.num_devices),
      attainment=interval_of_runs([
          [metrics.attains(record, p.slo) for record in p.kept]
          for p in points]))
  return dataclasses.replace(
      first, kept=kept, summary=summary,
      attribution=attribution.together(p.attribution for p in points),
      unsteady=next(filter(None, (p.unsteady for p in points)), ''),
      tried={size: sum(p.tried[size] for p in points) / len(points)
             for size in first.tried})


def by_system(points, kind):
  """The Points of all seeds, pooled, by system and x."""
  groups = {}
  for p in points:
    groups.setdefault((p.system, p.x if kind == 'scale' or p.rate_per_s
                       else None), []).append(p)
  return [pooled(group) for group in groups.values()]


def best(points):
  """Of Points of one chunked placement with several budgets, the one that
  attains most."""
  shares = {p.batch: p.summary.attainment[0] for p in points}
  chosen = max(points, key=lambda p: shares[p.batch])
  return dataclasses.replace(chosen, tried=shares if len(points) > 1 else {})


def simulate(options, asked, placements, points, kind, progress, halt, save,
             label=''):
  """Yields the Points of every placement, in order.

  save: called with (name, placement, config, log) of each run, or None.
  label: what else tells a run from others, ' seed 1'.
  """
  built = [[build(asked, p, chunk, options.aligned, options.depth,
                  options.run_ahead)
            for chunk in (asked.chunks if p.chunked else (candidates.CHUNK,))]
           for p in placements]
  runs = list(dict.fromkeys(rate for rate, _ in points))
  sample = [Record(r.id, 0.0, len(r.prompt), 1) for r in
            asked.workload(runs[0] or None, options.requests)]
  widest = max(scale for _, scale in points)
  each = [made for variants in built for made in variants]
  check_floor(each, sample, Slo(widest * options.ttft_s,
                                widest * options.tpot_s), options.target)
  task = progress.add_task('', total=len(each) * len(runs) * len(sample))
  for p, variants in zip(placements, built, strict=True):
    name, factor = f'{p}{label}', p.num_devices if options.per_device else 1
    for rate in runs:
      total = rate and rate * factor
      progress.update(task, description=f'{name} at '
                      f'{f"{total:g} requests/s" if total else "its times"}')
      outcomes = []
      for made in variants:
        log = [] if save else None
        outcomes.append(run(made, asked.workload(total, options.requests),
                            halt, lambda n: progress.advance(task, n), log))
        if save:
          save(name + (f' at {total:g}' if total else '') + (
              f' chunk {made[0].instances[0].prefill_tokens}'
              if len(variants) > 1 else ''), p, made[0], log)
      last_s = max(r.arrival_s for r in outcomes[0][0])
      # A trace at its own times; 0 where all come at once.
      seen = rate or (len(outcomes[0][0]) / last_s / factor if last_s else 0.0)
      for its, scale in points:
        if its == rate:
          slo = Slo(scale * options.ttft_s, scale * options.tpot_s)
          x = scale if kind == 'scale' else seen
          yield dataclasses.replace(best([
              point(p, x, total, slo, outcome, made) for made, outcome
              in zip(variants, outcomes, strict=True)]), scale=scale)


# --- what a person sees ------------------------------------------------------


def _ms(values):
  return '/'.join('-' if math.isnan(v) else f'{1e3 * v:,.0f}' for v in values)


def _where(p, kind):
  return f'{p.x:.4g}' if p.x or kind == 'scale' else 'at once'


def tables(points, kind):
  """Two rich tables of the Points of one placement, 80 columns at most."""
  first = kind if kind == 'scale' else 'req/s'
  met = Table(title=points[0].system, title_justify='left')
  gaps = Table()
  for out, names in ((met, ('batch', 'met both', '95 %', 'TTFT ms\np50/p90/p99',
                            'TPOT ms\np50/p90/p99')),
                     (gaps, ('ITL ms\np50/p90/p99', '1st-2nd ms\np50/p90/p99',
                             'pre-\nempted', 'misses, most'))):
    for name in (first, *names):
      out.add_column(name, justify='right', overflow='fold')
  for p in points:
    share, low, high = p.summary.attainment
    causes = sorted(((n, c) for c, n in p.attribution.causes.items() if n),
                    reverse=True)
    x = _where(p, kind) + (' !' if p.unsteady else '')
    met.add_row(x, str(p.batch), f'{share:.0%}',
                f'{100 * low:.0f}-{100 * high:.0f}', _ms(p.summary.ttft_s),
                _ms(p.summary.tpot_s))
    gaps.add_row(
        x, _ms(p.summary.itl_s), _ms(p.summary.second_s),
        str(p.summary.preemptions),
        f'{len(p.attribution.misses)}, {causes[0][0]} {causes[0][1]}'
        if causes else '-')
  return met, gaps


def told(points, kind, target):
  """Lines under a placement's table: each point's advice, the best rate."""
  lines = []
  for p in points:
    where = (f'scale {p.x:g}' if kind == 'scale' else _where(p, kind)
             + ' req/s' * bool(p.x))
    if p.tried:
      lines.append(f'{where}: met both with chunks of ' + ', '.join(
          f'{size}: {share:.0%}' for size, share in p.tried.items()))
    if p.unsteady and not any(p.unsteady in line for line in lines):
      lines.append(f'{where}: {p.unsteady}')
    if p.attribution.misses:
      lines.append(f'{where}: {p.attribution.advice}')
  if not any(p.x for p in points):
    return lines  # a trace at one moment: no rate to speak of
  good = [p.x for p in points if p.summary.attainment[0] >= target
          and not p.unsteady]
  end = min if kind == 'scale' else max
  lines.append(
      f'{target:.0%} met both objectives at '
      + (f'{kind} {end(good):.4g}, the '
         f'{"tightest" if kind == "scale" else "highest"} tried that did'
         if good else f'no {kind} tried'))
  return lines


def draw(path, points, kind, label, target, title):
  """Attainment of each placement, and under it why requests missed."""
  names = list(dict.fromkeys(p.system for p in points))
  figure = Figure(figsize=(8.5, 3.6 + 1.9 * len(names)),
                  layout='constrained')
  top, *below = figure.subplots(
      1 + len(names), 1, height_ratios=[3] + [1.6] * len(names), sharex=True)
  xs = sorted({p.x for p in points})
  width = 0.6 * min((b - a for a, b in zip(xs, xs[1:], strict=False)),
                    default=xs[0]) or 1.0
  most = max(5.0, 115 * max(len(p.attribution.misses) / max(1, len(p.kept))
                            for p in points))
  for k, name in enumerate(names):
    own = [p for p in points if p.system == name]
    at = [p.x + (k - (len(names) - 1) / 2) * width / 12 for p in own]
    share, low, high = zip(*(p.summary.attainment for p in own), strict=True)
    line = top.errorbar(
        at, [100 * s for s in share],
        [[100 * (s - b) for s, b in zip(share, low, strict=True)],
         [100 * (b - s) for s, b in zip(share, high, strict=True)]],
        **pictures.look(k), markersize=5, capsize=3, linewidth=1.8,
        label=name)
    for x, s, p in zip(at, share, own, strict=True):
      if p.unsteady:
        top.plot(x, 100 * s, marker=line[0].get_marker(), markersize=5,
                 color='white',
                 markeredgecolor=line[0].get_color(), zorder=5)
    _misses(below[k], own, width, name, most)
  top.axhline(100 * target, color='black', linestyle='--', linewidth=1)
  top.annotate(f'target {target:.0%}', (0, 100 * target), (4, -10),
               xycoords=('axes fraction', 'data'), fontsize=8,
               textcoords='offset points')
  top.set_ylim(-2, 104)
  top.set_ylabel('requests that met\nboth objectives, %')
  hollow = any(p.unsteady for p in points)
  top.legend(fontsize=8, frameon=False, loc='best', title_fontsize=8,
             title='hollow: queues grew or drifted' if hollow else None)
  below[-1].set_xlabel(label)
  below[-1].set_xticks(xs, [f'{x:.3g}' for x in xs])
  for axes in (top, *below):
    axes.grid(axis='y', alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
  seen = [c for c in LOOKS if any(p.attribution.causes[c] for p in points)]
  if seen:
    handles = [below[0].bar(xs[0], 0, **_look(c)) for c in seen]
    figure.legend(handles, [c.replace('_', ' ') for c in seen],
                  loc='outside lower center', ncols=5, frameon=False,
                  fontsize=8, title='misses by cause', title_fontsize=8)
  figure.suptitle(title, x=0.01, ha='left', fontsize=10)
  pictures.save(figure, path)


def _look(cause):
  colour, hatch = LOOKS[cause]
  return dict(color=colour, hatch=hatch, edgecolor='white', linewidth=0.5)


def _misses(axes, points, width, name, most):
  """Stacked bars: share of the requests that missed, by cause."""
  bottom = [0.0] * len(points)
  for cause in LOOKS:
    share = [100 * p.attribution.causes[cause] / max(1, len(p.kept))
             for p in points]
    axes.bar([p.x for p in points], share, width, bottom, **_look(cause))
    bottom = [a + b for a, b in zip(bottom, share, strict=True)]
  axes.set_ylim(0, most)
  axes.set_ylabel('missed, %')
  axes.set_title(name, loc='left', fontsize=9)


# --- files --------------------------------------------------------------------


def _facts(p):
  return {
      'placement': p.placement, 'policy': p.policy, 'seed': p.seed,
      'x': p.x, 'rate_per_s': p.rate_per_s,
      'batch': p.batch, 'tried': p.tried,
      'slo': dataclasses.asdict(p.slo), 'unsteady': p.unsteady,
      'summary': dataclasses.asdict(p.summary),
      'causes': p.attribution.causes, 'fixes': p.attribution.fixes,
      'advice': p.attribution.advice}


def _row(p):
  """A line of points.csv."""
  share, low, high = p.summary.attainment
  return {
      'placement': p.placement, 'policy': p.policy, 'seed': p.seed,
      'rate_per_s': p.rate_per_s, 'scale': p.scale, 'batch': p.batch,
      'devices': p.summary.num_devices, 'requests': len(p.kept),
      'attained': share, 'low': low, 'high': high, **{
          f'{name}_p{q}_s': value for name in ('ttft', 'tpot', 'itl')
          for q, value in zip(metrics.QUANTILES, getattr(
              p.summary, f'{name}_s'), strict=True)},
      'tokens_per_s': p.summary.tokens_per_s,
      'preemptions': p.summary.preemptions, 'unsteady': p.unsteady}


def _made_by(options):
  """(options, data) as provenance.save_json takes them."""
  return cli.asked(options, FLAGS), [options.lengths, options.latency]


def write(out, points, stopped, options):
  """Writes records.jsonl (a run once), points.csv and summary.json."""
  runs = {(p.system, p.seed, p.rate_per_s, p.batch): p for p in points}
  report.save_records(
      out / 'records.jsonl', [r for p in runs.values() for r in p.records],
      [p.system + (f' at {p.rate_per_s:g}' if p.rate_per_s else '')
       + (f' chunk {p.batch}' if p.tried else '')
       + (f' seed {p.seed}' if len(options.seeds) > 1 else '')
       for p in runs.values() for _ in p.records])
  with open(out / 'points.csv', 'w', newline='') as file:
    writer = csv.DictWriter(file, _row(points[0]))
    writer.writeheader()
    writer.writerows(map(_row, points))
  provenance.save_json(out / 'summary.json', {
      'stopped': stopped, 'points': [_facts(p) for p in points]},
                       *_made_by(options))


class Traces:
  """Writes the event log of each run, and all of them as one timeline."""

  def __init__(self, out, options):
    self.out, self.traces, self.options = out, [], options
    for old in out.glob('events-*.jsonl'):
      old.unlink()

  def save(self, name, placed, config, log):
    assert event_log.replay(config, log) is None, f'{name}: no replay'
    stem = re.sub('[^a-z0-9.]+', '-', name)
    report.save_log(self.out / f'events-{stem}.jsonl', log)
    self.traces.append((name, timeline.timeline(log, placed.names)))

  def close(self):
    provenance.save_trace(self.out / 'timeline.json',
                          timeline.merge(self.traces), *_made_by(self.options))


def main(options, console):
  """Simulates, shows and writes; returns the exit code."""
  points, kind = sweep(options)
  placements = [Placement.parse(text, '--placement')
                for text in options.placement.split('/')]
  require(len(set(placements)) == len(placements), '--placement',
          options.placement, 'different placements')
  drawn, named = _seeds(options.seeds), _policies(options.policy)
  problems = {(name, seed): problem(options, placements, policy, seed)
              for name, policy in named.items() for seed in drawn}
  asked = next(iter(problems.values()))
  require(options.out or not options.timeline, '--timeline', True,
          'given with --out')
  out = pathlib.Path(options.out) if options.out else None
  if out:
    out.mkdir(parents=True, exist_ok=True)
  traces = Traces(out, options) if options.timeline else None
  done, stopped = [], False
  with terminal.Interrupts() as interrupts, Progress(
      console=console, transient=True) as progress:
    try:
      for (policy, seed), its in problems.items():
        label = (f' under {policy}' if policy else '') + (
            f' seed {seed}' if len(drawn) > 1 else '')
        for p in simulate(options, its, placements, points, kind, progress,
                          interrupts.halt, traces and traces.save, label):
          p = dataclasses.replace(p, policy=policy, seed=seed)
          done.append(p)
          if not console.is_terminal:
            console.print(f'{p.placement}{label} at {_where(p, kind)}: '
                          f'{p.summary.attainment[0]:.0%} met both')
    except KeyboardInterrupt:
      stopped = True
  shown = by_system(done, kind)
  for name in dict.fromkeys(p.system for p in shown):
    own = [p for p in shown if p.system == name]
    console.print(*tables(own, kind), sep='\n')
    for line in told(own, kind, options.target):
      console.print(f'  {line}', soft_wrap=True, highlight=False)
  for words in filter(None, (note(asked), profiles.caveat(options.latency))):
    console.print(words, soft_wrap=True)
  if stopped:
    console.print(f'Stopped by Ctrl-C: {len(done)} of '
                  f'{len(points) * len(placements) * len(problems)} points.')
  if out and done:
    _save(options, out, done, shown, kind, stopped, traces, console)
  return 130 if stopped else 0


def _save(options, out, done, shown, kind, stopped, traces, console):
  write(out, done, stopped, options)
  label = ('objectives, as a multiple of those in the title'
           if kind == 'scale' else 'requests a second'
           + (' and device' if options.per_device else ''))
  fixed = (f', {options.rate:g} requests/s'
           if kind == 'scale' and options.rate else '')
  draw(out / 'simulate.png', shown, kind, label, options.target,
       f'{options.model}, {pathlib.Path(options.lengths).name}, '
       f'{options.process} arrivals{fixed}; TTFT {options.ttft_s:g} s, TPOT '
       f'{options.tpot_s:g} s\nsimulated, {options.latency} latencies, '
       f'{options.requests} requests a point'
       + (f' and seed, {len(options.seeds)} seeds' if len(options.seeds) > 1
          else '') + ', 95 % intervals')
  names = ['records.jsonl', 'points.csv', 'summary.json', 'simulate.png']
  if traces:
    traces.close()
    names += ['timeline.json', 'events-*.jsonl']
  console.print(f'Written to {out}: {" ".join(names)}', soft_wrap=True)


if __name__ == '__main__':
  cli.main(main, FLAGS)
