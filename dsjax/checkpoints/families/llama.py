"""Llama 2 and 3, and what the families like it share."""

from collections.abc import Callable
from typing import Any

from dsjax.checkpoints import hf_keys, hf_names
from dsjax.checkpoints.family import Family, Gguf, GgufKeys
from dsjax.checkpoints.hf_keys import Fields, Keys

TENSORS = (
    {'embed_VD': 'embed_tokens.weight'} | hf_names.norms({'norm': 'norm'})
    | hf_names.norms({'attn_norm': 'input_layernorm',
                      'mlp_norm': 'post_attention_layernorm'}, 'layers.{l}.')
    | hf_names.linears({k: f'{k}_proj' for k in 'qkvo'},
                       'layers.{l}.self_attn.')
    | hf_names.linears({k: f'{k}_proj' for k in ('gate', 'up', 'down')},
                       'layers.{l}.mlp.')
    | {f'{k}_norm_H': f'layers.{{l}}.self_attn.{k}_norm.weight' for k in 'qk'})
ENDS = dict(bos_token_id=1, eos_token_id=2)
GGUF_EXPERTS = ('expert_count', 'expert_used_count')


def shared_fields(keys: Keys, tied: bool = False,
                  rope: Callable[[Keys, int, int], Fields] = hf_keys.rope,
                  norm_eps: str = 'rms_norm_eps') -> Fields:
  """What every llama-like config.json spells alike.

  tied: where tie_word_embeddings is absent. rope: reads the rotary keys of
  heads of a width, and a context. norm_eps: the key of the epsilon.
  """
  d_model, num_heads = (keys.read('hidden_size'),
                        keys.read('num_attention_heads'))
  head_dim = keys.read('head_dim', int, d_model // max(num_heads, 1))
  max_len = keys.read('max_position_embeddings')
  for key in ('max_sequence_length', 'max_seq_len', 'model_max_length',
              'seq_length'):
    keys.only(key, max_len)
  return dict(
      num_layers=keys.count('num_hidden_layers'), d_model=d_model,
      num_heads=num_heads,
      num_kv_heads=keys.read('num_key_value_heads', int, num_heads),
      head_dim=head_dim, vocab_size=keys.read('vocab_size'), max_len=max_len,
      norm_eps=float(keys.read(norm_eps, float, 1e-6)),
      d_ff=keys.read('intermediate_size'),
      activation=hf_keys.activation(keys, 'hidden_act', 'silu'),
      tied=keys.read('tie_word_embeddings', bool, tied)) | rope(
          keys, head_dim, max_len)


def fields(keys: Keys) -> Fields:
  """The fields of a ModelConfig: Llama's own."""
  return shared_fields(keys) | hf_keys.biases(keys) | dict(
      mlp_bias=keys.read('mlp_bias', bool, False))


def gguf_experts(get: GgufKeys, base: dict[str, Any]) -> Fields:
  """How many experts there are, if any, and how many a token uses."""
  del base
  count = get('expert_count', default=0)
  return dict(num_experts=count, experts_per_token=get(
      'expert_used_count', default=0 if count == 0 else None))


FAMILY = Family(
    'llama', 'LlamaForCausalLM', fields, TENSORS, defaults=ENDS,
    gguf=Gguf('llama', gguf_experts, GGUF_EXPERTS, interleaved=True))
