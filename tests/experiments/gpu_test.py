"""experiments.gpu on a CPU: it runs, and what goes wrong in a task is told."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from experiments.common import cli
from experiments.gpu import __main__ as gpu
from experiments.gpu import (
  cache,
  child,
  ingest,
  lines,
  pytest_lines,
  report,
  runner,
  sanitizer,
  tasks,
)

ROOT = pathlib.Path(__file__).parents[2]
KEPT = ROOT / '.cache' / 'gpu.tar.gz'  # compiled programs, between runs
WRITE = ('import json, sys, time; open(sys.argv[1], "a").write(json.dumps('
         'dict(task="{0}", what="it", ok={1}, figure="7 s")) + "\\n"); {2}')


def task(name, code, ok='None', seconds=30):
  """A Task of the part `speed` that writes a line and then runs code."""
  return tasks.Task('speed', name, seconds, own=(
      sys.executable, '-c', WRITE.format(name, ok, code), '{lines}'))


def run(stages, folder, seconds=60.0):
  """Outcomes by name, with the tasks' file for {lines}."""
  stages = [[t._replace(own=tuple(x.replace('{lines}', str(
      folder / 'speed.jsonl')) for x in t.own)) for t in stage]
            for stage in stages]
  return {o.task.name: o for o in runner.run(
      stages, folder, str(folder), seconds, True)}


def test_what_crashes_hangs_or_fails_costs_only_itself(tmp_path):
  outcomes = run([
      [task('crashes', 'import os; os.kill(os.getpid(), 11)'),
       task('fails', 'raise ValueError("no such card")'),
       task('wrong', '', 'False'), task('goes', '', 'True')],
      [task('hangs', 'time.sleep(60)', seconds=1)],
      [task('next', '', seconds=29)]], tmp_path)
  assert {n: o.verdict for n, o in outcomes.items()} == {
      'crashes': 'crashed: SIGSEGV', 'fails': 'failed: ValueError: no such '
      'card', 'wrong': '1 wrong: it', 'goes': 'right', 'next': 'done',
      'hangs': f'stopped after {outcomes["hangs"].verdict.split()[2]} s'}
  assert all(o.figure == '7 s' for o in outcomes.values())
  assert outcomes['goes'].ok and not outcomes['hangs'].ok


@pytest.mark.slow
def test_a_task_that_writes_nothing_or_leaves_children_is_ended(tmp_path):
  silent = tasks.Task('tune', 'silent', 5, own=(sys.executable, '-c', ''))
  family = tasks.Task('tune', 'family', 5, own=(
      sys.executable, '-c', 'import os, time, sys\n'
      f'open({str(tmp_path / "pid")!r}, "w").write(str(os.fork()))\n'
      'time.sleep(60)'))
  outcomes = run([[silent], [family]], tmp_path, 3.0)
  assert outcomes['silent'].verdict == 'failed: it wrote nothing'
  assert outcomes['family'].verdict.startswith('stopped')
  assert is_gone((tmp_path / 'pid').read_text())


def until(happened):
  """Waits for it, a minute at most."""
  deadline = time.monotonic() + 60
  while not happened():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def is_gone(pid):
  """Whether a process has ended."""
  status = pathlib.Path('/proc', str(pid), 'status')
  return not status.exists() or 'State:\tZ' in status.read_text()


@pytest.mark.parametrize('end', ['', 'os.kill(os.getpid(), 9)'])
def test_what_a_task_leaves_running_is_ended(end, tmp_path):
  code = (f'import os; pid = os.fork()\nif pid:\n  open({str(tmp_path / "p")!r}'
          f', "w").write(str(pid))\n  {end or "pass"}\nelse: time.sleep(60)')
  outcomes = run([[task('leaves', 'exec(' + repr(code) + ')')]], tmp_path)
  assert outcomes['leaves'].verdict == ('crashed: SIGKILL' if end else 'done')
  until(lambda: is_gone((tmp_path / 'p').read_text()))


@pytest.mark.parametrize('code, says', [
    ('while True: print("x" * 1000)', 'stopped: printed over 0 MiB'),
    ('f = open(sys.argv[1], "a")\nwhile True: f.write("x" * 1000)',
     'stopped: wrote over 0 MiB')], ids=['prints', 'writes'])
def test_what_would_fill_the_disk_is_stopped(code, says, tmp_path, monkeypatch):
  monkeypatch.setattr(runner, 'MOST_SAID_BYTES', 10_000)
  monkeypatch.setattr(lines, 'MOST_BYTES', 10_000)
  outcomes = run([[task('fills', f'exec({code!r})')], [task('next', '')]],
                 tmp_path)
  assert {n: o.verdict for n, o in outcomes.items()} == {
      'fills': says, 'next': 'done' if 'print' in says else
      'failed: it wrote nothing'}
  assert (tmp_path / 'speed.jsonl').stat().st_size <= 12_000


def test_a_disk_that_is_full_keeps_no_task_from_running(tmp_path, monkeypatch):
  monkeypatch.setattr(runner, 'ROOT', ROOT)
  (tmp_path / 'log.txt').mkdir()  # cannot be written
  outcomes = run([[task('goes', '')], [task('on', '')]], tmp_path)
  assert [o.verdict for o in outcomes.values()] == ['done', 'done']


STOPPED = """
import runpy, sys
from experiments.gpu import tasks
tasks.machine = lambda: dict(platform='cpu', device='cpu')
tasks.STAGES = ((tasks.Task('speed', 'sleeps', 60, own=(
    sys.executable, '-c', 'import os, time\\nopen(sys.argv[1] + "/pid", "w")'
    '.write(str(os.getpid()))\\ntime.sleep(60)'.replace(
        'sys.argv[1]', repr(sys.argv[1])))),),)
sys.argv = ['gpu', '--out=' + sys.argv[1]]
runpy.run_module('experiments.gpu', run_name='__main__')
"""


def test_a_command_that_is_ended_ends_its_tasks_and_says_what_there_is(
    tmp_path):
  with subprocess.Popen([sys.executable, '-c', STOPPED, str(tmp_path)],
                        cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    pid = tmp_path / 'pid'
    until(lambda: pid.exists() and pid.read_text())
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
  assert process.returncode == 130 and 'interrupted' in said, said
  assert is_gone(pid.read_text())
  assert 'interrupted' in (tmp_path / 'log.txt').read_text()
  assert tarfile.is_tarfile(tmp_path / 'cache.tar.gz')


def test_a_task_whose_runner_is_gone_ends_by_itself(tmp_path, monkeypatch):
  monkeypatch.setattr(signal, 'alarm', lambda s: (_ for _ in ()).throw(
      InterruptedError(f'after {s} s')))
  monkeypatch.setattr(cli, 'main', lambda start, flags: start(
      types.SimpleNamespace(lines=str(tmp_path / 'x'), task='t', seconds=30.0,
                            tiny=True), None))
  with pytest.raises(InterruptedError, match='after 45 s'):
    child.main(lambda *_: None)


def items(target, names):
  """What child.each gives; what is given has a line."""
  file = target.lines()
  for what, item in child.each(target, file, names, str.upper):
    file.write(what, True)
    yield item


@pytest.fixture
def begun(monkeypatch):
  """Command lines with which a task begins anew."""
  begun_with = []
  monkeypatch.setattr(
      os, 'execv', lambda path, argv: begun_with.append(argv[1:]))
  monkeypatch.setattr(sys, 'orig_argv', ['python', '-m', 'x', '--seconds=9',
                                         '--task=t'])
  return begun_with


def test_a_task_whose_device_is_lost_begins_anew(tmp_path, monkeypatch, begun):
  target = lines.Target(tmp_path / 'x', 't', 9.0, False)
  assert list(items(target, 'ab')) == ['a', 'b'] and not begun
  assert list(items(target, 'abc')) == ['c']  # the others have lines

  def lost(_):
    raise jax.errors.JaxRuntimeError('CUDA_ERROR_ILLEGAL_ADDRESS')

  monkeypatch.setattr(jax, 'block_until_ready', lost)
  assert list(items(target, 'd')) == ['d']
  (*rest, seconds), = begun
  assert rest == ['-m', 'x', '--task=t']
  assert 0 < float(seconds.removeprefix('--seconds=')) <= 9


def test_an_item_that_hangs_costs_only_itself(tmp_path, begun):
  target = lines.Target(tmp_path / 'x', 't', 1.0, False)
  file = target.lines()
  for _ in child.each(target, file, 'a', str.upper):
    until(lambda: begun)
  row, = file.read()
  assert (row['what'], row['ok']) == ('A', False)
  assert row['says'] == 'no end after 1 s'
  file.began_s -= 1
  assert not list(child.each(target, file, 'b', str.upper))
  assert file.read()[1]['skipped'] == 'out of time'


def test_a_test_that_hangs_ends_its_worker_and_is_told(tmp_path, monkeypatch):
  for name, value in (('LINES', tmp_path / 'x'), ('TASK', 't'),
                      ('SECONDS', 1), ('BEGAN', time.time())):
    monkeypatch.setenv(f'DSJAX_GPU_{name}', str(value))
  ended = []
  monkeypatch.setattr(os, '_exit', ended.append)
  around = pytest_lines.pytest_runtest_protocol(
      types.SimpleNamespace(nodeid='a_test.py::test_a'))
  next(around)
  until(lambda: ended)
  with pytest.raises(StopIteration):
    around.send(True)
  row, = lines.read(tmp_path / 'x')
  assert (row['what'], row['ok']) == ('a_test.py::test_a', False)
  assert ended == [71]


def test_sweeps_come_last_a_seed_of_each_in_turn():
  def item(name, seed=None):
    return types.SimpleNamespace(
        name=name, callspec=types.SimpleNamespace(params=dict(seed=seed)),
        get_closest_marker=lambda _: seed is not None)

  items = [item('a0', 0), item('a1', 1), item('x'), item('b0', 0), item('y')]
  pytest_lines.pytest_collection_modifyitems(items)
  assert [i.name for i in items] == ['x', 'y', 'a0', 'b0', 'a1']


@pytest.mark.parametrize('code, name, says, ok', [
    (0, 'memcheck', '========= ERROR SUMMARY: 0 errors', True),
    (9, 'memcheck', '========= ERROR SUMMARY: 2 errors', False),
    (1, 'memcheck', 'ValueError\n========= ERROR SUMMARY: 0 errors', False),
    (1, 'memcheck', 'Device not supported\n= ERROR SUMMARY: 1 error', None),
    (0, 'racecheck', '= RACECHECK SUMMARY: 0 hazards displayed (0', True),
    (9, 'racecheck', '= RACECHECK SUMMARY: 3 hazards displayed (3', False),
    (127, 'racecheck', 'cannot open libInterceptorInjection', None)])
def test_what_the_sanitizer_says_is_judged(code, name, says, ok):
  assert sanitizer.judged(name, code, says) is ok


def test_ctrl_c_ends_tasks_and_keeps_the_table(tmp_path, monkeypatch):
  def interrupted(_):
    monkeypatch.undo()
    raise KeyboardInterrupt
  monkeypatch.setattr(runner.time, 'sleep', interrupted)
  outcomes = run([[task('runs', 'time.sleep(60)')], [task('later', '')]],
                 tmp_path)
  assert outcomes['runs'].verdict == 'interrupted'
  assert outcomes['later'].verdict == 'not begun'


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
  path = tmp_path / 'tune.jsonl'
  lines.Lines(path, 'tune').write('a', True, seconds=np.float32(0.5))
  with path.open('a') as file:
    file.write('{"task": "tu')
  lines.Lines(path, 'tune').write('b', None, share=np.float32('nan'))
  a, b = lines.read(path)
  assert (a['what'], a['ok'], a['seconds']) == ('a', True, 0.5)
  assert (b['what'], b['share']) == ('b', None)
  assert 'NaN' not in path.read_text()


def test_what_is_no_line_is_left_out(tmp_path):
  path, good = tmp_path / 'tune.jsonl', dict(task='t', what='w', ok=None)
  bad = ['3', 'null', '[]', '{}', '{"task": "t"}', '[' * 10**5, '\x00', '"',
         json.dumps(good | dict(ok='yes')), json.dumps(good | dict(ok=1)),
         json.dumps(good | dict(task=3)), json.dumps(good | dict(figure=3))]
  path.write_bytes(b'\xff\xfe\n' + '\n'.join(
      [*bad, json.dumps(good), '{"task": "t", "what": "n", "ok": null, '
       '"share": NaN, "seconds": -Infinity}']).encode())
  assert lines.read(path) == [good, dict(
      task='t', what='n', ok=None, share=None, seconds=None)]


def test_what_is_no_file_or_too_large_has_no_lines(tmp_path, monkeypatch):
  good = json.dumps(dict(task='t', what='w', ok=None))
  (tmp_path / 'file').write_text(good)
  (tmp_path / 'link').symlink_to(tmp_path / 'file')
  os.mkfifo(tmp_path / 'pipe')
  assert lines.read(tmp_path / 'file')
  assert not any(map(lines.read, [tmp_path, tmp_path / 'link',
                                  tmp_path / 'pipe', tmp_path / 'none']))
  monkeypatch.setattr(lines, 'MOST_BYTES', 10)
  assert not lines.read(tmp_path / 'file')


def hostile(**fields):
  """A tar with one member, of b'x' unless told otherwise."""
  info = tarfile.TarInfo('a')
  info.size = 1
  for name, value in fields.items():
    setattr(info, name, value)
  made = io.BytesIO()
  with tarfile.open(fileobj=made, mode='w:gz') as tar:
    tar.addfile(info, io.BytesIO(b'x' * info.size) if info.isreg() else None)
  return made.getvalue()


@pytest.mark.parametrize('data', [
    b'', b'no tar', hostile()[:60], hostile(name='../a'), hostile(name='/a'),
    hostile(type=tarfile.SYMTYPE, linkname='/etc/passwd'),
    hostile(type=tarfile.SYMTYPE, linkname='b'),
    hostile(type=tarfile.LNKTYPE, linkname='/etc/passwd'),
    hostile(type=tarfile.FIFOTYPE), hostile(size=16 * 2**20)],
    ids=['empty', 'none', 'cut', 'up', 'root', 'symlink', 'inside', 'link',
         'pipe', 'huge'])
def test_a_cache_that_is_none_is_refused(data, tmp_path):
  path, folder = tmp_path / 'cache.tar.gz', tmp_path / 'sub' / 'folder'
  path.write_bytes(data)
  folder.mkdir(parents=True)
  try:
    cache.unpack(path, folder)
  except InputError as error:
    assert '--cache' in str(error)
  assert not (tmp_path / 'sub' / 'a').exists()
  assert all(f.parent == folder and f.is_file() and not f.is_symlink()
             for f in folder.rglob('*'))


def test_the_cache_comes_back_and_stays_small(tmp_path):
  folder, back = tmp_path / 'a', tmp_path / 'b'
  (folder / 'sub').mkdir(parents=True)
  (folder / 'sub' / 'small').write_bytes(b'x' * 10)
  (folder / 'large').write_bytes(b'y' * 1000)
  cache.pack(folder, tmp_path / 'all.tar.gz')
  cache.pack(folder, tmp_path / 'less.tar.gz', 500)
  cache.unpack(tmp_path / 'all.tar.gz', back)
  assert (back / 'large').read_bytes() == b'y' * 1000
  shutil.rmtree(back)
  cache.unpack(tmp_path / 'less.tar.gz', back)
  assert [f.name for f in back.rglob('*') if f.is_file()] == ['small']


def begin(out, only=()):
  """(what is shown and logged, {part: its lines}) of a run on this CPU."""
  console = Console(file=io.StringIO(), width=80)
  code = gpu.run(cli.options(
      gpu.FLAGS, out=str(out), minutes=20.0, only=list(only),
      cache=str(KEPT) if KEPT.exists() else ''), console)
  told = console.file.getvalue()
  assert code == 0, told + (out / 'log.txt').read_text()
  parts = {part: lines.read(out / f'{part}.jsonl')
           for part in only or tasks.PARTS}
  assert {f.name for f in out.iterdir()} == {
      'log.txt', 'cache.tar.gz', *(f'{part}.jsonl' for part in parts)}
  assert not [row for part in parts.values() for row in part
              if 'skipped' in row or row['ok'] is False]
  assert all(rows[0]['what'] == 'machine' for rows in parts.values())
  assert all(part in told[-12000:] for part in parts)
  return told, parts


@pytest.mark.slow
def test_all_parts_run_on_a_cpu_and_eight_files_come_back(tmp_path):
  out = tmp_path / 'out'
  _, parts = begin(out)
  sizes = [f.stat().st_size for f in out.iterdir()]
  assert len(sizes) <= 8 and max(sizes) < 16 * 2**20
  assert {row['task'] for row in parts['right']} == {
      'run', 'kernels', 'families', 'sanitizer', 'registers'}
  with pytest.raises(InputError, match='must be results of a GPU'):
    ingest.run(out, Console(file=io.StringIO()), tmp_path)
  assert {row['mode'] for row in parts['simulate'] if 'mode' in row} == {
      'colocated', 'chunked'}
  KEPT.parent.mkdir(exist_ok=True)
  shutil.copy(out / 'cache.tar.gz', KEPT)


def test_programs_of_an_earlier_run_are_found_in_another_folder(tmp_path):
  made = tasks.STAGES[0][0].environment(
      lines.Target(tmp_path / 'x', 't', 9.0, True), str(tmp_path))
  assert made['JAX_COMPILATION_CACHE_DIR'] == str(tmp_path)
  assert made['JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES'] == 'none'


def test_what_travels_is_small():
  listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True,
                          text=True)
  if listed.returncode:
    pytest.skip('no git checkout')
  files = [ROOT / name for name in listed.stdout.splitlines()]
  assert sum(f.stat().st_size for f in files if f.is_file()) < 30 * 2**20


def test_a_folder_is_the_same_for_tasks_that_run_elsewhere(
    tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(tasks, 'machine', lambda: dict(platform='cpu'))
  monkeypatch.setattr(runner, 'run', lambda *args: asked.append(args) or [])
  monkeypatch.chdir(tmp_path)
  console = Console(file=io.StringIO())
  assert gpu.run(cli.options(gpu.FLAGS, out='out', only=['tune']), console) == 0
  assert asked[0][1] == tmp_path / 'out'
  (tmp_path / 'out' / 'serve.jsonl').write_text('kept')
  gpu.run(cli.options(gpu.FLAGS, out='out', only=['tune']), console)
  assert (tmp_path / 'out' / 'serve.jsonl').read_text() == 'kept'
  assert len(lines.read(tmp_path / 'out' / 'tune.jsonl')) == 1  # afresh
  assert (tmp_path / 'out' / 'log.txt').read_text().count('dsjax on') == 2


@pytest.mark.parametrize('code, platforms, says', [
    ('print("{}")', '', None), ('raise SystemExit("no")', '', 'jax=.*no'),
    ('print("noise"); print(json.dumps(dict(platform="cpu", driver="1")))',
     'cpu', None),
    ('print(json.dumps(dict(platform="cpu", driver="580.1"))); '
     'print("CUDA_ERROR_X", file=sys.stderr)', '',
     'CUDA_ERROR_X.*able to use the GPU here')])
def test_a_gpu_that_jax_does_not_find_is_an_error(code, platforms, says,
                                                  monkeypatch):
  real = subprocess.run
  code = code.replace('"{}"', 'json.dumps(dict(platform="gpu", driver="1"))')
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  monkeypatch.setattr(subprocess, 'run', lambda argv, **options: real(
      [sys.executable, '-c', f'import json, sys; {code}'], **options))
  if says:
    with pytest.raises(InputError, match=says):
      tasks.machine()
  else:
    assert tasks.machine()['driver'] == '1'


def test_a_part_that_does_not_exist_is_an_error():
  with pytest.raises(InputError, match='--only=.*tests.*of .*right'):
    gpu.run(cli.options(gpu.FLAGS, only=['tests']), None)


def test_the_table_fits_eighty_columns():
  task_ = tasks.STAGES[0][0]
  console = Console(file=io.StringIO(), width=80)
  console.print(report.table([runner.Outcome(
      task_, 'x' * runner.MOST_VERDICT, 12.0, 'y' * runner.MOST_FIGURE)] * 12,
                             'a GPU'))
  text = console.file.getvalue()
  assert max(map(len, text.splitlines())) <= 80 and 'y' * 10 in text
  assert len(text) < 12_000  # what is shown of a command's output
