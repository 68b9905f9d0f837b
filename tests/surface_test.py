"""What `import dsjax` offers: names, words, types, and how fast."""

import ast
import dataclasses
import inspect
import pathlib
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import pytest

import dsjax
from dsjax.config.request import SamplingFields
from dsjax.runtime.orchestrator import ServeOptions

ROOT = pathlib.Path(__file__).parent.parent
NAMES = {
    'AsyncServer', 'Cluster', 'DISTSERVE', 'EngineConfig', 'InputError',
    'Interrupted', 'Model', 'ModelConfig', 'Orchestrator', 'Output',
    'Placement', 'Plan', 'Policy', 'PolicyError', 'Profile', 'Record',
    'Request', 'RequestFailed', 'Sampling', 'Slo', 'load', 'profile', 'rows',
    'search', 'serve', 'serve_async', 'simulate'}


def test_the_names_are_these():
  assert set(dsjax.__all__) == NAMES and len(dsjax.__all__) == len(NAMES)
  assert set(dir(dsjax)) >= NAMES
  star = {}
  exec('from dsjax import *', star)
  assert set(star) >= NAMES
  with pytest.raises(AttributeError, match="no attribute 'generate'"):
    getattr(dsjax, 'gen' + 'erate')


def test_the_version_is_the_same_everywhere():
  assert f'version: {dsjax.__version__}\n' in (
      ROOT / 'CITATION.cff').read_text()
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  assert project['tool']['setuptools']['dynamic']['version'] == {
      'attr': 'dsjax.config.version.__version__'}


LENT = """
import importlib.machinery, sys

class Finder:  # as an editable install of another checkout has it
  @staticmethod
  def find_spec(name, path=None, target=None):
    if name == 'dsjax.kernels':
      return importlib.machinery.PathFinder.find_spec(name, [sys.argv[1]])

sys.meta_path.append(Finder)
try:
  import dsjax
except ImportError as error:
  print(error)
try:
  import dsjax.kernels
except ImportError as error:
  print(error)
"""


def test_dsjax_without_its_kernels_takes_no_others(tmp_path):
  """Other checkouts may be installed: they lend nothing in silence."""
  shutil.copytree(ROOT / 'dsjax', tmp_path / 'dsjax')
  done = subprocess.run([sys.executable, '-c', LENT, str(ROOT)], cwd=tmp_path,
                        check=False, text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 2 and lines[0] == lines[1], done.stdout
  assert lines[0].endswith(f'{tmp_path / "kernels"} is not there')


@pytest.mark.parametrize('name', sorted(NAMES))
def test_each_has_words_and_types(name):
  value = getattr(dsjax, name)
  assert inspect.getdoc(value) and '(' != inspect.getdoc(value)[-1]
  if inspect.isfunction(value):
    signature = inspect.signature(value)
    assert signature.return_annotation is not inspect.Signature.empty
    bare = [p.name for p in signature.parameters.values()
            if p.annotation is inspect.Parameter.empty]
    assert not bare


def test_parameters_by_name_are_those_that_are_taken():
  fields = {f.name for f in dataclasses.fields(dsjax.Sampling)}
  assert set(SamplingFields.__annotations__) == fields
  first = ['model', 'placement', 'config']
  assert [*first, *ServeOptions.__annotations__] == list(
      inspect.signature(dsjax.serve).parameters)
  assert list(inspect.signature(dsjax.serve).parameters) == list(
      inspect.signature(dsjax.Orchestrator).parameters)


@pytest.mark.parametrize('name', sorted(NAMES))
def test_no_parameter_may_be_anything(name):
  value = getattr(dsjax, name)
  members = [value] if inspect.isfunction(value) else [
      member for member_name, member in inspect.getmembers(
          value, inspect.isfunction) if not member_name.startswith('_')]
  for function in members:
    if function.__name__ == 'call':  # a function's arguments
      continue
    for parameter in inspect.signature(function).parameters.values():
      assert parameter.annotation is not Any, (function, parameter)


def test_type_checkers_see_what_is_lazy():
  tree = ast.parse((ROOT / 'dsjax' / '__init__.py').read_text())
  seen = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      seen.update({alias.name: node.module for alias in node.names})
  for name, home in dsjax._LAZY.items():
    assert seen[name] == f'dsjax.{home}'


def test_what_simulates_loads_no_jax():
  done = subprocess.run(
      [sys.executable, '-c', 'import sys, dsjax\n'
       "print(dsjax.simulate('colocated=1x1', rate_per_s=1.0, requests=20))\n"
       "sys.exit('jax' in sys.modules)"], cwd=ROOT, check=False, text=True,
      capture_output=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('colocated=1x1: ')


@pytest.mark.parametrize('arguments, field', [
    (('tiny', 'prefill=1x1,decode=1x1'), "model='tiny'"),
    ((None, 'prefill=1x1,decode=1x1'), 'model=None'),
    (('a model', 5), 'placement=5'),
    (('a model', 'colocated=1x1', {}), 'config={}'),
    (('a model', 'colocated=1x1', 'fast'), "config='fast'")])
def test_serve_says_what_it_wants(arguments, field):
  model, *others = arguments
  model = dsjax.load('tiny') if model == 'a model' else model
  with pytest.raises(dsjax.InputError, match=f'^{field}: must be a'):
    dsjax.serve(model, *others)


def test_serve_async_says_what_it_wants_before_it_is_entered():
  with pytest.raises(dsjax.InputError, match="^model='tiny': must be a Model"):
    dsjax.serve_async('tiny', 'colocated=1x1')
  with pytest.raises(dsjax.InputError, match="^option='polcy': must be one of"):
    dsjax.serve_async(dsjax.load('tiny'), 'colocated=1x1', polcy=None)


@pytest.mark.parametrize('arguments, field', [
    ((None,), 'model=None'), ((5,), 'model=5'), ((['tiny'],), 'model='),
    (('tiny', 'float8'), "dtype='float8'"), (('tiny', None), 'dtype=None'),
    (('tiny', 'float32', 'llama'), "family='llama'")])
def test_load_says_what_it_wants(arguments, field):
  with pytest.raises(dsjax.InputError, match=f'^{field}.*: must be '):
    dsjax.load(*arguments)
