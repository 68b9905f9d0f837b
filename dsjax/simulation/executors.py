"""What performs commands in virtual time: `Alone` and `Shared`.

Both have `perform(commands, now_s)`, which issues steps and copies, and
`next()`, the event that ends the earliest of these, or an arrival; None at the
end of the run. Under `Alone` every instance has devices of its own, so the end
of a step is known when it is issued. Under `Shared` instances slow each other
(contention.py): an end is known only as the others' steps are.

An event waits on a heap as (time_s, kind, index or id, number, value); of one
moment the least kind comes first.

Leaping. Most completions of a decode command change nothing but counters:
the next command has the same rows. scheduler.Run.quiet tells such commands in
advance, until something is to be decided: pages run short, or a request ends
and others wait for its pages. `Alone` gives them their times, in closed form
within a command, and when something else happens to the instance, or at the
end, tells the scheduler and the recorder at once how many of them there were
and who ended. Every command is the one that step would have issued, with its
boundaries, so leaping changes no time (an arrival in the middle of a command
waits for its end here as there).
"""

import bisect
import collections
import heapq
import itertools
import operator
from collections.abc import Iterable, Sequence

from dsjax.analysis.recorder import Recorder
from dsjax.config.engine import InstanceConfig
from dsjax.scheduling import events, scheduler
from dsjax.scheduling.events import (
  DecodeDone,
  Finish,
  Load,
  Loaded,
  Migrate,
  Migrated,
  Offload,
  Offloaded,
  PrefillDone,
  RunDecode,
  RunPrefill,
)
from dsjax.scheduling.live import LiveInstance
from dsjax.scheduling.lookahead import Ahead
from dsjax.simulation import latency
from dsjax.simulation.contention import Contention, Devices
from dsjax.simulation.instance import VirtualInstance, work

# Order of events of one moment; SENT is none: a part of a hand-off may go.
TICK, ARRIVED, MIGRATED, COPIED, SENT, STEP = range(6)
_NEVER, _LAST = (float('inf'),), operator.itemgetter(-1)
# Where nothing migrates.
NO_LINK = latency.Link(base_s=0.0, bytes_per_s=1.0, kv_bytes=1.0)


def _done(index: int, number: int, times: Sequence[float],
          decode: bool) -> events.Event:
  """The event of a command that is done."""
  if decode:
    return DecodeDone(times[-1], index, number, tuple(times))
  return PrefillDone(times[-1], index, number)


class Copies:
  """Migrations, each behind what shares its link; loads from host memory and
  offloads to it, each behind those of its instance in the same direction.

  link_s: seconds that links between instances were taken, summed.
  """

  def __init__(self, link: latency.LinkLike | None, share: str,
               heap: list[tuple],
               host_link: latency.LinkLike | None = None) -> None:
    self.link = NO_LINK if link is None else link
    self.host_link = NO_LINK if host_link is None else host_link
    self.share, self.heap = share, heap
    self.free_s: dict[tuple, float] = {}
    self.link_s = 0.0

  def send(self, command: Migrate, ready_s: float) -> None:
    """Moves pages that are read by `ready_s`."""
    source, target = command.source, command.target
    keys = (((source, target),) if self.share == 'pair'
            else (('from', source), ('to', target)))
    for key in keys:
      free_s = self.free_s.get(key, 0.0)
      if free_s > ready_s:
        ready_s = free_s
    done_s = ready_s + self.link.migrate_s(command.num_tokens)
    for key in keys:
      self.free_s[key] = done_s
    self.link_s += done_s - ready_s
    if not command.more:
      heapq.heappush(self.heap, (
          done_s, MIGRATED, command.id, command.epoch,
          Migrated(done_s, command.id, command.epoch)))

  def to_host(self, command: Offload | Load, ready_s: float) -> None:
    """Copies pages between an instance and its host."""
    loads = type(command) is Load
    key = ('load' if loads else 'offload', command.instance)
    done_s = max(ready_s, self.free_s.get(key, 0.0)) + (
        self.host_link.migrate_s(command.num_tokens))
    self.free_s[key] = done_s
    id, number = ((command.id, command.epoch) if isinstance(command, Load)
                  else (command.instance, command.number))
    event = (Loaded if loads else Offloaded)(done_s, id, number)
    heapq.heappush(self.heap, (done_s, COPIED, (key, id), number, event))

  def told(self, top: tuple) -> events.Event:
    """The event of what was the heap's top; of a hand-off, whether another of
    the same moment follows."""
    if top[1] == MIGRATED and self.heap and self.heap[0][:2] == top[:2]:
      return top[4]._replace(more=True)
    return top[4]


class Shared:
  """Performs commands on instances that share cores: see contention.py."""

  leapt = 0  # completions that no event told

  def __init__(self, latencies: Sequence[latency.Latency], copies: Copies,
               contention: Contention) -> None:
    self.latencies, self.copies = latencies, copies
    self.devices = Devices(contention, len(latencies))

  @property
  def busy_s(self) -> tuple[float, ...]:
    """Seconds that each instance was at work."""
    return tuple(self.devices.busy_s)

  def perform(self, commands: Iterable[events.Command],
              now_s: float) -> None:
    """Puts steps and reads of pages behind what their instance has to do."""
    for command in commands:
      if isinstance(command, RunDecode | RunPrefill):
        seconds = self.latencies[command.instance]
        base_s, step_s = self.devices.contention.command_s
        self.devices.share(command.instance, base_s + step_s * (
            command.steps if isinstance(command, RunDecode) else 1))
        self.devices.add(command.instance, command, *work(seconds, command),
                         now_s + seconds.host_s)
      elif isinstance(command, Migrate):
        ready_s = now_s + self.latencies[command.source].host_s
        if self.copies.link.beside and not command.more:
          self._send(command, ready_s)
        else:
          self.devices.add(command.source, command, None, [0.0], ready_s)
      elif isinstance(command, Offload | Load):
        self.copies.to_host(
            command, now_s + self.latencies[command.instance].host_s)

  def next(self) -> events.Event | None:
    """The next event; None at the end of the run."""
    heap = self.copies.heap
    while True:
      ended = self.devices.until(heap[0][0] if heap else float('inf'))
      if ended is None:
        return self.copies.told(heapq.heappop(heap)) if heap else None
      index, command, times = ended
      if type(command) is not Migrate:
        return _done(index, command.number, times,
                     type(command) is RunDecode)
      self._send(command, times[-1])

  def _send(self, command: Migrate, ready_s: float) -> None:
    """Sends pages that are read by `ready_s`, by threads that share cores."""
    contention = self.devices.contention
    for index, (base_s, token_s) in (
        (command.source, contention.read_s),
        (command.target, contention.write_s)):
      ready_s += self.devices.share(
          index, base_s + token_s * command.num_tokens)
    self.copies.send(command, ready_s)


class Alone:
  """Performs commands on instances with devices of their own.

  busy_s: seconds of each instance's stages at work, summed over stages.
  leapt: decode completions that no event told.
  """

  def __init__(self, configs: Sequence[InstanceConfig],
               latencies: Sequence[latency.Latency], copies: Copies,
               closed_form: bool) -> None:
    self.instances = [VirtualInstance(seconds, config.pp) for seconds, config in
                      zip(latencies, configs, strict=True)]
    self.pipelined = [i for i in self.instances if i.is_pipelined]
    self.copies, self.heap = copies, copies.heap
    self.closed_form, self.leapt = closed_form, 0
    self.decoding: list[int] = []  # instances that may begin a quiet run
    self.quiet: dict[int, _QuietRun] = {}  # those in one
    self.loose: list[int] = []  # of these, the ones off the heap

  def leap(self, run: scheduler.Run, recorder: Recorder) -> None:
    """Leaps over completions from now on, and tells these two of them."""
    self.run, self.recorder = run, recorder
    run.wake, run.passed = self.wake, self.passed
    self.decoding = [index for index, config in enumerate(run.config.instances)
                     if config.decodes]

  @property
  def busy_s(self) -> tuple[float, ...]:
    return tuple([instance.busy_s for instance in self.instances])

  def perform(self, commands: Iterable[events.Command],
              now_s: float) -> None:
    """Gives steps and copies their times."""
    for command in commands:
      if type(command) is RunDecode or type(command) is RunPrefill:
        self.issue(command, now_s)
      elif type(command) is Migrate:
        source = self.instances[command.source]
        ready_s = now_s + source.host_s
        if command.more:  # once its chunk is done
          heapq.heappush(self.heap, (max(ready_s, *source.free_s), SENT,
                                     command.id, command.epoch, command))
          continue
        self.copies.send(command, ready_s if self.copies.link.beside
                         else max(ready_s, *source.free_s))
      elif type(command) is Load or type(command) is Offload:
        ready_s = now_s + self.instances[command.instance].host_s
        if type(command) is Offload:  # behind the steps in flight
          ready_s = max(ready_s, *self.instances[command.instance].free_s)
        self.copies.to_host(command, ready_s)
      elif type(command) is Finish:
        for instance in self.pipelined:
          instance.token_s.pop(command.id, None)
    for index in self.decoding:
      if index not in self.quiet:
        self.open(index)

  def next(self) -> events.Event | None:
    """The next event; None at the end of the run."""
    heap, pop = self.heap, heapq.heappop
    while heap or self.loose:
      if self.loose:
        self.catch_up()
      self.top = top = pop(heap)
      if top[1] == SENT:
        self.copies.send(top[4], top[0])
        continue
      if top[1] != STEP:
        return self.copies.told(top)
      index = top[2]
      instance = self.instances[index]
      if top[4] != instance.serial:
        continue  # void by now
      quiet = self.quiet.get(index)
      if quiet is not None:
        if not quiet.is_over:
          self.loose.append(index)
          continue
        self.close(index, quiet.done)
      number, times, decode = instance.due.popleft()
      if instance.due:
        following, ends, _ = instance.due[0]
        self.expect(index, following, ends)
      return _done(index, number, times, decode)
    return None

  def issue(self, command: RunDecode | RunPrefill, now_s: float) -> None:
    """Puts a step behind what its instance has to do already."""
    index = command.instance
    instance = self.instances[index]
    ready_s, decode = now_s + instance.host_s, isinstance(command, RunDecode)
    if isinstance(command, RunDecode):
      times = instance.decode(ready_s, command, self.closed_form)
    else:
      times = instance.prefill(ready_s, command)
    instance.due.append((command.number, times, decode))
    if len(instance.due) == 1:
      self.expect(index, command.number, times)

  def expect(self, index: int, number: int, times: list[float]) -> None:
    """Puts an instance's next completion to be seen on the heap."""
    instance = self.instances[index]
    instance.serial += 1
    heapq.heappush(self.heap, (times[-1], STEP, index, number,
                               instance.serial))

  # --- quiet runs -----------------------------------------------------------

  def open(self, index: int) -> None:
    """Begins an instance's quiet run, if nothing has to be decided soon."""
    told = self.run.quiet(index)
    if told is not None:
      self.quiet[index] = _QuietRun(self.instances[index],
                                    self.run.instances[index], told)

  def catch_up(self) -> None:
    """Takes every quiet run to the next event, or to its end."""
    for index in tuple(self.loose):
      quiet = self.quiet[index]
      if quiet.advance(self.instances[index], index,
                       self.heap[0] if self.heap else _NEVER):
        self.loose.remove(index)
        self.expect(index, quiet.told.oldest + quiet.done,
                    quiet.due[quiet.done])

  def passed(self, index: int) -> int:
    """How many commands of a quiet run were issued by now; -1: it was taken
    further (see wake)."""
    quiet, (now_s, kind, other, _, _) = self.quiet[index], self.top
    end_s = quiet.due[quiet.done - 1][-1] if quiet.done else -1.0
    return quiet.done if end_s < now_s or (
        end_s == now_s and kind == STEP and index < other) else -1

  def wake(self, index: int) -> None:
    """Something else happens now to an instance in a quiet run.

    It may have gone beyond: the end of another's run came before the event
    that it was taken to.
    """
    quiet, (now_s, kind, other, _, _) = self.quiet[index], self.top
    find = (bisect.bisect_right if kind == STEP and index < other
            else bisect.bisect_left)
    if index in self.loose:
      self.loose.remove(index)
    self.close(index, find(quiet.due, now_s, 0, quiet.done, key=_LAST))
    number, times, _ = self.instances[index].due[0]
    self.expect(index, number, times)

  def close(self, index: int, count: int) -> None:
    """Ends a quiet run at its completion `count`."""
    instance, quiet = self.instances[index], self.quiet.pop(index)
    told, last = quiet.told, count + quiet.told.flight
    instance.free_s, instance.busy_s = quiet.free_s[count], quiet.busy_s[count]
    instance.due = collections.deque([
        (told.oldest + n, quiet.due[n], True) for n in range(count, last)])
    self.leapt += count
    if count:
      self.tell(index, quiet, count)
    self.run.follow(index, told, count)

  def tell(self, index: int, quiet: '_QuietRun', count: int) -> None:
    """Tells the recorder of `count` completions, and of requests that ended
    with them."""
    instance, told, due = self.instances[index], quiet.told, quiet.due
    flight, turns = told.flight, len(told.turns)
    # Steps that a turn issues from a command on.
    rest = [0] * (count + turns)
    for place in range(turns):
      rest[place:count:turns] = list(itertools.accumulate(
          told.steps[place:count:turns][::-1]))[::-1]
    issued = [(turn.first, rest[n], due[n][-1])
              for n, turn in enumerate(told.turns[:count])]
    joined = []
    for number, place, id in told.joined:
      n = number + (place - number) % turns  # its first command
      if n < count:
        joined.append((place, id, rest[n], due[n][-1]))
    if self.pipelined:
      for n, (rows, *_) in enumerate(issued):
        newest = n + (count - 1 - n) // turns * turns
        ids = [row[0] for row in rows] + [
            id for place, id, *_ in joined if place == n]
        instance.note(ids, due[flight + newest][-1])
    left = [(place, id, rest[n + turns]) for n, place, id in told.left
            if n < count]
    ended = [(id, due[after + flight][-1])
             for after, id in told.ends() if after + flight < count]
    self.recorder.leapt(index, due[:count], issued, left, ended, joined)
    for id, _ in ended:
      instance.token_s.pop(id, None)


class _QuietRun:
  """A quiet run of an instance, as far as it was followed.

  told: its commands, of scheduler.Run.quiet; is_over: no more can be told.
  due: times of the steps of the commands in flight when it began and of those
  issued since. done: how many have completed; each was answered by one.
  free_s, busy_s: of the instance, before each of these answers and after the
  last. token_s: of each turn, when its newest tokens are there (pp > 1 only).
  """

  __slots__ = ('told', 'is_over', 'due', 'done', 'free_s', 'busy_s', 'token_s')

  def __init__(self, instance: VirtualInstance, live: LiveInstance,
               told: Ahead) -> None:
    self.told, self.is_over = told, False
    self.due: list[list[float]] = [times for _, times, _ in instance.due]
    self.done = 0
    self.free_s, self.busy_s = [instance.free_s], [instance.busy_s]
    self.token_s = [instance.after(0.0, live.batches[turn.index].rows.values())
                    for turn in told.turns] if live.config.pp > 1 else [0.0]

  def advance(self, instance: VirtualInstance, index: int,
              bound: tuple) -> bool:
    """Completes what is due before `bound`; whether that was all."""
    due, told, free_s, busy_s = self.due, self.told, self.free_s, self.busy_s
    host_s, count, token_s = instance.host_s, len(told.turns), self.token_s
    n, until_s = self.done, bound[0]
    while True:
      now_s = due[n][-1]
      if now_s >= until_s and bound < (now_s, STEP, index):
        self.done = n
        return False
      steps = told.tell()
      if not steps:
        self.done, self.is_over = n, True
        return True
      place, ready_s = n % count, now_s + host_s
      if token_s[place] > ready_s:
        ready_s = token_s[place]
      times = instance.same_rows(ready_s, told.rows, told.context, steps)
      if count > 1 or instance.is_pipelined:
        token_s[place] = times[-1]
      due.append(times)
      free_s.append(instance.free_s)
      busy_s.append(instance.busy_s)
      n += 1
