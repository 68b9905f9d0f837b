"""Closed forms against each other, known values and sampled queues."""

import math
import random

import pytest

from dsjax.config.checks import InputError
from experiments.paper import queueing


def sampled_waits(rate, service, n, seed=0):
  """Lindley's recursion for M/D/1."""
  draw, wait, waits = random.Random(seed), 0.0, []
  for _ in range(n):
    waits.append(wait)
    wait = max(0.0, wait + service - draw.expovariate(rate))
  return waits


def test_the_papers_equations():
  rate, d, k = 3.0, 0.2, 1.6
  assert queueing.md1_ttft_s(rate, d) == pytest.approx(
      d + rate * d**2 / (2 * (1 - rate * d)))
  assert queueing.pipeline_ttft_s(rate, d) == pytest.approx(
      d + rate * d**2 / (4 * (2 - rate * d)))
  assert queueing.tensor_ttft_s(rate, d, k) == pytest.approx(
      d / k + rate * d**2 / (2 * k * (k - rate * d)))


def test_forms_agree_where_they_meet():
  assert queueing.pipeline_ttft_s(2, 0.3, 1) == queueing.md1_ttft_s(2, 0.3)
  assert queueing.tensor_ttft_s(2, 0.3, 1) == queueing.md1_ttft_s(2, 0.3)
  low, high = queueing.mdc_ttft_bounds_s(3, 0.4, 2)
  assert low < high == queueing.md1_ttft_s(1.5, 0.4)


def test_crossover():
  rate = queueing.crossover_rate_per_s(0.2, 1.5)
  assert queueing.tensor_ttft_s(rate, 0.2, 1.5) == pytest.approx(
      queueing.pipeline_ttft_s(rate, 0.2))
  assert (queueing.tensor_ttft_s(rate / 2, 0.2, 1.5)
          < queueing.pipeline_ttft_s(rate / 2, 0.2))


def test_wait_distribution():
  rate, d = 4.0, 0.2
  assert queueing.md1_wait_cdf(rate, d, 0.0) == pytest.approx(1 - rate * d)
  step = d / 40
  mean = sum((1 - queueing.md1_wait_cdf(rate, d, (n + 0.5) * step)) * step
             for n in range(1000))
  assert mean == pytest.approx(queueing.md1_wait_s(rate, d), rel=1e-3)
  waits = sampled_waits(rate, d, 100_000)
  share = sum(w <= 0.5 for w in waits) / len(waits)
  assert queueing.md1_wait_cdf(rate, d, 0.5) == pytest.approx(share, abs=0.02)
  far = [queueing.md1_wait_cdf(rate, d, n * d) for n in range(0, 120, 10)]
  assert far == sorted(far) and far[-1] == pytest.approx(1, abs=1e-12)


def test_known_values():
  assert queueing.dd1_time_s(1.0, 0.5, 7) == 0.5
  assert queueing.dd1_time_s(1.0, 1.5, 7) == 5.0
  assert queueing.load(3, 0.5, 2) == 0.75
  assert queueing.mean_context([10, 30], [4, 4]) == 22
  assert queueing.decode_tpot_s(0, 100, 0.02, 1e-4) == 0.02
  assert queueing.batch_ttft_bound_s(1e-9, 0.2, 0.1) == pytest.approx(0.3)


@pytest.mark.parametrize('call', [
    lambda q: q.md1_wait_s(5, 0.2),
    lambda q: q.tensor_ttft_s(6, 0.3, 1.5), lambda q: q.md1_ttft_s(-1, 0.2),
    lambda q: q.pipeline_ttft_s(5, 0.4, 2), lambda q: q.load(1, 0),
    lambda q: q.md1_ttft_s(math.nan, 0.2),
    lambda q: q.batch_ttft_bound_s(10, 0.1, 0.1),
    lambda q: q.decode_tpot_s(100, 100, 0.02, 1e-4),
    lambda q: q.mean_context([], []), lambda q: q.dd1_time_s(1, 1, -1),
    lambda q: q.crossover_rate_per_s(0.2, 2.0)])
def test_outside_its_domain(call):
  with pytest.raises(InputError):
    call(queueing)
