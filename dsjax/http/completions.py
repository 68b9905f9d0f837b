"""Completion and chat requests: from a body to the answer or its stream."""

import asyncio
import contextlib
import functools
import logging
import secrets
import time
from collections.abc import (
  AsyncIterator,
  Awaitable,
  Callable,
  Mapping,
  Sequence,
)
from typing import Any, TypeAlias, TypeVar

import fastapi
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dsjax.checkpoints.tokenizer import Tokenizer
from dsjax.config.checks import InputError
from dsjax.http import openai_answers, openai_schema
from dsjax.http.middleware import Json, dumps
from dsjax.http.service import Limits, Service, too_long
from dsjax.runtime import prompts
from dsjax.runtime.orchestrator_thread import Call, Gone
from dsjax.runtime.output import joined

LOG = logging.getLogger(__name__)
LONG_TEXT = 2000  # characters; a longer one is tokenized beside the loop
# Characters that a normalizer might make one token of, at the very most.
SLACK = 4
_Result = TypeVar('_Result')
# A text as it stands, messages, or ids; None: a new document.
BodyPrompt: TypeAlias = str | list[dict[str, Any]] | list[int] | None
_Receive: TypeAlias = Callable[[], Awaitable[Any]]
_Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]


async def beside(size: int, function: Callable[..., _Result], *args: Any
                 ) -> _Result:
  """function(*args), in another thread if `size`, in characters, is much."""
  if size > LONG_TEXT:
    return await asyncio.to_thread(function, *args)
  return function(*args)


class Completions:
  """Answers completion and chat requests of one model through a Service."""

  def __init__(self, service: Service, name: str,
               log_text: bool = False) -> None:
    self.service, self.name, self.log_text = service, name, log_text
    self.created = int(time.time())

  def check_model(self, model: str | None) -> None:
    """Raises an HTTPException (404) for another model."""
    if model not in (None, self.name):
      raise HTTPException(404, f'model: {ascii(model)[:80]} is not served; '
                          f'{self.name!r} is')

  async def ids(self, prompt: BodyPrompt, options: Mapping[str, Any]
                ) -> Sequence[int]:
    """Token ids of a prompt; of a long text, beside the event loop.

    options: of Tokenizer.chat, for messages.

    Raises:
      InputError: no tokenizer, or text that it cannot read.
      Refused: so long that it can never fit, however it is cut.
    """
    model = self.service.started().model
    if prompt is None:
      return _new_document(prompts.vocabulary(model))
    if isinstance(prompt, str):
      size, read = len(prompt), prompts.text_ids
    elif isinstance(prompt[0], int):
      return tuple(prompt)
    else:
      size = len(str(prompt))  # calls of tools may be long too
      read = functools.partial(prompts.chat_ids, **options)
    self._check_size(size, prompts.vocabulary(model))
    return await beside(size, read, model, prompt)

  def _check_size(self, size: int, vocabulary: Tokenizer) -> None:
    context = self.service.started().config.max_len
    if size > SLACK * vocabulary.max_token_chars * context:
      raise too_long(context, f'the prompt has {size} characters')

  async def respond(self, request: fastapi.Request,
                    body: openai_schema.Completion | openai_schema.Chat
                    ) -> Response:
    """The Response to a Completion or Chat body."""
    self.service.check_open()
    self.check_model(body.model)
    server = self.service.started()
    prompts_ids = [await self.ids(p, body.template_options)
                   for p in body.prompts]
    context = server.scheduler_config.longest
    seed = secrets.randbits(32) if body.seed is None else body.seed
    wanted = [(ids, sampling) for ids in prompts_ids
              for sampling in body.sampling(context - len(ids), seed,
                                            body.num_logprobs)]
    state = request.state
    call = self.service.submit(wanted, state.arrival_s)
    builder = openai_answers.ResponseBuilder(
        body, state.id, int(time.time()), [len(ids) for ids in prompts_ids],
        server.model.tokenizer)
    report = _Report(request, builder, body.prompts if self.log_text else [])
    if body.stream:
      return EventStream(call, builder, self.service.limits, report)
    return await self._full(request, call, builder, report)

  async def _full(self, request: fastapi.Request, call: Call,
                  builder: openai_answers.ResponseBuilder, report: '_Report'
                  ) -> Response:
    parts = [[] for _ in call.streams]
    try:
      async with _watched(call, request.receive):
        async with asyncio.timeout(self.service.limits.request_s):
          while news := await call.take():
            for i, update in news:
              parts[i].append(update)
    except TimeoutError:
      raise HTTPException(504, 'the answer took longer than '
                          f'{self.service.limits.request_s:g} s') from None
    finally:
      call.close()
      report(call)
    if problem := _problem(call):
      raise HTTPException(*problem)
    return Json(builder.full(list(map(joined, parts))))


def _new_document(vocabulary: Tokenizer) -> Sequence[int]:
  """What stands before a text: BOS, or else the EOS of another one."""
  begin = vocabulary.encode('')
  if not begin:
    if vocabulary.eos_id is None:
      raise InputError('prompt: must be given to a model without BOS and EOS')
    begin = [vocabulary.eos_id]
  return begin


def _problem(call: Call) -> tuple[int, str] | None:
  """(status, message) if a request did not end by itself, or None."""
  reasons = {s.reason for s in call.streams}
  errors = (s.error for s in call.streams if s.error)
  if 'error' in reasons:
    return 500, next(errors, 'the server failed while it answered')
  if 'refused' in reasons:
    return 429, next(errors, 'the policy refused it')
  if 'cancelled' in reasons:
    return 503, 'the server stopped before the answer was complete'
  return None


@contextlib.asynccontextmanager
async def _watched(call: Call, receive: _Receive) -> AsyncIterator[None]:
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

  def __init__(self, request: fastapi.Request,
               builder: openai_answers.ResponseBuilder,
               prompts: Sequence[BodyPrompt]) -> None:
    self.request, self.builder, self.prompts = request, builder, prompts

  def __call__(self, call: Call) -> None:
    state = self.request.state
    LOG.info('%s %s %s: %d prompt tokens, %d answers, %.3f s%s', state.id,
             self.request.url.path,
             ' '.join(sorted({s.reason or 'left' for s in call.streams})),
             self.builder.prompt_tokens, len(call.streams),
             time.perf_counter() - state.arrival_s,
             f' {ascii(self.prompts)}' if self.prompts else '')


class EventStream(Response):
  """Server-sent events: a chunk for what each request got since the last."""
  media_type = 'text/event-stream'

  def __init__(self, call: Call, builder: openai_answers.ResponseBuilder,
               limits: Limits, report: _Report) -> None:
    super().__init__(headers={'Cache-Control': 'no-cache',
                              'X-Accel-Buffering': 'no'})
    del self.headers['content-length']
    self.call, self.builder = call, builder
    self.limits, self.report = limits, report

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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

  async def _send_all(self, send: _Send) -> None:
    await send({'type': 'http.response.start', 'status': 200,
                'headers': self.raw_headers})
    while news := await self.call.take():
      events = [chunk for i, u in news
                if u.reason not in ('error', 'refused', 'cancelled')
                for chunk in self.builder.chunks(i, u)]
      await self._send(send, events)
    problem, last = _problem(self.call), self.builder.last()
    if problem:
      last = openai_schema.error(problem[1], 'server_error', code=problem[0])
    await self._send(send, [last] if last else [], done=True)

  async def _send(self, send: _Send, events: Sequence[dict[str, Any]],
                  done: bool = False) -> None:
    text = ''.join(f'data: {dumps(e)}\n\n' for e in events)
    text += 'data: [DONE]\n\n' * done
    await send({'type': 'http.response.body', 'body': text.encode(),
                'more_body': not done})
