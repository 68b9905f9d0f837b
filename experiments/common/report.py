"""What a person looks at after a run: records, tables, verdict, figure.

Pure rendering of Records and Summaries; the only effects are the files that
save_* write. The timeline of a run is in dsjax.analysis.
"""

import bisect
import json
import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from rich.console import Group
from rich.table import Table

from dsjax.analysis.metrics import Summary, slo_scale
from dsjax.analysis.record import STAGES, Record
from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.scheduling import event_log
from dsjax.scheduling.events import Command, Event
from dsjax.workload import json_lines
from experiments.common import pictures

# Of an event log: an event, and the commands that answer it.
Entry: TypeAlias = tuple[Event, tuple[Command, ...]]

# --- records ----------------------------------------------------------------


def save_records(path: str | pathlib.Path, records: Iterable[Record],
                 modes: Sequence[str] | None = None) -> None:
  """Writes the row of each Record as a line of JSON.

  Args:
    modes: None, or the mode of each record, written beside it.
  """
  with open(path, 'w', encoding='utf-8') as file:
    for i, r in enumerate(records):
      row = {'mode': modes[i]} if modes else {}
      file.write(json.dumps(row | r.row()) + '\n')


def save_log(path: str | pathlib.Path, log: Iterable[Entry]) -> None:
  """Writes an event log: a line of JSON for each (event, commands)."""
  with open(path, 'w') as file:
    file.writelines(json.dumps(event_log.encode(pair)) + '\n' for pair in log)


def load_log(path: str | pathlib.Path) -> list[Entry]:
  """Reads what save_log wrote.

  Raises:
    InputError naming the file and the line.
  """
  log = []
  with open(path, encoding='utf-8') as file:
    for number, line in enumerate(file, 1):
      try:
        event, commands = event_log.decode(json.loads(line))
      except (ValueError, TypeError) as error:  # InputError too
        raise InputError(f'{path}, line {number}: {error}') from error
      log.append((event, commands))
  return log


def load_records(path: str | pathlib.Path) -> list[Record]:
  """Reads what save_records wrote.

  Raises:
    InputError naming the file and the line.
  """
  records = []
  for line, row in json_lines(path):
    try:
      records.append(Record.of_row(row))
    except KeyError as error:
      raise InputError(f'{path}, line {line}: must have {error.args[0]}'
                       ) from error
  return records


# --- tables -----------------------------------------------------------------


def _number(value, digits=3):
  if value is None or not math.isfinite(value):
    return '-'
  if value == 0:
    return '0'
  if 1e-3 <= abs(value) < 1e6:
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f'{value:,.{places}f}'
  return f'{value:.{digits - 1}e}'


def _percent(value):
  return '-' if math.isnan(value) else f'{100 * value:.1f} %'


def _table(title, results, rows):
  table = Table(title=title, title_justify='left')
  table.add_column('')
  for mode, _, _ in results:
    table.add_column(mode, justify='right')
  for label, cell in rows:
    table.add_row(label, *(cell(s, extra) for _, s, extra in results))
  return table


def _attained(s):
  share, low, high = s.attainment
  return f'{_percent(share)} [{100 * low:.0f}, {100 * high:.0f}]'


def _times_ms(field, index):
  return lambda s, _: _number(1e3 * getattr(s, field)[index])


def _stage_ms(stage):
  return lambda s, _: _number(1e3 * s.stage_s[stage])


def _gb_per_s(extra):
  seconds = extra.get('kv_s')
  return extra.get('kv_bytes', 0) / seconds / 1e9 if seconds else None


def _scaled(key, factor):
  return lambda _, extra: (_number(extra[key] * factor)
                           if extra.get(key) is not None else '-')


def tables(results: Sequence[tuple[str, Summary, Mapping[str, Any]]]
           ) -> Group:
  """Comparison of modes, a column each.

  Args:
    results: [(mode, Summary, extra), ...]; extra may hold kv_bytes (moved),
      kv_s (seconds that moving them took), host_s_per_step, bubbles (of
      each instance of several pipeline stages, see timeline.bubbles).

  Returns:
    A rich renderable.
  """
  latency = [
      (f'{name} p{q} ms', _times_ms(field, index))
      for name, field in (('TTFT', 'ttft_s'), ('TPOT', 'tpot_s'),
                          ('ITL', 'itl_s'), ('1st gap', 'second_s'))
      for index, q in enumerate((50, 90, 99))]
  service = [
      ('requests', lambda s, _: str(sum(s.counts.values()))),
      ('not served', lambda s, _: ', '.join(
          f'{n} {status}' for status, n in sorted(s.counts.items())
          if status not in ('stop', 'length')) or '0'),
      ('attained [95 %]', lambda s, _: _attained(s)),
      ('TTFT attained', lambda s, _: _percent(s.ttft_share)),
      ('TPOT attained', lambda s, _: _percent(s.tpot_share)),
      ('devices', lambda s, _: str(s.num_devices)),
      ('goodput req/s', lambda s, _: _number(s.goodput_per_s)),
      ('  per device', lambda s, _: _number(s.goodput_per_s_device)),
      ('output tok/s', lambda s, _: _number(s.tokens_per_s)),
  ]
  spent = [(f'{stage} ms', _stage_ms(stage)) for stage in STAGES]
  spent += [
      ('preemptions', lambda s, _: str(s.preemptions)),
      ('KV moved MB', _scaled('kv_bytes', 1e-6)),
      ('KV GB/s', lambda _, extra: _number(_gb_per_s(extra))),
      ('host us a step', _scaled('host_s_per_step', 1e6)),
  ]
  if any(s.retries for _, s, _ in results):
    spent.append(('retries after faults', lambda s, _: str(s.retries)))
  if any(extra.get('bubbles') for _, _, extra in results):
    spent.append(('pipeline bubble', lambda _, extra: ' '.join(
        _percent(x) for x in extra.get('bubbles', {}).values()) or '-'))
  return Group(_table('Service', results, service),
               _table('Latency', results, latency),
               _table('Where a request spends its time (mean)', results,
                      spent))


def _dominant(summary):
  """(stage, its share) where a request spends the most time."""
  total = sum(summary.stage_s.values())
  if not total > 0:
    return None
  stage = max(STAGES, key=summary.stage_s.get)
  return stage, summary.stage_s[stage] / total


def _fastest(results, name, field):
  """Says which mode has the lowest p90 of a latency."""
  known = [(getattr(s, field)[1], mode) for mode, s, _ in results
           if math.isfinite(getattr(s, field)[1])]
  if len(known) < 2:
    return ''
  (best_s, mode), (next_s, other) = sorted(known)[:2]
  if next_s <= 1.02 * best_s:
    return f' {name} p90 is alike ({_number(1e3 * best_s)} ms).'
  return (f' {name} p90 is lowest in {mode}: {_number(1e3 * best_s)} ms, '
          f'against {_number(1e3 * next_s)} ms in {other}.')


def _why(best, other):
  """Says which objective the second mode misses more often, and in which of
  its stages."""
  (mode, fast, _), (name, slow, _) = best, other
  # Stages up to the first token make TTFT, those after it TPOT.
  which, share, stages = min(('TTFT', slow.ttft_share, STAGES[:2]),
                             ('TPOT', slow.tpot_share, STAGES[2:]),
                             key=lambda x: x[1])
  more_s = {s: slow.stage_s[s] - fast.stage_s[s] for s in stages}
  stage = max(stages, key=lambda name: more_s[name])
  text = f' {name} misses {which} more often ({_percent(share)} meet it)'
  if more_s[stage] > 0:
    text += (f': a request spends {_number(1e3 * more_s[stage])} ms more in '
             f'{stage} than in {mode}')
  return text + '.'


def _unsteady(results):
  text = ''
  for mode, s, _ in results:
    early, late = s.halves
    # Two standard errors of the difference, at their largest.
    if early - late > max(0.05, 2 / math.sqrt(sum(s.counts.values()) or 1)):
      text += (f' {mode} fell from {_percent(early)} attained in the first '
               f'half to {_percent(late)} in the second: not a steady state; '
               'a longer run would show less.')
  return text


def verdict(results: Sequence[tuple[str, Summary, Mapping[str, Any]]]
            ) -> str:
  """Which mode won, by how much and why, in a sentence or more.

  By goodput per device; no winner where the intervals overlap, or where the
  two best attain 90 % or more, since their goodput is then the rate sent.

  Args:
    results: as in tables().
  """
  ranked = sorted((r for r in results if math.isfinite(r[1].goodput_per_s)),
                  key=lambda r: -r[1].goodput_per_s_device)
  if not ranked:
    return 'Nothing was measured.'
  best, summary, _ = ranked[0]
  goodput = summary.goodput_per_s_device
  if goodput == 0:
    text = 'No request met both objectives in any mode.'
  elif len(ranked) == 1:
    text = (f'{best}: {_attained(summary)} of requests met both objectives, '
            f'{_number(goodput)} requests/s per device.')
  else:
    other, second, _ = ranked[1]
    ours, theirs = (s.goodput_interval_per_s_device
                    for s in (summary, second))
    latency = (_fastest(results, 'TTFT', 'ttft_s')
               + _fastest(results, 'TPOT', 'tpot_s'))
    if min(summary.attainment[0], second.attainment[0]) >= 0.9:
      text = (f'No clear winner: {best} and {other} both attain 90 % or more, '
              'so goodput only repeats the rate sent; send more to tell them '
              f'apart.{latency}')
    elif ours[0] <= theirs[1]:
      low, high, low2, high2 = map(_number, (*ours, *theirs))
      text = (f'No clear winner: goodput per device of {best}, '
              f'[{low}, {high}] requests/s, and of {other}, [{low2}, {high2}], '
              f'overlap.{latency}')
    else:
      other_goodput = second.goodput_per_s_device
      ratio = (f'{goodput / other_goodput:.2f} times the '
               f'{_number(other_goodput)} of {other}' if other_goodput
               else f'where {other} has none')
      text = (f'{best} wins: goodput of {_number(goodput)} requests/s per '
              f'device, {ratio}.{_why(ranked[0], ranked[1])}')
  dominant = _dominant(summary)
  if dominant:
    text += (f' In {best}, {dominant[0]} takes the most of a request\'s time '
             f'({_percent(dominant[1])}).')
  return text + _unsteady(results)


# --- figure -----------------------------------------------------------------

_MODES = ('disaggregated', 'colocated', 'chunked')
STAGE_LOOKS = {stage: {'color': colour, 'hatch': hatch, 'edgecolor': 'white'}
               for stage, colour, hatch in zip(STAGES, (
                   '#f5d2a0', '#e0912f', '#c2417c', '#a8cdea', '#3a86c8'),
                   pictures.HATCHES, strict=False)}
_BELOW: dict[str, Any] = {
    'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.17), 'ncols': 5,
    'frameon': False, 'fontsize': 8, 'handlelength': 2.4, 'columnspacing': 1.2}


def _numbers(modes):
  """{mode: number of its look}, the same for a mode in every picture."""
  return {mode: n for n, mode in enumerate(dict.fromkeys((*_MODES, *modes)))}


def _looks(modes):
  """{mode: colour and dashes} of lines without markers."""
  numbers = _numbers(modes)
  return {mode: {key: value for key, value in pictures.look(
      numbers[mode]).items() if key != 'marker'} for mode in modes}


def _ms(value, _):
  return f'{1e3 * value:,.0f}' if value >= 1e-3 else f'{1e3 * value:g}'


def _cdf(axes, results, field, limit_s, looks):
  """Share of requests sent at or below each latency; misses stay out."""
  top = [limit_s] if math.isfinite(limit_s) else [1e-3]
  for mode, records in results:
    sent = [r for r in records if r.status != 'cancelled']
    values = sorted(v for v in (getattr(r, field) for r in sent)
                    if v is not None)
    if values:
      shares = [100 * (i + 1) / len(sent) for i in range(len(values))]
      axes.step([values[0], *values], [0, *shares], where='post', label=mode,
                **looks[mode], linewidth=1.8)
      top += [v for v in (values[0], values[-1]) if v > 0]
  if max(top) > 30 * min(top):
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.set_xlim(min(top) / 1.2, max(top) * 1.4)
  else:
    axes.set_xlim(0, max(top) * 1.2)  # room for the label of the SLO
  if math.isfinite(limit_s):
    axes.axvline(limit_s, color='black', linestyle='--', linewidth=1)
    axes.annotate(f'SLO {1e3 * limit_s:,.4g} ms', (limit_s, 4), fontsize=8,
                  xytext=(4, 0), textcoords='offset points',
                  bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})
  axes.xaxis.set_major_formatter(FuncFormatter(_ms))
  axes.set_ylim(0, 103)
  axes.set_xlabel(f'{field[:4].upper()} (ms)')
  axes.set_ylabel('% of requests sent')


def _scale_curve(axes, results, slo, looks):
  """Share attained when both objectives are scaled: DistServe's Fig. 8."""
  scales = [2 ** (k / 64) for k in range(-192, 193)]
  for mode, records in results:
    needs = sorted(slo_scale(r, slo) for r in records
                   if r.status != 'cancelled')
    if needs:
      shares = [100 * bisect.bisect(needs, x) / len(needs) for x in scales]
      axes.step(scales, shares, where='post', label=mode,
                **looks[mode], linewidth=1.8)
  axes.axhline(90, color='black', linestyle=':', linewidth=1)
  axes.axvline(1, color='black', linestyle='--', linewidth=1)
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}x'))
  axes.set_ylim(0, 103)
  axes.set_xlabel('factor on both SLOs (left: tighter)')
  axes.set_ylabel('% attained')


def _stage_bars(axes, results):
  """Mean seconds in each stage of the requests that ended by themselves."""
  for y, (_, records) in enumerate(results):
    done = [r for r in records if r.status in ('stop', 'length')]
    left, parts = 0.0, []
    for stage in STAGES:
      mean_s = sum(r.stage_s[stage] for r in done) / max(1, len(done))
      axes.barh(y, mean_s, left=left, height=0.55, **STAGE_LOOKS[stage],
                label=stage.replace('_', ' ') if y == 0 else None)
      left += mean_s
      parts.append(f'{1e3 * mean_s:,.3g}' if mean_s < 1 else
                   f'{1e3 * mean_s:,.0f}')
    axes.text(0, y - 0.32, f' {" + ".join(parts)} ms', fontsize=8)
  axes.set_yticks(range(len(results)), [mode for mode, _ in results])
  axes.set_ylim(len(results) - 0.4, -0.6)
  axes.set_xlabel('mean seconds a request spends in each stage')
  axes.set_xlim(left=0)
  if results:
    axes.legend(**_BELOW)


_LOST = 'x+1234'  # a marker a mode, of requests that got no token


def over_time(axes: Axes, results: Sequence[tuple[str, Sequence[Record]]],
              field: str, limit_s: float) -> None:
  """A latency by arrival time; at the top, those that got no token.

  results: [(mode, records), ...]. field: ttft_s or tpot_s.
  """
  numbers = _numbers(mode for mode, _ in results)
  for mode, records in results:
    seen = [r for r in records if r.token_s]
    lost = [r.arrival_s for r in records if not r.token_s]
    axes.plot([r.arrival_s for r in seen], [getattr(r, field) for r in seen],
              **(pictures.look(numbers[mode]) | {'linestyle': ''}),
              markersize=3, label=mode)
    if lost:
      axes.plot(lost, [0.97] * len(lost), color='#b02a1c', linestyle='',
                marker=_LOST[numbers[mode] % len(_LOST)], markersize=5,
                label=f'{mode}: no token',
                transform=axes.get_xaxis_transform())
  if math.isfinite(limit_s):
    axes.axhline(limit_s, color='black', linestyle='--', linewidth=1)
  axes.set_ylim(bottom=0)
  axes.yaxis.set_major_formatter(FuncFormatter(_ms))
  axes.set_xlabel('arrival (s)')
  axes.set_ylabel(f'{field[:4].upper()} (ms)')
  axes.legend(**_BELOW)


def save_figure(path: str | pathlib.Path,
                results: Sequence[tuple[str, Sequence[Record]]], slo: Slo,
                title: str = '') -> None:
  """Draws the latencies, attainment and stages of each mode to a PNG.

  Records of a client have no stages: TTFT over time is drawn instead.

  Args:
    results: [(mode, records), ...]. slo: Slo. title: what was run.
  """
  figure = Figure(figsize=(11, 7.6), layout='constrained')
  (ttft, tpot), (stages, scale) = figure.subplots(2, 2)
  looks = _looks([mode for mode, _ in results])
  _cdf(ttft, results, 'ttft_s', slo.ttft_s, looks)
  _cdf(tpot, results, 'tpot_s', slo.tpot_s, looks)
  _scale_curve(scale, results, slo, looks)
  staged = any(s for _, records in results for r in records
               for s in r.stage_s.values())
  if staged or not any(records for _, records in results):
    _stage_bars(stages, results)
  else:
    over_time(stages, results, 'ttft_s', slo.ttft_s)
  for axes, name in ((ttft, 'Time to first token'),
                     (tpot, 'Time per output token'),
                     (stages, 'Where the time goes' if staged else 'Over time'),
                     (scale, 'Attainment as the SLOs change')):
    axes.set_title(name, loc='left', fontsize=10, fontweight='bold')
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)
  if scale.get_legend_handles_labels()[0]:
    scale.legend(**_BELOW)
  figure.suptitle(textwrap.fill(title, 125), x=0.01, ha='left', fontsize=10)
  pictures.save(figure, path)
