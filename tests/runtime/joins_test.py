"""Instances that are away at first, join, leave and come back under load."""

import asyncio
import dataclasses
import threading
import time

import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.runtime.async_server import AsyncServer
from dsjax.runtime.output import RequestFailed
from dsjax.scheduling.events import RunDecode, RunPrefill
from dsjax.scheduling.policy import DISTSERVE
from tests.common import serving
from tests.common.serving import MIXED, PAGES_4

pytestmark = pytest.mark.usefixtures('no_hang')


def busy(server, since):
  """Instances that were given work since an entry of the log."""
  return {c.instance for _, commands in server.log[since:] for c in commands
          if isinstance(c, RunPrefill | RunDecode)}


def submit(server, work):
  return [server.submit(prompt, **params) for prompt, params in work]


def check(server, ids, oracle=serving.expected):
  serving.drain(server, faulty=True)
  outputs = [server.output(id) for id in ids]
  serving.check_tokens([*MIXED] * (len(ids) // len(MIXED)), outputs, oracle)
  return outputs


def test_instances_join_leave_and_come_back_under_load():
  config = dataclasses.replace(PAGES_4, away=(1, 3))
  with serving.fake_server_of('2p2d', config) as server:
    ids = submit(server, MIXED)
    for _ in range(12):
      server.poll()
    assert busy(server, 0) == {0, 2}
    since = len(server.log)
    for index in (1, 3):
      server.restore(index)
    ids += submit(server, MIXED * 2)
    for _ in range(40):
      server.poll()
    assert busy(server, since) == {0, 1, 2, 3}
    for index in (0, 2):  # they leave: what they hold ends there
      server.drain(index)
    while any(server.state.instances[index].residents for index in (0, 2)):
      server.poll()
    since = len(server.log)
    for index in (0, 2):
      server.kill(index)
    ids += submit(server, MIXED)
    for _ in range(20):
      server.poll()
    assert busy(server, since) == {1, 3}
    since = len(server.log)
    for index in (0, 2):
      server.restore(index)
    ids += submit(server, MIXED * 2)
    outputs = check(server, ids, serving.expected_of_fakes)
    assert busy(server, since) == {0, 1, 2, 3}
    assert not any(output.record.retries for output in outputs)


def test_requests_wait_for_the_first_that_joins():
  config = dataclasses.replace(PAGES_4, away=(1,))
  with serving.fake_server_of('1p1d', config) as server:
    ids = submit(server, MIXED)
    for _ in range(50):
      server.poll()
    assert busy(server, 0) == {0} and len(server.unfinished) > 6
    server.restore(1)
    check(server, ids, serving.expected_of_fakes)


def test_a_real_one_joins_without_compiling():
  config = dataclasses.replace(PAGES_4, away=(1,))
  with serving.server_of('2colocated', config) as server:
    assert server.engines[1].stages[0].cache is None
    with serving.compilations() as compiled:
      ids = submit(server, MIXED)
      for _ in range(10):
        server.poll()
      server.restore(1)
      ids += submit(server, MIXED)
      serving.drain(server)
    check(server, ids)
    assert busy(server, 0) == {0, 1} and not compiled


@pytest.mark.parametrize('mode, away', [
    ('1p1d', (0,)), ('1p1d', (1,)), ('2p2d', (0, 1)), ('2p2d', (2, 3)),
    ('2colocated', (0, 1)), ('2chunked', (0, 1)), ('2flexible', (0, 1))])
def test_one_that_waits_for_what_is_away_is_told_and_not_for_ever(
    mode, away, caplog):
  config = dataclasses.replace(PAGES_4, away=away, stall_s=0.2)
  prompt, params = serving.job(6, 5, ignore_eos=True)
  with serving.fake_server_of(mode, config) as server:
    calls = (lambda: server.generate(prompt, **params),
             lambda: list(server.stream(prompt, **params)),
             lambda: server.generate_all([prompt] * 2, **params))
    for call in calls:
      caplog.clear()
      with pytest.raises(RequestFailed, match='are away: .*; restore starts'):
        call()
      assert f'{away[0]} ({server.engines[away[0]].role})' in caplog.text
      assert caplog.text.count('requests wait: nothing is in flight') == 1
      assert not server.requests


@pytest.mark.parametrize('mode, away', [
    ('1p1d', (0,)), ('2p2d', (2, 3)), ('2colocated', (0, 1))])
def test_a_task_that_waits_for_what_is_away_is_told_and_not_for_ever(
    mode, away, caplog):
  """And those that come once it is back are served."""
  config = dataclasses.replace(PAGES_4, away=away, stall_s=1.0)
  prompt, params = serving.job(6, 5, ignore_eos=True)

  async def generate(server):
    return (await server.generate(prompt, **params)).reason

  async def stream(server):
    return [piece async for piece in server.stream(prompt, **params)]

  async def later(call, server, seconds):
    await asyncio.sleep(seconds)
    return await call(server)

  async def main():
    async with AsyncServer(lambda _: serving.fake_server_of(mode, config)
                           ) as server:
      for error in await asyncio.gather(
          *(later(call, server, 0.02 * n)
            for n, call in enumerate((generate, stream) * 3)),
          return_exceptions=True):
        assert isinstance(error, RequestFailed), error
        assert 'are away: ' in str(error) and 'restore starts' in str(error)
      assert not server.orchestrator.requests
      assert caplog.text.count('requests wait: nothing is in flight') == 1
      for index in away:
        await asyncio.to_thread(server.orchestrator.restore, index)
      assert await generate(server) == 'length'
  asyncio.run(main())


def test_a_task_that_its_policy_never_lets_start_is_told():
  config = dataclasses.replace(PAGES_4, stall_s=1.0)
  prompt, params = serving.job(6, 5, ignore_eos=True)
  policy = dataclasses.replace(DISTSERVE, admit=lambda *_: False)

  async def main():
    async with AsyncServer(lambda _: serving.fake_server_of(
        '1p1d', config, policy=policy)) as server:
      with pytest.raises(RequestFailed, match='lets none of the 1 requests'):
        await server.generate(prompt, **params)
  asyncio.run(main())


def test_one_that_waits_goes_on_once_what_is_away_has_joined(caplog):
  config = dataclasses.replace(PAGES_4, away=(0,))
  prompt, params = serving.job(6, 5, ignore_eos=True)
  with serving.fake_server_of('1p1d', config) as server:
    def restore():
      while not caplog.text:
        time.sleep(0.01)
      server.restore(0)
    thread = threading.Thread(target=restore)
    thread.start()
    assert server.generate(prompt, **params).reason == 'length'
    thread.join()


def test_one_that_is_to_start_again_is_waited_for():
  config = dataclasses.replace(PAGES_4, stall_s=0.1)
  prompt, params = serving.job(6, 5, ignore_eos=True)
  with serving.fake_server_of('1p1d', config) as server:
    server.kill(1, back_s=0.3)
    assert server.generate(prompt, **params).reason == 'length'


@pytest.mark.parametrize('away', ((2,), (0, 7)))
def test_instances_that_do_not_exist_cannot_be_away(away):
  config = dataclasses.replace(PAGES_4, away=away)
  with pytest.raises(InputError, match='EngineConfig.away.*0 to 1'):
    serving.fake_server_of('1p1d', config)


def test_away_may_come_from_json():
  assert EngineConfig(away=[1]).away == (1,)


@pytest.mark.parametrize('away', ([-1], (-1,), (True,), ('1',), 1, None))
def test_away_is_a_tuple_of_numbers(away):
  with pytest.raises(InputError, match='EngineConfig.away'):
    EngineConfig(away=away)
