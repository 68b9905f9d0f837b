"""A server over fake engines, shared by the tests of a file."""

import pytest

from tests.common.serving import drain, fake_server_of


@pytest.fixture(scope='module')
def shared():
  """One colocated server for tests that leave it as they found it."""
  with fake_server_of('colocated') as server:
    yield server


@pytest.fixture
def server(shared):
  yield shared
  drain(shared)
  left = sorted(shared.requests)
  shared.requests.clear()  # so that one failure does not bring on others
  assert not left
