"""What clients send: histories, fields of no consequence, and errors.

The official client's types are the list: a field that they gain fails here.
"""


import httpx
import openai
import openai.types.chat as chat_types
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from dsjax.http.openai_messages import Message
from tests.common.web import CHAT, TEXT, ids, post

CALL = {'id': 'call_1', 'type': 'function',
        'function': {'name': 'add', 'arguments': '{"a": 1}'}}
CUSTOM = {'id': 'call_2', 'type': 'custom',
          'custom': {'name': 'run', 'input': 'ls'}}
USER = {'role': 'user', 'content': 'Hi'}
ROLES = ('assistant', 'developer', 'function', 'system', 'tool', 'user')
# Any value of these says nothing about the answer.
NOTHING = {
    'metadata': {'a': 'b'}, 'parallel_tool_calls': True,
    'prediction': {'type': 'content', 'content': 'a'},
    'prompt_cache_key': 'a', 'prompt_cache_options': {'mode': 'explicit'},
    'prompt_cache_retention': '24h', 'safety_identifier': 'a',
    'service_tier': 'flex', 'store': True, 'user': 'me'}
# These are refused, but for the value that asks for nothing.
REFUSED = {
    'audio': ({'voice': 'a', 'format': 'wav'}, None),
    'echo': (True, False), 'function_call': ({'name': 'f'}, 'none'),
    'functions': ([{'name': 'f'}], []), 'modalities': (['audio'], ['text']),
    'moderation': ({'model': 'a'}, None), 'reasoning_effort': ('high', 'none'),
    'response_format': ({'type': 'json_schema', 'json_schema': {'name': 'a'}},
                        {'type': 'text'}),
    'suffix': ('a', ''), 'tool_choice': ('required', 'auto'),
    'tools': ([{'type': 'function', 'function': {'name': 'f'}}], []),
    'best_of': (2, 1), 'verbosity': ('low', 'medium'),
    'web_search_options': ({}, None)}
SERVED = {
    'frequency_penalty', 'logit_bias', 'logprobs', 'max_completion_tokens',
    'max_tokens', 'messages', 'model', 'n', 'presence_penalty', 'prompt',
    'seed', 'stop', 'stream', 'stream_options', 'temperature', 'top_logprobs',
    'top_p'}
NEEDED = {'messages', 'model'}
WAYS = {'/v1/chat/completions': (CHAT, chat_params),
        '/v1/completions': (TEXT, completion_params)}


def fields_of(params):
  return {*params.CompletionCreateParamsBase.__annotations__, 'stream'}


def refusal(running, path, body):
  """(message, param) of a 400."""
  answer = post(running, path, body)
  assert answer.status_code == 400, answer.text
  return answer.json()['error']['message'], answer.json()['error']['param']


# --- fields -------------------------------------------------------------------


@pytest.mark.parametrize('path', WAYS)
def test_every_field_of_the_official_client_is_known(running, path):
  body, params = WAYS[path]
  body = body | {'max_tokens': 2}
  fields = fields_of(params)
  assert fields <= {*NOTHING, *REFUSED, *SERVED}
  nulls = dict.fromkeys(fields - NEEDED)  # a prompt is then a new document
  assert post(running, path, body | nulls).status_code == 200
  for field in fields - NEEDED:
    answer = post(running, path, body | {field: None})
    assert answer.status_code == 200, answer.text
  nothing = {field: NOTHING[field] for field in fields & {*NOTHING}}
  answer = post(running, path, body | nothing)
  assert answer.status_code == 200, answer.text
  for field in fields & {*REFUSED}:
    asked, unasked = REFUSED[field]
    message, param = refusal(running, path, body | {field: asked})
    assert param == field and message.startswith(field)
    answer = post(running, path, body | {field: unasked})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize('body', [
    CHAT | {'foo': None}, CHAT | {'messages': [USER | {'foo': None}]},
    CHAT | {'messages': [USER | {'content': [
        {'type': 'text', 'text': 'a', 'foo': None}]}]},
    CHAT | {'messages': [USER, {'role': 'assistant', 'tool_calls': [
        CALL | {'foo': None}]}]},
    CHAT | {'stream': True, 'stream_options': {'foo': None}}])
def test_a_field_that_is_not_known_may_be_null(running, body):
  answer = post(running, '/v1/chat/completions', body | {'max_tokens': 2})
  assert answer.status_code == 200, answer.text


def test_null_is_the_default(running):
  def answer(**more):
    return post(running, '/v1/completions', TEXT | {
        'seed': 3, 'ignore_eos': True} | more).json()['choices'][0]['text']
  assert answer(max_tokens=None) == answer() == answer(max_tokens=16)
  assert answer(temperature=None) == answer(temperature=1)


# --- histories ----------------------------------------------------------------


@pytest.mark.parametrize('role', ROLES)
def test_every_field_of_a_message_may_be_null(running, role):
  params = getattr(chat_types, f'ChatCompletion{role.title()}MessageParam')
  needed = {'role': role, 'content': 'Hi'} | {
      'tool': {'tool_call_id': 'call_1'}, 'function': {'name': 'f'}
      }.get(role, {})
  nulls = dict.fromkeys(set(params.__annotations__) - set(needed))
  answer = post(running, '/v1/chat/completions', CHAT | {
      'messages': [needed | nulls], 'max_tokens': 2})
  assert answer.status_code == 200, answer.text


def test_an_answer_may_be_sent_back_as_it_came(client):
  said = client.chat.completions.create(
      model='tiny', messages=[USER], max_tokens=2).choices[0].message
  assert set(chat_types.ChatCompletionMessage.model_fields) <= {
      *said.model_dump(), *Message.model_fields}
  for again in (said, said.model_dump(), said.to_dict()):
    client.chat.completions.create(
        model='tiny', messages=[USER, again, USER], max_tokens=2)


@pytest.mark.parametrize('messages', [
    [USER, {'role': 'assistant', 'content': None}],
    [USER, {'role': 'assistant'}, USER],
    [USER | {'name': 'Zoë'}],
    [USER, {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
     {'role': 'tool', 'tool_call_id': 'call_1', 'content': '2'}],
    [USER, {'role': 'assistant', 'content': '', 'tool_calls': []}],
    [USER, {'role': 'assistant', 'content': None, 'refusal': 'No.',
            'annotations': []}],
    [USER, {'role': 'assistant', 'content': [
        {'type': 'refusal', 'refusal': 'No.'}]}],
    [USER, {'role': 'assistant', 'content': None, 'function_call':
            CALL['function']}, {'role': 'function', 'name': 'f',
                                'content': None}],
    [USER, {'role': 'assistant', 'content': None, 'tool_calls': [CUSTOM]}],
    [{'role': 'tool', 'tool_call_id': 'a', 'content': [
        {'type': 'text', 'text': '2', 'prompt_cache_breakpoint': None}]}],
    # Answers as a stream's pieces make them, as `parse` gives them, and as
    # litellm, OpenRouter and vLLM add to them.
    [USER, {'role': 'assistant', 'tool_calls': [CALL | {'index': 0}]},
     {'role': 'tool', 'tool_call_id': 'call_1', 'content': '2'}],
    [USER, {'role': 'assistant', 'content': None, 'parsed': {'a': 1},
            'tool_calls': [CALL | {'function': CALL['function'] | {
                'parsed_arguments': {'a': 1}}}]}],
    [USER, {'role': 'assistant', 'content': 'Yo', 'thinking_blocks': [],
            'provider_specific_fields': {'refusal': None}}, USER],
    [USER, {'role': 'assistant', 'content': 'Yo', 'reasoning': 'hm',
            'reasoning_details': [{'type': 'reasoning.text', 'text': 'hm'}]}],
    [USER | {'cache_control': {'type': 'ephemeral'}, 'content': [
        {'type': 'text', 'text': 'a', 'cache_control': {'type': 'ephemeral'},
         'image_url': None}]}]])
def test_histories(running, messages):
  answer = post(running, '/v1/chat/completions',
                CHAT | {'messages': messages, 'max_tokens': 2})
  assert answer.status_code == 200, answer.text


def test_what_a_template_gets_of_a_message():
  def plain(**fields):
    return Message(**fields).plain
  assert plain(role='assistant', tool_calls=[CALL]) == {
      'role': 'assistant', 'content': '', 'tool_calls': [CALL | {
          'function': {'name': 'add', 'arguments': {'a': 1}}}]}
  for text in ('no JSON', '[1]', '[' * 10**5, '{"a":' * 900 + '1' + '}' * 900):
    call = CALL | {'function': {'name': 'f', 'arguments': text}}
    assert plain(role='assistant', tool_calls=[call])['tool_calls'] == [call]
  assert plain(role='assistant', tool_calls=[CUSTOM])['tool_calls'] == [{
      'id': 'call_2', 'type': 'function',
      'function': {'name': 'run', 'arguments': 'ls'}}]
  called = plain(role='assistant', function_call=CALL['function'])
  assert called['tool_calls'][0]['function']['arguments'] == {'a': 1}
  assert plain(role='function', name='f', content=None) == {
      'role': 'tool', 'content': '', 'name': 'f'}
  assert plain(role='assistant', refusal='No.')['content'] == 'No.'
  for field in ('reasoning', 'reasoning_content'):  # as templates name it
    assert plain(role='assistant', content='a', **{field: 'hm'}) == {
        'role': 'assistant', 'content': 'a', 'reasoning_content': 'hm'}
  assert plain(role='tool', tool_call_id='a', content='2', name='f') == {
      'role': 'tool', 'content': '2', 'tool_call_id': 'a', 'name': 'f'}


@pytest.mark.parametrize('message, why', [
    ({'role': 'tool', 'content': '2'}, 'tool_call_id: must be given'),
    ({'role': 'user', 'content': None}, 'content: must be given'),
    ({'role': 'system'}, 'content: must be given'),
    ({'role': 'tool', 'tool_call_id': 'a'}, 'content: must be given'),
    (USER | {'tool_call_id': 'a'}, 'tool_call_id: must be left out'),
    (USER | {'tool_calls': [CALL]}, 'tool_calls: must be left out'),
    (USER | {'name': 'two words'}, 'name: must match'),
    (USER | {'foo': 1}, 'foo: this server knows no such field'),
    (USER | {'reasoning': 'hm'}, 'reasoning: must be left out'),
    (USER | {'content': []}, 'content: must not be empty'),
    (USER | {'content': 5}, 'content: must be text or a list of parts'),
    (USER | {'content': [{'type': 'image_url', 'image_url': {'url': 'a'}}]},
     "content.0.type: must be 'text'"),
    (USER | {'content': [{'type': 'text'}]}, 'content.0.text: must be given'),
    (USER | {'content': [{'type': 'text', 'text': 'a', 'foo': 1}]},
     'content.0.foo: this server knows no such field'),
    ({'role': 'assistant', 'tool_calls': [CALL | {'type': 'song'}]},
     "tool_calls.0.type: must be 'function'"),
    ({'role': 'assistant', 'tool_calls': [CALL | {'type': 'custom'}]},
     'tool_calls.0.function: must be given with'),
    ({'role': 'function', 'content': '2'}, 'name: must be given'),
    (USER | {'function_call': CALL['function']}, 'function_call: must be left'),
    ({'role': 'assistant', 'tool_calls': [{**CALL, 'function': {}}]},
     'tool_calls.0.function.name: must be given'),
    ({'role': 'assistant', 'audio': {'id': 'a'}}, 'audio: is not served'),
    ({'role': 'king', 'content': 'a'}, "role: must be 'assistant', "
     "'developer', 'system', 'tool', 'user' or 'function'")])
def test_the_path_into_a_message_is_named(running, message, why):
  said, param = refusal(running, '/v1/chat/completions',
                        CHAT | {'messages': [USER, message]})
  assert said.startswith(f'messages.1.{why}') and param == 'messages'


# --- prompts ------------------------------------------------------------------


@pytest.mark.parametrize('fields, why', [
    ({'prompt': ['a'] * 129}, 'prompt: must have at most 128 items, not 129'),
    ({'prompt': [1, -1]}, 'prompt.1: must be a token id'),
    ({'prompt': [[1], [2, -1]]}, 'prompt.1.1: must be a token id'),
    ({'prompt': [1, 'a']}, 'prompt.1: must be a token id'),
    ({'prompt': ['a', ['b']]}, 'prompt.1: must be text or token ids'),
    ({'prompt': ['a', '']}, 'prompt.1: must not be empty'),
    ({'prompt': 5}, 'prompt: must be text, token ids or'),
    ({'stop': ['a', 5]}, 'stop.1: must be text'),
    ({'stop': {}}, 'stop: must be a text or'),
    ({'stop_token_ids': [-1]}, 'stop_token_ids.0: must be a token id'),
    ({'logit_bias': {'x': 1}}, 'logit_bias.x: must match'),
    ({'logit_bias': {'7': 101}},
     'logit_bias.7: must be a number from -100 to 100'),
    ({'logit_bias': 'x'}, 'logit_bias: must be a JSON object'),
    ({'temperature': 2.5}, 'temperature: must be a number from 0 to 2'),
    ({'temperature': True}, 'temperature: must be a number from 0 to 2'),
    ({'top_p': 0}, 'top_p: must be a number above 0 to 1'),
    ({'top_k': -2}, 'top_k: must be an integer from -1 to 2147483647'),
    ({'n': 0}, 'n: must be an integer from 1 to 128'),
    ({'n': 10**400}, 'n: must be an integer from 1 to 128'),
    ({'max_tokens': 1.5}, 'max_tokens: must be an integer from 1 on'),
    ({'logprobs': True}, 'logprobs: must be an integer from 0 to 20'),
    ({'stream': 1}, 'stream: must be true or false'),
    ({'metadata': 'x'}, 'metadata: must be a JSON object'),
    ({'user': 5}, 'user: must be text'),
    ({'stream_options': {'foo': 1}}, 'stream_options.foo: this server'),
    ({'chat_template_kwargs': {}}, 'chat_template_kwargs: this server')])
def test_the_path_into_other_fields_is_named(running, fields, why):
  said, param = refusal(running, '/v1/completions', TEXT | fields)
  assert said.startswith(why) and param == next(iter(fields))


@pytest.mark.parametrize('fields, why', [
    ({'messages': []}, 'messages: must not be empty'),
    ({'messages': 'Hi'}, 'messages: must be a list'),
    ({'chat_template_kwargs': '{"a": 1}'},
     'chat_template_kwargs: must be a JSON object'),
    ({'chat_template_kwargs': {'a': [1]}},
     'chat_template_kwargs.a: must be text, a number, true, false or null'),
    ({'logprobs': 5}, 'logprobs: must be true or false'),
    ({'top_logprobs': 21}, 'top_logprobs: must be an integer from 0 to 20')])
def test_the_path_into_fields_of_a_chat_is_named(running, fields, why):
  said, param = refusal(running, '/v1/chat/completions', CHAT | fields)
  assert said == why and param == next(iter(fields))


@pytest.mark.parametrize('tokens, why', [
    ([70, 10**6], 'tokens[1]=1000000: must be below 260'),
    ([260], 'tokens[0]=260: must be below 260'),
    ([-1], 'tokens.0: must be a token id'), ('a', 'tokens: must be a list'),
    ([1.0], 'tokens.0: must be a token id'), (None, 'tokens: must be a list')])
def test_a_token_that_has_no_text_is_named(running, tokens, why):
  said, param = refusal(running, '/detokenize', {'tokens': tokens})
  assert said.startswith(why) and param == 'tokens'


@pytest.mark.parametrize('content, headers, status, why', [
    (b'{"model": "tiny"}', {}, 415, 'content-type: must be application/json'),
    (b'{}', {'Content-Type': 'text/plain'}, 415, 'content-type: must be'),
    (b'{}', {'Content-Type': 'application/x-www-form-urlencoded'}, 415,
     'content-type: must be'),
    (b'{}', {'Content-Type': 'application/json', 'Content-Encoding': 'gzip'},
     415, 'content-encoding: must be left out'),
    (b'', {'Content-Type': 'application/json'}, 400, 'body: must be given'),
    (b'', {}, 400, 'body: must be given'),
    (b'[]', {'Content-Type': 'application/json'}, 400,
     'body: must be a JSON object'),
    (b'{', {'Content-Type': 'application/json; charset=utf-8'}, 400,
     'the body is not JSON')])
def test_what_is_wrong_with_a_body_is_named(running, content, headers, status,
                                            why):
  answer = httpx.post(running.url + '/v1/completions', content=content,
                      headers=headers)
  assert answer.status_code == status, answer.text
  assert answer.json()['error']['message'].startswith(why)
  assert answer.headers.get('Accept-Encoding') == (
      'identity' if 'content-encoding' in why else None)


def test_a_wrong_path_is_named(running):
  answer = post(running, '/v1/embeddings', CHAT)
  assert answer.status_code == 404
  assert answer.json()['error']['message'] == '/v1/embeddings: no such path'
  for path, meant in (('/v1/models/', '/v1/models'), ('//health', '/health'),
                      ('/v1/models//', '/v1/models'),
                      ('/v1//completions/', '/v1/completions'),
                      ('/chat/completions', '/v1/chat/completions'),
                      ('/models', '/v1/models'), ('/v1/health', '/health'),
                      ('/v1/v1/completions', '/v1/completions')):
    answer = httpx.get(running.url + path)
    assert answer.status_code == 404
    assert answer.json()['error']['message'] == (
        f'{path}: no such path; {meant} is one')


# --- what becomes of a prompt -------------------------------------------------


def tokens(running, **body):
  answer = post(running, '/tokenize', body)
  assert answer.status_code == 200, answer.text
  return answer.json()['tokens']


def test_control_tokens_are_read_in_raw_prompts_and_nowhere_else(
    running, client):
  raw = '<|start|>user: Hi<|end|>'
  want = [256, *ids('user: Hi'), 257]
  assert tokens(running, prompt=raw) == want
  assert client.completions.create(
      model='tiny', prompt=raw, max_tokens=1).usage.prompt_tokens == 10
  # As many of them as fit are not too long, whatever they are spelt like.
  assert client.completions.create(
      model='tiny', prompt='<|start|>' * 250, max_tokens=1
      ).usage.prompt_tokens == 250
  for fields in ({'content': raw}, {'content': 'a', 'name': raw[9:13]}, {
      'content': [{'type': 'text', 'text': raw[:4]},
                  {'type': 'text', 'text': raw[4:]}]}):
    chat = tokens(running, messages=[USER | fields])
    assert chat.count(256) == 2 and chat.count(257) == 1


def test_a_developer_is_the_system_to_a_template_that_knows_none(running):
  def of(role):
    return tokens(running, messages=[{'role': role, 'content': 'Be brief.'},
                                     USER])
  assert of('developer') == of('system') != of('user')


def test_a_template_is_asked_for_more(running, client):
  begun = {'role': 'assistant', 'content': 'He'}
  plain = tokens(running, messages=[USER, begun])
  going_on = tokens(running, messages=[USER, begun],
                    add_generation_prompt=False, continue_final_message=True)
  assert going_on[-2:] == ids('He') and plain[:len(going_on)] == going_on
  said = client.chat.completions.create(
      model='tiny', messages=[USER, begun], max_tokens=1, extra_body={
          'add_generation_prompt': False, 'continue_final_message': True,
          'chat_template_kwargs': {'enable_thinking': False}})
  assert said.usage.prompt_tokens == len(going_on)
  for fields in ({'continue_final_message': True},
                 {'chat_template_kwargs': {'messages': 'a'}},
                 {'chat_template_kwargs': {'a': {}}}):
    message, _ = refusal(running, '/v1/chat/completions', CHAT | fields)
    assert 'add_generation_prompt' in message or (
        'chat_template_kwargs' in message)


def test_the_length_that_is_too_much_is_told(client):
  for options in ({'prompt': 'x' * 300}, {'prompt': 'x' * 10**5},
                  {'prompt': 'x', 'max_tokens': 300}, {'prompt': [7] * 257},
                  {'prompt': ['x', 'x' * 300]}):
    with pytest.raises(openai.BadRequestError) as error:
      client.completions.create(model='tiny', **options)
    # What litellm and langchain look for.
    said = error.value.message
    assert "this model's maximum context length is" in said.lower()
    assert 'context_length_exceeded' in said
    assert error.value.code == 'context_length_exceeded'
  with pytest.raises(openai.BadRequestError, match='maximum context length'):
    client.chat.completions.create(
        model='tiny', messages=[{'role': 'user', 'content': 'x' * 300}])
