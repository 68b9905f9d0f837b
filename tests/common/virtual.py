"""Virtual instances: they perform a scheduler's commands and doubt each one.

`Engine` keeps, for every slot of every page, which request's which position
was written there. Instances run their commands one at a time in the order of
issue; a migration runs beside both of its instances, reads its source when it
completes and may write its target at any time until then. A command that
reads what is not there, or lands where another copy is landing, fails.

`World` runs the scheduler against an engine under a random schedule, and
checks what must hold after every event.
"""

import collections
import copy
import itertools
import random

from dsjax.config.engine import InstanceConfig
from dsjax.scheduling import page_pool, scheduler
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  DecodeDone,
  Finish,
  Migrate,
  Migrated,
  Preempt,
  PrefillDone,
  Reject,
  RunDecode,
  RunPrefill,
)


class Engine:
  """Performs commands on a model of the pages' contents."""

  def __init__(self, config):
    self.config = config
    self.slots = [{} for _ in config.instances]  # slot -> (id, life, position)
    self.landing = [set() for _ in config.instances]  # pages copied into
    self.known = {}  # tokens of a request: prompt and sampled
    self.life = collections.Counter()  # times its prefill began anew

  def begin(self, command):
    """The command was issued: a copy may read and write from now on."""
    if isinstance(command, Migrate):
      c = command
      self._read(c.source, c.id, c.source_pages, c.num_tokens)
      self._untouched(c.target, c.target_pages)
      self.landing[c.target].update(c.target_pages)

  def perform(self, command, time_s, ends):
    """Runs a command to its end; ends(id) says if a sampled token is EOS."""
    if isinstance(command, Migrate):
      return self._migrate(command, time_s)
    if isinstance(command, RunPrefill):
      return self._prefill(command, time_s, ends)
    return self._decode(command, time_s, ends)

  def _migrate(self, c, time_s):
    self._read(c.source, c.id, c.source_pages, c.num_tokens)
    self.landing[c.target].difference_update(c.target_pages)
    self._write(c.target, c.id, c.target_pages, 0, c.num_tokens)
    return Migrated(time_s, c.id, c.epoch)

  def _prefill(self, c, time_s, ends):
    ids = [part.id for part in c.chunks + c.rows]
    assert len(set(ids)) == len(ids), f'a request twice in {c}'
    ended = []
    for chunk in c.chunks:
      self.life[chunk.id] += chunk.start == 0
      self._read(c.instance, chunk.id, chunk.pages, chunk.start)
      self._write(c.instance, chunk.id, chunk.pages, chunk.start, chunk.stop)
      tokens = self.known[chunk.id]
      assert chunk.last == (chunk.stop == tokens), f'{chunk}: {tokens} tokens'
      self.known[chunk.id] += chunk.last
    for row in c.rows:
      self._tick(c.instance, row, c.tick)
    for part in c.chunks + c.rows:
      if getattr(part, 'last', True) and ends(part.id):
        ended.append(part.id)
    return PrefillDone(time_s, c.instance, c.number, tuple(ended))

  def _decode(self, c, time_s, ends):
    assert c.rows and c.steps > 0, f'nothing to do in {c}'
    ended = {}
    for step in range(c.steps):
      for row in c.rows:
        self._tick(c.instance, row, c.tick + step)
        if row.id not in ended and ends(row.id):
          ended[row.id] = step
    return DecodeDone(time_s, c.instance, c.number,
                      (time_s,) * c.steps, tuple(ended.items()))

  def _tick(self, instance, row, tick):
    position = row.base + tick
    assert tick < row.until, f'tick {tick} of {row}'
    assert position == self.known[row.id] - 1, (
        f'tick {tick} of {row}: {self.known[row.id]} tokens are known')
    self._write(instance, row.id, row.pages, position, position + 1)
    self._read(instance, row.id, row.pages, position + 1)
    self.known[row.id] += 1

  def _read(self, instance, id, pages, stop):
    self._untouched(instance, pages)
    for position in range(stop):
      found = self.slots[instance].get(self._slot(instance, pages, position))
      want = (id, self.life[id], position)
      assert found == want, f'instance {instance}: read {found}, not {want}'

  def _write(self, instance, id, pages, start, stop):
    self._untouched(instance, pages)
    for position in range(start, stop):
      slot = self._slot(instance, pages, position)
      self.slots[instance][slot] = (id, self.life[id], position)

  def _slot(self, instance, pages, position):
    page, offset = divmod(position, self.config.instances[instance].page_size)
    assert page < len(pages), f'no page for position {position} in {pages}'
    return pages[page], offset

  def _untouched(self, instance, pages):
    hit = self.landing[instance] & set(pages)
    assert not hit, f'instance {instance}: a copy is landing on {hit}'


class World:
  """A scheduler and an engine under a random schedule of `requests`.

  slow_copies: most migrations end when nothing else runs.

  Attributes:
    log: every (event, commands). counts: of command types and fates.
  """

  def __init__(self, config, seed, requests, slow_copies=False):
    self.config, self.left, self.slow_copies = config, requests, slow_copies
    self.random = random.Random(seed)
    self.rate = self.random.choice((0.2, 0.8))  # of arrivals
    self.most = self.random.choice(((16, 4), (16, 10), (4, 18)))  # tokens
    self.engine = Engine(config)
    self.state = scheduler.init(config)
    self.pending = {}  # what runs one at a time -> commands in order
    self.arrived = {}  # id -> max_tokens, while it lives
    self.emitted = collections.Counter()
    self.stopped, self.cancelled, self.copied = set(), set(), []
    self.log, self.counts = [], collections.Counter()
    self.passed = {}  # (id, other): commands of other since the last of id

  def run(self):
    """Runs until nothing is left to happen."""
    bound = 400 * (self.left + 1)
    while self.left or self.pending:
      self._feed(self._next())
      assert len(self.log) < bound, 'no progress'
    assert not self.arrived, f'never ended: {self.arrived}'
    assert scheduler.idle(self.state), self.state
    for c, inst in zip(self.config.instances, self.state.instances,
                       strict=True):
      assert inst.pool == page_pool.init(c.num_pages), 'pages leaked'
      assert not inst.ending and not inst.residents and not inst.backlog
    return self

  def _next(self):
    draw, time_s = self.random, float(len(self.log))
    if self.log and getattr(self.log[-1][0], 'more', False):
      return self._arrival(time_s)
    if self.engine.known and draw.random() < 0.04:
      id = draw.choice(list(self.arrived or self.engine.known))
      if draw.random() < 0.2:  # too late perhaps
        id = draw.choice(list(self.engine.known))
      if id in self.arrived:
        self.cancelled.add(id)
      return Cancelled(time_s, id)
    if self.copied and draw.random() < 0.04:  # said again, late
      return draw.choice(self.copied)
    if self.left and (not self.pending or draw.random() < self.rate):
      return self._arrival(time_s)
    keys = list(self.pending)
    if self.slow_copies and draw.random() < 0.9:
      keys = [k for k in keys if k[0] != 'migrate'] or keys
    key = draw.choice(keys)
    command = self.pending[key].pop(0)
    if not self.pending[key]:
      del self.pending[key]
    event = self.engine.perform(command, time_s, self._ends)
    if isinstance(command, Migrate):
      self.copied.append(event)
    return event

  def _arrival(self, time_s):
    self.left -= 1
    event = Arrived(
        time_s, self.left, *(self.random.randint(1, m) for m in self.most),
        more=self.left > 0 and self.random.random() < 0.2)
    self.engine.known[event.id] = event.prompt_len
    self.arrived[event.id] = event.max_tokens
    return event

  def _ends(self, id):
    """A token was sampled; the engine cannot know that nobody wants it."""
    eos = self.random.random() < 0.05
    if id in self.arrived and id not in self.stopped:
      self.emitted[id] += 1
      if eos:
        self.stopped.add(id)
    return eos

  def _feed(self, event):
    if self.random.random() < 0.1:
      self._pure(event)
    before = self.state
    self.state, commands = scheduler.step(self.config, before, event)
    self.log.append((event, commands))
    scheduler.check(self.state)
    self._turns(before, commands)
    for command in commands:
      self.counts[type(command).__name__] += 1
      if isinstance(command, Preempt):
        self.counts['before a younger copy'] += any(
            seq.stage == 'migrating' and seq.target == command.instance
            and seq.order > self.state.seqs[command.id].order
            for seq in before.seqs.values())
      if isinstance(command, Finish | Reject):
        self._over(command)
      elif not isinstance(command, Preempt):
        self._issue(command)
    for commands in self.pending.values():
      for command in commands:
        self._owns(command)
    if getattr(event, 'more', False):
      return  # nothing starts yet
    for inst in self.state.instances:
      assert inst.inflight or not (inst.rows or inst.prefilling), 'stalled'
      assert inst.residents or not (inst.queue or inst.pulls), 'stalled'
    assert not self.stopped & set(self.arrived), 'EOS without a Finish'

  def _turns(self, before, commands):
    """No row has a second turn while another row waits for its first."""
    for command in commands:
      if isinstance(command, Preempt):
        self.passed = {pair: n for pair, n in self.passed.items()
                       if command.id not in pair}
      elif getattr(command, 'rows', ()):
        now = {row.id for row in command.rows}
        decoding = [{r.id for r in s.instances[command.instance].rows}
                    for s in (before, self.state)]
        waiting = set.intersection(*decoding) - now
        self.passed = {(id, other): n for (id, other), n in self.passed.items()
                       if id not in now}
        for pair in itertools.product(waiting, now):
          self.passed[pair] = self.passed.get(pair, 0) + 1
          assert self.passed[pair] < 2, f'{pair[0]} waits: {command}'

  def _pure(self, event):
    before = copy.deepcopy(self.state)
    again = [scheduler.step(self.config, self.state, event) for _ in range(2)]
    assert again[0] == again[1] and self.state == before
    settled, _ = again[0]
    if getattr(event, 'more', False):
      return
    nothing = Migrated(event.time_s, -1, 0)  # nothing was left to start
    assert scheduler.step(self.config, settled, nothing) == (settled, ())

  def _over(self, command):
    reason, id = command.reason, command.id
    assert id in self.arrived, f'{command}: not alive'
    if isinstance(command, Finish):
      self.counts[reason] += 1
      assert (reason == 'stop') == (id in self.stopped), command
      assert (reason == 'cancelled') == (id in self.cancelled), command
      full = self.emitted[id] == self.arrived[id]
      assert full or reason != 'length', f'{command}: {self.emitted[id]}'
    del self.arrived[id]

  def _issue(self, command):
    self._within(command)
    if isinstance(command, Migrate):
      key = ('migrate', command.id)
      assert key not in self.pending, f'{command}: copied already'
    else:
      key = ('instance', command.instance)
    self.pending.setdefault(key, []).append(command)
    self.engine.begin(command)

  def _within(self, command):
    """The instance's configuration and depth bound what it is asked for."""
    if isinstance(command, Migrate):
      for index, ids in ((command.source, command.source_pages),
                         (command.target, command.target_pages)):
        size = self.config.instances[index].page_size
        want = page_pool.pages_for(command.num_tokens, size)
        assert len(ids) == want, command
      return
    c = self.config.instances[command.instance]
    before = self.pending.get(('instance', command.instance), [])
    depth = (max(self.config.prefill_depth, c.pp) if c.role == 'prefill'
             else self.config.depth * c.pp)
    assert len(before) < depth, 'too many in flight'
    assert len(command.rows) <= c.max_seqs
    for row in command.rows:
      assert sum(row.id in {r.id for r in b.rows}
                 for b in before) < self.config.depth, 'too far ahead'
    if isinstance(command, RunDecode):
      most = self.config.run_ahead if c.pp == 1 else 1
      assert c.role != 'prefill' and command.steps <= most
      return
    assert c.role != 'decode' and 0 < len(command.chunks) <= c.prefill_seqs
    tokens = sum(chunk.stop - chunk.start for chunk in command.chunks)
    assert tokens + len(command.rows) <= c.prefill_tokens, command
    assert c.role == 'chunked' or not command.rows

  def _owns(self, command):
    """What a command in flight touches belongs to its request until done."""
    seqs = self.state.seqs
    if isinstance(command, Migrate):
      seq, c = seqs[command.id], command
      assert seq.pages == c.source_pages and seq.instance == c.source
      assert seq.target_pages[:len(c.target_pages)] == c.target_pages
      return
    for part in getattr(command, 'chunks', ()) + command.rows:
      seq = seqs.get(part.id)
      assert (seq and seq.instance == command.instance
              and seq.pages[:len(part.pages)] == part.pages), (
                  f'{command} in flight uses pages that are not of {seq}')


def random_config(seed):
  """One to six small instances of one mode, each of its own sizes."""
  draw = random.Random(seed)
  mode = draw.choice(('prefill', 'prefill', 'colocated', 'chunked'))
  roles = [mode] * draw.choice((1, 2, 3))
  if mode == 'prefill':
    roles += ['decode'] * draw.choice((1, 2, 3))

  def instance(role):
    size = draw.choice((1, 2, 4))
    return InstanceConfig(
        role, -(-draw.choice((14, 20, 28)) // size), size,
        draw.choice((1, 2, 4) if role == 'chunked' else (1, 4, 8)),
        draw.choice((6, 16, 64)), draw.choice((1, 2, 4)),
        draw.choice((1, 2, 3)))

  return scheduler.Config(tuple(map(instance, roles)), max_len=24,
                          depth=draw.choice((1, 2, 3)),
                          prefill_depth=draw.choice((1, 1, 2)),
                          run_ahead=draw.choice((1, 2, 4)))
