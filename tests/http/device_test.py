"""The HTTP server over real engines: dense tokens, and no compilation."""

import functools
import threading

import jax.monitoring
import numpy as np
import openai
import pytest

from dsjax.runtime.engine import Engine
from tests.common import tiny
from tests.common.web import MODEL, WAIT_S, Running, all_back, make


@pytest.fixture(scope='module')
def client():
  compiled = []

  def note(name, *_, **__):
    if (name == '/jax/core/compile/backend_compile_duration'
        and threading.current_thread()
        is running.service.orchestrator.thread):
      compiled.append(name)
  running = Running(functools.partial(make, make_engine=Engine))
  try:
    running.await_status('ready', 'failed')
    assert running.service.status == 'ready', running.service.error
    jax.monitoring.register_event_duration_secs_listener(note)
    with openai.OpenAI(base_url=running.url + '/v1', api_key='-',
                       max_retries=0, timeout=WAIT_S) as client:
      yield client
    jax.monitoring.unregister_event_duration_listener(note)
    all_back(running)
    assert not compiled
  finally:
    running.stop()


def greedy(prompt, count):
  """Tokens by the dense pass, with the model's log-probabilities."""
  tokens, logprobs = list(prompt), []
  for _ in range(count):
    logits_V = tiny.dense_logits(tokens, MODEL.config, MODEL.params)[-1]
    tokens.append(int(np.argmax(logits_V)))
    logprobs.append(float(tiny.log_softmax(logits_V)[tokens[-1]]))
  return tokens[len(prompt):], logprobs


def test_greedy_tokens_are_those_of_the_dense_pass(client):
  tokens, logprobs = greedy(MODEL.tokenizer.encode('Why?'), 8)
  answer = client.completions.create(
      model='tiny', prompt='Why?', temperature=0, max_tokens=8, logprobs=2,
      extra_body={'ignore_eos': True})
  choice, = answer.choices
  assert choice.text == MODEL.tokenizer.decode(tokens)
  assert choice.finish_reason == 'length'
  np.testing.assert_allclose(choice.logprobs.token_logprobs, logprobs,
                             atol=2e-3)
  assert len(choice.logprobs.top_logprobs) == 8
  assert choice.logprobs.text_offset[0] == 0
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)
  assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_many_answers_at_once_are_those_of_each_alone(client):
  def ask(**options):
    return [c.text for c in client.completions.create(
        model='tiny', max_tokens=24, seed=7, temperature=1.0, **options
        ).choices]
  texts = ask(prompt=['Why?', 'How?'], n=4)
  assert texts == ask(prompt='Why?', n=4) + ask(prompt='How?', n=4)
  assert len(set(texts)) == 8


def test_no_eos_before_min_tokens(client):
  def ask(least):
    return client.completions.create(
        model='tiny', prompt='Why?', temperature=0, max_tokens=12,
        logit_bias={str(i): 100 for i in MODEL.config.eos_ids}, logprobs=0,
        extra_body={'min_tokens': least})
  assert ask(0).usage.completion_tokens == 1
  answer = ask(5)
  assert answer.usage.completion_tokens == 6
  assert answer.choices[0].finish_reason == 'stop'
  ends = {f'token_id:{i}' for i in MODEL.config.eos_ids}
  names = answer.choices[0].logprobs.tokens
  assert not ends & {*names[:5]} and names[5] in ends
