"""What a person sees of a sweep: tables, advice, the picture, rows of files.

All of it is of Points, see experiments.common.sweep.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from dsjax.analysis import attribution, metrics
from experiments.common import pictures
from experiments.common.sweep import Point

# Colour and hatch of each cause: told apart in grey too.
LOOKS = dict(zip(attribution.ALL, (
    ('#4e79a7', ''), ('#a0cbe8', '//'), ('#59a14f', '..'), ('#f28e2b', 'xx'),
    ('#e15759', '\\\\'), ('#b07aa1', 'oo'), ('#ffbe7d', '--'),
    ('#edc948', '||'), ('#9c755f', '++'), ('#d37295', '/.'), ('#bab0ac', '**')),
    strict=True))

# --- text ---------------------------------------------------------------------


def _ms(values_s):
  return '/'.join('-' if math.isnan(value_s) else f'{1e3 * value_s:,.0f}'
                  for value_s in values_s)


def where(point: Point, kind: str) -> str:
  """The rate or the scale of a Point."""
  return f'{point.x:.4g}' if point.x or kind == 'scale' else 'at once'


def tables(points: Sequence[Point], kind: str) -> tuple[Table, Table]:
  """Two rich tables of the Points of one placement, 80 columns at most."""
  first = kind if kind == 'scale' else 'req/s'
  met = Table(title=points[0].system, title_justify='left')
  gaps = Table()
  for table, names in (
      (met, ('batch', 'met both', '95 %', 'TTFT ms\np50/p90/p99',
             'TPOT ms\np50/p90/p99')),
      (gaps, ('ITL ms\np50/p90/p99', '1st-2nd ms\np50/p90/p99',
              'pre-\nempted', 'misses, most'))):
    for name in (first, *names):
      table.add_column(name, justify='right', overflow='fold')
  for point in points:
    summary, causes = point.summary, point.attribution.causes
    share, low, high = summary.attainment
    count, cause = max((count, cause) for cause, count in causes.items())
    x = where(point, kind) + (' !' if point.unsteady else '')
    met.add_row(x, str(point.batch), f'{share:.0%}',
                f'{100 * low:.0f}-{100 * high:.0f}', _ms(summary.ttft_s),
                _ms(summary.tpot_s))
    gaps.add_row(
        x, _ms(summary.itl_s), _ms(summary.second_s), str(summary.preemptions),
        f'{len(point.attribution.misses)}, {count} {cause}' if count else '-')
  return met, gaps


def told(points: Sequence[Point], kind: str, target: float) -> list[str]:
  """Lines under a placement's table: each point's advice, the best rate."""
  lines = []
  for point in points:
    place = (f'scale {point.x:g}' if kind == 'scale' else where(point, kind)
             + ' req/s' * bool(point.x))
    if point.tried:
      lines.append(f'{place}: met both with chunks of ' + ', '.join(
          f'{size}: {share:.0%}' for size, share in point.tried.items()))
    if point.unsteady and not any(point.unsteady in line for line in lines):
      lines.append(f'{place}: {point.unsteady}')
    if point.attribution.misses:
      lines.append(f'{place}: {point.attribution.advice}')
  if not any(point.x for point in points):
    return lines  # a trace at one moment: no rate to speak of
  good = [point.x for point in points
          if point.summary.attainment[0] >= target and not point.unsteady]
  end = min if kind == 'scale' else max
  lines.append(
      f'{target:.0%} or more met both objectives at '
      + (f'{kind} {end(good):.4g}, the '
         f'{"tightest" if kind == "scale" else "highest"} tried that did'
         if good else f'no {kind} tried'))
  return lines


# --- picture ------------------------------------------------------------------


def draw(path: str | pathlib.Path, points: Sequence[Point], kind: str,
         label: str, target: float, title: str) -> None:
  """Attainment of each placement, and under it why requests missed."""
  systems = list(dict.fromkeys(point.system for point in points))
  lines = math.ceil(len(systems) / 2)  # of the legend
  figure = Figure(figsize=(8.5, 3.6 + 1.9 * len(systems) + 0.2 * lines),
                  layout='constrained')
  top, *below = figure.subplots(
      1 + len(systems), 1, height_ratios=[3] + [1.6] * len(systems),
      sharex=True)
  xs = sorted({point.x for point in points})
  width = 0.6 * min((right - left for left, right in itertools.pairwise(xs)),
                    default=xs[0]) or 1.0
  most = max(5.0, 115 * max(
      len(point.attribution.misses) / max(1, len(point.kept))
      for point in points))
  for number, (axes, system) in enumerate(zip(below, systems, strict=True)):
    own = [point for point in points if point.system == system]
    aside = (number - (len(systems) - 1) / 2) * width / 12
    _attained(top, own, aside, pictures.look(number), system)
    _misses(axes, own, width, system, most)
  top.axhline(100 * target, color='black', linestyle='--', linewidth=1)
  top.annotate(f'target\n{target:.0%}', (1, 100 * target), (3, 0),
               xycoords=('axes fraction', 'data'), fontsize=8,
               textcoords='offset points', va='center')
  top.set_ylim(-2, 104)
  top.set_ylabel('requests that met\nboth objectives, %')
  hollow = any(point.unsteady for point in points)
  top.legend(fontsize=8, frameon=False, loc='upper left', ncols=2,
             bbox_to_anchor=(0, -0.04), title_fontsize=8, alignment='left',
             title='hollow: queues grew or drifted' if hollow else None)
  below[-1].set_xlabel(label)
  below[-1].set_xticks(xs, [f'{x:.3g}' for x in xs])
  for axes in (top, *below):
    axes.grid(axis='y', alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
  seen = [cause for cause in LOOKS
          if any(point.attribution.causes[cause] for point in points)]
  if seen:
    handles = [below[0].bar(xs[0], 0, **_look(cause)) for cause in seen]
    figure.legend(handles, [cause.replace('_', ' ') for cause in seen],
                  loc='outside lower center', ncols=5, frameon=False,
                  fontsize=8, title='misses by cause', title_fontsize=8)
  figure.suptitle(title, x=0.01, ha='left', fontsize=10)
  pictures.save(figure, path)


def _attained(axes, points, aside, look, system):
  """A line with intervals; hollow where a run was not steady."""
  xs = [point.x + aside for point in points]
  share, low, high = (
      [100 * part for part in parts] for parts in
      zip(*(point.summary.attainment for point in points), strict=True))
  line = axes.errorbar(
      xs, share,
      [[middle - end for middle, end in zip(share, low, strict=True)],
       [end - middle for middle, end in zip(share, high, strict=True)]],
      **look, markersize=5, capsize=3, linewidth=1.8, label=system)
  for x, y, point in zip(xs, share, points, strict=True):
    if point.unsteady:
      axes.plot(x, y, marker=line[0].get_marker(), markersize=5,
                color='white', markeredgecolor=line[0].get_color(), zorder=5)


def _look(cause):
  colour, hatch = LOOKS[cause]
  return dict(color=colour, hatch=hatch, edgecolor='white', linewidth=0.5)


def _misses(axes, points, width, system, most):
  """Stacked bars: share of the requests that missed, by cause."""
  bottom = [0.0] * len(points)
  for cause in LOOKS:
    share = [100 * point.attribution.causes[cause] / max(1, len(point.kept))
             for point in points]
    axes.bar([point.x for point in points], share, width, bottom,
             **_look(cause))
    bottom = [sum(both) for both in zip(bottom, share, strict=True)]
  axes.set_ylim(0, most)
  axes.set_ylabel('missed, %')
  axes.set_title(system, loc='left', fontsize=9)


# --- files --------------------------------------------------------------------


def facts(point: Point) -> dict[str, Any]:
  """What summary.json says of a Point."""
  return {
      'placement': point.placement, 'policy': point.policy,
      'seed': point.seed, 'x': point.x, 'rate_per_s': point.rate_per_s,
      'batch': point.batch, 'tried': point.tried,
      'slo': dataclasses.asdict(point.slo), 'unsteady': point.unsteady,
      'summary': dataclasses.asdict(point.summary),
      'causes': point.attribution.causes, 'fixes': point.attribution.fixes,
      'advice': point.attribution.advice}


def row(point: Point) -> dict[str, Any]:
  """A line of points.csv."""
  summary = point.summary
  share, low, high = summary.attainment
  return {
      'placement': point.placement, 'policy': point.policy,
      'seed': point.seed, 'rate_per_s': point.rate_per_s,
      'scale': point.scale, 'batch': point.batch,
      'devices': summary.num_devices, 'requests': len(point.kept),
      'attained': share, 'low': low, 'high': high, **{
          f'{name}_p{q}_s': value_s for name in ('ttft', 'tpot', 'itl')
          for q, value_s in zip(metrics.QUANTILES, getattr(
              summary, f'{name}_s'), strict=True)},
      'tokens_per_s': summary.tokens_per_s,
      'preemptions': summary.preemptions, 'unsteady': point.unsteady}
