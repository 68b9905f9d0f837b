"""Clients that leave, or do not read."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading

import httpx
import pytest

from dsjax.http import service as service_module
from dsjax.http import socket_server
from dsjax.http.middleware import Gate
from dsjax.runtime.orchestrator_thread import Call
from tests.common.web import (
  LIMITS,
  WAIT_S,
  all_back,
  complete,
  metric,
  only,
  paced,
  until,
)


def test_closing_a_stream_cancels_it(running, client):
  before = metric(running, 'output_tokens_total')
  with paced(running, 4):
    stream = complete(client, stream=True, max_tokens=250,
                      logit_bias=only('€'))
    next(stream)
    stream.close()
    until(lambda: not running.service.orchestrator.unfinished)
  all_back(running)
  written = metric(running, 'output_tokens_total') - before
  assert 1 <= written < 250
  assert metric(running, 'requests_ended_total') > 0


def test_a_client_that_leaves_is_cancelled_within_one_step(
    running, client, monkeypatch):
  service, happened = running.service, []
  server = service.orchestrator

  def note(owner, name, word):
    real = getattr(owner, name)

    def noted(*args):
      happened.append(word)
      return real(*args)
    monkeypatch.setattr(owner, name, noted)
  with paced(running, 2):
    stream = complete(client, stream=True, max_tokens=250,
                      logit_bias=only('€'))
    next(stream)
    note(server, 'poll', 'poll')
    note(server, 'cancel', 'cancel')
    leave, close = Call.leave, Call.close
    monkeypatch.setattr(Call, 'leave', lambda call: (
        happened.append('left'), leave(call)))
    monkeypatch.setattr(Call, 'close', lambda call: (
        close(call), happened.append('closed')))
    stream.close()
    until(lambda: {'cancel', 'closed'} <= set(happened))
  all_back(running)
  closed = happened.index('closed')
  assert happened.index('left') < closed
  # The poll that runs then may end; another does not begin.
  assert happened[closed:happened.index('cancel')].count('poll') <= 1


def test_a_dropped_connection_cancels_what_it_waited_for(running):
  before = metric(running, 'requests_ended_total')
  body = json.dumps({'model': 'tiny', 'prompt': 'Why?', 'max_tokens': 250,
                     'ignore_eos': True, 'n': 4}).encode()
  with paced(running, 2), socket.create_connection(running.address) as raw:
    raw.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: '
                b'application/json\r\nContent-Length: %d\r\n\r\n' % len(body)
                + body)
    until(lambda: len(running.service.streams) == 4)
  all_back(running)
  assert metric(running, 'requests_ended_total') == before + 4
  text = httpx.get(running.url + '/metrics').text
  assert 'ended_total{model="tiny",reason="cancelled"}' in text


@pytest.mark.parametrize('reads', (True, False))
def test_a_client_that_does_not_read_is_dropped(reads):
  size, left = 40 * 2**20, threading.Event()  # more than a socket holds

  async def app(scope, receive, send):
    kind = (await receive())['type']
    if scope['type'] == 'lifespan':
      await send({'type': f'{kind}.complete'})
      await receive()
      return await send({'type': 'lifespan.shutdown.complete'})
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})
    await send({'type': 'http.response.body', 'body': bytes(size),
                'more_body': True})
    while (await receive())['type'] != 'http.disconnect':
      pass
    left.set()

  service = service_module.Service(None, dataclasses.replace(
      LIMITS, send_s=60.0 if reads else 0.2))
  service.runner.status = 'ready'
  http = socket_server.Server(
      Gate(app, service.limits, None, lambda reason: None), service)
  bound = socket.create_server(('127.0.0.1', 0))
  thread = threading.Thread(target=lambda: asyncio.run(http.serve([bound])))
  thread.start()
  try:
    with socket.create_connection(bound.getsockname(), WAIT_S) as raw:
      raw.sendall(b'GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n')
      if not reads:
        assert left.wait(WAIT_S)
      got = 0
      with contextlib.suppress(ConnectionError):
        while got <= size and (data := raw.recv(2**20)):
          got += len(data)
      assert (got > size) == reads
    assert left.wait(WAIT_S)
  finally:
    http.should_exit = True
    thread.join(WAIT_S)
