"""One server a module, of fake engines, a byte a token, and OpenAI's client.

What needs a device is in device_test.py. At a module's end everything must
have come back: pages, requests, threads.
"""

import openai
import pytest

from tests.common.web import WAIT_S, Running, all_back


@pytest.fixture(scope='module')
def running():
  server = Running()
  try:
    server.await_status('ready', 'failed')
    assert server.service.status == 'ready', server.service.error
    yield server
    all_back(server)
  finally:
    server.stop()


@pytest.fixture(scope='module')
def client(running):
  with openai.OpenAI(base_url=running.url + '/v1', api_key='-',
                     max_retries=0, timeout=WAIT_S) as client:
    yield client
