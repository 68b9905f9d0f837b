"""The scheduler's state: as a value, as it changes in place, and its check.

The stages of a request are told in life.py.
"""

import collections
import dataclasses
import heapq
import operator
from typing import NamedTuple

from dsjax import base, life, pages

RUN_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Config:
  """Instances, the longest sequence, commands in flight, decode run-ahead.

  Attributes:
    max_len: most tokens of prompt and output together.
    depth: commands in flight of each micro-batch of an instance that decodes
      (an instance has as many micro-batches as pipeline stages).
    prefill_depth: commands in flight in the prefill role; 1, so that a
      finished prompt's pages can be read out before the next batch occupies
      the device. With more pipeline stages, as many as there are stages.
    run_ahead: most decode steps of one command while nothing waits; always 1
      under pipeline stages. None: RUN_AHEAD for decode instances, and 1 where
      prompts run too, as one that arrives would wait behind all of them.
    tries: faults (a hand-off that failed, an instance that died) that a
      request survives; the next one fails it.
  """

  instances: tuple[base.InstanceConfig, ...]
  max_len: int
  depth: int = 2
  prefill_depth: int = 1
  run_ahead: int | None = None
  tries: int = 3


class ImpossibleEvent(ValueError):
  """An event that no run of this state can see: an internal error."""


class Seq(NamedTuple):
  """A live request.

  prompt_len counts the tokens to prefill (after a preemption: the tokens
  emitted so far too); limit is prompt plus max_tokens. stage: one of
  life.STAGES. instance, target: -1 while it waits for one. tries: faults that
  it has been recovered from.
  """

  id: int
  order: int
  prompt_len: int
  limit: int
  stage: str
  instance: int
  pages: tuple[int, ...] = ()
  done: int = 0
  target: int = -1
  target_pages: tuple[int, ...] = ()
  epoch: int = 0
  tries: int = 0


class Batch(NamedTuple):
  """A decode micro-batch and the decode ticks issued for it."""

  rows: tuple[base.Row, ...] = ()
  tick: int = 0


class Instance(NamedTuple):
  """Queues and pool of one instance.

  queue: ids in stage queued, by arrival. prefilling: ids. pulls: ids in
  stage prefilled that this decode instance will pull. batches: a decode
  micro-batch a pipeline stage. turn: which of them goes next. number:
  commands issued. inflight: (command, its micro-batch or -1) not yet done.
  ending: (number, id): release when command `number` is done.
  residents: requests owning pages here. backlog: prompt tokens waiting.
  status: up, draining (takes no work that another could), down, or gone (down
  for good).
  """

  pool: pages.Pool
  batches: tuple[Batch, ...]
  queue: tuple[int, ...] = ()
  prefilling: tuple[int, ...] = ()
  pulls: tuple[int, ...] = ()
  turn: int = 0
  number: int = 0
  inflight: tuple[tuple, ...] = ()
  ending: tuple[tuple[int, int], ...] = ()
  residents: int = 0
  backlog: int = 0
  status: str = 'up'

  @property
  def rows(self):
    """The rows of every micro-batch."""
    return tuple(r for b in self.batches for r in b.rows)


class State(NamedTuple):
  """Everything the scheduler knows; a value (never change `seqs` in place).

  waiting: ids of those that need an instance while none of its kind is up.
  """

  seqs: dict[int, Seq]
  instances: tuple[Instance, ...]
  arrivals: int = 0
  waiting: tuple[int, ...] = ()


def init(config):
  """The state before the first event."""
  return State({}, tuple(Instance(pages.init(c.num_pages), (Batch(),) * c.pp)
                         for c in config.instances))


def idle(state):
  """No request lives and no command is in flight."""
  return not state.seqs and not any(i.inflight for i in state.instances)


def never_fits(config, prompt_len, max_tokens):
  """Why a request can never be served, in plain words, or None."""
  limit = prompt_len + max_tokens
  if prompt_len < 1 or max_tokens < 1:
    return (f'prompt of {prompt_len} tokens and max_tokens={max_tokens}: both '
            'must be 1 or more')
  if limit > config.max_len:
    return (f'prompt of {prompt_len} tokens and max_tokens={max_tokens} exceed '
            f'the context of {config.max_len} tokens')
  for index, c in enumerate(config.instances):
    need = pages.pages_for(limit - 1, c.page_size)
    if need > c.num_pages:
      return (f'prompt of {prompt_len} tokens and max_tokens={max_tokens} need '
              f'{need} pages; instance {index} ({c.role}) has {c.num_pages}')
  return None


def room(inst, config, tokens, reserve):
  """Pages for a new resident holding `tokens` tokens; 0 where it must wait.

  Args:
    inst: an Instance, or a live one. config: its InstanceConfig.
    tokens: 1 or more.
    reserve: leave a page for each resident, so that an admission does not
      at once preempt somebody (or itself, again and again).
  """
  need = pages.pages_for(tokens, config.page_size)
  spare = inst.residents if reserve else 0
  if (inst.residents >= config.max_seqs
      or pages.num_free(inst.pool) < need + spare):
    return 0
  return need


class LiveSeq:
  """A Seq that changes in place."""

  __slots__ = Seq._fields

  def __init__(self, id, order, prompt_len, limit, stage, instance, pages=(),
               done=0, target=-1, target_pages=(), epoch=0, tries=0):
    self.id, self.order, self.prompt_len = id, order, prompt_len
    self.limit, self.stage, self.instance = limit, stage, instance
    self.pages, self.done, self.target = pages, done, target
    self.target_pages, self.epoch, self.tries = target_pages, epoch, tries


fields_of = operator.attrgetter(*Seq._fields)


class LiveBatch:
  """A Batch that changes in place.

  rows: by id, in the order in which they joined. due: ids by their row's
  `until`, ticks: a heap of its keys, places: ids' in that order; made when
  needed. flying: commands of it in flight. ends: the tick at which each
  request is at its limit, of those that were asked for. value: the rows as a
  value.
  """

  __slots__ = ('rows', 'tick', 'flying', 'due', 'ticks', 'places', 'ends',
               'value')

  def __init__(self, batch, flying):
    self.rows, self.tick = {r[0]: r for r in batch.rows}, batch.tick
    self.flying, self.due, self.value = flying, None, batch.rows
    self.ends, self.places = {}, None

  def freeze(self):
    """The rows as a value."""
    if self.value is None:
      self.value = tuple(self.rows.values())
    return self.value

  def add(self, row):
    """Adds a row."""
    self.rows[row[0]], self.value, self.places = row, None, None
    if self.due is not None:
      self._note(row[0], row[2])

  def _note(self, id, until):
    if until in self.due:
      self.due[until].append(id)
    else:
      self.due[until] = [id]
      heapq.heappush(self.ticks, until)

  def remove(self, id):
    """Takes a row out."""
    row, self.value = self.rows.pop(id), None
    self.ends.pop(id, None)
    if self.due is not None:
      self.due[row[2]].remove(id)

  def end(self, seqs):
    """The first tick at which a request is at its limit."""
    ends = self.ends
    if len(ends) < len(self.rows):
      for id, row in self.rows.items():
        if id not in ends:
          ends[id] = seqs[id].limit - 1 - row[1]
    return min(ends.values())

  def until(self):
    """The first tick that some row is not covered for."""
    if self.due is None:
      due = self.due = {}
      for row in self.rows.values():
        if row[2] in due:
          due[row[2]].append(row[0])
        else:
          due[row[2]] = [row[0]]
      self.ticks = list(due)
      heapq.heapify(self.ticks)
    while not self.due[self.ticks[0]]:
      del self.due[heapq.heappop(self.ticks)]
    return self.ticks[0]

  def short(self):
    """Ids of the rows that are not covered for the next tick, in order."""
    if not self.rows or self.until() > self.tick:
      return ()
    ids = self.due[self.tick]
    if len(ids) == 1:
      return ids
    if self.places is None:
      self.places = {id: place for place, id in enumerate(self.rows)}
    return sorted(ids, key=self.places.__getitem__)

  def renew(self, seqs, page_size):
    """The short rows are to have a page more: their ids, in order."""
    ids, tick = self.short(), self.tick
    del self.due[heapq.heappop(self.ticks)]
    for id in ids:
      until, end = tick + page_size, seqs[id].limit - 1 - self.rows[id][1]
      self._note(id, until if until < end else end)
    return ids


class LiveInstance:
  """An Instance that changes in place.

  fresh: changed since it was planned last. asleep: in a quiet run. value:
  what it is as a value, or None where it has changed since.
  """

  __slots__ = (*Instance._fields, 'index', 'config', 'role', 'depth',
               'run_ahead', 'fresh', 'asleep', 'value')

  def __init__(self, config, index, value):
    self.index, self.config, self.value = index, config.instances[index], value
    self.role, self.fresh, self.asleep = self.config.role, False, False
    pp = self.config.pp
    self.depth = (max(config.prefill_depth, pp) if self.role == 'prefill'
                  else config.depth * pp)
    self.run_ahead = config.run_ahead or (
        RUN_AHEAD if self.role == 'decode' else 1)
    (self.pool, batches, queue, prefilling, pulls, self.turn, self.number,
     inflight, ending, self.residents, self.backlog, self.status) = value
    self.queue, self.prefilling = list(queue), list(prefilling)
    self.pulls, self.ending = list(pulls), list(ending)
    self.inflight = collections.deque(inflight)
    turns = [g for _, g in inflight]
    self.batches = [LiveBatch(b, turns.count(g))
                    for g, b in enumerate(batches)]

  def freeze(self):
    """It as a value."""
    if self.value is None:
      self.value = Instance(
          self.pool, tuple([Batch(b.freeze(), b.tick) for b in self.batches]),
          tuple(self.queue), tuple(self.prefilling), tuple(self.pulls),
          self.turn, self.number, tuple(self.inflight), tuple(self.ending),
          self.residents, self.backlog, self.status)
    return self.value


def check(state):
  """Raises AssertionError unless the state is sound.

  Every page is free or owned once; every request is in exactly one place,
  the one its stage names; micro-batches are disjoint; counts agree.
  """
  places = {}

  def at(id, stage, index):
    assert id not in places, f'request {id} in two places'
    places[id] = (stage, index)

  for index, inst in enumerate(state.instances):
    for id in inst.queue:
      at(id, 'queued', index)
    orders = [state.seqs[id].order for id in inst.queue]
    assert orders == sorted(orders), f'instance {index}: queue by arrival'
    for id in inst.prefilling:
      at(id, 'prefilling', index)
    for row in inst.rows:
      at(row.id, 'decoding', index)
      assert row.pages == state.seqs[row.id].pages, f'row {row.id}: pages'
    for _, id in inst.ending:
      assert state.seqs[id].stage in life.ENDING, f'request {id} is not ending'
      at(id, state.seqs[id].stage, index)
    for id in inst.pulls:
      at(id, 'prefilled', state.seqs[id].instance)
    owned = [s.pages for s in state.seqs.values() if s.instance == index]
    owned += [s.target_pages for s in state.seqs.values()
              if s.target == index]
    pages.check(inst.pool, owned)
    holders = sum(1 for p in owned if p)
    assert inst.residents == holders, f'instance {index}: residents'
    waiting = (state.seqs[i] for i in inst.queue + inst.prefilling)
    assert inst.backlog == sum(s.prompt_len - s.done for s in waiting), (
        f'instance {index}: backlog')
  for id in state.waiting:
    at(id, state.seqs[id].stage, state.seqs[id].instance)
  for seq in state.seqs.values():
    if seq.stage in ('migrating', 'abandoned'):
      at(seq.id, seq.stage, seq.instance)
    elif seq.stage == 'prefilling' and seq.done == seq.prompt_len:
      places.setdefault(seq.id, ('prefilling', seq.instance))
    assert places.get(seq.id) == (seq.stage, seq.instance), (
        f'request {seq.id} is {seq.stage} but at {places.get(seq.id)}')
