"""Gemma 3, its text part: Gemma 2 with head norms and two rotary bases."""

from typing import Any

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import gemma2
from dsjax.checkpoints.family import Family, Gguf, GgufKeys
from dsjax.checkpoints.hf_keys import Fields, Keys


def _rope(keys: Keys, head_dim: int, max_len: int) -> Fields:
  key = 'rope_local_base_freq'
  return hf_keys.rope_of_kinds(keys, head_dim, max_len, hf_keys.above_zero(
      key, float(keys.read(key, float, 1e4))))


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
    gain_less_one=True, defaults=gemma2.DEFAULTS | dict(rope_theta=1e6),
    gguf=Gguf('gemma3', _gguf_fields,
              (*gemma2.GGUF_KEYS, 'rope.freq_base_swa')))
