"""Ctrl-C in every runner: what was done by then stays, and the exit is 130."""

import functools
import importlib
import inspect
import itertools
import json

import pytest
from rich.console import Console

import dsjax
from dsjax.analysis.record import Record
from experiments import (
  equal_rates,
  explore,
  load,
  overload,
  policies,
  replan,
  reproduce,
  soak,
  stream,
)
from experiments.bench import (
  cluster,
  engine,
  migration,
  scheduler_step,
  simulator,
)
from experiments.common import cli
from tests.common.fake_engine import FakeEngine
from tests.common.runners import RUNNERS
from tests.experiments import equal_rates_test, policies_test, replan_test

# Runners whose own tests stop them: {name: the test}.
STOPPED_THERE = {
    'coverage': 'test_ctrl_c_keeps_what_is_known',
    'gpu.__main__':
    'test_a_command_that_is_ended_ends_its_tasks_and_says_what_there_is',
    'bench.http_cost': 'test_ctrl_c_keeps_the_rounds_there_are',
    'measure': 'test_the_runner_writes_what_was_timed_and_exits_130',
    'place': 'test_what_was_stopped_exits_130',
    'serve': 'test_ctrl_c_keeps_what_there_is',
    'sessions': 'test_ctrl_c_keeps_what_is_known',
    'simulate': 'test_ctrl_c_keeps_what_is_done',
    'validate': 'test_rows_files_and_ctrl_c'}
# Those that have nothing before they have all.
NOTHING_TO_KEEP = {
    'api', 'aot.__main__', 'host', 'tokenizer_folder'}


def stop_at(count, function=None):
  """A function whose call of this number is a Ctrl-C."""
  calls = itertools.count()

  @functools.wraps(function or stop_at)
  def stopped(*args, **kwargs):
    if next(calls) == count:
      raise KeyboardInterrupt
    return function(*args, **kwargs)
  return stopped


def stop_equal_rates(monkeypatch):
  monkeypatch.setattr(equal_rates, 'rivals_of', lambda _:
                      equal_rates_test.THREE)
  monkeypatch.setattr(equal_rates, 'measure', stop_at(2, equal_rates.measure))
  return equal_rates, equal_rates_test.TINY, 'equal_rates.csv', 3


def stop_load(monkeypatch):
  async def send_all(url, key, todo, timeout_s, on_sent):
    sender = load.Load(None)
    sender.records = [Record(0, 0.0, 5, 1, [0.5], finish_s=0.5,
                             status='length')]
    sender.lag_s = [0.0]
    on_sent(sender)
    raise KeyboardInterrupt
  monkeypatch.setattr(load, 'send_all', send_all)
  return load, dict(model='m', requests=2), 'records.jsonl', 1


def stop_overload(monkeypatch):
  async def measure(*_):
    raise KeyboardInterrupt
  monkeypatch.setattr(overload, 'measure', measure)
  monkeypatch.setattr(overload.load, 'find_model', lambda *_: 'm')
  return overload, dict(url='http://none/v1', config='tiny', set=[]), None, 0


def stop_explore(monkeypatch):
  monkeypatch.setattr(explore, '_explore', lambda *_: ([], True))
  return explore, {}, 'results.json', 1


def stop_policies(monkeypatch):
  monkeypatch.setattr(policies, 'measure', stop_at(1, policies.measure))
  return policies, policies_test.TINY, 'policies.csv', 2


def stop_replan(monkeypatch):
  monkeypatch.setattr(replan, 'best', stop_at(1, replan.best))
  return replan, replan_test.TINY, 'replan.csv', 4


def stop_reproduce(monkeypatch):
  compute, draw = reproduce.FIGURES['4']
  monkeypatch.setattr(reproduce, 'FIGURES', {
      '4': (compute, draw), 'x': (stop_at(0), draw)})
  monkeypatch.setattr(reproduce, 'names_of', lambda _: ['4', 'x'])
  return reproduce, dict(quick=True), '4.json', 1


def stop_soak(monkeypatch):
  monkeypatch.setattr(dsjax, 'serve', functools.partial(
      dsjax.serve, make_engine=FakeEngine))
  monkeypatch.setattr(soak._Lines, '__call__', stop_at(0))
  return soak, dict(quick=True), 'soak.json', 1


def stop_stream(monkeypatch):
  monkeypatch.setattr(stream, 'simulate', stop_at(2, stream.simulate))
  return stream, dict(prompt_lens='100,200', requests=3), 'stream.csv', 3


def stop_bench_cluster(monkeypatch):
  monkeypatch.setattr(cluster.dsjax, 'load', lambda *_: None)
  monkeypatch.setattr(cluster, 'serve', stop_at(1, lambda *_: {'ttft_ms': 1.0}))
  return cluster, {}, 'bench.json', 10


def stop_bench_engine(monkeypatch):
  monkeypatch.setattr(engine, 'bench_scheduler', lambda results, say: (
      engine.add(results, say, '(c) a step', 'us', 1.0)))
  monkeypatch.setattr(engine.checkpoint, 'load', stop_at(0))
  return engine, dict(only=['c', 'd']), 'bench.json', 10


def stop_bench_migration(monkeypatch):
  row = dict.fromkeys(('needed_mb', 'copied_mb', 'ratio', 'gb_per_s', 'hidden',
                       'put_gb_per_s', 'step_ms', 'slower'), 1.0)
  monkeypatch.setattr(migration.Bench, '__init__', lambda *_: None)
  monkeypatch.setattr(migration.Bench, 'run', stop_at(
      2, lambda *_: row | {'copies': 1, 'slower_range': (1.0, 1.0)}))
  return migration, dict(model='tiny'), 'bench.json', 20


def stop_bench_scheduler_step(monkeypatch):
  monkeypatch.setattr(scheduler_step, 'GROWTH', {
      'rows': (4, 8), 'waiting': (0,), 'blocks kept': (0,)})
  monkeypatch.setattr(scheduler_step, 'times_us', stop_at(
      2, scheduler_step.times_us))
  return scheduler_step, {}, 'bench.json', 20


def stop_bench_simulator(monkeypatch):
  monkeypatch.setattr(simulator, 'measure', stop_at(1, simulator.measure))
  return simulator, dict(requests=20, rounds=1), 'bench.json', 10


STOPS = {name.removeprefix('stop_').replace('bench_', 'bench.'): function
         for name, function in list(globals().items())
         if name.startswith('stop_') and name != 'stop_at'}


def test_every_runner_is_stopped_somewhere():
  assert {*STOPS, *STOPPED_THERE, *NOTHING_TO_KEEP} == {*RUNNERS}
  for name, test in STOPPED_THERE.items():
    module = importlib.import_module(
        f'tests.experiments.{name.removesuffix(".__main__").split(".")[-1]}'
        '_test')
    assert '130' in inspect.getsource(getattr(module, test))


@pytest.mark.parametrize('name', STOPS)
def test_what_was_done_before_ctrl_c_stays(tmp_path, monkeypatch, name):
  runner, options, kept, lines = STOPS[name](monkeypatch)
  console = Console(record=True, width=120)
  out = tmp_path / 'bench.json' if name.startswith('bench.') else tmp_path
  options = cli.options(runner.FLAGS, out=str(out), **options)
  assert runner.run(options, console) == 130
  told = console.export_text()
  if kept is None:
    assert 'Stopped' in told and not list(tmp_path.iterdir())
    return
  text = (tmp_path / kept).read_text()
  assert len(text.splitlines()) >= lines
  assert kept in told
  summaries = [json.loads(path.read_text()) for path in tmp_path.glob('*.json')]
  assert any('made_by' in summary for summary in summaries)
