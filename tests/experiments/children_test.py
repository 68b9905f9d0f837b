"""Processes of a runner: they end with it, and it sees when one is killed."""

import os
import time

import pytest

from experiments.common import children

pytestmark = pytest.mark.usefixtures('no_hang')


def test_one_that_is_killed_ends_the_run():
  """Else its task would be waited for without end; the other is busy."""
  with pytest.raises(ChildProcessError, match='was killed'):
    with children.spawned(2) as pool:
      pids = [task.result() for task in [pool.submit(os.getpid)]]
      pool.submit(time.sleep, 600)
      pool.submit(os._exit, 1).result()
  with pytest.raises(ProcessLookupError):
    os.kill(pids[0], 0)


def test_they_end_with_the_block_whatever_they_do():
  with pytest.raises(KeyError), children.spawned(2) as pool:
    pid = pool.submit(os.getpid).result()
    for _ in range(9):
      pool.submit(time.sleep, 600)
    raise KeyError
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_sigterm_ends_none_of_them():
  """It reaches them too, where a batch system sends it to all."""
  with children.spawned(1) as pool:
    pid = pool.submit(os.getpid).result()
    assert pool.submit(os.kill, pid, 15).result() is None
    assert list(pool.map(abs, (-1, -2))) == [1, 2]
