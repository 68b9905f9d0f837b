"""OLMo 3: OLMo 2 with windows, whose layers have their rotation unscaled."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import olmo2
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys


def _rope(keys: Keys, head_dim: int, max_len: int) -> Fields:
  # Of older files with another base, versions of transformers disagree.
  keys.only('rope_theta', 5e5)
  keys.set('rope_theta', 5e5)
  return hf_keys.rope_of_kinds(keys, head_dim, max_len, 5e5)


def _fields(keys: Keys) -> Fields:
  shared = olmo2.fields(keys, _rope)
  return shared | hf_keys.windows(keys, shared['num_layers'],
                                  lambda layer: (layer + 1) % 4)


FAMILY = Family('olmo3', 'Olmo3ForCausalLM', _fields, olmo2.TENSORS,
                defaults=olmo2.DEFAULTS | dict(sliding_window=4096))
