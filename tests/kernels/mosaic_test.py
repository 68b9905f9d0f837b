"""The Mosaic attention kernels, interpreted with race detection, against the
XLA references: on the poisoned pools and with the tolerance of kernels_test.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsjax import kernels
from dsjax.kernels import decode_attention, mosaic, paged, tiles
from tests.common import gpu
from tests.common.samples import deep
from tests.kernels import kernels_test
from tests.kernels.kernels_test import Case, check_decode, check_prefill

RUN = dict(impl=gpu.MOSAIC)
HALF = dict(dtype='bfloat16', kv='bfloat16')


@pytest.fixture(autouse=True)
def _needs_a_hopper_where_it_runs():
  gpu.skip_without_hopper()


# cuts: tokens a tile, stages, warpgroups that multiply, splits.
DECODE = [
    (Case(**HALF, N=4, K=1), [1, 15, 16, 17, 200]),
    (Case(dtype='float16', kv='float16', C=32, N=2, K=2, H=128, window=70,
          softcap=1.5, cuts=(64, 1, 1, 2)), [31, 33, 190]),
    (Case(**HALF, C=128, N=80, K=1, cuts=(128, 2, 2)), [127, 129]),
    (Case(**HALF, C=8, N=3, K=1, cuts=(64, 2, 1, 3)), [1, 64, 140]),
]
PREFILL = [
    (Case(**HALF, N=2, K=1, cuts=(64, 2, 2)), [(17, 0), (0, 3), (70, 31)]),
    (Case(**HALF, N=1, K=1, H=128, C=64, window=33, softcap=1.5,
          cuts=(64, 2, 1)), [(65, 100), (64, 0), (1, 64)]),
    (Case(dtype='float16', kv='float16', N=2, K=2, C=128,
          cuts=(128, 1, 1)), [(30, 120)]),
]


@pytest.mark.native
@pytest.mark.parametrize('case, lens', [*DECODE[:2], *deep(*DECODE[2:])],
                         ids=range(len(DECODE)))
def test_decode_equals_the_reference(case, lens):
  with gpu.racing():
    check_decode(case, lens, **RUN)


@pytest.mark.native
@pytest.mark.parametrize('case, packing', [*PREFILL[:-1], *deep(PREFILL[-1])],
                         ids=range(len(PREFILL)))
def test_prefill_equals_the_reference(case, packing):
  with gpu.racing():
    check_prefill(case, packing, **RUN)


@pytest.mark.parametrize('check, cases', [(check_decode, DECODE),
                                          (check_prefill, PREFILL)],
                         ids=['decode', 'prefill'])
def test_what_a_gpu_runs_can_be_lowered(check, cases):
  """Of prefill also any number of tokens, more and less than a block's."""
  more = [(cases[0][0], [(count, 5)]) for count in (1, 62)
          if check is check_prefill]
  for case, rows in cases + more:
    check(case, rows, impl='mosaic', lowered=True)


# --- what the tests catch ----------------------------------------------------

TILES = (Case(**HALF, N=1, K=1, C=64, window=100, cuts=(64, 1, 1)), [140])
NARROW = (Case(**HALF, N=1, K=1, C=64, window=7, cuts=(64, 1, 1)), [67])
SPLIT = (Case(**HALF, N=1, K=1, cuts=(64, 1, 1, 2)), [150])
PAIR = (Case(**HALF, N=1, K=1, C=64, cuts=(64, 1, 2)), [(70, 0)])
BLOCKS = (Case(**HALF, N=1, K=1, C=64, window=9, cuts=(64, 1, 1)), [(60, 70)])
WRONG = 'Not equal to tolerance'
SYNC = (f'{WRONG}|a race|RACE|observed|waited|completed|'  # whichever is first
        'Out-of-bounds|out-of-bounds')
MUTANTS = [
    ('t_RT < stop', 't_RT <= stop', TILES, WRONG),
    ('t_RT >= start', 't_RT > start', NARROW, WRONG),
    ('barrier_wait(shared.there_Z.at[stage])', 'commit_smem()', TILES, SYNC),
    ('barrier_wait(shared.used_Z.at[stage])', 'commit_smem()', TILES, SYNC),
    ('barrier_wait(shared.asked_W.at[wg])', 'commit_smem()', TILES, SYNC),
    ('(v_ref, shared.v_ZTH)', '(k_ref, shared.v_ZTH)', TILES, WRONG),
    ('pl.when(first + T > stop)', 'pl.when(first > stop)', TILES, WRONG),
    ('total_R * fix_R', 'total_R', TILES, WRONG),
    ('o_RH *= _across(fix_R', 'o_RH += 0 * _across(fix_R', TILES, WRONG),
    ('jnp.minimum(first + p, last)', 'first + p', SPLIT, SYNC),
    ('page += z * each', 'page += z', SPLIT, WRONG),
    ('jnp.minimum(stop, page * C + each * T)', 'stop', SPLIT, WRONG),
    ('barrier_wait(shared.clean.at[0])', 'commit_smem()', PAIR, SYNC),
    ('plgpu.barrier_arrive(shared.clean.at[0])', 'pass', PAIR, SYNC),
    ('back_RT >= 0', 'back_RT > 0', BLOCKS, WRONG),
    ('back_RT < window', 'back_RT <= window', BLOCKS, WRONG),
    ('pl.loop(0, count)(', 'pl.loop(0, count - 1)(', BLOCKS, WRONG),
]


@pytest.mark.deep
@pytest.mark.parametrize('old, new, case, says', MUTANTS,
                         ids=[m[0] for m in MUTANTS])
def test_a_mutant_is_caught(old, new, case, says, monkeypatch):
  source = inspect.getsource(mosaic)
  assert source.count(old) == 1
  mutant = types.ModuleType(mosaic.__name__)
  monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
  for module in (kernels, kernels_test):
    monkeypatch.setattr(module, 'mosaic', mutant)
  exec(compile(source.replace(old, new), old, 'exec'), mutant.__dict__)
  if says == SYNC:  # others wait for nothing, but maybe for the machine
    monkeypatch.setattr(gpu, 'PATIENCE_S', 2)
  check = check_prefill if case in (PAIR, BLOCKS) else check_decode
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=says):
    with gpu.racing(mutant):
      check(*case, **RUN)


@pytest.mark.native
@pytest.mark.deep
@pytest.mark.parametrize('case', [TILES, NARROW, SPLIT, PAIR, BLOCKS],
                         ids=range(5))
def test_what_mutants_are_made_of_is_right(case):
  check = check_prefill if case in (PAIR, BLOCKS) else check_decode
  with gpu.racing():
    check(*case, **RUN)


@pytest.mark.skipif(jax.__version_info__ < (0, 12),
                    reason='no transposed operand of wgmma is interpreted')
def test_the_scores_of_wgmma_are_those_of_dots():
  swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  shared = plgpu.SMEM((64, 64), jnp.bfloat16, transforms=swizzled)

  def body(q_ref, k_ref, o_ref, q_smem, k_smem, there):
    for ref, to in ((q_ref, q_smem), (k_ref, k_smem)):
      plgpu.copy_gmem_to_smem(ref, to, there)
    plgpu.barrier_wait(there)
    o_ref[...] = mosaic._scores(q_smem, k_smem, interpret=False)

  rng = np.random.default_rng(0)
  q, k = (jnp.asarray(rng.standard_normal((64, 64)), jnp.bfloat16)
          for _ in range(2))
  got = plgpu.kernel(
      body, out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
      scratch_types=(shared, shared, plgpu.Barrier(num_arrivals=2)),
      interpret=mosaic.interpreter())(q, k)
  np.testing.assert_allclose(got, np.float32(q) @ np.float32(k).T, atol=1e-4)


# --- many shapes -------------------------------------------------------------


def draw(seed):
  """A random Case of the shapes that Mosaic takes."""
  rng = np.random.default_rng((seed, 7))

  def one(*options):
    return options[rng.integers(len(options))]

  dtype, K, H = one('bfloat16', 'float16'), one(1, 2), one(64, 128, 192, 256)
  C = one(8, 16, 32, 64, 128 if H <= 128 else 64)
  G = one(1, 2, 3, 4, 7, 8, 16, *((65,) if H <= 128 else ()))
  cuts = (max(one(64, 128), C) if H <= 128 else 64, one(1, 2, 3),
          2 if G > 64 else 1)
  if paged.tile_bytes(cuts[0], H, 2, cuts[1]) > 2**17:
    cuts = (max(64, C), 1, cuts[2])
  return Case(C=C, K=K, N=K * G, H=H, dtype=dtype, kv=dtype,
              window=one(0, 0, 1, 15, 17, 100), softcap=one(0.0, 0.0, 3.0),
              cuts=cuts, seed=seed)


@pytest.mark.native
@pytest.mark.sweep
@pytest.mark.parametrize('seed', range(60))
def test_decode_sweep(seed):
  case, rng = draw(seed), np.random.default_rng((seed, 8))
  cuts = case.cuts + (() if case.H > 128 else (int(rng.integers(1, 5)),))
  lens = [1, case.C - 1, case.C, case.C + 1, int(rng.integers(1, 400))]
  with gpu.racing():
    check_decode(dataclasses.replace(case, cuts=cuts),
                 rng.permutation(lens).tolist(), **RUN)


@pytest.mark.native
@pytest.mark.sweep
@pytest.mark.parametrize('seed', range(60))
def test_prefill_sweep(seed):
  case, rng = draw(seed), np.random.default_rng((seed, 9))
  packing = [(int(n), int(p)) for n, p in zip(
      rng.choice([0, 1, case.C - 1, case.C + 1, 64, 130], 3),
      rng.choice([0, 1, case.C - 1, case.C, 2 * case.C + 3], 3), strict=True)]
  with gpu.racing():
    check_prefill(case, [*packing, (1, 0)], **RUN)


# --- shapes, devices, configs ------------------------------------------------

H100, A100 = 'NVIDIA H100 80GB HBM3', 'NVIDIA A100-SXM4-80GB'


def call(H=128, C=16, group=4, dtype='bfloat16', kv='bfloat16'):
  """(queries, keys), abstract."""
  return (jax.ShapeDtypeStruct((4, 2 * group, H), dtype),
          jax.ShapeDtypeStruct((2, 8, C, H), kv))


@pytest.mark.parametrize('kind, shape, says', [
    (H100, {}, ''), ('NVIDIA GH200 480GB', {}, ''), ('NVIDIA H20', {}, ''),
    (A100, {}, 'a NVIDIA A100-SXM4-80GB; must be a Hopper GPU'),
    ('NVIDIA B200', {}, 'must be a Hopper GPU'),
    (H100, dict(dtype='float32', kv='float32'), 'must be both bfloat16'),
    (H100, dict(kv='int8'), 'queries of bfloat16 and KV of int8'),
    (H100, dict(kv='float16'), 'must be both bfloat16 or both float16'),
    (H100, dict(H=96), 'heads of 96; must be 64, 128'),
    (H100, dict(C=48), 'pages of 48 tokens of 128; must be .* 8 to 128'),
    (H100, dict(C=128, H=192), 'pages of 128 tokens of 192; must .* 8 to 64'),
    (H100, dict(group=129), '129 query heads of 128 a kv head; must be 128'),
    (H100, dict(group=65, H=192), '65 query heads of 192 a kv head; must'),
])
def test_what_it_takes_is_picked_and_a_name_never_falls_back(kind, shape, says):
  picked = tiles.pick(None, 'gpu', call(**shape), kind)
  assert picked == ('pallas' if says else 'mosaic')
  if says:
    with pytest.raises(ValueError, match=f"impl='mosaic': .*{says}"):
      tiles.pick('mosaic', 'gpu', call(**shape), kind)
  else:
    assert tiles.pick('mosaic', 'gpu', call(**shape), kind) == 'mosaic'
  assert tiles.pick(None, 'cpu', call(**shape), kind) in ('xla', 'cpu')


def test_on_a_cpu_it_is_an_error_and_other_ops_have_none():
  q, k, v, table, len_B, *_ = kernels_test.arguments()
  with pytest.raises(ValueError, match='Only interpret mode is supported'):
    jax.jit(lambda *args: decode_attention.decode_attention(
        *args, 'mosaic')).lower(q, k, v, table, len_B)
  for name in ('mosaic', 'mosaic_interpret'):
    assert tiles.pick(name, call=call()) == name
  with pytest.raises(ValueError, match="impl='mosaic': it has attention only"):
    tiles.pick('mosaic', 'gpu')
  assert [tiles.portable(name) for name in tiles.IMPLS] == [
      'xla', 'xla', 'pallas', 'pallas_interpret', 'pallas', 'xla']


def test_a_jax_without_it_picks_another(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec',
                      lambda name: None if 'mosaic' in name else True)
  assert tiles.pick(None, 'gpu', call(), H100) == 'pallas'
  with pytest.raises(ValueError, match='this JAX has no jax.experimental.pal'):
    tiles.pick('mosaic', 'gpu', call(), H100)


@pytest.mark.parametrize('config, says', [
    (dict(block_tokens=256), r'block_tokens=256: must be of \(64, 128\)'),
    (dict(block_tokens=64), 'block_tokens=64: .* whole pages of 128'),
    (dict(block_tokens=128, num_stages=0), 'num_stages=0: must be 1 or more'),
    (dict(block_tokens=128, num_warpgroups=3), 'num_warpgroups=3: must be 1'),
    (dict(block_tokens=128, splits=0), 'splits=0: must be 1 or more'),
    (dict(block_tokens=128, num_stages=4), 'block_tokens=128: must be smaller, '
     'or num_stages: .* more than the 232448 of H100')])
def test_a_config_that_does_not_suit_is_an_error(config, says):
  with pytest.raises(ValueError, match=f'mosaic.TuningConfig.{says}'):
    mosaic.TuningConfig(**config).check(128, 128, paged.device(H100))


@pytest.mark.parametrize('config, says', [
    (mosaic.TuningConfig(), 'num_warpgroups=1: must be more for 65 query'),
    (decode_attention.TuningConfig(), 'must be a mosaic.TuningConfig')])
def test_a_config_of_another_shape_or_kernel_is_an_error(config, says):
  q, k = call(group=65)
  with pytest.raises(ValueError, match=says):
    jax.eval_shape(lambda q, k: mosaic.decode(
        q, k, k, np.zeros((4, 8), 'int32'), np.ones(4, 'int32'), 1.0, 0.0, 0,
        config=config), q, k)


@pytest.mark.parametrize('H', [64, 128, 192, 256])
def test_the_heuristic_suits_every_shape(H):
  for group, C in itertools.product((1, 7, 64, 128), (8, 16, 32, 64, 128)):
    check_heuristic(group, C, H)


def check_heuristic(group, C, H):
  (q, k), limits = call(H, C, group), paged.device(H100)
  if tiles.mosaic_lacks((q, k), H100):
    group, C = min(group, 64), min(C, 64)
    q, k = call(H, C, group)
  config = mosaic.decode_heuristic(q, k, 4096, limits)
  config.check(H, C, limits)
  assert group <= mosaic.ROWS * config.num_warpgroups
  config = mosaic.prefill_heuristic(q, k, limits)
  config.check(H, C, limits)


def test_the_heuristic_splits_few_long_rows_only():
  def splits(rows, tokens):
    q = jax.ShapeDtypeStruct((rows, 32, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((8, 9, 16, 128), jnp.bfloat16)
    return mosaic.decode_heuristic(q, k, tokens, paged.device(H100)).splits

  assert splits(1, 32768) == 17  # 8 programs on 132 cores
  assert splits(1, 64) == 1 and splits(64, 32768) == 1


@pytest.mark.parametrize('shape', [
    {}, dict(group=7, H=64, dtype='float16', kv='float16'),
    dict(group=80, H=128, C=128), dict(group=16, H=256, C=64)], ids=str)
def test_both_kernels_lower_for_cuda(shape):
  text = kernels_test.lower(kernels_test.arguments(**shape), 'mosaic',
                            window=40, softcap=3.0)
  assert text.count('custom_call @mosaic_gpu_v2') == 2
