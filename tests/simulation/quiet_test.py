"""Quiet runs: what one instance does unless another event comes, told ahead."""

import collections
import itertools
import random

from dsjax.scheduling import page_pool, scheduler
from dsjax.scheduling.events import (
  DecodeDone,
  Finish,
  Migrated,
  PrefillDone,
  RunDecode,
)
from dsjax.simulation import simulator
from tests.common.simulated import Affine, Link, plan, random_run, requests


def test_quiet_runs_issue_the_commands_of_steps():
  """Every command and the state after each, but for the names of pages."""
  tried = collections.Counter()
  for seed in range(48):
    config, sent, latency, link = random_run(seed)
    log = simulator.simulate(config, sent[:10], latency, link, log=True).log
    state = scheduler.init(config)
    for n, (event, _) in enumerate(log, 1):
      state, _ = scheduler.step(config, state, event)
      for index, instance in enumerate(config.instances[:3]):
        if n % 3 == 1 and instance.role != 'prefill':
          tried[instance.role, instance.pp] += follow_quietly(
              config, state, log[n:], index)
  assert len(tried) == 6 and min(tried.values()) > 10, tried


def follow_quietly(config, state, log, index):
  """How many commands of one instance the log and a quiet run shared.

  The events that follow are stepped as long as only this instance is told of
  completions; after them the quiet run must have come to the same state.
  """
  told = quiet(scheduler.Run(config, state), index)
  if told is None:
    return 0
  before, count, ended = state, 0, []
  for event, commands in log[:len(told.steps)]:
    if not isinstance(event, DecodeDone) or event.instance != index:
      break
    ended += [(count - told.flight, c.id) for c in commands
              if isinstance(c, Finish)]
    assert [(type(c), c.steps) for c in commands if not isinstance(
        c, Finish)] == [(RunDecode, told.steps[count])]
    state, count = scheduler.step(config, state, event)[0], count + 1
  assert ended == [e for e in told.ends() if e[0] + told.flight < count]
  run = scheduler.Run(config, before)
  run.follow(index, quiet(run, index), count)
  assert bare(run.freeze()) == bare(state)
  return count


def quiet(run, index):
  """A quiet run with eight of its commands told, or None."""
  told = run.quiet(index)
  if told is not None:
    for _ in range(8):
      told.tell()
  return told


def test_pulls_and_joins_leave_a_quiet_run_alone():
  """The commands of other events, and the state behind them, are those of
  steps while an instance sleeps on."""
  events, woken = collections.Counter(), 0
  for seed in range(60):
    config, sent, latency, link = random_run(seed)
    if config.instances[0].role != 'prefill':
      continue
    log = simulator.simulate(config, sent, latency, link, log=True).log
    state = scheduler.init(config, counted=True)
    for n, (event, _) in enumerate(log, 1):
      state, _ = scheduler.step(config, state, event)
      if n % 5 == 1:
        more, ended = sleep_on(config, state, log[n:n + 40])
        events.update(more)
        woken += ended
  assert events[PrefillDone] > 50 and events[Migrated] > 50
  assert 20 < woken < sum(events.values()) / 5


def sleep_on(config, state, log):
  """(types of the events that the last instance slept through, whether one
  woke it)"""
  index, count, woken, through = len(config.instances) - 1, 0, [], []

  def wake(index):
    live.follow(index, told, count)
    woken.append(index)

  live = scheduler.Run(config, state, wake, lambda index: count)
  told = live.quiet(index)
  for event, commands in log if told else ():
    if isinstance(event, DecodeDone) and event.instance == index:
      if not told.tell():
        break
      count += 1
    else:
      applied = live.apply(event)
      assert list(map(nameless, applied)) == list(map(nameless, commands))
      through.append(type(event))
    state, _ = scheduler.step(config, state, event)
    if woken:
      break
  if told and not woken:
    live.follow(index, told, count)
  # It is later told of those that ended here.
  assert sorted(live.recent.ended) == sorted(state.ended)
  assert bare(live.freeze())._replace(ended=()) == bare(state)._replace(
      ended=())
  return through, bool(woken)


def nameless(command):
  """A command with numbers of pages, of rows their ids."""
  changed = {name: len(getattr(command, name)) for name in command._fields
             if name.endswith('pages')}
  if hasattr(command, 'rows'):
    changed['rows'] = [row.id for row in command.rows]
  if 'chunks' in command._fields:
    changed['chunks'] = [c._replace(pages=len(c.pages))
                         for c in command.chunks]
  return command._replace(**changed)


def bare(state):
  """A state with the number of pages in place of their names, and commands in
  flight with the ids of their rows (see Run.follow)."""
  return state._replace(seqs={id: seq._replace(
      pages=len(seq.pages), target_pages=len(seq.target_pages))
                              for id, seq in state.seqs.items()},
                        instances=tuple(map(bare_instance, state.instances)))


def bare_instance(inst):
  return inst._replace(
      pool=page_pool.num_free(inst.pool),
      batches=tuple(b._replace(rows=tuple(
          r._replace(pages=len(r.pages)) for r in b.rows))
                    for b in inst.batches),
      inflight=tuple((c._replace(
          rows=tuple(r.id for r in c.rows), **{'chunks': tuple(
              k._replace(pages=()) for k in c.chunks)} if c.chunks else {}), g)
                     for c, g in inst.inflight))


def test_instances_that_sleep_are_roused_to_be_compared():
  """Where requests have ended unseen the least loaded is another."""
  for seed in range(8):
    draw = random.Random(seed)
    arrivals_s = itertools.accumulate(
        [draw.expovariate(20) for _ in range(60)])
    sent = requests(*((t, draw.randint(1, 20), draw.randint(2, 60))
                      for t in arrivals_s))
    for roles in (['prefill', 'decode', 'decode', 'decode'],
                  ['colocated'] * 3):
      run = (plan(roles, num_pages=300), sent,
             Affine(1e-4, 0.004, 1e-4, 1e-6), Link(0.001, 1e-5))
      assert [r.instances for r in simulator.simulate(*run).records] == [
          r.instances for r in simulator.simulate(*run, log=True).records]
