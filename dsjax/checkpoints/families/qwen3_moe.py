"""Qwen3 with experts in every layer."""

from typing import Any

from dsjax.checkpoints import hf_keys, hf_names
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family, Gguf, GgufKeys
from dsjax.checkpoints.hf_keys import Fields, Keys


def _fields(keys: Keys) -> Fields:
  keys.only('use_sliding_window', False)
  keys.only('decoder_sparse_step', 1)
  keys.only('mlp_only_layers', [])
  keys.ignore('sliding_window', 'max_window_layers')
  return llama.shared_fields(keys) | hf_keys.biases(keys) | dict(
      d_ff=keys.read('moe_intermediate_size'), qk_norm=True,
      num_experts=keys.count('num_experts', 'num_local_experts'),
      experts_per_token=keys.read('num_experts_per_tok'),
      renormalize=keys.read('norm_topk_prob', bool, False))


def _gguf_fields(get: GgufKeys, base: dict[str, Any]) -> Fields:
  return dict(qk_norm=True, d_ff=get('expert_feed_forward_length'),
              **llama.gguf_experts(get, base))


FAMILY = Family(
    'qwen3_moe', 'Qwen3MoeForCausalLM', _fields,
    llama.TENSORS | hf_names.experts('layers.{l}.mlp.', 'gate_proj',
                                     'up_proj', 'down_proj'),
    others=hf_names.fused_experts('layers.{l}.mlp.'),
    defaults=dict(num_key_value_heads=4, num_experts_per_tok=8),
    gguf=Gguf('qwen3moe', _gguf_fields,
              (*llama.GGUF_EXPERTS, 'expert_feed_forward_length')))
