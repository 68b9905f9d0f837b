"""Records of requests from the events and commands of a run."""

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.scheduling.events import (
  Abort,
  Arrived,
  Cancelled,
  Command,
  Decided,
  DecodeDone,
  Drain,
  Event,
  Fail,
  Finish,
  Flip,
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
  Row,
  RunDecode,
  RunPrefill,
  Tick,
  Timer,
)

CHAIN = 4096  # a chain that remembers more steps tells them to the records


class _Chain:
  """The steps of a decode micro-batch: its rows share their token times.

  times: of the steps that completed, without the first `shed` ones. issued:
  steps issued so far. lives: of the newest command's rows. Requests join at
  the end and leave anywhere.
  """

  __slots__ = ('times', 'shed', 'issued', 'lives')

  def __init__(self) -> None:
    self.times: list[float] = []
    self.lives: list[_Life] = []
    self.shed = self.issued = 0


class _Life:
  """A request between two preemptions; in-flight commands refer to lives, so
  what completes after a preemption belongs to the old life and is dropped.

  Its decode tokens are the steps [first, last) of its chain; last is None
  while it is a row. They reach the record when the life closes.
  """

  __slots__ = ('record', 'stage', 'since_s', 'after_prefill', 'after_copy',
               'open', 'epoch', 'chain', 'first', 'last', 'load')

  def __init__(self, record: Record, since_s: float) -> None:
    self.record = record
    self.stage: Any = 'prefill_queue'
    self.since_s = since_s
    self.after_prefill = self.after_copy = 'decode_queue'
    self.open = True  # takes tokens
    self.epoch: int | None = None
    self.chain: _Chain | None = None
    self.first = 0
    self.last: int | None = None
    self.load: Any = None  # the Load, or the fetch, that it waits for

  def is_in(self, chain: _Chain) -> bool:
    """Whether it is a row of the chain."""
    return self.chain is chain and self.last is None

  def tell(self, stop: int | None = None) -> None:
    """Moves the tokens of completed steps, those before `stop`, over."""
    if self.chain is not None and self.open:
      last, shed = self.last if stop is None else stop, self.chain.shed
      more = self.chain.times[self.first - shed:
                              None if last is None else last - shed]
      self.record.token_s += more
      self.first += len(more)

  def close(self, stop: int | None = None) -> None:
    """Takes no more tokens."""
    self.tell(stop)
    self.open = False


# (id, stage, start_s, stop_s), called as each stage of a request ends.
OnSpan = Callable[[int, str, float, float], object]


class Recorder:
  """Folds a run's events and commands into Records.

  The same for real and simulated runs: pass every event with the commands
  that the scheduler answered it with, in order. A stage begins when the
  command that opens it is issued. The token at which a request ends counts;
  what later steps of the same or of in-flight commands produce for it does
  not. Cost: of a decode step none a row; of a row that leaves, one a row.
  It keeps commands in flight itself (pairing.Pairing does it for others),
  since `leapt` folds completions and commands that were never made.

  on_end: called with each record as it ends; then it is not kept here.
  """

  def __init__(self, on_span: OnSpan | None = None,
               on_end: Callable[[Record], object] | None = None) -> None:
    self._on_span, self._on_end = on_span, on_end
    self._records: dict[int, Record] = {}
    self._live: dict[int, _Life] = {}
    self._pending: dict[int, collections.deque] = (
        collections.defaultdict(collections.deque))
    # Number of each instance's newest command.
    self._newest: dict[int, int] = {}

  @property
  def records(self) -> list[Record]:
    """Records in order of arrival, of running requests too."""
    for life in self._live.values():
      life.tell()
    return list(self._records.values())

  def forget(self, id: int) -> Record:
    """Drops the record of a request that has ended, and returns it."""
    return self._records.pop(id)

  def observe(self, event: Event, commands: Iterable[Command]) -> None:
    """Folds one event and the commands issued in answer to it.

    Raises:
      KeyError, IndexError: a command or completion of something never seen.
      InputError: an id that arrived before.
    """
    _SEEN[type(event)](self, event)
    for command in commands:
      _SEEN[type(command)](self, command, event.time_s)

  def leapt(self, instance: int, done: Sequence[Sequence[float]],
            turns: Iterable[tuple[Sequence[Row], int, float]],
            left: Iterable[tuple[int, int, int]] = (),
            ended: Iterable[tuple[int, float]] = (),
            joined: Iterable[tuple[int, int, int, float]] = ()) -> None:
    """Folds decode completions that were each answered by a decode command.

    done: seconds of the steps of each. turns: of each micro-batch in turn, the
    rows of its first command, the steps of all of its commands, and when the
    first was issued. left: (turn, id, steps issued after that) of each row
    that left. ended: (id, seconds) of requests that had their last token.
    joined: (turn, id, steps issued from its first command on, when that was
    issued) of each row that joined later.
    """
    pending = self._pending[instance]
    chains = [self._rows(instance, rows, now_s, steps)
              for rows, steps, now_s in turns]
    for _, chain, _ in pending:
      self._shed(chain)
    count, flight, turn_count = len(done), len(pending), len(chains)
    for steps_s in done[:flight]:
      pending.popleft()[1].times.extend(steps_s)
    for place, chain in enumerate(chains):  # of those that were never in flight
      chain.times.extend(itertools.chain.from_iterable(
          done[flight + place::turn_count]))
    pending.extend([((), chains[n % turn_count], 0)
                    for n in range(max(count - flight, 0), count)])
    self._newest[instance] += count
    for turn, id, after, now_s in joined:
      chain, life = chains[turn], self._live[id]
      self._join(life, instance, chain, now_s, after)
      chain.lives.append(life)
    for turn, id, after in left:
      chain, life = chains[turn], self._live[id]
      life.last = chain.issued - after
      chain.lives.remove(life)
    for id, now_s in ended:
      self._end(id, 'length', now_s)

  # --- events ---------------------------------------------------------------

  def _arrived(self, event: Arrived) -> None:
    require(event.id not in self._records, 'Arrived.id', event.id,
            'an id not seen before')
    record = Record(event.id, event.time_s, event.prompt_len,
                    event.max_tokens)
    self._records[event.id] = record
    self._live[event.id] = _Life(record, event.time_s)

  def _cancelled(self, event):
    if event.id in self._live:
      self._live[event.id].close()

  def _migrated(self, event: Migrated) -> None:
    life = self._live.get(event.id)
    if life and life.load:
      self._loaded(event)
    elif life and life.stage == 'migrate' and life.epoch == event.epoch:
      self._enter(life, life.after_copy, event.time_s)

  def _loaded(self, event, now_s=None):
    del now_s
    life = self._live.get(event.id)
    if life and life.load and life.load.epoch == event.epoch:
      more = (0 if isinstance(event, LoadFailed | MigrateFailed | Timer | Abort)
              else life.load.num_tokens)
      if not life.record.token_s:
        life.record.cached_tokens += life.load.hit + more
        if isinstance(life.load, Load):
          life.record.loaded_tokens += more
        else:
          life.record.fetched_tokens += more
      life.load = None

  def _prefill_done(self, event: PrefillDone) -> None:
    if self._over(event):
      return
    lasts, chain, _ = self._pending[event.instance].popleft()
    for life in lasts:
      if life.open:
        life.record.token_s.append(event.time_s)
        self._enter(life, life.after_prefill, event.time_s)
    if chain is not None:
      self._shed(chain)
      chain.times.append(event.time_s)
    for id in event.ended:
      life = self._live.get(id)
      if life is not None and (life in lasts or chain is not None
                               and life.chain is chain):
        life.close()

  def _decode_done(self, event: DecodeDone) -> None:
    if self._over(event):
      return
    _, chain, steps = self._pending[event.instance].popleft()
    self._told(chain, event.steps_s or (event.time_s,) * steps, event.ended)

  def _told(self, chain: _Chain, steps_s: Sequence[float],
            ended: Sequence[tuple[int, int]]) -> None:
    """Steps of a chain completed; some requests ended at one of them."""
    self._shed(chain)
    before = chain.shed + len(chain.times)
    chain.times.extend(steps_s)
    for id, step in ended:
      life = self._live.get(id)
      if life is not None and life.chain is chain:
        life.close(before + step + 1)

  def _shed(self, chain: _Chain) -> None:
    """Tells a long chain's times to the records, before more steps complete:
    one that never ends would grow for ever."""
    if len(chain.times) > CHAIN:
      for life in self._live.values():
        if life.chain is chain:
          life.tell()
      chain.shed += len(chain.times)
      chain.times.clear()

  def _over(self, event: PrefillDone | DecodeDone) -> bool:
    """A completion told before, or of a command lost with its instance."""
    pending = self._pending[event.instance]
    newest = self._newest.get(event.instance)
    return newest is not None and event.number <= newest - len(pending)

  def _instance_down(self, event):
    """What was in flight will not complete, but for the steps told."""
    pending = self._pending[event.instance]
    if pending and event.steps_s:
      self._told(pending[0][1], event.steps_s, event.ended)
    pending.clear()

  def _nothing(self, *_):
    """No request's life changes by it; a command that follows may tell."""

  # --- commands -------------------------------------------------------------

  def _decode(self, command: RunDecode, now_s: float) -> None:
    self._newest[command.instance] = command.number
    self._pending[command.instance].append((
        (), self._rows(command.instance, command.rows, now_s, command.steps),
         command.steps))

  def _prefill(self, command: RunPrefill, now_s: float) -> None:
    self._newest[command.instance] = command.number
    lasts = []
    for chunk in command.chunks:
      life = self._live[chunk.id]
      self._use(life, command.instance)
      if life.stage != 'prefill':
        self._enter(life, 'prefill', now_s)
      if not life.record.token_s:
        life.record.cached_tokens += chunk.hit
      if chunk.last:
        lasts.append(life)
    chain = self._rows(command.instance, command.rows, now_s, 1
                       ) if command.rows else None
    self._pending[command.instance].append((lasts, chain, 1))

  def _migrate(self, command: Migrate, now_s: float) -> None:
    life = self._live[command.id]
    if command.kept:
      life.record.migrated_tokens += command.num_tokens
      self._use(life, command.target)
      life.load = command
      return
    if command.more:  # while its prompt is prefilled
      life.record.migrated_tokens += command.num_tokens
      return
    life.record.retries += life.stage == 'migrate'
    if life.chain is not None:  # a row that moves
      life = self._again(life)
    if life.stage != 'migrate':  # a part of a prompt, or all of it
      life.after_copy = ('prefill_queue' if life.stage == 'prefill'
                         else 'decode_queue')
    life.epoch = command.epoch
    life.record.migrated_tokens += command.num_tokens
    self._use(life, command.target)
    self._enter(life, 'migrate', now_s)

  def _decided(self, command, now_s):
    del now_s
    record = self._live[command.id].record
    record.reasons += (
        f'{command.hook} {command.instance}: {command.reason}',)

  def _load(self, command, now_s):
    del now_s
    self._use(self._live[command.id], command.instance)
    self._live[command.id].load = command

  def _preempt(self, command, now_s):
    old = self._live[command.id]
    self._enter(old, 'decode_queue' if command.cause == 'swap'
                else 'prefill_queue', now_s)
    if not old.record.token_s:
      old.record.cached_tokens = 0
      old.record.loaded_tokens = old.record.fetched_tokens = 0
    if command.cause == 'fault':
      old.record.retries += 1
    else:
      old.record.preemptions += 1
    self._again(old)

  def _again(self, old: _Life) -> _Life:
    """A request has left its chain: another life of it begins."""
    self._live[old.record.id] = new = _Life(old.record, old.since_s)
    new.open, new.stage = old.open, old.stage
    old.close()
    return new

  def _finish(self, command: Finish, now_s: float) -> None:
    self._end(command.id, command.reason, now_s)

  def _reject(self, command, now_s):
    status = 'refused' if command.refused else 'rejected'
    self._end(command.id, status, now_s, command.reason)

  def _fail(self, command, now_s):
    self._end(command.id, 'failed', now_s, command.reason)

  def _rows(self, instance: int, rows: Sequence[Row], now_s: float,
            steps: int) -> _Chain:
    """The chain that a command continues, with those who join and leave it."""
    live = self._live
    chain = live[rows[0].id].chain or _Chain()
    lives, known = chain.lives, len(rows)
    while known and not live[rows[known - 1].id].is_in(chain):
      known -= 1
    if known < len(lives):
      ids = {row.id for row in rows}
      for life in lives:
        if life.record.id not in ids or live[life.record.id] is not life:
          life.last = chain.issued
      lives = [life for life in lives if life.last is None]
    if known < len(rows):
      fresh = [live[row.id] for row in rows[known:]]
      # One that had left, to move, and stayed after all begins another life.
      fresh = [life if life.chain is None else self._again(life)
               for life in fresh]
      for life in fresh:
        self._join(life, instance, chain, now_s)
      lives = lives + fresh
    chain.lives = lives
    chain.issued += steps
    return chain

  def _join(self, life: _Life, instance: int, chain: _Chain, now_s: float,
            after: int = 0) -> None:
    life.chain, life.first = chain, chain.issued - after
    self._use(life, instance)
    if life.stage == 'prefill':
      # Issued behind the prefill that is still in flight.
      life.after_prefill = 'decode'
    else:
      self._enter(life, 'decode', now_s)

  def _use(self, life: _Life, instance: int) -> None:
    if instance not in life.record.instances:
      life.record.instances += (instance,)

  def _enter(self, life: _Life, stage: Any, now_s: float) -> None:
    life.record.stage_s[life.stage] += now_s - life.since_s
    if self._on_span:
      self._on_span(life.record.id, life.stage, life.since_s, now_s)
    life.stage, life.since_s = stage, now_s

  def _end(self, id: int, status: Any, now_s: float,
           reason: str = '') -> None:
    life = self._live.pop(id)
    life.close()
    life.chain = None  # which may still have it: a cycle would wait for gc
    self._enter(life, None, now_s)
    life.record.status, life.record.reason = status, reason
    life.record.finish_s = now_s
    if self._on_end:
      self._on_end(self._records.pop(id))


_SEEN: dict[type, Callable[..., None]] = {
    Arrived: Recorder._arrived, Cancelled: Recorder._cancelled,
    Migrated: Recorder._migrated, PrefillDone: Recorder._prefill_done,
    DecodeDone: Recorder._decode_done, RunDecode: Recorder._decode,
    RunPrefill: Recorder._prefill, Migrate: Recorder._migrate,
    Preempt: Recorder._preempt, Finish: Recorder._finish,
    Reject: Recorder._reject, Fail: Recorder._fail,
    InstanceDown: Recorder._instance_down, InstanceUp: Recorder._nothing,
    Drain: Recorder._nothing, MigrateFailed: Recorder._loaded,
    Timer: Recorder._loaded, Abort: Recorder._loaded,
    Tick: Recorder._nothing, Flip: Recorder._nothing,
    Decided: Recorder._decided,
    Offload: Recorder._nothing, Offloaded: Recorder._nothing,
    Load: Recorder._load, Loaded: Recorder._loaded,
    LoadFailed: Recorder._loaded,
}
