"""Stories of events and the commands that each must give, told by hand."""

from dsjax.config.engine import InstanceConfig
from dsjax.scheduling import page_pool, scheduler
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  Chunk,
  DecodeDone,
  Finish,
  Migrate,
  Migrated,
  PrefillDone,
  Row,
  RunDecode,
  RunPrefill,
)


def instance(role, num_pages=8, page_size=4, max_seqs=4, prefill_tokens=16,
             prefill_seqs=4, pp=1):
  return InstanceConfig(role, num_pages, page_size, max_seqs, prefill_tokens,
                        prefill_seqs, pp)


def config_of(*instances, max_len=32, run_ahead=4, **changes):
  return scheduler.Config(instances, max_len, run_ahead=run_ahead, **changes)


def pair(prefill=None, decode=None, **changes):
  return config_of(instance('prefill', **prefill or {}),
                   instance('decode', **decode or {}), **changes)


def arrive(id, prompt_len, max_tokens):
  return Arrived(0, id, prompt_len, max_tokens)


def cancel(id):
  return Cancelled(0, id)


def prefilled(instance, number, *ended):
  return PrefillDone(0, instance, number, ended)


def decoded(instance, number, *ended):
  return DecodeDone(0, instance, number, (), ended)


def copied(id, epoch=1):
  return Migrated(0, id, epoch)


def play(config, story, before=()):
  """The state after a story whose every event gave exactly its commands.

  before: events that come first, whatever their commands.
  """
  state, _ = state_after(config, *before)
  for event, *commands in story:
    state, issued = scheduler.step(config, state, event)
    assert list(issued) == commands, event
    scheduler.check(state)
  return state


def state_after(config, *events):
  """The state after events and the commands of the last."""
  state, commands = scheduler.init(config), ()
  for event in events:
    state, commands = scheduler.step(config, state, event)
    scheduler.check(state)
  return state, list(commands)


def free(state):
  return [page_pool.num_free(instance.pool) for instance in state.instances]


def at_rest(config, state):
  return scheduler.idle(state) and free(state) == [
      c.num_pages for c in config.instances]


def staged(**changes):
  return pair(ROOMY, ROOMY | {'pp': 2}, **changes)


# What many stories begin or end with.
PREFILL_0 = RunPrefill(0, 0, (Chunk(0, 0, 6, (0, 1), True),))
GONE = Finish(0, 'cancelled')
ROOMY = {'page_size': 16}
TWO = [arrive(0, 4, 9), arrive(1, 4, 9), prefilled(0, 0), prefilled(0, 1)]
PRESSED = [
    (arrive(0, 8, 2), RunPrefill(0, 0, (Chunk(0, 0, 8, (0, 1), True),))),
    (prefilled(0, 0), Migrate(0, 1, 0, (0, 1), 1, (0, 1), 8)),
    (copied(0), RunDecode(1, 0, 0, 1, (Row(0, 8, 1, (0, 1, 2)),))),
    (arrive(1, 8, 2), RunPrefill(0, 1, (Chunk(1, 0, 8, (0, 1), True),))),
    (prefilled(0, 1),),  # one page free at the target, three wanted
    (arrive(2, 8, 2), RunPrefill(0, 2, (Chunk(2, 0, 8, (2, 3), True),))),
    (prefilled(0, 2),),
]
