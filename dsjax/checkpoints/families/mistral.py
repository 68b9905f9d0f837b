"""Mistral 7B: a Llama whose layers see a window. Its GGUF says llama."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys


def fields(keys: Keys) -> Fields:
  """The fields of a ModelConfig, every layer with the window if any."""
  shared = llama.shared_fields(keys)
  keys.only('layer_types', ['sliding_attention'] * shared['num_layers'])
  return shared | hf_keys.windows(keys, shared['num_layers'],
                                  lambda layer: True)


FAMILY = Family('mistral', 'MistralForCausalLM', fields, llama.TENSORS,
                defaults=llama.ENDS | dict(num_key_value_heads=8,
                                     sliding_window=4096))
