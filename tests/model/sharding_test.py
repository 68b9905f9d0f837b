"""Layouts, stages, meshes and the PartitionSpecs of parameters and cache."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan
from dsjax.model import kv_cache, sharding
from tests.common import tiny

SPLIT = set('VNKF')  # the axes that 'model' splits


def mesh(tp):
  return sharding.make_meshes(tiny.CONFIG, Placement(colocated=[Plan(tp)]),
                              jax.devices())[0][0]


def heads(num_heads, num_kv_heads):
  return dataclasses.replace(tiny.UNTIED, num_heads=num_heads,
                             num_kv_heads=num_kv_heads)


# --- layouts -----------------------------------------------------------------


@pytest.mark.parametrize('N, K, tp, kv_heads, query_heads', (
    (4, 2, 1, (0, 1), (0, 1, 2, 3)),
    (4, 2, 2, (0, 1), (0, 1, 2, 3)),
    (4, 2, 4, (0, 0, 1, 1), (0, 1, 2, 3)),
    (4, 4, 3, (0, 1, 2, 3, -1, -1), (0, 1, 2, 3, -1, -1)),
    (9, 3, 2, (0, 1, 2, -1), (0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1, -1)),
    (9, 3, 3, (0, 1, 2), tuple(range(9))),
    (9, 3, 8, (0, 0, 1, 1, 2, 2, -1, -1),
     (0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, -1, -1, -1, -1)),
    (8, 1, 4, (0, 0, 0, 0), tuple(range(8)))))
def test_cut(N, K, tp, kv_heads, query_heads):
  layout = sharding.cut(heads(N, K), tp)
  assert layout.kv_heads == kv_heads and layout.heads == query_heads
  assert layout.padded.num_heads == len(query_heads)
  assert layout.padded.num_kv_heads == len(kv_heads)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 16))
def test_every_head_has_one_place_beside_its_kv_head(K, G, tp):
  N = K * G
  if tp > N:
    with pytest.raises(InputError, match='Plan.tp'):
      sharding.cut(heads(N, K), tp)
    return
  layout = sharding.cut(heads(N, K), tp)
  placed, kv = layout.heads, layout.kv_heads
  assert sorted(h for h in placed if h >= 0) == list(range(N))
  assert set(range(K)) <= set(kv)
  assert len(placed) % tp == len(kv) % tp == len(placed) % len(kv) == 0
  group = len(placed) // len(kv)
  for place, head in enumerate(placed):
    assert head < 0 or kv[place // group] == head // G
  each = len(kv) // tp
  for shard in range(tp):  # no shard holds a head twice
    held = [h for h in kv[shard * each:(shard + 1) * each] if h >= 0]
    assert len(set(held)) == len(held)
  if K % tp == 0 or tp % K == 0 and G % (tp // K) == 0:
    assert -1 not in placed and -1 not in kv


@pytest.mark.parametrize('tp', (1, 2, 3, 4))
def test_padding_adds_zeros_and_copies_heads(tp):
  layout = sharding.cut(tiny.UNTIED, tp)
  rng = np.random.default_rng(0)
  for leaf in (*tiny.UNTIED.layer_leaves, *tiny.UNTIED.top_leaves):
    x = rng.standard_normal(tiny.UNTIED.leaf_shape(leaf)).astype(np.float32)
    y = layout.pad(leaf, x)
    assert y.shape == layout.shape(leaf), leaf
    letters = leaf.rsplit('_', 1)[1]
    if 'N' in letters:
      at = letters.index('N')
      for place, head in enumerate(layout.heads):
        np.testing.assert_array_equal(
            np.take(y, place, at), 0 if head < 0 else np.take(x, head, at))
    elif 'K' in letters:
      for place, head in enumerate(layout.kv_heads):
        np.testing.assert_array_equal(y[place], 0 if head < 0 else x[head])
    else:
      np.testing.assert_array_equal(y[tuple(map(slice, x.shape))], x)
      assert np.count_nonzero(y) == np.count_nonzero(x)


def test_experts_must_divide():
  config = dataclasses.replace(tiny.UNTIED, num_experts=6, experts_per_token=2)
  assert sharding.cut(config, 3).shape('gate_EFD')[0] == 6
  assert sharding.spec('gate_EFD') == jax.sharding.PartitionSpec('model')
  assert sharding.spec('router_ED') == jax.sharding.PartitionSpec()
  with pytest.raises(InputError, match='Plan.tp=4: must be a divisor of .* 6'):
    sharding.cut(config, 4)


def test_more_shards_than_heads_are_refused():
  with pytest.raises(InputError, match='Plan.tp=5: must be at most the 4'):
    sharding.cut(tiny.CONFIG, 5)


# --- specs -------------------------------------------------------------------


@pytest.mark.parametrize('tp', (1, 2, 3, 4))
@pytest.mark.parametrize('config', (tiny.CONFIG, tiny.UNTIED),
                         ids=lambda c: c.name)
def test_heads_feed_forward_and_vocabulary_are_split_and_nothing_else(
    config, tp):
  layout, span = sharding.cut(config, tp), (0, config.num_layers)
  tree = sharding.abstract_params(layout, span, mesh(tp), 'float32')
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    leaf = path[-1].key
    split = [c for c in leaf.rsplit('_', 1)[1] if c in SPLIT][:1]
    want = list(x.shape)
    if split:
      want[leaf.rsplit('_', 1)[1].index(split[0])] //= tp
    assert list(x.sharding.shard_shape(x.shape)) == want, leaf


def test_cache_and_moving_pages_are_split_by_kv_head():
  made = jax.eval_shape(lambda: kv_cache.init(tiny.CONFIG, 6, 4, 'int8'))
  shapes = {sharding.kv(mesh(2)).shard_shape(x.shape)
            for x in jax.tree.leaves(made)}
  assert shapes == {(1, 6, 4, 8), (1, 6, 4)}


def test_whole_is_replicated():
  assert sharding.replicated(mesh(2)).shard_shape((4, 6)) == (4, 6)


# --- stages ------------------------------------------------------------------


@pytest.mark.parametrize('layers, pp, want', (
    (4, 1, ((0, 4),)), (4, 2, ((0, 2), (2, 4))),
    (5, 3, ((0, 2), (2, 4), (4, 5))), (3, 3, ((0, 1), (1, 2), (2, 3)))))
def test_spans(layers, pp, want):
  assert sharding.spans(layers, pp) == want


def test_more_stages_than_layers_are_refused():
  with pytest.raises(InputError, match='Plan.pp=3: must be at most the 2'):
    sharding.make_meshes(tiny.CONFIG, Placement(colocated=[Plan(1, 3)]),
                         jax.devices())


@pytest.mark.parametrize('config', (tiny.CONFIG, tiny.UNTIED),
                         ids=lambda c: c.name)
def test_stages_hold_every_parameter_once_but_a_tied_embedding(config):
  layout = sharding.cut(config, 1)
  stages = [sharding.place_params(layout, span, mesh(1), tiny.params(config))
            for span in sharding.spans(config.num_layers, 2)]
  assert sum(len(s['layers']) for s in stages) == config.num_layers
  tops = [set(s) - {'layers'} for s in stages]
  assert 'embed_VD' in tops[0] and 'norm_D' in tops[1]
  assert tops[0] & tops[1] == ({'embed_VD'} if config.tied else set())
  assert ('head_VD' in tops[1]) != config.tied


@pytest.mark.parametrize('field', ('tp', 'pp'))
@pytest.mark.parametrize('value', (0, -1, 1.5, None))
def test_a_plan_is_of_positive_integers(field, value):
  with pytest.raises(InputError, match=f'Plan.{field}='):
    Plan(**{field: value})


# --- meshes ------------------------------------------------------------------


@pytest.mark.parametrize('placement', (
    Placement(prefill=[Plan(2), Plan(1, 2)], decode=[Plan(), Plan(2)]),
    Placement(colocated=[Plan(2, 2)] * 2), Placement(chunked=[Plan()] * 8)),
    ids=lambda p: p.mode)
def test_meshes_are_disjoint_and_in_device_order(placement):
  made = sharding.make_meshes(tiny.CONFIG, placement, jax.devices())
  used = [d for stages in made for m in stages for d in m.devices.flat]
  assert used == jax.devices()[:placement.num_devices]
  assert [[m.size for m in stages] for stages in made] == [
      [p.tp] * p.pp for _, p in placement.instances]
  assert all(m.axis_names == (sharding.AXIS,) for s in made for m in s)


def test_meshes_take_the_devices_they_are_given():
  devices = jax.devices()[::-1][:2]
  made = sharding.make_meshes(
      tiny.CONFIG, Placement(prefill=[Plan()], decode=[Plan()]), devices)
  assert [m.devices.item() for m, in made] == devices


def test_more_devices_than_exist_are_refused():
  with pytest.raises(InputError, match="'10 devices'.*at most the 8"):
    sharding.make_meshes(tiny.CONFIG, Placement(colocated=[Plan(2)] * 5),
                         jax.devices())


def test_a_plan_of_any_instance_is_checked():
  with pytest.raises(InputError, match='Plan.tp=5'):
    sharding.make_meshes(tiny.CONFIG, Placement(colocated=[Plan(2), Plan(5)]),
                         jax.devices())


@pytest.mark.parametrize('roles', (
    {}, {'prefill': [Plan()]}, {'decode': [Plan()]},
    {'colocated': [Plan()], 'decode': [Plan()]},
    {'colocated': 'Plan(1)'}, {'colocated': [1]}))
def test_a_placement_that_cannot_serve(roles):
  with pytest.raises(InputError, match='Placement'):
    Placement(**roles)
