"""Gemma: a Llama with wide heads and gains stored less one."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family, Gguf
from dsjax.checkpoints.hf_keys import Fields, Keys

ENDS = dict(bos_token_id=2, eos_token_id=1)


def _fields(keys: Keys) -> Fields:
  # In transformers gelu means its tanh form here, whatever the files say.
  keys.only('hidden_activation', 'gelu_pytorch_tanh')
  keys.only('use_bidirectional_attention', False)
  shared = llama.shared_fields(keys, tied=True)
  if shared['activation'] == 'gelu':
    shared['activation'] = 'gelu_tanh'
  return shared | hf_keys.biases(keys) | dict(
      embed_scale=shared['d_model']**0.5)


FAMILY = Family(
    'gemma', 'GemmaForCausalLM', _fields, llama.TENSORS, gain_less_one=True,
    defaults=ENDS | dict(num_key_value_heads=16, head_dim=256,
                         hidden_act='gelu_pytorch_tanh'),
    gguf=Gguf('gemma', lambda get, base: dict(
        activation='gelu_tanh', embed_scale=base['d_model']**0.5)))
