"""What policies predict."""

import types

import pytest

from dsjax.policies import predict
from tests.common.policy_runs import STEP


def _queue(count, asked):
  """An instance before which so many prompts wait, of 100 and 300 tokens."""
  waiting = [types.SimpleNamespace(done=0, stop=300 if n % 2 else 100)
             for n in range(count)]

  def first(most):
    asked.append(most)
    return waiting[:most]

  return types.SimpleNamespace(
      latency=STEP, pieces=(), num_waiting=count,
      backlog=sum(request.stop for request in waiting), waiting=first,
      prefilling=lambda: (), hit_tokens=lambda request: 0)


@pytest.mark.parametrize('count', [0, 1, predict.LISTED, 5000])
def test_a_queue_is_predicted_by_its_first_prompts_and_its_tokens(count):
  asked = []
  seconds = predict.queue_s(_queue(count, asked))
  each_s = [STEP.prefill_s(((0, size),)) for size in (100, 300)]
  assert seconds == pytest.approx(
      sum(each_s) * (count // 2) + each_s[0] * (count % 2))
  assert asked == [predict.LISTED]
