"""The placement runner, as a user starts it."""

import json
import subprocess
import sys

import pytest


def run(*args):
  return subprocess.run(
      [sys.executable, '-m', 'experiments.place', *args],
      capture_output=True, text=True, timeout=300)


def test_it_writes_a_table_a_figure_and_a_verdict(tmp_path):
  done = run('--model=opt-13b', '--devices=2', '--algorithms=low',
             '--lengths=humaneval', '--requests=20', '--tolerance=0.5',
             f'--out={tmp_path}')
  assert done.returncode == 0, done.stderr
  assert 'prefill=1x1,decode=1x1' in done.stdout
  found = json.loads((tmp_path / 'placement.json').read_text())
  row, = found['rows']
  assert row['placement'] == 'prefill=1x1,decode=1x1'
  assert 0 < row['low'] <= row['per_device'] <= row['high']
  assert found['verdict'] in done.stdout.replace('\n', ' ')
  assert (tmp_path / 'placement.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('flag, message', (
    ('--model=opt-14b', 'model='), ('--latency=roofline:tpu', 'a100-80g'),
    ('--latency=nowhere.json', 'nowhere.json: cannot be read'),
    ('--algorithms=best', '--algorithms'), ('--ttft=0.001', 'Slo.ttft_s'),
    ('--lengths=nowhere.csv', 'nowhere.csv')))
def test_bad_input_is_one_clear_error(flag, message):
  done = run('--devices=2', flag)
  assert done.returncode == 2
  assert done.stderr.strip().splitlines()[-1].startswith('error: ')
  assert message in done.stderr
