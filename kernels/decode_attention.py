"""Attention of one new token a row over its paged KV."""

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

TILE = 48  # tokens a tile: few tiles, a small overshoot of the longest row


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How the kernel cuts its work.

  block_heads: query heads of one kv head that a program has (rows of its
  products). block_tokens: tokens it reads at a time, several pages or a part
  of one. splits: programs that share a row's tokens. num_warps of a program;
  num_stages: tiles in flight, copied while the one before is used.
  """

  block_heads: int = 16
  block_tokens: int = 64
  splits: int = 1
  num_warps: int = 4
  num_stages: int = 2

  def check(self, q_BNH: Shaped, k_KPCH: Shaped, limits: paged.Device) -> None:
    """Raises ValueError unless it suits the arrays and a paged.Device."""
    paged.check(self, 'block_heads', q_BNH.shape[2], k_KPCH.dtype.itemsize,
                limits)
    if self.splits < 1:
      raise ValueError(f'TuningConfig.splits={self.splits}: must be 1 or more')


def heuristic(q_BNH: Shaped, k_KPCH: Shaped, tokens: int,
              limits: paged.Device) -> TuningConfig:
  """A TuningConfig from the floor of bytes, for rows of up to `tokens`.

  Decode reads each key and value once, so all that counts is bytes in
  flight: tiles that leave room for two programs on a core, and, where rows
  and heads are fewer than the programs that fill the device twice, splits of
  no less than 4 tiles each. Float32, which no tensor core multiplies exactly,
  takes the registers of four times as many heads.
  """
  B, N, H = q_BNH.shape
  K, item = k_KPCH.shape[0], k_KPCH.dtype.itemsize
  exact = paged.compute_dtype(q_BNH.dtype, k_KPCH.dtype) == jnp.float32
  heads = min(max(paged.power(N // K), paged.LEAST), 16 if exact else 64)
  size = paged.fit_tokens(H, item, 2, limits.shared_bytes // 2)
  programs = B * K * -(-(N // K) // heads)
  splits = min(-(-2 * limits.cores // programs), max(tokens // (4 * size), 1))
  return TuningConfig(heads, size, splits, 8 if heads * H >= 8192 else 4)


def shape_class(q_BNH: Shaped, k_KPCH: Shaped, tokens: int) -> str:
  """What a tuned config is for: sizes up to the next power of two."""
  B, N, H = q_BNH.shape
  K = k_KPCH.shape[0]
  return (f'{q_BNH.dtype} over {k_KPCH.dtype}, H {H}, G {N // K}, '
          f'B K {paged.power(B * K)}, T {paged.power(tokens)}')


def default(q_BNH: Shaped, k_KPCH: Shaped, tokens: int,
            limits: paged.Device) -> TuningConfig:
  """The tuned config, or the heuristic's."""
  return tuned.find(
      'decode_attention', shape_class(q_BNH, k_KPCH, tokens), TuningConfig,
      lambda config: config.check(q_BNH, k_KPCH, limits)) or heuristic(
          q_BNH, k_KPCH, tokens, limits)


def decode_attention(
    q_BNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    len_B: jax.Array, impl: str | None = None, *, scale: float | None = None,
    softcap: float = 0.0, window: int = 0, k_scale_KPC: jax.Array | None = None,
    v_scale_KPC: jax.Array | None = None,
    config: 'TuningConfig | mosaic.TuningConfig | None' = None
) -> jax.Array:
  """Softmax(scale q k^T) v over the first len_B tokens of each row.

  Query head n reads kv head n // G, G = N // K. Token t of row b lies in page
  table_BM[b, t // C] at offset t % C. len_B >= 1. Table entries past the
  length, and tokens past it inside the last page, may hold any valid page id
  and any finite number; the kernel does not read them. Cost: B * len * K * H
  * 2 values read; with a window, len is at most that and a page.

  Args:
    impl: one of tiles.IMPLS, or None to choose by platform: see tiles.pick.
    scale: of q k^T; None for 1 / sqrt(H).
    softcap: scores s become softcap tanh(s / softcap); 0 for none.
    k_scale_KPC, v_scale_KPC: what int8 or float8 keys and values are
      multiplied by.
    window: the last tokens that a row sees, its newest included; 0 for all.
    config: a TuningConfig of the kernel (mosaic.TuningConfig for Mosaic's);
      None for the default.

  Returns:
    o_BNH in q's dtype; float32 inside.

  Raises:
    ValueError: shapes disagree, impl is unknown or not available, or config
      does not suit shapes or device.
  """
  shapes.check(q_BNH=q_BNH, k_KPCH=k_KPCH, table_BM=table_BM, len_B=len_B)
  shapes.check_kv(q_BNH, k_KPCH, v_KPCH, k_scale_KPC, v_scale_KPC)
  picked = tiles.pick(impl, call=(q_BNH, k_KPCH))
  op: Any = reference
  options: dict[str, Any] = {}
  if picked == 'cpu':
    op = cpu.attend_rows
  elif picked != 'xla':
    op = mosaic_kernel if picked.startswith('mosaic') else kernel
    options = dict(interpret=picked.endswith('interpret'), config=config)
  return op(q_BNH, k_KPCH, v_KPCH, table_BM, len_B,
            q_BNH.shape[-1]**-0.5 if scale is None else scale, softcap,
            window, k_scale_KPC, v_scale_KPC, **options)


def kernel(
    q_BNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    len_B: jax.Array, scale: float, softcap: float, window: int,
    k_scale_KPC: jax.Array | None, v_scale_KPC: jax.Array | None,
    interpret: bool = False, config: TuningConfig | None = None
) -> jax.Array:
  """The Pallas kernel, and what joins the splits (flash-decoding).

  A program has some query heads of one kv head, one row, and one split of
  the row's visible tokens: equal splits of its own length, whatever the
  other rows' lengths are.
  """
  B, N, H = q_BNH.shape
  K, _, C, _ = k_KPCH.shape
  limits = paged.device()
  if config is None:
    tokens = table_BM.shape[1] * C
    config = default(q_BNH, k_KPCH, min(window or tokens, tokens), limits)
  config.check(q_BNH, k_KPCH, limits)
  paged.check_heads(H, interpret)
  scales = () if k_scale_KPC is None else (k_scale_KPC, v_scale_KPC)
  splits, out = config.splits, [jax.ShapeDtypeStruct(q_BNH.shape, q_BNH.dtype)]
  if splits > 1:
    out = [jax.ShapeDtypeStruct((splits, *shape), jnp.float32)
           for shape in ((B, N, H), (B, N), (B, N))]
  blocks = -(-(N // K) // config.block_heads)
  parts = paged.call(
      functools.partial(_program, config, scale, softcap, window, N // K),
      (B, K * blocks, splits), out, config, interpret, 'decode_attention')(
          q_BNH, table_BM, len_B, k_KPCH, v_KPCH, *scales)
  return parts[0] if splits == 1 else join(*parts).astype(q_BNH.dtype)


def mosaic_default(q_BNH: Shaped, k_KPCH: Shaped,
                   tokens: int) -> 'mosaic.TuningConfig':
  """The tuned config of the Mosaic kernel, or its heuristic's."""
  from dsjax.kernels import mosaic
  limits = paged.device(tiles.HOPPER[0])
  return tuned.find(
      'mosaic_decode', shape_class(q_BNH, k_KPCH, tokens),
      mosaic.TuningConfig, lambda config: config.check(
          q_BNH.shape[2], k_KPCH.shape[2], limits)
  ) or mosaic.decode_heuristic(q_BNH, k_KPCH, tokens, limits)


def mosaic_kernel(
    q_BNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    len_B: jax.Array, scale: float, softcap: float, window: int, *_: object,
    interpret: bool = False, config: 'mosaic.TuningConfig | None' = None
) -> jax.Array:
  """The Mosaic kernel, and what joins the splits; none of int8 or float8."""
  from dsjax.kernels import mosaic  # not every JAX has it
  if config is None:
    tokens = table_BM.shape[1] * k_KPCH.shape[2]
    config = mosaic_default(q_BNH, k_KPCH, min(window or tokens, tokens))
  parts = mosaic.decode(q_BNH, k_KPCH, v_KPCH, table_BM, len_B, scale, softcap,
                        window, interpret, config)
  return join(*parts).astype(q_BNH.dtype) if len(parts) > 1 else parts[0]


def join(o_ZBNH: jax.Array, top_ZBN: jax.Array,
         total_ZBN: jax.Array) -> jax.Array:
  """One softmax of Z splits' sums, each relative to its own largest score."""
  weight_ZBN = jnp.exp2(top_ZBN - jnp.max(top_ZBN, 0, keepdims=True))
  return (jnp.sum(o_ZBNH * weight_ZBN[..., None], 0)
          / jnp.sum(total_ZBN * weight_ZBN, 0)[..., None])


def _program(config, scale, softcap, window, group, q_ref, table_ref, len_ref,
             *refs):
  count = 3 if config.splits > 1 else 1
  kv, (o_ref, *sums) = refs[:-count], refs[-count:]
  b, at, split = (pl.program_id(i) for i in range(3))
  blocks = pl.cdiv(group, config.block_heads)
  head, block = at // blocks, at % blocks
  row_R = block * config.block_heads + jnp.arange(config.block_heads)
  row_R = head * group + jnp.minimum(row_R, group - 1)
  dtype = paged.compute_dtype(q_ref.dtype, kv[0].dtype)
  stop = len_ref[b]
  start = jnp.maximum(stop - window, 0) if window else 0
  size = config.block_tokens
  each = pl.cdiv(pl.cdiv(stop - start, size), config.splits) * size
  start += split * each
  top_R, total_R, out = paged.attend(
      [q.astype(dtype) for q in paged.load(q_ref, b, row_R)], start,
      jnp.minimum(stop, start + each), None, (kv, head), (table_ref, b), size,
      scale, softcap)
  if not sums:
    paged.store(o_ref, [o / total_R[:, None] for o in out], b, row_R)
  else:
    paged.store(o_ref, out, split, b, row_R)
    for ref, x_R in zip(sums, (top_R, total_R), strict=True):
      ref[split, b, row_R] = x_R


def reference(q_BNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array,
              table_BM: jax.Array, len_B: jax.Array, scale: float,
              softcap: float, window: int, k_scale_KPC: jax.Array | None,
              v_scale_KPC: jax.Array | None) -> jax.Array:
  """The XLA reference: online softmax over tiles of pages.

  A loop whose trip count is the longest row's: one compiled program serves
  every context length, and a gathered tile stays in cache.
  """
  B, N, H = q_BNH.shape
  K = k_KPCH.shape[0]
  q_KBGH = q_BNH.reshape(B, K, N // K, H).swapaxes(0, 1)
  q_KBGH = q_KBGH.astype(jnp.float32) * scale
  if window:
    table_BM, skip_B = tiles.clip(table_BM, jnp.maximum(len_B - window, 0),
                                  window, k_KPCH.shape[2])
    len_B = len_B - skip_B

  def tile(start, width, table_Bm):
    k_KBTH = tiles.gather(k_KPCH, k_scale_KPC, table_Bm)
    v_KBTH = tiles.gather(v_KPCH, v_scale_KPC, table_Bm)
    s_KBGT = tiles.cap(jnp.einsum('kbgh,kbth->kbgt', q_KBGH, k_KBTH), softcap)
    t_T = start + jnp.arange(width)
    live_BT = t_T[None, :] < len_B[:, None]
    if window:
      live_BT &= t_T[None, :] >= len_B[:, None] - window
    return jnp.where(live_BT[None, :, None, :], s_KBGT, tiles.NEVER), v_KBTH

  def weigh(p_KBGT, v_KBTH):
    return jnp.einsum('kbgt,kbth->kbgh', p_KBGT, v_KBTH)

  o_KBGH = tiles.attend(tile, weigh, q_KBGH.shape, table_BM,
                        k_KPCH.shape[2], jnp.max(len_B), TILE)
  return o_KBGH.swapaxes(0, 1).reshape(B, N, H).astype(q_BNH.dtype)
