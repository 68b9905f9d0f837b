"""A thousand requests that nobody should send, and what is left after them.

They are seeded, and talk to the server over raw sockets, sixty at a time. The
server answers each with a status that blames the client, or hangs up; after
them it has every page, task, connection and file back, about as much memory as
before, and the same tokens for a normal request.
"""

import asyncio
import collections
import copy
import ctypes
import dataclasses
import functools
import gc
import json
import os
import pathlib
import random
import socket
import struct
import threading
import time

import httpx
import hypothesis
import pytest
import schemathesis

from dsjax.runtime import orchestrator_thread
from dsjax.scheduling import prefix_cache
from dsjax.scheduling.policy import DISTSERVE
from experiments.verify.anything import FETCHING
from tests.common.web import (
  CONFIG,
  LIMITS,
  WAIT_S,
  Running,
  all_back,
  make,
  post,
  until,
)

AT_ONCE = 60
BODY_S = 2.0  # that the server waits for a body
JUNK = (None, True, -1, 0, 1.5, 2**63, -2**63 - 1, 10**400, float('nan'),
        float('inf'), '', 'x' * 10**4, '\ud800', '\x00', 'a\udfffb', [], {},
        [None], [[]], [[1], 'a'], [-1], [10**9], {'a': 1}, {'': None},
        {'1': float('nan')}, [{}], [{'role': 'user'}], 'Infinity')
PATHS = ('/v1/completions', '/v1/chat/completions', '/tokenize',
         '/detokenize')
BODIES = {
    PATHS[0]: {
        'model': 'tiny', 'prompt': 'Hi', 'max_tokens': 4, 'temperature': 1.0,
        'top_p': 0.9, 'top_k': 5, 'min_p': 0.1, 'presence_penalty': 0.1,
        'frequency_penalty': 0.1, 'logit_bias': {'7': 1}, 'seed': 1, 'n': 1,
        'stop': ['q'], 'stop_token_ids': [3], 'ignore_eos': True,
        'min_tokens': 1, 'stream': True, 'logprobs': 1, 'user': 'me',
        'stream_options': {'include_usage': True}, 'echo': False},
    PATHS[1]: {
        'model': 'tiny', 'messages': [
            {'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]},
            {'role': 'assistant', 'content': None, 'tool_calls': [
                {'id': 'a', 'type': 'function', 'function': {
                    'name': 'f', 'arguments': '{"x": [1]}'}}]},
            {'role': 'tool', 'tool_call_id': 'a', 'content': '1'}],
        'max_completion_tokens': 4, 'logprobs': True, 'top_logprobs': 1,
        'tools': [], 'response_format': {'type': 'text'}, 'stream': False},
    PATHS[2]: {'prompt': 'Hi', 'add_generation_prompt': True,
               'chat_template_kwargs': {'a': 1}},
    PATHS[3]: {'tokens': [70, 71]}}
NORMAL = {'model': 'tiny', 'prompt': 'Why?', 'max_tokens': 24, 'seed': 7,
          'ignore_eos': True}


def http(path, body, method='POST', length=None, more=''):
  """The bytes of a request."""
  return (f'{method} {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n'
          f'Content-Type: application/json\r\n{more}Content-Length: '
          f'{len(body) if length is None else length}\r\n\r\n').encode(
              errors='replace') + body


def sent(path, body):
  """A request with a body of JSON, whose answer must come."""
  return http(path, json.dumps(body).encode()), 'answer'


def valid(rng):
  path = rng.choice(PATHS)
  return path, copy.deepcopy(BODIES[path])


def places(value):
  """(container, key) of everything in a JSON value."""
  for key in (range(len(value)) if isinstance(value, list) else
              value if isinstance(value, dict) else ()):
    yield value, key
    yield from places(value[key])


# --- what is sent: each gives (bytes, how) ------------------------------------
# how: 'answer' (it must come), 'drop' (leave at once), 'read' (leave in the
# middle of the answer), 'hold' (send no more and wait), 'drip' (byte by byte).


def malformed(rng):
  path, body = valid(rng)
  raw = bytearray(json.dumps(body).encode())
  for _ in range(rng.randint(1, 4)):
    place = rng.randrange(len(raw) or 1)
    if raw and rng.random() < 0.5:
      raw[place] = rng.randrange(256)
    else:
      del raw[place:place + rng.randint(1, 9)]
  return http(path, bytes(raw)), 'answer'


def not_an_object(rng):
  body = rng.choice((b'', b'{', b'nul', b'\xff\xfe', b'[' * 10**5, b'1e999',
                     b'{"a":' * 10**4, b'9' * 10**4, b'{"model": NaN}', b'[]',
                     b'"\\ud800"', b'{"model": "tiny"} {}'))
  data = http(rng.choice(PATHS), body)
  return data.replace(b'application/json', rng.choice(
      (b'application/json', b'text/plain'))), 'answer'


def wrong_type(rng):
  path, body = valid(rng)
  name = rng.choice([*body, 'surprise', '\ud800', ''])
  value = rng.choice(JUNK)
  if rng.random() < 0.2:
    for _ in range(rng.choice((3, 500))):
      value = rng.choice(([value], {'a': value}))
  return sent(path, body | {name: value})


def two_wrong(rng):
  path, body = valid(rng)
  for container, key in rng.sample(list(places(body)), k=2):
    container[key] = rng.choice(JUNK)
  return sent(path, body)


def surrogates(rng):
  text = ''.join(rng.choice('a\ud83d\udc00é\u200b\U0001f41d') for _ in range(9))
  path = rng.choice(PATHS[:3])
  body = BODIES[path] | ({'messages': [{'role': 'user', 'content': text}]}
                         if path == PATHS[1] else {'prompt': text})
  return sent(path, body | ({} if path == PATHS[2] else {'stop': [text]}))


def a_mebibyte(rng):
  """Close to the limit of a body, so that all of it is read."""
  size = 2**20 - 2000
  path = rng.choice(PATHS[:3])
  text = rng.choice(('x', 'ab ', '[[')) * (size // 3)
  return sent(path, {'model': 'tiny'} | rng.choice((
      {'prompt': text[:size]}, {'prompt': [7] * (size // 4)},
      {'messages': [{'role': 'user', 'content': text[:size - 99]}]},
      {'prompt': [text[:8000]] * 120})))


def many_stops(rng):
  stop = [f's{i}' for i in range(rng.choice((17, 5000)))]
  return sent(PATHS[0], BODIES[PATHS[0]] | {'stop': rng.choice((
      stop, ['y' * 10**5] * 3, ['ab' * 2000] * 16))})


def not_http(rng):
  return rng.choice((
      rng.randbytes(200), b'GET / HTTP/9.9\r\n\r\n', b'\r\n' * 50,
      b'GET /' + b'a' * 10**5, b'POST ' + PATHS[0].encode() + b' HTTP/1.1\r\n',
      b'GET /%ff%00/../../etc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n',
      b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', b'\x16\x03\x01\x02\x00\x01\x00',
      http(PATHS[0], b'{}', more='X: ' + 'y' * 10**5 + '\r\n'),
      http(PATHS[0], b'{}', length=-1), http(PATHS[0], b'{}', length='1e3'),
      http(PATHS[0], b'{}', length=10**30), http(PATHS[0], b'{}', length=2**31),
      http(PATHS[0], b'{}', more='Content-Length: 7\r\n'),
      http(PATHS[0], b'zz\r\n', more='Transfer-Encoding: chunked\r\n'),
      http('/health', b'', more='Upgrade: websocket\r\n'),
      http('/v1/models/' + '%2e' * 3000, b'', method='GET'),
      http('/' + 'é', b'', method='GET'))), 'hold'


def odd_calls(rng):
  method = rng.choice(('GET', 'PUT', 'DELETE', 'PATCH', 'HEAD', 'OPTIONS',
                       'BREW', 'POST'))
  path = rng.choice((*PATHS, '/v1/models', '/metrics', '/health', '/live', '/',
                     '/placement', '/openapi.json', '/v1/models/x', '/nothing',
                     '/v1/completions/', '//', '/v1/models/tiny?x=\x7f'))
  return http(path, rng.randbytes(rng.choice((0, 30))), method), 'answer'


def dropped(rng):
  path = rng.choice(PATHS[:2])
  body = BODIES[path] | {'stream': rng.random() < 0.7, 'n': rng.choice((1, 3)),
                         'ignore_eos': True}
  body |= {'max_tokens': 90} if path == PATHS[0] else {
      'max_completion_tokens': 90}
  return http(path, json.dumps(body).encode()), rng.choice(('drop', 'read'))


def half_open(rng):
  data = http(PATHS[0], json.dumps(BODIES[PATHS[0]]).encode())
  return data[:rng.randrange(len(data))], 'hold'


def slow(rng):
  return sent(*valid(rng))[0], 'drip'


def two_at_once(rng):
  """Pipelined: the second waits its turn, and is dropped with the first."""
  data = http(PATHS[0], json.dumps(BODIES[PATHS[0]]).encode()).replace(
      b'Connection: close\r\n', b'')
  return data * 3, rng.choice(('read', 'drop'))


KINDS = {malformed: 290, not_an_object: 60, wrong_type: 500, two_wrong: 160,
         surrogates: 100, a_mebibyte: 40, many_stops: 60, not_http: 200,
         odd_calls: 230, dropped: 200, half_open: 80, slow: 40,
         two_at_once: 40}
MAY_SAY = {200, 400, 404, 405, 408, 413, 414, 415, 431, 501, 505}


async def send(address, data, how):
  """Sends one; returns the status, or None where there was no answer."""
  reader, writer = await asyncio.open_connection(*address)
  status, answer = None, asyncio.ensure_future(reader.read(100))
  try:
    if how == 'drip':
      head = data.index(b'\r\n\r\n') + 4
      writer.write(data[:head])
      for i in range(head, len(data)):
        writer.write(data[i:i + 1])
        if (await asyncio.wait({answer}, timeout=BODY_S / 20))[0]:
          break
    else:
      writer.write(data)
      await writer.drain()
    if how == 'drop':
      # Closed with a reset, as by a client that has crashed.
      writer.get_extra_info('socket').setsockopt(
          socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
      return None
    head = await answer
    if head.startswith(b'HTTP/1.1 '):
      status = int(head[9:12])
    if how != 'read':
      while await reader.read(2**16):
        pass
  except ConnectionError:
    pass  # it hung up, which is an answer
  finally:
    answer.cancel()
    writer.close()
  return status


def bombard(address, counts, seed):
  """Sends as many of each kind, mixed: {(kind, status): how many}."""
  rng = random.Random(seed)
  todo = [kind for kind, count in counts.items() for _ in range(count)]
  rng.shuffle(todo)
  counted = collections.Counter()

  async def work():
    while todo:
      kind = todo.pop()
      data, how = kind(rng)
      async with asyncio.timeout(WAIT_S):
        status = await send(address, data, how)
      key = kind.__name__, status
      counted[key] += 1
      bad = status is not None and status not in MAY_SAY
      bad |= status is None and how in ('answer', 'drip')
      assert not bad, (key, data[:2000])

  async def all_of_them():
    async with asyncio.TaskGroup() as group:
      for _ in range(AT_ONCE):
        group.create_task(work())
  asyncio.run(all_of_them())
  return counted


# --- what is left ------------------------------------------------------------


def rss_bytes():
  """Memory of this process, without what malloc only keeps for later."""
  ctypes.CDLL(None).malloc_trim(0)
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE')


def left(running):
  """What there is more of when something leaks."""
  async def tasks():
    return sum(not t.done() for t in asyncio.all_tasks())
  gc.collect()
  kinds = (orchestrator_thread.Stream, orchestrator_thread.Call,
           asyncio.Task)
  return {
      'tasks': asyncio.run_coroutine_threadsafe(
          tasks(), running.http.loop).result(WAIT_S),
      'connections': len(running.http.server_state.connections),
      'threads': sum(not t.name.startswith('asyncio_')
                     for t in threading.enumerate()),
      'files': len(os.listdir('/proc/self/fd')),
      'objects': sum(isinstance(x, kinds) for x in gc.get_objects())}


@pytest.fixture(scope='module', params=[True, pytest.param(
    False, marks=pytest.mark.deep)], ids=['all on', 'no cache'])
def running(request):
  """With cache, streams, host memory and fetches, or none of it."""
  on = request.param
  config = dataclasses.replace(
      CONFIG, prefix_cache=on, stream_kv=on, host_bytes=on * 2**20,
      num_pages=20 if on else None)
  server = Running(functools.partial(make, config=config, policy=(
      FETCHING if on else DISTSERVE)),
                   limits=dataclasses.replace(
                       LIMITS, body_s=BODY_S, keep_alive_s=BODY_S))
  try:
    server.await_status('ready', 'failed')
    assert server.service.status == 'ready', server.service.error
    yield server
  finally:
    server.stop()


def text_of(running, **more):
  answer = post(running, '/v1/completions', NORMAL | more)
  return answer.json()['choices'][0]['text']


@pytest.mark.parametrize('share', [8, pytest.param(
    2, marks=pytest.mark.deep)])
def test_hostile_requests_leave_nothing_behind(running, share):
  assert sum(KINDS.values()) == 2000
  gc.freeze()  # what other tests have left is not looked through
  normal = [text_of(running, seed=s) for s in range(3)]
  part = {kind: count // share for kind, count in KINDS.items()}
  bombard(running.address, part, 0)  # fills what is filled once
  all_back(running)
  until(lambda: not running.http.server_state.connections)
  before, size = left(running), rss_bytes()
  answers, stop = [], threading.Event()

  def keep_asking():  # a client among them, who must not notice
    while not stop.is_set():
      seed = len(answers) % 3
      answers.append(text_of(running, seed=seed) == normal[seed])
      time.sleep(0.05)
  thread = threading.Thread(target=keep_asking)
  thread.start()
  try:
    counted = bombard(running.address, part, 1)
  finally:
    stop.set()
    thread.join(WAIT_S)
  assert len(answers) > 3 and all(answers)
  assert [text_of(running, seed=s) for s in range(3)] == normal
  all_back(running)
  until(lambda: not running.http.server_state.connections)
  assert left(running) == before
  grown = rss_bytes() - size
  assert grown < 32 * 2**20, f'{grown / 2**20:.0f} MiB more'
  assert httpx.get(running.url + '/health').status_code == 200
  # They did get where they were meant to.
  statuses = {status for _, status in counted}
  assert statuses - {None} == MAY_SAY, counted
  assert counted['slow', 408] and counted['a_mebibyte', 400]
  for instance in running.service.orchestrator.state.instances:
    kept = prefix_cache.num_idle(instance.pool)
    assert kept <= instance.pool.num_pages
    assert bool(kept) == running.service.orchestrator.config.prefix_cache
    assert not instance.loading
    if instance.host:
      slots = instance.host.slots
      assert len(slots.kept) <= slots.num_pages
      prefix_cache.check(slots, ())


def test_its_own_description_holds(running):
  schema = schemathesis.openapi.from_dict(
      httpx.get(running.url + '/openapi.json').json())
  asked = []
  for operation in schema.get_all_operations():
    operation = operation.ok()

    @hypothesis.settings(max_examples=12, deadline=None, database=None,
                         derandomize=True, suppress_health_check=list(
                             hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy())
    def check(case):
      answer = case.call(base_url=running.url)
      # A valid body may still be too long, or have ids that no token has.
      case.validate_response(answer, excluded_checks=[
          schemathesis.checks.positive_data_acceptance])
      asked.append((case.method, case.path, answer.status_code))
    check()
  assert {path for _, path, _ in asked} >= set(PATHS)
  all_back(running)
