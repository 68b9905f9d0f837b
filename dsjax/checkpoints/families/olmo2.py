"""OLMo 2: outputs are normed, not inputs; queries and keys over all heads."""

from collections.abc import Callable

from dsjax.checkpoints import hf_keys, hf_names
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys

_NORMS = {'attn_post_norm': 'post_attention_layernorm',
          'mlp_post_norm': 'post_feedforward_layernorm'}
DEFAULTS = dict(rms_norm_eps=1e-5, eos_token_id=50279)
TENSORS = (
    llama.TENSORS | hf_names.norms(_NORMS, 'layers.{l}.')
    | {leaf: f'layers.{{l}}.self_attn.{leaf[0]}_norm.weight'
       for leaf in ('q_norm_NH', 'k_norm_KH')})


def fields(keys: Keys,
           rope: Callable[[Keys, int, int], Fields] = hf_keys.rope) -> Fields:
  """The fields of a ModelConfig. rope: as llama.shared_fields takes it."""
  shared = llama.shared_fields(keys, rope=rope)
  return shared | hf_keys.biases(keys) | dict(
      qk_norm=True, pre_norms=False, post_norms=True,
      joint_norm=(shared['num_heads'], shared['num_kv_heads']))


FAMILY = Family('olmo2', 'Olmo2ForCausalLM', fields, TENSORS,
                defaults=DEFAULTS)
