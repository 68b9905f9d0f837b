"""Quiet runs: what an instance will decide while only completions happen.

A simulator leaps over them; see scheduler.Run.quiet and Run.follow. That a
decode instance pulls KV, or a row joins its batch, does not end one
(Run.stir).
"""

from __future__ import annotations

import collections
import heapq
from typing import TYPE_CHECKING

from dsjax.scheduling import (
  batches,
  host_tier,
  page_pool,
  prefix_cache,
  residents,
)
from dsjax.scheduling.events import Row, RunDecode

if TYPE_CHECKING:
  from dsjax.scheduling.live import LiveInstance, LiveSeq
  from dsjax.scheduling.scheduler import Run

# Commands of a quiet run: at its end the recorder is told of them.
MOST = 512


class Turn:
  """A micro-batch in a quiet run, before its next command.

  index: of the micro-batch. tick, rows, context: ticks issued, rows, and
  tokens that these attend to in the next one. due: how many rows want a page
  at a tick, by the tick's rest of the page size; full: of those of the next
  tick, how many have just had one. end: the first tick at which
  a row is at its limit; -1: there are no rows. first: its rows at the start.
  before: (command, rows): up to this command, from the one before on, its
  commands had these rows; of commands that may be in flight.
  """

  __slots__ = ('index', 'tick', 'rows', 'context', 'due', 'full', 'end',
               'first', 'before', '_ends', '_count')

  def __init__(self, run: Run, inst: LiveInstance, index: int):
    self.index, size = index, inst.page_size
    batch = inst.batches[index]
    self.tick, self.rows = batch.tick, batch.size
    # A row wants a page when it is due and then every page_size ticks, until
    # the pages cover its limit: no tick of that rest comes then.
    self.due = due = [0] * size
    self.first = batch.row_values()
    self.before: collections.deque[tuple[int, tuple[Row, ...]]] = (
        collections.deque(maxlen=len(inst.inflight)))
    base, limits, full = 0, batch.limits(run.seqs), batch.tick + size
    self.full = 0
    # A heap of (tick, place, row).
    self._ends: list[tuple[int, int, Row]] = []
    for place, row in enumerate(self.first):
      id, start, until, _ = row
      due[until % size] += 1
      if until == full:
        self.full += 1
      base += start
      self._ends.append((limits[id], place, row))
    heapq.heapify(self._ends)
    self._count = self.rows
    self.context = base + self.rows * (self.tick + 1)
    self.end = self._ends[0][0]

  def leave(self) -> int:
    """Takes out the row that is at its limit; its id."""
    _, _, (id, base, until, _) = heapq.heappop(self._ends)
    self.due[until % len(self.due)] -= 1
    self.rows -= 1
    self.context -= base + self.tick + 1
    self.end = self._ends[0][0] if self._ends else -1
    return id

  def join(self, row: Row, limit: int) -> None:
    """Another row, which is at its limit at this tick."""
    _, base, until, _ = row
    heapq.heappush(self._ends, (limit, self._count, row))
    self._count += 1
    self.due[until % len(self.due)] += 1
    self.full += until == self.tick + len(self.due)
    self.rows += 1
    self.context += base + self.tick + 1
    self.end = self._ends[0][0]

  def had(self, number: int, rows: tuple[Row, ...]) -> None:
    """Up to a command it has these rows, and then others."""
    if not self.before or self.before[-1][0] < number:
      self.before.append((number, rows))

  def rows_of(self, number: int, now: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a command that is in flight. now: of the next one."""
    return next((rows for last, rows in self.before if last >= number), now)


class Ahead:
  """The decode commands that will follow those in flight.

  As long as nothing but completions happens to the instance, each of them is
  answered by the next of these commands. It sleeps from now on: no apply for
  its completions, but one `follow` for all of them, at the latest when no
  command can be told any more, as something is to be decided: pages run
  short, no row is left, or one ends and what waits may find room.

  Attributes:
    turns: the micro-batches in turn.
    steps, ticks: of each command that was told. wants: pages of all commands
      before each of them, and of all.
    left: (command, place of its turn, id) of each row that leaves behind a
      command, at its limit. joined: the same of each that joins before one.
    flight: commands that were in flight, oldest: the number of the first.
    ending: (command, id) of requests that end with one of these; counted from
      the first one told, so below 0. ended: the commands of `ends`.
    rows, context: of the command told last.
    stirred: the instance has changed, as Run.stir says.
  """

  __slots__ = ('turns', 'steps', 'ticks', 'wants', 'left', 'joined', 'flight',
               'oldest', 'ending', 'ended', 'rows', 'context', 'stirred',
               'first', '_inst', '_free', '_most', '_may_end', '_ids',
               '_issued', '_parted', '_settled')

  def __init__(self, inst: LiveInstance, turns: list[Turn], may_end: bool):
    self.turns, self._may_end, self._inst = turns, may_end, inst
    self.steps: list[int] = []
    self.ticks: list[int] = []
    self.wants = [0]
    self.left: list[tuple[int, int, int]] = []
    self.joined: list[tuple[int, int, int]] = []
    self.flight, self.first = len(inst.inflight), inst.number
    self.ending = [(max(after - inst.number, -self.flight), id)
                   for after, id in inst.ending]
    self.oldest, self.ended = self.first - self.flight, [
        after for after, _ in self.ending]
    self.rows = self.context = 0
    # What was followed: commands, of them those issued, those in `left`,
    # requests that ended; pages that are some row's, by now.
    self._issued = self._parted = self._settled = 0
    self._ids: list[int] = []
    self.look()

  def look(self) -> None:
    """Sees what the instance has, at what was followed."""
    inst, self.stirred = self._inst, False
    self._free = prefix_cache.num_free(inst.pool)
    if inst.host and inst.able.prefills:  # what is evicted is to be told
      self._free -= prefix_cache.num_idle(inst.pool)
    alone = (len(inst.batches) == 1 and not inst.pulls and inst.residents
             == inst.batches[0].size + len(inst.ending))
    self._most = inst.run_ahead if alone else 1

  def ends(self) -> list[tuple[int, int]]:
    """(command, id) of requests that end with one of the commands told, or
    with one that was in flight."""
    return self.ending + [(n, id) for n, _, id in self.left]

  def tell(self, ask: bool = False) -> int:
    """Tells another command: its steps, 0 where there is something to decide.
    ask: tells none, only whether there is one."""
    if self.stirred:
      self.look()
    number, turns = len(self.steps), self.turns
    place = number % len(turns)
    turn = turns[place]
    due, end, tick = turn.due, turn.end, turn.tick
    size = len(due)
    want = due[tick % size] - turn.full
    if end < 0 or want > self._free or number >= MOST:
      return 0
    steps, most = 1, self._most
    while steps < most and tick + steps < end and not due[
        (tick + steps) % size]:
      steps += 1
    if ask or not self._may_end and tick + steps >= end:
      return steps if self._may_end or tick + steps < end else 0
    turn.full = 0
    self._free -= want
    self.steps.append(steps)
    self.ticks.append(tick)
    self.wants.append(self.wants[number] + want)
    self.rows, self.context = turn.rows, turn.context
    turn.tick = tick + steps
    turn.context += steps * turn.rows
    while turn.end == turn.tick:
      self.left.append((number, place, turn.leave()))
      self.ended.append(number)
    return steps

  def join(self, run: Run, seq: LiveSeq) -> bool:
    """A request becomes a row, from the next command on; False: not in this
    quiet run. It was followed to the last command told."""
    inst, number = self._inst, len(self.steps)
    batch = min(inst.batches, key=batches.SIZE)
    place = 0
    while place < len(self.turns) and (
        inst.batches[self.turns[place].index] is not batch):
      place += 1
    if (place == len(self.turns) or not batch.size or seq.done < seq.prompt_len
        or seq.prompt_len + 1 >= seq.limit):
      return False
    turn = self.turns[place]
    turn.had(number - 1, batch.row_values())
    run.move(seq, 'decoding')
    start = seq.prompt_len - turn.tick
    row = batches.row_of(inst, seq, start)
    batch.add(row)
    turn.join(row, seq.limit - 1 - start)
    self.joined.append((number, place, seq.id))
    return True

  def follow(self, run: Run, count: int) -> None:
    """Comes to command `count`: see the function of that name. Rows do not
    have their pages yet, nor commands in flight changed."""
    inst, oldest, flight = self._inst, self.oldest, self.flight
    ended, left = self.ended, self.left
    commands, cause, inst.asleep = run.commands, run.cause, None
    run.commands = []
    while True:
      # A row leaves behind its command; its end is told with a completion.
      settles = (ended[self._settled] + flight
                 if self._settled < len(ended) else count)
      leaves = left[self._parted][0] if self._parted < len(left) else count
      if settles >= count and leaves >= count:
        break
      if settles <= leaves:
        self._issue(run, settles)
        run.cause, before = 'DecodeDone', len(inst.ending)
        run.settle(inst, oldest + settles)
        self._settled += before - len(inst.ending)
      else:
        self._issue(run, leaves + 1)
        run.cause = 'plan'
        self._part(run, *left[self._parted])
        self._parted += 1
    self._issue(run, count)
    run.commands, run.cause, inst.asleep = commands, cause, self

  def _issue(self, run: Run, count: int) -> None:
    """Takes the pages of commands up to `count`."""
    total = self.wants[count] - self.wants[self._issued]
    self._issued, self._inst.number = count, self.first + count
    if total:
      self._ids += residents.alloc(run, self._inst, total)

  def _part(self, run: Run, number: int, place: int, id: int) -> None:
    """A row leaves behind a command, with pages up to its limit."""
    inst, turn, seq = self._inst, self.turns[place], run.own(id)
    batch = inst.batches[turn.index]
    turn.had(number, batch.row_values())
    self._give(seq, page_pool.pages_for(seq.limit - 1, inst.page_size)
               - len(seq.pages))
    batches.part(run, inst, batch, id)

  def _give(self, seq: LiveSeq, count: int) -> None:
    if count > 0:
      seq.pages += tuple(self._ids[-count:])
      del self._ids[-count:]

  def close(self, run: Run, index: int) -> None:
    """Ends at what was followed: rows get their pages, and the commands in
    flight are others."""
    inst, count, size = self._inst, self._issued, self._inst.page_size
    turns, inflight = self.turns, inst.inflight
    inst.asleep = None
    if not count:
      return
    for place, turn in enumerate(turns[:count]):
      batch = inst.batches[turn.index]
      newest = place + (count - 1 - place) // len(turns) * len(turns)
      tick = self.ticks[newest]
      for row in list(batch.rows.values()):
        if row[2] <= tick:
          seq = run.own(row[0])
          self._give(seq, (tick - row[2]) // size + 1)
          batch.change(batches.row_of(inst, seq, row[1]))
      batch.tick = tick + self.steps[newest]
      batch.forget_due()
    for n in range(max(count - self.flight, 0), count):
      turn = turns[n % len(turns)]
      inflight.popleft()
      inflight.append((RunDecode(
          index, self.first + n, self.ticks[n], self.steps[n],
          turn.rows_of(n, inst.batches[turn.index].row_values())),
          turn.index))
    inst.value = None
    inst.turn = (inflight[-1][1] + 1) % len(inst.batches)


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
  told = Ahead(inst, [Turn(run, inst, g) for g in order], may_end)
  if not told.tell(ask=True):
    return None
  inst.asleep = told
  return told


def follow(run: Run, index: int, told: Ahead, count: int) -> None:
  """Ends a quiet run in which `count` of its commands have been issued.

  Does what the scheduler does at each of these completions, in the same
  order, but that pages may have other names; what it would answer is left out.
  """
  told.follow(run, count)
  told.close(run, index)
