"""Offers of one process to itself: what is taken back, and where one pulls."""

import dataclasses
import gc
import os
import time
import types
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from dsjax.runtime.cluster import messages, offered, parcels, shared_memory
from dsjax.runtime.cluster.exchange import Exchange
from tests.runtime import migration_test as pages

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


# --- pages --------------------------------------------------------------------


def introduced(plans, maps=True, **more):
  """(source, what it holds, target): Exchanges of two engines that know each
  other; maps: as of one host."""
  limits = dataclasses.replace(pages.LIMITS, **more)
  source, sent = pages.engine(plans[0], 0, 1, limits, 'prefill')
  target, _ = pages.engine(plans[1], 4, 2, limits, 'decode')
  ends = Exchange(source), Exchange(target)
  known = [{'0': {'capacity': dataclasses.asdict(end.engine.capacity),
                  'tp': plan[0], 'by_kernel': end.engine.by_kernel,
                  'memory': end.memory if maps else ''}}
           for end, plan in zip(ends, plans, strict=True)]
  with jax.transfer_guard('disallow'):
    ends[0].warm(messages.Warm({}, known[1]), pages.CONFIG, limits)
    ends[1].warm(messages.Warm(known[0], {}), pages.CONFIG, limits)
  return ends[0], sent, ends[1]


def hand_off(source, target, command, uuid):
  """(what the source told, what the target did) of a hand-off, with checksums;
  it is over."""
  told = []
  with jax.transfer_guard('disallow'):
    source.offer(messages.Offer(uuid, 0, command, True))
    asked = messages.Pull(uuid, 0, source.address, command, True)
    maps = source._to[0].maps
    if not maps:
      target.pull(asked)
    until_s = time.monotonic() + 60
    while len(told) < 2:
      if source.poll(told.append) and maps:
        target.pull(asked._replace(where=told[0].where))
      target.poll(told.append)
      assert time.monotonic() < until_s, 'it does not come'
    source.withdraw(messages.Withdraw(uuid, True))
    while target.busy:
      target.poll(told.append)
      assert time.monotonic() < until_s, 'it is not read'
  return told


@pytest.mark.parametrize('plans, more, most', [
    pytest.param(((1, 1), (1, 1)), {}, 0, marks=pages.needed),
    pytest.param(((1, 1), (1, 1)), {'maps': False}, 1, marks=pages.needed),
    (((1, 1), (1, 1)), dict(attention='xla'), 4),  # batches of its 7 pages
    (((1, 1), (1, 1)), dict(decode_page_size=8), 5),
    (((1, 1), (1, 1)), dict(kv_dtype='int8'), 8),  # numbers and scales
    (((2, 1), (3, 1)), {}, 12), (((1, 2), (1, 3)), {}, 16)])
def test_pages_arrive_in_few_arrays(monkeypatch, plans, more, most):
  """One where a kernel copies them, and none where the target reads the
  source's memory; else one a batch, piece and dtype."""
  source, sent, target = introduced(plans, **more)
  pulled, had = [], pages.contents(target.engine)
  real, c = offered.like, pages.command((5, 0, 3, 1, 7, 8, 2),
                                        (1, 0, 3, 5, 8, 2, 4), 26)
  if 'decode_page_size' in more:
    c = pages.command(c.source_pages, (1, 0, 3, 5), 26)
  monkeypatch.setattr(offered, 'like', lambda *args: (
      pulled.append(real(*args)) or pulled[-1]))
  for uuid in (1, 2):
    read, landed = hand_off(source, target, c, uuid)
    assert read.kind == landed.kind
    assert read.checksum == landed.checksum != 0
    assert (most > 0) <= sum(map(len, pulled.pop() if pulled else [])) <= most
  if 'kv_dtype' not in more:
    pages.check_arrived(c, sent, target.engine, had)
  assert not source.busy and not target.busy and not source.offers


@pages.needed
def test_memory_is_lent_until_it_was_pulled():
  source, _, target = introduced(((1, 1), (1, 1)), maps=False)
  landings, c = source.engine.landings, pages.command((5, 0), (1, 2), 8)
  source.offer(messages.Offer(1, 0, c, False))
  (first, _), = source.lent.values()
  source.offer(messages.Offer(2, 0, c, False))
  assert source.lent[2][0] is not first  # it is not read yet
  source.withdraw(messages.Withdraw(2, False))  # somebody may read it
  assert not landings.kept
  source.withdraw(messages.Withdraw(1, True))
  assert landings.take() is first and landings.take() is not first
  assert not source.lent and not source.busy or told(source)
  landings.give(first, ())
  hand_off(source, target, c, 3)
  assert landings.take() is first


@pages.needed
def test_memory_of_both_is_used_anew_once_it_was_read():
  """Not once its target has told that what is read has its place: a step of
  the target may come before that."""
  source, sent, target = introduced(((1, 1), (1, 1)))
  landings, c = source.engine.landings, pages.command((5, 0), (1, 2), 8)
  source.offer(messages.Offer(1, 0, c, False))
  (first, _), = source.lent.values()
  source.withdraw(messages.Withdraw(1, True))
  assert landings.take() is not first and not first.is_free()
  first.mark_1[0] = 1
  assert landings.take() is first
  landings.give(first, ())
  for uuid in (2, 3):  # the same memory, opened once
    had = pages.contents(target.engine)
    hand_off(source, target, c, uuid)
    pages.check_arrived(c, sent, target.engine, had)
    assert first.mark_1[0] == uuid and landings.kept == [first]
  opened = target._opened[0]
  assert len(opened._known) == 1 and not target.engine.landings.kept[1:]


def test_memory_of_a_process_that_is_gone_is_not_opened():
  """Nor another file that has its number by now."""
  own, opened = shared_memory.Own(100), shared_memory.Opened(100)
  pid, file, inode = own.where()
  mine = opened.open(own.where())
  own._memory[:] = 5
  assert (mine._memory == 5).all()
  with pytest.raises(RuntimeError, match='is another'):
    opened.open((pid, file, inode + 1))
  with pytest.raises(OSError):
    opened.open((2**22 + 1, file, inode))
  later = [shared_memory.Own(100) for _ in range(shared_memory.KEPT)]
  for other in later:
    opened.open(other.where())
  assert len(opened._known) == shared_memory.KEPT
  assert (mine._memory == 5).all()  # who has it keeps it
  del own
  gc.collect()
  with pytest.raises((OSError, RuntimeError)):
    opened.open((pid, file, inode))


def test_where_such_files_are_forbidden_nothing_is_shared(monkeypatch):
  """As in a sandbox: then KV is pulled."""
  assert shared_memory.of_host()

  def forbidden(name):
    raise PermissionError(name)

  monkeypatch.setattr(os, 'memfd_create', forbidden)
  assert shared_memory.of_host() == ''
  monkeypatch.delattr(os, 'memfd_create')
  assert shared_memory.of_host() == ''


def test_arrays_are_packed_by_dtype_and_size(monkeypatch):
  """And come back as they were."""
  monkeypatch.setattr(parcels, 'PART_BYTES', 100)
  rng = np.random.default_rng(0)
  arrays = [jax.device_put(rng.integers(0, 99, shape).astype(dtype),
                           jax.devices()[1])
            for shape, dtype in [((3, 4), np.float32), ((5,), np.int8),
                                 ((2, 2, 3), np.float32), ((2,), np.float32),
                                 ((99, 2), np.int8), ((7,), np.int8)]]
  assert parcels.groups(arrays) == ((0, 2), (1,), (3,), (4,), (5,))
  like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
          for x in arrays]
  packed = parcels.pack(arrays)
  assert [(x.shape, x.dtype, x.sharding) for x in packed] == [
      (x.shape, x.dtype, x.sharding) for x in parcels.packed_like(like)]
  for a, b in zip(arrays, parcels.unpack(packed, like), strict=True):
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype and a.sharding == b.sharding
