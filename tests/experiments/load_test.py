"""The load client against a server of a few lines that answers as it is told.

The real server answers it too, in server_test.
"""

import asyncio
import io
import json

import httpx
import pytest
from rich.console import Console

from dsjax import workload
from dsjax.analysis.record import Record
from dsjax.config.checks import InputError
from experiments import load
from experiments.common import cli
from tests.common.programs import ended
from tests.common.results import check_written, made_by

PROMPT = workload.Prompt('Hi', None, None)


def chunk(text, **more):
  return {'choices': [{'index': 0, 'text': text, 'finish_reason': None} | more]}


def sse(*parts, done=True):
  lines = [f'data: {json.dumps(p)}\n\n' for p in parts]
  return ''.join(lines) + 'data: [DONE]\n\n' * done


END = [chunk('', finish_reason='length'),
       {'choices': [], 'usage': {'prompt_tokens': 5, 'completion_tokens': 6}}]


async def run(todo, answer, pause_s=0.0):
  """Sends jobs to a server that answers with (status, body) of a body."""
  seen = []

  async def serve(reader, writer):
    try:
      head = await reader.readuntil(b'\r\n\r\n')
      size = int(head.lower().split(b'content-length: ')[1].split(b'\r')[0])
      body = json.loads(await reader.readexactly(size))
      seen.append((head.split()[1].decode(), body))
      await asyncio.sleep(pause_s)
      status, text = answer(body)
      writer.write(b'HTTP/1.1 %d x\r\nConnection: close\r\n\r\n' % status
                   + text.encode())
      await writer.drain()
    finally:
      writer.close()
  server = await asyncio.start_server(serve, '127.0.0.1', 0)
  async with server:
    port = server.sockets[0].getsockname()[1]
    return await load.send_all(f'http://127.0.0.1:{port}/v1', 'key', todo,
                               30.0), seen


def ask(answer, n=1, kind='completion', pause_s=0.0, **options):
  todo = load.jobs(kind, 'm', (0.0,) * n, **{'prompts': [PROMPT]} | options)
  sender, seen = asyncio.run(run(todo, answer, pause_s))
  return sender.records, seen


def test_what_is_sent():
  ok = sse(*END)
  _, seen = ask(lambda _: (200, ok), max_tokens=9, seed=3, extra={'top_k': 1})
  path, body = seen[0]
  assert path == '/v1/completions'
  assert body == {'model': 'm', 'prompt': 'Hi', 'stream': True, 'seed': 3,
                  'max_tokens': 9, 'top_k': 1,
                  'stream_options': {'include_usage': True}}
  _, seen = ask(lambda _: (200, ok), kind='chat')
  assert seen[0][0] == '/v1/chat/completions'
  assert seen[0][1]['messages'] == [{'role': 'user', 'content': 'Hi'}]
  entry = workload.Entry(None, 7, 4)
  _, seen = ask(lambda _: (200, ok), entries=[entry], vocab=50)
  body = seen[0][1]
  assert len(body['prompt']) == 7 and max(body['prompt']) < 50
  assert body['max_tokens'] == 4 and body['ignore_eos'] is True


def said(text):
  return {'choices': [{'index': 0, 'delta': {'content': text},
                       'finish_reason': None}]}


def test_turns_repeat_what_was_said_and_follow_the_answer():
  usage = {'prompt_tokens': 9, 'completion_tokens': 2,
           'prompt_tokens_details': {'cached_tokens': 4}}
  end = {'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'length'}],
         'usage': usage}
  single = load.jobs('chat', 'm', (0.0,) * 6, [
      workload.Prompt(f'q{n}', None, None) for n in range(6)])
  todo = load.chats(single, 3, think_s=0.01)
  assert [len(job.turns) for job in todo] == [2, 2]
  sender, seen = asyncio.run(run(
      todo, lambda body: (200, sse(said('a'), said('b'), end))))
  chats = [[m['content'] for m in body['messages']] for _, body in seen]
  assert sorted(chats) == sorted(
      [[*sum(([f'q{n}', 'ab'] for n in range(first, last)), []), f'q{last}']
       for first in (0, 3) for last in range(first, first + 3)])
  assert [r.cached_tokens for r in sender.records] == [4] * 6
  done = {r.id: r for r in sender.records}
  for id in (1, 2, 4, 5):
    assert done[id].arrival_s >= done[id - 1].finish_s
  assert not sender.answers


def test_a_chat_ends_where_a_turn_is_not_answered():
  todo = load.chats(load.jobs('chat', 'm', (0.0,) * 3, [PROMPT]), 3, 0.0)
  sender, seen = asyncio.run(run(todo, lambda body: (429, '{}')))
  assert len(seen) == 1 and sender.records[0].status == 'rejected'


def test_turns_are_of_chats():
  with pytest.raises(InputError, match='--turns=2: must be 1 with --lengths'):
    load.run(cli.options(load.FLAGS, turns=2, kind='completion'), Console())


def test_a_record_of_a_stream():
  (record,), _ = ask(lambda _: (200, sse(chunk('a'), chunk('b'), *END)))
  assert record.status == 'length' and record.prompt_len == 5
  # Three chunks, six tokens by usage: two tokens each.
  assert len(record.token_s) == 6
  assert record.token_s == sorted(record.token_s)
  assert record.token_s[0] == record.token_s[1]
  assert 0 < record.ttft_s <= record.finish_s


def test_usage_with_every_chunk_counts_exactly():
  def counted(n):
    return chunk('a') | {'usage': {'prompt_tokens': 5, 'completion_tokens': n}}
  (record,), _ = ask(lambda _: (200, sse(counted(1), counted(6), *END)))
  assert len(record.token_s) == 6
  assert record.token_s[0] < record.token_s[1] == record.token_s[5]


def test_a_role_without_text_is_no_token():
  def delta(**fields):
    return {'choices': [{'index': 0, 'delta': fields, 'finish_reason': None}]}
  end = {'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]}
  (record,), _ = ask(lambda _: (200, sse(
      delta(role='assistant', content=''), delta(content='a'), end)),
      kind='chat')
  assert len(record.token_s) == 1 and record.status == 'stop'


@pytest.mark.parametrize('status, text, ends, why', [
    (429, '{}', 'rejected', 'HTTP 429'), (500, 'oh', 'rejected', 'HTTP 500'),
    (200, sse(chunk('a'), done=False), 'failed', 'ended by hanging up'),
    (200, sse(chunk('a'), {'error': {}}), 'failed', 'error in the stream'),
    (200, 'data: {\n\n', 'failed', 'JSONDecodeError'),
    (200, sse([]), 'failed', 'AttributeError'),
    (200, sse({'choices': None}), 'failed', 'TypeError')])
def test_every_error_ends_in_the_record(status, text, ends, why):
  (record,), _ = ask(lambda _: (status, text))
  assert (record.status, record.reason) == (ends, why)
  assert record.finish_s is not None


def test_errors_count_and_arrivals_do_not_wait(tmp_path):
  records, seen = ask(
      lambda body: (200, sse(chunk('a'), *END)) if body['seed'] % 4
      else (429, '{}'), n=8, pause_s=0.2)
  # One after another they would take 1.6 s: all were sent before any answer.
  assert len(seen) == 8 and max(r.arrival_s for r in records) == 0
  out = io.StringIO()
  sender = load.Load(None)
  sender.records, sender.lag_s = records, [0.0] * 8
  summary = load.show(
      Console(file=out, width=100), sender, 'title', cli.options(
          load.FLAGS, ttft_s=30.0, tpot_s=30.0, devices=2, out=str(tmp_path)))
  check_written(out.getvalue(), tmp_path)
  assert summary.attainment[0] == 6 / 8 and summary.num_devices == 2
  assert 'Errors: 2 HTTP 429' in out.getvalue()
  assert json.loads((tmp_path / 'summary.json').read_text())['errors'] == {
      'HTTP 429': 2}
  assert 'prompts.jsonl' in made_by(tmp_path)['data']
  assert (tmp_path / 'report.png').stat().st_size > 10_000


@pytest.mark.parametrize('wrong, code', [(2, 1), (1, 0), (0, 0)])
def test_a_run_of_which_no_request_is_answered_fails(monkeypatch, wrong, code):
  async def send_all(url, key, todo, timeout_s, on_sent):
    sender = load.Load(None)
    sender.records = [
        Record(job.id, 0.0, 5, 1, [0.5], finish_s=0.5, status='length')
        if job.id >= wrong else
        Record(job.id, 0.0, 5, 1, finish_s=0.5, status='rejected',
               reason='HTTP 404') for job in todo]
    sender.lag_s = [0.0 for _ in todo]
    on_sent(sender)
  monkeypatch.setattr(load, 'send_all', send_all)
  assert ended(load, '--model=m', '--requests=2').code == code


def test_tokens_are_spread_over_chunks():
  assert load.spread([], 3) == []
  assert load.spread([1, 2, 3], 2) == [1, 2]  # the last told the end
  assert load.spread([1, 2, 3], 0) == [1, 2, 3]  # no usage came
  assert load.spread([1, 2], 5) == [1, 1, 1, 2, 2]


def test_nobody_there_is_an_input_error():
  for url in ('http://127.0.0.1:1', 'no url', 'http://[::1'):
    with pytest.raises(InputError, match='--url='):
      load.find_model(url, None)
  with pytest.raises(InputError, match='--kind'):
    load.jobs('song', 'm', (0.0,), prompts=[PROMPT])


@pytest.mark.parametrize('body, says', [
    ('{"error": {"message": "the server is starting: 3 of 7 steps compiled"}}',
     'a model: the server is starting: 3 of 7 steps compiled$'),
    ('<html>', 'a model: 503 Service Unavailable$'),
    ('{"error": "no"}', 'a model: 503 Service Unavailable$')])
def test_a_server_that_says_no_is_quoted(monkeypatch, body, says):
  monkeypatch.setattr(load.httpx, 'get', lambda *_, **options: httpx.Response(
      503, text=body))
  with pytest.raises(InputError, match=says):
    load.find_model('http://127.0.0.1:1', None)
