"""Causal attention of packed prompt chunks over their paged KV."""

import jax
import jax.numpy as jnp

from dsjax.kernels import shapes, tiles

BLOCK = 64  # queries a block
TILE = 128  # keys a tile


def prefill_attention(q_SNH, k_KPCH, v_KPCH, table_BM, start_A, pos_B,
                      impl=None, *, scale=None, softcap=0.0, window=0,
                      k_scale_KPC=None, v_scale_KPC=None):
  """Each query attends to its sequence's tokens up to its own position.

  o = softmax(scale q k^T) v. Sequence b's queries are
  q_SNH[start_A[b]:start_A[b + 1]] (A = B + 1), at positions pos_B[b],
  pos_B[b] + 1, ...; its keys and values, these tokens' included, are already
  in the pages of table_BM[b]. Earlier context (a prefix, earlier chunks) is
  whatever the pages hold before pos_B. Packed tokens past start_A[B] come
  back as garbage.

  Args:
    impl: 'xla', or None to choose by platform.
    scale: of q k^T; None for 1 / sqrt(H).
    softcap: scores s become softcap tanh(s / softcap); 0 for none.
    k_scale_KPC, v_scale_KPC: what int8 keys and values are multiplied by.
    window: a query at position p sees p - window + 1 to p; 0 for all. A
      block of queries reads nothing before its first one's window.

  Returns:
    o_SNH in q's dtype; float32 inside.

  Raises:
    ValueError: shapes disagree, or impl is unknown.
  """
  shapes.check(q_SNH=q_SNH, k_KPCH=k_KPCH, table_BM=table_BM, pos_B=pos_B)
  shapes.check(k_KPCH=k_KPCH, v_KPCH=v_KPCH, start_A=start_A)
  if start_A.shape[0] != pos_B.shape[0] + 1:
    raise ValueError(f'start_A: A must be B + 1 = {pos_B.shape[0] + 1}')
  if k_scale_KPC is not None:
    shapes.check(k_KPCH=k_KPCH, k_scale_KPC=k_scale_KPC,
                 v_scale_KPC=v_scale_KPC)
  return tiles.pick(impl, {'xla': reference})(
      q_SNH, k_KPCH, v_KPCH, table_BM, start_A, pos_B,
      q_SNH.shape[-1]**-0.5 if scale is None else scale, softcap, window,
      k_scale_KPC, v_scale_KPC)


def reference(q_SNH, k_KPCH, v_KPCH, table_BM, start_A, pos_B, scale, softcap,
              window, k_scale_KPC, v_scale_KPC):
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
