"""What a soak has shown: figures, checks, a table, a picture."""

import collections
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from configs.serve import PROMPTS
from dsjax.config.engine import EngineConfig
from experiments.common import pictures, provenance


def added_latency(done: Sequence[Mapping[str, Any]], config: EngineConfig,
                  back_s: float) -> tuple[list[float], list[int]]:
  """(added seconds of each request that a fault hit, those over the bound)."""
  calm = collections.defaultdict(list)
  for r in done:
    if r['status'] in ('stop', 'length') and not r['retries']:
      calm[r['job']].append(r['latency_s'])
  worst = max((x for every in calm.values() for x in every), default=0.0)
  added, over = [], []
  for r in done:
    if (r['status'] in ('stop', 'length') and r['retries']
        and calm[r['job']]):
      added.append(r['latency_s'] - statistics.median(calm[r['job']]))
      wait_s = max(config.lease_s, config.stall_s) + back_s + config.restart_s
      if r['latency_s'] > worst + r['retries'] * (wait_s + worst):
        over.append(r['id'])
  return added, over


def growth_mb_per_min(memory: Sequence[tuple[float, float]]) -> float | None:
  """Slope of the memory after the first third, by least squares; None of
  too few samples."""
  late = memory[len(memory) // 3:]
  if len(late) < 3:
    return None
  fit = statistics.linear_regression(*zip(*late, strict=True))
  return fit.slope * 60


def summarize(soak: Any, seconds: float, compiled: Sequence[float]
              ) -> dict[str, Any]:
  """What the table shows, as a dict; 'failed checks' names those that did."""
  by = collections.Counter(r['status'] for r in soak.done)
  back_s = soak.options.back_s
  if soak.options.cluster:
    back_s = max(back_s, soak.away_s) + soak.server.config.silent_s
  added, over = added_latency(soak.done, soak.server.config, back_s)
  leaked = soak.leaked()
  result = {
      'seconds': seconds, 'requests': dict(by), 'not sent': soak.unsent,
      'tokens': sum(r['tokens'] for r in soak.done),
      'faults': dict(collections.Counter(f['what'] for f in soak.faults)),
      'copies': soak.copies,
      'hit': sum(r['retries'] > 0 for r in soak.done),
      'retries': sum(r['retries'] for r in soak.done),
      'added_s': {'median': statistics.median(added), 'worst': max(added)}
      if added else None,
      'over the bound': over, 'requests with wrong tokens': soak.wrong,
      'pages and slots leaked': leaked, 'programs compiled': len(compiled),
      'log entries that replay otherwise': soak.differs,
      'memory_mb': (soak.memory[0][1], soak.memory[-1][1]),
      'arrays_mb': soak.arrays_mb,
      'growth_mb_per_min': growth_mb_per_min(soak.memory)}
  result['failed checks'] = [
      name for name, bad in (
          ('tokens', soak.wrong), ('pages', leaked), ('lost', by['failed']),
          ('compiled', compiled), ('replay', soak.differs),
          ('latency', over), ('arrays', result['arrays_mb'][1]
                              > 1.02 * result['arrays_mb'][0])) if bad]
  return result


def table(result: Mapping[str, Any]) -> Table:
  """A rich Table of a result."""
  shown = Table(show_header=False)
  shown.add_column()
  shown.add_column(justify='right')
  for what, count in sorted(result['faults'].items()):
    shown.add_row(f'fault: {what}', str(count))
  shown.add_row('faults', str(sum(result['faults'].values())),
                end_section=True)
  for status, count in sorted(result['requests'].items()):
    shown.add_row(f'requests: {status}', f'{count:,}')
  shown.add_row('not sent, too many waited', str(result['not sent']))
  shown.add_row('hit by a fault (retries)',
                f'{result["hit"]} ({result["retries"]})')
  for what, count in result['copies'].items():
    shown.add_row(f'copies: {what}', f'{count:,}')
  for name in ('requests with wrong tokens', 'over the bound'):
    shown.add_row(name, str(len(result[name])))
  for name in ('pages and slots leaked', 'programs compiled',
               'log entries that replay otherwise'):
    shown.add_row(name, str(result[name]))
  added = result['added_s']
  shown.add_row('added latency, median / worst', '-' if added is None else
                f'{added["median"]:.2f} / {added["worst"]:.2f} s')
  for what, name in (('memory of the process', 'memory_mb'),
                     ('arrays on devices', 'arrays_mb')):
    first, last = result[name]
    shown.add_row(f'{what}, first / last', f'{first:,.1f} / {last:,.1f} MB')
  growth = result['growth_mb_per_min']
  shown.add_row('memory growth after a third', '-' if growth is None else
                f'{growth:+.2f} MB/min')
  return shown


def draw(path: pathlib.Path, soak: Any) -> None:
  """Latencies, faults and memory over time, to a PNG."""
  figure = Figure(figsize=(10, 7), layout='constrained')
  top, middle, low = figure.subplots(
      3, 1, sharex=True, height_ratios=(3, 1.5, 1))
  for name, mark, colour, keep in (
      ('no fault hit it', '.', '#9db4c8', lambda r: not r['retries']),
      ('a fault hit it', 'x', '#c0392b', lambda r: r['retries'])):
    chosen = [r for r in soak.done if keep(r) and r['status'] != 'cancelled']
    top.plot([r['s'] for r in chosen], [r['latency_s'] for r in chosen], mark,
             color=colour, label=f'{name} ({len(chosen)})', markersize=5)
  top.set_ylabel('latency, s')
  top.legend(frameon=False, loc='upper right', ncols=2)
  for what, mark, colour in (('killed', 'X', '#c0392b'),
                             ('drained', 'v', '#2c7fb8'),
                             ('a call went wrong', '.', 'black')):
    chosen = [f for f in soak.faults if f['what'] == what
              or what.startswith('a ') and ':' in f['what']]
    middle.plot([f['s'] for f in chosen], [f['instance'] for f in chosen],
                mark, color=colour, label=what)
  names = [f'{i} {engine.role}' for i, engine in enumerate(soak.server.engines)]
  middle.set_yticks(range(len(names)), names)
  middle.set_ylim(len(names) - 0.5, -0.5)
  middle.legend(frameon=False, loc='upper center', ncols=3,
                bbox_to_anchor=(0.5, 1.25), fontsize=8)
  low.plot(*zip(*soak.memory, strict=True), color='black')
  low.set_ylabel('memory, MB')
  low.set_xlabel('seconds')
  for axes in (top, middle, low):
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
  pictures.save(figure, path)


def save(out: pathlib.Path, soak: Any, result: Mapping[str, Any],
         options: Mapping[str, Any]) -> None:
  """Writes every file but the event log; options: a dict."""
  provenance.save_json(out / 'soak.json', result, options, [PROMPTS])
  for name, rows in (('requests', soak.done), ('faults', soak.faults)):
    with open(out / f'{name}.jsonl', 'w') as file:
      file.writelines(json.dumps(row) + '\n' for row in rows)
  draw(out / 'soak.png', soak)
