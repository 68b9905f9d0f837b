"""The socket: connections that must send in time, and a server that drains."""

import asyncio
import logging
import math
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsjax.http import openai_schema
from dsjax.http.middleware import dumps
from dsjax.http.service import Limits, Service

LOG = logging.getLogger(__name__)


class _Connection(H11Protocol):
  """A connection that must send its headers and read its answer in time, and
  can be aborted."""

  limits: Limits  # of its server
  _late: asyncio.TimerHandle | None = None  # headers are
  _unread: asyncio.TimerHandle | None = None  # the answer is

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    most = self.limits.max_connections
    self.app_state = {**self.app_state, 'abort': transport.abort,
                      'crowded': len(self.connections) > most}
    if len(self.connections) > 2 * most:
      transport.abort()  # too many even to be told
    self._arm()

  def _arm(self) -> None:
    if self._late is None:
      self._late = self.loop.call_later(self.limits.body_s,
                                        self.transport.abort)

  def _disarm(self) -> None:
    if self._late is not None:
      self._late.cancel()
      self._late = None

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.cycle is None or self.cycle.response_complete:
      self._arm()
    else:
      self._disarm()

  def send_400_response(self, msg: str) -> None:
    """Answers what is not HTTP, in the shape of every other error."""
    body = dumps(openai_schema.error(msg, 'invalid_request_error')).encode()
    headers = [*self.server_state.default_headers,
               (b'content-type', b'application/json'),
               (b'content-length', b'%d' % len(body)),
               (b'connection', b'close')]
    if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      for event in (h11.Response(status_code=400, headers=headers,
                                 reason=b'Bad Request'), h11.Data(data=body),
                    h11.EndOfMessage()):
        self.transport.write(self.conn.send(event))
    self.transport.close()

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
  """Uvicorn that drains at the first SIGTERM or Ctrl-C, and goes at the
  second."""

  def __init__(self, app: Callable[..., Any], service: Service) -> None:
    class Connection(_Connection):
      limits = service.limits

    limits = service.limits
    config = uvicorn.Config(
        app, http=Connection, ws='none', lifespan='on',
        log_config=None, access_log=False, server_header=False,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_keep_alive=math.ceil(limits.keep_alive_s),
        timeout_graceful_shutdown=5)
    super().__init__(config)
    self.service = service
    self._leaving = False
    self._draining: asyncio.Task[None] | None = None

  async def startup(self, sockets: list[socket.socket] | None = None
                    ) -> None:
    self.loop = asyncio.get_running_loop()
    await super().startup(sockets)

  def handle_exit(self, sig: int, frame: Any) -> None:
    del sig, frame
    if not self._leaving and self.started:
      self._leaving = True
      self.loop.call_soon_threadsafe(self.leave)
    else:
      self.should_exit = self.force_exit = True

  def leave(self) -> None:
    """Drains, then ends the server; call it on the event loop."""
    self._leaving = True
    self._draining = self.loop.create_task(self._drain())  # kept alive

  async def _drain(self) -> None:
    LOG.info('draining: %d requests, up to %g s', len(self.service.streams),
             self.service.limits.drain_s)
    await self.service.drain()
    self.should_exit = True

  async def on_tick(self, counter: int) -> bool:
    if self.service.status == 'failed' and self.service.orchestrator is None:
      return True  # it never started
    return await super().on_tick(counter)


def run(app: Callable[..., Any], service: Service, bound: socket.socket
        ) -> str | None:
  """Serves on a bound socket until a signal.

  Returns:
    why the service failed, or None.
  """
  asyncio.run(Server(app, service).serve([bound]))
  return service.error
