"""Attention of one new token a row over its paged KV."""

import jax.numpy as jnp

from dsjax.kernels import shapes, tiles

TILE = 48  # tokens a tile: few tiles, a small overshoot of the longest row


def decode_attention(q_BNH, k_KPCH, v_KPCH, table_BM, len_B, impl=None, *,
                     scale=None, softcap=0.0, window=0,
                     k_scale_KPC=None, v_scale_KPC=None):
  """Softmax(scale q k^T) v over the first len_B tokens of each row.

  Query head n reads kv head n // G, G = N // K. Token t of row b lies in page
  table_BM[b, t // C] at offset t % C. len_B >= 1. Table entries past the
  length, and tokens past it inside the last page, may hold any valid page id
  and any finite number. Cost: B * len * K * H * 2 values read; with a window,
  len is at most that and a page.

  Args:
    impl: 'xla', or None to choose by platform.
    scale: of q k^T; None for 1 / sqrt(H).
    softcap: scores s become softcap tanh(s / softcap); 0 for none.
    k_scale_KPC, v_scale_KPC: what int8 keys and values are multiplied by.
    window: the last tokens that a row sees, its newest included; 0 for all.

  Returns:
    o_BNH in q's dtype; float32 inside.

  Raises:
    ValueError: shapes disagree, or impl is unknown.
  """
  shapes.check(q_BNH=q_BNH, k_KPCH=k_KPCH, table_BM=table_BM, len_B=len_B)
  shapes.check(k_KPCH=k_KPCH, v_KPCH=v_KPCH)
  if k_scale_KPC is not None:
    shapes.check(k_KPCH=k_KPCH, k_scale_KPC=k_scale_KPC,
                 v_scale_KPC=v_scale_KPC)
  return tiles.pick(impl, {'xla': reference})(
      q_BNH, k_KPCH, v_KPCH, table_BM, len_B,
      q_BNH.shape[-1]**-0.5 if scale is None else scale, softcap, window,
      k_scale_KPC, v_scale_KPC)


def reference(q_BNH, k_KPCH, v_KPCH, table_BM, len_B, scale, softcap, window,
              k_scale_KPC, v_scale_KPC):
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
