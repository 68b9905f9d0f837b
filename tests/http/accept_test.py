"""What a client takes, and what the server has for it (RFC 9110)."""

import httpx
import pytest

from tests.common.web import CHAT, post


@pytest.mark.parametrize('accept, status', [
    ('', 200), ('*/*', 200), ('application/json', 200),
    ('text/event-stream', 200), ('Application/*;q=0.1', 200),
    ('text/html, */*;q=0.1', 200), ('image/png, application/json', 200),
    ('text/html', 406), ('application/json;q=0', 406),
    ('application/json;q=0.000, text/plain', 406),
    ('*/*, application/*;q=0, text/*;q=0', 406), ('nonsense', 406)])
def test_what_is_not_accepted_is_not_sent(running, accept, status):
  answer = post(running, '/v1/chat/completions', CHAT,
                headers={'Accept': accept})
  assert answer.status_code == status
  if status == 406:
    assert 'application/json' in answer.json()['error']['message']


@pytest.mark.parametrize('path, accept, status', [
    ('/', 'text/html,application/xhtml+xml', 200), ('/', 'text/plain', 406),
    ('/metrics', 'application/openmetrics-text;q=0.5,text/plain;q=0.2', 200),
    ('/metrics', 'application/json', 406), ('/nothing', 'image/png', 404)])
def test_every_path_has_a_type(running, path, accept, status):
  assert httpx.get(running.url + path, headers={'Accept': accept}
                   ).status_code == status
