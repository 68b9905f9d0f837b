"""What a step of a busy scheduler takes: part (c) of bench.engine."""

import time

import numpy as np

from dsjax.config.engine import InstanceConfig
from dsjax.scheduling import prefix_cache, scheduler
from dsjax.scheduling.events import (
  Arrived,
  DecodeDone,
  Offload,
  Offloaded,
  PrefillDone,
  RunDecode,
  RunPrefill,
)

RUNNING, WAITING, KEPT, TIMED = 256, 1000, 100_000, 320
# What is kept when nobody has come yet, in pages and in slots of host memory.
CASES = {'no cache': None, 'cache': (0, 0),
         f'{KEPT:,} blocks kept': (KEPT, 0),
         'and in host memory': (KEPT, KEPT)}


def filled(pool, hashes):
  """A pool in which blocks are kept that nobody asks for."""
  pool, pages = prefix_cache.alloc(pool, len(hashes))
  return prefix_cache.release(pool, pages, hashes, len(hashes))


class Busy:
  """A colocated instance's scheduler, its rows running, its queue full.

  With blocks kept, each page that a row takes evicts one, which goes to a slot
  where there are any, and evicts what was there.
  """

  def __init__(self, kept, running=RUNNING, waiting=WAITING):
    pages, slots = kept or (0, 0)
    room = running * (20 if pages else 75)
    instance = InstanceConfig('colocated', pages + room, 16, running, 8192, 64,
                              host_pages=slots)
    self.config = scheduler.Config((instance,), 4096,
                                   prefix_cache=kept is not None)
    self.state, self.pending = scheduler.init(self.config), []
    first, = self.state.instances
    if pages:
      first = first._replace(pool=filled(first.pool, range(-pages, 0)))
    if slots:
      first = first._replace(host=first.host._replace(
          slots=filled(first.host.slots, range(-pages - slots, -pages))))
    self.state = self.state._replace(instances=(first,))
    for id in range(running + waiting):
      self.step(Arrived(0.0, id, 300, 900, blocks=tuple(
          range(id * 100, id * 100 + 18)) if kept is not None else ()))
    while len(self.state.instances[0].rows) < running:
      self.next()

  def row_pages(self):
    """Pages of all rows together."""
    return sum(len(row.pages) for row in self.state.instances[0].rows)

  def step(self, event):
    """CPU seconds of a step."""
    start = time.process_time()
    self.state, commands = scheduler.step(self.config, self.state, event)
    taken = time.process_time() - start
    self.pending += [c for c in commands
                     if isinstance(c, RunPrefill | RunDecode | Offload)]
    return taken

  def next(self):
    """The oldest command is done: CPU seconds of its step, if it decodes."""
    command = self.pending.pop(0)
    if isinstance(command, RunDecode):
      return self.step(DecodeDone(0.0, 0, command.number,
                                  (0.0,) * command.steps))
    self.step(Offloaded(0.0, 0, command.number) if isinstance(command, Offload)
              else PrefillDone(0.0, 0, command.number))
    return None


def times_us():
  """CPU us of DecodeDones of busy schedulers, in turn: by CASES, 'step' those
  in which no row takes a page, and 'page taken' by page those in which most
  do."""
  busy = {name: Busy(kept) for name, kept in CASES.items()}
  quiet, taking = ({name: [] for name in CASES} for _ in range(2))
  for _ in range(TIMED):
    for name, each in busy.items():
      before = each.row_pages()
      while (took_s := each.next()) is None:
        pass
      pages = each.row_pages() - before
      if not pages:
        quiet[name].append(took_s)
      elif pages > RUNNING // 2:
        taking[name].append(took_s / pages)
  for each in busy.values():
    assert len(each.state.instances[0].queue) == WAITING
    scheduler.check(each.state)
  return {name: {case: 1e6 * np.array(seconds)
                 for case, seconds in cases.items()}
          for name, cases in (('step', quiet), ('page taken', taking))}
