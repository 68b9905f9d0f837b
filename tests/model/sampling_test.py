"""Sampling against definitions written out in numpy.

Every draw of a position is fixed by (seed, position), so one call with a row
a position gives a thousand draws: what is drawn at least once shows the set
kept, exactly, and how often shows the distribution. Nothing here is random.
"""

import numpy as np
import pytest

from dsjax.config.request import Sampling
from dsjax.model import sampling
from tests.common import tiny
from tests.common.draws import (
  MODES,
  PARAMS,
  R,
  V,
  a_batch,
  both_modes,
  drawn,
  draws,
  normal_logits,
  sample,
  sample_few,
  slots_of,
  top_k_set,
)

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
