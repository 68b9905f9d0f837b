"""Micro-batches of pipeline stages: turns, rows, pieces."""

import pytest

from dsjax.config.checks import InputError
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  Chunk,
  Finish,
  Preempt,
  Row,
  RunDecode,
  RunPrefill,
)
from tests.common.stories import (
  TWO,
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
  staged,
  state_after,
)

ROWS = [Row(0, 4, 8, (0,)), Row(1, 4, 8, (1,))]


def test_micro_batches_take_turns_one_step_at_a_time():
  first, second = ROWS
  state = play(staged(depth=1), [
      (copied(0), RunDecode(1, 0, 0, 1, (first,))),
      (copied(1), RunDecode(1, 1, 0, 1, (second,))),
      (decoded(1, 0), RunDecode(1, 2, 1, 1, (first,))),
      (decoded(1, 1), RunDecode(1, 3, 1, 1, (second,))),
      # Its end is known as its last step starts; the other goes on.
      *((decoded(1, n), RunDecode(1, n + 2, n // 2 + 1, 1, (ROWS[n % 2],)))
        for n in range(2, 14)),
      (decoded(1, 14), Finish(0, 'length')),
      (decoded(1, 15), Finish(1, 'length'))], before=TWO)
  assert at_rest(staged(), state)


def test_each_micro_batch_has_depth_commands_in_flight():
  first, second = ROWS
  play(staged(depth=2), [
      # The other is empty: nothing to take turns with.
      (copied(0), RunDecode(1, 0, 0, 1, (first,)),
       RunDecode(1, 1, 1, 1, (first,))),
      # Then the first is waited for, or 0, 0, 1, 1 would go on for ever.
      (copied(1), RunDecode(1, 2, 0, 1, (second,))),
      (decoded(1, 0), RunDecode(1, 3, 2, 1, (first,)),
       RunDecode(1, 4, 1, 1, (second,))),
      (decoded(1, 1), RunDecode(1, 5, 3, 1, (first,))),
      (decoded(1, 2), RunDecode(1, 6, 2, 1, (second,)))], before=TWO)


def test_a_request_joins_the_micro_batch_with_the_fewest_rows():
  state, _ = state_after(staged(depth=1), *TWO, copied(0), copied(1),
                         arrive(2, 4, 9), prefilled(0, 2), copied(2),
                         arrive(3, 4, 9), prefilled(0, 3), copied(3))
  first, two = state.instances[1].batches
  assert [r.id for r in first.rows] == [0, 2]
  assert [r.id for r in two.rows] == [1, 3]
  _, (command,) = scheduler.step(staged(depth=1), state, decoded(1, 0))
  # Its first tick is the micro-batch's second.
  assert command == RunDecode(1, 2, 1, 1, (ROWS[0], Row(2, 3, 9, (2,))))
  assert first.tick == two.tick == 1


def test_an_ended_row_keeps_its_pages_until_every_micro_batch_is_done():
  config, second = staged(depth=1), ROWS[1]
  story = [(copied(1), RunDecode(1, 1, 0, 1, (second,))),
           (cancel(0), Finish(0, 'cancelled')), (decoded(1, 0),)]
  before = [*TWO, copied(0)]
  assert free(play(config, story, before)) == [8, 6]
  story.append((decoded(1, 1), RunDecode(1, 2, 1, 1, (second,))))
  assert free(play(config, story, before)) == [8, 7]


def test_preemption_takes_the_latest_arrival_of_any_micro_batch():
  config = pair({'page_size': 2}, {'page_size': 2, 'num_pages': 5, 'pp': 2},
                depth=1)
  first, second = Row(0, 2, 2, (0, 1)), Row(1, 2, 2, (2, 3))
  play(config, [
      (copied(0), RunDecode(1, 1, 0, 1, (first,))),
      (decoded(1, 0), RunDecode(1, 2, 1, 1, (second,))),
      (decoded(1, 1), RunDecode(1, 3, 1, 1, (first,))),
      (decoded(1, 2), RunDecode(1, 4, 2, 1, (Row(1, 2, 4, (2, 3, 4)),))),
      (decoded(1, 3),),  # no page for request 0; 4 is still in flight
      (decoded(1, 4), Preempt(1, 1),
       RunPrefill(0, 2, (Chunk(1, 0, 6, (0, 1, 2), True),)),
       RunDecode(1, 5, 2, 1, (Row(0, 2, 4, (0, 1, 2)),)))],
      before=[arrive(0, 2, 6), arrive(1, 2, 6), prefilled(0, 0),
              prefilled(0, 1), copied(1)])


def test_prompt_pieces_ride_with_the_micro_batch_whose_turn_it_is():
  config = config_of(instance('chunked', num_pages=16, prefill_tokens=8, pp=2),
                     depth=1)
  row, pieces = Row(0, 4, 4, (0, 1)), (2, 3, 4, 5, 6, 7)
  play(config, [
      (arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0, 1), True),))),
      (prefilled(0, 0), RunDecode(0, 1, 0, 1, (row,))),
      # The other micro-batch is empty; its turn has room for a piece.
      (arrive(1, 20, 9),
       RunPrefill(0, 2, (Chunk(1, 0, 8, pieces, False),))),
      (decoded(0, 1),
       RunPrefill(0, 3, (Chunk(1, 8, 15, pieces, False),), 1, (row,))),
      (prefilled(0, 2),
       RunPrefill(0, 4, (Chunk(1, 15, 20, pieces, True),))),
      (prefilled(0, 3), RunDecode(0, 5, 2, 1, (row,))),
      (prefilled(0, 4), RunDecode(0, 6, 0, 1, (Row(1, 20, 4, pieces),)))])


@pytest.mark.parametrize('pp', [0, 1.5, True])
def test_stages_are_an_integer_above_0(pp):
  with pytest.raises(InputError, match=f'InstanceConfig.pp={pp}: must'):
    instance('decode', pp=pp)
