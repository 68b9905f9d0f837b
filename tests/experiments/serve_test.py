"""The runner from end to end on a tiny model, and what it says to bad input."""

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest
from rich.console import Console

from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.runtime import weights
from dsjax.scheduling import event_log, scheduler
from experiments import serve
from experiments.common import cli, machine, report, terminal
from experiments.common import overrides as configs
from tests.common.results import check_written, made_by

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ('model=tiny', 'engine.max_len=128', 'engine.max_seqs=2',
         'engine.prefill_tokens=16', 'engine.prefill_seqs=1',
         'engine.chunk_tokens=16', 'engine.transfer_pages=4',
         'sampling.max_tokens=4', 'workload.process=burst',
         'workload.requests=4')
PROMPTS = ('Hi', 'Ολα καλά;', '\U0001f41d and \U0001f36f?', 'One, two, three')


@pytest.fixture(autouse=True)
def _started():
  jax.devices()  # so that the runner leaves the number of devices alone


def start(folder, *settings, config='demo', console=None):
  prompts = folder / 'prompts.txt'
  prompts.write_text('\n'.join(PROMPTS), encoding='utf-8')
  return cli.exit_code(serve.run, cli.options(
      serve.FLAGS, config=config, out=str(folder / 'out'),
      compilation_cache=None,
      set=(*SMALL, f'workload.prompts={prompts}', *settings)),
                       console or Console(file=sys.stdout))


def rows(path):
  lines = path.read_text(encoding='utf-8').split('\n')[:-1]
  return [json.loads(line) for line in lines]


def test_all_modes(tmp_path, capsys, monkeypatch):
  gc.freeze()  # what other tests have left is not looked through
  place, placing, placed = weights._place, weights.placing, []
  monkeypatch.setattr(weights, '_place', lambda *args: (
      placed.append(args) or place(*args)))
  monkeypatch.setattr(weights, 'placing', lambda *args: (
      gc.collect() and None) or placing(*args))
  assert start(tmp_path, 'sampling.temperature=0.8') == 0
  assert len(placed) == 1  # six instances, one copy
  told, out = capsys.readouterr().out, tmp_path / 'out'
  check_written(told, out)
  said = ' '.join(told.split())
  modes = ('disaggregated', 'colocated', 'chunked')
  for mode in modes:
    assert f'{mode}: 4 of 4 answered; every page returned' in said
  assert said.count('0 programs compiled while serving') == 3
  assert 'All 4 answers are equal token for token in all modes' in said
  assert 'TTFT p90 ms' in said and ' answer ' in said
  records = rows(out / 'records.jsonl')
  assert [r['mode'] for r in records] == [m for m in modes for _ in PROMPTS]
  assert len(report.load_records(out / 'records.jsonl')) == 12
  assert all(a['text'] is not None for a in rows(out / 'answers.jsonl'))
  summary = json.loads((out / 'summary.json').read_text())
  assert list(summary['modes']) == list(modes)
  assert summary['modes']['disaggregated']['kv_bytes'] > 0
  made = made_by(out)
  assert made['options']['config'] == 'demo' and 'prompts.txt' in made['data']
  assert 'TPOT p90' in (out / 'summary.txt').read_text()
  assert (out / 'report.png').read_bytes().startswith(b'\x89PNG')
  _check_timeline(json.loads((out / 'timeline.json').read_text()), modes)
  _check_logs(out, summary['config']['engine'])


def _check_timeline(trace, modes):
  events = trace['traceEvents']
  named = {e['pid']: e['args']['name'] for e in events
           if e['name'] == 'process_name'}
  assert sorted(named.values()) == sorted(
      f'{m}: {what}' for m in modes for what in ('instances', 'requests'))
  steps = {named[e['pid']] for e in events if e['ph'] == 'X'}
  assert steps == {f'{m}: instances' for m in modes}
  arrows = [e['id'] for e in events if e['ph'] == 's']
  assert len(arrows) == len(set(arrows)) == len(PROMPTS)
  assert all(a.startswith('disaggregated') for a in arrows)


def _check_logs(out, fields):
  engine = EngineConfig(**fields)
  for mode, roles in (('disaggregated', ('prefill', 'decode')),
                      ('colocated', ('colocated',) * 2),
                      ('chunked', ('chunked',) * 2)):
    log = [event_log.decode(row) for row in rows(out / f'events-{mode}.jsonl')]
    plan = scheduler.Config(tuple(map(engine.instance, roles)),
                            engine.max_len, engine.depth,
                            run_ahead=engine.run_ahead)
    assert event_log.replay(plan, log) is None


def test_a_busy_machine_is_said(monkeypatch):
  def result(mode, cores):
    extra = {'others_cores': cores}
    return serve.Result(mode, None, [], [], {}, extra, 0, False, {})

  assert serve.disturbed([result('a', None), result('b', 0.1)]) == ''
  said = serve.disturbed([result('a', 0.05), result('b', 1.04)])
  assert '(1.0 in b)' in said and 'not fair' in said
  monkeypatch.setattr(machine, '_busy_s', lambda: None)
  assert machine.Others().cores() is None


def test_cores_of_others(monkeypatch):
  seen = iter([(100.0, 10.0), (107.0, 11.0)])
  clock = iter([50.0, 54.0])
  monkeypatch.setattr(machine, '_busy_s', lambda: next(seen))
  monkeypatch.setattr(machine.time, 'perf_counter', lambda: next(clock))
  assert machine.Others().cores() == 1.5


def test_what_a_process_has_started_is_its_own():
  """While it runs and when it has ended: the seconds of an instance."""
  before_s = sum(machine._started())
  with subprocess.Popen([sys.executable, '-c', 'while True: pass']) as busy:
    try:
      while sum(machine._started()) < before_s + 0.3:
        pass
      running_s = machine._busy_s()[1]
      own_s = sum(os.times()[:4])
    finally:
      busy.kill()
  ended_s = machine._busy_s()[1]
  assert running_s > own_s + 0.2
  assert ended_s > running_s - 0.1  # sums of clocks' ticks


def test_ctrl_c_keeps_what_there_is(tmp_path, capsys, monkeypatch):
  plain = terminal.Screen.serving

  def serving(self, server):
    if sum(r.finish_s is not None for r in server.records) >= 2:
      signal.raise_signal(signal.SIGINT)
    plain(self, server)

  monkeypatch.setattr(terminal.Screen, 'serving', serving)
  assert start(tmp_path, 'workload.requests=50', 'workload.rate_per_s=4',
               'workload.process=uniform') == 130
  said = ' '.join(capsys.readouterr().out.split())
  assert 'Stopped early, in disaggregated.' in said
  records = rows(tmp_path / 'out' / 'records.jsonl')
  assert 2 <= len(records) < 50
  assert sum(r['status'] == 'length' for r in records) >= 2
  assert (tmp_path / 'out' / 'report.png').exists()
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_warming_up(tmp_path, capsys, monkeypatch):
  def warming(self, done, total, name):
    raise KeyboardInterrupt

  monkeypatch.setattr(terminal.Screen, 'warming', warming)
  assert start(tmp_path) == 130
  assert 'nothing to write' in capsys.readouterr().out


def test_live_table(tmp_path):
  console = Console(force_terminal=True, width=100, record=True)
  two = 'placements=prefill=1x1,decode=1x1'
  assert start(tmp_path, two, console=console) == 0
  said = console.export_text()
  assert 'compiling' in said and 'instance' in said
  assert '0 prefill 1x1' in said and '1 decode 1x1' in said


def _gguf(path, architecture):
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_tensor('x.weight', np.zeros((1, 32), np.float32))
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file,
                writer.write_tensors_to_file, writer.close):
    write()


@pytest.mark.parametrize('setting, says', [
    ('workload.rate=2', "did you mean 'workload.rate_per_s'?"),
    ('rate_per_s=2', "did you mean 'workload.rate_per_s'?"),
    ('engine.max_sequences=2', "did you mean 'engine.max_seqs'?"),
    ('engine.max_seqs', 'must be field=value'),
    ('engine.max_seqs=two', "engine.max_seqs='two': must be an integer"),
    ('engine.max_seqs=0', 'EngineConfig.max_seqs=0: must be an integer of 1'),
    ('engine.least_tokens=0', 'EngineConfig.least_tokens=0: must be an'),
    ('engine.least_rows=0', 'EngineConfig.least_rows=0: must be an'),
    ('engine.dtype=int8', "must be 'float32' or 'bfloat16'"),
    ('sampling.max_tokens=0', 'Sampling.max_tokens=0: must be an integer of'),
    ('sampling.ignore_eos=maybe', 'must be true or false'),
    ('slo.ttft_s=-1', 'Slo.ttft_s=-1.0: must be seconds above 0'),
    ('workload.rate_per_s=-2',
     'rate_per_s=-2.0: must be None or a number above 0'),
    ('workload.rate_per_s=nan',
     'rate_per_s=nan: must be None or a number above 0'),
    ('workload.process=daily', "workload: process='daily': must be one of"),
    ('workload.lengths=web', "lengths='web': cannot be"),
    ('workload.prompts=/nowhere.txt', '/nowhere.txt: cannot be read'),
    ('workload.lengths=/nowhere.csv', '/nowhere.csv: cannot be read'),
    ('placements=prefill=1x1', 'must be instances that prefill and'),
    ('placements=decode', "placements='decode': must be role=TPxPP"),
    ('placements=colocated=1x1/chunked=1x1,1x1', 'of equally many devices'),
    ('placements=prefill=8x1,decode=1x1',
     "placements='9 devices': must be of at most the 8 that exist"),
    ('placements=colocated=5x1', 'Plan.tp=5: must be at most the 4'),
    ('workload.process=sine:low=5', "process='sine:low=5': must be sine:"),
    ('workload.process=resample', "workload.process='resample': must be"),
    ('engine.max_len=20', 'exceed engine.max_len=20'),
    ('engine.max_len=4096', 'must be at most 2048, the context of tiny'),
    ('model=gpt5', "model='gpt5': must be one of"),
    ('model=/nowhere.gguf', '/nowhere.gguf: no such file'),
    ('model=@cut.gguf', 'cut.gguf: truncated'),
    ('model=@text.gguf', 'text.gguf: not a GGUF file'),
    ('model=@other.gguf', "general.architecture='mamba': must be one of"),
])
def test_bad_input_is_one_clear_error(tmp_path, capsys, setting, says):
  (tmp_path / 'text.gguf').write_text('hello')
  _gguf(tmp_path / 'other.gguf', 'mamba')
  (tmp_path / 'cut.gguf').write_bytes(
      (tmp_path / 'other.gguf').read_bytes()[:60])
  setting = setting.replace('@', f'{tmp_path}/')
  assert start(tmp_path, setting) == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ') and said.count('\n') == 1
  assert says in said


def test_bad_row_of_a_trace_is_named(tmp_path, capsys):
  trace = tmp_path / 'trace.csv'
  trace.write_text('arrival_s,prompt_len,output_len\n0,5,3\n1,-4,3\n')
  assert start(tmp_path, f'workload.lengths={trace}') == 2
  assert f'{trace}, line 3: prompt_len=' in capsys.readouterr().err


def test_unknown_config_names_the_nearest(tmp_path, capsys):
  assert start(tmp_path, config='dem') == 2
  assert "did you mean 'demo'?" in capsys.readouterr().err


@pytest.mark.parametrize('text, says', [
    ('raise ValueError("boom")', 'ValueError: boom'),
    ('config = (', 'SyntaxError'), ('import nothing_at_all', 'No module named'),
    ('import sys; sys.exit(3)', 'SystemExit: 3'),
    ('import dsjax; config = dsjax.Slo(-1.0, 1.0)', 'Slo.ttft_s=-1.0: must')])
def test_a_config_that_cannot_be_run_is_one_clear_error(tmp_path, capsys, text,
                                                        says):
  path = tmp_path / 'own.py'
  path.write_text(text)
  assert start(tmp_path, config=str(path)) == 2
  said = capsys.readouterr().err
  assert said.startswith('error: ') and says in said and said.count('\n') == 1


def test_azure_config_asks_for_its_file(tmp_path, capsys):
  assert start(tmp_path, config='azure') == 2
  assert 'Trace_conv.csv: cannot be read' in capsys.readouterr().err


def test_every_config_loads():
  for name in configs.names():
    assert isinstance(configs.load(name), serve.Serve), name


def test_the_demo_compiles_no_prefill_that_it_hardly_meets():
  engine = configs.load('demo').engine
  assert engine.token_buckets(engine.prefill_tokens) == (64, 128)
  assert engine.token_buckets(engine.chunk_tokens) == (64,)
  assert EngineConfig().token_buckets(100) == (32, 64, 100)
  assert EngineConfig(least_tokens=64).token_buckets(40) == (40,)


def test_override_types():
  config = configs.override(configs.load('demo'), (
      'workload.rate_per_s=none', 'sampling.stop=a,b', 'sampling.stop_token_'
      'ids=', 'sampling.logit_bias=3:-1,5:0.5', 'engine.num_pages=none',
      'sampling.ignore_eos=true', 'placements=prefill=2x1,1x1,decode=1x3'))
  assert config.workload.rate_per_s is None
  assert config.sampling.stop == ('a', 'b')
  assert config.sampling.stop_token_ids == ()
  assert config.sampling.logit_bias == ((3, -1.0), (5, 0.5))
  assert config.sampling.ignore_eos is True
  plan = Plan
  assert config.placements == (Placement(
      prefill=[plan(2), plan(1)], decode=[plan(1, 3)]),)
  text = str(config.placements[0])
  assert text == 'prefill=2x1,1x1,decode=1x3'


def test_command_line():
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.serve', '--config=demo',
       '--out=/tmp/unused', '--set=slo.ttft=1'], cwd=ROOT, text=True,
      capture_output=True, check=False)
  assert done.returncode == 2 and done.stdout == ''
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
