"""OpenAI's HTTP interface to one orchestrator (extra `serve`): the routes.

`make_app` builds the application over a Service; `listener.run` serves it on
a socket until SIGTERM, which drains.
"""

import contextlib
import pathlib
import time

import fastapi
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from dsjax.config.checks import InputError
from dsjax.http import openai_schema, telemetry
from dsjax.http.completions import Completions, beside
from dsjax.http.middleware import Gate, Json, add_errors

ERRORS = {status: {'model': openai_schema.Error, 'description': why}
          for status, why in (('4XX', 'Turned away, and why.'),
                              ('5XX', 'Not now, or a mistake of the server.'))}
PAGE = pathlib.Path(__file__).with_name('live.html')


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
                        redoc_url=None, default_response_class=Json,
                        responses=ERRORS, redirect_slashes=False)

  gate = Gate(app, service.limits, key, metrics.reject)
  add_errors(app, gate.turn_away)
  completions = Completions(service, name, log_text)
  _add_openai(app, completions)
  _add_tokens(app, completions)
  _add_watching(app, service, metrics, name, slo)
  return gate


def _add_openai(app, completions):
  service = completions.service

  both = {200: {'description': 'The answer, or with `stream` its events.',
                'content': {'application/json': {}, 'text/event-stream': {}}}}

  @app.post('/v1/completions', responses=both)
  async def complete(request: fastapi.Request, body: openai_schema.Completion):
    return await completions.respond(request, body)

  @app.post('/v1/chat/completions', responses=both)
  async def chat(request: fastapi.Request, body: openai_schema.Chat):
    return await completions.respond(request, body)

  def model():
    return {'id': completions.name, 'object': 'model', 'owned_by': 'dsjax',
            'created': completions.created,
            'max_model_len': service.started().config.max_len}

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
    found = service.started().model.tokenizer
    if found is None:
      raise InputError('model: has no tokenizer')
    return found

  @app.post('/tokenize')
  async def tokenize(body: openai_schema.Tokenize):
    vocabulary(body)
    prompt = body.prompt if body.messages is None else [
        m.plain for m in body.messages]
    ids = await completions.ids(prompt, body.add_generation_prompt)
    return Json({'tokens': list(ids), 'count': len(ids),
                 'max_model_len': service.orchestrator.config.max_len})

  @app.post('/detokenize')
  async def detokenize(body: openai_schema.Detokenize):
    found = vocabulary(body)
    return Json({'prompt': await beside(len(body.tokens), found.decode,
                                        body.tokens)})


def _add_watching(app, service, metrics, name, slo):
  @app.get('/health')
  async def health():
    status = service.status
    if status in ('ready', 'draining') and not service.alive:
      status = 'stalled'
    about = {'status': status} | (
        {'progress': service.runner.progress} if status == 'starting' else {})
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


def explain(server):
  """The placement that an orchestrator serves, in numbers and in words."""
  placement, config = server.placement, server.config
  instances = [{
      'role': role, 'tp': plan.tp, 'pp': plan.pp,
      'devices': list(map(str, one.devices)),
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
