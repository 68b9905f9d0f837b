"""What Prometheus reads, while requests run; what the log tells."""

import logging
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsjax.http import telemetry
from dsjax.http.service import Refused, Service
from dsjax.scheduling.events import (
  Cancelled,
  Finish,
  Load,
  Loaded,
  LoadFailed,
  Migrate,
  Migrated,
  Tick,
)
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
  values = samples(running)
  assert values and all(labels['model'] == 'tiny' for _, labels, _ in values)
  build, = [labels for name, labels, _ in values if name == 'dsjax_build_info']
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


def test_kept_kv_that_is_copied_counts_once_it_is_there():
  gauges = telemetry.Gauges('tiny')

  def hits(event, *commands):
    gauges.observe(event, commands)
    return sum(s.value for f in text_string_to_metric_families(
        gauges.text().decode()) for s in f.samples
        if s.name == 'dsjax_prefix_hit_tokens_total')

  load = Load(5, 1, 0, (3, 4), (7, 8), 8, hit=4)
  again = load._replace(epoch=2)
  fetch = Migrate(6, 1, 1, (0,), 0, (9,), 4, hit=8, kept=True)
  assert hits(Tick(0.0), load, fetch) == 4 + 8  # in the instance's own memory
  assert hits(LoadFailed(1.0, 5, 1)) == 12
  assert hits(Tick(0.0), again) == 12 + 4
  assert hits(Loaded(2.0, 5, 1)) == 16  # late, of the one that failed
  assert hits(Migrated(2.0, 6, 1)) == 16 + 4
  assert hits(Migrated(2.0, 6, 1)) == 20
  assert hits(Cancelled(3.0, 5), Finish(5, 'cancelled')) == 20
  assert hits(Loaded(4.0, 5, 2)) == 20
  assert hits(Tick(4.0), load) + 8 == hits(Loaded(5.0, 5, 1)) == 32
  assert not gauges._coming
