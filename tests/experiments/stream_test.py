"""The second token of long prompts with streamed KV and without: the runner."""

import csv

import pytest
from rich.console import Console

import dsjax
from dsjax.config.checks import InputError
from experiments import stream
from experiments.common import cli, terminal
from tests.common import serving
from tests.common.fake_engine import FakeEngine
from tests.common.results import check_written


def shown(**options):
  console = Console(record=True, width=100)
  code = stream.run(cli.options(stream.FLAGS, **options), console)
  return code, console.export_text()


def rows(path):
  with open(path / 'stream.csv', newline='') as file:
    return list(csv.DictReader(file))


def test_the_gap_is_the_last_chunk_and_a_step(tmp_path):
  code, told = shown(out=str(tmp_path), prompt_lens='100,8192', requests=3,
                     across=True)
  assert code == 0
  short, short_too, whole, streamed = rows(tmp_path)
  assert short | {'stream': 'True'} == short_too  # it has one chunk
  for row in (short, whole, streamed):
    assert float(row['gap_p99_s']) == pytest.approx(
        float(row['last_s']), rel=0.01)  # whole pages
  assert float(streamed['gap_s']) < 0.5 * float(whole['gap_s'])
  assert streamed['ttft_s'] == whole['ttft_s']
  assert streamed['moved'] == whole['moved'] == '1.0'
  check_written(told, tmp_path)
  assert max(len(line) for line in told.splitlines()
             if 'Written' not in line) <= 80


@pytest.mark.parametrize('given', [{}, {'model': 'mine', 'prompt_lens': '40',
                                        'requests': 2}])
def test_a_served_model(given, tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(dsjax, 'load', lambda name: (
      asked.append(name), serving.MODEL)[1])
  serve = dsjax.serve
  monkeypatch.setattr(dsjax, 'serve', lambda *args: serve(
      *args, make_engine=FakeEngine))
  monkeypatch.setattr(terminal, 'FIRST_S', 0)
  monkeypatch.setitem(stream.REAL, 'prompt_lens', '20,50')
  code, told = shown(real=True, prefill_tokens=16, answer=3,
                     out=str(tmp_path), **given)
  assert code == 0
  assert asked == [given.get('model', 'smollm2-135m-instruct')]
  lines = rows(tmp_path)
  assert [row['tokens'] for row in lines[::2]] == (
      ['40'] if given else ['20', '50'])
  for whole, streamed in zip(lines[::2], lines[1::2], strict=True):
    assert (whole['stream'], streamed['stream']) == ('False', 'True')
    assert whole['moved'] == streamed['moved'] == '1.0'
  words = ' '.join(told.split())
  assert f'{lines[0]["tokens"]} tokens: compiling two servers' in words
  assert f'0 of {given.get("requests", 6) + 1} prompts served' in words


@pytest.mark.parametrize('options, words', [
    ({'prompt_lens': '0'}, '--prompt_lens'),
    ({'prompt_lens': '1.5'}, '--prompt_lens'),
    ({'placement': 'colocated=1x1'}, '--placement'),
    ({'real': True, 'rate': 1.0}, '--rate')])
def test_bad_input_is_named(options, words):
  with pytest.raises(InputError, match=words):
    shown(**{'prompt_lens': '100', 'requests': 1} | options)
