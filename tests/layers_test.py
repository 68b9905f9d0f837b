"""Imports run downwards only, read from the sources.

Each folder of dsjax has a rank, and imports from folders of a lower one; what
kind it is says which packages it may use, and whether it may touch files. An
import inside a function counts too. A new folder must be given a rank.
"""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# folder -> (rank, kind)
FOLDERS = {
    'kernels': (0, 'device'),
    'config': (1, 'pure'),
    'scheduling': (2, 'pure'),
    'workload': (2, 'pure'),
    'model': (2, 'device'),
    'analysis': (3, 'pure'),
    'checkpoints': (3, 'shell'),
    'simulation': (4, 'pure'),
    'placement': (5, 'pure'),
    'policies': (5, 'pure'),
    'runtime': (6, 'shell'),
    'http': (7, 'shell'),
}
TOOLS = {'kernels/bench.py', 'kernels/build_cpu.py',  # run by people
         'kernels/compiled.py', 'kernels/timing.py'}
# Of the standard library what has no effect; all else is asked for by file.
HARMLESS = {'__future__', 'bisect', 'collections', 'contextlib', 'dataclasses',
            'functools', 'hashlib', 'heapq', 'itertools', 'json', 'math',
            'operator', 're', 'statistics', 'sys', 'typing', 'warnings'}
FILE_METHODS = {'read_text', 'read_bytes', 'write_text', 'write_bytes'}
# Of numpy, and of datetime's classes: files, a clock, a state of the process.
NUMPY_FILES = {'load', 'save', 'savez', 'savez_compressed', 'loadtxt',
               'savetxt', 'genfromtxt', 'fromfile', 'memmap'}
NUMPY_RANDOM = {'default_rng', 'Generator', 'SeedSequence', 'PCG64'}
CLOCKS = {'now', 'utcnow', 'today'}
# Packages from outside beside HARMLESS; None: any, and effects.
PACKAGES = {'pure': {'numpy'}, 'device': {'jax', 'flax', 'numpy'},
            'shell': None, 'tool': None}
# What else single files may do, and why.
EXCEPTIONS = {
    'dsjax/scheduling/prefix_cache.py': {'immutables'},  # maps that are values
    # Reads traces and prompts.
    'dsjax/workload/files.py': {'codecs', 'csv', 'datetime', 'gzip', 'io',
                                'pathlib', 'zlib'},
    'dsjax/workload/served.py': {'datetime'},  # dates in a log
    'dsjax/policies/named.py': {'importlib', 'inspect'},  # a module by name
    'dsjax/simulation/hardware.py': {'csv', 'pathlib'},  # DistServe's data
    'dsjax/simulation/profiles.py': {'pathlib'},  # files of latencies
    'dsjax/simulation/roofline_fit.py': {'jax', 'optax'},  # a descent
    'dsjax/simulation/served_fit.py': {'scipy'},  # least squares
    # Where its library lies, and for what machine it is.
    'kernels/cpu.py': {'ctypes', 'mmap', 'os', 'pathlib', 'platform'},
    'kernels/tiles.py': {'importlib'},  # whether a GPU's plug-in is there
    'kernels/tuned.py': {'pathlib'},  # what kernels.bench --tune wrote
}
MAY_OPEN = {name for name, what in EXCEPTIONS.items() if 'pathlib' in what}
FILES = sorted([*ROOT.glob('dsjax/*/**/*.py'), *ROOT.glob('kernels/*.py')])
RUNNERS = sorted([*ROOT.glob('experiments/**/*.py'),
                  *ROOT.glob('configs/*.py')])
OURS = {'dsjax', 'kernels', 'experiments', 'configs', 'examples', 'tests'}


def _id(path):
  return path.relative_to(ROOT).as_posix()


def _folder(name):
  return name.removeprefix('dsjax/').split('/')[0]


def _kind(name):
  folder = _folder(name)
  assert folder in FOLDERS, f'{name}: give its folder a rank in {__file__}'
  return 'tool' if name in TOOLS else FOLDERS[folder][1]


@functools.cache
def _tree(path):
  return ast.parse(path.read_text())


def _imports(tree):
  """(line, dotted name) of each import: `from a import b` gives a.b."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      prefix = '.' * node.level + (node.module or '')
      yield from ((node.lineno, f'{prefix}.{a.name}') for a in node.names)


def _forbidden(name, imported):
  """Why the file `name` may not import this, or None."""
  kind, (rank, _) = _kind(name), FOLDERS[_folder(name)]
  top, *rest = imported.split('.')
  if top in OURS:
    other = rest[0] if rest else ''
    ok = top == 'dsjax' and other in FOLDERS and (
        other == _folder(name) or FOLDERS[other][0] < rank
        and (kind != 'pure' or FOLDERS[other][1] == 'pure'))
    if ok and kind != 'tool':
      ok = '/'.join(rest[:2]) + '.py' not in TOOLS
  else:
    packages = PACKAGES[kind]
    ok = bool(top) and (packages is None or top in HARMLESS | packages
                        or top in EXCEPTIONS.get(name, ()))
  return None if ok else f'{kind} {name} may not import {imported}'


def _effects(tree):
  """(line, name) of each call that looks like access to a file, a clock or
  numpy's one stream of random numbers."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      *owner, last = name.split('.')
      if (name == 'open' or last in FILE_METHODS
          or owner == ['np'] and last in NUMPY_FILES
          or owner == ['np', 'random'] and last not in NUMPY_RANDOM
          or owner[-1:] in (['datetime'], ['date']) and last in CLOCKS):
        yield node.lineno, name


@pytest.mark.parametrize('path', FILES, ids=_id)
def test_imports_run_downwards(path):
  name = _id(path)
  wrong = [f'{name}:{line}: {why}'
           for line, imported in _imports(_tree(path))
           if (why := _forbidden(name, imported))]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('path', FILES, ids=_id)
def test_a_pure_layer_touches_no_file(path):
  name = _id(path)
  if _kind(name) in ('pure', 'device') and name not in MAY_OPEN:
    assert not list(_effects(_tree(path)))


@pytest.mark.parametrize('path', FILES, ids=_id)
def test_what_is_public_says_what_it_is(path):
  tree = _tree(path)
  assert ast.get_docstring(tree), f'{_id(path)} has no docstring'
  kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
  bare = [f'{_id(path)}:{node.lineno}: {node.name} has no docstring'
          for node in tree.body if isinstance(node, kinds)
          and not node.name.startswith('_') and not ast.get_docstring(node)]
  assert not bare, '\n'.join(bare)


def _bare(tree):
  """(line, name) of public functions that an annotation is missing of."""
  def visit(body, of_class):
    for node in body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
        yield from visit(node.body, True)
      if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
          node.name.startswith('_') and node.name != '__init__'):
        continue
      static = any(getattr(d, 'id', '') == 'staticmethod'
                   for d in node.decorator_list)
      parameters = [*node.args.posonlyargs, *node.args.args][
          of_class and not static:] + node.args.kwonlyargs
      if any(p.annotation is None for p in parameters) or (
          node.returns is None and node.name != '__init__'):
        yield node.lineno, node.name

  yield from visit(tree.body, False)


@pytest.mark.parametrize('path', [*FILES, *RUNNERS], ids=_id)
def test_what_is_public_is_annotated(path):
  assert not list(_bare(_tree(path)))


@pytest.mark.parametrize('source, bare', [
    ('def f(x: int) -> int: pass\ndef _g(x): pass', []),
    ('def f(x) -> int: pass', ['f']), ('def f(x: int): pass', ['f']),
    ('class A:\n  def f(self, *, x) -> int: pass', ['f']),
    ('class A:\n  def __init__(self, x: int): pass', []),
    ('class _A:\n  def f(self, x): pass', [])])
def test_what_is_bare_is_seen(source, bare):
  assert [name for _, name in _bare(ast.parse(source))] == bare


HOST, DEVICE = 'dsjax/scheduling/state.py', 'dsjax/model/sampling.py'
SHELL, KERNEL = 'dsjax/runtime/engine.py', 'kernels/tiles.py'


@pytest.mark.parametrize('name, source, wrong', [
    (HOST, 'import math, bisect\nimport numpy as np', []),
    (HOST, 'from dsjax.config import model\nfrom dsjax.scheduling import live',
     []),
    (HOST, 'import time', ['time']),
    (HOST, 'def f():\n  from jax import numpy', ['jax.numpy']),
    (HOST, 'from dsjax.model import sampling', ['dsjax.model.sampling']),
    (HOST, 'from dsjax.workload import files', ['dsjax.workload.files']),
    (HOST, 'from dsjax.analysis import metrics', ['dsjax.analysis.metrics']),
    (HOST, 'import pathlib', ['pathlib']),
    (HOST, 'import gzip, signal', ['gzip', 'signal']),
    (HOST, 'from concurrent import futures', ['concurrent.futures']),
    (HOST, 'from importlib import resources', ['importlib.resources']),
    (HOST, 'import dsjax', ['dsjax']),
    (HOST, 'from . import live', ['..live']),
    ('dsjax/workload/files.py', 'import pathlib, io', []),
    ('dsjax/simulation/latency.py', 'import optax', ['optax']),
    ('dsjax/simulation/roofline_fit.py', 'import jax, optax', []),
    (DEVICE, 'import jax\nfrom dsjax.kernels import shapes', []),
    (DEVICE, 'from dsjax.scheduling import state', ['dsjax.scheduling.state']),
    (DEVICE, 'from dsjax.runtime import steps', ['dsjax.runtime.steps']),
    (KERNEL, 'import functools\nimport jax.numpy as jnp', []),
    (KERNEL, 'from dsjax.config import model', ['dsjax.config.model']),
    (KERNEL, 'import time, rich', ['time', 'rich']),
    (KERNEL, 'from dsjax.kernels import bench', ['dsjax.kernels.bench']),
    ('kernels/bench.py', 'import time, rich\n'
     'from dsjax.kernels import compiled', []),
    ('kernels/bench.py', 'from dsjax.config import zoo', ['dsjax.config.zoo']),
    (SHELL, 'import os, time, gguf\nfrom dsjax.scheduling import scheduler',
     []),
    (SHELL, 'from dsjax.http import service', ['dsjax.http.service']),
    (SHELL, 'from .steps import Shapes', ['.steps.Shapes']),
    (SHELL, 'import configs.smollm', ['configs.smollm']),
    (SHELL, 'from experiments import serve', ['experiments.serve'])])
def test_the_rules_themselves(name, source, wrong):
  assert [imported for _, imported in _imports(ast.parse(source))
          if _forbidden(name, imported)] == wrong


@pytest.mark.parametrize('source', [
    "open('x')", 'def f(path):\n  return path.read_text()',
    "pathlib.Path('x').write_bytes(b'')", "np.load('x.npy')",
    'datetime.datetime.now()', 'date.today()', 'np.random.normal(2)'])
def test_an_effect_is_seen(source):
  assert len(list(_effects(ast.parse(source)))) == 1


@pytest.mark.parametrize('source', [
    'self.open(3)', 'np.random.default_rng(0).normal(2)', 'np.floor(2.5)',
    'datetime.datetime.fromisoformat(x)', 'json.load(x)'])
def test_what_has_no_effect_is_let_through(source):
  assert not list(_effects(ast.parse(source)))


def test_a_folder_without_a_rank_is_named():
  with pytest.raises(AssertionError, match='surprise.py: give its folder'):
    _kind('dsjax/cellar/surprise.py')


def test_no_module_lies_outside_a_folder():
  assert {path.name for path in ROOT.glob('dsjax/*.py')} == {
      '__init__.py', '_kernels_beside.py'}
