"""Files of a model: JSON objects, and errors that name the file."""

import contextlib
import os
import pathlib
from collections.abc import Generator
from typing import Any

from dsjax.config.checks import InputError, parse_json


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Generator[None, None, None]:
  """Puts the file's name before an InputError's message."""
  try:
    yield
  except InputError as error:
    raise InputError(f'{path}: {error}') from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The JSON object in a file. Raises InputError naming the file."""
  try:
    text = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise InputError(f'{path}: {error.strerror}') from error
  value = parse_json(path, text)
  if not isinstance(value, dict):
    raise InputError(f'{path}: must hold a JSON object')
  return value
