"""The runner that compares policies at equal rates, cell by cell."""

import csv
import io
import json

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from dsjax.scheduling.events import Finish, Tick
from experiments import equal_rates
from experiments.common import cli, equal_rates_report, policies_report, seeds
from experiments.common import equal_rates as measuring
from tests.common.results import check_written, made_by
from tests.experiments import policies_test

TINY = dict(lengths='fixed:100x10', policies=['colocated'], requests=50,
            seconds=1.0, seeds=['7', '8'], processes=1, settings='best')
CLUSTER = '2 x 1x1 tables:h100-80g'


def line(policy, goodput, objective='balanced', variant='', **more):
  """A line of a policies.csv."""
  return policies_report.Line(
      'llama-3-8b', CLUSTER, 'fixed:100x10', 0.06, 0.02, policy, goodput,
      goodput, goodput, 'target', objective, variant or policy,
      effort='requests=400 seed=0')._replace(**more)


LINES = [
    line('static+deadlines', 30.0, variant='static:prefills=1+deadlines'),
    line('chunked+deadlines', 40.0), line('chunked', 90.0),
    line('colocated+deadlines', 80.0), line('arrow+deadlines', 0.0)]


def write(out, lines):
  """A folder that experiments.policies might have written."""
  equal_rates.provenance.save_csv(
      out / 'cells' / 'policies.csv', policies_report.Line._fields, lines)


def run(out, lines=LINES, **options):
  if lines is not None:
    write(out, lines)
  chosen = cli.options(equal_rates.FLAGS, **TINY | dict(
      cells=str(out / 'cells'), out=str(out / 'out')) | options)
  console = Console(record=True, width=150)
  with cli.naming_flags(chosen, equal_rates.FLAGS):
    code = equal_rates.run(chosen, console)
  return code, console.export_text()


THREE = [line('static+deadlines', 30.0, objective)
         for objective in ('balanced', 'ttft', 'tpot')]


def found(out):
  with open(out / 'out' / 'equal_rates.csv', newline='') as file:
    return list(csv.DictReader(file))


def test_the_rate_and_the_rivals_are_of_lines_of_the_others_with_the_order(
    tmp_path):
  code, text = run(tmp_path)
  assert code == 0
  check_written(text, tmp_path / 'out')
  assert made_by(tmp_path / 'out')['options']['seeds'] == ['7', '8']
  own, = found(tmp_path)
  assert own['rate_per_s'] == '80.0'  # 40 a device, of chunked
  assert own['rivals'] == 'static:prefills=1+deadlines; chunked+deadlines'
  assert own['rival'] in own['rivals'] and own['policy'] == 'colocated'
  shares = list(map(float, own['shares'].split('; ')))
  assert float(own['ahead']) == pytest.approx(
      float(own['attained']) - max(shares), abs=2e-4)
  assert own['verdict'] in ' '.join(text.split())
  assert 'colocated, 1 cells: ' in text and 'static' in text
  told = json.loads((tmp_path / 'out' / 'equal_rates.json').read_text())
  assert sum(told['verdicts']['colocated'].values()) == 1


def test_rivals_may_have_all_their_settings(tmp_path):
  code, text = run(tmp_path, settings='all')
  own, = found(tmp_path)
  rivals = own['rivals'].split('; ')
  assert code == 0 and rivals == ['static:prefills=1+deadlines', *[
      f'chunked{chunk}+deadlines' for chunk in (
          '', ':chunk=256', ':chunk=512', ':chunk=1024', ':chunk=2048')]]
  shares = dict(zip(rivals, map(float, own['shares'].split('; ')), strict=True))
  best = max(share for share in shares.values() if share >= 0)  # not nan
  assert shares[own['rival']] == best and f'{best:.1%}*' in text


def test_a_run_that_goes_on_measures_nothing_again(tmp_path):
  run(tmp_path)
  first = found(tmp_path)
  code, text = run(tmp_path)
  assert code == 0 and '0 of 1 cells to measure' in text
  code, text = run(tmp_path, [*LINES, line('static+deadlines', 1.0, 'ttft')])
  assert '1 of 2 cells to measure' in text and found(tmp_path)[0] == first[0]
  # Another rival, rate, policy, seed or length is another question.
  more = line('splitwise+deadlines', 1.0)
  for lines, options in (([*LINES, more], {}),
                         ([*LINES, more._replace(goodput_per_device=50.0)], {}),
                         (LINES, dict(seeds=['7'])), (LINES, dict(warmup=0.5)),
                         (LINES, dict(policies=['chunked+deadlines']))):
    code, text = run(tmp_path, lines, **options)
    assert '1 of 1 cells to measure' in text


def test_minutes_end_it_and_it_goes_on(tmp_path):
  code, text = run(tmp_path, THREE, minutes=0.0)
  assert code == 0 and 'Stopped by --minutes' in text
  assert [own['objective'] for own in found(tmp_path)] == ['balanced']
  code, text = run(tmp_path, THREE)
  assert code == 0 and '2 of 3 cells to measure' in text
  assert [own['objective'] for own in found(tmp_path)] == ['balanced', 'ttft',
                                                           'tpot']


def cell(**more):
  """A Cell of two rivals."""
  effort = measuring.Effort(400, 1.0, 0.25, (7, 8))
  return next(measuring.cells(
      [x for x in LINES if '+' in x.policy][:2], ['colocated'],
      {'fixed:100x10': 'fixed:100x10'}, effort, 'best'))._replace(**more)


def fake(shares, monkeypatch):
  """Runs that attain such shares, evenly: {policy: (one of seed 7, of 8)}.

  Returns:
    The list of what will be run: (policy, seed, requests, seconds).
  """
  asked = []

  def serve(cell, text, seed):
    asked.append((text, seed, cell.effort.requests, cell.effort.seconds))
    every = shares[text][seed - 7]
    return measuring.Served([n % 10 < every for n in range(300)], 1)
  monkeypatch.setattr(measuring, 'serve', serve)
  return asked


@pytest.mark.parametrize('own, verdict', [
    ((10, 10), 'ahead'), ((8, 9), 'level'), ((6, 5), 'behind')])
def test_the_verdict_is_beside_the_best_over_all_seeds(monkeypatch, own,
                                                       verdict):
  """static is best on one seed, chunked on both together."""
  fake({'static:prefills=1+deadlines': (9, 5), 'chunked+deadlines': (8, 9),
        'colocated': own}, monkeypatch)
  answer = measuring.measure(cell())
  assert answer.rival == 'chunked+deadlines'
  assert answer.shares == '0.7; 0.85'
  assert answer.ahead == pytest.approx(sum(own) / 20 - 0.85)
  assert answer.low <= answer.ahead <= answer.high
  assert answer.verdict == verdict and answer.flips == 2
  assert answer.of_seeds.startswith(f'7: {own[0] / 10 - 0.8:+.4f} [')
  assert equal_rates_report.key(answer) == cell().key


def test_settings_that_are_far_below_have_a_short_run_only(monkeypatch):
  shares = {'static:prefills=1+deadlines': (4, 4), 'chunked+deadlines': (6, 9),
            'static:prefills=2+deadlines': (3, 9), 'colocated': (9, 9),
            'chunked:chunk=256+deadlines': (9, 9),
            'chunked:chunk=512+deadlines': (8, 10)}
  asked = fake(shares, monkeypatch)
  answer = measuring.measure(cell(rivals='; '.join(
      text for text in shares if text != 'colocated')))
  assert answer.shares == '0.4; nan; nan; 0.9; 0.9'
  assert [(text, seed) for text, seed, n, seconds in asked
          if (n, seconds) == (100, 0.25)] == [
              (text, 7) for text in shares if text != 'colocated']
  assert [text for text, _, *size in asked if size == [400, 1.0]] == [
      text for text in (
          'static:prefills=1+deadlines', 'chunked:chunk=256+deadlines',
          'chunked:chunk=512+deadlines', 'colocated') for _ in '78']
  assert '40.0%' in shown(answer) and '90.0%*' in shown(answer)
  assert 'nan' not in shown(answer)


def shown(line):
  """The table of a line."""
  console = Console(record=True, width=150, file=io.StringIO())
  console.print(equal_rates_report.table([line]))
  return console.export_text()


def test_seeds_come_together_as_independent_means():
  assert seeds.together([(0.1, 0.07, 0.13)]) == pytest.approx((0.1, 0.07, 0.13))
  assert seeds.together([(0.1, 0.07, 0.13), (0.3, 0.26, 0.34)]) == (
      pytest.approx((0.2, 0.175, 0.225)))  # 3, 4, 5
  # A bound that is cut off at 1 says nothing of the width.
  assert seeds.together([(0.9, 0.7, 1.0)]) == pytest.approx((0.9, 0.7, 1.1))


def test_no_batch_holds_two_seeds(monkeypatch):
  """What is won on one seed and lost on the other is even within each, so
  batches of both together, half of them won, would be noise that is not."""
  fake({'static:prefills=1+deadlines': (0, 0), 'chunked+deadlines': (10, 0),
        'colocated': (0, 10)}, monkeypatch)
  answer = measuring.measure(cell())
  assert answer.ahead == 0 and answer.high - answer.low < 0.1


def test_all_see_the_same_requests_of_a_seed(monkeypatch):
  asked, sent, run_it = cell(rate_per_s=20.0), [], measuring.judging.run

  def seen(*args):
    records = run_it(*args)
    sent.append([(r.arrival_s, r.prompt_len) for r in records])
    return records
  monkeypatch.setattr(measuring.judging, 'run', seen)
  every = asked._replace(effort=asked.effort._replace(warmup=0.0, seconds=40.0))
  hits = [measuring.serve(which, text, seed).hits for which, text, seed in (
      (asked, 'static:prefills=1', 7), (asked, 'colocated', 7),
      (asked, 'colocated', 8), (every, 'colocated', 7))]
  assert sent[0] == sent[1] != sent[2]
  # All of --requests but a quarter; where --seconds take more, these.
  assert [(len(own), len(those)) for own, those in zip(
      sent, hits, strict=True)] == [(400, 300)] * 3 + [(800, 800)]


def test_flips_count_from_the_warm_up_to_the_last_arrival(monkeypatch):
  def flipping(problem, system, rate_per_s, n, on_event):
    records = run_it(problem, system, rate_per_s, n)
    first, last = records[n // 4].arrival_s, records[-1].arrival_s
    for time_s in (0.0, first - 1e-3, first + 1e-3, last - 1e-3, last + 1e-3):
      flip = measuring.Flip(0, 'decode')
      on_event(None, Tick(time_s), (flip, Finish(1, 'stop')))
    return records
  run_it = measuring.judging.run
  monkeypatch.setattr(measuring.judging, 'run', flipping)
  assert measuring.serve(cell(), 'colocated', 7).flips == 2


@pytest.mark.parametrize('lines, options, error', [
    (None, {}, '--cells=.*policies.csv of'),
    ([], {}, '--cells=.*lines with .deadlines'),
    ([line('chunked', 9.0)], {}, '--cells=.*lines with .deadlines'),
    ([line('colocated+deadlines', 9.0)], {}, '--cells=.*not under test'),
    ([line('chunked+deadlines', 'x')], {}, '--cells: .*float'),
    ([line('chunked+deadlines', 9.0, ttft_s=-0.2)], {},
     '--cells: Slo.ttft_s=-0.2'),
    ([line('chunked+deadlines', 9.0, cluster='none')], {},
     '--cells=.*cluster='),
    (LINES, dict(policies=['colocated', 'luck']), '--policies: policy='),
    (LINES, dict(policies=[]), '--policies='),
    (LINES, dict(seeds=['7', '07']), '--seeds=.*different'),
    (LINES, dict(seeds=['7', '00']), '--seeds=.*without .0.: these chose'),
    (LINES, dict(lengths='sharegpt'), '--lengths=.*not fixed:100x10')])
def test_bad_input_names_the_flag(tmp_path, lines, options, error):
  with pytest.raises(InputError, match=error):
    run(tmp_path, lines, **options)
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('damaged, told', [
    (lambda text: b'a,b\n1,2\n', 'columns'), (lambda text: b'a,b\n', 'columns'),
    (lambda text: b'\xff\n', 'utf-8'),
    (lambda text: text + b'\0\n', 'columns|NUL'),
    (lambda text: text[:-60], 'columns'),
    (lambda text: text + b'x,y', 'columns'),
    (lambda text: text.rpartition(b',')[0], 'columns'),
    (lambda text: text.replace(b'40.0', b'nan', 1), '=nan: must be a finite'),
    (lambda text: text.replace(b'0.06', b'inf', 1), 'ttft_s=inf: must be')])
def test_cells_that_are_damaged_are_told(tmp_path, damaged, told):
  path = tmp_path / 'policies.csv'
  equal_rates.provenance.save_csv(path, LINES[0]._fields, LINES)
  assert policies_report.read(path) == LINES
  path.write_bytes(damaged(path.read_bytes()))
  with pytest.raises(InputError, match=f'^--out[=:].*({told})'):
    policies_report.read(path)


def test_a_table_that_was_saved_by_a_spreadsheet_is_read(tmp_path):
  """With a byte order mark; a folder of that name is told."""
  path = tmp_path / 'policies.csv'
  equal_rates.provenance.save_csv(path, LINES[0]._fields, LINES)
  path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
  assert policies_report.read(path) == LINES
  path.unlink()
  path.mkdir()
  with pytest.raises(InputError, match='^--out: .*policies.csv'):
    policies_report.read(path)


@pytest.mark.parametrize('lines, shown', [
    (LINES, 5), (LINES[:2], 2), (LINES[3:4], 1),
    ([line('static', 0.0), LINES[1]], 2),
    ([LINES[0], line('chunked+deadlines', 9.0, 'ttft')], 2)])
def test_the_picture_of_goodputs_shows_each_policy(
    tmp_path, monkeypatch, lines, shown):
  """Also without a static split, or where that attains nothing; next to the
  highest one there."""
  figures = []
  monkeypatch.setattr(policies_report.pictures, 'save',
                      lambda figure, path: figures.append(figure))
  policies_report.draw(tmp_path, lines)
  panel, = figures[0].axes
  marks = [x for own in panel.lines if own.get_marker() not in ('None', None)
           for x in own.get_xdata()]
  assert len(marks) == shown and max(marks) == 1
  assert all(panel.get_xlim()[0] <= x <= panel.get_xlim()[1] for x in marks)


def test_it_reads_what_experiments_policies_writes(tmp_path):
  policies_test.run(tmp_path / 'cells', orders=['fifo', 'deadlines'])
  code, text = run(tmp_path, None, policies=['adaptive'])
  assert code == 0 and 'static' in text and 'colocated' in text
  own, = found(tmp_path)
  assert own['policy'] == 'adaptive' and float(own['rate_per_s']) > 0


def test_workloads_without_a_file_are_left_out(tmp_path):
  code, text = run(tmp_path, [*LINES, line(
      'chunked+deadlines', 9.0, workload='azure-code')],
                   lengths='fixed:100x10,azure-code',
                   traces=str(tmp_path / 'none'))
  assert code == 0 and 'azure-code: left out' in text
  assert [own['workload'] for own in found(tmp_path)] == ['fixed:100x10']
