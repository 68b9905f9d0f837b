"""Worlds in which everything may go wrong: one scheduler, virtual instances.

A World is a value: the scheduler's state, what lies on every page, what each
client was told. Rules says what may happen next in it (a command is done, a
copy arrives, an instance dies), and Rules.apply lets it happen and doubts
every answer of the scheduler. Nothing here chooses a move: schedules.py does.

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

from collections.abc import Iterable
from typing import Any, NamedTuple

from dsjax.scheduling import page_pool, prefix_cache, scheduler
from dsjax.scheduling.events import (
  Abort,
  Arrived,
  Cancelled,
  Chunk,
  DecodeDone,
  Drain,
  Fail,
  Finish,
  InstanceDown,
  InstanceUp,
  Load,
  Loaded,
  LoadFailed,
  Migrate,
  Migrated,
  MigrateFailed,
  Offload,
  Offloaded,
  PrefillDone,
  Reject,
  RunDecode,
  RunPrefill,
  Tick,
  Timer,
)
from dsjax.scheduling.policy import DISTSERVE


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


NO_CLOCK = _NoClock()
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
  Rules.key.
  """

  state: object
  kv: tuple
  fates: tuple
  out: tuple
  copies: tuple
  faults: int
  marks: tuple
  host: dict[tuple[int, int], tuple] = {}
  offloads: tuple = ()
  loads: tuple = ()


class _Traced(scheduler.Run):
  """Notes every hop."""

  def move(self, seq, stage):
    hop = seq.stage, self.cause, stage
    super().move(seq, stage)
    self.hops.add(hop)


class Rules:
  """What may happen to some requests on some instances, and what must hold.

  Args:
    config: a scheduler.Config.
    requests: (prompt_len, max_tokens, tokens until EOS or 0) of each, and
      how many tokens, prompt and output, it begins with as others do.

  Attributes:
    time_s: of the next events. Only DistServe's own choices may not look at
      it; for other policies it stands still where worlds are explored to the
      end, and counts moves on a random walk.
    hops: every (stage, cause, stage) that was taken. probed: every (stage,
      kind of event) that was tried where it is stale or impossible. probes:
      how many.
  """

  def __init__(self, config: scheduler.Config,
               requests: Iterable[Iterable[int]]) -> None:
    self.config = config
    self.requests = tuple((*request, 0)[:4] for request in requests)
    self.hops, self.probed, self.probes = set(), set(), 0
    self.time_s = NO_CLOCK if config.policy is DISTSERVE else 0.0

  def first(self, faults: int) -> World:
    """The world before anything happens."""
    start = scheduler.init(self.config)
    return World(start, tuple((None,) * c.num_pages
                              for c in self.config.instances),
                 (None,) * len(self.requests), (0,) * len(self.requests), (),
                 faults, tuple(map(_mark, start.instances)))

  def page_of(self, id: int, block: int, size: int) -> tuple[int, int]:
    """(request, block) of what a request has on a page of `size` tokens."""
    alike = (block + 1) * size <= self.requests[id][3]
    return (ALIKE if alike else id), block

  def blocks(self, id: int, start: int, stop: int) -> tuple[int, ...]:
    """Hashes of the full blocks of tokens [start, stop) of a request."""
    if not self.config.prefix_cache:
      return ()
    size = self.config.block_size
    return tuple([_hash(*self.page_of(id, block, size))
                  for block in range(start // size, stop // size)])

  def moves(self, w: World) -> list[tuple[Move, int]]:
    """(move, faults that it costs) of everything that may happen next."""
    found, faults = [], w.faults
    if None in w.fates:
      id = w.fates.index(None)
      found.append((('arrive', id), 0))
      if id + 1 < len(w.fates):
        found.append((('burst', id, id + 1), 0))
    for i, inst in enumerate(w.state.instances):
      if inst.inflight:
        found.append((('run', i), 0))
      if inst.status == 'down':
        found.append((('up', i), 0))
        if faults:
          found.append((('gone', i), 1))
      elif faults and inst.status == 'gone':
        found.append((('up', i), 1))
      elif faults:
        steps = inst.inflight[0][0].steps if inst.inflight else 1
        found += [(('crash', i, n), 1) for n in range(steps)]
        found.append((('gone', i), 1))
        found.append((('drain' if inst.status == 'up' else 'up', i), 1))
    for c, lost, number in w.copies:
      which = (c.id, c.hit) if c.more else (c.id,)
      if lost:
        found.append((('lease', *which), 0))
        continue
      read = not _behind(w, c, number)
      last = c.more or all([p.id != c.id or p is c for p, *_ in w.copies])
      if read and last:
        found.append((('copied', *which), 0))
      if faults:
        kinds = ('failed', 'damaged', 'lease', 'lose')[:4 if read else 1]
        found += [((kind, *which), 1) for kind in kinds]
    for c, _ in w.offloads:
      found.append((('offloaded', c.instance, c.number), 0))
      if faults:
        found.append((('offload_failed', c.instance, c.number), 1))
    for c in w.loads:
      found.append((('loaded', c.id), 0))
      if faults:
        found += [((kind, c.id), 1) for kind in ('load_failed', 'bad_load')]
    if faults:
      found += [(('cancel', id), 1) for id, f in enumerate(w.fates) if f == '']
      if self.config.policy.tick_s is not None:
        found.append((('tick',), 1))
    return found

  def apply(self, w: World, move: Move, cost: int) -> tuple[World, Log]:
    """(the world after a move, [(event, commands)] of it). Raises Violation.

    Any exception has this log, as far as it got, as its `log`.
    """
    kind, *rest = move
    made = _Move(self, w)
    try:
      getattr(made, kind)(*rest)
      return made.done(w.faults - cost), made.log
    except Exception as error:
      error.log = made.log
      raise

  def key(self, w: World) -> int:
    """A hash of a world, less what only counts up (numbers, ticks, epochs)
    and the times of arrivals.

    Python's -1 and -2 hash alike: two numbers below 0 must not meet here.
    """
    seqs = w.state.seqs
    return hash((w.marks, tuple([
        (*s[:10], s.tries, s.stop, s.hit, s.sent == -1) for s in (
            seqs[id] for id in sorted(seqs))]), w.state.waiting, w.out,
        w.fates, w.faults, tuple([
            (c.id, c.hit, lost, _behind(w, c, number))
            for c, lost, number in w.copies])))

  def check(self, w: World) -> None:
    """Raises Violation unless all holds that the world alone can show."""
    now = w.state
    scheduler.check(now)
    for seq in now.seqs.values():
      need(seq.tries <= self.config.tries, '{}: tried too often', seq)
      need(w.fates[seq.id] == '' or seq.stage in ('over', 'abandoned'),
           '{} lives on: {}', seq, w.fates[seq.id])
    for c, *_ in w.copies:
      seq = now.seqs.get(c.id)
      need(seq and (seq.epoch, seq.instance, seq.target) == (
          c.epoch, c.source, c.target)
           and all([pages[first:first + len(moved)] == moved
                    for pages, moved, first in (
                        (seq.pages, c.source_pages, self.skipped(c, c.source)),
                        (seq.target_pages, c.target_pages,
                         self.skipped(c, c.target)))]),
           'pages of {} are not of {} while it runs', c, seq)
    for i, inst in enumerate(now.instances):
      self._in_flight(now, i, inst)
      self._kept(w, i)
    self._moving(now)
    self._probe(w)

  def skipped(self, c: Migrate, i: int) -> int:
    """Pages of an instance that a copy leaves out."""
    return c.hit // self.config.instances[i].page_size

  def _kept(self, w, i):
    """Each page that is kept is full, with the tokens of its hash."""
    size = self.config.instances[i].page_size
    for hash, page in _kept_pages(w.state.instances[i]):
      got = w.kv[i][page]
      last = got and (got[1] + 1) * size // self.config.block_size - 1
      need(got and got[2] == size and hash == _hash(got[0], last),
           'instance {}: {} is kept as {}', i, got, hash)
    host = w.state.instances[i].host
    for hash, entry in host.slots.kept.items() if host else ():
      got = w.host.get((i, entry.page))
      last = got and (got[1] + 1) * size // self.config.block_size - 1
      need(got and hash == _hash(got[0], last),
           'the host of instance {}: {} is kept as {}', i, got, hash)
    if host:
      ids = sorted([c.id for c in w.loads if c.instance == i])
      need(ids == sorted([id for id, _ in host.loading]),
           'instance {}: {} load, not {}', i, ids, host.loading)
      numbers = [c.number for c, _ in w.offloads if c.instance == i]
      need(numbers == [number for number, *_ in host.offloads],
           'instance {}: offloads {}, not {}', i, numbers, host.offloads)

  def _in_flight(self, now, i, inst):
    """Commands in flight touch pages of their requests only, and ask for no
    more than the instance and the depth allow."""
    config, c = self.config, self.config.instances[i]
    depths = [config.depth * c.pp] * c.decodes
    if c.flips or not c.decodes:
      depths += [config.prefill_depth, c.pp]
    depth = max(depths)
    need(len(inst.inflight) <= depth, 'instance {}: {} commands in flight', i,
         len(inst.inflight))
    ahead = []
    for command, _ in inst.inflight:
      rows, parts = command.rows, command.rows
      if isinstance(command, RunDecode):
        most = config.run_ahead if c.pp == 1 else 1
        need(rows and c.decodes and 0 < command.steps <= most,
             '{}: of {} to {} steps', command, 1, most)
      else:
        parts = command.chunks + rows
        tokens = sum([p.stop - p.start for p in command.chunks]) + len(rows)
        need(command.chunks and c.prefills
             and all([p.start < p.stop for p in command.chunks])
             and len(command.chunks) <= c.prefill_seqs
             and tokens <= c.prefill_tokens
             and (c.mixes or not rows),
             '{}: more than {} takes', command, c)
      ids = [p.id for p in parts]
      need(len(rows) <= c.max_seqs and len(set(ids)) == len(ids),
           '{}: too many rows, or one twice', command)
      ahead += [row.id for row in rows]
      for part in parts:
        seq = now.seqs.get(part.id)
        need(seq and seq.instance == i
             and seq.pages[:len(part.pages)] == part.pages,
             'instance {}: pages of {} are not of {}', i, part, seq)
    need(len(ahead) <= config.depth
         or all([ahead.count(id) <= config.depth for id in set(ahead)]),
         'instance {}: a row is too far ahead: {}', i, inst.inflight)

  def _moving(self, now):
    """Progress: everything that can go on does, with what is there."""
    up = {'prefill': False, 'decode': False}
    for i, inst in enumerate(now.instances):
      config = self.config.instances[i]
      takes_work = inst.status in ('up', 'draining')
      up['prefill'] |= config.prefills and takes_work
      up['decode'] |= config.decodes and takes_work
      busy = inst.rows or inst.prefilling or inst.queue or inst.pulls
      need(inst.status in ('up', 'draining')
           or not (busy or inst.residents or inst.inflight),
           'instance {} is {} and has work', i, inst.status)
      need(not (inst.pulls and inst.streams),
           'instance {}: a stream has the place of what waits', i)
      if not inst.inflight:
        need(not (inst.rows or inst.prefilling), 'instance {} stalled', i)
        need(inst.residents or not busy, 'instance {} admits nothing', i)
    for id in now.waiting:
      kind = 'prefill' if now.seqs[id].stage == 'queued' else 'decode'
      need(not up[kind], 'request {} waits though one may serve it', id)

  def over(self, w: World) -> None:
    """Nothing more will happen: all have ended, every page is back."""
    need('' not in w.fates, 'never ended: {}', w.fates)
    need(scheduler.idle(w.state), 'not idle')
    for c, inst in zip(self.config.instances, w.state.instances, strict=True):
      need(prefix_cache.num_free(inst.pool) == c.num_pages, 'pages leaked')
      prefix_cache.check(inst.pool, ())
      if inst.host:
        prefix_cache.check(inst.host.slots, ())
      need(not (inst.ending or inst.residents or inst.backlog),
           'not empty: {}', inst)

  # --- events without sense -------------------------------------------------

  def _probe(self, w):
    """In turn: stale events change nothing; an impossible event is named.

    A policy that may say not yet is asked again at any event, so there the
    first is not looked at.
    """
    self.probes += 1
    turn, now = self.probes // 2, w.state
    if self.probes % 2:
      if self.config.policy.says_not_yet:
        return
      run = scheduler.Run(self.config, now)
      for event, stage in self._stale(w, turn):
        self.probed.add((stage, type(event).__name__, 'stale'))
        need(not run.apply(event), 'not inert: {}', event)
      need(run.freeze() == now, 'a stale event changed the state')
      return
    event, stage = self._wrong(w, turn)
    try:
      scheduler.step(self.config, now, event)
    except scheduler.ImpossibleEvent:
      self.probed.add((stage, type(event).__name__, 'impossible'))
    else:
      raise Violation(f'not an error: {event}')

  def _stale(self, w, turn):
    """(event, stage of its request or status of its instance)s: late ones,
    those that are told twice."""
    now, found, count = w.state, [], len(w.fates)
    for n in range(min(count, PROBED)):  # of many requests some, in turn
      id = (turn * PROBED + n) % count if count > PROBED else n
      fate, seq = w.fates[id], now.seqs.get(id)
      if seq is None:
        stage, epoch = 'absent', 1
      else:
        stage, epoch = seq.stage, seq.epoch - (
            seq.stage in COPIED or bool(seq.target_pages))
      kind = HAND_OFF[(turn + id) % len(HAND_OFF)]
      found.append((kind(NO_CLOCK, id, epoch), stage))
      if fate != '' and stage in ('absent', 'over', 'abandoned'):
        found.append((Cancelled(NO_CLOCK, id), stage))
    for i, inst in enumerate(now.instances):
      number = inst.inflight[0][0].number if inst.inflight else inst.number
      if number:
        kind = (PrefillDone, DecodeDone)[(turn + i) % 2]
        found.append((kind(NO_CLOCK, i, number - 1), inst.status))
      again = {'up': InstanceUp, 'draining': Drain,
               'down': InstanceDown, 'gone': Drain}[inst.status]
      found.append((again(NO_CLOCK, i), inst.status))
    return found

  def _wrong(self, w, turn):
    """(event, stage or status): what cannot have happened."""
    now, kind = w.state, turn % 10
    if now.seqs and kind in (0, 1, 2, 3, 8, 9):
      seq = now.seqs[list(now.seqs)[turn // 10 % len(now.seqs)]]
      if kind == 0 and seq.stage == 'prefilling' and seq.target_pages:
        return Migrated(NO_CLOCK, seq.id, seq.epoch), seq.stage
      if kind == 3:
        return Arrived(NO_CLOCK, seq.id, 1, 1), seq.stage
      late = HAND_OFF[kind % 5]  # 8 and 9: of a load
      return late(NO_CLOCK, seq.id, seq.epoch + 1), seq.stage
    i = turn // 10 % len(now.instances)
    inst, stranger = now.instances[i], len(self.requests)
    command = inst.inflight[0][0] if inst.inflight else None
    steps = (NO_CLOCK,) * (command.steps if command else 1)
    prefill = (isinstance(command, RunPrefill) if command
               else turn // 30 % 2)
    if command and kind == 5:  # the other kind
      other = DecodeDone if prefill else PrefillDone
      event = other(NO_CLOCK, i, command.number)
    elif command and kind == 6:  # all of it is out: so it is done
      event = InstanceDown(NO_CLOCK, i, steps)
    elif command and kind == 7:  # it samples nothing of this request
      event = (PrefillDone(NO_CLOCK, i, command.number, (stranger,))
               if prefill else DecodeDone(
                   NO_CLOCK, i, command.number, steps, ((stranger, 0),)))
    else:  # not issued yet
      done = PrefillDone if prefill else DecodeDone
      event = done(NO_CLOCK, i, inst.number)
    return event, inst.status


class _Move:
  """One move of a world, in place."""

  def __init__(self, rules, w):
    self.rules, self.w, self.time_s = rules, w, rules.time_s
    self.events, self.log, self.stopped = [], [], []
    self.kv, self.changed = list(w.kv), set()
    self.out, self.fates = list(w.out), list(w.fates)
    self.copies = list(w.copies)
    self.host, self.offloads = w.host, list(w.offloads)
    self.loads = list(w.loads)

  def done(self, faults):
    """Steps the scheduler, performs Abort and ends, doubts."""
    w, config = self.w, self.rules.config
    before = after = w.state
    marks = w.marks
    if self.events:
      run = _Traced(config, before)
      run.hops = self.rules.hops
      for event in self.events:
        self.log.append((event, tuple(run.apply(event))))
      after = run.freeze()
      marks = tuple([m if a is b else _mark(a) for a, b, m in zip(
          after.instances, before.instances, marks, strict=True)])
    self.numbers = [inst.number - 1 for inst in before.instances]
    for _, commands in self.log:
      self.issued = []
      for c in commands:
        if isinstance(c, RunPrefill | RunDecode):
          self.numbers[c.instance] = c.number
        doubt = _DOUBTS.get(type(c))
        if doubt:
          doubt(self, c, after)
        self.issued.append(c)
    for id in self.stopped:
      need(self.fates[id], 'request {} goes on after its end', id)
    for i, inst in enumerate(after.instances):
      freed = _free(inst) & ~_free(before.instances[i])
      if freed:
        kv = self.pages_of(i)
        for p in range(len(kv)):
          if freed >> p & 1:
            kv[p] = None
    for i in self.changed:
      self.kv[i] = tuple(self.kv[i])
    return World(after, tuple(self.kv), tuple(self.fates), tuple(self.out),
                 tuple(self.copies), faults, marks, self.host,
                 tuple(self.offloads), tuple(self.loads))

  def end(self, c, after):
    """A request ends: once, with all its tokens, for a reason that is so."""
    need(self.fates[c.id] == '', '{}: ended {} before', c, self.fates[c.id])
    _, most, eos, _ = self.rules.requests[c.id]
    self.fates[c.id] = reason = (
        c.reason if isinstance(c, Finish) else type(c).__name__)
    if reason in ('stop', 'length'):
      want = eos or most
      need(self.out[c.id] == want and (reason == 'stop') == bool(eos),
           '{} after {} of {}', c, self.out[c.id], want)
    elif reason == 'cancelled':
      event, = self.events
      need(isinstance(event, Cancelled) and event.id == c.id,
           '{} by {}', c, event)
    elif reason == 'Fail':
      seq = self.w.state.seqs.get(c.id)
      left = [config for inst, config in zip(
          after.instances, self.rules.config.instances, strict=True)
              if inst.status != 'gone']
      need(seq and seq.tries == self.rules.config.tries
           or c.refused
           or not any([config.prefills for config in left])
           or not any([config.decodes for config in left]),
           '{}: it could go on', c)
    else:
      need(c.refused or scheduler.never_fits(
          self.rules.config, *self.rules.requests[c.id][:2]),
           '{}: it fits', c)

  def started(self, c, after):
    need(all([p.id != c.id or p.epoch == c.epoch and p.more
              and p.hit + p.num_tokens <= c.hit for p, *_ in self.copies]),
         '{}: two copies of one request', c)
    self.pulled(c, after)
    source, target = (self.rules.config.instances[i]
                      for i in (c.source, c.target))
    need((source.flips or not source.decodes) and target.decodes,
         '{}: no copy goes from {} to {}', c, source.role, target.role)
    for i, pages in ((c.source, c.source_pages), (c.target, c.target_pages)):
      size = self.rules.config.instances[i].page_size
      need(pages and len(pages) == page_pool.pages_for(c.num_tokens, size),
           '{}: {} pages', c, len(pages))
      need(c.hit % size == 0 and not (c.more and c.num_tokens % size),
           '{}: not of whole pages', c)
    if not c.more:  # else when what it is read behind has run
      self.read(c.source, c.id, c.source_pages, c.hit + c.num_tokens, c.hit)
    self.copies.append((c, False, self.numbers[c.source]))

  def aborted(self, c, after):
    self.copies = [p for p in self.copies
                   if (p[0].id, p[0].epoch) != (c.id, c.epoch)]

  def offload(self, c, after):
    """It reads full pages before what is issued later writes them."""
    used = {page for other in self.issued if isinstance(
        other, RunPrefill | RunDecode) and other.instance == c.instance
            for part in other.chunks + other.rows for page in part.pages}
    need(used.isdisjoint(c.pages), '{}: after what writes there', c)
    size = self.rules.config.instances[c.instance].page_size
    got = tuple([self.kv[c.instance][page] for page in c.pages])
    need(all([page and page[2] == size for page in got])
         and len(c.pages) == len(c.slots), '{}: reads {}', c, got)
    self.offloads.append((c, got))

  def load(self, c, after):
    """It writes pages that nothing else uses."""
    seq, size = after.seqs[c.id], self.rules.config.instances[
        c.instance].page_size
    first, count = c.hit // size, len(c.slots)
    need(seq.instance == c.instance and count * size == c.num_tokens
         and seq.pages[first:first + count] == c.pages
         and c.hit + c.num_tokens < seq.prompt_len,
         '{}: other pages than those of {}', c, seq)
    self.read(c.instance, c.id, seq.pages, c.hit)
    self.admitted(c, after)
    self.loads.append(c)

  def admitted(self, c, after):
    """First come, first served: no request of a prefill queue is passed."""
    if self.rules.config.policy.order:
      return
    before = self.w.state.instances[c.instance].queue
    # Not of those that came since, perhaps after the command was issued.
    queue = [id for id in after.instances[c.instance].queue if id in before]
    seqs = self.w.state.seqs  # one that loaded was let in before
    waited = [id for id in after.seqs if id not in seqs
              or seqs[id].stage != 'loading']
    if queue:
      first = after.seqs[queue[0]].order
      for part in (c,) if isinstance(c, Load) else c.chunks:
        need(isinstance(part, Chunk) and part.start > part.hit
             or part.id not in waited or after.seqs[part.id].order < first,
             '{}: passes request {} by', c, queue[0])

  def pulled(self, c, after):
    """No finished prefill that waits for this instance is passed."""
    if self.rules.config.policy.order:
      return
    before = self.w.state.instances[c.target].pulls
    stay = after.instances[c.target].pulls
    for id in before:
      if id == c.id:
        break
      need(id not in stay, '{}: passes request {} by', c, id)

  # --- what commands do to pages and clients --------------------------------

  def pages_of(self, i):
    if i not in self.changed:
      self.changed.add(i)
      self.kv[i] = list(self.kv[i])
    return self.kv[i]

  def read(self, i, id, ids, stop, start=0):
    """Tokens [start, stop) are read; `ids` begin with the page of start."""
    kv, size = self.kv[i], self.rules.config.instances[i].page_size
    for k, page in self.places(id, ids, start, stop, size):
      got, want = kv[page], min(size, stop - k * size)
      name = self.rules.page_of(id, k, size)
      need(got and got[:2] == name and got[2] >= want,
           'instance {}: read {} for {} tokens of {}', i, got, want, name)

  def write(self, i, id, ids, start, stop, skipped=0):
    """Tokens [start, stop) are written; `ids` begin with the page of
    `skipped`."""
    kv, size = self.pages_of(i), self.rules.config.instances[i].page_size
    kept = {page for _, page in _kept_pages(self.w.state.instances[i])}
    for k, page in self.places(id, ids, skipped, stop, size):
      if k >= start // size:
        need(page not in kept, 'instance {}: page {}, which is kept, is '
             'written for {}', i, page, id)
        kv[page] = (*self.rules.page_of(id, k, size),
                    min(size, stop - k * size))

  def places(self, id, ids, start, stop, size):
    """(block, page) of tokens [start, stop) of a request."""
    first, after = start // size, page_pool.pages_for(stop, size)
    need(after - first <= len(ids), 'request {}: no page for {} in {}', id,
         stop, ids)
    return zip(range(first, after), ids, strict=False)

  def tell(self, id, position):
    """A token is told; True where the stream ends with it."""
    prompt, _, eos, _ = self.rules.requests[id]
    out = self.out[id]
    if self.fates[id] != '' or eos and out >= eos:
      return False
    need(position == prompt + out,
         'request {}: token {} after {}', id, position - prompt, out)
    self.out[id] = out + 1
    if out + 1 == eos:
      self.stopped.append(id)
    return out + 1 == eos

  def rows(self, i, c, steps):
    ended = []
    for t in range(c.tick, c.tick + steps):
      for row in c.rows:
        need(t < row.until, 'tick {} of {}', t, row)
        position = row.base + t
        self.read(i, row.id, row.pages, position)
        self.write(i, row.id, row.pages, position, position + 1)
        if self.tell(row.id, position + 1):
          ended.append((row.id, t - c.tick))
    return tuple(ended)

  # --- moves ----------------------------------------------------------------

  def arrive(self, id, more=False):
    self.fates[id] = ''
    prompt_len, limit = self.rules.requests[id][:2]
    self.events.append(Arrived(self.time_s, id, prompt_len, limit, more,
                               self.rules.blocks(id, 0, prompt_len)))

  def burst(self, first, second):
    """Two arrive at once."""
    self.arrive(first, more=True)
    self.arrive(second)

  def run(self, i):
    c = self.w.state.instances[i].inflight[0][0]
    if isinstance(c, RunDecode):
      ended = self.rows(i, c, c.steps)
      self.events.append(DecodeDone(
          self.time_s, i, c.number, (self.time_s,) * c.steps, ended,
          blocks=self.generated(c)))
      return
    ended = []
    for chunk in c.chunks:
      known = self.rules.requests[chunk.id][0] + self.out[chunk.id]
      need(self.fates[chunk.id] or chunk.last == (chunk.stop == known),
           '{}: {} tokens are known', chunk, known)
      self.read(i, chunk.id, chunk.pages, chunk.start)
      self.write(i, chunk.id, chunk.pages, chunk.start, chunk.stop)
      if chunk.last and self.tell(chunk.id, chunk.stop):
        ended.append(chunk.id)
    ended += [id for id, _ in self.rows(i, c, 1)]
    self.events.append(PrefillDone(self.time_s, i, c.number, tuple(ended),
                                   blocks=self.generated(c)))

  def generated(self, c):
    """(id, blocks) of what those that end with a command have generated."""
    blocks = []
    for id in [part.id for part in c.chunks + c.rows]:
      prompt, most, eos, _ = self.rules.requests[id]
      more = self.rules.blocks(id, prompt, prompt + self.out[id] - 1)
      if more and self.out[id] == (eos or most) != self.w.out[id]:
        blocks.append((id, more))
    return tuple(blocks)

  def crash(self, i, steps, back=True):
    flying = self.w.state.instances[i].inflight
    ended = self.rows(i, flying[0][0], steps) if steps else ()
    self.events.append(InstanceDown(
        self.time_s, i, (self.time_s,) * steps, ended, back))
    self.changed.add(i)
    self.kv[i] = [None] * len(self.kv[i])
    self.copies = [p for p in self.copies if p[0].target != i]
    self.host = {k: v for k, v in self.host.items() if k[0] != i}
    self.offloads = [p for p in self.offloads if p[0].instance != i]
    self.loads = [c for c in self.loads if c.instance != i]

  def gone(self, i):
    self.crash(i, 0, False)

  def up(self, i):
    self.events.append(InstanceUp(self.time_s, i))

  def drain(self, i):
    self.events.append(Drain(self.time_s, i))

  def tick(self):
    self.events.append(Tick(self.time_s))

  def cancel(self, id):
    self.stopped.append(id)
    self.events.append(Cancelled(self.time_s, id))

  def copy(self, id, part):
    """Which of the copies: a part is known by its first token."""
    return next(n for n, (c, *_) in enumerate(self.copies)
                if c.id == id and (c.hit if c.more else -1) == part)

  def copied(self, id, part=-1):
    c, *_ = self.copies.pop(self.copy(id, part))
    stop = c.hit + c.num_tokens
    self.read(c.source, id, c.source_pages, stop, c.hit)
    self.write(c.target, id, c.target_pages, c.hit, stop, c.hit)
    if not c.more:
      self.events.append(Migrated(self.time_s, id, c.epoch))

  def failed(self, id, part=-1, reason='the copy failed'):
    """With it every part of its hand-off is given up."""
    c, *_ = self.copies[self.copy(id, part)]
    self.aborted(c, None)
    self.events.append(MigrateFailed(self.time_s, id, c.epoch, reason))

  def damaged(self, id, part=-1):
    """It arrived, and its checksum does not fit."""
    c, *_ = self.copies[self.copy(id, part)]
    kv = self.pages_of(c.target)
    for page in c.target_pages:
      kv[page] = DAMAGED
    self.failed(id, part, 'checksum')

  def offloaded(self, i, number, failed=False):
    n, = [n for n, (c, _) in enumerate(self.offloads)
          if (c.instance, c.number) == (i, number)]
    c, got = self.offloads.pop(n)
    self.host = self.host | {(i, slot): None if failed else page
                             for slot, page in zip(c.slots, got, strict=True)}
    self.events.append(Offloaded(self.time_s, i, number, failed))

  def offload_failed(self, i, number):
    self.offloaded(i, number, True)

  def loading(self, id):
    n, = [n for n, c in enumerate(self.loads) if c.id == id]
    return self.loads.pop(n)

  def loaded(self, id):
    c = self.loading(id)
    size, kv = self.rules.config.instances[c.instance].page_size, self.pages_of(
        c.instance)
    first = c.hit // size
    for n, (slot, page) in enumerate(zip(c.slots, c.pages, strict=True)):
      got, name = self.host.get((c.instance, slot)), self.rules.page_of(
          id, first + n, size)
      need(got and got[:2] == name, '{}: loads {} for {}', c, got, name)
      kv[page] = got
    self.events.append(Loaded(self.time_s, id, c.epoch))

  def load_failed(self, id):
    c = self.loading(id)
    self.events.append(LoadFailed(self.time_s, id, c.epoch))

  def bad_load(self, id):
    """It is there, and its checksum does not fit."""
    c = self.loading(id)
    kv = self.pages_of(c.instance)
    for page in c.pages:
      kv[page] = DAMAGED
    read = {(other.instance, slot) for other in self.loads
            for slot in other.slots}
    self.host = self.host | {(c.instance, slot): DAMAGED for slot in c.slots
                             if (c.instance, slot) not in read}
    self.events.append(LoadFailed(self.time_s, id, c.epoch, 'checksum'))

  def lease(self, id, part=-1):
    c, *_ = self.copies[self.copy(id, part)]
    self.events.append(Timer(self.time_s, id, c.epoch))

  def lose(self, id, part=-1):
    """It may write for ever, and will never answer."""
    n = self.copy(id, part)
    c, _, number = self.copies[n]
    self.copies[n] = c, True, number


_DOUBTS = {Migrate: _Move.started, Abort: _Move.aborted,
           Offload: _Move.offload, Load: _Move.load,
           RunPrefill: _Move.admitted, Finish: _Move.end,
           Fail: _Move.end, Reject: _Move.end}


def _hash(id, block):
  """Of a block, and all before it."""
  return 1 + 1000 * block + (0 if id == ALIKE else id + 1)


def _behind(w, c, number):
  """Commands that are to run before a copy reads: those up to `number`."""
  flying = w.state.instances[c.source].inflight
  return max(0, number + 1 - flying[0][0].number) if flying else 0


def _free(inst):
  """The bits of the pages that nobody owns, and that are not kept."""
  return getattr(inst.pool, 'pool', inst.pool).free


def _kept_pages(inst):
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
  return hash((_cache_mark(host.slots), host.loading,
               tuple([entry[1:] for entry in host.offloads])))


def _mark(inst):
  """A hash of an instance, see Rules.key."""
  ticks = [b.tick for b in inst.batches]
  number = inst.number
  return hash((
      _free(inst), _kept_mark(inst), _host_mark(inst), inst.queue,
      inst.prefilling, inst.pulls, inst.streams, inst.turn, inst.status,
      inst.role,
      tuple([(number - n, id) for n, id in inst.ending]),
      tuple([tuple([(r[0], r[1] + b.tick, r[2] - b.tick, r[3])
                    for r in b.rows]) for b in inst.batches]),
      tuple([(g, c.steps, c.chunks,
              tuple([(r[0], r[1] + c.tick, r[3]) for r in c.rows]),
              ticks[g] - c.tick if g >= 0 else 0)
             for c, g in inst.inflight])))
