"""What result files say of their making."""

import hashlib
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

import dsjax
from dsjax.config.checks import InputError
from experiments.bench import engine, simulator
from experiments.common import cli, provenance


def test_a_result_says_how_it_was_made(tmp_path):
  trace = tmp_path / 'trace.csv'
  trace.write_text('a,b\n')
  provenance.save_json(tmp_path / 'x.json', {'answer': 'ναι'}, {'seed': 3},
                       ['sharegpt', trace, None])
  written = json.loads((tmp_path / 'x.json').read_text(encoding='utf-8'))
  assert list(written) == ['made_by', 'answer'] and written['answer'] == 'ναι'
  made = written['made_by']
  assert made['dsjax'] == dsjax.__version__ and made['options'] == {'seed': 3}
  assert made['data'] == {
      'sharegpt': 'built in',
      'trace.csv': hashlib.sha256(b'a,b\n').hexdigest()}
  assert made['machine']['jax'] == jax.__version__
  assert made['machine']['devices'] and made['machine']['cores'] > 0
  assert str(tmp_path) not in json.dumps(made)


def test_a_file_of_results_is_json_in_a_folder_that_is_made(tmp_path):
  path = tmp_path / 'a' / 'b' / 'x.json'
  provenance.save_json(path, {'rows': [math.nan, (1.5, -math.inf)]},
                       {'ttft_s': math.inf})

  def refuse(word):
    raise AssertionError(word)
  read = json.loads(path.read_text(), parse_constant=refuse)
  assert read['rows'] == [None, [1.5, None]]
  assert read['made_by']['options'] == {'ttft_s': None}


@pytest.mark.parametrize('save', [
    lambda path: provenance.save_json(path, {'new': 1}, {}),
    lambda path: provenance.save_trace(path, {'new': 1}, {}),
    lambda path: provenance.save_csv(path, ['new'], [[1]])])
def test_a_write_that_ends_early_leaves_what_was_there(
    tmp_path, monkeypatch, save):
  path, write = tmp_path / 'x', pathlib.Path.write_text
  path.write_text('old')

  def killed(self, text, **options):
    write(self, text[:len(text) // 2], **options)
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, 'write_text', killed)
  with pytest.raises(KeyboardInterrupt):
    save(path)
  assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]
  monkeypatch.setattr(pathlib.Path, 'write_text', write)
  link = tmp_path / 'link'
  link.symlink_to(path)
  save(link)
  assert link.is_symlink() and 'new' in path.read_text()
  save('/dev/null')


@pytest.mark.parametrize('bench, changes', [
    (engine, {'only': ['c']}),
    (simulator, {'only': ['colocated'], 'requests': 20, 'rounds': 1})])
def test_a_bench_writes_its_numbers(tmp_path, bench, changes, capsys):
  path = tmp_path / 'bench.json'
  bench.run(cli.options(bench.FLAGS, out=str(path), **changes),
            cli.wide_console())
  written = json.loads(path.read_text())
  assert written.pop('made_by')['options']['only'] == changes['only']
  assert len(written) == 1
  table, told, _ = capsys.readouterr().out.partition('Written to ')
  assert told and max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize('bench', [engine, simulator])
def test_a_part_that_a_bench_does_not_have_is_named(bench):
  with pytest.raises(InputError, match='--only=.*nothing'):
    bench.run(cli.options(bench.FLAGS, only=['nothing']), cli.wide_console())


# Files that are no results of a run.
OTHERS = {'common/provenance.py', 'gpu/ingest.py', 'gpu/simulate.py',
          'tokenizer_folder.py', 'aot/report.py', 'bench/aisimulate.py',
          'bench/peers.py', 'common/operators.py', 'fast/build.py',
          'verify/faults.py', 'verify/schedules.py',
          *(f'goldens/make_{what}.py'
            for what in ('families', 'goldens', 'sentencepiece'))}
EXPERIMENTS = cli.ROOT / 'experiments'
FILES = sorted(path.relative_to(EXPERIMENTS).as_posix()
               for path in EXPERIMENTS.rglob('*.py'))


@pytest.mark.parametrize('name', [n for n in FILES if n not in OTHERS])
def test_results_are_written_one_way(name):
  text = (EXPERIMENTS / name).read_text()
  assert 'json.dump(' not in text and '.write_text(' not in text, (
      'save_json of experiments.common.provenance writes results')


@pytest.mark.parametrize('runner', [
    'serve', 'simulate', 'place', 'reproduce', 'measure', 'validate', 'load',
    'overload', 'explore', 'soak'])
def test_every_runner_is_asked_how_its_files_were_made(runner):
  tests = (cli.ROOT / 'tests' / 'experiments' / f'{runner}_test.py').read_text()
  assert 'made_by(' in tests, 'tests.common.results.made_by reads its files'


def _git(folder, *words):
  subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *words],
                 cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_a_checkout(tmp_path, monkeypatch):
  monkeypatch.setattr(cli, 'ROOT', tmp_path)
  assert provenance.commit() is None  # a copy without .git
  _git(tmp_path, 'init')
  (tmp_path / 'a').write_text('1')
  _git(tmp_path, 'add', 'a')
  _git(tmp_path, 'commit', '-m', 'a')
  _git(tmp_path, 'tag', 'v1')
  first = provenance.commit()
  assert len(first) == 12 and int(first, 16)
  (tmp_path / 'a').write_text('2')
  assert provenance.commit() == f'{first}-dirty'


def test_jax_is_not_loaded_for_it():
  done = subprocess.run(
      [sys.executable, '-c', 'import sys\n'
       'from experiments.common import provenance\n'
       "assert 'jax' not in provenance.machine()\n"
       "sys.exit('jax' in sys.modules)"], cwd=cli.ROOT, check=False)
  assert done.returncode == 0
