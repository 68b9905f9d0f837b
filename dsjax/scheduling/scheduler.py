"""One scheduler, a pure transition: step(config, state, event).

The orchestrator feeds it real events and performs its commands; a simulator
feeds it virtual ones and performs nothing. It reads no clock, holds no
global, and its commands carry every page id, so a run replays from its
event log. What could be decided otherwise it asks of Config.policy
(choices.py). What it does itself is the mechanism: pages, epochs, stages,
what is in flight.

A request's life is a table in lifecycle.py: every change of its stage goes
through Run.move, which knows no other.

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
from collections.abc import Callable, Sequence
from typing import Any

from dsjax.scheduling import (
  batches,
  choices,
  copied,
  flexible,
  lifecycle,
  loading,
  lookahead,
  pace,
  recovery,
  residents,
  streaming,
  swapping,
)
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  Command,
  DecodeDone,
  Event,
  Finish,
  Migrated,
  MigrateFailed,
  Preempt,
  PrefillDone,
  Reject,
  RunDecode,
  RunPrefill,
  Tick,
  Timer,
)
from dsjax.scheduling.live import (
  LiveInstance,
  LiveSeq,
  fields_of,
)
from dsjax.scheduling.policy import Refuse, View
from dsjax.scheduling.recent import Recent
from dsjax.scheduling.state import (
  RUN_AHEAD,
  Batch,
  Config,
  ImpossibleEvent,
  Instance,
  Seq,
  State,
  check,
  idle,
  init,
  never_fits,
)

__all__ = ('RUN_AHEAD', 'Batch', 'Config', 'ImpossibleEvent', 'Instance',
           'Run', 'Seq', 'State', 'check', 'idle', 'init', 'never_fits',
           'step')


def step(config: Config, state: State, event: Event
         ) -> tuple[State, tuple[Command, ...]]:
  """Applies one event.

  Returns (state, commands). Cost: well under 100 us at 256 running and 1,000
  waiting requests.

  Raises:
    ImpossibleEvent: the event cannot happen in this state (an internal
      error). One of a hand-off or a command that is over, or of a request
      that is gone, changes nothing.
  """
  run = Run(config, state)
  commands = run.apply(event)
  return run.freeze(), tuple(commands)


class Run:
  """The transition on a state that changes in place.

  `step` is one apply on a copy. A simulator, which owns the state for long,
  copies it once. After the same events both have given the same commands and
  are in the same state.

  wake: called with the index of an instance that sleeps in a quiet run before
  it changes in a way that ends it; it calls follow. passed: called with the
  index as well; how many commands of the run were issued by now, or -1: it was
  taken further.
  hops: notes each hop (stage, cause, stage), where it is not None.
  ends_alone: whether requests may end in a quiet run: nothing but what waits
  for their pages is to learn of it at once.
  """

  def __init__(self, config: Config, state: State,
               wake: Callable[[int], object] = bool,
               passed: Callable[[int], int] | None = None):
    self.config, self.wake, self.passed = config, wake, passed
    self.seqs: dict[int, Any] = state.seqs
    self.is_shared = True  # seqs is a State's: copied before it changes
    self.arrivals = state.arrivals
    self.waiting = list(state.waiting)
    self.recent = Recent(state.arrived, state.ended)
    self.owned: set[int] = set()  # ids of those that may change in place
    self.instances = [LiveInstance(config, index, value)
                      for index, value in enumerate(state.instances)]
    self.entries = [i for i in self.instances if i.able.prefills]
    self.decoders = [i for i in self.instances if i.able.decodes]
    self.policy = config.policy
    self._view: View | None = None
    self.now: list[Any] = [0.0, [], [], [], []]  # see View
    self.asks_again = self.policy.says_not_yet
    self.ends_alone = True
    self.commands: list[Command] = []
    self.cause = ''
    self.hops: set[tuple[str, str, str]] | None = None
    self.roster()

  def roster(self) -> None:
    """Who takes work: those that are up, else those that are drained; in the
    view of them those whose role it is, if there are any."""
    entries = self.open_entries = _open(self.entries)
    decoders = self.open_decoders = _open(self.decoders)
    self.now[1:] = ([i for i in entries if i.prefills] or entries,
                    [i for i in decoders if i.decodes] or decoders,
                    entries, decoders)

  def apply(self, event: Event) -> list[Command]:
    """Applies one event; a list of commands. See step."""
    commands: list[Command] = []
    self.commands = commands
    self.cause, self.now[0] = type(event).__name__, event.time_s
    if self.asks_again:
      for inst in self.instances:
        if inst.queue or inst.prefilling or inst.pulls:
          inst.fresh = True
    _APPLY[type(event)](self, event)
    self.cause = 'plan'
    if type(event) is Migrated:
      for inst in self.instances:  # what it let start may be anywhere
        inst.fresh = not (event.more or inst.asleep)
    batches.plan(self)
    return commands

  def freeze(self) -> State:
    """The State now."""
    seqs = self.seqs
    for id in self.owned:
      seqs[id] = Seq._make(fields_of(seqs[id]))
    self.owned.clear()
    self.is_shared = True
    return State(seqs, tuple([i.freeze() for i in self.instances]),
                 self.arrivals, tuple(self.waiting),
                 self.recent.arrived, self.recent.ended)

  @property
  def view(self) -> View:
    """What the policy sees."""
    if self._view is None:
      self._view = View(self.instances, self.seqs, self.now, self.recent,
                        self.config.link)
    return self._view

  def own(self, id: int) -> LiveSeq:
    """A request, to be changed."""
    seq = self.seqs[id]
    if type(seq) is not LiveSeq:
      seq = self.own_seqs()[id] = LiveSeq(*seq)
      self.owned.add(id)
    return seq

  def own_seqs(self) -> dict[int, Any]:
    """The requests, to be changed."""
    if self.is_shared:
      self.seqs, self.is_shared, self._view = dict(self.seqs), False, None
    return self.seqs

  def move(self, seq: LiveSeq, stage: str) -> None:
    """Takes a request to another stage of its life, if it has that hop."""
    if stage not in lifecycle.HOPS.get((seq.stage, self.cause), ()):
      raise ImpossibleEvent(f'request {seq.id}: no hop from {seq.stage} to '
                            f'{stage} by {self.cause}')
    if self.hops is not None:
      self.hops.add((seq.stage, self.cause, stage))
    seq.stage = stage

  def touch(self, index: int) -> LiveInstance:
    """An instance, to be changed, and planned for the change."""
    inst = self.instances[index]
    if inst.asleep and self.passed:
      self.wake(index)
    inst.fresh, inst.value = True, None
    return inst

  def stir(self, index: int) -> LiveInstance:
    """The same, of one that pulls, or gets a row: it may sleep on."""
    inst = self.instances[index]
    if not inst.asleep or inst.able.prefills or inst.host:
      return self.touch(index)
    self.rouse((inst,))
    inst.fresh, inst.value = True, None
    if inst.asleep:
      inst.asleep.stirred = True
    return inst

  def rouse(self, instances: Sequence[LiveInstance]) -> None:
    """Those that sleep are shown as they are now: what they hold is asked."""
    for inst in instances:
      if inst.asleep and self.passed:
        count = self.passed(inst.index)
        if count < 0:
          self.wake(inst.index)
        else:
          inst.asleep.follow(self, count)

  # --- events ---------------------------------------------------------------

  def arrived(self, e: Arrived) -> None:
    if e.id in self.seqs:
      raise ImpossibleEvent(f'request {e.id} arrived twice')
    reason = never_fits(self.config, e.prompt_len, e.max_tokens)
    if reason:
      self.commands.append(Reject(e.id, reason))
    else:
      seq = self.own_seqs()[e.id] = LiveSeq(
          e.id, self.arrivals, e.prompt_len, e.prompt_len + e.max_tokens,
          'absent', -1, arrival_s=e.time_s, input_len=e.prompt_len,
          blocks=e.blocks)
      self.owned.add(e.id)
      self.recent.add_arrived(self.arrivals, e.time_s, e.prompt_len)
      self.arrivals += 1
      self.enqueue(seq)
    for inst in self.entries:  # the first of a burst may be at another one
      inst.fresh = not e.more

  def cancelled(self, e: Cancelled) -> None:
    seq = self.seqs.get(e.id)
    if seq is None or seq.stage in ('over', 'abandoned'):
      return
    self.commands.append(Finish(e.id, 'cancelled'))
    self.leave(self.own(e.id), 'over')

  def prefill_done(self, e: PrefillDone) -> None:
    inst, command = self.complete(e, RunPrefill, e.ended)
    if inst is None:
      return
    for chunk in command.chunks:
      if self.config.prefix_cache:
        residents.keep(inst, self.seqs[chunk.id], chunk.start, chunk.stop)
      seq = self.own(chunk.id)
      if not chunk.last:
        if seq.stage == 'prefilling' and chunk.stop == seq.stop:
          self.offer(seq)
        continue
      if seq.first_s is None:
        seq.first_s = e.time_s
      if seq.stage != 'prefilling':
        continue  # a row already, or over
      if chunk.id in e.ended or seq.prompt_len + 1 >= seq.limit:
        self.finish(seq, 'stop' if chunk.id in e.ended else 'length')
      elif seq.target_pages:
        streaming.rest(self, seq)
      else:
        self.offer(seq)
    for id in e.ended:
      if id in self.seqs:
        self.ended(id)
    self.settle(inst, e.number)

  def decode_done(self, e: DecodeDone) -> None:
    inst, _ = self.complete(e, RunDecode, [id for id, _ in e.ended])
    if inst is None:
      return
    for id, _ in e.ended:
      self.ended(id)
    self.settle(inst, e.number)

  def migrated(self, e: Migrated) -> None:
    seq = self.handed(e)
    if seq is None:
      return
    if not seq.target_pages:
      copied.go_on(self, seq, whole=True)
      return
    residents.free(self, seq)
    seq.instance, seq.pages = seq.target, seq.target_pages
    seq.target, seq.target_pages = -1, ()
    if seq.stage == 'abandoned':
      self.drop(seq)
      return
    inst = self.stir(seq.instance)
    if self.config.prefix_cache:
      residents.keep(inst, seq, 0, seq.done)
    batches.join(self, inst, seq)

  def handed(self, e: Migrated | MigrateFailed | Timer) -> LiveSeq | None:
    """The request whose hand-off this is about, or that borrows what another
    instance has kept; None where it is over."""
    seq = self.seqs.get(e.id)
    if seq is None or e.epoch < seq.epoch:
      return None
    if e.epoch > seq.epoch:
      raise ImpossibleEvent(f'{e}: its last hand-off is {seq.epoch}')
    if not seq.target_pages:
      entry = loading.entry_of(self, seq)
      if entry is None or entry.lender < 0:
        return None
    return self.own(e.id)

  # --- the ends of a life ---------------------------------------------------

  def complete(self, e: PrefillDone | DecodeDone,
               kind: type[RunPrefill] | type[RunDecode],
               ended: Sequence[int]) -> tuple[Any, Any]:
    """Takes the oldest command off the instance; it must be this one.

    ended: ids of those whose tokens, by this command, met their end.

    (None, None) for one that was told before, or lost with its instance.
    """
    if not 0 <= e.instance < len(self.instances):
      raise ImpossibleEvent(f'{e}: no such instance')
    inst = self.instances[e.instance]
    command: Any = None
    g = -1
    if inst.inflight:
      command, g = inst.inflight[0]
    if 0 <= e.number < (command.number if command else inst.number):
      return None, None
    if type(command) is not kind or command.number != e.number:
      raise ImpossibleEvent(f'{type(e).__name__} {e.number} of instance '
                            f'{e.instance}, which awaits '
                            f'{command or "nothing"}')
    if ended:
      recovery.samples(e, command, ended)
    if e.blocks:
      residents.learn(self, e, command)
    inst.fresh, inst.value = True, None
    inst.inflight.popleft()
    if inst.latency is not None and inst.config.pp == 1:
      if e.number % pace.EVERY == 0:
        inst.pace = pace.corrected(inst.pace, inst.latency, command,
                                   e.time_s - inst.since_s)
      inst.since_s = e.time_s
    if g >= 0:
      inst.batches[g].flying -= 1
    return inst, command

  def ended(self, id: int) -> None:
    """A token of a command that is done met EOS or a stop condition."""
    if self.seqs[id].stage != 'over':
      self.finish(self.own(id), 'stop')

  def finish(self, seq: LiveSeq, reason: str) -> None:
    row = (self.instances[seq.instance].home(seq.id) if
           seq.stage == 'decoding' else None)
    known = (row.rows[seq.id][1] + row.tick if row else seq.prompt_len)
    self.recent.add_ended(seq.order, known - seq.input_len + 1)
    self.commands.append(Finish(seq.id, reason))
    self.leave(seq, 'over')

  def leave(self, seq: LiveSeq, stage: str) -> None:
    """Takes a request out of whatever it is in, keeping unsafe pages.

    stage: over, yielding or leaving.
    """
    was = seq.stage
    if was in ('migrating', 'loading'):
      if was == 'loading':
        self.touch(seq.instance).backlog += seq.done - seq.stop
      self.move(seq, 'abandoned')
      return  # its pages are released when the copy has ended
    if seq.target_pages:
      streaming.end(self, seq)
    if was == 'prefilled':
      self.unpull(seq)
      self.drop(seq)
      return
    if seq.instance < 0:
      self.waiting.remove(seq.id)
      self.forget(seq)
      return
    inst = self.touch(seq.instance)
    if was in ('queued', 'prefilling'):
      inst.backlog += seq.done - seq.stop
    if was == 'swapped':
      swapping.give_up(self, seq)
      self.forget(seq)
      return
    if was == 'queued':
      inst.own_queue().remove(seq.id)
      self.forget(seq)
      return
    self.move(seq, stage)
    if was in lifecycle.ENDING:
      seq.target = -1  # of one that was leaving
      return  # in inst.ending already
    if was == 'decoding':
      batch = inst.home(seq.id)
      seq.done = batch.rows[seq.id][1] + batch.tick
      batch.remove(seq.id)
    elif seq.id in inst.prefilling:  # else its last chunk is in flight
      inst.prefilling.remove(seq.id)
    # Its pages are safe once all that is in flight is done.
    if inst.inflight:
      inst.ending.append((inst.number - 1, seq.id))
    else:
      self.conclude(seq)

  def unpull(self, seq: LiveSeq) -> None:
    """Takes a finished prefill from the instance that was to pull it."""
    if seq.target < 0:
      self.waiting.remove(seq.id)
    else:
      self.touch(seq.target).pulls.remove(seq.id)

  def settle(self, inst: LiveInstance, number: int) -> None:
    """Concludes what waited for command `number`."""
    ending = inst.ending
    if ending and ending[0][0] <= number:
      inst.ending = [e for e in ending if e[0] > number]
      for after, id in ending:
        if after <= number:
          self.conclude(self.own(id))

  def conclude(self, seq: LiveSeq) -> None:
    if seq.stage == 'yielding':
      if swapping.swap(self, self.instances[seq.instance], seq):
        return
      self.commands.append(Preempt(seq.id, seq.instance))
      residents.free(self, seq)
      seq.pages, seq.done = (), 0
      self.enqueue(seq)
      return
    if seq.stage == 'leaving':
      self.offer(seq, to=seq.target)
      return
    if seq.stage == 'finishing':
      self.recent.add_ended(seq.order, seq.limit - seq.input_len)
      self.commands.append(Finish(seq.id, 'length'))
    self.drop(seq)

  def drop(self, seq: LiveSeq) -> None:
    residents.free(self, seq)
    self.forget(seq)

  def forget(self, seq: LiveSeq) -> None:
    self.move(seq, 'absent')
    del self.own_seqs()[seq.id]
    self.owned.discard(seq.id)

  # --- places ----------------------------------------------------------------

  def enqueue(self, seq: LiveSeq) -> None:
    """Puts a request into the queue of an instance that prefills."""
    if not self.placeable(seq, self.open_entries, self.entries):
      return
    entry = choices.entry(self, seq) if self.open_entries else None
    if isinstance(entry, Refuse):
      self.turn_away(seq, entry.reason)
      return
    if seq.stage != 'queued':
      self.move(seq, 'queued')
    if entry is None:
      seq.instance = -1
      self.waiting.append(seq.id)
      return
    inst, seq.stop = entry
    self.touch(inst.index)
    inst.backlog += seq.stop
    # By arrival: a preempted request keeps its place.
    queue, seqs = inst.own_queue(), self.seqs
    if not queue or seqs[queue[-1]].order < seq.order:
      queue.append(seq.id)
    else:
      bisect.insort(queue, seq.id, key=lambda id: seqs[id].order)
    seq.instance = inst.index

  def turn_away(self, seq: LiveSeq, reason: str) -> None:
    """The policy refuses a request that arrives, or waits for a place."""
    if seq.stage != 'absent':
      recovery.fail(self, seq, reason, refused=True)
      return
    self.commands.append(Reject(seq.id, reason, True))
    self.forget(seq)

  def offer(self, seq: LiveSeq, but: int = -1, to: int = -1) -> None:
    """Its KV is there, of all of its prompt or of a part: an instance that
    goes on with it will pull it, or it goes on where it is.

    but: one that has just failed at it, or -1. to: where it is wanted, or -1.
    """
    target: LiveInstance | None
    if seq.done < seq.prompt_len:
      entry = choices.entry(self, seq)
      if isinstance(entry, Refuse):
        self.turn_away(seq, entry.reason)
        return
      target, seq.stop = entry
    else:
      if not self.placeable(seq, self.open_decoders, self.decoders):
        return
      target = (next((i for i in self.open_decoders if i.index == to), None)
                if to >= 0 else None)
    if seq.stage != 'prefilled':
      self.move(seq, 'prefilled')
    if target is None and not self.open_decoders:
      seq.target = -1
      self.waiting.append(seq.id)
      return
    target = target or choices.decoder(self, seq, but)
    if target.index == seq.instance:
      self.touch(target.index)
      seq.target = -1
      batches.join(self, target, seq)
    else:
      self.stir(target.index).pulls.append(seq.id)
      seq.target = target.index

  def placeable(self, seq: LiveSeq, up: Sequence[LiveInstance],
                kind: Sequence[LiveInstance]) -> bool:
    """An instance of the kind is up or may be again; fails it otherwise."""
    if up or any([i.status != 'gone' for i in kind]):
      return True
    recovery.fail(self, seq, f'no {kind[0].config.role} instance is left')
    return False

  # --- quiet runs: see lookahead.py -----------------------------------------

  def quiet(self, index: int) -> lookahead.Ahead | None:
    """The decode commands that will follow those in flight, or None."""
    return lookahead.ahead(self, index)

  def follow(self, index: int, told: lookahead.Ahead, count: int) -> None:
    """Ends a quiet run in which `count` of its commands were issued."""
    lookahead.follow(self, index, told, count)


_APPLY: dict[type, Callable[..., None]] = {
    Arrived: Run.arrived,
    Cancelled: Run.cancelled,
    PrefillDone: Run.prefill_done,
    DecodeDone: Run.decode_done,
    Migrated: Run.migrated,
    Tick: flexible.tick,
    **recovery.APPLY,
    **copied.APPLY,
}


def _open(kind):
  return ([i for i in kind if i.status == 'up']
          or [i for i in kind if i.status == 'draining'])
