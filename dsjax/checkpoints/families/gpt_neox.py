"""GPT-NeoX (Pythia): attention and feed-forward side by side."""

from dsjax.checkpoints import hf_keys, hf_names
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys


def _rope(keys: Keys, head_dim: int, max_len: int) -> Fields:
  keys.set('rope_theta', keys.read('rotary_emb_base', float))
  keys.set('partial_rotary_factor', keys.read('rotary_pct', float))
  return hf_keys.rope(keys, head_dim, max_len, partial=True)


def _fields(keys: Keys) -> Fields:
  return llama.shared_fields(
      keys, rope=_rope, norm_eps='layer_norm_eps') | hf_keys.biases(keys) | (
          dict(norm='layer', gated=False, mlp_bias=True,
               parallel=keys.read('use_parallel_residual', bool, True)))


_ATTENTION = 'gpt_neox.layers.{l}.attention.'
_TENSORS = (
    {'embed_VD': 'gpt_neox.embed_in.weight', 'head_VD': 'embed_out.weight'}
    | hf_names.norms({'norm': 'final_layer_norm'}, 'gpt_neox.')
    | hf_names.norms({'attn_norm': 'input_layernorm',
                      'mlp_norm': 'post_attention_layernorm'},
                     'gpt_neox.layers.{l}.')
    | hf_names.linears({'o': 'attention.dense', 'up': 'mlp.dense_h_to_4h',
                        'down': 'mlp.dense_4h_to_h'}, 'gpt_neox.layers.{l}.')
    | {leaf: hf_names.third_of_heads(f'{_ATTENTION}query_key_value.{kind}',
                                     part)
       for kind, leaves in (
           ('weight', ('q_NHD', 'k_KHD', 'v_KHD')),
           ('bias', ('q_bias_NH', 'k_bias_KH', 'v_bias_KH')))
       for part, leaf in enumerate(leaves)})

FAMILY = Family(
    'gpt_neox', 'GPTNeoXForCausalLM', _fields, _TENSORS,
    others={'head_VD': 'lm_head.weight'},
    defaults=dict(rotary_emb_base=1e4, rotary_pct=0.25, hidden_act='gelu',
                  layer_norm_eps=1e-5, attention_bias=True,
                  bos_token_id=0, eos_token_id=2),
    not_parameters=r'attention\.(masked_)?bias$|rotary_emb\.inv_freq$')
