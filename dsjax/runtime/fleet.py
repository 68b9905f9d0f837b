"""The instances of a server: performs commands, says what came of them.

What comes back is data: the tokens of each step as it completes, and events.
A Fleet knows of no text and of no client.

What fails is an event, as what completes is:

- A call of an engine that raises, a result that cannot be read (its buffer is
  gone, or what made it failed) and an instance that is stuck lose the instance
  with all it held: InstanceDown. It is started again, empty, after a while.
- A hand-off that raises, or whose checksums differ, has failed: MigrateFailed.
  The source still holds the pages. Where an engine's buffers are gone, it is
  lost instead.
- A hand-off whose lease ran out: Timer. The scheduler answers with Abort.
- A copy to host memory, or from there, that fails or is late is over.

Nothing that was in flight when an instance was lost can touch it later: jax
arrays are values, so a late step writes buffers that nothing reads any more.
"""

import collections
import itertools
import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement
from dsjax.config.request import Sampling
from dsjax.model import sharding
from dsjax.runtime import memory
from dsjax.runtime.arrays import is_ready
from dsjax.runtime.looks import Looks
from dsjax.runtime.migration import hands_off
from dsjax.runtime.output import Logprobs
from dsjax.runtime.protocols import (
  Dispatched,
  Engine,
  Event,
  MakeEngine,
  Report,
  Route,
  Transfer,
)
from dsjax.scheduling.events import (
  Abort,
  DecodeDone,
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
  RunDecode,
  RunPrefill,
  Timer,
)

LOG = logging.getLogger(__name__)
NEWEST = 1000  # faults that are remembered


class Prefix(NamedTuple):
  """A request so far, as an engine needs it: prompt and sampled tokens."""
  tokens: Sequence[int]
  prompt_len: int
  sampling: Sampling


class SampledToken(NamedTuple):
  """The next token of a request. logprobs: where the request asks for them."""
  id: int
  token: int
  logprobs: Logprobs | None = None


class StepDone(NamedTuple):
  """A step (0-based) of an instance's oldest command completed.

  sampled: its tokens, also those of requests that have ended meanwhile.
  """
  instance: int
  step: int
  sampled: tuple[SampledToken, ...]


# What an engine has a part in.
Performed: TypeAlias = (RunPrefill | RunDecode | Migrate | Offload | Load
                        | Preempt | Flip | Abort)
# The Prefix of a request; None: it has ended.
PrefixOf: TypeAlias = Callable[[int], Prefix | None]


class Running:
  """A command in flight and the outputs of its steps.

  times, stages: when its steps, and their stages but the last, were done.
  """

  def __init__(self, command: RunPrefill | RunDecode,
               dispatched: Dispatched) -> None:
    outputs, marks = dispatched
    self.command, self.outputs = command, collections.deque(outputs)
    self.marks = collections.deque(marks)  # what each stage but the last sent
    self.times: list[float] = []
    self.stages: list[float] = []

  def event(self) -> PrefillDone | DecodeDone:
    """What happened when all of its steps are done; `ended` is left empty."""
    command, stages = self.command, tuple(self.stages)
    if isinstance(command, RunDecode):
      return DecodeDone(self.times[-1], command.instance, command.number,
                        tuple(self.times), stages_s=stages)
    return PrefillDone(self.times[-1], command.instance, command.number,
                       stages_s=stages)


def build(model: Model, placement: Placement, config: EngineConfig,
          devices: Sequence[jax.Device], make_engine: MakeEngine
          ) -> list[Engine]:
  """The engines of a placement, all of this process.

  Raises:
    InputError: the placement or the config cannot be served.
  """
  if not model.params:
    raise InputError(f'model={model.config.name!r}: has no weights: load it '
                     'without weights=False')
  roles = [role for role, _ in placement.instances]
  meshes = sharding.make_meshes(model.config, placement, devices)
  capacities = [memory.size_pages(model.config, stages, role, config)
                for role, stages in zip(roles, meshes, strict=True)]
  memory.check_host(config.host_bytes, len(roles))
  return [make_engine(model, stages, role, config, capacity)
          for role, stages, capacity in zip(roles, meshes, capacities,
                                            strict=True)]


class Fleet:
  """Engines, what they run, and what moves between them.

  Attributes:
    engines: by instance. routes: (source, target) engines -> Route.
    running: commands in flight of each instance, in order.
    transfers: hand-offs in flight. hosts: what instances have of host memory.
    down: instances that are lost -> when to start them again, or None;
      starting: those of them that are about to be there again.
    faults: (time, what happened) of the newest.
    raised: what is no Exception, such as SystemExit, and was taken as a fault:
      to be raised again once the state is whole.
    copied_bytes, copy_s: what migrations moved and the seconds they took,
      from dispatch to arrival, summed; of parts that were sent before, which
      wait for their chunk, the bytes only. steps: device steps done.
  """

  def __init__(self, engines: Sequence[Engine], config: EngineConfig,
               prefix_of: PrefixOf, clock: Callable[[], float],
               fetches: bool = False) -> None:
    """Joins instances; `warm` compiles.

    Args:
      engines: of this process (build), or of others (cluster/local.py).
      prefix_of: asked when a request comes to an engine that does not have it.
      clock: seconds now, on the clock of the events.
      fetches: whether instances are joined for it, see Policy.
    """
    self.config, self.prefix_of, self.clock = config, prefix_of, clock
    self.engines = list(engines)
    self.capacities = tuple(engine.capacity for engine in engines)
    self.routes: dict[tuple[Engine, Engine], Route] = {
        (source, target): source.route_to(target)
        for source in engines for target in engines
        if hands_off(source.capacity, target.capacity, fetches)
        and target is not source}
    self.hosts = {index: engine.host_memory(config.checksum)
                  for index, engine in enumerate(engines)
                  if engine.capacity.host_pages}
    self.transfers: list[Transfer] = []
    self.running: list[collections.deque[Running]] = [
        collections.deque() for _ in engines]
    self.moved_s = [0.0] * len(engines)  # when each made progress
    self._looks = Looks(0.0)
    self.down: dict[int, float | None] = {}
    self.starting: set[int] = set()
    self.losses = [0] * len(engines)  # in a row
    self.faults: collections.deque[tuple[float, str]] = collections.deque(
        maxlen=NEWEST)
    self.raised: list[BaseException] = []
    self.copied_bytes, self.copy_s, self.steps = 0, 0.0, 0
    self._num_logprobs: dict[int, int] = {}  # of requests that want some

  def warm(self, report: Report) -> None:
    """Compiles every step, also of those that are away; report(done, total,
    name) after each."""
    total, done = sum(len(e.shapes_needed()) for e in self.engines), 0
    for index, engine in enumerate(self.engines):
      for name in engine.warm():
        done += 1
        report(done, total, f'{engine.role} {index}: {name}')
    for route in self.routes.values():
      route.warm(self.config.checksum)
    for host in self.hosts.values():
      host.warm()
    for index in self.config.away:
      self.engines[index].stop()
      self.down[index] = None

  @property
  def busy(self) -> bool:
    """Whether something is in flight."""
    return (any(self.running) or bool(self.transfers)
            or any([host.busy for host in self.hosts.values()]))

  @property
  def host_bytes(self) -> int:
    """Bytes copied to host memory and from there."""
    return sum([host.copied_bytes for host in self.hosts.values()])

  # --- commands -------------------------------------------------------------

  def perform(self, command: Performed) -> Sequence[Event]:
    """Performs a command; the events of what failed in doing so.

    A command for an instance that is lost, which the scheduler may not know
    yet, is passed over: InstanceDown takes it back.
    """
    index = (command.target if isinstance(command, Migrate | Abort)
             else command.instance)
    if index in self.down or (isinstance(command, Migrate)
                              and command.source in self.down):
      return ()
    try:
      _PERFORM[type(command)](self, command)
    except BaseException as error:  # whatever an engine raises
      if isinstance(command, Migrate):
        return self._hand_off_failed(command, error)
      return (self._lose(index, error),)
    return ()

  def forget(self, id: int) -> Sequence[Event]:
    """A request has ended; the events of what failed in forgetting it."""
    self._num_logprobs.pop(id, None)
    failed = []
    for index, engine in enumerate(self.engines):
      try:
        engine.forget(id)
      except BaseException as error:  # whatever an engine raises
        failed.append(self._lose(index, error))
    return failed

  def _step(self, command: RunPrefill | RunDecode) -> None:
    """Admits the requests that are new to the instance, and dispatches."""
    index = command.instance
    engine, queue = self.engines[index], self.running[index]
    if isinstance(command, RunPrefill):
      for chunk in command.chunks:
        self._admit(index, chunk.id)
    if not queue:
      self.moved_s[index] = self.clock()
    queue.append(Running(command, engine.prefill(command) if isinstance(
        command, RunPrefill) else engine.decode(command)))

  def _admit(self, index: int, id: int) -> None:
    engine = self.engines[index]
    if id in engine.slot_of:
      return
    prefix = self.prefix_of(id)
    if prefix is not None:
      engine.admit(id, *prefix)
      if prefix.sampling.logprobs is not None:
        self._num_logprobs[id] = prefix.sampling.logprobs

  def _migrate(self, command: Migrate) -> None:
    if not (command.more or command.kept):  # its first token is out
      self._admit(command.target, command.id)
    route = self.routes[self.engines[command.source],
                        self.engines[command.target]]
    self.transfers.append(route.start(command, self.config.checksum))

  def _load(self, command: Load) -> None:
    if command.row:
      self._admit(command.instance, command.id)
    self.hosts[command.instance].load(command)

  def _preempt(self, command: Preempt) -> None:
    self.engines[command.instance].forget(command.id)

  def _abort(self, command: Abort) -> None:
    """Ends the target's right to write.

    A copy that has landed by now comes before what is written to these pages
    next; one that has not landed never does.
    """
    self._drop(lambda transfer: _is_of(transfer, command))
    self.engines[command.target].forget(command.id)

  def _drop(self, ends: Callable[[Transfer], bool]) -> None:
    """Gives up those hand-offs that `ends` says."""
    for transfer in [t for t in self.transfers if ends(t)]:
      self.transfers.remove(transfer)
      transfer.drop()

  # --- completions ----------------------------------------------------------

  def poll(self) -> Iterator[StepDone | Event]:
    """Yields what has completed, or failed, since last time, in order.

    A StepDone for each step, with its tokens, as it completes; an event when
    the last step of a command has completed.
    """
    self._come_back()
    yield from self._poll_transfers()
    yield from self._poll_hosts()
    yield from self._poll_steps()
    for index, engine in enumerate(self.engines):
      if index in self.down:
        continue
      try:
        engine.check()
      except BaseException as error:  # what has ended it
        yield self._lose(index, error)
    for index, start_s in list(self.down.items()):
      if start_s is not None and self.clock() >= start_s:
        event = self.start(index)
        if event:
          yield event

  def _come_back(self) -> None:
    """Time in which the loop did not look makes nothing late."""
    now_s, clock_s = self.clock(), time.perf_counter()
    away_s = self._looks.away_s(now_s)
    if away_s:
      self.moved_s = [min(now_s, moved_s + away_s) for moved_s in self.moved_s]
      for transfer in self.transfers:
        transfer.start_s = min(clock_s, transfer.start_s + away_s)

  def _poll_transfers(self) -> Iterator[Event]:
    ended: list[Event] = []
    for transfer in list(self.transfers):
      if transfer in self.transfers:  # no loss of this poll has ended it
        ended.extend(self._advance(transfer))
    for event, following in itertools.zip_longest(ended, ended[1:]):
      if isinstance(event, Migrated) and isinstance(following, Migrated):
        event = event._replace(more=True)
      yield event

  def _advance(self, transfer: Transfer) -> Sequence[Event]:
    """Takes a hand-off as far as it will go."""
    command = transfer.command
    try:
      if not transfer.landed and transfer.has_arrived():
        transfer.land()
      done = transfer.is_ready() and (command.more or self._is_last(command))
      if done and transfer.checksum:
        transfer.check()
    except BaseException as error:  # whatever jax raises for a broken copy
      return self._hand_off_failed(command, error)
    took_s = time.perf_counter() - transfer.start_s
    if done:
      self.transfers.remove(transfer)
      self.copied_bytes += transfer.bytes
      if command.more:
        return ()
      self.copy_s += took_s
      migrated = Migrated(self.clock(), command.id, command.epoch)
      try:
        self.engines[command.source].forget(command.id)
      except BaseException as error:  # whatever an engine raises
        return (migrated, self._lose(command.source, error))
      return (migrated,)
    if took_s > self.config.lease_s:
      self._note(_hand_off(command), f'no end after {took_s:.1f} s')
      return (Timer(self.clock(), command.id, command.epoch),)
    return ()

  def _is_last(self, command: Migrate) -> bool:
    """Whether every other part of its hand-off has come to its end."""
    return 1 == sum(_is_of(t, command) for t in self.transfers)

  def _poll_hosts(self) -> Iterator[Event]:
    for index, host in self.hosts.items():
      for command, error in host.poll(self.config.lease_s):
        if error is not None:
          if not self.engines[index].is_sound():
            yield self._lose(index, error)
            break
          self._note(f'a copy between instance {index} and its host failed',
                     error)
        if isinstance(command, Offload):
          yield Offloaded(self.clock(), index, command.number,
                          error is not None)
        elif error is None:
          yield Loaded(self.clock(), command.id, command.epoch)
        else:
          yield LoadFailed(self.clock(), command.id, command.epoch,
                           _text(error))

  def _poll_steps(self) -> Iterator[StepDone | Event]:
    # What these completions start is left to the next poll, however fast the
    # device: arrivals and cancels get their turn.
    for index, count in enumerate(map(len, list(self.running))):
      queue = self.running[index]
      while count and queue:
        event = yield from self._next(index, queue[0])
        if event is None:
          break
        count -= 1
        yield event

  def _next(self, index: int, running: Running
            ) -> Generator[StepDone, None, Event | None]:
    """Yields the steps of an instance's oldest command that have completed.

    Returns:
      the event of the command, or None: it goes on.
    """
    while True:
      try:
        sampled = self._read(index, running)
      except BaseException as error:  # what has no value
        return self._lose(index, error)
      if sampled is None:
        break
      running.times.append(self.clock())
      self.steps += 1
      yield StepDone(index, len(running.times) - 1, sampled)
    if not running.outputs:
      self.running[index].popleft()
      self.losses[index] = 0
      return running.event()
    idle_s = self.clock() - self.moved_s[index]
    if idle_s > self.config.stall_s:
      return self._lose(index, f'no step for {idle_s:.1f} s')
    return None

  def _read(self, index: int, running: Running
            ) -> tuple[SampledToken, ...] | None:
    """The tokens of the next step; None: it is not ready.

    All of a step is read before any of it is told.
    """
    while running.marks and is_ready(running.marks[0]):
      running.marks.popleft()
      running.stages.append(self.clock())
      self.moved_s[index] = self.clock()
    if not running.outputs or not is_ready(running.outputs[0].token_R):
      return None
    out = running.outputs[0]
    token_R = jax.device_get(out.token_R).tolist()
    entries = self._entries(running.command, len(token_R))
    logprobs = self._read_logprobs(out, entries)
    running.outputs.popleft()
    self.moved_s[index] = self.clock()
    return tuple(SampledToken(id, token_R[r], logprobs.get(id))
                 for r, id in entries)

  def _read_logprobs(self, out: Any, entries: Iterable[tuple[int, int]]
                     ) -> dict[int, Logprobs]:
    """{id: log-probabilities} of those of a step that want them."""
    wanted = [(r, id, self._num_logprobs[id]) for r, id in entries
              if id in self._num_logprobs]
    if not wanted:
      return {}
    logprob_R, top_id_RA, top_logprob_RA = jax.device_get(
        (out.logprob_R, out.top_id_RA, out.top_logprob_RA))
    return {id: (float(logprob_R[r]), tuple(zip(
        top_id_RA[r, :count].tolist(), top_logprob_RA[r, :count].tolist(),
        strict=True))) for r, id, count in wanted}

  def _entries(self, command: RunPrefill | RunDecode, size: int
               ) -> list[tuple[int, int]]:
    """(index into token_R, id) of each token that a step samples."""
    entries = [(r, row.id) for r, row in enumerate(command.rows)]
    if isinstance(command, RunPrefill):
      first = size - self.engines[command.instance].sequences(command)
      entries += [(first + b, chunk.id)
                  for b, chunk in enumerate(command.chunks) if chunk.last]
    return entries

  # --- faults ---------------------------------------------------------------

  def stop(self, index: int, why: str | BaseException,
           back_s: float | None = None) -> InstanceDown:
    """An instance is lost with all it held: its event, with `ended` empty.

    back_s: when to start it again; None: never, unless asked.
    """
    self._note(f'instance {index} ({self.engines[index].role}) was lost', why)
    queue = self.running[index]
    steps_s = tuple(queue[0].times) if queue else ()
    queue.clear()
    if index in self.hosts:
      self.hosts[index].clear()
    self.down[index] = back_s
    self.starting.discard(index)
    try:
      self.engines[index].stop()
    except BaseException as error:  # it is lost either way
      self._note(f'instance {index} did not stop', error)
    self._drop(lambda transfer: transfer.command.target == index)
    return InstanceDown(self.clock(), index, steps_s,
                        back=back_s is not None)

  def start(self, index: int) -> InstanceUp | InstanceDown | None:
    """Starts a lost instance again, empty: an InstanceUp; or, where its
    devices refuse, another InstanceDown; or None: `poll` will tell."""
    try:
      is_there = self.engines[index].start()
    except BaseException as error:  # whatever jax raises for lack of memory
      return self._lose(index, error)
    if not is_there:
      self.down[index] = self.clock()
      self.starting.add(index)
      return None
    self.starting.discard(index)
    del self.down[index]
    return InstanceUp(self.clock(), index)

  def _lose(self, index: int, why: str | BaseException) -> InstanceDown:
    self.losses[index] += 1
    again = self.losses[index] <= self.config.restarts
    return self.stop(index, why, self.clock() + self.config.restart_s
                     if again else None)

  def _hand_off_failed(self, command: Migrate, error: BaseException
                       ) -> Sequence[Event]:
    """Events: the engines whose buffers are gone are lost, or just the copy.

    Its target writes no more.
    """
    try:
      self._abort(Abort(command.id, command.epoch, command.target))
      lost = [i for i in (command.source, command.target)
              if i not in self.down and not self.engines[i].is_sound()]
    except BaseException as again:  # the target's engine, whatever it raises
      error, lost = again, [command.target]
    if lost:
      return tuple(self._lose(i, error) for i in lost)
    self._note(_hand_off(command), error)
    return (MigrateFailed(self.clock(), command.id, command.epoch,
                          _text(error)),)

  def _note(self, what: str, why: str | BaseException) -> None:
    self.faults.append((self.clock(), f'{what}: {_text(why)}'))
    if isinstance(why, BaseException) and not isinstance(why, Exception):
      self.raised.append(why)
    # As text: a traceback would hold on to buffers.
    trace = (traceback.format_exception(why) if isinstance(why, BaseException)
             else ())
    LOG.warning('%s: %s%s', what, _text(why), ''.join(['\n', *trace]).rstrip())


def _hand_off(command: Migrate) -> str:
  return (f'the hand-off of request {command.id} from instance '
          f'{command.source} to {command.target} failed')


def _text(why: str | BaseException) -> str:
  """An error, or a reason, in one line."""
  line = ' '.join((str(why) or type(why).__name__).split())
  return line if len(line) <= 200 else line[:200] + ' ...'


def _is_of(transfer: Transfer, command: Migrate | Abort) -> bool:
  """Whether a transfer is of the hand-off that a command is about."""
  sent = transfer.command
  return (sent.id, sent.epoch) == (command.id, command.epoch)


_PERFORM: dict[type, Callable[..., None]] = {
    RunPrefill: Fleet._step,
    RunDecode: Fleet._step,
    Migrate: Fleet._migrate,
    Offload: lambda fleet, command: fleet.hosts[command.instance].offload(
        command),
    Load: Fleet._load,
    Preempt: Fleet._preempt,
    Abort: Fleet._abort,
    Flip: lambda fleet, command: None,  # steps of every role are compiled
}
