"""HTTP itself: RFC 9110 and what browsers and pools of connections expect."""

import dataclasses
import email.utils
import json
import socket
import time

import httpx
import pytest

from dsjax.http.service import Limits
from tests.common.web import (
  CHAT,
  LIMITS,
  TEXT,
  WAIT_S,
  Running,
  post,
  until,
)

PAGE = 'https://app.example'


def talk(running, head, body=b'', end=True):
  """The bytes that come back for a request; end: until the server closes."""
  with socket.create_connection(running.address, WAIT_S) as raw:
    raw.sendall(head.replace('\n', '\r\n').encode() + b'\r\n\r\n' + body)
    got = b''
    while data := raw.recv(2**16):
      got += data
      if not end:
        break
  return got


def status(data):
  return int(data[9:12])


@pytest.mark.parametrize('head, wanted', [
    ('FOO /health HTTP/1.1', 501), ('get /health HTTP/1.1', 501),
    ('PUT /health HTTP/1.1', 405), ('OPTIONS * HTTP/1.1', 204),
    ('GET /' + 40_000 * 'x' + ' HTTP/1.1', 414),
    ('GET /health HTTP/1.1\nX: ' + 40_000 * 'x', 431)])
def test_what_is_no_request_of_ours_has_its_own_status(running, head, wanted):
  got = talk(running, head + '\nHost: x\nConnection: close')
  assert status(got) == wanted, got[:300]
  assert wanted != 204 or b'GET, HEAD, POST' in got


JSON_HEAD = ('POST /v1/completions HTTP/1.1\nHost: x\nConnection: close\n'
             'Content-Type: application/json\n')
MANY = 3 * LIMITS.max_body_bytes


@pytest.mark.parametrize('head, body, wanted, why', [
    ('GET /' + 200_000 * 'x' + ' HTTP/1.1\nHost: x', b'', 414, 'the target'),
    (JSON_HEAD + 'X: ' + 200_000 * 'y', b'', 431, 'target and headers'),
    (JSON_HEAD + '\n'.join(f'X{i}: ' + 900 * 'y' for i in range(200)), b'',
     431, 'target and headers'),
    (JSON_HEAD + f'Content-Length: {MANY}', bytes(MANY), 413, 'the body has'),
    (JSON_HEAD + 'Transfer-Encoding: chunked', b'%x\r\n' % MANY + bytes(MANY),
     413, 'the body has more'),
    (JSON_HEAD + 'Content-Length: 2\nContent-Length: 3', bytes(MANY), 400,
     'the request: must be HTTP/1.1: conflicting'),
    (JSON_HEAD + 'Content-Length: -1', bytes(MANY), 400, 'the request: must'),
    (JSON_HEAD + 'Transfer-Encoding: chunked', b'zz\r\n' + bytes(MANY), 400,
     'the request: must be HTTP/1.1: illegal chunk header'),
    (JSON_HEAD + 'Transfer-Encoding: chunked', b'2;' + MANY * b'a', 400,
     'the line before a chunk'),
    (JSON_HEAD + 'Transfer-Encoding: gzip, chunked', bytes(MANY), 501,
     'transfer-encoding: must be chunked, once'),
    (JSON_HEAD + 'Transfer-Encoding: identity', b'{}', 501, 'transfer-enc'),
    ('GET /health HTTP/1.1\nHost x', b'', 400, 'the request: must be HTTP/1.1'),
    ('GET /health HTTP/1.1\nHost: x\nHost: y', b'', 400, 'the request: must'),
    ('PRI * HTTP/2.0', b'SM\r\n\r\n', 505, 'the version of HTTP')])
def test_what_is_refused_early_is_told_whatever_follows(running, head, body,
                                                        wanted, why):
  """The client, who sends all before it reads, meets no reset."""
  got = talk(running, head, body)
  assert status(got) == wanted, got[:300]
  fields, _, said = got.partition(b'\r\n\r\n')
  assert json.loads(said)['error']['message'].startswith(why)
  assert b'\r\nx-request-id: ' in fields
  assert b'\r\nconnection: close' in fields.lower()


def test_a_body_without_end_is_dropped():
  server = Running(limits=dataclasses.replace(LIMITS, max_body_bytes=1000))
  try:
    server.await_status('ready')
    with (socket.create_connection(server.address, WAIT_S) as raw,
          pytest.raises(ConnectionError)):
      raw.sendall(JSON_HEAD.replace('\n', '\r\n').encode()
                  + b'Content-Length: 99999999999\r\n\r\n')
      while True:
        raw.sendall(bytes(2**16))
  finally:
    server.stop()


@pytest.mark.parametrize('empty', ['\r\n', '\n', '\r\n\r\n\r\n'])
def test_empty_lines_before_a_request_are_passed_over(running, empty):
  ask = b'GET /health HTTP/1.1\r\nHost: x\r\n'
  body = json.dumps(TEXT | {'max_tokens': 1}).encode()
  first = (b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: '
           b'application/json\r\nContent-Length: %d\r\n\r\n' % len(body))
  line = empty.encode()
  for parts in ([line + ask + b'Connection: close\r\n\r\n'],
                [line, ask + b'Connection: close\r\n\r\n'],
                [line[:1], line[1:] + ask + b'Connection: close\r\n\r\n'],
                [first + body + line + ask + b'\r\n' + line + ask
                 + b'Connection: close\r\n\r\n']):
    got = b''
    with socket.create_connection(running.address, WAIT_S) as raw:
      raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      for part in parts:
        raw.sendall(part)
        time.sleep(0.02)  # apart, if the system lets them
      while data := raw.recv(2**16):
        got += data
    assert got.count(b'HTTP/1.1 200') == got.count(b'HTTP/1.1') == (
        3 if first in parts[0] else 1), got


@pytest.mark.parametrize('body', [
    b'{"prompt": "\xff"}', b'[' * 100_000,
    b'{"max_tokens": %s}' % (b'9' * 5000)])
def test_a_body_that_cannot_be_read_is_told_what_may_be(running, body):
  answer = httpx.post(running.url + '/v1/completions', content=body,
                      headers={'Content-Type': 'application/json'})
  assert answer.status_code == 400
  assert answer.json()['error']['message'].startswith(
      ('body: must be JSON in UTF-8', 'the body is not JSON'))


@pytest.mark.parametrize('path', ['/', '/health', '/v1/models', '/metrics',
                                  '/placement', '/nothing'])
def test_head_is_get_without_the_body(running, path):
  got, head = httpx.get(running.url + path), httpx.head(running.url + path)
  assert head.status_code == got.status_code and not head.content
  assert head.headers['content-type'] == got.headers['content-type']
  assert int(head.headers['content-length']) > 0


@pytest.mark.parametrize('method, path, allow', [
    ('GET', '/v1/completions', {'POST'}), ('HEAD', '/tokenize', {'POST'}),
    ('PUT', '/v1/chat/completions', {'POST'}),
    ('POST', '/health', {'GET', 'HEAD'}),
    ('OPTIONS', '/v1/models', {'GET', 'HEAD'}),
    ('DELETE', '/v1/models/tiny', {'GET', 'HEAD'})])
def test_another_method_is_told_which_are_allowed(running, method, path,
                                                  allow):
  answer = httpx.request(method, running.url + path)
  assert answer.status_code == 405
  assert set(answer.headers['Allow'].split(', ')) == allow
  if method != 'HEAD':
    assert answer.json()['error']['message'].startswith('method: must be ')


@pytest.mark.parametrize('accept', ['application/json', 'text/event-stream',
                                    '*/*'])
@pytest.mark.parametrize('stream', (False, True))
def test_json_and_a_stream_are_not_negotiated(running, accept, stream):
  """Clients ask for JSON where they want a stream."""
  answer = post(running, '/v1/completions', TEXT | {
      'stream': stream, 'max_tokens': 1}, headers={'Accept': accept})
  assert answer.status_code == 200
  kind = 'text/event-stream' if stream else 'application/json'
  assert answer.headers['content-type'].startswith(kind)


@pytest.mark.parametrize('head, want, also', [
    ('GET /health HTTP/1.1\nHost: a\nConnection: close', 200, b''),
    ('GET /health HTTP/1.0', 200, b''),
    ('GET /health HTTP/1.1', 400, b'"error"'),  # without a host
    ('GET /health', 400, b'"error"'),
    ('GET /nothing HTTP/1.1\nHost: a\nConnection: close', 404, b'"error"')])
def test_every_answer_has_a_date_and_closes_when_asked(running, head, want,
                                                       also):
  data = talk(running, head)
  assert status(data) == want and also in data
  fields = dict(line.lower().split(b': ', 1) for line in
                data.split(b'\r\n\r\n')[0].split(b'\r\n')[1:])
  assert email.utils.parsedate_to_datetime(fields[b'date'].decode())
  assert fields[b'connection'] == b'close'
  assert fields[b'content-type'] == b'application/json'


def test_a_body_is_asked_for_where_it_is_read(running):
  body = json.dumps(TEXT | {'max_tokens': 1}).encode()
  head = ('POST {} HTTP/1.1\nHost: a\nContent-Type: application/json\n'
          'Expect: {}\nContent-Length: {}')
  data = talk(running, head.format('/v1/completions', '100-continue',
                                   len(body)) + '\nConnection: close', body)
  first, _, rest = data.partition(b'\r\n\r\n')
  assert status(first) == 100 and status(rest) == 200
  # Where it is not, the answer comes at once, and no body is waited for.
  for path, expect, size, want in (
      ('/v1/completions', '100-continue', 10**9, 413),
      ('/nothing', '100-continue', 9, 404),
      ('/v1/completions', 'tea', 9, 417)):
    data = talk(running, head.format(path, expect, size))
    assert status(data) == want and b'\r\nconnection: close\r\n' in data


def test_a_connection_lives_longer_than_clients_keep_it(running):
  # aiohttp 15 s, Java 30 s, nginx 60 s, Go 90 s.
  assert Limits().keep_alive_s > 90
  connections = running.http.server_state.connections
  with httpx.Client() as pool:
    pool.get(running.url + '/health')

    def idle():
      return [c.timeout_keep_alive_task for c in connections
              if c.timeout_keep_alive_task]
    until(idle)
    left_s = idle()[-1].when() - running.http.loop.time()
    assert left_s > 90
    pool.get(running.url + '/health')


def test_an_idle_connection_is_closed_when_set():
  server = Running(limits=dataclasses.replace(LIMITS, keep_alive_s=1))
  try:
    data = talk(server, 'GET /health HTTP/1.1\nHost: a')  # until it closes
    assert data.startswith(b'HTTP/1.1 ')
  finally:
    server.stop()


def test_pages_of_other_sites_ask_only_where_set(running):
  ask = {'Origin': PAGE, 'Access-Control-Request-Method': 'POST',
         'Access-Control-Request-Headers': 'authorization,content-type'}
  path = '/v1/chat/completions'
  assert httpx.options(running.url + path, headers=ask).status_code == 405
  assert 'access-control-allow-origin' not in post(
      running, path, CHAT | {'max_tokens': 1}, headers={'Origin': PAGE}).headers
  server = Running(origins=(PAGE + '/',), key='secret')
  try:
    server.await_status('ready')
    before = httpx.options(server.url + path, headers=ask)
    assert before.status_code == 200  # a preflight has no key
    assert before.headers['access-control-allow-origin'] == PAGE
    assert 'authorization' in before.headers['access-control-allow-headers']
    for wrong in ({'Origin': 'https://other.example'},
                  {'Access-Control-Request-Method': 'DELETE'}):
      answer = httpx.options(server.url + path, headers=ask | wrong)
      assert answer.status_code == 400
      error = answer.json()['error']
      assert error['message'].split(':')[0] in ('origin', 'method')
      assert len(answer.headers['X-Request-Id']) == 24
      assert ('access-control-allow-origin' in answer.headers) == (
          'Origin' not in wrong)
    assert len(before.headers['X-Request-Id']) == 24
    assert server.metrics.num_rejected == 2
    for key, want in (('secret', 200), ('wrong', 401)):  # errors are read too
      answer = post(server, path, CHAT | {'max_tokens': 1}, headers={
          'Origin': PAGE, 'Authorization': f'Bearer {key}'})
      assert answer.status_code == want
      assert answer.headers['access-control-allow-origin'] == PAGE
      assert 'X-Request-Id' in answer.headers['access-control-expose-headers']
  finally:
    server.stop()


@pytest.mark.parametrize('target, want', [
    ('http://x/v1/models', 200), ('HTTPS://x:80/health?a=b', 200),
    ('http://x', 200), ('http://x?a=b', 200), ('http://x/nothing', 404),
    ('/http://x/health', 404)])
def test_a_target_may_be_a_whole_url(running, target, want):
  data = talk(running, f'GET {target} HTTP/1.1\nHost: x\nConnection: close')
  assert status(data) == want


@pytest.mark.parametrize('path, want', [
    ('/tokenize', 200), ('/nothing', 404), ('/v1/models', 405)])
def test_a_connection_ends_after_a_body_of_two_lengths(running, path, want):
  body = json.dumps({'prompt': 'Hi'}).encode()
  piece = b'%x\r\n%b\r\n0\r\n\r\n' % (len(body), body)
  data = talk(running, f'POST {path} HTTP/1.1\nHost: x\nContent-Length: 4\n'
              'Content-Type: application/json\nTransfer-Encoding: chunked',
              piece + b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n')
  assert status(data) == want and data.count(b'HTTP/1.1 ') == 1
  assert b'\r\nconnection: close\r\n' in data
