"""The overload runner, in seconds and on the tiny model: what is done, not how
fast. The figures it aims at are for a quiet machine, see experiments/LOG.md."""

import asyncio
import dataclasses
import io
import json

import pytest
from rich.console import Console

from dsjax import workload
from dsjax.analysis.record import Record
from dsjax.config.placement import Slo
from experiments import load, overload
from experiments.common import cli
from tests.common.results import made_by
from tests.common.web import LIMITS, Running, all_back, metric, post

SLO = Slo(30.0, 30.0)
MOST = 3


def make(times, seed):
  return load.jobs('completion', 'tiny', times, [
      workload.Prompt('Why?', None, None)], (), 40, seed,
      extra={'ignore_eos': True})


def record(arrival_s, ttft_s=0.1, tpot_s=0.1):
  start_s = arrival_s + ttft_s
  return Record(0, arrival_s, 4, 2, [start_s, start_s + tpot_s],
                status='length')


@pytest.fixture(scope='module')
def flooded():
  """(Outcome, the server's metrics, most requests open at a time)."""
  one = Running(limits=dataclasses.replace(LIMITS, max_open=MOST))
  try:
    one.await_status('ready', 'failed')
    opened = []
    submit = one.service.submit

    def watched(*args):
      call = submit(*args)
      opened.append(len(one.service.streams))
      return call
    one.service.submit = watched
    found = asyncio.run(overload.measure(
        one.url, None, make, 2 * MOST, 3, 0.7, 5.0, 1.5, 0.7))
    all_back(one)
    # After it the server answers as before.
    assert post(one, '/v1/completions', {
        'model': 'tiny', 'prompt': 'Why?'}).status_code == 200
    yield found, metric(one, 'requests_rejected_total'), max(opened)
  finally:
    one.stop()


def test_what_is_too_much_is_refused_and_the_rest_served(flooded):
  found, rejected, most_open = flooded
  assert most_open == MOST
  assert not found.other
  flood = found.records['flood']
  assert len(flood) > len(found.accepted()) > 0
  assert all(r.status == 'length' and len(r.token_s) == 40
             for r in found.accepted())
  # Each 429 says when to come back, and the server counted each.
  assert found.with_retry == len(found.refused_s) == (
      len(flood) - len(found.accepted()))
  assert rejected == sum(r.reason == 'HTTP 429' for records in
                         found.records.values() for r in records)
  assert found.capacity_per_s > 0 and len(found.records['unloaded']) == 3
  assert {r.status for r in found.records['after']} <= {'length', 'rejected'}


def test_the_table_the_verdict_and_the_files(flooded, tmp_path):
  found, *_ = flooded
  out = io.StringIO()
  Console(file=out, width=150).print(overload.table(found, SLO))
  assert '100 % ' in out.getvalue()
  assert f'{len(found.refused_s)} were sent away with 429' in (
      overload.verdict(found, SLO))
  overload.save(found, SLO, tmp_path, 'title', cli.options(overload.FLAGS),
                str(load.PROMPTS))
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['attained'] == summary['accepted'] == len(found.accepted())
  made = made_by(tmp_path)
  assert made['options']['factor'] == 3.0 and 'prompts.jsonl' in made['data']
  lines = (tmp_path / 'records.jsonl').read_text().splitlines()
  assert len(lines) == sum(map(len, found.records.values()))
  assert (tmp_path / 'report.png').stat().st_size > 10_000


def test_recovery_is_from_when_all_are_fast_again():
  unloaded = [record(0.0), record(1.0, 0.2, 0.1)]
  slow, refused = record(0.0, 0.3), Record(0, 0.5, 4, 2)
  def recovery(*after):
    return overload.recovery_s(unloaded, after)
  assert recovery(record(0.2), record(0.9)) == 0.2
  assert recovery(slow, refused, record(1.0, 0.24), record(2.0)) == 1.0
  assert recovery(record(0.0), record(1.0, tpot_s=0.2), record(2.0)) == 2.0
  assert recovery(record(0.0), record(1.0, 0.3)) is None
  assert recovery(refused) is None
