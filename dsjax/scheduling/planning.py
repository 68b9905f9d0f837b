"""A policy's resize, asked beside the loop: it may search for long.

The loop goes on meanwhile. What came of it enters with a later Tick, so a log
replays without asking again.
"""

from dsjax.scheduling import choices, scheduler

Roles = tuple[tuple[int, str], ...]


def roles_of(config: scheduler.Config, state: scheduler.State, time_s: float
             ) -> Roles:
  """What Policy.resize answers to a state, as Tick.roles: those that change.

  A pure function: any process may run it.

  Raises:
    PolicyError.
  """
  run = scheduler.Run(config, state)
  run.now[0] = time_s
  return tuple(sorted(choices.roles(
      run, choices.ask(run, 'resize')).items()))

