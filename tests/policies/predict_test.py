"""What policies predict."""

import dataclasses
import types

import pytest

from dsjax.policies import predict
from dsjax.scheduling.policy import Load
from dsjax.simulation import latency
from tests.common.policy_runs import STEP

FEW = latency.Affine((0.0, 0.0, 0.0), (0.01, 0.0, 1e-4))
LOAD = Load(1.0, 100.0, 1e9, lives=1.0)


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


def test_a_long_queue_of_some_is_predicted_by_its_first_prompts():
  queue = _queue(1000, []).waiting
  seconds = predict.queue_s(_queue(9, []), queue(1000))
  assert seconds == pytest.approx(500 * (
      STEP.prefill_s(((0, 100),)) + STEP.prefill_s(((0, 300),))))


def _room(rows, home=1, coming=0, begun=0, last=0, copied=0, load=LOAD,
          token_s=0.02005, places=400, context=0, steps=FEW):
  """Prompts of 100 tokens that may begin at instance 0 for rows at another,
  or for its own, whose steps take 10 ms and .1 ms a row."""
  instances = [types.SimpleNamespace(
      index=index, latency=steps, num_rows=0, context=context,
      config=types.SimpleNamespace(max_seqs=places), pulls=lambda: (),
      prefilling=lambda: (), num_last=0, residents=0) for index in (0, 1)]
  prefills, decodes = instances[0], instances[home]
  prefills.prefilling, prefills.num_last = lambda: [None] * begun, last
  prefills.residents = begun + last
  decodes.num_rows = rows
  decodes.residents += rows + copied
  decodes.pulls = lambda: [types.SimpleNamespace(prompt_len=100)] * coming
  view = types.SimpleNamespace(
      instances=instances, decodes=[decodes], load=load, knows_link=True,
      link=types.SimpleNamespace(migrate_s=lambda tokens: 0.001))
  return predict.room(view, prefills, lambda instance: token_s)


def test_room_is_what_steps_of_rows_leave():
  """100 rows take .02 s a step; nothing is lost where outputs are long."""
  assert _room(0) == predict.LISTED
  assert _room(5, token_s=0.01) == predict.LISTED  # one alone takes longer
  assert [_room(rows) for rows in (10, 90, 99, 100, 120)] == [
      predict.LISTED, 10, 1, 0, 0]
  assert _room(90, home=0) == 10  # its own
  assert _room(90, coming=4) == 6 and _room(90, begun=4) == 6
  assert _room(120, begun=4) == -4
  assert _room(90, last=4) == _room(90, copied=4) == 6
  assert _room(90, home=0, begun=4, last=2) == 4  # not counted twice
  assert _room(90, token_s=0.01955) == 5


def test_the_wait_for_the_first_step_takes_room_where_outputs_are_short():
  """Not of a row that stays where its prompt is computed."""
  short = LOAD._replace(output_len=50.0, output_cv=0.2)
  assert 0 < _room(90, load=short) < 10
  assert _room(90, home=0, load=short) == 10
  varied = short._replace(output_cv=1.5)
  assert _room(90, load=varied) < _room(90, load=short)


def test_the_rows_that_come_are_as_long_as_those_there():
  longer = latency.Affine((0.0, 0.0, 0.0), (0.01, 1e-7, 9e-5))
  assert _room(50, context=50 * 100, steps=longer) == 50
  assert _room(50, context=50 * 1000, steps=longer) == 2


def test_outputs_of_which_none_has_ended_are_not_taken_for_short():
  """A load tells them to have one token."""
  unknown = LOAD._replace(output_len=1.0, lives=0.0)
  slow = dataclasses.replace(FEW, prefill=(0.3, 0.0, 0.0))
  assert _room(90, load=unknown) == _room(90, load=unknown, steps=slow) == 10
  assert _room(90, load=unknown._replace(lives=0.1)) == 0


def test_rows_that_end_meanwhile_make_room():
  """A prompt of 1 s is as long as 50 steps: of 100 rows of 500 tokens 10
  end."""
  slow = dataclasses.replace(FEW, prefill=(1.0, 0.0, 0.0))
  load = LOAD._replace(output_len=500.0, output_cv=0.0)
  assert 6 <= _room(100, steps=slow, load=load) <= 10
  assert _room(105, steps=slow, load=load) == _room(
      100, steps=slow, load=load) - 5
  assert _room(130, steps=slow, load=load) == 0


@pytest.mark.parametrize('prompt_s', [0.14, 1.0])
def test_no_more_rows_end_meanwhile_than_there_are(prompt_s):
  """Beside outputs of 5 steps of .02 s."""
  slow = dataclasses.replace(FEW, prefill=(prompt_s, 0.0, 0.0))
  short = LOAD._replace(output_len=5.0, output_cv=0.0)
  assert _room(100, home=0, steps=slow, load=short) == predict.LISTED


@pytest.mark.parametrize('steps', [
    FEW, latency.Affine((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))])
@pytest.mark.parametrize('rows, coming, places', [
    (1, 0, 1), (2, 0, 1), (0, 1, 1), (1, 40, 4), (1, 0, 400)])
def test_room_of_few_places_and_steps_that_take_no_time(
    steps, rows, coming, places):
  """Nothing is divided by the time of a step without rows."""
  for output_len in (1.0, 100.0):
    load = LOAD._replace(output_len=output_len)
    assert 0 <= _room(rows, coming=coming, places=places, steps=steps,
                      load=load, context=1000 * rows) <= predict.LISTED


def test_what_finds_no_place_waits_for_an_end():
  """All places are taken: a step takes .015 s, and each of 50 rows ends after
  so many tokens. Few wait meanwhile, and none where outputs are short."""
  options = {'places': 50, 'token_s': 0.02}
  assert _room(40, **options) == 10 + _room(50, **options)
  assert 0 <= _room(50, **options) < 10
  assert _room(60, **options) == 0


@pytest.mark.parametrize('tokens, cv, share', [
    (0, 1.0, 1.0), (100 / 2**0.5, 1.0, 0.5), (18, 1.0, 0.95), (1e9, 1.0, 0.0),
    (90, 0.0, 0.97), (110, 0.0, 0.03)])
def test_the_share_of_longer_outputs(tokens, cv, share):
  load = LOAD._replace(output_len=100.0, output_cv=cv)
  assert predict.longer(load, tokens) == pytest.approx(share, abs=0.02)
