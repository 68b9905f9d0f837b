"""Fits: exact where the data are, near where they are noisy, never below 0."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.placement import Plan
from dsjax.simulation import fitting, hardware, latency
from dsjax.simulation.hardware import Shares
from dsjax.simulation.latency import Affine, Buckets, Costs
from dsjax.simulation.roofline import Roofline
from dsjax.simulation.roofline_fit import affine_of, fit_shares
from tests.common import tiny

POSITIVE = st.floats(0.01, 1.0)
UNITS = (1e-2, 1e-4, 1e-8)  # of A, B, C: seconds as devices have them
LENGTHS = (16, 64, 256, 512, 1024, 2048)


def grid(model, batches=(1, 2, 4, 8, 16, 32), mixed=True):
  """Noiseless cells of a latency: batch x length, as measure takes them."""
  shapes = [(((0, n),) * b, 0, 0) for n in LENGTHS for b in (1, 2, 4)]
  shapes += [(((256, 512),), 0, 0), (((1024, 1536),), 0, 0)]
  shapes += [((), b, b * n) for b in batches for n in LENGTHS]
  if mixed:
    shapes += [(((s, s + n),), b, b * 300) for s in (0, 512)
               for n in (32, 128, 512) for b in (2, 16)]
  return [fitting.Cell(*x, model.mixed_s(*x)) for x in shapes]


def noisy(cells, seed, share=0.05):
  rng = np.random.default_rng(seed)
  return [c._replace(seconds=c.seconds * (1 + share * x))
          for c, x in zip(cells, rng.uniform(-1, 1, len(cells)),
                          strict=True)]


def times(units, free):
  return tuple(u * f for u, f in zip(units, free, strict=True))


AFFINES = st.builds(
    lambda p, d, m, each: Affine(
        times(UNITS, p), times((1e-2, 1e-6, 1e-4), d),
        mixed=times((1e-2, 1e-4, 1e-8, 1e-6), m), piece_s=1e-2 * each),
    *(st.tuples(*[POSITIVE] * n) for n in (3, 3, 4)), POSITIVE)


@settings(deadline=None, max_examples=40)
@given(AFFINES, st.sampled_from([Buckets(), Buckets(
    (32, 128, 512, 1024, 8192), (1, 4, 32), (8, 32))]))
def test_noiseless_data_give_the_constants_back(truth, buckets):
  truth = dataclasses.replace(truth, buckets=buckets)
  fitted = fitting.fit_affine(grid(truth), buckets)
  for field in ('prefill', 'decode', 'mixed', 'piece_s'):
    assert getattr(fitted, field) == pytest.approx(
        getattr(truth, field), rel=1e-3)
  assert all(r.worst < 1e-6 for r in fitting.residuals(
      fitted, grid(truth)).values())


@settings(deadline=None, max_examples=40)
@given(AFFINES, st.integers(0, 2**30))
def test_noise_of_five_percent_moves_predictions_less(truth, seed):
  exact = grid(truth)
  fitted = fitting.fit_affine(noisy(exact, seed))
  # What is predicted lies nearer to the truth than what was measured; which
  # constant says it is not certain, as batch and context go together.
  for kind, r in fitting.residuals(fitted, exact).items():
    assert r.mape < 0.04 and r.worst < 0.12, kind


def test_each_compiled_size_costs_what_its_steps_took():
  buckets = Buckets((32, 128, 512, 1024, 8192), (1, 4, 32), (8, 32))
  truth = Affine((1e-2, 2e-4, 1e-8), (1e-2, 1e-6, 1e-4),
                 mixed=(1e-2, 2e-4, 1e-8, 1e-6), buckets=buckets,
                 piece_s=1e-3, costs=Costs((40, 120, 600, 950, 8192),
                                           (30, 150, 500, 1024, 8192),
                                           (2, 60)))
  cells = grid(truth)
  for own in (buckets, Buckets()):  # a line alone cannot say it
    fitted = fitting.fit_affine(cells, own)
    errors = fitting.residuals(fitted, cells)
    for kind in ('prefill', 'mixed'):
      assert (errors[kind].worst < 0.01) == (own is buckets), (own, kind)


@pytest.mark.parametrize('seed', range(8))
def test_what_is_larger_than_all_compiled_sizes_takes_longer(seed):
  """Noise goes to the largest size's own costs, and none is faster beyond."""
  buckets = Buckets((32, 128, 512), (1, 4), (2, 4))
  truth = Affine((1e-2, 2e-4, 0), (1e-2, 1e-6, 1e-4), buckets=buckets,
                 mixed=(1e-2, 2e-4, 0, 1e-6))
  fitted = fitting.fit_affine(noisy(grid(truth), seed), buckets)
  assert fitted.costs.tokens
  for steps in ([fitted.prefill_s(((0, n),)) for n in range(500, 600)],
                [fitted.mixed_s(((0, n),), 4, 100) for n in range(500, 600)],
                [fitted.mixed_s(((0, 9),), b, 100) for b in range(3, 20)]):
    assert steps == sorted(steps)


def test_noise_of_five_percent_bounds_the_constants():
  truth = hardware.published('opt-13b', Plan())
  cells = grid(truth, (1, 2, 8, 16, 32, 64, 80, 96, 128, 160, 192), False)
  errors = []
  for seed in range(20):
    fitted = fitting.fit_affine(noisy(cells, seed))
    errors.append([abs(a / b - 1) for a, b in (
        (fitted.prefill[0], truth.prefill[0]),
        (fitted.prefill[1], truth.prefill[1]),
        (fitted.decode[0], truth.decode[0]),
        (fitted.decode[1], truth.decode[1]))])
  # A and B of each phase, of a fit by relative error to U(-5 %, 5 %) noise.
  assert np.max(errors) < 0.12


def test_the_split_is_found():
  truth = Affine((1, 1, 1), (20., 6e-4, 0.04), (7., 6e-4, 0.16), 64)
  cells = grid(truth, (1, 8, 32, 64, 96, 128, 192), False)
  fitted = fitting.fit_affine(cells)
  assert fitted.split == 64
  assert fitted.decode == pytest.approx(truth.decode, rel=1e-3)
  assert fitted.decode_large == pytest.approx(truth.decode_large, rel=1e-3)
  plain = dataclasses.replace(truth, decode_large=None, split=None)
  cells = grid(plain, (1, 8, 32, 64, 96), False)
  assert fitting.fit_affine(cells).split is None


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1e6)] * 4), min_size=1,
                max_size=12), st.data())
def test_no_data_make_a_constant_negative(rows, data):
  seconds = data.draw(st.lists(st.floats(1e-6, 1e3), min_size=len(rows),
                               max_size=len(rows)))
  constants, error = fitting.nonnegative(rows, seconds)
  assert (constants >= 0).all() and np.isfinite(constants).all()
  assert 0 <= error <= len(rows)


def test_nonnegative_is_what_projected_gradients_find():
  rng = np.random.default_rng(0)
  for _ in range(5):
    x, y = rng.uniform(0, 1, (20, 4)), rng.uniform(0.5, 1.5, 20)
    fitted, error = fitting.nonnegative(x, y)
    scaled = x / y[:, None]
    rival = np.zeros(4)
    rate = 1 / np.linalg.norm(scaled, 2)**2
    for _ in range(5000):
      rival = np.maximum(rival - rate * (scaled.T @ (scaled @ rival - 1)), 0)
    assert error == pytest.approx(((scaled @ rival - 1)**2).sum(), rel=1e-3)
    assert fitted == pytest.approx(rival, abs=1e-2)


def test_times_that_fall_with_size_give_zeros_and_a_large_residual():
  cells = [fitting.Cell(((0, n),), 0, 0, 1 / n) for n in LENGTHS]
  cells += [fitting.Cell((), b, b * n, 1 / (b * n)) for b in (1, 4, 16)
            for n in LENGTHS]
  fitted = fitting.fit_affine(cells)
  assert min(*fitted.prefill, *fitted.decode) >= 0
  wrong = fitting.residuals(fitted, cells)
  assert wrong['prefill'].mape > 0.3 and wrong['decode'].mape > 0.3
  assert wrong['prefill'].worst >= wrong['prefill'].mape
  # The worst cell is named.
  r = wrong['decode']
  assert abs(fitted.decode_s(r.cell.batch, r.cell.context)
             / r.cell.seconds - 1) == pytest.approx(r.worst)


def test_appendix_a_is_found_and_misses_what_it_cannot_say():
  config = zoo.config('opt-13b')
  truth = (4e-15, 3e-13, 0.012, 7e-11, 4e-11)
  cells = grid(latency.appendix_a(config, truth), mixed=False)
  assert fitting.fit_appendix_a(cells, config) == pytest.approx(truth, rel=1e-3)
  # The paper's decode has no term of the batch.
  cells = grid(hardware.published('opt-13b', Plan()), (1, 32, 95, 192), False)
  affine = fitting.residuals(fitting.fit_affine(cells), cells)
  paper = fitting.residuals(latency.appendix_a(
      config, fitting.fit_appendix_a(cells, config)), cells)
  assert paper['decode'].mape > 3 * affine['decode'].mape
  assert paper['decode'].worst > 0.1


@pytest.mark.parametrize('plans, link', [((Plan(),), 1.0),
                                         ((Plan(), Plan(4, 1)), 0.4)])
def test_shares_are_found(plans, link):
  """Over two models; the link's share where something crosses it."""
  truth = Shares(0.7, 0.8, 0.4, 5e-5, 2e-6)
  measured = [
      (Roofline(zoo.config(name), hardware.HARDWARE['a100-80g'], plan.tp,
                plan.pp, shares=truth)) for plan in plans
      for name in ('opt-13b', 'llama-3-8b')]
  fitted = fit_shares([
      (dataclasses.replace(model, shares=Shares(message_s=2e-6)), grid(model))
      for model in measured])
  assert fitted.link == pytest.approx(link, rel=0.02)
  assert fitted._replace(link=0.4) == pytest.approx(truth, rel=0.02)


@pytest.mark.parametrize('slower', [1, 5000])
def test_two_plans_measured_predict_a_third(slower):
  """Also on a device that is nowhere near the peaks that were named."""
  truth = Roofline(
      zoo.config('opt-13b'), hardware.HARDWARE['a100-80g'],
      shares=Shares(0.6 / slower, 0.8 / slower, 1 / slower, 5e-5))
  plans = {plan: dataclasses.replace(truth, tp=plan.tp, pp=plan.pp)
           for plan in (Plan(), Plan(2, 1), Plan(4, 2))}
  cells = {plan: noisy(grid(model), 0) for plan, model in plans.items()}
  wanted = Plan(4, 2)
  measured = {plan: cells[plan] for plan in plans if plan != wanted}
  fitted = fit_shares([(plans[plan], own) for plan, own in measured.items()])
  assert fitted[:2] == pytest.approx(truth.shares[:2], rel=0.05)
  fitted = dataclasses.replace(truth, shares=fitted)
  exact = dataclasses.replace(fitted, tp=wanted.tp, pp=wanted.pp)
  model = affine_of(fitted, wanted, measured[Plan()], Buckets())
  assert model.pp == 2
  # An Affine has no kink where operations come to outweigh bytes.
  for predicted, most in ((exact, 0.06), (model, 0.2)):
    for kind, r in fitting.residuals(predicted, cells[wanted]).items():
      assert r.mape < most, (kind, r)


def test_link():
  truth = latency.Link(1e-3, 5e9, 4096)
  n = (16, 64, 256, 1024)
  fitted = fitting.fit_link(n, [truth.migrate_s(x) for x in n], 4096)
  assert dataclasses.astuple(fitted) == pytest.approx(
      dataclasses.astuple(truth))
  with pytest.raises(InputError, match='longer'):
    fitting.fit_link(n, (1.0, 0.9, 0.8, 0.7), 4096)


@pytest.mark.parametrize('cells, part', [
    ([], 'kind prefill'),
    ([fitting.Cell(((0, 9),), 0, 0, 1.0)], 'kind decode'),
    ([fitting.Cell(((0, 9),), 0, 0, 0.0), fitting.Cell((), 1, 9, 1.0)],
     'seconds')])
def test_too_little_is_said(cells, part):
  with pytest.raises(InputError, match=part):
    fitting.fit_affine(cells)
  if not cells:
    with pytest.raises(InputError):
      fitting.fit_appendix_a(cells, tiny.CONFIG)
    with pytest.raises(InputError):
      fit_shares([(None, cells)])
