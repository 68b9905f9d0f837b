"""Quiet runs: what an instance will decide while only completions happen.

A simulator leaps over them; see scheduler.Run.quiet and Run.follow.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from dsjax.scheduling import batches, prefix_cache
from dsjax.scheduling.events import RunDecode

if TYPE_CHECKING:
  from dsjax.scheduling.live import LiveBatch, LiveInstance
  from dsjax.scheduling.scheduler import Run


class Turn:
  """A micro-batch in a quiet run, before its next command.

  batch: its index. tick, rows, context: ticks issued, rows, and tokens that
  these attend to in the next one. due: how many rows want a page at a tick,
  by the tick's rest of the page size. ends: (tick at which it is at its limit,
  place, id, base, that rest) of each row, the last to end first.
  """

  __slots__ = ('batch', 'tick', 'rows', 'context', 'due', 'ends')

  def __init__(self, run: Run, inst: LiveInstance, index: int):
    batch, size = inst.batches[index], inst.config.page_size
    self.batch, self.tick, self.rows = index, batch.tick, batch.size
    # A row wants a page when it is due and then every page_size ticks, until
    # the pages cover its limit: no tick of that rest comes then.
    self.due, self.ends, self.context = [0] * size, [], 0
    due, ends, base = self.due, self.ends, 0
    limits = batch.limits(run.seqs)
    for id, start, until, _ in batch.rows.values():
      rest = until % size
      due[rest] += 1
      base += start
      ends.append((limits[id], len(ends), id, start, rest))
    ends.sort(reverse=True)
    self.context = base + self.rows * (self.tick + 1)


class Ahead:
  """The decode commands that will follow those in flight.

  As long as nothing but completions happens to the instance, each of them is
  answered by the next of these commands. It sleeps from now on: no apply for
  its completions, but one `follow` for all of them, at the latest when no
  command can be told any more, as something is to be decided: pages run
  short, no row is left, or one ends and what waits may find room.

  Attributes:
    turns: the micro-batches in turn.
    steps, ticks: of each command that was told, and ticks before it. left: (command, place of its turn,
      id) of each row that leaves behind a command, at its limit.
    flight: commands that were in flight. ending: (command, id) of requests
      that end with one of these; counted from the first one told, so below 0.
    rows, context: of the command told last.
  """

  __slots__ = ('turns', 'steps', 'ticks', 'left', 'flight', 'ending', 'rows',
               'context', '_free', '_most', '_may_end', '_over')

  def __init__(self, inst: LiveInstance, turns: list[Turn], may_end: bool,
               most: int):
    self.turns, self._may_end, self._most = turns, may_end, most
    self.steps: list[int] = []
    self.ticks: list[int] = []
    self.left: list[tuple[int, int, int]] = []
    self.flight = len(inst.inflight)
    self.ending = [(after - inst.number, id) for after, id in inst.ending]
    self.rows = self.context = 0
    self._over = False
    self._free = prefix_cache.num_free(inst.pool)
    if inst.host:  # what is evicted is to be told
      self._free -= prefix_cache.num_idle(inst.pool)

  def ends(self) -> list[tuple[int, int]]:
    """(command, id) of requests that end with one of the commands told, or
    with one that was in flight."""
    return self.ending + [(n, id) for n, _, id in self.left]

  def tell(self) -> bool:
    """Tells another command; False where there is something to decide."""
    if self._over:
      return False
    number = len(self.steps)
    place = number % len(self.turns)
    turn = self.turns[place]
    due, ends, tick = turn.due, turn.ends, turn.tick
    size, end = len(due), ends[-1][0]
    want = due[tick % size]
    if want > self._free:
      return False
    steps, most = 1, self._most
    while steps < most and tick + steps < end and not due[
        (tick + steps) % size]:
      steps += 1
    if tick + steps >= end and not self._may_end:
      return False
    self._free -= want
    self.steps.append(steps)
    self.ticks.append(tick)
    self.rows, self.context = turn.rows, turn.context
    turn.tick = tick = tick + steps
    turn.context += steps * turn.rows
    while ends and ends[-1][0] <= tick:
      _, _, id, base, rest = ends.pop()
      self.left.append((number, place, id))
      due[rest] -= 1
      turn.rows -= 1
      turn.context -= base + tick + 1
      self._over = not ends
    return True


def ahead(run: Run, index: int) -> Ahead | None:
  """What will follow the commands in flight; None: it is to be decided now.

  The instance sleeps from now on, unless that is None.
  """
  inst, depth = run.instances[index], run.config.depth
  if (inst.asleep or inst.queue or inst.prefilling
      or len(inst.inflight) < inst.depth):
    return None
  pp = len(inst.batches)
  order = [g % pp for g in range(inst.turn, inst.turn + pp)
           if inst.batches[g % pp].size]
  if (not order or [g for _, g in inst.inflight] != order * depth
      or any([type(c) is not RunDecode for c, _ in inst.inflight])):
    return None
  may_end = run.ends_alone and not (inst.pulls or inst.able.flips)
  if inst.ending and (not may_end or any([
      run.seqs[id].stage != 'finishing' for _, id in inst.ending])):
    return None
  alone = pp == 1 and not inst.pulls and (
      inst.residents == inst.batches[0].size + len(inst.ending))
  told = Ahead(inst, [Turn(run, inst, g) for g in order], may_end,
               inst.run_ahead if alone else 1)
  if not told.tell():
    return None
  inst.asleep = True
  return told


def follow(run: Run, index: int, told: Ahead, count: int) -> None:
  """Ends a quiet run in which `count` of its commands have been issued.

  Does what the scheduler does at each of these completions, in the same
  order; what it would answer is left out.
  """
  inst = run.instances[index]
  inst.asleep = False
  if not count:
    return
  commands, cause = run.commands, run.cause
  run.commands = []
  first, flight = inst.number, told.flight
  order = [turn.batch for turn in told.turns]
  # (command that answers the completion, whether it has been issued, turn,
  # id): a row leaves behind its command; its end is told with a completion.
  stops = [(after + flight, False, 0, id) for after, id in told.ending]
  for n, place, id in told.left:
    stops += (n, True, place, id), (n + flight, False, place, id)
  stops.sort(key=_MOMENT)
  issued, rows = 0, [()] * count
  for n, has_issued, place, id in stops:
    if n >= count:
      break
    if n + has_issued > issued:
      _issue(run, inst, told, issued, n + has_issued, rows)
      issued = n + has_issued
    inst.number = first + issued
    if has_issued:
      run.cause = 'plan'
      batches.part(run, inst, inst.batches[order[place]], id)
    else:
      run.cause = 'DecodeDone'
      run.settle(inst, first - flight + n)
  if count > issued:
    _issue(run, inst, told, issued, count, rows)
  for n in range(max(count - flight, 0), count):
    inst.inflight.popleft()
    inst.inflight.append((RunDecode(
        index, first + n, told.ticks[n], told.steps[n], rows[n]),
        order[n % len(order)]))
  inst.number, inst.value = first + count, None
  inst.turn = (inst.inflight[-1][1] + 1) % len(inst.batches)
  run.commands, run.cause = commands, cause


_MOMENT = operator.itemgetter(0, 1)


def _issue(run, inst, told, start, stop, rows):
  """Issues commands [start, stop), of the same rows: ticks pass, and these
  get pages. Sets the rows of each command."""
  wants, size, count = [], inst.config.page_size, len(told.turns)
  for n in range(start, min(start + count, stop)):
    batch = inst.batches[told.turns[n % count].batch]
    newest = n + (stop - 1 - n) // count * count
    tick = told.ticks[newest]
    batch.forget_due()
    for id, _, until, _ in batch.rows.values():
      while until <= tick:
        wants.append((n + count * (until - told.ticks[n]), batch, id))
        until += size
    batch.tick = tick + told.steps[newest]
  if wants:
    wants.sort(key=_WHEN)
    batches.extend(run, inst, [(batch, id) for _, batch, id in wants])
  for n in range(max(start, len(rows) - told.flight), stop):
    rows[n] = inst.batches[told.turns[n % count].batch].row_values()


_WHEN = operator.itemgetter(0)
