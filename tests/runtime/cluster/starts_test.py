"""How processes of instances start and end: errors, interrupts, orphans."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

import dsjax
from dsjax.checkpoints.checkpoint import Recipe
from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan
from dsjax.runtime import worker
from dsjax.runtime.cluster import (
  begin,
  channel,
  instance,
  local,
  messages,
  watch,
)
from tests.common import fake_engine, serving
from tests.common.processes import CONFIG, MODEL, PAIR, alive, children, start
from tests.common.serving import until
from tests.runtime.interrupts_test import at_line

pytestmark = pytest.mark.usefixtures('no_hang')


def broken_engine(*_):
  raise RuntimeError('the device is on fire')


def gone_engine(*_):
  os._exit(7)


@pytest.mark.parametrize('make, error', [
    (broken_engine, 'instance 0 .prefill. did not start: .*on fire'),
    (gone_engine, 'instance 0 .prefill. did not start: its process ended')])
def test_an_instance_that_fails_at_start_is_one_clear_error(make, error):
  before = children()
  with pytest.raises(RuntimeError, match=error):
    start(make_engine=make)
  assert children() <= before


def test_bad_input_that_an_instance_finds_is_bad_input():
  before = children()
  with pytest.raises(InputError, match='EngineConfig.dtype'):
    start(config=dataclasses.replace(CONFIG, dtype='bfloat16'))
  assert children() <= before


def test_an_interrupt_at_start_leaves_no_process():
  before = children()

  def interrupt(done, total, name):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    start(make_engine=fake_engine.FakeEngine, report=interrupt,
          placement=Placement(colocated=[Plan()]))
  assert children() <= before


def test_an_interrupt_at_any_line_of_a_start_leaves_nothing(monkeypatch):
  """No process, no port: what stands for a process does not end by itself."""
  before, starts, begun = children(), local._popen, []

  def begin_other(command, env):
    begun.append(command)
    return starts(['sleep', '1000'], env)

  monkeypatch.setattr(local, '_popen', begin_other)
  monkeypatch.setattr(watch, 'COMES_S', 1.0)
  for line in range(0, 400, 3):
    try:
      assert at_line(line, lambda: start(
          Placement(colocated=[Plan()] * 2),
          make_engine=fake_engine.FakeEngine), '/dsjax/runtime/cluster/')
    except RuntimeError:  # none came
      break
    until(lambda: children() <= before)
    until(lambda: 'dsjax door' not in {t.name for t in threading.enumerate()})
  assert len(begun) > 10


@pytest.mark.parametrize('options, error', [
    *(({'cluster': name}, 'cluster=.*: must be None') for name in (
        'rays', 'hosts:', 'ray:', 'local:x', '', 7)),
    ({'cluster': 'local', 'devices': []}, 'devices=.*have their own'),
    ({'cluster': 'local', 'make_engine': lambda *_: None}, 'make_engine='),
])
def test_what_is_not_there_is_refused(options, error):
  before = children()
  with pytest.raises(InputError, match=error):
    dsjax.serve(MODEL, PAIR, CONFIG, **options)
  assert children() <= before


def test_models_that_cannot_be_served_are_refused():
  """One that no other process has; one without weights in this process."""
  with pytest.raises(InputError, match='loads it again'):
    start(model=serving.MODEL)
  bare = dsjax.load('tiny', weights=False)
  assert bare.tokenizer and bare.config == dsjax.load('tiny').config
  with pytest.raises(InputError, match='has no weights'):
    dsjax.serve(bare, PAIR, CONFIG)


def test_close_leaves_nothing():
  """No process, no thread, no open port or file."""
  before, files = children(), len(os.listdir('/proc/self/fd'))
  server = start(Placement(colocated=[Plan()] * 2),
                 make_engine=fake_engine.FakeEngine)
  doors = [engine._process._door.address for engine in server.engines]
  pids = [engine.pid for engine in server.engines]
  server.submit(*serving.job(5, 40)[:1], max_tokens=40)
  server.close()
  server.close()
  assert children() <= before and not any(map(alive, pids))
  for address in doors:
    host, port = address.rsplit(':', 1)
    with pytest.raises(ConnectionRefusedError):
      socket.create_connection((host, int(port)))
  until(lambda: len(os.listdir('/proc/self/fd')) <= files)


def test_a_key_is_in_no_command_line():
  """And not in the environment of what an instance would start."""
  with start(Placement(colocated=[Plan()]),
             make_engine=fake_engine.FakeEngine) as server:
    engine = server.engines[0]
    with open(f'/proc/{engine.pid}/cmdline') as file:
      assert engine._process._door.key.hex() not in file.read()
    assert begin.KEY not in os.environ


SERVED = """
import dataclasses, os, signal, sys
import dsjax
from tests.common import fake_engine
from tests.common import processes as here

server = here.start(here.Placement(colocated=[here.Plan()]),
                    make_engine=fake_engine.FakeEngine)
print(*[engine.pid for engine in server.engines], flush=True)
if sys.argv[1] == 'serve':
  with server:
    server.run([dsjax.Request(i, 1e3 * i, (5, 6), dsjax.Sampling(4))
                for i in range(9)])
if sys.argv[1] == 'raise':
  sys.stdin.read()  # until they have been looked at
  raise SystemExit(3)
"""


@pytest.mark.parametrize('end', ['SIGKILL', *(
    pytest.param(end, marks=pytest.mark.slow) for end in ('SIGINT', 'raise'))])
def test_instances_end_with_their_server(end):
  """However it ends; one that is not closed too, and one that is stopped."""
  script = subprocess.Popen(
      [sys.executable, '-c', SERVED, 'raise' if end == 'raise' else 'serve'],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
      env=os.environ | {'PYTHONPATH': local.settings()['PYTHONPATH']})
  with script:
    pids = list(map(int, script.stdout.readline().split()))
    assert pids and all(map(alive, pids))
    if end == 'SIGKILL':
      for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # it sees the end of nothing
    if end == 'raise':
      script.stdin.close()
    else:
      script.send_signal(getattr(signal, end))
    script.wait()
  until(lambda: not any(map(alive, pids)))


STOPPED = """
import os, signal, sys
from dsjax.runtime.cluster import local

process = local._popen(['sleep', '1000'], dict(os.environ))
os.kill(process.pid, signal.SIGSTOP)
print(process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the kernel of Linux')
def test_one_that_is_stopped_before_its_first_line_ends_with_its_server():
  with subprocess.Popen(
      [sys.executable, '-c', STOPPED], stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, env=os.environ | {
          'PYTHONPATH': local.settings()['PYTHONPATH']}) as script:
    pid = int(script.stdout.readline())
    assert alive(pid)
    script.kill()
  until(lambda: not alive(pid))


def test_an_instance_ends_with_its_socket_and_not_with_a_thread(tmp_path):
  """What started it may be a thread that ends; nobody need kill it."""
  door, started, end = channel.Door(4, 2), [], threading.Event()

  def start_one():
    started.append(worker.call_lasting(lambda: local.popen(
        door.address, 4, 2, channel.LOOPBACK, os.environ | local.settings() | {
            begin.KEY: door.key.hex()})))
    end.wait()

  thread = threading.Thread(target=start_one)
  thread.start()
  here = until(lambda: door.channel)
  end.set()
  until(lambda: not os.path.exists(f'/proc/self/task/{thread.native_id}'))
  here.send(messages.Ping())
  assert isinstance(until(here.take)[0], messages.Pong)
  here.cut()
  assert started[0].wait() == 0


def test_an_instance_whose_server_has_gone_before_it_begins_ends():
  done = subprocess.run([sys.executable, '-P', begin.__file__, 'address', '0',
                         '1', 'host', '1'], capture_output=True, text=True)
  assert done.returncode == 1 and 'is gone' in done.stderr


def test_an_instance_whose_server_lets_nobody_in_says_so_in_one_line():
  with socket.create_server((channel.LOOPBACK, 0)) as listens:
    address = '{}:{}'.format(*listens.getsockname())
  process = subprocess.run(
      [sys.executable, '-P', begin.__file__, address, '4', '1', 'host',
       str(os.getpid())], capture_output=True, text=True,
      env=os.environ | {begin.KEY: '00' * 32})
  assert process.returncode == 1
  assert process.stderr.startswith(f'instance 4 cannot come to {address}: ')
  assert process.stderr.count('\n') == 1


def test_an_instance_ends_though_nobody_reads_what_it_says(monkeypatch):
  ended = []
  monkeypatch.setattr(instance.os, '_exit', ended.append)
  with monkeypatch.context() as patch, open(os.devnull) as unwritable:
    patch.setattr(sys, 'stderr', unwritable)
    with pytest.raises(OSError):
      instance._leave('it sent what is no message')
  assert ended == [0]


def test_an_instance_refuses_a_model_of_another_shape():
  """As where a folder elsewhere has another model under the same name."""
  fields = {'recipe': Recipe(config=serving.CONFIG)._asdict() | {
      'config': dataclasses.asdict(serving.CONFIG)}, 'plan': {},
            'model': repr(dataclasses.replace(serving.CONFIG, num_layers=1))}
  with pytest.raises(InputError, match='model=.*the server has'):
    instance.Instance.build(object.__new__(instance.Instance),
                            messages.Build(fields))
