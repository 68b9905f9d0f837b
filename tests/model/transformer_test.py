"""The two step functions against one plain dense forward pass in float64.

Log-probabilities of the 20 best tokens, which a FULL step returns, stand for
the logits. They agree with float64 to 1e-4: two layers of sums of some 50
terms near 1. Tokens have to be equal.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.request import Sampling
from dsjax.kernels.prefill_attention import prefill_attention
from dsjax.model import kv_cache as kv
from dsjax.model import sampling, transformer
from tests.common import tiny

CONFIG = tiny.CONFIG
B = 4  # sequences of a prefill batch, rows of a decode batch
E = 6  # slots
T = CONFIG.max_len
SIZE = 128  # tokens of a packed axis
ATOL = 1e-4
LOGPROBS = Sampling(logprobs=20)
DRAW = Sampling(temperature=1.5, top_k=40, top_p=0.95, seed=11)
i32 = functools.partial(np.asarray, dtype=np.int32)


@functools.cache
def compiled(config):
  """The two steps, jitted; every test of a config shares them."""
  return (jax.jit(functools.partial(transformer.prefill_step, config),
                  static_argnames=('size', 'impl')),
          jax.jit(functools.partial(transformer.decode_step, config),
                  static_argnames='impl'))


admit = jax.jit(sampling.admit)


class Instance:
  """A cache, slots and a permuted page table for each slot.

  Pages start out full of garbage, which no step may read.
  """

  def __init__(self, config=CONFIG, params=None, page_size=8, seed=0,
               dtype=jnp.float32):
    self.config = config
    self.params = tiny.params(config) if params is None else params
    self.page_size = page_size
    M = T // page_size
    pages = np.random.default_rng(seed).permutation(E * M + 1)
    self.table_EM = i32(pages[:E * M].reshape(E, M))
    self.cache = jax.tree.map(
        lambda x: jnp.full_like(x, 1e6),
        kv.init(config, E * M + 1, page_size, dtype))
    self.slots = sampling.init(E, T, config.vocab_size)
    self.prefill_fn, self.decode_fn = compiled(config)

  def admit(self, slot, tokens, params=LOGPROBS, prompt_len=None):
    row = sampling.slot_row(
        tokens, len(tokens) if prompt_len is None else prompt_len, params, T,
        self.config.vocab_size)
    self.slots = admit(self.slots, slot, row)

  def packed(self, chunks):
    """Packed of (slot, first, end, sample) chunks, empty ones after them."""
    slot, first, end, last = map(list, zip(*chunks, strict=True))
    spare = B - len(chunks)
    count = [b - a for a, b in zip(first, end, strict=True)] + [0] * spare
    slot = i32(slot + [0] * spare)
    return transformer.Packed(
        i32(np.cumsum([0, *count])), i32(first + [0] * spare), slot,
        np.array(last + [False] * spare), self.table_EM[slot])

  def rows(self, at):
    """Rows of {slot: position of its input token}, padded at the end.

    Padding points into the middle of a prompt, where a write would show.
    """
    spare = B - len(at)
    slot = i32([*at, *[3] * spare])
    return transformer.Rows(i32([*at.values(), *[2] * spare]), slot,
                            np.array([True] * len(at) + [False] * spare),
                            self.table_EM[slot])

  def prefill(self, *chunks, size=SIZE, at=None, need=sampling.FULL):
    """Sampled of rows and chunks."""
    rows = None if at is None else self.rows(at)
    self.cache, self.slots, rows, out = self.prefill_fn(
        self.params, self.cache, self.slots, self.packed(chunks), size=size,
        need=need, rows=rows)
    return jax.tree.map(np.asarray, out)

  def decode(self, at, steps=1, need=sampling.FULL):
    """Sampled of every step, [steps, B, ...]."""
    rows, outs = self.rows(at), []
    for _ in range(steps):
      self.cache, self.slots, rows, out = self.decode_fn(
          self.params, self.cache, self.slots, rows, need)
      outs.append(out)
    return jax.tree.map(lambda *x: np.stack(x), *outs)

  def tokens(self, slot, start, stop):
    return self.slots.tokens_ET[slot, start:stop].tolist()

  def kv_of(self, slot, stop):
    """Keys and values of a slot's first tokens, in token order."""
    pages = kv.gather_pages(self.cache, self.table_EM[slot])
    return [np.asarray(x).reshape(x.shape[0], -1, x.shape[-1])[:, :stop]
            for x in jax.tree.leaves(pages)]


def check_logprobs(ids_RA, logprobs_RA, logits_RV, atol=ATOL):
  """The 20 best log-probabilities equal those of the oracle's logits."""
  want_RV = tiny.log_softmax(logits_RV)
  np.testing.assert_allclose(
      logprobs_RA, np.sort(want_RV)[:, ::-1][:, :logprobs_RA.shape[1]],
      rtol=0, atol=atol)
  np.testing.assert_allclose(
      logprobs_RA, np.take_along_axis(want_RV, ids_RA, 1), rtol=0, atol=atol)


def check_sampled(out, row, tokens, config=CONFIG):
  """Row's token and log-probabilities are the oracle's after `tokens`."""
  logits = tiny.dense_logits(tokens, config)[-1]
  assert out.token_R[row] == logits.argmax()
  check_logprobs(out.top_id_RA[[row]], out.top_logprob_RA[[row]],
                 logits[None])


@functools.cache
def continuation(tokens, params, count):
  """Tokens that the dense pass and the sampler append: no batch, no cache."""
  slots = admit(sampling.init(1, T, CONFIG.vocab_size), 0, sampling.slot_row(
      tokens, len(tokens), params, T, CONFIG.vocab_size))
  sample = jax.jit(sampling.sample)
  tokens = list(tokens)
  start = len(tokens)
  for _ in range(count):
    logits = tiny.dense_logits(tokens)[-1:].astype(np.float32)
    slots, out = sample(logits, slots, i32([0]), i32([len(tokens)]),
                        sampling.mode(params))
    tokens.append(int(out.token_R[0]))
  return tokens[start:]


# --- prefill -----------------------------------------------------------------


@pytest.mark.parametrize('length', [1, 7, 8, 9, 63, 64, 65, 127, 128])
def test_prefill_of_a_whole_prompt(length):
  tokens, inst = tiny.prompt(length), Instance()
  inst.admit(0, tokens)
  out = inst.prefill((0, 0, length, True))
  check_sampled(out, 0, tokens)
  assert inst.tokens(0, 0, length + 1) == [*tokens, out.token_R[0]]


def test_forward_gives_the_logits_of_every_position():
  tokens, inst = tiny.prompt(50), Instance()
  table_1M, pos_S = inst.table_EM[:1], np.arange(50)

  def attend(_, q, k, v):
    return prefill_attention(q, k, v, jnp.asarray(table_1M),
                             jnp.array([0, 50]), jnp.array([0]))

  @jax.jit
  def logits(params, cache, token_S, page_S):
    x_SD, _ = transformer.run_layers(
        CONFIG, params['layers'], 0, cache,
        transformer.embed(CONFIG, params, token_S, pos_S), pos_S, page_S,
        attend)
    return transformer.head(CONFIG, params, x_SD)

  got_SV = logits(inst.params, inst.cache, i32(tokens),
                  table_1M[0, pos_S // inst.page_size])
  assert got_SV.dtype == jnp.float32
  np.testing.assert_allclose(got_SV, tiny.dense_logits(tokens), rtol=0,
                             atol=ATOL)


@functools.cache
def whole(length):
  """An instance whose slot 0 was prefilled in one go, and its Sampled."""
  inst = Instance()
  inst.admit(0, tiny.prompt(length))
  return inst, inst.prefill((0, 0, length, True))


@pytest.mark.parametrize('chunk', [1, 3, 8, 15, 16, 40, 64, 69])
def test_prefill_in_chunks_is_prefill_of_the_whole(chunk):
  tokens, inst = tiny.prompt(70), Instance(seed=chunk)
  inst.admit(2, tokens)
  for first in range(0, 70, chunk):
    end = min(first + chunk, 70)
    out = inst.prefill((2, first, end, end == 70),
                       size=SIZE if chunk > 16 else 16)
    assert inst.tokens(2, 70, 71) == [out.token_R[0] if end == 70 else 0]
  check_sampled(out, 0, tokens)
  for got, want in zip(inst.kv_of(2, 70), whole(70)[0].kv_of(0, 70),
                       strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


@pytest.mark.parametrize('lengths', [
    (30, 1, 64, 33), (1, 1, 1, 1), (64, 63, 1), (5,), (65, 2, 61)], ids=str)
def test_a_packed_batch_is_each_alone(lengths):
  inst = Instance()
  slots = [3, 0, 5, 1][:len(lengths)]
  for slot, length in zip(slots, lengths, strict=True):
    inst.admit(slot, tiny.prompt(length, slot))
  out = inst.prefill(*((slot, 0, length, True) for slot, length in zip(
      slots, lengths, strict=True)))
  for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
    check_sampled(out, row, tiny.prompt(length, slot))
    assert inst.tokens(slot, length, length + 1) == [out.token_R[row]]


def test_chunks_at_different_places_share_a_batch():
  inst, a, b, c = Instance(), *(tiny.prompt(n) for n in (60, 20, 33))
  for slot, tokens in enumerate((a, b, c)):
    inst.admit(slot, tokens)
  inst.prefill((0, 0, 37, False), (2, 0, 9, False))
  out = inst.prefill((2, 9, 33, True), (1, 0, 20, True), (0, 37, 60, True))
  for row, tokens in enumerate((c, b, a)):
    check_sampled(out, row, tokens)


def test_a_chunk_that_is_not_last_samples_nothing():
  inst = Instance()
  inst.admit(0, tiny.prompt(20))
  before = inst.slots
  inst.prefill((0, 0, 20, False))
  jax.tree.map(np.testing.assert_array_equal, inst.slots, before)


def changed(before, after):
  """The (page, offset) pairs that differ in any layer, head or width."""
  old, new = (jnp.stack(jax.tree.leaves(x)) for x in (before, after))
  at = np.nonzero(np.asarray((old != new).any((0, 1, 4))))
  return set(zip(*at, strict=True))


def test_prefill_writes_its_positions_only():
  inst = Instance()
  inst.admit(4, tiny.prompt(30))
  before = inst.cache
  inst.prefill((4, 0, 13, False))
  table = inst.table_EM[4]
  assert changed(before, inst.cache) == {(table[t // 8], t % 8)
                                         for t in range(13)}
  before = inst.cache
  inst.prefill((4, 13, 30, True))
  assert changed(before, inst.cache) == {(table[t // 8], t % 8)
                                         for t in range(13, 30)}


# --- decode ------------------------------------------------------------------


def started(prompts, params=LOGPROBS, **kwargs):
  """An instance with these prompts prefilled in slots 0, 1, ..."""
  inst = Instance(**kwargs)
  for slot, tokens in enumerate(prompts):
    inst.admit(slot, tokens, params)
  inst.prefill(*((slot, 0, len(tokens), True)
                 for slot, tokens in enumerate(prompts)))
  return inst


PROMPTS = tuple(tiny.prompt(n, seed=1) for n in (1, 8, 31, 62))
STEPS = 24
PENALIZED = Sampling(repetition_penalty=1.4, frequency_penalty=0.5,
                     presence_penalty=0.2, logit_bias={7: 1.5})


def ends(prompts=PROMPTS):
  return {slot: len(tokens) for slot, tokens in enumerate(prompts)}


def streams(inst, prompts=PROMPTS, count=STEPS + 1):
  return [inst.tokens(slot, len(tokens), len(tokens) + count)
          for slot, tokens in enumerate(prompts)]


@pytest.mark.parametrize('params', [Sampling(), DRAW, PENALIZED], ids=[
    'greedy', 'seeded', 'penalized'])
def test_decode_continues_as_the_dense_pass(params):
  inst = started(PROMPTS, params)
  inst.decode(ends(), STEPS, need=sampling.mode(params))
  assert streams(inst) == [continuation(tokens, params, STEPS + 1)
                           for tokens in PROMPTS]


def test_decode_gives_the_log_probabilities_of_the_dense_pass():
  inst = started(PROMPTS)
  out = inst.decode(ends(), STEPS)
  for slot, tokens in enumerate(PROMPTS):
    tokens = (*tokens, *streams(inst)[slot])
    logits = tiny.dense_logits(tokens[:-1])[-STEPS:]
    check_logprobs(out.top_id_RA[:, slot], out.top_logprob_RA[:, slot],
                   logits)


def test_the_tiny_model_does_not_repeat_one_token():
  """Else equal streams would say little."""
  for params, most in ((Sampling(), 3), (DRAW, 12), (PENALIZED, 12)):
    for tokens in PROMPTS:
      assert len(set(continuation(tokens, params, STEPS + 1))) > most


@pytest.mark.parametrize('page_size', [4, 32, 128])
def test_the_page_size_changes_no_token(page_size):
  inst = started(PROMPTS, DRAW, page_size=page_size)
  inst.decode(ends(), STEPS, need=sampling.RANDOM)
  assert streams(inst) == [continuation(tokens, DRAW, STEPS + 1)
                           for tokens in PROMPTS]


def test_other_pages_change_no_bit():
  inst, other = (started(PROMPTS, seed=seed) for seed in (1, 2))
  assert (inst.table_EM != other.table_EM).any()
  jax.tree.map(np.testing.assert_array_equal, inst.decode(ends(), STEPS),
               other.decode(ends(), STEPS))


def test_the_order_of_rows_changes_no_token():
  inst, other = started(PROMPTS, DRAW), started(PROMPTS, DRAW)
  inst.decode(ends(), STEPS)
  for step in range(STEPS):
    at = {slot: pos + step for slot, pos in ends().items()}
    other.decode(dict(sorted(at.items(), key=lambda x: (x[0] * step) % 5)))
  assert streams(inst) == streams(other)


def test_decode_returns_the_rows_one_position_on():
  inst = started(PROMPTS)
  rows = inst.rows(ends())
  _, _, after, out = inst.decode_fn(inst.params, inst.cache, inst.slots, rows,
                                    sampling.GREEDY)
  want = dataclasses.replace(rows, pos_B=rows.pos_B + 1)
  jax.tree.map(np.testing.assert_array_equal, after, want)
  assert out.token_R.shape == (B,)


def test_decode_writes_its_positions_only():
  inst = started(PROMPTS)
  before = inst.cache
  inst.decode({1: 8, 3: 62})
  assert changed(before, inst.cache) == {
      (inst.table_EM[slot, pos // 8], pos % 8) for slot, pos in (
          (1, 8), (3, 62))}


def test_padding_rows_write_nothing():
  inst = started(PROMPTS)
  before = inst.cache, inst.slots
  for need in (sampling.GREEDY, sampling.RANDOM, sampling.FULL):
    inst.decode({}, need=need)
  jax.tree.map(np.testing.assert_array_equal, (inst.cache, inst.slots), before)


def test_padding_rows_beside_live_ones_write_nothing():
  inst = started(PROMPTS)
  before = inst.slots
  inst.decode({2: 31})
  kept = np.array([0, 1, 3, 4, 5])
  jax.tree.map(lambda x, old: np.testing.assert_array_equal(
      x[kept], old[kept]), inst.slots, before)
  assert inst.tokens(2, 0, 33) == [*PROMPTS[2],
                                   *continuation(PROMPTS[2], Sampling(), 2)]


def test_a_request_prefilled_again_goes_on_as_before():
  """Preemption: prompt and output so far come back as one prompt."""
  for params in (DRAW, PENALIZED):
    want = continuation(PROMPTS[2], params, STEPS + 1)
    inst, so_far = Instance(), (*PROMPTS[2], *want[:10])
    inst.admit(5, so_far, params, prompt_len=len(PROMPTS[2]))
    inst.prefill((5, 0, len(so_far), True))
    inst.decode({5: len(so_far)}, STEPS - 10)
    assert inst.tokens(5, 31, 31 + STEPS + 1) == want


# --- chunked mode ------------------------------------------------------------


@pytest.mark.parametrize('params', [LOGPROBS, DRAW], ids=['greedy', 'seeded'])
def test_rows_beside_chunks_are_decode_and_prefill_apart(params):
  together, apart = (started(PROMPTS[:2], params) for _ in range(2))
  tokens = tiny.prompt(70)
  for inst in (together, apart):
    inst.admit(4, tokens, params)
  at = {0: 1, 1: 8}
  for first, end in ((0, 33), (33, 70)):
    out = together.prefill((4, first, end, end == 70), at=at)
    rows = apart.decode(at)
    chunk = apart.prefill((4, first, end, end == 70))
    at = {slot: pos + 1 for slot, pos in at.items()}
    assert out.token_R.shape == (2 * B,)
    np.testing.assert_array_equal(out.token_R[:2], rows.token_R[0, :2])
    np.testing.assert_allclose(out.top_logprob_RA[:2],
                               rows.top_logprob_RA[0, :2], atol=ATOL)
  assert out.token_R[B] == chunk.token_R[0]
  np.testing.assert_array_equal(together.slots.tokens_ET,
                                apart.slots.tokens_ET)
  for got, want in zip(together.kv_of(4, 70), apart.kv_of(4, 70),
                       strict=True):
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


def test_padding_rows_beside_chunks_write_nothing():
  inst = started(PROMPTS)
  inst.admit(5, tiny.prompt(9))
  before = inst.cache, inst.slots
  inst.prefill((5, 0, 9, False), at={})
  assert changed(before[0], inst.cache) == {
      (inst.table_EM[5, t // 8], t % 8) for t in range(9)}
  jax.tree.map(np.testing.assert_array_equal, inst.slots, before[1])


def test_rows_beside_chunks_go_one_position_on():
  inst = started(PROMPTS)
  rows = inst.rows(ends())
  _, _, after, _ = inst.prefill_fn(
      inst.params, inst.cache, inst.slots, inst.packed([(5, 0, 3, False)]),
      size=SIZE, need=sampling.FULL, rows=rows)
  want = dataclasses.replace(rows, pos_B=rows.pos_B + 1)
  jax.tree.map(np.testing.assert_array_equal, after, want)


# --- configurations ----------------------------------------------------------


@pytest.mark.parametrize('step', ['prefill', 'decode'])
def test_an_unknown_impl_is_an_error(step):
  inst = Instance()
  with pytest.raises(ValueError, match="impl='cuda'.*'pallas_interpret'"):
    if step == 'prefill':
      inst.prefill_fn(inst.params, inst.cache, inst.slots,
                      inst.packed([(0, 0, 3, True)]), size=16, need=0,
                      impl='cuda')
    else:
      inst.decode_fn(inst.params, inst.cache, inst.slots, inst.rows({0: 3}), 0,
                     impl='cuda')
