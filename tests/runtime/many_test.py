"""Many prompts at once, and tasks of asyncio: on fake engines."""

import asyncio
import contextlib
import dataclasses
import functools
import signal
import threading

import jax
import pytest

import dsjax
from dsjax.config.checks import InputError
from dsjax.runtime.async_server import AsyncServer
from dsjax.runtime.output import Interrupted
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import DecodeDone
from experiments.verify.faults import COPY, Injector
from tests.common import fake_engine, serving, tiny
from tests.common.serving import (
  LONG,
  MIXED,
  MODEL,
  MODES,
  PAGES_4,
  Letters,
  check_tidy,
  drain,
  job,
)

pytestmark = pytest.mark.usefixtures('no_hang')
WORK = MIXED + LONG
PROMPTS, PARAMS = zip(*WORK, strict=True)
FAULTY = dataclasses.replace(PAGES_4, tries=0, restarts=50, restart_s=0.0)


server_of = serving.fake_server_of
want = functools.partial(serving.want, oracle=serving.expected_of_fakes)


@pytest.fixture
def server():
  with server_of() as server:
    yield server
    drain(server)
    assert not server.requests


# --- generate_all ------------------------------------------------------------


def test_outputs_come_in_the_order_of_the_prompts(server):
  outputs = server.generate_all(PROMPTS, PARAMS)
  assert [o.tokens for o in outputs] == list(map(want, WORK))
  assert [o.text for o in outputs] == [
      server.generate(p, **params).text for p, params in WORK]
  at_once = sum(len(c.rows) > 1 for _, commands in server.log
                for c in commands if hasattr(c, 'rows'))
  assert at_once > 10
  assert len({o.record.arrival_s for o in outputs}) == 1


def test_a_prompt_may_be_text_messages_or_ids_and_sampling_for_all(server):
  messages = [{'role': 'user', 'content': 'Hi'}]
  ids = Letters().chat(messages)
  outputs = server.generate_all(['Hi', messages, ids], max_tokens=5,
                                ignore_eos=True)
  assert {o.tokens for o in outputs} == {
      want((tuple(ids), {'max_tokens': 5, 'ignore_eos': True}))}
  first, second = server.generate_all(
      [ids, ids], [{'max_tokens': 2}, {'seed': 3}], max_tokens=6,
      temperature=1.0, ignore_eos=True)
  assert (len(first.tokens), len(second.tokens)) == (2, 6)
  assert first.tokens != second.tokens[:2]
  assert server.generate_all([]) == []


@pytest.mark.parametrize('prompts, options, message', (
    ([[3], [96]], {}, r'prompts\[1\]: prompt=.*\[0, 96\)'),
    ([[3]], {'max_token': 1}, r"prompts\[0\]: parameter='max_token'"),
    ([[3]], {'sampling': []}, 'sampling=.*as many as the prompts, 1'),
    ([[3]], {'sampling': 5}, 'sampling=5'), (5, {}, 'prompts=5'),
    ([[3]], {'sampling': ['x']}, "sampling=.'x'"), (None, {}, 'prompts=None'),
    ([[3]], {'sampling': [{1: 2}]}, 'sampling='), ('ab', {}, "prompts='ab'"),
    ([[3]], {'sampling': 'x'}, "sampling='x'"), (b'a', {}, "prompts=b'a'"),
    ({'a': 1}, {}, 'prompts=.*a list'), ({'a', 'b'}, {}, 'prompts=.*a list'),
    ([[3]], {'errors': 'ignore'}, "errors='ignore': must be 'raise' or")))
def test_a_bad_request_is_an_error_before_any_is_queued(
    server, prompts, options, message):
  with pytest.raises(InputError, match=message):
    server.generate_all(prompts, **options)
  assert not server.log


def test_what_can_never_fit_is_an_error_before_any_runs(server):
  prompts = [tiny.prompt(5), tiny.prompt(64), tiny.prompt(6)]
  with pytest.raises(InputError, match=r'prompts\[1\]: .*64 tokens'):
    server.generate_all(prompts, max_tokens=4)
  assert not server.busy and not server.requests and not server.steps
  outputs = server.generate_all(prompts, errors='return', max_tokens=4)
  assert [o.reason == 'rejected' for o in outputs] == [False, True, False]


def interrupt(server):
  """Ctrl-C, as a terminal sends it, in the middle of a transition."""
  def observe(event, _):
    if isinstance(event, DecodeDone) and len(server.records) == len(WORK):
      server.observers.clear()
      server.engines[-1].pace.left = 0  # nothing ends before it is heard
      signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
  server.observers.append(observe)


@pytest.fixture
def handle_with():
  """Sets the handler of Ctrl-C, which a shell's background job ignores."""
  before = signal.getsignal(signal.SIGINT)
  yield functools.partial(signal.signal, signal.SIGINT)
  signal.signal(signal.SIGINT, before)


def test_ctrl_c_cancels_the_rest_and_keeps_what_there_is(server, handle_with):
  handle_with(signal.default_int_handler)
  interrupt(server)
  with pytest.raises(Interrupted) as interrupted:
    server.generate_all(PROMPTS, PARAMS)
  outputs = interrupted.value.outputs
  assert isinstance(interrupted.value, KeyboardInterrupt)
  assert [o.tokens for o in outputs] == [
      want(w)[:len(o.tokens)] for w, o in zip(WORK, outputs, strict=True)]
  assert 'cancelled' in {o.reason for o in outputs}
  server.engines[-1].pace.left = None
  drain(server)
  assert server.generate(*WORK[0][:1], **WORK[0][1]).tokens == want(WORK[0])


def test_a_handler_of_the_programs_own_is_called_between_transitions(
    server, handle_with):
  def own(*_):
    raise KeyError('own')
  handle_with(own)
  interrupt(server)
  with pytest.raises(KeyError, match='own'):
    server.generate_all(PROMPTS, PARAMS)
  server.engines[-1].pace.left = None


@pytest.mark.parametrize('errors', ('raise', 'return'))
def test_a_failed_request_is_told_once_the_others_have_ended(errors):
  with server_of(config=FAULTY) as server, Injector(server) as injector:
    injector.arm(1, COPY, 'raise', when=lambda c, _: c.id == 1)
    if errors == 'raise':
      with pytest.raises(dsjax.RequestFailed, match='given up') as failed:
        server.generate_all(PROMPTS, PARAMS)
      outputs = failed.value.outputs
    else:
      outputs = server.generate_all(PROMPTS, PARAMS, errors='return')
    for i, (work, output) in enumerate(zip(WORK, outputs, strict=True)):
      assert (output.reason == 'failed') == (i == 1)
      assert output.tokens == (want(work)[:1] if i == 1 else want(work))
    drain(server, faulty=True)
    assert not server.requests


# --- asyncio -----------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(config=PAGES_4, **options):
  placement, devices = MODES['1p1d']
  async with dsjax.serve_async(
      MODEL, placement, config, make_engine=fake_engine.FakeEngine,
      devices=[jax.devices()[i] for i in devices], **options) as server:
    yield server
  check_tidy(server._thread.orchestrator, faulty=True)
  assert not server._thread.orchestrator.requests
  assert not server._thread.thread.is_alive()


def test_tasks_are_served_together_each_as_alone():
  async def main():
    async with opened() as server:
      outputs = await asyncio.gather(*(
          server.generate(p, **params) for p, params in WORK))
      assert [o.tokens for o in outputs] == list(map(want, WORK))
      assert all(o.record.status == o.reason for o in outputs)
      assert [len(o.logprobs) for o in outputs] == [
          len(o.tokens) if 'logprobs' in params else 0
          for o, params in zip(outputs, PARAMS, strict=True)]
      assert server.orchestrator.records == []  # nothing piles up
      return outputs

  with server_of() as alone:
    texts = [alone.generate(p, **params).text for p, params in WORK]
  assert [o.text for o in asyncio.run(main())] == texts


def test_a_stream_joins_to_the_text():
  async def main():
    async with opened() as server:
      prompt, params = job(6, 20, ignore_eos=True)
      whole = await server.generate(prompt, **params)
      pace = server.orchestrator.engines[-1].pace
      pace.left, pieces = 3, []  # no more until there was a piece
      async for piece in server.stream(prompt, **params):
        pace.left = None
        pieces.append(piece)
      assert ''.join(pieces) == whole.text and len(pieces) > 1
      assert all(pieces)
  asyncio.run(main())


def test_leaving_cancels():
  """A stream that is closed, a task that is cancelled, and at the end all."""
  async def main():
    async def until(true):
      async with asyncio.timeout(60):
        while not true():
          await asyncio.sleep(0.001)

    async with opened() as server:
      pace, streams = server.orchestrator.engines[-1].pace, (
          server._thread.streams)
      pace.left = 3
      prompt, params = job(6, 50, ignore_eos=True)
      async with contextlib.aclosing(server.stream(
          prompt, **params)) as stream:
        await anext(stream)
      await until(lambda: not streams)
      task = asyncio.create_task(server.generate(prompt, **params))
      await until(lambda: streams)
      task.cancel()
      with pytest.raises(asyncio.CancelledError):
        await task
      await until(lambda: not streams)
      left = asyncio.create_task(server.generate(prompt, **params))
      await until(lambda: streams)
      pace.left = None
      await server._thread.close()
      with pytest.raises(dsjax.RequestFailed, match='the server was closed'):
        await left
  asyncio.run(main())


@pytest.mark.parametrize('prompt, params, error, message', (
    ([96], {}, InputError, r'\[0, 96\)'),
    ([3], {'max_token': 1}, InputError, "parameter='max_token'"),
    ([3] * 64, {}, InputError, '64 tokens'),
    ([3, 4], {'max_tokens': 5, 'ignore_eos': True}, dsjax.RequestFailed,
     'given up')))
def test_errors_are_raised_in_the_task(prompt, params, error, message):
  async def main():
    async with opened(FAULTY) as server:
      with Injector(server.orchestrator) as injector:
        injector.arm(1, COPY, 'raise', when=lambda *_: True)
        with pytest.raises(error, match=message):
          await server.generate(prompt, **params)
        with pytest.raises(error, match=message):
          async for _ in server.stream(prompt, **params):
            pass
      assert (await server.generate([3], max_tokens=2)).tokens
  asyncio.run(main())


def test_a_placement_that_cannot_be_served_is_an_error_on_entering():
  async def main():
    config = dataclasses.replace(PAGES_4, max_len=129)
    with pytest.raises(InputError, match='max_len=129'):
      async with opened(config):
        pass
  asyncio.run(main())


def test_a_thread_that_fails_tells_every_task():
  def broken(report):
    server = server_of(report=report)
    poll = server.poll
    server.poll = lambda: poll() and server.steps > 3 and 1 / 0
    return server

  async def main():
    async with AsyncServer(broken) as server:
      tasks = [server.generate(p, **params) for p, params in LONG]
      for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, RuntimeError), result
        assert isinstance(result.__cause__, ZeroDivisionError)
      with pytest.raises(RuntimeError, match='the server is failed'):
        await server.generate([3])
  asyncio.run(main())
  assert 'orchestrator' not in {t.name for t in threading.enumerate()}


def test_a_burst_is_queued_as_one():
  """So its prompts are prefilled together."""
  with server_of() as server:
    server.generate_all([tiny.prompt(5), tiny.prompt(6)], max_tokens=2)
    arrivals = [event.more for event, _ in server.log
                if type(event).__name__ == 'Arrived']
    assert arrivals == [True, False]
    scheduler.check(server.state)
