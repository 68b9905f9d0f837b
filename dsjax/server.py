"""OpenAI's HTTP interface to one orchestrator (extra `serve`).

`make_app` builds the application over a Service, `run` serves it on a socket
until SIGTERM, which drains. Every error has OpenAI's shape; every request that
is turned away says why and is counted.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import pathlib
import secrets
import time

import fastapi
import uvicorn
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsjax import gauges, protocol
from dsjax.base import InputError
from dsjax.service import Gone, Refused, Update

LOG = logging.getLogger(__name__)
PAGE = pathlib.Path(__file__).with_name('live.html')
OPEN_PATHS = ('/', '/health')  # without a key
LONG_TEXT = 2000  # characters; a longer one is tokenized beside the loop
# Characters that a normalizer might make one token of, at the very most.
SLACK = 4
_KINDS = {401: 'authentication_error', 404: 'not_found_error',
          429: 'rate_limit_error'}
_STATUS = {'too_long': 413, 'queue_full': 429, 'ttft': 429}
_CODES = {'too_long': 'context_length_exceeded'}


class Json(Response):
  """JSON in ASCII, so that any string can be answered, and no NaN."""
  media_type = 'application/json'

  def render(self, content):
    return _json(content).encode()


def _json(value):
  return json.dumps(value, separators=(',', ':'), allow_nan=False)


# --- the outer gate ---------------------------------------------------------


class Gate:
  """Middleware: request ids, the key, and bodies that are too big or slow."""

  def __init__(self, app, limits, key, reject):
    self.app, self.limits, self.reject = app, limits, reject
    self.key = None if key is None else f'Bearer {key}'.encode()

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return
    id = secrets.token_hex(12)
    scope['state'] |= {'id': id, 'arrival_s': time.perf_counter()}
    headers = dict(scope['headers'])

    async def named_send(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [*message.get('headers', ()),
                              (b'x-request-id', id.encode())]
      await send(message)

    body = _Body(receive, self.limits)
    status, why = self._refusal(scope, headers)
    if not status:
      await self.app(scope, body.receive, named_send)
      return
    with contextlib.suppress(HTTPException):
      await body.discard()  # or it would not read the answer
    self.reject({401: 'unauthorized', 413: 'too_long'}[status])
    LOG.info('%s %s %s %d', id, scope['method'], scope['path'], status)
    await _error(status, why)(scope, receive, named_send)

  def _refusal(self, scope, headers):
    given = headers.get(b'authorization', b'')
    if (self.key and scope['path'] not in OPEN_PATHS
        and not hmac.compare_digest(given, self.key)):
      return 401, 'authorization: must be "Bearer " and the key'
    size = headers.get(b'content-length', b'0')
    if size.isdigit() and int(size[:20]) > self.limits.max_body_bytes:
      return 413, (f'the body has {int(size[:20])} bytes: must be at most '
                   f'{self.limits.max_body_bytes}')
    return None, None


class _Body:
  """Reads a request's body within its limits."""

  def __init__(self, receive, limits):
    self._receive, self.limits = receive, limits
    self._size, self._whole = 0, False
    self._until = asyncio.get_running_loop().time() + limits.body_s

  async def receive(self):
    if self._whole:  # what follows is the client's leaving
      return await self._receive()
    try:
      async with asyncio.timeout_at(self._until):
        message = await self._receive()
    except TimeoutError:
      raise HTTPException(408, 'the body took longer than '
                          f'{self.limits.body_s:g} s') from None
    self._size += len(message.get('body', b''))
    self._whole = not message.get('more_body', False)
    if self._size > self.limits.max_body_bytes:
      raise HTTPException(413, f'the body has more than '
                          f'{self.limits.max_body_bytes} bytes')
    return message

  async def discard(self):
    """Reads a body nobody wants, up to the limit once more."""
    while not self._whole:
      await self.receive()


# --- errors -----------------------------------------------------------------


def _error(status, message, param=None, code=None, retry_s=None):
  kind = _KINDS.get(status, 'invalid_request_error' if status < 500 else
                    'server_error')
  headers = {} if retry_s is None else {
      'Retry-After': str(math.ceil(retry_s))}
  if status == 401:
    headers['WWW-Authenticate'] = 'Bearer'
  return Json(protocol.error(message, kind, param, code), status, headers)


def _add_errors(app, reject):
  def refused(_, e):
    reject(e.reason)
    return _error(_STATUS.get(e.reason, 503), str(e),
                  code=_CODES.get(e.reason, e.reason), retry_s=e.retry_s)

  def invalid(_, e):
    reject('bad_request')
    return _error(400, *protocol.invalid(e.errors()), 'invalid_value')

  def bad(_, e):
    reject('bad_request')
    return _error(400, *protocol.named(str(e)), 'invalid_value')

  def http(_, e):
    reject({404: 'not_found', 413: 'too_long', 408: 'slow'}.get(
        e.status_code, 'bad_request'))
    known = {'param': 'model', 'code': 'model_not_found'}
    about = known if e.detail.startswith('model: ') else {}
    return _error(e.status_code, e.detail, **about)

  def broken(*_):
    reject('internal')
    return _error(500, 'the server made a mistake; its log says which')

  def gone(*_):
    reject('gone')
    return Response(status_code=499)

  for kind, handler in ((Refused, refused), (RequestValidationError, invalid),
                        (InputError, bad), (HTTPException, http), (Gone, gone),
                        (ClientDisconnect, gone), (Exception, broken)):
    app.add_exception_handler(kind, handler)




# --- completions ------------------------------------------------------------


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

  def encode(self, prompt):
    """Token ids of a text, of messages, or of ids.

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
                 vocabulary.chat(prompt))

  async def ids(self, prompt):
    """encode, beside the event loop if it takes long."""
    parts = [prompt] if isinstance(prompt, str) else prompt
    if sum(len(p) if isinstance(p, str) else len(p['content'])
           for p in parts if isinstance(p, str | dict)) > LONG_TEXT:
      return await asyncio.to_thread(self.encode, prompt)
    return self.encode(prompt)

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
    answer = protocol.Answer(body, state.id, int(time.time()),
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
    return 500, 'the server failed while it answered'
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
      async with _watched(self.call, receive):
        await self._send_all(send)
    except Gone:
      pass
    except TimeoutError:  # it does not read, or this took too long
      scope['state'].get('abort', lambda: None)()
    finally:
      self.call.close()
      self.report(self.call)

  async def _send_all(self, send):
    await send({'type': 'http.response.start', 'status': 200,
                'headers': self.raw_headers})
    loop = asyncio.get_running_loop()
    until = loop.time() + self.limits.request_s
    while True:
      async with asyncio.timeout_at(until):
        found = await self.call.take()
      if not found:
        break
      events = [self.answer.chunk(i, u) for i, u in found
                if u.reason not in ('error', 'cancelled')]
      await self._send(send, events)
    problem, last = _broken(self.call), self.answer.last()
    if problem:
      last = protocol.error(problem[1], 'server_error', code=problem[0])
    await self._send(send, [last] if last else [], done=True)

  async def _send(self, send, events, done=False):
    text = ''.join(f'data: {_json(e)}\n\n' for e in events)
    text += 'data: [DONE]\n\n' * done
    async with asyncio.timeout(self.limits.send_s):
      await send({'type': 'http.response.body', 'body': text.encode(),
                  'more_body': not done})


# --- the application --------------------------------------------------------


def make_app(service, metrics, name, key=None, slo=None, log_text=False):
  """The application; its lifespan starts and closes the service.

  Args:
    service: a Service whose observer is `metrics`, a Gauges.
    name: of the model, as clients ask for it. key: bearer key, or None.
    slo: shown on the live page. log_text: prompts in the log.
  """
  @contextlib.asynccontextmanager
  async def lifespan(_):
    service.start()
    yield
    await service.close()

  app = fastapi.FastAPI(title='dsjax', lifespan=lifespan, docs_url=None,
                        redoc_url=None, default_response_class=Json)

  def reject(reason):
    metrics.rejected.labels(reason).inc()
  app.add_middleware(Gate, limits=service.limits, key=key, reject=reject)
  _add_errors(app, reject)
  completions = Completions(service, name, log_text)
  _add_openai(app, completions)
  _add_tokens(app, completions)
  _add_watching(app, service, metrics, name, slo)
  return app


def _add_openai(app, completions):
  service = completions.service

  @app.post('/v1/completions')
  async def complete(request: fastapi.Request, body: protocol.Completion):
    return await completions.answer(request, body)

  @app.post('/v1/chat/completions')
  async def chat(request: fastapi.Request, body: protocol.Chat):
    return await completions.answer(request, body)

  def model():
    if service.orchestrator is None:
      service.check_open()
    return {'id': completions.name, 'object': 'model', 'owned_by': 'dsjax',
            'created': completions.created,
            'max_model_len': service.orchestrator.config.max_len}

  @app.get('/v1/models')
  async def models():
    return Json({'object': 'list', 'data': [model()]})

  @app.get('/v1/models/{id:path}')
  async def one_model(id: str):
    completions.check_model(id)
    return Json(model())


def _add_tokens(app, completions):
  service = completions.service

  def vocabulary(body):
    completions.check_model(body.model)
    if service.orchestrator is None:
      service.check_open()
    found = service.orchestrator.model.tokenizer
    if found is None:
      raise InputError('model: has no tokenizer')
    return found

  @app.post('/tokenize')
  async def tokenize(body: protocol.Tokenize):
    found = vocabulary(body)
    if body.messages is None:
      ids = await completions.ids(body.prompt) if body.prompt else ()
    elif body.add_generation_prompt:
      ids = await completions.ids([m.plain for m in body.messages])
    else:
      ids = found.chat([m.plain for m in body.messages], False)
    return Json({'tokens': list(ids), 'count': len(ids),
                 'max_model_len': service.orchestrator.config.max_len})

  @app.post('/detokenize')
  async def detokenize(body: protocol.Detokenize):
    return Json({'prompt': vocabulary(body).decode(body.tokens)})


def _add_watching(app, service, metrics, name, slo):
  @app.get('/health')
  async def health():
    status = service.status
    if status in ('ready', 'draining') and not service.alive:
      status = 'stalled'
    about = {'status': status} | (
        {'progress': service.progress} if status == 'starting' else {})
    return Json(about, 200 if service.alive else 503)

  @app.get('/metrics')
  async def scrape():
    return Response(metrics.text(),
                    media_type='text/plain; version=0.0.4; charset=utf-8')

  @app.get('/placement')
  async def placement():
    if service.orchestrator is None:
      service.check_open()
    return Json(explain(service.orchestrator))

  @app.get('/live')
  async def live():
    server = service.orchestrator
    return Json({
        'model': name, 'status': service.status, 'waiting': service.waiting,
        'slo': slo and {'ttft_s': slo.ttft_s, 'tpot_s': slo.tpot_s},
        'instances': gauges.snapshot(server), 'flow': gauges.flow(server),
        'recent': list(metrics.recent)})

  @app.get('/')
  async def page():
    return HTMLResponse(PAGE.read_text(encoding='utf-8'))


def explain(server):
  """The placement that an orchestrator serves, in numbers and in words."""
  placement, config = server.placement, server.config
  instances = [{
      'role': role, 'tp': plan.tp, 'pp': plan.pp,
      'devices': [str(d) for stage in one.stages
                  for d in stage.shapes.mesh.devices.flat],
      'pages': one.limits.num_pages, 'page_size': one.limits.page_size,
      'max_seqs': one.limits.max_seqs,
      'prefill_tokens': one.limits.prefill_tokens,
      'kv_dtype': config.kv_dtype_of(role)}
      for (role, plan), one in zip(placement.instances, server.engines,
                                   strict=True)]
  words = {
      'disaggregated': 'Prompts are read by the prefill instances; the KV of '
      'each then moves, device to device, to a decode instance, which writes '
      'the rest, so neither phase waits behind the other.',
      'colocated': 'Each instance reads prompts first and writes tokens in '
      'between: the baseline without disaggregation.',
      'chunked': 'Each instance reads prompts in pieces beside the tokens that '
      'it writes: the baseline of chunked prefill.'}
  return {'mode': placement.mode, 'num_devices': placement.num_devices,
          'max_len': config.max_len, 'dtype': config.dtype,
          'instances': instances, 'explanation': words[placement.mode]}


# --- the socket -------------------------------------------------------------


class _Connection(H11Protocol):
  """A connection that must send its headers in time, and can be aborted."""

  def connection_made(self, transport):
    super().connection_made(transport)
    self.app_state = {**self.app_state, 'abort': transport.abort}
    self._late = None
    self._arm()

  def _arm(self):
    if self._late is None:
      self._late = self.loop.call_later(self.config.timeout_headers,
                                        self.transport.abort)

  def _disarm(self):
    if self._late is not None:
      self._late.cancel()
      self._late = None

  def data_received(self, data):
    super().data_received(data)
    if self.cycle is None or self.cycle.response_complete:
      self._arm()
    else:
      self._disarm()

  def connection_lost(self, exc):
    self._disarm()
    super().connection_lost(exc)


class Server(uvicorn.Server):
  """Uvicorn that drains at the first SIGTERM or Ctrl-C, and goes at the
  second."""

  def __init__(self, app, service):
    limits = service.limits
    config = uvicorn.Config(
        app, http=_Connection, ws='none', lifespan='on',
        log_config=None, access_log=False, server_header=False,
        limit_concurrency=limits.max_connections,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        timeout_graceful_shutdown=5)
    config.timeout_headers = limits.body_s
    super().__init__(config)
    self.service, self._leaving = service, None

  async def startup(self, sockets=None):
    self._loop = asyncio.get_running_loop()
    await super().startup(sockets)

  def handle_exit(self, sig, frame):
    del sig, frame
    if self._leaving is None and self.started:
      self._leaving = True
      self._loop.call_soon_threadsafe(self.leave)
    else:
      self.should_exit = self.force_exit = True

  def leave(self):
    """Drains, then ends the server; call it on the event loop."""
    self._leaving = self._loop.create_task(self._drain())

  async def _drain(self):
    LOG.info('draining: %d requests, up to %g s', len(self.service.streams),
             self.service.limits.drain_s)
    await self.service.drain()
    self.should_exit = True

  async def on_tick(self, counter):
    if self.service.status == 'failed' and self.service.orchestrator is None:
      return True  # it never started
    return await super().on_tick(counter)


def run(app, service, listener):
  """Serves on a bound socket until a signal.

  Returns:
    why the service failed, or None.
  """
  asyncio.run(Server(app, service).serve([listener]))
  return service.error
