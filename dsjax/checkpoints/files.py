"""Files of a model: JSON objects."""

import os
import pathlib
from typing import Any

from dsjax.config.checks import InputError, parse_json


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
