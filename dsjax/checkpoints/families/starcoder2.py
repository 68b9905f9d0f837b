"""StarCoder 2: layer norms and biases, grouped heads, rotation."""

from dsjax.checkpoints import hf_keys, hf_names
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys


def _fields(keys: Keys) -> Fields:
  shared = llama.shared_fields(keys, tied=True, norm_eps='norm_epsilon')
  keys.only('norm_type', 'layer_norm')
  keys.only('layer_norm_epsilon', shared['norm_eps'])  # the same once more
  keys.only('mlp_type', 'default')
  keys.only('scale_attn_weights', True)
  keys.ignore('activation_function',  # as hidden_act, which is read
              'attention_softmax_in_fp32', 'scale_attention_softmax_in_fp32')
  bias = keys.read('use_bias', bool, True)
  return shared | hf_keys.windows(
      keys, shared['num_layers'], lambda layer: True) | dict(
          norm='layer', gated=False, qkv_bias=bias, out_bias=bias,
          mlp_bias=bias)


FAMILY = Family(
    'starcoder2', 'Starcoder2ForCausalLM', _fields,
    llama.TENSORS | hf_names.linears({'up': 'c_fc', 'down': 'c_proj'},
                                     'layers.{l}.mlp.'),
    defaults=dict(num_key_value_heads=2, norm_epsilon=1e-5,
                  hidden_act='gelu_pytorch_tanh', bos_token_id=50256,
                  eos_token_id=50256))
