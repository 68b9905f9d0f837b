"""Records on disk, tables, verdicts and the figure."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console
from rich.measure import Measurement

from dsjax.analysis.metrics import summarize
from dsjax.analysis.record import STAGES, Record
from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from experiments.common import pictures, report
from tests.common.legible import alike

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def _record(i, ttft_s=0.5, gap_s=0.05, status='length', **kwargs):
  token_s = [i + ttft_s + gap_s * k for k in range(3)]
  stage_s = dict(zip(STAGES, (ttft_s - 0.25, 0.25, 0, 0, 2 * gap_s),
                     strict=True))
  return Record(i, float(i), 4, 3, token_s, stage_s, token_s[-1], status,
                **kwargs)


def test_records_round_trip(tmp_path):
  path = tmp_path / 'records.jsonl'
  records = [_record(0, preemptions=2, migrated_tokens=9, instances=(0, 3)),
             _record(1, ttft_s=1 / 3), Record(2, 0.1, 1, 1),
             Record(3, 0.1, 1, 1, status='rejected', reason='no "room"\n')]
  report.save_records(path, records)
  assert report.load_records(path) == records
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows[0]['ttft_s'] == records[0].ttft_s
  assert rows[0]['tpot_s'] == records[0].tpot_s
  assert rows[2]['ttft_s'] is None
  path.write_text(path.read_text() + '{"id": 5, "arrival_s": 0}\n')
  with pytest.raises(InputError, match='line 5: must have prompt_len'):
    report.load_records(path)


def _result(mode, hits, n=400, devices=1, extra=None, **kwargs):
  """A result in which `hits` of n requests attain, evenly spread."""
  records = [_record(i) if (i * hits) % n < hits else _record(i, **kwargs)
             for i in range(n)]
  return mode, summarize(records, SLO, devices), extra or {}


def _text(renderable):
  console = Console(file=io.StringIO(), width=120)
  console.print(renderable)
  return console.file.getvalue()


def test_tables():
  text = _text(report.tables([
      _result('disaggregated', 400, extra={
          'kv_bytes': 3e9, 'kv_s': 0.5, 'host_s_per_step': 120e-6}),
      _result('colocated', 200, devices=2, ttft_s=2.0)]))
  rows = {}
  for line in text.splitlines():
    cells = [c.strip() for c in line.split('│')]
    if len(cells) == 5:
      rows[cells[1]] = cells[2:4]
  assert rows['TTFT p50 ms'] == ['500', '1,250']
  assert rows['TTFT p90 ms'] == ['500', '2,000']
  assert rows['TPOT p99 ms'] == ['50.0', '50.0']
  assert rows['attained [95 %]'][1].startswith('50.0 % [45,')
  assert rows['devices'] == ['1', '2']
  assert rows['per device'] == ['1.00', '0.249']
  assert rows['prefill_queue ms'] == ['250', '1,000']
  assert rows['migrate ms'] == ['0', '0']
  assert rows['KV moved MB'] == ['3,000', '-']
  assert rows['KV GB/s'] == ['6.00', '-']
  assert rows['host us a step'] == ['120', '-']


def test_the_tables_of_three_modes_fit_80_columns():
  extra = {'kv_bytes': 3e9, 'kv_s': 0.5, 'host_s_per_step': 120e-6,
           'bubbles': {0: 0.1, 1: 0.25}}
  shown = report.tables([_result(mode, 400, extra=extra) for mode in (
      'disaggregated', 'colocated', 'chunked')])
  console = Console(width=200)
  assert Measurement.get(console, console.options, shown).maximum <= 80


def test_tables_of_nothing():
  empty = ('colocated', summarize([], SLO, 1), {})
  assert 'nan' not in _text(report.tables([empty]))
  assert 'Service' in _text(report.tables([]))


def test_verdict_names_the_winner_and_why():
  text = report.verdict([_result('colocated', 120, ttft_s=2.0),
                         _result('disaggregated', 360, gap_s=0.3)])
  assert text.startswith('disaggregated wins: goodput of 0.90')
  assert '3.0' in text and 'of colocated' in text
  assert ('colocated misses TTFT more often (30.0 % meet it): a request '
          'spends 1,050 ms more in prefill_queue than in disaggregated'
          ) in text
  assert 'prefill takes the most' in text or 'prefill_queue takes' in text


def test_verdict_sees_no_winner_where_intervals_overlap():
  text = report.verdict([_result('chunked', 200, ttft_s=2.0),
                         _result('colocated', 210, gap_s=0.2)])
  assert text.startswith('No clear winner: goodput per device of colocated')
  assert 'TTFT p90 is lowest in colocated: 500 ms, against 2,000 ms' in text
  assert 'TPOT p90 is lowest in chunked' in text


def test_verdict_does_not_praise_fewer_devices_at_a_low_rate():
  text = report.verdict([_result('disaggregated', 400, devices=2),
                         _result('colocated', 400)])
  assert text.startswith('No clear winner: colocated and disaggregated both')
  assert 'TTFT p90 is alike (500 ms)' in text


def test_verdict_of_one_none_and_all_missed():
  assert report.verdict([]) == 'Nothing was measured.'
  empty = ('chunked', summarize([], SLO, 1), {})
  assert report.verdict([empty]) == 'Nothing was measured.'
  text = report.verdict([_result('chunked', 100, ttft_s=3.0), empty])
  assert text.startswith('chunked: 25.0 % [')
  text = report.verdict([_result('chunked', 0, ttft_s=3.0)] * 2)
  assert text.startswith('No request met both')
  text = report.verdict([_result('chunked', 100, ttft_s=3.0),
                         _result('colocated', 0, ttft_s=3.0)])
  assert 'where colocated has none' in text


def test_verdict_warns_of_a_run_that_was_not_steady():
  _, summary, _ = _result('chunked', 200, ttft_s=3.0)
  assert 'steady' not in report.verdict([('chunked', summary, {})])
  falling = dataclasses.replace(summary, halves=(0.9, 0.6))
  text = report.verdict([('chunked', falling, {})])
  assert ('chunked fell from 90.0 % attained in the first half to 60.0 % in '
          'the second') in text


@pytest.mark.parametrize('results', [
    [],
    [('colocated', [])],
    [('a', [Record(0, 0.0, 1, 1)]), ('b', [_record(0, status='cancelled')])],
    [('disaggregated', [_record(i, 0.3 + i / 9) for i in range(20)]),
     ('colocated', [_record(i, 0.0) for i in range(9)]),
     ('chunked', [_record(i, 40.0) for i in range(9)]),
     ('other', [_record(0)])],
])
def test_figure_is_drawn(tmp_path, results):
  path = tmp_path / 'report.png'
  report.save_figure(path, results, SLO, 'What was run')
  assert path.read_bytes().startswith(b'\x89PNG')
  assert path.with_suffix('.pdf').read_bytes().startswith(b'%PDF')


def test_a_mode_keeps_its_look_which_is_told_apart_in_grey():
  alone = report._looks(['chunked'])
  both = report._looks(['x', 'chunked', 'y'])
  assert alone['chunked'] == both['chunked']
  assert len({look['color'] for look in both.values()}) == 3
  drawn = [pictures.look(n) for n in range(7)]
  assert len({(look['marker'], look['linestyle']) for look in drawn}) == 7


def test_what_differs_by_colour_alone_is_found():
  """The check of tests/experiments/conftest.py, of every picture drawn."""
  axes = report.Figure().subplots()
  for number, label in enumerate('abc'):
    axes.plot([1], [2], **pictures.look(number), label=label)
    axes.bar([number], [1], label=f'bar {label}', **pictures.fill(number))
  axes.plot([1], [2], color='red')  # without a label
  assert alike(axes.figure) == []
  axes.plot([1], [2], **pictures.look(1) | {'color': 'red'}, label='d')
  axes.bar([3], [1], label='bar d')
  axes.errorbar([1], [2], [1], **pictures.look(2), label='e')
  assert alike(axes.figure) == [('b', 'd'), ('bar a', 'bar d'), ('c', 'e')]


def test_requests_without_a_token_are_told_apart_too():
  axes = report.Figure().subplots()
  lost = Record(1, 2.0, 8, 2, status='rejected')
  report.over_time(axes, [(mode, [_record(0), lost]) for mode in (
      'flood', 'after', 'other')], 'ttft_s', SLO.ttft_s)
  assert 'after: no token' in [line.get_label() for line in axes.lines]
  assert alike(axes.figure) == []


def test_cdf_is_of_all_requests_sent():
  figure = report.Figure()
  axes = figure.subplots()
  records = [_record(0, 0.2), _record(1, 0.4),
             Record(2, 0.0, 1, 1, status='rejected'),
             Record(3, 0.0, 1, 1, status='cancelled')]
  report._cdf(axes, [('a', records)], 'ttft_s', 1.0,
              {'a': {'color': 'red'}})
  assert axes.lines[0].get_ydata()[-1] == pytest.approx(200 / 3)
  assert axes.lines[0].get_xdata()[-1] == pytest.approx(0.4)
  assert math.isclose(axes.lines[1].get_xdata()[0], 1.0)


def test_objectives_of_infinity_are_drawn_without_a_line(tmp_path):
  records = [Record(i, 0.0, 8, 2, [0.5 + i, 0.6 + 2 * i], finish_s=3.0,
                    status='length') for i in range(2)]
  report.save_figure(tmp_path / 'x.png', [('a', records)],
                     Slo(math.inf, math.inf))
  assert (tmp_path / 'x.png').stat().st_size > 10_000
