"""What it tells beside the answers: metrics, log, pages."""

import logging
import threading

import httpx
import openai
import pytest

from dsjax.http import telemetry
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Preempt
from experiments.verify import schedules
from tests.common.web import (
  TEXT,
  WAIT_S,
  Running,
  complete,
  metric,
  paced,
  post,
  until,
)


def test_metrics_move(running, client, monkeypatch):
  names = (
      'ttft_seconds_count', 'tpot_seconds_count', 'itl_seconds_count',
      'request_seconds_sum', 'stage_seconds_total', 'requests_ended_total',
      'prompt_tokens_total', 'output_tokens_total', 'migrations_total',
      'kv_moved_bytes_total', 'kv_moved_seconds_total', 'device_steps_total',
      'host_seconds_total', 'prefill_batch_tokens_sum',
      'decode_batch_rows_sum')
  before = [metric(running, name) for name in names]
  server, go = running.service.orchestrator, threading.Event()
  poll = server.poll
  monkeypatch.setattr(server, 'poll', lambda: go.wait(WAIT_S) and poll())
  stream = complete(client, stream=True, max_tokens=200,
                    extra_body={'ignore_eos': True})
  try:
    until(lambda: server.unfinished)  # and no step of it is seen yet
    assert metric(running, 'requests') == 1  # now
    live = httpx.get(running.url + '/live').json()
    assert len(live['flow']) == 1
    assert [i['role'] for i in live['instances']] == ['prefill', 'decode']
  finally:
    go.set()
  list(stream)
  until(lambda: not running.service.streams)
  after = [metric(running, name) for name in names]
  still = [n for n, a, b in zip(names, before, after, strict=True) if a >= b]
  assert not still
  pages = sum(i.pool.num_pages for i in
              running.service.orchestrator.state.instances)
  until(lambda: scheduler.idle(running.service.orchestrator.state))
  assert metric(running, 'pages') == pages  # all of them free or owned


def test_preemptions_and_owners_of_pages_show(running, client):
  metrics = telemetry.Gauges('tiny')
  preempted = 0
  for seed in range(20):
    rules = schedules.random_rules(seed, 20)
    for moved in schedules.wander(rules, 0, seed):
      for event, commands in moved.log:
        metrics.observe(event, commands)
        preempted += sum(isinstance(c, Preempt) for c in commands)
  assert preempted > 0
  counted = f'dsjax_preemptions_total{{model="tiny"}} {preempted}.0'
  assert counted in metrics.text().decode()
  owned = {}

  def look():
    now = telemetry.snapshot(running.service.orchestrator)
    for i, instance in enumerate(now):
      assert sum(instance['pages'].values()) == 64
      assert instance['status'] == 'up'
      for owner, count in instance['pages'].items():
        owned[i, owner] = max(count, owned.get((i, owner), 0))
    return owned[1, 'decoding'] and owned[0, 'prefilled']
  with paced(running, 2) as pace:
    stream = complete(client, stream=True, n=8, max_tokens=200,
                      extra_body={'ignore_eos': True})
    until(look)
    pace.left = None
    for _ in stream:
      look()


def test_the_log_has_ids_and_no_text(running, client, caplog):
  secret = 'Xyzzy'
  with caplog.at_level(logging.INFO):
    said = client.completions.with_raw_response.create(
        model='tiny', prompt=secret, max_tokens=4)
    with pytest.raises(openai.BadRequestError) as error:
      complete(client, prompt=secret, temperature=9, user=secret)
    with pytest.raises(openai.NotFoundError):
      client.completions.create(model=secret, prompt=secret)
  until(lambda: said.headers['x-request-id'] in caplog.text)
  assert f'{error.value.request_id} POST /v1/completions: 400 bad_request' in (
      caplog.text)
  assert '404 not_found' in caplog.text
  assert secret not in caplog.text
  wordy = Running(log_text=True)
  try:
    wordy.await_status('ready')
    with caplog.at_level(logging.INFO):
      post(wordy, '/v1/completions', TEXT | {'prompt': secret})
      until(lambda: secret in caplog.text)
  finally:
    wordy.stop()


def test_health_page_and_placement(running):
  assert httpx.get(running.url + '/health').json() == {'status': 'ready'}
  assert '<title>dsjax' in httpx.get(running.url + '/').text
  placement = httpx.get(running.url + '/placement').json()
  assert placement['mode'] == 'disaggregated'
  assert [i['role'] for i in placement['instances']] == ['prefill', 'decode']
  assert placement['instances'][0]['pages'] == 64
  assert 'paths' in httpx.get(running.url + '/openapi.json').json()
