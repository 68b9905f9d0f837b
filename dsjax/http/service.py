"""What stands between clients and an orchestrator: how much is let in.

A Service turns requests away that are too many, too slow to come or too long,
and drains. What it takes, an OrchestratorThread serves.
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from dsjax.config import checks
from dsjax.config.checks import InputError, require
from dsjax.config.request import Sampling
from dsjax.runtime.orchestrator import Orchestrator
from dsjax.runtime.orchestrator_thread import (
  Call,
  MakeOrchestrator,
  OrchestratorThread,
  Stream,
  ThreadObserver,
)
from dsjax.runtime.output import Update
from dsjax.scheduling import scheduler


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
    keep_alive_s: that a connection stays open between two requests; longer
      than clients keep theirs, or they would use one that has just closed.
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
  keep_alive_s: float = 120.0
  body_s: float = 30.0
  send_s: float = 30.0
  request_s: float = 600.0
  stall_s: float = 60.0
  drain_s: float = 30.0

  def __post_init__(self) -> None:
    checks.make_plain(self)
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

  def __init__(self, reason: str, message: str,
               retry_s: float | None = None) -> None:
    super().__init__(message)
    self.reason, self.retry_s = reason, retry_s


def too_long(context: int, why: str) -> Refused:
  """For a request that can never fit.

  litellm knows it by the first sentence, langchain by the last words.

  context: tokens of a prompt and its answer.
  """
  return Refused('too_long', "This model's maximum context length is "
                 f'{context} tokens. However, {why} '
                 '(context_length_exceeded).')


class Service:
  """Serves an orchestrator to one event loop, within Limits.

  Attributes:
    status: starting | ready | draining | failed | stopped. error: why it
      failed.
    orchestrator: None until it has started.
    waiting: requests without a token yet. streams: those that have not ended.
    runner: the thread of the orchestrator.
  """

  def __init__(self, make: MakeOrchestrator, limits: Limits | None = None,
               observer: ThreadObserver | None = None,
               clock: Callable[[], float] = time.monotonic) -> None:
    self.limits = limits or Limits()
    self.runner = OrchestratorThread(make, observer, self._account, clock)
    self.waiting, self._draining = 0, False
    self._share_s = 0.0  # seconds of TTFT for each request in the queue
    self._gap_s = 0.0  # TPOT of late, which the next one is guessed to have

  def start(self) -> None:
    """Starts the thread; call it on the event loop."""
    self.runner.start()

  @property
  def status(self) -> str:
    status = self.runner.status
    return 'draining' if status == 'ready' and self._draining else status

  @property
  def error(self) -> str | None:
    failure = self.runner.failure
    return None if failure is None else ': '.join(
        filter(None, (type(failure).__name__, str(failure))))

  @property
  def orchestrator(self) -> Orchestrator | None:
    return self.runner.orchestrator

  @property
  def progress(self) -> str:
    """How far starting has come."""
    return self.runner.progress or 'loading the model'

  @property
  def streams(self) -> set[Stream]:
    return self.runner.streams

  @property
  def thread(self) -> threading.Thread:
    return self.runner.thread

  @property
  def alive(self) -> bool:
    """False before it has started, after it failed, and when it hangs: work
    waits, and for stall_s no device has finished a step of it."""
    if self.status not in ('ready', 'draining'):
      return False
    return (not self.streams or self.runner.clock() - self.runner.moved_s
            < self.limits.stall_s)

  @property
  def expected_ttft_s(self) -> float:
    """A guess at the TTFT of the next request: what a place in the queue cost
    lately, times the places."""
    return self._share_s * (self.waiting + 1)

  def started(self) -> Orchestrator:
    """The orchestrator; raises Refused before there is one."""
    if self.orchestrator is None:
      self.check_open()
    assert self.orchestrator
    return self.orchestrator

  def check_open(self) -> None:
    """Raises Refused unless new requests are taken."""
    if self.status != 'ready':
      why = {'starting': f'the server is starting: {self.progress}',
             'failed': f'the server has failed: {self.error}'}
      raise Refused(self.status, why.get(
          self.status, f'the server is {self.status}'), 5.0)

  def submit(self, requests: Sequence[tuple[Sequence[int], Sampling]],
             arrival_s: float) -> Call:
    """Queues requests, all or none.

    arrival_s: on time.perf_counter.

    Raises:
      InputError: a field does not suit the model.
      Refused: they can never fit, or not now.
    """
    self.check_open()
    server = self.started()
    for prompt, sampling in requests:
      server.check(prompt, sampling)
      most = sampling.max_tokens or (
          server.scheduler_config.longest - len(prompt))
      why = scheduler.never_fits(server.scheduler_config, len(prompt), most)
      if why:
        raise too_long(server.config.max_len, why)
    self._check_room(len(requests))
    call = self.runner.submit(requests, arrival_s)
    for stream in call.streams:
      self.waiting += 1
      stream.ahead = self.waiting
    return call

  def _check_room(self, count: int) -> None:
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

  def _retry_s(self) -> float:
    return min(60.0, max(1.0, self._share_s * self.waiting))

  async def drain(self, wait_s: float) -> None:
    """Takes no more requests; waits for the running ones, up to wait_s, and
    cancels the rest."""
    self._draining = True
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(wait_s):
        await self.runner.emptied()
    for stream in self.streams:
      self.runner.cancel(stream)
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(5.0):
        await self.runner.emptied()

  async def close(self) -> None:
    """Cancels everything and waits for the thread to end."""
    await self.runner.close()

  def _account(self, updates: Sequence[tuple[Stream, Update]]) -> None:
    """Learns from what is about to be delivered how fast answers come."""
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
