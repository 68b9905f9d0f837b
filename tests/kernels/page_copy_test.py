"""pack and unpack: the kernels give exactly what the references do."""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import page_copy as module
from dsjax.kernels.page_copy import TuningConfig, pack, unpack
from tests.common import gpu

K, P = 2, 6
IMPLS = ('xla', gpu.PALLAS)


def pool(*rest, dtype='float32', pages=P, seed=0):
  x = np.random.default_rng(seed).standard_normal((K, pages, *rest)) * 50
  return jnp.asarray(x, dtype)


SHAPES = [((4, 8), 'float32'), ((16, 96), 'bfloat16'), ((16,), 'float32'),
          ((5, 3), 'int8'), ((128, 64), 'float16')]
shapes = pytest.mark.parametrize('rest, dtype', SHAPES, ids=str)
impls = pytest.mark.parametrize('impl', IMPLS)


@pytest.mark.native
@impls
@shapes
def test_pack_reads_pages_in_the_asked_order(rest, dtype, impl):
  x, ids = pool(*rest, dtype=dtype), jnp.array([3, 0, 3])
  got = jax.jit(functools.partial(pack, impl=impl))(x, ids)
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(got, np.asarray(x)[:, [3, 0, 3]])


@pytest.mark.native
@impls
@shapes
def test_unpack_writes_its_pages_only_and_drops_those_of_P(rest, dtype, impl):
  x, new = pool(*rest, dtype=dtype), pool(*rest, dtype=dtype, pages=3, seed=1)
  got = jax.jit(functools.partial(unpack, impl=impl))(
      x, jnp.array([4, 1, P]), new)
  want = np.array(x)
  want[:, [4, 1]] = np.asarray(new)[:, :2]
  np.testing.assert_array_equal(got, want)


@pytest.mark.native
@impls
def test_unpack_converts(impl):
  x, new = pool(4, 8, dtype='bfloat16'), pool(4, 8, pages=1)
  got = unpack(x, jnp.array([2]), new, impl)
  np.testing.assert_array_equal(got[:, 2], new[:, 0].astype(jnp.bfloat16))


@pytest.mark.native
def test_in_many_programs_a_page():
  x, ids = pool(16, 96), jnp.array([5, 2])
  config = TuningConfig(32)
  got = pack(x, ids, gpu.PALLAS, config=config)
  np.testing.assert_array_equal(got, pack(x, ids))
  np.testing.assert_array_equal(
      unpack(x, ids, 2 * got, gpu.PALLAS, config=config),
      unpack(x, ids, 2 * got))


MUTANTS = [('page_ref[i], where', 'i, where'), ('page < out', 'page <= out'),
           ('(2) * block', '(2)'), ('new_ref[head, i,', 'new_ref[head, 0,')]


@pytest.mark.parametrize('old, new', MUTANTS, ids=[m[0] for m in MUTANTS])
def test_a_mutant_is_caught(old, new, monkeypatch):
  source = inspect.getsource(module)
  assert source.count(old) == 1
  mutant = types.ModuleType(module.__name__)
  exec(compile(source.replace(old, new), old, 'exec'), mutant.__dict__)
  for name in ('_pack', '_unpack', '_at'):
    monkeypatch.setattr(module, name, getattr(mutant, name))
  with pytest.raises(AssertionError, match='Arrays are not equal'):
    test_in_many_programs_a_page()
    test_unpack_writes_its_pages_only_and_drops_those_of_P(
        (4, 8), 'float32', 'pallas_interpret')


@shapes
def test_both_lower_for_cuda(rest, dtype):
  x, ids = pool(*rest, dtype=dtype), jnp.array([3, 0, P])
  for op, args in ((pack, ()), (unpack, (pool(*rest, pages=3),))):
    step = jax.jit(functools.partial(op, impl='pallas'),
                   donate_argnums=(0,) * len(args))
    text = gpu.lower(step, x, ids, *args)
    assert text.count('custom_call @__gpu$xla.gpu.triton') == 1
    assert text.count('#stablehlo.output_operand_alias<') == len(args)


def test_a_block_that_does_not_divide_a_page_is_an_error():
  for block in (3, 64):
    with pytest.raises(ValueError, match=f'block={block}: .* the 32 numbers'):
      pack(pool(4, 8), jnp.array([1]), 'pallas_interpret',
           config=TuningConfig(block))
