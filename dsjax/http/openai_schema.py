"""OpenAI's requests and errors as data: no server, no clock.

A body is a pydantic model: unknown fields, wrong types and values out of
range are errors that name the field. What this server does not compute is an
error too, unless the field says nothing about the answer (user, metadata).
Any field but one that must be given may be null.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

import pydantic
import pydantic_core

from dsjax.config.checks import InputError
from dsjax.config.request import (
  ABOVE,
  MAX_LOGIT_BIAS,
  MAX_LOGPROBS,
  MAX_STOP_TOKENS,
  RANGES,
  Sampling,
)
from dsjax.http.openai_messages import Body, Message, one_of

MAX_N = 128
_Token = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_Token], pydantic.Field(min_length=1)]
_Text = Annotated[str, pydantic.Field(min_length=1)]
# Its characters are indexed in the orchestrator's thread, while all wait.
_Stop = Annotated[str, pydantic.Field(max_length=1024)]
_TokenText = Annotated[str, pydantic.Field(pattern='^[0-9]{1,9}$')]
_Bias = Annotated[float, pydantic.Field(ge=RANGES['logit_bias'][0],
                                        le=RANGES['logit_bias'][1])]


def _within(field: str, least: float = -math.inf, most: float = math.inf
            ) -> Any:
  """A number in Sampling's range of the field, and in OpenAI's."""
  low, high = max(RANGES[field][0], least), min(RANGES[field][1], most)
  if field in ABOVE:
    return pydantic.Field(None, gt=low, le=high)
  return pydantic.Field(None, ge=low, le=high)


class StreamOptions(Body):
  """What a stream has beside its text."""
  include_usage: bool | None = None
  continuous_usage_stats: bool | None = None
  include_obfuscation: bool | None = None  # of no consequence


class _Common(Body):
  """Fields of both kinds of request; None means the default."""
  model: str
  max_tokens: int | None = pydantic.Field(None, ge=1)
  temperature: float | None = _within('temperature', most=2)
  top_p: float | None = _within('top_p')
  top_k: int | None = pydantic.Field(None, ge=-1, lt=2**31)
  min_p: float | None = _within('min_p')
  presence_penalty: float | None = _within('presence_penalty', -2, 2)
  frequency_penalty: float | None = _within('frequency_penalty', -2, 2)
  repetition_penalty: float | None = _within('repetition_penalty')
  logit_bias: dict[_TokenText, _Bias] | None = pydantic.Field(
      None, max_length=MAX_LOGIT_BIAS)
  seed: int | None = pydantic.Field(None, ge=-2**63, lt=2**63)
  n: int | None = pydantic.Field(None, ge=1, le=MAX_N)
  stop: Annotated[
      Annotated[_Stop, pydantic.Tag('text')]
      | Annotated[list[_Stop], pydantic.Tag('list')],
      one_of('a text or a list of texts')] | None = None
  stop_token_ids: list[_Token] | None = pydantic.Field(
      None, max_length=MAX_STOP_TOKENS)
  ignore_eos: bool | None = None
  min_tokens: int | None = pydantic.Field(None, ge=0)
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  user: str | None = None
  metadata: dict[str, Any] | None = None

  @property
  def limit(self) -> int | None:
    return self.max_tokens

  @property
  def usage_wanted(self) -> StreamOptions:
    return self.stream_options or StreamOptions()

  def sampling(self, room: int, seed: int, logprobs: int | None
               ) -> list[Sampling]:
    """A Sampling for each of the n answers.

    room: tokens left in the context, for want of a max_tokens. seed: for want
    of one. Answer i draws with seed + i.

    Raises:
      InputError.
    """
    given: dict[str, Any] = {'temperature': 1.0, 'seed': seed} | {
        field: value for field in (
            'temperature', 'top_p', 'min_p', 'seed', 'presence_penalty',
            'frequency_penalty', 'repetition_penalty', 'ignore_eos',
            'min_tokens', 'stop_token_ids')
        if (value := getattr(self, field)) is not None}
    seed = given.pop('seed')
    first = Sampling(
        max_tokens=self.limit or max(1, room), top_k=max(0, self.top_k or 0),
        logprobs=logprobs, stop=((self.stop,) if isinstance(self.stop, str)
                                 else tuple(self.stop or ())),
        logit_bias=tuple((int(token), bias) for token, bias in
                         (self.logit_bias or {}).items()),
        **given)
    return [dataclasses.replace(first, seed=(seed + i) % 2**32)
            for i in range(self.n or 1)]


_TextOrIds = (Annotated[_Text, pydantic.Tag('text')]
              | Annotated[_Ids, pydantic.Tag('ids')])
_Batch = Annotated[
    list[Annotated[_TextOrIds, one_of('text or token ids')]],
    pydantic.Field(min_length=1, max_length=MAX_N)]


class Completion(_Common):
  """A body of /v1/completions."""
  prompt: Annotated[_TextOrIds | Annotated[_Batch, pydantic.Tag('list')],
                    one_of('text, token ids or a list of either')] | None
  logprobs: int | None = pydantic.Field(None, ge=0, le=MAX_LOGPROBS)
  echo: Literal[False] | None = None
  suffix: Literal[''] | None = None
  best_of: int | None = None

  kind: ClassVar = 'text_completion'
  chat: ClassVar = False
  template_options: ClassVar[dict[str, Any]] = {}

  @pydantic.model_validator(mode='after')
  def _all_are_best(self):
    if self.best_of not in (None, self.n or 1):
      raise InputError('best_of: must be n, or be left out')
    return self

  @property
  def limit(self) -> int:
    return self.max_tokens or 16

  @property
  def num_logprobs(self) -> int | None:
    return self.logprobs

  @property
  def prompts(self) -> list[Any]:
    """A list of texts and lists of ids; None: a new document."""
    if (self.prompt is None or isinstance(self.prompt, str)
        or isinstance(self.prompt[0], int)):
      return [self.prompt]
    return list(self.prompt)


def _no_list(value: Any) -> Any:
  if isinstance(value, list | dict):
    raise pydantic_core.PydanticCustomError(
        'form', 'must be text, a number, true, false or null')
  return value


class _Templated(Body):
  """How a chat template is asked; see Tokenizer.chat."""
  add_generation_prompt: bool | None = None
  continue_final_message: bool | None = None
  chat_template_kwargs: dict[str, Annotated[
      bool | int | float | str | None, pydantic.BeforeValidator(_no_list)]
                             ] | None = None

  @property
  def template_options(self) -> dict[str, Any]:
    return {'add_generation_prompt': self.add_generation_prompt is not False,
            'continue_final_message': bool(self.continue_final_message),
            'chat_template_kwargs': self.chat_template_kwargs}


class ResponseFormat(Body):
  """Only text."""
  type: Literal['text']


class Chat(_Common, _Templated):
  """A body of /v1/chat/completions."""
  messages: list[Message] = pydantic.Field(min_length=1, max_length=4096)
  max_completion_tokens: int | None = pydantic.Field(None, ge=1)
  logprobs: bool | None = None
  top_logprobs: int | None = pydantic.Field(None, ge=0, le=MAX_LOGPROBS)
  response_format: ResponseFormat | None = None
  # Nothing but what a server without tools does anyway.
  tools: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None
  tool_choice: Literal['none', 'auto'] | None = None
  functions: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None
  function_call: Literal['none', 'auto'] | None = None
  modalities: list[Literal['text']] | None = None
  reasoning_effort: Literal['none'] | None = None
  verbosity: Literal['medium'] | None = None
  audio: None = None
  moderation: None = None
  web_search_options: None = None
  # They say nothing about the answer.
  parallel_tool_calls: bool | None = None
  prediction: Any = None
  prompt_cache_key: str | None = None
  prompt_cache_options: Any = None
  prompt_cache_retention: str | None = None
  safety_identifier: str | None = None
  service_tier: str | None = None
  store: bool | None = None

  kind: ClassVar = 'chat.completion'
  chat: ClassVar = True

  @pydantic.model_validator(mode='after')
  def _top_needs_logprobs(self):
    if self.top_logprobs is not None and not self.logprobs:
      raise InputError('top_logprobs: must be left out unless logprobs is '
                       'true')
    return self

  @property
  def limit(self) -> int | None:
    return self.max_completion_tokens or self.max_tokens

  @property
  def num_logprobs(self) -> int | None:
    return (self.top_logprobs or 0) if self.logprobs else None

  @property
  def prompts(self) -> list[Any]:
    return [[m.plain for m in self.messages]]


class Tokenize(_Templated):
  """A body of /tokenize: a text as it stands, or a conversation."""
  model: str | None = None
  prompt: str | None = None
  messages: list[Message] | None = pydantic.Field(None, min_length=1)

  @pydantic.model_validator(mode='after')
  def _one(self):
    if (self.prompt is None) == (self.messages is None):
      raise InputError('prompt: must be given, or else messages')
    return self

  @property
  def given(self) -> str | list[dict[str, Any]]:
    return self.prompt or [m.plain for m in self.messages or ()] or ''


class Detokenize(Body):
  """A body of /detokenize."""
  model: str | None = None
  tokens: list[_Token] = pydantic.Field(max_length=2**20)


# --- errors -----------------------------------------------------------------


class ErrorBody(pydantic.BaseModel):
  """What went wrong. param: the field. code: of OpenAI's, or ours."""
  message: str
  type: str
  param: str | None
  code: str | int | None


class Error(pydantic.BaseModel):
  """The body of every answer that says no."""
  error: ErrorBody


def error(message: str, kind: str, param: str | None = None,
          code: str | int | None = None) -> dict[str, Any]:
  """An error in OpenAI's shape."""
  return {'error': {'message': message, 'type': kind, 'param': param,
                    'code': code}}


def named(text: str) -> tuple[str, str | None]:
  """(message, field) of an InputError's text: the name that it starts with."""
  field = text.partition('=')[0].partition(':')[0].partition('[')[0]
  field = field.rpartition('.')[2] if ' ' not in field else ''
  for ours in ('Sampling.', 'Request.'):
    text = text.removeprefix(ours)
  return text, field or None


_NOT_SERVED = 'is not served: must be null or left out'
_REASONS = {
    'extra_forbidden': 'this server knows no such field',
    'missing': 'must be given',
    'model_attributes_type': 'must be a JSON object',
    'too_long': 'must have at most {max_length} items, not {actual_length}',
    'too_short': 'must not be empty', 'string_too_short': 'must not be empty',
    'string_too_long': 'must have at most {max_length} characters',
    'dict_type': 'must be a JSON object', 'list_type': 'must be a list',
    'string_type': 'must be text', 'bool_type': 'must be true or false',
    'none_required': _NOT_SERVED}
_RANGES = ('greater_than', 'greater_than_equal', 'less_than',
           'less_than_equal', 'finite_number', 'int_type',
           'int_parsing_size', 'float_type')


def invalid(errors: Sequence[Any], body: object) -> tuple[str, str | None]:
  """(message, field) of the first of pydantic's errors, input left out.

  The message begins with the path to what is wrong in the body, as in
  messages.0.content.
  """
  first = errors[0]
  if first['type'] == 'json_invalid':
    return f'the body is not JSON: {first["ctx"]["error"]}', None
  path = _path(first, body)
  field = path[0][:80] if path else None
  if first['type'] == 'value_error':
    message, own = named(first['msg'].removeprefix('Value error, '))
    return '.'.join([*path, message]), field or own
  ours, context = _REASONS.get(first['type']), first.get('ctx') or {}
  if first['type'] in _RANGES and path:
    ours = _number(path[0])
  reason = (_NOT_SERVED if context.get('max_length') == 0 else
            ours.format_map(context) if ours else
            re.sub('^[A-Z][a-z]+ should ', 'must ', first['msg']))
  return f'{".".join(path)[:160] or "body"}: {reason}', field


def _number(field: str) -> str | None:
  """Which numbers a field may have, or its items; None where nothing says."""
  if field in ('prompt', 'tokens', 'stop_token_ids'):
    return 'must be a token id, an integer from 0'
  if field == 'logit_bias':
    return 'must be a number from {:g} to {:g}'.format(*RANGES[field])
  about = Completion.model_fields.get(field) or Chat.model_fields.get(field)
  if about is None:
    return None
  bounds = {name: getattr(limit, name) for limit in about.metadata
            for name in ('ge', 'gt', 'le', 'lt') if hasattr(limit, name)}
  if not bounds:
    return None
  noun = 'an integer' if int in get_args(about.annotation) else 'a number'
  low = (f'above {bounds["gt"]}' if 'gt' in bounds else
         f'from {bounds["ge"]}')
  high = bounds.get('le', bounds.get('lt', 0) - 1)
  return f'must be {noun} {low}' + (
      f' to {high}' if bounds.keys() & {'le', 'lt'} else ' on')


def _path(error: Any, body: object) -> list[str]:
  """The keys and indices of an error's place; its other names are pydantic's,
  for the forms that a value may have."""
  path, value = [], body
  place = error['loc'][1:]  # in the body
  for i, key in enumerate(place):
    absent = error['type'] == 'missing' and i == len(place) - 1
    if isinstance(value, dict) and key in value:
      value = value[key]
    elif isinstance(value, list) and isinstance(key, int):
      value = value[key]
    elif not absent:
      continue
    path.append(str(key))
  return path
