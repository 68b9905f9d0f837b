"""Both attention operators against a loop over queries in float64.

Tolerance: a score is a sum of H = 8 products of normal numbers, wrong by less
than 1e-6 in float32; so is the log of every weight, and the output is a mean
of values below 5. 1e-5 leaves room for all of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import build_cpu, cpu, tiles
from dsjax.kernels.decode_attention import TILE, decode_attention
from dsjax.kernels.kv_write import LARGEST
from dsjax.kernels.prefill_attention import BLOCK, prefill_attention
from tests.common.samples import thinned

H = 8
REACH = 336  # tokens a table covers; no multiple of a tile of many pages
ATOL = 1e-5
HUGE = float(np.finfo(np.float32).max)  # what unused places hold
# (C, N, K)
LAYOUTS = [(1, 2, 1), (4, 4, 2), (16, 6, 2), (16, 8, 1), (48, 3, 3),
           (64, 8, 1), (256, 4, 2)]
layouts = pytest.mark.parametrize('layout', LAYOUTS, ids=str)

OPTIONS = ('impl', 'scale', 'softcap', 'window')
decode_jit = jax.jit(decode_attention, static_argnames=OPTIONS)
prefill_jit = jax.jit(prefill_attention, static_argnames=OPTIONS)


def paged(rng, lens, K, C, dtype=np.float32):
  """Keys and values [t, K, H] of each sequence, and the pools that hold them.

  Tables are permuted; spare pages, page tails and table entries past the end
  hold garbage.
  """
  M = -(-REACH // C)
  used = [-(-n // C) for n in lens]
  P = len(lens) * M + 3
  ids = rng.permutation(P)
  table_BM = rng.integers(0, P, (len(lens), M)).astype(np.int32)
  pools = [np.where(rng.random((K, P, C, H)) < 0.5, HUGE, -HUGE)
           for _ in 'kv']
  sequences = []
  for b, n in enumerate(lens):
    table_BM[b, :used[b]], ids = ids[:used[b]], ids[used[b]:]
    dense = [rng.standard_normal((n, K, H)).astype(dtype) for _ in 'kv']
    for pool, x in zip(pools, dense, strict=True):
      for t in range(n):
        pool[:, table_BM[b, t // C], t % C] = x[t]
    sequences.append([x.astype(np.float64) for x in dense])
  if dtype != np.float32:
    pools = [np.clip(pool, -3e38, 3e38) for pool in pools]
  return sequences, [pool.astype(dtype) for pool in pools], table_BM


def attend_one(q_NH, k_TKH, v_TKH, scale=H**-0.5, softcap=0.0, window=0):
  """One query over all of these tokens, a head at a time."""
  N = q_NH.shape[0]
  k_TKH, v_TKH = k_TKH[-window:], v_TKH[-window:]  # -0: all
  out_NH = np.zeros((N, H))
  for n in range(N):
    head = n // (N // k_TKH.shape[1])
    score_T = k_TKH[:, head] @ q_NH[n] * scale
    if softcap:
      score_T = softcap * np.tanh(score_T / softcap)
    weight_T = np.exp(score_T - score_T.max())
    out_NH[n] = weight_T @ v_TKH[:, head] / weight_T.sum()
  return out_NH


# --- decode ------------------------------------------------------------------


def decode_oracle(q_BNH, sequences, **options):
  return np.stack([attend_one(q, k, v, **options) for q, (k, v) in zip(
      q_BNH.astype(np.float64), sequences, strict=True)])


def decode_lens(C):
  """Around a page's end and a tile's end, and up to the whole table."""
  return [1, max(C - 1, 1), C, C + 1, TILE - 1, TILE, TILE + 1, 2 * TILE - 1,
          2 * TILE, 2 * TILE + 1, 300, REACH]


def decode_case(layout, lens, dtype=np.float32, seed=0):
  C, N, K = layout
  rng = np.random.default_rng(seed)
  sequences, pools, table_BM = paged(rng, lens, K, C, dtype)
  q_BNH = rng.standard_normal((len(lens), N, H)).astype(dtype)
  return (q_BNH, *pools, table_BM, np.array(lens, np.int32)), sequences


@pytest.fixture(params=['xla', 'cpu'])
def impl(request):
  """Each implementation for CPUs."""
  if request.param == 'cpu' and build_cpu.build():
    pytest.skip('no C++ compiler')
  return request.param


@pytest.fixture
def decode(impl):
  return functools.partial(decode_jit, impl=impl)


@pytest.fixture
def prefill(impl):
  return functools.partial(prefill_jit, impl=impl)


@layouts
def test_decode_equals_the_loop(decode, layout):
  args, sequences = decode_case(layout, decode_lens(layout[0]))
  np.testing.assert_allclose(decode(*args), decode_oracle(
      args[0], sequences), rtol=0, atol=ATOL)


@thinned('layout, length', 3, LAYOUTS, [1, TILE, TILE + 1, REACH])
def test_decode_when_every_row_is_as_long(decode, layout, length):
  args, sequences = decode_case(layout, [length] * 2)
  np.testing.assert_allclose(decode(*args), decode_oracle(
      args[0], sequences), rtol=0, atol=ATOL)


@thinned('window, layout', 2, [1, 6, 16, 18, TILE + 1, 400],
         [(4, 4, 2), (16, 6, 2), (64, 8, 1)])
def test_decode_under_a_window(decode, layout, window):
  lens = [1, window - 1, window, window + 1, window + layout[0], 300, REACH,
          window + 2 * layout[0] - 1]  # starts at a page's end
  lens = [min(max(n, 1), REACH) for n in lens]
  args, sequences = decode_case(layout, lens)
  np.testing.assert_allclose(
      decode(*args, window=window),
      decode_oracle(args[0], sequences, window=window), rtol=0, atol=ATOL)


@thinned('span, C', 2, [1, 2, 3, 4, 5, 6, 7, 12, 40], [1, 2, 5])
def test_clip_keeps_the_pages_of_a_span(C, span):
  table_BM = np.arange(20, dtype=np.int32)[None].repeat(3 * C, 0)
  first_B = 2 * C + np.arange(3 * C)
  got_BM, skip_B = tiles.clip(table_BM, first_B, span, C)
  for got_M, skip, first in zip(got_BM, skip_B, first_B, strict=True):
    assert got_M[0] * C == skip and first - C < skip <= first
    last = min((first + span - 1) // C, 19)
    assert set(range(got_M[0], last + 1)) <= set(got_M.tolist())
  assert got_BM.shape[1] == min(1 + -(-(span - 1) // C), 20)  # no more


def reads(op, args, window, monkeypatch):
  """Tiles that an operator reads."""
  count = []
  gather = tiles.gather

  def counted(*args):
    jax.debug.callback(lambda: count.append(1))
    return gather(*args)

  monkeypatch.setattr(tiles, 'gather', counted)
  op = functools.partial(op, impl='xla', window=window)
  jax.block_until_ready(jax.jit(op)(*args))
  jax.effects_barrier()
  return len(count) / 2


def test_decode_reads_no_more_than_the_windows(monkeypatch):
  args, _ = decode_case((16, 4, 2), [1, 20, 200, REACH])
  assert reads(decode_attention, args, 33, monkeypatch) == 1
  assert reads(decode_attention, args, 0, monkeypatch) == 7


def test_decode_with_a_table_of_one_page(decode):
  args, sequences = decode_case((16, 4, 2), [1, 15, 16])
  args = (*args[:3], args[3][:, :1], args[4])
  np.testing.assert_allclose(decode(*args), decode_oracle(
      args[0], sequences), rtol=0, atol=ATOL)


def test_decode_of_large_scores_does_not_overflow(decode):
  args, sequences = decode_case((16, 4, 2), [1, 20, 300])
  args = (args[0] * np.float32(1e3), *args[1:])
  got = decode(*args)
  np.testing.assert_allclose(got, decode_oracle(args[0], sequences),
                             rtol=0, atol=1e-2)  # scores of 1e3 +- 1e-3


def test_decode_bfloat16_rounds_only_the_result(decode):
  args, sequences = decode_case((16, 4, 2), decode_lens(16), jnp.bfloat16)
  got = decode(*args)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
      np.asarray(got, np.float64), decode_oracle(args[0], sequences),
      rtol=2**-8, atol=ATOL)


@pytest.mark.parametrize('softcap, scale', [(1.5, None), (-1.5, 0.3),
                                            (0.0, 0.3), (2.0, 1.0)])
def test_decode_with_a_softcap_and_a_scale(decode, softcap, scale):
  args, sequences = decode_case((16, 4, 2), decode_lens(16))
  got = decode(*args, softcap=softcap, scale=scale, window=37)
  np.testing.assert_allclose(got, decode_oracle(
      args[0], sequences, softcap=softcap, scale=scale or H**-0.5,
      window=37), rtol=0, atol=ATOL)


# --- prefill -----------------------------------------------------------------

S = 200
# Tokens and first position of each packed chunk.
PACKINGS = {
    'whole prompts': [(5, 0), (0, 0), (1, 0), (130, 0), (1, 0), (63, 0)],
    'around a block': [(63, 0), (64, 0), (65, 0), (0, 0), (1, 0), (0, 0)],
    'earlier context': [(1, 0), (1, 127), (64, 3), (0, 9), (65, 64),
                        (2, 128)],
    'late chunks': [(130, 170), (65, 255), (1, 299), (1, 15), (1, 16),
                    (1, 17)],
    'page edges': [(0, 0), (3, 14), (64, 64), (63, 65), (0, 0), (1, 335)],
    'empty at the ends': [(0, 0), (0, 7), (2, 0), (129, 1), (0, 0), (0, 0)],
    'one long': [(S, 120), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0)],
}


def prefill_oracle(q_SNH, sequences, packing, **options):
  out, at = [], 0
  for (k, v), (count, pos) in zip(sequences, packing, strict=True):
    out += [attend_one(q_SNH[at + i].astype(np.float64), k[:pos + i + 1],
                       v[:pos + i + 1], **options) for i in range(count)]
    at += count
  return np.stack(out)


def prefill_case(layout, packing, size=S, dtype=np.float32, seed=0):
  C, N, K = layout
  rng = np.random.default_rng(seed)
  counts, starts = zip(*packing, strict=True)
  sequences, pools, table_BM = paged(
      rng, [p + n for n, p in packing], K, C, dtype)
  q_SNH = rng.standard_normal((size, N, H)).astype(dtype)
  start_A = np.cumsum((0, *counts)).astype(np.int32)
  return (q_SNH, *pools, table_BM, start_A,
          np.array(starts, np.int32)), sequences


def check_prefill(prefill, args, sequences, packing, rtol=0, **options):
  got = np.asarray(prefill(*args, **options), np.float64)
  assert got.shape == args[0].shape
  want = prefill_oracle(args[0], sequences, packing, **options)
  np.testing.assert_allclose(got[:len(want)], want, rtol=rtol, atol=ATOL)


@pytest.mark.parametrize('packing', PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize('layout', [(16, 6, 2), (48, 3, 3)], ids=str)
def test_prefill_equals_the_loop(prefill, layout, packing):
  check_prefill(prefill, *prefill_case(layout, packing), packing)


@thinned('window, packing', 4, [1, 7, 16, 65, 300], PACKINGS)
def test_prefill_under_a_window(prefill, window, packing):
  check_prefill(prefill, *prefill_case((16, 6, 2), packing), packing,
                window=window)


@pytest.mark.parametrize('window', [5, 64, 129])
@pytest.mark.parametrize('layout', [(4, 4, 2), (64, 8, 1)], ids=str)
def test_prefill_around_the_end_of_a_window(prefill, layout, window):
  packing = [(1, window - 2), (1, window - 1), (1, window),
             (40, max(window - 9, 0))]
  check_prefill(prefill, *prefill_case(layout, packing), packing, window=window)


def test_prefill_of_a_block_that_starts_at_the_end_of_a_page(prefill):
  packing = [(BLOCK, 33), (BLOCK, 1)]
  check_prefill(prefill, *prefill_case((16, 4, 2), packing), packing, window=3)


@pytest.mark.parametrize('window', [0, 20])
def test_prefill_with_a_softcap_and_a_scale(prefill, window):
  packing = PACKINGS['earlier context']
  check_prefill(prefill, *prefill_case((16, 4, 2), packing), packing,
                softcap=1.5, scale=0.7, window=window)


def test_prefill_reads_no_more_than_the_windows(monkeypatch):
  args, _ = prefill_case((16, 4, 2), [(60, 270)], 64)
  assert reads(prefill_attention, args, 30, monkeypatch) == 1
  assert reads(prefill_attention, args, 0, monkeypatch) == 3


@layouts
def test_prefill_in_every_layout(prefill, layout):
  packing = [(70, 62), (1, 330), (0, 0), (3, layout[0] - 1)]
  check_prefill(prefill, *prefill_case(layout, packing, 80), packing)


@pytest.mark.parametrize('size', [1, 7, BLOCK - 1, BLOCK, BLOCK + 1])
def test_prefill_of_few_tokens(prefill, size):
  packing = [(size // 2, 5), (0, 3), (size - size // 2, 130)]
  check_prefill(prefill, *prefill_case((16, 4, 2), packing, size), packing)


def test_prefill_of_nothing_gives_garbage_of_the_right_shape(prefill):
  args, _ = prefill_case((16, 4, 2), [(0, 0), (0, 5)], 7)
  assert prefill(*args).shape == (7, 4, H)


def test_prefill_bfloat16_rounds_only_the_result(prefill):
  packing = PACKINGS['earlier context']
  args, sequences = prefill_case((16, 4, 2), packing, dtype=jnp.bfloat16)
  assert prefill(*args).dtype == jnp.bfloat16
  check_prefill(prefill, args, sequences, packing, rtol=2**-8)


def test_prefill_of_one_token_is_decode(prefill):
  lens = [1, 16, 17, 128, 129, 300]
  args, _ = decode_case((16, 4, 2), lens)
  start_A = np.arange(len(lens) + 1, dtype=np.int32)
  got = prefill(*args[:4], start_A, args[4] - 1)
  np.testing.assert_allclose(got, decode_jit(*args, impl='xla'), rtol=0,
                             atol=ATOL)


# --- arguments ---------------------------------------------------------------


@functools.cache
def small(op):
  case = decode_case((16, 4, 2), [3, 5]) if op is decode_jit else prefill_case(
      (16, 4, 2), [(2, 0), (5, 0)], 7)
  return case[0]


both = pytest.mark.parametrize('op', [decode_jit, prefill_jit],
                               ids=['decode', 'prefill'])


@both
def test_an_unknown_impl_is_an_error_that_names_the_allowed(op):
  with pytest.raises(ValueError, match=r"impl='cuda'.*'pallas_interpret'"):
    op(*small(op), impl='cuda')


@both
def test_the_default_impl_on_cpu_is_what_is_built(op):
  np.testing.assert_array_equal(op(*small(op)), op(
      *small(op), impl='cpu' if cpu.loaded() else 'xla'))


@both
def test_keys_and_values_must_agree(op):
  q, k, v, *rest = small(op)
  with pytest.raises(ValueError, match='v_KPCH: P is'):
    op(q, k, v[:, :-1], *rest)


@both
def test_the_head_widths_must_agree(op):
  q, *rest = small(op)
  with pytest.raises(ValueError, match='k_KPCH: H is 8, but 4 in q_.NH'):
    op(q[..., :4], *rest)


@both
@pytest.mark.parametrize('heads', [0, 1, 3])
def test_kv_heads_have_equally_many_queries(op, heads):
  q, *rest = small(op)
  with pytest.raises(ValueError, match=f'^{heads} query heads; must be a mul'):
    op(q[:, :heads], *rest)


@both
def test_keys_and_values_are_of_one_dtype(op):
  q, k, v, *rest = small(op)
  with pytest.raises(ValueError, match='v_KPCH: of bfloat16, but keys of fl'):
    op(q, k, v.astype(jnp.bfloat16), *rest)


def test_decode_rows_must_agree():
  *args, len_B = small(decode_jit)
  with pytest.raises(ValueError, match='len_B: B is 1, but 2 in q_BNH'):
    decode_jit(*args, len_B[:1])


def test_prefill_takes_a_start_more_than_sequences():
  *args, start_A, pos_B = small(prefill_jit)
  with pytest.raises(ValueError, match='start_A: A must be B . 1 = 3'):
    prefill_jit(*args, start_A[:-1], pos_B)


# --- pages of a byte ---------------------------------------------------------


@pytest.mark.parametrize('dtype', LARGEST)
@pytest.mark.parametrize('op, rest', (
    (decode_attention, (np.array([9, 4, 1]),)),
    (prefill_attention, (np.array([0, 3, 5, 6]), np.array([4, 0, 7])))),
    ids=('decode', 'prefill'))
def test_pages_of_a_byte_are_numbers_times_their_scales(op, rest, dtype):
  rng = np.random.default_rng(0)
  table_BM = rng.permutation(9).reshape(3, 3).astype(np.int32)
  rest = [jnp.asarray(x, jnp.int32) for x in (table_BM, *rest)]
  q = rng.standard_normal((3 if op is decode_attention else 6, 4, 8),
                          np.float32)
  k, v = rng.integers(-127, 128, (2, 2, 9, 4, 8)).astype(dtype)
  k_scale, v_scale = rng.uniform(0.001, 0.02, (2, 2, 9, 4)).astype(np.float32)
  q, k, v, k_scale, v_scale = map(jnp.asarray, (q, k, v, k_scale, v_scale))
  got = op(q, k, v, *rest, k_scale_KPC=k_scale, v_scale_KPC=v_scale)
  k32, v32 = k.astype(jnp.float32), v.astype(jnp.float32)
  want = op(q, k32 * k_scale[..., None], v32 * v_scale[..., None], *rest,
            impl='xla')
  np.testing.assert_allclose(got, want, atol=1e-6)
  other = op(q, k32 * v_scale[..., None], v32 * k_scale[..., None], *rest)
  assert np.abs(got - other).max() > 1e-2
