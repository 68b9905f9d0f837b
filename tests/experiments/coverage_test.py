"""How often intervals of goodput hold."""

import contextlib
import csv
import json
import math

import numpy as np
import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from dsjax.placement import search
from dsjax.placement.goodput import Goodput
from experiments import coverage
from experiments.common import cli
from tests.common.results import check_written

TINY = dict(problems=['kv-limit'], seeds=1, truth_seeds=3,
            truth_requests=60, requests=20, tolerance=0.5, processes=1)


def line(problem, low, high, truth_low, truth_high, seed=0):
  return coverage.Interval(problem, seed, low, high, truth_low, truth_high)


@pytest.mark.parametrize('interval, covered', [
    ((1.0, 2.0), True), ((1.0, 1.6), True), ((1.8, 3.0), True),
    ((1.6, 1.7), True), ((0.5, 1.4), False), ((1.9, 3.0), False)])
def test_an_interval_covers_where_it_meets_the_truth(interval, covered):
  assert line('colocated', *interval, 1.5, 1.8).covered == covered


def test_a_wrong_sign_is_one_that_the_truth_does_not_have():
  # kv-limit has three devices, colocated two.
  told, = coverage.signs([line('kv-limit', 3.0, 3.3, 3.0, 3.3),
                          line('colocated', 2.4, 2.6, 1.0, 1.2)])
  assert (told.says, told.truth, told.wrong) == ('colocated', 'kv-limit', True)
  told, = coverage.signs([line('kv-limit', 3.0, 3.9, 3.0, 3.3),
                          line('colocated', 2.4, 2.6, 1.0, 1.2)])
  assert told.says == '' and not told.wrong


def test_truth_of_runs_that_differ_has_their_spread():
  seeds = np.random.default_rng(0).normal(0, 0.02, 20)

  def shares_at(rate):
    return [0.9 - (rate - 7.0) / 10 + noise for noise in seeds]

  rate, low, high = coverage.truth(shares_at, 0.9, 3.0)
  assert low < rate < high
  assert rate == pytest.approx(7.0 + 10 * seeds.mean(), abs=0.05)
  half = 2.093 * seeds.std(ddof=1) / 20**0.5 * 10
  assert high - low == pytest.approx(2 * half, rel=0.05)


def test_files_and_table(tmp_path, monkeypatch):
  monkeypatch.setattr(search, 'measure', lambda problem, candidate: Goodput(
      3.0, 2.9, 3.1, 'target', 0.9, 1, True))
  console = Console(record=True, width=100)
  options = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY)
  assert coverage.run(options, console) == 0
  with open(tmp_path / 'coverage.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['seed'] for row in rows] == ['0']
  assert list(rows[0]) == ['problem', 'seed', 'low', 'high', 'truth_low',
                           'truth_high', 'covered']
  assert all(float(row['low']) < float(row['high']) for row in rows)
  written = json.loads((tmp_path / 'coverage.json').read_text())
  assert written['made_by']['options']['seeds'] == 1
  assert set(written['truths']) == {'kv-limit'} and not written['stopped']
  told = console.export_text()
  assert 'kv-limit' in told
  check_written(told, tmp_path)


@pytest.mark.parametrize('processes', [1, 2])
def test_minutes_end_truths_too_and_the_command_goes_on(
    tmp_path, monkeypatch, processes):
  asked = []

  def answered(task):
    asked.append(task)
    return task

  monkeypatch.setattr(coverage, 'estimate', lambda requests, tolerance, task:
                      answered(task) and Goodput(3.0, 2.9, 3.1, 'target', 0.9,
                                                 1, True))
  monkeypatch.setattr(coverage, 'share', lambda n, task:
                      0.9 - answered(task)[1] / 100 + task[2] / 1e6)
  if processes > 1:  # which come further than what is read of them
    monkeypatch.setattr(coverage, 'processes', lambda count:
                        contextlib.nullcontext(lambda function, tasks: iter(
                            list(map(function, tasks)))))

  def run(minutes, out):
    console = Console(record=True, width=100)
    options = cli.options(coverage.FLAGS, out=str(out), **TINY | {
        'minutes': minutes})
    assert coverage.run(options, console) == 0
    return console.export_text(), json.loads(
        (out / 'coverage.json').read_text())

  _, whole = run(600.0, tmp_path / 'whole')
  count, out = len(set(asked)), tmp_path / 'parts'
  asked.clear()
  told, written = run(0.0, out)
  assert 'Stopped by --minutes' in told and not written['truths']
  assert written['begun'] == {'kv-limit': [[3.0, []]]}
  for _ in range(count - 1):
    told, written = run(0.0, out)
  assert written['truths'] == whole['truths'] and not written['begun']
  assert (out / 'coverage.csv').read_text() == (
      tmp_path / 'whole' / 'coverage.csv').read_text()
  assert not written['stopped']
  if processes == 1:
    assert len(asked) == count


def test_ctrl_c_keeps_what_is_known(tmp_path, monkeypatch):
  def estimate(requests, tolerance, task):
    if task[1] == 3:
      raise KeyboardInterrupt
    return Goodput(3.0, 2.9, 3.1, 'target', 0.9, 1, True)

  monkeypatch.setattr(coverage, 'estimate', estimate)
  monkeypatch.setattr(coverage, 'share', lambda n, task:
                      0.9 - task[1] / 100 + task[2] / 1e6)
  console = Console(record=True, width=100)
  options = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY | {
      'seeds': 40})
  assert coverage.run(options, console) == 130
  assert 'Stopped by Ctrl-C' in console.export_text()
  assert len((tmp_path / 'coverage.csv').read_text().splitlines()) == 4


def test_the_same_command_goes_on(tmp_path, monkeypatch):
  asked = []

  def estimate(requests, tolerance, task):
    asked.append(task)
    return Goodput(3.0, 2.9, 3.1, 'target', 0.9, 1, True)

  monkeypatch.setattr(coverage, 'estimate', estimate)
  monkeypatch.setattr(coverage, 'share', lambda n, task:
                      0.9 - task[1] / 100 + task[2] / 1e6)
  options = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY | {
      'seeds': 2})
  one = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY)
  assert coverage.run(one, Console()) == 0
  first = (tmp_path / 'coverage.csv').read_text().splitlines()
  assert coverage.run(options, Console()) == 0
  lines = (tmp_path / 'coverage.csv').read_text().splitlines()
  assert lines[:len(first)] == first and len(lines) == 3
  assert asked == [('kv-limit', coverage.TRUTH_SEED), ('kv-limit', 0),
                   ('kv-limit', 1)]
  assert json.loads((tmp_path / 'coverage.json').read_text())['stopped'] == ''


def test_a_folder_that_was_measured_in_another_way(tmp_path):
  options = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY)
  coverage.save(tmp_path, options, coverage.Measured({}, [], {}))
  with pytest.raises(InputError, match='--requests=30: .*20, as in'):
    coverage.run(cli.options(coverage.FLAGS, out=str(tmp_path), **TINY | {
        'requests': 30}), Console())


@pytest.mark.parametrize('problems', [['kv'], [], ['strict', 'strict']])
def test_problems_that_there_are_not(problems):
  with pytest.raises(InputError, match='--problems=.*kv-limit'):
    coverage.run(cli.options(coverage.FLAGS, problems=problems), Console())


@pytest.mark.parametrize('name, text', [
    ('coverage.json', '{"made_by": {"opti'), ('coverage.json', '[]'),
    ('coverage.json', '{"made_by": {"options": {}}, "truths": {}}'),
    ('coverage.csv', 'problem,seed\nkv-limit,0\n'), ('coverage.csv', None),
    ('coverage.csv', 'problem,seed,low,high,truth_low,truth_high\n'
                     'kv,0,1,2,1,2\n'),
    ('coverage.csv', 'x' * 200_000)])
def test_files_that_are_not_its_own_are_told(tmp_path, name, text):
  options = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY)
  coverage.save(tmp_path, options, coverage.Measured({}, [], {}))
  if text is None:
    (tmp_path / name).unlink()
  else:
    (tmp_path / name).write_text(text)
  with pytest.raises(InputError, match=str(tmp_path)):
    coverage.run(options, Console())


@pytest.mark.parametrize('lines, part', [
    (['kv-limit,0,1,2,1.5,1'], '1.5, 1.0'),  # cut: 1.75,1
    (['kv-limit,0,1,2,1.5,1.75,1'] * 2, 'of a seed each'),
    (['kv-limit,0,3,2,1.5,1.75,1'], 'an interval'),
    (['kv-limit,0,1,nan,1.5,1.75,1'], 'an interval'),
    (['kv-limit,-1,1,2,1.5,1.75,1'], 'a seed'),
    (['strict,0,1,2,1.5,1.75,1'], 'strict')])
def test_lines_that_no_run_wrote_are_told(tmp_path, lines, part):
  options = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY)
  own = coverage.Measured({'kv-limit': (1.6, 1.5, 1.75)},
                          [line('kv-limit', 1.0, 2.0, 1.5, 1.75)],
                          {'strict': {1.3: [0.9, 0.91], 1.4: []}})
  coverage.save(tmp_path, options, own)
  assert coverage.read(tmp_path, options) == own
  path = tmp_path / 'coverage.csv'
  first = path.read_text().splitlines()[0]
  path.write_text('\n'.join([first, *lines]))
  with pytest.raises(InputError, match=f'coverage.csv: .*{part}'):
    coverage.read(tmp_path, options)


@pytest.mark.parametrize('changes, part', [
    ({'begun': {'strict': {'1.3': []}}}, 'gone on from'),
    ({'begun': {'strict': 1.3}}, 'gone on from'),
    ({'begun': {'strict': [[1.3]]}}, 'gone on from'),
    ({'begun': {'strict': [[1.3, 0.9]]}}, 'gone on from'),
    ({'begun': {'strict': [[10**400, []]]}}, 'gone on from'),
    ({'begun': {'stric': []}}, 'problem'),
    ({'begun': {'kv-limit': []}}, 'a problem without a truth'),
    ({'begun': {'strict': [[0, []]]}}, 'begun.strict.*above 0'),
    ({'begun': {'strict': [[-1.3, []]]}}, 'begun.strict.*above 0'),
    ({'begun': {'strict': [[math.inf, []]]}}, 'begun.strict.*above 0'),
    ({'begun': {'strict': [[1.3, []], [1.3, [.9]]]}}, 'each rate once'),
    ({'begun': {'strict': [[1.3, [90]]]}}, 'begun.strict.*shares'),
    ({'begun': {'strict': [[1.3, [math.nan]]]}}, 'begun.strict.*shares'),
    ({'begun': {'strict': [[1.3, [.9] * 4]]}}, 'begun.strict.*3 shares'),
    ({'truths': {'kv-limit': [1.6, 1.5]}}, 'gone on from'),
    ({'truths': {'kv-limit': [1.4, 1.5, 1.75]}}, 'truths.kv-limit.*within'),
    ({'truths': {'kv-limit': [0, 0, 1.75]}}, 'truths.kv-limit.*above 0')])
def test_what_was_begun_and_no_run_wrote_is_told(tmp_path, changes, part):
  """One error that names the file, before anything is measured."""
  options = cli.options(coverage.FLAGS, out=str(tmp_path), **TINY)
  coverage.save(tmp_path, options, coverage.Measured(
      {'kv-limit': (1.6, 1.5, 1.75)}, [], {'strict': {1.3: [0.9]}}))
  path = tmp_path / 'coverage.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(InputError, match=part) as told:
    coverage.run(options, Console())
  assert str(tmp_path) in str(told.value) and 'coverage.json' in str(told.value)
