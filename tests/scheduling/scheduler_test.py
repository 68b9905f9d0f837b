"""Stories of (event, commands) by hand; random worlds; replay of a log."""

import collections
import functools
import json

import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.placement import ROLES
from dsjax.scheduling import event_log, lifecycle, page_pool, scheduler
from dsjax.scheduling.events import (
  Abort,
  Arrived,
  Cancelled,
  Chunk,
  DecodeDone,
  Drain,
  Fail,
  Finish,
  InstanceDown,
  InstanceUp,
  Migrate,
  Migrated,
  MigrateFailed,
  Preempt,
  PrefillDone,
  Reject,
  Row,
  RunDecode,
  RunPrefill,
  Timer,
)
from experiments.verify import schedules, world


def _instance(role, num_pages=8, page_size=4, max_seqs=4, prefill_tokens=16,
              prefill_seqs=4, pp=1):
  return InstanceConfig(role, num_pages, page_size, max_seqs, prefill_tokens,
                        prefill_seqs, pp)


def _config(*instances, max_len=32, run_ahead=4, **changes):
  return scheduler.Config(instances, max_len, run_ahead=run_ahead, **changes)


def _pair(prefill=None, decode=None, **changes):
  return _config(_instance('prefill', **prefill or {}),
                 _instance('decode', **decode or {}), **changes)


def _arrive(id, prompt_len, max_tokens):
  return Arrived(0, id, prompt_len, max_tokens)


def _cancel(id):
  return Cancelled(0, id)


def _prefilled(instance, number, *ended):
  return PrefillDone(0, instance, number, ended)


def _decoded(instance, number, *ended):
  return DecodeDone(0, instance, number, (), ended)


def _copied(id, epoch=1):
  return Migrated(0, id, epoch)


def _play(config, story, before=()):
  """The state after a story whose every event gave exactly its commands.

  before: events that come first, whatever their commands.
  """
  state, _ = _after(config, *before)
  for event, *commands in story:
    state, issued = scheduler.step(config, state, event)
    assert list(issued) == commands, event
    scheduler.check(state)
  return state


def _after(config, *events):
  """The state after events and the commands of the last."""
  state, commands = scheduler.init(config), ()
  for event in events:
    state, commands = scheduler.step(config, state, event)
    scheduler.check(state)
  return state, list(commands)


def _free(state):
  return [page_pool.num_free(instance.pool) for instance in state.instances]


def _at_rest(config, state):
  return scheduler.idle(state) and _free(state) == [
      c.num_pages for c in config.instances]


# --- a life on a disaggregated pair -----------------------------------------

PREFILL_0 = RunPrefill(0, 0, (Chunk(0, 0, 6, (0, 1), True),))


def test_one_request_through_an_idle_pair():
  config = _pair()
  state = _play(config, [
      (_arrive(0, 6, 3), PREFILL_0),
      (_prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
      (_copied(0), RunDecode(1, 0, 0, 2, (Row(0, 6, 2, (0, 1)),))),
      (_decoded(1, 0), Finish(0, 'length'))])
  assert _at_rest(config, state)


def test_source_pages_are_held_until_the_copy_is_complete():
  life = [_arrive(0, 6, 3), _prefilled(0, 0), _copied(0)]
  assert _free(_after(_pair(), *life[:2])[0]) == [6, 6]
  assert _free(_after(_pair(), *life)[0]) == [8, 6]


@pytest.mark.parametrize('max_tokens, ended, reason', [
    (1, (), 'length'), (3, (0,), 'stop'), (1, (0,), 'stop')])
def test_an_end_at_the_first_token_never_migrates(max_tokens, ended, reason):
  state = _play(_pair(), [
      (_arrive(0, 6, max_tokens), PREFILL_0),
      (_prefilled(0, 0, *ended), Finish(0, reason))])
  assert _at_rest(_pair(), state)


def test_a_row_takes_a_page_when_its_pages_are_full():
  config = _pair(depth=1)
  state = _play(config, [
      (_arrive(0, 4, 10), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      # The target takes a page more, for the first tick; it is not copied to.
      (_prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4)),
      (_copied(0), RunDecode(1, 0, 0, 4, (Row(0, 4, 4, (0, 1)),))),
      (_decoded(1, 0), RunDecode(1, 1, 4, 4, (Row(0, 4, 8, (0, 1, 2)),))),
      (_decoded(1, 1), RunDecode(1, 2, 8, 1, (Row(0, 4, 9, (0, 1, 2, 3)),))),
      (_decoded(1, 2), Finish(0, 'length'))])
  assert _at_rest(config, state)


def test_eos_in_a_run_keeps_pages_until_what_is_in_flight_is_done():
  story = [
      (_arrive(0, 4, 10), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (_prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4)),
      (_copied(0), RunDecode(1, 0, 0, 4, (Row(0, 4, 4, (0, 1)),)),
       RunDecode(1, 1, 4, 4, (Row(0, 4, 8, (0, 1, 2)),))),
      (_decoded(1, 0, (0, 1)), Finish(0, 'stop'))]
  assert _free(_play(_pair(), story)) == [8, 5]
  # The extra tokens of command 1 are ignored, a second EOS among them.
  state = _play(_pair(), [*story, (_cancel(0),), (_decoded(1, 1, (0, 0)),)])
  assert _at_rest(_pair(), state)


def test_only_decode_instances_run_ahead_unless_asked():
  for run_ahead, want in ((None, (1, 4)), (3, (3, 3))):
    steps = []
    for config, story in (
        (_config(_instance('colocated'), run_ahead=run_ahead), ()),
        (_pair(run_ahead=run_ahead), (_prefilled(0, 0), _copied(0)))):
      _, commands = _after(config, _arrive(0, 4, 9), *story)
      steps += [c.steps for c in commands if isinstance(c, RunDecode)][:1]
    assert tuple(steps) == want


def test_an_ended_row_leaves_the_others_running():
  config = _config(_instance('colocated', num_pages=16), depth=1)
  _, commands = _after(
      config, _arrive(0, 4, 9), _arrive(1, 4, 9), _prefilled(0, 0),
      _prefilled(0, 1), _decoded(0, 2, (0, 3)))
  assert commands == [Finish(0, 'stop'),
                      RunDecode(0, 3, 4, 4, (Row(1, 4, 8, (2, 3, 0)),))]


# --- prefill batches --------------------------------------------------------


def test_batches_stay_within_l_m_and_longer_prompts_run_in_pieces():
  long = (10, 11, 12, 13, 14)
  _play(_pair({'num_pages': 32, 'max_seqs': 8},
              {'num_pages': 16, 'max_seqs': 1}), [
      (_arrive(0, 16, 2),
       RunPrefill(0, 0, (Chunk(0, 0, 16, (0, 1, 2, 3), True),))),
      (_arrive(1, 6, 2),), (_arrive(2, 6, 2),), (_arrive(3, 6, 2),),
      (_arrive(4, 20, 2),),
      (_prefilled(0, 0), Migrate(0, 1, 0, (0, 1, 2, 3), 1, (0, 1, 2, 3), 16),
       RunPrefill(0, 1, (Chunk(1, 0, 6, (4, 5), True),
                         Chunk(2, 0, 6, (6, 7), True)))),
      (_prefilled(0, 1), RunPrefill(0, 2, (Chunk(3, 0, 6, (8, 9), True),))),
      (_prefilled(0, 2), RunPrefill(0, 3, (Chunk(4, 0, 16, long, False),))),
      (_arrive(5, 6, 2),), (_arrive(6, 7, 2),),
      (_prefilled(0, 3),
       RunPrefill(0, 4, (Chunk(4, 16, 20, long, True),
                         Chunk(5, 0, 6, (15, 16), True))))])


def test_a_batch_has_at_most_prefill_seqs_prompts():
  _play(_pair({'prefill_seqs': 2}, {'max_seqs': 1}), [
      (_arrive(0, 4, 2), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (_arrive(1, 4, 2),), (_arrive(2, 4, 2),), (_arrive(3, 4, 2),),
      (_prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4),
       RunPrefill(0, 1, (Chunk(1, 0, 4, (1,), True),
                         Chunk(2, 0, 4, (2,), True)))),
      (_prefilled(0, 1), RunPrefill(0, 2, (Chunk(3, 0, 4, (3,), True),)))])


def test_a_burst_is_one_batch_though_its_last_is_refused():
  _play(_pair(), [
      (Arrived(0, 0, 4, 2, more=True),),
      (Arrived(0, 1, 4, 2, more=True),),
      (_arrive(2, 40, 2), Reject(2, 'prompt of 40 tokens and max_tokens=2'
                                 ' exceed the context of 32 tokens'),
       RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),
                         Chunk(1, 0, 4, (1,), True))))])


@pytest.mark.parametrize('last, rows', [
    (_copied(1), [(0, 4), (1, 4)]), (_copied(7), [(0, 4)])])
def test_hand_offs_that_end_together_begin_together(last, rows):
  """Though the last of them be of a request that is gone."""
  config = _pair()
  before = [Arrived(0, 0, 4, 3, more=True), _arrive(1, 4, 3), _prefilled(0, 0)]
  first = _copied(0)._replace(more=True)
  state, commands = _after(config, *before, first)
  assert commands == []
  run = scheduler.Run(config, _after(config, *before)[0])
  assert run.apply(first) == [] and run.freeze() == state
  if last.id == 7:
    state, commands = _after(config, *before, first, last)
  else:
    state, commands = scheduler.step(config, state, last)
  assert [(row.id, row.base) for row in commands[0].rows] == rows
  assert run.apply(last) == list(commands)


def test_prefill_depth():
  _play(_pair(prefill_depth=2), [
      (_arrive(0, 6, 3), PREFILL_0),
      (_arrive(1, 6, 3), RunPrefill(0, 1, (Chunk(1, 0, 6, (2, 3), True),))),
      (_arrive(2, 6, 3),)])


def test_prefill_batches_overlap_in_pipeline_stages():
  pieces = (0, 1, 2, 3, 4)
  _play(_pair({'pp': 2}), [
      (_arrive(0, 20, 2), RunPrefill(0, 0, (Chunk(0, 0, 16, pieces, False),)),
       RunPrefill(0, 1, (Chunk(0, 16, 20, pieces, True),))),
      (_arrive(1, 4, 2),),
      (_prefilled(0, 0), RunPrefill(0, 2, (Chunk(1, 0, 4, (5,), True),))),
      (_prefilled(0, 1), Migrate(0, 1, 0, pieces, 1, pieces, 20))])


# --- dispatch and back-pressure ---------------------------------------------


def test_arrivals_go_to_the_shortest_queue_in_tokens():
  config = _config(_instance('prefill'), _instance('prefill'),
                   _instance('decode'))
  state = _play(config, [
      (_arrive(0, 4, 2), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (_arrive(1, 4, 2), RunPrefill(1, 0, (Chunk(1, 0, 4, (0,), True),))),
      (_arrive(2, 10, 2),), (_arrive(3, 3, 2),), (_arrive(4, 3, 2),),
      (_arrive(5, 5, 2),), (_arrive(6, 1, 2),)])
  assert [i.queue for i in state.instances] == [(2, 6), (3, 4, 5), ()]


def test_finished_prefills_go_to_the_least_loaded_decode_instance():
  config = _config(_instance('prefill'), _instance('decode'),
                   _instance('decode'))
  _play(config, [
      (_arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0,), True),))),
      (_arrive(1, 4, 9),), (_arrive(2, 4, 9),),
      (_prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 4),
       RunPrefill(0, 1, (Chunk(1, 0, 4, (1,), True),
                         Chunk(2, 0, 4, (2,), True)))),
      (_prefilled(0, 1), Migrate(2, 1, 0, (2,), 1, (2,), 4),
       Migrate(1, 1, 0, (1,), 2, (0,), 4))])


PRESSED = [
    (_arrive(0, 8, 2), RunPrefill(0, 0, (Chunk(0, 0, 8, (0, 1), True),))),
    (_prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 8)),
    (_copied(0), RunDecode(1, 0, 0, 1, (Row(0, 8, 1, (0, 1, 2)),))),
    (_arrive(1, 8, 2), RunPrefill(0, 1, (Chunk(1, 0, 8, (0, 1), True),))),
    (_prefilled(0, 1),),  # one page free at the target, three wanted
    (_arrive(2, 8, 2), RunPrefill(0, 2, (Chunk(2, 0, 8, (2, 3), True),))),
    (_prefilled(0, 2),),
]


def test_kv_not_pulled_holds_back_prefill_until_decode_frees_pages():
  _play(_pair({'num_pages': 4}, {'num_pages': 4}), PRESSED + [
      (_arrive(3, 8, 2),),  # no page left at the source
      (_decoded(1, 0), Finish(0, 'length'),
       Migrate(1, 1, 0, (0, 1), 1, (0, 1), 8)),
      (_copied(1), RunPrefill(0, 3, (Chunk(3, 0, 8, (0, 1), True),)),
       RunDecode(1, 1, 1, 1, (Row(1, 7, 2, (0, 1, 2)),)))])


def test_a_pull_leaves_a_page_for_each_running_row():
  config = _pair(decode={'num_pages': 4}, depth=1)
  life = [_arrive(0, 4, 9), _arrive(1, 4, 5), _prefilled(0, 0), _copied(0)]
  _, commands = _after(config, *life, _prefilled(0, 1))
  assert commands == []  # two pages are wanted, two free, one row running


# --- one instance for both phases -------------------------------------------


def test_colocated_runs_prefill_before_decode():
  _play(_config(_instance('colocated', num_pages=16), depth=1), [
      (_arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0, 1), True),))),
      (_prefilled(0, 0), RunDecode(0, 1, 0, 4, (Row(0, 4, 4, (0, 1)),))),
      (_arrive(1, 4, 9),),
      (_decoded(0, 1), RunPrefill(0, 2, (Chunk(1, 0, 4, (2, 3), True),), 4)),
      (_prefilled(0, 2),
       RunDecode(0, 3, 4, 4, (Row(0, 4, 8, (0, 1, 4)),
                              Row(1, 0, 8, (2, 3)))))])


def test_chunked_rows_ride_in_prefill_within_one_budget():
  config = _config(_instance('chunked', num_pages=16, prefill_tokens=8),
                   depth=1)
  row = Row(0, 4, 8, (0, 1, 2))
  _play(config, [
      (_arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0, 1), True),))),
      (_prefilled(0, 0), RunDecode(0, 1, 0, 4, (Row(0, 4, 4, (0, 1)),))),
      (_arrive(1, 10, 9),),
      (_decoded(0, 1),
       RunPrefill(0, 2, (Chunk(1, 0, 7, (3, 4, 5), False),), 4, (row,))),
      (_prefilled(0, 2),
       RunPrefill(0, 3, (Chunk(1, 7, 10, (3, 4, 5), True),), 5, (row,))),
      (_prefilled(0, 3),
       RunDecode(0, 4, 6, 2, (row, Row(1, 4, 8, (3, 4, 5)))))])


# --- micro-batches of pipeline stages ---------------------------------------

TWO = [_arrive(0, 4, 9), _arrive(1, 4, 9), _prefilled(0, 0), _prefilled(0, 1)]
ROWS = [Row(0, 4, 8, (0,)), Row(1, 4, 8, (1,))]


def _staged(**changes):
  return _pair(ROOMY, ROOMY | {'pp': 2}, **changes)


def test_micro_batches_take_turns_one_step_at_a_time():
  zero, one = ROWS
  state = _play(_staged(depth=1), [
      (_copied(0), RunDecode(1, 0, 0, 1, (zero,))),
      (_copied(1), RunDecode(1, 1, 0, 1, (one,))),
      (_decoded(1, 0), RunDecode(1, 2, 1, 1, (zero,))),
      (_decoded(1, 1), RunDecode(1, 3, 1, 1, (one,))),
      # Its end is known as its last step starts; the other goes on.
      *((_decoded(1, n), RunDecode(1, n + 2, n // 2 + 1, 1, (ROWS[n % 2],)))
        for n in range(2, 14)),
      (_decoded(1, 14), Finish(0, 'length')),
      (_decoded(1, 15), Finish(1, 'length'))], before=TWO)
  assert _at_rest(_staged(), state)


def test_each_micro_batch_has_depth_commands_in_flight():
  zero, one = ROWS
  _play(_staged(depth=2), [
      # The other is empty: nothing to take turns with.
      (_copied(0), RunDecode(1, 0, 0, 1, (zero,)),
       RunDecode(1, 1, 1, 1, (zero,))),
      # Then the first is waited for, or 0, 0, 1, 1 would go on for ever.
      (_copied(1), RunDecode(1, 2, 0, 1, (one,))),
      (_decoded(1, 0), RunDecode(1, 3, 2, 1, (zero,)),
       RunDecode(1, 4, 1, 1, (one,))),
      (_decoded(1, 1), RunDecode(1, 5, 3, 1, (zero,))),
      (_decoded(1, 2), RunDecode(1, 6, 2, 1, (one,)))], before=TWO)


def test_a_request_joins_the_micro_batch_with_the_fewest_rows():
  state, _ = _after(_staged(depth=1), *TWO, _copied(0), _copied(1),
                    _arrive(2, 4, 9), _prefilled(0, 2), _copied(2),
                    _arrive(3, 4, 9), _prefilled(0, 3), _copied(3))
  zero, two = state.instances[1].batches
  assert [r.id for r in zero.rows] == [0, 2]
  assert [r.id for r in two.rows] == [1, 3]
  _, (command,) = scheduler.step(_staged(depth=1), state, _decoded(1, 0))
  # Its first tick is the micro-batch's second.
  assert command == RunDecode(1, 2, 1, 1, (ROWS[0], Row(2, 3, 9, (2,))))
  assert zero.tick == two.tick == 1


def test_an_ended_row_keeps_its_pages_until_every_micro_batch_is_done():
  config, one = _staged(depth=1), ROWS[1]
  story = [(_copied(1), RunDecode(1, 1, 0, 1, (one,))),
           (_cancel(0), Finish(0, 'cancelled')), (_decoded(1, 0),)]
  before = [*TWO, _copied(0)]
  assert _free(_play(config, story, before)) == [8, 6]
  story.append((_decoded(1, 1), RunDecode(1, 2, 1, 1, (one,))))
  assert _free(_play(config, story, before)) == [8, 7]


def test_preemption_takes_the_latest_arrival_of_any_micro_batch():
  config = _pair({'page_size': 2}, {'page_size': 2, 'num_pages': 5, 'pp': 2},
                 depth=1)
  zero, one = Row(0, 2, 2, (0, 1)), Row(1, 2, 2, (2, 3))
  _play(config, [
      (_copied(0), RunDecode(1, 1, 0, 1, (zero,))),
      (_decoded(1, 0), RunDecode(1, 2, 1, 1, (one,))),
      (_decoded(1, 1), RunDecode(1, 3, 1, 1, (zero,))),
      (_decoded(1, 2), RunDecode(1, 4, 2, 1, (Row(1, 2, 4, (2, 3, 4)),))),
      (_decoded(1, 3),),  # no page for request 0; 4 is still in flight
      (_decoded(1, 4), Preempt(1, 1),
       RunPrefill(0, 2, (Chunk(1, 0, 6, (0, 1, 2), True),)),
       RunDecode(1, 5, 2, 1, (Row(0, 2, 4, (0, 1, 2)),)))],
      before=[_arrive(0, 2, 6), _arrive(1, 2, 6), _prefilled(0, 0),
              _prefilled(0, 1), _copied(1)])


def test_prompt_pieces_ride_with_the_micro_batch_whose_turn_it_is():
  config = _config(_instance('chunked', num_pages=16, prefill_tokens=8, pp=2),
                   depth=1)
  row, pieces = Row(0, 4, 4, (0, 1)), (2, 3, 4, 5, 6, 7)
  _play(config, [
      (_arrive(0, 4, 9), RunPrefill(0, 0, (Chunk(0, 0, 4, (0, 1), True),))),
      (_prefilled(0, 0), RunDecode(0, 1, 0, 1, (row,))),
      # The other micro-batch is empty; its turn has room for a piece.
      (_arrive(1, 20, 9),
       RunPrefill(0, 2, (Chunk(1, 0, 8, pieces, False),))),
      (_decoded(0, 1),
       RunPrefill(0, 3, (Chunk(1, 8, 15, pieces, False),), 1, (row,))),
      (_prefilled(0, 2),
       RunPrefill(0, 4, (Chunk(1, 15, 20, pieces, True),))),
      (_prefilled(0, 3), RunDecode(0, 5, 2, 1, (row,))),
      (_prefilled(0, 4), RunDecode(0, 6, 0, 1, (Row(1, 20, 4, pieces),)))])


@pytest.mark.parametrize('pp', [0, 1.5, True])
def test_stages_are_an_integer_above_0(pp):
  with pytest.raises(InputError, match=f'InstanceConfig.pp={pp}: must'):
    _instance('decode', pp=pp)


# --- page sizes -------------------------------------------------------------


@pytest.mark.parametrize('source, target, copy, row', [
    (2, 8, Migrate(0, 1, 0, (0, 1, 2), 1, (0,), 5), Row(0, 5, 3, (0,))),
    (8, 2, Migrate(0, 1, 0, (0,), 1, (0, 1, 2), 5), Row(0, 5, 1, (0, 1, 2))),
    (4, 5, Migrate(0, 1, 0, (0, 1), 1, (0,), 5), Row(0, 5, 5, (0, 1)))])
def test_a_copy_names_the_pages_of_either_size(source, target, copy, row):
  config = _pair({'page_size': source}, {'page_size': target}, run_ahead=1,
                 depth=1)
  pages_0 = copy.source_pages
  _play(config, [
      (_arrive(0, 5, 9), RunPrefill(0, 0, (Chunk(0, 0, 5, pages_0, True),))),
      (_prefilled(0, 0), copy),
      (_copied(0), RunDecode(1, 0, 0, 1, (row,)))])


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


# --- preemption -------------------------------------------------------------

TIGHT = _instance('colocated', num_pages=5, page_size=2)
FULL = [  # two rows, each about to need a page of the one that is free
    (_arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0, 1), True),))),
    (_arrive(1, 2, 6),),
    (_prefilled(0, 0), RunPrefill(0, 1, (Chunk(1, 0, 2, (2, 3), True),))),
    (_prefilled(0, 1), RunDecode(0, 2, 0, 2, (Row(0, 2, 2, (0, 1)),
                                              Row(1, 2, 2, (2, 3))))),
]


def test_the_latest_arrival_is_preempted_and_recomputed():
  config = _config(TIGHT, depth=1)
  row = Row(0, 2, 4, (0, 1, 2))
  state = _play(config, FULL + [
      (_decoded(0, 2), Preempt(1, 0), RunDecode(0, 3, 2, 1, (row,))),
      (_decoded(0, 3), RunDecode(0, 4, 3, 1, (row,))),
      (_decoded(0, 4), RunDecode(0, 5, 4, 1, (Row(0, 2, 5, (0, 1, 2, 3)),))),
      # Its prompt is now 2 tokens and the 3 that were emitted.
      (_decoded(0, 5), Finish(0, 'length'),
       RunPrefill(0, 6, (Chunk(1, 0, 5, (0, 1, 2), True),), 5)),
      (_prefilled(0, 6), RunDecode(0, 7, 5, 1, (Row(1, 0, 6, (0, 1, 2)),))),
      (_decoded(0, 7), RunDecode(0, 8, 6, 1, (Row(1, 0, 7, (0, 1, 2, 3)),))),
      (_decoded(0, 8), Finish(1, 'length'))])
  assert _at_rest(config, state)


def test_a_preempted_request_keeps_its_place_in_the_queue():
  state = _play(_config(TIGHT, depth=1), FULL + [
      (_arrive(2, 2, 6),),
      (_decoded(0, 2), Preempt(1, 0),
       RunDecode(0, 3, 2, 1, (Row(0, 2, 4, (0, 1, 2)),)))])
  assert state.instances[0].queue == (1, 2)


IN_FLIGHT = [  # as FULL, one more command ahead
    (_arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0, 1), True),)),
     RunDecode(0, 1, 0, 2, (Row(0, 2, 2, (0, 1)),))),
    (_arrive(1, 2, 6),),
    (_prefilled(0, 0), RunPrefill(0, 2, (Chunk(1, 0, 2, (2, 3), True),), 2)),
    (_decoded(0, 1), RunDecode(0, 3, 2, 2, (Row(0, 2, 4, (0, 1, 4)),
                                            Row(1, 0, 4, (2, 3))))),
    (_prefilled(0, 2),),  # no page for either row; 3 is still in flight
]


def test_preemption_waits_for_commands_in_flight():
  _play(_config(TIGHT, depth=2), IN_FLIGHT + [
      (_decoded(0, 3), Preempt(1, 0),
       RunDecode(0, 4, 4, 1, (Row(0, 2, 5, (0, 1, 4, 2)),)))])


@pytest.mark.parametrize('event, reason', [
    (_decoded(0, 3, (1, 0)), 'stop'), (_cancel(1), 'cancelled')])
def test_an_end_overtakes_a_preemption(event, reason):
  state, commands = _after(_config(TIGHT, depth=2),
                           *(event for event, *_ in IN_FLIGHT), event)
  assert commands[0] == Finish(1, reason)
  assert not any(isinstance(c, Preempt) for c in commands)
  if reason == 'cancelled':
    state, commands = scheduler.step(_config(TIGHT, depth=2), state,
                                     _decoded(0, 3))
    assert not any(isinstance(c, Preempt) for c in commands)
  assert set(state.seqs) == {0}


AGAIN = [  # request 1 is preempted by its decode instance and copied anew
    (_arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0,), True),))),
    (_arrive(1, 2, 6),),
    (_prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 2),
     RunPrefill(0, 1, (Chunk(1, 0, 2, (1,), True),))),
    (_prefilled(0, 1), Migrate(1, 1, 0, (1,), 1, (2,), 2)),
    (_copied(0), RunDecode(1, 0, 0, 1, (Row(0, 2, 2, (0, 1)),))),
    (_copied(1),),
    (_decoded(1, 0), RunDecode(1, 1, 1, 1, (Row(0, 2, 2, (0, 1)),
                                            Row(1, 1, 3, (2, 3))))),
    (_decoded(1, 1), RunDecode(1, 2, 2, 1, (Row(0, 2, 4, (0, 1, 4)),
                                            Row(1, 1, 3, (2, 3))))),
    (_decoded(1, 2), Preempt(1, 1),
     RunDecode(1, 3, 3, 1, (Row(0, 2, 4, (0, 1, 4)),)),
     RunPrefill(0, 2, (Chunk(1, 0, 5, (0, 1, 2), True),))),
    (_prefilled(0, 2),),
    (_decoded(1, 3), RunDecode(1, 4, 4, 1, (Row(0, 2, 5, (0, 1, 4, 2)),))),
    (_decoded(1, 4), Finish(0, 'length'),
     Migrate(1, 2, 0, (0, 1, 2), 1, (0, 1, 2), 5)),
]


def test_a_completion_of_an_earlier_hand_off_is_ignored():
  small = {'num_pages': 5, 'page_size': 2}
  config = _pair({'page_size': 2}, small, depth=1)
  before = _play(config, AGAIN)
  assert _play(config, [*AGAIN, (_copied(1, epoch=1),)]) == before
  _play(config, AGAIN + [
      (_copied(1, epoch=2), RunDecode(1, 5, 5, 1, (Row(1, 0, 6, (0, 1, 2)),))),
      (_copied(1, epoch=2),)])


def test_a_row_gives_way_where_only_a_younger_copy_holds_pages():
  """It is no victim while it lands; the older one is recomputed behind it."""
  config = _pair({'page_size': 2}, {'page_size': 2, 'num_pages': 5}, depth=1)
  row = Row(0, 2, 2, (0, 1))
  _play(config, [
      (_arrive(0, 2, 6), RunPrefill(0, 0, (Chunk(0, 0, 2, (0,), True),))),
      (_arrive(1, 2, 6),),
      (_prefilled(0, 0), Migrate(0, 1, 0, (0,), 1, (0,), 2),
       RunPrefill(0, 1, (Chunk(1, 0, 2, (1,), True),))),
      (_prefilled(0, 1), Migrate(1, 1, 0, (1,), 1, (2,), 2)),
      (_copied(0), RunDecode(1, 0, 0, 1, (row,))),
      (_decoded(1, 0), RunDecode(1, 1, 1, 1, (row,))),
      (_decoded(1, 1), RunDecode(1, 2, 2, 1, (Row(0, 2, 4, (0, 1, 4)),))),
      (_decoded(1, 2), RunDecode(1, 3, 3, 1, (Row(0, 2, 4, (0, 1, 4)),))),
      (_decoded(1, 3), Preempt(0, 1),
       RunPrefill(0, 2, (Chunk(0, 0, 7, (0, 2, 3, 4), True),))),
      (_prefilled(0, 2), Finish(0, 'length')),
      (_copied(1), RunDecode(1, 4, 4, 2, (Row(1, -2, 6, (2, 3)),)))])


# --- cancellation -----------------------------------------------------------

GONE = Finish(0, 'cancelled')


def test_cancelled_in_the_queue():
  config = _pair()
  state, commands = _after(config, _arrive(1, 6, 3), _arrive(0, 6, 3),
                           _cancel(0))
  assert commands == [GONE] and set(state.seqs) == {1}
  assert state.instances[0].backlog == 0


def test_cancelled_while_its_prefill_is_in_flight():
  state = _play(_pair(), [(_arrive(0, 6, 3), PREFILL_0), (_cancel(0), GONE)])
  assert _free(state) == [6, 8]
  state = _play(_pair(), [(_arrive(0, 6, 3), PREFILL_0), (_cancel(0), GONE),
                          (_prefilled(0, 0),)])
  assert _at_rest(_pair(), state)


def test_cancelled_between_the_pieces_of_a_long_prompt():
  config = _pair()
  pieces = (0, 1, 2, 3, 4)
  state = _play(config, [
      (_arrive(0, 20, 2), RunPrefill(0, 0, (Chunk(0, 0, 16, pieces, False),))),
      (_cancel(0), GONE), (_prefilled(0, 0),)])
  assert _at_rest(config, state)


def test_cancelled_while_its_kv_waits_to_be_pulled():
  config = _pair({'num_pages': 4}, {'num_pages': 4})
  state = _play(config, PRESSED + [
      (_arrive(3, 8, 2),),
      (_cancel(1), Finish(1, 'cancelled'),
       RunPrefill(0, 3, (Chunk(3, 0, 8, (0, 1), True),)))])
  assert state.instances[1].pulls == (2,)


def test_cancelled_while_it_migrates_keeps_both_sides_until_migrated():
  story = [(_arrive(0, 6, 3), PREFILL_0),
           (_prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
           (_cancel(0), GONE)]
  assert _free(_play(_pair(), story)) == [6, 6]
  assert _at_rest(_pair(), _play(_pair(), [*story, (_copied(0),)]))


def test_cancelled_while_it_decodes():
  config = _pair()
  story = [(_arrive(0, 6, 3), PREFILL_0),
           (_prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
           (_copied(0), RunDecode(1, 0, 0, 2, (Row(0, 6, 2, (0, 1)),))),
           (_cancel(0), GONE), (_cancel(0),)]  # the second time is too late
  assert _free(_play(config, story)) == [8, 6]
  assert _at_rest(config, _play(config, [*story, (_decoded(1, 0),)]))


def test_a_cancel_of_an_unknown_request_is_ignored():
  assert _play(_pair(), [(_cancel(7),)]) == scheduler.init(_pair())


# --- bad input and internal errors ------------------------------------------


@pytest.mark.parametrize('prompt_len, max_tokens, reason', [
    (30, 3, 'prompt of 30 tokens and max_tokens=3 exceed the context of 32 '
     'tokens'),
    (8, 2, 'prompt of 8 tokens and max_tokens=2 need 3 pages; instance 1 '
     '(decode) has 2'),
    (0, 2, 'prompt of 0 tokens and max_tokens=2: both must be 1 or more'),
    (2, 0, 'prompt of 2 tokens and max_tokens=0: both must be 1 or more')])
def test_what_never_fits_is_rejected_with_its_numbers(prompt_len, max_tokens,
                                                      reason):
  config = _pair(decode={'num_pages': 2})
  state = _play(config, [
      (_arrive(0, prompt_len, max_tokens), Reject(0, reason))])
  assert state == scheduler.init(config)


def test_what_just_fits_the_context_is_served():
  _, commands = _after(_pair(), _arrive(0, 30, 2))
  assert isinstance(commands[0], RunPrefill)


def test_what_just_fits_the_pages_is_served():
  state = _play(_pair(decode={'num_pages': 2}), [
      (_arrive(0, 6, 3), PREFILL_0),
      (_prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
      (_copied(0), RunDecode(1, 0, 0, 2, (Row(0, 6, 2, (0, 1)),)))])
  assert _free(state) == [8, 0]


@pytest.mark.parametrize('event, message', [
    (_arrive(0, 6, 3), 'request 0 arrived twice'),
    (_prefilled(0, 1), 'PrefillDone 1 of instance 0, which awaits RunPrefill'),
    (_decoded(0, 0), 'DecodeDone 0 of instance 0, which awaits RunPrefill'),
    (_decoded(1, 0), 'DecodeDone 0 of instance 1, which awaits nothing')])
def test_an_event_that_cannot_happen_raises(event, message):
  with pytest.raises(ValueError, match=message):
    _after(_pair(), _arrive(0, 6, 3), event)


def test_completions_out_of_order_raise_and_a_second_one_is_inert():
  two = _arrive(0, 6, 3), _arrive(1, 6, 3)
  config = _pair(prefill_depth=2)
  with pytest.raises(scheduler.ImpossibleEvent, match='awaits RunPrefill'):
    _after(config, *two, _prefilled(0, 1))
  once, _ = _after(config, *two, _prefilled(0, 0))
  assert scheduler.step(config, once, _prefilled(0, 0)) == (once, ())


# --- faults -----------------------------------------------------------------

MOVING = [_arrive(0, 6, 3), _prefilled(0, 0)]
FAULTS = {'failed': MigrateFailed(0, 0, 1), 'lease': Timer(0, 0, 1)}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_failed_hand_off_is_tried_again_from_the_held_source(fault):
  abort = [Abort(0, 1, 1)] if fault == 'lease' else []
  state, commands = _after(_pair(), *MOVING, FAULTS[fault])
  assert commands == abort + [Migrate(0, 2, 0, (0, 1), 1, (0, 1), 6)]
  for late in (_copied(0), *FAULTS.values()):
    assert scheduler.step(_pair(), state, late) == (state, ())


def test_a_retry_prefers_another_decode_instance():
  config = _config(_instance('prefill'), _instance('decode'),
                   _instance('decode'))
  _, commands = _after(config, *MOVING, FAULTS['failed'])
  assert commands == [Migrate(0, 2, 0, (0, 1), 2, (0, 1), 6)]


def test_one_fault_more_than_tries_fails_the_request():
  config = _pair(tries=1)
  state, commands = _after(config, *MOVING, FAULTS['failed'],
                           Timer(0, 0, 2))
  assert [type(c) for c in commands] == [Abort, Fail]
  assert 'given up after 2 faults' in commands[1].reason
  assert _at_rest(config, state)


def test_a_lost_decode_instance_recomputes_with_the_tokens_that_are_out():
  down = InstanceDown(0, 1, (0.0,))  # one of two steps was told
  state, commands = _after(_pair(), *MOVING, _copied(0), down)
  assert commands == [Preempt(0, 1, 'fault'),
                      RunPrefill(0, 1, (Chunk(0, 0, 8, (0, 1), True),))]
  state, commands = scheduler.step(_pair(), state, _decoded(1, 0))
  assert not commands  # it was lost with its instance
  state, commands = scheduler.step(_pair(), state, _prefilled(0, 1))
  assert commands == (Finish(0, 'length'),) and _at_rest(_pair(), state)


def test_a_lost_source_takes_the_target_s_right_to_write():
  state, commands = _after(_pair(), *MOVING, InstanceDown(0, 0))
  assert commands == [Abort(0, 1, 1), Preempt(0, 0, 'fault')]
  assert _free(state) == [8, 8] and state.waiting == (0,)
  assert scheduler.step(_pair(), state, _copied(0)) == (state, ())
  _, commands = scheduler.step(_pair(), state, InstanceUp(0, 0))
  assert commands == (RunPrefill(0, 1, (Chunk(0, 0, 7, (0, 1), True),)),)


def test_a_lost_target_leaves_the_source_its_pages():
  state, commands = _after(_pair(), *MOVING, InstanceDown(0, 1))
  assert commands == [] and _free(state) == [6, 8] and state.waiting == (0,)
  _, commands = scheduler.step(_pair(), state, InstanceUp(0, 1))
  assert commands == (Migrate(0, 2, 0, (0, 1), 1, (0, 1), 6),)


def test_who_waits_for_an_instance_fails_when_all_are_gone():
  gone = InstanceDown(0, 1, back=False)
  for events in ((gone,), (InstanceDown(0, 1), gone)):
    state, commands = _after(_pair(), *MOVING, *events)
    assert commands == [Fail(0, 'no decode instance is left')]
    assert _free(state) == [8, 8]


@pytest.mark.parametrize('down', [0, 1])
def test_cancelled_while_it_waits_for_an_instance(down):
  state, commands = _after(_pair(), *MOVING, InstanceDown(0, down),
                           _cancel(0))
  assert commands == [GONE] and _at_rest(_pair(), state)


def test_a_drained_instance_hands_its_queue_over():
  config = _config(_instance('colocated', max_seqs=1),
                   _instance('colocated'))
  state, _ = _after(config, _arrive(0, 6, 3), _arrive(1, 6, 3),
                    _arrive(2, 6, 3))
  assert state.instances[0].queue == (2,)
  state, commands = scheduler.step(config, state, Drain(0, 0))
  scheduler.check(state)
  assert state.instances[0].queue == () and 2 in (
      *state.instances[1].queue, *state.instances[1].prefilling,
      *[r.id for r in state.instances[1].rows])


def test_the_last_instance_of_its_kind_goes_on_though_drained():
  _play(_pair(), [(Drain(0, 0),), (Drain(0, 1),),
                  (_arrive(0, 6, 3), PREFILL_0)])


@pytest.mark.parametrize('event', [
    Migrated(0, 0, 2), MigrateFailed(0, 0, 2), Timer(0, 0, 2),
    InstanceDown(0, 2), InstanceUp(0, 2), Drain(0, -1),
    InstanceDown(0, 1, (0.0,)), _prefilled(0, -1), _prefilled(2, 0)])
def test_an_event_without_sense_is_a_named_error(event):
  with pytest.raises(scheduler.ImpossibleEvent):
    _after(_pair(), *MOVING, event)


@pytest.mark.parametrize('kind', [
    Migrated, MigrateFailed, Timer])
def test_a_hand_off_that_was_never_begun_is_a_named_error(kind):
  for story in ([_arrive(0, 6, 3)], [*MOVING, _copied(0)]):
    with pytest.raises(scheduler.ImpossibleEvent, match='last hand-off'):
      _after(_pair(), *story, kind(0, 0, 2))


@pytest.mark.parametrize('story, event', [
    ([_arrive(0, 6, 3)], PrefillDone(0, 0, 0, (1,))),
    ([_arrive(0, 20, 2)], PrefillDone(0, 0, 0, (0,))),  # not its last
    ([*MOVING, _copied(0)], DecodeDone(0, 1, 0, (0, 0), ((1, 0),))),
    ([*MOVING, _copied(0)], InstanceDown(0, 1, (0,), ((1, 0),)))])
def test_an_end_of_what_was_not_sampled_is_a_named_error(story, event):
  with pytest.raises(scheduler.ImpossibleEvent, match='it samples tokens of'):
    _after(_pair(), *story, event)


def test_an_end_after_the_steps_that_are_out_is_a_named_error():
  down = InstanceDown(0, 1, (0.0,), ((0, 1),))
  with pytest.raises(scheduler.ImpossibleEvent, match='after the last step'):
    _after(_pair(), *MOVING, _copied(0), down)


def test_a_status_follows_its_table():
  events = {'InstanceUp': InstanceUp(0, 1), 'Drain': Drain(0, 1),
            'InstanceDown': InstanceDown(0, 1),
            'InstanceGone': InstanceDown(0, 1, back=False)}
  start, _ = _after(_pair(), *MOVING)
  for (status, event), after in lifecycle.STATUS.items():
    to = {'up': [], 'draining': ['Drain'], 'down': ['InstanceDown'],
          'gone': ['InstanceGone']}[status]
    state = start
    for name in (*to, event):
      state, _ = scheduler.step(_pair(), state, events[name])
      scheduler.check(state)
    assert state.instances[1].status == after, (status, event)


# --- depth and run-ahead ----------------------------------------------------

LONG = [_arrive(0, 1, 15), _prefilled(0, 0), _copied(0)]  # 14 decode steps
ROOMY = {'page_size': 16}


@pytest.mark.parametrize('depth', [1, 2, 3])
def test_depth_bounds_what_is_in_flight(depth):
  config = _pair(ROOMY, ROOMY, depth=depth, run_ahead=2)
  _, commands = _after(config, *LONG)
  row = (Row(0, 1, 14, (0,)),)
  assert commands == [RunDecode(1, n, 2 * n, 2, row) for n in range(depth)]


@pytest.mark.parametrize('run_ahead, steps', [
    (1, [1] * 14), (4, [4, 4, 4, 2]), (100, [14])])
def test_run_ahead_while_quiet_and_never_past_until(run_ahead, steps):
  config = _pair(ROOMY, ROOMY, depth=1, run_ahead=run_ahead)
  state, commands = _after(config, *LONG)
  seen = []
  while isinstance(commands[0], RunDecode):
    seen.append(commands[0].steps)
    done = _decoded(1, commands[0].number)
    state, commands = scheduler.step(config, state, done)
  assert seen == steps and commands == (Finish(0, 'length'),)


@pytest.mark.parametrize('decode, more', [
    ({'max_seqs': 1}, (_arrive(1, 1, 4), _prefilled(0, 1))),  # not pulled yet
    ({}, (_arrive(1, 1, 4), _prefilled(0, 1)))])  # on its way
def test_one_step_at_a_time_while_something_waits(decode, more):
  config = _pair(ROOMY, ROOMY | decode, depth=1)
  _, commands = _after(config, *LONG, *more, _decoded(1, 0))
  assert commands == [RunDecode(1, 1, 4, 1, (Row(0, 1, 14, (0,)),))]


def test_one_step_at_a_time_while_a_prompt_waits_for_pages():
  config = _config(_instance('colocated', num_pages=4), depth=1)
  _, commands = _after(config, _arrive(0, 4, 9), _prefilled(0, 0),
                       _arrive(1, 12, 2), _decoded(0, 1))
  assert commands == [RunDecode(0, 2, 4, 1, (Row(0, 4, 8, (0, 1, 2)),))]


# --- check ------------------------------------------------------------------


def _break_instance(**changes):
  def broken(state):
    first = state.instances[0]._replace(**changes)
    return state._replace(instances=(first, *state.instances[1:]))
  return broken


def _break_seq(**changes):
  def broken(state):
    return state._replace(seqs=state.seqs | {
        0: state.seqs[0]._replace(**changes)})
  return broken


def _break_queue(state):
  """Two wait, the later one first."""
  state, _ = scheduler.step(_pair(), state, _arrive(2, 6, 3))
  return _break_instance(queue=(2, 1))(state)


@pytest.mark.parametrize('broken, message', [
    (_break_instance(pool=page_pool.init(8)), 'owned and free'),
    (_break_instance(residents=2), 'residents'),
    (_break_instance(backlog=1), 'backlog'),
    (_break_instance(queue=(0, 1)), 'request 0'),
    (_break_queue, 'queue by arrival'),
    (_break_instance(queue=()), 'backlog|request 1'),
    (_break_seq(pages=(0,)), 'leaked: 1 of 8'),
    (_break_seq(pages=(0, 1, 1)), 'page 1 owned twice'),
    (_break_seq(stage='decoding'), 'request 0 is decoding')])
def test_check_finds(broken, message):
  state, _ = _after(_pair(), _arrive(0, 6, 3), _arrive(1, 6, 3))
  with pytest.raises(AssertionError, match=message):
    scheduler.check(broken(state))


def test_check_finds_a_row_of_two_micro_batches():
  state, _ = _after(_staged(), *TWO, _copied(0))
  batch = state.instances[1].batches[0]
  broken = state.instances[1]._replace(batches=(batch, batch))
  with pytest.raises(AssertionError, match='request 0 in two places'):
    scheduler.check(state._replace(instances=(state.instances[0], broken)))


# --- random worlds ----------------------------------------------------------


def test_random_worlds():
  """All that experiments.verify doubts; the first to fail is a small one."""
  for seed in range(90):
    rules = schedules.random_rules(seed, 1 + seed // 3)
    try:
      schedules.walk(rules, seed % 4, seed)
    except world.Violation as error:
      error.add_note(f'seed {seed}, after {len(error.moves)} moves')
      raise


@functools.cache
def _walked(seed, config=None, **options):
  """A scheduler.Config, and every Moved of 20 requests of a random world."""
  rules = schedules.random_rules(seed, 20, config)
  return rules.config, list(schedules.wander(rules, 3, seed, **options))


def _log(moved):
  return [entry for m in moved for entry in m.log]


def test_worlds_where_rows_give_way_to_copies_end():
  """Short decode pools: residents that are on their way are no victims."""
  preempted = younger = 0
  for seed in range(40):
    config = _config(
        _instance('prefill', 24, 2, 8), _instance('prefill', 12, 4, 8),
        _instance('decode', 8 + seed % 4, 2, 5, pp=1 + seed % 3),
        max_len=20)
    for m in _walked(seed, config, slow_copies=True)[1]:
      for command in (c for _, commands in m.log for c in commands):
        if isinstance(command, Preempt) and command.cause == 'pages':
          preempted += 1
          younger += any(
              seq.stage == 'migrating' and seq.target == command.instance
              and seq.order > m.after.state.seqs[command.id].order
              for seq in m.before.state.seqs.values())
  assert preempted >= 50 and younger >= 12, (preempted, younger)


def test_a_log_replays_to_the_same_commands():
  seen = collections.Counter()
  for seed in range(60):
    config, moved = _walked(seed, timed=True)
    lines = [json.dumps(event_log.encode(entry)) for entry in _log(moved)]
    state = scheduler.init(config)
    for line in lines:
      event, commands = event_log.decode(json.loads(line))
      state, again = scheduler.step(config, state, event)
      assert again == commands
      seen.update(c.reason if isinstance(c, Finish) else type(c).__name__
                  for c in commands)
    assert state == moved[-1].after.state
  kinds = ('RunPrefill', 'RunDecode', 'Migrate', 'Preempt', 'Reject',
           'length', 'stop', 'cancelled')
  assert all(seen[kind] >= 20 for kind in kinds), seen


def test_a_run_that_lives_on_is_stepping():
  """Run.apply after Run.apply: the commands and the states of step."""
  for seed in range(40):
    config, moved = _walked(seed, timed=True)
    state = scheduler.init(config)
    run = scheduler.Run(config, state)
    for n, (event, commands) in enumerate(_log(moved)):
      state, _ = scheduler.step(config, state, event)
      assert tuple(run.apply(event)) == commands, f'seed {seed}, event {n}'
      if n % 3 == 0:  # the state is not looked at in between
        assert run.freeze() == state, f'seed {seed}, event {n}'
    assert run.freeze() == state == moved[-1].after.state
