"""Plans, meshes and the PartitionSpecs of parameters and cache."""

import dataclasses

import jax
import numpy as np
import pytest

from dsjax import base, cache, model, sharding
from dsjax.base import InputError, Placement, Plan
from tests import tiny

ALL_SHARDED = {'embed_VD', 'head_VD', 'q_NHD', 'k_KHD', 'v_KHD', 'o_DNH',
               'gate_FD', 'up_FD', 'down_DF'}
SPLIT = set('VNKF')  # the axes that 'model' splits


def meshes(*plans):
  return sharding.make_meshes(tiny.CONFIG, Placement(colocated=plans),
                              jax.devices())


def leaves(config, tp):
  """(name, ShapeDtypeStruct, sharding) of every parameter."""
  mesh, = meshes(Plan(tp))
  tree = model.abstract_params(config)
  specs = sharding.params(mesh, tree)
  assert jax.tree.structure(tree) == jax.tree.structure(specs)
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return [(path[-1].key, x, s) for (path, x), s in zip(
      paths, jax.tree.leaves(specs), strict=True)]


@pytest.mark.parametrize('config', (tiny.CONFIG, tiny.UNTIED),
                         ids=lambda c: c.name)
def test_every_parameter_has_a_sharding(config):
  found = leaves(config, 2)
  assert {name for name, _, _ in found} - {'head_VD'} == (
      ALL_SHARDED - {'head_VD'} | {'attn_norm_D', 'mlp_norm_D', 'norm_D'})
  assert ('head_VD' in {name for name, _, _ in found}) == (not config.tied)
  assert all(s.mesh.size == 2 for _, _, s in found)


def test_heads_feed_forward_and_vocabulary_are_split_and_nothing_else():
  for name, x, placed in leaves(tiny.UNTIED, 2):
    axes = name.rsplit('_', 1)[1]
    want = [size // (2 if axis in SPLIT else 1)
            for axis, size in zip(axes, x.shape, strict=True)]
    assert list(placed.shard_shape(x.shape)) == want, name
    assert placed.is_fully_replicated == (name not in ALL_SHARDED), name


def test_cache_and_moving_pages_are_split_by_kv_head():
  mesh, = meshes(Plan(2))
  made = jax.eval_shape(lambda: cache.init(tiny.CONFIG, 6, 4))
  for x in jax.tree.leaves(made):
    assert sharding.kv(mesh).shard_shape(x.shape) == (1, 6, 4, 8)


def test_whole_is_replicated():
  mesh, = meshes(Plan(2))
  assert sharding.whole(mesh).shard_shape((4, 6)) == (4, 6)


def test_sharded_parameters_keep_their_values():
  mesh, = meshes(Plan(2))
  tree = tiny.params()
  placed = jax.device_put(tree, sharding.params(mesh, tree))
  jax.tree.map(np.testing.assert_array_equal, placed, tree)


# --- plans -------------------------------------------------------------------


@pytest.mark.parametrize('tp', (1, 2))
def test_plans_that_divide_heads_are_allowed(tp):
  sharding.check_plan(tiny.CONFIG, Plan(tp))


@pytest.mark.parametrize('tp', (3, 4, 8))
def test_other_tp_is_refused_and_the_allowed_are_named(tp):
  with pytest.raises(InputError, match=rf'Plan.tp={tp}: .*\[1, 2\].*tiny'):
    sharding.check_plan(tiny.CONFIG, Plan(tp))


@pytest.mark.parametrize('field, value, allowed', (
    ('num_kv_heads', 4, '[1, 2, 4]'), ('d_ff', 49, '[1]'),
    ('vocab_size', 97, '[1]')))
def test_allowed_tp_divides_heads_feed_forward_and_vocabulary(
    field, value, allowed):
  config = dataclasses.replace(tiny.CONFIG, **{field: value})
  with pytest.raises(InputError) as error:
    sharding.check_plan(config, Plan(5))
  assert allowed in str(error.value)


def test_pipeline_stages_are_refused():
  with pytest.raises(InputError, match='Plan.pp=2: must be 1'):
    sharding.check_plan(tiny.CONFIG, Plan(1, 2))


@pytest.mark.parametrize('field', ('tp', 'pp'))
@pytest.mark.parametrize('value', (0, -1, 1.5, None))
def test_a_plan_is_of_positive_integers(field, value):
  with pytest.raises(InputError, match=f'Plan.{field}='):
    Plan(**{field: value})


# --- meshes ------------------------------------------------------------------


@pytest.mark.parametrize('placement', (
    Placement(prefill=[Plan(2), Plan()], decode=[Plan(), Plan(2)]),
    Placement(colocated=[Plan(2)] * 4), Placement(chunked=[Plan()] * 8)),
    ids=lambda p: p.mode)
def test_meshes_are_disjoint_and_in_device_order(placement):
  made = sharding.make_meshes(tiny.CONFIG, placement, jax.devices())
  used = [d for mesh in made for d in mesh.devices.flat]
  assert used == jax.devices()[:placement.num_devices]
  assert [m.size for m in made] == [p.tp for _, p in placement.instances]
  assert all(m.axis_names == (sharding.AXIS,) for m in made)


def test_meshes_take_the_devices_they_are_given():
  devices = jax.devices()[::-1][:2]
  made = sharding.make_meshes(
      tiny.CONFIG, Placement(prefill=[Plan()], decode=[Plan()]), devices)
  assert [m.devices.item() for m in made] == devices


def test_more_devices_than_exist_are_refused():
  with pytest.raises(InputError, match="'10 devices'.*at most the 8"):
    meshes(*[Plan(2)] * 5)


def test_a_plan_of_any_instance_is_checked():
  with pytest.raises(InputError, match='Plan.tp=3'):
    meshes(Plan(2), Plan(3))


@pytest.mark.parametrize('roles', (
    {}, {'prefill': [Plan()]}, {'decode': [Plan()]},
    {'colocated': [Plan()], 'chunked': [Plan()]},
    {'prefill': [Plan()], 'decode': [Plan()], 'colocated': [Plan()]},
    {'colocated': 'Plan(1)'}, {'colocated': [1]}))
def test_a_placement_is_of_one_mode(roles):
  with pytest.raises(base.InputError, match='Placement'):
    Placement(**roles)
