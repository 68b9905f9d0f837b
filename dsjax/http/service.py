"""An orchestrator in a thread of its own, behind two queues.

The event loop asks (submit, cancel) through one queue; the thread takes what
was asked between two polls and hands the new tokens of a step back in one
call, before it starts what follows from them. It never waits for a client: a
slow one finds its tokens piled up, at most its max_tokens of them. Whatever
else is here belongs to the event loop, so nothing is locked.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from typing import NamedTuple

from dsjax.config import checks
from dsjax.config.checks import InputError, require
from dsjax.config.request import Request
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import DecodeDone, PrefillDone

LOG = logging.getLogger(__name__)
IDLE_S = 0.5  # between two beats of a thread that has nothing to do
STATUSES = ('starting', 'ready', 'draining', 'failed', 'stopped')


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the service takes before it says no. Times in seconds.

  Attributes:
    max_waiting: requests that may wait for their first token. max_open: that
      may wait or run; None: as many as the queue lets in.
    max_ttft_s, max_tpot_s: turn away what would be slower, by a guess from
      what the last ones took; None: take it.
    max_body_bytes, max_header_bytes: of an HTTP request.
    max_connections: open at a time; as many again are told so, and those
      beyond are dropped.
    body_s: to send a body; send_s: that a client may leave a full buffer
      unread; request_s: from arrival to the last token.
    stall_s: without progress while work waits, the service is not alive.
    drain_s: that running requests get when the service stops.
  """

  max_waiting: int = 256
  max_open: int | None = None
  max_ttft_s: float | None = None
  max_tpot_s: float | None = None
  max_body_bytes: int = 4 * 2**20
  max_header_bytes: int = 32 * 2**10
  max_connections: int = 1024
  body_s: float = 30.0
  send_s: float = 30.0
  request_s: float = 600.0
  stall_s: float = 60.0
  drain_s: float = 30.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      whole = field.type in (int, int | None)
      ok = checks.is_positive_int(value) if whole else checks.is_positive(value)
      require(ok or value is None and field.default is None,
              f'limits.{field.name}', value,
              'an integer of 1 or more' if whole else 'seconds above 0')


class Refused(Exception):
  """The service does not take this request now, or ever.

  reason: too_long | queue_full | busy | ttft | tpot | starting | draining |
  failed | stopped. retry_s: when to ask again, or None.
  """

  def __init__(self, reason, message, retry_s=None):
    super().__init__(message)
    self.reason, self.retry_s = reason, retry_s


class Gone(Exception):
  """The client has left."""


class Update(NamedTuple):
  """What one request got since the last look. reason: why it ended, or None.

  logprobs: one a token where they were asked for; see Output.
  """

  text: str = ''
  tokens: tuple[int, ...] = ()
  logprobs: tuple = ()
  reason: str | None = None


class Stream:
  """One request. The thread owns id, live and sent, the event loop the rest."""

  def __init__(self, prompt, sampling, arrival_s, wake):
    self.prompt, self.sampling, self.arrival_s = prompt, sampling, arrival_s
    self.id, self.live, self.sent = None, None, 0
    self.wake, self.new, self.ahead = wake, [], 0
    self.last_s = self.reason = None

  def take(self):
    """All that came since the last call, as one Update."""
    new, self.new = self.new, []
    return Update(''.join(u.text for u in new),
                  tuple(t for u in new for t in u.tokens),
                  tuple(x for u in new for x in u.logprobs),
                  new[-1].reason)


class Call:
  """The requests that one client waits for together: n, or a batch."""

  def __init__(self, streams, wake, cancel):
    self.streams, self._wake, self._cancel = streams, wake, cancel
    self._gone = False

  @property
  def ended(self):
    return all(s.reason for s in self.streams)

  def leave(self):
    """Tells whoever takes that the client has left."""
    self._gone = True
    self._wake.set()

  async def take(self):
    """[(index, Update), ...] as soon as there is one; [] after the last.

    Raises:
      Gone: the client has left.
    """
    while True:
      if self._gone:
        raise Gone
      found = [(i, s.take()) for i, s in enumerate(self.streams) if s.new]
      if found or self.ended:
        return found
      self._wake.clear()
      await self._wake.wait()

  def close(self):
    """Cancels what has not ended. Always call it at the end."""
    for stream in self.streams:
      if not stream.reason:
        self._cancel(stream)


class _Stop(Exception):
  """Asked to stop while starting."""


class Service:
  """Serves an orchestrator to one event loop.

  Attributes:
    status: one of STATUSES. error: why it failed.
    orchestrator: None until it has started.
    waiting: requests without a token yet. streams: those that have not ended.
    progress: what is being compiled while starting.
  """

  def __init__(self, make, limits=None, observer=None, clock=time.monotonic):
    """make: called in the thread with report(done, total, name); gives an
    Orchestrator. observer: an object with started(orchestrator), observe
    (event, commands) and finished(record), all called in the thread."""
    self.limits = limits or Limits()
    self.status, self.error, self.orchestrator = 'starting', None, None
    self.waiting, self.streams, self.progress = 0, set(), ''
    self._make, self._observer, self._clock = make, observer, clock
    self._inbox, self._open = queue.SimpleQueue(), {}
    self._stopping, self._moved_s = False, clock()
    self._share_s = 0.0  # seconds of TTFT for each request in the queue
    self._gap_s = 0.0  # TPOT of late, which the next one is guessed to have
    self.thread = threading.Thread(target=self._work, name='orchestrator',
                                   daemon=True)

  # --- the event loop's side ------------------------------------------------

  def start(self):
    """Starts the thread; call it on the event loop."""
    self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
    self.thread.start()

  @property
  def alive(self):
    """False before it has started, after it failed, and when it hangs: work
    waits, and for stall_s no device has finished a step of it."""
    if self.status not in ('ready', 'draining'):
      return False
    return (not self.streams
            or self._clock() - self._moved_s < self.limits.stall_s)

  @property
  def expected_ttft_s(self):
    """A guess at the TTFT of the next request: what a place in the queue cost
    lately, times the places."""
    return self._share_s * (self.waiting + 1)

  def check_open(self):
    """Raises Refused unless new requests are taken."""
    if self.status != 'ready':
      why = {'starting': f'the server is starting: {self.progress}',
             'failed': f'the server has failed: {self.error}'}
      raise Refused(self.status, why.get(
          self.status, f'the server is {self.status}'), 5.0)

  def submit(self, requests, arrival_s):
    """Queues (ids, Sampling) pairs, all or none: a Call.

    arrival_s: on time.perf_counter.

    Raises:
      InputError: a field does not suit the model.
      Refused: they can never fit, or not now.
    """
    self.check_open()
    server = self.orchestrator
    for prompt, sampling in requests:
      server.check(prompt, sampling)
      why = scheduler.never_fits(server.plan, len(prompt), sampling.max_tokens)
      if why:
        raise Refused('too_long', why)
    self._check_room(len(requests))
    wake = asyncio.Event()
    streams = [Stream(*r, arrival_s, wake) for r in requests]
    for stream in streams:
      self.waiting += 1
      stream.ahead = self.waiting
      self.streams.add(stream)
    if len(streams) == len(self.streams):
      self._moved_s = self._clock()  # idle until now
    self._inbox.put(streams)
    return Call(streams, wake, self._inbox.put)

  def _check_room(self, count):
    limits = self.limits
    most = min(limits.max_waiting, limits.max_open or limits.max_waiting)
    if count > most:
      raise InputError(f'n={count}: must be at most {most} answers of one '
                       'call')
    if self.waiting + count > limits.max_waiting:
      raise Refused('queue_full', f'{self.waiting} requests wait for their '
                    f'first token; the most is {limits.max_waiting}',
                    self._retry_s())
    if limits.max_open and len(self.streams) + count > limits.max_open:
      raise Refused('busy', f'{len(self.streams)} requests wait or run; the '
                    f'most is {limits.max_open}', self._retry_s())
    wait_s = self.expected_ttft_s
    if limits.max_ttft_s and self.waiting and wait_s > limits.max_ttft_s:
      raise Refused('ttft', f'the first token would take about {wait_s:.2g} s, '
                    f'the limit is {limits.max_ttft_s:g} s', self._retry_s())
    limit_s = limits.max_tpot_s
    if limit_s and self.streams and self._gap_s > limit_s:
      raise Refused('tpot', f'a token takes about {self._gap_s:.2g} s, the '
                    f'limit is {limit_s:g} s', self._retry_s())

  def _retry_s(self):
    return min(60.0, max(1.0, self._share_s * self.waiting))

  async def drain(self):
    """Takes no more requests; waits for the running ones, up to drain_s, and
    cancels the rest."""
    if self.status == 'ready':
      self.status = 'draining'
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(self.limits.drain_s):
        await self._emptied()
    for stream in list(self.streams):
      self._inbox.put(stream)
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(5.0):
        await self._emptied()

  async def _emptied(self):
    while self.streams and self.status != 'failed':
      self._changed.clear()
      await self._changed.wait()

  async def close(self):
    """Cancels everything and waits for the thread to end."""
    self._stopping = True
    self._inbox.put(None)
    await asyncio.to_thread(self.thread.join, 60.0)

  def _deliver(self, updates):
    """Hands updates to their streams; called by the thread."""
    now_s = time.perf_counter()
    for stream, update in updates:
      if stream.last_s is None:
        self.waiting -= 1
        if update.tokens:
          share_s = (now_s - stream.arrival_s) / stream.ahead
          self._share_s += 0.2 * (share_s - self._share_s)
      elif update.tokens:
        gap_s = (now_s - stream.last_s) / len(update.tokens)
        self._gap_s += 0.02 * (gap_s - self._gap_s)
      stream.last_s = now_s
      stream.new.append(update)
      if update.reason:
        stream.reason = update.reason
        self.streams.discard(stream)
      stream.wake.set()
    self._changed.set()

  def _become(self, status, error=None):
    if status != 'ready' or self.status == 'starting':
      self.status, self.error = status, error
    if status in ('failed', 'stopped'):
      self._deliver([(s, Update(reason='error')) for s in list(self.streams)])

  # --- the thread's side ----------------------------------------------------

  def _say(self, function, *args):
    with contextlib.suppress(RuntimeError):  # the loop has closed
      self._loop.call_soon_threadsafe(function, *args)

  def _report(self, done, total, name):
    self.progress = f'{done} of {total} steps compiled, {name}'
    if self._stopping:
      raise _Stop

  def _work(self):
    try:
      server = self.orchestrator = self._make(self._report)
      if self._observer:
        self._observer.started(server)
        server.observers.append(self._observer.observe)
      server.observers.append(self._hear)
      self._say(self._become, 'ready')
      while self._turn(server):
        pass
      server.close()
      self._publish(server)
      self._say(self._become, 'stopped')
    except _Stop:
      self._say(self._become, 'stopped')
    except Exception as error:  # everybody who waits must hear of it
      LOG.exception('the orchestrator failed')
      self._say(self._become, 'failed', f'{type(error).__name__}: {error}')

  def _turn(self, server):
    """Takes what was asked, polls once, publishes. False: to stop."""
    some = False
    for item in self._asked(wait=not server.busy):
      some = True
      if item is None:
        return False
      if isinstance(item, list):
        self._enqueue(server, item)
      elif item.id in self._open:
        server.cancel(item.id)
    if server.busy and server.poll():
      some, self._moved_s = True, self._clock()
    if some:
      self._publish(server)
    return True

  def _asked(self, wait):
    items = []
    with contextlib.suppress(queue.Empty):
      items.append(self._inbox.get(wait, IDLE_S if wait else None))
      while True:
        items.append(self._inbox.get_nowait())
    return items

  def _enqueue(self, server, streams):
    for i, stream in enumerate(streams):
      stream.id = server.next_id
      server.enqueue(Request(
          stream.id, stream.arrival_s - server.origin, stream.prompt,
          stream.sampling), more=i + 1 < len(streams))
      stream.live = server.requests[stream.id]
      self._open[stream.id] = stream

  def _hear(self, event, _):
    """Tokens leave before what follows from them is done."""
    if isinstance(event, PrefillDone | DecodeDone):
      self._publish(self.orchestrator)

  def _publish(self, server):
    """Sends what every request got since the last time, in one call."""
    updates = []
    for stream in list(self._open.values()):
      live = stream.live
      if len(live.tokens) == stream.sent and not live.finished:
        continue
      text = ''.join(live.pieces)
      live.pieces.clear()
      update = Update(text, tuple(live.tokens[stream.sent:]),
                      tuple(live.logprobs[stream.sent:]),
                      live.reason or live.error and 'error')
      stream.sent = len(live.tokens)
      if live.finished:
        del self._open[stream.id]
        record = server.forget(stream.id)
        if self._observer:
          self._observer.finished(record)
      updates.append((stream, update))
    if updates:
      self._say(self._deliver, updates)
