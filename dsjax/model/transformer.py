"""Decoders of every family that a ModelConfig describes.

One forward pass, and two steps that run it: decode and prefill.

Parameters are a plain tree, weights stored output-first: the config's
top_leaves, and its layer_leaves for each of `layers`. Layers are a tuple and
the loop over them is unrolled: a scan over stacked weights copies every
layer's weights each step on CPU.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dsjax.config.model import ModelConfig
from dsjax.kernels import shapes, tiles
from dsjax.kernels.decode_attention import decode_attention
from dsjax.kernels.kv_write import kv_write, rotary
from dsjax.kernels.prefill_attention import prefill_attention
from dsjax.model import kv_cache as kv
from dsjax.model import sampling, sharding
from dsjax.model.products import (
  INPUTS,
  QKV,
  UP_GATE,
  project,
  project_all,
  rows_of,
)

Params = Mapping[str, Any]  # a tree, or one layer's leaves, by name
Attend = Callable[..., jax.Array]
# How arrays are cut over heads: a layer's KV; [S, N, H] and [S, K, H]; not.
HELD, HEADS, REPLICATED = (PartitionSpec(sharding.AXIS),
                           PartitionSpec(None, sharding.AXIS), PartitionSpec())
ACTIVATIONS = {
    'silu': jax.nn.silu, 'relu': jax.nn.relu,
    'gelu': functools.partial(jax.nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True)}
# x_RI, w_EOI -> y_RO: rows in groups, one an expert.
BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    (((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,))


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


def rms_norm(x_SD: jax.Array, gain_D: jax.Array, eps: float) -> jax.Array:
  """RMSNorm over the last axis, in float32."""
  x32_SD = x_SD.astype(jnp.float32)
  scale_S1 = jax.lax.rsqrt(jnp.mean(x32_SD**2, -1, keepdims=True) + eps)
  return (x32_SD * scale_S1).astype(x_SD.dtype) * jnp.expand_dims(
      gain_D, range(x_SD.ndim - 1))


def layer_norm(x_SD: jax.Array, gain_D: jax.Array, bias_D: jax.Array,
               eps: float) -> jax.Array:
  """LayerNorm, in float32."""
  x32_SD = x_SD.astype(jnp.float32)
  x32_SD -= jnp.mean(x32_SD, -1, keepdims=True)
  return rms_norm(x32_SD, gain_D, eps).astype(x_SD.dtype) + bias_D[None, :]


def norm(config: ModelConfig, leaves: Params, name: str,
         x_SD: jax.Array) -> jax.Array:
  """The config's norm with the parameters of this name."""
  gain_D = leaves[f'{name}_D']
  if config.norm == 'layer':
    return layer_norm(x_SD, gain_D, leaves[f'{name}_bias_D'], config.norm_eps)
  return rms_norm(x_SD, gain_D, config.norm_eps)


def angles(config: ModelConfig, pos_S: jax.Array,
           window: int = 0) -> tuple[jax.Array, jax.Array]:
  """cos and sin of the rotary angles: [S, 1, H] each, float32.

  Where only R numbers of a head rotate, they are the first R/2 of each half:
  the weights are stored so. The others turn by nothing.
  """
  local = window and config.rope_local_base
  half = (config.rope_width or config.head_dim) // 2
  rate_h = (local or config.rope_base) ** (
      -jnp.arange(half, dtype=jnp.float32) / half)
  gain_h = jnp.ones(half)
  if not local:
    gain_h *= config.rope_gain
    if config.rope_divisors:
      rate_h /= jnp.array(config.rope_divisors, jnp.float32)
  angle_Sh = pos_S[:, None].astype(jnp.float32) * rate_h[None, :]

  def whole(value_Sh: jax.Array, still: float) -> jax.Array:
    value_Sh = jnp.pad(value_Sh * gain_h[None, :],
                       ((0, 0), (0, config.head_dim // 2 - half)),
                       constant_values=still)
    return jnp.concatenate((value_Sh, value_Sh), -1)[:, None, :]

  return whole(jnp.cos(angle_Sh), 1), whole(jnp.sin(angle_Sh), 0)


def qk_norm(config: ModelConfig, layer: Params, name: str,
            x_SNH: jax.Array) -> jax.Array:
  """RMSNorm of queries or keys, each head by itself or all together."""
  if not config.joint_norm:
    return rms_norm(x_SNH, layer[f'{name}_norm_H'], config.norm_eps)
  letter, heads = dict(q=('N', config.joint_norm[0]),
                       k=('K', config.joint_norm[1]))[name]
  x32_SNH = x_SNH.astype(jnp.float32)
  mean_S11 = jnp.sum(x32_SNH**2, (1, 2), keepdims=True) / (
      heads * config.head_dim)
  x32_SNH *= jax.lax.rsqrt(mean_S11 + config.norm_eps)
  return x32_SNH.astype(x_SNH.dtype) * layer[f'{name}_norm_{letter}H'][None]


def attention_inputs(
    config: ModelConfig, layer: Params, x_SD: jax.Array,
    turn: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries, keys and values of hidden states; turn: angles, or None.

  Keys are not rotated yet: that is done as they are written.
  """
  h_SD = norm(config, layer, 'attn_norm', x_SD) if config.pre_norms else x_SD
  q_SNH, k_SKH, v_SKH = project_all(layer, QKV, h_SD)
  if config.qkv_bias:
    q_SNH += layer['q_bias_NH'][None]
    k_SKH += layer['k_bias_KH'][None]
    v_SKH += layer['v_bias_KH'][None]
  if config.qk_norm:
    q_SNH = qk_norm(config, layer, 'q', q_SNH)
    k_SKH = qk_norm(config, layer, 'k', k_SKH)
  if turn is not None:
    q_SNH = rotary(q_SNH, *turn)
  return q_SNH, k_SKH, v_SKH


def feed_forward(config: ModelConfig, layer: Params,
                 h_SD: jax.Array) -> jax.Array:
  """down(act(gate h) * up h), or down(act(up h)) without a gate."""
  act = ACTIVATIONS[config.activation]

  def biased(leaf: str, y_SO: jax.Array) -> jax.Array:
    name, axes = leaf.split('_')
    return (y_SO + layer[f'{name}_bias_{axes[0]}'][None, :] if config.mlp_bias
            else y_SO)

  names = UP_GATE[:1 + config.gated]
  up_SF, *gate = map(biased, names, project_all(layer, names, h_SD))
  h_SF = act(gate[0]) * up_SF if gate else act(up_SF)
  return biased('down_DF', project(layer['down_DF'], h_SF))


def route(config: ModelConfig, router_ED: jax.Array,
          h_SD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Weights (float32) and numbers of each token's experts, A a token.

  The A best of softmax(router h) over all experts, summing to one where
  config.renormalize (Mixtral's softmax over the best is the same).
  """
  weight_SE = jax.nn.softmax(project(router_ED, h_SD).astype(jnp.float32))
  weight_SA, expert_SA = jax.lax.top_k(weight_SE, config.experts_per_token)
  if config.renormalize:
    weight_SA /= jnp.sum(weight_SA, -1, keepdims=True)
  return weight_SA, expert_SA


def run_experts(
    act: Callable[[jax.Array], jax.Array], first: jax.Array | int,
    gate_EFD: jax.Array, up_EFD: jax.Array, down_EDF: jax.Array,
    h_SD: jax.Array, weight_SA: jax.Array, expert_SA: jax.Array
) -> jax.Array:
  """sum_a weight_a expert_a(h) over those of experts first .. first + E - 1.

  Rows are sorted by expert, other experts' last (no group has them, so what
  the product gives for them is dropped). A token's terms are summed in its own
  order, whatever the batch.
  """
  E, A = gate_EFD.shape[0], expert_SA.shape[1]
  expert_R = expert_SA.reshape(-1) - first
  expert_R = jnp.where((expert_R >= 0) & (expert_R < E), expert_R, E)
  order_R = jnp.argsort(expert_R)
  size_E = jnp.sum(expert_R[:, None] == jnp.arange(E)[None, :], 0)

  def product(x_RI: jax.Array, w_EOI: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(x_RI, w_EOI, size_E, BY_EXPERT)

  h_RD = h_SD[order_R // A]
  y_RD = product(act(product(h_RD, gate_EFD)) * product(h_RD, up_EFD),
                 down_EDF)
  y_SAD = y_RD[jnp.argsort(order_R)].reshape(*expert_SA.shape, -1)
  mine_SA1 = (expert_R < E).reshape(*expert_SA.shape, 1)
  y_SAD = jnp.where(mine_SA1, y_SAD * weight_SA[:, :, None], 0)
  return jnp.sum(y_SAD, 1)  # float32, as the weights


def experts(config: ModelConfig, layer: Params, h_SD: jax.Array,
            mesh: Mesh | None = None) -> jax.Array:
  """The experts' weighted sum; over a mesh each shard runs its own ones."""
  act = ACTIVATIONS[config.activation]
  weights = layer['gate_EFD'], layer['up_EFD'], layer['down_EDF']
  rows = h_SD, *route(config, layer['router_ED'], h_SD)
  if mesh is None or mesh.shape[sharding.AXIS] == 1:
    return run_experts(act, 0, *weights, *rows).astype(h_SD.dtype)

  def shard(weights, rows):
    first = jax.lax.axis_index(sharding.AXIS) * weights[0].shape[0]
    return jax.lax.psum(run_experts(act, first, *weights, *rows),
                        sharding.AXIS)

  y_SD = jax.shard_map(
      shard, mesh=mesh, in_specs=(PartitionSpec(sharding.AXIS),
                                  PartitionSpec()),
      out_specs=PartitionSpec())(weights, rows)
  return y_SD.astype(h_SD.dtype)


def embed(config: ModelConfig, params: Params, token_S: jax.Array,
          pos_S: jax.Array) -> jax.Array:
  """Hidden states before the first layer."""
  x_SD = rows_of(params['embed_VD'], token_S) * config.embed_scale
  if config.positions == 'learned':
    x_SD += params['pos_TD'][pos_S]
  return x_SD


def run_layers(
    config: ModelConfig, layers: Sequence[Params], first: int,
    cache: kv.Cache, x_SD: jax.Array, pos_S: jax.Array, page_S: jax.Array,
    attend: Attend, mesh: Mesh | None = None, impl: str | None = None
) -> tuple[jax.Array, kv.Cache]:
  """Hidden states after `layers`, the ones from layer `first` on.

  attend(layer, q_SNH, *held) -> o_SNH, held being what by_layer gives of the
  layer, is the only thing in which prefill and decode differ; it may ask for
  the window of `layer`, and layers of a kind may all come as one of them.
  cache holds just these layers.
  page_S: the page of each token, P to drop it.

  Args:
    mesh: what parameters are sharded over; None for no mesh.
    impl: of attention; kv_write's is what `tiles.portable` makes of it.

  Returns:
    (x_SD, cache).
  """
  kinds = {config.kind(first + i) for i in range(len(layers))}
  turns = {(window, rotates): angles(config, pos_S, window) if rotates else None
           for window, rotates in kinds}
  offset_S = pos_S % cache.k_KPCH[0].shape[2]
  write = sharding.shard_map(
      mesh, functools.partial(kv_write, impl=tiles.portable(impl)),
      (HELD, HEADS, HEADS, REPLICATED, REPLICATED, REPLICATED), HELD)

  def add(layer: Params, part: str, x_SD: jax.Array, y_SD: jax.Array
          ) -> jax.Array:
    if config.post_norms:
      y_SD = norm(config, layer, f'{part}_post_norm', y_SD)
    return x_SD + y_SD * config.residual_scale

  # Traced and lowered once for all layers alike.
  @functools.partial(jax.jit, static_argnames='like')
  def block(x_SD, layer, held, like):
    turn = turns[config.kind(like)]
    q_SNH, k_SKH, v_SKH = attention_inputs(config, layer, x_SD, turn)
    held = write(held, k_SKH, v_SKH, page_S, offset_S, turn)
    o_SNH = attend(like, q_SNH, *held)
    y_SD = project(layer['o_DNH'], o_SNH.reshape(o_SNH.shape[0], -1),
                   INPUTS['o_DNH'])
    if config.out_bias:
      y_SD += layer['o_bias_D'][None, :]
    attended_SD = add(layer, 'attn', x_SD, y_SD)
    h_SD = x_SD if config.parallel else attended_SD
    if config.pre_norms:
      h_SD = norm(config, layer, 'mlp_norm', h_SD)
    y_SD = (experts(config, layer, h_SD, mesh) if config.num_experts
            else feed_forward(config, layer, h_SD))
    return add(layer, 'mlp', attended_SD, y_SD), held

  alike, written = {}, []
  for i, (layer, held) in enumerate(
      zip(layers, kv.by_layer(cache), strict=True), first):
    like = alike.setdefault(config.kind(i), i)
    x_SD, held = block(x_SD, layer, held, like)
    written.append(held)
  return x_SD, kv.from_layers(written)


def head(config: ModelConfig, params: Params, x_RD: jax.Array) -> jax.Array:
  """Logits of hidden states, float32; -inf for rows that pad V."""
  x_RD = norm(config, params, 'norm', x_RD)
  head_VD = params['embed_VD'] if config.tied else params['head_VD']
  logits_RV = project(head_VD, x_RD).astype(jnp.float32) * config.logit_scale
  logits_RV = tiles.cap(logits_RV, config.logit_softcap)
  if head_VD.shape[0] == config.vocab_size:
    return logits_RV
  real_V = jnp.arange(head_VD.shape[0]) < config.vocab_size
  return jnp.where(real_V[None, :], logits_RV, -jnp.inf)


def attention(op: Callable[..., jax.Array], config: ModelConfig,
              impl: str | None, mesh: Mesh | None,
              *where: jax.Array) -> Attend:
  """run_layers' attend: op on every shard's heads.

  where: what op takes after keys and values.
  """
  def attend(layer: int, q_SNH: jax.Array, *held: jax.Array) -> jax.Array:
    def on_shard(q_SNH, held, *where):
      k_KPCH, v_KPCH, *scales = held
      k_scale_KPC, v_scale_KPC = scales or (None, None)
      return op(q_SNH, k_KPCH, v_KPCH, *where, impl, scale=config.attn_scale,
                softcap=config.attn_softcap, window=config.window(layer),
                k_scale_KPC=k_scale_KPC, v_scale_KPC=v_scale_KPC)

    return sharding.shard_map(
        mesh, on_shard, (HEADS, HELD, *(REPLICATED for _ in where)), HEADS)(
            q_SNH, held, *where)

  return attend


def page_of(table_BM: jax.Array, row_S: jax.Array, pos_S: jax.Array,
            live_S: jax.Array, page_size: int, num_pages: int) -> jax.Array:
  """The page of position pos_S of row row_S; num_pages where not live."""
  page_S = table_BM[row_S, pos_S // page_size]
  return jnp.where(live_S, page_S, num_pages)


class _Tokens(NamedTuple):
  """The S tokens of a step: decode rows, prompt chunks, or both.

  page_S: where the key and value of each go, P for nowhere. attend: as
  run_layers takes it. read(slots) gives the tokens themselves. rows: the
  decode rows among them, which come first, or None. samples(slots) gives
  row_R, slot_R and pos_R: after which of the S to sample (None: after each),
  and the slots and positions that the samples are written to.
  """

  pos_S: jax.Array
  page_S: jax.Array
  attend: Attend
  read: Callable[[sampling.Slots], jax.Array]
  rows: Rows | None
  samples: Callable[[sampling.Slots], tuple[Any, jax.Array, jax.Array]]


def _of_rows(config: ModelConfig, cache: kv.Cache, rows: Rows,
             impl: str | None, mesh: Mesh | None) -> _Tokens:
  """One token of each decode row."""
  shapes.check(pos_B=rows.pos_B, slot_B=rows.slot_B, live_B=rows.live_B,
               table_BM=rows.table_BM)
  _, P, C, _ = cache.k_KPCH[0].shape
  page_B = page_of(rows.table_BM, jnp.arange(rows.pos_B.shape[0]), rows.pos_B,
                   rows.live_B, C, P)

  def read(slots: sampling.Slots) -> jax.Array:
    return slots.tokens_ET[rows.slot_B, rows.pos_B]

  def samples(slots: sampling.Slots) -> tuple[None, jax.Array, jax.Array]:
    unused = slots.tokens_ET.shape[0]
    return (None, jnp.where(rows.live_B, rows.slot_B, unused), rows.pos_B + 1)

  attend = attention(decode_attention, config, impl, mesh, rows.table_BM,
                     rows.pos_B + 1)
  return _Tokens(rows.pos_B, page_B, attend, read, rows, samples)


def _of_prompts(config: ModelConfig, cache: kv.Cache, packed: Packed,
                size: int, impl: str | None, mesh: Mesh | None) -> _Tokens:
  """The packed tokens of prompt chunks, and padding up to `size`."""
  shapes.check(pos_B=packed.pos_B, slot_B=packed.slot_B,
               sample_B=packed.sample_B, table_BM=packed.table_BM)
  _, P, C, _ = cache.k_KPCH[0].shape
  at_S = jnp.arange(size)
  seq_S = jnp.minimum(jnp.searchsorted(packed.start_A[1:], at_S, side='right'),
                      packed.pos_B.shape[0] - 1)
  live_S = at_S < packed.start_A[-1]
  pos_S = packed.pos_B[seq_S] + at_S - packed.start_A[seq_S]
  pos_S = jnp.where(live_S, pos_S, 0)
  page_S = page_of(packed.table_BM, seq_S, pos_S, live_S, C, P)

  def read(slots: sampling.Slots) -> jax.Array:
    return slots.tokens_ET[packed.slot_B[seq_S], pos_S]

  def samples(slots: sampling.Slots) -> tuple[jax.Array, jax.Array, jax.Array]:
    end_B, unused = packed.start_A[1:], slots.tokens_ET.shape[0]
    return (jnp.maximum(end_B - 1, 0),
            jnp.where(packed.sample_B, packed.slot_B, unused),
            packed.pos_B + end_B - packed.start_A[:-1])

  attend = attention(prefill_attention, config, impl, mesh, packed.table_BM,
                     packed.start_A, packed.pos_B)
  return _Tokens(pos_S, page_S, attend, read, None, samples)


def _beside(decoded: _Tokens, prompts: _Tokens) -> _Tokens:
  """Decode rows and then prompt chunks, in one token axis."""
  B = decoded.pos_S.shape[0]

  def join(rows: jax.Array, chunks: jax.Array) -> jax.Array:
    return jnp.concatenate((rows, chunks))

  def attend(layer: int, q_SNH: jax.Array, *held: jax.Array) -> jax.Array:
    return join(decoded.attend(layer, q_SNH[:B], *held),
                prompts.attend(layer, q_SNH[B:], *held))

  def read(slots: sampling.Slots) -> jax.Array:
    return join(decoded.read(slots), prompts.read(slots))

  def samples(slots: sampling.Slots) -> tuple[jax.Array, jax.Array, jax.Array]:
    _, *written = decoded.samples(slots)
    row_R, *others = prompts.samples(slots)
    slot_R, pos_R = map(join, written, others)
    return join(jnp.arange(B), B + row_R), slot_R, pos_R

  return _Tokens(join(decoded.pos_S, prompts.pos_S),
                 join(decoded.page_S, prompts.page_S), attend, read,
                 decoded.rows, samples)


def _step(config: ModelConfig, params: Params, cache: kv.Cache,
          slots: sampling.Slots, tokens: _Tokens, need: jax.Array | int,
          impl: str | None, mesh: Mesh | None, span: tuple[int, int] | None,
          x_SD: jax.Array | None) -> tuple[Any, ...]:
  """Runs the tokens through a stage, and samples behind the last one."""
  first, last = span or (0, config.num_layers)
  if x_SD is None:
    x_SD = embed(config, params, tokens.read(slots), tokens.pos_S)
  x_SD, cache = run_layers(config, params['layers'], first, cache, x_SD,
                           tokens.pos_S, tokens.page_S, tokens.attend, mesh,
                           impl)
  if last < config.num_layers:
    return cache, x_SD
  row_R, slot_R, pos_R = tokens.samples(slots)
  x_RD = x_SD if row_R is None else x_SD[row_R]
  slots, out = sampling.sample(head(config, params, x_RD), slots, slot_R,
                               pos_R, need)
  rows = tokens.rows
  if rows is not None:
    rows = dataclasses.replace(rows, pos_B=rows.pos_B + 1)
  return cache, slots, rows, out


def decode_step(
    config: ModelConfig, params: Params, cache: kv.Cache,
    slots: sampling.Slots, rows: Rows, need: jax.Array | int,
    impl: str | None = None, mesh: Mesh | None = None,
    span: tuple[int, int] | None = None, x_BD: jax.Array | None = None
) -> tuple[Any, ...]:
  """One token for every row.

  Args:
    need: the highest sampling.mode of the rows.
    impl: of attention. mesh: what params are sharded over.
    span: layers [first, last) of a pipeline stage that params and cache hold;
      None for all. x_BD: what the stage before returned; None in the first.

  Returns:
    (cache, slots, rows one position on, Sampled): feed the rows back for the
    next step without the host. From a stage that is not the last: (cache,
    x_BD); it needs no slots unless it is the first.
  """
  tokens = _of_rows(config, cache, rows, impl, mesh)
  return _step(config, params, cache, slots, tokens, need, impl, mesh, span,
               x_BD)


def prefill_step(
    config: ModelConfig, params: Params, cache: kv.Cache,
    slots: sampling.Slots, packed: Packed, size: int, need: jax.Array | int,
    rows: Rows | None = None, impl: str | None = None,
    mesh: Mesh | None = None, span: tuple[int, int] | None = None,
    x_SD: jax.Array | None = None
) -> tuple[Any, ...]:
  """Runs packed prompt chunks, and with `rows` one decode token each too.

  size: tokens of the packed axis (S, static). With rows (the chunked mode)
  their tokens and the prompt's share every weight read. The other arguments
  are those of decode_step.

  Returns:
    (cache, slots, rows one position on or None, Sampled): R = rows first,
    then one entry a sequence, garbage where sample_B is False. From a stage
    that is not the last: (cache, x_SD).
  """
  tokens = _of_prompts(config, cache, packed, size, impl, mesh)
  if rows is not None:
    tokens = _beside(_of_rows(config, cache, rows, impl, mesh), tokens)
  return _step(config, params, cache, slots, tokens, need, impl, mesh, span,
               x_SD)
