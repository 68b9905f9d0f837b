"""OPT but 350M, which norms after the residual and projects embeddings."""

from dsjax.checkpoints import hf_keys, hf_names
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys


def _fields(keys: Keys) -> Fields:
  keys.only('do_layer_norm_before', True)
  keys.only('_remove_final_layer_norm', False)
  keys.only('layer_norm_elementwise_affine', True)
  d_model, num_heads = (keys.read('hidden_size'),
                        keys.read('num_attention_heads'))
  keys.only('word_embed_proj_dim', d_model)
  bias = keys.read('enable_bias', bool, True)
  return dict(
      num_layers=keys.count('num_hidden_layers'), d_model=d_model,
      num_heads=num_heads, num_kv_heads=num_heads,
      head_dim=d_model // max(num_heads, 1), d_ff=keys.read('ffn_dim'),
      vocab_size=keys.read('vocab_size'),
      max_len=keys.read('max_position_embeddings'), norm='layer',
      positions='learned', gated=False, qkv_bias=bias, out_bias=bias,
      mlp_bias=bias, norm_eps=1e-5,
      activation=hf_keys.activation(keys, 'activation_function', 'relu'),
      tied=keys.read('tie_word_embeddings', bool, True))


_TENSORS = (
    {'embed_VD': 'decoder.embed_tokens.weight',
     # Its first two rows are of no position.
     'pos_TD': hf_names.Take('decoder.embed_positions.weight',
                             lambda s, _: (s[0] + 2, s[1]),
                             lambda x, _: x[2:])}
    | hf_names.norms({'norm': 'final_layer_norm'}, 'decoder.')
    | hf_names.norms({'attn_norm': 'self_attn_layer_norm',
                      'mlp_norm': 'final_layer_norm'}, 'decoder.layers.{l}.')
    | hf_names.linears({'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj',
                        'v': 'self_attn.v_proj', 'o': 'self_attn.out_proj',
                        'up': 'fc1', 'down': 'fc2'}, 'decoder.layers.{l}.'))

FAMILY = Family('opt', 'OPTForCausalLM', _fields, _TENSORS,
                defaults=dict(bos_token_id=2, eos_token_id=2))
