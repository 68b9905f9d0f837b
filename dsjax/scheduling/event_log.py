"""Events and commands as JSON-ready lists, and back."""

from dsjax.config.checks import require
from dsjax.scheduling.events import (
  Abort,
  Arrived,
  Cancelled,
  Chunk,
  DecodeDone,
  Drain,
  Fail,
  Finish,
  InstanceDown,
  InstanceUp,
  Migrate,
  Migrated,
  MigrateFailed,
  Preempt,
  PrefillDone,
  Reject,
  Row,
  RunDecode,
  RunPrefill,
  Timer,
)

_LOGGED = {t.__name__: t for t in (
    Arrived, Cancelled, PrefillDone, DecodeDone, Migrated, MigrateFailed,
    Timer, InstanceDown, InstanceUp, Drain, Chunk, Row, RunPrefill, RunDecode,
    Migrate, Abort, Preempt, Finish, Fail, Reject)}


def encode(value):
  """An event or command (or a tuple of them) as JSON-ready lists."""
  if isinstance(value, tuple):
    named = [type(value).__name__] if hasattr(value, '_fields') else []
    return named + [encode(v) for v in value]
  return value


def decode(data):
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
