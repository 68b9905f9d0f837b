"""How the figures of figures.py and end_to_end.py look.

draw(data, figure): data as computed, figure a matplotlib Figure.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dsjax.analysis.record import STAGES
from experiments.common import pictures
from experiments.paper import reported

# The same system, or its part in another figure, looks the same.
LOOKS = {label: pictures.look(number) for number, labels in enumerate((
    ('DistServe', 'DistServe-Low'), ('vLLM',), ('chunked',),
    ("vLLM's plan, DistServe's engine", 'colocated'),
    ('tuned colocated', 'vLLM++'), ('tuned chunked',), ('DistServe-High',)))
         for label in labels}
PUBLISHED = {'vLLM': '+'}  # marks of published points; others have x
STAGE_LOOKS = {stage: pictures.fill(number) for number, stage in
               enumerate(STAGES)}


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
  axes.set_title(title, fontsize=10)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)


def draw1(data: Mapping[str, Any], figure: Figure) -> None:
  axes = figure.subplots()
  names = [*reported.FIG1, 'chunked']
  x = np.arange(len(names))
  for column, (label, values) in enumerate((
      ('paper', data['paper']),
      ('paper rules', {k: v[0] for k, v in data['rules'].items()}),
      ('ours', {k: v[0] for k, v in data['ours'].items()}
       | {'chunked': data['chunked'][0]}))):
    bars = axes.bar(x + 0.27 * (column - 1),
                    [values.get(n, np.nan) for n in names], 0.25, label=label,
                    **pictures.fill(column))
    axes.bar_label(bars, fmt='%.3g', fontsize=8)
  axes.set_xticks(x, [n.replace(' + ', '\n+ ') for n in names])
  axes.legend()
  tidy(axes, 'Fig. 1: OPT-13B on A100s, 512 tokens in, 64 out, TTFT 0.4 s and '
       'TPOT 0.04 s for 90 %', '', 'goodput, requests/s per device')


def draw3(data: Mapping[str, Any], figure: Figure) -> None:
  left, right = figure.subplots(1, 2)
  for i, n in enumerate(data['prefill']):
    for name, style in (('published', '-'), ('roofline', ':')):
      look = pictures.look(i) | {'linestyle': style}
      left.plot(data['batches'], data['prefill'][n][name], **look, ms=3,
                label=f'{n} tokens' if style == '-' else None)
      right.plot(data['wide'], data['decode'][n][name], **look, ms=3,
                 label=f'context {n}' if style == '-' else None)
    batch, value = reported.FIG3[n]
    left.plot(batch, value, **pictures.look(i), ms=9, fillstyle='none')
  for axes, title in ((left, 'Fig. 3a: prefill'), (right, 'Fig. 3b: decode')):
    axes.set_xscale('log', base=2)
    axes.set_ylim(bottom=0)
    axes.legend(title='line: profile, dotted: roofline,\nhollow: the paper'
                if axes is left else 'line: profile\ndotted: roofline',
                fontsize=8, title_fontsize=8)
    tidy(axes, title + ' of OPT-13B on one A100', 'batch', 'tokens/s')


def draw4(data: Mapping[str, Any], figure: Figure) -> None:
  for axes, (name, curve) in zip(figure.subplots(1, 2, sharey=True),
                                 data['curves'].items(), strict=True):
    for column, which in enumerate(('intra', 'inter')):
      look = pictures.look(column)
      axes.plot(data['rates'], curve[which], **look | {'marker': ''},
                label=f'{which}-op, Eq. {3 - column}')
      rates, means, halves = zip(*(
          (rate, *pair[column]) for rate, *pair in curve['dots']), strict=True)
      axes.errorbar(rates, means, halves, **look | {'linestyle': ''},
                    capsize=3, ms=4, label=f'{which}-op, simulated, 95 %')
    if name == 'paper':
      axes.plot(*reported.FIG4['intra'], '^', color='black',
                label='paper: intra-op is above')
      axes.plot(*reported.FIG4['inter'], 'v', color='black',
                label='paper: inter-op is below')
    axes.axvline(curve['crossover'], color='grey', ls='--', lw=1)
    axes.set_ylim(0, 1.5)
    axes.legend(fontsize=8)
    tidy(axes, ("Fig. 4, D and K of the paper's figure" if name == 'paper'
                else 'D and K of the released profile')
         + f': {curve["d"]:.2f} s, {curve["k"]:.2f}', 'requests/s',
         'mean TTFT, s')


def draw5(data: Mapping[str, Any], figure: Figure) -> None:
  left, right = figure.subplots(1, 2)
  for name, points in data['curves'].items():
    source, kind = name.split()
    look = pictures.look(('intra', 'inter').index(kind)) | {
        'linestyle': '-' if source == 'profile' else ':'}
    for axes, at in ((left, 0), (right, 1)):
      axes.plot(list(points), [v[at] for v in points.values()], **look,
                ms=4, label=f'{kind}-op, {source}')
  left.plot(list(reported.FIG5_INTRA_MS), reported.FIG5_INTRA_MS.values(), 'k^',
            label='paper, intra-op')
  for mark, (kind, x) in zip('v^', reported.FIG5_TOKENS.items(), strict=True):
    right.plot(list(x), x.values(), f'k{mark}', label=f'paper, {kind}-op')
  for axes, title, y in ((left, 'latency of a step', 'ms'),
                         (right, 'throughput', 'tokens/s')):
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)
    axes.legend(fontsize=8, ncols=2, loc='upper left')
    tidy(axes, f'Fig. 5: {title}, OPT-13B decode, batch 128, input 256',
         'GPUs', y)


def draw10(data: Mapping[str, Any], figure: Figure) -> None:
  left, right = figure.subplots(1, 2, width_ratios=(3, 2))
  names = {'paper': 'rules', 'ours': 'ours'}
  x = np.arange(len(data['rates']))
  for column, who in enumerate(('published', 'paper', 'ours')):
    below = np.zeros(len(x))
    for stage in STAGES:
      values = []
      for rate in data['rates']:
        if who == 'published':
          a, b, c = reported.FIG10[rate]
          values.append({'prefill_queue': a, 'prefill': b, 'decode_queue': c,
                         'migrate': 0, 'decode': 100 - a - b - c}[stage])
        else:
          values.append(data['shares'][f'{who} {rate}'][stage])
      left.bar(x + 0.28 * (column - 1), values, 0.26, below,
               **STAGE_LOOKS[stage],
               label=stage.replace('_', ' ') if column == 0 else None)
      below += values
    for i in x:
      left.text(i + 0.28 * (column - 1), 101, names.get(who, 'paper'),
                fontsize=6, ha='center', rotation=45)
  left.set_xticks(x, data['rates'])
  left.set_ylim(0, 112)
  tidy(left, 'Fig. 10a: where a request spends its time, OPT-175B',
       'requests/s per device', '% of time')
  for number, (name, values) in enumerate((
      ('9 links', data['kv']), ('one link, with waiting', data['copies']))):
    right.plot([1e3 * v for v in values], np.linspace(0, 100, len(values)),
               **pictures.look(number) | {'marker': ''}, label=f'ours, {name}')
  right.plot([1e3 * k for k in reported.FIG10_CDF], reported.FIG10_CDF.values(),
             'k^', label='paper')
  right.set_xscale('log')
  tidy(right, 'Fig. 10b: KV transfer time', 'ms', '% of requests')
  _legend_above(figure)


def draw12(data: Mapping[str, Any], figure: Figure) -> None:
  axes = figure.subplots()
  axes.plot(list(reported.FIG12), list(reported.FIG12.values()), 'k--^',
            label="paper's draft, 96 cores, seconds")
  for number, (name, points) in enumerate(data['spent'].items()):
    axes.plot(list(points), [v[0] for v in points.values()],
              **pictures.look(number) | {'linestyle': '-:'[number]},
              label=f'ours, {name}, CPU seconds')
  axes.set_xscale('log', base=2)
  axes.set_xticks(list(reported.FIG12), [str(gpus) for gpus in reported.FIG12])
  axes.set_yscale('log')
  axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
  axes.legend()
  tidy(axes, 'Fig. 12: time of a placement search, OPT-13B', 'GPUs', 's')


def draw_end_to_end(data: Mapping[str, Any], figure: Figure) -> None:
  parts = data['parts']
  figure.set_size_inches(13, 3.1 * len(parts))
  for line, part in zip(figure.subplots(len(parts), 4, squeeze=False), parts,
                        strict=True):
    case = reported.CASES[part['case']]
    for column, who in enumerate(('paper', 'ours')):
      for key, points in part['curves'].items():
        rules, label = key.split('|')
        if rules == who:
          _draw_system(line[column], line[2 + column], label, points,
                       part['scales'][key])
      for label, (rates, values) in case.curves.items():
        line[column].plot(rates, values, PUBLISHED.get(label, 'x'), ms=5,
                          color=LOOKS[label if label in LOOKS else 'chunked'][
                              'color'], label=f'published, {label}')
      for axes, value in ((line[column], case.goodput[0]),
                          (line[2 + column], case.scale[0])):
        axes.axvline(value, color=LOOKS['DistServe']['color'], ls=':', lw=1,
                     label='published, DistServe at 90 %')
      rules = 'paper rules' if who == 'paper' else 'ours'
      tidy(line[column], f'{case.title}: {rules}', 'requests/s per device',
           '% met both')
      tidy(line[2 + column], f'{rules}, {case.scale_rate}/s per device',
           'scale of both objectives', '% met both')
      line[2 + column].set_xscale('log')
    for axes in line:
      axes.axhline(90, color='grey', lw=0.8, ls='--')
      axes.set_ylim(0, 103)
  _legend_above(figure)


def _legend_above(figure):
  """One legend for all that is drawn; below is what the lengths are."""
  labels: dict = {}
  for axes in figure.axes:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      labels.setdefault(label, handle)
  figure.legend(labels.values(), labels, fontsize=8, ncols=5,
                loc='outside upper right')


def _draw_system(left, right, label, points, scales):
  rates, shares, lows, highs = zip(*points, strict=True)
  look = LOOKS[label]
  left.plot(rates, [100 * s for s in shares], ms=3, label=label, **look)
  left.fill_between(rates, [100 * x for x in lows], [100 * x for x in highs],
                    color=look['color'], alpha=0.12, lw=0, label='95 %')
  right.plot(*zip(*((f, 100 * s) for f, s in scales), strict=True), ms=3,
             **look)


def draw_rules(data: Mapping[str, Any], figure: Figure) -> None:
  axes = figure.subplots()
  for number, row in enumerate(data['rows']):
    axes.plot(data['columns'], list(map(float, row[1:])), label=row[0],
              **pictures.look(number))
  axes.legend(fontsize=8)
  tidy(axes, "Between the paper's rules and ours", '', 'requests/s per device')


def draw_causes(data: Mapping[str, Any], figure: Figure) -> None:
  figure.set_size_inches(11, 1.2 + 0.3 * len(data['bars']))
  axes = figure.subplots()
  for y, (_, published, mean, low, high) in enumerate(data['bars']):
    axes.barh(y, mean, 0.6, **pictures.fill(0),
              label=None if y else 'simulated; the least and the most seed')
    axes.plot((low, high), (y, y), 'k-|', lw=1)
    axes.plot([published], [y], 'D', color=pictures.COLOURS[1],
              label=None if y else 'published')
  axes.set_yticks(range(len(data['bars'])), [b[0] for b in data['bars']])
  axes.invert_yaxis()
  axes.legend(fontsize=8, loc='lower right')
  tidy(axes, "Between the paper's values and its rules, a change at a time",
       'requests/s per device', '')


def draw11(data: Mapping[str, Any], figure: Figure) -> None:
  for axes, who in zip(figure.subplots(1, 2, sharey=True), ('paper', 'ours'),
                       strict=True):
    for key, points in data['curves'].items():
      rules, label = key.split('|')
      if rules == who:
        axes.errorbar([p[0] for p in points], [100 * p[1] for p in points],
                      [[100 * (p[1] - p[2]) for p in points],
                       [100 * (p[3] - p[1]) for p in points]],
                      ms=3, capsize=2, label=label, alpha=0.8,
                      **LOOKS[label])
    for name, values in reported.FIG11.items():
      axes.plot(reported.FIG11_RATES, values, PUBLISHED.get(name, 'x'),
                color=LOOKS[name]['color'], label=f'published draft, {name}')
    axes.axhline(90, color='grey', lw=0.8, ls='--')
    axes.set_ylim(0, 103)
    tidy(axes, 'Fig. 11: ablation, OPT-66B ShareGPT, 0.4 s and 0.1 s: '
         + ('paper rules' if who == 'paper' else 'ours'),
         'requests/s per device', '% met both, with 95 %')
  _legend_above(figure)


def draw_table2(data: Mapping[str, Any], figure: Figure) -> None:
  axes = figure.subplots()
  for column, name in ((0, 'vLLM'), (2, 'DistServe-Low')):
    axes.plot([v[column] for v in reported.TABLE2.values()],
              [v[column + 1] for v in reported.TABLE2.values()],
              'v' if column == 0 else '^', ms=5,
              color='tab:red' if column == 0 else 'tab:blue',
              label=f'paper, {name}')
  for mark, name in zip(itertools.cycle('osDPX*hp'), sorted(
      {p[0] for p in data['points']}), strict=False):
    axes.plot(*zip(*((p[2], p[3]) for p in data['points'] if p[0] == name),
                   strict=True), mark, mfc='none',
              color='tab:red' if 'vLLM' in name or 'colocated' in name else
              'tab:green' if 'chunked' in name else 'tab:blue',
              label=f'our simulator, {name}')
  axes.plot((0, 100), (0, 100), color='grey', lw=0.8)
  axes.legend(fontsize=8)
  tidy(axes, 'Table 2: attainment, simulated against measured', 'measured, %',
       'simulated, %')


def draw_table3(data: Mapping[str, Any], figure: Figure) -> None:
  axes = figure.subplots()
  for y, (_, published, same, best, theirs, ours) in enumerate(data['bars']):
    for number, (label, text, value, *interval) in enumerate((
        ('published goodput', theirs, published),
        ("paper's placement, simulated, 95 %", theirs, *same),
        ('best found, simulated, 95 %', ours, *best))):
      at = y + .27 * (number - 1)
      axes.barh(at, value, 0.24, **pictures.fill(number),
                label=None if y else label)
      # One without an upper end is drawn as long as twice the bar, with a >.
      ends = [2 * value if math.isinf(x) else x for x in interval]
      axes.plot(ends, [at] * len(ends), 'k-|', lw=1)
      if math.inf in interval:
        axes.plot(ends[-1:], [at], 'k>', ms=6)
      # Behind the bar and its interval, so that neither hides a letter.
      axes.annotate(text, (max(value, *ends, 0), at), (6, 0), fontsize=7,
                    textcoords='offset points', va='center')
  axes.set_yticks(range(len(data['bars'])), [b[0] for b in data['bars']])
  axes.invert_yaxis()
  axes.set_xlim(right=1.2 * axes.get_xlim()[1])
  axes.legend(fontsize=8, loc='lower right')
  tidy(axes, 'Table 3: placements', 'goodput, requests/s per device', '')
