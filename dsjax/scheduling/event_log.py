"""Events and commands as JSON-ready lists, and back."""

from typing import Any, get_args

from dsjax.config.checks import require
from dsjax.scheduling.events import Chunk, Command, Event, Row

_LOGGED = {kind.__name__: kind for kind in (
    *get_args(Event), *get_args(Command), Chunk, Row)}


def encode(value: Any) -> Any:
  """An event or command (or a tuple of them) as JSON-ready lists."""
  if isinstance(value, tuple):
    named = [type(value).__name__] if hasattr(value, '_fields') else []
    return named + [encode(v) for v in value]
  return value


def decode(data: Any) -> Any:
  """The inverse of encode.

  Raises:
    InputError: a name or a field count is unknown.
  """
  if not isinstance(data, list):
    return data
  if data and isinstance(data[0], str):
    kind = _LOGGED.get(data[0])
    require(kind is not None and len(data) - 1 <= len(kind._fields)
            if kind else False, 'log entry', data[0], sorted(_LOGGED))
    return kind(*(decode(v) for v in data[1:]))
  return tuple(decode(v) for v in data)
