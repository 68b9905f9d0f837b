"""The paged KV cache: one array of keys and one of values a layer.

Pages are stored kv-head first, k_KPCH. An array a layer (not one stacked
array) lets every step update in place what it was given, and lets a
migration copy layer by layer.
"""

import flax.struct
import jax
import jax.numpy as jnp

from dsjax.kernels import shapes


@flax.struct.dataclass
class Cache:
  """k_KPCH and v_KPCH of each layer: [K, P, C, H]."""

  k_KPCH: tuple[jax.Array, ...]
  v_KPCH: tuple[jax.Array, ...]


def init(config, num_pages, page_size, dtype=jnp.float32):
  """A zeroed cache of num_pages pages of page_size tokens."""
  shape = (config.num_kv_heads, num_pages, page_size, config.head_dim)
  keys, values = ([jnp.zeros(shape, dtype) for _ in range(config.num_layers)]
                  for _ in range(2))
  return Cache(tuple(keys), tuple(values))


def write(x_KPCH, new_SKH, page_S, offset_S):
  """Puts token s into page page_S[s] at offset_S[s]; page P drops it."""
  shapes.check(x_KPCH=x_KPCH, new_SKH=new_SKH, page_S=page_S,
               offset_S=offset_S)
  return x_KPCH.at[:, page_S, offset_S].set(
      new_SKH.swapaxes(0, 1).astype(x_KPCH.dtype), mode='drop')


def gather_pages(cache, page_m):
  """Pages page_m of every layer: a tree of [K, m, C, H] (migration's read)."""
  return jax.tree.map(lambda x: x.at[:, page_m].get(
      mode='promise_in_bounds'), cache)


def scatter_pages(cache, page_m, pages):
  """Writes `pages` (as gathered) to page_m; id P drops a page."""
  return jax.tree.map(lambda x, new: x.at[:, page_m].set(
      new.astype(x.dtype), mode='drop'), cache, pages)
