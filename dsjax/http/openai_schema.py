"""OpenAI's requests and answers as data: no server, no clock.

A body is a pydantic model: unknown fields, wrong types and values out of
range are errors that name the field. What this server does not compute is an
error too, unless the field says nothing about the answer (user, metadata).
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from dsjax.checkpoints.tokenizer import ROLES, Tokenizer
from dsjax.config.checks import InputError
from dsjax.config.request import (
  ABOVE,
  MAX_LOGIT_BIAS,
  MAX_LOGPROBS,
  RANGES,
  Sampling,
)
from dsjax.runtime.output import Update

MAX_N = 128
LOWEST = -9999.0  # JSON has no minus infinity
_Token = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
_Ids = Annotated[list[_Token], pydantic.Field(min_length=1)]
# Its characters are indexed in the orchestrator's thread, while all wait.
_Stop = Annotated[str, pydantic.Field(max_length=1024)]
_TokenText = Annotated[str, pydantic.Field(pattern='^[0-9]{1,9}$')]
_Bias = Annotated[float, pydantic.Field(ge=RANGES['logit_bias'][0],
                                        le=RANGES['logit_bias'][1])]


def _within(field: str, **narrower: float) -> Any:
  """A number in Sampling's range of the field, or in OpenAI's narrower one."""
  low, high = RANGES[field]
  least = 'gt' if field in ABOVE else 'ge'
  return pydantic.Field(None, **{least: low, 'le': high} | narrower)


class _Body(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid', strict=True,
                                     allow_inf_nan=False)


class StreamOptions(_Body):
  """What a stream has beside its text."""
  include_usage: bool = False
  continuous_usage_stats: bool = False


class _Common(_Body):
  """Fields of both kinds of request; None means the default."""
  model: str
  max_tokens: int | None = pydantic.Field(None, ge=1)
  temperature: float | None = _within('temperature', le=2)
  top_p: float | None = _within('top_p')
  top_k: int | None = pydantic.Field(None, ge=-1, lt=2**31)
  min_p: float | None = _within('min_p')
  presence_penalty: float | None = _within('presence_penalty', ge=-2, le=2)
  frequency_penalty: float | None = _within('frequency_penalty', ge=-2, le=2)
  repetition_penalty: float | None = _within('repetition_penalty')
  logit_bias: dict[_TokenText, _Bias] | None = pydantic.Field(
      None, max_length=MAX_LOGIT_BIAS)
  seed: int | None = pydantic.Field(None, ge=-2**63, lt=2**63)
  n: int | None = pydantic.Field(None, ge=1, le=MAX_N)
  stop: _Stop | list[_Stop] | None = None
  stop_token_ids: list[_Token] | None = pydantic.Field(None, max_length=64)
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


class Completion(_Common):
  """A body of /v1/completions."""
  prompt: Annotated[str, pydantic.Field(min_length=1)] | _Ids | Annotated[
      list[Annotated[str, pydantic.Field(min_length=1)] | _Ids],
      pydantic.Field(min_length=1, max_length=MAX_N)]
  logprobs: int | None = pydantic.Field(None, ge=0, le=MAX_LOGPROBS)
  echo: Literal[False] | None = None
  suffix: None = None
  best_of: Literal[1] | None = None
  max_tokens: int | None = pydantic.Field(16, ge=1)

  kind: ClassVar = 'text_completion'
  chat: ClassVar = False

  @property
  def num_logprobs(self) -> int | None:
    return self.logprobs

  @property
  def prompts(self) -> list[Any]:
    """A list of texts and lists of ids."""
    single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
    return [self.prompt] if single else self.prompt


class Part(_Body):
  """A piece of a message: only text."""
  type: Literal['text']
  text: str


class Message(_Body):
  """A turn of a conversation."""
  role: Literal[ROLES]
  content: str | list[Part]
  name: None = None

  @property
  def plain(self) -> dict[str, str]:
    """What a chat template takes."""
    text = (self.content if isinstance(self.content, str) else
            ''.join(p.text for p in self.content))
    return {'role': self.role, 'content': text}


class ResponseFormat(_Body):
  """Only text."""
  type: Literal['text']


class Chat(_Common):
  """A body of /v1/chat/completions."""
  messages: list[Message] = pydantic.Field(min_length=1, max_length=4096)
  max_completion_tokens: int | None = pydantic.Field(None, ge=1)
  logprobs: bool | None = None
  top_logprobs: int | None = pydantic.Field(None, ge=0, le=MAX_LOGPROBS)
  tools: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None
  tool_choice: Literal['none'] | None = None
  response_format: ResponseFormat | None = None
  service_tier: Literal['auto', 'default'] | None = None
  store: Literal[False] | None = None

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


class Tokenize(_Body):
  """A body of /tokenize: a text as it stands, or a conversation."""
  model: str | None = None
  prompt: str | None = None
  messages: list[Message] | None = pydantic.Field(None, min_length=1)
  add_generation_prompt: bool = True

  @pydantic.model_validator(mode='after')
  def _one(self):
    if (self.prompt is None) == (self.messages is None):
      raise InputError('prompt: must be given, or else messages')
    return self


class Detokenize(_Body):
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


def invalid(errors: Sequence[Any]) -> tuple[str, str | None]:
  """(message, field) of the first of pydantic's errors, input left out."""
  first = errors[0]
  names = [str(x) for x in first['loc'] if x != 'body']
  if first['type'] == 'value_error':
    message, field = named(first['msg'].removeprefix('Value error, '))
    return message, field or (names[0] if names else None)
  if first['type'] == 'json_invalid':
    return f'the body is not JSON: {first["ctx"]["error"]}', None
  if first['type'] == 'extra_forbidden':
    return (f'{names[0][:80]}: this server knows no such field',
            names[0][:80])
  where = '.'.join(names)[:80]
  return f'{where or "body"}: {first["msg"]}', names[0] if names else None


# --- answers ----------------------------------------------------------------


class ResponseBuilder:
  """Makes the JSON of one call from the updates of its requests."""

  def __init__(self, body: Completion | Chat, id: str, created: int,
               prompt_lens: Sequence[int], tokenizer: Tokenizer | None
               ) -> None:
    self.body, self.tokenizer = body, tokenizer
    self.head = {'id': ('chatcmpl-' if body.chat else 'cmpl-') + id,
                 'object': body.kind, 'created': created, 'model': body.model}
    self.prompt_tokens, self.output_tokens = sum(prompt_lens), 0
    self._told: set[int] = set()  # choices whose role is out
    self._offset: dict[int, int] = {}  # by choice, of the next token's text

  def usage(self) -> dict[str, Any]:
    """Tokens read and written; this server shares no prompts (cached: 0)."""
    return {'prompt_tokens': self.prompt_tokens,
            'completion_tokens': self.output_tokens,
            'total_tokens': self.prompt_tokens + self.output_tokens,
            'prompt_tokens_details': {'cached_tokens': 0}}

  def chunk(self, index: int, update: Update) -> dict[str, Any]:
    """The chunk of a stream for one update."""
    self.output_tokens += len(update.tokens)
    choice = {'index': index, 'finish_reason': update.reason,
              'logprobs': self._logprobs(index, update)}
    if self.body.chat:
      role = {} if index in self._told else {'role': 'assistant'}
      self._told.add(index)
      choice['delta'] = role | (
          {'content': update.text} if update.tokens or update.text else {})
    else:
      choice['text'] = update.text
    chunk = self.head | {'choices': [choice]}
    if self.body.chat:
      chunk['object'] = 'chat.completion.chunk'
    wanted = self.body.usage_wanted
    if wanted.include_usage or wanted.continuous_usage_stats:
      chunk['usage'] = (self.usage() if wanted.continuous_usage_stats
                        else None)
    return chunk

  def last(self) -> dict[str, Any] | None:
    """The chunk after all others, of usage alone; None unless asked for."""
    if not self.body.usage_wanted.include_usage:
      return None
    kind = 'chat.completion.chunk' if self.body.chat else self.body.kind
    return self.head | {'object': kind, 'choices': [], 'usage': self.usage()}

  def full(self, updates: Sequence[Update]) -> dict[str, Any]:
    """The unstreamed answer: an Update with everything for each choice."""
    choices = []
    for index, update in enumerate(updates):
      self.output_tokens += len(update.tokens)
      choice = {'index': index, 'finish_reason': update.reason,
                'logprobs': self._logprobs(index, update)}
      choice |= ({'message': {'role': 'assistant', 'content': update.text}}
                 if self.body.chat else {'text': update.text})
      choices.append(choice)
    return self.head | {'choices': choices, 'usage': self.usage()}

  def _spell(self, token: int) -> tuple[str, list[int]]:
    raw = self.tokenizer.token_bytes(token) if self.tokenizer else b''
    return raw.decode(errors='replace') or f'token_id:{token}', list(raw)

  def _logprobs(self, index: int, update: Update) -> dict[str, Any] | None:
    if self.body.num_logprobs is None:
      return None
    rows = [(self._spell(t), max(p, LOWEST), [
        (self._spell(id), max(q, LOWEST)) for id, q in top])
            for t, (p, top) in zip(update.tokens, update.logprobs,
                                   strict=True)]
    if self.body.chat:
      def entry(spelt: tuple[str, list[int]], p: float) -> dict[str, Any]:
        return {'token': spelt[0], 'bytes': spelt[1], 'logprob': p}
      return {'content': [entry(spelt, p) | {
          'top_logprobs': [entry(*other) for other in top]}
                          for spelt, p, top in rows], 'refusal': None}
    offset, offsets = self._offset.get(index, 0), []
    for (text, _), _, _ in rows:
      offsets.append(offset)
      offset += len(text)
    self._offset[index] = offset
    return {'tokens': [text for (text, _), _, _ in rows],
            'token_logprobs': [p for _, p, _ in rows],
            'top_logprobs': [{text: q for (text, _), q in top}
                             for _, _, top in rows],
            'text_offset': offsets}
