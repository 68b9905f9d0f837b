"""The live page in a real browser, while the tiny model serves."""

import json
import threading
import time

import httpx
import pytest

from dsjax.http import telemetry
from dsjax.scheduling import lifecycle
from experiments.common import terminal
from tests.common import browser
from tests.common.web import WAIT_S, Running, post, until

# What the page shows now.
LOOK = '''JSON.stringify({
  status: document.getElementById('status').textContent,
  model: document.getElementById('model').textContent,
  boxes: [...document.querySelectorAll('#floor .box b')].map(
      e => e.textContent),
  dots: [...document.querySelectorAll('.dot')].map(
      e => [e.dataset.id, e.dataset.stage, e.style.transform]),
  ttft: document.getElementById('ttft').textContent,
  tpot: document.getElementById('tpot').textContent,
  points: document.querySelectorAll('#ttft_plot circle').length,
  pages: [...document.querySelectorAll('#floor .box .right')].map(
      e => e.textContent)})'''


# Before the page is there, it has no such element.
STATUS = 'document.getElementById("status")?.textContent ?? ""'


@pytest.fixture(scope='module')
def chromium():
  path = browser.find()
  if path is None:
    pytest.skip('no Chromium here (Debian: apt-get install chromium)')
  return path


@pytest.fixture
def running():
  server = Running()
  try:
    server.await_status('ready', 'failed')
    yield server
  finally:
    server.stop()


def test_the_page_shows_requests_that_move(chromium, running, tmp_path):
  stop = threading.Event()

  def ask():
    while not stop.is_set():
      post(running, '/v1/completions', {
          'model': 'tiny', 'prompt': 'Why? ' * 20, 'max_tokens': 120,
          'ignore_eos': True, 'n': 6})
  threads = [threading.Thread(target=ask) for _ in range(2)]
  with browser.Browser(chromium, tmp_path) as page:
    page.open(running.url)

    def look():
      return json.loads(page.value(LOOK))
    until(lambda: page.value(
        'document.querySelectorAll("#floor .box").length'))
    idle = look()
    assert idle['ttft'] == 'none yet' and not idle['dots']
    for thread in threads:
      thread.start()
    stages, places, points, shown = {}, {}, 0, idle
    try:
      end_s = time.monotonic() + WAIT_S
      while time.monotonic() < end_s and not (
          points and any({'queued', 'decoding'} <= s or
                         {'prefilled', 'decoding'} <= s
                         for s in stages.values())):
        shown = look()
        points = max(points, shown['points'])
        for id, stage, place in shown['dots']:
          stages.setdefault(id, set()).add(stage)
          places.setdefault(id, set()).add(place)
        time.sleep(0.02)
      page.screenshot(tmp_path / 'live.png')
    finally:
      stop.set()
      for thread in threads:
        thread.join(WAIT_S)
    assert shown['model'] == 'tiny' and shown['status'].startswith('ready')
    assert shown['boxes'] == ['prefill 0', 'decode 1']
    assert all('of 64 pages' in text for text in shown['pages'])
    moved = [id for id, seen in stages.items() if 'decoding' in seen
             and seen & {'queued', 'prefilled'}]
    assert moved and all(len(places[id]) > 1 for id in moved)
    assert points and 'objective' in shown['ttft'] + look()['ttft']
    assert not page.errors
    assert (tmp_path / 'live.png').stat().st_size > 10_000
    # They leave the page when they end.
    until(lambda: not look()['dots'])


def test_it_says_what_is_wrong(chromium, tmp_path):
  server = Running(key='secret')
  try:
    with browser.Browser(chromium, tmp_path) as page:
      page.open(server.url)
      until(lambda: 'needs the key' in page.value(STATUS))
      server.await_status('ready')
      page.open('about:blank')
      page.open(server.url + '/#key=secret')
      until(lambda: 'ready' in page.value(STATUS))
      assert httpx.get(server.url + '/live').status_code == 401
      server.stop()
      until(lambda: 'no answer' in page.value(STATUS))
  finally:
    server.stop()


def test_every_stage_of_a_life_is_shown_or_left_out():
  stages = set(lifecycle.STAGES) - {'absent'}
  shown = {terminal._STAGE.get(stage, stage) for stage in stages}
  assert shown <= {None, *terminal.STAGES}
  assert {telemetry._SHOWN.get(stage, stage) for stage in stages} <= set(
      telemetry.STAGES)
