"""A thousand draws in one call: what tests of sampling share."""

import functools

import jax
import numpy as np
import pytest

from dsjax.config.request import Sampling
from dsjax.model import sampling

V = 24
R = 1024  # rows of a call
E = 5  # slots
MAX_LEN = R + 1
MODES = {'random': sampling.RANDOM, 'full': sampling.FULL}
both_modes = pytest.mark.parametrize('need', MODES.values(), ids=MODES)

sample = jax.jit(sampling.sample)
penalize = jax.jit(sampling.penalize)
admit = jax.jit(sampling.admit)


def normal_logits(seed=0, scale=1.0):
  return scale * np.random.default_rng(seed).standard_normal(
      V).astype(np.float32)


@functools.cache
def slots_of(*params, tokens=(), prompt_len=0):
  """Slots whose first ones hold requests with these parameters."""
  slots = sampling.init(E, MAX_LEN, V)
  for slot, request in enumerate(params):
    row = sampling.slot_row(tokens, prompt_len, request, MAX_LEN, V)
    slots = admit(slots, slot, row)
  return slots


def draws(logits_V, params, need=sampling.RANDOM):
  """The tokens drawn at positions 1, 2, ..., R of one request."""
  logits_RV = np.tile(logits_V, (R, 1))
  _, out = sample(logits_RV, slots_of(params), np.zeros(R, np.int32),
                  np.arange(1, R + 1, dtype=np.int32), need)
  return np.asarray(out.token_R)


def drawn(*args, **kwargs):
  return set(draws(*args, **kwargs).tolist())


def pad_rows(x):
  """Up to R rows, so that every call shares one compiled program."""
  x = np.asarray(x)
  return np.concatenate((x, np.zeros((R - len(x), *x.shape[1:]), x.dtype)))


def sample_few(logits, slots, slot, pos, need):
  """Sampled of a few rows; the padding belongs to slot E."""
  count = len(slot)
  slot = np.concatenate((slot, np.full(R - count, E))).astype(np.int32)
  slots, out = sample(pad_rows(logits).astype(np.float32), slots, slot,
                      pad_rows(pos).astype(np.int32), need)
  return slots, jax.tree.map(lambda x: np.asarray(x)[:count], out)


def top_k_set(logits_V, k):
  """Tokens that fewer than k others beat: ties at the border stay."""
  return {v for v in range(V) if (logits_V > logits_V[v]).sum() < k}


# A request a row.
PARAMS = [Sampling(temperature=1., seed=5),
          Sampling(temperature=0.8, top_k=9, seed=2**32 - 1),
          Sampling(temperature=1.5, top_p=0.9, min_p=0.02, seed=5),
          Sampling()]


def a_batch():
  """Logits, slots and positions of 12 rows: each request at 3 positions."""
  logits = np.stack([normal_logits(seed) for seed in range(12)])
  return logits, np.arange(12) % 4, np.arange(12) // 4 * 7 + 1
