"""Slices, arrows and requests of a log by hand; idle pipeline stages."""

import collections
import json

import pytest

from dsjax.analysis import timeline
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


def test_what_instances_stamped_has_rows_of_its_own():
  """Both sides of the border: what is of another run, or not issued here, is
  left out; a step begins where the one before ended."""
  stamps = {1: [('landed', 7, 8.0, 9.0, 0.0), ('step', 9, 12.0, 12.5, 0.5),
                ('landed', 7, 12.2, 12.9, 0.0), ('step', 0, 13.1, 13.4, 1.0),
                ('step', 0, 13.1, 14.9, 2.5), ('step', 1, 13.2, 15.4, 3.0)]}
  there = [e for e in timeline.timeline(LOG, ('a', 'b'), stamps)['traceEvents']
           if e.get('cat') == 'there']
  assert [(e['ph'], e['name'], e['ts'], e.get('dur')) for e in there] == [
      ('i', 'KV landed', 2.9e6, None), ('X', 'decode x1', 3.1e6, 0.3e6),
      ('X', 'decode x1', 3.4e6, 1.5e6), ('X', 'decode x1', 4.9e6, 0.5e6)]
  assert [e['args'].get('cpu_ms') for e in there] == [None, None, 1500, 500]
  row, = {e['tid'] for e in there}
  rows = {e['tid']: e['args'] for e in timeline.timeline(
      LOG, ('a', 'b'), stamps)['traceEvents'] if e['name'].startswith('thread')}
  assert rows[row] == {'sort_index': 1999}
  assert {'name': 'b, as it says'} in [e['args'] for e in timeline.timeline(
      LOG, ('a', 'b'), stamps)['traceEvents'] if e['name'] == 'thread_name']


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


def test_a_timeline_is_json_with_names():
  text = json.dumps(timeline.timeline(LOG, ('prefill 0',)))
  events = json.loads(text)['traceEvents']
  assert [e['args']['name'] for e in events if e['name'] == 'thread_name'] == [
      'prefill 0', 'instance 1']
  assert all('ts' in e for e in events if e['ph'] != 'M')
  times = [e['ts'] for e in events if e['ph'] != 'M']
  assert times == sorted(times) and times[0] == 0
  assert timeline.timeline([])['traceEvents']
