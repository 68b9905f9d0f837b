"""What cannot be, and what goes wrong: bad input, lost instances, faults."""

import pytest

from dsjax.scheduling import lifecycle, scheduler
from dsjax.scheduling.events import (
  Abort,
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
from tests.common.stories import (
  GONE,
  PREFILL_0,
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
  config = pair(decode={'num_pages': 2})
  state = play(config, [
      (arrive(0, prompt_len, max_tokens), Reject(0, reason))])
  assert state == scheduler.init(config)


def test_what_just_fits_the_context_is_served():
  _, commands = state_after(pair(), arrive(0, 30, 2))
  assert isinstance(commands[0], RunPrefill)


def test_what_just_fits_the_pages_is_served():
  state = play(pair(decode={'num_pages': 2}), [
      (arrive(0, 6, 3), PREFILL_0),
      (prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 6)),
      (copied(0), RunDecode(1, 0, 0, 2, (Row(0, 6, 2, (0, 1)),)))])
  assert free(state) == [8, 0]


@pytest.mark.parametrize('event, message', [
    (arrive(0, 6, 3), 'request 0 arrived twice'),
    (prefilled(0, 1), 'PrefillDone 1 of instance 0, which awaits RunPrefill'),
    (decoded(0, 0), 'DecodeDone 0 of instance 0, which awaits RunPrefill'),
    (decoded(1, 0), 'DecodeDone 0 of instance 1, which awaits nothing')])
def test_an_event_that_cannot_happen_raises(event, message):
  with pytest.raises(ValueError, match=message):
    state_after(pair(), arrive(0, 6, 3), event)


def test_completions_out_of_order_raise_and_a_second_one_is_inert():
  two = arrive(0, 6, 3), arrive(1, 6, 3)
  config = pair(prefill_depth=2)
  with pytest.raises(scheduler.ImpossibleEvent, match='awaits RunPrefill'):
    state_after(config, *two, prefilled(0, 1))
  once, _ = state_after(config, *two, prefilled(0, 0))
  assert scheduler.step(config, once, prefilled(0, 0)) == (once, ())


# --- faults -----------------------------------------------------------------

MOVING = [arrive(0, 6, 3), prefilled(0, 0)]
FAULTS = {'failed': MigrateFailed(0, 0, 1), 'lease': Timer(0, 0, 1)}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_failed_hand_off_is_tried_again_from_the_held_source(fault):
  abort = [Abort(0, 1, 1)] if fault == 'lease' else []
  state, commands = state_after(pair(), *MOVING, FAULTS[fault])
  assert commands == abort + [Migrate(0, 2, 0, (0, 1), 1, (0, 1), 6)]
  for late in (copied(0), *FAULTS.values()):
    assert scheduler.step(pair(), state, late) == (state, ())


def test_a_retry_prefers_another_decode_instance():
  config = config_of(instance('prefill'), instance('decode'),
                     instance('decode'))
  _, commands = state_after(config, *MOVING, FAULTS['failed'])
  assert commands == [Migrate(0, 2, 0, (0, 1), 2, (0, 1), 6)]


def test_one_fault_more_than_tries_fails_the_request():
  config = pair(tries=1)
  state, commands = state_after(config, *MOVING, FAULTS['failed'],
                                Timer(0, 0, 2))
  assert [type(c) for c in commands] == [Abort, Fail]
  assert 'given up after 2 faults' in commands[1].reason
  assert at_rest(config, state)


def test_a_lost_decode_instance_recomputes_with_the_tokens_that_are_out():
  down = InstanceDown(0, 1, (0.0,))  # one of two steps was told
  state, commands = state_after(pair(), *MOVING, copied(0), down)
  assert commands == [Preempt(0, 1, 'fault'),
                      RunPrefill(0, 1, (Chunk(0, 0, 8, (0, 1), True),))]
  state, commands = scheduler.step(pair(), state, decoded(1, 0))
  assert not commands  # it was lost with its instance
  state, commands = scheduler.step(pair(), state, prefilled(0, 1))
  assert commands == (Finish(0, 'length'),) and at_rest(pair(), state)


def test_a_lost_source_takes_the_target_s_right_to_write():
  state, commands = state_after(pair(), *MOVING, InstanceDown(0, 0))
  assert commands == [Abort(0, 1, 1), Preempt(0, 0, 'fault')]
  assert free(state) == [8, 8] and state.waiting == (0,)
  assert scheduler.step(pair(), state, copied(0)) == (state, ())
  _, commands = scheduler.step(pair(), state, InstanceUp(0, 0))
  assert commands == (RunPrefill(0, 1, (Chunk(0, 0, 7, (0, 1), True),)),)


def test_a_lost_target_leaves_the_source_its_pages():
  state, commands = state_after(pair(), *MOVING, InstanceDown(0, 1))
  assert commands == [] and free(state) == [6, 8] and state.waiting == (0,)
  _, commands = scheduler.step(pair(), state, InstanceUp(0, 1))
  assert commands == (Migrate(0, 2, 0, (0, 1), 1, (0, 1), 6),)


def test_who_waits_for_an_instance_fails_when_all_are_gone():
  gone = InstanceDown(0, 1, back=False)
  for events in ((gone,), (InstanceDown(0, 1), gone)):
    state, commands = state_after(pair(), *MOVING, *events)
    assert commands == [Fail(0, 'no decode instance is left')]
    assert free(state) == [8, 8]


@pytest.mark.parametrize('down', [0, 1])
def test_cancelled_while_it_waits_for_an_instance(down):
  state, commands = state_after(pair(), *MOVING, InstanceDown(0, down),
                                cancel(0))
  assert commands == [GONE] and at_rest(pair(), state)


def test_a_drained_instance_hands_its_queue_over():
  config = config_of(instance('colocated', max_seqs=1),
                     instance('colocated'))
  state, _ = state_after(config, arrive(0, 6, 3), arrive(1, 6, 3),
                         arrive(2, 6, 3))
  assert state.instances[0].queue == (2,)
  state, commands = scheduler.step(config, state, Drain(0, 0))
  scheduler.check(state)
  assert state.instances[0].queue == () and 2 in (
      *state.instances[1].queue, *state.instances[1].prefilling,
      *[r.id for r in state.instances[1].rows])


def test_the_last_instance_of_its_kind_goes_on_though_drained():
  play(pair(), [(Drain(0, 0),), (Drain(0, 1),),
                (arrive(0, 6, 3), PREFILL_0)])


@pytest.mark.parametrize('event', [
    Migrated(0, 0, 2), MigrateFailed(0, 0, 2), Timer(0, 0, 2),
    InstanceDown(0, 2), InstanceUp(0, 2), Drain(0, -1),
    InstanceDown(0, 1, (0.0,)), prefilled(0, -1), prefilled(2, 0)])
def test_an_event_without_sense_is_a_named_error(event):
  with pytest.raises(scheduler.ImpossibleEvent):
    state_after(pair(), *MOVING, event)


@pytest.mark.parametrize('kind', [
    Migrated, MigrateFailed, Timer])
def test_a_hand_off_that_was_never_begun_is_a_named_error(kind):
  for story in ([arrive(0, 6, 3)], [*MOVING, copied(0)]):
    with pytest.raises(scheduler.ImpossibleEvent, match='last hand-off'):
      state_after(pair(), *story, kind(0, 0, 2))


@pytest.mark.parametrize('story, event', [
    ([arrive(0, 6, 3)], PrefillDone(0, 0, 0, (1,))),
    ([arrive(0, 20, 2)], PrefillDone(0, 0, 0, (0,))),  # not its last
    ([*MOVING, copied(0)], DecodeDone(0, 1, 0, (0, 0), ((1, 0),))),
    ([*MOVING, copied(0)], InstanceDown(0, 1, (0,), ((1, 0),)))])
def test_an_end_of_what_was_not_sampled_is_a_named_error(story, event):
  with pytest.raises(scheduler.ImpossibleEvent, match='it samples tokens of'):
    state_after(pair(), *story, event)


def test_an_end_after_the_steps_that_are_out_is_a_named_error():
  down = InstanceDown(0, 1, (0.0,), ((0, 1),))
  with pytest.raises(scheduler.ImpossibleEvent, match='after the last step'):
    state_after(pair(), *MOVING, copied(0), down)


def test_a_status_follows_its_table():
  events = {'InstanceUp': InstanceUp(0, 1), 'Drain': Drain(0, 1),
            'InstanceDown': InstanceDown(0, 1),
            'InstanceGone': InstanceDown(0, 1, back=False)}
  start, _ = state_after(pair(), *MOVING)
  for (status, event), after in lifecycle.STATUS.items():
    to = {'up': [], 'draining': ['Drain'], 'down': ['InstanceDown'],
          'gone': ['InstanceGone']}[status]
    state = start
    for name in (*to, event):
      state, _ = scheduler.step(pair(), state, events[name])
      scheduler.check(state)
    assert state.instances[1].status == after, (status, event)
