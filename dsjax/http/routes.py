"""OpenAI's HTTP interface to one orchestrator (extra `serve`): the routes.

`make_app` builds the application over a Service; `socket_server.run` serves it
on a socket until SIGTERM, which drains.
"""

import contextlib
import pathlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import fastapi
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from dsjax.checkpoints.tokenizer import Tokenizer
from dsjax.config.checks import InputError, require
from dsjax.config.placement import Slo
from dsjax.http import openai_schema, telemetry
from dsjax.http.completions import Completions, beside
from dsjax.http.middleware import Gate, Json, acceptable, add_errors
from dsjax.http.service import Service
from dsjax.runtime.orchestrator import Orchestrator

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {'model': openai_schema.Error, 'description': why}
    for status, why in (('4XX', 'Turned away, and why.'),
                        ('5XX', 'Not now, or a mistake of the server.'))}
ANSWERS: dict[int | str, dict[str, Any]] = {200: {
    'description': 'The answer, or with `stream` its events.',
    'content': {'application/json': {}, 'text/event-stream': {}}}}
PAGE = pathlib.Path(__file__).with_name('live.html')


def make_app(service: Service, metrics: telemetry.Gauges, name: str,
             key: str | None = None, slo: Slo | None = None,
             log_text: bool = False, origins: Sequence[str] = ()
             ) -> Gate:
  """The application; its lifespan starts and closes the service.

  Args:
    service: its observer is `metrics`.
    name: of the model, as clients ask for it. key: bearer key, or None.
    slo: shown on the live page. log_text: prompts in the log.
    origins: whose pages a browser lets ask; '*' for all.
  """
  @contextlib.asynccontextmanager
  async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
    service.start()
    yield
    await service.close()

  app = fastapi.FastAPI(title='dsjax', lifespan=lifespan, docs_url=None,
                        redoc_url=None, default_response_class=Json,
                        responses=ERRORS, redirect_slashes=False,
                        dependencies=[fastapi.Depends(acceptable)])

  gate = Gate(app, service.limits, key, metrics.reject, origins)
  add_errors(app, gate.turn_away)
  completions = Completions(service, name, log_text)
  _add_openai(app, completions)
  _add_tokens(app, completions)
  _add_watching(app, service, metrics, name, slo)
  return gate


def _add_openai(app: fastapi.FastAPI, completions: Completions) -> None:
  service = completions.service

  @app.post('/v1/completions', responses=ANSWERS)
  async def complete(request: fastapi.Request, body: openai_schema.Completion):
    return await completions.respond(request, body)

  @app.post('/v1/chat/completions', responses=ANSWERS)
  async def chat(request: fastapi.Request, body: openai_schema.Chat):
    return await completions.respond(request, body)

  def model() -> dict[str, Any]:
    return {'id': completions.name, 'object': 'model', 'owned_by': 'dsjax',
            'created': completions.created,
            'max_model_len': service.started().config.max_len}

  @app.get('/v1/models')
  async def models():
    return Json({'object': 'list', 'data': [model()]})

  @app.get('/v1/models/{id:path}')
  async def one_model(id: str):
    if not id.strip('/ '):
      raise HTTPException(404)  # of no model
    completions.check_model(id)
    return Json(model())


def _add_tokens(app: fastapi.FastAPI, completions: Completions) -> None:
  service = completions.service

  def vocabulary(body: openai_schema.Tokenize | openai_schema.Detokenize
                 ) -> Tokenizer:
    completions.check_model(body.model)
    tokenizer = service.started().model.tokenizer
    if tokenizer is None:
      raise InputError('model: has no tokenizer')
    return tokenizer

  @app.post('/tokenize')
  async def tokenize(body: openai_schema.Tokenize):
    vocabulary(body)
    ids = await completions.ids(body.given, body.template_options)
    return Json({'tokens': list(ids), 'count': len(ids),
                 'max_model_len': service.started().config.max_len})

  @app.post('/detokenize')
  async def detokenize(body: openai_schema.Detokenize):
    tokenizer = vocabulary(body)
    size = tokenizer.vocab_size
    for index, token in enumerate(body.tokens):
      require(token < size, f'tokens[{index}]', token, f'below {size}')
    return Json({'prompt': await beside(
        len(body.tokens), tokenizer.decode, body.tokens)})


def _add_watching(app: fastapi.FastAPI, service: Service,
                  metrics: telemetry.Gauges, name: str, slo: Slo | None
                  ) -> None:
  @app.get('/health')
  async def health():
    status = service.status
    if status in ('ready', 'draining') and not service.alive:
      status = 'stalled'
    about = {'status': status} | (
        {'progress': service.progress} if status == 'starting' else {})
    return Json(about, 200 if service.alive else 503)

  @app.get('/metrics', response_class=PlainTextResponse)
  async def scrape():
    return Response(metrics.text(),
                    media_type='text/plain; version=0.0.4; charset=utf-8')

  @app.get('/placement')
  async def placement():
    return Json(explain(service.started()))

  @app.get('/live')
  async def live():
    server = service.orchestrator
    return Json({
        'model': name, 'status': service.status, 'waiting': service.waiting,
        'slo': slo and {'ttft_s': slo.ttft_s, 'tpot_s': slo.tpot_s},
        'instances': telemetry.snapshot(server), 'flow': telemetry.flow(server),
        'recent': list(metrics.recent), 'time_s': time.time(),
        'rejected': metrics.num_rejected})

  @app.get('/', response_class=HTMLResponse)
  async def page():
    return HTMLResponse(PAGE.read_text(encoding='utf-8'))


def explain(server: Orchestrator) -> dict[str, Any]:
  """The placement that an orchestrator serves, in numbers and in words."""
  placement, config = server.placement, server.config
  instances = [{
      'role': role, 'tp': plan.tp, 'pp': plan.pp,
      'devices': list(map(str, engine.devices)),
      'pages': engine.capacity.num_pages,
      'page_size': engine.capacity.page_size,
      'max_seqs': engine.capacity.max_seqs,
      'prefill_tokens': engine.capacity.prefill_tokens,
      'kv_dtype': config.kv_dtype_of(role)}
      for (role, plan), engine in zip(placement.instances, server.engines,
                                      strict=True)]
  words = {
      'disaggregated': 'Prompts are read by the prefill instances; the KV of '
      'each then moves, device to device, to a decode instance, which writes '
      'the rest, so neither phase waits behind the other.',
      'colocated': 'Each instance reads prompts first and writes tokens in '
      'between: the baseline without disaggregation.',
      'chunked': 'Each instance reads prompts in pieces beside the tokens that '
      'it writes: the baseline of chunked prefill.',
      'mixed': 'Instances of several kinds: prompts that a prefill instance '
      'has read move, device to device, to one that writes.'}
  return {'mode': placement.mode, 'num_devices': placement.num_devices,
          'max_len': config.max_len, 'dtype': config.dtype,
          'instances': instances, 'explanation': words[placement.mode]}
