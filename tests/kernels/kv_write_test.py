"""kv_write: the reference against a loop, the kernel against the reference.

Both round the same numbers in the same order, up to a fused multiply-add: a
rotated key may differ by 2^-22 of the largest factor, and then round to the
neighbour in what the pages hold.
"""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import kv_write as module
from dsjax.kernels.kv_write import (
    TuningConfig,
    kv_write,
    largest,
    quantize,
    rotary,
)
from tests.common import gpu
from tests.common.samples import one_in

P, C = 5, 4
PAGE, OFFSET = np.array([4, 0, P, 4, 2]), np.array([3, 0, 2, 1, 2])


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def arguments(K=2, H=8, dtype='float32', kv='float32', turn=True, S=5):
  """(held, k_SKH, v_SKH, turn) of a call."""
  held = [normal(K, P, C, H, seed=i) for i in (1, 2)]
  if largest(kv):
    held = [jnp.asarray(30 * x, kv) for x in held]
    held += [jnp.asarray(normal(K, P, C, seed=i)) for i in (3, 4)]
  held = [jnp.asarray(x, kv) if x.ndim == 4 else x for x in held]
  new = [jnp.asarray(normal(S, K, H, seed=i), dtype) for i in (5, 6)]
  angle_SH = np.concatenate([normal(S, H // 2, seed=7)] * 2, -1)[:, None]
  return (tuple(held), *new,
          (np.cos(angle_SH), np.sin(angle_SH)) if turn else None)


def run(args, impl, config=None, page=PAGE, offset=OFFSET):
  *rest, turn = args
  return jax.jit(lambda held, k, v, turn: kv_write(
      held, k, v, page, offset, turn, impl, config=config))(*rest, turn)


def check(args, config=None, **where):
  want = run(args, 'xla', **where)
  got = run(args, gpu.PALLAS, config, **where)
  for x, y in zip(got, want, strict=True):
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    eps = (2e-7 if x.ndim == 3 else 1.0 if args[0][0].dtype == jnp.int8
           else float(jnp.finfo(args[0][0].dtype).eps))
    np.testing.assert_allclose(x, y, rtol=eps, atol=max(1e-6, eps == 1))
    assert np.mean(x == y) > 0.99


def test_the_reference_puts_each_token_in_its_place_and_nothing_else():
  held, *new, _ = args = arguments(turn=False)
  for old, x_SKH, got in zip(held, new, run(args, 'xla'), strict=True):
    want = np.array(old)
    for s in (0, 1, 3, 4):  # token 2 is dropped
      want[:, PAGE[s], OFFSET[s]] = x_SKH[s]
    np.testing.assert_array_equal(got, want)


def test_the_reference_rotates_keys_only():
  *rest, turn = arguments()
  want = run((rest[0], rotary(rest[1], *turn), rest[2], None), 'xla')
  for got, x in zip(run((*rest, turn), 'xla'), want, strict=True):
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-6)


# What a number may be wrong by: a part of it, and a part of its scale.
ROUNDING = {'int8': (0, 0.5), 'float8_e4m3fn': (2**-4, 2**-10),
            'float8_e5m2': (2**-3, 2**-17)}


@pytest.mark.parametrize('kv', ROUNDING)
def test_pages_of_a_byte_keep_numbers_and_scales(kv):
  held, k, v, _ = args = arguments(kv=kv, turn=False)
  k8, v8, k_scale, v_scale = run(args, 'xla')
  for x, scale, new in ((k8, k_scale, k), (v8, v_scale, v)):
    x, scale = x[:, 4, 3].astype(jnp.float32), scale[:, 4, 3, None]
    assert np.abs(x).max() == largest(kv)
    rtol, part = ROUNDING[kv]
    np.testing.assert_array_less(
        np.abs(x * scale - new[0]),
        (rtol * np.abs(new[0]) + part * scale) * (1 + 1e-6) + 1e-7)
    np.testing.assert_array_equal(quantize(new, kv)[0][0].astype(jnp.float32),
                                  x)
  assert (k_scale[:, 1] == held[2][:, 1]).all()


KERNEL = [{}, dict(turn=False), dict(K=3, H=96), dict(K=4, H=64, turn=False),
          dict(dtype='bfloat16', kv='bfloat16'), dict(kv='int8', K=4),
          dict(dtype='bfloat16', kv='int8', H=96), dict(dtype='float16',
                                                        kv='float32'),
          dict(kv='float8_e4m3fn', K=4), dict(dtype='bfloat16', H=96,
                                              kv='float8_e5m2')]


@pytest.mark.native
@pytest.mark.parametrize('shape', KERNEL, ids=str)
def test_the_kernel_equals_the_reference(shape):
  check(arguments(**shape))


@pytest.mark.native
def test_the_kernel_in_programs_of_a_head_each():
  check(arguments(K=4, kv='int8'), TuningConfig(1))


@pytest.mark.native
@pytest.mark.parametrize('count', [0, 5])
def test_the_kernel_writes_all_or_nothing(count):
  page = np.array([0, 1, 2, 3, 4] if count else [P] * 5)
  check(arguments(), page=page)


@pytest.mark.native
def test_a_head_of_zeros_has_a_scale_of_zero():
  held, k, v, turn = arguments(kv='int8')
  got = run((held, 0 * k, v, turn), gpu.PALLAS)
  assert not got[0][:, 4, 3].any() and not got[2][:, 4, 3].any()


MUTANTS = [('page < out', 'page <= out'), ('y * sin', '-y * sin'),
           ('enumerate((k_ref, v_ref))', 'enumerate((k_ref, k_ref))'),
           ('out[2 + part][head, page', 'out[2][head, page'),
           ('top_K / LARGEST[jnp.dtype(dtype).name]', 'top_K / 128'),
           ('start + half', 'start'), ('if part == 0 else ()', '')]


@pytest.mark.parametrize('old, new', one_in(2, MUTANTS),
                         ids=[m[0] for m in MUTANTS])
def test_a_mutant_is_caught(old, new, monkeypatch):
  source = inspect.getsource(module)
  assert source.count(old) == 1
  mutant = types.ModuleType(module.__name__)
  exec(compile(source.replace(old, new), old, 'exec'), mutant.__dict__)
  monkeypatch.setattr(module, '_program', mutant._program)
  with pytest.raises(AssertionError):
    check(arguments(kv='int8' if 'part' in old or 'top' in old
                    else 'float32'))


@pytest.mark.parametrize('shape', [
    dict(H=128, K=8), dict(H=128, K=8, turn=False), dict(H=96, K=10),
    dict(H=64, kv='int8'), dict(kv='float8_e4m3fn'), dict(kv='float8_e5m2'),
    dict(H=256, dtype='bfloat16', kv='bfloat16')],
    ids=str)
def test_it_lowers_for_cuda_in_place(shape):
  *rest, turn = arguments(**shape)
  step = jax.jit(functools.partial(kv_write, impl='pallas'), donate_argnums=0)
  text = gpu.lower(step, *rest, PAGE, OFFSET, turn)
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 1
  assert text.count('#stablehlo.output_operand_alias<') == len(rest[0])


def test_a_wrong_call_is_an_error():
  held, k, v, turn = arguments(K=6)
  with pytest.raises(ValueError, match='offset_S: S is 4, but 5 in k_SKH'):
    kv_write(held, k, v, PAGE, OFFSET[:4], turn)
  with pytest.raises(ValueError, match="impl='triton': must be None or one"):
    kv_write(held, k, v, PAGE, OFFSET, turn, 'triton')
  for size in (3, 4, 0):
    with pytest.raises(ValueError, match=f'block_heads={size}: .* the 6 kv'):
      kv_write(held, k, v, PAGE, OFFSET, turn, 'pallas_interpret',
               config=TuningConfig(size))
