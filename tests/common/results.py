"""What every folder of results must say of its making."""

import json
import os

import dsjax
from experiments.common import cli


def check_written(text, folder):
  """A run that printed `text` named each file that is in the folder."""
  names = text.rsplit('Written to ', 1)[1].partition(': ')[2].split('\n')[0]
  assert sorted(names.split(', ')) == sorted(
      file.name for file in folder.iterdir() if file.is_file())


def made_by(folder):
  """What the JSON files of a run say of their making, the same in all.

  Lines, tables and pictures lie beside one of them, which speaks for them.
  """
  told = []
  for path in sorted(folder.glob('*.json')):
    written = json.loads(path.read_text())
    told.append((written.get('otherData') or written)['made_by'])
  assert told, f'{os.listdir(folder)}: no file says how they were made'
  for made in told:
    assert set(made) == {'dsjax', 'commit', 'time', 'options', 'data',
                         'machine'}
    assert made['dsjax'] == dsjax.__version__ and made['machine']['cores'] > 0
    assert made['commit'] if (cli.ROOT / '.git').exists() else True
    assert made['options'] == told[0]['options'] != {}
    assert made['data'] == told[0]['data']
  return told[0]
