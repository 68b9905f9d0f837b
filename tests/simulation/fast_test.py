"""Compiled modules: the same logs, byte for byte, and never an old source.

`make test-fast` runs this, and the other tests of the simulator and of the
scheduler, compiled.
"""

import hashlib
import importlib.machinery
import json
import os
import pathlib
import subprocess
import sys

import pytest

from dsjax.simulation import executors
from experiments.fast import finder

ROOT = pathlib.Path(__file__).parents[2]
IS_COMPILED = not executors.__file__.endswith('.py')
LOGS = """
import hashlib, sys
from dsjax.simulation import executors, simulator
from tests.common.simulated import random_run
seen = hashlib.sha256()
for seed in range(24):
  run = random_run(seed)
  logged = simulator.simulate(*run, log=True)
  seen.update(repr((logged, simulator.simulate(*run))).encode())
print(executors.__file__.endswith('.py'), seen.hexdigest())
"""


def logs(**environment):
  """(whether the sources run, the digest of the logs and records)"""
  done = subprocess.run(
      [sys.executable, '-c', LOGS], cwd=ROOT, capture_output=True, text=True,
      check=True, env={**os.environ, **environment})
  return done.stdout.split()


@pytest.mark.skipif(not IS_COMPILED, reason='run by make test-fast')
def test_logs_are_those_of_the_sources():
  (plain, expected), (compiled, told) = logs(DSJAX_FAST='0'), logs()
  assert (plain, compiled) == ('True', 'False')
  assert told == expected


@pytest.fixture
def folder(tmp_path):
  """A package of one module, of which `compiled` has another version."""
  source = tmp_path / 'package/one.py'
  source.parent.mkdir()
  source.write_text('VALUE = 1\n')
  compiled = tmp_path / 'compiled'
  compiled.mkdir()
  (compiled / 'manifest.json').write_text(json.dumps(
      {'package.one': hashlib.sha256(source.read_bytes()).hexdigest()}))
  return tmp_path


def test_a_compiled_module_comes_first(folder):
  modules = finder.Finder(folder / 'compiled')
  spec = modules.find_spec('package.one', [str(folder / 'package')])
  assert spec.origin == str(folder / 'compiled/package/one') + (
      importlib.machinery.EXTENSION_SUFFIXES[0])
  assert isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)
  assert modules.find_spec('package.two', [str(folder / 'package')]) is None
  assert modules.find_spec('one') is None


def test_a_source_that_has_changed_is_an_error(folder):
  (folder / 'package/one.py').write_text('VALUE = 2\n')
  with pytest.raises(ImportError, match='one.py has changed .* `make fast`'):
    finder.Finder(folder / 'compiled').find_spec(
        'package.one', [str(folder / 'package')])


def test_it_can_be_turned_off(folder, monkeypatch):
  before = list(sys.meta_path), list(sys.path)
  monkeypatch.setenv('DSJAX_FAST', '0')
  finder.install(folder / 'compiled')
  monkeypatch.delenv('DSJAX_FAST')
  finder.install(folder / 'nothing')
  assert (list(sys.meta_path), list(sys.path)) == before
  monkeypatch.setattr(sys, 'meta_path', [])
  monkeypatch.setattr(sys, 'path', [])
  monkeypatch.setattr(finder.gc, 'set_threshold', lambda objects: None)
  finder.install(folder / 'compiled')
  assert [type(f) for f in sys.meta_path] == [finder.Finder]
