"""What this device reaches: bytes a second of a copy, products a second.

Shares in tables are of these, measured in the same run, and not of a data
sheet's peaks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.kernels import timing


class Rates(NamedTuple):
  """bytes_per_s: read and written; flops_per_s: of bfloat16 products."""

  bytes_per_s: float
  flops_per_s: float

  def least_s(self, flops: float, moved_bytes: float) -> float:
    """Seconds that work takes at least on this device."""
    return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)


def measure(tiny: bool) -> Rates:
  """The Rates of the default device."""
  count, size = (2**18, 128) if tiny else (2**30, 8192)
  x = jnp.ones(count, jnp.bfloat16)
  copy_s = timing.seconds(lambda x: x + 1, {'x': x}, 'x', repeats=3, loops=4)
  key = jax.random.key(0)
  a, b = (jax.random.normal(k, (size, size), jnp.bfloat16)
          for k in jax.random.split(key))
  product_s = timing.seconds(lambda a, b: a @ b, {'a': a, 'b': b}, repeats=3,
                            loops=4)
  return Rates(2 * 2 * count / copy_s, 2 * size**3 / product_s)
