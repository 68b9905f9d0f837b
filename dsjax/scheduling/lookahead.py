"""Quiet runs: what an instance will decide while only completions happen.

A simulator leaps over them; see scheduler.Run.quiet and Run.follow.
"""

from __future__ import annotations

import heapq
import operator
from typing import TYPE_CHECKING, Any

from dsjax.scheduling import batches, host_tier, prefix_cache, residents
from dsjax.scheduling.events import RunDecode

if TYPE_CHECKING:
  from dsjax.scheduling.live import LiveInstance
  from dsjax.scheduling.scheduler import Run


class Turn:
  """A micro-batch in a quiet run, before its next command.

  index: of the micro-batch. tick, rows, context: ticks issued, rows, and
  tokens that these attend to in the next one. due: how many rows want a page
  at a tick, by the tick's rest of the page size. end: the first tick at which
  a row is at its limit; -1: there are no rows.
  """

  __slots__ = ('index', 'tick', 'rows', 'context', 'due', 'end', '_batch',
               '_ends')

  def __init__(self, run: Run, inst: LiveInstance, index: int):
    self.index, size = index, inst.config.page_size
    self._batch = batch = inst.batches[index]
    self.tick, self.rows = batch.tick, batch.size
    # A row wants a page when it is due and then every page_size ticks, until
    # the pages cover its limit: no tick of that rest comes then.
    self.due = due = [0] * size
    base = 0
    for _, start, until, _ in batch.rows.values():
      due[until % size] += 1
      base += start
    self.context = base + self.rows * (self.tick + 1)
    self.end = min(batch.limits(run.seqs).values())
    self._ends: list[tuple[int, int, Any]] = []  # a heap, once there is an end

  def leave(self) -> int:
    """Takes out the row that is at its limit; its id."""
    if not self._ends:
      limits = self._batch.ends
      self._ends = [(limits[id], place, row) for place, (id, row) in
                    enumerate(self._batch.rows.items())]
      heapq.heapify(self._ends)
    _, _, (id, base, until, _) = heapq.heappop(self._ends)
    self.due[until % len(self.due)] -= 1
    self.rows -= 1
    self.context -= base + self.tick + 1
    self.end = self._ends[0][0] if self._ends else -1
    return id


class Ahead:
  """The decode commands that will follow those in flight.

  As long as nothing but completions happens to the instance, each of them is
  answered by the next of these commands. It sleeps from now on: no apply for
  its completions, but one `follow` for all of them, at the latest when no
  command can be told any more, as something is to be decided: pages run
  short, no row is left, or one ends and what waits may find room.

  Attributes:
    turns: the micro-batches in turn.
    steps, ticks: of each command that was told, and ticks before it.
    left: (command, place of its turn, id) of each row that leaves behind a
      command, at its limit.
    flight: commands that were in flight. ending: (command, id) of requests
      that end with one of these; counted from the first one told, so below 0.
    rows, context: of the command told last.
  """

  __slots__ = ('turns', 'steps', 'ticks', 'left', 'flight', 'ending', 'rows',
               'context', '_free', '_most', '_may_end')

  def __init__(self, inst: LiveInstance, turns: list[Turn], may_end: bool,
               most: int):
    self.turns, self._may_end, self._most = turns, may_end, most
    self.steps: list[int] = []
    self.ticks: list[int] = []
    self.left: list[tuple[int, int, int]] = []
    self.flight = len(inst.inflight)
    self.ending = [(max(after - inst.number, -self.flight), id)
                   for after, id in inst.ending]
    self.rows = self.context = 0
    self._free = prefix_cache.num_free(inst.pool)
    if inst.host and inst.able.prefills:  # what is evicted is to be told
      self._free -= prefix_cache.num_idle(inst.pool)

  def ends(self) -> list[tuple[int, int]]:
    """(command, id) of requests that end with one of the commands told, or
    with one that was in flight."""
    return self.ending + [(n, id) for n, _, id in self.left]

  def tell(self) -> bool:
    """Tells another command; False where there is something to decide."""
    number = len(self.steps)
    place = number % len(self.turns)
    turn = self.turns[place]
    due, end, tick = turn.due, turn.end, turn.tick
    size = len(due)
    want = due[tick % size]
    if end < 0 or want > self._free:
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
    turn.tick = tick + steps
    turn.context += steps * turn.rows
    while turn.end == turn.tick:
      self.left.append((number, place, turn.leave()))
    return True


def ahead(run: Run, index: int) -> Ahead | None:
  """What will follow the commands in flight; None: it is to be decided now.

  The instance sleeps from now on, unless that is None.
  """
  inst, depth = run.instances[index], run.config.depth
  if (inst.asleep or inst.queue or inst.prefilling or host_tier.waits(inst)
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
  order, but that pages may have other names; what it would answer is left out.
  """
  inst = run.instances[index]
  inst.asleep = False
  if not count:
    return
  commands, cause = run.commands, run.cause
  run.commands = []
  first, flight = inst.number, told.flight
  order = [turn.index for turn in told.turns]
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
  get pages. Sets the rows of each command that will be in flight."""
  size, count, short, total = inst.config.page_size, len(told.turns), [], 0
  for n in range(start, min(start + count, stop)):
    batch = inst.batches[told.turns[n % count].index]
    newest = n + (stop - 1 - n) // count * count
    tick = told.ticks[newest]
    for row in batch.rows.values():
      if row[2] <= tick:
        more = (tick - row[2]) // size + 1
        short.append((batch, row, more))
        total += more
    batch.tick = tick + told.steps[newest]
    batch.forget_due()
  if short:
    ids = residents.alloc(run, inst, total)
    for batch, row, more in short:
      seq = run.own(row[0])
      seq.pages += ids[:more]
      ids = ids[more:]
      batch.change(batches.row_of(inst, seq, row[1]))
  for n in range(max(start, len(rows) - told.flight), stop):
    rows[n] = inst.batches[told.turns[n % count].index].row_values()
