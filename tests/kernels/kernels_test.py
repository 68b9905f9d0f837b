"""The Pallas attention kernels, interpreted, against the XLA references.

(attention_test holds those to a loop in float64.) The kernels are given pools
and tables in which everything unused is poison: NaN, and pages that do not
exist. Tolerance: scores are sums of H products in float32, wrong by less than
1e-6, and so is the log of every weight. Weights are rounded to what the
products take, by eps / 2 of each at most, and so is the result: eps + 1e-6 of
the largest value in all. 1e-5 as in attention_test.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import decode_attention as decode
from dsjax.kernels import mosaic, paged, tiles
from dsjax.kernels import prefill_attention as prefill
from dsjax.kernels.kv_write import LARGEST, largest
from tests.common import gpu
from tests.common.samples import deep, one_in

REACH = 4  # pages of the longest table, at least
NOWHERE = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
  """Shapes of one call. kv: the pools' dtype. cuts: block_heads or
  block_rows, block_tokens (and splits); None for the heuristic's."""

  C: int = 16
  N: int = 4
  K: int = 2
  H: int = 64
  dtype: str = 'float32'
  kv: str = 'float32'
  window: int = 0
  softcap: float = 0.0
  cuts: tuple = ()
  seed: int = 0


def pools(case, lens):
  """(dense float32 pools, poisoned ones, clean table, poisoned, scales)."""
  rng = np.random.default_rng(case.seed)
  C, K, H = case.C, case.K, case.H
  M = max(REACH, *(-(-n // C) for n in lens))
  P = sum(-(-n // C) for n in lens) + 3
  clean_BM = np.zeros((len(lens), M), np.int32)
  table_BM = np.full_like(clean_BM, NOWHERE)
  ids, used = list(rng.permutation(P)), np.zeros((P, C), bool)
  for b, n in enumerate(lens):
    for page in range(-(-n // C)):
      table_BM[b, page] = clean_BM[b, page] = ids.pop()
      used[table_BM[b, page], :n - page * C] = True
  dense, poisoned, scales, kind = [], [], [], jnp.dtype(case.kv)
  for spread in (1.0, 3.0):
    if most := largest(case.kv):
      x = rng.integers(-most, most + 1, (K, P, C, H)).astype(kind)
      scale = rng.uniform(0.4, 2, (K, P, C)).astype(np.float32) * spread / most
      scales.append(np.where(used, scale, np.float32(np.nan)))
      dense.append(x.astype(np.float32) * np.where(
          used, scale, np.float32(0))[..., None])
      poison = 127 if case.kv == 'int8' else np.nan
    else:
      x = (rng.standard_normal((K, P, C, H)) * spread).astype(kind)
      dense.append(np.where(used[:, :, None], x, 0).astype(np.float32))
      poison = np.nan
    poisoned.append(np.where(used[:, :, None], x, np.array(poison, kind)))
  return dense, poisoned, clean_BM, table_BM, scales


def compare(op, case, q, lens, rest, rows=None, impl=gpu.PALLAS,
            lowered=False):
  """op, on poison, equals its reference in float32; or it can be lowered for
  CUDA, to which an interpreter may be blind."""
  if (gpu.NATIVE or lowered) and not tiles.triton_has(case.H):
    pytest.skip('Triton cannot have such heads')
  dense, poisoned, clean_BM, table_BM, scales = pools(case, lens)
  options = dict(window=case.window, softcap=case.softcap,
                 scale=1.1 * case.H**-0.5)
  named = dict(zip(('k_scale_KPC', 'v_scale_KPC'), scales, strict=False))
  config = None
  if case.cuts:
    module = mosaic if impl.startswith('mosaic') else inspect.getmodule(op)
    config = module.TuningConfig(*case.cuts)

  def interpreted(args, named):
    return op(*args, impl, config=config, **options, **named)

  given = (q, *poisoned, table_BM, *rest), named
  if lowered:
    gpu.lower(jax.jit(interpreted), *given)
    return
  want = jax.jit(lambda *args: op(*args, 'xla', **options))(
      q.astype(np.float32), *dense, clean_BM, *rest)
  got = jax.jit(interpreted)(*given)
  assert got.dtype == q.dtype
  eps = float(jnp.finfo(case.dtype).eps)
  atol = 1e-5 + (eps + 1e-6) * float(np.abs(dense[1]).max())
  np.testing.assert_allclose(np.asarray(got, np.float64)[:rows],
                             np.asarray(want)[:rows], rtol=0, atol=atol)


def check_decode(case, lens=None, **options):
  """Rows of 1, C - 1, C, C + 1 tokens, and a long one."""
  C = case.C
  lens = lens or [1, max(C - 1, 1), C, C + 1, 3 * C + 5]
  rng = np.random.default_rng((case.seed, 1))
  q = rng.standard_normal((len(lens), case.N, case.H)).astype(
      jnp.dtype(case.dtype))
  compare(decode.decode_attention, case, q, lens, (np.array(lens, np.int32),),
          **options)


def check_prefill(case, packing=None, **options):
  """Whole prompts, chunks after earlier context, none; and padding."""
  C = case.C
  packing = packing or [(C + 1, 0), (0, 3), (1, C), (C - 1, 2), (3, 2 * C - 1)]
  counts, starts = zip(*packing, strict=True)
  rng = np.random.default_rng((case.seed, 1))
  rows = sum(counts)
  q = rng.standard_normal((rows + 3, case.N, case.H)).astype(
      jnp.dtype(case.dtype))
  compare(prefill.prefill_attention, case, q, [sum(p) for p in packing],
          (np.cumsum((0, *counts)).astype(np.int32),
           np.array(starts, np.int32)), rows, **options)


DECODE = [
    Case(),
    Case(N=8, K=1, H=128, cuts=(16, 16, 3)),  # MQA, split
    Case(N=3, K=3, H=96, cuts=(16, 32, 1)),  # MHA, a head of 64 + 32
    Case(C=32, N=6, H=256, window=7),
    Case(C=128, H=64, cuts=(16, 64, 2), window=70),
    Case(N=40, K=1, H=64, cuts=(16, 16, 2), softcap=2.0),  # 16 + 16 + 8 heads
    Case(dtype='bfloat16', kv='bfloat16', softcap=1.5, cuts=(16, 16, 2)),
    Case(dtype='float16', kv='float16', window=17),
    Case(kv='int8', cuts=(16, 16, 2), window=20),
    Case(dtype='bfloat16', kv='int8'),
    Case(dtype='bfloat16', kv='float8_e4m3fn', window=20, H=96),
    Case(kv='float8_e5m2', cuts=(16, 16, 2)),
    Case(dtype='bfloat16', kv='float32', C=5, H=8),
]
PREFILL = [
    Case(),
    Case(N=8, K=1, H=128, cuts=(16, 16)),  # MQA, 2 tokens a block
    Case(N=3, K=1, H=96, cuts=(16, 32)),  # 5 tokens a block, a row to spare
    Case(N=2, K=2, H=256, window=7, cuts=(16, 16)),
    Case(C=32, cuts=(32, 16), window=33),
    Case(dtype='bfloat16', kv='bfloat16', softcap=1.5),
    Case(dtype='float16', kv='float16', cuts=(16, 16), window=17),
    Case(kv='int8', cuts=(16, 16), window=20),
    Case(dtype='bfloat16', kv='int8', softcap=2.0),
    Case(dtype='float16', kv='float8_e4m3fn', cuts=(16, 16), window=20),
    Case(dtype='bfloat16', kv='float8_e5m2', softcap=2.0),
    Case(dtype='bfloat16', kv='float32', C=5, H=8),
]


@pytest.mark.native
@pytest.mark.parametrize('case', DECODE, ids=range(len(DECODE)))
def test_decode_equals_the_reference(case):
  check_decode(case)


@pytest.mark.native
@pytest.mark.parametrize('case', PREFILL, ids=range(len(PREFILL)))
def test_prefill_equals_the_reference(case):
  check_prefill(case)


@pytest.mark.parametrize('check, cases', [(check_decode, DECODE),
                                          (check_prefill, PREFILL)],
                         ids=['decode', 'prefill'])
def test_what_a_gpu_runs_can_be_lowered(check, cases):
  for case in cases:
    if tiles.triton_has(case.H):
      check(case, impl='pallas', lowered=True)


HALF = dict(dtype='bfloat16', kv='bfloat16', H=128)
PUBLISHED = [Case(**HALF, N=32, K=8), Case(**HALF, N=40, K=40),
             Case(**HALF, N=16, K=2, C=64, window=900),
             Case(**HALF | dict(kv='float8_e4m3fn'), N=8, K=2)]


@pytest.mark.native
@pytest.mark.skipif(not gpu.NATIVE, reason='takes minutes interpreted')
@pytest.mark.parametrize('impl', ['pallas', 'mosaic'])
@pytest.mark.parametrize('case', PUBLISHED, ids=range(len(PUBLISHED)))
def test_shapes_of_published_models(case, impl):
  if impl == 'mosaic':
    gpu.skip_without_hopper()
    if case.kv != case.dtype:
      pytest.skip('Mosaic takes KV of the dtype of queries')
  check_decode(case, [2048, 1, 777, 2047, 16, 17] * 3, impl=impl)
  check_prefill(case, [(1024, 0), (1, 2047), (300, 1500), (17, 64)],
                impl=impl)


def draw(seed, last):
  """A random Case; `last` closes its cuts."""
  rng = np.random.default_rng((seed, 7))

  def one(*options):
    return options[rng.integers(len(options))]

  dtype = one('float32', 'bfloat16', 'float16')
  K, H = one(1, 2, 3), one(64, 96, 128, 256)
  tokens = min(one(16, 32, 64), 4096 // paged.power(H))  # that fit
  return Case(
      C=one(16, 32, 64, 128), K=K, N=K * one(1, 2, 3, 4, 7, 8, 16),
      H=H, dtype=dtype, kv=one(dtype, dtype, *LARGEST),
      window=one(0, 0, 1, 15, 16, 17, 100), softcap=one(0.0, 0.0, 3.0),
      cuts=one((), (one(16, 32), tokens, *last(one))), seed=seed)


@pytest.mark.native
@pytest.mark.sweep
@pytest.mark.parametrize('seed', range(200))
def test_decode_sweep(seed):
  case = draw(seed, lambda one: (one(1, 2, 3, 7),))
  rng = np.random.default_rng((seed, 8))
  lens = [1, case.C - 1, case.C, case.C + 1,
          *rng.integers(1, 4 * case.C, rng.integers(1, 4)).tolist()]
  check_decode(case, rng.permutation(lens).tolist())


@pytest.mark.native
@pytest.mark.sweep
@pytest.mark.parametrize('seed', range(200))
def test_prefill_sweep(seed):
  case = draw(seed, lambda one: ())
  rng = np.random.default_rng((seed, 9))
  packing = [(int(n), int(p)) for n, p in zip(
      rng.choice([0, 1, 5, case.C - 1, case.C, case.C + 1], 4),
      rng.choice([0, 0, 1, case.C - 1, case.C, 2 * case.C + 3], 4),
      strict=True)]
  check_prefill(case, [*packing, (1, 0)])


# --- what the tests catch ----------------------------------------------------

SPLIT = Case(kv='int8', cuts=(16, 16, 2))  # of up to two tiles
BLOCKS = Case(cuts=(16, 16), window=9)
FULL = Case(cuts=(16, 16))
MUTANTS = [
    (paged, 'jnp.minimum(at_T, tokens - 1)', 'at_T', SPLIT),
    (paged, 'at_T < tokens', 'at_T <= tokens', SPLIT),
    (paged, 'load(v_ref', 'load(k_ref', SPLIT),
    (paged, 'scales[1]', 'scales[0]', SPLIT),
    (paged, 's_RT * scale,', 's_RT,', SPLIT),
    (paged, 'total_R * fix_R', 'total_R', SPLIT),
    (paged, 'o * fix_R[:, None]', 'o', SPLIT),
    (paged, 'lax.rem(t_T, C)', 'lax.rem(t_T + 1, C)', SPLIT),
    (decode, 'stop - window', 'stop - window + 1', Case(
        window=20, cuts=(16, 16, 2))),
    (decode, 'start += split * each', 'start += split * size', Case(
        C=32, cuts=(16, 16, 2))),
    (decode, 'o_ZBNH * weight_ZBN', 'o_ZBNH * jnp.ones_like(weight_ZBN)',
     SPLIT),
    (decode, 'jnp.minimum(stop, start + each)', 'stop', SPLIT),
    (decode, 'head * group + jnp.minimum', 'jnp.minimum', SPLIT),
    (prefill, 'back_RT >= 0', 'back_RT > 0', FULL),
    (prefill, 'back_RT < window', 'back_RT <= window', BLOCKS),
    (prefill, 'first + 1 - window', 'first + 2 - window', BLOCKS),
    (prefill, 'first + each, count', 'first + each - 1, count', FULL),
    (prefill, "at_J, side='right'", "at_J, side='left'", FULL),
]


@pytest.mark.parametrize('module, old, new, case', one_in(3, MUTANTS),
                         ids=[m[1] for m in MUTANTS])
def test_a_mutant_is_caught(module, old, new, case, monkeypatch):
  source = inspect.getsource(module)
  assert source.count(old) == 1
  mutant = types.ModuleType(module.__name__)
  exec(compile(source.replace(old, new), old, 'exec'), mutant.__dict__)
  op = prefill if module is prefill or case in (FULL, BLOCKS) else decode
  if module is paged:
    monkeypatch.setattr(op, 'paged', mutant)
  else:
    for name in ('_program', 'join', 'cut'):
      if hasattr(module, name):
        monkeypatch.setattr(module, name, getattr(mutant, name))
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    (check_prefill if op is prefill else check_decode)(case)


# --- configs -----------------------------------------------------------------

Q, KV = jnp.zeros((2, 64, 128)), jnp.zeros((2, 4, 16, 128), jnp.bfloat16)
A100 = paged.device('NVIDIA A100-SXM4-80GB')


@pytest.mark.parametrize('config, message', [
    (decode.TuningConfig(block_heads=8), 'block_heads=8: .* 16 or more'),
    (decode.TuningConfig(block_tokens=48), 'block_tokens=48: .* power of two'),
    (decode.TuningConfig(splits=0), 'splits=0: must be 1 or more'),
    (decode.TuningConfig(num_warps=3), 'num_warps=3: must be 1, 2, 4'),
    (decode.TuningConfig(num_stages=0), 'num_stages=0: must be 1 or more'),
    (decode.TuningConfig(block_tokens=512), 'block_tokens=512: .* more than '
     'the 166912 of A100'),
    (prefill.TuningConfig(block_rows=16), 'block_rows=16: must be 32 or more'),
    (prefill.TuningConfig(block_rows=24), 'block_rows=24: must be a power')])
def test_a_config_that_does_not_suit_is_an_error(config, message):
  with pytest.raises(ValueError, match=f'TuningConfig.{message}'):
    config.check(Q, KV, A100)


@pytest.mark.parametrize('limits', paged.DEVICES, ids=lambda d: d.name)
def test_the_heuristic_suits_every_shape(limits):
  for group, H, kv in itertools.product(
      (1, 7, 8, 64, 128), (64, 96, 128, 256),
      ('float32', 'bfloat16', *LARGEST)):
    q = jax.ShapeDtypeStruct((4, 2 * group, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 8, 16, H), kv)
    decode.heuristic(q, k, 4096, limits).check(q, k, limits)
    prefill.heuristic(q, k, limits).check(q, k, limits)


def test_the_heuristic_splits_few_long_rows_only():
  def splits(rows, tokens):
    q = jax.ShapeDtypeStruct((rows, 32, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((8, 9, 16, 128), jnp.bfloat16)
    return decode.heuristic(q, k, tokens, A100).splits

  assert splits(1, 32768) == 27  # 8 programs on 108 cores, twice
  assert splits(1, 64) == 1 and splits(64, 32768) == 1


def test_devices_are_known_by_their_kind():
  assert paged.device('NVIDIA H100 80GB HBM3').cores == 132
  assert paged.device('cpu') == A100


@pytest.mark.parametrize('size, widths', [
    (96, [64, 32]), (128, [128]), (80, [64, 16]), (7, [4, 2, 1])])
def test_parts_make_up_the_whole(size, widths):
  assert [w for _, w in paged.parts(size)] == widths
  assert [s for s, _ in paged.parts(size)] == np.cumsum(
      [0, *widths])[:-1].tolist()


@pytest.mark.parametrize('H', [8, 40, 72, 264])
def test_heads_that_triton_cannot_have_are_left_to_xla(H):
  call = jnp.zeros((1, 4, H)), jnp.zeros((2, 3, 16, H))
  assert tiles.pick(None, 'gpu', call, 'NVIDIA A100') == 'xla'
  assert tiles.pick('pallas', 'gpu', call) == 'pallas'  # and fails by name


def test_the_platform_picks():
  assert tiles.pick(None, 'cpu') == tiles.pick(None, 'tpu') == 'xla'
  assert tiles.pick(None, 'gpu') == tiles.pick('pallas', 'cpu') == 'pallas'


def test_without_triton_none_is_xla_and_a_name_is_an_error(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.warns(UserWarning, match='no Triton lowering'):
    assert tiles.pick(None, 'gpu') == 'xla'
  assert tiles.pick(None, 'cpu') == tiles.pick('xla') == 'xla'
  with pytest.raises(ValueError, match="impl='pallas': this JAX has no"):
    tiles.pick('pallas')


# --- lowering for CUDA -------------------------------------------------------


def arguments(C=16, group=4, H=128, dtype='bfloat16', kv='bfloat16'):
  """(q, k, v, table, lengths, starts, positions, scales), abstract."""
  def array(*shape, dtype='int32'):
    return jax.ShapeDtypeStruct(shape, dtype)

  pool = array(2, 64, C, H, dtype=kv)
  scale = array(2, 64, C, dtype='float32') if largest(kv) else None
  return (array(8, 2 * group, H, dtype=dtype), pool, pool, array(8, 16),
          array(8), array(9), scale)


def lower(args, impl='pallas', **options):
  """Text of both kernels lowered for CUDA, on a machine without."""
  def both(q, k, v, table, len_B, start_A, scale):
    named = dict(k_scale_KPC=scale, v_scale_KPC=scale, **options)
    return (decode.decode_attention(q, k, v, table, len_B, impl, **named),
            prefill.prefill_attention(q, k, v, table, start_A, len_B, impl,
                                      **named))

  return gpu.lower(jax.jit(both), *args)


@pytest.mark.parametrize('shape', [
    {}, dict(group=64), dict(H=96), dict(C=48), dict(kv='float8_e4m3fn'),
    dict(dtype='float32', kv='float32'), *deep(
        dict(group=1), dict(group=7), dict(H=64), dict(H=256), dict(C=32),
        dict(C=64), dict(C=128), dict(kv='int8'), dict(kv='float8_e5m2'),
        dict(dtype='float16', kv='float16'))], ids=str)
def test_both_kernels_lower_for_cuda(shape):
  text = lower(arguments(**shape), window=40, softcap=3.0)
  assert text.count('custom_call @__gpu$xla.gpu.triton') == 2


KINDS = {'NVIDIA A100-SXM4-80GB': True, 'NVIDIA H100 80GB HBM3': False}


@pytest.mark.parametrize('kind', KINDS)
def test_float8_is_exact_by_its_bits_and_by_conversion(kind):
  every = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8),
                                       jnp.float8_e4m3fn)
  numbers = every.astype(jnp.float32)
  halves = jnp.sort(numbers[jnp.isfinite(numbers)])
  between = jnp.concatenate([  # ties, and what lies beside them
      (halves[1:] + halves[:-1]) / 2 * x for x in (1, 1 - 2**-20, 1 + 2**-20)])
  with gpu.described(kind):
    assert paged.by_bits(every.dtype, paged.device()) == KINDS[kind]
    got = jax.jit(paged.widen, static_argnums=1)(every, jnp.bfloat16)
    back = jax.jit(paged.narrow, static_argnums=1)(between, every.dtype)
  np.testing.assert_array_equal(got[jnp.isfinite(numbers)],
                                numbers[jnp.isfinite(numbers)])
  np.testing.assert_array_equal(back.astype(jnp.float32), between.astype(
      every.dtype).astype(jnp.float32))


def test_heads_that_triton_cannot_have_are_an_error():
  with pytest.raises(ValueError, match="impl='pallas': heads of 72; must be"):
    lower(arguments(H=72))


def test_a_gpu_kernel_on_cpu_is_an_error():
  q, k, v, table, len_B, *_ = arguments()
  with pytest.raises(ValueError, match='Only interpret mode is supported'):
    jax.jit(lambda *args: decode.decode_attention(*args, 'pallas')).lower(
        q, k, v, table, len_B)
