"""Tables and pictures of what experiments.validate measured."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dsjax.analysis.record import STAGES
from dsjax.config.placement import Slo
from experiments.common import pictures

PROFILES = ('bench', 'calibrated')
STATS = ('mean', 'p50', 'p90', 'p99')


def show(console: Console, rows: Sequence[Mapping[str, Any]],
         slo: Slo) -> None:
  """Attainment and latencies; then where the seconds are."""
  table = Table(title=f'Real against simulated; SLO TTFT {slo.ttft_s:.3g} s, '
                f'TPOT {slo.tpot_s:.3g} s', title_justify='left')
  for column in ('mode, rate', 'of', 'attained % [95 %]',
                 *(f'{x} {stat}' for x in ('TTFT', 'TPOT') for stat in STATS)):
    table.add_column(column, justify='right')
  for row in rows:
    for kind in ('real', *PROFILES):
      shown = row[kind]
      share, low, high = (100 * x for x in shown['attainment'])
      cells = [f'{1e3 * shown[x][stat]:.0f}' if kind == 'real' else
               f'{100 * row["errors"][kind][x][stat]:+.0f}%'
               for x in ('ttft_s', 'tpot_s') for stat in STATS]
      table.add_row(
          f'{row["mode"]} {row["rate_per_s"]:.2f}/s' if kind == 'real'
          else '', kind, f'{share:.1f} [{low:.0f}, {high:.0f}]'
          if kind == 'real' else
          f'{share:.1f} ({_points(row["errors"][kind])})', *cells,
          end_section=kind == PROFILES[-1])
  console.print(table)
  console.print('real in ms; simulated as the error of its statistic')
  _show_stages(console, rows)
  _show_steps(console, rows)


def _points(error):
  """How far the simulated share is from the real one, with its interval."""
  half = error['half_width']
  return f'{error["attainment"]:+.1f}' + (
      '' if half is None else f' ± {half:.1f}')


def _show_stages(console, rows):
  table = Table(title='Mean ms a request in each stage', title_justify='left')
  for column in ('mode, rate', 'of', *STAGES):
    table.add_column(column, justify='right')
  for row in rows:
    for kind in ('real', *PROFILES):
      table.add_row(f'{row["mode"]} {row["rate_per_s"]:.2f}/s'
                    if kind == 'real' else '', kind,
                    *(f'{1e3 * row[kind]["stage_s"][stage]:.0f}'
                      for stage in STAGES),
                    end_section=kind == PROFILES[-1])
  console.print(table)


def _show_steps(console, rows):
  table = Table(title="The real run's own steps against what a profile says "
                'of the same batches (ratio real / predicted)',
                title_justify='left')
  for column in ('mode, rate', 'profile', 'step', 'count', 'real ms',
                 'predicted', 'ratio', 'overlap', 'alone', 'together'):
    table.add_column(column, justify='right')

  def number(x):
    return '' if x is None else f'{x:.2f}'
  for row in rows:
    for kind in PROFILES:
      for step in row['steps'][kind]:
        table.add_row(f'{row["mode"]} {row["rate_per_s"]:.2f}/s', kind,
                      step['what'], str(step['count']),
                      f'{1e3 * step["real_s"]:.1f}',
                      f'{1e3 * step["predicted_s"]:.1f}', number(step['ratio']),
                      f'{100 * step["overlap"]:.0f}%', number(step['alone']),
                      number(step['together']))
  console.print(table)
  console.print('alone, together: steps in which the other instance was at '
                'work less or more than half of the time; of a migration, '
                'whether its pages were read behind a step', soft_wrap=True)


def draw(path: str | pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Attainment, TTFT and TPOT, and their errors; a column a mode."""
  modes = list(dict.fromkeys(r['mode'] for r in rows))
  figure = Figure(figsize=(6 * len(modes), 12), layout='constrained')
  axes = figure.subplots(4, len(modes), squeeze=False)
  for column, mode in zip(axes.T, modes, strict=True):
    own = sorted((r for r in rows if r['mode'] == mode),
                 key=lambda r: r['rate_per_s'])
    rates = [r['rate_per_s'] for r in own]
    share, low, high = 100 * np.array([r['real']['attainment']
                                       for r in own]).T
    column[0].errorbar(rates, share, (share - low, high - share), fmt='ko',
                       capsize=3, label='real')
    for kind, style in zip(PROFILES, ('--', '-'), strict=True):
      column[0].plot(rates, [100 * r[kind]['attainment'][0] for r in own],
                     style, color='C0', label=f'simulated, {kind}')
      for axis, name in zip(column[1:3], ('ttft_s', 'tpot_s'), strict=True):
        for i, stat in enumerate(STATS[1:]):
          axis.plot(rates, [1e3 * r[kind][name][stat] for r in own],
                    **pictures.look(i) | {'linestyle': style}, ms=3)
      for i, name in enumerate(('ttft_s', 'tpot_s')):
        column[3].plot(rates, [100 * r['errors'][kind][name]['mean']
                               for r in own], ms=4,
                       **pictures.look(i) | {'linestyle': style},
                       label=f'{name[:4].upper()}, {kind}')
    for axis, name in zip(column[1:3], ('ttft_s', 'tpot_s'), strict=True):
      for i, stat in enumerate(STATS[1:]):
        axis.plot(rates, [1e3 * r['real'][name][stat] for r in own],
                  **pictures.look(i) | {'linestyle': ''}, ms=7, label=stat)
      axis.set(ylabel=f'{name[:4].upper()}, ms', yscale='log')
    column[0].set(title=mode, ylabel='attained both, %', ylim=(-3, 103))
    column[3].axhspan(-10, 10, color='0.9')
    column[3].set(xlabel='requests a second', ylabel='error of the mean, %')
    for axis in column:
      axis.legend(frameon=False, fontsize=8)
  figure.suptitle('Real (large marks) and simulated (lines; dashed: bench '
                  'profile)')
  pictures.save(figure, path)
