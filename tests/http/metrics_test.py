"""What Prometheus reads, while requests run; and the dashboard that draws it."""

import json
import logging
import pathlib
import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.common.web import TEXT, Running, complete, metric, paced, post, until

BOARD = pathlib.Path(__file__).parents[2] / 'docs' / 'grafana.json'


def samples(running):
  """Every sample of the metrics: (name, labels, value)."""
  text = httpx.get(running.url + '/metrics').text
  return [(s.name, s.labels, s.value)
          for family in text_string_to_metric_families(text)
          for s in family.samples]


def test_tokens_count_as_they_come(running, client):
  names = ('ttft_seconds_count', 'prompt_tokens_total', 'output_tokens_total',
           'itl_seconds_count', 'requests_ended_total')
  before = [metric(running, name) for name in names]

  def grown():
    return [metric(running, name) - old for name, old in zip(
        names, before, strict=True)]
  with paced(running, 0) as pace:
    stream = complete(client, stream=True, max_tokens=8,
                      extra_body={'ignore_eos': True})
    until(lambda: grown()[0])
    assert grown() == [1, 4, 1, 0, 0]  # the first token, of the prefill
    pace.left = 2
    until(lambda: grown()[2] >= 3)
    assert grown() == [1, 4, 3, 2, 0]
    pace.left = None
    list(stream)
  until(lambda: grown()[4])
  assert grown() == [1, 4, 8, 7, 1]
  assert not running.metrics._last_s


def test_every_sample_names_the_model(running, client):
  complete(client)
  found = samples(running)
  assert found and all(labels['model'] == 'tiny' for _, labels, _ in found)
  build, = [labels for name, labels, _ in found if name == 'dsjax_build_info']
  assert build['mode'] == 'disaggregated' and build['platform'] == 'cpu'
  assert re.match(r'\d+\.\d+', build['version']) and build['jax']


def test_the_dashboard_draws_what_there_is(running, client):
  complete(client)
  post(running, '/v1/completions', {})  # is rejected
  until(lambda: metric(running, 'requests_ended_total'))
  labels_of = {}
  for name, labels, _ in samples(running):
    labels_of.setdefault(name, set()).update(labels)
  board = json.loads(BOARD.read_text())
  exprs = [target['expr'] for panel in board['panels']
           for target in panel['targets']]
  drawn = set()
  for expr in exprs:
    assert expr.count('(') == expr.count(')')
    parts = re.findall(r'(?:by \(([\w, ]+)\) \()?(?:rate\()?(dsjax_\w+)\{(\w+)=',
                       expr)
    assert parts, expr
    for by, name, label in parts:
      wanted = {label, *filter(None, by.split(', '))}
      assert name in labels_of and wanted <= labels_of[name], (expr, name)
      drawn.add(name)
  there = {re.sub('_(bucket|sum|count|created)$', '', n) for n in labels_of}
  assert there == {re.sub('_(bucket|sum|count)$', '', n) for n in drawn}
  legends = {label for panel in board['panels'] for target in panel['targets']
             for label in re.findall(r'{{(\w+)}}', target['legendFormat'])}
  assert legends <= set().union(*labels_of.values())


def test_the_log_tells_how_far_it_is_and_when_it_is_ready(caplog):
  def make(report):
    report(1, 3, 'a step')
    raise MemoryError
  with caplog.at_level(logging.INFO, 'dsjax'):
    one = Running(make)
    try:
      one.await_status('failed')
      answer = post(one, '/v1/completions', TEXT)
      assert answer.status_code == 503
      assert answer.json()['error']['message'] == (
          'the server has failed: MemoryError')
    finally:
      one.stop()
    assert '1 of 3 steps compiled, a step' in caplog.text
    two = Running()
    try:
      assert two.service.progress  # words before anything is compiled
      two.await_status('ready')
      until(lambda: 'ready' in [r.message for r in caplog.records])
    finally:
      two.stop()
