"""Phi-3, 3.5 and 4: a Llama with joined projections and longrope."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys
from dsjax.checkpoints.hf_names import rows


def _rope(keys: Keys, head_dim: int, max_len: int) -> Fields:
  for key in ('rope_scaling', 'rope_parameters'):
    rotary = keys.read(key, dict, None)
    if rotary is not None:  # older names of longrope
      kind = rotary.get('rope_type') or rotary.get('type')
      keys.set(key, rotary | dict(
          rope_type='longrope' if kind in ('su', 'yarn') else kind))
  return hf_keys.rope(keys, head_dim, max_len, partial=True)


def _fields(keys: Keys) -> Fields:
  for key in ('full_attn_mod', 'interpolate_factor'):  # of Phi-4-mini
    keys.only(key, 1)
  shared = llama.shared_fields(keys, rope=_rope)
  return shared | hf_keys.windows(keys, shared['num_layers'],
                                  lambda layer: True)


_ATTENTION, _MLP = 'layers.{l}.self_attn.', 'layers.{l}.mlp.'
_TENSORS = (
    llama.TENSORS
    | {leaf: rows(f'{_ATTENTION}qkv_proj.weight', 'NKK', part)
       for part, leaf in enumerate(('q_NHD', 'k_KHD', 'v_KHD'))}
    | {leaf: rows(f'{_MLP}gate_up_proj.weight', 'FF', part)
       for part, leaf in enumerate(('gate_FD', 'up_FD'))})

FAMILY = Family('phi3', 'Phi3ForCausalLM', _fields, _TENSORS,
                defaults=dict(rms_norm_eps=1e-5, bos_token_id=1,
                              eos_token_id=32000,
                              original_max_position_embeddings=4096))
