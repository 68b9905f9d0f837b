"""Explores every interleaving of a small world with its faults.

python -m experiments.explore [seconds a world] [more faults]
"""

import collections
import sys
import time
from typing import NamedTuple

from dsjax import base, pages, scheduler


class Violation(AssertionError):
  """What must hold does not."""


def need(ok, text):
  """Raises Violation unless ok."""
  if not ok:
    raise Violation(text)


class World(NamedTuple):
  """kv: of each page (id, block, tokens filled) or None. copies: (Migrate,
  answer lost). out: tokens told of each request. fates: '' until it ends.
  past: events that must change nothing from now on. faults: left to inject.
  """

  state: object
  kv: tuple
  fates: tuple
  out: tuple
  copies: tuple = ()
  faults: int = 0
  past: tuple = ()


class Explorer:
  """Depth-first over the worlds of one configuration, with state hashing.

  requests: (prompt_len, max_tokens, tokens until EOS or 0) of each.
  """

  def __init__(self, config, requests, faults, step=scheduler.step):
    self.config, self.requests, self.step = config, requests, step
    self.first = World(
        scheduler.init(config),
        tuple((None,) * c.num_pages for c in config.instances),
        (None,) * len(requests), (0,) * len(requests), (), faults)
    self.transitions = self.inert = 0

  def moves(self, w):
    """(move, whether it is a fault) pairs that may happen next."""
    found = []
    if None in w.fates:
      found.append((('arrive', w.fates.index(None)), 0))
    for i, inst in enumerate(w.state.instances):
      if inst.inflight:
        found.append((('run', i), 0))
      if inst.status == 'up':
        if w.faults:
          steps = getattr(inst.inflight[0][0], 'steps', 1) if (
              inst.inflight) else 1
          found += [(('crash', i, n), 1) for n in range(steps)]
          found += [(('gone', i, 0), 1), (('drain', i), 1)]
      elif inst.status == 'down':
        found.append((('up', i), 0))
    for n, (_, lost) in enumerate(w.copies):
      if lost:
        found.append((('lease', n), 0))
      else:
        found.append((('copied', n), 0))
        if w.faults:
          found += [((kind, n), 1) for kind in ('failed', 'lease', 'lose')]
    if w.faults:
      found += [(('cancel', id), 1) for id, f in enumerate(w.fates) if f == '']
    return found

  def apply(self, w, move, fault):
    """The world after a move. Raises Violation."""
    kind, n, *rest = move
    world = _Move(self, w._replace(faults=w.faults - fault))
    getattr(world, kind)(n, *rest)
    return world.done()

  def run(self, seconds=1e9, most=10**12):
    """Explores; {moves: count}. Raises Violation with the schedule."""
    began, seen, path = time.monotonic(), {key(self.first)}, []
    grey = [key(self.first)]
    stack = [(self.first, iter(self.moves(self.first)))]
    on = set(grey)
    while stack:
      w, todo = stack[-1]
      move, fault = next(todo, (None, 0))
      if move is None:
        stack.pop()
        on.discard(grey.pop())
        del path[-1:]
        continue
      self.transitions += 1
      if self.transitions >= most or time.monotonic() - began > seconds:
        return False
      try:
        after = self.apply(w, move, fault)
        mark = key(after)
        need(mark not in on or move[0] == 'up', 'no progress: a cycle')
        moves = () if mark in seen else self.moves(after)
        if mark not in seen and not any(not f for _, f in moves):
          self.over(after)
      except Exception as error:
        raise Violation(f'{error}; after {[*path, move]}') from error
      if mark in seen:
        continue
      seen.add(mark)
      stack.append((after, iter(moves)))
      path.append(move)
      grey.append(mark)
      on.add(mark)
    return True

  def over(self, w):
    """Nothing more will happen: everyone has ended, every page is back."""
    need('' not in w.fates, f'never ended: {w.fates}')
    need(scheduler.idle(w.state), 'not idle')
    for c, inst in zip(self.config.instances, w.state.instances, strict=True):
      need(inst.pool == pages.init(c.num_pages), 'pages leaked')


class _Move:
  """One move of a world, in place."""

  def __init__(self, explorer, w):
    self.x, self.w, self.event = explorer, w, None
    self.kv, self.out = [list(k) for k in w.kv], list(w.out)
    self.fates, self.copies = list(w.fates), list(w.copies)
    self.past = list(w.past)

  def done(self):
    """Steps the scheduler, performs Abort and ends, checks."""
    w, config, step = self.w, self.x.config, self.x.step
    state, commands = w.state, ()
    if self.event is not None:
      state, commands = step(config, state, self.event)
      scheduler.check(state)
    for c in commands:
      if isinstance(c, base.Migrate):
        self.copies.append((c, False))
      elif isinstance(c, base.Abort):
        self.copies = [p for p in self.copies
                       if (p[0].id, p[0].epoch) != (c.id, c.epoch)]
      elif isinstance(c, base.Finish | base.Fail | base.Reject):
        self.end(c)
    for kv, inst in zip(self.kv, state.instances, strict=True):
      for p in range(len(kv)):
        if inst.pool.free >> p & 1:
          kv[p] = None
    for c, _ in self.copies:
      for i, ids in ((c.source, c.source_pages), (c.target, c.target_pages)):
        need(not any(state.instances[i].pool.free >> p & 1 for p in ids),
             f'pages of {c} are free while it runs')
    for seq in state.seqs.values():
      need(seq.tries <= config.tries, f'{seq}: tried too often')
    for event in self.past[-3:]:
      self.x.inert += 1
      need(step(config, state, event) == (state, ()), f'not inert: {event}')
    return World(state, tuple(map(tuple, self.kv)), tuple(self.fates),
                 tuple(self.out), tuple(self.copies), w.faults,
                 tuple(self.past[-3:]))

  def end(self, c):
    need(self.fates[c.id] == '', f'{c}: ended {self.fates[c.id]} before')
    _, most, eos = self.x.requests[c.id]
    reason = getattr(c, 'reason', '') if isinstance(c, base.Finish) else 'fail'
    self.fates[c.id] = reason
    if reason in ('stop', 'length'):
      want = eos or most
      need(self.out[c.id] == want, f'{c} after {self.out[c.id]} of {want}')

  def use(self, i, ids):
    free = self.w.state.instances[i].pool.free
    need(not any(free >> p & 1 for p in ids), f'pages {ids} are not owned')
    for c, _ in self.w.copies:
      need(c.target != i or not set(ids) & set(c.target_pages),
           f'pages {ids} are copied into')

  def read(self, i, id, ids, stop):
    size = self.x.config.instances[i].page_size
    for k in range(pages.pages_for(stop, size)):
      got, want = self.kv[i][ids[k]], min(size, stop - k * size)
      need(got and got[:2] == (id, k) and got[2] >= want,
           f'instance {i}: read {got} for {want} tokens of {(id, k)}')

  def write(self, i, id, ids, start, stop):
    size = self.x.config.instances[i].page_size
    for at in range(start, stop):
      self.kv[i][ids[at // size]] = (id, at // size, at % size + 1)

  def tell(self, id, position):
    """A token is told; True where the stream ends with it."""
    prompt, _, eos = self.x.requests[id]
    if self.fates[id] != '' or eos and self.out[id] >= eos:
      return False
    need(position == prompt + self.out[id],
         f'request {id}: token {position - prompt} after {self.out[id]}')
    self.out[id] += 1
    return self.out[id] == eos

  def rows(self, i, c, steps):
    ended = []
    for t in range(c.tick, c.tick + steps):
      for row in c.rows:
        self.use(i, row.pages)
        at = row.base + t
        self.write(i, row.id, row.pages, at, at + 1)
        self.read(i, row.id, row.pages, at + 1)
        if self.tell(row.id, at + 1):
          ended.append((row.id, t - c.tick))
    return tuple(ended)

  # --- moves ----------------------------------------------------------------

  def arrive(self, id):
    self.fates[id] = ''
    self.event = base.Arrived(0.0, id, *self.x.requests[id][:2])

  def run(self, i):
    c = self.w.state.instances[i].inflight[0][0]
    ended = []
    for chunk in getattr(c, 'chunks', ()):
      self.use(i, chunk.pages)
      self.read(i, chunk.id, chunk.pages, chunk.start)
      self.write(i, chunk.id, chunk.pages, chunk.start, chunk.stop)
      if chunk.last and self.tell(chunk.id, chunk.stop):
        ended.append(chunk.id)
    if isinstance(c, base.RunDecode):
      self.event = base.DecodeDone(0.0, i, c.number, (0.0,) * c.steps,
                                   self.rows(i, c, c.steps))
    else:
      ended += [id for id, _ in self.rows(i, c, 1)]
      self.event = base.PrefillDone(0.0, i, c.number, tuple(ended))
    self.past.append(self.event)

  def crash(self, i, steps, back=True):
    flying = [c for c, _ in self.w.state.instances[i].inflight]
    ended = self.rows(i, flying[0], steps) if steps else ()
    self.event = base.InstanceDown(0.0, i, (0.0,) * steps, ended, back)
    self.kv[i] = [None] * len(self.kv[i])
    self.copies = [p for p in self.copies if p[0].target != i]
    self.past += [(base.DecodeDone if isinstance(c, base.RunDecode)
                   else base.PrefillDone)(0.0, i, c.number) for c in flying]

  def gone(self, i, steps):
    self.crash(i, steps, False)

  def up(self, i):
    self.event = base.InstanceUp(0.0, i)

  def drain(self, i):
    self.event = base.Drain(0.0, i)

  def cancel(self, id):
    self.event = base.Cancelled(0.0, id)

  def copied(self, n):
    c, _ = self.copies.pop(n)
    self.read(c.source, c.id, c.source_pages, c.num_tokens)
    self.write(c.target, c.id, c.target_pages, 0, c.num_tokens)
    self.event = base.Migrated(0.0, c.id, c.epoch)
    self.past.append(self.event)

  def failed(self, n):
    c, _ = self.copies.pop(n)
    self.event = base.MigrateFailed(0.0, c.id, c.epoch)
    self.past += [self.event, base.Migrated(0.0, c.id, c.epoch)]

  def lease(self, n):
    c, _ = self.copies[n]
    self.event = base.Timer(0.0, c.id, c.epoch)
    self.past += [self.event, base.Migrated(0.0, c.id, c.epoch)]

  def lose(self, n):
    self.copies[n] = (self.copies[n][0], True)


def key(w):
  """A hash of a world, less what only counts up (numbers, ticks, epochs)."""
  instances = []
  for i in w.state.instances:
    ticks = [b.tick for b in i.batches]
    instances.append((
        i.pool.free, i.queue, i.prefilling, i.pulls, i.turn, i.status,
        tuple([(n - i.number, id) for n, id in i.ending]),
        tuple([(r[0], r[1] + b.tick, r[2] - b.tick, r[3])
               for b in i.batches for r in b.rows]),
        tuple([(g, getattr(c, 'steps', 0), getattr(c, 'chunks', 0),
                tuple([(r[0], r[1] + c.tick, r[3]) for r in c.rows]),
                c.tick - ticks[g]) for c, g in i.inflight])))
  seqs = tuple([(*s[:10], *s[11:]) for s in sorted(w.state.seqs.values())])
  return hash((tuple(instances), seqs, w.state.waiting, w.out, w.fates,
               w.faults, tuple([(c.id, lost) for c, lost in w.copies])))


def worlds(more=0):
  """{name: (Config, requests, faults)} of the small worlds."""
  def one(role, num_pages=4):
    return base.InstanceConfig(role, num_pages, 2, 2, 4, 2)

  def config(*roles):
    return scheduler.Config(tuple(map(one, roles)), 8, run_ahead=2, tries=1)

  two = ((2, 3, 0), (3, 4, 2))
  three = (*two, (1, 2, 0))
  return {
      '1P1D, 2 requests': (
          config('prefill', 'decode'), two, 3 + more),
      '1P1D, 3 requests': (
          config('prefill', 'decode'), three, 2 + more),
      '1P2D, 2 requests': (
          config('prefill', 'decode', 'decode'), two, 2 + more),
      '2P1D, 2 requests': (
          config('prefill', 'prefill', 'decode'), two, 2 + more),
      '2 colocated, 3 requests': (
          config('colocated', 'colocated'), three, 2 + more),
      '2 chunked, 3 requests': (
          config('chunked', 'chunked'), three, 2 + more),
  }


def main():
  seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
  more = int(sys.argv[2]) if len(sys.argv) > 2 else 0
  total = collections.Counter()
  for name, (config, requests, faults) in worlds(more).items():
    began, one = time.process_time(), Explorer(config, requests, faults)
    whole = one.run(seconds)
    total.update(moves=one.transitions, inert=one.inert)
    print(f'{name}: {one.transitions:,} transitions, {one.inert:,} stale '
          f'events inert, {"all" if whole else "cut short"}, '
          f'{time.process_time() - began:.1f} s of CPU', flush=True)
  print(dict(total))


if __name__ == '__main__':
  main()
