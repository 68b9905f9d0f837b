"""Keys of a config.json, each checked as it is read.

A key that this model would ignore in silence is refused. Defaults and rules
follow transformers (src/transformers/models/*/configuration_*.py).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.config import rope as rope_scaling
from dsjax.config.checks import is_number, naming, require

Fields = dict[str, Any]  # of a ModelConfig, by name

_KINDS = {int: 'an integer', float: 'a finite number', bool: 'true or false',
          str: 'a string', list: 'a list', dict: 'an object'}
# Keys that change nothing in a forward pass: of training, of generation, of
# exports and other programs, and what transformers keeps for itself. A family
# may still read one of them.
_IGNORED = re.compile(
    r'_|(init|initializer|summary)_|is_\w+_config$|'
    r'(transformers|torch|onnx|unsloth|neuron|mlx|gguf|axolotl)(\W|_|$)|'
    r'.*(loss|label|drop|jitter|checkpoint)|.*token_(ids?|index)$|'
    r'(output|return)_(attentions|hidden_states|past|router_logits|scores|dict)|'
    '('
    'architectures|model_type|attn_implementation|auto_map|bad_words_ids|'
    'cache_implementation|chunk_size_feed_forward|cross_attention_hidden_size|'
    'diversity_penalty|do_sample|dtype|early_stopping|'
    'encoder_no_repeat_ngram_size|exponential_decay_length_penalty|finetuning_task|'
    'is_decoder|keys_to_ignore_at_inference|layerdrop|length_penalty|max_length|'
    'max_new_tokens|min_length|min_new_tokens|model_name|n_ctx|name_or_path|'
    'no_repeat_ngram_size|num_beam_groups|num_beams|num_return_sequences|'
    'prefix|pretraining_tp|problem_type|remove_invalid_values|'
    'reorder_and_upcast_attn|repetition_penalty|'
    r'(bos|eos|pad|sep|unk|cls|mask)_token|(bf|fp)(16|32)|use_flash_att\w+|'
    '(begin_)?suppress_tokens|task_specific_params|temperature|'
    'tie_encoder_decoder|tokenizer_class|top_[kp]|torchscript|typical_p|'
    'use_bfloat16|use_cache|use_return_dict)$')
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'relu': 'relu',
                'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh',
                'gelu_fast': 'gelu_tanh', 'gelu_accurate': 'gelu_tanh',
                'gelu_pytorch_tanh': 'gelu_tanh'}
_is_finite = is_number(-math.inf, math.inf)


class Keys:
  """config.json's keys, each checked as it is read; leftovers are refused."""

  def __init__(self, keys: Mapping[str, Any]) -> None:
    self._keys = dict(keys)

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

  def set(self, key: str, value: object) -> None:
    """Another value of a key, or one that stands under another name."""
    self._keys[key] = value

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
      require(value in (None, False, [], {}) or _IGNORED.match(key), key, value,
              'absent (it is not supported)')


def above_zero(key: str, value: float) -> float:
  """The value. Raises InputError unless it is above 0."""
  require(value > 0, key, value, 'above 0')
  return value


def _numbers(keys: Keys, key: str) -> list[Any]:
  values = keys.read(key, list)
  require(all(map(_is_finite, values)), key, values, 'finite numbers')
  return values


def rope_fields(rotary: Any, key: str, head_dim: int, max_len: int,
                ) -> Fields:
  """The rotary fields of one set of parameters, which `key` holds.

  Args:
    max_len: of the model, which yarn and longrope change: yarn's is what it
      stretches to. Longrope's is its original length, since beyond it
      transformers computes all keys of a text anew, with other divisors;
      dynamic changes nothing up to max_len, and is not computed beyond.
  """
  require(isinstance(rotary, dict), key, rotary, 'an object')
  keys = Keys(rotary)
  with naming(key):
    kind = keys.read('rope_type', str, None) or keys.read('type', str, None)
    keys.ignore('type', 'finetuned')
    base = above_zero('rope_theta', float(keys.read('rope_theta', float)))
    share = float(keys.read('partial_rotary_factor', float, 1.0))
    width = int(head_dim * share)
    fields: Fields = dict(
        rope_base=base, rope_width=None if width == head_dim else width)
    require(kind in (None, *_SCALINGS), 'rope_type', kind,
            f'one of {sorted(_SCALINGS)}')
    fields |= _SCALINGS[kind or 'default'](keys, width, base, max_len)
    keys.finish()
  return fields


def _linear(keys: Keys, width: int, base: float, max_len: int) -> Fields:
  keys.ignore('original_max_position_embeddings')
  return dict(rope_divisors=rope_scaling.linear(width,
                                                keys.read('factor', float)))


def _dynamic(keys: Keys, width: int, base: float, max_len: int) -> Fields:
  keys.ignore('factor', 'original_max_position_embeddings')
  return {}


def _llama3(keys: Keys, width: int, base: float, max_len: int) -> Fields:
  return dict(rope_divisors=rope_scaling.llama3(
      width, base, keys.read('factor', float),
      keys.read('original_max_position_embeddings', int, max_len),
      keys.read('low_freq_factor', float),
      keys.read('high_freq_factor', float)))


def _yarn(keys: Keys, width: int, base: float, max_len: int) -> Fields:
  original = keys.read('original_max_position_embeddings', int, max_len)
  factor = keys.read('factor', float, max_len / max(original, 1))
  gain = rope_scaling.yarn_gain(
      factor, *(keys.read(key, float, None)
                for key in ('mscale', 'mscale_all_dim')))
  return dict(
      max_len=max(max_len, round(original * factor)),
      rope_divisors=rope_scaling.yarn(
          width, base, factor, original,
          keys.read('beta_fast', float, None) or 32,
          keys.read('beta_slow', float, None) or 1,
          keys.read('truncate', bool, True)),
      rope_gain=float(keys.read('attention_factor', float, gain)))


def _longrope(keys: Keys, width: int, base: float, max_len: int) -> Fields:
  original = keys.read('original_max_position_embeddings', int, max_len)
  require(original > 1, 'original_max_position_embeddings', original,
          'above 1')
  factor = keys.read('factor', float, max_len / original)
  keys.ignore('long_factor', 'long_mscale', 'short_mscale')
  return dict(
      max_len=min(max_len, original),
      rope_divisors=rope_scaling.longrope(width, _numbers(keys,
                                                          'short_factor')),
      rope_gain=float(keys.read('attention_factor', float,
                                rope_scaling.longrope_gain(factor, original))))


_SCALINGS: dict[str, Callable[[Keys, int, float, int], Fields]] = {
    'default': lambda *_: {}, 'linear': _linear, 'dynamic': _dynamic,
    'llama3': _llama3, 'yarn': _yarn, 'longrope': _longrope}


def rope(keys: Keys, head_dim: int, max_len: int,
         partial: bool = False) -> Fields:
  """The rotary fields, from the keys of any transformers.

  Before version 5: rope_theta and rope_scaling; since then: rope_parameters.
  partial: the family may rotate a part of each head.
  """
  rotary: Fields = dict(rope_theta=keys.read('rope_theta', float, 1e4))
  share = keys.read('partial_rotary_factor', float, None)
  original = keys.read('original_max_position_embeddings', int, None)
  scaling = keys.read('rope_scaling', dict, None)
  key = 'rope_parameters' if scaling is None else 'rope_scaling'
  rotary |= {} if share is None else dict(partial_rotary_factor=share)
  rotary |= keys.read('rope_parameters', dict, None) or {}
  rotary |= scaling or {}
  if original is not None and rotary.get('rope_type', rotary.get(
      'type', 'default')) in ('llama3', 'yarn', 'longrope'):
    rotary['original_max_position_embeddings'] = original
  share = rotary.get('partial_rotary_factor', 1.0)
  require(partial or share == 1, 'partial_rotary_factor', share,
          '1.0 (others are not supported)')
  return rope_fields(rotary, key, head_dim, max_len)


def rope_of_kinds(keys: Keys, head_dim: int, max_len: int,
                  local_base: float) -> Fields:
  """The same where windowed layers have a base of their own, unscaled.

  local_base: what it is where the file has no rope_parameters.
  """
  both = keys.read('rope_parameters', dict, None)
  if both is None:
    return rope(keys, head_dim, max_len) | dict(rope_local_base=local_base)
  kinds = ('full_attention', 'sliding_attention')
  require(both.keys() == set(kinds), 'rope_parameters', sorted(both),
          f'an object of {kinds}')
  keys.ignore('rope_theta', 'rope_scaling')
  full, sliding = (
      rope_fields(both[kind], f'rope_parameters.{kind}', head_dim, max_len)
      for kind in kinds)
  require(sliding.keys() == {'rope_base', 'rope_width'}
          and full['rope_width'] is sliding['rope_width'] is None,
          'rope_parameters.sliding_attention', both[kinds[1]],
          'of the default type')
  return full | dict(rope_local_base=sliding['rope_base'])


def activation(keys: Keys, key: str, default: str) -> str:
  """The ModelConfig's name of the activation that a key names."""
  name = keys.read(key, str, default)
  require(name in _ACTIVATIONS, key, name, f'one of {sorted(_ACTIVATIONS)}')
  return _ACTIVATIONS[name]


def biases(keys: Keys) -> Fields:
  """qkv_bias and out_bias, which attention_bias says together."""
  bias = keys.read('attention_bias', bool, False)
  return dict(qkv_bias=bias, out_bias=bias)


def windows(keys: Keys, num_layers: int,
            slides: Callable[[int], object]) -> Fields:
  """The window of each layer that slides.

  Those are what layer_types names, or else the layers of which slides(layer)
  is true.
  """
  window = keys.read('sliding_window', int, 0)
  names = ('full_attention', 'sliding_attention')
  types = keys.read('layer_types', list, None)
  if types is None:
    types = [names[bool(slides(layer))] for layer in range(num_layers)]
  require(len(types) == num_layers and all(t in names for t in types),
          'layer_types', types, f'{num_layers} of {names}')
  by_layer = tuple(window * names.index(kind) for kind in types)
  return dict(windows=by_layer if any(by_layer) else ())
