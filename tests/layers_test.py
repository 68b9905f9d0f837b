"""Imports run downwards only (DESIGN section 2), read from the sources.

An import inside a function counts too. A new module must be put in a layer.
"""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
HOST = {'attribution', 'base', 'pages', 'scheduler', 'latency', 'workload',
        'metrics', 'state', 'recovery', 'life', 'quiet', 'goodput', 'bounds',
        'contention', 'queueing', 'simulator', 'problem', 'placement',
        'verdict', 'traffic', 'hardware', 'roofline', 'zoo'}
DEVICE = {'model', 'cache', 'sampling', 'sharding'}
SHELL = {'engine', 'fit', 'migrate', 'checkpoint', 'gguf_file', 'gguf_model',
         'hf', 'hf_config', 'hf_tokenizer', 'orbax_file', 'weights',
         'tokenizer', 'answer', 'fleet', 'orchestrator', 'service',
         'protocol', 'gauges', 'server', 'gate', 'completions', 'listener',
         'cluster'}
TOOLS = {'bench', 'compiled'}  # of kernels/: run by people, not by an op
EFFECTS = {'asyncio', 'multiprocessing', 'os', 'random', 'secrets', 'socket',
           'subprocess', 'threading', 'time'}
OURS = {'dsjax', 'kernels', 'experiments', 'configs', 'tests'}
# Layer -> modules of dsjax that it may import; packages from outside, beside
# the standard library less EFFECTS (None: anything).
MAY = {
    'kernels': ({'kernels'}, {'jax', 'numpy'}),
    'tools': ({'kernels'}, {'jax', 'numpy', 'absl', 'rich', *EFFECTS}),
    'host': (HOST, {'numpy'}),
    'device': (DEVICE | {'base', 'kernels'}, {'jax', 'flax', 'numpy'}),
    'shell': (HOST | DEVICE | SHELL | {'kernels'}, None),
}
FILES = sorted([*ROOT.glob('dsjax/**/*.py'), *ROOT.glob('kernels/**/*.py')])


def _layer(path):
  if path.is_relative_to(ROOT / 'kernels'):
    return 'tools' if path.stem in TOOLS else 'kernels'
  layers = {'host': HOST, 'device': DEVICE, 'shell': SHELL}
  found = [name for name, layer in layers.items() if path.stem in layer]
  assert len(found) == 1, f'{path}: put it in one layer of {__file__}'
  return found[0]


def _imports(tree):
  """(line, dotted name) of each import: `from a import b` gives a.b."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      prefix = '.' * node.level + (node.module or '')
      yield from ((node.lineno, f'{prefix}.{a.name}') for a in node.names)


def _forbidden(layer, name):
  """Why this layer may not import this name, or None."""
  ours, packages = MAY[layer]
  top, _, rest = name.partition('.')
  if top in OURS:
    ok = top == 'dsjax' and rest.split('.')[0] in ours and (
        layer == 'tools' or not TOOLS & set(rest.split('.')))
  else:
    pure = top in sys.stdlib_module_names and top not in EFFECTS
    ok = bool(top) and (packages is None or pure or top in packages)
  return None if ok else f'{layer} may not import {name}'


def _id(path):
  return str(path.relative_to(ROOT))


@pytest.mark.parametrize('path', FILES, ids=_id)
def test_imports_run_downwards(path):
  if path == ROOT / 'dsjax' / '__init__.py':
    return  # the public names, of any layer
  layer = _layer(path)
  wrong = [f'{_id(path)}:{line}: {why}'
           for line, name in _imports(ast.parse(path.read_text()))
           if (why := _forbidden(layer, name))]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('path', FILES, ids=_id)
def test_what_is_public_says_what_it_is(path):
  tree = ast.parse(path.read_text())
  assert ast.get_docstring(tree), f'{_id(path)} has no docstring'
  kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
  bare = [f'{_id(path)}:{node.lineno}: {node.name} has no docstring'
          for node in tree.body if isinstance(node, kinds)
          and not node.name.startswith('_') and not ast.get_docstring(node)]
  assert not bare, '\n'.join(bare)


@pytest.mark.parametrize('layer, source, wrong', [
    ('host', 'import math, bisect\nimport numpy as np', []),
    ('host', 'from dsjax import base, pages', []),
    ('host', 'import time', ['time']),
    ('host', 'def f():\n  from jax import numpy', ['jax.numpy']),
    ('host', 'from dsjax import base, model', ['dsjax.model']),
    ('host', 'from dsjax.engine import init', ['dsjax.engine.init']),
    ('host', 'import dsjax', ['dsjax']),
    ('host', 'from . import pages', ['..pages']),
    ('device', 'import jax\nfrom dsjax.kernels import shapes', []),
    ('device', 'from dsjax import scheduler', ['dsjax.scheduler']),
    ('device', 'from dsjax import migrate', ['dsjax.migrate']),
    ('kernels', 'import functools\nimport jax.numpy as jnp', []),
    ('kernels', 'from dsjax import base', ['dsjax.base']),
    ('kernels', 'import time, rich', ['time', 'rich']),
    ('kernels', 'from dsjax.kernels import bench', ['dsjax.kernels.bench']),
    ('tools', 'import time, rich\nfrom dsjax.kernels import compiled', []),
    ('tools', 'from dsjax import zoo', ['dsjax.zoo']),
    ('shell', 'import os, time, gguf\nfrom dsjax import scheduler', []),
    ('shell', 'from .base import require', ['.base.require']),
    ('shell', 'import configs.smollm', ['configs.smollm']),
    ('shell', 'from experiments import report', ['experiments.report'])])
def test_the_rules_themselves(layer, source, wrong):
  found = [name for _, name in _imports(ast.parse(source))
           if _forbidden(layer, name)]
  assert found == wrong


def test_a_module_without_a_layer_is_named():
  with pytest.raises(AssertionError, match='surprise.py: put it in one layer'):
    _layer(ROOT / 'dsjax' / 'surprise.py')
