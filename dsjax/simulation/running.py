"""Rows that run already where a simulation begins.

A system that has served for long is full of them, each somewhere in its
output. To fill an empty one takes as long as the longest outputs.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from dsjax.config.checks import is_number, require
from dsjax.scheduling import page_pool, prefix_cache, residents
from dsjax.scheduling.events import Arrived, Command, Event, Migrated
from dsjax.scheduling.live import LiveSeq
from dsjax.scheduling.state import never_fits


class Running(NamedTuple):
  """A row of an instance.

  id: of its request; none that arrives has it. prompt_len: tokens. so_far,
  more: tokens that it has generated, at least 1, and those to come, at least 1.
  first_s: when the first one was there, 0 at most.
  """

  id: int
  instance: int
  prompt_len: int
  so_far: int
  more: int
  first_s: float


def begin(run: Any, rows: Iterable[Running]
          ) -> list[tuple[Event, list[Command]]]:
  """Puts rows on instances of a scheduler.Run, as if each had just been handed
  off there. Those are left out for which there is no page to grow into, or no
  seat, or that an instance could not hold to their end.

  Returns:
    (event, commands) of each, an Arrived that commands nothing, and a
    Migrated at second 0.

  Raises:
    InputError: one cannot be a row of its instance.
  """
  placed = [row for row in rows if _place(run, row)]
  for row in placed:  # at its source too, which its hand-off gives back
    run.instances[row.instance].residents += 1
  told: list[tuple[Event, list[Command]]] = []
  for number, row in enumerate(placed, 1):
    arrived = Arrived(row.first_s, row.id, row.prompt_len,
                      row.so_far + row.more)
    moved = Migrated(0.0, row.id, 0, number < len(placed))
    told += [(arrived, []), (moved, run.apply(moved))]
  return told


def _place(run: Any, row: Running) -> bool:
  """Whether a request has pages, for its KV and for its next token."""
  decoders = [inst.index for inst in run.open_decoders]
  require(row.instance in decoders, 'Running.instance', row.instance,
          f'one of {decoders}, those that decode')
  tokens = row.prompt_len, row.so_far, row.more
  require(all([type(count) is int for count in tokens]) and min(tokens) >= 1
          and sum(tokens) <= run.config.max_len, 'Running', row,
          f'of 1 token or more each, {run.config.max_len} at most in all')
  require(is_number(-math.inf, 0)(row.first_s), 'Running.first_s', row.first_s,
          'seconds, 0 or less')
  require(row.id not in run.seqs, 'Running.id', row.id, 'of no other row')
  if never_fits(run.config, row.prompt_len, row.so_far + row.more):
    return False
  inst = run.instances[row.instance]
  known = row.prompt_len + row.so_far - 1
  pages = page_pool.pages_for(known + 1, inst.page_size)
  spare = inst.residents + 1  # each has a page to grow into
  if (inst.residents >= inst.config.max_seqs
      or pages + spare > prefix_cache.num_free(inst.pool)):
    return False
  seq = LiveSeq(
      row.id, run.arrivals, known, row.prompt_len + row.so_far + row.more,
      'migrating', row.instance, done=known, target=row.instance,
      target_pages=residents.alloc(run, inst, pages), arrival_s=row.first_s,
      input_len=row.prompt_len, first_s=row.first_s, stop=known)
  run.own_seqs()[row.id] = seq
  run.owned.add(row.id)
  run.arrivals += 1
  inst.residents += 1
  return True
