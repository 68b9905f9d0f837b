"""Offers of one process to itself: what is taken back, and where one pulls."""

import gc
import types
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dsjax.runtime.cluster import messages
from dsjax.runtime.cluster.exchange import Exchange

pytestmark = pytest.mark.usefixtures('no_hang')


@pytest.fixture
def source():
  """An Exchange whose engine has devices, and no pages."""
  return Exchange(types.SimpleNamespace(devices=jax.devices()[:1]))


def offer(source, uuid):
  """Offers what a hand-off would; gives a weak reference to it."""
  array = jax.device_put(np.full(8, uuid, np.float32), jax.devices()[0])
  source.offers[uuid] = source.server
  source.server.await_pull(uuid, [array])
  return weakref.ref(array)


def pull(address, uuid):
  """What another instance would get."""
  server = Exchange(types.SimpleNamespace(devices=jax.devices()[:1])).server
  like = jax.ShapeDtypeStruct((8,), np.float32, sharding=(
      SingleDeviceSharding(jax.devices()[0])))
  return np.array(jax.device_get(server.connect(address).pull(uuid, [like]))[0])


def told(source):
  """What it tells next."""
  heard = []
  source.poll(heard.append)
  return heard


def test_what_was_pulled_leaves_the_server_as_it_is(source):
  offer(source, 5)
  address = source.address
  assert (pull(address, 5) == 5).all()
  source.withdraw(messages.Withdraw(5, True))
  assert source.address == address and not source.offers
  assert not told(source) and not source.busy


def test_what_was_not_pulled_ends_with_its_server(source):
  """A puller that died may hold all its buffers: nothing would come again."""
  given_up, other = offer(source, 5), source.address
  offer(source, 6)
  source.withdraw(messages.Withdraw(5, False))
  assert source.busy and source.address != other
  assert told(source) == [messages.Moved(source.address)]
  assert not source.busy
  offer(source, 7)
  assert (pull(source.address, 7) == 7).all()
  assert (pull(other, 6) == 6).all()  # it was offered before, and goes on
  source.withdraw(messages.Withdraw(6, True))
  gc.collect()
  assert given_up() is None  # nothing is kept for the one that was lost


def test_each_withdrawal_is_answered_by_where_the_next_offer_is(source):
  """Also that of an offer which never came to be; and where another follows
  before anything is told, what is offered in between is still at the first:
  the server counts them."""
  source.withdraw(messages.Withdraw(5, False))
  offer(source, 7)
  source.withdraw(messages.Withdraw(6, False))
  first, second = told(source)
  assert second == messages.Moved(source.address) != first
  assert (pull(first.address, 7) == 7).all()
