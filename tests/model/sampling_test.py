"""Sampling against definitions written out in numpy.

Every draw of a position is fixed by (seed, position), so one call with a row
a position gives a thousand draws: what is drawn at least once shows the set
kept, exactly, and how often shows the distribution. Nothing here is random.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, Sampling
from dsjax.model import sampling
from tests.common import tiny

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
  for slot, one in enumerate(params):
    row = sampling.slot_row(tokens, prompt_len, one, MAX_LEN, V)
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


# --- greedy ------------------------------------------------------------------


@pytest.mark.parametrize('need', [sampling.GREEDY, *MODES.values()])
def test_temperature_zero_is_the_argmax_in_every_mode(need):
  logits = np.stack([normal_logits(seed) for seed in range(8)])
  mixed = slots_of(Sampling(), Sampling(temperature=1.0, seed=3))
  _, out = sample_few(logits, mixed, [0] * 8, range(1, 9), need)
  np.testing.assert_array_equal(out.token_R, logits.argmax(-1))


@pytest.mark.parametrize('need', [sampling.GREEDY, *MODES.values()])
def test_the_first_of_equal_logits_wins(need):
  logits = np.zeros((1, V))
  logits[0, [4, 9]] = 2
  _, out = sample_few(logits, slots_of(Sampling()), [0], [1], need)
  assert out.token_R == [4]


def test_parameters_of_the_draw_do_not_touch_a_greedy_row():
  logits = normal_logits()
  params = Sampling(top_k=3, top_p=0.5, min_p=0.3, seed=9)
  assert drawn(logits, params) == {logits.argmax()}


# --- which tokens a draw may give --------------------------------------------
# A temperature of 4 over normal logits leaves every kept token a share of
# more than 1 / 200, so a thousand draws meet all of them.


def softmax(logits_V):
  return np.exp(tiny.log_softmax(logits_V))


def top_k_set(logits_V, k):
  """Tokens that fewer than k others beat: ties at the border stay."""
  return {v for v in range(V) if (logits_V > logits_V[v]).sum() < k}


def top_p_set(prob_V, p):
  """Most likely first until they hold p, with the ties of the last."""
  kept, total = set(), 0.0
  for value in sorted(set(prob_V[prob_V > 0]), reverse=True):
    equal = set(np.flatnonzero(prob_V == value).tolist())
    kept, total = kept | equal, total + value * len(equal)
    if total >= p:
      return kept
  return kept


@both_modes
@pytest.mark.parametrize('k', [1, 2, 5, V - 1, V, V + 1, 2**31 - 1])
def test_top_k_keeps_exactly_the_k_best(k, need):
  logits = normal_logits(1)
  want = set(np.argsort(-logits)[:k].tolist())
  assert drawn(logits, Sampling(temperature=4., top_k=k), need) == want


def test_top_k_off_keeps_all():
  assert drawn(normal_logits(1), Sampling(temperature=4.)) == set(range(V))


@pytest.mark.parametrize('k', [1, 2, 3, 4, 5, 6])
def test_top_k_keeps_the_ties_of_the_last(k):
  logits = np.full(V, -9., np.float32)
  logits[[3, 7, 11, 15, 19]] = [2, 1, 1, 1, -1]
  logits[[1, 2]] = -1
  want = top_k_set(logits, k)
  assert len(want) == {1: 1, 2: 4, 3: 4, 4: 4, 5: 7, 6: 7}[k]
  assert drawn(logits, Sampling(temperature=4., top_k=k)) == want


def test_top_k_tells_neighbouring_floats_apart():
  logits = np.full(V, -1., np.float32)
  logits[[3, 8]] = [1., np.nextafter(np.float32(1), np.float32(2))]
  assert drawn(logits, Sampling(temperature=1., top_k=1)) == {8}
  assert drawn(logits, Sampling(temperature=1., top_k=2)) == {3, 8}
  logits[[3, 8]] *= -1
  logits[logits == -1] = -2
  logits[3] = -1
  assert drawn(logits, Sampling(temperature=1., top_k=1)) == {3}


@both_modes
@pytest.mark.parametrize('p', [1e-9, 0.1, 0.3, 0.5, 0.9, 0.97, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, need):
  logits = normal_logits(2)
  want = top_p_set(softmax(logits / 4), p) if p < 1 else set(range(V))
  assert drawn(logits, Sampling(temperature=4., top_p=p), need) == want


def test_top_p_that_is_met_exactly_keeps_no_more():
  logits = np.full(V, -np.inf, np.float32)
  logits[[2, 5, 8, 9]] = np.log([0.5, 0.25, 0.125, 0.125])
  assert drawn(logits, Sampling(temperature=1., top_p=0.5)) == {2}
  assert drawn(logits, Sampling(temperature=1., top_p=0.51)) == {2, 5}
  assert drawn(logits, Sampling(temperature=1., top_p=0.75)) == {2, 5}
  assert drawn(logits, Sampling(temperature=1., top_p=0.8)) == {2, 5, 8, 9}


@both_modes
@pytest.mark.parametrize('floor', [0.0, 0.4, 0.7, 1.0])
def test_min_p_is_a_share_of_the_best(floor, need):
  logits = normal_logits(3)
  prob = softmax(logits / 4)
  want = set(np.flatnonzero(prob >= floor * prob.max()).tolist())
  assert drawn(logits, Sampling(temperature=4., min_p=floor), need) == want


@pytest.mark.parametrize('p', [0.3, 0.6, 0.8])
@pytest.mark.parametrize('k', [3, 6])
def test_top_p_counts_what_top_k_left(k, p):
  logits = normal_logits(4)
  left = np.where(np.isin(np.arange(V), list(top_k_set(logits, k))),
                  logits / 4, -np.inf)
  want = top_p_set(softmax(left), p)
  got = drawn(logits, Sampling(temperature=4., top_k=k, top_p=p))
  assert got == want


def test_the_filters_follow_the_temperature():
  logits = normal_logits(5, scale=3)
  for hot in (0.5, 1., 4.):
    want = top_p_set(softmax(logits / np.float32(hot)), 0.8)
    got = drawn(logits, Sampling(temperature=hot, top_p=0.8))
    assert got <= want and logits.argmax() in got
    assert hot < 4 or got == want


def test_a_forbidden_token_is_never_drawn():
  logits = normal_logits(6)
  logits[::2] = -np.inf
  assert drawn(logits, Sampling(temperature=4.)) == set(range(1, V, 2))


# --- how often ---------------------------------------------------------------

CHI2 = {V - 1: 49.7, 8: 26.1}  # 99.9 % quantiles


def chi2(count, expected):
  return ((count - expected)**2 / expected).sum()


@both_modes
@pytest.mark.parametrize('temperature', [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature, need):
  logits = normal_logits(7)
  tokens = np.concatenate([
      draws(logits, Sampling(temperature=temperature, seed=seed), need)
      for seed in range(8)])
  count = np.bincount(tokens, minlength=V)
  expected = len(tokens) * softmax(logits.astype(np.float64) / temperature)
  assert chi2(count, expected) < CHI2[V - 1]


def test_draws_of_a_filtered_set_follow_its_softmax():
  logits = normal_logits(8)
  tokens = np.concatenate([
      draws(logits, Sampling(temperature=1., top_k=9, seed=seed))
      for seed in range(4)])
  best = np.argsort(-logits)[:9]
  count = np.bincount(tokens, minlength=V)[best]
  expected = len(tokens) * softmax(logits[best].astype(np.float64))
  assert count.sum() == len(tokens)
  assert chi2(count, expected) < CHI2[8]


@pytest.mark.parametrize('other', [
    dict(pos=1), dict(seed=1), dict(seed=2**31), dict(pos=1, seed=-1)],
    ids=str)
def test_neighbouring_draws_are_independent(other):
  """Pairs (draw, draw at another position or seed) fill a 3 x 3 table."""
  logits = np.full(V, -np.inf, np.float32)
  logits[:3] = 0
  seed = 7
  first = draws(logits, Sampling(temperature=1., seed=seed))
  second = draws(logits, Sampling(temperature=1.,
                                  seed=seed + other.get('seed', 0)))
  second = np.roll(second, -other.get('pos', 0))
  count = np.bincount(first * 3 + second, minlength=9)
  assert chi2(count, R / 9) < CHI2[8]


# --- the same (seed, position) gives the same token --------------------------

PARAMS = [Sampling(temperature=1., seed=5),
          Sampling(temperature=0.8, top_k=9, seed=2**32 - 1),
          Sampling(temperature=1.5, top_p=0.9, min_p=0.02, seed=5),
          Sampling()]


def a_batch():
  """Logits, slots and positions of 12 rows: each request at 3 positions."""
  logits = np.stack([normal_logits(seed) for seed in range(12)])
  return logits, np.arange(12) % 4, np.arange(12) // 4 * 7 + 1


def test_rows_in_any_order_draw_the_same():
  logits, slot, pos = a_batch()
  slots = slots_of(*PARAMS)
  _, want = sample_few(logits, slots, slot, pos, sampling.RANDOM)
  order = np.random.default_rng(0).permutation(12)
  _, got = sample_few(logits[order], slots, slot[order], pos[order],
                      sampling.RANDOM)
  np.testing.assert_array_equal(got.token_R, want.token_R[order])


def test_a_row_alone_draws_the_same():
  logits, slot, pos = a_batch()
  slots = slots_of(*PARAMS)
  _, want = sample_few(logits, slots, slot, pos, sampling.RANDOM)
  for r in range(12):  # one row: another compiled shape
    _, got = sample(logits[r:r + 1], slots, slot[r:r + 1], pos[r:r + 1],
                    sampling.RANDOM)
    assert got.token_R == want.token_R[r]


def test_any_slot_draws_the_same():
  logits, slot, pos = a_batch()
  _, want = sample_few(logits, slots_of(*PARAMS), slot, pos,
                       sampling.RANDOM)
  _, got = sample_few(logits, slots_of(*PARAMS[::-1]), 3 - slot, pos,
                      sampling.RANDOM)
  np.testing.assert_array_equal(got.token_R, want.token_R)


def test_neutral_parameters_draw_the_same_in_full_mode():
  logits, slot, pos = a_batch()
  slots = slots_of(*PARAMS)
  _, want = sample_few(logits, slots, slot, pos, sampling.RANDOM)
  _, got = sample_few(logits, slots, slot, pos, sampling.FULL)
  np.testing.assert_array_equal(got.token_R, want.token_R)


def test_the_tokens_so_far_do_not_change_a_draw():
  logits, slot, pos = a_batch()
  _, want = sample_few(logits, slots_of(*PARAMS), slot, pos,
                       sampling.RANDOM)
  other = slots_of(*PARAMS, tokens=tuple(range(20)), prompt_len=9)
  for need in MODES.values():
    _, got = sample_few(logits, other, slot, pos, need)
    np.testing.assert_array_equal(got.token_R, want.token_R)


def test_seeds_and_positions_differ():
  flat = np.zeros(V, np.float32)
  one, two, high = (draws(flat, Sampling(temperature=1., seed=seed))
                    for seed in (0, 1, 2**31))
  for other in (two, high, np.roll(one, 1)):
    assert (one == other).mean() < 3 / V


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


# --- extremes ----------------------------------------------------------------


@pytest.mark.parametrize('temperature', [1e-3, 1e-30, 1e-37, 2e-38, 1e-45])
def test_a_temperature_near_zero_is_greedy(temperature):
  logits = 40 * normal_logits(2)
  assert drawn(logits, Sampling(temperature=temperature)) == {
      logits.argmax()}


def test_the_hottest_temperature_is_flat():
  assert drawn(normal_logits(12), Sampling(temperature=100.)) == set(range(V))


def test_plus_and_minus_zero_are_equal():
  logits = np.full(V, -np.inf, np.float32)
  logits[[3, 8]] = [0.0, -0.0]
  assert drawn(logits, Sampling(temperature=1., top_k=1)) == {3, 8}
