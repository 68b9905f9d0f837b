"""config.json of a Hugging Face folder as a ModelConfig."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.checkpoints.families import FAMILIES
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.files import is_there, read_json
from dsjax.checkpoints.hf_keys import Keys
from dsjax.config import zoo
from dsjax.config.checks import naming, naming_file, require
from dsjax.config.model import ModelConfig

CONFIG = 'config.json'


def _family(keys: Mapping[str, Any], families: Sequence[Family]) -> Family:
  """The family that model_type, or else architectures, names."""
  kind: Any = keys.get('model_type')
  listed = keys.get('architectures')
  by_type = {family.model_type: family for family in families}
  if kind is None:
    kind = next((family.model_type for family in families
                 if listed == [family.architecture]), None)
  require(isinstance(kind, str) and kind in by_type, 'model_type',
          kind or listed, f'one of {sorted(by_type)}')
  family = by_type[kind]
  require(listed in (None, [family.architecture]), 'architectures', listed,
          f'{[family.architecture]} for model_type={kind!r}')
  return family


def _token_ids(key: str, *sources: Mapping[str, Any]) -> list[int]:
  """bos_token_id or eos_token_id: the first file that gives one wins."""
  given = next((s[key] for s in sources if s.get(key) is not None), [])
  ids = given if isinstance(given, list) else [given]
  require(all(type(i) is int for i in ids), key, given,
          'a token id or a list of them')
  return ids


def read_config(
    path: str | os.PathLike[str], families: Sequence[Family] = FAMILIES
) -> tuple[ModelConfig, Family]:
  """The ModelConfig of a folder, and which of the families it is.

  From its config.json and, for special tokens, generation_config.json. Ids
  outside the vocabulary are dropped: no token has them.

  Raises:
    InputError: names the file and key: unreadable, another architecture, or
      a hyperparameter that this model does not compute.
  """
  path = pathlib.Path(path)
  raw, generation = read_json(path / CONFIG), {}
  if is_there(path / 'generation_config.json'):
    generation = read_json(path / 'generation_config.json')
  with naming(path / CONFIG):
    family = _family(raw, families)
    raw = {**family.defaults, **raw}
    keys = Keys(raw)
    fields = family.fields(keys)
    keys.finish()
    config = ModelConfig(name=path.resolve().name, **fields)
    bos, eos = (
        sorted({i for i in _token_ids(key, generation, raw)
                if 0 <= i < config.vocab_size})
        for key in ('bos_token_id', 'eos_token_id'))
    return dataclasses.replace(config, bos_id=bos[0] if bos else None,
                               eos_ids=tuple(eos)), family


def named(model: str) -> ModelConfig:
  """The ModelConfig of a name of config.zoo, or of a folder with a
  config.json.

  Raises:
    InputError: neither, or a config.json that is not read; `model` is named.
  """
  if model in zoo.NAMES or not pathlib.Path(model).is_dir():
    return zoo.config(model)
  with naming_file('model', model, f'one of {sorted(zoo.NAMES)}, or a '
                   'folder with a config.json'):
    return read_config(model)[0]
