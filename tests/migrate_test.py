"""Pages from mesh to mesh: which heads go where, and that they arrive."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.array import ArrayImpl
from jax.sharding import Mesh

from dsjax import base, checkpoint, migrate, sharding
from dsjax.engine import Engine
from tests import tiny

CONFIG = dataclasses.replace(tiny.CONFIG, name='4 kv heads', num_kv_heads=4)
TINY = checkpoint.Model(CONFIG, tiny.params(CONFIG))
LIMITS = base.EngineConfig(max_len=32, page_size=4, num_pages=9, max_seqs=2,
                           transfer_pages=6)
PAIRS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2))


def mesh(tp, first=0):
  return Mesh(np.array(jax.devices()[first:first + tp]), (sharding.AXIS,))


# --- the plan ----------------------------------------------------------------


@pytest.mark.parametrize('heads, source, target, want', (
    (2, 1, 1, [[(0, 0, 2)]]),
    (4, 2, 2, [[(0, 0, 2)], [(1, 0, 2)]]),
    (4, 1, 2, [[(0, 0, 2)], [(0, 2, 4)]]),
    (4, 2, 1, [[(0, 0, 2), (1, 0, 2)]]),
    (4, 4, 2, [[(0, 0, 1), (1, 0, 1)], [(2, 0, 1), (3, 0, 1)]]),
    (4, 2, 4, [[(0, 0, 1)], [(0, 1, 2)], [(1, 0, 1)], [(1, 1, 2)]]),
    (6, 2, 3, [[(0, 0, 2)], [(0, 2, 3), (1, 0, 1)], [(1, 1, 3)]]),
    (6, 3, 2, [[(0, 0, 2), (1, 0, 1)], [(1, 1, 2), (2, 0, 2)]])))
def test_plan_heads(heads, source, target, want):
  assert migrate.plan_heads(heads, source, target) == want


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_target_shard_gets_its_heads_once_in_order(data):
  heads = data.draw(st.integers(1, 48))
  sizes = st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])
  source, target = data.draw(sizes), data.draw(sizes)
  pieces = migrate.plan_heads(heads, source, target)
  each = heads // source
  for shard, needed in enumerate(pieces):
    assert all(0 <= low < high <= each for _, low, high in needed)
    got = [s * each + h for s, low, high in needed for h in range(low, high)]
    assert got == list(range(shard * heads // target,
                             (shard + 1) * heads // target))
  assert len(pieces) == target


# --- the copy ----------------------------------------------------------------


@pytest.fixture
def host_reads(monkeypatch):
  """Sizes of arrays whose values the host has read."""
  sizes, value = [], ArrayImpl._value.fget

  def spy(self):
    sizes.append(self.size)
    return value(self)

  monkeypatch.setattr(ArrayImpl, '_value', property(spy))
  return sizes


def pages_tree(tp, seed=0):
  """(numpy, sharded) pages [K, m, C, H] of two layers, keys and values."""
  rng = np.random.default_rng(seed)
  tree = tuple(rng.standard_normal((4, 3, 4, 8)).astype(np.float32)
               for _ in range(4))
  return tree, jax.device_put(tree, sharding.kv(mesh(tp)))


def test_the_spy_sees_a_reshard_through_the_host(host_reads):
  _, tree = pages_tree(2)
  jax.block_until_ready(jax.device_put(tree[0], sharding.kv(mesh(1, 4))))
  if jax.__version_info__ < (0, 11):
    assert host_reads == [tree[0].size]


@pytest.mark.parametrize('source, target', PAIRS)
def test_move_keeps_values_and_never_visits_the_host(
    host_reads, source, target):
  want, tree = pages_tree(source)
  to = mesh(target, 4)
  with jax.transfer_guard('disallow'):
    moved = jax.block_until_ready(migrate.move(tree, mesh(source), to))
  assert not host_reads
  assert jax.tree.structure(moved) == jax.tree.structure(want)
  for x, y in zip(moved, want, strict=True):
    assert x.sharding == sharding.kv(to)
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('source, target', PAIRS)
def test_every_shard_has_its_own_heads(source, target):
  want, tree = pages_tree(source)
  to = mesh(target, 4)
  moved = migrate.move(tree, mesh(source), to)
  each = 4 // target
  for x, y in zip(moved, want, strict=True):
    shards = {s.device: s.data for s in x.addressable_shards}
    for i, device in enumerate(to.devices.flat):
      np.testing.assert_array_equal(shards[device],
                                    y[i * each:(i + 1) * each])


def test_move_keeps_bfloat16():
  _, tree = pages_tree(2)
  tree = jax.tree.map(lambda x: x.astype('bfloat16'), tree)
  moved = migrate.move(tree, mesh(2), mesh(1, 4))
  for x, y in zip(moved, tree, strict=True):
    assert x.dtype == 'bfloat16'
    np.testing.assert_array_equal(x, y)


# --- from instance to instance -----------------------------------------------


def instance(tp, first, seed, limits=LIMITS):
  """An Engine whose cache is full of random values, and those values."""
  made = Engine(TINY, mesh(tp, first), 'decode', limits)
  rng = np.random.default_rng(seed)
  values = jax.tree.map(
      lambda x: rng.standard_normal(x.shape).astype(x.dtype), made.cache)
  made.cache = jax.device_put(
      values, jax.tree.map(lambda x: x.sharding, made.cache))
  return made, values


def command(source_pages, target_pages):
  return base.Migrate(5, 1, 0, tuple(source_pages), 1, tuple(target_pages),
                      4 * len(source_pages))


def check_arrived(c, source, source_values, target, target_values):
  """Named pages arrived; every other page of both sides is as it was."""
  jax.tree.map(np.testing.assert_array_equal, source.cache, source_values)
  for x, had, sent in zip(
      *map(jax.tree.leaves, (target.cache, target_values, source_values)),
      strict=True):
    want = had.copy()
    want[:, list(c.target_pages)] = sent[:, list(c.source_pages)]
    np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize('tp', ((1, 1), (2, 2), (2, 1), (1, 2), (4, 2)))
@pytest.mark.parametrize('count', (1, 3, 4, 7))
def test_the_named_pages_arrive_and_no_other_is_touched(tp, count):
  source, was = instance(tp[0], 0, 1)
  target, had = instance(tp[1], 4, 2)
  rng = np.random.default_rng(count)
  c = command(rng.permutation(9)[:count].tolist(),
              rng.permutation(9)[:count].tolist())
  migrate.warm(source, target)
  with jax.transfer_guard('disallow'):
    transfer = migrate.start(source, target, c)
    jax.block_until_ready(transfer.done)
  assert transfer.is_ready() and transfer.command == c
  check_arrived(c, source, was, target, had)


@pytest.mark.parametrize('count, sizes', (
    (1, (4,)), (3, (4,)), (4, (4,)), (5, (4, 4)), (6, (6,)), (7, (6, 4)),
    (9, (6, 4))))
def test_bytes_count_what_was_copied(count, sizes):
  source, _ = instance(1, 0, 1)
  target, _ = instance(1, 4, 2)
  transfer = migrate.start(source, target, command(range(count),
                                                   range(count)))
  assert transfer.bytes == sum(sizes) * 4 * CONFIG.kv_bytes_per_token()
  assert len(transfer.done) == len(sizes)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 100))
def test_copies_hold_every_page_with_little_padding(count, most):
  buckets = base.EngineConfig(transfer_pages=most).page_buckets
  sizes = migrate.batches(count, buckets)
  assert set(sizes) <= set(buckets) and max(buckets) == most
  assert 0 <= sum(sizes) - count < buckets[0]
  assert sizes == sorted(sizes, reverse=True)


def test_a_transfer_is_ready_only_when_every_batch_is():
  class Done:
    def __init__(self, ready):
      self.is_ready = lambda: ready

  for ready in ((True, False), (False, True), (False,)):
    transfer = migrate.Transfer(None, [Done(r) for r in ready], 0, 0.0)
    assert not transfer.is_ready()


def test_the_source_may_reuse_its_pages_once_the_copy_is_dispatched():
  """A later operation on the source does not change what arrives."""
  source, was = instance(1, 0, 1)
  target, had = instance(2, 4, 2)
  c = command(range(8), range(1, 9))
  transfer = migrate.start(source, target, c)
  source.scatter((0, 1, 2), jax.tree.map(
      lambda x: jax.device_put(np.zeros_like(x), source.whole),
      source.gather((0, 1, 2))))
  jax.block_until_ready(transfer.done)
  for x, y, z in zip(*map(jax.tree.leaves, (target.cache, was, had)),
                     strict=True):
    np.testing.assert_array_equal(np.asarray(x)[:, 1:], y[:, :8])
    np.testing.assert_array_equal(np.asarray(x)[:, 0], z[:, 0])


def test_two_hand_offs_in_flight_do_not_mix():
  source, was = instance(2, 0, 1)
  target, had = instance(1, 4, 2)
  first, second = command((0, 1, 2, 3), (8, 7, 6, 5)), command((4, 5), (0, 1))
  transfers = [migrate.start(source, target, c) for c in (first, second)]
  jax.block_until_ready([t.done for t in transfers])
  both = command(first.source_pages + second.source_pages,
                 first.target_pages + second.target_pages)
  check_arrived(both, source, was, target, had)


@pytest.mark.parametrize('tp', ((1, 1), (2, 1), (1, 4)))
def test_warm_touches_no_page(tp):
  source, was = instance(tp[0], 0, 1)
  target, had = instance(tp[1], 4, 2)
  migrate.warm(source, target)
  jax.tree.map(np.testing.assert_array_equal, source.cache, was)
  jax.tree.map(np.testing.assert_array_equal, target.cache, had)
