"""Commands in flight and what ends them, by hand."""

import pytest

from dsjax.analysis import pairing
from dsjax.analysis.pairing import Execution, HandOff
from dsjax.scheduling.events import (
  Arrived,
  Chunk,
  DecodeDone,
  InstanceDown,
  Migrate,
  Migrated,
  MigrateFailed,
  PrefillDone,
  Row,
  RunDecode,
  RunPrefill,
  Timer,
)

CHUNKS, ROWS = (Chunk(0, 0, 8, (), True),), (Row(0, 8, 9, ()),)


def prefill(number, instance=0):
  return RunPrefill(instance, number, CHUNKS)


def decode(number, steps=1, instance=1):
  return RunDecode(instance, number, 0, steps, ROWS)


def migrate(epoch, source=0, target=1):
  return Migrate(0, epoch, source, (), target, (), 8)


def test_a_command_starts_when_the_one_before_it_ends():
  log = [(Arrived(1.0, 0, 8, 4), (prefill(0), prefill(1))),
         (PrefillDone(3.0, 0, 0, stages_s=(2.0,)), ()),
         (PrefillDone(4.0, 0, 1), ()),
         (Arrived(6.0, 1, 8, 4), (decode(0, 2), prefill(2))),
         (DecodeDone(9.0, 1, 0, (7.0, 9.0)), ()),
         (PrefillDone(9.5, 0, 2), ())]
  assert list(pairing.ended(log)) == [
      Execution(prefill(0), 1.0, 1.0, 3.0, (3.0,), (2.0,), True),
      Execution(prefill(1), 1.0, 3.0, 4.0, (4.0,), (), True),
      Execution(decode(0, 2), 6.0, 6.0, 9.0, (7.0, 9.0), (), True),
      Execution(prefill(2), 6.0, 6.0, 9.5, (9.5,), (), True)]


def test_a_lost_instance_loses_what_was_in_flight_on_it():
  followed = pairing.Pairing()
  followed.observe(Arrived(1.0, 0, 8, 9), (decode(0, 3), decode(1)))
  followed.observe(Arrived(1.0, 1, 8, 9), (
      prefill(0), migrate(1), migrate(2, 2, 3)))
  down = InstanceDown(5.0, 1, (3.0, 4.0))
  assert followed.observe(down, ()) == [
      Execution(decode(0, 3), 1.0, 1.0, 5.0, (3.0, 4.0), (), False),
      Execution(decode(1), 1.0, 5.0, 5.0, (), (), False),
      HandOff(migrate(1), 1.0, 5.0, True, False)]
  # Late completions are passed over; other instances go on, and so does it.
  assert followed.observe(DecodeDone(6.0, 1, 1), (decode(2),)) == []
  assert followed.observe(Migrated(6.0, 0, 1), ()) == []
  assert followed.observe(DecodeDone(7.0, 1, 2), ()) == [
      Execution(decode(2), 6.0, 6.0, 7.0, (7.0,), (), True)]
  assert followed.observe(PrefillDone(8.0, 0, 0), ())[0].done
  assert followed.observe(Migrated(8.0, 0, 2), ())[0].done


@pytest.mark.parametrize('event, done', (
    (Migrated(3.0, 0, 1), True), (MigrateFailed(3.0, 0, 1), False),
    (Timer(3.0, 0, 1), False), (InstanceDown(3.0, 0), False),
    (InstanceDown(3.0, 1), False)))
def test_what_ends_a_hand_off(event, done):
  followed = pairing.Pairing()
  followed.observe(Arrived(2.0, 0, 8, 4), (migrate(1),))
  for other in (Migrated(2.5, 0, 0), Timer(2.5, 1, 1), InstanceDown(2.5, 2)):
    assert followed.observe(other, ()) == []
  assert followed.observe(event, ()) == [
      HandOff(migrate(1), 2.0, 3.0, False, done)]
  assert followed.observe(event, ()) == []


def test_a_hand_off_is_behind_what_its_source_has_in_flight():
  log = [(Arrived(1.0, 0, 8, 4), (migrate(1), prefill(0), migrate(2))),
         (PrefillDone(2.0, 0, 0), (migrate(3),)),
         *((Migrated(3.0, 0, epoch), ()) for epoch in (1, 2, 3))]
  assert [e.behind for e in pairing.ended(log)
          if isinstance(e, HandOff)] == [False, True, False]
