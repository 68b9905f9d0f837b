"""A server that many threads use at once; on fake engines but for the last."""

import asyncio
import contextlib
import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from dsjax.config.checks import InputError
from dsjax.config.request import Request, Sampling
from dsjax.runtime.async_server import AsyncServer
from dsjax.runtime.output import RequestFailed
from tests.common import serving, tiny
from tests.common.serving import (
  LONG,
  MIXED,
  PAGES_4,
  check_tidy,
  drain,
  job,
)

pytestmark = pytest.mark.usefixtures('no_hang')
WORK = (MIXED + LONG) * 4


server_of = serving.fake_server_of
want = functools.partial(serving.want, oracle=serving.expected_of_fakes)


def generate(server, work):
  prompt, params = work
  return server.generate(prompt, **params)


@pytest.fixture
def server():
  with server_of() as server:
    yield server
    drain(server)
    assert not server.requests


@pytest.mark.parametrize('threads', (4, 8, 64))
def test_a_pool_of_threads_may_generate(server, threads):
  with ThreadPoolExecutor(threads) as pool:
    outputs = list(pool.map(functools.partial(generate, server), WORK))
  assert [o.tokens for o in outputs] == list(map(want, WORK))
  assert len({o.id for o in outputs}) == len(WORK)
  batch = max(len(c.rows) for _, commands in server.log for c in commands
              if hasattr(c, 'rows'))
  assert batch > 1  # side by side, not one after another


def test_every_kind_of_call_at_once(server):
  def stream(work):
    prompt, params = work
    return ''.join(server.stream(prompt, **params))

  def run(ids):
    records = server.run([Request(id, 0.0, tiny.prompt(5), Sampling(
        max_tokens=9, ignore_eos=True)) for id in ids])
    return [(r.id, server.output(r.id).tokens) for r in records]

  def everything(work):
    return [o.tokens for o in server.generate_all(*zip(*work, strict=True))]

  def cancelled(work):
    prompt, params = work
    id = server.submit(prompt, **params)
    server.cancel(id)
    return server.output(id).reason

  with ThreadPoolExecutor(8) as pool:
    streams = [pool.submit(stream, work) for work in WORK[:6]]
    runs = [pool.submit(run, range(start, start + 5))
            for start in (10**6, 2 * 10**6)]
    batches = [pool.submit(everything, MIXED) for _ in range(2)]
    cancels = [pool.submit(cancelled, work) for work in LONG]
    outputs = list(pool.map(functools.partial(generate, server), MIXED))
  texts = [generate(server, work).text for work in WORK[:6]]
  assert [s.result() for s in streams] == texts
  nine = want((tiny.prompt(5), {'max_tokens': 9, 'ignore_eos': True}))
  for future, start in zip(runs, (10**6, 2 * 10**6), strict=True):
    assert future.result() == [(start + i, nine) for i in range(5)]
  assert all(b.result() == list(map(want, MIXED)) for b in batches)
  assert {c.result() for c in cancels} == {'cancelled'}
  assert [o.tokens for o in outputs] == list(map(want, MIXED))


def test_nothing_moves_implicitly_in_the_servers_thread(server):
  with pytest.raises(RuntimeError, match='isallowed host-to-device'):
    server.call(jax.jit(lambda x: x + 1), 1)


def test_a_run_does_not_wait_for_the_requests_of_others(server):
  prompt, params = job(6, 50, ignore_eos=True)
  pace = server.engines[1].pace
  pace.left = 2
  other = server.submit(prompt, **params)
  record, = server.run([Request(99, 0.0, prompt, Sampling(max_tokens=1))])
  assert record.status == 'length' and not server.requests[other].finished
  pace.left = None
  drain(server)
  server.output(99)
  assert server.output(other).tokens == want((prompt, params))


def test_closing_tells_every_thread_that_waits():
  started, ends = threading.Barrier(4), []
  prompt, params = job(6, 50, ignore_eos=True)

  def client(call):
    started.wait()
    try:
      ends.append(call(prompt, **params))
    except (RequestFailed, InputError) as error:  # or it comes too late
      ends.append(error)

  with server_of() as server:
    server.engines[1].pace.left = 3
    threads = [threading.Thread(target=client, args=(call,)) for call in (
        server.generate, lambda p, **kw: list(server.stream(p, **kw)),
        lambda p, **kw: server.generate_all([p], **kw))]
    for thread in threads:
      thread.start()
    started.wait()
    while len(server.unfinished) < 3:
      server.poll()
    server.engines[1].pace.left = None
    server.close()
  for thread in threads:
    thread.join()
  assert len(ends) == 3
  for error in ends:
    assert 'the server was closed' in str(error)
    assert error.outputs[0].reason == 'cancelled'
  check_tidy(server)
  assert not server.requests and not server.thread.is_alive()


@pytest.mark.parametrize('taken', (0, 1, 3))
def test_a_stream_held_past_close_fails(taken):
  prompt, params = job(6, 20, ignore_eos=True)
  with server_of() as server:
    server.engines[1].pace.left = taken
    stream = server.stream(prompt, **params)
    next(stream)
    server.engines[1].pace.left = None
  with pytest.raises(RequestFailed, match='the server was closed') as failed:
    list(stream)
  assert len(failed.value.outputs[0].tokens) < 20
  assert not server.requests


@pytest.mark.parametrize('name', ('generate', 'stream', 'generate_all', 'run'))
@pytest.mark.parametrize('stage', ('cancels', 'waits'))
def test_a_ctrl_c_in_close_fails_those_that_wait(stage, name, monkeypatch):
  prompt, params = job(6, 40, ignore_eos=True)
  calls = {
      'generate': lambda: server.generate(prompt, **params),
      'stream': lambda: list(server.stream(prompt, **params)),
      'generate_all': lambda: server.generate_all([prompt], **params),
      'run': lambda: server.run([
          Request(0, 0.0, prompt, Sampling(**params)),
          Request(1, 1000.0, prompt, Sampling(**params))])}

  def interrupted(*_):
    raise KeyboardInterrupt

  server = server_of()
  server.engines[1].pace.left = 2
  with ThreadPoolExecutor(1) as pool:
    waits = pool.submit(calls[name])
    while not server.steps:
      server.poll()
    monkeypatch.setattr(*(
        (server._asked, 'cancel_all') if stage == 'cancels' else
        (server.loop, 'settled')), interrupted)
    with pytest.raises(KeyboardInterrupt):
      server.close()
    monkeypatch.undo()
    with pytest.raises(RequestFailed, match='the server was closed'):
      waits.result()
  assert server.closed
  server.thread.join()


def test_a_stream_that_is_cancelled_elsewhere_fails(server):
  prompt, params = job(6, 20, ignore_eos=True)
  stream = server.stream(prompt, **params)
  next(stream)
  server.cancel(next(iter(server.requests)))
  with pytest.raises(RequestFailed, match='was cancelled'):
    list(stream)


def test_an_error_of_an_observer_reaches_one_client_and_no_other(server):
  def fails(*_):
    if len(server.unfinished) == 8:
      server.observers.clear()
      raise OSError('disk full')
  server.observers.append(fails)
  ready = threading.Barrier(8)

  def client(work):
    ready.wait()
    try:
      return generate(server, work).tokens == want(work)
    except OSError:
      return 'disk full'
  work = job(6, 40, ignore_eos=True)
  with ThreadPoolExecutor(8) as pool:
    ends = list(pool.map(client, [work] * 8))
  assert sorted(map(str, ends)) in (['True'] * 8, ['True'] * 7 + ['disk full'])
  server.observers.clear()


def test_a_policy_that_breaks_tells_every_thread():
  with server_of() as server:
    server.engines[1].pace.left = 2
    with ThreadPoolExecutor(4) as pool:
      ends = [pool.submit(generate, server, work) for work in LONG]
      while len(server.unfinished) < 4:
        server.poll()
      server.call(server.loop.give_up, 'PolicyError: route')
      for end in ends:
        with pytest.raises(RequestFailed, match='PolicyError: route'):
          end.result()
    with pytest.raises(InputError, match='PolicyError: route.*must be open'):
      generate(server, LONG[0])


# --- beside asyncio ----------------------------------------------------------


def test_threads_beside_the_tasks_of_a_loop():
  async def main():
    async with AsyncServer(lambda report: server_of(report=report)) as server:
      own = server.orchestrator
      outputs = await asyncio.gather(
          *(server.generate(p, **params) for p, params in MIXED),
          *(asyncio.to_thread(generate, own, work) for work in MIXED))
      assert [o.tokens for o in outputs] == list(map(want, MIXED)) * 2
  asyncio.run(main())


@pytest.mark.parametrize('error', (SystemExit, KeyboardInterrupt, OSError))
def test_an_observer_that_ends_the_program_tells_every_task(error):
  async def main():
    async with AsyncServer(lambda report: server_of(report=report)) as server:
      own = server.orchestrator

      def leaves(event, _):
        if len(own.unfinished) == len(LONG):
          raise error('enough')
      own.observers.append(leaves)
      tasks = [server.generate(p, **params) for p, params in LONG]
      for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, RuntimeError), result
        assert isinstance(result.__cause__, error)
      with pytest.raises(InputError, match='server='):
        own.generate([3])
      with pytest.raises(RuntimeError, match='the server is failed'):
        await server.generate([3])
  asyncio.run(main())


@pytest.mark.parametrize('error', (SystemExit, KeyboardInterrupt, OSError))
def test_a_server_that_cannot_start_is_an_error_on_entering(error):
  def make(report):
    raise error('no')

  async def main():
    with pytest.raises(Exception) as raised:
      async with AsyncServer(make):
        pass
    assert error in (raised.type, type(raised.value.__cause__))
  asyncio.run(main())


def test_a_stream_of_a_task_held_past_close_fails():
  async def main():
    prompt, params = job(6, 50, ignore_eos=True)
    async with contextlib.AsyncExitStack() as stack:
      server = await stack.enter_async_context(
          AsyncServer(lambda report: server_of(report=report)))
      pace = server.orchestrator.engines[1].pace
      pace.left = 2
      stream = server.stream(prompt, **params)
      await anext(stream)
      closing = asyncio.create_task(server._thread.close())
      await asyncio.sleep(0)  # it is asked to close: what runs may end
      pace.left = None
      await closing
      with pytest.raises(RequestFailed, match='the server was closed'):
        async for _ in stream:
          pass
  asyncio.run(main())


# --- on the tiny model -------------------------------------------------------


def test_threads_on_a_real_engine():
  config = dataclasses.replace(PAGES_4)
  with serving.server_of('1p1d', config) as server:
    with ThreadPoolExecutor(64) as pool:
      outputs = list(pool.map(functools.partial(generate, server),
                              MIXED * 6))
    drain(server)
  assert [o.tokens for o in outputs] == [
      serving.want(work) for work in MIXED] * 6


def test_another_loop_is_refused_and_a_server_is_entered_once():
  server = AsyncServer(lambda report: server_of(report=report))
  prompt, params = MIXED[0]

  async def main():
    async with server:
      with pytest.raises(RuntimeError, match='belongs to another event loop'):
        await asyncio.to_thread(asyncio.run, server.generate(prompt, **params))
      output = await server.generate(prompt, **params)
      assert output.tokens == want(MIXED[0])
  asyncio.run(main())
  with pytest.raises(RuntimeError, match='was started before'):
    asyncio.run(main())
