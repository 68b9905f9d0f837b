"""Gemma 3, its text part: Gemma 2 with head norms and two rotary bases."""

from typing import Any

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import gemma2
from dsjax.checkpoints.family import Family, Gguf, GgufKeys
from dsjax.checkpoints.hf_keys import Fields, Keys
from dsjax.config.checks import require


def _rope(keys: Keys) -> Fields:
  """Full layers' base and scaling, sliding layers' base."""
  local = hf_keys.above_zero('rope_local_base_freq', float(
      keys.read('rope_local_base_freq', float, 1e4)))
  both = keys.read('rope_parameters', dict, None)
  if both is None:
    return hf_keys.rope(keys, 1e6) | dict(rope_local_base=local)
  require(both.keys() == {'full_attention', 'sliding_attention'},
          'rope_parameters', sorted(both),
          "{'full_attention': ..., 'sliding_attention': ...}")
  keys.ignore('rope_theta', 'rope_scaling')
  full, sliding = (
      hf_keys.rope_fields(both[name], f'rope_parameters.{name}')
      for name in ('full_attention', 'sliding_attention'))
  require(sliding[1] is None, 'rope_parameters.sliding_attention', sliding[1],
          'of the default type')
  return dict(rope_base=full[0], rope_scaling=full[1],
              rope_local_base=sliding[0])


def _fields(keys: Keys) -> Fields:
  full_every = keys.read('sliding_window_pattern', int, None)
  full_every = keys.read('_sliding_window_pattern', int, full_every or 6)
  hf_keys.above_zero('_sliding_window_pattern', full_every)
  return dict(qk_norm=True) | gemma2.fields(
      keys, _rope, lambda layer: (layer + 1) % full_every)


def _gguf_fields(get: GgufKeys, base: dict[str, Any]) -> Fields:
  return gemma2.gguf_fields(get, base, largest=62, full_every=6) | dict(
      qk_norm=True, rope_local_base=get('rope.freq_base_swa', float, 1e4))


FAMILY = Family(
    'gemma3_text', 'Gemma3ForCausalLM', _fields, gemma2.TENSORS,
    gain_less_one=True,
    gguf=Gguf('gemma3', _gguf_fields,
              (*gemma2.GGUF_KEYS, 'rope.freq_base_swa')))
