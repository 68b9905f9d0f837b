"""Conversations with a prefix cache and without: the runner."""

import csv
import dataclasses
import json
import types

import pytest
from rich.console import Console

import dsjax
from dsjax.config.checks import InputError
from experiments import sessions
from experiments.common import cli
from tests.common import serving
from tests.common.fake_engine import FakeEngine
from tests.common.results import check_written

TINY = dict(requests=60, rates='4', routes=['hits'], page_size=64,
            placement='prefill=1x1,decode=1x1')


def shown(**options):
  console = Console(record=True, width=100)
  code = sessions.run(cli.options(sessions.FLAGS, **options), console)
  return code, console.export_text()


def rows(path):
  with open(path / 'sessions.csv', newline='') as file:
    return list(csv.DictReader(file))


def test_later_turns_come_sooner_with_a_cache(tmp_path):
  code, told = shown(out=str(tmp_path), **TINY)
  assert code == 0
  without, with_it = rows(tmp_path)
  assert (without['cache'], with_it['cache']) == ('False', 'True')
  assert float(without['cached']) == 0 and float(with_it['cached']) > 0.3
  assert float(with_it['later_ttft_s']) < float(without['later_ttft_s'])
  assert float(with_it['moved']) < 0.7 * float(without['moved'])
  check_written(told, tmp_path)
  assert max(len(line) for line in told.splitlines()
             if 'Written' not in line) <= 80
  made = json.loads((tmp_path / 'sessions.json').read_text())['made_by']
  assert made['options']['lengths'] == 'chat'


def test_the_table_of_all_routes_fits():
  told = [sessions.Line(9.5, route, True, 256.0, *[0.5] * 4, *[0.345] * 3, 1.0,
                        0.98, 1.0) for route in sessions.ROUTES]
  console = Console(record=True, width=100)
  console.print(sessions.table(told))
  assert max(map(len, console.export_text().splitlines())) <= 80


def test_a_served_model(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(dsjax, 'load', lambda name: (
      asked.append(name), dataclasses.replace(
          serving.MODEL, config=dataclasses.replace(
              serving.MODEL.config, max_len=512)))[1])
  serve = dsjax.serve
  monkeypatch.setattr(dsjax, 'serve', lambda *args: serve(
      *args, make_engine=FakeEngine))
  code, told = shown(real=True, out=str(tmp_path), sessions=2)
  assert code == 0 and asked == ['smollm2-135m-instruct'] * 2
  without, with_it = rows(tmp_path)
  assert float(without['cached']) == 0 and float(with_it['cached']) > 0.5
  assert float(with_it['moved']) < float(without['moved']) == 1
  assert 'cache on: compiling' in told and 'later TTFT' in told


def test_a_trace(tmp_path):
  path = tmp_path / 'trace.jsonl'
  path.write_text('\n'.join(json.dumps(dict(
      timestamp=1000 * n, input_length=1100, output_length=5,
      hash_ids=[0, n % 4, 100 + n])) for n in range(40)))
  code, _ = shown(out=str(tmp_path / 'out'), **TINY | {
      'lengths': str(path), 'host_gb': '1'})
  assert code == 0
  _, with_it, tiered = rows(tmp_path / 'out')
  assert (tiered['host_gb'], tiered['loaded']) == ('1.0', '0.0')
  assert tiered['cached'] == with_it['cached']
  assert float(with_it['cached']) == pytest.approx(1024 / 1100, rel=0.05)


@pytest.mark.parametrize('options, words', [
    ({'lengths': 'talk'}, '--lengths=.*agent'),
    ({'routes': ['none']}, '--routes'), ({'routes': []}, '--routes'),
    ({'rates': '0'}, '--rates'), ({'target': 1.0}, '--target'),
    ({'host_gb': '-1'}, '--host_gb'),
    ({'placement': 'prefill=1'}, '--placement')])
def test_bad_input_is_named(options, words):
  with pytest.raises(InputError, match=words):
    shown(**TINY | options)


def test_the_rate_that_is_sustained(tmp_path):
  path = tmp_path / 'trace.jsonl'
  path.write_text('\n'.join(json.dumps(dict(
      timestamp=1000 * n, input_length=16 * 512, output_length=5,
      hash_ids=[*(n % 3 * 100 + block for block in range(15)), 1000 + n]))
      for n in range(60)))
  code, told = shown(out=str(tmp_path), **TINY | {
      'lengths': str(path), 'goodput': True, 'rates': '3'})
  assert code == 0
  best = {}
  for cache in ('False', 'True'):
    runs = [(float(row['rate_per_s']), float(row['attained']) >= 0.9)
            for row in rows(tmp_path) if row['cache'] == cache]
    passed = [rate for rate, attains in runs if attains]
    failed = [rate for rate, attains in runs if not attains]
    assert max(passed) < min(failed) <= 1.05 * max(passed)
    best[cache] = max(passed)
    assert f'{best[cache]:.3g}' in told.split('Sustained')[1]
  assert best['True'] > best['False']


@pytest.mark.parametrize('limit', [0.0, 1e9])
def test_a_rate_that_is_not_bracketed_ends(limit):
  def line_at(rate_per_s):
    return types.SimpleNamespace(attained=float(rate_per_s < limit))
  assert len(list(sessions.goodput(line_at, 1.0, 0.9))) == sessions.MOST_RUNS


def test_ctrl_c_keeps_what_is_known(monkeypatch, tmp_path):
  simulate = sessions.simulate

  def once(options, rate_per_s, work, route, cache, host_gb):
    if cache:
      raise KeyboardInterrupt
    return simulate(options, rate_per_s, work, route, cache, host_gb)

  monkeypatch.setattr(sessions, 'simulate', once)
  code, _ = shown(out=str(tmp_path), **TINY)
  assert code == 130 and len(rows(tmp_path)) == 1
