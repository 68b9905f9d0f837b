"""Keys of a config.json, each checked as it is read.

A key that this model would ignore in silence is refused. Defaults and rules
follow transformers (src/transformers/models/*/configuration_*.py).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.config.checks import InputError, is_number, require
from dsjax.config.model import RopeScaling

Fields = dict[str, Any]  # of a ModelConfig, by name

_KINDS = {int: 'an integer', float: 'a finite number', bool: 'true or false',
          str: 'a string', list: 'a list', dict: 'an object'}
# Keys that change nothing in a forward pass without dropout.
_IGNORED = frozenset('''
  _name_or_path activation_dropout architectures
  attention_dropout attention_probs_dropout_prob attn_implementation
  attn_pdrop begin_suppress_tokens bos_token_id cache_implementation
  chunk_size_feed_forward classifier_dropout do_sample dropout dtype
  embd_pdrop eos_token_id finetuning_task gradient_checkpointing
  hidden_dropout id2label init_std initializer_range is_decoder
  keys_to_ignore_at_inference label2id layerdrop length_penalty max_length
  model_type n_ctx num_beam_groups num_beams num_return_sequences
  output_attentions output_hidden_states output_past output_router_logits
  output_scores pad_token_id predict_special_tokens prefix pretraining_tp
  problem_type reorder_and_upcast_attn repetition_penalty resid_pdrop
  return_dict return_dict_in_generate router_aux_loss_coef sep_token_id
  summary_activation summary_first_dropout summary_proj_to_labels summary_type
  summary_use_proj suppress_tokens task_specific_params temperature
  tokenizer_class top_k top_p torch_dtype torchscript transformers_version
  typical_p unk_token_id unsloth_fixed unsloth_version use_cache'''.split())
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'relu': 'relu',
                'gelu': 'gelu', 'gelu_new': 'gelu_tanh',
                'gelu_pytorch_tanh': 'gelu_tanh'}
_is_finite = is_number(-math.inf, math.inf)


class Keys:
  """config.json's keys, each checked as it is read; leftovers are refused."""

  def __init__(self, keys: Mapping[str, Any]) -> None:
    self._keys = {k: v for k, v in keys.items() if k not in _IGNORED}

  def read(self, key: str, kind: type = int, *default: Any) -> Any:
    """A key's value; null counts as absent, and absent is `default`."""
    value = self._keys.pop(key, None)
    if value is None and default:
      return default[0]
    require(value is not None, key, value, f'given ({_KINDS[kind]})')
    ok = (_is_finite(value) if kind is float else isinstance(value, kind)
          and (kind is bool) == isinstance(value, bool))
    require(ok, key, value, _KINDS[kind])
    return value

  def only(self, key: str, value: object) -> None:
    """A key that must have this value, or be absent."""
    given = self._keys.pop(key, None)
    require(given is None or given == value, key, given,
            f'{value!r} (others are not supported)')

  def count(self, key: str, other: str | None = None) -> int:
    """Layers or experts: few enough to be listed; of either key."""
    key = other if self._keys.get(key) is None and other else key
    value = self.read(key)
    require(1 <= value <= 9999, key, value, 'from 1 to 9999')
    return value

  def ignore(self, *keys: str) -> None:
    """Keys of which any value changes nothing."""
    for key in keys:
      self._keys.pop(key, None)

  def finish(self) -> None:
    """Raises InputError for a key that nothing has read."""
    for key, value in self._keys.items():
      require(value in (None, False, [], {}), key, value,
              'absent (it is not supported)')


def above_zero(key: str, value: float) -> float:
  """The value. Raises InputError unless it is above 0."""
  require(value > 0, key, value, 'above 0')
  return value


def rope_fields(rotary: Any, key: str) -> tuple[float, RopeScaling | None]:
  """Base and scaling of one set of rotary parameters, which `key` holds."""
  require(isinstance(rotary, dict), key, rotary, 'an object')
  keys = Keys(rotary)
  try:
    kind = keys.read('rope_type', str, None)
    kind = keys.read('type', str, None) if kind is None else kind
    keys.ignore('type')
    base = above_zero('rope_theta', float(keys.read('rope_theta', float, 1e4)))
    keys.only('partial_rotary_factor', 1.0)
    require(kind in (None, 'default', 'linear', 'llama3'), 'rope_type', kind,
            "'default', 'linear' or 'llama3'")
    scaling = None
    if kind == 'linear':
      scaling = RopeScaling('linear', float(keys.read('factor', float)))
      keys.ignore('original_max_position_embeddings')
    elif kind == 'llama3':
      scaling = RopeScaling(
          'llama3', float(keys.read('factor', float)),
          keys.read('original_max_position_embeddings'),
          float(keys.read('low_freq_factor', float)),
          float(keys.read('high_freq_factor', float)))
    keys.finish()
  except InputError as error:
    raise InputError(f'{key}: {error}') from error
  return base, scaling


def rope(keys: Keys, default_base: float = 1e4) -> Fields:
  """rope_base and rope_scaling, from the keys of any transformers.

  Before version 5: rope_theta and rope_scaling; since then: rope_parameters.
  """
  base = float(keys.read('rope_theta', float, default_base))
  scaling = keys.read('rope_scaling', dict, None)
  rotary = keys.read('rope_parameters', dict, scaling)
  key = 'rope_parameters' if scaling is None else 'rope_scaling'
  base, scaling = rope_fields({'rope_theta': base} | (rotary or {}), key)
  keys.only('partial_rotary_factor', 1.0)
  return dict(rope_base=base, rope_scaling=scaling)


def activation(keys: Keys, key: str, default: str) -> str:
  """The ModelConfig's name of the activation that a key names."""
  name = keys.read(key, str, default)
  require(name in _ACTIVATIONS, key, name, f'one of {sorted(_ACTIVATIONS)}')
  return _ACTIVATIONS[name]


def biases(keys: Keys) -> Fields:
  """qkv_bias and out_bias, which attention_bias says together."""
  bias = keys.read('attention_bias', bool, False)
  return dict(qkv_bias=bias, out_bias=bias)


def windows(keys: Keys, num_layers: int, slides: Callable[[int], object],
            default: int | None = None) -> Fields:
  """The window of each layer that slides.

  Those are what layer_types names, or else the layers of which slides(layer)
  is true. default: the window where sliding_window is absent.
  """
  window = keys.read('sliding_window', int, default) or 0
  names = ('full_attention', 'sliding_attention')
  types = keys.read('layer_types', list, None)
  if types is None:
    types = [names[bool(slides(layer))] for layer in range(num_layers)]
  require(len(types) == num_layers and all(t in names for t in types),
          'layer_types', types, f'{num_layers} of {names}')
  by_layer = tuple(window * names.index(kind) for kind in types)
  return dict(windows=by_layer if any(by_layer) else ())
