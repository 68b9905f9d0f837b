"""Names of tensors in Hugging Face folders, and how leaves are cut from them.

Names follow transformers (src/transformers/models/*/modeling_*.py), without
'model.' or 'transformer.'; {l} stands for the layer, {e} for the expert.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dsjax.config.model import ModelConfig

Shape = tuple[int, ...]


class Take(NamedTuple):
  """A tensor that is not stored as its leaf: its name, shape and cut.

  shape: from the leaf's stored_shape and the ModelConfig to the file's shape;
  cut: from the file's array and the ModelConfig to the leaf's.
  """
  name: str
  shape: Callable[[Shape, ModelConfig], Shape]
  cut: Callable[[np.ndarray, ModelConfig], np.ndarray]


Names = Mapping[str, str | Take]  # leaf -> the tensor, or how it is cut


def conv1d(name: str) -> Take:
  """GPT-2's Conv1D: [inputs, outputs]."""
  return Take(name, lambda s, _: s[::-1], lambda x, _: np.transpose(x))


def third(name: str, part: int) -> Take:
  """Queries, keys or values of one tensor, its last axis packed."""
  return Take(name, lambda s, _: (*s[1:], 3 * s[0]),
              lambda x, _: np.split(x.T, 3)[part])


def third_of_heads(name: str, part: int) -> Take:
  """The same where each head's three parts lie together: [N 3 H, D]."""
  return Take(name, lambda s, _: (3 * s[0], *s[1:]),
              lambda x, config: x.reshape(
                  config.num_heads, 3, config.head_dim, -1)[:, part])


def rows(name: str, letters: str, part: int) -> Take:
  """Some of the rows of one tensor, which holds several projections.

  letters: the heads (N, K) or the width (F) of each projection; part: which.
  """
  def ends(config: ModelConfig) -> list[int]:
    sizes = dict(N=config.num_heads * config.head_dim,
                 K=config.num_kv_heads * config.head_dim, F=config.d_ff)
    return [sum(sizes[letter] for letter in letters[:i])
            for i in range(len(letters) + 1)]

  return Take(name, lambda s, config: (ends(config)[-1], *s[1:]),
              lambda x, config: x[slice(*ends(config)[part:part + 2])])


def half(name: str, part: int) -> Take:
  """Gate or up of all experts: [E, 2 F, D]."""
  return Take(name, lambda s, _: (s[0], 2 * s[1], s[2]),
              lambda x, _: np.split(x, 2, axis=1)[part])


def linears(projections: Mapping[str, str], prefix: str) -> dict[str, str]:
  """Weight and bias of projections: {'q': 'self_attn.q_proj'} and so on."""
  matrices = dict(q='NHD', k='KHD', v='KHD', o='DNH', gate='FD', up='FD',
                 down='DF')
  biases = dict(q='NH', k='KH', v='KH', o='D', up='F', down='D', gate='F')
  return ({f'{k}_{matrices[k]}': f'{prefix}{name}.weight'
           for k, name in projections.items()}
          | {f'{k}_bias_{biases[k]}': f'{prefix}{name}.bias'
             for k, name in projections.items()})


def norms(names: Mapping[str, str], prefix: str = '') -> dict[str, str]:
  """Gain and bias of norms: {'norm': 'ln_f'} and so on."""
  return ({f'{k}_D': f'{prefix}{name}.weight' for k, name in names.items()}
          | {f'{k}_bias_D': f'{prefix}{name}.bias'
             for k, name in names.items()})


def experts(prefix: str, gate: str, up: str, down: str) -> dict[str, str]:
  """Router and projections of experts, each expert's tensors by themselves."""
  return {'router_ED': f'{prefix}gate.weight',
          'gate_EFD': f'{prefix}experts.{{e}}.{gate}.weight',
          'up_EFD': f'{prefix}experts.{{e}}.{up}.weight',
          'down_EDF': f'{prefix}experts.{{e}}.{down}.weight'}


def fused_experts(prefix: str) -> dict[str, str | Take]:
  """The same where one tensor holds all experts (transformers 5)."""
  return {'router_ED': f'{prefix}gate.weight',
          'gate_EFD': half(f'{prefix}experts.gate_up_proj', 0),
          'up_EFD': half(f'{prefix}experts.gate_up_proj', 1),
          'down_EDF': f'{prefix}experts.down_proj'}
