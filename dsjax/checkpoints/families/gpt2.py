"""GPT-2: transposed projections; queries, keys and values in one tensor."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.family import Family, Gguf
from dsjax.checkpoints.hf_keys import Fields, Keys
from dsjax.checkpoints.hf_names import conv1d, norms, third

_SHAPE: Fields = dict(norm='layer', positions='learned', gated=False,
                      qkv_bias=True, out_bias=True, mlp_bias=True)


def _fields(keys: Keys) -> Fields:
  keys.only('scale_attn_weights', True)
  keys.only('scale_attn_by_inverse_layer_idx', False)
  d_model, num_heads = keys.read('n_embd'), keys.read('n_head')
  return _SHAPE | dict(
      num_layers=keys.count('n_layer'), d_model=d_model, num_heads=num_heads,
      num_kv_heads=num_heads, head_dim=d_model // max(num_heads, 1),
      d_ff=keys.read('n_inner', int, 4 * d_model),
      vocab_size=keys.read('vocab_size'), max_len=keys.read('n_positions'),
      norm_eps=float(keys.read('layer_norm_epsilon', float, 1e-5)),
      activation=hf_keys.activation(keys, 'activation_function', 'gelu_new'),
      tied=keys.read('tie_word_embeddings', bool, True))


_QKV = (('q_NHD', 'k_KHD', 'v_KHD'), ('q_bias_NH', 'k_bias_KH', 'v_bias_KH'))
_PARTS = [(leaf, kind, part)
          for kind, leaves in zip(('weight', 'bias'), _QKV, strict=True)
          for part, leaf in enumerate(leaves)]
_TENSORS = (
    {'embed_VD': 'wte.weight', 'pos_TD': 'wpe.weight'}
    | norms({'norm': 'ln_f'})
    | norms({'attn_norm': 'ln_1', 'mlp_norm': 'ln_2'}, 'h.{l}.')
    | {leaf: third(f'h.{{l}}.attn.c_attn.{kind}', part)
       for leaf, kind, part in _PARTS}
    | {leaf: conv1d(f'h.{{l}}.{name}') for leaf, name in {
        'o_DNH': 'attn.c_proj.weight', 'o_bias_D': 'attn.c_proj.bias',
        'up_FD': 'mlp.c_fc.weight', 'up_bias_F': 'mlp.c_fc.bias',
        'down_DF': 'mlp.c_proj.weight', 'down_bias_D': 'mlp.c_proj.bias'
    }.items()})

FAMILY = Family(
    'gpt2', 'GPT2LMHeadModel', _fields, _TENSORS,
    defaults=dict(bos_token_id=50256, eos_token_id=50256),
    not_parameters=r'^h\.\d+\.attn\.(masked_)?bias$',
    gguf=Gguf(
        'gpt2', lambda get, base: _SHAPE | dict(activation='gelu_tanh'),
        norm_eps='attention.layer_norm_epsilon',
        packed={leaf: (f'attn_qkv.{kind}', part)
                for leaf, kind, part in _PARTS}))
