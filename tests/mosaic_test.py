"""The Mosaic attention kernels, interpreted with race detection, against the
XLA references: on the poisoned pools and with the tolerance of kernels_test.
"""

import pytest

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
