"""Timelines, records on disk, tables, verdicts and the figure."""

import collections
import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from dsjax.analysis.metrics import summarize
from dsjax.analysis.record import STAGES, Record
from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.scheduling.events import (
  Arrived,
  Chunk,
  DecodeDone,
  Finish,
  Migrate,
  Migrated,
  PrefillDone,
  Reject,
  Row,
  RunDecode,
  RunPrefill,
)
from experiments.common import report, timeline

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
ROWS, OTHER = (Row(7, 6, 9, (5,)),), (Row(8, 6, 9, (5,)),)
CHUNKS = (Chunk(7, 0, 6, (0, 1), True), Chunk(8, 0, 4, (2,), False))
# Two commands in flight on each instance; the first hand-off of 7 is given up
# for another, and the last command of instance 1 is never done.
LOG = [
    (Arrived(10.0, 7, 6, 9), ()),
    (Arrived(11.0, 8, 8, 1), (
        RunPrefill(0, 0, CHUNKS),
        RunPrefill(0, 1, (Chunk(8, 4, 8, (2,), True),), 5, OTHER))),
    (PrefillDone(12.0, 0, 0), (Migrate(7, 2, 0, (0, 1), 2, (4,), 6),)),
    (PrefillDone(13.0, 0, 1), (
        Finish(8, 'length'), Migrate(7, 3, 0, (0, 1), 1, (5,), 6))),
    (Migrated(13.0, 7, 3), (RunDecode(1, 0, 0, 2, ROWS),
                            RunDecode(1, 1, 2, 1, ROWS))),
    (DecodeDone(15.0, 1, 0, (13.5, 15.0)), (RunDecode(1, 2, 3, 1, ROWS),)),
    (DecodeDone(15.5, 1, 1, (15.5,)), (Finish(7, 'length'),)),
    (Arrived(16.0, 9, 1, 1), (Reject(9, 'too long'),)),
]


def _events(ph, log=LOG, **kwargs):
  return [e for e in timeline.timeline(log, **kwargs)['traceEvents']
          if e['ph'] == ph]


def test_slices_are_the_steps():
  slices = [(e['tid'], e['name'], e['ts'], e['dur']) for e in _events('X')]
  assert slices == [
      (0, 'prefill 10 tok', 1e6, 1e6),
      (0, 'prefill 4 tok + decode x1', 2e6, 1e6),
      (1, 'decode x1', 3e6, 0.5e6),
      (1, 'decode x1', 3.5e6, 1.5e6),
      (1, 'decode x1', 5e6, 0.5e6),
  ]
  assert [e['args'] for e in _events('X')][1] == {
      'number': 1, 'tick': 5, 'rows': 1, 'tokens': 5, 'pages': 2,
      'prefilled': [8]}
  assert [e['args']['tick'] for e in _events('X')][2:] == [0, 1, 2]


def test_slices_of_a_row_do_not_overlap():
  rows = collections.defaultdict(list)
  for e in _events('X'):
    rows[e['tid']].append((e['ts'], e['ts'] + e['dur']))
  for spans in rows.values():
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_every_arrow_has_both_ends():
  begins, ends = _events('s'), _events('f')
  assert [e['id'] for e in begins] == [e['id'] for e in ends] == ['7.3']
  assert (begins[0]['tid'], ends[0]['tid']) == (0, 1)
  # The tail lies inside a slice of the source, the head where one begins.
  assert any(e['tid'] == 0 and e['ts'] < begins[0]['ts'] < e['ts'] + e['dur']
             and 7 in e['args']['prefilled'] for e in _events('X'))
  assert ends[0]['ts'] == 3e6


def test_requests_nest_their_stages():
  depth, inner = collections.Counter(), []
  for e in timeline.timeline(LOG)['traceEvents']:
    if e['ph'] == 'b':
      depth[e['id']] += 1
      if depth[e['id']] == 2:
        inner.append((e['id'], e['name'], e['ts']))
      assert (depth[e['id']] == 1) == e['name'].startswith('request')
    elif e['ph'] == 'e':
      depth[e['id']] -= 1
      assert depth[e['id']] >= 0
  assert set(depth) == {7, 8, 9} and not any(depth.values())
  assert [x[1:] for x in inner if x[0] == 7] == [
      ('prefill_queue', 0), ('prefill', 1e6), ('migrate', 2e6),
      ('decode', 3e6)]


def _staged():
  """Two prefills of one chunk each through two stages of instance 3."""
  chunks = [(Chunk(id, 0, 4, (id,), True),) for id in range(2)]
  return [
      (Arrived(10.0, 0, 4, 1), (RunPrefill(3, 0, chunks[0]),)),
      (Arrived(10.0, 1, 4, 1), (RunPrefill(3, 1, chunks[1]),)),
      (PrefillDone(12.0, 3, 0, (0,), (11.0,)),
       (Finish(0, 'length'),)),
      (PrefillDone(13.5, 3, 1, (1,), (12.0,)),
       (Finish(1, 'length'),))]


def test_stages_have_rows_of_their_own_and_overlap():
  steps = [(e['tid'], e['ts'], e['ts'] + e['dur'])
           for e in timeline.timeline(_staged())['traceEvents']
           if e.get('cat') == 'step']
  assert sorted(steps) == [(3, 0, 1e6), (3, 1e6, 2e6), (1003, 1e6, 2e6),
                           (1003, 2e6, 3.5e6)]
  rows = {e['tid']: e['args'] for e in
          timeline.timeline(_staged(), ('a', 'b', 'c', 'd'))['traceEvents']
          if e['name'] == 'thread_name'}
  assert rows[3] == {'name': 'd'} and rows[1003] == {'name': 'd, stage 1'}


def test_bubbles_are_what_stages_idle_while_there_is_work():
  assert timeline.bubbles(_staged()) == {3: pytest.approx(1 - 4.5 / 7)}
  assert timeline.bubbles(LOG) == {}
  late = [(Arrived(20.0, 2, 4, 1), (RunPrefill(
      3, 2, (Chunk(2, 0, 4, (2,), True),)),)),
          (PrefillDone(22.0, 3, 2, (), (21.0,)), ())]
  # Idle between commands is no bubble; a lone command fills half the stages.
  assert timeline.bubbles(_staged() + late) == {
      3: pytest.approx(1 - 6.5 / 11)}


def test_timeline_file_and_names(tmp_path):
  path = tmp_path / 'timeline.json'
  timeline.save_timeline(path, LOG, ('prefill 0',))
  events = json.loads(path.read_text())['traceEvents']
  assert [e['args']['name'] for e in events if e['name'] == 'thread_name'] == [
      'prefill 0', 'instance 1']
  assert all('ts' in e for e in events if e['ph'] != 'M')
  times = [e['ts'] for e in events if e['ph'] != 'M']
  assert times == sorted(times) and times[0] == 0
  assert timeline.timeline([])['traceEvents']


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


def test_a_mode_keeps_its_colour():
  alone = report._colours(['chunked'])
  both = report._colours(['x', 'chunked', 'y'])
  assert alone['chunked'] == both['chunked']
  assert len(set(both.values())) == 3


def test_cdf_is_of_all_requests_sent():
  figure = report.Figure()
  axes = figure.subplots()
  records = [_record(0, 0.2), _record(1, 0.4),
             Record(2, 0.0, 1, 1, status='rejected'),
             Record(3, 0.0, 1, 1, status='cancelled')]
  report._cdf(axes, [('a', records)], 'ttft_s', 1.0, {'a': 'red'})
  assert axes.lines[0].get_ydata()[-1] == pytest.approx(200 / 3)
  assert axes.lines[0].get_xdata()[-1] == pytest.approx(0.4)
  assert math.isclose(axes.lines[1].get_xdata()[0], 1.0)
