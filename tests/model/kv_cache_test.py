import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.kv_write import LARGEST, quantize
from dsjax.model import kv_cache as kv
from tests.common import tiny

K, P, C, H = tiny.CONFIG.num_kv_heads, 5, 4, tiny.CONFIG.head_dim


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def filled(dtype=jnp.float32, seed=0):
  """A cache of random numbers, different in every layer."""
  cache = kv.init(tiny.CONFIG, P, C, dtype)
  leaves, tree = jax.tree.flatten(cache)
  return jax.tree.unflatten(tree, [
      jnp.asarray(normal(*x.shape, seed=seed + i), dtype)
      for i, x in enumerate(leaves)])


def same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_init_is_zeros_a_layer_each(dtype):
  cache = kv.init(tiny.CONFIG, P, C, dtype)
  assert len(cache.k_KPCH) == len(cache.v_KPCH) == tiny.CONFIG.num_layers
  for x in jax.tree.leaves(cache):
    assert x.shape == (K, P, C, H) and x.dtype == dtype and not x.any()


def test_gather_reads_pages_in_the_asked_order():
  cache = filled()
  pages = kv.gather_pages(cache, np.array([3, 0, 3]))
  want = jax.tree.map(lambda x: np.asarray(x)[:, [3, 0, 3]], cache)
  same(pages, want)


def test_scatter_writes_only_its_pages():
  cache, pages = filled(), kv.gather_pages(filled(seed=9), np.array([1, 2]))
  got = kv.scatter_pages(cache, np.array([4, 0]), pages)
  for new, old, page in zip(*map(jax.tree.leaves, (got, cache, pages)),
                            strict=True):
    np.testing.assert_array_equal(new[:, [4, 0]], page)
    np.testing.assert_array_equal(new[:, 1:4], old[:, 1:4])


def test_gather_then_scatter_is_a_copy():
  cache, empty = filled(), kv.init(tiny.CONFIG, P + 2, C)
  here, there = np.array([4, 1, 2]), np.array([0, 6, 3])
  moved = jax.jit(kv.scatter_pages)(
      empty, there, jax.jit(kv.gather_pages)(cache, here))
  same(kv.gather_pages(moved, there), kv.gather_pages(cache, here))
  others = np.array([1, 2, 4, 5])
  same(kv.gather_pages(moved, others), kv.gather_pages(empty, others))


def test_scatter_to_page_P_is_dropped():
  cache = filled()
  pages = kv.gather_pages(filled(seed=9), np.array([0, 1, 2]))
  got = kv.scatter_pages(cache, np.array([2, P, P]), pages)
  others = np.array([0, 1, 3, 4])
  same(kv.gather_pages(got, others), kv.gather_pages(cache, others))
  same(kv.gather_pages(got, np.array([2])),
       jax.tree.map(lambda x: x[:, :1], pages))


def test_scatter_converts_to_the_cache_dtype():
  cache = kv.init(tiny.CONFIG, P, C, jnp.bfloat16)
  pages = kv.gather_pages(filled(), np.array([0]))
  got = kv.scatter_pages(cache, np.array([1]), pages)
  for x, page in zip(*map(jax.tree.leaves, (got, pages)), strict=True):
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x[:, 1:2], page.astype(jnp.bfloat16))


@pytest.mark.parametrize('dtype', LARGEST)
def test_pages_of_a_byte_are_quantized_on_the_way(dtype):
  cache, ids = filled(), np.array([3, 0])
  pages = kv.gather_pages(cache, ids, 2 * C, dtype)
  assert pages.k_KPCH[0].dtype == dtype
  for x, got, scale in zip(cache.v_KPCH, pages.v_KPCH, pages.v_scale_KPC,
                           strict=True):
    want, want_scale = quantize(x[:, ids].reshape(K, 1, 2 * C, H), dtype)
    np.testing.assert_array_equal(got.astype(jnp.float32),
                                  want.astype(jnp.float32))
    np.testing.assert_array_equal(scale, want_scale)
  back = kv.gather_pages(pages, np.array([0]), dtype=jnp.float32)
  rtol = {'int8': 2**-8, 'float8_e4m3fn': 2**-4, 'float8_e5m2': 2**-3}[dtype]
  for x, got in zip(cache.k_KPCH, back.k_KPCH, strict=True):
    np.testing.assert_allclose(got, x[:, ids].reshape(K, 1, 2 * C, H),
                               rtol=rtol, atol=0.02)
