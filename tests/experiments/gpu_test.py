"""experiments.gpu on a CPU: it runs, and what goes wrong in a task is told."""

import io
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from experiments.common import cli
from experiments.gpu import __main__ as gpu
from experiments.gpu import cache, ingest, lines, report, runner, tasks

ROOT = pathlib.Path(__file__).parents[2]
KEPT = ROOT / '.cache' / 'gpu.tar.gz'  # compiled programs, between runs
WRITE = ('import json, sys, time; open(sys.argv[1], "a").write(json.dumps('
         'dict(task="{0}", what="it", ok={1}, figure="7 s")) + "\\n"); {2}')


def task(name, code, ok='None', seconds=30):
  """A Task of the part `speed` that writes a line and then runs code."""
  return tasks.Task('speed', name, seconds, own=(
      sys.executable, '-c', WRITE.format(name, ok, code), '{lines}'))


def run(stages, folder, seconds=60.0):
  """Outcomes by name, with the tasks' file for {lines}."""
  stages = [[t._replace(own=tuple(x.replace('{lines}', str(
      folder / 'speed.jsonl')) for x in t.own)) for t in stage]
            for stage in stages]
  return {o.task.name: o for o in runner.run(
      stages, folder, str(folder), seconds, True)}


def test_what_crashes_hangs_or_fails_costs_only_itself(tmp_path):
  outcomes = run([
      [task('crashes', 'import os; os.kill(os.getpid(), 11)'),
       task('fails', 'raise ValueError("no such card")'),
       task('wrong', '', 'False'), task('goes', '', 'True')],
      [task('hangs', 'time.sleep(60)', seconds=1)],
      [task('next', '', seconds=29)]], tmp_path)
  assert {n: o.verdict for n, o in outcomes.items()} == {
      'crashes': 'crashed: SIGSEGV', 'fails': 'failed: ValueError: no such '
      'card', 'wrong': '1 wrong: it', 'goes': 'right', 'next': 'done',
      'hangs': f'stopped after {outcomes["hangs"].verdict.split()[2]} s'}
  assert all(o.figure == '7 s' for o in outcomes.values())
  assert outcomes['goes'].ok and not outcomes['hangs'].ok


def test_a_task_that_writes_nothing_or_leaves_children_is_ended(tmp_path):
  silent = tasks.Task('tune', 'silent', 5, own=(sys.executable, '-c', ''))
  family = tasks.Task('tune', 'family', 5, own=(
      sys.executable, '-c', 'import os, time, sys\n'
      f'open({str(tmp_path / "pid")!r}, "w").write(str(os.fork()))\n'
      'time.sleep(60)'))
  outcomes = run([[silent], [family]], tmp_path, 3.0)
  assert outcomes['silent'].verdict == 'failed: it wrote nothing'
  assert outcomes['family'].verdict.startswith('stopped')
  status = pathlib.Path('/proc', (tmp_path / 'pid').read_text(), 'status')
  assert not status.exists() or 'State:\tZ' in status.read_text()


def test_ctrl_c_ends_tasks_and_keeps_the_table(tmp_path, monkeypatch):
  def interrupted(_):
    raise KeyboardInterrupt
  monkeypatch.setattr(runner.time, 'sleep', interrupted)
  outcomes = run([[task('runs', 'time.sleep(60)')], [task('later', '')]],
                 tmp_path)
  assert outcomes['runs'].verdict == 'interrupted'
  assert outcomes['later'].verdict == 'not begun'


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
  path = tmp_path / 'tune.jsonl'
  lines.Lines(path, 'tune').write('a', True, seconds=np.float32(0.5))
  with path.open('a') as file:
    file.write('{"task": "tu')
  row, = lines.read(path)
  assert (row['what'], row['ok'], row['seconds']) == ('a', True, 0.5)


def test_the_cache_comes_back_and_stays_small(tmp_path):
  folder, back = tmp_path / 'a', tmp_path / 'b'
  (folder / 'sub').mkdir(parents=True)
  (folder / 'sub' / 'small').write_bytes(b'x' * 10)
  (folder / 'large').write_bytes(b'y' * 1000)
  cache.pack(folder, tmp_path / 'all.tar.gz')
  cache.pack(folder, tmp_path / 'less.tar.gz', 500)
  cache.unpack(tmp_path / 'all.tar.gz', back)
  assert (back / 'large').read_bytes() == b'y' * 1000
  shutil.rmtree(back)
  cache.unpack(tmp_path / 'less.tar.gz', back)
  assert [f.name for f in back.rglob('*') if f.is_file()] == ['small']


def test_all_parts_run_on_a_cpu_and_eight_files_come_back(tmp_path):
  out, console = tmp_path / 'out', Console(file=io.StringIO(), width=80)
  code = gpu.run(cli.options(
      gpu.FLAGS, out=str(out), minutes=6.0,
      cache=str(KEPT) if KEPT.exists() else ''), console)
  log = console.file.getvalue() + (out / 'log.txt').read_text()
  assert code == 0, log
  files = {f.name: f.stat().st_size for f in out.iterdir()}
  assert set(files) == {'log.txt', 'cache.tar.gz',
                        *(f'{part}.jsonl' for part in tasks.PARTS)}
  assert len(files) <= 8 and max(files.values()) < 16 * 2**20
  found = {part: lines.read(out / f'{part}.jsonl') for part in tasks.PARTS}
  assert not [r for part in found.values() for r in part
              if 'skipped' in r or r['ok'] is False]
  assert {r['task'] for r in found['right']} == {
      'kernels', 'families', 'sanitizer'}
  assert {r['mode'] for r in found['simulate'] if 'mode' in r} == {
      'colocated', 'chunked'}
  tail = console.file.getvalue()[-12000:]
  assert all(part in tail for part in tasks.PARTS)
  KEPT.parent.mkdir(exist_ok=True)
  shutil.copy(out / 'cache.tar.gz', KEPT)


def test_what_travels_is_small():
  listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True,
                          text=True)
  if listed.returncode:
    pytest.skip('no git checkout')
  files = [ROOT / name for name in listed.stdout.splitlines()]
  assert sum(f.stat().st_size for f in files if f.is_file()) < 30 * 2**20


MACHINE = dict(task='t', what='machine', ok=None, device='NVIDIA H100 80GB '
               'HBM3', driver='580.1', jax='0.11.2', python='3.12.3',
               date='2026-11-28')


@pytest.fixture
def results(tmp_path):
  """A folder of results as a GPU would give, and a root to take them into."""
  folder, root = tmp_path / 'out', tmp_path / 'root'
  for path in (folder, root / 'docs', root / 'kernels'):
    path.mkdir(parents=True)
  for name in ('README.md', 'docs/gpu.md'):
    (root / name).write_text(f'before\n{ingest.BEGIN}\nold\n{ingest.END}\n'
                             'after\n')
  stats = dict(attainment=[0.9, 0.8, 1.0])
  errors = dict(attainment=1.0, ttft_s=dict(mean=0.05),
                tpot_s=dict(mean=-0.02))
  rows = dict(
      right=[MACHINE, dict(task='kernels', what='x', ok=False, figure='1 of')],
      speed=[dict(task='kernels', what='decode', ok=None, op='decode',
                  impl='mosaic', seconds=1e-4, share=0.8,
                  others=dict(cudnn=2e-4)),
             dict(task='steps', what='opt-13b: decode 8 rows', ok=None,
                  seconds=0.02, least_s=0.015, share=0.75, host_s=0.001),
             dict(task='steps', what='opt-13b: hand-off of 16 tokens', ok=None,
                  bytes_per_s=1e11, of_a_copy=0.5)],
      tune=[dict(task='tune', what='d', ok=None, kind='NVIDIA H100', kept=True,
                 op='decode_attention', shape='s', config=dict(splits=2))],
      measure=[dict(task='measure', what='profile', ok=None, profile=json.dumps(
          dict(model='llama-3-8b', device='H100', source='dsjax')))],
      simulate=[dict(task='simulate', what='chunked, 2/s', ok=None,
                     mode='chunked', rate_per_s=2.0, requests=9, real=stats,
                     simulated=stats, errors=errors)])
  for part, of_part in rows.items():
    (folder / f'{part}.jsonl').write_text(
        ''.join(json.dumps(row) + '\n' for row in of_part))
  return folder, root


def test_results_of_a_gpu_are_taken_in(results):
  folder, root = results
  console = Console(file=io.StringIO(), width=200)
  assert ingest.run(folder, console, root) == 0
  readme, details = ((root / name).read_text()
                     for name in ('README.md', 'docs/gpu.md'))
  assert 'old' not in readme and readme.startswith('before\n')
  assert readme.endswith(f'{ingest.END}\nafter\n')
  assert 'HBM3, driver 580.1, jax 0.11.2' in readme
  assert '| right | 1 of 1 wrong | kernels: 1 of |' in readme
  assert '| serve | not run |' in readme
  assert '| decode | 100.0 | 80% | 200.0 | - | - |' in details
  assert '20.00 | 15.00 | 75% | 1.00 | - |' in details
  assert '100.0 | 50% |' in details and '- kernels: x' in details
  assert '90.0 [80, 100] % | 90.0 % | +5% | -2% |' in details
  path = root / 'experiments/profiles/latency-h100-llama-3-8b.json'
  assert 'driver 580.1' in json.loads(path.read_text())['source']
  held = json.loads((root / 'kernels' / 'tuned.json').read_text())
  assert held['NVIDIA H100']['decode_attention']['s'] == {'splits': 2}
  assert (root / 'docs/figures/gpu.png').stat().st_size > 5000
  ingest.run(folder, console, root)  # again: the same
  assert (root / 'README.md').read_text() == readme


@pytest.mark.parametrize('device, says', [
    ('cpu', "'cpu'.*: must be results of a GPU"), (None, 'a folder with')])
def test_results_of_no_gpu_are_refused(tmp_path, device, says):
  if device:
    (tmp_path / 'tune.jsonl').write_text(json.dumps(
        MACHINE | dict(device=device)) + '\n')
  with pytest.raises(InputError, match=says):
    ingest.run(tmp_path, Console(file=io.StringIO()), tmp_path)


def test_a_part_that_does_not_exist_is_an_error():
  with pytest.raises(InputError, match='--only=.*tests.*of .*right'):
    gpu.run(cli.options(gpu.FLAGS, only=['tests']), None)


def test_the_table_fits_eighty_columns():
  task_ = tasks.STAGES[0][0]
  console = Console(file=io.StringIO(), width=80)
  console.print(report.table([runner.Outcome(
      task_, 'failed: ' + 'x' * 90, 12.0, 'y' * 200)], 'a GPU'))
  text = console.file.getvalue()
  assert max(map(len, text.splitlines())) <= 80 and 'y' * 10 in text
