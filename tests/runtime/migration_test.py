"""Pages from any plan to any plan: which heads go where, that they arrive."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoints import checkpoint
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.kernels import build_cpu
from dsjax.model import kv_cache as kv
from dsjax.model import sharding
from dsjax.runtime import migration
from dsjax.runtime.engine import Engine
from dsjax.runtime.landing import Landings
from dsjax.runtime.migration import Piece
from dsjax.scheduling.events import Migrate
from tests.common import tiny
from tests.common.samples import deep

CONFIG = dataclasses.replace(tiny.CONFIG, name='3 kv heads', num_layers=3,
                             num_heads=6, num_kv_heads=3)
TINY = checkpoint.Model(CONFIG, tiny.params(CONFIG))
LIMITS = EngineConfig(max_len=32, page_size=4, num_pages=9, max_seqs=2,
                      transfer_pages=4)
# (tp, pp) on both sides, at most 4 devices each.
PAIRS = (((1, 1), (1, 1)), ((2, 1), (3, 1)), ((4, 1), (2, 2)),
         ((1, 3), (1, 2)), ((2, 2), (1, 3)), ((1, 2), (2, 1)))


def layout(tp, config=CONFIG):
  return sharding.cut(config, tp)


def pieces(source, target, config=CONFIG):
  (tp, pp), (to_tp, to_pp) = source, target
  return migration.plan_pieces(
      layout(tp, config), sharding.spans(config.num_layers, pp),
      layout(to_tp, config), sharding.spans(config.num_layers, to_pp))


# --- the plan ----------------------------------------------------------------


@pytest.mark.parametrize('source, target, want', (
    ((1, 1), (1, 1), [Piece((0, 3), (0, 0), (0, 0), (0, 1, 2), (0, 1, 2))]),
    ((3, 1), (1, 1), [Piece((0, 3), (0, s), (0, 0), (0,), (s,))
                      for s in range(3)]),
    ((1, 1), (2, 1), [Piece((0, 3), (0, 0), (0, 0), (0, 1), (0, 1)),
                      Piece((0, 3), (0, 0), (0, 1), (2,), (2,))]),
    ((2, 1), (3, 1), [Piece((0, 3), (0, 0), (0, 0), (0,), (0,)),
                      Piece((0, 3), (0, 0), (0, 1), (1,), (1,)),
                      Piece((0, 3), (0, 1), (0, 2), (0,), (2,))]),
    ((1, 2), (1, 3), [Piece((0, 1), (0, 0), (0, 0), (0, 1, 2), (0, 1, 2)),
                      Piece((1, 2), (0, 0), (1, 0), (0, 1, 2), (0, 1, 2)),
                      Piece((2, 3), (1, 0), (2, 0), (0, 1, 2), (0, 1, 2))])))
def test_plan_pieces(source, target, want):
  assert list(pieces(source, target)) == want


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_target_shard_gets_its_heads_of_its_layers_once(data):
  number = st.integers(1, 8)
  K, G, layers = data.draw(number), data.draw(number), data.draw(number)
  config = dataclasses.replace(CONFIG, num_heads=K * G, num_kv_heads=K,
                               num_layers=layers)
  tps, pps = st.integers(1, min(8, K * G)), st.integers(1, layers)
  source, target = [(data.draw(tps), data.draw(pps)) for _ in range(2)]
  a, b = layout(source[0], config), layout(target[0], config)
  got = {}
  for piece in pieces(source, target, config):
    stage, shard = piece.source
    size = len(a.kv_heads) // a.tp
    assert piece.heads == tuple(a.kv_heads[shard * size + p]
                                for p in piece.places)
    first, last = sharding.spans(layers, source[1])[stage]
    assert first <= piece.layers[0] < piece.layers[1] <= last
    for layer in range(*piece.layers):
      got.setdefault((piece.target, layer), []).extend(piece.heads)
  size = len(b.kv_heads) // b.tp
  want = {((stage, shard), layer): held
          for stage, span in enumerate(sharding.spans(layers, target[1]))
          for shard in range(b.tp) for layer in range(*span)
          if (held := [h for h in b.kv_heads[shard * size:(shard + 1) * size]
                       if h >= 0])}
  assert got == want
  copies = sum(map(len, got.values())) / (K * layers)
  assert migration.ratio(pieces(source, target, config), a) == copies
  if target[0] <= K:
    assert copies == 1


# --- from instance to instance -----------------------------------------------


def test_the_spy_sees_a_reshard_through_the_host(host_reads):
  two, four = (jax.sharding.NamedSharding(
      jax.sharding.Mesh(np.array(jax.devices()[:n]), ('model',)),
      jax.sharding.PartitionSpec('model')) for n in (2, 4))
  x = jax.device_put(np.ones((4, 3), np.float32), two)
  jax.block_until_ready(jax.device_put(x, four))
  if jax.__version_info__ < (0, 11):
    assert host_reads == [x.size]


def engine(plan, first, seed, limits=LIMITS, role='decode'):
  """An Engine with a random cache, and what it holds: k, v as [L, K, P, C, H]
  (caches with scales: dequantised)."""
  placement = Placement(colocated=[Plan(*plan)])
  meshes, = sharding.make_meshes(CONFIG, placement, jax.devices()[first:])
  made = Engine(TINY, meshes, role, limits)
  rng = np.random.default_rng(seed)
  c, n = made.capacity, made.where[0]
  values = rng.standard_normal(
      (2, 3, 3, c.num_pages, c.page_size, CONFIG.head_dim)).astype(np.float32)
  for stage, span in zip(made.stages, made.where[1], strict=True):
    parts = []
    for part in values:
      held = part[span[0]:span[1]][:, np.maximum(n.kv_heads, 0)]
      held[:, np.array(n.kv_heads) < 0] = 0
      parts.append(list(held))
    if kv.largest(kind := limits.kv_dtype_of(role)):
      both = [[kv.quantize(x, kind) for x in part] for part in parts]
      parts = [[x for x, _ in part] for part in both] + [
          [s for _, s in part] for part in both]
    stage.cache = jax.tree.map(
        lambda like, x: jax.device_put(np.asarray(x, like.dtype),
                                       like.sharding),
        stage.cache, kv.Cache(*map(tuple, parts)))
  return made, values


def contents(inst):
  """(k, v) as [2, L, places, P, C, H], float32."""
  parts = [[], []]
  for stage in inst.stages:
    scales = (stage.cache.k_scale_KPC, stage.cache.v_scale_KPC)
    for part, arrays, scale in zip(parts, (
        stage.cache.k_KPCH, stage.cache.v_KPCH), scales, strict=True):
      arrays = [np.asarray(x, np.float32) for x in arrays]
      if scale:
        arrays = [x * np.asarray(s)[..., None]
                  for x, s in zip(arrays, scale, strict=True)]
      part += arrays
  return np.array(parts)


def tokens(x, ids, count):
  """Tokens of pages `ids` of [..., P, C, H]: [..., count, H]."""
  picked = x[..., list(ids), :, :]
  return picked.reshape(*picked.shape[:-3], -1, picked.shape[-1])[
      ..., :count, :]


def check_arrived(c, sent, target, had, tolerance=0.0):
  """The tokens arrived in every replica; other pages are as before."""
  got = contents(target)
  want = tokens(sent, c.source_pages, c.num_tokens)
  others = [p for p in range(target.capacity.num_pages)
            if p not in c.target_pages]
  for place, head in enumerate(target.where[0].kv_heads):
    if head >= 0:
      np.testing.assert_allclose(
          tokens(got[:, :, place], c.target_pages, c.num_tokens),
          want[:, :, head], atol=tolerance, rtol=0)
      np.testing.assert_array_equal(got[:, :, place][:, :, others],
                                    had[:, :, place][:, :, others])
    else:
      assert not got[:, :, place].any()


def command(source_pages, target_pages, num_tokens):
  return Migrate(5, 1, 0, tuple(source_pages), 1, tuple(target_pages),
                 num_tokens)


def some_pages(route, num_tokens, seed=0):
  """A Migrate between random pages of both sides."""
  rng = np.random.default_rng(seed)
  ids = [rng.permutation(e.capacity.num_pages)[
      :-(-num_tokens // e.capacity.page_size)].tolist()
      for e in (route.source, route.target)]
  return command(*ids, num_tokens)


def check_route(source, target, sent, num_tokens=(3, 26), tolerance=0.0,
                host_reads=()):
  route = migration.Route(source, target)
  route.warm(checksum=True)
  before = contents(source)
  for count in num_tokens:
    had, c = contents(target), some_pages(route, count, count)
    read = len(host_reads)
    with jax.transfer_guard('disallow'):
      transfer = route.start(c, checksum=True)
      jax.block_until_ready([tree for _, tree in transfer.moved])
      assert transfer.has_arrived() and not transfer.is_ready()
      done = transfer.land()
      jax.block_until_ready((done, transfer.sent, transfer.arrived))
      assert transfer.is_ready() and transfer.command == c
      transfer.check()
    assert set(host_reads[read:]) <= {1}  # the checksums
    check_arrived(c, sent, target, had, tolerance)
  np.testing.assert_array_equal(contents(source), before)
  return transfer


@pytest.mark.parametrize('plans', [
    *PAIRS[1:5], *deep((PAIRS[0],), (PAIRS[5],))], ids=str)
def test_the_tokens_arrive_and_no_other_page_is_touched(plans, host_reads):
  source, sent = engine(plans[0], 0, 1)
  target, _ = engine(plans[1], 4, 2)
  check_route(source, target, sent, (3, 26), host_reads=host_reads)


@pytest.mark.parametrize('sizes, plans', (
    *((sizes, ((2, 2), (3, 1))) for sizes in ((4, 8), (8, 4), (4, 6))),
    *deep(((4, 8), ((1, 1), (1, 1))), ((3, 3), ((2, 2), (3, 1))))))
def test_page_sizes_may_differ(sizes, plans):
  limits = dataclasses.replace(LIMITS, page_size=sizes[0],
                               decode_page_size=sizes[1])
  source, sent = engine(plans[0], 0, 1, limits, 'prefill')
  target, _ = engine(plans[1], 4, 2, limits)
  check_route(source, target, sent, (1, 12, 25))


@pytest.mark.parametrize('dtypes, tolerance', (
    (('float32', 'bfloat16'), 2**-6), (('bfloat16', 'int8'), 0.04),
    (('int8', 'float32'), 0.02), *deep(
        (('int8', 'int8'), 0.02), (('float32', 'int8'), 0.02),
        (('float32', 'float8_e4m3fn'), 0.2), (('float8_e4m3fn', 'int8'), 0.2),
        (('bfloat16', 'float8_e5m2'), 0.35),  # half a step at the top
        (('float8_e5m2', 'float8_e4m3fn'), 0.55))))
def test_dtypes_may_differ(dtypes, tolerance):
  limits = dataclasses.replace(LIMITS, kv_dtype=dtypes[0],
                               decode_kv_dtype=dtypes[1], decode_page_size=8)
  source, sent = engine((2, 1), 0, 1, limits, 'prefill')
  target, _ = engine((1, 2), 4, 2, limits)
  transfer = check_route(source, target, sent, (26,), tolerance)
  assert not transfer.route.shares
  assert transfer.bytes == 32 * kv.bytes_per_token(CONFIG, dtypes[1], 3)


@pytest.mark.parametrize('num_tokens', (1, 4, 9, 32))
def test_bytes_are_those_of_the_pages(num_tokens):
  for plans, ratio in ((((2, 2), (1, 3)), 1), (((1, 1), (4, 1)), 1),
                       (((3, 1), (1, 1)), 1)):
    route = migration.Route(engine(plans[0], 0, 1)[0],
                            engine(plans[1], 4, 2)[0])
    transfer = route.start(some_pages(route, num_tokens))
    pages = -(-num_tokens // 4)
    assert transfer.bytes == (pages * 4 * ratio
                              * CONFIG.kv_bytes_per_token())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 100))
def test_copies_hold_every_page_exactly(count, most):
  buckets = EngineConfig(transfer_pages=most).page_buckets
  sizes = migration.batches(count, buckets)
  assert set(sizes) <= set(buckets) and max(buckets) == most
  assert sum(sizes) == count and sizes == sorted(sizes, reverse=True)


class Array:
  """One that is there, is not yet, or is gone."""

  def __init__(self, state):
    self.size = 1
    self.is_ready = lambda: state == 'ready'
    self.is_deleted = lambda: state == 'deleted'

  def block_until_ready(self):
    pass


def transfer_of(*states, **fields):
  moved = [((), Array(state)) for state in states]
  return migration.Transfer(None, None, moved, 0, 0.0, **fields)


def test_a_transfer_has_arrived_only_when_every_batch_has():
  for states in (('ready', 'late'), ('late', 'ready'), ('late',)):
    assert not transfer_of(*states).has_arrived()
  assert transfer_of('ready', 'ready').has_arrived()
  with pytest.raises(RuntimeError, match='deleted'):
    transfer_of('ready', 'deleted').has_arrived()


def test_a_transfer_is_ready_once_it_landed_and_its_checksums_are_there():
  for late in ('sent', 'arrived'):
    assert not transfer_of(landed=True, **{late: [Array('late')]}).is_ready()
  assert not transfer_of().is_ready()
  assert transfer_of(landed=True, sent=[Array('ready')]).is_ready()


# --- memory of two devices ---------------------------------------------------

needed = pytest.mark.skipif(bool(build_cpu.build()), reason='no C++ compiler')
# With a gather, copies and a scatter; and through memory of both.
BOTH_WAYS = pytest.mark.parametrize('plans', (
    ((1, 1), (2, 1)), pytest.param(((1, 1), (1, 1)), marks=needed)), ids=str)


@needed
@pytest.mark.parametrize('kind, most', (('float32', 64), ('bfloat16', 4)))
def test_pages_of_equal_bytes_go_through_memory_of_both(kind, most):
  """Also where a copy could be longer than a request."""
  limits = dataclasses.replace(LIMITS, kv_dtype=kind, transfer_pages=most)
  source, sent = engine((1, 1), 0, 1, limits)
  target, _ = engine((1, 1), 4, 2, limits)
  transfer = check_route(source, target, sent, (1, 4, 26, 32),
                         2**-6 if kind == 'bfloat16' else 0.0)
  assert transfer.route.shares
  assert transfer.bytes == 32 * kv.bytes_per_token(CONFIG, kind, 3)


@needed
@pytest.mark.parametrize('plans, more', (
    (((2, 1), (2, 1)), {}), (((1, 2), (1, 2)), {}),
    (((1, 1), (1, 1)), dict(decode_page_size=8)),
    (((1, 1), (1, 1)), dict(decode_kv_dtype='bfloat16')),
    (((1, 1), (1, 1)), dict(kv_dtype='int8')),
    (((1, 1), (1, 1)), dict(attention='xla'))))
def test_other_pages_do_not(plans, more):
  limits = dataclasses.replace(LIMITS, **more)
  source, target = (engine(plan, 4 * i, i, limits, role)[0] for i, (plan, role)
                    in enumerate(zip(plans, ('prefill', 'decode'),
                                     strict=True)))
  assert not migration.Route(source, target).shares


@needed
def test_the_memory_is_kept_once_nothing_uses_it():
  source, sent = engine((1, 1), 0, 1)
  target, _ = engine((1, 1), 4, 2)
  route, c = migration.Route(source, target), command((0, 1), (3, 4), 8)
  first, second = route.start(c), route.start(c)
  used = first.landing, second.landing
  assert used[0] is not used[1]  # both in flight
  jax.block_until_ready((second.land(), first.land()))
  assert target.landings.kept == [used[0]]
  third = route.start(c)
  assert third.landing is used[0]
  third.drop()  # what it began is read by nobody
  jax.block_until_ready(third.moved)
  assert target.landings.kept == [used[0]]
  had = contents(target)
  third.land()
  np.testing.assert_array_equal(contents(target), had)


def test_memory_that_is_in_use_is_nobody_elses():
  landings = Landings(100)
  one = landings.take()
  for state in ('late', 'deleted'):
    landings.give(one, [Array('ready'), Array(state)])
    assert landings.take() is not one
  landings.give(one, [Array('ready')])
  assert landings.take() is one and landings.take() is not one


@BOTH_WAYS
def test_until_it_lands_a_hand_off_has_written_nothing(plans):
  source, sent = engine(plans[0], 0, 1)
  target, _ = engine(plans[1], 4, 2)
  had, route = contents(target), migration.Route(source, target)
  c = command((0, 1, 2), (3, 4, 5), 12)
  transfer = route.start(c)
  jax.block_until_ready([tree for _, tree in transfer.moved])
  np.testing.assert_array_equal(contents(target), had)
  transfer.land()
  check_arrived(c, sent, target, had)


@BOTH_WAYS
def test_the_source_may_reuse_its_pages_once_the_copy_is_dispatched(plans):
  """A later operation on the source does not change what arrives."""
  source, sent = engine(plans[0], 0, 1)
  target, _ = engine(plans[1], 4, 2)
  had, route = contents(target), migration.Route(source, target)
  c = command(range(8), range(1, 9), 32)
  transfer = route.start(c)
  source.scatter((0, 1, 2), jax.tree.map(
      lambda x: jax.device_put(np.zeros_like(x), x.sharding),
      source.gather((0, 1, 2))))
  transfer.land()
  check_arrived(c, sent, target, had)


@BOTH_WAYS
def test_two_hand_offs_in_flight_do_not_mix(plans):
  source, sent = engine(plans[0], 0, 1)
  target, _ = engine(plans[1], 4, 2)
  had, route = contents(target), migration.Route(source, target)
  first = command((0, 1, 2, 3), (8, 7, 6, 5), 16)
  second = command((4, 5), (0, 1), 8)
  transfers = [route.start(c) for c in (first, second)]
  for transfer in transfers[::-1]:
    transfer.land()
  check_arrived(command(first.source_pages + second.source_pages,
                        first.target_pages + second.target_pages, 24),
                sent, target, had)


# --- checksums ---------------------------------------------------------------


def checksum(inst, ids, num_tokens):
  sums = inst.checksum(inst.gather(ids), np.int32(0), np.int32(num_tokens))
  return sum(int(s) for s in sums) % 2**32


def fill(inst, values, size):
  """Puts tokens [L, 2, K, T, H] into pages 0, 1, ... of an Engine."""
  held = np.maximum(inst.where[0].kv_heads, 0)

  def put(part, layer, like):
    x = np.asarray(like).copy()
    for t in range(values.shape[3]):
      x[:, t // size, t % size] = values[layer, part][held, t]
    return jax.device_put(x, like.sharding)

  for stage, span in zip(inst.stages, inst.where[1], strict=True):
    parts = stage.cache.k_KPCH, stage.cache.v_KPCH
    stage.cache = kv.Cache(*(
        tuple(map(put, [i] * len(part), range(*span), part))
        for i, part in enumerate(parts)))


def test_a_checksum_knows_no_layout_and_sees_every_change():
  values = np.random.default_rng(7).standard_normal(
      (3, 2, 3, 14, 8)).astype(np.float32)
  sums, changed = set(), set()
  for plan, size in (((1, 1), 4), ((3, 1), 4), ((4, 1), 8), ((2, 2), 4),
                     ((1, 3), 2)):
    limits = dataclasses.replace(LIMITS, page_size=size, num_pages=16)
    inst, _ = engine(plan, 0, 1, limits)
    other, _ = engine((1, 1), 7, 1, limits)
    fill(inst, values, size)
    fill(other, values, size)
    ids = tuple(range(-(-14 // size)))
    sums |= {checksum(inst, ids, 14), checksum(other, ids, 14)}
    changed.add(checksum(inst, ids, 13))
  assert len(sums) == len(changed) == 1 and sums != changed


@pytest.mark.parametrize('axis', range(5))
def test_swapped_or_changed_numbers_change_the_checksum(axis):
  rng = np.random.default_rng(0)
  k = rng.standard_normal((2, 3, 4, 4, 8)).astype(np.float32)
  v = rng.standard_normal(k.shape).astype(np.float32)

  def total(k, v):
    return int(kv.checksum(kv.Cache(tuple(k), tuple(v)), np.arange(3), 0, 0,
                           16))

  was = total(k, v)
  assert was == total(k.copy(), v) and was != total(v, k)
  assert was != total(np.flip(k, axis), v)
  bit = k.copy()
  bit[1, 2, 3, 1, 5] = np.nextafter(bit[1, 2, 3, 1, 5], 9)
  assert was != total(bit, v)


def test_damage_is_seen():
  source, _ = engine((1, 1), 0, 1)
  target, _ = engine((2, 1), 4, 2)
  route = migration.Route(source, target)
  transfer = route.start(command((0, 1), (3, 4), 8), checksum=True)
  transfer.land()
  transfer.check()
  transfer.arrived = target.checksum(target.gather((4, 3)), 0, 8)
  with pytest.raises(migration.Damaged, match='KV checksum .* was sent'):
    transfer.check()
