"""Qwen2 and 2.5: biased queries, keys and values; windows in later layers."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family, Gguf
from dsjax.checkpoints.hf_keys import Fields, Keys


def fields(keys: Keys) -> Fields:
  """The fields of a ModelConfig; Qwen3 spells the same keys."""
  shared = llama.shared_fields(keys)
  first = keys.read('max_window_layers', int, 28)
  if not keys.read('use_sliding_window', bool, False):
    keys.ignore('sliding_window', 'layer_types')
  return shared | dict(qkv_bias=True) | hf_keys.windows(
      keys, shared['num_layers'], lambda layer: layer >= first)


FAMILY = Family(
    'qwen2', 'Qwen2ForCausalLM', fields, llama.TENSORS,
    defaults=dict(num_key_value_heads=32, sliding_window=4096),
    gguf=Gguf('qwen2', lambda get, base: dict(qkv_bias=True)))
