"""What `import dsjax` offers: names, words, types, and how fast."""

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import dsjax

ROOT = pathlib.Path(__file__).parent.parent
NAMES = {
    'DISTSERVE', 'Affine', 'AsyncServer', 'Cluster', 'EngineConfig',
    'InputError', 'Interrupted', 'Model', 'ModelConfig', 'Orchestrator',
    'Output', 'Placement', 'Plan', 'Policy', 'PolicyError', 'PrefillBudget',
    'Profile', 'Record', 'Request', 'RequestFailed', 'Sampling',
    'SearchResult', 'Simulated', 'Slo', 'load', 'profile', 'rows', 'search',
    'serve', 'serve_async', 'simulate'}


def test_the_names_are_these():
  assert set(dsjax.__all__) == NAMES and len(dsjax.__all__) == len(NAMES)
  assert set(dir(dsjax)) >= NAMES
  star = {}
  exec('from dsjax import *', star)
  assert set(star) >= NAMES
  with pytest.raises(AttributeError, match="no attribute 'generate'"):
    getattr(dsjax, 'gen' + 'erate')


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
