"""The examples run as a user runs them, on the tiny model."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'examples'
ENV = os.environ | {'PYTHONPATH': str(ROOT)}

pytestmark = pytest.mark.usefixtures('no_hang')


def start(name, folder, *args):
  return subprocess.Popen(
      [sys.executable, FOLDER / f'{name}.py', *args], cwd=folder, env=ENV,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(name, folder):
  process = start(name, folder)
  out, error = process.communicate()
  assert process.returncode == 0, error
  return out


def ready(url):
  try:
    with urllib.request.urlopen(f'{url}/health', timeout=60) as answer:
      return json.load(answer)['status'] == 'ready'
  except urllib.error.HTTPError as error:  # 503 while it starts
    assert json.load(error)['status'] == 'starting'
    return False


def test_each_is_short_and_touches_no_path():
  for path in FOLDER.glob('*.py'):
    text = path.read_text()
    assert 25 <= text.count('\n') <= 50, path.name
    assert 'sys.path' not in text, path.name
    assert not re.search(r'^\s*(from|import) (experiments|configs)', text,
                         re.MULTILINE), path.name


def test_serve_offline(tmp_path):
  out = said('serve_offline', tmp_path)
  assert out.count(' -> ') == 4 and 'streamed: ' in out
  assert out.count('instances [0, 1], KV of ') == 4


@pytest.mark.slow
def test_serve_http(tmp_path):
  server = start('serve_http', tmp_path, 'tiny', '0')
  url = server.stdout.readline().strip()
  try:
    while not ready(url):  # no_hang bounds it
      time.sleep(0.1)
    body = {'model': 'tiny', 'max_tokens': 5, 'ignore_eos': True,
            'messages': [{'role': 'user', 'content': 'Hi!'}]}
    with urllib.request.urlopen(urllib.request.Request(
        f'{url}/v1/chat/completions', json.dumps(body).encode(),
        {'Content-Type': 'application/json'}), timeout=60) as answer:
      assert json.load(answer)['usage']['completion_tokens'] == 5
  finally:
    server.send_signal(signal.SIGINT)
    _, error = server.communicate()
  assert server.returncode == 0, error


@pytest.mark.slow
def test_policy_of_ones_own(tmp_path):
  out = said('policy_of_ones_own', tmp_path)
  assert out.count('met both objectives') == 2
  assert out.count('8 tokens of ') == 2


@pytest.mark.slow
def test_placement_from_measurements(tmp_path):
  out = said('placement_from_measurements', tmp_path)
  assert out.count('met both objectives') == 3
  assert 'requests/s a device' in out and 'per device' in out
