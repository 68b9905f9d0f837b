"""An orchestrator in a thread of its own, behind two queues, for asyncio.

The event loop asks (submit, cancel) through one queue; the thread takes what
was asked between two polls and hands the new tokens of a step back in one
call, before it starts what follows from them. It never waits for a client:
tokens pile up for a slow one, at most its max_tokens of them. The thread owns
the orchestrator and `_open`; everything else here belongs to the event loop,
so nothing is locked.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from dsjax.analysis.record import Record
from dsjax.config.checks import InputError, StartError
from dsjax.config.request import Request, Sampling
from dsjax.runtime.orchestrator import Orchestrator
from dsjax.runtime.output import Update, joined
from dsjax.runtime.protocols import Report
from dsjax.scheduling.events import Command, DecodeDone, Event, PrefillDone

LOG = logging.getLogger(__name__)
IDLE_S = 0.5  # between two beats of a thread that has nothing to do

# Called in the thread; tells Report how far compiling has come.
MakeOrchestrator: TypeAlias = Callable[[Report], Orchestrator]


class ThreadObserver(Protocol):
  """Hears what an OrchestratorThread does, in that thread."""

  def started(self, server: Orchestrator) -> None: ...

  def observe(self, event: Event, commands: tuple[Command, ...]) -> None: ...

  def wrote(self, stream: 'Stream', num_tokens: int) -> None: ...

  def finished(self, record: Record) -> None: ...


class Gone(Exception):
  """The client has left."""


class Stream:
  """One request, as the event loop sees it.

  Attributes:
    id: of its Request; the thread's. ahead: its place in the queue when it
      came. last_s: when its last update
      came, on time.perf_counter. reason, error: see Update; None: it goes on.
  """

  def __init__(self, prompt: Sequence[int], sampling: Sampling,
               arrival_s: float, wake: asyncio.Event) -> None:
    self.prompt, self.sampling, self.arrival_s = prompt, sampling, arrival_s
    self.id, self.ahead = -1, 0
    self.last_s: float | None = None
    self.reason: str | None = None
    self.error: str | None = None
    self._wake = wake
    self._new: list[Update] = []

  @property
  def has_news(self) -> bool:
    return bool(self._new)

  def deliver(self, update: Update, now_s: float) -> None:
    """Adds what has come, and wakes the client."""
    self._new.append(update)
    self.last_s, self.reason, self.error = now_s, update.reason, update.error
    self._wake.set()

  def take(self) -> Update:
    """All that has come since the last call, as one Update."""
    new, self._new = self._new, []
    return joined(new)


class Call:
  """The requests that one client waits for together: n, or a batch."""

  def __init__(self, streams: Sequence[Stream], wake: asyncio.Event,
               cancel: Callable[[Stream], None]) -> None:
    self.streams, self._wake, self._cancel = streams, wake, cancel
    self._gone = False

  @property
  def ended(self) -> bool:
    return all(s.reason for s in self.streams)

  def leave(self) -> None:
    """Says that the client has left: a waiting `take` raises Gone."""
    self._gone = True
    self._wake.set()

  async def take(self) -> list[tuple[int, Update]]:
    """[(index, Update), ...] as soon as there is one; [] after the last.

    Raises:
      Gone: the client has left.
    """
    while True:
      if self._gone:
        raise Gone
      news = [(i, s.take()) for i, s in enumerate(self.streams) if s.has_news]
      if news or self.ended:
        return news
      self._wake.clear()
      await self._wake.wait()

  def close(self) -> None:
    """Cancels what has not ended. Always call it at the end."""
    for stream in self.streams:
      if not stream.reason:
        self._cancel(stream)


class _Stop(Exception):
  """Asked to stop while starting."""


class OrchestratorThread:
  """Runs an orchestrator for one event loop.

  Attributes:
    status: starting | ready | failed | stopped. failure: why it failed.
    orchestrator: None until it has started.
    streams: requests that have not ended.
    progress: what is being compiled while starting.
    moved_s: when, on `clock`, a device last completed a step of work that
      waits.
  """

  def __init__(self, make: MakeOrchestrator,
               observer: ThreadObserver | None = None,
               on_updates: Callable[[Sequence[tuple[Stream, Update]]], None]
               = lambda updates: None,
               clock: Callable[[], float] = time.monotonic) -> None:
    """on_updates: called on the event loop with what is about to be
    delivered."""
    self.status = 'starting'
    self.failure: BaseException | None = None
    self.orchestrator: Orchestrator | None = None
    self.streams: set[Stream] = set()
    self.progress, self.clock, self.moved_s = '', clock, clock()
    self._make, self._observer, self._on_updates = make, observer, on_updates
    self._inbox: queue.Queue[list[Stream] | Stream | None] = (
        queue.Queue())
    self._open: dict[int, Stream] = {}
    self._overdue: dict[int, str] = {}  # given up: why
    self._stopping = False
    self.thread = threading.Thread(target=self._work, name='orchestrator',
                                   daemon=True)

  # --- the event loop's side ------------------------------------------------

  def start(self) -> None:
    """Starts the thread; call it on the event loop.

    Raises:
      RuntimeError: it has been started before.
    """
    if self.thread.ident is not None:
      raise RuntimeError('the server was started before: make another one')
    self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
    self.thread.start()

  @property
  def is_open(self) -> bool:
    """Whether requests are taken."""
    return self.status == 'ready' and not self._stopping

  async def started(self) -> None:
    """Waits until requests are taken.

    Raises:
      Exception: what the maker of the orchestrator raised.
    """
    await self._until(lambda: self.status != 'starting')
    if isinstance(self.failure, Exception):
      raise self.failure
    if self.failure:  # SystemExit and the like would end the event loop
      raise RuntimeError('the server did not start') from self.failure

  def submit(self, requests: Sequence[tuple[Sequence[int], Sampling]],
             arrival_s: float) -> Call:
    """Queues requests that Orchestrator.check has passed.

    arrival_s: on time.perf_counter.

    Raises:
      RuntimeError: another event loop asks, which nothing here would wake.
    """
    if asyncio.get_running_loop() is not self._loop:
      raise RuntimeError('the server belongs to another event loop')
    wake = asyncio.Event()
    streams = [Stream(*request, arrival_s, wake) for request in requests]
    if not self.streams:
      self.moved_s = self.clock()  # idle until now
    self.streams.update(streams)
    self._ask(streams)
    return Call(streams, wake, self.cancel)

  def cancel(self, stream: Stream) -> None:
    """Asks for the end of a request; one that has ended is left alone."""
    self._ask(stream)

  def _ask(self, what: list[Stream] | Stream | None) -> None:
    """Has the thread take something, soon."""
    self._inbox.put(what)
    if self.orchestrator:
      self.orchestrator.loop.wake()

  async def emptied(self) -> None:
    """Waits until no request is left, or all is lost."""
    await self._until(lambda: not self.streams or self.status == 'failed')

  async def _until(self, true: Callable[[], bool]) -> None:
    while not true():
      self._changed.clear()
      await self._changed.wait()

  async def close(self) -> None:
    """Cancels everything and waits for the thread to end."""
    self._stopping = True
    self._ask(None)
    await asyncio.to_thread(self.thread.join, 60.0)

  def _deliver(self, updates: Sequence[tuple[Stream, Update]]) -> None:
    """Hands updates to their streams; called by the thread."""
    now_s = time.perf_counter()
    self._on_updates(updates)
    for stream, update in updates:
      stream.deliver(update, now_s)
      if update.reason:
        self.streams.discard(stream)
    self._changed.set()

  def _become(self, status: str, failure: BaseException | None = None) -> None:
    self.status, self.failure = status, failure
    LOG.info(status)
    if status in ('failed', 'stopped'):
      self._deliver([(s, Update(reason='error')) for s in self.streams])
    self._changed.set()

  # --- the thread's side ----------------------------------------------------

  def _say(self, function: Callable[..., None], *args: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has closed
      self._loop.call_soon_threadsafe(function, *args)

  def _report(self, done: int, total: int, name: str) -> None:
    self.progress = f'{done} of {total} steps compiled, {name}'
    LOG.info(self.progress)
    if self._stopping:
      raise _Stop

  def _work(self) -> None:
    try:
      server = self.orchestrator = self._make(self._report)
      if self._observer:
        self._observer.started(server)
        server.observers.append(self._observer.observe)
      server.observers.append(self._hear)
      self._say(self._become, 'ready')
      while server.call(self._turn, server, self._asked(not server.busy)):
        pass
      server.close()
      self._publish(server)
      self._say(self._become, 'stopped')
    except _Stop:
      self._say(self._become, 'stopped')
    except BaseException as error:  # every client that waits must hear of it
      told = isinstance(error, InputError | StartError) and (
          not self.orchestrator)  # in words for a user
      LOG.error('not started: %s' if told else 'the orchestrator failed: %s',
                error, exc_info=not told)
      if self.orchestrator:
        self.orchestrator.fail(f'{type(error).__name__}: {error}')
      self._say(self._become, 'failed', error)

  def _turn(self, server: Orchestrator,
            asked: Sequence[list[Stream] | Stream | None]) -> bool:
    """Does what was asked, polls once, publishes. False: to stop."""
    some = bool(asked)
    for item in asked:
      if item is None:
        return False
      if isinstance(item, list):
        self._enqueue(server, item)
      elif item.id in self._open:
        server.cancel(item.id)
    if server.poll():  # an idle one too: an instance may be lost
      some, self.moved_s = True, self.clock()
    elif self._give_up(server):
      some = True
    if some:
      self._publish(server)
    return True

  def _give_up(self, server: Orchestrator) -> bool:
    """Fails what has waited stall_s for nothing; whether there was any."""
    why, ids = server.loop.overdue()
    for id in ids:
      self._overdue[id] = why
      server.cancel(id)
    return bool(ids)

  def _asked(self, wait: bool) -> list[list[Stream] | Stream | None]:
    items = []
    with contextlib.suppress(queue.Empty):
      items.append(self._inbox.get(wait, IDLE_S if wait else None))
      while True:
        items.append(self._inbox.get_nowait())
    return items

  def _enqueue(self, server: Orchestrator, streams: list[Stream]) -> None:
    for i, stream in enumerate(streams):
      stream.id = server.next_id
      self._open[stream.id] = stream
      server.enqueue(Request(
          stream.id, stream.arrival_s - server.origin, stream.prompt,
          stream.sampling), more=i + 1 < len(streams))

  def _hear(self, event: Event, _: tuple[Command, ...]) -> None:
    """Tokens leave before what follows from them is done."""
    if isinstance(event, PrefillDone | DecodeDone) and self.orchestrator:
      self._publish(self.orchestrator)

  def _publish(self, server: Orchestrator) -> None:
    """Sends what every request got since the last time, in one call."""
    updates = []
    for id, update in server.take(self._open):
      stream = self._open[id]
      if update.tokens and self._observer:
        self._observer.wrote(stream, len(update.tokens))
      if update.reason:
        del self._open[id]
        record = server.forget(id)
        if why := self._overdue.pop(id, ''):
          record.status, record.reason = 'failed', why
          update = update._replace(reason='error', error=why)
        update = update._replace(record=record)
        if self._observer:
          self._observer.finished(record)
      updates.append((stream, update))
    if updates:
      self._say(self._deliver, updates)
