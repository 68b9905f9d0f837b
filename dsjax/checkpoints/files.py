"""Files of a model: whether they are there, JSON objects."""

import os
import pathlib
from typing import Any

from dsjax.config.checks import InputError, parse_json


def is_there(path: pathlib.Path) -> bool:
  """Whether there is a file of this name; one that a folder may lack.

  Raises:
    InputError: what is there is none, such as a link to nowhere, which is not
      passed over in silence.
  """
  if os.path.lexists(path) and not path.is_file():
    where = (f', but a link to {os.readlink(path)}, where none is'
             if path.is_symlink() else '')
    raise InputError(f'{path}: is not a file{where}')
  return path.is_file()


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
