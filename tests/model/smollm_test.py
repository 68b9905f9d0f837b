"""SmolLM2 continues the goldens of an independent implementation."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.checkpoints import checkpoint
from dsjax.config.request import Sampling
from dsjax.model import kv_cache as kv
from dsjax.model import sampling, transformer

NAME = 'smollm2-135m-instruct'
GOLDENS = json.loads(
    (pathlib.Path(__file__).parents[1] / 'goldens/smollm2.json').read_text())
PACK = 80  # tokens a prefill: what is not deep packs into two, one cut in two
PAGE = 16
i32 = functools.partial(np.asarray, dtype=np.int32)
admit = jax.jit(sampling.admit)


def is_deep(golden):
  """What others stand for: the tokens of a batch are computed together."""
  return golden['name'] not in ('one_token', 'english', 'chinese', 'emoji',
                                'code')


def packs(lengths, budget, most):
  """Chunks (row, first, end) filled up to `budget` tokens, `most` a batch."""
  batch, room = [], budget
  for row, length in enumerate(lengths):
    first = 0
    while first < length:
      end = min(length, first + room)
      batch.append((row, first, end))
      room, first = room - (end - first), end
      if not room or len(batch) == most:
        yield batch
        batch, room = [], budget
  if batch:
    yield batch


@functools.cache
def smollm():
  """Config and weights of SmolLM2-135M-Instruct, float32."""
  config, params = checkpoint.load_gguf(checkpoint.find(NAME))
  return config, jax.tree.map(jnp.asarray, params)


def smollm_prefill(config, params, cache, slots, table_EM, lengths):
  """Prefills every golden, packed and chunked: one compiled shape."""
  step = jax.jit(functools.partial(transformer.prefill_step, config),
                 static_argnames='size', donate_argnums=(1, 2))
  most = len(lengths)
  for batch in packs(lengths, PACK, most):
    rows, first, end = (i32([*x, *[0] * (most - len(batch))])
                        for x in zip(*batch, strict=True))
    last = (end == i32(lengths)[rows]) & (end > 0)
    packed = transformer.Packed(
        i32(np.cumsum([0, *(end - first)])), first, rows, last, table_EM[rows])
    cache, slots, _, _ = step(params, cache, slots, packed, size=PACK,
                              need=sampling.GREEDY)
  return cache, slots


@functools.cache
def smollm_tokens(deep):
  """What SmolLM2 appends to the prompts of a batch of goldens, by name."""
  config, params = smollm()
  goldens = [golden for golden in GOLDENS if is_deep(golden) == deep]
  lengths = [len(golden['ids']) for golden in goldens]
  count = max(len(golden['tokens']) for golden in goldens)
  num, max_len = len(goldens), max(lengths) + count
  width = -(-max_len // PAGE)
  pages = np.random.default_rng(0).permutation(num * width)
  table_EM = i32(pages.reshape(num, width))
  cache = kv.init(config, num * width, PAGE)
  slots = sampling.init(num, max_len, config.vocab_size)
  for slot, golden in enumerate(goldens):
    slots = admit(slots, slot, sampling.slot_row(
        golden['ids'], len(golden['ids']), Sampling(), max_len,
        config.vocab_size))
  cache, slots = smollm_prefill(config, params, cache, slots, table_EM,
                                lengths)
  step = jax.jit(functools.partial(transformer.decode_step, config),
                 donate_argnums=(1, 2))
  rows = transformer.Rows(i32(lengths), np.arange(num, dtype=np.int32),
                          np.ones(num, bool), table_EM)
  for _ in range(count - 1):
    cache, slots, rows, _ = step(params, cache, slots, rows, sampling.GREEDY)
  tokens_ET = np.asarray(slots.tokens_ET)
  return {golden['name']: tokens_ET[slot, n:n + count].tolist()
          for slot, (n, golden) in enumerate(zip(lengths, goldens,
                                                 strict=True))}


@pytest.mark.parametrize('golden', [
    pytest.param(golden, id=golden['name'],
                 marks=[pytest.mark.deep] * is_deep(golden))
    for golden in GOLDENS])
def test_smollm_continues_every_golden(golden):
  want = golden['tokens']
  assert smollm_tokens(is_deep(golden))[golden['name']][:len(want)] == want
