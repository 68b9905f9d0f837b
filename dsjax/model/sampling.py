"""Logits to tokens, with every request's own parameters, on the device.

An instance keeps a Slot for each request that it runs: its tokens so far and
its sampling parameters. A step reads its input token from the slot and
writes the token it samples back, so tokens feed the next step without
visiting the host.

The random draw at a position folds (seed, position) and nothing else: batch,
slot, instance and mesh never change a token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config.request import (
  MAX_LOGIT_BIAS,
  MAX_LOGPROBS,
  MAX_STOP_TOKENS,
  Sampling,
)
from dsjax.kernels import shapes

GREEDY, RANDOM, FULL = 0, 1, 2  # what a batch needs; see `mode`
MAX_ENDS = MAX_STOP_TOKENS + 16  # and a model's own EOS ids
COLD = 1e-5  # a temperature below is greedy: dividing by it overflows


@flax.struct.dataclass
class Slots:
  """Per-request state on an instance: E slots, T tokens, A logit biases, C
  tokens that end it."""

  tokens_ET: jax.Array  # prompt and output so far; garbage beyond
  prompt_E: jax.Array  # prompt length
  seed_E: jax.Array
  top_k_E: jax.Array
  temperature_E: jax.Array
  top_p_E: jax.Array
  min_p_E: jax.Array
  repetition_E: jax.Array
  presence_E: jax.Array
  frequency_E: jax.Array
  bias_id_EA: jax.Array  # V where unused
  bias_EA: jax.Array
  min_tokens_E: jax.Array
  end_id_EC: jax.Array  # not before min_tokens; V where unused


@flax.struct.dataclass
class Sampled:
  """One step's output: R rows; A = MAX_LOGPROBS.

  Log-probabilities are of the raw logits; zero unless the mode is FULL.
  """

  token_R: jax.Array
  logprob_R: jax.Array
  top_id_RA: jax.Array
  top_logprob_RA: jax.Array


def init(num_slots: int, max_len: int, vocab_size: int) -> Slots:
  """Unused slots of max_len + 1 tokens: the last step may overshoot by one."""
  row = slot_row((), 0, Sampling(), max_len, vocab_size)
  return jax.tree.map(
      lambda x: jnp.tile(x, (num_slots,) + (1,) * (x.ndim - 1)), row)


def slot_row(tokens: Sequence[int], prompt_len: int, params: Sampling,
             max_len: int, vocab_size: int, eos_ids: Sequence[int] = ()
             ) -> Slots:
  """A Slots of one row, in numpy, for a request with these tokens so far."""
  row_T = np.zeros(max_len + 1, np.int32)
  row_T[:len(tokens)] = tokens
  bias_id_A = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
  bias_A = np.zeros(MAX_LOGIT_BIAS, np.float32)
  for i, (token, value) in enumerate(params.logit_bias):
    bias_id_A[i], bias_A[i] = token, value
  end_id_C = np.full(MAX_ENDS, vocab_size, np.int32)
  ends = (*params.stop_token_ids, *(() if params.ignore_eos else eos_ids))
  end_id_C[:len(ends)] = ends
  f32, i32 = np.float32, np.int32
  columns: list[Any] = [np.asarray(x)[None] for x in (
      row_T, i32(prompt_len), np.uint32(params.seed), i32(params.top_k),
      f32(params.temperature), f32(params.top_p), f32(params.min_p),
      f32(params.repetition_penalty), f32(params.presence_penalty),
      f32(params.frequency_penalty), bias_id_A, bias_A,
      i32(params.min_tokens), end_id_C)]
  return Slots(*columns)


def admit(slots: Slots, slot: jax.Array | int, row: Slots) -> Slots:
  """Puts a request's row into a slot."""
  return jax.tree.map(
      lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0),
      slots, row)


def mode(params: Sampling) -> int:
  """What this request needs of a step: GREEDY, RANDOM or FULL."""
  if (params.logit_bias or params.logprobs is not None or params.min_tokens
      or params.repetition_penalty != 1 or params.presence_penalty != 0
      or params.frequency_penalty != 0):
    return FULL
  return RANDOM if params.temperature > 0 else GREEDY


def sample(logits_RV: jax.Array, slots: Slots, slot_R: jax.Array,
           pos_R: jax.Array, need: jax.Array | int) -> tuple[Slots, Sampled]:
  """The token at position pos_R[r] of the request in slot slot_R[r].

  need: the highest `mode` of the batch, a traced scalar; one compiled step
  runs only the branch it needs. Rows of lower mode in a batch of higher mode
  get the same token: every parameter has an identity value.

  Returns:
    (slots with the tokens written, Sampled). Nothing is written to slot E.
  """
  shapes.check(logits_RV=logits_RV, slot_R=slot_R, pos_R=pos_R)
  logits_RV = logits_RV.astype(jnp.float32)
  R, V = logits_RV.shape
  A = MAX_LOGPROBS

  def greedy() -> Sampled:
    none = jnp.zeros((R, A), jnp.float32)
    return Sampled(_best(logits_RV),
                   jnp.zeros(R, jnp.float32), none.astype(jnp.int32), none)

  def random() -> Sampled:
    return dataclasses.replace(
        greedy(), token_R=draw(logits_RV, slots, slot_R, pos_R))

  def full() -> Sampled:
    token_R = draw(penalize(logits_RV, slots, slot_R, pos_R), slots, slot_R,
                   pos_R)
    logprob_RV = jax.nn.log_softmax(logits_RV, -1)
    top_RA, id_RA = _top(logprob_RV, min(A, V))
    pad = ((0, 0), (0, A - min(A, V)))
    return Sampled(
        token_R, jnp.take_along_axis(logprob_RV, token_R[:, None], 1)[:, 0],
        jnp.pad(id_RA.astype(jnp.int32), pad),
        jnp.pad(top_RA, pad, constant_values=-np.inf))

  out = jax.lax.switch(need, (greedy, random, full))
  tokens_ET = slots.tokens_ET.at[slot_R, pos_R].set(out.token_R, mode='drop')
  return dataclasses.replace(slots, tokens_ET=tokens_ET), out


def _top(x_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """jax.lax.top_k; elsewhere than on a CPU by `_top_by_16`."""
  return jax.lax.platform_dependent(
      x_RV, cpu=lambda x_RV: tuple(jax.lax.top_k(x_RV, count)),
      default=lambda x_RV: _top_by_16(x_RV, count))


def _top_by_16(x_RV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """jax.lax.top_k of finite numbers, 16 at a time.

  XLA has a kernel for GPUs of up to 16; for more it sorts the whole
  vocabulary, in kernels that spill registers.
  """
  values, ids, row_R1 = [], [], jnp.arange(x_RV.shape[0])[:, None]
  for start in range(0, count, 16):
    top_RA, id_RA = jax.lax.top_k(x_RV, min(16, count - start))
    x_RV = x_RV.at[row_R1, id_RA].set(-jnp.inf)
    values.append(top_RA)
    ids.append(id_RA)
  return jnp.concatenate(values, -1), jnp.concatenate(ids, -1)


def penalize(logits_RV: jax.Array, slots: Slots, slot_R: jax.Array,
             pos_R: jax.Array) -> jax.Array:
  """Applies logit bias, the three penalties over the tokens so far, and
  min_tokens."""
  R, V = logits_RV.shape
  tokens_RT = slots.tokens_ET[slot_R]
  t_T = jnp.arange(tokens_RT.shape[1])
  row_R1 = jnp.arange(R)[:, None]
  past_RT = t_T[None, :] < pos_R[:, None]
  out_RT = past_RT & (t_T[None, :] >= slots.prompt_E[slot_R][:, None])
  zero_RV = jnp.zeros((R, V), jnp.float32)
  count_RV = zero_RV.at[row_R1, tokens_RT].add(out_RT, mode='drop')
  seen_RV = zero_RV.at[row_R1, tokens_RT].add(past_RT, mode='drop') > 0

  def column(x_E):
    return x_E[slot_R][:, None]

  factor_R1 = column(slots.repetition_E)
  logits_RV = jnp.where(
      seen_RV, jnp.where(logits_RV > 0, logits_RV / factor_R1,
                         logits_RV * factor_R1), logits_RV)
  logits_RV -= column(slots.frequency_E) * count_RV
  logits_RV -= column(slots.presence_E) * (count_RV > 0)
  logits_RV = logits_RV.at[row_R1, slots.bias_id_EA[slot_R]].add(
      slots.bias_EA[slot_R], mode='drop')
  early_R1 = pos_R[:, None] - column(slots.prompt_E) < column(
      slots.min_tokens_E)
  return logits_RV.at[row_R1, slots.end_id_EC[slot_R]].add(
      jnp.where(early_R1, -jnp.inf, 0.0), mode='drop')


def draw(logits_RV: jax.Array, slots: Slots, slot_R: jax.Array,
         pos_R: jax.Array) -> jax.Array:
  """Temperature, top-k, top-p, min-p, then Gumbel-max; greedy at zero."""
  hot_R = slots.temperature_E[slot_R]
  hot_R = jnp.where(hot_R < COLD, 0.0, hot_R)
  cool_R1 = jnp.where(hot_R > 0, hot_R, 1.0)[:, None]
  scaled_RV = logits_RV / cool_R1
  V = logits_RV.shape[1]
  k_R = slots.top_k_E[slot_R]
  k_R = jnp.where(k_R > 0, jnp.minimum(k_R, V), V).astype(jnp.float32)
  keep_RV = _at_least(scaled_RV, jnp.ones_like(scaled_RV), k_R)
  prob_RV = jax.nn.softmax(jnp.where(keep_RV, scaled_RV, -jnp.inf), -1)
  p_R = slots.top_p_E[slot_R]
  keep_RV &= _at_least(scaled_RV, prob_RV, p_R) | (p_R[:, None] >= 1)
  floor_R1 = (jnp.max(prob_RV, -1) * slots.min_p_E[slot_R])[:, None]
  keep_RV &= prob_RV >= floor_R1

  def noise(seed, pos):
    key = jax.random.fold_in(jax.random.key(seed), pos)
    return jax.random.gumbel(key, (V,), jnp.float32)

  gumbel_RV = jax.vmap(noise)(slots.seed_E[slot_R], pos_R)
  score_RV = jnp.where(keep_RV, scaled_RV + gumbel_RV, -jnp.inf)
  return _best(jnp.where(hot_R[:, None] > 0, score_RV, logits_RV))


def _best(x_RV: jax.Array) -> jax.Array:
  """The first of the largest; argmax in two passes on a CPU, where XLA has
  vectors for those and none for argmax."""
  def two_passes(x_RV: jax.Array) -> jax.Array:
    top_R1, V = jnp.max(x_RV, -1, keepdims=True), x_RV.shape[1]
    return jnp.min(jnp.where(x_RV == top_R1, jnp.arange(V)[None, :], V - 1), -1)

  return jax.lax.platform_dependent(
      x_RV, cpu=two_passes, default=lambda x_RV: jnp.argmax(x_RV, -1)
  ).astype(jnp.int32)


def _at_least(x_RV: jax.Array, weight_RV: jax.Array,
              target_R: jax.Array) -> jax.Array:
  """The smallest top set of x whose weight reaches target, ties included.

  Bisects the threshold over the 32 bits of an ordered integer image of the
  floats: exact, and far cheaper than sorting a vocabulary.
  """
  x_RV = jnp.where(x_RV == 0, 0.0, x_RV)  # -0 and 0 tie
  bits_RV = jax.lax.bitcast_convert_type(x_RV, jnp.int32)
  bits_RV = jnp.where(bits_RV < 0, bits_RV ^ jnp.int32(0x7FFFFFFF), bits_RV)
  order_RV = jax.lax.bitcast_convert_type(bits_RV, jnp.uint32) ^ jnp.uint32(
      0x80000000)

  def body(i, low_R):
    try_R = low_R | (jnp.uint32(0x80000000) >> i.astype(jnp.uint32))
    above_RV = order_RV >= try_R[:, None]
    reached_R = jnp.sum(jnp.where(above_RV, weight_RV, 0), -1) >= target_R
    return jnp.where(reached_R, try_R, low_R)

  low_R = jax.lax.fori_loop(0, 32, body,
                            jnp.zeros(x_RV.shape[0], jnp.uint32))
  return order_RV >= low_R[:, None]
