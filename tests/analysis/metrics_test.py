"""Recorder against hand-written logs; statistics against their definitions."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.analysis import metrics
from dsjax.analysis.record import STAGES, Record
from dsjax.analysis.recorder import Recorder
from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  Chunk,
  DecodeDone,
  Finish,
  Migrate,
  Migrated,
  Preempt,
  PrefillDone,
  Reject,
  Row,
  RunDecode,
  RunPrefill,
)

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def _chunk(id, start=0, stop=4, last=True):
  return Chunk(id, start, stop, (0,), last)


def _row(id):
  return Row(id, 0, 100, (0,))


def _records(log, **kwargs):
  recorder = Recorder(**kwargs)
  for event, commands in log:
    recorder.observe(event, commands)
  return {r.id: r for r in recorder.records}


def _stages(*seconds):
  return dict(zip(STAGES, seconds, strict=True))


# Times are multiples of 1/8, so that sums are exact.
MIGRATION = [
    (Arrived(1.0, 7, 6, 4), ()),
    # Queued for 1 s, prefilled in two chunks.
    (Arrived(2.0, 8, 4, 1), (
        RunPrefill(0, 0, (_chunk(7, 0, 4, False),)),
        RunPrefill(0, 1, (_chunk(7, 4, 6), _chunk(8))))),
    (PrefillDone(3.0, 0, 0), ()),
    (PrefillDone(4.0, 0, 1, ended=(8,)), (Finish(8, 'stop'),)),
    (Arrived(4.5, 9, 99, 5), (
        Reject(9, 'too long'), Migrate(7, 3, 0, (0,), 1, (5,), 6))),
    (Migrated(4.75, 7, 2), ()),  # of a hand-off given up: dropped
    (Migrated(5.0, 7, 3), ()),
    (Migrated(5.5, 7, 3), (RunDecode(1, 0, 0, 1, (_row(7),)),)),
    (DecodeDone(6.0, 1, 0), (RunDecode(1, 1, 1, 2, (_row(7),)),)),
    (DecodeDone(8.0, 1, 1, steps_s=(7.0, 7.5)), (Finish(7, 'length'),)),
]


def test_migration():
  assert _records(MIGRATION) == {
      7: Record(7, 1.0, 6, 4, [4.0, 6.0, 7.0, 7.5],
                _stages(1.0, 2.0, 0.5, 1.0, 2.5), 8.0, 'length',
                migrated_tokens=6, instances=(0, 1)),
      8: Record(8, 2.0, 4, 1, [4.0], _stages(0, 2.0, 0, 0, 0), 4.0, 'stop',
                instances=(0,)),
      9: Record(9, 4.5, 99, 5, [], _stages(0, 0, 0, 0, 0), 4.5, 'rejected',
                'too long'),
  }


def test_spans_tile_each_life():
  spans = {}
  _records(MIGRATION, on_span=lambda id, *s: spans.setdefault(
      id, []).append(s))
  assert spans[7] == [
      ('prefill_queue', 1.0, 2.0), ('prefill', 2.0, 4.0),
      ('decode_queue', 4.0, 4.5), ('migrate', 4.5, 5.0),
      ('decode_queue', 5.0, 5.5), ('decode', 5.5, 8.0)]


def test_two_in_flight_and_eos_in_the_middle():
  rows = (_row(1), _row(2))
  records = _records([
      (Arrived(0.0, 1, 4, 9), ()),
      (Arrived(0.0, 2, 4, 9), (
          RunPrefill(0, 0, (_chunk(1), _chunk(2))),
          # Issued behind the prefill: decode begins when that is done.
          RunDecode(0, 1, 0, 3, rows))),
      (PrefillDone(1.0, 0, 0), ()),
      (Cancelled(1.5, -1), (RunDecode(0, 2, 3, 2, rows),)),
      # 1 ends with the second token of three; what it makes later is void.
      (DecodeDone(4.0, 0, 1, (2.0, 3.0, 4.0), ((1, 1),)),
       (Finish(1, 'stop'),)),
      (DecodeDone(6.0, 0, 2, (5.0, 6.0), ((2, 1),)), (Finish(2, 'stop'),)),
  ])
  assert records == {
      1: Record(1, 0.0, 4, 9, [1.0, 2.0, 3.0], _stages(0, 1.0, 0, 0, 3.0),
                4.0, 'stop', instances=(0,)),
      2: Record(2, 0.0, 4, 9, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                _stages(0, 1.0, 0, 0, 5.0), 6.0, 'stop', instances=(0,)),
  }


def test_ended_counts_even_if_finish_comes_later():
  records = _records([
      (Arrived(0.0, 1, 4, 9), (RunPrefill(0, 0, (_chunk(1),)),)),
      (PrefillDone(1.0, 0, 0), (RunDecode(0, 1, 0, 2, (_row(1),)),
                                RunDecode(0, 2, 2, 1, (_row(1),)))),
      (DecodeDone(3.0, 0, 1, (2.0, 3.0), ((1, 0),)), ()),
      (DecodeDone(4.0, 0, 2, (4.0,)), (Finish(1, 'stop'),)),
  ])
  assert records[1].token_s == [1.0, 2.0]
  records = _records([
      (Arrived(0.0, 1, 4, 9), (RunPrefill(0, 0, (_chunk(1),)),
                               RunDecode(0, 1, 0, 1, (_row(1),)))),
      (PrefillDone(1.0, 0, 0, ended=(1,)), ()),
      (DecodeDone(2.0, 0, 1, (2.0,)), (Finish(1, 'stop'),)),
  ])
  assert records[1].token_s == [1.0]


def test_preemption_drops_what_was_in_flight():
  records = _records([
      (Arrived(0.0, 1, 4, 9), (RunPrefill(0, 0, (_chunk(1),)),)),
      (PrefillDone(1.0, 0, 0), (RunDecode(0, 1, 0, 1, (_row(1),)),
                                RunDecode(0, 2, 1, 1, (_row(1),)))),
      (DecodeDone(2.0, 0, 1, (2.0,)), (Preempt(1, 0),)),
      # The old step completes after the new prefill was issued.
      (Arrived(2.5, 2, 1, 1), (RunPrefill(0, 3, (_chunk(1, 0, 6),)),)),
      (DecodeDone(3.0, 0, 2, (3.0,), ((1, 0),)), (Reject(2, 'full'),)),
      (PrefillDone(4.0, 0, 3), (RunDecode(0, 4, 0, 1, (_row(1),)),)),
      (DecodeDone(5.0, 0, 4, (5.0,)), (Finish(1, 'length'),)),
  ])
  assert records[1] == Record(
      1, 0.0, 4, 9, [1.0, 2.0, 4.0, 5.0], _stages(0.5, 2.5, 0, 0, 2.0), 5.0,
      'length', preemptions=1, instances=(0,))


def test_preempted_in_the_middle_of_a_prefill():
  records = _records([
      (Arrived(0.0, 1, 4, 9), (RunPrefill(0, 0, (_chunk(1),)),)),
      (Arrived(0.5, 2, 4, 9), (Preempt(1, 0),)),
      (PrefillDone(1.0, 0, 0), (RunPrefill(0, 1, (_chunk(1),)),)),
      (PrefillDone(2.0, 0, 1), (Finish(1, 'length'),)),
  ])
  assert records[1].token_s == [2.0]
  assert records[1].stage_s == _stages(0.5, 1.5, 0, 0, 0)
  assert records[2].status == 'running' and records[2].finish_s is None


def test_chunked_rows_ride_with_a_prefill():
  records = _records([
      (Arrived(0.0, 1, 4, 9), (RunPrefill(0, 0, (_chunk(1),)),)),
      (Arrived(0.5, 2, 8, 2), ()),
      (PrefillDone(1.0, 0, 0), (
          RunPrefill(0, 1, (_chunk(2, 0, 4, False),), 0, (_row(1),)),)),
      (PrefillDone(2.0, 0, 1), (
          RunPrefill(0, 2, (_chunk(2, 4, 8),), 1, (_row(1),)),)),
      (PrefillDone(3.0, 0, 2, ended=(1,)), (
          Finish(1, 'stop'), RunPrefill(0, 3, (), 2, (_row(2),)))),
      (PrefillDone(4.0, 0, 3), (Finish(2, 'length'),)),
  ])
  assert records == {
      1: Record(1, 0.0, 4, 9, [1.0, 2.0, 3.0], _stages(0, 1.0, 0, 0, 2.0),
                3.0, 'stop', instances=(0,)),
      2: Record(2, 0.5, 8, 2, [3.0, 4.0], _stages(0.5, 2.0, 0, 0, 1.0), 4.0,
                'length', instances=(0,)),
  }


def test_cancelled_takes_no_more_tokens():
  records = _records([
      (Arrived(0.0, 1, 4, 9), (RunPrefill(0, 0, (_chunk(1),)),)),
      (PrefillDone(1.0, 0, 0), (RunDecode(0, 1, 0, 1, (_row(1),)),)),
      (Cancelled(1.5, 1), ()),
      (Cancelled(1.5, 5), ()),
      (DecodeDone(2.0, 0, 1, (2.0,)), (Finish(1, 'cancelled'),)),
  ])
  assert records[1].token_s == [1.0] and records[1].status == 'cancelled'
  assert sum(records[1].stage_s.values()) == 2.0


def test_cancelled_while_it_migrates():
  records = _records([
      (Arrived(0.0, 1, 4, 9), (RunPrefill(0, 0, (_chunk(1),)),)),
      (PrefillDone(1.0, 0, 0), (Migrate(1, 0, 0, (0,), 2, (0,), 4),)),
      (Cancelled(1.5, 1), (Finish(1, 'cancelled'),)),
      (Migrated(2.0, 1, 0), ()),
  ])
  assert records[1] == Record(
      1, 0.0, 4, 9, [1.0], _stages(0, 1.0, 0.5, 0, 0), 1.5, 'cancelled',
      migrated_tokens=4, instances=(0, 2))


def test_one_id_arrives_once():
  with pytest.raises(InputError, match='Arrived.id'):
    _records([(Arrived(0.0, 1, 4, 9), ())] * 2)


@st.composite
def _logs(draw):
  """A log of one instance that does allowed things in a random order."""
  log, now, number, next_id = [], 0.0, 0, 0
  queue, decoding, flight = [], [], []
  for _ in range(draw(st.integers(1, 40))):
    now += draw(st.integers(0, 3)) / 8
    event, commands = Cancelled(now, -1), []
    kind = draw(st.sampled_from(['arrive', 'done', 'done', 'preempt']))
    if kind == 'arrive':
      event = Arrived(now, next_id, 4, 9)
      queue.append(next_id)
      next_id += 1
    elif kind == 'preempt' and decoding:
      queue.append(decoding.pop())
      commands.append(Preempt(queue[-1], 0))
    elif kind == 'done' and flight:
      run = flight.pop(0)
      if isinstance(run, RunDecode):
        event = DecodeDone(now, 0, run.number, (now,) * run.steps)
      else:
        event = PrefillDone(now, 0, run.number)
        fresh = [c.id for c in run.chunks if c.id not in queue]
        decoding += fresh
      if decoding and draw(st.booleans()):
        commands.append(Finish(decoding.pop(0), 'length'))
    if len(flight) < 2:
      if queue and draw(st.booleans()):
        run = RunPrefill(0, number, (_chunk(queue.pop(0)),))
      elif decoding:
        run = RunDecode(0, number, 0, draw(st.integers(1, 3)),
                        tuple(map(_row, decoding)))
      else:
        run = None
      if run:
        commands.append(run)
        flight.append(run)
        number += 1
    log.append((event, tuple(commands)))
  return log


@given(_logs())
@settings(deadline=None)
def test_stages_add_up_to_the_life(log):
  spans = {}
  records = _records(log, on_span=lambda id, *s: spans.setdefault(
      id, []).append(s))
  for record in records.values():
    own = spans.get(record.id, [])
    assert all(a[2] == b[1] for a, b in zip(own, own[1:], strict=False))
    if record.finish_s is not None:
      assert sum(record.stage_s.values()) == (
          record.finish_s - record.arrival_s)
      assert own[-1][2] == record.finish_s
    assert record.token_s == sorted(record.token_s)
    assert min(record.stage_s.values()) >= 0


def test_observing_256_rows_is_cheap():
  recorder, n = Recorder(), 256
  for i in range(n):
    recorder.observe(Arrived(0.0, i, 4, 999), ())
  chunks = tuple(map(_chunk, range(n)))
  recorder.observe(Cancelled(0.0, -1), (RunPrefill(0, 0, chunks),))
  rows = tuple(map(_row, range(n)))
  recorder.observe(PrefillDone(0.0, 0, 0), (RunDecode(0, 1, 0, 1, rows),))
  best_s = math.inf
  for number in range(1, 200):
    begin_s = time.perf_counter()
    recorder.observe(DecodeDone(1.0, 0, number, (1.0,)),
                     (RunDecode(0, number + 1, number, 1, rows),))
    best_s = min(best_s, time.perf_counter() - begin_s)
  assert best_s < 100e-6
  assert all(len(r.token_s) == 200 for r in recorder.records)


# --- statistics -------------------------------------------------------------


def _record(id=0, arrival_s=0.0, ttft_s=0.5, gap_s=0.05, tokens=3,
            status='length', **kwargs):
  token_s = [arrival_s + ttft_s + gap_s * k for k in range(tokens)]
  finish_s = token_s[-1] if token_s else arrival_s
  return Record(id, arrival_s, 4, 9, token_s, finish_s=finish_s,
                status=status, **kwargs)


def test_attains_needs_both_objectives_and_an_end():
  assert metrics.attains(_record(), SLO)
  assert metrics.attains(_record(ttft_s=1.0, tokens=1), SLO)
  assert not metrics.attains(_record(ttft_s=1.001), SLO)
  assert not metrics.attains(_record(gap_s=0.101), SLO)
  assert not metrics.attains(_record(tokens=0), SLO)
  for status in ('running', 'rejected', 'cancelled', 'failed'):
    assert not metrics.attains(_record(status=status), SLO)


@given(st.floats(0, 5), st.floats(0, 1), st.floats(0.1, 4),
       st.sampled_from(['stop', 'length', 'rejected']))
def test_slo_scale_is_the_least_that_attains(ttft_s, gap_s, factor, status):
  record = _record(ttft_s=ttft_s, gap_s=gap_s, status=status)
  scale = metrics.slo_scale(record, SLO)
  slo = Slo(SLO.ttft_s * factor, SLO.tpot_s * factor)
  if abs(scale - factor) > 1e-9:
    assert metrics.attains(record, slo) == (scale < factor)


def test_attainment_counts_all_but_the_cancelled():
  records = [_record(), _record(ttft_s=2.0), _record(status='rejected'),
             _record(status='running'), _record(status='cancelled')]
  share, low, high = metrics.attainment(records, SLO)
  assert share == 0.25
  # Wilson's bounds of 1 in 4.
  assert (low, high) == pytest.approx((0.0456, 0.6994), abs=1e-4)


def test_attainment_of_nothing():
  share, low, high = metrics.attainment([_record(status='cancelled')], SLO)
  assert math.isnan(share) and (low, high) == (0, 1)


@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_interval_contains_the_share(hits):
  share, low, high = metrics.interval(hits)
  assert 0 <= low <= share <= high <= 1 and low < high
  assert share == sum(hits) / len(hits)


def test_interval_is_wider_where_misses_come_together():
  n = 1000
  apart = [i % 2 == 0 for i in range(n)]
  together = [i < n // 2 for i in range(n)]
  _, low, high = metrics.interval(apart)
  assert high - low == pytest.approx(0.062, abs=1e-3)  # Wilson
  _, low, high = metrics.interval(together)
  # Five batch means, 1, 1, 0.5, 0, 0: 2 * 2.776 * 0.5 / sqrt(5), cut at 1.
  assert (low, high) == (0, 1)
  # Ten batches of 20, which attain or miss in turn.
  _, low, high = metrics.interval([i % 40 < 20 for i in range(200)])
  assert high - low == pytest.approx(2 * 2.262 * 0.527 / 10**0.5, abs=1e-3)


def test_interval_covers_where_requests_share_queues():
  """The share of a two-state chain that stays 50 requests where it is."""
  covered = 0
  for seed in range(200):
    turns = np.random.default_rng(seed).random(4000) < 0.02
    _, low, high = metrics.interval((np.cumsum(turns) % 2).astype(bool))
    covered += low <= 0.5 <= high
  assert 180 <= covered <= 199


def test_interval_of_sure_success_is_not_a_point():
  _, low, high = metrics.interval([True] * 400)
  assert high == 1 and low == pytest.approx(0.9905, abs=1e-4)


def test_difference_of_runs_on_the_same_requests():
  rng = np.random.default_rng(0)
  easy = rng.random(2000) < 0.8  # both attain these
  ours, theirs = easy | (rng.random(2000) < 0.3), easy
  mean, low, high = metrics.difference(ours, theirs)
  assert mean == pytest.approx(ours.mean() - theirs.mean())
  assert 0.03 < low < mean < high < 0.09
  apart = [metrics.interval(hits) for hits in (ours, theirs)]
  assert high - low < min(each[2] - each[1] for each in apart)
  back = metrics.difference(theirs, ours)
  assert back == pytest.approx((-mean, -high, -low))


def test_difference_is_wider_where_it_comes_together():
  apart = [i % 10 == 0 for i in range(1000)]
  together = [i < 100 for i in range(1000)]
  none = [False] * 1000
  (_, *narrow), (_, *wide) = (metrics.difference(hits, none)
                              for hits in (apart, together))
  assert wide[0] < 0 < narrow[0] and wide[1] > narrow[1]


def test_equal_runs_do_not_differ_by_much():
  hits = [i % 7 > 0 for i in range(3000)]
  mean, low, high = metrics.difference(hits, hits)
  assert mean == 0 and -0.002 < low < 0 < high < 0.002


def test_difference_of_none_and_of_unequal_numbers():
  mean, low, high = metrics.difference([], [])
  assert np.isnan(mean) and (low, high) == (-1.0, 1.0)
  mean, low, high = metrics.difference([True], [False])
  assert mean == high == 1 and low < 0
  with pytest.raises(InputError, match='difference=1: must be as many as 2'):
    metrics.difference([True, True], [True])


def test_percentiles():
  assert metrics.percentiles(range(101)) == (50, 90, 99)
  assert metrics.percentiles([1.0, 2.0], (50,)) == (1.5,)
  assert all(map(math.isnan, metrics.percentiles([])))


def test_summarize():
  stages = _stages(0.25, 0.25, 0, 0, 0.1)
  records = [
      _record(0, 10.0, stage_s=stages),
      _record(1, 11.0, ttft_s=2.0, stage_s=_stages(1.75, 0.25, 0, 0, 0.3)),
      _record(2, 12.0, gap_s=0.2, preemptions=2),
      _record(3, 13.0, tokens=1, stage_s=stages),
      _record(4, 14.0, tokens=0, status='rejected'),
      _record(5, 15.0, tokens=2, status='cancelled'),
  ]
  s = metrics.summarize(records[::-1], SLO, num_devices=2)
  assert s.counts == {'length': 4, 'rejected': 1, 'cancelled': 1}
  assert s.span_s == 4.0  # 10 to the rejection at 14
  assert s.attainment[0] == 0.4
  assert (s.ttft_share, s.tpot_share) == (0.6, 0.6)
  assert s.halves == (0.5, pytest.approx(1 / 3))
  assert s.sent_per_s == 1.25
  assert s.goodput_per_s == 0.5 and s.goodput_per_s_device == 0.25
  low, high = s.goodput_interval_per_s_device
  assert low < 0.25 < high
  assert s.tokens_per_s == 10 / 4
  assert s.ttft_s[0] == pytest.approx(0.5)
  # Of 0.05, 0.05 and 0.2: a single token has no TPOT.
  assert s.tpot_s[:2] == pytest.approx((0.05, 0.17))
  assert s.second_s[2] == pytest.approx(0.2, rel=0.05)
  assert s.stage_s['prefill_queue'] == pytest.approx(2.25 / 4)
  assert s.preemptions == 2


def test_summarize_leaves_out_the_warm_up():
  records = [_record(i, float(i)) for i in range(5)]
  s = metrics.summarize(records, SLO, 1, warmup_s=2.0)
  assert s.counts == {'length': 3}
  assert s.span_s == pytest.approx(2.6)


@pytest.mark.parametrize('records', [
    [], [_record(status='cancelled')], [_record(tokens=0, status='rejected')],
    [Record(0, 0.0, 4, 9)]])
def test_summarize_of_nothing_measured(records):
  s = metrics.summarize(records, SLO, 1)
  assert math.isnan(s.ttft_s[0]) == (not records or not records[0].token_s
                                     or s.counts == {'cancelled': 1})
  assert math.isnan(s.goodput_per_s)
  assert all(map(math.isnan, s.stage_s.values()))


def test_summarize_refuses():
  for change in ({'num_devices': 0}, {'num_devices': 1.5},
                 {'warmup_s': -1.0}, {'warmup_s': math.nan}):
    with pytest.raises(InputError):
      metrics.summarize([], SLO, **{'num_devices': 1} | change)


def test_each_phase_has_a_share_of_its_own():
  records = [_record(arrival_s=float(n), ttft_s=0.5 if n % 10 < 5 else 2.0)
             for n in range(40)]
  shares = metrics.by_phase(records, SLO, 10.0, ('calm', 'busy'))
  assert list(shares) == ['calm', 'busy']
  assert [share for share, *_ in shares.values()] == [1.0, 0.0]
  empty = metrics.by_phase(records[:1], SLO, 100.0, ('calm', 'busy'))
  assert math.isnan(empty['busy'][0])


@pytest.mark.parametrize('counts', [
    (), (0,), (1,), (1, 0, 1), (3,), (2, 1, 0, 5, 1), (40, 1, 2)])
def test_gaps_between_tokens_are_of_one_request_each(counts):
  rng = np.random.default_rng(0)
  records = [Record(i, 0.0, 8, 50, token_s=np.cumsum(rng.random(n)).tolist(),
                    finish_s=60.0, status='length')
             for i, n in enumerate(counts)]
  summary = metrics.summarize(records, SLO, 1)
  np.testing.assert_array_equal(summary.itl_s, metrics.percentiles(
      [gap for record in records for gap in record.itl_s]))
