"""What --help says: of every program, flag and field."""

import ast
import dataclasses
import runpy
import subprocess
import sys

import pytest
from absl import app, flags

from configs.serve import Serve
from dsjax.config.engine import EngineConfig
from experiments import api
from experiments.common import cli, overrides
from tests.common.runners import ROOT, RUNNERS, STARTS, TASKS


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
