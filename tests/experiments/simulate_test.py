"""The runner that simulates placements."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from dsjax.analysis import attribution
from dsjax.analysis.record import Record
from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.placement import api
from dsjax.scheduling.event_log import decode
from dsjax.scheduling.events import RunDecode
from experiments import simulate
from experiments.common import cli, report, sweep, sweep_report
from tests.common.legible import alike, hidden
from tests.common.programs import ended
from tests.common.results import check_written, made_by

BASE = ('--requests=40', '--lengths=humaneval')


def run(*args):
  return ended(simulate, *BASE, *args)


def test_rates_of_two_placements_with_timelines(tmp_path):
  code, text, _ = run('--placement=prefill=1x1,decode=1x1/colocated=1x1',
                      '--rates=2,1', '--timeline', f'--out={tmp_path}')
  assert code == 0
  check_written(text, tmp_path)
  written = json.loads((tmp_path / 'summary.json').read_text())
  assert [(p['placement'], p['x']) for p in written['points']] == [
      ('prefill=1x1,decode=1x1', 1), ('prefill=1x1,decode=1x1', 2),
      ('colocated=1x1', 1), ('colocated=1x1', 2)]
  for p in written['points']:
    assert p['advice'] == 'no misses' or p['advice'] in text
    share, low, high = p['summary']['attainment']
    assert low <= share <= high
    misses = round((1 - share) * 32)  # 40, less a fifth
    assert sum(p['causes'].values()) == misses
  records = report.load_records(tmp_path / 'records.jsonl')
  assert len(records) == 160
  assert (tmp_path / 'simulate.png').read_bytes()[:4] == b'\x89PNG'
  trace = json.loads((tmp_path / 'timeline.json').read_text())
  assert any(e.get('cat') == 'migrate' for e in trace['traceEvents'])
  logs = sorted(tmp_path.glob('events-*.jsonl'))
  assert len(logs) == 4
  event, _ = decode(json.loads(logs[0].read_text().splitlines()[0]))
  assert event.id == 0
  made = made_by(tmp_path)
  assert made['data'] == dict.fromkeys(('humaneval', 'published'), 'built in')
  assert made['options']['rates'] == '2,1'


def test_run_ahead_is_asked_of_the_scheduler(tmp_path):
  assert run('--placement=colocated=1x1', '--rate=1', '--timeline',
             '--run_ahead=1', f'--out={tmp_path}')[0] == 0
  log, = tmp_path.glob('events-*.jsonl')
  pairs = [decode(json.loads(line)) for line in log.read_text().splitlines()]
  steps = {c.steps for _, commands in pairs for c in commands
           if isinstance(c, RunDecode)}
  assert steps == {1}


def test_tighter_scales_attain_less(tmp_path):
  code, text, _ = run('--scales=2,0.2,1', '--rate=6', f'--out={tmp_path}')
  assert code == 0
  points = json.loads((tmp_path / 'summary.json').read_text())['points']
  assert [p['x'] for p in points] == [0.2, 1, 2]
  shares = [p['summary']['attainment'][0] for p in points]
  assert shares == sorted(shares) and shares[0] < shares[-1]
  assert 'tightest' in text


def test_a_trace_at_its_own_times(tmp_path):
  path = tmp_path / 'trace.csv'
  path.write_text('arrival_s,prompt_len,output_len\n' + ''.join(
      f'{i / 4},{50 + i},8\n' for i in range(30)))
  assert run(f'--lengths={path}', '--process=trace', f'--out={tmp_path}'
             )[0] == 0
  records = report.load_records(tmp_path / 'records.jsonl')
  assert [(r.arrival_s, r.prompt_len) for r in records] == [
      (i / 4, 50 + i) for i in range(30)]


def test_a_cluster_of_several_kinds_as_in_a_search(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(sweep_report.pictures, 'save',
                      lambda figure, _: drawn.append(figure))
  path = tmp_path / 'my.json'
  path.write_text(json.dumps({'kinds': {
      'fast': {'devices_per_node': 2, 'latency': 'tables:h100-80g'},
      'slow': {'devices_per_node': 2, 'latency': 'tables:a100-80g'}},
      'links': {'fast>slow': {'bytes_per_s': 1e9}}}))
  placements = ('prefill=1x1@fast,decode=1x1@slow', 'colocated=1x1@slow')
  code, text, error = run(
      '--model=llama-3-8b', '--rates=2', f'--machines={path}',
      f'--placement={"/".join(placements)}', f'--out={tmp_path / "out"}')
  assert code == 0, error
  written = json.loads((tmp_path / 'out' / 'summary.json').read_text())
  assert [p['placement'] for p in written['points']] == list(placements)
  assert {'my.json', 'tables:h100-80g', 'tables:a100-80g'} <= set(
      made_by(tmp_path / 'out')['data'])
  figure, = drawn
  assert figure._suptitle.get_text().endswith(
      'latencies: tables:h100-80g, tables:a100-80g')
  # The border between the two takes longer than a link inside either.
  crossing, _ = (p['summary'] for p in written['points'])
  assert crossing['stage_s']['migrate'] > 0.02
  for flag in ('--memory_gb=40', '--placement=colocated=1x1',
               '--placement=colocated=4x1@slow'):
    code, _, error = run('--model=llama-3-8b', '--rate=2',
                         f'--machines={path}', flag)
    assert code == 2 and flag.split('=')[0] in error
  assert error.endswith(': 1 x 2 of fast, 1 x 2 of slow\n')


@pytest.mark.parametrize('flag, message', (
    ('--rates=0,1', '--rates'), ('--rates=1,nan', '--rates'),
    ('--rates=1,x', '--rates'), ('--rate=-1', '--rate'),
    ('--rate=inf', '--rate'), ('--seeds=1', '--rate'),
    ('--scales=1', '--rate'), ('--process=weekly --rate=1', 'process'),
    ('--process=trace', 'arrival times'),
    ('--ttft_s=0.001 --rate=1', 's or more'),
    ('--tpot_s=0.001 --rate=1', '--tpot_s'),
    ('--memory_gb=20 --rate=1', 'fit in the memory'),
    ('--placement=best --rate=1', 'placement'),
    ('--placement=prefill=8x1,decode=1x1 --rate=1', 'latencies'),
    ('--lengths=/dev/null --rate=1', 'at least one row'),
    ('--model=opt-14b --rate=1', 'model'), ('--cv=0 --process=gamma --rate=1',
                                            'cv')))
def test_bad_input_is_one_clear_error(flag, message):
  code, _, error = run(*flag.split())
  assert code == 2
  error, = error.strip().splitlines()
  assert error.startswith('error: ') and message in error


def test_ctrl_c_keeps_what_is_done(tmp_path):
  rates = ','.join(str(1 + i / 100) for i in range(300))
  process = subprocess.Popen(
      [sys.executable, '-m', 'experiments.simulate', '--lengths=humaneval',
       '--placement=prefill=1x1,decode=1x1', f'--rates={rates}',
       f'--out={tmp_path}'],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  first = process.stdout.readline()
  assert 'met both' in first
  os.kill(process.pid, signal.SIGINT)
  text, _ = process.communicate(timeout=60)
  assert process.returncode == 130, text
  assert 'Stopped by Ctrl-C' in text
  written = json.loads((tmp_path / 'summary.json').read_text())
  assert written['stopped'] and 1 <= len(written['points']) < 300


def test_a_trace_without_a_span_is_at_once(tmp_path):
  for name, rows in (('one', 1), ('many', 40)):
    path = tmp_path / f'{name}.csv'
    path.write_text('arrival_s,prompt_len,output_len\n' + '7,30,4\n' * rows)
    code, text, _ = run(f'--lengths={path}', '--process=trace', '--ttft_s=9',
                     f'--out={tmp_path}')
    assert code == 0 and '1x1 at once: 100% met both' in text
    point, = json.loads((tmp_path / 'summary.json').read_text())['points']
    assert point['x'] == 0 and sum(
        point['summary']['counts'].values()) == rows - rows // 5
    assert (tmp_path / 'simulate.png').read_bytes()[:4] == b'\x89PNG'


def test_a_picture_of_many_lines_hides_nothing(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(sweep_report.pictures, 'save',
                      lambda figure, _: drawn.append(figure))
  code, _, error = run(
      '--placement=prefill=1x1,1x1,decode=1x1/colocated=1x1/chunked=1x1,1x1',
      '--policy=distserve,arrow', '--rates=1,3,30', '--seeds=0,1',
      f'--out={tmp_path}')
  assert code == 0, error
  figure, = drawn
  top, *_ = figure.axes
  assert not hidden(figure) and not alike(figure)
  assert len(top.get_legend().get_texts()) == 6
  inside = top.get_window_extent()
  for outside in (top.get_legend(), *top.texts):
    assert not outside.get_window_extent().overlaps(inside)
  for each in (top.get_legend(), *top.texts, figure._suptitle):
    left, low, right, high = each.get_window_extent().extents
    assert 0 <= left < right <= figure.bbox.width and low > 0, each
    assert high <= figure.bbox.height


def test_tables_fit_80_columns_and_label_their_percentiles():
  run = api.simulate('prefill=1x1,decode=1x1', rate_per_s=9.0, requests=60,
                     log=True)
  point = sweep.Point(
      'prefill=2x1,decode=1x1', 12.34, 12.34, run.slo, run.records, run.kept,
      run.summary, run.explain(), 'not steady')
  text = io.StringIO()
  Console(file=text, width=150).print(*sweep_report.tables([point], 'rate'))
  assert max(map(len, text.getvalue().splitlines())) <= 80
  assert text.getvalue().count('p50/p90/p99') == 4
  assert re.search(r'12.34 ! .* \d+, \d+ prefill_queue', text.getvalue(),
                   re.DOTALL)


def test_causes_are_told_apart_in_grey_and_told_of_in_help():
  assert set(sweep_report.LOOKS) == set(attribution.ALL)
  assert len({hatch for _, hatch in sweep_report.LOOKS.values()}) == len(
      attribution.ALL)
  assert all(cause in simulate.__doc__ for cause in attribution.ALL)


def test_infinite_objectives_and_cut_lengths_are_told(tmp_path):
  code, text, _ = run('--lengths=fixed:2100x4', '--rate=1', '--ttft_s=inf',
                   '--tpot_s=inf', '--requests=20', '--cut',
                   f'--out={tmp_path}')
  assert code == 0 and '1 of 1 lengths are cut' in text
  point, = json.loads((tmp_path / 'summary.json').read_text())['points']
  assert point['slo'] == {'ttft_s': None, 'tpot_s': None}


def test_each_mode_runs_with_the_batches_that_suit_it(tmp_path):
  code, text, _ = run(
      '--lengths=fixed:1500x40', '--rate=5', '--requests=20',
      '--placement=colocated=1x1/chunked=1x1', '--chunks=2048,300',
      f'--out={tmp_path}')
  assert code == 0
  colocated, chunked = json.loads((tmp_path / 'summary.json').read_text())[
      'points']
  assert not colocated['tried'] and colocated['batch'] >= 1500
  assert list(chunked['tried']) == ['300', '2048']
  shares = chunked['tried']
  assert shares['300'] < shares['2048'] == chunked['summary']['attainment'][0]
  assert chunked['batch'] == 2048
  assert re.search(r'5 │ +2048 │', text)
  assert 'met both with chunks of 300: ' in text


@pytest.mark.parametrize('chunks', ['256', '512,x', '512.5', '-512',
                                    '512,0512'])
def test_a_chunk_that_decode_rows_fill_is_refused(chunks):
  options = cli.parse(simulate.FLAGS, ['--rate=1', f'--chunks={chunks}'])
  with pytest.raises(InputError, match='--chunks='):
    simulate.run(options, Console(quiet=True))


def waiting(waits):
  records = []
  for i, wait_s in enumerate(waits):
    record = Record(i, float(i), 8, 1, finish_s=i + 1.0)
    record.stage_s['prefill_queue'] = wait_s
    records.append(record)
  return records


def test_growing_waits_are_beyond_capacity():
  slo, hits = Slo(0.5, 0.1), [True] * 40
  assert api.unsteady(waiting([0.1] * 40), slo, hits) == ''
  assert api.unsteady(waiting([0.01 * i for i in range(40)]), slo,
                           hits) == ''
  assert 'beyond capacity' in api.unsteady(
      waiting([0.1 * i for i in range(40)]), slo, hits)
  assert 'not steady' in api.unsteady(
      waiting([0.1] * 40), slo, [True] * 20 + [False] * 20)


def test_seeds_and_policies_are_swept_into_one_tidy_table(tmp_path):
  mine = tmp_path / 'mine.py'
  mine.write_text('import dataclasses, dsjax\n'
                  'late = dataclasses.replace(dsjax.DISTSERVE, name="late")\n')
  console = Console(width=100, record=True)
  options = cli.options(
      simulate.FLAGS, lengths='humaneval', requests=40, rates='4,12',
      seeds=['3', '5', '8'], policy=f'distserve,{mine}:late',
      placement='colocated=1x1', out=str(tmp_path))
  assert simulate.run(options, console) == 0
  with open(tmp_path / 'points.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [(row['policy'], row['seed'], float(row['rate_per_s']))
          for row in rows] == [(policy, seed, rate)
                               for policy in ('distserve', 'late')
                               for seed in '358' for rate in (4, 12)]
  for row in rows:
    assert float(row['low']) <= float(row['attained']) <= float(row['high'])
    assert float(row['ttft_p50_s']) <= float(row['ttft_p99_s'])
  # The default under another name decides the same; other seeds do not.
  half = len(rows) // 2
  assert [r['ttft_p50_s'] for r in rows[:half]] == [
      r['ttft_p50_s'] for r in rows[half:]]
  assert len({r['ttft_p50_s'] for r in rows[:half]}) == half
  text = console.export_text()
  assert len(re.findall('colocated=1x1 under late *\n', text)) == 1
  shares = [float(r['attained']) for r in rows[1:half:2]]
  assert f'{sum(shares) / 3:.0%}' in text


def test_processes_beside_each_other_change_nothing(tmp_path):
  written = []
  for processes in (1, 2):
    out = tmp_path / str(processes)
    code, text, _ = run(
        '--placement=prefill=1x1,decode=1x1/chunked=1x1', '--rates=1,6',
        '--chunks=512,1024', '--seeds=0,3', '--timeline',
        f'--processes={processes}', f'--out={out}')
    assert code == 0
    written.append((text.replace(str(out), 'out'), [
        (out / name).read_text() for name in (
            'points.csv', 'records.jsonl', *sorted(
                file.name for file in out.glob('events-*.jsonl')))]))
  assert written[0] == written[1] and len(written[0][1]) == 14


def test_ctrl_c_ends_processes_too(tmp_path):
  rates = ','.join(str(1 + i / 100) for i in range(300))
  process = subprocess.Popen(
      [sys.executable, '-m', 'experiments.simulate', '--lengths=humaneval',
       '--placement=prefill=1x1,decode=1x1', f'--rates={rates}',
       '--processes=2', f'--out={tmp_path}'],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert 'met both' in process.stdout.readline()
  os.kill(process.pid, signal.SIGINT)
  text, _ = process.communicate(timeout=60)
  assert process.returncode == 130, text
  assert 'Stopped by Ctrl-C' in text


def test_an_interval_of_runs_is_of_what_differs_between_them():
  share, low, high = sweep.interval_of_runs([[True] * 50] * 4)
  assert (share, high) == (1, 1) and 0.97 < low < 0.99  # of 200 requests
  runs = [[True] * 100, [True] * 100, [True] * 40 + [False] * 60]
  share, low, high = sweep.interval_of_runs(runs)
  assert share == 0.8 and low < 0.01 and high == 1  # t of 3: 0.8 +- 0.86


@pytest.mark.parametrize('seeds', [
    [], ['1', '1'], ['-1'], ['x'], ['1.5'], ['1', '01'], ['9' * 5000]])
def test_seeds_are_different_integers(seeds):
  with pytest.raises(InputError, match='--seeds='):
    simulate.run(cli.options(simulate.FLAGS, rates='4', seeds=seeds),
                  Console())
