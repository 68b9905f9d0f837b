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

Placements with '/' between are
drawn together; --per_device multiplies rates by their devices. --latency is as
in experiments.place. --process=trace without a rate uses the trace's own times.
Files in --out: records.jsonl, summary.json, simulate.png and, with --timeline,
timeline.json (for ui.perfetto.dev) and events-NAME.jsonl, which replays.
"""

import dataclasses
import json
import math
import pathlib
import re

from matplotlib.figure import Figure
from rich.progress import Progress
from rich.table import Table

from dsjax.analysis import attribution, metrics, timeline
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.placement import Placement, Slo
from dsjax.placement import candidates
from dsjax.placement.api import build, make_problem, no_load, note, simulated
from dsjax.placement.candidates import Cluster
from dsjax.scheduling.events import Finish, Reject
from dsjax.simulation import profiles, simulator
from experiments.common import cli, policies, provenance, report, terminal

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
    'policy': 'distserve',
    'aligned': cli.Flag(True, 'KV moves inside a node.'),
    'cut': cli.Flag(False, 'Cut requests beyond the context of the model, '
                    'which are refused otherwise.'),
    'chunk': cli.Flag(candidates.CHUNK, 'Token budget of chunked placements.',
                      low=1),
    'depth': cli.Flag(None, 'Commands in flight; see scheduler.Config.', int,
                      low=1),
    'run_ahead': cli.Flag(None, 'Most decode steps of a command, while a '
                          'prompt may have to wait for them; see '
                          'scheduler.Config.', int, low=1),
    'requests': cli.Flag(400, 'Simulated at each point.', low=20),
    'seed': 0,
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


def problem(options, placements):
  """The SearchProblem of a command line.

  Raises:
    InputError.
  """
  most = max(p.num_devices for p in placements)
  return make_problem(
      options.model, Slo(options.ttft_s, options.tpot_s), options.lengths,
      options.latency, process=options.process, cv=options.cv,
      seed=options.seed, host_ms=options.host_ms, target=options.target,
      cut=options.cut,
      policy=policies.load(options.policy),
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


def point(placement, at, rate, slo, records, parts, made, alone):
  """The Point of a finished run; made: what api.build gave."""
  run = simulated(placement, slo, records, *made[:2])
  return Point(str(placement), at, rate, slo, records, run.kept, run.summary,
               attribution.attribute(run.kept, parts, slo, alone),
               run.unsteady)


def simulate(options, asked, placements, points, kind, progress, halt, save):
  """Yields the Points of every placement, in order.

  save: called with (name, placement, config, log) of each run, or None.
  """
  built = [build(asked, p, options.chunk, options.aligned, options.depth,
                 options.run_ahead) for p in placements]
  factors = [p.num_devices if options.per_device else 1 for p in placements]
  runs = list(dict.fromkeys(rate for rate, _ in points))
  sample = [Record(r.id, 0.0, len(r.prompt), 1) for r in
            asked.workload(runs[0] or None, options.requests)]
  widest = max(scale for _, scale in points)
  check_floor(built, sample, Slo(widest * options.ttft_s,
                                 widest * options.tpot_s), options.target)
  task = progress.add_task('', total=len(built) * len(runs) * len(sample))
  for p, made, factor in zip(placements, built, factors, strict=True):
    name, alone = str(p), no_load(*made[:2])
    for rate in runs:
      total = rate and rate * factor
      progress.update(task, description=f'{name} at '
                      f'{f"{total:g} requests/s" if total else "its times"}')
      log = [] if save else None
      records, parts = run(made, asked.workload(total, options.requests), halt,
                           lambda n: progress.advance(task, n), log)
      if save:
        save(f'{name} at {total:g}' if total else name, p, made[0], log)
      last_s = max(r.arrival_s for r in records)
      # A trace at its own times; 0 where all come at once.
      seen = rate or (len(records) / last_s / factor if last_s else 0.0)
      for its, scale in points:
        if its == rate:
          slo = Slo(scale * options.ttft_s, scale * options.tpot_s)
          yield point(p, scale if kind == 'scale' else seen, total, slo,
                      records, parts, made, alone)


# --- what a person sees ------------------------------------------------------


def _ms(values):
  return '/'.join('-' if math.isnan(v) else f'{1e3 * v:,.0f}' for v in values)


def _where(p, kind):
  return f'{p.x:.4g}' if p.x or kind == 'scale' else 'at once'


def tables(points, kind):
  """Two rich tables of the Points of one placement, 80 columns at most."""
  first = kind if kind == 'scale' else 'req/s'
  met = Table(title=points[0].placement, title_justify='left')
  gaps = Table()
  for out, names in ((met, ('met both', '95 %', 'TTFT ms\np50/p90/p99',
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
    met.add_row(x, f'{share:.0%}', f'{100 * low:.0f}-{100 * high:.0f}',
                _ms(p.summary.ttft_s), _ms(p.summary.tpot_s))
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
  names = list(dict.fromkeys(p.placement for p in points))
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
    own = [p for p in points if p.placement == name]
    at = [p.x + (k - (len(names) - 1) / 2) * width / 12 for p in own]
    share, low, high = zip(*(p.summary.attainment for p in own), strict=True)
    line = top.errorbar(
        at, [100 * s for s in share],
        [[100 * (s - b) for s, b in zip(share, low, strict=True)],
         [100 * (b - s) for s, b in zip(share, high, strict=True)]],
        marker='o', markersize=5, capsize=3, linewidth=1.8, label=name)
    for x, s, p in zip(at, share, own, strict=True):
      if p.unsteady:
        top.plot(x, 100 * s, marker='o', markersize=5, color='white',
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
  figure.savefig(path, dpi=120)


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
      'placement': p.placement, 'x': p.x, 'rate_per_s': p.rate_per_s,
      'slo': dataclasses.asdict(p.slo), 'unsteady': p.unsteady,
      'summary': dataclasses.asdict(p.summary),
      'causes': p.attribution.causes, 'fixes': p.attribution.fixes,
      'advice': p.attribution.advice}


def write(out, points, asked, stopped):
  """Writes records.jsonl (a run once) and summary.json."""
  runs = {(p.placement, p.rate_per_s): p for p in points}
  report.save_records(
      out / 'records.jsonl', [r for p in runs.values() for r in p.records],
      [p.placement + (f' at {p.rate_per_s:g}' if p.rate_per_s else '')
       for p in runs.values() for _ in p.records])
  (out / 'summary.json').write_text(json.dumps(provenance.finite({
      'options': asked, 'stopped': stopped,
      'points': [_facts(p) for p in points]}), indent=1) + '\n')


class Traces:
  """Writes the event log of each run, and all of them as one timeline."""

  def __init__(self, out):
    self.out, self.traces = out, []
    for old in out.glob('events-*.jsonl'):
      old.unlink()

  def save(self, name, placed, config, log):
    from dsjax.runtime import orchestrator  # jax, which only this needs
    assert orchestrator.replay(config, log) is None, f'{name}: no replay'
    stem = re.sub('[^a-z0-9.]+', '-', name)
    orchestrator.write_log(self.out / f'events-{stem}.jsonl', log)
    self.traces.append((name, timeline.timeline(log, placed.names)))

  def close(self):
    (self.out / 'timeline.json').write_text(
        json.dumps(timeline.merge(self.traces)))


def main(options, console):
  """Simulates, shows and writes; returns the exit code."""
  points, kind = sweep(options)
  placements = [Placement.parse(text, '--placement')
                for text in options.placement.split('/')]
  require(len(set(placements)) == len(placements), '--placement',
          options.placement, 'different placements')
  asked = problem(options, placements)
  require(options.out or not options.timeline, '--timeline', True,
          'given with --out')
  out = pathlib.Path(options.out) if options.out else None
  if out:
    out.mkdir(parents=True, exist_ok=True)
  traces = Traces(out) if options.timeline else None
  done, stopped = [], False
  with terminal.Interrupts() as interrupts, Progress(
      console=console, transient=True) as progress:
    try:
      for p in simulate(options, asked, placements, points, kind, progress,
                        interrupts.halt, traces and traces.save):
        done.append(p)
        if not console.is_terminal:
          console.print(f'{p.placement} at {_where(p, kind)}: '
                        f'{p.summary.attainment[0]:.0%} met both')
    except KeyboardInterrupt:
      stopped = True
  for name in dict.fromkeys(p.placement for p in done):
    own = [p for p in done if p.placement == name]
    console.print(*tables(own, kind), sep='\n')
    for line in told(own, kind, options.target):
      console.print(f'  {line}', soft_wrap=True, highlight=False)
  for words in filter(None, (note(asked), profiles.caveat(options.latency))):
    console.print(words, soft_wrap=True)
  if stopped:
    console.print(f'Stopped by Ctrl-C: {len(done)} of '
                  f'{len(points) * len(placements)} points.')
  if out and done:
    _save(options, out, done, kind, stopped, traces, console)
  return 130 if stopped else 0


def _save(options, out, done, kind, stopped, traces, console):
  told_by = [name for name in FLAGS if name not in ('timeline', 'out')]
  write(out, done, {k: getattr(options, k) for k in told_by}, stopped)
  label = ('objectives, as a multiple of those in the title'
           if kind == 'scale' else 'requests a second'
           + (' and device' if options.per_device else ''))
  fixed = (f', {options.rate:g} requests/s'
           if kind == 'scale' and options.rate else '')
  draw(out / 'simulate.png', done, kind, label, options.target,
       f'{options.model}, {pathlib.Path(options.lengths).name}, '
       f'{options.process} arrivals{fixed}; TTFT {options.ttft_s:g} s, TPOT '
       f'{options.tpot_s:g} s\nsimulated, {options.latency} latencies, '
       f'{options.requests} requests a point, 95 % intervals')
  names = ['records.jsonl', 'summary.json', 'simulate.png']
  if traces:
    traces.close()
    names += ['timeline.json', 'events-*.jsonl']
  console.print(f'Written to {out}: {" ".join(names)}', soft_wrap=True)


if __name__ == '__main__':
  cli.main(main, FLAGS)
