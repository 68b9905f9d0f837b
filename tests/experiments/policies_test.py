"""The runner that measures policies side by side."""

import csv
import dataclasses
import functools
import importlib
import inspect
import pickle
import time
import types

import pytest
from rich.console import Console

import dsjax
from dsjax.config.checks import InputError
from dsjax.policies.named import NAMES
from dsjax.runtime.engine import Engine
from experiments import policies
from experiments.common import cli, policy_cells, real_row
from tests.common import fake_engine
from tests.common.results import check_written, made_by

# Of little prompts and answers: a tenth of the seconds of a real workload.
TINY = dict(lengths='fixed:100x10', objectives=['balanced'], requests=30,
            tolerance=0.5, processes=1, orders=['fifo'], instances=2,
            only=['static', 'colocated'])


def run(out, **options):
  console = Console(record=True, width=80)
  code = policies.run(cli.options(policies.FLAGS, out=str(out),
                                  **TINY | options), console)
  return code, console.export_text()


def lines(out):
  with open(out / 'policies.csv', newline='') as file:
    return list(csv.DictReader(file))


def test_lines_table_and_pictures_and_a_run_that_goes_on(tmp_path):
  code, text = run(tmp_path)
  assert code == 0 and 'balanced: requests/s a' in ' '.join(text.split())
  check_written(text, tmp_path)
  assert made_by(tmp_path)['options']['instances'] == 2
  first = lines(tmp_path)
  assert [line['policy'] for line in first] == ['static', 'colocated']
  for line in first:
    assert 0 < float(line['low']) <= float(line['goodput_per_device'])
    assert float(line['goodput_per_device']) <= float(line['high'])
  code, text = run(tmp_path, only=['static', 'colocated', 'splitwise'])
  assert code == 0 and '1 of 3 cells to measure' in text
  assert lines(tmp_path)[:2] == first and len(lines(tmp_path)) == 3


def test_lines_of_another_seed_are_others(tmp_path):
  for seed, count in ((0, 1), (1, 2), (0, 2)):
    code, _ = run(tmp_path, only=['colocated'], seed=seed)
    assert code == 0 and len(lines(tmp_path)) == count
  assert [line['effort'][-6:] for line in lines(tmp_path)] == ['seed=0',
                                                               'seed=1']


def test_traces_are_found_in_their_folder_or_left_out(tmp_path):
  code, text = run(tmp_path, lengths='fixed:100x10,azure-conv',
                   only=['colocated'], traces=str(tmp_path / 'none'))
  assert code == 0 and 'azure-conv: no file' in text and 'left out' in text
  assert [line['workload'] for line in lines(tmp_path)] == ['fixed:100x10']
  path = tmp_path / 'traces' / policies.policy_cells.TRACES['azure-conv']
  path.parent.mkdir(parents=True)
  path.write_text('TIMESTAMP,ContextTokens,GeneratedTokens\n' + ''.join(
      f'2023-11-16 18:15:{i:02}.0,{100 + i},{20 + i}\n' for i in range(30)))
  code, text = run(tmp_path, lengths='azure-conv', only=['colocated'],
                   traces=str(tmp_path / 'traces'))
  assert code == 0 and 'left out' not in text
  assert [line['workload'] for line in lines(tmp_path)] == ['fixed:100x10',
                                                            'azure-conv']
  with pytest.raises(InputError, match='--lengths'):
    run(tmp_path, lengths='azure-conv', traces=str(tmp_path / 'none'))


@pytest.mark.slow
def test_the_grid_has_every_model(tmp_path, monkeypatch):
  monkeypatch.setattr(policies, 'GRID', (
      ('llama-3-8b', 'tables:h100-80g', '1x1', 2),
      ('opt-13b', 'published', '1x1', 2)))
  code, text = run(tmp_path, grid=True)
  assert code == 0 and 'opt-13b, 2 x 1x1 published, balanced' in ' '.join(
      text.split())
  check_written(text, tmp_path)
  assert [(line['model'], line['policy']) for line in lines(tmp_path)] == [
      (model, policy) for model in ('llama-3-8b', 'opt-13b')
      for policy in ('static', 'colocated')]
  assert all(float(line['goodput_per_device']) > 0 for line in lines(tmp_path))


def test_every_shipped_policy_is_measured():
  assert set(policies.VARIANTS) == set(NAMES)


def test_every_shipped_policy_has_cells_of_both_orders():
  asked = {policies.label(cell) for cell in policies.cells(
      cli.options(policies.FLAGS, lengths='sharegpt'))}
  assert asked == {f'{name}{end}' for name in NAMES
                   for end in ('', '+deadlines')} - {'adaptive+deadlines'}


def test_a_file_s_policy_has_cells_of_both_orders(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('import dataclasses, dsjax\n'
                  'def last(view, instance, waiting):\n'
                  '  return waiting[::-1]\n'
                  'policy = dataclasses.replace(dsjax.DISTSERVE, order=last)\n')
  for end, order in (('', 'last'), ('+deadlines', 'order')):
    loaded = policies.policies.load(f'{path}:policy{end}')
    assert loaded.order and loaded.order.__name__ == order
    again = pickle.loads(pickle.dumps(loaded))
    assert again.order.__name__ == order
  code, text = run(tmp_path / 'out', only=[f'{path}:policy'],
                   orders=['fifo', 'deadlines'])
  assert code == 0
  assert [line['policy'] for line in lines(tmp_path / 'out')] == [
      f'{path}:policy', f'{path}:policy+deadlines']
  assert '│ mine.py:policy+deadlines' in text


def test_a_load_that_shifts_is_judged_over_whole_periods(tmp_path):
  code, text = run(tmp_path, process='sine:low=1:high=9:period_s=4',
                   only=['static'])
  assert code == 0 and 'sine' in text
  line, = lines(tmp_path)
  assert line['phases'] in ' '.join(text.split())
  assert line['workload'] == 'fixed:100x10 sine:low=1:high=9:period_s=4'
  assert float(line['goodput_per_device']) > 0
  names = [part.rpartition(' ')[0] for part in line['phases'].split(', ')]
  assert names == ['rising high', 'falling high', 'falling low', 'rising low']
  code, text = run(tmp_path, process='sine:low=1:high=9:period_s=4',
                   only=['static'])
  assert '0 of 1 cells to measure' in text


@pytest.mark.parametrize('make_engine', [
    fake_engine.FakeEngine, pytest.param(Engine, marks=pytest.mark.deep)])
def test_a_row_is_served_on_this_machine(tmp_path, monkeypatch, make_engine):
  monkeypatch.setattr(dsjax, 'serve', functools.partial(
      dsjax.serve, make_engine=make_engine))
  code, text = run(
      tmp_path, real=True, model='tiny', rate=40.0, requests=50,
      lengths='fixed:24x6', only=['static', 'colocated'], ttft_s=60.0,
      tpot_s=60.0)
  assert code == 0 and 'seconds on this machine' in text
  check_written(text, tmp_path)
  with open(tmp_path / 'real.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['policy'] for row in rows] == ['static:prefills=1', 'colocated']
  for row in rows:
    assert (row['tokens'], row['equal']) == ('300', 'True')
    assert float(row['attained']) == 1.0 and float(row['ttft_p50_s']) > 0


@pytest.mark.parametrize('minutes, stopped, status', [
    (0.0, '--minutes', 0), (9.0, 'Ctrl-C', 130)])
def test_real_rows_that_were_served_are_kept(
    tmp_path, monkeypatch, minutes, stopped, status):
  """Ctrl-C comes while the second policy serves."""
  served, serve = [], real_row.serve

  def serve_one(options, model, text, *args):
    served.append(text)
    if len(served) > 1:
      raise KeyboardInterrupt
    return serve(options, model, text, *args)

  monkeypatch.setattr(real_row, 'serve', serve_one)
  monkeypatch.setattr(dsjax, 'serve', functools.partial(
      dsjax.serve, make_engine=fake_engine.FakeEngine))
  code, text = run(
      tmp_path, real=True, model='tiny', rate=40.0, requests=9, ttft_s=60.0,
      tpot_s=60.0, lengths='fixed:24x6', minutes=minutes)
  assert code == status and f'Stopped by {stopped}' in text
  assert 'static:prefills=1: 9 requests, which come in 0 s' in text
  with open(tmp_path / 'real.csv', newline='') as file:
    assert [row['policy'] for row in csv.DictReader(file)] == [
        'static:prefills=1']


def test_a_real_row_needs_a_rate(tmp_path):
  with pytest.raises(InputError, match='--rate'):
    run(tmp_path, real=True, model='tiny', only=['static'])


def test_minutes_end_it_and_what_was_known_is_kept(tmp_path):
  code, text = run(tmp_path, minutes=0.0)
  assert code == 0 and 'Stopped by --minutes' in text
  assert len(lines(tmp_path)) == 1


def test_minutes_end_cells_that_other_processes_measure(tmp_path):
  """They last for minutes more."""
  options = types.SimpleNamespace(minutes=0.0, processes=2)
  lines = []
  assert policy_cells.measure_all(
      options, Console(quiet=True), time.sleep, [600, 600], 2, lines,
      tmp_path / 'policies.csv', str) == '--minutes'
  assert not lines
  code, text = run(tmp_path, minutes=0.0, processes=2)
  assert code == 0 and 'Stopped by --minutes' in text
  check_written(text, tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_every_start_of_a_policy_is_tried(name):
  """Of one that changes roles later, a bad start would count for it."""
  make = importlib.import_module(f'dsjax.policies.{name}').policy
  starts = 'prefills' in inspect.signature(make).parameters
  assert all(('prefills={k}' in text) == starts
             for text in policies.VARIANTS[name])


def test_the_best_variant_counts():
  cell = policies.Cell('llama-3-8b', 'tables:h100-80g', '1x1', 3, 'sharegpt',
                       'sharegpt', 'poisson', 'balanced', 'static',
                       'deadlines')
  assert policies.variants(cell) == ['static:prefills=1+deadlines',
                                     'static:prefills=2+deadlines']


@pytest.mark.parametrize('options, error', [
    (dict(objectives=['fast']), '--objectives'),
    (dict(orders=['lifo']), '--orders'),
    (dict(only=['luck']), 'policy'), (dict(plan='3x1'), '--plan'),
    (dict(lengths='nowhere'), 'lengths'),
    (dict(lengths='fixed:100x10,,nowhere'), 'lengths')])
def test_bad_input_names_the_flag(tmp_path, options, error):
  with pytest.raises(InputError, match=error):
    run(tmp_path, **options)


def test_a_folder_of_other_results_is_left_alone(tmp_path):
  (tmp_path / 'policies.csv').write_text('a,b\n1,2\n')
  with pytest.raises(InputError, match='--out'):
    run(tmp_path)


def test_objectives_follow_the_model():
  effort = policies.Effort(50, 0.5, 0.9, 0)
  problem = policies.problem_of('llama-3-8b', 'tables:h100-80g', 'sharegpt',
                                'poisson', effort)
  plan = policies.Plan()
  balanced, ttft, tpot = (policies.objectives(problem, plan, name)
                          for name in policies.OBJECTIVES)
  assert ttft.ttft_s < balanced.ttft_s < tpot.ttft_s
  assert tpot.tpot_s < balanced.tpot_s < ttft.tpot_s
  assert dataclasses.astuple(balanced) == pytest.approx((0.19, 0.022), rel=.1)
