"""Granite: a Llama with four multipliers."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys


def _fields(keys: Keys) -> Fields:
  def factor(key: str) -> float:
    return hf_keys.above_zero(key, float(keys.read(key, float, 1.0)))

  return llama.fields(keys) | dict(
      embed_scale=factor('embedding_multiplier'),
      attn_scale=factor('attention_multiplier'),
      residual_scale=factor('residual_multiplier'),
      logit_scale=1 / factor('logits_scaling'))


FAMILY = Family('granite', 'GraniteForCausalLM', _fields, llama.TENSORS,
                defaults=llama.ENDS)
