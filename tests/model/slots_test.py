"""What slots hold of a request, and what it does to a row: penalties, biases,
log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, Sampling
from dsjax.model import sampling
from tests.common import tiny
from tests.common.draws import (
  MAX_LEN,
  MODES,
  PARAMS,
  E,
  R,
  V,
  a_batch,
  admit,
  drawn,
  normal_logits,
  penalize,
  sample,
  sample_few,
  slots_of,
  top_k_set,
)

# --- penalties and bias ------------------------------------------------------

TOKENS = (3, 3, 5, 7, 7, 7, 1, 5, 9, 9, 3, 2, 2)  # the first 6: the prompt
PROMPT = 6


def penalized(logits_V, params, pos):
  """The penalties by their definitions, with token sets and counts."""
  seen, output = TOKENS[:pos], TOKENS[PROMPT:pos]
  out_V = logits_V.astype(np.float64)
  for v in range(V):
    if v in seen:
      factor = params.repetition_penalty
      out_V[v] = out_V[v] / factor if out_V[v] > 0 else out_V[v] * factor
    out_V[v] -= params.frequency_penalty * output.count(v)
    out_V[v] -= params.presence_penalty * (v in output)
  for token, value in params.logit_bias:
    if token < V:
      out_V[token] += value
  return out_V


PENALTIES = {
    'repetition': Sampling(repetition_penalty=1.7),
    'repetition below 1': Sampling(repetition_penalty=0.5),
    'presence': Sampling(presence_penalty=0.9),
    'frequency': Sampling(frequency_penalty=0.6),
    'negative': Sampling(presence_penalty=-1.5, frequency_penalty=-0.4),
    'bias': Sampling(logit_bias={0: 2.5, 5: -100, V - 1: 3}),
    'bias of no token': Sampling(logit_bias={V: 100, V + 50: 100}),
    'all': Sampling(repetition_penalty=1.3, presence_penalty=0.4,
                    frequency_penalty=0.3, logit_bias={9: 4, 3: -1}),
}
penalties = pytest.mark.parametrize('params', PENALTIES.values(),
                                    ids=PENALTIES)
POSITIONS = [PROMPT, PROMPT + 1, PROMPT + 4, len(TOKENS)]


@penalties
def test_penalize_follows_the_definitions(params):
  slots = slots_of(Sampling(), params, tokens=TOKENS, prompt_len=PROMPT)
  logits = normal_logits(9)
  got = penalize(np.tile(logits, (4, 1)), slots, np.ones(4, np.int32),
                 np.array(POSITIONS, np.int32))
  for row, pos in zip(got, POSITIONS, strict=True):
    np.testing.assert_allclose(row, penalized(logits, params, pos),
                               rtol=1e-6, atol=1e-6)


@penalties
def test_a_penalized_greedy_row_takes_the_best(params):
  slots = slots_of(params, tokens=TOKENS, prompt_len=PROMPT)
  logits = np.stack([normal_logits(seed) for seed in range(4)])
  _, out = sample_few(logits, slots, [0] * 4, POSITIONS, sampling.FULL)
  want = [penalized(x, params, pos).argmax()
          for x, pos in zip(logits, POSITIONS, strict=True)]
  np.testing.assert_array_equal(out.token_R, want)


def test_the_filters_follow_the_bias():
  logits = normal_logits(10)
  best, worst = int(logits.argmax()), int(logits.argmin())
  params = Sampling(temperature=4., top_k=6,
                    logit_bias={best: -100, worst: 5})
  biased = logits.copy()
  biased[best] -= 100
  biased[worst] += 5
  want = top_k_set(biased, 6)
  assert worst in want and best not in want
  assert drawn(logits, params, sampling.FULL) == want


def test_rows_are_penalized_by_their_own_request():
  params = [PENALTIES['repetition'], Sampling(), PENALTIES['frequency']]
  slots = slots_of(*params, tokens=TOKENS, prompt_len=PROMPT)
  logits = normal_logits(9)
  got = penalize(np.tile(logits, (4, 1)), slots,
                 np.array([2, 1, 0, 1], np.int32),
                 np.array([9, 13, 7, 6], np.int32))
  for row, slot, pos in zip(got, (2, 1, 0, 1), (9, 13, 7, 6), strict=True):
    np.testing.assert_allclose(row, penalized(logits, params[slot], pos),
                               rtol=1e-6, atol=1e-6)


# --- log-probabilities -------------------------------------------------------


def test_logprobs_are_of_the_raw_logits():
  params = Sampling(temperature=2., seed=4, logprobs=20, logit_bias={3: 50},
                    repetition_penalty=1.9)
  logits = np.stack([normal_logits(seed) for seed in range(6)])
  _, out = sample_few(logits, slots_of(params, tokens=TOKENS), [0] * 6,
                      range(8, 14), sampling.FULL)
  want = tiny.log_softmax(logits)
  assert set(out.token_R.tolist()) == {3}
  np.testing.assert_allclose(out.logprob_R, want[:, 3], atol=1e-5)
  order = np.argsort(-want, -1)[:, :MAX_LOGPROBS]
  np.testing.assert_array_equal(out.top_id_RA, order)
  np.testing.assert_allclose(
      out.top_logprob_RA, np.take_along_axis(want, order, 1), atol=1e-5)


def test_logprobs_of_a_small_vocabulary_are_padded():
  slots = sampling.init(2, 8, 5)
  logits = normal_logits()[None, :5]
  _, out = sampling.sample(logits, slots, np.array([0]), np.array([1]),
                           sampling.FULL)
  assert out.top_id_RA.shape == out.top_logprob_RA.shape == (
      1, MAX_LOGPROBS)
  assert sorted(out.top_id_RA[0, :5].tolist()) == list(range(5))
  assert (out.top_logprob_RA[0, 5:] == -np.inf).all()


@pytest.mark.parametrize('need', [sampling.GREEDY, sampling.RANDOM])
def test_logprobs_are_zero_in_the_other_modes(need):
  _, out = sample_few(normal_logits()[None], slots_of(Sampling()), [0], [1],
                      need)
  assert not any(x.any() for x in (out.logprob_R, out.top_id_RA,
                                   out.top_logprob_RA))


@pytest.mark.parametrize('need', [sampling.GREEDY, *MODES.values()])
def test_dtypes_of_a_step(need):
  _, out = sample_few(normal_logits()[None], slots_of(Sampling()), [0], [1],
                      need)
  assert [x.dtype for x in jax.tree.leaves(out)] == [
      np.int32, np.float32, np.int32, np.float32]


# --- slots -------------------------------------------------------------------


def test_tokens_are_written_to_their_slot_and_position_only():
  slots = slots_of(*PARAMS, tokens=TOKENS)
  logits, slot, pos = a_batch()
  after, out = sample_few(logits, slots, slot, pos, sampling.RANDOM)
  want = np.array(slots.tokens_ET)
  want[slot, pos] = out.token_R
  np.testing.assert_array_equal(after.tokens_ET, want)


@pytest.mark.parametrize('need', [sampling.GREEDY, *MODES.values()])
def test_a_row_of_slot_E_changes_nothing(need):
  slots = slots_of(*PARAMS, tokens=TOKENS)
  after, _ = sample_few(np.zeros((3, V)), slots, [E] * 3, [0, 1, MAX_LEN],
                        need)
  jax.tree.map(np.testing.assert_array_equal, after, slots)


@pytest.mark.parametrize('count, size', [(20, 300), (5, 5), (16, 40), (33, 90)])
def test_the_best_by_16_are_the_best_with_ties_in_order(count, size):
  x = np.random.default_rng(0).integers(-9, 0, (4, size)).astype(np.float32)
  for got, want in zip(sampling._top_by_16(jnp.asarray(x), count),
                       jax.lax.top_k(x, count), strict=True):
    np.testing.assert_array_equal(got, want)


def test_the_last_position_is_kept_and_the_next_dropped():
  slots = slots_of(Sampling())
  logits = np.zeros((2, V))
  logits[:, 6] = 1
  after, _ = sample_few(logits, slots, [0, 1], [MAX_LEN, MAX_LEN + 1],
                        sampling.GREEDY)
  assert after.tokens_ET[0, MAX_LEN] == 6
  assert not after.tokens_ET[1].any() and not after.tokens_ET[0, :-1].any()


def test_a_row_holds_its_request():
  params = Sampling(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125,
                    repetition_penalty=1.5, presence_penalty=-2.,
                    frequency_penalty=1., logit_bias={4: 2., 1: -1.},
                    seed=2**32 - 1)
  row = sampling.slot_row((5, 6, 7), 2, params, 8, V)
  assert row.tokens_ET.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0, 0]]
  assert [x.item() for x in (
      row.prompt_E, row.seed_E, row.top_k_E, row.temperature_E, row.top_p_E,
      row.min_p_E, row.repetition_E, row.presence_E, row.frequency_E,
      row.min_tokens_E)] == [
          2, 2**32 - 1, 3, 0.5, 0.25, 0.125, 1.5, -2., 1., 0]
  assert row.bias_id_EA[0, :3].tolist() == [4, 1, V]
  assert row.bias_EA[0, :3].tolist() == [2., -1., 0.]
  assert row.bias_id_EA.shape == (1, MAX_LOGIT_BIAS)


def test_what_would_end_it_too_early_cannot_be_drawn():
  logits = np.zeros((R, V), np.float32)
  logits[:, 3], logits[:, 5], logits[:, 6] = 3, 2, 1
  row = sampling.slot_row((1, 2), 2, Sampling(
      min_tokens=4, stop_token_ids=(3,)), MAX_LEN, V, eos_ids=(5,))
  blind = sampling.slot_row((1, 2), 2, Sampling(
      min_tokens=4, ignore_eos=True), MAX_LEN, V, eos_ids=(5, 3))
  slots = admit(admit(sampling.init(E, MAX_LEN, V), 0, row), 1, blind)
  slot_R = np.repeat(np.arange(2), R // 2)
  pos_R = np.tile(np.arange(R // 2), 2) + 2
  _, out = sample(logits, slots, slot_R, pos_R,
                  sampling.mode(Sampling(min_tokens=4)))
  token_R = np.asarray(out.token_R)
  assert token_R[:6].tolist() == [6, 6, 6, 6, 3, 3]
  assert set(token_R[R // 2:].tolist()) == {3}


@pytest.mark.parametrize('ignore_eos', (False, True))
@pytest.mark.parametrize('temperature', (0.0, 0.01))
def test_what_ends_a_request_is_masked_before_min_tokens(
    ignore_eos, temperature):
  eos, stop, other = 5, 3, 2
  logits_V = np.zeros(V, np.float32)
  logits_V[[eos, stop, other]] = 30, 20, 10
  params = Sampling(stop_token_ids=(stop,), min_tokens=3, ignore_eos=ignore_eos,
                    temperature=temperature, logit_bias={eos: 1.0})
  assert sampling.mode(params) == sampling.FULL
  slots = admit(sampling.init(E, MAX_LEN, V), 0, sampling.slot_row(
      (7, 8), 2, params, MAX_LEN, V, eos_ids=(eos,)))
  _, out = sample(np.tile(logits_V, (R, 1)), slots, np.zeros(R, np.int32),
                  np.arange(2, R + 2, dtype=np.int32), sampling.FULL)
  early = eos if ignore_eos else other
  assert np.asarray(out.token_R).tolist() == [early] * 3 + [eos] * (R - 3)


def test_admit_replaces_one_slot():
  before = slots_of(*PARAMS, tokens=TOKENS)
  row = sampling.slot_row((1, 2), 1, Sampling(seed=8, logit_bias={3: 1}),
                          MAX_LEN, V)
  after = admit(before, 2, row)
  kept = np.array([0, 1, 3, 4])
  jax.tree.map(lambda x, old: np.testing.assert_array_equal(
      x[kept], old[kept]), after, before)
  jax.tree.map(lambda x, new: np.testing.assert_array_equal(x[2], new[0]),
               after, row)
  jax.tree.map(lambda x, new: np.testing.assert_equal(x.dtype, new.dtype),
               after, row)


@pytest.mark.parametrize('want, params', [
    ('GREEDY', Sampling()), ('GREEDY', Sampling(top_k=3, top_p=0.5)),
    ('RANDOM', Sampling(temperature=0.1)),
    ('FULL', Sampling(logprobs=0)), ('FULL', Sampling(logit_bias={1: 1})),
    ('FULL', Sampling(repetition_penalty=1.1)),
    ('FULL', Sampling(presence_penalty=-1)),
    ('FULL', Sampling(frequency_penalty=1, temperature=1.))], ids=str)
def test_mode_is_the_least_that_serves(want, params):
  assert sampling.mode(params) == getattr(sampling, want)


def test_rows_must_agree():
  slots = slots_of(Sampling())
  with pytest.raises(ValueError, match='pos_R: R is 2, but 1 in logits_RV'):
    sampling.sample(jnp.zeros((1, V)), slots, np.zeros(1, np.int32),
                    np.zeros(2, np.int32), 0)
