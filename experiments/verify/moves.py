"""A move of a world: it happens, and every answer of the scheduler is doubted.

Rules (worlds.py) says which moves there are, and Rules.apply makes one.
"""


from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dsjax.scheduling import page_pool, scheduler
from dsjax.scheduling.events import (
  Abort,
  Arrived,
  Cancelled,
  Chunk,
  Command,
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
  Preempt,
  PrefillDone,
  Reject,
  RunDecode,
  RunPrefill,
  Tick,
  Timer,
)
from dsjax.scheduling.state import State
from experiments.verify.world import (
  DAMAGED,
  World,
  free_bits,
  kept_pages,
  mark_of,
  need,
)


class Moving:
  """One move of a world, in place."""

  def __init__(self, rules: Any, w: World) -> None:
    self.rules, self.w, self.time_s = rules, w, rules.time_s
    self.events, self.log, self.stopped = [], [], []
    self.kv, self.changed = list(w.kv), set()
    self.out, self.fates = list(w.out), list(w.fates)
    self.copies = list(w.copies)
    self.host, self.offloads = w.host, list(w.offloads)
    self.loads = list(w.loads)

  def done(self, faults: int) -> World:
    """Steps the scheduler, performs Abort and ends, doubts."""
    w, config = self.w, self.rules.config
    before = after = w.state
    marks = w.marks
    if self.events:
      run = scheduler.Run(config, before)
      run.hops = self.rules.hops
      for event in self.events:
        self.log.append((event, tuple(run.apply(event))))
      after = run.freeze()
      marks = tuple([m if a is b else mark_of(a) for a, b, m in zip(
          after.instances, before.instances, marks, strict=True)])
    self.numbers = [inst.number - 1 for inst in before.instances]
    for _, commands in self.log:
      self.issued = []
      for command in commands:
        if isinstance(command, RunPrefill | RunDecode):
          self.numbers[command.instance] = command.number
        doubt = _DOUBTS.get(type(command))
        if doubt:
          getattr(self, doubt)(command, after)
        self.issue(command)
    for id in self.stopped:
      need(self.fates[id], 'request {} goes on after its end', id)
    for i, inst in enumerate(after.instances):
      freed = free_bits(inst) & ~free_bits(before.instances[i])
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

  def issue(self, c: Command) -> None:
    """A command goes to its instances."""
    self.issued.append(c)

  def end(self, c: Finish | Fail | Reject, after: State) -> None:
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
    elif isinstance(c, Fail):
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
      need(isinstance(c, Reject) and c.refused or scheduler.never_fits(
          self.rules.config, *self.rules.requests[c.id][:2]),
           '{}: it fits', c)

  def started(self, c: Migrate, after: State) -> None:
    need(all([p.id != c.id or p.epoch == c.epoch and p.more
              and p.hit + p.num_tokens <= c.hit for p, *_ in self.copies]),
         '{}: two copies of one request', c)
    source, target = (self.rules.config.instances[i]
                      for i in (c.source, c.target))
    if c.kept:
      self.fetched(c, after)
    else:
      self.pulled(c, after)
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

  def fetched(self, c: Migrate, after: State) -> None:
    """What is kept, and not here, goes to pages that nothing else uses."""
    seq = after.seqs[c.id]
    kept = {page for _, page in kept_pages(after.instances[c.source])}
    size = self.rules.config.instances[c.target].page_size
    need(seq.instance == c.target != c.source and kept.issuperset(
        c.source_pages) and c.hit + c.num_tokens < seq.prompt_len
         and c.num_tokens % size == 0, '{}: is no fetch of {}', c, seq)
    self.read(c.target, c.id, seq.pages, c.hit)
    self.admitted(c, after)

  def aborted(self, c: Abort | Migrate, after: State | None) -> None:
    need(all([p.target == c.target for p, *_ in self.copies
              if (p.id, p.epoch) == (c.id, c.epoch)]), '{}: of another', c)
    self.copies = [p for p in self.copies
                   if (p[0].id, p[0].epoch) != (c.id, c.epoch)]

  def offload(self, c: Offload, after: State) -> None:
    """It reads full pages before what is issued later writes them."""
    used = {page for other in self.issued if isinstance(
        other, RunPrefill | RunDecode) and other.instance == c.instance
            for part in other.chunks + other.rows for page in part.pages}
    need(used.isdisjoint(c.pages), '{}: after what writes there', c)
    size = self.rules.config.instances[c.instance].page_size
    got = tuple([self.kv[c.instance][page] for page in c.pages])
    need(len(c.pages) == len(c.slots), '{}: other slots than pages', c)
    row = [p.id for p in self.issued[-1:] if type(p) is Preempt
           and p.cause == 'swap']
    for id in row:
      self.read(c.instance, id, c.pages, c.num_tokens)
      need(c.num_tokens == self.rules.requests[id][0] + self.out[id] - 1,
           '{}: not all of request {}', c, id)
    need(row or all([page and page[2] == size for page in got]),
         '{}: reads {}', c, got)
    self.offloads.append((c, got))

  def load(self, c: Load, after: State) -> None:
    """It writes pages that nothing else uses."""
    seq, size = after.seqs[c.id], self.rules.config.instances[
        c.instance].page_size
    first, count = c.hit // size, len(c.slots)
    known = self.rules.requests[c.id][0] + self.out[c.id]
    need(seq.instance == c.instance
         and count == page_pool.pages_for(c.num_tokens, size)
         and seq.pages[first:first + count] == c.pages
         and (c.hit + c.num_tokens == known - 1 if c.row else
              c.hit + c.num_tokens < seq.prompt_len
              and c.num_tokens % size == 0),
         '{}: other pages than those of {}', c, seq)
    self.read(c.instance, c.id, seq.pages, c.hit)
    if not c.row:
      self.admitted(c, after)
    self.loads.append(c)

  def admitted(self, c: RunPrefill | Migrate | Load, after: State) -> None:
    """First come, first served: no request of a prefill queue is passed."""
    self.waited(c, after)
    if self.rules.config.policy.order:
      return
    index = c.target if isinstance(c, Migrate) else c.instance
    before = self.w.state.instances[index].queue
    # Not of those that came since, perhaps after the command was issued.
    queue = [id for id in after.instances[index].queue if id in before]
    seqs = self.w.state.seqs  # one that loaded, well or not, was let in before
    waited = [id for id in after.seqs if id not in seqs
              or seqs[id].stage not in ('loading', 'prefilling')]
    if queue:
      first = after.seqs[queue[0]].order
      for part in c.chunks if isinstance(c, RunPrefill) else (c,):
        need(isinstance(part, Chunk) and part.start > part.hit
             or part.id not in waited or after.seqs[part.id].order < first,
             '{}: passes request {} by', c, queue[0])

  def waited(self, c: RunPrefill | Migrate | Load, after: State) -> None:
    """No row that waits in host memory is passed."""
    index = c.target if isinstance(c, Migrate) else c.instance
    known = [{id for id, *_ in host.swapped} if host else set()
             for host in (self.w.state.instances[index].host,
                          after.instances[index].host)]
    fresh = (self.w.state.seqs[part.id].stage == 'queued'
             for part in (c.chunks if isinstance(c, RunPrefill) else (c,))
             if part.id in self.w.state.seqs)
    need(not (known[0] & known[1] and (isinstance(c, Migrate) and not c.kept
                                       or any(fresh))),
         '{}: passes rows {} by', c, known[0])

  def pulled(self, c: Migrate, after: State) -> None:
    """No finished prefill that waits for this instance is passed."""
    self.waited(c, after)
    if self.rules.config.policy.order:
      return
    before = self.w.state.instances[c.target].pulls
    stay = after.instances[c.target].pulls
    for id in before:
      if id == c.id:
        break
      need(id not in stay, '{}: passes request {} by', c, id)

  # --- what commands do to pages and clients --------------------------------

  def pages_of(self, i: int) -> list[tuple | None]:
    if i not in self.changed:
      self.changed.add(i)
      self.kv[i] = list(self.kv[i])
    return self.kv[i]

  def read(self, i: int, id: int, ids: Sequence[int], stop: int,
           start: int = 0) -> None:
    """Tokens [start, stop) are read; `ids` begin with the page of start."""
    kv, size = self.kv[i], self.rules.config.instances[i].page_size
    for k, page in self.places(id, ids, start, stop, size):
      got, want = kv[page], min(size, stop - k * size)
      name = self.rules.page_of(id, k, size)
      need(got and got[:2] == name and got[2] >= want,
           'instance {}: read {} for {} tokens of {}', i, got, want, name)

  def write(self, i: int, id: int, ids: Sequence[int], start: int, stop: int,
            skipped: int = 0) -> None:
    """Tokens [start, stop) are written; `ids` begin with the page of
    `skipped`."""
    kv, size = self.pages_of(i), self.rules.config.instances[i].page_size
    kept = {page for _, page in kept_pages(self.w.state.instances[i])}
    for k, page in self.places(id, ids, skipped, stop, size):
      if k >= start // size:
        need(page not in kept, 'instance {}: page {}, which is kept, is '
             'written for {}', i, page, id)
        kv[page] = (*self.rules.page_of(id, k, size),
                    min(size, stop - k * size))

  def places(self, id: int, ids: Sequence[int], start: int, stop: int,
             size: int) -> Iterator[tuple[int, int]]:
    """(block, page) of tokens [start, stop) of a request."""
    first, after = start // size, page_pool.pages_for(stop, size)
    need(after - first <= len(ids), 'request {}: no page for {} in {}', id,
         stop, ids)
    return zip(range(first, after), ids, strict=False)

  def tell(self, id: int, position: int) -> bool:
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

  def work(self, i: int, c: RunPrefill | RunDecode, step: int
           ) -> list[tuple[int, int]]:
    """A step of a command at its instance: what it does to pages, and (id,
    tokens known with it) of each token that it samples."""
    sampled = []
    for chunk in c.chunks:
      known = self.rules.requests[chunk.id][0] + self.out[chunk.id]
      need(self.fates[chunk.id] or chunk.last == (chunk.stop == known),
           '{}: {} tokens are known', chunk, known)
      self.read(i, chunk.id, chunk.pages, chunk.start)
      self.write(i, chunk.id, chunk.pages, chunk.start, chunk.stop)
      if chunk.last:
        sampled.append((chunk.id, chunk.stop))
    t = c.tick + step
    for row in c.rows:
      need(t < row.until, 'tick {} of {}', t, row)
      position = row.base + t
      self.read(i, row.id, row.pages, position)
      self.write(i, row.id, row.pages, position, position + 1)
      sampled.append((row.id, position + 1))
    return sampled

  def tell_all(self, sampled: Iterable[tuple[int, int]], step: int
               ) -> tuple[tuple[int, int], ...]:
    """(id, step) of the streams that end with the tokens of a step."""
    return tuple([(id, step) for id, position in sampled
                  if self.tell(id, position)])

  def steps(self, i: int, c: RunPrefill | RunDecode, count: int
            ) -> tuple[tuple[int, int], ...]:
    """The first steps of a command: (id, step) of the streams that ended."""
    return sum([self.tell_all(self.work(i, c, step), step)
                for step in range(count)], ())

  # --- moves ----------------------------------------------------------------

  def arrive(self, id: int, more: bool = False) -> None:
    self.fates[id] = ''
    prompt_len, limit = self.rules.requests[id][:2]
    self.events.append(Arrived(self.time_s, id, prompt_len, limit, more,
                               self.rules.blocks(id, 0, prompt_len)))

  def burst(self, first: int, second: int) -> None:
    """Two arrive at once."""
    self.arrive(first, more=True)
    self.arrive(second)

  def run(self, i: int) -> None:
    command = self.w.state.instances[i].inflight[0][0]
    self.ran(i, command, self.steps(i, command, command.steps))

  def ran(self, i: int, command: RunPrefill | RunDecode,
          ended: tuple[tuple[int, int], ...]) -> None:
    """A command is done."""
    told, blocks = (self.time_s, i, command.number), self.generated(command)
    self.events.append(
        DecodeDone(*told, (self.time_s,) * command.steps, ended, blocks=blocks)
        if isinstance(command, RunDecode) else
        PrefillDone(*told, tuple([id for id, _ in ended]), blocks=blocks))

  def generated(self, command: RunPrefill | RunDecode
                ) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(id, blocks) of what those that end with a command have generated."""
    blocks = []
    for id in [part.id for part in command.chunks + command.rows]:
      prompt, most, eos, _ = self.rules.requests[id]
      more = self.rules.blocks(id, prompt, prompt + self.out[id] - 1)
      if more and self.out[id] == (eos or most) != self.w.out[id]:
        blocks.append((id, more))
    return tuple(blocks)

  def crash(self, i: int, steps: int, back: bool = True) -> None:
    flying = self.w.state.instances[i].inflight
    ended = self.steps(i, flying[0][0], steps) if steps else ()
    self.events.append(InstanceDown(
        self.time_s, i, (self.time_s,) * steps, ended, back))
    self.changed.add(i)
    self.kv[i] = [None] * len(self.kv[i])
    self.copies = [p for p in self.copies if p[0].target != i]
    self.host = {k: v for k, v in self.host.items() if k[0] != i}
    self.offloads = [p for p in self.offloads if p[0].instance != i]
    self.loads = [c for c in self.loads if c.instance != i]

  def gone(self, i: int) -> None:
    self.crash(i, 0, False)

  def up(self, i: int) -> None:
    self.events.append(InstanceUp(self.time_s, i))

  def drain(self, i: int) -> None:
    self.events.append(Drain(self.time_s, i))

  def tick(self) -> None:
    self.events.append(Tick(self.time_s))

  def cancel(self, id: int) -> None:
    self.stopped.append(id)
    self.events.append(Cancelled(self.time_s, id))

  def copy(self, id: int, part: int) -> int:
    """Which of the copies: a part is known by its first token."""
    return next(n for n, (c, *_) in enumerate(self.copies)
                if c.id == id and (c.hit if c.more else -1) == part)

  def copied(self, id: int, part: int = -1) -> None:
    c, *_ = self.copies.pop(self.copy(id, part))
    stop = c.hit + c.num_tokens
    self.read(c.source, id, c.source_pages, stop, c.hit)
    self.write(c.target, id, c.target_pages, c.hit, stop, c.hit)
    if not c.more:
      self.events.append(Migrated(self.time_s, id, c.epoch))

  def failed(self, id: int, part: int = -1, reason: str = 'the copy failed'
             ) -> None:
    """With it every part of its hand-off is given up."""
    c, *_ = self.copies[self.copy(id, part)]
    self.aborted(c, None)
    self.events.append(MigrateFailed(self.time_s, id, c.epoch, reason))

  def damaged(self, id: int, part: int = -1) -> None:
    """It arrived, and its checksum does not fit."""
    c, *_ = self.copies[self.copy(id, part)]
    kv = self.pages_of(c.target)
    for page in c.target_pages:
      kv[page] = DAMAGED
    self.failed(id, part, 'checksum')

  def offloaded(self, i: int, number: int, failed: bool = False) -> None:
    n, = [n for n, (command, _) in enumerate(self.offloads)
          if (command.instance, command.number) == (i, number)]
    command, got = self.offloads.pop(n)
    self.host = self.host | {
        (i, slot): None if failed else page
        for slot, page in zip(command.slots, got, strict=True)}
    self.events.append(Offloaded(self.time_s, i, number, failed))

  def offload_failed(self, i: int, number: int) -> None:
    self.offloaded(i, number, True)

  def loading(self, id: int) -> Load:
    n, = [n for n, c in enumerate(self.loads) if c.id == id]
    return self.loads.pop(n)

  def loaded(self, id: int) -> None:
    load = self.loading(id)
    size = self.rules.config.instances[load.instance].page_size
    kv, first = self.pages_of(load.instance), load.hit // size
    for n, (slot, page) in enumerate(zip(load.slots, load.pages, strict=True)):
      got, name = self.host.get((load.instance, slot)), self.rules.page_of(
          id, first + n, size)
      least = min(size, load.hit + load.num_tokens - (first + n) * size)
      need(got and got[:2] == name and got[2] >= least,
           '{}: loads {} for {}', load, got, name)
      kv[page] = got
    self.events.append(Loaded(self.time_s, id, load.epoch))

  def load_failed(self, id: int) -> None:
    load = self.loading(id)
    self.events.append(LoadFailed(self.time_s, id, load.epoch))

  def bad_load(self, id: int) -> None:
    """It is there, and its checksum does not fit."""
    load = self.loading(id)
    kv = self.pages_of(load.instance)
    for page in load.pages:
      kv[page] = DAMAGED
    read = {(other.instance, slot) for other in self.loads
            for slot in other.slots}
    self.host = self.host | {
        (load.instance, slot): DAMAGED for slot in load.slots
        if (load.instance, slot) not in read}
    self.events.append(LoadFailed(self.time_s, id, load.epoch, 'checksum'))

  def lease(self, id: int, part: int = -1) -> None:
    c, *_ = self.copies[self.copy(id, part)]
    self.events.append(Timer(self.time_s, id, c.epoch))

  def lose(self, id: int, part: int = -1) -> None:
    """It may write for ever, and will never answer."""
    n = self.copy(id, part)
    c, _, number = self.copies[n]
    self.copies[n] = c, True, number


_DOUBTS = {Migrate: 'started', Abort: 'aborted', Offload: 'offload',
           Load: 'load', RunPrefill: 'admitted', Finish: 'end', Fail: 'end',
           Reject: 'end'}
