"""The best placement for a model, a cluster, a workload and two objectives.

  python -m experiments.place --model=opt-13b --nodes=1 --devices=3 \
    --ttft=0.25 --tpot=0.1 --lengths=sharegpt --out=out/place

Seconds of a step come from --latency: 'published' (DistServe's A100 profiles
of OPT-13B and 66B), 'roofline:a100-80g' and the like (shapes against peaks:
hardware that nobody has measured), or a file that experiments.measure wrote.
Lengths are a mixture of dsjax.traffic (sharegpt, humaneval, longbench) or a
file of dsjax.workload (CSV, JSONL). It prints a table of the best placements
with 95 % intervals and a verdict, and writes placement.json and placement.png.
The first line of the table can be served: experiments.serve --set=placements=.
"""

import json
import pathlib
import sys
import time

from absl import app, flags
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dsjax import placement, traffic, zoo
from dsjax.base import InputError, Slo, require
from experiments import setting
from experiments.config import show_placement

ALGORITHMS = {'low': placement.low_affinity, 'high': placement.high_affinity,
              'colocated': placement.colocated}

_MODEL = flags.DEFINE_string('model', 'opt-13b', 'A name in dsjax.zoo.')
_NODES = flags.DEFINE_integer('nodes', 1, 'Nodes.', lower_bound=1)
_DEVICES = flags.DEFINE_integer('devices', 3, 'Devices a node.', lower_bound=1)
_MEMORY = flags.DEFINE_float('memory_gb', 80.0, 'Of a device.')
_INTRA = flags.DEFINE_float('intra_gb_per_s', 300.0, 'Inside a node.')
_INTER = flags.DEFINE_float('inter_gb_per_s', 3.125, 'Between nodes.')
_TTFT = flags.DEFINE_float('ttft', 0.25, 'Objective, seconds.')
_TPOT = flags.DEFINE_float('tpot', 0.1, 'Objective, seconds.')
_TARGET = flags.DEFINE_float('target', 0.9, 'Share that must meet both.')
_LENGTHS = flags.DEFINE_string(
    'lengths', 'sharegpt', f'One of {sorted(traffic.MIXTURES)}, or a file.')
_LATENCY = flags.DEFINE_string('latency', 'published', 'See above.')
_HOST = flags.DEFINE_float('host_ms', 2.0, "Host's time between two steps, "
                           'where --latency does not say.')
_ALGORITHMS = flags.DEFINE_list('algorithms', ['low', 'colocated'],
                                f'Of {sorted(ALGORITHMS)}.')
_REQUESTS = flags.DEFINE_integer('requests', 150, 'Simulated at a rate, at '
                                 'first.', lower_bound=20)
_TOLERANCE = flags.DEFINE_float('tolerance', 0.1, 'Of the rate.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the workload.', lower_bound=0)
_OUT = flags.DEFINE_string('out', None, 'Folder for the files.')
_TOP = flags.DEFINE_integer('top', 10, 'Lines of the table.', lower_bound=1)


def _cells(row):
  low, high = row.interval_per_device
  return (show_placement(row.placement),
          str(row.chunk_tokens or '-'), str(row.placement.num_devices),
          f'{row.per_device:.3g}', f'[{low:.3g}, {high:.3g}]',
          f'{100 * row.goodput.attained:.0f} %', row.goodput.binds)


def table(rows):
  """A rich table of Rows."""
  out = Table()
  out.add_column('placement (TPxPP)', no_wrap=True, min_width=24)
  for name in ('chunk', 'devices', 'req/s/dev', '95 %', 'met', 'binds'):
    out.add_column(name, justify='right')
  for row in rows:
    out.add_row(*_cells(row))
  return out


def draw(path, rows, title):
  """Bars of goodput per device with their intervals, best on top."""
  figure = Figure(figsize=(8, 1 + 0.35 * len(rows)), layout='constrained')
  axes = figure.subplots()
  colours = dict(disaggregated='tab:blue', colocated='tab:orange',
                 chunked='tab:green')
  for y, row in enumerate(rows):
    low, high = row.interval_per_device
    axes.barh(y, row.per_device, color=colours[row.placement.mode], alpha=0.7)
    axes.plot([low, high], [y, y], color='black', marker='|')
  axes.set_yticks(range(len(rows)), [
      show_placement(r.placement) + (f' ({r.chunk_tokens})'
                                     if r.chunk_tokens else '') for r in rows])
  axes.invert_yaxis()
  axes.set_xlim(left=0)
  axes.set_xlabel('goodput, requests/s per device (simulated)')
  axes.set_title(title, fontsize=9)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=100)


def main(_):
  try:
    _main(Console())
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _main(console):
  config = zoo.config(_MODEL.value)
  for name in _ALGORITHMS.value:
    require(name in ALGORITHMS, '--algorithms', name,
            f'one of {sorted(ALGORITHMS)}')
  make, longest = setting.requests(_LENGTHS.value, _SEED.value)
  problem = placement.Problem(
      config, placement.Cluster(
          _NODES.value, _DEVICES.value, _MEMORY.value * 1e9,
          _INTRA.value * 1e9, _INTER.value * 1e9),
      Slo(_TTFT.value, _TPOT.value), make,
      setting.latencies(_LATENCY.value, config, _MODEL.value,
                        _HOST.value / 1e3),
      _TARGET.value, max_len=longest, requests=_REQUESTS.value,
      most_requests=4 * _REQUESTS.value, tolerance=_TOLERANCE.value)
  start = time.perf_counter()
  with console.status('searching') as status:
    found = []

    def report(row):
      found.append(row)
      best = max(found, key=lambda r: r.per_device)
      status.update(f'{len(found)} placements, best so far '
                    f'{show_placement(best.placement)} at '
                    f'{best.per_device:.3g} requests/s per device')

    answer = placement.search(
        problem, [ALGORITHMS[n] for n in _ALGORITHMS.value], report)
  took = time.perf_counter() - start
  rows = answer.rows[:_TOP.value]
  console.print(table(rows))
  console.print(answer.verdict, soft_wrap=True)
  candidates = len(answer.rows) + answer.pruned
  console.print(
      f'{answer.simulations} simulations of {len(answer.rows)} placements; '
      f'{answer.pruned} of {candidates} ruled out by bounds; '
      f'{len(answer.unfit)} plans do not fit, {len(answer.unmeasured)} are '
      f'not measured; {took:.1f} s', soft_wrap=True)
  if not _OUT.value:
    return
  out = pathlib.Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  draw(out / 'placement.png', rows, f'{_MODEL.value}, {_LENGTHS.value}, TTFT '
       f'{_TTFT.value} s, TPOT {_TPOT.value} s, {_TARGET.value:.0%}')
  (out / 'placement.json').write_text(json.dumps({
      'verdict': answer.verdict, 'simulations': answer.simulations,
      'pruned': answer.pruned, 'seconds': took, 'rows': [{
          'placement': show_placement(r.placement),
          'chunk_tokens': r.chunk_tokens, 'aligned': r.aligned,
          'per_device': r.per_device, 'low': r.interval_per_device[0],
          'high': r.interval_per_device[1], 'binds': r.goodput.binds,
          'attained': r.goodput.attained} for r in answer.rows]}, indent=1))
  console.print(f'Written to {out}: placement.json placement.png')


if __name__ == '__main__':
  app.run(main)
