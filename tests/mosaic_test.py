"""The Mosaic attention kernels, interpreted with race detection, against the
XLA references: on the poisoned pools and with the tolerance of kernels_test.
"""

import inspect
import sys
import types

import jax
import pytest

from dsjax import kernels
from dsjax.kernels import mosaic
from tests import gpu
from tests.kernels_test import Case, check_decode, check_prefill

INTERPRET = dict(impl='mosaic_interpret')
HALF = dict(dtype='bfloat16', kv='bfloat16')
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


@pytest.mark.parametrize('case, lens', DECODE, ids=range(len(DECODE)))
def test_decode_equals_the_reference(case, lens):
  with gpu.racing():
    check_decode(case, lens, **INTERPRET)


@pytest.mark.parametrize('case, packing', PREFILL, ids=range(len(PREFILL)))
def test_prefill_equals_the_reference(case, packing):
  with gpu.racing():
    check_prefill(case, packing, **INTERPRET)


# --- what the tests catch ----------------------------------------------------

TILES = (Case(**HALF, N=1, K=1, C=64, window=100, cuts=(64, 1, 1)), [140])
NARROW = (Case(**HALF, N=1, K=1, C=64, window=7, cuts=(64, 1, 1)), [67])
SPLIT = (Case(**HALF, N=1, K=1, cuts=(64, 1, 1, 2)), [150])
PAIR = (Case(**HALF, N=1, K=1, C=64, cuts=(64, 1, 2)), [(70, 0)])
BLOCKS = (Case(**HALF, N=1, K=1, C=64, window=9, cuts=(64, 1, 1)), [(60, 70)])
WRONG = 'Not equal to tolerance'
SYNC = 'a race|RACE|observed|waited|completed|Out-of-bounds|out-of-bounds'
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


@pytest.mark.parametrize('old, new, case, says', MUTANTS,
                         ids=[m[0] for m in MUTANTS])
def test_a_mutant_is_caught(old, new, case, says, monkeypatch):
  source = inspect.getsource(mosaic)
  assert source.count(old) == 1
  mutant = types.ModuleType(mosaic.__name__)
  monkeypatch.setitem(sys.modules, mutant.__name__, mutant)
  monkeypatch.setattr(kernels, 'mosaic', mutant)
  exec(compile(source.replace(old, new), old, 'exec'), mutant.__dict__)
  monkeypatch.setattr(gpu, 'PATIENCE_S', 2)
  check = check_prefill if case in (PAIR, BLOCKS) else check_decode
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=says):
    with gpu.racing(mutant):
      check(*case, **INTERPRET)


@pytest.mark.parametrize('case', [TILES, NARROW, SPLIT, PAIR, BLOCKS],
                         ids=range(5))
def test_what_mutants_are_made_of_is_right(case):
  check = check_prefill if case in (PAIR, BLOCKS) else check_decode
  with gpu.racing():
    check(*case, **INTERPRET)
