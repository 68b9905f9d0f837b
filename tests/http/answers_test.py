"""What it answers, asked by OpenAI's client."""

import asyncio
import dataclasses
import json

import httpx
import jax
import openai
import pytest

from dsjax.config.request import Sampling
from dsjax.runtime.orchestrator import serve
from tests.common.fake_engine import FakeEngine, expected
from tests.common.web import (
  CHAT,
  CONFIG,
  MODEL,
  PLACEMENT,
  WAIT_S,
  Running,
  complete,
  ids,
  only,
  paced,
  post,
)


def joined(stream):
  """{choice: text} of a stream of completions."""
  texts = {}
  for chunk in stream:
    for choice in chunk.choices:
      texts[choice.index] = texts.get(choice.index, '') + choice.text
  return texts


def test_models(client):
  listed, = client.models.list().data
  assert listed.id == 'tiny' and listed.max_model_len == 256
  assert client.models.retrieve('tiny').id == 'tiny'
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('gpt-4')


def test_an_answer_has_its_log_probabilities_and_its_usage(client):
  answer = complete(client, temperature=0, max_tokens=8, logprobs=2,
                    extra_body={'ignore_eos': True})
  choice, = answer.choices
  assert choice.text == MODEL.tokenizer.decode(expected(
      ids('Why?'), Sampling(max_tokens=8, ignore_eos=True), (),
      MODEL.config.vocab_size))
  assert choice.finish_reason == 'length'
  assert choice.logprobs.token_logprobs == [-1] * 8
  assert len(choice.logprobs.top_logprobs) == 8
  assert choice.logprobs.text_offset[0] == 0
  assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 8)
  assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_may_be_ids_texts_or_a_batch_of_either(client):
  def text(prompt):
    said = complete(client, prompt=prompt, temperature=0, max_tokens=6)
    assert [c.index for c in said.choices] == list(range(len(said.choices)))
    return [c.text for c in said.choices]
  one, two = text('Why?'), text('How?')
  assert one != two
  assert text(ids('Why?')) == one
  assert text(['Why?', 'How?']) == text([ids('Why?'), ids('How?')]) == one + two


def test_chat(client):
  def ask(**options):
    return client.chat.completions.create(
        model='tiny', temperature=0, max_completion_tokens=6, seed=1,
        messages=[{'role': 'user', 'content': 'Hi'}], **options)
  said = ask(logprobs=True, top_logprobs=3)
  prompt = MODEL.tokenizer.chat([{'role': 'user', 'content': 'Hi'}])
  assert said.usage.prompt_tokens == len(prompt)
  choice, = said.choices
  assert choice.message.role == 'assistant'
  content = choice.logprobs.content
  assert b''.join(bytes(c.bytes) for c in content).decode(
      errors='replace') == choice.message.content
  assert all(len(c.top_logprobs) == 3 for c in content)
  # Greedy: the token chosen is the likeliest.
  assert all(c.logprob == c.top_logprobs[0].logprob for c in content)
  chunks = list(ask(stream=True, stream_options={'include_usage': True}))
  assert chunks[0].choices[0].delta.role == 'assistant'
  assert not chunks[-2].choices[0].delta.model_dump(exclude_none=True)
  assert not any(c.choices[0].finish_reason for c in chunks[:-2])
  assert ''.join(c.choices[0].delta.content or '' for c in chunks[:-1]) == (
      choice.message.content)
  assert chunks[-2].choices[0].finish_reason == choice.finish_reason
  assert chunks[-1].usage.total_tokens == said.usage.total_tokens
  assert not chunks[-1].choices
  parts = [{'type': 'text', 'text': 'H'}, {'type': 'text', 'text': 'i'}]
  again = client.chat.completions.create(
      model='tiny', temperature=0, max_tokens=6,
      messages=[{'role': 'user', 'content': parts}])
  assert again.choices[0].message.content == choice.message.content


@pytest.mark.parametrize('text', ['€', 'ж', 'ไ', '語', '\U0001f41d'])
def test_a_stream_joins_to_the_whole_text_whatever_the_script(client, text):
  options = {'logit_bias': only(text), 'max_tokens': 240}
  for seed in range(40):  # until there are whole characters, and pieces
    whole = complete(client, seed=seed, **options).choices[0].text
    if text in whole and '\ufffd' in whole:
      break
  assert text in whole and '\ufffd' in whole
  assert joined(complete(client, seed=seed, stream=True, **options)) == {
      0: whole}
  messages = [{'role': 'user', 'content': text}]

  def chat(**more):
    return client.chat.completions.create(
        model='tiny', messages=messages, seed=seed, logprobs=True,
        **options | {'max_tokens': 60} | more)
  whole = chat().choices[0]
  assert ''.join(c.choices[0].delta.content or '' for c in chat(
      stream=True)) == whole.message.content
  # Whoever wants the bytes of the pieces has them in the logprobs.
  assert b''.join(bytes(c.bytes) for c in whole.logprobs.content).decode(
      errors='replace') == whole.message.content


def test_usage_may_come_with_every_chunk(running, client):
  counts = []
  with paced(running, 2) as pace:  # no more until there was a chunk
    for chunk in complete(client, stream=True, extra_body={'stream_options': {
        'include_usage': True, 'continuous_usage_stats': True}}):
      pace.left = None
      counts.append(chunk.usage.completion_tokens)
  assert counts == sorted(counts) and counts[-1] == 24 and counts[0] < 24


def test_stop_strings_end_the_text_across_tokens(client):
  def ask(**options):
    return complete(client, extra_body={
        'ignore_eos': True, 'min_tokens': options.pop('least', 0)}, **options)
  whole = ask().choices[0].text
  stop = whole[5:8]
  at = whole.index(stop)
  choice = ask(stop=['never', stop]).choices[0]
  assert (choice.text, choice.finish_reason) == (whole[:at], 'stop')
  assert joined(ask(stop=stop, stream=True)) == {0: whole[:at]}
  # What would end it with the last of the least is passed over.
  assert ask(stop=stop, least=24).choices[0].text == whole
  assert ask(stop=whole[0], least=1).choices[0].text[0] == whole[0]


def test_seeds_and_n(client):
  n = complete(client, n=3)
  texts = [c.text for c in n.choices]
  assert len(set(texts)) == 3 and n.usage.prompt_tokens == 4
  assert texts == [complete(client, seed=7 + i).choices[0].text
                   for i in range(3)]
  assert joined(complete(client, n=3, stream=True)) == dict(enumerate(texts))
  unseeded = {complete(client, seed=openai.omit).choices[0].text
              for _ in range(2)}
  assert len(unseeded) == 2


@pytest.mark.parametrize('field, value', [
    ('temperature', 0.0), ('top_p', 0.1), ('presence_penalty', 2.0),
    ('frequency_penalty', 2.0), ('logit_bias', {'70': 100}),
    ('top_k', 1), ('min_p', 0.9), ('repetition_penalty', 5.0),
    ('stop_token_ids', list(range(64)))])
def test_every_sampling_field_changes_the_answer(client, field, value):
  def text(body):
    return complete(client, max_tokens=40, extra_body=body).choices[0].text
  assert text({field: value}) != text({})


def test_fifty_streams_at_once_say_what_each_says_alone(running, client):
  alone = [complete(client, seed=i).choices[0].text for i in (0, 49)]

  async def all_of_them():
    async with openai.AsyncOpenAI(base_url=running.url + '/v1', api_key='-',
                                  max_retries=0, timeout=WAIT_S) as asking:
      async def ask(seed):
        stream = await asking.completions.create(
            model='tiny', prompt='Why?', max_tokens=24, seed=seed,
            stream=True)
        return ''.join([c.choices[0].text async for c in stream])
      return await asyncio.gather(*map(ask, range(50)))
  texts = asyncio.run(all_of_them())
  assert [texts[0], texts[49]] == alone


def test_tokens_leave_before_what_follows_from_them(running, client,
                                                    monkeypatch):
  service, seen = running.service, []
  fleet, say = service.orchestrator.fleet, service.runner._say
  perform = fleet.perform

  def performed(command):
    seen.append(type(command).__name__)
    return perform(command)

  def said(function, updates):
    seen.append(sum(len(u.tokens) for _, u in updates))
    say(function, updates)
  monkeypatch.setattr(fleet, 'perform', performed)
  monkeypatch.setattr(service.runner, '_say', said)
  complete(client, prompt='Why?', max_tokens=6)
  assert seen[:3] == ['RunPrefill', 1, 'Migrate']


def test_tokenize_and_back(running):
  text = 'Ολα καλά \U0001f41d'
  said = post(running, '/tokenize', {'prompt': text}).json()
  assert said['tokens'] == ids(text) and said['count'] == len(ids(text))
  back = post(running, '/detokenize', {'tokens': said['tokens']}).json()
  assert back == {'prompt': text}
  messages = CHAT['messages']
  assert post(running, '/tokenize', {'messages': messages}).json()[
      'tokens'] == MODEL.tokenizer.chat(messages)
  for body in ({}, {'prompt': 'a', 'messages': messages}):
    assert post(running, '/tokenize', body).status_code == 400
  assert post(running, '/detokenize', {'tokens': [260]}).status_code == 400


def test_of_several_answers_a_prompt_is_counted_once():
  """Cached tokens are those that were there before the call."""
  def make(report):
    config = dataclasses.replace(CONFIG, prefix_cache=True)
    return serve(MODEL, PLACEMENT, config, devices=jax.devices()[:2],
                 report=report, make_engine=FakeEngine)
  running = Running(make)
  try:
    running.await_status('ready')
    body = {'model': 'tiny', 'prompt': ['a' * 40, 'b' * 40], 'n': 3,
            'max_tokens': 4, 'seed': 1}
    for known, more in (
        (0, {}), (64, {}),
        (64, {'stream': True, 'stream_options': {'include_usage': True}})):
      answer = httpx.post(running.url + '/v1/completions', json=body | more,
                          timeout=WAIT_S)
      usage = (json.loads(answer.text.split('data: ')[-2]) if more
               else answer.json())['usage']
      assert usage['prompt_tokens'] in (80, 82)
      assert usage['prompt_tokens_details']['cached_tokens'] == known
  finally:
    running.stop()
