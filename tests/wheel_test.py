"""A wheel of this tree serves and simulates away from the checkout."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
USE = """
import dsjax
print(dsjax.__file__)
print(dsjax.simulate('prefill=1x1,decode=1x1', rate_per_s=1.0, requests=40))
model = dsjax.load('tiny')
with dsjax.serve(model, dsjax.Placement.parse('prefill=1x1,decode=1x1'),
                 dsjax.EngineConfig(max_len=64, max_seqs=2, prefill_tokens=32),
                 report=lambda *_: None) as server:
  print(len(server.generate('Hi', max_tokens=5, ignore_eos=True).tokens))
print(dsjax.kernels.__file__)
"""


@pytest.fixture(scope='module')
def unpacked(wheel, tmp_path_factory):
  """The folder that a wheel of this tree was unpacked into."""
  folder = tmp_path_factory.mktemp('site')
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder)
  return folder


def test_every_package_and_its_data_are_inside(unpacked):
  ours = {path.relative_to(ROOT / 'dsjax') for path in
          ROOT.glob('dsjax/**/*') if path.suffix in ('.py', '.html', '.json')}
  ours |= {pathlib.Path('kernels', path.name) for path in
           ROOT.glob('kernels/*') if path.suffix in ('.py', '.json')}
  assert not [str(name) for name in sorted(ours)
              if not (unpacked / 'dsjax' / name).is_file()]
  assert {path.name.split('-')[0] for path in unpacked.iterdir()} == {'dsjax'}


@pytest.mark.usefixtures('no_hang')
def test_it_simulates_and_serves_elsewhere(unpacked, tmp_path):
  done = subprocess.run(
      [sys.executable, '-c', USE], cwd=tmp_path, text=True, check=False,
      capture_output=True,
      env=os.environ | {'PYTHONPATH': str(unpacked), 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  file, simulated, tokens, kernels = done.stdout.splitlines()
  assert file == str(unpacked / 'dsjax' / '__init__.py')
  assert kernels == str(unpacked / 'dsjax' / 'kernels' / '__init__.py')
  assert 'met both objectives' in simulated and tokens == '5'
