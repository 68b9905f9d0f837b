"""Attention of one new token a row over its paged KV."""

import jax.numpy as jnp

from dsjax.kernels import shapes, tiles

TILE = 48  # tokens a tile: few tiles, a small overshoot of the longest row


def decode_attention(q_BNH, k_KPCH, v_KPCH, table_BM, len_B, impl=None):
  """Softmax(q k^T / sqrt(H)) v over the first len_B tokens of each row.

  Query head n reads kv head n // G, G = N // K. Token t of row b lies in page
  table_BM[b, t // C] at offset t % C. len_B >= 1. Table entries past the
  length, and tokens past it inside the last page, may hold any valid page id
  and any finite number. Cost: B * len * K * H * 2 values read.

  Args:
    impl: 'xla', or None to choose by platform.

  Returns:
    o_BNH in q's dtype; float32 inside.

  Raises:
    ValueError: shapes disagree, or impl is unknown.
  """
  shapes.check(q_BNH=q_BNH, k_KPCH=k_KPCH, table_BM=table_BM, len_B=len_B)
  shapes.check(k_KPCH=k_KPCH, v_KPCH=v_KPCH)
  return tiles.pick(impl, {'xla': reference})(
      q_BNH, k_KPCH, v_KPCH, table_BM, len_B)


def reference(q_BNH, k_KPCH, v_KPCH, table_BM, len_B):
  """The XLA reference: online softmax over tiles of pages.

  A loop whose trip count is the longest row's: one compiled program serves
  every context length, and a gathered tile stays in cache.
  """
  B, N, H = q_BNH.shape
  K = k_KPCH.shape[0]
  q_KBGH = q_BNH.reshape(B, K, N // K, H).swapaxes(0, 1)
  q_KBGH = q_KBGH.astype(jnp.float32) * H**-0.5

  def tile(start, width, table_Bm):
    k_KBTH, v_KBTH = (tiles.gather(x, table_Bm) for x in (k_KPCH, v_KPCH))
    s_KBGT = jnp.einsum('kbgh,kbth->kbgt', q_KBGH, k_KBTH)
    t_T = start + jnp.arange(width)
    live_BT = t_T[None, :] < len_B[:, None]
    return jnp.where(live_BT[None, :, None, :], s_KBGT, tiles.NEVER), v_KBTH

  def weigh(p_KBGT, v_KBTH):
    return jnp.einsum('kbgt,kbth->kbgh', p_KBGT, v_KBTH)

  o_KBGH = tiles.attend(tile, weigh, q_KBGH.shape, table_BM,
                        k_KPCH.shape[2], jnp.max(len_B), TILE)
  return o_KBGH.swapaxes(0, 1).reshape(B, N, H).astype(q_BNH.dtype)
