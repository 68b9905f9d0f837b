"""The paged KV cache: one array of keys and one of values a layer.

Pages are stored kv-head first, k_KPCH. An array a layer (not one stacked
array) lets every step update in place what it was given, and lets a
migration copy layer by layer.

A cache of int8 or float8 keeps a float32 scale for every token and kv head
beside it.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsjax.config.model import ModelConfig
from dsjax.kernels import cpu
from dsjax.kernels.kv_write import largest, quantize
from dsjax.kernels.page_copy import pack, unpack


@flax.struct.dataclass
class Cache:
  """k_KPCH and v_KPCH of each layer; of int8 or float8, also their scales.

  Pages on the move have the same form, with m pages in place of P.
  """

  k_KPCH: tuple[jax.Array, ...]
  v_KPCH: tuple[jax.Array, ...]
  k_scale_KPC: tuple[jax.Array, ...] = ()
  v_scale_KPC: tuple[jax.Array, ...] = ()


def init(config: ModelConfig, num_pages: int, page_size: int,
         dtype: DTypeLike = jnp.float32,
         num_layers: int | None = None) -> Cache:
  """A zeroed cache of num_pages pages of page_size tokens."""
  shape = (config.num_kv_heads, num_pages, page_size, config.head_dim)

  def many(shape: tuple[int, ...], dtype: DTypeLike) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(shape, dtype) for _ in range(
        config.num_layers if num_layers is None else num_layers))

  scales = ()
  if largest(dtype):
    scales = many(shape[:-1], jnp.float32), many(shape[:-1], jnp.float32)
  return Cache(many(shape, dtype), many(shape, dtype), *scales)


def bytes_per_token(config: ModelConfig, dtype: DTypeLike,
                    num_layers: int) -> int:
  """Bytes that one token keeps in num_layers layers of a cache."""
  dtype = jnp.dtype(dtype)
  scale = 4 if largest(dtype) else 0
  return 2 * num_layers * config.num_kv_heads * (
      config.head_dim * dtype.itemsize + scale)


def by_layer(cache: Cache) -> list[tuple[jax.Array, ...]]:
  """[(k_KPCH, v_KPCH)] of a cache's layers, with their scales if any."""
  parts = (cache.k_KPCH, cache.v_KPCH, cache.k_scale_KPC, cache.v_scale_KPC)
  return list(zip(*(p for p in parts if p), strict=True))


def from_layers(layers: Sequence[tuple[jax.Array, ...]]) -> Cache:
  """The inverse of by_layer."""
  return Cache(*zip(*layers, strict=True))


def gather_pages(cache: Cache, page_m: jax.Array, page_size: int | None = None,
                 dtype: DTypeLike | None = None,
                 impl: str | None = None) -> Cache:
  """Pages page_m of every layer, as another cache would hold them.

  Args:
    page_size, dtype: of the cache they go to; this one's by default. The
      tokens of m pages must fill a whole number of its pages.
    impl: of page_copy.pack.

  Returns:
    a Cache of [K, m * C // page_size, page_size, H] and scales.
  """
  target = jnp.dtype(dtype or cache.k_KPCH[0].dtype)

  def pages(x_KPC: jax.Array) -> jax.Array:
    return pack(x_KPC, page_m, impl)

  def part(arrays: tuple[jax.Array, ...], scales: tuple[jax.Array, ...]
           ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    out, out_scales = [], []
    for x, scale in zip(map(pages, arrays),
                        map(pages, scales) if scales else [None] * len(arrays),
                        strict=True):
      if x.dtype != target:
        if scale is not None:
          x, scale = x.astype(jnp.float32) * scale[..., None], None
        if largest(target):
          x, scale = quantize(x, target)
      K, m, C, H = x.shape
      size = page_size or C
      out.append(x.astype(target).reshape(K, m * C // size, size, H))
      if scale is not None:
        out_scales.append(scale.reshape(K, m * C // size, size))
    return tuple(out), tuple(out_scales)

  keys, k_scales = part(cache.k_KPCH, cache.k_scale_KPC)
  values, v_scales = part(cache.v_KPCH, cache.v_scale_KPC)
  return Cache(keys, values, k_scales, v_scales)


def scatter_pages(cache: Cache, page_m: jax.Array, pages: Cache | jax.Array,
                  impl: str | None = None) -> Cache:
  """Writes `pages` (as gathered) to page_m; ids of P, all last, are dropped.

  Args:
    pages: a Cache, or the bytes that cpu.gather wrote.
    impl: of page_copy.unpack.
  """
  if not isinstance(pages, Cache):
    arrays, form = jax.tree.flatten(cache)
    return jax.tree.unflatten(form, cpu.scatter(arrays, page_m, pages))
  return jax.tree.map(
      lambda x_KPC, new_KmC: unpack(x_KPC, page_m, new_KmC, impl), cache,
      pages)


def checksum(pages: Cache, kv_head_K: np.ndarray, first_layer: int,
             start: jax.Array | int, stop: jax.Array | int) -> jax.Array:
  """A sum over the KV of tokens [start, stop) that no layout changes.

  Every number's bits are hashed with its layer, part, kv head, token and
  place in the head, and added modulo 2^32. So sums over any pieces add up,
  and the same KV in other pages, shards, stages or page sizes has the same
  sum.

  Args:
    pages: a Cache as gathered: m pages that hold tokens start, start + 1...
    kv_head_K: the model's kv head at each place; -1: not counted (a replica
      of one that is, or padding).
    first_layer: the model's layer of the first one here.
  """
  total = jnp.uint32(0)
  for part, arrays in enumerate((pages.k_KPCH, pages.v_KPCH,
                                 pages.k_scale_KPC, pages.v_scale_KPC)):
    for layer, x in enumerate(arrays):
      x_KmCH = x if x.ndim == 4 else x[..., None]
      K, m, C, H = x_KmCH.shape
      bits = jax.lax.bitcast_convert_type(
          x_KmCH, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32)
      token_mC = start + jnp.arange(m * C).reshape(m, C)
      head_K = jnp.asarray(kv_head_K)
      where = (_mix(np.uint32(4 * (layer + first_layer) + part))
               + head_K.astype(jnp.uint32)[:, None, None, None]
               * np.uint32(0x85EBCA6B)
               + token_mC.astype(jnp.uint32)[None, :, :, None]
               * np.uint32(0xC2B2AE35)
               + jnp.arange(H, dtype=jnp.uint32)[None, None, None, :]
               * np.uint32(0x27D4EB2F))
      counted = ((head_K >= 0)[:, None, None, None]
                 & (token_mC < stop)[None, :, :, None])
      total += jnp.sum(jnp.where(counted, _mix(bits ^ _mix(where)), 0),
                       dtype=jnp.uint32)
  return total


def _mix(x: jax.Array | np.uint32) -> jax.Array:
  """MurmurHash3's finalizer."""
  x = jnp.asarray(x, jnp.uint32)
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
