"""Starting, draining, and what fails on the way."""

import dataclasses
import signal
import threading
import time
import types

import httpx
import openai
import pytest

from dsjax.http import openai_answers
from dsjax.scheduling import scheduler
from experiments.verify import faults
from tests.common.web import (
  CONFIG,
  LIMITS,
  MODEL,
  PLACEMENT,
  TEXT,
  WAIT_S,
  Running,
  all_back,
  complete,
  paced,
  post,
  until,
)


def test_a_mistake_of_ours_costs_one_request(running, client, monkeypatch,
                                             caplog):
  secret = 'xyzzy'.title()  # not so in the lines of a traceback

  def fail(*_):
    raise ZeroDivisionError(secret)
  monkeypatch.setattr(running.service, 'submit', fail)
  with pytest.raises(openai.InternalServerError) as error:
    complete(client)
  assert error.value.type == 'server_error'
  monkeypatch.undo()
  monkeypatch.setattr(openai_answers.ResponseBuilder, 'chunks', fail)
  with pytest.raises((openai.APIError, httpx.TransportError)):
    list(complete(client, stream=True))
  monkeypatch.undo()
  assert error.value.request_id in caplog.text
  assert 'ZeroDivisionError' in caplog.text and secret not in caplog.text
  assert complete(client).choices[0].text
  all_back(running)


def test_faults_that_end_a_request_are_told(running, client):
  with faults.Injector(running.service.orchestrator) as injector:
    injector.arm(1, faults.COPY, 'raise', when=lambda *_: True)
    with pytest.raises(openai.InternalServerError,
                       match='given up after 4 faults') as error:
      complete(client)
    assert error.value.type == 'server_error'
    with pytest.raises(openai.APIError, match='given up after 4 faults'):
      list(complete(client, stream=True))
  assert complete(client).choices[0].text
  all_back(running)


def test_the_key_is_asked_for():
  started = threading.Event()

  def slow(report):
    while True:  # starts for as long as it is let
      started.set()
      report(1, 3, 'a step')
      time.sleep(0.01)
  server = Running(slow, key='secret')
  try:
    started.wait(WAIT_S)
    bare = httpx.get(server.url + '/v1/models')
    assert bare.status_code == 401
    assert bare.json()['error']['type'] == 'authentication_error'
    for key, status in (
        ('Bearer wrong', 401), ('Bearer', 401), ('secret', 401),
        ('Basic secret', 401), ('Bearer secretsecret', 401),
        ('Bearer secret', 503), ('bearer secret', 503), ('BEARER  secret', 503)
    ):
      assert httpx.get(server.url + '/v1/models', headers={
          'Authorization': key}).status_code == status, key
    health = httpx.get(server.url + '/health')
    assert health.status_code == 503
    assert health.json()['status'] == 'starting'
    answer = post(server, '/v1/completions', TEXT,
                  headers={'Authorization': 'Bearer secret'})
    assert answer.status_code == 503 and answer.headers['Retry-After'] == '5'
    assert answer.json()['error']['message'] == (
        'the server is starting: 1 of 3 steps compiled, a step')
  finally:
    server.stop()


@pytest.mark.parametrize('patience_s', (20.0, 0.05))
def test_draining_lets_running_requests_finish(patience_s):
  server = Running(limits=dataclasses.replace(LIMITS, drain_s=patience_s))
  try:
    server.await_status('ready')
    with openai.OpenAI(base_url=server.url + '/v1', api_key='-', max_retries=0,
                       timeout=WAIT_S) as client:
      # Enough that the last ones still wait when the patience ends.
      with paced(server, 4):
        streams = [complete(client, stream=True, max_tokens=240,
                            extra_body={'ignore_eos': True, 'n': 8})
                   for _ in range(2)]
        first = next(streams[0])
        server.http.loop.call_soon_threadsafe(server.http.leave)
        until(lambda: server.service.status != 'ready')
        if patience_s > 1:
          refused = post(server, '/v1/completions', TEXT)
          assert refused.status_code == 503
          assert 'draining' in refused.json()['error']['message']
        else:  # it runs out while nothing moves
          until(lambda: not server.service.orchestrator.unfinished)
      if patience_s > 1:
        chunks = [c for s in streams for c in s]
        ends = [c.choices[0].finish_reason for c in (first, *chunks)]
        assert ends.count('length') == 16
      else:
        for stream in streams:
          with pytest.raises(openai.APIError, match='stopped before'):
            list(stream)
    server.thread.join(WAIT_S)
    assert not server.thread.is_alive()
    scheduler.check(server.service.orchestrator.state)
    assert scheduler.idle(server.service.orchestrator.state)
  finally:
    server.stop()


def test_a_second_signal_cancels_and_a_third_ends_the_program(monkeypatch,
                                                              caplog):
  def leave(code):
    raise SystemExit(code)
  monkeypatch.setattr('dsjax.http.socket_server.os._exit', leave)
  server = Running(limits=dataclasses.replace(LIMITS, drain_s=1000.0))
  try:
    server.await_status('ready')
    with openai.OpenAI(base_url=server.url + '/v1', api_key='-', max_retries=0,
                       timeout=WAIT_S) as client:
      with paced(server, 4):
        stream = complete(client, stream=True, max_tokens=240,
                          extra_body={'ignore_eos': True, 'n': 8})
        next(stream)
        server.http.handle_exit(signal.SIGTERM, None)
        server.http.handle_exit(signal.SIGINT, None)
        until(lambda: not server.service.orchestrator.unfinished)
      with pytest.raises(openai.APIError, match='stopped before'):
        list(stream)
    server.thread.join(WAIT_S)
    assert server.service.status == 'stopped'
    with pytest.raises(SystemExit, match='130'):
      server.http.handle_exit(signal.SIGINT, None)
    assert not [r for r in caplog.records if r.levelname == 'ERROR']
  finally:
    server.stop()


class Stuck:
  """An orchestrator that takes requests and never gets anywhere."""

  def __init__(self, broken=False):
    self.next_id, self.origin, self.observers = 0, 0.0, []
    self.busy, self.broken, self.steps_end = False, broken, False
    self.model, self.config, self.placement = MODEL, CONFIG, PLACEMENT
    self.scheduler_config = scheduler.Config((), 256)
    self.state = scheduler.init(self.scheduler_config)
    self.copied_bytes = self.steps = self.copy_s = self.host_s = 0
    self.host_bytes = 0
    self.loop = types.SimpleNamespace(overdue=lambda: ('', []),
                                      wake=lambda: None)

  def check(self, *_):
    pass

  def call(self, function, *args):
    return function(*args)

  def fail(self, reason):
    pass

  def enqueue(self, request, more):
    self.busy = True

  def take(self, ids):
    return []

  def cancel(self, id):
    pass

  def poll(self):
    if self.broken:
      raise RuntimeError('the device fell off')
    time.sleep(0.001)
    return self.steps_end

  def close(self):
    pass


def test_health_tells_a_hang_from_patience():
  server = Running(lambda _: Stuck())
  now = [0.0]
  server.service.runner.clock = lambda: now[0]
  try:
    server.await_status('ready')
    now[0] = 1e6  # nothing waits, so nothing hangs
    assert httpx.get(server.url + '/health').status_code == 200
    with pytest.raises(httpx.ReadTimeout):
      httpx.post(server.url + '/v1/completions', json=TEXT, timeout=0.2)
    assert httpx.get(server.url + '/health').status_code == 200
    now[0] += LIMITS.stall_s
    health = httpx.get(server.url + '/health')
    assert (health.status_code, health.json()) == (503, {'status': 'stalled'})
    # Steps that end are progress, though no token has come of them.
    server.service.orchestrator.steps_end = True
    until(lambda: httpx.get(server.url + '/health').status_code == 200)
  finally:
    server.stop()


def test_a_failure_is_told_to_whoever_waits():
  server = Running(lambda _: Stuck(broken=True))
  try:
    server.await_status('ready')
    answer = post(server, '/v1/completions', TEXT)
    assert answer.status_code == 500
    assert answer.json()['error']['type'] == 'server_error'
    assert httpx.get(server.url + '/health').json() == {'status': 'failed'}
    again = post(server, '/v1/completions', TEXT)
    assert again.status_code == 503
    assert 'the device fell off' in again.json()['error']['message']
  finally:
    server.stop()
