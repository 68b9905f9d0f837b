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
  server = Running(limits=dataclasses.replace(LIMITS, max_open=MOST))
  try:
    server.await_status('ready', 'failed')
    opened = []
    submit = server.service.submit

    def watched(*args):
      call = submit(*args)
      opened.append(len(server.service.streams))
      return call
    server.service.submit = watched
    outcome = asyncio.run(overload.measure(
        server.url, None, make, 2 * MOST, 3, 0.7, 5.0, 1.5, 0.7))
    all_back(server)
    # After it the server answers as before.
    assert post(server, '/v1/completions', {
        'model': 'tiny', 'prompt': 'Why?'}).status_code == 200
    yield outcome, metric(server, 'requests_rejected_total'), max(opened)
  finally:
    server.stop()


@pytest.mark.slow
def test_what_is_too_much_is_refused_and_the_rest_served(flooded):
  outcome, rejected, most_open = flooded
  assert most_open == MOST
  assert not outcome.other
  flood = outcome.records['flood']
  assert len(flood) > len(outcome.accepted()) > 0
  assert all(r.status == 'length' and len(r.token_s) == 40
             for r in outcome.accepted())
  # Each 429 says when to come back, and the server counted each.
  assert outcome.with_retry == len(outcome.refused_s) == (
      len(flood) - len(outcome.accepted()))
  assert rejected == sum(r.reason == 'HTTP 429' for records in
                         outcome.records.values() for r in records)
  assert outcome.capacity_per_s > 0 and len(outcome.records['unloaded']) == 3
  assert {r.status for r in outcome.records['after']} <= {'length', 'rejected'}


@pytest.mark.slow
def test_the_table_the_verdict_and_the_files(flooded, tmp_path):
  outcome, *_ = flooded
  out = io.StringIO()
  Console(file=out, width=150).print(overload.table(outcome, SLO))
  assert '100 % ' in out.getvalue()
  assert f'{len(outcome.refused_s)} were sent away with 429' in (
      overload.verdict(outcome, SLO))
  overload.save(outcome, SLO, tmp_path, 'title', cli.options(overload.FLAGS),
                str(load.PROMPTS))
  summary = json.loads((tmp_path / 'summary.json').read_text())
  assert summary['attained'] == summary['accepted'] == len(outcome.accepted())
  made = made_by(tmp_path)
  assert made['options']['factor'] == 3.0 and 'prompts.jsonl' in made['data']
  lines = (tmp_path / 'records.jsonl').read_text().splitlines()
  assert len(lines) == sum(map(len, outcome.records.values()))
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
