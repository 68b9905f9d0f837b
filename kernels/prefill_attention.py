"""Causal attention of packed prompt chunks over their paged KV."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dsjax.kernels import cpu, paged, shapes, tiles, tuned
from dsjax.kernels.shapes import Shaped

if TYPE_CHECKING:
  from dsjax.kernels import mosaic  # not every JAX has it

BLOCK = 64  # queries a block
TILE = 128  # keys a tile


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How the kernel cuts its work.

  block_rows: rows of a program's products: the query heads of one kv head
  for as many consecutive tokens of one sequence as fit. block_tokens: keys
  it reads at a time. num_warps of a program; num_stages: tiles in flight.
  """

  block_rows: int = 64
  block_tokens: int = 64
  num_warps: int = 4
  num_stages: int = 2

  def check(self, q_SNH: Shaped, k_KPCH: Shaped, limits: paged.Device) -> None:
    """Raises ValueError unless it suits the arrays and a paged.Device."""
    paged.check(self, 'block_rows', q_SNH.shape[2], k_KPCH.dtype.itemsize,
                limits)
    group = q_SNH.shape[1] // k_KPCH.shape[0]
    if self.block_rows < group:
      raise ValueError(f'TuningConfig.block_rows={self.block_rows}: must be '
                       f'{group} or more, the query heads of a kv head')


def heuristic(q_SNH: Shaped, k_KPCH: Shaped,
              limits: paged.Device) -> TuningConfig:
  """A TuningConfig from the floor of bytes.

  Rows reuse each key and value that a program reads: 128 of them for heads
  of up to 128, what the registers hold for wider ones and for float32, which
  no tensor core multiplies exactly. Tiles leave room for two programs on a
  core, and registers for float8 by its bits.
  """
  H, group = q_SNH.shape[2], q_SNH.shape[1] // k_KPCH.shape[0]
  exact = paged.compute_dtype(q_SNH.dtype, k_KPCH.dtype) == jnp.float32
  rows = max(32 if exact else 128 if H <= 128 else 64, paged.power(group))
  most = max(1024 // rows, paged.LEAST) if exact else 64
  if paged.by_bits(k_KPCH.dtype, limits) and rows > 64:
    most = 32
  size = paged.fit_tokens(H, k_KPCH.dtype.itemsize, 2,
                          limits.shared_bytes // 2)
  return TuningConfig(rows, min(size, most), 8 if rows * H >= 8192 else 4)


def shape_class(q_SNH: Shaped, k_KPCH: Shaped) -> str:
  """What a tuned config is for: sizes up to the next power of two."""
  S, N, H = q_SNH.shape
  K = k_KPCH.shape[0]
  return (f'{q_SNH.dtype} over {k_KPCH.dtype}, H {H}, G {N // K}, '
          f'S K {paged.power(S * K)}')


def default(q_SNH: Shaped, k_KPCH: Shaped,
            limits: paged.Device) -> TuningConfig:
  """The tuned config, or the heuristic's."""
  return tuned.find(
      'prefill_attention', shape_class(q_SNH, k_KPCH), TuningConfig,
      lambda config: config.check(q_SNH, k_KPCH, limits)) or heuristic(
          q_SNH, k_KPCH, limits)


def prefill_attention(
    q_SNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    start_A: jax.Array, pos_B: jax.Array, impl: str | None = None, *,
    scale: float | None = None, softcap: float = 0.0, window: int = 0,
    k_scale_KPC: jax.Array | None = None, v_scale_KPC: jax.Array | None = None,
    config: 'TuningConfig | mosaic.TuningConfig | None' = None
) -> jax.Array:
  """Each query attends to its sequence's tokens up to its own position.

  o = softmax(scale q k^T) v. Sequence b's queries are
  q_SNH[start_A[b]:start_A[b + 1]] (A = B + 1), at positions pos_B[b],
  pos_B[b] + 1, ...; its keys and values, these tokens' included, are already
  in the pages of table_BM[b]. Earlier context (a prefix, earlier chunks) is
  whatever the pages hold before pos_B. Packed tokens past start_A[B] come
  back as garbage.

  Args:
    impl: one of tiles.IMPLS, or None to choose by platform: see tiles.pick.
    scale: of q k^T; None for 1 / sqrt(H).
    softcap: scores s become softcap tanh(s / softcap); 0 for none.
    k_scale_KPC, v_scale_KPC: what int8 or float8 keys and values are
      multiplied by.
    window: a query at position p sees p - window + 1 to p; 0 for all. A
      block of queries reads nothing before its first one's window.
    config: a TuningConfig of the kernel (mosaic.TuningConfig for Mosaic's);
      None for the default.

  Returns:
    o_SNH in q's dtype; float32 inside.

  Raises:
    ValueError: shapes disagree, impl is unknown or not available, or config
      does not suit shapes or device.
  """
  shapes.check(q_SNH=q_SNH, k_KPCH=k_KPCH, table_BM=table_BM, pos_B=pos_B)
  shapes.check(start_A=start_A)
  shapes.check_kv(q_SNH, k_KPCH, v_KPCH, k_scale_KPC, v_scale_KPC)
  if start_A.shape[0] != pos_B.shape[0] + 1:
    raise ValueError(f'start_A: A must be B + 1 = {pos_B.shape[0] + 1}')
  picked = tiles.pick(impl, call=(q_SNH, k_KPCH))
  op: Any = reference
  options: dict[str, Any] = {}
  if picked == 'cpu':
    op = cpu.attend
  elif picked != 'xla':
    op = mosaic_kernel if picked.startswith('mosaic') else kernel
    options = dict(interpret=picked.endswith('interpret'), config=config)
  return op(q_SNH, k_KPCH, v_KPCH, table_BM, start_A, pos_B,
            q_SNH.shape[-1]**-0.5 if scale is None else scale, softcap,
            window, k_scale_KPC, v_scale_KPC, **options)


def kernel(
    q_SNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    start_A: jax.Array, pos_B: jax.Array, scale: float, softcap: float,
    window: int, k_scale_KPC: jax.Array | None, v_scale_KPC: jax.Array | None,
    interpret: bool = False, config: TuningConfig | None = None
) -> jax.Array:
  """The Pallas kernel: a program has one block of one sequence's queries.

  It reads the tokens that some query of the block sees and no others. There
  are programs for the most blocks that S tokens of B sequences can make;
  those past the last block do nothing.
  """
  S, N, H = q_SNH.shape
  K, limits = k_KPCH.shape[0], paged.device()
  config = config or default(q_SNH, k_KPCH, limits)
  config.check(q_SNH, k_KPCH, limits)
  paged.check_heads(H, interpret)
  each = config.block_rows // (N // K)
  most = (S + pos_B.shape[0] * (each - 1)) // each
  scales = () if k_scale_KPC is None else (k_scale_KPC, v_scale_KPC)
  return paged.call(
      functools.partial(_program, config, scale, softcap, window, N // K),
      (most, K), jax.ShapeDtypeStruct(q_SNH.shape, q_SNH.dtype), config,
      interpret, 'prefill_attention')(
          q_SNH, table_BM, start_A, pos_B, *cut(start_A, each, most), k_KPCH,
          v_KPCH, *scales)


def mosaic_default(q_SNH: Shaped, k_KPCH: Shaped) -> 'mosaic.TuningConfig':
  """The tuned config of the Mosaic kernel, or its heuristic's."""
  from dsjax.kernels import mosaic
  limits = paged.device(tiles.HOPPER[0])
  return tuned.find(
      'mosaic_prefill', shape_class(q_SNH, k_KPCH), mosaic.TuningConfig,
      lambda config: config.check(q_SNH.shape[2], k_KPCH.shape[2], limits)
  ) or mosaic.prefill_heuristic(q_SNH, k_KPCH, limits)


def mosaic_kernel(
    q_SNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    start_A: jax.Array, pos_B: jax.Array, scale: float, softcap: float,
    window: int, *_: object, interpret: bool = False,
    config: 'mosaic.TuningConfig | None' = None
) -> jax.Array:
  """The Mosaic kernel; it takes no int8, no float8."""
  from dsjax.kernels import mosaic  # not every JAX has it
  return mosaic.prefill(q_SNH, k_KPCH, v_KPCH, table_BM, start_A, pos_B, cut,
                        scale, softcap, window, interpret,
                        config or mosaic_default(q_SNH, k_KPCH))


def cut(start_A: jax.Array, each: int,
        most: int) -> tuple[jax.Array, jax.Array]:
  """Packed sequences in blocks of `each` tokens, `most` (J) blocks.

  Returns:
    (seq_J, first_J): whose block it is, and its first token in it. For a
    block past the last one that is no token of the sequence.
  """
  count_B = start_A[1:] - start_A[:-1]
  blocks_B = (count_B + each - 1) // each
  ends_B, at_J = jnp.cumsum(blocks_B), jnp.arange(most)
  seq_J = jnp.searchsorted(ends_B, at_J, side='right', method='compare_all')
  seq_J = jnp.minimum(seq_J, count_B.shape[0] - 1).astype(jnp.int32)
  return seq_J, (at_J - (ends_B - blocks_B)[seq_J]) * each


def _program(config, scale, softcap, window, group, q_ref, table_ref,
             start_ref, pos_ref, seq_ref, first_ref, *refs):
  *kv, o_ref = refs
  j, head = pl.program_id(0), pl.program_id(1)
  b, first = seq_ref[j], first_ref[j]
  start, pos = start_ref[b], pos_ref[b]
  count = start_ref[b + 1] - start
  each = config.block_rows // group
  dtype = paged.compute_dtype(q_ref.dtype, kv[0].dtype)

  @pl.when(first < count)
  def _():
    row_R = jnp.minimum(jnp.arange(config.block_rows), each * group - 1)
    token_R = jnp.minimum(first + jax.lax.div(row_R, group), count - 1)
    row_R = head * group + jax.lax.rem(row_R, group)
    pos_R = pos + token_R

    def visible(t_T):
      back_RT = pos_R[:, None] - t_T[None, :]
      ok_RT = back_RT >= 0
      return ok_RT & (back_RT < window) if window else ok_RT

    _, total_R, out = paged.attend(
        [q.astype(dtype) for q in paged.load(q_ref, start + token_R, row_R)],
        jnp.maximum(pos + first + 1 - window, 0) if window else 0,
        pos + jnp.minimum(first + each, count), visible, (kv, head),
        (table_ref, b), config.block_tokens, scale, softcap)
    paged.store(o_ref, [o / total_R[:, None] for o in out], start + token_R,
                row_R)


def reference(
    q_SNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    start_A: jax.Array, pos_B: jax.Array, scale: float, softcap: float,
    window: int, k_scale_KPC: jax.Array | None, v_scale_KPC: jax.Array | None
) -> jax.Array:
  """The XLA reference: a loop over blocks of one sequence's queries.

  Blocks past a sequence's end spill into the next one's place and are
  overwritten by it, since blocks run in packed order.
  """
  S, N, H = q_SNH.shape
  K, C = k_KPCH.shape[0], k_KPCH.shape[2]
  Q = min(BLOCK, S)
  q_SKGH = jnp.pad(q_SNH, ((0, Q), (0, 0), (0, 0))).reshape(
      S + Q, K, N // K, H).astype(jnp.float32) * scale
  blocks_B = -(-(start_A[1:] - start_A[:-1]) // Q)
  ends_B = jnp.cumsum(blocks_B)

  def block(j, o_SKGH):
    b = jnp.searchsorted(ends_B, j, side='right')
    offset = (j - (ends_B[b] - blocks_B[b])) * Q
    first, pos = start_A[b] + offset, pos_B[b] + offset
    q_KQGH = jax.lax.dynamic_slice_in_dim(q_SKGH, first, Q).swapaxes(0, 1)
    last = pos_B[b] + start_A[b + 1] - start_A[b]  # tokens of the sequence
    table_1M = table_BM[b][None]
    if window:
      table_1M, skip_1 = tiles.clip(
          table_1M, jnp.maximum(pos + 1 - window, 0)[None], window + Q - 1, C)
      pos, last = pos - skip_1[0], last - skip_1[0]

    def tile(start, width, table_1m):
      k_KTH = tiles.gather(k_KPCH, k_scale_KPC, table_1m)[:, 0]
      v_KTH = tiles.gather(v_KPCH, v_scale_KPC, table_1m)[:, 0]
      s_KQGT = tiles.cap(jnp.einsum('kqgh,kth->kqgt', q_KQGH, k_KTH), softcap)
      back_QT = (pos + jnp.arange(Q)[:, None]
                 - (start + jnp.arange(width)[None, :]))
      ok_QT = back_QT >= 0
      if window:
        ok_QT &= back_QT < window
      return jnp.where(ok_QT[None, :, None, :], s_KQGT, tiles.NEVER), v_KTH

    def weigh(p_KQGT, v_KTH):
      return jnp.einsum('kqgt,kth->kqgh', p_KQGT, v_KTH)

    o_KQGH = tiles.attend(tile, weigh, q_KQGH.shape, table_1M, C,
                          jnp.minimum(pos + Q, last), TILE)
    return jax.lax.dynamic_update_slice_in_dim(
        o_SKGH, o_KQGH.swapaxes(0, 1), first, 0)

  o_SKGH = jax.lax.fori_loop(0, ends_B[-1], block, jnp.zeros(q_SKGH.shape))
  return o_SKGH[:S].reshape(S, N, H).astype(q_SNH.dtype)
