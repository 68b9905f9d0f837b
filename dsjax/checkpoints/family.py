"""What is known of one family of models, wherever its files come from.

The known ones are the modules of families/. Another one is a value of the
same kind, given to `load(path, family=...)`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.checkpoints.hf_keys import Keys
from dsjax.checkpoints.hf_names import Names
from dsjax.config.checks import InputError, require


class GgufKeys:
  """An architecture's hyperparameters in a GGUF file: get('block_count')."""

  def __init__(self, meta: Mapping[str, Any], architecture: str) -> None:
    self._meta, self._prefix = meta, f'{architecture}.'

  def __call__(self, key: str, kind: type = int, default: Any = None) -> Any:
    """A hyperparameter of this type. Raises InputError: missing, another."""
    value = self._meta.get(self._prefix + key, default)
    if value is None:
      raise InputError(f'metadata key {self._prefix + key!r} is missing')
    require(isinstance(value, kind) and not isinstance(value, bool),
            self._prefix + key, value,
            f'one {kind.__name__} (a value per layer is not supported)')
    return value

  def raw(self, key: str) -> Any:
    """A hyperparameter as it stands, or None."""
    return self._meta.get(self._prefix + key)

  def name(self, key: str) -> str:
    """What a hyperparameter is called in the file."""
    return self._prefix + key


@dataclasses.dataclass(frozen=True)
class Gguf:
  """A family's GGUF files (llama.cpp, src/llama-model.cpp).

  Attributes:
    architecture: general.architecture.
    fields: (hyperparameters, the fields that every architecture spells alike)
      -> further fields of the ModelConfig.
    keys: hyperparameters that `fields` reads.
    norm_eps: the hyperparameter that is the epsilon of every norm.
    interleaved: rows of q and k are in interleaved rotary order.
    packed: leaf -> (tensor, which third of it), where one tensor holds
      queries, keys and values.
  """

  architecture: str
  fields: Callable[[GgufKeys, dict[str, Any]], dict[str, Any]]
  keys: tuple[str, ...] = ()
  norm_eps: str = 'attention.layer_norm_rms_epsilon'
  interleaved: bool = False
  packed: Mapping[str, tuple[str, int]] = dataclasses.field(
      default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Family:
  """A family's files as Hugging Face publishes them, and as GGUF.

  Attributes:
    model_type, architecture: as config.json names the family.
    fields: its keys -> the fields of the ModelConfig but name and token ids.
      A key that it does not read is refused, unless it changes nothing.
    defaults: values of absent keys, of which llama's are others; those of
      the family's configuration class in transformers.
    tensors: how each leaf is stored; see hf_names.Names.
    others: the same where a file names a leaf's tensor otherwise.
    gain_less_one: norms are stored as gain - 1.
    not_parameters: a pattern of tensors that may be stored and are not read.
    gguf: None: GGUF files of this family are not read.
  """

  model_type: str
  architecture: str
  fields: Callable[[Keys], dict[str, Any]]
  tensors: Names
  others: Names = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  gain_less_one: bool = False
  not_parameters: str = r'rotary_emb\.inv_freq$'
  gguf: Gguf | None = None
