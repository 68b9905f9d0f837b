"""Qwen3: queries and keys are normed; biases where config.json says so."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import llama, qwen2
from dsjax.checkpoints.family import Family, Gguf
from dsjax.checkpoints.hf_keys import Fields, Keys


def _fields(keys: Keys) -> Fields:
  return qwen2.fields(keys) | hf_keys.biases(keys) | dict(qk_norm=True)


FAMILY = Family(
    'qwen3', 'Qwen3ForCausalLM', _fields, llama.TENSORS,
    defaults={**qwen2.FAMILY.defaults, 'head_dim': 128},
    gguf=Gguf('qwen3', lambda get, base: dict(qk_norm=True)))
