"""A llama-architecture decoder: one forward, two step functions.

Parameters are a plain tree, weights stored output-first:
  embed_VD, norm_D, head_VD (absent when tied), and for each of `layers`:
  attn_norm_D, q_NHD, k_KHD, v_KHD, o_DNH, mlp_norm_D, gate_FD, up_FD, down_DF.
Layers are a tuple and the loop over them is unrolled: a scan over stacked
weights copies every layer's weights each step on CPU.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from dsjax import cache as kv
from dsjax import sampling
from dsjax.kernels import shapes
from dsjax.kernels.decode_attention import decode_attention
from dsjax.kernels.prefill_attention import prefill_attention

SMALL = 16  # tokens up to which a product reads W first


@flax.struct.dataclass
class Packed:
  """Prompt chunks packed in one token axis (S), B sequences, A = B + 1.

  Sequence b's tokens are packed [start_A[b], start_A[b + 1]), positions from
  pos_B[b], read from slot slot_B[b]. sample_B: write the token after the
  chunk (its last chunk). Tokens past start_A[B] are padding.
  """

  start_A: jax.Array
  pos_B: jax.Array
  slot_B: jax.Array
  sample_B: jax.Array
  table_BM: jax.Array


@flax.struct.dataclass
class Rows:
  """A decode batch: row b's input token is at pos_B[b] of slot slot_B[b].

  Padding rows have live_B False.
  """

  pos_B: jax.Array
  slot_B: jax.Array
  live_B: jax.Array
  table_BM: jax.Array


def abstract_params(config, dtype=jnp.float32):
  """The parameter tree as ShapeDtypeStructs: for sharding and checks."""
  def tree(leaves):
    return {leaf: jax.ShapeDtypeStruct(config.leaf_shape(leaf), dtype)
            for leaf in leaves}

  return tree(config.top_leaves) | {'layers': tuple(
      tree(config.layer_leaves) for _ in range(config.num_layers))}


def project(w_O__I, x_SI):
  """x W^T for a weight stored output-first, any number of output axes.

  Up to SMALL tokens the weight is the left operand: 1.7 times faster on CPU,
  which then streams W instead of repacking it.
  """
  *out, inner = w_O__I.shape
  w_OI = w_O__I.reshape(-1, inner)
  if x_SI.shape[0] <= SMALL:
    y_SO = jax.lax.dot_general(w_OI, x_SI, (((1,), (1,)), ((), ()))).T
  else:
    y_SO = jax.lax.dot_general(x_SI, w_OI, (((1,), (1,)), ((), ())))
  return y_SO.reshape(x_SI.shape[0], *out)


def rms_norm(x_SD, gain_D, eps):
  """RMSNorm in float32."""
  x32_SD = x_SD.astype(jnp.float32)
  scale_S1 = jax.lax.rsqrt(jnp.mean(x32_SD**2, -1, keepdims=True) + eps)
  return (x32_SD * scale_S1).astype(x_SD.dtype) * gain_D[None, :]


def rotary(x_SNH, cos_S1H, sin_S1H):
  """Rotates pairs (h, h + H/2) by the position's angles."""
  left, right = jnp.split(x_SNH.astype(jnp.float32), 2, -1)
  turned = jnp.concatenate((-right, left), -1)
  return (x_SNH * cos_S1H + turned * sin_S1H).astype(x_SNH.dtype)


def angles(config, pos_S):
  """cos and sin of the rotary angles: [S, 1, H] each, float32."""
  half = config.head_dim // 2
  rate_h = config.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_Sh = pos_S[:, None].astype(jnp.float32) * rate_h[None, :]
  angle_S1H = jnp.concatenate((angle_Sh, angle_Sh), -1)[:, None, :]
  return jnp.cos(angle_S1H), jnp.sin(angle_S1H)


def embed(config, params, token_S, pos_S):
  """Hidden states before the first layer."""
  del config, pos_S
  return params['embed_VD'][token_S]


def run_layers(config, layers, first, cache, x_SD, pos_S, page_S, attend,
               mesh=None):
  """Hidden states after `layers`, the ones from layer `first` on.

  attend(layer, q_SNH, k_KPCH, v_KPCH) -> o_SNH is the only thing in which
  prefill and decode differ; it may ask for the window of `layer`, and layers
  of equal windows may all come as one of them. cache holds just these layers.
  page_S: the page of each token, P to drop it.

  Args:
    mesh: what parameters are sharded over; None where they are whole.

  Returns:
    (x_SD, cache).
  """
  del mesh
  turn = angles(config, pos_S)
  offset_S = pos_S % cache.k_KPCH[0].shape[2]

  # Traced and lowered once for all layers alike.
  @functools.partial(jax.jit, static_argnames='like')
  def block(x_SD, layer, k_KPCH, v_KPCH, like):
    h_SD = rms_norm(x_SD, layer['attn_norm_D'], config.norm_eps)
    q_SNH = rotary(project(layer['q_NHD'], h_SD), *turn)
    k_SKH = rotary(project(layer['k_KHD'], h_SD), *turn)
    k_KPCH = kv.write(k_KPCH, k_SKH, page_S, offset_S)
    v_KPCH = kv.write(v_KPCH, project(layer['v_KHD'], h_SD), page_S, offset_S)
    o_SNH = attend(like, q_SNH, k_KPCH, v_KPCH)
    o_DI = layer['o_DNH'].reshape(config.d_model, -1)
    x_SD += project(o_DI, o_SNH.reshape(o_SNH.shape[0], -1))
    h_SD = rms_norm(x_SD, layer['mlp_norm_D'], config.norm_eps)
    h_SF = jax.nn.silu(project(layer['gate_FD'], h_SD)) * project(
        layer['up_FD'], h_SD)
    return x_SD + project(layer['down_DF'], h_SF), k_KPCH, v_KPCH

  alike, keys, values = {}, [], []
  for i, (layer, k_KPCH, v_KPCH) in enumerate(
      zip(layers, cache.k_KPCH, cache.v_KPCH, strict=True), first):
    like = alike.setdefault(config.window(i), i)
    x_SD, k_KPCH, v_KPCH = block(x_SD, layer, k_KPCH, v_KPCH, like)
    keys.append(k_KPCH)
    values.append(v_KPCH)
  return x_SD, kv.Cache(tuple(keys), tuple(values))


def forward(config, params, cache, token_S, pos_S, page_S, attend, mesh=None):
  """embed, then run_layers over all of them: (x_SD before the head, cache)."""
  x_SD = embed(config, params, token_S, pos_S)
  return run_layers(config, params['layers'], 0, cache, x_SD, pos_S, page_S,
                    attend, mesh)


def head(config, params, x_RD):
  """Logits of hidden states, float32."""
  x_RD = rms_norm(x_RD, params['norm_D'], config.norm_eps)
  return project(params.get('head_VD', params['embed_VD']),
                 x_RD).astype(jnp.float32)


def page_of(table_BM, row_S, pos_S, live_S, page_size, num_pages):
  """The page of position pos_S of row row_S; num_pages where not live."""
  page_S = table_BM[row_S, pos_S // page_size]
  return jnp.where(live_S, page_S, num_pages)


def decode_step(config, params, cache, slots, rows, need, impl=None,
                mesh=None):
  """One token for every row.

  Returns:
    (cache, slots, rows one position on, Sampled): feed the rows back for the
    next step without the host.
  """
  shapes.check(pos_B=rows.pos_B, slot_B=rows.slot_B, live_B=rows.live_B,
               table_BM=rows.table_BM)
  _, P, C, _ = cache.k_KPCH[0].shape
  token_B, page_B = _row_inputs(slots, rows, P, C)
  x_BD, cache = forward(
      config, params, cache, token_B, rows.pos_B, page_B,
      lambda _, q, k, v: decode_attention(q, k, v, rows.table_BM,
                                          rows.pos_B + 1, impl), mesh)
  slots, out = sampling.sample(
      head(config, params, x_BD), slots, _slot(slots, rows), rows.pos_B + 1,
      need)
  return cache, slots, rows.replace(pos_B=rows.pos_B + 1), out


def prefill_step(config, params, cache, slots, packed, size, need, rows=None,
                 impl=None, mesh=None):
  """Runs packed prompt chunks, and with `rows` one decode token each too.

  size: tokens of the packed axis (S, static). With rows (the chunked mode)
  their tokens and the prompt's share every weight read.

  Returns:
    (cache, slots, rows one position on or None, Sampled): R = rows first,
    then one entry a sequence, garbage where sample_B is False.
  """
  shapes.check(pos_B=packed.pos_B, slot_B=packed.slot_B,
               sample_B=packed.sample_B, table_BM=packed.table_BM)
  _, P, C, _ = cache.k_KPCH[0].shape
  num_slots = slots.tokens_ET.shape[0]
  at_S = jnp.arange(size)
  seq_S = jnp.minimum(jnp.searchsorted(packed.start_A[1:], at_S, side='right'),
                      packed.pos_B.shape[0] - 1)
  live_S = at_S < packed.start_A[-1]
  pos_S = packed.pos_B[seq_S] + at_S - packed.start_A[seq_S]
  pos_S = jnp.where(live_S, pos_S, 0)
  token_S = slots.tokens_ET[packed.slot_B[seq_S], pos_S]
  page_S = page_of(packed.table_BM, seq_S, pos_S, live_S, C, P)

  def attend(layer, q_SNH, k_KPCH, v_KPCH):
    del layer
    return prefill_attention(q_SNH, k_KPCH, v_KPCH, packed.table_BM,
                             packed.start_A, packed.pos_B, impl)

  B = 0
  if rows is not None:
    B = rows.pos_B.shape[0]
    token_B, page_B = _row_inputs(slots, rows, P, C)
    token_S = jnp.concatenate((token_B, token_S))
    pos_S = jnp.concatenate((rows.pos_B, pos_S))
    page_S = jnp.concatenate((page_B, page_S))
    attend_packed = attend

    def attend(layer, q_SNH, k_KPCH, v_KPCH):
      o_BNH = decode_attention(q_SNH[:B], k_KPCH, v_KPCH, rows.table_BM,
                               rows.pos_B + 1, impl)
      o_SNH = attend_packed(layer, q_SNH[B:], k_KPCH, v_KPCH)
      return jnp.concatenate((o_BNH, o_SNH))

  x_SD, cache = forward(config, params, cache, token_S, pos_S, page_S, attend,
                        mesh)
  end_B = packed.start_A[1:]
  row_R = B + jnp.maximum(end_B - 1, 0)
  slot_R = jnp.where(packed.sample_B, packed.slot_B, num_slots)
  pos_R = packed.pos_B + end_B - packed.start_A[:-1]
  if rows is not None:
    row_R = jnp.concatenate((jnp.arange(B), row_R))
    slot_R = jnp.concatenate((_slot(slots, rows), slot_R))
    pos_R = jnp.concatenate((rows.pos_B + 1, pos_R))
    rows = rows.replace(pos_B=rows.pos_B + 1)
  slots, out = sampling.sample(head(config, params, x_SD[row_R]), slots,
                               slot_R, pos_R, need)
  return cache, slots, rows, out


def _row_inputs(slots, rows, num_pages, page_size):
  token_B = slots.tokens_ET[rows.slot_B, rows.pos_B]
  page_B = page_of(rows.table_BM, jnp.arange(rows.pos_B.shape[0]), rows.pos_B,
                   rows.live_B, page_size, num_pages)
  return token_B, page_B


def _slot(slots, rows):
  """The slot a row writes to: no one's for padding."""
  return jnp.where(rows.live_B, rows.slot_B, slots.tokens_ET.shape[0])
