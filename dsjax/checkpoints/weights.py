"""The parameter tree of any ModelConfig: built leaf by leaf, or random.

The tree is {top leaves of the config, 'layers': a tuple of L dicts of its
layer leaves}; every leaf's name says its shape (docs/design.md).
"""

import math
import re
from typing import Any

import ml_dtypes
import numpy as np

from dsjax.config.checks import require
from dsjax.config.model import ModelConfig
from dsjax.model import sharding

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16}


def check_dtype(dtype: str) -> None:
  """Raises InputError unless it names a dtype in DTYPES."""
  require(dtype in DTYPES, 'dtype', dtype, f'one of {sorted(DTYPES)}')


def tree(config: ModelConfig, make: sharding.Make) -> dict[str, Any]:
  """The tree with make(leaf name, layer number or None) at each leaf."""
  return sharding.stage_tree(config, (0, config.num_layers), make)


def stored_shape(config: ModelConfig, leaf: str) -> tuple[int, ...]:
  """A leaf's shape with the heads of a projection in one axis, as in files.

  o_DNH is stored [D, N H], k_bias_KH [K H].
  """
  sizes = iter(config.leaf_shape(leaf))
  return tuple(math.prod(next(sizes) for _ in group)
               for group in re.findall('[NK]H|.', leaf.rsplit('_', 1)[1]))


_ROTATED = re.compile('[qk](_bias|_norm)?_N?K?HD?$')


def rotary_order(config: ModelConfig, leaf: str,
                 array: np.ndarray) -> np.ndarray:
  """A leaf with the numbers that rotate together half a head apart.

  Files whose heads rotate in their first R numbers pair i and i + R/2; ours
  pair i and i + H/2, so that what rotates is the first R/2 of each half.
  """
  H, R = config.head_dim, config.rope_width
  if R is None or not _ROTATED.match(leaf):
    return array
  rest = H // 2 - R // 2
  order = [*range(R // 2), *range(R, R + rest), *range(R // 2, R),
           *range(R + rest, H)]
  return np.ascontiguousarray(
      np.take(array, order, leaf.rsplit('_', 1)[1].index('H')))


def random_params(config: ModelConfig, seed: int,
                  dtype: str = 'float32') -> dict[str, Any]:
  """Seeded random weights with the tree, shapes and layout of a loaded model.

  Matrices are normal with deviation 1/sqrt(inputs), gains normal around 1
  and biases around 0 with deviation 0.1, so activations keep their scale
  through the layers.
  """
  check_dtype(dtype)
  rng = np.random.default_rng(seed)

  def make(leaf: str, _: int | None) -> np.ndarray:
    noise = rng.standard_normal(config.leaf_shape(leaf), np.float32)
    _, *inputs = stored_shape(config, leaf)
    if inputs:
      noise *= np.float32(1 / math.sqrt(inputs[-1]))
    else:
      noise *= np.float32(0.1)
      noise += np.float32('bias' not in leaf)
    return noise.astype(DTYPES[dtype])

  return tree(config, make)
