"""Engines of other processes, as a fleet sees them.

A RemoteEngine is an Engine whose effects are messages. A step's output is an
array that is ready when its message has come. So a Fleet does with it what it
does with an Engine of its own process: what raises, stalls or ends loses the
instance, and `start` begins a new process, another incarnation. Nothing of an
earlier one can come in: it has another socket, another key, another number.
"""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsjax.config import checks
from dsjax.config.checks import InputError, StartError
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.request import Sampling
from dsjax.runtime.cluster import messages
from dsjax.runtime.cluster.channel import Channel
from dsjax.runtime.cluster.handoff import LOOK_S, RemoteRoute, RemoteTransfer
from dsjax.runtime.cluster.outputs import Due
from dsjax.runtime.cluster.page_tables import PageTables
from dsjax.runtime.cluster.processes import Launcher, Process
from dsjax.runtime.cluster.remote_memory import RemoteHostMemory
from dsjax.runtime.cluster.stamps import Clock, Stamp
from dsjax.runtime.cluster.watch import Watch
from dsjax.runtime.protocols import Dispatched, HostMemory
from dsjax.runtime.worker import call_lasting
from dsjax.scheduling.events import RunDecode, RunPrefill

NEWEST = 10_000  # stamps of steps that are remembered


class RemoteEngine:
  """An Engine that is a process of its own.

  Attributes:
    pid: of its process, or None. incarnation: how many there have been.
    capacity, devices: see Built; known once `is_built`.
    address: where its offers were pulled when it last told. withdrawn: offers
      that were taken back, each of which changes it; moved: how many of these
      it has told of.
    peers: those that KV comes from, and goes to. by_kernel, memory: see Built.
    slot_of, spare: what has been admitted, in slots of no meaning.
    stamps: a Stamp of each step and hand-off, of the newest. clock: that of
      its process. held: its last answer to `count`, or None. weights: see
      Built.
  """

  capacity: InstanceConfig
  _shapes: Sequence[tuple[int, int]]
  _channel: Channel | None
  _process: Process | None
  _slots: RemoteHostMemory

  def __init__(self, index: int, config: EngineConfig, fields: dict[str, Any],
               launcher: Launcher, siblings: Sequence['RemoteEngine'],
               news: threading.Event) -> None:
    """`start` begins the first process.

    Args:
      fields: of Build. launcher: closed with the last of its `siblings`.
      news: of all siblings.
    """
    self.news = news
    self.index, self.role, self.config = index, fields['role'], config
    self.incarnation, self.is_built, self.closed = 0, False, False
    self.devices: tuple[str, ...] = ()
    self.stamps: collections.deque[Stamp] = collections.deque(maxlen=NEWEST)
    self.held: messages.Counted | None = None
    self.weights: int | None = None
    self.by_kernel, self.memory = False, ''
    self._fields, self._launcher = fields, launcher
    self._siblings = siblings
    self.peers, self._compiles = messages.Warm({}, {}), False
    self._warmed: collections.deque[str] = collections.deque()
    self._vacate()

  def _vacate(self) -> None:
    """Knows of no process, and of nothing that one holds."""
    self._process = self._channel = None
    self.slot_of: dict[int, int] = {}
    self.spare = list(range(self.config.max_seqs))
    self.transfers: dict[int, RemoteTransfer] = {}
    self._tables = PageTables()
    self._due = Due(self)
    self.address, self.withdrawn, self.moved = '', 0, 0
    self._why, self._bad_input = '', False
    self._ready, self._watch, self.clock = False, Watch(), Clock()

  def _begin(self) -> None:
    self.incarnation += 1
    self._watch = Watch()
    # The kernel ends a process with the thread that has started it.
    call_lasting(self._begin_process)

  def _begin_process(self) -> None:
    self._process = self._launcher.start(self.index, self.incarnation)
    if self.closed:  # meanwhile, by another thread
      self.stop()

  @property
  def pid(self) -> int | None:
    return self._process.pid if self._process else None

  # --- what it says ---------------------------------------------------------

  def hear(self) -> None:
    """Takes in what has come."""
    if self._process is None:
      return
    if self._channel is None:
      self._channel = self._process.channel
      if self._channel is None:
        return
      self._channel.news = self.news
      self._watch.begin()
      self._channel.send(messages.Build(self._fields))
    try:
      for message in self._channel.take():
        _HEAR[type(message)](self, message)
    except Exception as error:  # what follows would be as wrong
      self._why = self._why or f'it said what cannot be: {error!r}'
      raise

  def wait(self, seconds: float) -> None:
    """Waits until something has come, so long at most."""
    if self._channel:
      self._channel.wait(seconds)

  def check(self) -> None:
    """Raises what ended the process, if something has.

    Raises:
      InputError: it cannot be built as it was asked to.
      RuntimeError: it failed, ended, or is silent.
    """
    process = self._process
    if process is None:
      raise RuntimeError('it was not started')
    code, ended = process.exit_code(), self._channel and self._channel.ended
    self._watch.look()
    self.hear()  # all that it said before it ended
    if self._why:
      raise (InputError if self._bad_input else RuntimeError)(self._why)
    if self._channel is None:
      if code is not None or process.failed:
        raise RuntimeError(process.failed or (
            f'its process ended before it came (exit code {code})'))
      self._watch.check_comes(process, self.config.silent_s)
    elif ended:
      raise RuntimeError(f'its process ended (exit code {code})' if code
                         is not None else ended)
    else:
      if not self._ready and (self._compiles or not self.is_built):
        self._watch.check_loads()
      self._watch.ping(self._channel, self.config.silent_s)

  def count(self) -> Callable[[], messages.Counted | None]:
    """Asks what it holds; what gives the answer, once it has come."""
    self.held = None
    self.send(messages.Count())
    return lambda: self.held

  def cut(self) -> None:
    """Cuts the connection, as a fault would."""
    if self._channel:
      self._channel.cut()

  def send(self, message: messages.FromServer) -> None:
    """Sends a message. Raises RuntimeError: the instance is not there."""
    if self._channel is None:
      raise RuntimeError('it is not there')
    self._channel.send(message)

  def _on_failed(self, message: messages.Failed) -> None:
    self._why, self._bad_input = message.why, message.bad_input

  def _on_built(self, message: messages.Built) -> None:
    known = [engine.weights for engine in (self, *self._siblings)]
    if set(known) - {None, message.weights}:
      self._why, self._bad_input = (
          'its model has other weights than that of an instance before it: '
          'where each loads it from there must be the same', True)
      return
    self.weights = message.weights
    self.capacity = InstanceConfig(**message.capacity)
    self.address = message.address
    self.by_kernel, self.memory = message.by_kernel, message.memory
    self._fields = self._fields | {'capacity': message.capacity}  # for ever
    self.devices = tuple(f'{device}, process {self.pid}'
                         for device in message.devices.values())
    self._shapes, self.is_built = ((0, 0),) * message.shapes, True
    if self._compiles:
      self._watch.begin()
      self.send(self.peers)

  def _on_warmed(self, message: messages.Warmed) -> None:
    self._warmed.append(message.name)
    self._watch.begin()

  def _on_ready(self, message: messages.Ready) -> None:
    self._ready = True

  def _on_stage(self, message: messages.StageDone) -> None:
    self._due.put_stage()

  def _on_step(self, message: messages.Stepped) -> None:
    self._due.put_step(message)
    self._stamp('step', message.number, message.began_s, message)

  def _stamp(self, what: str, number: int, began_s: float, message: Any
             ) -> None:
    self.stamps.append(self.clock.stamp(what, number, began_s, message.wall_s,
                                        message.cpu_s))

  def _on_pong(self, message: messages.Pong) -> None:
    self.clock.hear(self._watch.pinged_s, message.wall_s)

  def _on_transfer(self, message: Any) -> None:
    transfer = self.transfers.get(message.uuid)
    if transfer:  # else it was given up
      transfer.hear(message)
      if isinstance(message, messages.Offered):
        self._stamp('offered', transfer.command.id, message.wall_s, message)
      elif isinstance(message, messages.Landed):
        self._stamp('landed', transfer.command.id, message.began_s, message)

  def _on_moved(self, message: messages.Moved) -> None:
    self.moved, self.address = self.moved + 1, message.address
    for transfer in self.transfers.values():
      transfer.begin()

  def _on_copied(self, message: messages.Copied) -> None:
    self._slots.hear(message)

  def _on_lost(self, message: messages.Lost) -> None:
    self._why = message.why

  def _on_counted(self, message: messages.Counted) -> None:
    self.held = message

  # --- start and end --------------------------------------------------------

  def shapes_needed(self) -> Sequence[tuple[int, int]]:
    """One a step that it compiles."""
    return self._shapes

  def begin_warm(self) -> None:
    """Has it compile; from now on a new process does so by itself."""
    if not self._compiles:
      self._compiles = True
      self._watch.begin()
      self.send(self.peers)

  def warm(self) -> Iterator[str]:
    """Waits until everything is compiled; yields the name of each step."""
    with self.naming():
      self.begin_warm()
    while not self._ready:
      with self.naming():
        self.check()
      while self._warmed:
        yield self._warmed.popleft()
      time.sleep(LOOK_S)
    yield from self._warmed
    self._warmed.clear()

  @contextlib.contextmanager
  def naming(self) -> Iterator[None]:
    """What ends its start, from inside, says which instance it is about."""
    what = f'instance {self.index} ({self.role})'
    try:
      with checks.naming(what):
        yield
    except RuntimeError as error:
      raise StartError(f'{what} did not start: {error}') from error

  def route_to(self, target: 'RemoteEngine') -> RemoteRoute:
    """How KV goes from this engine to another."""
    return RemoteRoute(self, target)

  def is_sound(self) -> bool:
    """Whether it is there; if not, it can only start again."""
    try:
      self.check()
    except Exception:  # whatever has ended it
      return False
    return True

  def stop(self) -> None:
    """Kills the process; nothing of it comes in any more."""
    process, channel = self._process, self._channel
    self._vacate()
    self.spare = []
    if process:
      process.kill()
    if channel:
      channel.close()

  def start(self) -> bool:
    """Begins a process, or looks at the one that has begun; whether it takes
    commands.

    Raises:
      RuntimeError, InputError: it did not start.
    """
    if self.closed:
      raise RuntimeError('the server was closed')
    if self._process is None:
      self._vacate()
      self._begin()
    self.check()
    self._warmed.clear()
    return self._ready

  def close(self) -> None:
    """Kills the process and waits for its end."""
    self.closed, process = True, self._process
    self.stop()
    if process:
      process.kill(wait_s=10.0)
    if all(sibling.closed for sibling in self._siblings):
      self._launcher.close()

  # --- commands -------------------------------------------------------------

  def admit(self, id: int, tokens: Sequence[int], prompt_len: int,
            params: Sampling) -> None:
    """Gives a request a slot holding its tokens so far."""
    self.send(messages.Admit(id, tuple(map(int, tokens)), prompt_len,
                              dataclasses.asdict(params)))
    self.slot_of[id] = self.spare.pop()

  def forget(self, id: int) -> None:
    """Takes the slot back."""
    if id in self.slot_of:
      self.spare.append(self.slot_of.pop(id))
      self._tables.forget(id)
      self.send(messages.Forget(id))

  def prefill(self, command: RunPrefill) -> Dispatched:
    """Sends a RunPrefill."""
    return self._run(command, len(command.rows) + len(command.chunks))

  def decode(self, command: RunDecode) -> Dispatched:
    """Sends a RunDecode."""
    return self._run(command, len(command.rows))

  def _run(self, command: RunPrefill | RunDecode, size: int) -> Dispatched:
    self.send(self._tables.pack(command))
    return self._due.add(command, size, self.capacity.pp)

  def host_memory(self, checksum: bool) -> HostMemory:
    """The slots that its process has."""
    del checksum  # of the config, which the process has too
    self._slots = RemoteHostMemory(self)
    return self._slots

  def sequences(self, command: RunPrefill) -> int:
    """Sequence entries at the end of a RunPrefill's output."""
    return len(command.chunks)

  def end_offer(self, uuid: int, pulled: bool) -> None:
    """Takes an offer of this process back, or says that it was pulled; once."""
    if self.transfers.pop(uuid, None):
      self.withdrawn += not pulled
      self.send_if_there(messages.Withdraw(uuid, pulled))

  def send_if_there(self, message: messages.FromServer) -> None:
    """Sends what an instance that is lost need not know."""
    if self._channel is not None and not self._channel.ended:
      self._channel.send(message)


_HEAR: dict[type, Callable[[RemoteEngine, Any], None]] = {
    messages.Failed: RemoteEngine._on_failed,
    messages.Built: RemoteEngine._on_built,
    messages.Warmed: RemoteEngine._on_warmed,
    messages.Ready: RemoteEngine._on_ready,
    messages.StageDone: RemoteEngine._on_stage,
    messages.Stepped: RemoteEngine._on_step,
    messages.Offered: RemoteEngine._on_transfer,
    messages.Moved: RemoteEngine._on_moved,
    messages.Landed: RemoteEngine._on_transfer,
    messages.Broken: RemoteEngine._on_transfer,
    messages.Copied: RemoteEngine._on_copied,
    messages.Lost: RemoteEngine._on_lost,
    messages.Counted: RemoteEngine._on_counted,
    messages.Pong: RemoteEngine._on_pong,
}
