"""One scheduler, a pure transition: step(config, state, event).

The orchestrator feeds it real events and performs its commands; a simulator
feeds it virtual ones and performs nothing. It reads no clock, holds no
global, and its commands carry every page id, so a run replays from its
event log.

A request's life, by stage:

  queued      in an instance's prefill queue; owns no pages
  prefilling  owns pages for its whole prompt; some chunks may have run
  prefilled   its first token is out, its KV waits at the prefill instance
              until a decode instance pulls it (the prefill pool is the
              queue's buffer: DistServe section 4.3, burstiness)
  migrating   owns pages on both sides until the target has every byte
  decoding    a Row of an instance's batch
  ending      its outcome is known; its pages wait until the commands that
              were in flight when it ended are done

Up to `depth` commands are in flight on an instance, so that the device never
waits for Python. The scheduler plans ahead as if no stream ended early; a
stream that meets EOS is dropped from the batch one command late, and the
extra tokens are ignored.

An instance of `pp` pipeline stages decodes as many disjoint micro-batches in
turn, `depth` commands of each in flight, so that every stage has work. Each
stage runs the commands in order, so they complete in order; a micro-batch's
next step waits on the device for the tokens of its previous one.
"""

import bisect
import collections
import dataclasses
import heapq
from typing import NamedTuple

from dsjax import base, pages


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
      under pipeline stages.
  """

  instances: tuple[base.InstanceConfig, ...]
  max_len: int
  depth: int = 2
  prefill_depth: int = 1
  run_ahead: int = 4


class Seq(NamedTuple):
  """A live request.

  prompt_len counts the tokens to prefill (after a preemption: the tokens
  emitted so far too); limit is prompt plus max_tokens. fate says why an
  'ending' request ends: stop, length, cancelled or preempt.
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
  fate: str = ''


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

  @property
  def rows(self):
    """The rows of every micro-batch."""
    return tuple(r for b in self.batches for r in b.rows)


class State(NamedTuple):
  """Everything the scheduler knows; a value (never change `seqs` in place)."""

  seqs: dict[int, Seq]
  instances: tuple[Instance, ...]
  arrivals: int = 0


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


def step(config, state, event):
  """Applies one event.

  Returns (state, commands). Cost: well under 100 us at 256 running and 1,000
  waiting requests; a decode step touches only the rows that end or need a
  page.

  Raises:
    ValueError: the event cannot happen in this state (an internal error).
      A stale Migrated or a Cancelled for a request that is gone is ignored.
  """
  draft = _Draft(config, state)
  _HANDLERS[type(event)](draft, event)
  if not (isinstance(event, base.Arrived) and event.more):
    draft.plan()
  return draft.freeze(), tuple(draft.commands)


class Quiet:
  """A decode run of one instance in which nothing is decided.

  Stands for a series of DecodeDone events each of which `step` would answer
  with one RunDecode of the same micro-batch, its rows the same, some of them
  with a page more. It is not a rule of its own: the tests hold it against
  step, command by command.

  Attributes:
    queue: prompts that wait. number: of the next command. commands: how many
      it has issued so far. batch: the micro-batch of the newest (rows, the
      sum of their `base`, the tick after it).
  """

  def __init__(self, config, state, index, order):
    inst = state.instances[index]
    self.queue, self.number, self.commands = inst.queue, inst.number, 0
    self._index, self._seqs = index, state.seqs
    self._size = config.instances[index].page_size
    self._most = 1
    if (len(inst.batches) == 1 and not inst.queue and not inst.pulls
        and inst.residents == len(inst.batches[0].rows)):
      self._most = config.run_ahead
    self._free = pages.num_free(inst.pool)
    self._granted = []  # (batch, place) in the order they get a page
    self._turns = collections.deque(_Ticks(g, *inst.batches[g])
                                    for g in order)
    self._inflight = collections.deque(
        [(c.tick, c.steps, g) for c, g in inst.inflight], len(inst.inflight))

  def issue(self):
    """Issues the command that answers the next completion.

    Returns its number of steps; 0, and nothing is issued, where `step` must
    decide: a row would end or pages are short.
    """
    batch = self.batch = self._turns[0]
    tick, due = batch.tick, batch.ticks[0]
    if due <= tick:
      if not self._cover(batch, due):
        return 0
      due = batch.ticks[0]
    steps = due - tick
    if steps > self._most:
      steps = self._most
    else:
      for place in batch.until[due]:
        row = batch.rows[place]
        if row[1] + due >= self._seqs[row[0]].limit - 1:
          return 0
    self._inflight.append((tick, steps, batch.g))
    batch.tick = tick + steps
    self.number += 1
    self.commands += 1
    self._turns.rotate(-1)
    return steps

  def _cover(self, batch, due):
    """Gives the rows that are short at this tick a page each, if all can."""
    places = sorted(batch.until[due])
    if len(places) > self._free:
      return False
    self._free -= len(places)
    del batch.until[due]
    heapq.heappop(batch.ticks)
    for place in places:
      self._granted.append((batch, place))
      row = batch.rows[place]
      until = min(due + self._size, self._seqs[row[0]].limit - 1 - row[1])
      if until in batch.until:
        batch.until[until].append(place)
      else:
        batch.until[until] = [place]
        heapq.heappush(batch.ticks, until)
    return True

  def close(self, state):
    """The state after the commands issued so far.

    The commands in flight carry the rows as they are now (step reads their
    kind and number). state: of any later moment, the instance's pool, rows
    and commands in flight untouched since.
    """
    index, inst = self._index, state.instances[self._index]
    seqs, pool, batches = state.seqs, inst.pool, list(inst.batches)
    rows = {batch.g: list(batch.rows) for batch in self._turns}
    if self._granted:
      pool, ids = pages.alloc(pool, len(self._granted))
      gained, seqs = {}, dict(seqs)
      for key, page in zip(self._granted, ids, strict=True):
        gained.setdefault(key, []).append(page)
      for (batch, place), more in gained.items():
        row = batch.rows[place]
        seq = seqs[row.id] = seqs[row.id]._replace(
            pages=row.pages + tuple(more))
        rows[batch.g][place] = base.Row(
            row.id, row.base, _until(seq, row.base, self._size), seq.pages)
    for batch in self._turns:
      batches[batch.g] = Batch(tuple(rows[batch.g]), batch.tick)
    first = self.number - len(self._inflight)
    inflight = tuple([
        (base.RunDecode(index, first + n, tick, steps, batches[g].rows), g)
        for n, (tick, steps, g) in enumerate(self._inflight)])
    turn = (inflight[-1][1] + 1) % len(batches)
    inst = inst._replace(pool=pool, batches=tuple(batches), turn=turn,
                         number=self.number, inflight=inflight)
    return State(seqs, (*state.instances[:index], inst,
                        *state.instances[index + 1:]), state.arrivals)


class _Ticks:
  """A micro-batch of a Quiet: rows by place, `until` by tick, ticks' heap."""

  __slots__ = ('g', 'rows', 'tick', 'bases', 'until', 'ticks')

  def __init__(self, g, rows, tick):
    self.g, self.rows, self.tick, self.until = g, rows, tick, {}
    self.bases = sum([r[1] for r in rows])
    due = self.until
    for place, row in enumerate(rows):
      if row[2] in due:
        due[row[2]].append(place)
      else:
        due[row[2]] = [place]
    self.ticks = list(due)
    heapq.heapify(self.ticks)


def quiet(config, state, index):
  """A Quiet run of an instance, or None where its next completion may decide.

  What waits to be admitted here must have been refused since pages were last
  released (always so for a decode instance); in a run, pages only get fewer.
  """
  inst = state.instances[index]
  count = len(inst.batches)
  order = [g % count for g in range(inst.turn, inst.turn + count)
           if inst.batches[g % count].rows]
  if (inst.ending or inst.prefilling or not order
      # With room for a command, a prompt might go at any event.
      or len(order) < count and config.instances[index].role != 'decode'
      or [g for _, g in inst.inflight] != order * config.depth
      or not all(type(c) is base.RunDecode for c, _ in inst.inflight)):
    return None
  return Quiet(config, state, index, order)


class _Work:
  """An Instance that changes in place, private to one draft (a namedtuple's
  _replace costs ten times as much)."""

  def __init__(self, inst):
    self.__dict__.update(zip(Instance._fields, inst, strict=True))

  rows = Instance.rows


class _Draft:
  """A working copy of the state, private to one call of step."""

  def __init__(self, config, state):
    self.config = config
    self.seqs = dict(state.seqs)
    self.instances = list(state.instances)
    self.arrivals = state.arrivals
    self.commands = []

  def freeze(self):
    return State(self.seqs, tuple([
        Instance(**i.__dict__) if type(i) is _Work else i
        for i in self.instances]), self.arrivals)

  def put(self, index, **changes):
    inst = self.instances[index]
    if type(inst) is not _Work:
      inst = self.instances[index] = _Work(inst)
    inst.__dict__.update(changes)

  def put_batch(self, index, g, rows=None, tick=None):
    batches = self.instances[index].batches
    batch = Batch(batches[g].rows if rows is None else rows,
                  batches[g].tick if tick is None else tick)
    self.put(index, batches=(*batches[:g], batch, *batches[g + 1:]))

  def change(self, id, **changes):
    self.seqs[id] = self.seqs[id]._replace(**changes)

  # --- events ---------------------------------------------------------------

  def arrived(self, e):
    if e.id in self.seqs:
      raise ValueError(f'request {e.id} arrived twice')
    reason = never_fits(self.config, e.prompt_len, e.max_tokens)
    if reason:
      self.commands.append(base.Reject(e.id, reason))
      return
    self.seqs[e.id] = Seq(e.id, self.arrivals, e.prompt_len,
                          e.prompt_len + e.max_tokens, 'queued', -1)
    self.arrivals += 1
    self.enqueue(e.id)

  def cancelled(self, e):
    seq = self.seqs.get(e.id)
    if seq is None or seq.fate in ('stop', 'cancelled'):
      return
    self.commands.append(base.Finish(e.id, 'cancelled'))
    self.leave(seq, 'cancelled')

  def prefill_done(self, e):
    command = self.complete(e, base.RunPrefill)
    role = self.config.instances[e.instance].role
    for chunk in command.chunks:
      seq = self.seqs[chunk.id]
      if role == 'prefill' and chunk.last and not seq.fate:
        if chunk.id in e.ended or seq.prompt_len + 1 >= seq.limit:
          self.finish(seq, 'stop' if chunk.id in e.ended else 'length')
        else:
          self.offer(seq)
    if role != 'prefill':
      for id in e.ended:
        self.ended(id)
    self.settle(e.instance, e.number)

  def decode_done(self, e):
    self.complete(e, base.RunDecode)
    for id, _ in e.ended:
      self.ended(id)
    self.settle(e.instance, e.number)

  def migrated(self, e):
    seq = self.seqs.get(e.id)
    if seq is None or seq.epoch != e.epoch or not seq.target_pages:
      return  # a late completion of a hand-off that is over
    source, target = seq.instance, seq.target
    self.free(source, seq.pages)
    seq = seq._replace(instance=target, pages=seq.target_pages, target=-1,
                       target_pages=())
    self.seqs[e.id] = seq
    if seq.fate:
      self.drop(seq)
    else:
      self.join(seq)

  # --- the ends of a life ---------------------------------------------------

  def complete(self, e, kind):
    """Takes the oldest command off the instance; it must be this one."""
    inflight = self.instances[e.instance].inflight
    command = inflight[0][0] if inflight else None
    if not isinstance(command, kind) or command.number != e.number:
      raise ValueError(f'{type(e).__name__} {e.number} of instance '
                       f'{e.instance}, which awaits {command or "nothing"}')
    self.put(e.instance, inflight=inflight[1:])
    return command

  def ended(self, id):
    """A token of a row met EOS or a stop condition."""
    seq = self.seqs.get(id)
    if seq is not None and seq.fate in ('', 'length', 'preempt'):
      self.finish(seq, 'stop')

  def finish(self, seq, reason):
    self.commands.append(base.Finish(seq.id, reason))
    self.leave(seq, 'stop')

  def leave(self, seq, fate):
    """Takes a request out of whatever it is in, keeping unsafe pages."""
    index, inst = seq.instance, self.instances[seq.instance]
    first_time = not seq.fate
    self.change(seq.id, fate=fate)
    if seq.stage in ('queued', 'prefilling'):
      self.backlog(index, seq.done - seq.prompt_len)
      inst = self.instances[index]
    if seq.stage == 'migrating':
      return  # both sides' pages are released when the copy has ended
    if seq.stage == 'queued':
      self.put(index, queue=_without(inst.queue, seq.id))
      del self.seqs[seq.id]
      return
    if seq.stage == 'prefilled':
      pulls = self.instances[seq.target].pulls
      self.put(seq.target, pulls=_without(pulls, seq.id))
      self.drop(self.seqs[seq.id])
      return
    if not first_time:
      return  # in `ending` already; only the fate has changed
    if seq.stage == 'decoding':
      g, _ = _find(inst, seq.id)
      self.put_batch(index, g, rows=tuple(
          r for r in inst.batches[g].rows if r.id != seq.id))
    else:
      self.put(index, prefilling=_without(inst.prefilling, seq.id))
    self.change(seq.id, stage='ending')
    self.linger(seq.id, index)

  def linger(self, id, index):
    """Releases a request's pages once all that is in flight is done."""
    inst = self.instances[index]
    if inst.inflight:
      self.put(index, ending=inst.ending + ((inst.number - 1, id),))
    else:
      self.conclude(id)

  def settle(self, index, number):
    """Concludes what waited for command `number`."""
    ending = self.instances[index].ending
    if ending and ending[0][0] <= number:
      self.put(index, ending=tuple(e for e in ending if e[0] > number))
      for after, id in ending:
        if after <= number:
          self.conclude(id)

  def conclude(self, id):
    seq = self.seqs[id]
    if seq.fate == 'length':
      self.commands.append(base.Finish(id, 'length'))
    if seq.fate != 'preempt':
      self.drop(seq)
      return
    self.commands.append(base.Preempt(id, seq.instance))
    self.free(seq.instance, seq.pages)
    self.change(id, stage='queued', fate='', pages=(), done=0)
    self.enqueue(id)

  def drop(self, seq):
    self.free(seq.instance, seq.pages)
    del self.seqs[seq.id]

  # --- resources ------------------------------------------------------------

  def free(self, index, ids):
    inst = self.instances[index]
    self.put(index, pool=pages.release(inst.pool, ids),
             residents=inst.residents - 1)

  def take(self, index, tokens, reserve):
    """Pages for a new resident holding `tokens` tokens, or None.

    reserve: leave a page for each resident, so that an admission does not
    at once preempt somebody (or itself, again and again).
    """
    inst, c = self.instances[index], self.config.instances[index]
    need = pages.pages_for(tokens, c.page_size)
    spare = inst.residents if reserve else 0
    if (inst.residents >= c.max_seqs
        or pages.num_free(inst.pool) < need + spare):
      return None
    pool, ids = pages.alloc(inst.pool, need)
    self.put(index, pool=pool, residents=inst.residents + 1)
    return ids

  def backlog(self, index, tokens):
    self.put(index, backlog=self.instances[index].backlog + tokens)

  def enqueue(self, id):
    """Dispatch: the shortest prefill queue, in tokens (DistServe 4.3)."""
    seqs = self.seqs
    index = min((i for i, c in enumerate(self.config.instances)
                 if c.role != 'decode'),
                key=lambda i: (self.instances[i].backlog,
                               self.instances[i].residents))
    self.backlog(index, seqs[id].prompt_len)
    queue = self.instances[index].queue
    at = bisect.bisect(queue, seqs[id].order, key=lambda i: seqs[i].order)
    self.put(index, queue=queue[:at] + (id,) + queue[at:])
    self.change(id, instance=index)

  def offer(self, seq):
    """Prefill is done: the least loaded decode instance will pull."""
    able = [i for i, c in enumerate(self.config.instances)
            if c.role == 'decode']
    target = min(able, key=lambda i: self.instances[i].residents
                 + len(self.instances[i].pulls))
    self.change(seq.id, stage='prefilled', target=target)
    self.put(target, pulls=self.instances[target].pulls + (seq.id,))

  def pull(self, index):
    """Admits finished prefills, first come first served, while they fit."""
    while self.instances[index].pulls:
      seq = self.seqs[self.instances[index].pulls[0]]
      ids = self.take(index, min(seq.prompt_len + 1, seq.limit - 1), True)
      if ids is None:
        return
      self.put(index, pulls=self.instances[index].pulls[1:])
      self.change(seq.id, stage='migrating', target_pages=ids,
                  epoch=seq.epoch + 1)
      count = pages.pages_for(seq.prompt_len,
                              self.config.instances[index].page_size)
      self.commands.append(base.Migrate(
          seq.id, seq.epoch + 1, seq.instance, seq.pages, index, ids[:count],
          seq.prompt_len))

  # --- batches --------------------------------------------------------------

  def plan(self):
    """Pulls and issues until nothing more can start."""
    before = -1
    while before < len(self.commands):  # one decision may allow another
      before = len(self.commands)
      roles = [c.role for c in self.config.instances]
      for index, role in enumerate(roles):
        if role == 'decode':
          self.pull(index)
      for index, role in enumerate(roles):
        self.issue(index, role)

  def issue(self, index, role):
    pp = self.config.instances[index].pp
    depth = (max(self.config.prefill_depth, pp) if role == 'prefill'
             else self.config.depth * pp)
    while len(self.instances[index].inflight) < depth:
      if not (role != 'decode' and self.prefill(index)
              or role != 'prefill' and self.decode(index)):
        return

  def send(self, index, command, g):
    """Issues a command, of micro-batch g or of none (-1)."""
    inst = self.instances[index]
    self.put(index, number=inst.number + 1,
             inflight=inst.inflight + ((command, g),))
    self.commands.append(command)

  def ready(self, index, g):
    """Micro-batch g may have another command, and pages for its tick."""
    inflight = self.instances[index].inflight
    return (sum(of == g for _, of in inflight) < self.config.depth
            and self.cover(index, g))

  def prefill(self, index):
    """Issues the next prefill batch; False when none can be.

    Prefill and colocated roles: whole prompts while the batch stays within
    prefill_tokens (L_m), a longer one alone and in pieces. Chunked role: one
    tick of every row of the micro-batch whose turn it is (it may have none),
    the rest of the budget filled with prompt pieces.
    """
    c, g = self.config.instances[index], self.instances[index].turn
    chunked = c.role == 'chunked'
    if not (self.instances[index].queue or self.instances[index].prefilling):
      return False
    if chunked and not self.ready(index, g):
      return False
    batch = self.instances[index].batches[g]
    rows = batch.rows if chunked else ()
    budget = c.prefill_tokens - len(rows)
    chunks, last = [], []
    while len(chunks) < c.prefill_seqs and budget > 0:
      seq = self.candidate(index, budget, bool(chunks) and not chunked)
      if seq is None:
        break
      stop = min(seq.prompt_len, seq.done + budget)
      chunks.append(base.Chunk(seq.id, seq.done, stop, seq.pages,
                               stop == seq.prompt_len))
      self.change(seq.id, done=stop)
      self.backlog(index, seq.done - stop)
      budget -= stop - seq.done
      if stop == seq.prompt_len:
        last.append(seq.id)
    if not chunks:
      return False
    number = self.instances[index].number
    self.send(index, base.RunPrefill(index, number, tuple(chunks), batch.tick,
                                     rows), g if chunked else -1)
    if chunked:
      self.advance(index, g, 1 if rows else 0)
    for id in last:
      self.put(index, prefilling=_without(self.instances[index].prefilling,
                                          id))
      if c.role != 'prefill':
        self.join(self.seqs[id], number)
    return True

  def candidate(self, index, budget, whole):
    """The next request of a prefill batch, admitted, or None."""
    inst, c = self.instances[index], self.config.instances[index]
    begun = [i for i in inst.prefilling
             if self.seqs[i].done < self.seqs[i].prompt_len]
    if begun:
      seq = self.seqs[begun[0]]
    elif inst.queue:
      seq = self.seqs[inst.queue[0]]
    else:
      return None
    if whole and seq.prompt_len - seq.done > budget:
      return None
    if seq.stage == 'queued':
      room = seq.prompt_len + (c.role != 'prefill')  # for its first tick
      ids = self.take(index, min(room, seq.limit - 1), c.role != 'prefill')
      if ids is None:
        return None
      inst = self.instances[index]
      self.put(index, queue=inst.queue[1:],
               prefilling=inst.prefilling + (seq.id,))
      seq = seq._replace(stage='prefilling', pages=ids)
      self.seqs[seq.id] = seq
    return seq

  def join(self, seq, number=None):
    """Adds a prefilled request to its instance's decode batch.

    number: the prefill command in flight whose token it starts from.
    """
    index = seq.instance
    inst, c = self.instances[index], self.config.instances[index]
    if seq.prompt_len + 1 >= seq.limit:
      self.change(seq.id, stage='ending', fate='length')
      self.put(index, ending=inst.ending + ((number, seq.id),))
      return
    self.change(seq.id, stage='decoding')
    g = min(range(c.pp), key=lambda g: len(inst.batches[g].rows))
    batch = inst.batches[g]
    start = seq.prompt_len - batch.tick
    row = base.Row(seq.id, start, _until(seq, start, c.page_size), seq.pages)
    self.put_batch(index, g, rows=batch.rows + (row,))

  def decode(self, index):
    """Issues the next decode command; False when none can be.

    Micro-batches take strict turns, the empty ones left out. One that may not
    go yet is waited for: were it passed by, two commands of another would
    follow each other and the stages would idle between them, for ever.
    """
    pp = self.config.instances[index].pp
    while True:
      inst = self.instances[index]
      g = next((g % pp for g in range(inst.turn, inst.turn + pp)
                if inst.batches[g % pp].rows), None)
      if g is None or not self.ready(index, g):
        return False
      inst = self.instances[index]
      batch = inst.batches[g]
      if batch.rows:  # covering it may have preempted all of it
        break
    # A step waits for the one before to leave the last stage, and stages take
    # work in order: micro-batches whose commands had several steps would run
    # one after another, not side by side.
    steps = 1
    if (pp == 1 and not inst.queue and not inst.pulls
        and inst.residents == len(batch.rows) + len(inst.ending)):
      steps = min(min([r.until for r in batch.rows]) - batch.tick,
                  self.config.run_ahead)
    self.send(index, base.RunDecode(index, inst.number, batch.tick, steps,
                                    batch.rows), g)
    self.advance(index, g, steps)
    return True

  def advance(self, index, g, steps):
    """Ends a turn: ticks pass; rows that reached their limit leave."""
    inst = self.instances[index]
    rows, tick = inst.batches[g]
    tick += steps
    due = [r for r in rows if r.until <= tick]
    gone = [r.id for r in due if r.base + tick >= self.seqs[r.id].limit - 1]
    ending = inst.ending
    if gone:
      rows = tuple(r for r in rows if r.id not in gone)
      ending += tuple((inst.number - 1, id) for id in gone)
      for id in gone:
        self.change(id, stage='ending', fate='length')
    self.put(index, ending=ending, turn=(g + 1) % len(inst.batches))
    self.put_batch(index, g, rows=rows, tick=tick)

  def cover(self, index, g):
    """Gives micro-batch g's rows a page for their next tick.

    Preempts if it must, of any micro-batch. Returns False while pages of a
    preempted request are still in use by a command in flight.
    """
    c = self.config.instances[index]

    def due():
      batch = self.instances[index].batches[g]
      return [r for r in batch.rows if r.until <= batch.tick]

    short = due()
    if not short:
      return True
    while short and pages.num_free(self.instances[index].pool) < len(short):
      if self.instances[index].ending:
        return False
      self.preempt(index)
      short = due()
    inst = self.instances[index]
    pool, ids = pages.alloc(inst.pool, len(short))
    fresh = {}
    for row, page in zip(short, ids, strict=True):
      seq = self.seqs[row.id]
      seq = self.seqs[row.id] = seq._replace(pages=seq.pages + (page,))
      fresh[row.id] = row._replace(
          pages=seq.pages, until=_until(seq, row.base, c.page_size))
    self.put(index, pool=pool)
    self.put_batch(index, g, rows=tuple(fresh.get(r.id, r)
                                        for r in inst.batches[g].rows))
    return True

  def preempt(self, index):
    """Sends the latest arrival back to be recomputed.

    A request on its way in is no victim: a copy is landing on its pages. This
    cannot deadlock. Whoever is short of a page is a row, so there is a victim,
    if need be the row itself; a copy ends whatever the pool holds; and `take`
    admits, for want of another resident, whatever never_fits let in. Nor does
    it go on for ever: a row has emitted a token since its prefill began, so
    each of its preemptions leaves it fewer to emit; a request preempted in its
    prefill gave way to a row that then emits one.
    """
    inst = self.instances[index]
    victims = ([r.id for r in inst.rows] + list(inst.prefilling))
    seq = self.seqs[max(victims, key=lambda i: self.seqs[i].order)]
    if seq.stage == 'decoding':
      g, row = _find(inst, seq.id)
      self.change(seq.id, prompt_len=row.base + inst.batches[g].tick + 1)
    self.leave(self.seqs[seq.id], 'preempt')


_HANDLERS = {
    base.Arrived: _Draft.arrived,
    base.Cancelled: _Draft.cancelled,
    base.PrefillDone: _Draft.prefill_done,
    base.DecodeDone: _Draft.decode_done,
    base.Migrated: _Draft.migrated,
}


def _without(ids, id):
  return tuple(i for i in ids if i != id)


def _find(inst, id):
  """(micro-batch, Row) of a decoding request."""
  return next((g, r) for g, b in enumerate(inst.batches) for r in b.rows
              if r.id == id)


def _until(seq, start, page_size):
  """First tick that the row's pages or its limit do not cover."""
  return min(len(seq.pages) * page_size, seq.limit - 1) - start


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
    for id in inst.prefilling:
      at(id, 'prefilling', index)
    for row in inst.rows:
      at(row.id, 'decoding', index)
      assert row.pages == state.seqs[row.id].pages, f'row {row.id}: pages'
    for _, id in inst.ending:
      at(id, 'ending', index)
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
  for seq in state.seqs.values():
    if seq.stage == 'migrating':
      at(seq.id, 'migrating', seq.instance)
    elif seq.stage == 'prefilling' and seq.done == seq.prompt_len:
      places.setdefault(seq.id, ('prefilling', seq.instance))
    assert places.get(seq.id) == (seq.stage, seq.instance), (
        f'request {seq.id} is {seq.stage} but at {places.get(seq.id)}')
