"""What check finds; random worlds; replay of a log."""

import collections
import functools
import json

import pytest

from dsjax.scheduling import event_log, page_pool, scheduler
from dsjax.scheduling.events import Finish, Preempt
from experiments.verify import schedules, world
from tests.common.stories import (
  TWO,
  arrive,
  config_of,
  copied,
  instance,
  pair,
  staged,
  state_after,
)

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
  state, _ = scheduler.step(pair(), state, arrive(2, 6, 3))
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
  state, _ = state_after(pair(), arrive(0, 6, 3), arrive(1, 6, 3))
  with pytest.raises(AssertionError, match=message):
    scheduler.check(broken(state))


def test_check_finds_a_row_of_two_micro_batches():
  state, _ = state_after(staged(), *TWO, copied(0))
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
    config = config_of(
        instance('prefill', 24, 2, 8), instance('prefill', 12, 4, 8),
        instance('decode', 8 + seed % 4, 2, 5, pp=1 + seed % 3),
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
