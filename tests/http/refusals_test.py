"""What it refuses: bad fields, and too much."""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import socket

import httpx
import openai
import pytest

from tests.common.web import (
  CHAT,
  LIMITS,
  TEXT,
  WAIT_S,
  complete,
  metric,
  only,
  paced,
  post,
  until,
)


@pytest.mark.parametrize('body, param', [
    (TEXT | {'temperature': 3}, 'temperature'),
    (TEXT | {'temperature': 'hot'}, 'temperature'),
    (TEXT | {'max_tokens': 0}, 'max_tokens'),
    (TEXT | {'max_tokens': 1.5}, 'max_tokens'),
    (TEXT | {'n': 10**400}, 'n'),
    (TEXT | {'n': 1000}, 'n'),
    (TEXT | {'top_p': float('nan')}, 'top_p'),
    (TEXT | {'seed': True}, 'seed'),
    (TEXT | {'stop': ['x'] * 17}, 'stop'),
    (TEXT | {'stop': ['']}, 'stop'),
    (TEXT | {'stop': ['ab', 'x' * 1025]}, 'stop'),
    (TEXT | {'logit_bias': {'260': 1}}, 'logit_bias'),
    (TEXT | {'logit_bias': {'x': 1}}, 'logit_bias'),
    (TEXT | {'logprobs': 21}, 'logprobs'),
    (TEXT | {'min_tokens': 99}, 'min_tokens'),
    (TEXT | {'echo': True}, 'echo'),
    (TEXT | {'prompt': ''}, 'prompt'),
    (TEXT | {'prompt': []}, 'prompt'),
    (TEXT | {'prompt': [260]}, 'prompt'),
    (TEXT | {'prompt': 'a\ud800'}, 'prompt'),
    (TEXT | {'\ud800': 1}, None),
    (TEXT | {'colour': 'red'}, 'colour'),
    ({'prompt': 'Hi'}, 'model'),
    ([], None),
    (CHAT | {'messages': []}, 'messages'),
    (CHAT | {'messages': [{'role': 'king', 'content': 'Hi'}]}, 'messages'),
    (CHAT | {'messages': [{'role': 'user'}]}, 'messages'),
    (CHAT | {'tools': [{}]}, 'tools'),
    (CHAT | {'top_logprobs': 2}, 'top_logprobs'),
    (CHAT | {'response_format': {'type': 'json_object'}}, 'response_format'),
])
def test_a_bad_field_is_named(running, body, param):
  path = '/v1/chat/completions' if 'messages' in body else '/v1/completions'
  answer = post(running, path, json.dumps(body).encode(),
                headers={'Content-Type': 'application/json'})
  error = answer.json()['error']
  assert answer.status_code == 400, error
  assert error['type'] == 'invalid_request_error'
  assert error['param'] == param, error
  assert set(error) == {'message', 'type', 'param', 'code'}


def test_errors_by_type(running, client):
  with pytest.raises(openai.BadRequestError) as error:
    complete(client, temperature=9)
  assert error.value.param == 'temperature'
  with pytest.raises(openai.NotFoundError) as error:
    client.completions.create(model='gpt-4', prompt='Hi')
  assert error.value.code == 'model_not_found'
  for options in ({'prompt': 'x' * 250}, {'prompt': 'x' * 10**5},
                  {'max_tokens': 10**9}):
    with pytest.raises(openai.BadRequestError,
                       match="model's maximum context length is 256 tokens"
                       ) as error:
      complete(client, **options)
    assert error.value.code == 'context_length_exceeded'
  large = post(running, '/v1/completions', b'{' + b' ' * LIMITS.max_body_bytes,
               headers={'Content-Type': 'application/json'})
  assert large.status_code == 413
  assert 'bytes' in large.json()['error']['message']
  assert httpx.get(running.url + '/nothing').json()['error']['type'] == (
      'not_found_error')
  assert httpx.get(running.url + '/v1/completions').status_code == 405
  assert metric(running, 'requests_rejected_total') >= 6
  reasons = set(re.findall(r'rejected_total{.*reason="(\w+)"}', httpx.get(
      running.url + '/metrics').text))
  assert reasons >= {'bad_request', 'not_found', 'too_long'}


def test_a_full_queue_says_when_to_come_back(running, client):
  old = running.service.limits
  running.service.limits = dataclasses.replace(old, max_waiting=2)
  try:
    with (paced(running, 0) as pace,
          concurrent.futures.ThreadPoolExecutor(12) as pool):
      answers = [pool.submit(post, running, '/v1/completions', TEXT | {
          'n': 2, 'max_tokens': 200, 'ignore_eos': True}) for _ in range(12)]
      until(lambda: any(a.done() for a in answers))  # the first is refused
      pace.left = None
      results = [a.result() for a in answers]
    with pytest.raises(openai.BadRequestError, match='n=3'):
      complete(client, n=3)
  finally:
    running.service.limits = old
  statuses = {a.status_code for a in results}
  assert statuses == {200, 429}
  refused = next(a for a in results if a.status_code == 429)
  assert int(refused.headers['Retry-After']) >= 1
  assert refused.json()['error']['type'] == 'rate_limit_error'


def test_a_first_token_that_would_come_too_late_is_refused(running):
  service = running.service
  old, share_s = service.limits, service._share_s
  try:
    service.limits = dataclasses.replace(old, max_ttft_s=1.0)
    service._share_s = 100.0
    assert post(running, '/v1/completions', TEXT).status_code == 200  # empty
    service._share_s, service.waiting = 100.0, service.waiting + 1
    answer = post(running, '/v1/completions', TEXT)
    service.waiting -= 1
  finally:
    service.limits, service._share_s = old, share_s
  assert answer.status_code == 429 and answer.headers['Retry-After'] == '60'


def test_tokens_that_would_come_too_slowly_are_refused(running, client):
  service = running.service
  old = service.limits
  complete(client)
  assert 0 < service._gap_s < 10  # it was measured
  try:
    service.limits = dataclasses.replace(old, max_tpot_s=1e-9)
    assert post(running, '/v1/completions', TEXT).status_code == 200  # empty
    with paced(running, 2):
      stream = complete(client, stream=True, max_tokens=250,
                        logit_bias=only('€'))
      next(stream)
      answer = post(running, '/v1/completions', TEXT)
      stream.close()
  finally:
    service.limits = old
  assert answer.status_code == 429 and 'Retry-After' in answer.headers
  assert answer.json()['error']['code'] == 'tpot'


def test_too_many_connections_are_told_so(running):
  connection = running.http.config.http_protocol_class
  old = connection.limits
  connection.limits = dataclasses.replace(old, max_connections=20)
  try:
    with contextlib.ExitStack() as stack:
      def ask():
        raw = stack.enter_context(
            socket.create_connection(running.address, WAIT_S))
        with contextlib.suppress(ConnectionError):
          raw.sendall(b'GET /health HTTP/1.1\r\nHost: a\r\n\r\n')
          return raw.recv(2000).lower()
        return b''
      answers = [ask() for _ in range(42)]
  finally:
    connection.limits = old
  assert answers[0].startswith(b'http/1.1 200')
  assert answers[25].startswith(b'http/1.1 503')
  assert b'retry-after: 1' in answers[25]
  assert b'application/json' in answers[25]
  assert answers[41] == b''  # not even told
