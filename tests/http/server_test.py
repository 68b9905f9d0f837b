"""The HTTP server over a real socket, asked by OpenAI's own client.

One server for the whole module, of fake engines, a byte a token; what needs a
device is in device_test.py. At its end everything must have come back: pages,
requests, threads.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import re
import socket
import threading
import time

import httpx
import openai
import pytest

from dsjax.config.request import Sampling
from dsjax.http import completions, socket_server, telemetry
from dsjax.http import service as service_module
from dsjax.runtime.orchestrator_thread import Call
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Preempt
from experiments.verify import faults, schedules
from tests.common.fake_engine import expected
from tests.common.web import (
  CHAT,
  CONFIG,
  LIMITS,
  MODEL,
  PLACEMENT,
  TEXT,
  WAIT_S,
  Running,
  all_back,
  complete,
  ids,
  metric,
  only,
  paced,
  post,
  until,
)


def joined(stream):
  """{choice: text} of a stream of completions."""
  texts = {}
  for chunk in stream:
    for choice in chunk.choices:
      texts[choice.index] = texts.get(choice.index, '') + choice.text
  return texts


# --- what it answers ---------------------------------------------------------


def test_models(client):
  found, = client.models.list().data
  assert found.id == 'tiny' and found.max_model_len == 256
  assert client.models.retrieve('tiny').id == 'tiny'
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('gpt-4')


def test_an_answer_has_its_log_probabilities_and_its_usage(client):
  answer = complete(client, temperature=0, max_tokens=8, logprobs=2,
                    extra_body={'ignore_eos': True})
  choice, = answer.choices
  assert choice.text == MODEL.tokenizer.decode(expected(
      ids('Why?'), Sampling(max_tokens=8, ignore_eos=True), (),
      MODEL.config.vocab_size))
  assert choice.finish_reason == 'length'
  assert choice.logprobs.token_logprobs == [-1] * 8
  assert len(choice.logprobs.top_logprobs) == 8
  assert choice.logprobs.text_offset[0] == 0
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)
  assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_may_be_ids_texts_or_a_batch_of_either(client):
  def text(prompt):
    said = complete(client, prompt=prompt, temperature=0, max_tokens=6)
    assert [c.index for c in said.choices] == list(range(len(said.choices)))
    return [c.text for c in said.choices]
  one, two = text('Why?'), text('How?')
  assert one != two
  assert text(ids('Why?')) == one
  assert text(['Why?', 'How?']) == text([ids('Why?'), ids('How?')]) == one + two


def test_chat(client):
  def ask(**options):
    return client.chat.completions.create(
        model='tiny', temperature=0, max_completion_tokens=6, seed=1,
        messages=[{'role': 'user', 'content': 'Hi'}], **options)
  said = ask(logprobs=True, top_logprobs=3)
  prompt = MODEL.tokenizer.chat([{'role': 'user', 'content': 'Hi'}])
  assert said.usage.prompt_tokens == len(prompt)
  choice, = said.choices
  assert choice.message.role == 'assistant'
  content = choice.logprobs.content
  assert b''.join(bytes(c.bytes) for c in content).decode(
      errors='replace') == choice.message.content
  assert all(len(c.top_logprobs) == 3 for c in content)
  # Greedy: the token chosen is the likeliest.
  assert all(c.logprob == c.top_logprobs[0].logprob for c in content)
  chunks = list(ask(stream=True, stream_options={'include_usage': True}))
  assert chunks[0].choices[0].delta.role == 'assistant'
  assert not chunks[-2].choices[0].delta.model_dump(exclude_none=True)
  assert not any(c.choices[0].finish_reason for c in chunks[:-2])
  assert ''.join(c.choices[0].delta.content or '' for c in chunks[:-1]) == (
      choice.message.content)
  assert chunks[-2].choices[0].finish_reason == choice.finish_reason
  assert chunks[-1].usage == said.usage and not chunks[-1].choices
  parts = [{'type': 'text', 'text': 'H'}, {'type': 'text', 'text': 'i'}]
  again = client.chat.completions.create(
      model='tiny', temperature=0, max_tokens=6,
      messages=[{'role': 'user', 'content': parts}])
  assert again.choices[0].message.content == choice.message.content


@pytest.mark.parametrize('text', ['€', 'ж', 'ไ', '語', '\U0001f41d'])
def test_a_stream_joins_to_the_whole_text_whatever_the_script(client, text):
  options = {'logit_bias': only(text), 'max_tokens': 240}
  for seed in range(40):  # until there are whole characters, and pieces
    whole = complete(client, seed=seed, **options).choices[0].text
    if text in whole and '\ufffd' in whole:
      break
  assert text in whole and '\ufffd' in whole
  assert joined(complete(client, seed=seed, stream=True, **options)) == {
      0: whole}
  messages = [{'role': 'user', 'content': text}]

  def chat(**more):
    return client.chat.completions.create(
        model='tiny', messages=messages, seed=seed, logprobs=True,
        **options | {'max_tokens': 60} | more)
  whole = chat().choices[0]
  assert ''.join(c.choices[0].delta.content or '' for c in chat(
      stream=True)) == whole.message.content
  # Whoever wants the bytes of the pieces has them in the logprobs.
  assert b''.join(bytes(c.bytes) for c in whole.logprobs.content).decode(
      errors='replace') == whole.message.content


def test_usage_may_come_with_every_chunk(running, client):
  counts = []
  with paced(running, 2) as pace:  # no more until there was a chunk
    for chunk in complete(client, stream=True, extra_body={'stream_options': {
        'include_usage': True, 'continuous_usage_stats': True}}):
      pace.left = None
      counts.append(chunk.usage.completion_tokens)
  assert counts == sorted(counts) and counts[-1] == 24 and counts[0] < 24


def test_stop_strings_end_the_text_across_tokens(client):
  def ask(**options):
    return complete(client, extra_body={
        'ignore_eos': True, 'min_tokens': options.pop('least', 0)}, **options)
  whole = ask().choices[0].text
  stop = whole[5:8]
  at = whole.index(stop)
  choice = ask(stop=['never', stop]).choices[0]
  assert (choice.text, choice.finish_reason) == (whole[:at], 'stop')
  assert joined(ask(stop=stop, stream=True)) == {0: whole[:at]}
  # What would end it with the last of the least is passed over.
  assert ask(stop=stop, least=24).choices[0].text == whole
  assert ask(stop=whole[0], least=1).choices[0].text[0] == whole[0]


def test_seeds_and_n(client):
  n = complete(client, n=3)
  texts = [c.text for c in n.choices]
  assert len(set(texts)) == 3 and n.usage.prompt_tokens == 4
  assert texts == [complete(client, seed=7 + i).choices[0].text
                   for i in range(3)]
  assert joined(complete(client, n=3, stream=True)) == dict(enumerate(texts))
  unseeded = {complete(client, seed=openai.omit).choices[0].text
              for _ in range(2)}
  assert len(unseeded) == 2


@pytest.mark.parametrize('field, value', [
    ('temperature', 0.0), ('top_p', 0.1), ('presence_penalty', 2.0),
    ('frequency_penalty', 2.0), ('logit_bias', {'70': 100}),
    ('top_k', 1), ('min_p', 0.9), ('repetition_penalty', 5.0),
    ('stop_token_ids', list(range(64)))])
def test_every_sampling_field_changes_the_answer(client, field, value):
  def text(body):
    return complete(client, max_tokens=40, extra_body=body).choices[0].text
  assert text({field: value}) != text({})


def test_fifty_streams_at_once_say_what_each_says_alone(running, client):
  alone = [complete(client, seed=i).choices[0].text for i in (0, 49)]

  async def all_of_them():
    async with openai.AsyncOpenAI(base_url=running.url + '/v1', api_key='-',
                                  max_retries=0, timeout=WAIT_S) as one:
      async def ask(seed):
        stream = await one.completions.create(
            model='tiny', prompt='Why?', max_tokens=24, seed=seed,
            stream=True)
        return ''.join([c.choices[0].text async for c in stream])
      return await asyncio.gather(*map(ask, range(50)))
  texts = asyncio.run(all_of_them())
  assert [texts[0], texts[49]] == alone


# --- clients that leave ------------------------------------------------------


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


# --- what it refuses ---------------------------------------------------------

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


def test_tokens_leave_before_what_follows_from_them(running, client,
                                                    monkeypatch):
  service, seen = running.service, []
  fleet, say = service.orchestrator.fleet, service.runner._say
  perform = fleet.perform

  def performed(command):
    seen.append(type(command).__name__)
    return perform(command)

  def said(function, updates):
    seen.append(sum(len(u.tokens) for _, u in updates))
    say(function, updates)
  monkeypatch.setattr(fleet, 'perform', performed)
  monkeypatch.setattr(service.runner, '_say', said)
  complete(client, prompt='Why?', max_tokens=6)
  assert seen[:3] == ['RunPrefill', 1, 'Migrate']


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
      found = [a.result() for a in answers]
    with pytest.raises(openai.BadRequestError, match='n=3'):
      complete(client, n=3)
  finally:
    running.service.limits = old
  statuses = {a.status_code for a in found}
  assert statuses == {200, 429}
  refused = next(a for a in found if a.status_code == 429)
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


# --- beside the answers ------------------------------------------------------


def test_tokenize_and_back(running):
  text = 'Ολα καλά \U0001f41d'
  found = post(running, '/tokenize', {'prompt': text}).json()
  assert found['tokens'] == ids(text) and found['count'] == len(ids(text))
  back = post(running, '/detokenize', {'tokens': found['tokens']}).json()
  assert back == {'prompt': text}
  messages = CHAT['messages']
  assert post(running, '/tokenize', {'messages': messages}).json()[
      'tokens'] == MODEL.tokenizer.chat(messages)
  for body in ({}, {'prompt': 'a', 'messages': messages}):
    assert post(running, '/tokenize', body).status_code == 400
  assert post(running, '/detokenize', {'tokens': [260]}).status_code == 400


def test_metrics_move(running, client, monkeypatch):
  names = (
      'ttft_seconds_count', 'tpot_seconds_count', 'itl_seconds_count',
      'request_seconds_sum', 'stage_seconds_total', 'requests_ended_total',
      'prompt_tokens_total', 'output_tokens_total', 'migrations_total',
      'kv_moved_bytes_total', 'kv_moved_seconds_total', 'device_steps_total',
      'host_seconds_total', 'prefill_batch_tokens_sum',
      'decode_batch_rows_sum')
  before = [metric(running, name) for name in names]
  server, go = running.service.orchestrator, threading.Event()
  poll = server.poll
  monkeypatch.setattr(server, 'poll', lambda: go.wait(WAIT_S) and poll())
  stream = complete(client, stream=True, max_tokens=200,
                    extra_body={'ignore_eos': True})
  try:
    until(lambda: server.unfinished)  # and no step of it is seen yet
    assert metric(running, 'requests') == 1  # now
    live = httpx.get(running.url + '/live').json()
    assert len(live['flow']) == 1
    assert [i['role'] for i in live['instances']] == ['prefill', 'decode']
  finally:
    go.set()
  list(stream)
  until(lambda: not running.service.streams)
  after = [metric(running, name) for name in names]
  still = [n for n, a, b in zip(names, before, after, strict=True) if a >= b]
  assert not still
  pages = sum(i.pool.num_pages for i in
              running.service.orchestrator.state.instances)
  until(lambda: scheduler.idle(running.service.orchestrator.state))
  assert metric(running, 'pages') == pages  # all of them free or owned


def test_preemptions_and_owners_of_pages_show(running, client):
  metrics = telemetry.Gauges('tiny')
  preempted = 0
  for seed in range(20):
    rules = schedules.random_rules(seed, 20)
    for moved in schedules.wander(rules, 0, seed):
      for event, commands in moved.log:
        metrics.observe(event, commands)
        preempted += sum(isinstance(c, Preempt) for c in commands)
  assert preempted > 0
  counted = f'dsjax_preemptions_total{{model="tiny"}} {preempted}.0'
  assert counted in metrics.text().decode()
  owned = {}

  def look():
    for i, one in enumerate(telemetry.snapshot(running.service.orchestrator)):
      assert sum(one['pages'].values()) == 64 and one['status'] == 'up'
      for owner, count in one['pages'].items():
        owned[i, owner] = max(count, owned.get((i, owner), 0))
    return owned[1, 'decoding'] and owned[0, 'prefilled']
  with paced(running, 2) as pace:
    stream = complete(client, stream=True, n=8, max_tokens=200,
                      extra_body={'ignore_eos': True})
    until(look)
    pace.left = None
    for _ in stream:
      look()


def test_the_log_has_ids_and_no_text(running, client, caplog):
  secret = 'Xyzzy'
  with caplog.at_level(logging.INFO):
    said = client.completions.with_raw_response.create(
        model='tiny', prompt=secret, max_tokens=4)
    with pytest.raises(openai.BadRequestError) as error:
      complete(client, prompt=secret, temperature=9, user=secret)
    with pytest.raises(openai.NotFoundError):
      client.completions.create(model=secret, prompt=secret)
  until(lambda: said.headers['x-request-id'] in caplog.text)
  assert f'{error.value.request_id} POST /v1/completions: 400 bad_request' in (
      caplog.text)
  assert '404 not_found' in caplog.text
  assert secret not in caplog.text
  wordy = Running(log_text=True)
  try:
    wordy.await_status('ready')
    with caplog.at_level(logging.INFO):
      post(wordy, '/v1/completions', TEXT | {'prompt': secret})
      until(lambda: secret in caplog.text)
  finally:
    wordy.stop()


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
  monkeypatch.setattr(completions.openai_schema.ResponseBuilder, 'chunks', fail)
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


def test_too_many_connections_are_told_so(running):
  config = running.http.config
  old, config.max_connections = config.max_connections, 20
  try:
    with contextlib.ExitStack() as stack:
      def ask():
        one = stack.enter_context(
            socket.create_connection(running.address, WAIT_S))
        with contextlib.suppress(ConnectionError):
          one.sendall(b'GET /health HTTP/1.1\r\nHost: a\r\n\r\n')
          return one.recv(2000).lower()
        return b''
      answers = [ask() for _ in range(42)]
  finally:
    config.max_connections = old
  assert answers[0].startswith(b'http/1.1 200')
  assert answers[25].startswith(b'http/1.1 503')
  assert b'retry-after: 1' in answers[25]
  assert b'application/json' in answers[25]
  assert answers[41] == b''  # not even told


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
  http = socket_server.Server(app, service)
  bound = socket.create_server(('127.0.0.1', 0))
  thread = threading.Thread(target=lambda: asyncio.run(http.serve([bound])))
  thread.start()
  try:
    with socket.create_connection(bound.getsockname(), WAIT_S) as one:
      one.sendall(b'GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n')
      if not reads:
        assert left.wait(WAIT_S)
      got = 0
      with contextlib.suppress(ConnectionError):
        while got <= size and (data := one.recv(2**20)):
          got += len(data)
      assert (got > size) == reads
    assert left.wait(WAIT_S)
  finally:
    http.should_exit = True
    thread.join(WAIT_S)


def test_health_page_and_placement(running):
  assert httpx.get(running.url + '/health').json() == {'status': 'ready'}
  assert '<title>dsjax' in httpx.get(running.url + '/').text
  found = httpx.get(running.url + '/placement').json()
  assert found['mode'] == 'disaggregated'
  assert [i['role'] for i in found['instances']] == ['prefill', 'decode']
  assert found['instances'][0]['pages'] == 64
  assert 'paths' in httpx.get(running.url + '/openapi.json').json()


def test_the_key_is_asked_for():
  started = threading.Event()

  def slow(report):
    while True:  # starts for as long as it is let
      started.set()
      report(1, 3, 'a step')
      time.sleep(0.01)
  one = Running(slow, key='secret')
  try:
    started.wait(WAIT_S)
    bare = httpx.get(one.url + '/v1/models')
    assert bare.status_code == 401
    assert bare.json()['error']['type'] == 'authentication_error'
    for key, status in (('wrong', 401), ('secret', 503)):
      assert httpx.get(one.url + '/v1/models', headers={
          'Authorization': f'Bearer {key}'}).status_code == status
    health = httpx.get(one.url + '/health')
    assert health.status_code == 503
    assert health.json()['status'] == 'starting'
    answer = post(one, '/v1/completions', TEXT,
                  headers={'Authorization': 'Bearer secret'})
    assert answer.status_code == 503 and answer.headers['Retry-After'] == '5'
    assert answer.json()['error']['message'] == (
        'the server is starting: 1 of 3 steps compiled, a step')
  finally:
    one.stop()


@pytest.mark.parametrize('patience_s', (20.0, 0.05))
def test_draining_lets_running_requests_finish(patience_s):
  one = Running(limits=dataclasses.replace(LIMITS, drain_s=patience_s))
  try:
    one.await_status('ready')
    with openai.OpenAI(base_url=one.url + '/v1', api_key='-', max_retries=0,
                       timeout=WAIT_S) as client:
      # Enough that the last ones still wait when the patience ends.
      with paced(one, 4):
        streams = [complete(client, stream=True, max_tokens=240,
                            extra_body={'ignore_eos': True, 'n': 8})
                   for _ in range(2)]
        first = next(streams[0])
        one.http.loop.call_soon_threadsafe(one.http.leave)
        until(lambda: one.service.status != 'ready')
        if patience_s > 1:
          refused = post(one, '/v1/completions', TEXT)
          assert refused.status_code == 503
          assert 'draining' in refused.json()['error']['message']
        else:  # it runs out while nothing moves
          until(lambda: not one.service.orchestrator.unfinished)
      if patience_s > 1:
        chunks = [c for s in streams for c in s]
        ends = [c.choices[0].finish_reason for c in (first, *chunks)]
        assert ends.count('length') == 16
      else:
        for stream in streams:
          with pytest.raises(openai.APIError, match='stopped before'):
            list(stream)
    one.thread.join(WAIT_S)
    assert not one.thread.is_alive()
    scheduler.check(one.service.orchestrator.state)
    assert scheduler.idle(one.service.orchestrator.state)
  finally:
    one.stop()


class Stuck:
  """An orchestrator that takes requests and never gets anywhere."""

  def __init__(self, broken=False):
    self.next_id, self.origin, self.observers = 0, 0.0, []
    self.busy, self.broken, self.steps_end = False, broken, False
    self.model, self.config, self.placement = MODEL, CONFIG, PLACEMENT
    self.scheduler_config = scheduler.Config((), 256)
    self.state = scheduler.init(self.scheduler_config)
    self.copied_bytes = self.steps = self.copy_s = self.host_s = 0

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
  one = Running(lambda _: Stuck())
  now = [0.0]
  one.service.runner.clock = lambda: now[0]
  try:
    one.await_status('ready')
    now[0] = 1e6  # nothing waits, so nothing hangs
    assert httpx.get(one.url + '/health').status_code == 200
    with pytest.raises(httpx.ReadTimeout):
      httpx.post(one.url + '/v1/completions', json=TEXT, timeout=0.2)
    assert httpx.get(one.url + '/health').status_code == 200
    now[0] += LIMITS.stall_s
    health = httpx.get(one.url + '/health')
    assert (health.status_code, health.json()) == (503, {'status': 'stalled'})
    # Steps that end are progress, though no token has come of them.
    one.service.orchestrator.steps_end = True
    until(lambda: httpx.get(one.url + '/health').status_code == 200)
  finally:
    one.stop()


def test_a_failure_is_told_to_whoever_waits():
  one = Running(lambda _: Stuck(broken=True))
  try:
    one.await_status('ready')
    answer = post(one, '/v1/completions', TEXT)
    assert answer.status_code == 500
    assert answer.json()['error']['type'] == 'server_error'
    assert httpx.get(one.url + '/health').json() == {'status': 'failed'}
    again = post(one, '/v1/completions', TEXT)
    assert again.status_code == 503
    assert 'the device fell off' in again.json()['error']['message']
  finally:
    one.stop()
