"""The HTTP bench on the tiny model: that it measures what it says. No times."""

import functools
import io
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from experiments.bench import http_cost, sse_client
from experiments.common import cli
from tests.common.fake_engine import FakeEngine
from tests.common.web import LIMITS, MODEL, make

STREAMS, TOKENS = 3, 24


@pytest.fixture(scope='module')
def rounds():
  """(a bench of little steps, two rounds of it, [what was asked for, ...])."""
  server, asked = make(lambda *_: None), []
  enqueue = server._asked.enqueue

  def noted(request, *args, **kwargs):
    asked.append((request.prompt, request.sampling))
    return enqueue(request, *args, **kwargs)
  server._asked.enqueue = noted
  bench = http_cost.Bench(server, [MODEL.tokenizer.encode(f'Why {i}?')
                                   for i in range(STREAMS)], TOKENS, 0.01,
                          LIMITS)
  client = subprocess.Popen(
      [sys.executable, pathlib.Path(sse_client.__file__)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  try:
    measured = list(http_cost.rounds(bench, 2, client))
  finally:
    client.stdin.close()
    client.wait()
  yield bench, measured, asked
  assert not bench.server.records and not bench.server.busy
  bench.server.close()


@pytest.mark.slow
def test_every_way_serves_the_same_streams(rounds):
  bench, measured, asked = rounds
  want = {(tuple(ids), bench._sampling(i))
          for i, ids in enumerate(bench.prompts)}
  assert {(tuple(ids), sampling) for ids, sampling in asked} == want
  assert len(asked) == 2 * len(http_cost.WAYS) * STREAMS
  for costs in measured:
    assert set(costs) == set(http_cost.WAYS)
    for ttft_s, tpot_s, cpu_s in costs.values():
      assert 0 < ttft_s < 60 and 0 < tpot_s < 60
      assert all(0 < s < 60 for s in cpu_s.values())
    assert set(costs['HTTP'].cpu_s) == {'orchestrator', 'event loop', 'client'}


@pytest.mark.slow
def test_the_table_tells_what_http_adds(rounds):
  _, measured, _ = rounds
  made, added = http_cost.table(measured, STREAMS, TOKENS)
  out = io.StringIO()
  Console(file=out, width=150).print(made)
  assert 'CPU us a token, client' in out.getvalue()
  alone = http_cost.Cost(0.1, 0.01, {'orchestrator': 1.0})
  twice = [dict.fromkeys(http_cost.WAYS, alone) | {
      'HTTP': http_cost.Cost(0.103 + 0.001 * i, 0.0102, {'client': 0.1})}
           for i in range(3)]
  _, added = http_cost.table(twice, STREAMS, TOKENS)
  assert added == {'ttft_s': pytest.approx(0.004),
                   'tpot_share': pytest.approx(0.02),
                   'socket_share': pytest.approx(0.0)}


def test_measures_are_means_and_a_missing_answer_is_an_error():
  times = [[1.0, 1.5, 1.7, 2.0], [2.0, 2.1, 2.9]]  # 2 events may be 6 tokens
  assert http_cost.measures(times, 6) == (
      pytest.approx(0.3), pytest.approx((0.5 / 5 + 0.8 / 5) / 2))
  with pytest.raises(InputError, match='answers'):
    http_cost.measures([[1.0, 1.5, 1.6], [1.0]], 6)


def test_ctrl_c_keeps_the_rounds_there_are(monkeypatch):
  alone = http_cost.Cost(0.1, 0.01, {'orchestrator': 1.0})

  def some(*_):
    yield dict.fromkeys(http_cost.WAYS, alone)
    raise KeyboardInterrupt
  monkeypatch.setattr(http_cost, 'rounds', some)
  monkeypatch.setattr(http_cost.dsjax, 'serve', functools.partial(
      http_cost.dsjax.serve, make_engine=FakeEngine))
  console = Console(record=True, width=150)
  assert http_cost.run(cli.options(
      http_cost.FLAGS, config='tiny', streams=2), console) == 130
  told = console.export_text()
  assert '2 streams of 96 tokens, 1 rounds' in told and 'HTTP adds' in told
