"""Gemma 2, and what Gemma 3 shares with it."""

from collections.abc import Callable
from typing import Any

from dsjax.checkpoints import hf_keys, hf_names
from dsjax.checkpoints.families import gemma, llama
from dsjax.checkpoints.family import Family, Gguf, GgufKeys
from dsjax.checkpoints.hf_keys import Fields, Keys

TENSORS = llama.TENSORS | hf_names.norms(
    {'attn_post_norm': 'post_attention_layernorm',
     'mlp_norm': 'pre_feedforward_layernorm',
     'mlp_post_norm': 'post_feedforward_layernorm'}, 'layers.{l}.')
DEFAULTS = gemma.ENDS | dict(
    num_key_value_heads=4, head_dim=256, sliding_window=4096,
    query_pre_attn_scalar=256)
GGUF_KEYS = ('attn_logit_softcapping', 'final_logit_softcapping',
             'attention.sliding_window')


def fields(keys: Keys,
           rope: Callable[[Keys, int, int], Fields] = hf_keys.rope,
           slides: Callable[[int], object] = lambda layer: layer % 2 == 0
           ) -> Fields:
  """The fields of a ModelConfig. slides: which layers have a window."""
  keys.ignore('hidden_act', 'sliding_window_size')  # unused by transformers
  keys.only('use_bidirectional_attention', False)
  shared = llama.shared_fields(keys, tied=True, rope=rope)
  return shared | hf_keys.biases(keys) | dict(
      activation=hf_keys.activation(keys, 'hidden_activation',
                                    'gelu_pytorch_tanh'),
      post_norms=True, embed_scale=shared['d_model']**0.5,
      attn_scale=hf_keys.above_zero('query_pre_attn_scalar', keys.read(
          'query_pre_attn_scalar', float))**-0.5,
      attn_softcap=float(keys.read('attn_logit_softcapping', float, 0)),
      logit_softcap=float(keys.read('final_logit_softcapping', float, 0)),
  ) | hf_keys.windows(keys, shared['num_layers'], slides)


def gguf_fields(get: GgufKeys, base: dict[str, Any], largest: int = 46,
                full_every: int = 2) -> Fields:
  """The same from a GGUF file.

  Args:
    largest: layers of the size whose scale is of D / N, not of H.
    full_every: every so many-th layer has no window.
  """
  num_layers, d_model = base['num_layers'], base['d_model']
  window = get('attention.sliding_window')
  scale_of = (d_model / base['num_heads'] if num_layers == largest else
              base['head_dim'])
  return dict(
      activation='gelu_tanh', post_norms=True, embed_scale=d_model**0.5,
      attn_scale=scale_of**-0.5,
      windows=tuple(window * bool((layer + 1) % full_every)
                    for layer in range(num_layers)),
      attn_softcap=get('attn_logit_softcapping', float, 0.0),
      logit_softcap=get('final_logit_softcapping', float, 0.0))


FAMILY = Family(
    'gemma2', 'Gemma2ForCausalLM', fields, TENSORS, gain_less_one=True,
    defaults=DEFAULTS | dict(attn_logit_softcapping=50.0,
                             final_logit_softcapping=30.0),
    gguf=Gguf('gemma2', gguf_fields, GGUF_KEYS))
