"""Mixtral: Mistral with experts. Its GGUF says llama."""

from dsjax.checkpoints import hf_names
from dsjax.checkpoints.families import llama, mistral
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys


def _fields(keys: Keys) -> Fields:
  return mistral.fields(keys) | dict(
      num_experts=keys.count('num_local_experts'),
      experts_per_token=keys.read('num_experts_per_tok'))


FAMILY = Family(
    'mixtral', 'MixtralForCausalLM', _fields,
    llama.TENSORS | hf_names.experts('layers.{l}.block_sparse_moe.', 'w1',
                                     'w3', 'w2'),
    others=hf_names.fused_experts('layers.{l}.mlp.'),
    defaults=llama.ENDS | dict(
        num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6,
        num_experts_per_tok=2, num_local_experts=8))
