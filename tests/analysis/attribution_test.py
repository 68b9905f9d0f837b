"""Causes of SLO misses: by hand, in sum, and where the bottleneck is known."""

import dataclasses

import pytest

from dsjax.analysis import attribution
from dsjax.analysis.record import Record
from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  Arrived,
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
from dsjax.simulation import latency, simulator

LOOSE = 1e6


def prefill(instance, number, *ids, rows=()):
  return RunPrefill(instance, number, tuple(
      Chunk(i, 0, 8, (), True) for i in ids), 0,
      tuple(Row(i, 8, 9, ()) for i in rows))


def decode(instance, number, *ids):
  return RunDecode(instance, number, 0, 1,
                   tuple(Row(i, 8, 9, ()) for i in ids))


def near(parts, **want):
  """Whether parts are these seconds, and zero elsewhere."""
  return parts == pytest.approx(dict.fromkeys(attribution.CAUSES, 0.0) | want)


# Request 1 waits 1 s, prefills 2, waits 3, moves 4, waits 5, decodes 6.
APART = [
    (Arrived(0.0, 0, 8, 1), (prefill(0, 0, 0),)),
    (Arrived(1.0, 1, 8, 2), ()),
    (PrefillDone(2.0, 0, 0), (Finish(0, 'length'), prefill(0, 1, 1))),
    (PrefillDone(4.0, 0, 1), ()),
    (Arrived(7.0, 2, 8, 1), (Migrate(1, 0, 0, (), 1, (), 8),)),
    (Migrated(11.0, 1, 0), ()),
    (Arrived(16.0, 3, 8, 1), (decode(1, 0, 1),)),
    (DecodeDone(22.0, 1, 0, (22.0,)), (Finish(1, 'length'),)),
]


def test_the_parts_of_a_request_by_hand():
  parts = attribution.of_log(APART).parts()[1]
  assert near(parts.before, prefill_queue=1, prefill=2)
  assert near(parts.after, decode_queue=8, transfer=4, decode=6)


@pytest.mark.parametrize('slo, cause, fixes', (
    (Slo(2.5, LOOSE), 'prefill', ('prefill_queue', 'prefill')),
    (Slo(1.5, LOOSE), 'prefill', ('prefill',)),
    (Slo(0.5, LOOSE), 'prefill', ()),
    (Slo(LOOSE, 15), 'decode_queue', ('transfer', 'decode_queue', 'decode')),
    (Slo(LOOSE, 11), 'decode_queue', ('decode_queue',)),
    (Slo(LOOSE, 1), 'decode_queue', ()),
    (Slo(2.5, 15), 'prefill', ())))
def test_the_cause_is_the_largest_removal_that_suffices(slo, cause, fixes):
  fold = attribution.of_log(APART)
  record, parts = fold.records[1], fold.parts()[1]
  assert attribution.explain(record, parts, slo) == (1, cause, fixes)


def test_execution_falls_only_to_what_an_empty_system_takes():
  fold = attribution.of_log(APART)
  record, parts = fold.records[1], fold.parts()[1]

  def idle(record):
    return 2.0, 6.0
  assert attribution.explain(record, parts, Slo(2.5, LOOSE), idle)[1:] == (
      'prefill_queue', ('prefill_queue',))
  assert attribution.explain(record, parts, Slo(1.5, LOOSE),
                             lambda record: (1.4, 6.0))[1:] == (
      'prefill_queue', ())


@pytest.mark.parametrize('slo, advice', (
    (Slo(1.5, LOOSE), 'a faster prefill (larger tp) or a looser TTFT'),
    (Slo(LOOSE, 5), 'a faster decode (larger tp) or a looser TPOT')))
def test_what_misses_on_an_empty_system_is_not_blamed_on_the_others(
    slo, advice):
  fold = attribution.of_log(APART)
  why = attribution.attribute(fold.records[1:2], fold.parts(), slo,
                              lambda record: (2.0, 6.0))
  assert why.misses == ((1, 'alone', ()),)
  assert why.causes['alone'] == 1 and not any(why.fixes.values())
  assert why.advice == f'{advice}: 1 of 1 misses cannot attain even alone'
  # One token has no TPOT to miss.
  record = dataclasses.replace(fold.records[1], token_s=[2.0])
  assert attribution.explain(record, fold.parts()[1], Slo(0.5, 1.0),
                             lambda record: (0.1, 6.0)).cause != 'alone'


def explained(before, after, slo):
  record = Record(0, 0.0, 8, 2, status='length')
  record.token_s = [sum(before.values()),
                    sum(before.values()) + sum(after.values())]
  none = dict.fromkeys(attribution.CAUSES, 0.0)
  return attribution.explain(
      record, attribution.Parts(none | before, none | after), slo)


def test_what_suffices_goes_before_what_is_larger():
  miss = explained(dict(prefill=3, preemption=1),
                   dict(decode_queue=9, preemption=1), Slo(3, 9))
  assert miss == (0, 'preemption', ('preemption',))


def test_advice_that_saves_few_says_what_the_others_lost_to():
  counts = dict.fromkeys(attribution.ALL, 0)
  causes = counts | dict(decode=1, decode_queue=9)
  text = attribution._advice(10, causes, counts | dict(decode=1))
  assert text.startswith('a faster decode') and text.endswith(
      '9 lost most to decode_queue')
  text = attribution._advice(10, causes, counts)
  assert text.startswith('no single change') and '9 lost most' in text


def test_only_a_missed_objective_counts():
  miss = explained(dict(prefill=0.6, prefill_queue=0.5, preemption=0.5),
                   dict(decode=9), Slo(0.9, 10))
  assert miss == (0, 'prefill', ())
  miss = explained(dict(prefill=9), dict(
      decode=0.6, decode_queue=0.5, preemption=0.5), Slo(10, 0.9))
  assert miss == (0, 'decode', ())


def test_the_least_of_a_log_is_its_fastest_step_and_token():
  fold = attribution.of_log(APART)
  assert fold.least()(fold.records[1]) == (2.0, 6.0)


def test_a_prompt_before_an_idle_prefill_instance_waits_for_what_holds_it():
  log = [
      (Arrived(0.0, 0, 8, 2), (prefill(0, 0, 0),)),
      (Arrived(0.0, 1, 8, 1), ()),
      (PrefillDone(2.0, 0, 0), ()),
      (Arrived(3.0, 2, 8, 1), (Migrate(0, 0, 0, (), 1, (), 8),)),
      (Migrated(7.0, 0, 0), (prefill(0, 1, 1), decode(1, 0, 0))),
      (PrefillDone(8.0, 0, 1), (Finish(1, 'length'),)),
  ]
  parts = attribution.of_log(log).parts()[1]
  assert near(parts.before, prefill_queue=2, decode_queue=1, transfer=4,
              prefill=1)


def colocated(rows):
  """Request 0 decodes 1 s steps; request 1's prompt takes 5 s, once."""
  ends = [DecodeDone(7.0, 0, 2, (7.0,))] if not rows else []
  return [
      (Arrived(0.0, 0, 8, 3), (prefill(0, 0, 0),)),
      (PrefillDone(1.0, 0, 0), (decode(0, 1, 0),)),
      (Arrived(1.5, 1, 8, 1), ()),
      (DecodeDone(2.0, 0, 1, (2.0,)), (prefill(0, 2, 1, rows=rows),)),
      (PrefillDone(7.0, 0, 2), (Finish(1, 'length'),) + (
          (Finish(0, 'length'),) if rows else (decode(0, 3, 0),))),
      *((DecodeDone(8.0, 0, 3, (8.0,)), (Finish(0, 'length'),))
        for _ in ends),
  ]


def test_interference_is_a_prompts_step_between_two_tokens():
  parts = attribution.of_log(colocated(())).parts()
  assert near(parts[0].after, interference=5, decode=2)
  assert near(parts[1].before, prefill_queue=0.5, prefill=5)


def test_a_prompt_behind_a_decode_step_in_flight_is_interference():
  log = [
      (Arrived(0.0, 0, 8, 3), (prefill(0, 0, 0),)),
      (PrefillDone(1.0, 0, 0), (decode(0, 1, 0),)),
      (Arrived(2.0, 1, 8, 1), (prefill(0, 2, 1),)),
      (DecodeDone(5.0, 0, 1, (5.0,)), ()),
      (PrefillDone(9.0, 0, 2), (Finish(1, 'length'),)),
  ]
  parts = attribution.of_log(log).parts()[1]
  assert near(parts.before, interference=3, prefill=4)


def test_a_mixed_step_counts_but_for_what_decode_alone_takes():
  log = colocated((0,))
  parts = attribution.of_log(log).parts()[0]
  assert near(parts.after, interference=4, decode=2)  # median: 1 s
  late = latency.Affine((0, 0, 0), (3, 0, 0))
  parts = attribution.of_log(log, [late]).parts()[0]
  assert near(parts.after, interference=2, decode=4)


def test_from_a_preemption_until_it_decodes_again():
  log = [
      (Arrived(0.0, 0, 8, 4), (prefill(0, 0, 0),)),
      (PrefillDone(1.0, 0, 0), (decode(0, 1, 0),)),
      (DecodeDone(2.0, 0, 1, (2.0,)), (Preempt(0, 0),)),
      (Arrived(5.0, 1, 8, 1), (prefill(0, 2, 0),)),
      (PrefillDone(7.0, 0, 2), ()),
      (Arrived(8.0, 2, 8, 1), (decode(0, 3, 0),)),
      (DecodeDone(9.0, 0, 3, (9.0,)), (Finish(0, 'length'),)),
  ]
  fold = attribution.of_log(log)
  assert near(fold.parts()[0].after, decode=2, preemption=6)
  miss = attribution.explain(fold.records[0], fold.parts()[0], Slo(2, 1))
  assert miss == (0, 'preemption', ('preemption',))


def test_what_did_not_end_by_itself_has_its_own_causes():
  log = [(Arrived(0.0, 0, 8, 1), (Reject(0, 'too long'),)),
         (Arrived(0.0, 1, 8, 1), ())]
  fold = attribution.of_log(log)
  told = attribution.attribute(fold.records, fold.parts(), Slo(1, 1))
  assert told.causes['rejected'] == told.causes['failed'] == 1
  assert sum(told.causes.values()) == len(told.misses) == 2
  assert 'see their reasons' in told.advice


# --- simulated runs whose bottleneck is known --------------------------------

FAST = latency.Affine((1e-3, 1e-6, 0), (1e-2, 0, 0))
USUAL = Slo(0.1, 0.03)
WIRE = latency.Link(0.0, 1e12, 1.0)


def run(roles, late, link=WIRE, n=40, gap_s=0.05, prompt=64, out=16,
        pages=512, seqs=64, slo=None, tokens=128):
  config = scheduler.Config(tuple(
      InstanceConfig(role, size, 16, seqs, tokens, 8)
      for role, size in zip(roles, pages if isinstance(pages, tuple)
                            else (pages,) * len(roles), strict=True)), 256)
  requests = [Request(i, i * gap_s, range(prompt),
                      Sampling(max_tokens=out)) for i in range(n)]
  late = late if isinstance(late, tuple) else (late,) * len(roles)
  fold = attribution.Fold(late)
  result = simulator.simulate(config, requests, late, link, on_event=lambda
                              state, *pair: fold.observe(*pair))
  assert [(r.id, r.token_s) for r in fold.records] == [
      (r.id, r.token_s) for r in result.records]
  parts = fold.parts()
  for r in result.records:
    before, after = (sum(half.values()) for half in parts[r.id])
    assert before == pytest.approx(r.ttft_s)
    assert after == pytest.approx(r.tpot_s * (len(r.token_s) - 1))
    assert min(min(half.values()) for half in parts[r.id]) >= 0
  return attribution.attribute(
      result.records, parts, slo or USUAL, lambda r: (
          late[0].prefill_s(((0, r.prompt_len),)), late[-1].decode_s(1, 0)))


SLOW_PREFILL = latency.Affine((0.08, 1e-6, 0), (1e-2, 0, 0))
SLOW_LINK = latency.Link(0.0, 100.0, 1.0)
APART_ROLES = ('prefill', 'decode')


@pytest.mark.parametrize('cause, arguments', (
    ('prefill_queue', dict(roles=APART_ROLES, late=(SLOW_PREFILL, FAST),
                           tokens=64)),
    ('transfer', dict(roles=APART_ROLES, late=FAST, link=SLOW_LINK)),
    # The prefill instance fills behind the link: prompts wait for it too.
    ('transfer', dict(roles=APART_ROLES, late=FAST, link=SLOW_LINK,
                      pages=(16, 512))),
    ('decode_queue', dict(roles=APART_ROLES, late=FAST, pages=(512, 6))),
    ('preemption', dict(roles=('colocated',), late=FAST, prompt=16, out=64,
                        pages=30, n=30, gap_s=0.01, slo=Slo(9, 0.0125))),
    ('interference', dict(roles=('colocated',), late=SLOW_PREFILL, n=20,
                          gap_s=0.2, out=20, slo=Slo(1, 0.013))),
    ('interference', dict(roles=('chunked',), late=SLOW_PREFILL, n=20,
                          gap_s=0.2, out=20, slo=Slo(1, 0.013)))))
def test_a_known_bottleneck_gets_the_advice(cause, arguments):
  told = run(**arguments)
  assert len(told.misses) >= 3
  assert max(told.fixes, key=told.fixes.get) == cause, told
  assert max(told.causes, key=told.causes.get) == cause, told
  assert told.advice.startswith(attribution._CHANGE[cause][0])


def test_no_misses():
  assert run(APART_ROLES, FAST).advice == 'no misses'
