"""Bad input is one clear error: the checks that every layer shares."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class InputError(ValueError):
  """Bad input from outside: names the field and what it may be."""


class StartError(RuntimeError):
  """An instance that is a process did not start: says which one, and why."""


def require(ok: object, field: str, value: object, allowed: object) -> None:
  """Raises InputError naming the field, its value and the allowed values."""
  if not ok:
    text = repr(value)
    text = text if len(text) <= 120 else f'{text[:100]} ... {text[-15:]}'
    raise InputError(f'{field}={text}: must be {allowed}')


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
  """An InputError from inside says first what it is about, such as a file."""
  try:
    yield
  except InputError as error:
    raise InputError(f'{where}: {error}') from error


@contextlib.contextmanager
def naming_file(field: str, path: str, allowed: str) -> Iterator[None]:
  """An InputError about a file says first which field names the file, and last
  what else the field may be."""
  try:
    yield
  except InputError as error:
    text = str(error)
    text = (text.removeprefix(path) if text.startswith((f'{path}:', f'{path},'))
            else f': {text}')
    named = path if '.' in path or '/' in path else repr(path)
    raise InputError(
        f'{field}={named}{text}; {field} must be {allowed}') from error


def check_fetched(source: object, begin: bytes) -> None:
  """Raises InputError of a file that Git LFS would have to fetch first.

  begin: its first bytes, four or more.
  """
  if begin and begin[:24] == b'version https://git-lfs.'[:len(begin)]:
    raise InputError(f'{source}: is a pointer of Git LFS: must be the file, '
                     'which `git lfs pull` fetches')


def parse_json(source: object, text: str | bytes, unique: bool = False
               ) -> object:
  """The value of a JSON text. unique: no name of an object comes twice.

  Raises:
    InputError: it is none; names its source.
  """
  try:
    return json.loads(text, object_pairs_hook=_unique if unique else None)
  except (ValueError, RecursionError) as error:
    check_fetched(source, (text if isinstance(text, bytes) else
                           text[:24].encode(errors='replace'))[:24])
    raise InputError(f'{source}: is not JSON: {error}') from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """An object of JSON.

  Raises:
    ValueError: a name comes twice.
  """
  made = dict(pairs)
  if len(made) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f'{max(names, key=names.count)!r} is given twice')
  return made


def plain(value: Any) -> Any:
  """A scalar of numpy as Python's own; anything else as it is."""
  return value.item() if isinstance(value, np.generic) else value


def make_plain(record: Any) -> None:
  """Makes the scalars of numpy in a frozen dataclass Python's own, which JSON
  takes and which cannot overflow."""
  for field, value in list(vars(record).items()):
    if isinstance(value, np.generic):
      object.__setattr__(record, field, value.item())


def is_number(low: float, high: float,
              low_open: bool = False) -> Callable[[object], bool]:
  """A test for finite numbers, Python's or numpy's, from low (or above it:
  low_open) to high."""
  def test(value: object) -> bool:
    value = plain(value)
    return (isinstance(value, int | float) and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max and value <= high
            and (value > low if low_open else value >= low))
  return test


def is_integer(low: float, high: float) -> Callable[[object], bool]:
  """A test for integers, Python's or numpy's, from low to high."""
  def test(value: object) -> bool:
    value = plain(value)
    return (isinstance(value, int) and not isinstance(value, bool)
            and low <= value <= high)
  return test


is_nonnegative = is_number(0, math.inf)
is_positive = is_number(0, math.inf, low_open=True)
is_positive_int = is_integer(1, math.inf)
