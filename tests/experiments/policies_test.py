"""The runner that measures policies side by side."""

import csv
import dataclasses

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from experiments import policies
from experiments.common import cli
from tests.common.results import check_written, made_by

TINY = dict(workloads=['sharegpt'], objectives=['balanced'], requests=50,
            tolerance=0.5, processes=1, orders=['fifo'], instances=2,
            only=['static', 'chunked'])


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
  assert [line['policy'] for line in first] == ['static', 'chunked']
  for line in first:
    assert 0 < float(line['low']) <= float(line['goodput_per_device'])
    assert float(line['goodput_per_device']) <= float(line['high'])
  code, text = run(tmp_path, only=['static', 'chunked', 'colocated'])
  assert code == 0 and '1 of 3 cells to measure' in text
  assert lines(tmp_path)[:2] == first and len(lines(tmp_path)) == 3


def test_minutes_end_it_and_what_was_known_is_kept(tmp_path):
  code, text = run(tmp_path, minutes=0.0)
  assert code == 0 and 'Stopped by --minutes' in text
  assert len(lines(tmp_path)) == 1


def test_the_best_variant_counts():
  cell = policies.Cell('llama-3-8b', 'tables:h100-80g', '1x1', 3, 'sharegpt',
                       'balanced', 'static', 'deadlines')
  assert policies.variants(cell) == ['static:prefills=1+deadlines',
                                     'static:prefills=2+deadlines']


@pytest.mark.parametrize('options, error', [
    (dict(objectives=['fast']), '--objectives'),
    (dict(orders=['lifo']), '--orders'),
    (dict(only=['luck']), 'policy'), (dict(plan='3x1'), '--plan'),
    (dict(workloads=['nowhere']), 'lengths')])
def test_bad_input_names_the_flag(tmp_path, options, error):
  with pytest.raises(InputError, match=error):
    run(tmp_path, **options)


def test_a_folder_of_other_results_is_left_alone(tmp_path):
  (tmp_path / 'policies.csv').write_text('a,b\n1,2\n')
  with pytest.raises(InputError, match='--out'):
    run(tmp_path)


def test_objectives_follow_the_model():
  effort = policies.Effort(50, 0.5, 0.9, 0)
  problem = policies.problem_of('llama-3-8b', 'tables:h100-80g', '1x1',
                                'sharegpt', effort)
  plan = policies.Plan()
  balanced, ttft, tpot = (policies.objectives(problem, plan, name)
                          for name in policies.OBJECTIVES)
  assert ttft.ttft_s < balanced.ttft_s < tpot.ttft_s
  assert tpot.tpot_s < balanced.tpot_s < ttft.tpot_s
  assert dataclasses.astuple(balanced) == pytest.approx((0.19, 0.022), rel=.1)
