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
  def one(x_KPCH):
    K, P, C, H = x_KPCH.shape
    flat = x_KPCH.reshape(K, P, C * H).at[:, page_m].get(
        mode='promise_in_bounds', wrap_negative_indices=False)
    return flat.reshape(K, page_m.shape[0], C, H)

  return jax.tree.map(one, cache)


def scatter_pages(cache, page_m, pages):
  """Writes `pages` (as gathered) to page_m; ids of P, all last, are dropped.

  A loop of whole-page updates in place: XLA's CPU scatter of blocks goes
  element by element.
  """
  page_m = jnp.asarray(page_m)

  def one(x_KPCH, new_KmCH):
    def put(i, x_KPCH):
      page_K1CH = jax.lax.dynamic_slice_in_dim(new_KmCH, i, 1, 1)
      return jax.lax.dynamic_update_slice_in_dim(
          x_KPCH, page_K1CH.astype(x_KPCH.dtype), page_m[i], 1)
    live = jnp.sum(page_m < x_KPCH.shape[1])
    return jax.lax.fori_loop(0, live, put, x_KPCH)

  return jax.tree.map(one, cache, pages)
