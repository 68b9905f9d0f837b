"""Events and commands as JSON-ready lists, and back."""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from dsjax.config.checks import require
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Chunk, Command, Event, Row

LOGGED: dict[str, Any] = {kind.__name__: kind for kind in (
    *get_args(Event), *get_args(Command), Chunk, Row)}


def encode(value: Any) -> Any:
  """An event or command (or a tuple of them) as JSON-ready lists."""
  if isinstance(value, tuple):
    named = [type(value).__name__] if hasattr(value, '_fields') else []
    return named + [encode(v) for v in value]
  return value


def decode(data: Any, kinds: Mapping[str, Any] = LOGGED) -> Any:
  """The inverse of encode, of values of these kinds.

  Raises:
    InputError: a name or a field count is unknown.
  """
  if not isinstance(data, list):
    return data
  if data and isinstance(data[0], str):
    name, *fields = data
    require(name in kinds and len(fields) <= len(kinds[name]._fields),
            'log entry', name, sorted(kinds))
    return kinds[name](*[decode(field, kinds) for field in fields])
  return tuple([decode(value, kinds) for value in data])


def replay(config: scheduler.Config,
           log: Iterable[tuple[Event, tuple[Command, ...]]]) -> int | None:
  """Steps the scheduler through a log's events.

  Returns:
    the index of the first entry whose commands differ, or None.
  """
  state = scheduler.init(config)
  for index, (event, commands) in enumerate(log):
    state, again = scheduler.step(config, state, event)
    if again != commands:
      return index
  return None
