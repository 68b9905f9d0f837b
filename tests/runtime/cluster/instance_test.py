"""The loop of an instance's process: woken by steps, with a thread a core."""

import queue
import threading
import types

import pytest

from dsjax.config.placement import Placement, Plan
from dsjax.runtime.cluster import instance, local
from tests.common.fake_engine import Late, Pace

pytestmark = pytest.mark.usefixtures('no_hang')


class Lost:
  """An array whose step went wrong."""

  def block_until_ready(self):
    raise RuntimeError('the device is gone')


@pytest.fixture
def waits():
  """An Instance that has its thread, and nothing else."""
  waits = instance.Instance.__new__(instance.Instance)
  waits.awaited = queue.SimpleQueue()
  waits.channel = types.SimpleNamespace(news=threading.Event())
  threading.Thread(target=waits._await, daemon=True).start()
  return waits


def test_a_step_that_is_done_wakes_the_loop(waits):
  pace = Pace()
  pace.left = 0
  step = Late([1], pace)
  waits.awaited.put(step)
  assert not waits.channel.news.wait(0.05) and not step.is_ready()
  pace.left = 1
  waits.channel.news.wait()
  assert step.is_ready()


def test_so_does_one_that_failed_and_the_next_is_awaited(waits):
  waits.awaited.put(Lost())
  waits.channel.news.wait()
  waits.channel.news.clear()
  waits.awaited.put(Late([1], Pace()))
  waits.channel.news.wait()


def test_a_thread_a_core_but_for_devices_that_wait_for_each_other():
  assert local.threads(Plan(), [3, 4]) == {'NPROC': '2'}
  assert local.threads(Plan(1), []) == {}
  assert local.threads(Plan(2, 1), [3, 4]) == {}


def test_each_process_is_given_its_threads(monkeypatch):
  monkeypatch.setenv('NPROC', '32')
  monkeypatch.setattr(local, 'split_cores', lambda placement: [[0, 1], [2]])
  placement = Placement(prefill=[Plan(2)], decode=[Plan()])
  assert [env['NPROC'] for env, _ in local.LocalLauncher(placement)._given] == [
      '32', '1']
