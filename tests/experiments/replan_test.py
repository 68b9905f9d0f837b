"""The runner that shifts a load and shows what policies make of it."""

import csv
import json
import math

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.scheduling.events import Flip
from dsjax.workload.named import Phases
from experiments import replan
from experiments.common import cli
from tests.common.results import check_written, made_by

TINY = dict(instances=2, seconds=6.0, policies=['static:prefills={k}',
                                                'colocated'],
            process='step:low=2:high=20:period_s=4')


def run(out, **options):
  console = Console(record=True, width=150)
  code = replan.run(cli.options(replan.FLAGS, out=str(out), **TINY | options),
                    console)
  return code, console.export_text()


def test_a_line_a_segment_and_policy(tmp_path):
  code, text = run(tmp_path)
  assert code == 0
  check_written(text, tmp_path)
  assert made_by(tmp_path)['options']['instances'] == 2
  with open(tmp_path / 'replan.csv', newline='') as file:
    lines = list(csv.DictReader(file))
  assert [(line['policy'], line['start_s'], line['phase'], line['roles'])
          for line in lines] == [
      (policy, start_s, phase, roles)
      for policy, roles in (('static:prefills=1', 'PD'), ('colocated', 'BB'))
      for start_s, phase in (('0.0', 'low'), ('2.0', 'high'), ('4.0', 'low'))]
  assert float(lines[1]['rate_per_s']) > 3 * float(lines[0]['rate_per_s'])
  told = json.loads((tmp_path / 'replan.json').read_text())['policies']
  assert told['colocated']['flips'] == 0 and told['colocated']['attained'] > 0
  assert 'in the worst segment; 0 flips, 0 after the first minute' in text


def test_segments_without_a_request_are_not_the_worst(tmp_path):
  _, text = run(tmp_path, process='poisson', rate=0.5, segment_s=0.5)
  assert ' - ' in text and 'nan' not in text
  code, text = run(tmp_path, process='poisson', rate=0.004, seconds=1000.0)
  assert code == 0 and '% in the worst segment' in text
  for options in ({'rate': 0.001}, {'rate': 1.0, 'warmup_s': 5.999}):
    with pytest.raises(InputError, match='a load of which a request counts'):
      run(tmp_path, process='poisson', **options)


def test_the_worst_segment_is_one_of_those_that_count():
  """Not one of the warm-up; nor one without requests, however few come."""
  lines = [replan.Segment('x', start_s, '', rate, 1.0, 1.0, 'PD', 0, share, 0.0,
                          1.0)
           for start_s, rate, share in ((0.0, 9.0, .1), (5.0, 0.0, .6),
                                        (10.0, 0.0, math.nan), (15.0, 9.0, .8))]
  run = replan.Served('x', lines, [True, True, False], [])
  assert replan.summary(run, [run])['worst'] == .1
  assert replan.summary(run, [run], 5.0)['worst'] == .6
  assert replan.summary(run, [run], 5.1)['worst'] == .8
  told = replan.summary(run, [run], 16.0)
  assert told['worst'] is None and 'worst' not in replan.words(run, told)


def test_each_is_compared_with_the_best_other_on_the_same_requests(tmp_path):
  code, text = run(tmp_path, policies=['colocated', 'static:prefills=1',
                                       'chunked'], warmup_s=2.0)
  told = json.loads((tmp_path / 'replan.json').read_text())['policies']
  assert code == 0 and set(told) == {'colocated', 'static:prefills=1',
                                     'chunked'}
  best, second, _ = sorted(told, key=lambda name: -told[name]['attained'])
  assert told[best]['rival'] == second
  assert {told[name]['rival'] for name in told if name != best} == {best}
  for own in told.values():
    mean, low, high = own['ahead']
    assert low <= mean <= high
    assert mean == pytest.approx(
        own['attained'] - told[own['rival']]['attained'])
  lines = ' '.join(text.split())
  sent = len(replan.serve(cli.options(replan.FLAGS, **TINY), 'colocated').hits)
  assert 'points [' in lines and f'of {sent} attained' not in lines


def test_the_best_of_several_may_be_one_that_is_there(tmp_path):
  """A run under one name, which is no rival of itself."""
  code, text = run(tmp_path, policies=['static:prefills=1',
                                       'static:prefills={k}', 'colocated'])
  told = json.loads((tmp_path / 'replan.json').read_text())['policies']
  assert code == 0 and text.count('static:prefills=1: ') == 1
  assert 'static:prefills={k}: the best is static:prefills=1, which is' in text
  assert told['static:prefills=1']['rival'] == 'colocated'


def test_policies_may_be_told_wrong_latencies(tmp_path):
  """Where steps were 50 times as long, no first token would be on time."""
  code, text = run(tmp_path, policies=['mooncake'], predicted=['1', '50'])
  told = json.loads((tmp_path / 'replan.json').read_text())['policies']
  assert code == 0 and told['mooncake']['attained'] > 0.5
  assert told['mooncake, 50 times the latencies']['attained'] == 0
  assert 'beside mooncake' in text


def test_segments_where_nothing_shifts_and_where_lengths_do():
  even = cli.options(replan.FLAGS, seconds=12.0, segment_s=5.0)

  class Source:
    phases = None

  assert replan.spans(even, Source) == [
      (0.0, 5.0, ''), (5.0, 10.0, ''), (10.0, 12.0, '')]
  Source.phases = Phases(6.0, ('a', 'b', 'c'))
  assert [name for *_, name in replan.spans(even, Source)] == list('abcabc')


def test_flips_are_counted_but_those_of_the_start():
  flips = [(0.0, Flip(0, 'prefill')), (3.0, Flip(1, 'decode')),
           (7.0, Flip(0, 'decode'))]
  lines = replan.segments('mine', [(0.0, 5.0, ''), (5.0, 9.0, '')], [], flips,
                          Slo(1.0, 1.0), 2)
  assert [(line.roles, line.flips) for line in lines] == [('PD', 1), ('DD', 1)]


@pytest.mark.parametrize('options, error', [
    (dict(policies=['luck']), 'policy'), (dict(plan='3x1'), 'Placement'),
    (dict(process='ramp'), 'process'), (dict(lengths='nowhere'), 'lengths'),
    (dict(process='poisson'), 'rate_per_s'),
    (dict(policies=['static:prefills={q}']), 'prefills'),
    (dict(policies=['static:prefills={k}{']), 'prefills'),
    (dict(policies=[]), '--policies'),
    (dict(policies=['chunked', 'colocated', 'chunked']),
     '--policies=.*must be different policies'),
    (dict(predicted=['0']), "--predicted='0': must be a number from 0.01"),
    (dict(predicted=['1', 'x']), "--predicted='x'"),
    (dict(warmup_s=6.0), '--warmup_s=6.0: must be below --seconds=6'),
    (dict(lengths='shift:1e-9:sharegpt+longbench'), 'lengths=.*0.1 s')])
def test_bad_input_names_the_flag(tmp_path, options, error):
  with pytest.raises(InputError, match=error):
    run(tmp_path, **options)


def test_a_load_has_a_bound(tmp_path, monkeypatch):
  monkeypatch.setattr(replan, 'MOST', 256)
  with pytest.raises(InputError, match='--rate.*less than 256 requests'):
    run(tmp_path, process='sine:low=5:high=1e9:period_s=60')
