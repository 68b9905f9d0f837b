"""A World: everything at one moment, as a value.

The scheduler's state, what lies on every page, what each client was told.

A page holds (request, block, tokens): the first `tokens` slots of its block
of positions. That is what every slot holds, as nothing is written behind a
slot that was not read first. Of a page of tokens with which several requests
begin the request is ALIKE; where pages are kept for such requests, one of
them holds what its hash says, and nobody writes there. Slots of host memory
hold the same, once a copy has ended.

The clock: events carry a time that may not be looked at (NO_CLOCK), so that
no jump of a clock changes a decision. What a clock does decide, when a lease
runs out, is a move that may come at any time. A log that is to be kept has
numbers instead, see Rules.time_s.
"""

from typing import Any, NamedTuple

from dsjax.scheduling import prefix_cache
from dsjax.scheduling.events import (
  Loaded,
  LoadFailed,
  Migrate,
  Migrated,
  MigrateFailed,
  Timer,
)
from dsjax.scheduling.state import Instance, State


class Violation(AssertionError):
  """What must hold does not.

  Attributes:
    moves: the schedule that led to it, where it is known.
  """

  moves = ()


def need(ok: object, text: str, *told: object) -> None:
  """Raises Violation unless ok; `told` goes into the braces of `text`."""
  if not ok:
    raise Violation(text.format(*told))


class _NoClock:
  """A time that must not be looked at."""

  def _looked(self, *_):
    raise Violation('the scheduler looked at the time of an event')

  def __repr__(self):
    return 'any'

  __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _looked
  __add__ = __radd__ = __sub__ = __rsub__ = __float__ = __bool__ = _looked


NO_CLOCK: Any = _NoClock()
HAND_OFF = (Migrated, MigrateFailed, Timer, Loaded, LoadFailed)
COPIED = ('migrating', 'loading', 'abandoned')
DAMAGED = ('damaged', 0, 0)
ALIKE = -1
Move = tuple  # a name and its numbers, such as ('crash', instance, steps)
Log = list[tuple[Any, tuple]]  # [(event, commands), ...]
PROBED = 6  # requests that are told stale events at a time


class World(NamedTuple):
  """Everything at one moment.

  kv: (id, block, tokens filled) or None for each page. host: (id, block,
  tokens filled) of slots, by (instance, slot). offloads: (Offload, what it has
  read). loads: Load. fates: None until a
  request arrives, '' until it ends. out: tokens told to each client. copies:
  (Migrate, its answer is lost, number of the command of its source that it is
  read behind). faults: left to inject. marks: a hash of each instance, see
  Rules.key. links, halves: of instances that are processes, see links.py.
  """

  state: State
  kv: tuple
  fates: tuple
  out: tuple
  copies: tuple
  faults: int
  marks: tuple
  host: dict[tuple[int, int], tuple | None] = {}
  offloads: tuple = ()
  loads: tuple = ()
  links: tuple = ()
  halves: frozenset = frozenset()


def hash_of(id: int, block: int) -> int:
  """Of a block, and all before it."""
  return 1 + 1000 * block + (0 if id == ALIKE else id + 1)


def behind(w: World, c: Migrate, number: int) -> int:
  """Commands that are to run before a copy reads: those up to `number`."""
  flying = w.state.instances[c.source].inflight
  return max(0, number + 1 - flying[0][0].number) if flying else 0


def free_bits(inst: Instance) -> int:
  """The bits of the pages that nobody owns, and that are not kept."""
  pool = inst.pool
  return (pool.pool if isinstance(pool, prefix_cache.Cache) else pool).free


def kept_pages(inst: Instance) -> list[tuple[int, int]]:
  """[(hash, page)] of what is kept."""
  if type(inst.pool) is not prefix_cache.Cache:
    return []
  return [(hash, entry.page) for hash, entry in inst.pool.kept.items()]


def _kept_mark(inst):
  """A hash of what is kept; of stamps only their order counts."""
  if type(inst.pool) is not prefix_cache.Cache:
    return 0
  return _cache_mark(inst.pool)


def _cache_mark(cache):
  return hash((tuple([hash for _, hash in sorted(cache.idle.items())]),
               tuple(sorted([(hash, *entry[:2]) for hash, entry
                             in cache.kept.items()]))))


def _host_mark(inst):
  """A hash of what the host has; of numbers only their order counts."""
  host = inst.host
  if host is None:
    return 0
  return hash((_cache_mark(host.slots),
               tuple([entry[1:] for entry in host.offloads]),
               tuple([(id, slots, number < 0)
                      for id, slots, number in host.swapped])))


def mark_of(inst: Instance) -> int:
  """A hash of an instance, see Rules.key."""
  ticks = [b.tick for b in inst.batches]
  number = inst.number
  return hash((
      free_bits(inst), _kept_mark(inst), _host_mark(inst), inst.queue,
      inst.prefilling, inst.pulls, inst.streams, inst.turn, inst.status,
      inst.role, inst.loading,
      tuple([(number - n, id) for n, id in inst.ending]),
      tuple([tuple([(r[0], r[1] + b.tick, r[2] - b.tick, r[3])
                    for r in b.rows]) for b in inst.batches]),
      tuple([(g, c.steps, c.chunks,
              tuple([(r[0], r[1] + c.tick, r[3]) for r in c.rows]),
              ticks[g] - c.tick if g >= 0 else 0)
             for c, g in inst.inflight])))
