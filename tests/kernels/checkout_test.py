"""`dsjax.kernels` comes from the checkout that `dsjax` comes from."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ASK = ('import dsjax, dsjax.kernels, dsjax.kernels.tiles as tiles;'
       'print(dsjax.__file__, dsjax.kernels.__file__, tiles.__file__, '
       'sep="\\n")')


@pytest.mark.parametrize('how', ['PYTHONPATH', 'folder'])
def test_a_second_checkout_has_its_own_kernels(tmp_path, how):
  """Here the environment has another one installed, or none."""
  for folder in ('dsjax', 'kernels'):
    shutil.copytree(ROOT / folder, tmp_path / folder,
                    ignore=shutil.ignore_patterns('__pycache__'))
  env = dict(os.environ)
  env.pop('PYTHONPATH', None)
  if how == 'PYTHONPATH':
    env['PYTHONPATH'] = str(tmp_path)
  files = subprocess.run(
      [sys.executable, '-c', ASK], env=env, text=True, check=True,
      cwd=tmp_path if how == 'folder' else '/', stdout=subprocess.PIPE).stdout
  for file in files.split():
    assert pathlib.Path(file).is_relative_to(tmp_path), files


def test_here_they_are_this_checkouts():
  import dsjax.kernels.tiles
  assert pathlib.Path(dsjax.kernels.tiles.__file__).parent == ROOT / 'kernels'
