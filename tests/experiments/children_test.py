"""Processes of a runner: they end with it, and it sees when one is killed."""

import os
import re
import subprocess
import sys
import time

import pytest

from experiments.common import children, cli
from tests.common.samples import deep

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


CHILDREN = '''
import os, signal
# A terminal's Ctrl-C, while each process still imports.
if __name__ == '__mp_main__':
  os.kill(os.getpid(), signal.STOP)

from experiments.common import children, cli

def work(x):
  signal.raise_signal(signal.STOP)
  return x + 1

def run(options, console):
  with children.spawned(2) as pool:
    print(list(pool.map(work, range(4))), flush=True)
    pool.submit(signal.pause)
    signal.raise_signal(signal.STOP)

if __name__ == '__main__':
  cli.main(run, {})
'''


@pytest.mark.parametrize('stop', ['SIGINT', 'SIGTERM', *deep('SIGHUP')])
def test_ctrl_c_is_left_to_the_parent_while_children_import(tmp_path, stop):
  (tmp_path / 'parent.py').write_text(CHILDREN.replace('STOP', stop))
  done = subprocess.run(
      [sys.executable, tmp_path / 'parent.py'], text=True, timeout=100,
      capture_output=True, check=False, cwd=cli.ROOT,
      env=os.environ | {'PYTHONPATH': str(cli.ROOT)})
  assert (done.returncode, done.stdout, done.stderr) == (
      130, '[1, 2, 3, 4]\n', 'stopped\n')


LEFT = '''
import os, signal
from multiprocessing import resource_tracker
from experiments.common import children, cli

if __name__ == '__main__':
  with children.spawned(2) as pool:
    list(pool.map(abs, range(4)))
    os.kill(WHOM, signal.HOW)
    list(pool.map(abs, range(4)))
'''


@pytest.mark.parametrize('whom, how, code', [
    ('os.getpid()', 'SIGKILL', -9),
    ('resource_tracker._resource_tracker._pid', 'SIGHUP', 0)])
def test_processes_end_with_a_parent_that_is_killed_and_hear_no_hang_up(
    whom, how, code, tmp_path):
  """They have its output open, so all of it is read once they have ended."""
  (tmp_path / 'parent.py').write_text(
      LEFT.replace('WHOM', whom).replace('HOW', how))
  done = subprocess.run(
      [sys.executable, tmp_path / 'parent.py'], text=True, timeout=100,
      capture_output=True, check=False, cwd=cli.ROOT,
      env=os.environ | {'PYTHONPATH': str(cli.ROOT)})
  assert done.returncode == code
  assert code or not done.stderr


def test_every_pool_of_processes_leaves_ctrl_c_to_its_parent():
  uses = [path for path in (cli.ROOT / 'experiments').rglob('*.py')
          if re.search(r'\bPool\(|ProcessPoolExecutor', path.read_text())]
  assert [path.name for path in uses] == ['children.py']


PLANS = '''
import os, signal
from dsjax.runtime.planner import planner_process

if __name__ == '__main__':
  print(planner_process().submit(abs, -1).result(), flush=True)
  os.kill(os.getpid(), signal.SIGKILL)
'''


def test_a_planner_ends_with_a_server_that_is_killed(tmp_path):
  (tmp_path / 'parent.py').write_text(PLANS)
  done = subprocess.run(
      [sys.executable, tmp_path / 'parent.py'], text=True, timeout=100,
      capture_output=True, check=False, cwd=cli.ROOT,
      env=os.environ | {'PYTHONPATH': str(cli.ROOT)})
  assert (done.returncode, done.stdout) == (-9, '1\n')
