"""What all runners share: flags by name, errors, exit codes, help."""

import ast
import dataclasses
import importlib
import io
import json
import logging
import math
import os
import pathlib
import pty
import re
import runpy
import signal
import subprocess
import sys
import types

import jax
import pytest
from absl import app, flags
from rich.console import Console

import dsjax
from configs.serve import Serve
from dsjax.config.checks import InputError, StartError, require
from dsjax.config.engine import EngineConfig
from dsjax.runtime.cluster import local
from experiments import api
from experiments.common import cli, extras, overrides, terminal

ROOT = cli.ROOT / 'experiments'
# {module: how it starts} of every program.
STARTS = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): start
          for path in sorted(ROOT.rglob('*.py'))
          for _, mark, start in [path.read_text().partition(
              "if __name__ == '__main__':")] if mark}
RUNNERS = [name for name, start in STARTS.items() if 'cli.main(' in start]
TASKS = [name for name, start in STARTS.items() if 'child.main(' in start]
# Former names of flags that SHARED has by another name.
FORMER = {'ttft', 'tpot', 'num', 'most', 'arrivals', 'cache'}


def defined(name):
  return importlib.import_module(f'experiments.{name}').FLAGS


@pytest.mark.parametrize('name', RUNNERS)
def test_every_runner_s_flags_parse_and_have_words(name):
  values = cli.parse(defined(name), [])
  for flag in defined(name):
    assert values[flag].help and getattr(values, flag) == (
        vars(cli.options(defined(name)))[flag]) or flag == 'set'
  if name != 'gpu.__main__':  # its cache is a file
    assert not FORMER & set(defined(name))


@pytest.mark.parametrize('name', RUNNERS)
def test_the_same_flag_has_the_same_type_everywhere(name):
  for flag, value in defined(name).items():
    if flag in cli.SHARED and isinstance(value, cli.Flag):
      kind = value.kind or type(value.default)
      assert kind is cli.SHARED[flag].kind, flag


def test_a_flag_of_several_runners_has_one_type():
  """But that coverage takes so many seeds, not which."""
  kinds = {}
  for name in RUNNERS:
    for flag, value in defined(name).items():
      value = cli.SHARED[flag] if not isinstance(value, cli.Flag) else value
      if (name, flag) != ('coverage', 'seeds'):
        kinds.setdefault(flag, {}).setdefault(
            value.kind or type(value.default), []).append(name)
  assert not {flag: of for flag, of in kinds.items() if len(of) > 1}


@pytest.mark.parametrize('name', RUNNERS)
def test_no_default_is_a_path_outside_the_checkout(name):
  for flag, value in vars(cli.options(defined(name))).items():
    assert not str(value).startswith(('..', '~')), flag
    assert not str(value).startswith('/') or cli.ROOT in pathlib.Path(
        value).parents, flag


def test_a_command_line_is_read():
  values = cli.parse({
      'rate': None, 'seed': 0, 'set': (), 'deep': cli.Flag(False, 'Far.'),
      'plans': cli.Flag(['1x1'], 'Of these.'),
      'kind': cli.Flag('chat', 'Of.', choices=('chat', 'completion'))},
                     ['--rate=2', '--set=a=1', '--set=b=2', '--deep',
                      '--plans=1x1,2x1', '--kind=completion'])
  assert (values.rate, values.seed, values.set, values.deep, values.plans,
          values.kind) == (2.0, 0, ['a=1', 'b=2'], True, ['1x1', '2x1'],
                           'completion')


@pytest.mark.parametrize('text', ['--seed=-1', '--rate=fast', '--sed=1',
                                  '--requests=0'])
def test_a_bad_flag_is_an_error(text):
  with pytest.raises(flags.Error):
    cli.parse({'rate': None, 'seed': 0, 'requests': 4}, [text])


@pytest.mark.parametrize('words, code, says', [
    (('--sed=1',), 2, "error: Unknown command line flag 'sed'"),
    (('--large=-1',), 2, 'error: flag --large=-1'),
    (('--large=x',), 2, 'error: flag --large=x'),
    (('7',), 2, "error: arguments='7': must be flags"),
    (('--help',), 0, ''), (('--table',), 0, '')])
def test_the_exit_code_of_a_command_line(words, code, says):
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.explore', *words], text=True,
      capture_output=True, check=False, cwd=cli.ROOT)
  assert (done.returncode, done.stderr[:len(says)]) == (code, says)
  assert done.stderr.count('\n') <= 1


@pytest.mark.parametrize('runner, out', [
    ('sessions', '/dev/null/x'), ('place', __file__),
    ('bench.simulator', '/dev/null/x.json')])
def test_an_out_that_cannot_be_is_told_before_the_run(runner, out):
  done = subprocess.run(
      [sys.executable, '-m', f'experiments.{runner}', f'--out={out}'],
      text=True, capture_output=True, check=False, cwd=cli.ROOT, timeout=60)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('error: --out=')


LATENCY, LENGTHS = 'tables:.*measure wrote', 'sharegpt, fixed:PROMPTxOUTPUT'


@pytest.mark.parametrize('runner, flag, given, says', [
    ('simulate', 'latency', '--rate=1', LATENCY),
    ('simulate', 'lengths', '--rate=1', LENGTHS),
    ('simulate', 'machines', '--rate=1', 'JSON|an object|one of|read'),
    ('simulate', 'policy', '--rate=1', 'distserve.*path.py:name'),
    ('simulate', 'placement', '--rate=1', 'role=TPxPP'),
    ('simulate', 'model', '--rate=1', 'llama-3-8b'),
    ('place', 'latency', '', LATENCY), ('place', 'lengths', '', LENGTHS),
    ('place', 'machines', '', 'JSON|an object|one of|read'),
    ('replan', 'latency', '', LATENCY), ('replan', 'lengths', '', LENGTHS),
    ('sessions', 'latency', '', LATENCY),
    ('sessions', 'lengths', '', 'columns|row|read|UTF-8|object|or a file'),
    ('stream', 'latency', '', LATENCY),
    ('measure', 'from', '--out=out', 'columns|read|line'),
    ('load', 'prompts', '', 'prompt|read')])
def test_a_bad_file_is_told_with_its_flag(runner, flag, given, says, tmp_path,
                                          monkeypatch):
  """And with what else the flag may be. One file is missing, one is a folder;
  others hold nothing, bytes, or JSON of another kind."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'folder').mkdir()
  for name, data in (('empty.csv', b''), ('bytes.csv', b'\x9c\xff'),
                     ('list.json', b'[1]'), ('other.json', b'{"a": 1}')):
    (tmp_path / name).write_bytes(data)
  module = importlib.import_module(f'experiments.{runner}')
  for name in ('nowhere', 'nowhere.json', *os.listdir(tmp_path)):
    options = cli.parse(module.FLAGS, [*given.split(), f'--{flag}={name}'])
    with pytest.raises(InputError) as error:
      with cli.naming_flags(options, module.FLAGS):
        module.run(options, Console(file=io.StringIO()))
    text = str(error.value)
    assert re.match(f"--{flag}='?{name}'?[:,= ]", text), text
    assert re.search(says, text) and '\n' not in text, text


@pytest.mark.parametrize('runner', ['api', 'measure', 'serve', 'soak',
                                    'validate'])
def test_a_bad_cluster_is_told_before_anything_is_loaded(runner, tmp_path,
                                                         monkeypatch):
  """Also where the file of its hosts says something else."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(dsjax, 'load', None)
  monkeypatch.setattr(cli, 'prepare', lambda *_, **__: None)
  logger = logging.getLogger('dsjax')
  monkeypatch.setattr(logger, 'handlers', [])
  monkeypatch.setattr(logger, 'propagate', True)
  (tmp_path / 'list.json').write_text('[1]')
  module = importlib.import_module(f'experiments.{runner}')
  for cluster, says in (
      ('rays', "must be None, 'local'"), ('hosts:', "must be None, 'local'"),
      ('hosts:none.json', 'none.json: cannot be read'),
      ('hosts:list.json', r"list.json=.*must be an object of 'server'")):
    options = cli.parse(module.FLAGS, [f'--cluster={cluster}'] + (
        ['--config=tiny', '--port=0'] if runner == 'api' else
        ['--config=tiny', '--out=out'] if runner == 'serve' else
        ['--out=out'] + ['--model=tiny'] * (runner == 'measure')))
    with pytest.raises(InputError) as error:
      with cli.naming_flags(options, module.FLAGS):
        module.run(options, Console(file=io.StringIO()))
    assert re.match(f"--cluster='{cluster}': {says}", str(error.value)), (
        str(error.value))
  assert os.listdir(tmp_path) == ['list.json']


@pytest.mark.parametrize('runner', ('place', 'simulate'))
@pytest.mark.parametrize('data, flags, says', [
    ({'latency': 'tables:x'}, (), "--machines={}: Cluster: latency='tables:x'"),
    ({'kinds': {'odd': {'latency': 'nowhere.json'}}}, (),
     '--machines={}: MixedCluster.kinds.odd: latency=nowhere.json: '),
    ({'kinds': {'odd': {'price': -1}}}, (), '--machines={}: kinds.odd: '),
    ({'nodes': 2}, ('--latency=tables:x',), "--latency='tables:x': must be ")])
def test_a_latency_of_a_file_of_machines_is_told_with_the_file(
    runner, data, flags, says, tmp_path):
  module = importlib.import_module(f'experiments.{runner}')
  path = tmp_path / 'my.json'
  path.write_text(json.dumps(data))
  kind = '@odd' if 'kinds' in data else ''
  given = [f'--placement=colocated=1x1{kind}', '--rate=1']
  options = cli.parse(module.FLAGS, [f'--machines={path}', *flags, *(
      given if runner == 'simulate' else ())])
  with pytest.raises(InputError) as error:
    with cli.naming_flags(options, module.FLAGS):
      module.run(options, Console(file=io.StringIO()))
  assert str(error.value).startswith(says.format(path))


@pytest.mark.parametrize('text', ('', 'static,'))
def test_an_empty_policy_is_none(text):
  module = importlib.import_module('experiments.simulate')
  options = cli.parse(module.FLAGS, ['--rate=1', f'--policy={text}'])
  with pytest.raises(InputError, match="^--policy='': must be a name"):
    module.run(options, Console(file=io.StringIO()))


def test_a_flag_of_another_name_is_told_as_well():
  options = types.SimpleNamespace(workloads=['chat', 'x.csv'], seed=1)
  for text, told in (("lengths='x.csv': bad", "--workloads: lengths='x.csv': "),
                     ('x.csv, line 2: bad', '--workloads=x.csv, line 2: '),
                     ('seed=1: bad', '--seed=1: '), ('y.csv: 1', 'y.csv: ')):
    with pytest.raises(InputError, match=f'^{re.escape(told)}'):
      with cli.naming_flags(options, ('workloads', 'seed')):
        raise InputError(text)


@pytest.mark.parametrize('name', RUNNERS)
def test_a_list_that_has_items_has_one_on_the_command_line_too(name):
  for flag, value in vars(cli.options(defined(name))).items():
    if isinstance(value, list) and value:
      with pytest.raises(flags.Error, match=f'--{flag}=.*must have an item'):
        cli.parse(defined(name), [f'--{flag}='])


@pytest.mark.parametrize('name', RUNNERS)
def test_a_list_has_each_item_once(name):
  for flag, value in vars(cli.options(defined(name))).items():
    if isinstance(value, list):
      with pytest.raises(flags.Error, match=f'--{flag}=.*each item once'):
        cli.parse(defined(name), [f'--{flag}=a,b,a'])


@pytest.mark.parametrize('runner, given', [
    ('simulate', ['--rates=2,2']), ('simulate', ['--rates=1,1.0000001']),
    ('simulate', ['--rate=1', '--scales=1,1.0']),
    ('simulate', ['--rate=1', '--seeds=7,07']),
    ('simulate', ['--rate=1', '--policy=arrow,arrow']),
    ('simulate', ['--rate=1', '--placement=colocated=1x1/colocated=1x1']),
    ('place', ['--chunks=512,0512']), ('replan', ['--predicted=1,1.0']),
    ('reproduce', ['--figure=8,8']), ('policies', ['--lengths=a.csv,b/a.csv'])])
def test_what_is_asked_for_twice_is_told(runner, given):
  module = importlib.import_module(f'experiments.{runner}')
  with pytest.raises(InputError, match=given[-1].partition('=')[0] + '='):
    module.run(cli.parse(module.FLAGS, given), Console(quiet=True))


@pytest.mark.parametrize('simulates, count', [(True, 500_000), (False, 700)])
def test_garbage_is_looked_for_seldom_where_all_is_simulated(
    simulates, count):
  done = subprocess.run(
      [sys.executable, '-c', 'import gc\nfrom experiments.common import cli\n'
       'def run(options, console):\n  print(gc.get_threshold()[0])\n'
       f'cli.main(run, {{}}, simulates={simulates})'],
      capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout) == (0, f'{count}\n'), done.stderr


def test_an_extra_that_is_missing_is_one_line(capsys):
  with pytest.raises(SystemExit) as ended, extras.needs('serve'):
    importlib.import_module('no_such_package')
  assert ended.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith("error: No module named 'no_such_package': this")
  assert said.endswith("`serve`: pip install -e '.[serve]'\n")


def outside_of_extras(source):
  """Modules that the top of a source imports although an extra has them."""
  extras = {'fastapi', 'h11', 'httpx', 'prometheus_client', 'pydantic', 'ray',
            'simpy', 'starlette', 'torch', 'transformers', 'uvicorn'}
  names = [name for node in ast.parse(source).body
           if isinstance(node, ast.Import | ast.ImportFrom)
           for name in ([f'{node.module}.{alias.name}' for alias in node.names]
                        if isinstance(node, ast.ImportFrom) else
                        [alias.name for alias in node.names])]
  return [name for name in names
          if name.split('.')[0] in extras or name.startswith('dsjax.http.')
          and not name.startswith('dsjax.http.service.')]


@pytest.mark.parametrize('name', RUNNERS)
def test_a_runner_says_which_extra_it_needs(name):
  path = ROOT / (name.replace('.', '/') + '.py')
  assert not outside_of_extras(path.read_text())


def test_imports_outside_of_extras_are_found():
  assert outside_of_extras(
      'import os, httpx\nfrom dsjax.http import routes\n'
      'from dsjax.http.service import Limits\n'
      "with extras.needs('serve'):\n  import uvicorn\n") == [
          'httpx', 'dsjax.http.routes']


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
import fcntl, os, pathlib, termios, time
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


def test_options_knows_only_what_is_defined():
  assert cli.options({'seed': 3}).seed == 3
  with pytest.raises(InputError, match='sed'):
    cli.options({'seed': 3}, sed=1)


def test_exit_codes(capsys):
  def bad():
    require(False, 'field', 1, 'another')

  def stop():
    raise KeyboardInterrupt

  def lost():
    raise FileNotFoundError('no file')

  def unreached():
    raise StartError('instance 0 did not start')
  assert [cli.exit_code(f) for f in (bad, stop, lost, unreached)] == [
      2, 130, 2, 2]
  assert capsys.readouterr().err.splitlines() == [
      'error: field=1: must be another', 'stopped', 'error: no file',
      'error: instance 0 did not start']
  assert cli.exit_code(lambda: None) == 0 and cli.exit_code(lambda: 1) == 1


@pytest.mark.parametrize('said, told', [
    ('a.json: is not JSON', '--latency=a.json: is not JSON'),
    ("rates='x': must be", "--rates='x': must be"),
    ('c.csv, line 2: no', '--lengths=c.csv, line 2: no'),
    ('d.csv: both flags', 'd.csv: both flags'),
    ('workload.rate=0: must', 'workload.rate=0: must')])
def test_an_error_names_its_flag(said, told):
  defined = dict(latency='a.json', rates='1', lengths='b.csv,c.csv',
                 placement='d.csv', traces='d.csv')
  with pytest.raises(InputError) as raised, cli.naming_flags(
      cli.options(defined), defined):
    raise InputError(said)
  assert str(raised.value) == told


@pytest.mark.parametrize('config', [Serve(), api.Api(), EngineConfig()],
                         ids=lambda c: type(c).__name__)
def test_help_has_every_field_with_its_meaning(config):
  lines = overrides.describe(config).splitlines()
  fields = [line.split(':')[0].strip() for line in lines
            if not line.startswith('      ')]
  assert len(fields) == len(set(fields)) > 20
  missing = [field for i, line in enumerate(lines)
             if not line.startswith('      ')
             for field in [line.split(':')[0].strip()]
             if i + 1 == len(lines) or not lines[i + 1].startswith('      ')]
  assert not missing
  for line in lines:  # every field can be set to what is shown
    if not line.startswith('      '):
      field, _, value = line.strip().partition(': ')
      value = value.partition(' = ')[2].strip("'")
      if not field.endswith('prompts'):  # of the checkout
        assert overrides.override(config, [f'{field}={value}']) == config


def test_meanings_are_those_of_the_docstring():
  @dataclasses.dataclass
  class Config:
    """Some words on width: not these.

    Attributes:
      width, height: in tokens; None: as
        many as fit. depth: of it; size: all.
    """
    width: int | None = None
    height: int | None = None
    depth: int = 1
    size: int = 1
    bare: int = 1
  assert overrides.meanings(Config) == {
      'width': 'in tokens; None: as many as fit.',
      'height': 'in tokens; None: as many as fit.', 'depth': 'of it',
      'size': 'all.'}


def test_the_program_s_help_lists_flags_and_fields():
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.measure', '--help'], text=True,
      capture_output=True, check=False, cwd=cli.ROOT)
  for part in ('--rounds: Timed rounds', 'prefill_tokens: int = 512',
               'L_m, tokens of a prefill batch', '--tpot_s'):
    assert part in done.stdout


def help_of(path, monkeypatch, capsys):
  """(docstring, what --help says) of a program, run in this process."""
  before = set(flags.FLAGS)
  monkeypatch.setattr(app, 'run', lambda *_, **__: app.usage(
      writeto_stdout=True))
  monkeypatch.setattr(sys, 'unraisablehook', sys.unraisablehook)
  monkeypatch.setattr(sys, 'argv', [str(path)])
  try:
    runpy.run_path(str(path), run_name='__main__')
  finally:
    for flag in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, flag)
  words = ast.get_docstring(ast.parse(path.read_text()), clean=False)
  return words, capsys.readouterr().out


@pytest.mark.parametrize('name', [
    name for name in STARTS if name.startswith(('goldens.', 'fast.'))])
def test_help_of_what_needs_other_packages_is_no_traceback(name):
  done = subprocess.run(
      [sys.executable, '-m', f'experiments.{name}', '--help'], text=True,
      capture_output=True, check=False, cwd=cli.ROOT)
  assert done.returncode == 0 or 'needs the extra `peers`' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('name', [*RUNNERS, *TASKS])
def test_every_program_s_help_is_its_docstring(name, monkeypatch, capsys):
  words, told = help_of(ROOT / f'{name.replace(".", "/")}.py', monkeypatch,
                        capsys)
  assert words in told


def test_commands_of_a_docstring_keep_their_lines():
  for folder in ('experiments', 'examples'):
    for path in sorted((cli.ROOT / folder).rglob('*.py')):
      words = ast.get_docstring(ast.parse(path.read_text())) or ''
      assert max(map(len, words.split('\n'))) <= 80, path


def test_help_keeps_every_percent_sign(tmp_path, monkeypatch, capsys):
  path = tmp_path / 'x.py'
  path.write_text('"""95 % should, 9 %% and %s"""\n'
                  'from experiments.common import cli\ncli.main(None, {})\n')
  words, told = help_of(path, monkeypatch, capsys)
  assert words in told


def test_numbers():
  assert cli.numbers('--rates', '3,1,2') == [1, 2, 3]
  for text in ('', '0,1', 'nan', '1,x', 'inf', '2,2', '2,1,2.0'):
    with pytest.raises(InputError, match='--rates'):
      cli.numbers('--rates', text)


def test_a_console_off_a_terminal_is_wide():
  assert isinstance(cli.wide_console(), Console)
  assert cli.wide_console().width >= 80


def test_progress_is_a_plain_line_now_and_then_off_a_terminal():
  for is_terminal, lines in ((False, ['1', '3', 'next']), (True, [])):
    console, now_s = Console(file=io.StringIO(),
                             force_terminal=is_terminal), [0.0]
    tell = terminal.now_and_then(console, clock=lambda now_s=now_s: now_s[0])
    for number, now_s[0] in enumerate((1.0, 9.0, 12.0, 21.0, 22.0)):
      tell(f'{number}')
    tell('next', begins=True)
    assert console.file.getvalue().split() == lines


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


@pytest.mark.parametrize('value', ['inf', 'nan', '0'])
def test_a_length_of_time_is_a_number_that_ends(value):
  with pytest.raises(flags.IllegalFlagValueError, match='flag --minutes='):
    cli.parse({'minutes': cli.Flag(1.0, 'How long.', low=0.01)},
              [f'--minutes={value}'])
  assert cli.parse({'ttft_s': 1.0}, ['--ttft_s=inf']).ttft_s == math.inf


@pytest.mark.parametrize('given, tp, threads', [
    (None, 1, None), (None, 2, '32'), ('3', 1, '3'), ('3', 2, '3')])
def test_threads_are_as_many_as_cores_but_for_collectives(given, tp, threads,
                                                          monkeypatch):
  monkeypatch.setattr(os, 'environ', {'NPROC': given} if given else {})
  cli.prepare(2, None, tp)
  assert os.environ.get('NPROC') == threads


def test_compiled_programs_are_found_in_a_copied_folder(tmp_path, monkeypatch):
  changed = {}
  monkeypatch.setattr(jax.config, 'update', changed.__setitem__)
  cli.prepare(2, str(tmp_path))
  assert changed['jax_compilation_cache_dir'] == str(tmp_path)
  assert changed['jax_persistent_cache_enable_xla_caches'] == 'none'


@pytest.mark.parametrize('said', [True, False])
def test_programs_are_kept_from_the_seconds_on_that_the_environment_says(
    said, tmp_path, monkeypatch):
  least, changed = 'jax_persistent_cache_min_compile_time_secs', {}
  monkeypatch.setattr(jax.config, 'update', changed.__setitem__)
  if said:
    monkeypatch.setenv(least.upper(), '0')
  else:
    monkeypatch.delenv(least.upper(), raising=False)
  cli.prepare(2, str(tmp_path))
  assert (least in changed) != said


@pytest.mark.parametrize('cores, gpus, cluster', [
    (2, None, None), (3, None, 'local'), (8, ['0', '1'], None)])
def test_instances_are_processes_where_each_has_cores(cores, gpus, cluster,
                                                      monkeypatch):
  """And the server has one."""
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(cores)))
  monkeypatch.setattr(local, 'visible_gpus', lambda: gpus)
  auto = cli.options({'cluster': cli.CLUSTER_FLAG}, cluster='auto')
  assert cli.cluster_of(auto, 2) == cluster
  with pytest.raises(InputError, match='^cluster='):  # of other runners
    cli.cluster_of(auto)
