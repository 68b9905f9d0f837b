"""What all runners share: flags by name, errors, exit codes."""

import ast
import importlib
import io
import json
import logging
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest
from absl import flags
from rich.console import Console

import dsjax
from dsjax.config.checks import InputError, StartError, require
from dsjax.runtime.cluster import local
from experiments.common import cli, extras, terminal
from tests.common.runners import ROOT, RUNNERS

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
