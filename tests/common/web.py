"""A server of the tiny model on a real socket, for tests that ask it."""

import asyncio
import contextlib
import re
import socket
import threading
import time

import httpx
import jax

from dsjax.checkpoints import checkpoint
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.http import routes, socket_server, telemetry
from dsjax.http.service import Limits, Service
from dsjax.runtime.orchestrator import serve
from dsjax.scheduling import prefix_cache, scheduler
from dsjax.scheduling.policy import DISTSERVE
from tests.common.fake_engine import FakeEngine

MODEL = checkpoint.load('tiny')
CONFIG = EngineConfig(
    max_len=256, page_size=16, max_seqs=4, prefill_tokens=32, prefill_seqs=2,
    chunk_tokens=32, transfer_pages=1)
PLACEMENT = Placement(prefill=[Plan()], decode=[Plan()])
LIMITS = Limits(body_s=20.0, max_body_bytes=2**20, request_s=60.0, drain_s=20.0)
WAIT_S, START_S = 60, 300
CHAT = {'model': 'tiny', 'messages': [{'role': 'user', 'content': 'Hi'}]}
TEXT = {'model': 'tiny', 'prompt': 'Hi'}


def make(report, make_engine=FakeEngine, config=CONFIG, policy=DISTSERVE):
  """An Orchestrator of one prefill and one decode instance, both fakes."""
  return serve(MODEL, PLACEMENT, config, devices=jax.devices()[:2],
               report=report, keep_events=1, make_engine=make_engine,
               policy=policy)


class Running:
  """A server in a thread: url, service, metrics, and the last to leave."""

  def __init__(self, make=make, limits=LIMITS, key=None,
               log_text=False, origins=()):
    self.metrics = telemetry.Gauges('tiny')
    self.service = Service(make, limits, self.metrics)
    self.app = routes.make_app(self.service, self.metrics, 'tiny', key,
                               Slo(1.0, 0.1), log_text, origins)
    self.http = socket_server.Server(self.app, self.service)
    self.listener = socket.create_server(('127.0.0.1', 0))
    self.address = self.listener.getsockname()
    self.url = f'http://127.0.0.1:{self.address[1]}'
    self.thread = threading.Thread(
        target=lambda: asyncio.run(self.http.serve([self.listener])))
    self.thread.start()

  def await_status(self, *statuses):
    """Waits for one of them, for as long as compiling may take."""
    until(lambda: self.service.status in statuses, START_S)

  def stop(self):
    self.http.should_exit = True
    self.thread.join(WAIT_S)
    assert not self.thread.is_alive() and not self.service.thread.is_alive()


@contextlib.contextmanager
def paced(running, steps):
  """The decode instance, a fake, completes as many steps and then none."""
  pace = running.service.orchestrator.engines[-1].pace
  pace.left = steps
  try:
    yield pace
  finally:
    pace.left = None


def until(true, wait_s=WAIT_S):
  """Waits until true() is; fails after wait_s."""
  end = time.monotonic() + wait_s
  while not true():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.005)


def all_back(running):
  """Every request and page has come back."""
  until(lambda: not running.service.streams and scheduler.idle(
      running.service.orchestrator.state))
  state = running.service.orchestrator.state
  scheduler.check(state)
  assert running.service.waiting == 0
  assert all(prefix_cache.num_free(i.pool) == i.pool.num_pages
             for i in state.instances)
  orchestrator = running.service.orchestrator
  until(lambda: not orchestrator.requests)
  assert not orchestrator.records and not orchestrator.seen
  assert all(len(e.spare) == CONFIG.max_seqs for e in orchestrator.engines)


def post(running, path, body, **options):
  """The answer to a body, of bytes or for JSON."""
  return httpx.post(running.url + path, timeout=WAIT_S, verify=False,
                    **options, **({'content': body} if isinstance(body, bytes)
                                  else {'json': body}))


def ids(text):
  """Its tokens, a byte each."""
  return MODEL.tokenizer.encode(text)


def only(text):
  """The logit_bias that lets a model say these bytes alone, in any order."""
  return {str(i): 100 for i in ids(text)}


def complete(client, **options):
  """A completion by OpenAI's client."""
  return client.completions.create(model='tiny', **{
      'prompt': 'Why?', 'max_tokens': 24, 'seed': 7} | options)


def metric(running, name):
  """The sum of a metric's samples of this exact name."""
  text = httpx.get(running.url + '/metrics', verify=False).text
  return sum(float(x) for x in re.findall(
      rf'^dsjax_{name}(?:\{{.*\}})? (\S+)$', text, re.M))
