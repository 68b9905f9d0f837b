"""The scheduler's state as it changes in place; state.py has it as a value."""

import collections
import heapq
import operator
from collections.abc import Sequence
from typing import Any

from dsjax.config.placement import ROLES
from dsjax.scheduling import blocks
from dsjax.scheduling.events import Row
from dsjax.scheduling.state import (
  RUN_AHEAD,
  Batch,
  Config,
  Instance,
  Seq,
)


class LiveSeq:
  """A Seq that changes in place: the same fields in the same order."""

  __slots__ = Seq._fields

  def __init__(
      self, id: int, order: int, prompt_len: int, limit: int, stage: str,
      instance: int, pages: tuple[int, ...] = (), done: int = 0,
      target: int = -1, target_pages: tuple[int, ...] = (), epoch: int = 0,
      tries: int = 0, arrival_s: float = 0.0, input_len: int = 0,
      first_s: float | None = None, stop: int = 0,
      blocks: tuple[int, ...] = (), hit: int = 0, sent: int = 0,
      lender: int = -1):
    self.id, self.order, self.prompt_len = id, order, prompt_len
    self.limit, self.stage, self.instance = limit, stage, instance
    self.pages, self.done, self.target = pages, done, target
    self.target_pages, self.epoch, self.tries = target_pages, epoch, tries
    self.arrival_s, self.input_len, self.first_s = (
        arrival_s, input_len, first_s)
    self.stop, self.blocks, self.hit = stop, blocks, hit
    self.sent, self.lender = sent, lender


fields_of = operator.attrgetter(*Seq._fields)


class LiveBatch:
  """A Batch that changes in place.

  rows: by id, in the order in which they joined; made when needed, as a step
  may pass without. size: how many. due: ids by their row's `until`, ticks: a
  heap of its keys, places: ids' in that order; made when needed. least: the
  least `until`, while there is no due; None: not known. flying: commands of it
  in flight. ends: the tick at which each request is at its limit, of those that
  were asked for. value: the rows as a value, or None where they have changed.
  """

  __slots__ = ('size', 'tick', 'flying', 'due', 'ticks', 'places', 'least',
               'ends', 'value', '_rows')

  def __init__(self, batch: Batch, flying: int):
    self.tick, self.flying, self.size = batch.tick, flying, len(batch.rows)
    self._rows: dict[int, Row] | None = None
    self.ends: dict[int, int] = {}
    self.value: tuple[Row, ...] | None = batch.rows
    self.due: Any = None
    self.places: Any = None
    self.least: int | None = batch.least

  @property
  def rows(self) -> dict[int, Row]:
    """The rows by id, made when they are first asked for."""
    if self._rows is None:
      self._rows = {row[0]: row for row in self.value or ()}
    return self._rows

  def row_values(self) -> tuple[Row, ...]:
    """The rows as a value."""
    if self.value is None:
      self.value = tuple(self.rows.values())
    return self.value

  def freeze(self) -> Batch:
    """It as a value."""
    rows = self.row_values()
    return Batch(rows, self.tick, self.until() if rows else -1)

  def add(self, row: Row) -> None:
    """Adds a row."""
    if self.due is not None:
      self._note(row[0], row[2])
    elif self.least is not None and not 0 <= self.least <= row[2]:
      self.least = row[2]
    self.rows[row[0]] = row
    self.size += 1
    self.value = self.places = None

  def _note(self, id: int, until: int) -> None:
    if until in self.due:
      self.due[until].append(id)
    else:
      self.due[until] = [id]
      heapq.heappush(self.ticks, until)

  def remove(self, id: int) -> None:
    """Takes a row out."""
    row, self.value = self.rows.pop(id), None
    self.size -= 1
    self.ends.pop(id, None)
    if self.due is not None:
      self.due[row[2]].remove(id)
    elif self.least == row[2]:
      self.least = None

  def change(self, row: Row) -> None:
    """Puts a row in place of the one of the same request."""
    self.rows[row[0]] = row
    self.value = None

  def limits(self, seqs: dict[int, Any]) -> dict[int, int]:
    """The tick at which each request is at its limit."""
    ends = self.ends
    if len(ends) < len(self.rows):
      for id, row in self.rows.items():
        if id not in ends:
          ends[id] = seqs[id].limit - 1 - row[1]
    return ends

  def until(self) -> int:
    """The first tick that some row is not covered for."""
    if self.due is None:
      if self.least is None:
        self.least = min([row[2] for row in self.rows.values()], default=-1)
      return self.least
    while not self.due[self.ticks[0]]:
      del self.due[heapq.heappop(self.ticks)]
    return self.ticks[0]

  def forget_due(self) -> None:
    """Rows are to get pages otherwise than by `renew`."""
    self.due = self.least = None

  def sort(self) -> dict[int, list[int]]:
    """Makes due, which it returns, and ticks."""
    due: dict[int, list[int]] = {}
    self.due = due
    for row in self.rows.values():
      if row[2] in due:
        due[row[2]].append(row[0])
      else:
        due[row[2]] = [row[0]]
    self.ticks = list(due)
    heapq.heapify(self.ticks)
    return due

  def short(self) -> Sequence[int]:
    """Ids of the rows that are not covered for the next tick, in order."""
    if not self.size or self.until() > self.tick:
      return ()
    ids = (self.due or self.sort())[self.tick]
    if len(ids) == 1:
      return ids
    if self.places is None:
      self.places = {id: place for place, id in enumerate(self.rows)}
    return sorted(ids, key=self.places.__getitem__)

  def renew(self, seqs: dict[int, Any], page_size: int) -> Sequence[int]:
    """The short rows are to have a page more: their ids, in order."""
    ids, tick = self.short(), self.tick
    del self.due[heapq.heappop(self.ticks)]
    for id in ids:
      until, end = tick + page_size, seqs[id].limit - 1 - self.rows[id][1]
      self._note(id, until if until < end else end)
    return ids


class LiveInstance:
  """An Instance that changes in place.

  page_size: of its config. block_size: of the hashes of a prefix cache, or 0.
  latency, host_link: what predicts its steps, and loads, or None. able: what it
  may do; prefills, decodes, mixes: what its role of now does.
  fresh: changed since it was planned last. asleep: the lookahead.Ahead of its
  quiet run, or None. value:
  what it is as a value, or None where it has changed since.
  """

  __slots__ = (*Instance._fields, 'index', 'config', 'latency', 'able',
               'prefills', 'decodes', 'mixes', 'depth', 'page_size',
               'block_size', 'run_ahead', 'fresh', 'asleep', 'value',
               'host_link', '_depths', '_run_ahead')

  def __init__(self, config: Config, index: int, value: Instance):
    self.index, self.config = index, config.instances[index]
    self.value: Instance | None = value
    self.able, pp = ROLES[self.config.role], self.config.pp
    self.fresh = False
    self.asleep: Any = None
    self.page_size = self.config.page_size
    self.block_size = config.block_size if config.prefix_cache else 0
    self.latency = config.latencies[index] if config.latencies else None
    self.host_link = config.host_link
    self._depths = max(config.prefill_depth, pp), config.depth * pp
    self._run_ahead = config.run_ahead
    (self.pool, batches, queue, prefilling, pulls, self.turn, self.number,
     inflight, ending, self.residents, self.backlog, self.status,
     role, self.since_s, self.pace, streams, host, self.loading) = value
    self.host: Any = host  # a prefix_cache.Host, or None
    self.assign(role)
    self.queue: Sequence[int] = queue  # see own_queue
    self.prefilling = list(prefilling)
    self.pulls, self.ending = list(pulls), list(ending)
    self.streams = list(streams)
    self.inflight = collections.deque(inflight)
    turns = [g for _, g in inflight]
    self.batches = [LiveBatch(b, turns.count(g))
                    for g, b in enumerate(batches)]

  def assign(self, role: str) -> None:
    """Gives it a role."""
    self.role, does = role, ROLES[role]
    self.prefills, self.decodes = does.prefills, does.decodes
    self.mixes = does.mixes
    self.depth = self._depths[does.decodes]
    self.run_ahead = self._run_ahead or (1 if does.prefills else RUN_AHEAD)

  def own_queue(self) -> list[int]:
    """Its queue, to be changed: until then it is the value's, not copied."""
    if not isinstance(self.queue, list):
      self.queue = list(self.queue)
    return self.queue

  def hashes(self, seq: Any) -> Sequence[int]:
    """Of a request's full pages here, those that are known."""
    if not (self.block_size and seq.blocks):
      return ()
    return blocks.of_pages(seq.blocks, self.page_size, self.block_size)

  def home(self, id: int) -> LiveBatch:
    """The micro-batch of a decoding request."""
    return next(batch for batch in self.batches if id in batch.rows)

  def freeze(self) -> Instance:
    """It as a value."""
    if self.value is None:
      self.value = Instance(
          self.pool, tuple([b.freeze() for b in self.batches]),
          tuple(self.queue), tuple(self.prefilling), tuple(self.pulls),
          self.turn, self.number, tuple(self.inflight), tuple(self.ending),
          self.residents, self.backlog, self.status, self.role,
          self.since_s, self.pace, tuple(self.streams), self.host,
          self.loading)
    return self.value
