"""How a runner ends: signals, a reader or a terminal that is gone, Ctrl-C."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from experiments.common import cli, terminal
from tests.common.runners import RUNNERS, TASKS

PIPED = '''
import pathlib, sys
from experiments.common import cli

def run(options, console):
  done = pathlib.Path(sys.stdin.read())
  for line in range(LINES):
    SAY('of what nobody reads')
  done.write_text('all of it')
  return 1

sys.argv[1:] = []
cli.main(run, {})
'''


@pytest.mark.parametrize('say, lines, code, done', (
    ('console.print', 1, 1, True), ('console.print', 3000, 1, True),
    ('print', 1, 1, True), ('print', 3000, 0, False)))
def test_a_run_goes_on_where_its_reader_has_left(tmp_path, say, lines, code,
                                                 done):
  program = PIPED.replace('SAY', say).replace('LINES', str(lines))
  path = tmp_path / 'done'
  with subprocess.Popen(
      [sys.executable, '-c', program], text=True, cwd=cli.ROOT,
      env=os.environ | {'PYTHONUNBUFFERED': ''},
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.close()
    process.stdin.write(str(path))
    process.stdin.close()
    assert process.stderr.read() == ''
  assert (process.returncode, path.exists()) == (code, done)


@pytest.mark.parametrize('more', ('', '; program.__doc__ = "line\\n" * 9000'))
def test_help_ends_where_its_reader_has_left(more):
  """However long it is."""
  program = f"""import sys
from experiments.common import cli
program = sys.modules['__main__']{more}
sys.argv[1:] = ['--help']
cli.main(None, {{}})"""
  with subprocess.Popen(
      [sys.executable, '-c', program], text=True, cwd=cli.ROOT,
      env=os.environ | {'PYTHONUNBUFFERED': ''},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    process.stdout.close()
    assert process.stderr.read() == ''
  assert process.returncode == 0


@pytest.mark.parametrize('say', ('console.print', 'print'))
def test_what_an_output_cannot_say_is_a_question_mark(say):
  program = f"""from experiments.common import cli
cli.main(lambda _, console: {say}('caf\\xe9 \\ufffd'), {{}})"""
  done = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, check=False,
      cwd=cli.ROOT, env=os.environ | {'PYTHONIOENCODING': 'latin-1'})
  assert (done.returncode, done.stdout) == (0, b'caf\xe9 ?\n'), done.stderr


LOST = '''
import gc, signal, sys, time
from experiments.common import cli

def once(phase, info):
  gc.callbacks.remove(once)
  signal.raise_signal(signal.SIGINT)
  for _ in range(10):  # where Python looks for signals
    pass

def run(options, console):
  gc.callbacks.append(once)
  gc.collect()
  for _ in range(600):  # as runners poll; one long sleep may miss it
    time.sleep(0.05)

sys.argv[1:] = []
cli.main(run, {})
'''


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
  done = subprocess.run([sys.executable, '-c', LOST], text=True, timeout=50,
                        capture_output=True, check=False, cwd=cli.ROOT)
  assert (done.returncode, done.stderr) == (130, 'stopped\n')


INTERRUPTED = '''
import signal
try:
  signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
  raise ImportError('stopped halfway') from None
'''


@pytest.mark.parametrize('name', [*RUNNERS, *TASKS])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, name):
  (tmp_path / 'numpy.py').write_text(INTERRUPTED)
  done = subprocess.run(
      [sys.executable, '-m', f'experiments.{name.removesuffix(".__main__")}'],
      text=True, capture_output=True, check=False, cwd=cli.ROOT,
      env=os.environ | {'PYTHONPATH': str(tmp_path)})
  assert (done.returncode, done.stderr) == (130, 'stopped\n')


COMPILES = '''
import concurrent.futures, threading
from experiments.common import cli

def run(options, console):
  print('known')
  concurrent.futures.ThreadPoolExecutor(1).submit(threading.Event().wait)
  raise KeyboardInterrupt

cli.main(run, {})
'''


def test_ctrl_c_does_not_wait_for_a_thread_that_nothing_stops():
  done = subprocess.run([sys.executable, '-c', COMPILES], text=True,
                        capture_output=True, check=False, cwd=cli.ROOT,
                        timeout=100)
  assert (done.returncode, done.stdout, done.stderr) == (
      130, 'known\n', 'stopped\n')


ENDED = '''
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as after `&` in a script
signal.signal(signal.SIGHUP, signal.HOW)
from experiments.common import cli, terminal

def run(options, console):
  with terminal.Interrupts() as interrupts:
    signal.raise_signal(signal.FIRST)
    try:
      interrupts.halt()
    except KeyboardInterrupt:
      print('kept', flush=True)
  signal.raise_signal(signal.FIRST)

cli.main(run, {})
'''


@pytest.mark.parametrize('first, how, code, said', [
    ('SIGTERM', 'SIG_DFL', 130, 'kept\n'), ('SIGHUP', 'SIG_DFL', 130, 'kept\n'),
    ('SIGHUP', 'SIG_IGN', 0, '')])
def test_a_signal_that_ends_a_runner_is_as_ctrl_c(first, how, code, said):
  done = subprocess.run(
      [sys.executable, '-c', ENDED.replace('FIRST', first).replace('HOW', how)],
      text=True, capture_output=True, check=False, cwd=cli.ROOT, timeout=100)
  assert (done.returncode, done.stdout) == (code, said), done.stderr
  assert code == 0 or done.stderr.endswith('stopped\n')


def test_no_runner_has_signals_of_its_own_for_that():
  uses = [path for path in (cli.ROOT / 'experiments').rglob('*.py')
          if 'signal.SIGHUP' in path.read_text()]
  assert sorted(path.name for path in uses) == ['children.py', 'cli.py']


HUNG_UP = '''
import fcntl, os, pathlib, signal, termios, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever nohup left
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # its terminal
from experiments.common import cli, terminal

def run(options, console):
  with terminal.Interrupts() as interrupts:
    console.print('begun')
    while not interrupts.seen:
      time.sleep(0.01)  # signal.pause would miss one that comes before it
  console.print('what is shown to nobody')
  pathlib.Path(os.environ['KEPT']).write_text('all of it')
  return 130

cli.main(run, {})
'''


def test_what_was_done_stays_where_the_terminal_is_gone(tmp_path):
  ours, its = pty.openpty()
  kept = tmp_path / 'kept'
  with subprocess.Popen(
      [sys.executable, '-c', HUNG_UP], cwd=cli.ROOT, stdin=its, stdout=its,
      stderr=its, start_new_session=True,
      env=os.environ | {'KEPT': str(kept)}) as process:
    os.close(its)
    told = b''
    while b'begun' not in told:
      told += os.read(ours, 1000)
    os.close(ours)  # a hang-up
    try:
      assert process.wait(100) == 130
    finally:
      process.kill()
  assert kept.read_text() == 'all of it'


STARTED = '''
from experiments.common import cli

def run(options, console):
  import signal
  try:
    signal.raise_signal(signal.SIGINT)
  except KeyboardInterrupt:
    return 7

cli.main(run, {})
'''


def test_ctrl_c_is_the_runner_s_once_it_runs():
  # As `python -m experiments.NAME` starts: argv is '-m' at first.
  start = f"import sys; sys.argv = ['-m']; import experiments{STARTED}"
  done = subprocess.run([sys.executable, '-c', start], text=True,
                        capture_output=True, check=False, cwd=cli.ROOT)
  assert (done.returncode, done.stderr) == (7, '')


def test_ctrl_c_that_waits_for_a_step_says_so_at_once(capfd):
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with terminal.Interrupts() as interrupts:
      signal.raise_signal(signal.SIGINT)
      assert 'stopping after the current step' in capfd.readouterr().err
      with pytest.raises(KeyboardInterrupt):
        interrupts.halt()
      with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)
