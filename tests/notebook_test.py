"""Notebooks run from top to bottom, on a small question."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'experiments' / 'colabs'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))
SAYS = {
    '1_two_meshes': ('equal token for token', *(
        f'{mode}: 4 of 4 answered'
        for mode in ('disaggregated', 'colocated', 'chunked'))),
    '2_placement': ('met both objectives, 95 % interval',
                    'prefill=1x1,decode=1x1', 'Only disaggregated placements'),
    '3_kernels': ('masked: 8', 'splits against dense: ', 'of the floor; ',
                  'pallas_interpret on cpu: error '),
}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings('ignore')
def test_runs(path, monkeypatch):
  monkeypatch.setenv('DSJAX_TINY', '1')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))  # else what is installed
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(ROOT / '.cache' / 'jax'))
  monkeypatch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
  notebook = nbformat.read(path, as_version=4)
  assert len(notebook.cells) <= 20
  assert all(c.source.count('\n') < 25 for c in notebook.cells)
  for word in ('sys.path', 'experiments.common', 'from experiments'):
    assert not any(word in c.source for c in notebook.cells)
  client = nbclient.NotebookClient(
      notebook, timeout=300, kernel_name='python3',
      resources={'metadata': {'path': str(FOLDER)}})
  client.execute()
  said = ''.join(o.get('text', '') for c in notebook.cells
                 for o in c.get('outputs', []))
  for line in SAYS[path.stem]:
    assert line in said
