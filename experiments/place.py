r"""The best placement for a model, a cluster, a workload and two objectives.

  python -m experiments.place --model=opt-13b --nodes=1 --devices=3 \
    --ttft_s=0.25 --tpot_s=0.1 --lengths=sharegpt --out=out/place

Seconds of a step come from --latency: 'published' (DistServe's A100 profiles
of OPT-13B and 66B), 'tables:h100-80g' and the like (operators measured on that
GPU; Llama 3 8B and 70B, Qwen3 32B and 30B-A3B), 'roofline:h100-80g' and the
like (any model's shape against the GPU's rates), or a file that
experiments.measure wrote.
Lengths are a mixture of dsjax.workload.traffic (sharegpt, humaneval,
longbench) or a file of dsjax.workload (CSV, JSONL). The cluster is --nodes and
so on, or with --machines a JSON file with the fields of dsjax.Cluster, or of a
MixedCluster for nodes of several kinds (docs/placement.md).

It prints a table of the best placements (of the best of each kind with a 95 %
interval: experiments.coverage measures that it holds), what binds them and a
verdict, and writes placement.json and placement.png. Its columns: batch,
the tokens of a prefill batch (of a chunked step) where it is not what suits
the plan; dev., devices; per dev., requests/s a device (per unit of price, where
devices have one), `<=` of a placement that only lost to the best; met, the
share that met both objectives at that rate; ends, what ended the search for
the rate: target (both neighbours are known), samples (more --requests would
narrow it), horizon (attainment still fell at the end of the longest run), cap
(no work to bind it), floor (no rate attains) or beaten (it lost to the best).

Ctrl-C ends the search and prints what is known. A line of the table can be
served: experiments.serve --set=placements=. Objectives may be inf. Exit codes:
0; 2 for bad input, and where no placement could be judged; 130 by Ctrl-C.
"""

import math
import os
import pathlib
import time
import types
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
  BarColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
)
from rich.table import Table

from dsjax.checkpoints import hf_config
from dsjax.config.checks import require
from dsjax.config.placement import Slo
from dsjax.placement import candidates, clusters, search
from dsjax.placement.api import ALGORITHMS, make_problem, note
from dsjax.placement.clusters import Cluster
from dsjax.placement.verdict import RankedPlacement
from dsjax.simulation import profiles
from experiments.common import (
  children,
  cli,
  pictures,
  policies,
  provenance,
  terminal,
)

MAX_SEQS = candidates.SearchProblem.max_seqs
CLUSTER = dict(nodes=('nodes', 1), devices=('devices_per_node', 1),
               **cli.CLUSTER, hand_off_ms=('hand_off_s', 1e-3))


FLAGS = {
    'model': cli.Flag('opt-13b', 'A name in dsjax.config.zoo, or a folder '
                      'with a config.json.'),
    'machines': cli.machines_flag(CLUSTER),
    'nodes': cli.Flag(1, 'Nodes.', low=1),
    'devices': cli.Flag(candidates.DEVICES, 'Devices a node.', low=1),
    **dict.fromkeys(cli.CLUSTER),
    'hand_off_ms': cli.Flag(1e3 * Cluster.hand_off_s, 'Fixed part of a KV '
                            'transfer.'),
    'ttft_s': 0.25, 'tpot_s': 0.1, 'target': 0.9,
    'strict': cli.Flag(0.99, 'A second share, of the best placements; 0: '
                       'none.'),
    'strict_effort': cli.Flag(0.5, 'Of its runs; as many as --effort: with '
                              'intervals, at their price.'),
    'effort': cli.Flag(16.0, "Of the best placements' runs: so many times "
                       'the requests, for intervals that hold.', low=1.0),
    'rate': cli.Flag(None, 'Requests/s of the whole cluster.', float),
    'lengths': 'sharegpt', 'process': 'poisson', 'cv': 1.0,
    'latency': 'published', 'host_ms': 2.0, 'policy': 'distserve',
    'algorithms': cli.Flag(['low', 'colocated'], f'Of {sorted(ALGORITHMS)}.'),
    'cut': cli.Flag(False, 'Cut requests beyond the context of the model, '
                    'which are refused otherwise.'),
    'chunks': list(map(str, candidates.CHUNKS)),
    'replicas': cli.Flag(3, 'Most instances of a phase.', low=1),
    'requests': cli.Flag(200, 'Simulated at a rate, at first.', low=20),
    'tolerance': cli.Flag(0.1, 'Of the rate; less for the best.'),
    'seed': 0,
    'processes': cli.Flag(os.cpu_count() or 1, 'Of the search.', low=1),
    'out': None,
    'top': cli.Flag(10, 'Lines of the table.', low=1),
}


def _cluster(options):
  """The cluster of the flags, or of the file."""
  return cli.machines(options, CLUSTER) or Cluster.of(
      options.latency, **cli.fields(options, CLUSTER))


def _rate(row):
  """(estimate, interval) per device, in words."""
  low, high = row.interval_per_device
  if row.goodput.binds == 'beaten':
    return f'<= {high:.3g}', '-'
  return f'{row.per_device:.3g}', (f'[{low:.3g}, {high:.3g}]'
                                   if row.goodput.tight else '-')


def _cells(row):
  return (str(row.placement),
          str(row.prefill_tokens or '-'), str(row.placement.num_devices),
          *_rate(row), f'{100 * row.goodput.attained:.0f} %',
          row.goodput.binds)


def table(rows: Iterable[RankedPlacement], target: float,
          unit: str = 'device') -> Table:
  """A rich table of RankedPlacements; unit: what goodput counts per."""
  out = Table(width=80, title=f'requests/s per {unit}, {target:.0%} met '
              'both objectives')
  out.add_column('placement (TPxPP)', overflow='fold')
  for name in ('batch', 'dev.', 'per ' + (
      'dev.' if unit == 'device' else 'unit'), '95 %', 'met', 'ends'):
    out.add_column(name, justify='right', no_wrap=True)
  for row in rows:
    out.add_row(*_cells(row))
  return out


def draw(path: str | pathlib.Path, rows: Sequence[RankedPlacement], title: str,
         unit: str = 'device') -> None:
  """Bars of goodput per device with their intervals, best on top."""
  figure = Figure(figsize=(8, 1.2 + 0.35 * len(rows)), layout='constrained')
  axes = figure.subplots()
  modes = ('disaggregated', 'colocated', 'chunked')
  looks = {mode: dict(edgecolor=pictures.COLOURS[n], hatch=hatch) for n, (
      mode, hatch) in enumerate(zip(modes, ('', '//', '..'), strict=True))}
  seen = set()
  for y, row in enumerate(rows):
    low, high = row.interval_per_device
    mode = row.placement.mode
    beaten = row.goodput.binds == 'beaten'
    axes.barh(y, high if beaten and math.isfinite(high) else row.per_device,
              facecolor='none' if beaten else f"{looks[mode]['edgecolor']}40",
              **looks[mode], linestyle=':' if beaten else '-',
              label=None if mode in seen or beaten else mode)
    seen |= set() if beaten else {mode}
    if row.goodput.tight:  # without an upper end: twice the bar, and a >
      end = high if math.isfinite(high) else 2 * row.per_device
      axes.plot([low, end], [y, y], color='black', marker='|')
      if end != high:
        axes.plot([end], [y], color='black', marker='>', ms=7)
  axes.set_yticks(range(len(rows)), [
      str(r.placement) + (f' ({r.prefill_tokens})'
                                     if r.prefill_tokens else '')
      for r in rows])
  axes.invert_yaxis()
  axes.set_xlim(left=0)
  axes.set_xlabel(f'goodput, requests/s per {unit} (simulated)\n'
                  '95 % intervals; dotted: at most')
  axes.set_title(title, fontsize=9)
  axes.spines[['top', 'right']].set_visible(False)
  if seen:
    figure.legend(fontsize=8, loc='outside lower right', ncols=len(seen))
  pictures.save(figure, path)


def _problem(options):
  """The Problem of the flags."""
  require(options.algorithms and all(
      name in ALGORITHMS for name in options.algorithms), '--algorithms',
          ','.join(options.algorithms), f'some of {sorted(ALGORITHMS)}')
  return make_problem(
      hf_config.named(options.model), Slo(options.ttft_s, options.tpot_s),
      options.lengths, options.latency, cluster=_cluster(options),
      process=options.process, cv=options.cv, seed=options.seed,
      host_ms=options.host_ms, cut=options.cut, max_seqs=MAX_SEQS,
      target=options.target,
      chunks=cli.token_budgets('--chunks', options.chunks, MAX_SEQS),
      requests=options.requests, most_requests=4 * options.requests,
      tolerance=options.tolerance, replicas=options.replicas,
      strict=options.strict or None, strict_effort=options.strict_effort,
      effort=options.effort,
      rate_per_s=options.rate, policy=policies.load(
          options.policy, Slo(options.ttft_s, options.tpot_s)))


def _search(console, problem, options):
  """The SearchResult, with a bar."""
  bar = Progress(TextColumn('{task.description}'), BarColumn(),
                 TextColumn('{task.fields[more]}'), TimeElapsedColumn(),
                 console=console, transient=True)
  tell = terminal.now_and_then(console)
  with children.processes(options.processes) as run, bar:
    line = bar.add_task('searching', total=None, more='')

    def report(now):
      bar.update(line, completed=now.done, total=now.total, more=str(now))
      tell(str(now), bool(now.doing))

    return search.search(
        problem, [ALGORITHMS[n] for n in options.algorithms], report, run)


def _json(rows):
  """Rows for a file."""
  return [{
      'placement': str(r.placement), 'to_serve': str(r.to_serve),
      'prefill_tokens': r.prefill_tokens, 'aligned': r.aligned,
      'devices': r.placement.num_devices, 'per_device': r.per_device,
      'low': r.interval_per_device[0], 'high': r.interval_per_device[1],
      'tight': r.goodput.tight, 'binds': r.goodput.binds,
      'attained': r.goodput.attained}
          for r in rows]


def _show(console, answer, options, took, unit):
  """Prints a SearchResult."""
  console.print(table(answer.rows[:options.top], options.target, unit))
  if answer.strict:
    console.print(table(answer.strict, options.strict, unit))
  if answer.stopped:
    console.print('Stopped: what follows is what was known.')
  console.print(answer.verdict, soft_wrap=True)
  for mode, words in answer.bottlenecks.items():
    console.print(f'What binds the best {mode} placement: {words}.')
  total = len(answer.rows) + answer.pruned
  console.print(
      f'{answer.simulations} simulations of {len(answer.rows)} placements; '
      f'{answer.pruned} of {total} ruled out by bounds, '
      f'{sum(r.goodput.binds == "beaten" for r in answer.rows)} by one rate; '
      f'{len(answer.unfit)} plans do not fit, {len(answer.unmeasured)} have '
      f'no latencies ({candidates.names(answer.unmeasured)}); '
      f'{took:.1f} s, {options.processes} processes',
      soft_wrap=True)


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Searches, shows and writes."""
  problem = _problem(options)
  start = time.perf_counter()
  answer = _search(console, problem, options)
  took = time.perf_counter() - start
  unit, latencies = clusters.unit(problem.cluster), [
      each for each in clusters.latencies(problem.cluster, options.latency)
      if isinstance(each, str)]
  _show(console, answer, options, took, unit)
  for words in filter(None, (note(problem), *map(profiles.caveat, latencies))):
    console.print(words, soft_wrap=True)
  code = 130 if answer.stopped else 0
  if not options.out:
    return code
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  rows = answer.rows[:options.top]
  draw(out / 'placement.png', rows, f'{options.model}, {options.lengths}, '
       f'TTFT {options.ttft_s} s, TPOT {options.tpot_s} s, '
       f'{options.target:.0%}', unit)
  provenance.save_json(out / 'placement.json', {
      'verdict': answer.verdict, 'bottlenecks': answer.bottlenecks,
      'simulations': answer.simulations, 'pruned': answer.pruned,
      'seconds': took, 'stopped': answer.stopped, 'target': options.target,
      'rows': _json(answer.rows), 'strict_target': options.strict,
      'strict': _json(answer.strict), 'note': note(problem)},
                       cli.asked(options, FLAGS),
                       [options.lengths, *latencies, options.machines])
  terminal.written(console, out, 'placement.json', 'placement.png')
  return code


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
