"""What stands before the application: limits of a request, the key, errors.

Every error has OpenAI's shape; every request that is turned away says why, is
counted and leaves a line in the log, with its id and without its text.
"""

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import math
import re
import secrets
import time
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from dsjax.config.checks import InputError
from dsjax.http import openai_schema
from dsjax.http.service import Limits, Refused
from dsjax.runtime.orchestrator_thread import Gone

LOG = logging.getLogger(__name__)
OPEN_PATHS = ('/', '/health')  # without a key
# Media types; JSON and events elsewhere.
OFFERED = {'/': ('text/html',), '/metrics': ('text/plain',)}
_ENCODER = json.JSONEncoder(separators=(',', ':'), allow_nan=False)
_KINDS = {401: 'authentication_error', 404: 'not_found_error',
          429: 'rate_limit_error'}
_STATUS = {'too_long': 400, 'queue_full': 429, 'busy': 429, 'ttft': 429,
           'tpot': 429}
REASONS = {404: 'not_found', 413: 'too_long', 408: 'slow', 500: 'internal',
           414: 'too_long', 431: 'too_long', 415: 'media_type',
           417: 'expectation', 501: 'encoding', 503: 'stopped', 504: 'slow'}
METHODS = ('GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'TRACE',
           'CONNECT')  # that are known; few of them are allowed anywhere
UNREADABLE = 'There was an error parsing the body'  # FastAPI's words
_CODES = {'too_long': 'context_length_exceeded'}


class Json(JSONResponse):
  """JSON in ASCII, so that any string can be answered, and no NaN."""

  def render(self, content: Any) -> bytes:
    return dumps(content).encode()


def dumps(value: Any) -> str:
  """A JSON text in ASCII; ValueError for what is not finite."""
  return _ENCODER.encode(value)


class Gate:
  """An ASGI application around another: request ids, pages of other sites, the
  key, bodies that are too big or slow, and the last resort when the other
  fails.

  reject: counts a reason. origins: whose pages a browser lets ask; '*': all.
  """

  def __init__(self, app: Callable[..., Any], limits: Limits, key: str | None,
               reject: Callable[[str], None], origins: Sequence[str] = ()
               ) -> None:
    self.app, self.limits, self.reject = app, limits, reject
    self.key = None if key is None else key.encode()
    self.cors = CORSMiddleware(
        app, allow_origins=[origin.rstrip('/') for origin in origins],
        allow_methods=('GET', 'POST'), allow_headers=('*',),
        expose_headers=('Retry-After', 'X-Request-Id')) if origins else None

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return
    id, ended = secrets.token_hex(12).encode(), False
    state, headers = scope['state'], dict(scope['headers'])
    waits = b'expect' in headers  # with its body, until it is asked for
    # A server in between may have read another length (RFC 9112, 6.1).
    known = scope['http_version'].startswith('1.')
    unclear = headers.keys() >= {b'content-length', b'transfer-encoding'}
    state |= {'id': id.decode(), 'arrival_s': time.perf_counter()}
    # A target may be a whole URL (RFC 9112, 3.2.2).
    path = re.sub('^https?://[^/]*', '', scope['path'], flags=re.IGNORECASE)
    if path != scope['path']:
      scope = scope | {'path': path or '/',
                       'raw_path': urllib.parse.quote(path or '/').encode()}

    async def named_send(message):
      nonlocal ended
      ended = (message['type'] == 'http.response.body'
               and not message.get('more_body'))
      if message['type'] == 'http.response.start':
        message['headers'] = [*message.get('headers', ()),
                              (b'x-request-id', id)]
        # Nor is a body to be waited for that was not asked for.
        if unclear or not known or waits and not body.whole:
          message['headers'].append((b'connection', b'close'))
      await send(message)

    if self.cors and b'origin' in headers and not _is_preflight(scope, headers):
      send = functools.partial(self.cors.send, send=send,
                               request_headers=Headers(scope=scope))
    body = _Body(receive, self.limits)
    answer = self._refusal(scope, headers)
    if answer:
      if not waits:
        with contextlib.suppress(HTTPException):
          await body.discard()  # or it would not read the answer
      await answer(scope, receive, named_send)
      return
    if scope['method'] == 'HEAD':  # the socket leaves out the body
      scope = scope | {'method': 'GET'}
    try:
      await self.app(scope, body.receive, named_send)
    except Exception as error:  # a mistake of ours costs one request
      LOG.error('%s %s: %s\n%s', state['id'], scope['path'],
                type(error).__name__,
                ''.join(traceback.format_tb(error.__traceback__)))
      if not ended:
        state['abort']()

  def _refusal(self, scope: Any, headers: dict[bytes, bytes]
               ) -> Response | None:
    if not scope['http_version'].startswith('1.'):
      return self.turn_away(scope, 505, 'version', 'the version of HTTP must '
                            'be 1.1 or 1.0')
    if scope['method'] not in METHODS:
      return self.turn_away(scope, 501, 'method', 'the method must be one of '
                            f'{", ".join(METHODS)}')
    # h11 bounds what has not come whole; this what came in one piece.
    size = len(scope['raw_path']) + len(scope['query_string'])
    if size > self.limits.max_header_bytes:
      return self.turn_away(scope, 414, 'too_long', f'the target has {size} '
                            'bytes: must be at most '
                            f'{self.limits.max_header_bytes}')
    size += sum([len(name) + len(value) + 4
                 for name, value in scope['headers']])
    if size > self.limits.max_header_bytes:
      return self.turn_away(scope, 431, 'too_long', f'target and headers have '
                            f'{size} bytes: must be at most '
                            f'{self.limits.max_header_bytes}')
    if scope['method'] == 'OPTIONS' and scope['raw_path'] == b'*':
      return Response(status_code=204, headers={'Allow': 'GET, HEAD, POST'})
    if self.cors and _is_preflight(scope, headers):  # it has no key
      return self._preflight(scope, self.cors)
    if (self.key and scope['path'] not in OPEN_PATHS
        and not _has_key(headers.get(b'authorization', b''), self.key)):
      return self.turn_away(scope, 401, 'unauthorized', 'authorization: must '
                            'be "Bearer " and the key')
    if headers.get(b'expect', b'100-continue').lower() != b'100-continue':
      return self.turn_away(scope, 417, 'expectation', 'expect: must be '
                            '100-continue or be left out')
    if headers.get(b'content-encoding', b'identity').lower() != b'identity':
      return self.turn_away(scope, 415, 'media_type', 'content-encoding: must '
                            'be left out', encoding='identity')
    size = headers.get(b'content-length', b'0')
    if size.isdigit() and int(size[:20]) > self.limits.max_body_bytes:
      return self.turn_away(
          scope, 413, 'too_long', f'the body has {int(size[:20])} bytes: must '
          f'be at most {self.limits.max_body_bytes}')
    if scope['state'].get('crowded'):
      return self.turn_away(
          scope, 503, 'connections', 'too many connections: at most '
          f'{self.limits.max_connections}', code='connections', retry_s=1.0)
    return None

  def _preflight(self, scope: Any, cors: CORSMiddleware) -> Response:
    """What a browser is told that asks whether a page may ask."""
    answer = cors.preflight_response(Headers(scope=scope))
    if answer.status_code < 400:
      return answer
    what = bytes(answer.body).decode().removeprefix('Disallowed CORS ')
    refused = self.turn_away(
        scope, answer.status_code, 'origin', f'{what}: must be what this '
        'server lets the pages of other sites use')
    refused.headers.update({
        name: value for name, value in answer.headers.items()
        if not name.startswith('content-')})
    return refused

  def turn_away(self, scope: Any, status: int, reason: str, message: str,
                **options: Any) -> Response:
    """The answer to a request that is refused: logged and counted."""
    self.reject(reason)
    LOG.info('%s %s %s: %d %s', scope['state']['id'], scope['method'],
             ascii(scope['path'])[1:-1][:80], status, reason)
    return refusal(status, message, **options)


def _has_key(given: bytes, key: bytes) -> bool:
  """Whether a header Authorization has the key; its scheme is of any case
  (RFC 9110, 11.1)."""
  scheme, _, rest = given.partition(b' ')
  return scheme.lower() == b'bearer' and hmac.compare_digest(rest.strip(), key)


def _is_preflight(scope: Any, headers: dict[bytes, bytes]) -> bool:
  """Whether a browser asks, before a page may."""
  return scope['method'] == 'OPTIONS' and headers.keys() >= {
      b'origin', b'access-control-request-method'}


class _Body:
  """Reads a request's body within its limits."""

  def __init__(self, receive: Callable[[], Any], limits: Limits) -> None:
    self._receive, self.limits = receive, limits
    self._size, self.whole = 0, False
    self._until = asyncio.get_running_loop().time() + limits.body_s

  async def receive(self) -> Any:
    if self.whole:  # what follows is the client's leaving
      return await self._receive()
    try:
      async with asyncio.timeout_at(self._until):
        message = await self._receive()
    except TimeoutError:
      raise HTTPException(408, 'the body took longer than '
                          f'{self.limits.body_s:g} s') from None
    self._size += len(message.get('body', b''))
    self.whole = not message.get('more_body', False)
    if self._size > self.limits.max_body_bytes:
      raise HTTPException(413, f'the body has more than '
                          f'{self.limits.max_body_bytes} bytes')
    return message

  async def discard(self) -> None:
    """Reads the rest of a refused body, up to the limit once more."""
    while not self.whole:
      await self.receive()


async def acceptable(request: fastapi.Request) -> None:
  """Raises an HTTPException (406) unless the client takes what a path has."""
  offered = OFFERED.get(request.url.path,
                        ('application/json', 'text/event-stream'))
  accept = ','.join(request.headers.getlist('accept')) or '*/*'
  if not any(_accepts(accept, media) for media in offered):
    raise HTTPException(406, f'accept: must have {" or ".join(offered)}')


def _accepts(accept: str, media: str) -> bool:
  """Whether a header Accept has a media type: its closest range decides."""
  ranges = {}
  for item in accept.lower().split(','):
    name, *parameters = (part.strip() for part in item.split(';'))
    ranges[name] = not any(re.fullmatch(r'q=0(\.0*)?', parameter)
                           for parameter in parameters)
  closest = (media, media.split('/')[0] + '/*', '*/*')
  return next((ranges[name] for name in closest if name in ranges), False)


# --- errors -----------------------------------------------------------------


def refusal(status: int, message: str, param: str | None = None,
            code: str | int | None = None, retry_s: float | None = None,
            allow: str | None = None, encoding: str | None = None
            ) -> Response:
  """The Response that says no, in OpenAI's shape."""
  kind = _KINDS.get(status, 'invalid_request_error' if status < 500 else
                    'server_error')
  headers = {} if retry_s is None else {
      'Retry-After': str(math.ceil(retry_s))}
  if allow:
    headers['Allow'] = allow
  if encoding:
    headers['Accept-Encoding'] = encoding
  if status == 401:
    headers['WWW-Authenticate'] = 'Bearer'
  return Json(openai_schema.error(message, kind, param, code), status, headers)


def add_errors(app: fastapi.FastAPI, turn_away: Callable[..., Response]
               ) -> None:
  """Answers what the application raises. turn_away: see Gate."""
  # Coroutines, since starlette gives a function a thread.
  async def refused(request, e):
    return turn_away(request.scope, _STATUS.get(e.reason, 503), e.reason,
                     str(e), code=_CODES.get(e.reason, e.reason),
                     retry_s=e.retry_s)

  async def bad(request, e):
    message, param = openai_schema.named(str(e))
    return turn_away(request.scope, 400, 'bad_request', message, param=param,
                     code='invalid_value')

  async def unread(request, e):
    if isinstance(e.body, bytes):  # it was not said to be JSON
      return turn_away(request.scope, 415, 'media_type',
                       'content-type: must be application/json')
    message, param = openai_schema.invalid(e.errors(), e.body)
    return turn_away(request.scope, 400, 'bad_request', message, param=param,
                     code='invalid_value')

  async def http(request, e):
    known = {'param': 'model', 'code': 'model_not_found'}
    allow = (e.headers or {}).get('Allow')
    allow = 'GET, HEAD' if allow == 'GET' else allow
    message = e.detail
    if e.status_code == 405:
      message = f'method: must be {allow}'
    elif message == 'Not Found':
      message = f'{ascii(request.url.path)[1:-1][:80]}: no such path'
      paths = {getattr(route, 'path', '') for route in app.routes}
      plain = re.sub('/+', '/', request.url.path).rstrip('/')
      # A base URL without /v1, or with it twice.
      for meant in (plain, f'/v1{plain}', plain.removeprefix('/v1')):
        if meant in paths:
          message += f'; {meant} is one'
          break
    elif message == UNREADABLE:
      message = ('body: must be JSON in UTF-8, with numbers of at most 4,300 '
                 'digits and fewer than 1,000 levels')
    return turn_away(
        request.scope, e.status_code,
        REASONS.get(e.status_code, 'bad_request'), message, allow=allow,
        **(known if e.detail.startswith('model: ') else {}))

  async def broken(request, _):  # raised again after this, to the Gate's log
    return turn_away(request.scope, 500, 'internal',
                     'the server made a mistake; its log says which')

  async def gone(request, _):
    turn_away(request.scope, 499, 'gone', '')
    return Response(status_code=499)

  for kind, answer in ((Refused, refused), (RequestValidationError, unread),
                       (InputError, bad), (HTTPException, http), (Gone, gone),
                       (ClientDisconnect, gone), (Exception, broken)):
    app.add_exception_handler(kind, answer)
