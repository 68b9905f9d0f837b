"""Log-probabilities and what may end an answer, token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config.request import MAX_LOGPROBS
from dsjax.http.openai_answers import ResponseBuilder
from dsjax.http.openai_schema import Chat, Completion
from dsjax.runtime.output import Update, joined
from tests.common.web import CHAT, MODEL, TEXT, complete, ids

EOS = MODEL.config.eos_ids[0]


def builder(body):
  return ResponseBuilder(body, 'id', 0, [2], MODEL.tokenizer)


def update(tokens, text, count=MAX_LOGPROBS, reason='length'):
  """Of tokens that are not among their own likeliest."""
  likeliest = [(token, (token + 1 + i) % 256) for token in tokens
               for i in range(count)]
  rows = [tuple((other, -1.0) for of, other in
                likeliest[i * count:(i + 1) * count] if of == token)
          for i, token in enumerate(tokens)]
  return Update(text, tuple(tokens),
                tuple((-9.0, row) for row in rows), reason)


def logprobs_of(text, cut=None, **options):
  body = Completion(**TEXT, logprobs=MAX_LOGPROBS)
  return builder(body).full([update(ids(text), cut or text, **options)])[
      'choices'][0]['logprobs']


@pytest.mark.parametrize('text', ['\U0001f41d', 'aжb', '€€', 'ไ語a'])
def test_each_token_has_its_entries_and_its_place(text):
  raw, said = text.encode(), logprobs_of(text)
  names = said['tokens']
  assert len(names) == len(raw) == len(said['top_logprobs'])
  place = 0
  for i, (name, offset) in enumerate(zip(names, said['text_offset'],
                                         strict=True)):
    place = len(raw[:i + 1].decode(errors='replace')) - 1
    assert offset == place
    if raw[i] < 128:
      assert name == text[offset]
    else:
      assert name == f'bytes:\\x{raw[i]:02x}'
  for name, top in zip(names, said['top_logprobs'], strict=True):
    assert len(top) == MAX_LOGPROBS + 1 and top[name] == -9.0


def test_tokens_of_the_same_text_have_an_entry_each():
  class Twins:
    def token_bytes(self, token):
      return b'A' if token < 3 else b''
  body = Completion(**TEXT, logprobs=4)
  row = (-1.0, ((0, -1.0), (1, -2.0), (2, -3.0), (7, -4.0)))
  said = ResponseBuilder(body, 'id', 0, [2], Twins()).full(
      [Update('A', (0,), (row,), 'length')])['choices'][0]['logprobs']
  assert said['top_logprobs'] == [{
      'A': -1.0, 'token_id:1': -2.0, 'token_id:2': -3.0, 'token_id:7': -4.0}]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from((0x41, 0xf0, 0x9f, 0x90, 0x9d, 0xe2, 0x82,
                                 0xac, 0x80, 0xff)), max_size=12),
       st.integers(0, 12))
def test_places_whatever_the_bytes_and_the_pieces(raw, cut):
  by_byte = {MODEL.tokenizer.token_bytes(i)[0]: i for i in range(256)}
  tokens = [by_byte[byte] for byte in raw]
  text = bytes(raw).decode(errors='replace')
  want = [len(bytes(raw[:i + 1]).decode(errors='replace')) - 1
          for i in range(len(raw))]
  body = Completion(**TEXT, logprobs=1)
  whole = builder(body).full([update(tokens, text, 1)])
  assert whole['choices'][0]['logprobs']['text_offset'] == want
  streamed = builder(body)
  pieces = [update(tokens[:cut], '', 1, None), update(tokens[cut:], text, 1)]
  assert [x for piece in pieces for chunk in streamed.chunks(0, piece)
          for x in chunk['choices'][0]['logprobs']['text_offset']] == want


def test_places_stay_in_a_text_that_a_stop_string_cut():
  assert logprobs_of('abcd', 'ab', reason='stop')['text_offset'] == [0, 1, 2, 2]


def test_a_chat_names_its_tokens_alike():
  body = Chat(**CHAT, logprobs=True, top_logprobs=2)
  made = builder(body)
  chunks = made.chunks(0, update(ids('é'), 'é', 2))
  assert [c['choices'][0]['delta'] for c in chunks] == [
      {'role': 'assistant', 'content': ''}, {'content': 'é'}, {}]
  assert [c['choices'][0]['finish_reason'] for c in chunks] == [
      None, None, 'length']
  entries = chunks[1]['choices'][0]['logprobs']['content']
  assert [e['token'] for e in entries] == ['bytes:\\xc3', 'bytes:\\xa9']
  assert [e['bytes'] for e in entries] == [[0xc3], [0xa9]]
  assert all(len(e['top_logprobs']) == 2 for e in entries)
  assert made.chunks(0, Update(reason='stop'))[0]['choices'][0] == {
      'index': 0, 'finish_reason': 'stop', 'logprobs': None, 'delta': {}}


def test_logprobs_over_emoji(client):
  choice, = complete(client, logprobs=20, max_tokens=40, prompt='\U0001f41d',
                     extra_body={'ignore_eos': True}).choices
  said = choice.logprobs
  assert all(len(top) >= 20 and name in top for name, top in zip(
      said.tokens, said.top_logprobs, strict=True))
  assert max(said.text_offset) <= len(choice.text)
  for name, offset in zip(said.tokens, said.text_offset, strict=True):
    if len(name) == 1:
      assert choice.text[offset] == name


# --- min_tokens ---------------------------------------------------------------


@pytest.mark.parametrize('least', (1, 3))
def test_a_stop_string_that_token_n_completes_is_passed_over(client, least):
  def text(**more):
    return complete(client, max_tokens=40, logit_bias={
        str(i): 100 for i in ids('ab')}, **more).choices[0]
  whole = text().text
  stop = whole[least - 1]
  end = whole.index(stop, least)
  cut = text(stop=stop, extra_body={'min_tokens': least})
  assert (cut.text, cut.finish_reason) == (whole[:end], 'stop')


@pytest.mark.parametrize('end', (EOS, ids('b')[0]))
def test_what_would_end_it_too_soon_is_not_said(client, end):
  """Not passed over: it must not be in what the model reads next."""
  bias = {str(i): 100 for i in (end, ids('a')[0])}
  for seed in range(8):
    answer = complete(client, seed=seed, logit_bias=bias, max_tokens=60,
                      logprobs=0, extra_body={
                          'min_tokens': 5, 'stop_token_ids': [ids('b')[0]]})
    names = answer.choices[0].logprobs.tokens
    assert names[:5] == ['a'] * 5
    assert answer.choices[0].finish_reason == 'stop' and len(names) >= 6


def test_updates_join_as_they_would_come_at_once():
  parts = [update(ids('a'), 'a', 1, None), update(ids('b'), 'b', 1)]
  body = Completion(**TEXT, logprobs=1)
  assert builder(body).full([joined(parts)])['choices'][0]['text'] == 'ab'
