"""What Prometheus reads, while requests run; what the log tells."""

import logging
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsjax.http.service import Refused, Service
from tests.common.web import Running, complete, metric, paced, until


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


def test_the_log_tells_how_far_it_is_and_when_it_is_ready(caplog):
  def make(report):
    report(1, 3, 'a step')
    raise MemoryError
  with caplog.at_level(logging.INFO, 'dsjax'):
    broken = Running(make)
    try:
      broken.await_status('failed')
      assert broken.service.error == 'MemoryError'
    finally:
      broken.stop()
    assert '1 of 3 steps compiled, a step' in caplog.text
    sound = Running()
    try:
      sound.await_status('ready')
      until(lambda: 'ready' in [r.message for r in caplog.records])
    finally:
      sound.stop()


def test_there_are_words_before_anything_is_compiled():
  service = Service(None)
  with pytest.raises(Refused, match='the server is starting: loading the m'):
    service.check_open()
