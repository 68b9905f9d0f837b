"""Notebooks run from top to bottom in an environment without dsjax.

As on Colab, where jax is there: the first cell installs it, the rest runs in
the same kernel. What is cloned there is a wheel of this tree here.

  python -m tests.notebook_test 1_two_meshes 2_placement 3_kernels

executes notebooks at full size, with the dsjax that is installed here, and
stores their outputs. On a quiet machine: the first one compares latencies.
"""

import copy
import json
import pathlib
import subprocess
import sys
import sysconfig
import tomllib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'experiments' / 'colabs'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))
INSTALL = 2  # the cell that installs
SAYS = {
    '1_two_meshes': ('equal token for token', *(
        f'{mode}: 4 of 4 answered'
        for mode in ('disaggregated', 'colocated', 'chunked'))),
    '2_placement': ('met both objectives, 95 % interval',
                    'prefill=2x1,decode=1x1', 'Only disaggregated placements'),
    '3_kernels': ('masked: 8', 'splits against dense: ', 'of the floor; ',
                  'pallas_interpret on cpu: error '),
    '4_policies': ('met both objectives, 95 % interval', 'adaptive',
                   'static:prefills=2+deadlines', 'answers are equal: True'),
}


def _said(cell):
  return ''.join(o.get('text', '') for o in cell.get('outputs', []))


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
  """An environment with all that is here but dsjax: its folder of packages.

  Links to packages, since the finder of an editable install must stay out.
  """
  folder = tmp_path_factory.mktemp('bare')
  subprocess.run([sys.executable, '-m', 'venv', '--without-pip', folder],
                 check=True)
  site, = folder.glob('lib/python*/site-packages')
  pip = subprocess.run(
      [sys._base_executable, '-c', 'import pip; print(pip.__path__[0])'],
      check=True, capture_output=True, text=True).stdout.strip()
  for path in (*pathlib.Path(sysconfig.get_path('purelib')).iterdir(),
               pathlib.Path(pip)):
    if 'dsjax' not in path.name and path.suffix != '.pth':
      (site / path.name).symlink_to(path)
  kernel = folder / 'share' / 'kernels' / 'bare'
  kernel.mkdir(parents=True)
  (kernel / 'kernel.json').write_text(json.dumps({
      'display_name': 'bare', 'language': 'python',
      'argv': [str(folder / 'bin' / 'python'), '-m', 'ipykernel_launcher',
               '-f', '{connection_file}']}))
  return site


@pytest.mark.parametrize('path', [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow)
    for path in NOTEBOOKS])
@pytest.mark.filterwarnings('ignore')
def test_runs_where_dsjax_is_not_installed(path, bare, wheel, tmp_path,
                                           monkeypatch):
  for name, value in {
      'DSJAX_TINY': '1', 'DSJAX_SOURCE': wheel.as_uri(), 'PIP_NO_INDEX': '1',
      'JUPYTER_PATH': str(bare.parents[2] / 'share')}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.delenv('PYTHONPATH', raising=False)
  notebook = nbformat.read(path, as_version=4)
  notebook.cells.append(nbformat.v4.new_code_cell(
      'import dsjax.kernels\nprint(dsjax.__file__, dsjax.kernels.__file__)'))
  nbclient.NotebookClient(notebook, timeout=300, kernel_name='bare',
                          resources={'metadata': {'path': str(tmp_path)}}
                          ).execute()
  for line in SAYS[path.stem]:
    assert line in ''.join(map(_said, notebook.cells))
  assert _said(notebook.cells[-1]).split() == [
      str(bare / name / '__init__.py') for name in ('dsjax', 'dsjax/kernels')]


def _cells(path):
  return nbformat.read(path, as_version=4).cells


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_says_where_it_is_and_stays_short(path):
  cells = _cells(path)
  repository = tomllib.loads((ROOT / 'pyproject.toml').read_text())[
      'project']['urls']['Repository']
  assert repository.startswith('https://github.com/')
  assert (repository.replace('https://', 'https://colab.research.google.com/')
          .replace('github.com', 'github')
          + f'/blob/main/experiments/colabs/{path.name})') in cells[0].source
  install = cells[INSTALL].source
  assert f"'git+{repository}')" in install
  assert install == _cells(NOTEBOOKS[0])[INSTALL].source
  assert len(cells) <= 20
  assert all(c.source.count('\n') < 25 for c in cells)
  for word in ('sys.path', 'experiments.common', 'from experiments'):
    assert not any(word in c.source for c in cells)
  assert 'site-packages' not in path.read_text()  # a path of one machine
  counts = [c.execution_count for c in cells if c.cell_type == 'code']
  assert counts == list(range(1, len(counts) + 1))  # in one go


class Distribution:
  def __init__(self, name):
    self.name = name


@pytest.mark.parametrize('there, gpu, extras', [
    (['jax'], False, ''), (['jax'], True, 'cuda13'),
    (['jax', 'jax-cuda12-plugin'], True, 'cuda12'),
    (['jax', 'jax-cuda12-plugin'], False, 'cuda12'),
    (['jax', 'jax-cuda13-plugin', 'dsjax-not'], True, 'cuda13')])
def test_jax_and_its_plugin_are_upgraded_together(monkeypatch, there, gpu,
                                                  extras):
  asked = []
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  monkeypatch.setattr('importlib.metadata.distributions',
                      lambda: map(Distribution, there))
  monkeypatch.setattr('shutil.which', lambda name: name if gpu else None)
  monkeypatch.setattr('subprocess.run', lambda words, check: asked.append(
      words[-1]))
  monkeypatch.setenv('DSJAX_SOURCE', 'file:///x')
  exec(_cells(NOTEBOOKS[0])[INSTALL].source, {})
  assert asked == [f'dsjax[{extras}] @ file:///x']


def test_a_package_that_changed_under_the_kernel_is_said(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  monkeypatch.setattr('subprocess.run', lambda words, check: None)
  monkeypatch.setattr('importlib.metadata.version', lambda name: '99.0')
  with pytest.raises(RuntimeError, match='99.0 is installed: restart'):
    exec(_cells(NOTEBOOKS[0])[INSTALL].source, {})


def store(path):
  """Executes a notebook and writes it with its outputs."""
  notebook = nbformat.read(path, as_version=4)
  metadata = copy.deepcopy(notebook.metadata)
  nbclient.NotebookClient(
      notebook, timeout=1800, kernel_name='python3', coalesce_streams=True,
      resources={'metadata': {'path': str(path.parent)}}).execute()
  notebook.metadata = metadata  # of no machine
  for cell in notebook.cells:
    cell.metadata.pop('execution', None)
  nbformat.write(notebook, path)


if __name__ == '__main__':
  for name in sys.argv[1:]:
    store(FOLDER / f'{name}.ipynb')
