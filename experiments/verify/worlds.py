"""Worlds in which everything may go wrong: one scheduler, virtual instances.

Rules says what may happen next in a World (a command is done, a copy arrives,
an instance dies), lets it happen (moves.py), and what must hold then. Nothing
here chooses a move: schedules.py does.
"""

import math
from collections.abc import Iterable

from dsjax.scheduling import prefix_cache, scheduler
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  DecodeDone,
  Drain,
  InstanceDown,
  InstanceUp,
  Migrate,
  Migrated,
  PrefillDone,
  RunDecode,
  RunPrefill,
)
from dsjax.scheduling.policy import DISTSERVE
from experiments.verify.moves import Moving
from experiments.verify.world import (
  ALIKE,
  COPIED,
  HAND_OFF,
  NO_CLOCK,
  PROBED,
  Log,
  Move,
  Violation,
  World,
  behind,
  hash_of,
  kept_pages,
  mark_of,
  need,
)


class Rules:
  """What may happen to some requests on some instances, and what must hold.

  Args:
    config: a scheduler.Config.
    requests: (prompt_len, max_tokens, tokens until EOS or 0) of each, and
      how many tokens, prompt and output, it begins with as others do.

  Attributes:
    time_s: of the next events. Only DistServe's own choices may not look at
      it; for other policies it stands still where worlds are explored to the
      end, and counts moves on a random walk (timed).
    hops: every (stage, cause, stage) that was taken. probed: every (stage,
      kind of event) that was tried where it is stale or impossible. probes:
      how many.
  """

  moving = Moving

  def __init__(self, config: scheduler.Config,
               requests: Iterable[Iterable[int]]) -> None:
    self.config = config
    self.requests = tuple((*request, 0)[:4] for request in requests)
    self.hops, self.probed, self.probes = set(), set(), 0
    self.time_s = NO_CLOCK if config.policy is DISTSERVE else 0.0
    self.timed = False

  def first(self, faults: int) -> World:
    """The world before anything happens."""
    start = scheduler.init(self.config)
    return World(start, tuple((None,) * c.num_pages
                              for c in self.config.instances),
                 (None,) * len(self.requests), (0,) * len(self.requests), (),
                 faults, tuple(map(mark_of, start.instances)))

  def page_of(self, id: int, block: int, size: int) -> tuple[int, int]:
    """(request, block) of what a request has on a page of `size` tokens."""
    alike = (block + 1) * size <= self.requests[id][3]
    return (ALIKE if alike else id), block

  def blocks(self, id: int, start: int, stop: int) -> tuple[int, ...]:
    """Hashes of the full blocks of tokens [start, stop) of a request."""
    if not self.config.prefix_cache:
      return ()
    size = self.config.block_size
    return tuple([hash_of(*self.page_of(id, block, size))
                  for block in range(start // size, stop // size)])

  def moves(self, w: World) -> list[tuple[Move, int]]:
    """(move, faults that it costs) of everything that may happen next."""
    possible, faults = [], w.faults
    if None in w.fates:
      id = w.fates.index(None)
      possible.append((('arrive', id), 0))
      if id + 1 < len(w.fates):
        possible.append((('burst', id, id + 1), 0))
    for i, inst in enumerate(w.state.instances):
      if inst.inflight:
        possible.append((('run', i), 0))
      if inst.status == 'down':
        possible.append((('up', i), 0))
        if faults:
          possible.append((('gone', i), 1))
      elif faults and inst.status == 'gone':
        possible.append((('up', i), 1))
      elif faults:
        steps = inst.inflight[0][0].steps if inst.inflight else 1
        possible += [(('crash', i, n), 1) for n in range(steps)]
        possible.append((('gone', i), 1))
        possible.append((('drain' if inst.status == 'up' else 'up', i), 1))
    for c, lost, number in w.copies:
      which = (c.id, c.hit) if c.more else (c.id,)
      if lost:
        possible.append((('lease', *which), 0))
        continue
      read = not behind(w, c, number)
      last = c.more or all([p.id != c.id or p is c for p, *_ in w.copies])
      if read and last:
        possible.append((('copied', *which), 0))
      if faults:
        kinds = ('failed', 'damaged', 'lease', 'lose')[:4 if read else 1]
        possible += [((kind, *which), 1) for kind in kinds]
    for c, _ in w.offloads:
      possible.append((('offloaded', c.instance, c.number), 0))
      if faults:
        possible.append((('offload_failed', c.instance, c.number), 1))
    for c in w.loads:
      possible.append((('loaded', c.id), 0))
      if faults:
        possible += [((kind, c.id), 1) for kind in ('load_failed', 'bad_load')]
    if faults:
      possible += [(('cancel', id), 1)
                   for id, fate in enumerate(w.fates) if fate == '']
      if self.config.policy.tick_s is not None:
        possible.append((('tick',), 1))
    return possible

  def apply(self, w: World, move: Move, cost: int) -> tuple[World, Log]:
    """(the world after a move, [(event, commands)] of it). Raises Violation.

    Any exception has this log, as far as it got, as its `log`.
    """
    kind, *rest = move
    made = self.moving(self, w)
    try:
      getattr(made, kind)(*rest)
      return made.done(w.faults - cost), made.log
    except Exception as error:
      vars(error)['log'] = made.log
      raise

  def key(self, w: World) -> int:
    """A hash of a world, less what only counts up (numbers, ticks, epochs)
    and the times of arrivals.

    Python's -1 and -2 hash alike: two numbers below 0 must not meet here.
    """
    seqs = w.state.seqs
    return hash((w.marks, tuple([
        (*s[:10], s.tries, s.stop, s.hit, s.sent == -1, s.lender,
         s.first_s is None) for s in (
            seqs[id] for id in sorted(seqs))]), w.state.waiting, w.out,
        w.fates, w.faults, tuple([
            (c.id, c.hit, lost, behind(w, c, number))
            for c, lost, number in w.copies]), self._rows_in_hosts(w)))

  def _rows_in_hosts(self, w):
    """What is in slots of preempted rows; of others their hashes say it."""
    return tuple([
        w.host.get((i, slot)) for i, inst in enumerate(w.state.instances)
        if inst.host for slots in (
            *[slots for _, slots, _ in inst.host.swapped],
            *[entry.held for entry in inst.loading if entry.lender < 0])
        for slot in slots])

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
      if c.kept:
        lent = [entry.held for entry in now.instances[c.target].loading
                if (entry.id, entry.lender) == (c.id, c.source)]
        need(seq and (seq.epoch, seq.instance) == (c.epoch, c.target)
             and lent == [c.source_pages],
             'pages of {} are not lent to {}', c, seq)
        assert seq  # as needed
        pages, sides = seq.pages, ()
      else:
        need(seq and (seq.epoch, seq.instance, seq.target) == (
            c.epoch, c.source, c.target), '{} is not of {}', c, seq)
        assert seq  # as needed
        pages = seq.target_pages
        sides = (seq.pages, c.source_pages, self.skipped(c, c.source)),
      need(all([whole[first:first + len(moved)] == moved
                for whole, moved, first in (*sides, (
                    pages, c.target_pages, self.skipped(c, c.target)))]),
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
    for hash, page in kept_pages(w.state.instances[i]):
      got = w.kv[i][page]
      last = got and (got[1] + 1) * size // self.config.block_size - 1
      need(got and got[2] == size and hash == hash_of(got[0], last),
           'instance {}: {} is kept as {}', i, got, hash)
    host = w.state.instances[i].host
    for hash, entry in host.slots.kept.items() if host else ():
      got = w.host.get((i, entry.page))
      last = got and (got[1] + 1) * size // self.config.block_size - 1
      need(got and hash == hash_of(got[0], last),
           'the host of instance {}: {} is kept as {}', i, got, hash)
    loading = w.state.instances[i].loading
    ids = sorted([*[c.id for c in w.loads if c.instance == i],
                  *[c.id for c, *_ in w.copies if c.kept and c.target == i]])
    need(ids == sorted([entry.id for entry in loading]),
         'instance {}: {} load, not {}', i, ids, loading)
    if host:
      numbers = [c.number for c, _ in w.offloads if c.instance == i]
      need(numbers == sorted([
          *[number for number, *_ in host.offloads],
          *[number for *_, number in host.swapped if number >= 0]]),
           'instance {}: offloads {}, not {}', i, numbers, host)

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
        most = (config.run_ahead or math.inf) if c.pp == 1 else 1
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
    # A policy may hold prompts back while something runs that will end.
    held_back = self.config.policy.says_not_yet and any(
        [inst.inflight for inst in now.instances])
    for i, inst in enumerate(now.instances):
      config = self.config.instances[i]
      takes_work = inst.status in ('up', 'draining')
      up['prefill'] |= config.prefills and takes_work
      up['decode'] |= config.decodes and takes_work
      swapped = inst.host.swapped if inst.host else ()
      busy = (inst.rows or inst.prefilling or inst.queue or inst.pulls
              or swapped)
      # Till these copies end there may be no room, or a row's turn is first.
      copying = any([number >= 0 for *_, number in swapped]) or any(
          [entry.lender == i for other in now.instances
           for entry in other.loading])
      need(inst.status in ('up', 'draining')
           or not (busy or inst.residents or inst.inflight),
           'instance {} is {} and has work', i, inst.status)
      need(not ((inst.pulls or swapped) and inst.streams) or copying,
           'instance {}: a stream has the place of what waits', i)
      if not inst.inflight:
        need(not (inst.rows or inst.prefilling), 'instance {} stalled', i)
        need(inst.residents or not busy or copying or held_back,
             'instance {} admits nothing', i)
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
      policy = self.config.policy
      if policy.says_not_yet or self.timed and policy.order:
        return  # it may answer what it did not when less time had passed
      run = scheduler.Run(self.config, now)
      for event, stage in self._stale(w, turn):
        self.probed.add((stage, type(event).__name__, 'stale'))
        answer = run.apply(event)
        need(not answer, 'not inert: {}, which answers {}', event, answer)
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
    now, stale, count = w.state, [], len(w.fates)
    for n in range(min(count, PROBED)):  # of many requests some, in turn
      id = (turn * PROBED + n) % count if count > PROBED else n
      fate, seq = w.fates[id], now.seqs.get(id)
      if seq is None:
        stage, epoch = 'absent', 1
      else:
        stage, epoch = seq.stage, seq.epoch - (
            seq.stage in COPIED or bool(seq.target_pages))
      kind = HAND_OFF[(turn + id) % len(HAND_OFF)]
      stale.append((kind(self.time_s, id, epoch), stage))
      if fate != '' and stage in ('absent', 'over', 'abandoned'):
        stale.append((Cancelled(self.time_s, id), stage))
    for i, inst in enumerate(now.instances):
      number = inst.inflight[0][0].number if inst.inflight else inst.number
      if number:
        kind = (PrefillDone, DecodeDone)[(turn + i) % 2]
        stale.append((kind(self.time_s, i, number - 1), inst.status))
      again = {'up': InstanceUp, 'draining': Drain,
               'down': InstanceDown, 'gone': Drain}[inst.status]
      stale.append((again(self.time_s, i), inst.status))
    return stale

  def _wrong(self, w, turn):
    """(event, stage or status): what cannot have happened."""
    now, kind = w.state, turn % 10
    if now.seqs and kind in (0, 1, 2, 3, 8, 9):
      seq = now.seqs[list(now.seqs)[turn // 10 % len(now.seqs)]]
      if kind == 0 and seq.stage == 'prefilling' and seq.target_pages:
        return Migrated(self.time_s, seq.id, seq.epoch), seq.stage
      if kind == 3:
        return Arrived(self.time_s, seq.id, 1, 1), seq.stage
      late = HAND_OFF[kind % 5]  # 8 and 9: of a load
      return late(self.time_s, seq.id, seq.epoch + 1), seq.stage
    i = turn // 10 % len(now.instances)
    inst, stranger = now.instances[i], len(self.requests)
    command = inst.inflight[0][0] if inst.inflight else None
    steps = (self.time_s,) * (command.steps if command else 1)
    prefill = (isinstance(command, RunPrefill) if command
               else turn // 30 % 2)
    if command and kind == 5:  # the other kind
      other = DecodeDone if prefill else PrefillDone
      event = other(self.time_s, i, command.number)
    elif command and kind == 6:  # all of it is out: so it is done
      event = InstanceDown(self.time_s, i, steps)
    elif command and kind == 7:  # it samples nothing of this request
      event = (PrefillDone(self.time_s, i, command.number, (stranger,))
               if prefill else DecodeDone(
                   self.time_s, i, command.number, steps, ((stranger, 0),)))
    else:  # not issued yet
      done = PrefillDone if prefill else DecodeDone
      event = done(self.time_s, i, inst.number)
    return event, inst.status
