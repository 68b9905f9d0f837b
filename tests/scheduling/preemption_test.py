"""Requests that leave before their end: preempted, or cancelled."""

import pytest

from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  Chunk,
  Finish,
  Migrate,
  Preempt,
  Row,
  RunDecode,
  RunPrefill,
)
from tests.common.stories import (
  GONE,
  PREFILL_0,
  PRESSED,
  arrive,
  at_rest,
  cancel,
  config_of,
  copied,
  decoded,
  free,
  instance,
  pair,
  play,
  prefilled,
  state_after,
)

# --- preemption -------------------------------------------------------------

TIGHT = instance('colocated', num_pages=5, page_size=2)
FULL = [  # two rows, each about to need a page of the one that is free
    (arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0, 1), True),))),
    (arrive(1, 2, 6),),
    (prefilled(0, 0), RunPrefill(0, 1, (Chunk(1, 0, 2, (2, 3), True),))),
    (prefilled(0, 1), RunDecode(0, 2, 0, 2, (Row(0, 2, 2, (0, 1)),
                                             Row(1, 2, 2, (2, 3))))),
]


def test_the_latest_arrival_is_preempted_and_recomputed():
  config = config_of(TIGHT, depth=1)
  row = Row(0, 2, 4, (0, 1, 2))
  state = play(config, FULL + [
      (decoded(0, 2), Preempt(1, 0), RunDecode(0, 3, 2, 1, (row,))),
      (decoded(0, 3), RunDecode(0, 4, 3, 1, (row,))),
      (decoded(0, 4), RunDecode(0, 5, 4, 1, (Row(0, 2, 5, (0, 1, 2, 3)),))),
      # Its prompt is now 2 tokens and the 3 that were emitted.
      (decoded(0, 5), Finish(0, 'length'),
       RunPrefill(0, 6, (Chunk(1, 0, 5, (0, 1, 2), True),), 5)),
      (prefilled(0, 6), RunDecode(0, 7, 5, 1, (Row(1, 0, 6, (0, 1, 2)),))),
      (decoded(0, 7), RunDecode(0, 8, 6, 1, (Row(1, 0, 7, (0, 1, 2, 3)),))),
      (decoded(0, 8), Finish(1, 'length'))])
  assert at_rest(config, state)


def test_a_preempted_request_keeps_its_place_in_the_queue():
  state = play(config_of(TIGHT, depth=1), FULL + [
      (arrive(2, 2, 6),),
      (decoded(0, 2), Preempt(1, 0),
       RunDecode(0, 3, 2, 1, (Row(0, 2, 4, (0, 1, 2)),)))])
  assert state.instances[0].queue == (1, 2)


IN_FLIGHT = [  # as FULL, one more command ahead
    (arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0, 1), True),)),
     RunDecode(0, 1, 0, 2, (Row(0, 2, 2, (0, 1)),))),
    (arrive(1, 2, 6),),
    (prefilled(0, 0), RunPrefill(0, 2, (Chunk(1, 0, 2, (2, 3), True),), 2)),
    (decoded(0, 1), RunDecode(0, 3, 2, 2, (Row(0, 2, 4, (0, 1, 4)),
                                           Row(1, 0, 4, (2, 3))))),
    (prefilled(0, 2),),  # no page for either row; 3 is still in flight
]


def test_preemption_waits_for_commands_in_flight():
  play(config_of(TIGHT, depth=2), IN_FLIGHT + [
      (decoded(0, 3), Preempt(1, 0),
       RunDecode(0, 4, 4, 1, (Row(0, 2, 5, (0, 1, 4, 2)),)))])


@pytest.mark.parametrize('event, reason', [
    (decoded(0, 3, (1, 0)), 'stop'), (cancel(1), 'cancelled')])
def test_an_end_overtakes_a_preemption(event, reason):
  state, commands = state_after(config_of(TIGHT, depth=2),
                                *(event for event, *_ in IN_FLIGHT), event)
  assert commands[0] == Finish(1, reason)
  assert not any(isinstance(c, Preempt) for c in commands)
  if reason == 'cancelled':
    state, commands = scheduler.step(config_of(TIGHT, depth=2), state,
                                     decoded(0, 3))
    assert not any(isinstance(c, Preempt) for c in commands)
  assert set(state.seqs) == {0}


AGAIN = [  # request 1 is preempted by its decode instance and copied anew
    (arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0,), True),))),
    (arrive(1, 2, 6),),
    (prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 2),
     RunPrefill(0, 1, (Chunk(1, 0, 2, (1,), True),))),
    (prefilled(0, 1), Migrate(1, 1, 0, (1,), 1, (2,), 2)),
    (copied(0), RunDecode(1, 0, 0, 1, (Row(0, 2, 2, (0, 1)),))),
    (copied(1),),
    (decoded(1, 0), RunDecode(1, 1, 1, 1, (Row(0, 2, 2, (0, 1)),
                                           Row(1, 1, 3, (2, 3))))),
    (decoded(1, 1), RunDecode(1, 2, 2, 1, (Row(0, 2, 4, (0, 1, 4)),
                                           Row(1, 1, 3, (2, 3))))),
    (decoded(1, 2), Preempt(1, 1),
     RunDecode(1, 3, 3, 1, (Row(0, 2, 4, (0, 1, 4)),)),
     RunPrefill(0, 2, (Chunk(1, 0, 5, (0, 1, 2), True),))),
    (prefilled(0, 2),),
    (decoded(1, 3), RunDecode(1, 4, 4, 1, (Row(0, 2, 5, (0, 1, 4, 2)),))),
    (decoded(1, 4), Finish(0, 'length'),
     Migrate(1, 2, 0, (0, 1, 2), 1, (0, 1, 2), 5)),
]


def test_a_completion_of_an_earlier_hand_off_is_ignored():
  small = {'num_pages': 5, 'page_size': 2}
  config = pair({'page_size': 2}, small, depth=1)
  before = play(config, AGAIN)
  assert play(config, [*AGAIN, (copied(1, epoch=1),)]) == before
  play(config, AGAIN + [
      (copied(1, epoch=2), RunDecode(1, 5, 5, 1, (Row(1, 0, 6, (0, 1, 2)),))),
      (copied(1, epoch=2),)])


def test_a_row_gives_way_where_only_a_younger_copy_holds_pages():
  """It is no victim while it lands; the older one is recomputed behind it."""
  config = pair({'page_size': 2}, {'page_size': 2, 'num_pages': 5}, depth=1)
  row = Row(0, 2, 2, (0, 1))
  play(config, [
      (arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0,), True),))),
      (arrive(1, 2, 6),),
      (prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 2),
       RunPrefill(0, 1, (Chunk(1, 0, 2, (1,), True),))),
      (prefilled(0, 1), Migrate(1, 1, 0, (1,), 1, (2,), 2)),
      (copied(0), RunDecode(1, 0, 0, 1, (row,))),
      (decoded(1, 0), RunDecode(1, 1, 1, 1, (row,))),
      (decoded(1, 1), RunDecode(1, 2, 2, 1, (Row(0, 2, 4, (0, 1, 4)),))),
      (decoded(1, 2), RunDecode(1, 3, 3, 1, (Row(0, 2, 4, (0, 1, 4)),))),
      (decoded(1, 3), Preempt(0, 1),
       RunPrefill(0, 2, (Chunk(0, 0, 7, (0, 2, 3, 4), True),))),
      (prefilled(0, 2), Finish(0, 'length')),
      (copied(1), RunDecode(1, 4, 4, 2, (Row(1, -2, 6, (2, 3)),)))])


# --- cancellation -----------------------------------------------------------


def test_cancelled_in_the_queue():
  config = pair()
  state, commands = state_after(config, arrive(1, 6, 3), arrive(0, 6, 3),
                                cancel(0))
  assert commands == [GONE] and set(state.seqs) == {1}
  assert state.instances[0].backlog == 0


def test_cancelled_while_its_prefill_is_in_flight():
  state = play(pair(), [(arrive(0, 6, 3), PREFILL_0), (cancel(0), GONE)])
  assert free(state) == [6, 8]
  state = play(pair(), [(arrive(0, 6, 3), PREFILL_0), (cancel(0), GONE),
                        (prefilled(0, 0),)])
  assert at_rest(pair(), state)


def test_cancelled_between_the_pieces_of_a_long_prompt():
  config = pair()
  pieces = (0, 1, 2, 3, 4)
  state = play(config, [
      (arrive(0, 20, 2), RunPrefill(0, 0, (Chunk(0, 0, 16, pieces, False),))),
      (cancel(0), GONE), (prefilled(0, 0),)])
  assert at_rest(config, state)


def test_cancelled_while_its_kv_waits_to_be_pulled():
  config = pair({'num_pages': 4}, {'num_pages': 4})
  state = play(config, PRESSED + [
      (arrive(3, 8, 2),),
      (cancel(1), Finish(1, 'cancelled'),
       RunPrefill(0, 3, (Chunk(3, 0, 8, (0, 1), True),)))])
  assert state.instances[1].pulls == (2,)


def test_cancelled_while_it_migrates_keeps_both_sides_until_migrated():
  story = [(arrive(0, 6, 3), PREFILL_0),
           (prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
           (cancel(0), GONE)]
  assert free(play(pair(), story)) == [6, 6]
  assert at_rest(pair(), play(pair(), [*story, (copied(0),)]))


def test_cancelled_while_it_decodes():
  config = pair()
  story = [(arrive(0, 6, 3), PREFILL_0),
           (prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
           (copied(0), RunDecode(1, 0, 0, 2, (Row(0, 6, 2, (0, 1)),))),
           (cancel(0), GONE), (cancel(0),)]  # the second time is too late
  assert free(play(config, story)) == [8, 6]
  assert at_rest(config, play(config, [*story, (decoded(1, 0),)]))


def test_a_cancel_of_an_unknown_request_is_ignored():
  assert play(pair(), [(cancel(7),)]) == scheduler.init(pair())
