"""The bench beside AISimulate, with a stand-in for it. No times."""

import json
import sys

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from experiments.bench import aisimulate, simulator
from experiments.common import cli

# Answers with what it was given: prompts' tokens and how many lines.
STAND_IN = '''
import json, pathlib, sys
assert sys.argv[1] == 'predict'
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert flags['--format'] == 'json' and flags['--output-dir']
config = json.loads(pathlib.Path(flags['--config']).read_text())
path, = config['traffic']['source']['paths']
lines = list(map(json.loads, pathlib.Path(path).read_text().splitlines()))
assert config['traffic']['source']['format'] == 'mooncake'
print(json.dumps({'median_ttft_ms': sum(x['input_length'] for x in lines),
                  'median_tpot_ms': len(lines)}))
'''
CASE = simulator.CASES['1P+1D']
SENT = simulator.requests(CASE, 30)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
  """stand_in(source) puts a package of this main program on the path."""
  def write(source=STAND_IN):
    folder = tmp_path / 'aisimulate'
    folder.mkdir()
    (folder / '__init__.py').write_text('')
    (folder / '__main__.py').write_text(source)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  return write


def test_a_trace_has_every_request_and_no_block_twice():
  lines = [json.loads(line) for line in aisimulate.lines(SENT)]
  assert [(line['input_length'], line['output_length']) for line in lines] == [
      (len(r.prompt), r.sampling.max_tokens) for r in SENT]
  for line, request in zip(lines, SENT, strict=True):
    assert abs(line['timestamp'] - 1e3 * request.arrival_s) <= 0.5
    blocks = len(line['hash_ids'])
    assert 0 <= blocks * aisimulate.BLOCK - line['input_length'] < (
        aisimulate.BLOCK)
  ids = [id for line in lines for id in line['hash_ids']]
  assert len(set(ids)) == len(ids) and max(line['input_length']
                                           for line in lines) > 1


def test_it_is_given_the_same_requests(stand_in):
  stand_in()
  aisimulate.check(sys.executable, len(SENT))
  took_s, told = aisimulate.theirs(sys.executable, SENT)
  assert took_s > 0
  assert told == {'median_ttft_ms': sum(len(r.prompt) for r in SENT),
                  'median_tpot_ms': len(SENT)}


def test_its_rate_is_beyond_its_start(monkeypatch):
  told = {'median_ttft_ms': 7.5, 'median_tpot_ms': 6.25}
  monkeypatch.setattr(aisimulate, 'theirs', lambda python, sent: (
      3.0 + len(sent) / 10, told))
  summary = aisimulate.ours(CASE.config(), SENT)[1]
  assert len(summary.ttft_s) and summary.counts['length'] == len(SENT)
  monkeypatch.setattr(aisimulate, 'ours', lambda config, sent: (1.0, summary))
  words = aisimulate.compare('python', CASE.config(), SENT)
  # 27 requests in 2.7 s beyond the start, ours 30 in a second.
  assert 'AISimulate 10 requests a CPU second' in words
  assert 'ours 30: 3.0 times' in words and '7.5 and 6.25' in words
  monkeypatch.setattr(aisimulate, 'theirs', lambda python, sent: (3.0, told))
  assert 'more --requests' in aisimulate.compare(
      'python', CASE.config(), SENT)


@pytest.mark.parametrize('source, message', [
    ('import sys; sys.exit("no such table")', 'code 1: no such table'),
    ('print("Loading")', 'AISimulate: is not JSON')])
def test_a_run_that_fails_is_one_clear_error(stand_in, source, message):
  stand_in(source)
  with pytest.raises(InputError, match=message):
    aisimulate.theirs(sys.executable, SENT)


@pytest.mark.parametrize('python, requests, field', [
    ('/no/such/python', 20, '--aisimulate='),
    (sys.executable, 20, '--aisimulate=.*make aisimulate'),
    ('stand-in', 9, '--requests=9')])
def test_what_is_missing_is_told_before_anything_is_measured(
    stand_in, monkeypatch, python, requests, field):
  if python == 'stand-in':
    stand_in()
    python = sys.executable
  monkeypatch.setattr(simulator, 'measure', lambda *_: pytest.fail('measured'))
  with pytest.raises(InputError, match=field):
    simulator.run(cli.options(simulator.FLAGS, requests=requests,
                              aisimulate=python), Console(quiet=True))
