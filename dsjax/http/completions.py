"""Completion and chat requests: from a body to the answer or its stream."""

import asyncio
import contextlib
import logging
import secrets
import time

from starlette.exceptions import HTTPException
from starlette.responses import Response

from dsjax.config.checks import InputError
from dsjax.http import openai_schema
from dsjax.http.middleware import Json, dumps
from dsjax.http.service import Gone, Refused, Update

LOG = logging.getLogger(__name__)
LONG_TEXT = 2000  # characters; a longer one is tokenized beside the loop
# Characters that a normalizer might make one token of, at the very most.
SLACK = 4


async def beside(size, function, *args):
  """function(*args), in another thread if `size`, in characters, is much."""
  if size > LONG_TEXT:
    return await asyncio.to_thread(function, *args)
  return function(*args)


class Completions:
  """Answers completion and chat requests of one model through a Service."""

  def __init__(self, service, name, log_text=False):
    self.service, self.name, self.log_text = service, name, log_text
    self.created, self._longest = int(time.time()), None

  def check_model(self, model):
    """Raises an HTTPException (404) for another model."""
    if model not in (None, self.name):
      raise HTTPException(404, f'model: {ascii(model)[:80]} is not served; '
                          f'{self.name!r} is')

  def encode(self, prompt, to_answer=True):
    """Token ids of a text, of messages, or of ids. to_answer: messages end
    where an answer begins.

    Raises:
      InputError: no tokenizer, or text that it cannot read.
      Refused: so long that it can never fit, however it is cut.
    """
    server = self.service.orchestrator
    vocabulary = server.model.tokenizer
    if isinstance(prompt, list) and isinstance(prompt[0], int):
      return tuple(prompt)
    if vocabulary is None:
      raise InputError('prompt: must be token ids: this model has no '
                       'tokenizer')
    text = isinstance(prompt, str)
    size = len(prompt) if text else sum(len(m['content']) for m in prompt)
    if self._longest is None:
      self._longest = SLACK * max(map(len, map(vocabulary.token_bytes, range(
          vocabulary.vocab_size))))
    if size > self._longest * server.config.max_len:
      raise Refused('too_long', f'a prompt of {size} characters exceeds the '
                    f'context of {server.config.max_len} tokens')
    return tuple(vocabulary.encode(prompt) if text else
                 vocabulary.chat(prompt, to_answer))

  async def ids(self, prompt, to_answer=True):
    """encode, beside the event loop if it takes long."""
    parts = [prompt] if isinstance(prompt, str) else prompt
    size = sum(len(p) if isinstance(p, str) else len(p['content'])
               for p in parts if isinstance(p, str | dict))
    return await beside(size, self.encode, prompt, to_answer)

  async def answer(self, request, body):
    """The Response to a Completion or Chat body."""
    self.service.check_open()
    self.check_model(body.model)
    prompts = [await self.ids(p) for p in body.prompts]
    max_len, seed = self.service.orchestrator.config.max_len, body.seed
    wanted = [(ids, sampling) for ids in prompts for sampling in body.sampling(
        max_len - len(ids), secrets.randbits(32) if seed is None else seed,
        body.num_logprobs)]
    if body.min_tokens and body.min_tokens > wanted[0][1].max_tokens:
      raise InputError('min_tokens: must be at most max_tokens')
    state = request.state
    call = self.service.submit(wanted, state.arrival_s)
    answer = openai_schema.Answer(body, state.id, int(time.time()),
                                  [len(ids) for ids in prompts],
                                  self.service.orchestrator.model.tokenizer)
    report = _Report(request, answer, self.log_text and body.prompts)
    if body.stream:
      return EventStream(call, answer, self.service.limits, report)
    return await self._whole(request, call, answer, report)

  async def _whole(self, request, call, answer, report):
    parts = [[] for _ in call.streams]
    try:
      async with _watched(call, request.receive):
        async with asyncio.timeout(self.service.limits.request_s):
          while found := await call.take():
            for i, update in found:
              parts[i].append(update)
    except TimeoutError:
      raise HTTPException(504, 'the answer took longer than '
                          f'{self.service.limits.request_s:g} s') from None
    finally:
      call.close()
      report(call)
    if problem := _broken(call):
      raise HTTPException(*problem)
    return Json(answer.whole([Update(
        ''.join(u.text for u in updates),
        tuple(t for u in updates for t in u.tokens),
        tuple(x for u in updates for x in u.logprobs),
        updates[-1].reason) for updates in parts]))


def _broken(call):
  """(status, message) if a request did not end by itself, or None."""
  reasons = {s.reason for s in call.streams}
  if 'error' in reasons:
    found = (s.live.error for s in call.streams if s.live and s.live.error)
    return 500, next(found, 'the server failed while it answered')
  if 'cancelled' in reasons:
    return 503, 'the server stopped before the answer was complete'
  return None


@contextlib.asynccontextmanager
async def _watched(call, receive):
  """Makes call.take raise Gone as soon as the client has left."""
  async def watch():
    while (await receive())['type'] != 'http.disconnect':
      pass
    call.leave()
  task = asyncio.create_task(watch())
  try:
    yield
  finally:
    task.cancel()


class _Report:
  """One line of log for a request; its text only when asked for."""

  def __init__(self, request, answer, prompts):
    self.request, self.answer, self.prompts = request, answer, prompts

  def __call__(self, call):
    state = self.request.state
    LOG.info('%s %s %s: %d prompt tokens, %d answers, %.3f s%s', state.id,
             self.request.url.path,
             ' '.join(sorted({s.reason or 'left' for s in call.streams})),
             self.answer.prompt_tokens, len(call.streams),
             time.perf_counter() - state.arrival_s,
             f' {ascii(self.prompts)}' if self.prompts else '')


class EventStream(Response):
  """Server-sent events: a chunk for what each request got since the last."""
  media_type = 'text/event-stream'

  def __init__(self, call, answer, limits, report):
    super().__init__(headers={'Cache-Control': 'no-cache',
                              'X-Accel-Buffering': 'no'})
    del self.headers['content-length']
    self.call, self.answer = call, answer
    self.limits, self.report = limits, report

  async def __call__(self, scope, receive, send):
    try:
      async with (_watched(self.call, receive),
                  asyncio.timeout(self.limits.request_s)):
        await self._send_all(send)
    except Gone:
      pass
    except TimeoutError:
      scope['state'].get('abort', lambda: None)()
    finally:
      self.call.close()
      self.report(self.call)

  async def _send_all(self, send):
    await send({'type': 'http.response.start', 'status': 200,
                'headers': self.raw_headers})
    while found := await self.call.take():
      events = [self.answer.chunk(i, u) for i, u in found
                if u.reason not in ('error', 'cancelled')]
      await self._send(send, events)
    problem, last = _broken(self.call), self.answer.last()
    if problem:
      last = openai_schema.error(problem[1], 'server_error', code=problem[0])
    await self._send(send, [last] if last else [], done=True)

  async def _send(self, send, events, done=False):
    text = ''.join(f'data: {dumps(e)}\n\n' for e in events)
    text += 'data: [DONE]\n\n' * done
    await send({'type': 'http.response.body', 'body': text.encode(),
                'more_body': not done})
