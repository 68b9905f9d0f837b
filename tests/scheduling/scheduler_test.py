"""The life of requests: batches, dispatch, hand-offs, steps ahead."""

import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import ROLES
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  Arrived,
  Chunk,
  Finish,
  Migrate,
  Reject,
  Row,
  RunDecode,
  RunPrefill,
)
from tests.common.stories import (
  PREFILL_0,
  PRESSED,
  ROOMY,
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

# --- a life on a disaggregated pair -----------------------------------------


def test_one_request_through_an_idle_pair():
  config = pair()
  state = play(config, [
      (arrive(0, 6, 3), PREFILL_0),
      (prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
      (copied(0), RunDecode(1, 0, 0, 2, (Row(0, 6, 2, (0, 1)),))),
      (decoded(1, 0), Finish(0, 'length'))])
  assert at_rest(config, state)


def test_source_pages_are_held_until_the_copy_is_complete():
  life = [arrive(0, 6, 3), prefilled(0, 0), copied(0)]
  assert free(state_after(pair(), *life[:2])[0]) == [6, 6]
  assert free(state_after(pair(), *life)[0]) == [8, 6]


@pytest.mark.parametrize('max_tokens, ended, reason', [
    (1, (), 'length'), (3, (0,), 'stop'), (1, (0,), 'stop')])
def test_an_end_at_the_first_token_never_migrates(max_tokens, ended, reason):
  state = play(pair(), [
      (arrive(0, 6, max_tokens), PREFILL_0),
      (prefilled(0, 0, *ended), Finish(0, reason))])
  assert at_rest(pair(), state)


def test_a_row_takes_a_page_when_its_pages_are_full():
  config = pair(depth=1)
  state = play(config, [
      (arrive(0, 4, 10), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      # The target takes a page more, for the first tick; it is not copied to.
      (prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4)),
      (copied(0), RunDecode(1, 0, 0, 4, (Row(0, 4, 4, (0, 1)),))),
      (decoded(1, 0), RunDecode(1, 1, 4, 4, (Row(0, 4, 8, (0, 1, 2)),))),
      (decoded(1, 1), RunDecode(1, 2, 8, 1, (Row(0, 4, 9, (0, 1, 2, 3)),))),
      (decoded(1, 2), Finish(0, 'length'))])
  assert at_rest(config, state)


def test_eos_in_a_run_keeps_pages_until_what_is_in_flight_is_done():
  story = [
      (arrive(0, 4, 10), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4)),
      (copied(0), RunDecode(1, 0, 0, 4, (Row(0, 4, 4, (0, 1)),)),
       RunDecode(1, 1, 4, 4, (Row(0, 4, 8, (0, 1, 2)),))),
      (decoded(1, 0, (0, 1)), Finish(0, 'stop'))]
  assert free(play(pair(), story)) == [8, 5]
  # The extra tokens of command 1 are ignored, a second EOS among them.
  state = play(pair(), [*story, (cancel(0),), (decoded(1, 1, (0, 0)),)])
  assert at_rest(pair(), state)


def test_only_decode_instances_run_ahead_unless_asked():
  for run_ahead, want in ((None, (1, 4)), (3, (3, 3))):
    steps = []
    for config, story in (
        (config_of(instance('colocated'), run_ahead=run_ahead), ()),
        (pair(run_ahead=run_ahead), (prefilled(0, 0), copied(0)))):
      _, commands = state_after(config, arrive(0, 4, 9), *story)
      steps += [c.steps for c in commands if isinstance(c, RunDecode)][:1]
    assert tuple(steps) == want


def test_an_ended_row_leaves_the_others_running():
  config = config_of(instance('colocated', num_pages=16), depth=1)
  _, commands = state_after(
      config, arrive(0, 4, 9), arrive(1, 4, 9), prefilled(0, 0),
      prefilled(0, 1), decoded(0, 2, (0, 3)))
  assert commands == [Finish(0, 'stop'),
                      RunDecode(0, 3, 4, 4, (Row(1, 4, 8, (2, 3, 0)),))]


# --- prefill batches --------------------------------------------------------


def test_batches_stay_within_l_m_and_longer_prompts_run_in_pieces():
  long = (10, 11, 12, 13, 14)
  play(pair({'num_pages': 32, 'max_seqs': 8},
            {'num_pages': 16, 'max_seqs': 1}), [
      (arrive(0, 16, 2),
       RunPrefill(0, 0, (Chunk(0, 0, 16, (0, 1, 2, 3), True),))),
      (arrive(1, 6, 2),), (arrive(2, 6, 2),), (arrive(3, 6, 2),),
      (arrive(4, 20, 2),),
      (prefilled(0, 0), Migrate(0, 1, 0, (0, 1, 2, 3), 1, (0, 1, 2, 3), 16),
       RunPrefill(0, 1, (Chunk(1, 0, 6, (4, 5), True),
                         Chunk(2, 0, 6, (6, 7), True)))),
      (prefilled(0, 1), RunPrefill(0, 2, (Chunk(3, 0, 6, (8, 9), True),))),
      (prefilled(0, 2), RunPrefill(0, 3, (Chunk(4, 0, 16, long, False),))),
      (arrive(5, 6, 2),), (arrive(6, 7, 2),),
      (prefilled(0, 3),
       RunPrefill(0, 4, (Chunk(4, 16, 20, long, True),
                         Chunk(5, 0, 6, (15, 16), True))))])


def test_a_batch_has_at_most_prefill_seqs_prompts():
  play(pair({'prefill_seqs': 2}, {'max_seqs': 1}), [
      (arrive(0, 4, 2), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (arrive(1, 4, 2),), (arrive(2, 4, 2),), (arrive(3, 4, 2),),
      (prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4),
       RunPrefill(0, 1, (Chunk(1, 0, 4, (1,), True),
                         Chunk(2, 0, 4, (2,), True)))),
      (prefilled(0, 1), RunPrefill(0, 2, (Chunk(3, 0, 4, (3,), True),)))])


def test_a_burst_is_one_batch_though_its_last_is_refused():
  play(pair(), [
      (Arrived(0, 0, 4, 2, more=True),),
      (Arrived(0, 1, 4, 2, more=True),),
      (arrive(2, 40, 2), Reject(2, 'prompt of 40 tokens and max_tokens=2'
                                ' exceed the context of 32 tokens'),
       RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),
                         Chunk(1, 0, 4, (1,), True))))])


@pytest.mark.parametrize('last, rows', [
    (copied(1), [(0, 4), (1, 4)]), (copied(7), [(0, 4)])])
def test_hand_offs_that_end_together_begin_together(last, rows):
  """Though the last of them be of a request that is gone."""
  config = pair()
  before = [Arrived(0, 0, 4, 3, more=True), arrive(1, 4, 3), prefilled(0, 0)]
  first = copied(0)._replace(more=True)
  state, commands = state_after(config, *before, first)
  assert commands == []
  run = scheduler.Run(config, state_after(config, *before)[0])
  assert run.apply(first) == [] and run.freeze() == state
  if last.id == 7:
    state, commands = state_after(config, *before, first, last)
  else:
    state, commands = scheduler.step(config, state, last)
  assert [(row.id, row.base) for row in commands[0].rows] == rows
  assert run.apply(last) == list(commands)


def test_prefill_depth():
  play(pair(prefill_depth=2), [
      (arrive(0, 6, 3), PREFILL_0),
      (arrive(1, 6, 3), RunPrefill(0, 1, (Chunk(1, 0, 6, (2, 3), True),))),
      (arrive(2, 6, 3),)])


def test_prefill_batches_overlap_in_pipeline_stages():
  pieces = (0, 1, 2, 3, 4)
  play(pair({'pp': 2}), [
      (arrive(0, 20, 2), RunPrefill(0, 0, (Chunk(0, 0, 16, pieces, False),)),
       RunPrefill(0, 1, (Chunk(0, 16, 20, pieces, True),))),
      (arrive(1, 4, 2),),
      (prefilled(0, 0), RunPrefill(0, 2, (Chunk(1, 0, 4, (5,), True),))),
      (prefilled(0, 1), Migrate(0, 1, 0, pieces, 1, pieces, 20))])


# --- dispatch and back-pressure ---------------------------------------------


def test_arrivals_go_to_the_shortest_queue_in_tokens():
  config = config_of(instance('prefill'), instance('prefill'),
                     instance('decode'))
  state = play(config, [
      (arrive(0, 4, 2), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (arrive(1, 4, 2), RunPrefill(1, 0, (Chunk(1, 0, 4, (0,), True),))),
      (arrive(2, 10, 2),), (arrive(3, 3, 2),), (arrive(4, 3, 2),),
      (arrive(5, 5, 2),), (arrive(6, 1, 2),)])
  assert [i.queue for i in state.instances] == [(2, 6), (3, 4, 5), ()]


def test_a_step_copies_no_queue_that_does_not_change():
  config = config_of(instance('colocated', max_seqs=1), depth=1)
  before, _ = state_after(config, arrive(0, 4, 9), arrive(1, 4, 2),
                          arrive(2, 4, 2), prefilled(0, 0))
  after, commands = scheduler.step(config, before, decoded(0, 1))
  assert commands and before.instances[0].queue == (1, 2)
  assert after.instances[0].queue is before.instances[0].queue


def test_finished_prefills_go_to_the_least_loaded_decode_instance():
  config = config_of(instance('prefill'), instance('decode'),
                     instance('decode'))
  play(config, [
      (arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (arrive(1, 4, 9),), (arrive(2, 4, 9),),
      (prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4),
       RunPrefill(0, 1, (Chunk(1, 0, 4, (1,), True),
                         Chunk(2, 0, 4, (2,), True)))),
      (prefilled(0, 1), Migrate(2, 1, 0, (2,), 1, (2,), 4),
       Migrate(1, 1, 0, (1,), 2, (0,), 4))])


def test_kv_not_pulled_holds_back_prefill_until_decode_frees_pages():
  play(pair({'num_pages': 4}, {'num_pages': 4}), PRESSED + [
      (arrive(3, 8, 2),),  # no page left at the source
      (decoded(1, 0), Finish(0, 'length'),
       Migrate(1, 1, 0, (0, 1), 1, (0, 1), 8)),
      (copied(1), RunPrefill(0, 3, (Chunk(3, 0, 8, (0, 1), True),)),
       RunDecode(1, 1, 1, 1, (Row(1, 7, 2, (0, 1, 2)),)))])


def test_a_pull_leaves_a_page_for_each_running_row():
  config = pair(decode={'num_pages': 4}, depth=1)
  life = [arrive(0, 4, 9), arrive(1, 4, 5), prefilled(0, 0), copied(0)]
  _, commands = state_after(config, *life, prefilled(0, 1))
  assert commands == []  # two pages are wanted, two free, one row running


# --- one instance for both phases -------------------------------------------


def test_colocated_runs_prefill_before_decode():
  play(config_of(instance('colocated', num_pages=16), depth=1), [
      (arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0, 1), True),))),
      (prefilled(0, 0), RunDecode(0, 1, 0, 4, (Row(0, 4, 4, (0, 1)),))),
      (arrive(1, 4, 9),),
      (decoded(0, 1), RunPrefill(0, 2, (Chunk(1, 0, 4, (2, 3), True),), 4)),
      (prefilled(0, 2),
       RunDecode(0, 3, 4, 4, (Row(0, 4, 8, (0, 1, 4)),
                              Row(1, 0, 8, (2, 3)))))])


def test_chunked_rows_ride_in_prefill_within_one_budget():
  config = config_of(instance('chunked', num_pages=16, prefill_tokens=8),
                     depth=1)
  row = Row(0, 4, 8, (0, 1, 2))
  play(config, [
      (arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0, 1), True),))),
      (prefilled(0, 0), RunDecode(0, 1, 0, 4, (Row(0, 4, 4, (0, 1)),))),
      (arrive(1, 10, 9),),
      (decoded(0, 1),
       RunPrefill(0, 2, (Chunk(1, 0, 7, (3, 4, 5), False),), 4, (row,))),
      (prefilled(0, 2),
       RunPrefill(0, 3, (Chunk(1, 7, 10, (3, 4, 5), True),), 5, (row,))),
      (prefilled(0, 3),
       RunDecode(0, 4, 6, 2, (row, Row(1, 4, 8, (3, 4, 5)))))])


# --- page sizes -------------------------------------------------------------


@pytest.mark.parametrize('source, target, copy, row', [
    (2, 8, Migrate(0, 1, 0, (0, 1, 2), 1, (0,), 5), Row(0, 5, 3, (0,))),
    (8, 2, Migrate(0, 1, 0, (0,), 1, (0, 1, 2), 5), Row(0, 5, 1, (0, 1, 2))),
    (4, 5, Migrate(0, 1, 0, (0, 1), 1, (0,), 5), Row(0, 5, 5, (0, 1)))])
def test_a_copy_names_the_pages_of_either_size(source, target, copy, row):
  config = pair({'page_size': source}, {'page_size': target}, run_ahead=1,
                depth=1)
  pages_0 = copy.source_pages
  play(config, [
      (arrive(0, 5, 9), RunPrefill(0, 0, (Chunk(0, 0, 5, pages_0, True),))),
      (prefilled(0, 0), copy),
      (copied(0), RunDecode(1, 0, 0, 1, (row,)))])


def test_decode_instances_may_have_pages_of_their_own_size():
  config = EngineConfig(max_len=64, page_size=4, max_seqs=2,
                        decode_page_size=16)
  sizes = {role: (c.page_size, c.num_pages) for role in ROLES
           for c in [config.instance(role)]}
  assert sizes.pop('decode') == (16, 8)
  assert sizes == dict.fromkeys(sizes, (4, 32))
  assert EngineConfig(page_size=4).instance('decode').page_size == 4
  assert [config.instance('decode', pp).pp for pp in (1, 3)] == [1, 3]


@pytest.mark.parametrize('size', [0, -1, 2.0, True])
def test_a_page_size_of_decode_is_an_integer_above_0(size):
  with pytest.raises(InputError,
                     match=f'EngineConfig.decode_page_size={size}: must be'):
    EngineConfig(decode_page_size=size)


# --- depth and run-ahead ----------------------------------------------------

LONG = [arrive(0, 1, 15), prefilled(0, 0), copied(0)]  # 14 decode steps


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_depth_bounds_what_is_in_flight(depth):
  config = pair(ROOMY, ROOMY, depth=depth, run_ahead=2)
  _, commands = state_after(config, *LONG)
  row = (Row(0, 1, 14, (0,)),)
  assert commands == [RunDecode(1, n, 2 * n, 2, row) for n in range(depth)]


@pytest.mark.parametrize('run_ahead, steps', [
    (1, [1] * 14), (4, [4, 4, 4, 2]), (100, [14])])
def test_run_ahead_while_quiet_and_never_past_until(run_ahead, steps):
  config = pair(ROOMY, ROOMY, depth=1, run_ahead=run_ahead)
  state, commands = state_after(config, *LONG)
  seen = []
  while isinstance(commands[0], RunDecode):
    seen.append(commands[0].steps)
    done = decoded(1, commands[0].number)
    state, commands = scheduler.step(config, state, done)
  assert seen == steps and commands == (Finish(0, 'length'),)


@pytest.mark.parametrize('decode, more', [
    ({'max_seqs': 1}, (arrive(1, 1, 4), prefilled(0, 1))),  # not pulled yet
    ({}, (arrive(1, 1, 4), prefilled(0, 1)))])  # on its way
def test_one_step_at_a_time_while_something_waits(decode, more):
  config = pair(ROOMY, ROOMY | decode, depth=1)
  _, commands = state_after(config, *LONG, *more, decoded(1, 0))
  assert commands == [RunDecode(1, 1, 4, 1, (Row(0, 1, 14, (0,)),))]


def test_one_step_at_a_time_while_a_prompt_waits_for_pages():
  config = config_of(instance('colocated', num_pages=4), depth=1)
  _, commands = state_after(config, arrive(0, 4, 9), prefilled(0, 0),
                            arrive(1, 12, 2), decoded(0, 1))
  assert commands == [RunDecode(0, 2, 4, 1, (Row(0, 4, 8, (0, 1, 2)),))]
