"""Messages of a chat, as clients send them: a turn, or an answer sent back."""

import contextlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from dsjax.checkpoints.chat_template import Role
from dsjax.config.checks import InputError

MAX_NESTED = 64  # lists and objects of a call's arguments


class Body(pydantic.BaseModel):
  """Of JSON: every field is known, and nothing is converted.

  One that is not known may be null: clients send all that they know.
  """
  model_config = pydantic.ConfigDict(extra='forbid', strict=True,
                                     allow_inf_nan=False)

  @pydantic.model_validator(mode='before')
  @classmethod
  def _without_nulls(cls, value: Any) -> Any:
    if not isinstance(value, dict):
      return value
    return {field: item for field, item in value.items()
            if item is not None or field in cls.model_fields}


def _form(value: object) -> str | None:
  """Which form of a prompt or a content a value is meant to have."""
  if isinstance(value, list):
    return 'ids' if value and isinstance(value[0], int) else 'list'
  return 'text' if isinstance(value, str) else None


def one_of(forms: str) -> pydantic.Discriminator:
  """Reads a union by its form, so that an error is of the form meant."""
  return pydantic.Discriminator(_form, custom_error_type='form',
                                custom_error_message=f'must be {forms}')


def _check_type(value: Any, fields: Sequence[str]) -> Any:
  """The value; raises InputError unless the field of its type is there, and
  no other."""
  for field in fields:
    if (getattr(value, field) is None) == (field == value.type):
      raise InputError(f'{field}: must be given with the type {field!r}, and '
                       'with no other')
  return value


class Part(Body):
  """A piece of a message: only text, or an assistant's refusal."""
  type: Literal['text', 'refusal']
  text: str | None = None
  refusal: str | None = None
  # Of no consequence.
  prompt_cache_breakpoint: Any = None
  cache_control: Any = None
  annotations: Any = None

  @pydantic.model_validator(mode='after')
  def _one(self):
    return _check_type(self, ('text', 'refusal'))

  @property
  def plain(self) -> str:
    return self.text or self.refusal or ''


class Function(Body):
  """What an assistant called. arguments: JSON, if the model wrote it well."""
  name: str
  arguments: str
  parsed_arguments: Any = None  # of the official client: the same

  @property
  def plain(self) -> dict[str, Any]:
    """Arguments as templates expect them: an object if they are one."""
    arguments = None
    if self.arguments.count('{') + self.arguments.count('[') <= MAX_NESTED:
      with contextlib.suppress(ValueError):
        arguments = json.loads(self.arguments)
    return {'name': self.name, 'arguments': arguments if isinstance(
        arguments, dict) else self.arguments}


class Custom(Body):
  """What an assistant called with a text of any form."""
  name: str
  input: str

  @property
  def plain(self) -> dict[str, Any]:
    return {'name': self.name, 'arguments': self.input}


class ToolCall(Body):
  """A call that an assistant made in an earlier turn."""
  id: str
  index: int | None = None  # of a stream's pieces, of no consequence
  type: Literal['function', 'custom']
  function: Function | None = None
  custom: Custom | None = None

  @pydantic.model_validator(mode='after')
  def _one(self):
    return _check_type(self, ('function', 'custom'))

  @property
  def plain(self) -> dict[str, Any]:
    """As templates expect it: they know only functions."""
    called = self.function or self.custom
    assert called
    return {'id': self.id, 'type': 'function', 'function': called.plain}


class Message(Body):
  """A turn of a conversation, or an answer of OpenAI's client sent back."""
  role: Literal[Role, 'function']
  content: Annotated[
      Annotated[str, pydantic.Tag('text')]
      | Annotated[list[Part], pydantic.Field(min_length=1),
                  pydantic.Tag('list')],
      one_of('text or a list of parts')] | None = None
  name: str | None = pydantic.Field(
      None, min_length=1, max_length=64, pattern=r'^[^\s<|\\/>]+$')
  tool_call_id: str | None = None
  tool_calls: list[ToolCall] | None = None
  refusal: str | None = None
  reasoning_content: str | None = None
  reasoning: str | None = None  # what some servers call reasoning_content
  audio: None = None
  function_call: Function | None = None
  # What clients and other servers add to an answer, of no consequence.
  annotations: list[Any] | None = None
  cache_control: Any = None
  parsed: Any = None
  provider_specific_fields: Any = None
  reasoning_details: Any = None
  thinking_blocks: Any = None

  @pydantic.model_validator(mode='after')
  def _suits_its_role(self):
    assistant, tool = self.role == 'assistant', self.role == 'tool'
    for field, needed in (
        ('content', self.role not in ('assistant', 'function')),
        ('tool_call_id', tool), ('name', self.role == 'function')):
      if needed and getattr(self, field) is None:
        raise InputError(f'{field}: must be given with the role {self.role!r}')
    for field, allowed in (
        ('tool_call_id', tool), ('tool_calls', assistant),
        ('function_call', assistant), ('refusal', assistant),
        ('reasoning_content', assistant), ('reasoning', assistant)):
      if getattr(self, field) and not allowed:
        raise InputError(f'{field}: must be left out with the role '
                         f'{self.role!r}')
    return self

  @property
  def plain(self) -> dict[str, Any]:
    """What a chat template takes; it knows no role of a function."""
    parts = self.content or self.refusal or ''
    text = (parts if isinstance(parts, str) else
            ''.join(part.plain for part in parts))
    extras = {field: value for field, value in (
        ('name', self.name), ('tool_call_id', self.tool_call_id),
        ('reasoning_content', self.reasoning_content or self.reasoning))
              if value}
    calls = [call.plain for call in self.tool_calls or ()]
    if self.function_call:
      calls.append({'type': 'function', 'function': self.function_call.plain})
    role = 'tool' if self.role == 'function' else self.role
    return {'role': role, 'content': text} | extras | (
        {'tool_calls': calls} if calls else {})
