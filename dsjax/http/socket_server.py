"""The socket: connections that must send in time, and a server that drains."""

import asyncio
import logging
import math
import os
import secrets
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsjax.http import openai_schema
from dsjax.http.middleware import REASONS, Gate, dumps
from dsjax.http.service import Limits, Service

LOG = logging.getLogger(__name__)
# Of a body that is refused, so many times what a body may have is read.
LINGER = 16


class _Transport(asyncio.Transport):
  """A transport whose close, where the client may still be sending, waits for
  its end: the system would answer what comes after a close with a reset, and
  the client may lose the answer that it has not read yet.

  left: bytes that are still read, or None: it has not been closed.
  """

  def __init__(self, transport: asyncio.Transport, most: int,
               sends: Callable[[], bool]) -> None:
    super().__init__()
    self._transport, self._most, self._sends = transport, most, sends
    self.left: int | None = None
    for same in ('abort', 'get_extra_info', 'pause_reading', 'resume_reading',
                 'write'):
      setattr(self, same, getattr(transport, same))

  def is_closing(self) -> bool:
    return self.left is not None or self._transport.is_closing()

  def close(self) -> None:
    if self.is_closing() or not self._sends():
      self._transport.close()
      return
    self.left = self._most
    if self._transport.can_write_eof():
      self._transport.write_eof()
    self._transport.resume_reading()

  def drop(self, data: bytes) -> None:
    """Reads what nothing will come of."""
    self.left = (self.left or 0) - len(data)
    if self.left < 0:
      self._transport.abort()


class _Connection(H11Protocol):
  """A connection that must send its headers and read its answer in time, and
  can be aborted."""

  limits: Limits  # of its server
  reject: Callable[[str], None]  # see Gate
  _late: asyncio.TimerHandle | None = None  # headers are
  _unread: asyncio.TimerHandle | None = None  # the answer is

  def connection_made(self, transport: Any) -> None:
    self._ending = _Transport(
        transport, LINGER * self.limits.max_body_bytes, self._sends)
    super().connection_made(self._ending)
    most = self.limits.max_connections
    self.app_state = {**self.app_state, 'abort': transport.abort,
                      'crowded': len(self.connections) > most}
    if len(self.connections) > 2 * most:
      transport.abort()  # too many even to be told
    self._arm()

  def _sends(self) -> bool:
    """Whether more of a request may be on its way."""
    return (self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
            or bool(self.conn.trailing_data[0]))

  def _arm(self) -> None:
    if self._late is None:
      self._late = self.loop.call_later(self.limits.body_s,
                                        self.transport.abort)

  def _disarm(self) -> None:
    if self._late is not None:
      self._late.cancel()
      self._late = None

  def data_received(self, data: bytes) -> None:
    if self._ending.left is not None:
      self._ending.drop(data)
      return
    super().data_received(data)
    if self.cycle is None or self.cycle.response_complete:
      self._arm()
    else:
      self._disarm()

  def handle_events(self) -> None:
    waiting, _ = self.conn.trailing_data
    if self.conn.their_state is h11.IDLE and waiting[:1] in (b'\r', b'\n'):
      # Empty lines before a request (RFC 9112, 2.2), which h11 refuses.
      self.conn = h11.Connection(
          h11.SERVER, max_incomplete_event_size=self.limits.max_header_bytes)
      if rest := waiting.lstrip(b'\r\n'):
        self.conn.receive_data(rest)
    super().handle_events()

  def send_400_response(self, msg: str) -> None:
    """Answers what is not HTTP, in the shape of every other error; uvicorn
    calls it where h11 raises."""
    error = sys.exception()
    status = getattr(error, 'error_status_hint', 400)
    reads_body = self.cycle and not self.cycle.response_complete
    if status == 431:
      status, what = ((400, 'the line before a chunk') if reads_body else
                      (431, 'target and headers')
                      if b'\n' in self.conn.trailing_data[0] else
                      (414, 'the target'))
      msg = f'{what}: must have at most {self.limits.max_header_bytes} bytes'
    elif status == 501:
      msg = 'transfer-encoding: must be chunked, once, or be left out'
    elif error:
      what, _, _ = str(error).partition(': bytearray(')
      msg = f'the request: must be HTTP/1.1: {what[:160]}'
    id = secrets.token_hex(12)
    self.reject(REASONS.get(status, 'bad_request'))
    LOG.info('%s: %d %s', id, status, msg)
    body = dumps(openai_schema.error(msg, 'invalid_request_error')).encode()
    headers = [*self.server_state.default_headers,
               (b'content-type', b'application/json'),
               (b'content-length', b'%d' % len(body)),
               (b'x-request-id', id.encode()), (b'connection', b'close')]
    if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      reason = HTTPStatus(status).phrase.encode()
      for event in (h11.Response(status_code=status, headers=headers,
                                 reason=reason), h11.Data(data=body),
                    h11.EndOfMessage()):
        self.transport.write(self.conn.send(event))
    if reads_body:
      self.cycle.disconnected = True  # its body will not come
      self.cycle.message_event.set()
    self.transport.close()
    self._arm()

  def pause_writing(self) -> None:
    super().pause_writing()
    self._unread = self.loop.call_later(self.limits.send_s,
                                        self.transport.abort)

  def resume_writing(self) -> None:
    super().resume_writing()
    if self._unread is not None:
      self._unread.cancel()

  def connection_lost(self, exc: Exception | None) -> None:
    self._disarm()
    if self._unread is not None:
      self._unread.cancel()
    super().connection_lost(exc)


class Server(uvicorn.Server):
  """Uvicorn that drains at the first SIGTERM or Ctrl-C, cancels what still
  runs at the second, and ends the program at the third."""

  def __init__(self, app: Gate, service: Service) -> None:
    class Connection(_Connection):
      limits, reject = service.limits, staticmethod(app.reject)

    limits = service.limits
    config = uvicorn.Config(
        app, http=Connection, ws='none', lifespan='on',
        log_config=None, access_log=False, server_header=False,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_keep_alive=math.ceil(limits.keep_alive_s),
        timeout_graceful_shutdown=5)
    super().__init__(config)
    self.service = service
    self._asked = 0  # how often it was asked to end
    self._draining: asyncio.Task[None] | None = None

  async def startup(self, sockets: list[socket.socket] | None = None
                    ) -> None:
    self.loop = asyncio.get_running_loop()
    await super().startup(sockets)

  def handle_exit(self, sig: int, frame: Any) -> None:
    del sig, frame
    self._asked += 1
    if self._asked > 2:  # a step may hang
      os._exit(130)
    if not self.started:
      self.should_exit = self.force_exit = True
    else:
      self.loop.call_soon_threadsafe(
          self.leave, 0.0 if self._asked > 1 else None)

  def leave(self, drain_s: float | None = None) -> None:
    """Drains, then ends the server; call it on the event loop.

    drain_s: in place of the limit.
    """
    if self._draining:
      self._draining.cancel()
    wait_s = self.service.limits.drain_s if drain_s is None else drain_s
    self._draining = self.loop.create_task(self._drain(wait_s))  # kept alive

  async def _drain(self, wait_s: float) -> None:
    LOG.info('draining: %d requests, up to %g s', len(self.service.streams),
             wait_s)
    await self.service.drain(wait_s)
    self.should_exit = True

  async def on_tick(self, counter: int) -> bool:
    if self.service.status == 'failed' and self.service.orchestrator is None:
      return True  # it never started
    return await super().on_tick(counter)


def run(app: Gate, service: Service, bound: socket.socket
        ) -> str | None:
  """Serves on a bound socket until a signal.

  Returns:
    why the service failed, or None.
  """
  asyncio.run(Server(app, service).serve([bound]))
  return service.error
