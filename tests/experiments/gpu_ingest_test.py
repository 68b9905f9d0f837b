"""What a run on a GPU would give, made up, goes into the repository."""

import io
import json

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from experiments.aot import report as aot_report
from experiments.gpu import ingest, lines, pages, tasks

MACHINE = dict(task='run', what='machine', ok=None, device='NVIDIA H100 80GB '
               'HBM3', driver='580.1', jax='0.11.2', python='3.12.3',
               date='2026-11-28')
CODE = dict(task='registers', ok=True, what='x', model='llama-3-8b')


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
      right=[dict(task='kernels', what='x', ok=False, figure='1 of'),
             CODE | dict(kernel='pack', compiled=dict(
                 registers=24, spilled=0, grid='64, 4, 1', threads=128,
                 shared=0)),
             CODE | dict(kernel='unpack', compiled=dict(
                 registers=20, spilled=0, grid='64, 2, 1', threads=128,
                 shared=0))],
      speed=[dict(task='kernels', what='decode', ok=None, op='decode',
                  impl='mosaic', seconds=1e-4, share=0.8,
                  others=dict(cudnn=2e-4)),
             dict(task='steps', what='opt-13b: decode 8 rows', ok=None,
                  seconds=0.02, least_s=0.015, share=0.75, host_s=0.001),
             dict(task='steps', what='opt-13b: hand-off of 16 tokens', ok=None,
                  bytes_per_s=1e11, of_a_copy=0.5)],
      tune=[dict(task='tune', what='d', ok=None, kept=True, shape='s',
                 op='kv_write', config=dict(block_heads=2, num_warps=4,
                                            num_stages=1))],
      measure=[dict(task='measure', what='profile', ok=None, profile=json.dumps(
          dict(model='llama-3-8b', device='H100', source='dsjax',
               latencies={})))],
      simulate=[dict(task='simulate', what='chunked, 2/s', ok=None,
                     mode='chunked', rate_per_s=2.0, requests=9, real=stats,
                     simulated=stats, errors=errors)])
  for part, of_part in rows.items():
    save(folder, part, [MACHINE, *of_part])
  return folder, root


def save(folder, part, rows):
  """Writes the file of a part."""
  (folder / f'{part}.jsonl').write_text(
      ''.join(json.dumps(row) + '\n' for row in rows))


def state(root):
  """What is in each file."""
  return {f: f.read_bytes() for f in root.rglob('*') if f.is_file()
          and f.suffix != '.png'}


def test_results_of_a_gpu_are_taken_in(results):
  folder, root = results
  console = Console(file=io.StringIO(), width=200)
  assert ingest.run(folder, console, root) == 0
  readme, details = ((root / name).read_text()
                     for name in ('README.md', 'docs/gpu.md'))
  assert 'old' not in readme and readme.startswith('before\n')
  assert readme.endswith(f'{ingest.END}\nafter\n')
  assert 'HBM3, driver 580.1, jax 0.11.2' in readme
  assert '| right | 1 of 3 wrong | kernels: 1 of |' in readme
  assert '| serve | not run |' in readme
  assert '| decode | 100.0 | 80% | 200.0 | - | - |' in details
  assert '20.00 | 15.00 | 75% | 1.00 | - |' in details
  assert '100.0 | 50% |' in details and '- kernels: x' in details
  assert '90.0 [80, 100] % | 90.0 % | +5% | -2% |' in details
  path = root / 'experiments/profiles/latency-h100-llama-3-8b.json'
  assert 'driver 580.1' in json.loads(path.read_text())['source']
  held = json.loads((root / 'kernels' / 'tuned.json').read_text())
  assert held[MACHINE['device']]['kv_write']['s']['num_warps'] == 4
  assert (root / 'docs/figures/gpu.png').stat().st_size > 5000
  before = state(root)
  ingest.run(folder, console, root)  # again: the same
  assert state(root) == before


def test_registers_stand_beside_those_of_make_aot(results):
  """Of a result that no GPU wrote."""
  folder, root = results
  ingest.run(folder, Console(file=io.StringIO()), root)
  details = (root / 'docs' / 'gpu.md').read_text()
  assert '| pack | llama-3-8b | 64x4x1 | 20 (24) | 0 | 0 |' in details
  assert '| unpack |' not in details  # no different
  real = aot_report.measured(root / 'experiments' / 'aot' / 'measured.json')
  rows = [row for row in aot_report.golden()['rows']
          if (row['gpu'], row['model']) == ('h100', 'llama-3-8b')]
  console = Console(width=200, file=io.StringIO())
  console.print(aot_report.tables(rows, real))
  text = console.file.getvalue()
  assert text.count('20 (24)') == 2  # both packs
  assert 'HBM3, driver 580.1' in text
  assert aot_report.measured(root / 'none.json') == ({}, '')


@pytest.mark.parametrize('device, chip', [
    ('NVIDIA H200', 'h100'), ('NVIDIA A100-SXM4-80GB', 'a100')])
def test_registers_of_another_card_go_to_its_chip(device, chip):
  row = CODE | dict(kernel='pack', compiled=dict(
      registers=1, spilled=0, grid='1, 1, 1', threads=32, shared=0))
  assert ingest.registers([row], MACHINE | dict(device=device))['gpu'] == chip
  for wrong in (dict(registers='1'), dict(grid='|'), dict(extra=1)):
    assert ingest.registers([row | dict(compiled=row['compiled'] | wrong)],
                            MACHINE) is None


NOT_NUMBERS = [None, 'x', [], {}, True, 10**400, 1e300]


@pytest.mark.parametrize('value', NOT_NUMBERS, ids=repr)
def test_what_is_no_number_has_no_row(value, results):
  """In the place of any number of the results."""
  folder, root = results
  for part in ('speed', 'simulate'):
    rows = lines.read(folder / f'{part}.jsonl')
    for row in rows:
      for field in row.keys() - {'task', 'what', 'ok', 'figure', 'device',
                                 'driver', 'jax', 'python', 'date'}:
        save(folder, part, [r | dict([(field, value)]) if r is row else r
                            for r in rows])
        machine = ingest.machine_of({part: rows}, folder)
        every = {p: lines.read(folder / f'{p}.jsonl') for p in tasks.PARTS}
        text = (pages.details(every, machine, None)
                + pages.summary(every, machine))
        assert 'None' not in text and '00000' not in text
  ingest.run(folder, Console(file=io.StringIO()), root)


def test_text_that_would_break_a_page_does_not(results):
  folder, root = results
  nasty = f'a | b\n# c {ingest.END} <script> `x` ' + 'y' * 10**5
  save(folder, 'speed', [MACHINE, dict(
      task=nasty, what=nasty, ok=False, figure=nasty)])
  before = [(root / n).read_text() for n in ('README.md', 'docs/gpu.md')]
  ingest.run(folder, Console(file=io.StringIO()), root)
  for name, text in zip(('README.md', 'docs/gpu.md'), before, strict=True):
    made = (root / name).read_text()
    assert made.count(ingest.END) == 1 and '<script' not in made
    assert made.endswith(text[-6:]) and len(made) < 5000


@pytest.mark.parametrize('part, rows, says', [
    ('tune', [dict(config={})], 'a config of a kernel'),
    ('tune', [dict(config=dict(block_heads=0, num_warps=4, num_stages=1))],
     'block_heads: 0: must be an integer'),
    ('tune', [dict(op='sort')], 'a config of a kernel'),
    ('tune', [dict(op=None)], 'a config of a kernel'),
    ('tune', [dict(shape=3)], 'a config of a kernel'),
    ('measure', [dict(profile='{')], 'profile.json'),
    ('measure', [dict(profile='[]')], 'profile.json'),
    ('measure', [dict(profile=json.dumps(dict(
        model='../../x', device='d', latencies={})))], 'the name of a model'),
    ('right', [dict(what='machine', task='run', device='cpu')],
     'results of a GPU')], ids=str)
def test_what_does_not_suit_is_an_error_and_nothing_is_written(
    part, rows, says, results):
  folder, root = results
  own = lines.read(folder / f'{part}.jsonl')
  save(folder, part, [r | row for r in own for row in rows
                      if part == 'right' or r is not own[0]]
       if part == 'right' else [own[0], *(own[1] | row for row in rows)])
  before = state(root)
  with pytest.raises(InputError, match=says):
    ingest.run(folder, Console(file=io.StringIO()), root)
  assert state(root) == before


def test_results_of_two_cards_or_of_no_card_are_refused(results):
  folder, root = results
  for changed, says in ((dict(device='NVIDIA H200'), 'of one machine'),
                        (dict(device='TFRT_CPU'), 'results of a GPU'),
                        (dict(driver=None), 'results of a GPU'),
                        (dict(what='x'), 'to begin with the machine'),
                        (dict(device=None), 'to begin with the machine')):
    save(folder, 'serve', [MACHINE | changed, dict(task='serve', what='x',
                                                   ok=True)])
    with pytest.raises(InputError, match=says):
      ingest.run(folder, Console(file=io.StringIO()), root)
  save(folder, 'serve', [MACHINE | dict(date='2026-11-29')])
  ingest.run(folder, Console(file=io.StringIO()), root)  # a later call


def test_a_part_that_only_began_has_measured_nothing(results):
  folder, root = results
  save(folder, 'serve', [MACHINE])
  ingest.run(folder, Console(file=io.StringIO()), root)
  assert '| serve | nothing measured |' in (root / 'README.md').read_text()


@pytest.mark.parametrize('device, says', [
    ('cpu', "'cpu'.*: must be results of a GPU"), (None, 'a folder with')])
def test_results_of_no_gpu_are_refused(tmp_path, device, says):
  if device:
    (tmp_path / 'tune.jsonl').write_text(json.dumps(
        MACHINE | dict(device=device)) + '\n')
  with pytest.raises(InputError, match=says):
    ingest.run(tmp_path, Console(file=io.StringIO()), tmp_path)
