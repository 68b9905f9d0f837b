"""Meshes of a Plan, and the PartitionSpecs of parameters and cache.

Tensor parallelism is the mesh axis 'model': heads, feed-forward and
vocabulary are split over it.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax import base

AXIS = 'model'

_SPECS = {
    'embed_VD': PartitionSpec(AXIS),
    'head_VD': PartitionSpec(AXIS),
    'q_NHD': PartitionSpec(AXIS),
    'k_KHD': PartitionSpec(AXIS),
    'v_KHD': PartitionSpec(AXIS),
    'o_DNH': PartitionSpec(None, AXIS),
    'gate_FD': PartitionSpec(AXIS),
    'up_FD': PartitionSpec(AXIS),
    'down_DF': PartitionSpec(None, AXIS),
}


def check_plan(config, plan):
  """Raises InputError when this model cannot run under this plan."""
  base.require(plan.pp == 1, 'Plan.pp', plan.pp,
               '1 (pipeline stages are not built yet)')
  shared = np.gcd.reduce([config.num_heads, config.num_kv_heads, config.d_ff,
                          config.vocab_size])
  allowed = [n for n in range(1, shared + 1) if shared % n == 0]
  base.require(plan.tp in allowed, 'Plan.tp', plan.tp,
               f'one of {allowed} for {config.name} (a divisor of its heads, '
               'kv heads, d_ff and vocabulary)')


def make_meshes(config, placement, devices):
  """One mesh an instance, over disjoint devices taken in order.

  Raises:
    InputError: more devices are asked for than exist, or a plan that the
      model cannot run.
  """
  base.require(placement.num_devices <= len(devices), 'Placement',
               f'{placement.num_devices} devices',
               f'at most the {len(devices)} that exist')
  meshes, taken = [], 0
  for _, plan in placement.instances:
    check_plan(config, plan)
    chosen = devices[taken:taken + plan.num_devices]
    meshes.append(Mesh(np.array(chosen), (AXIS,)))
    taken += plan.num_devices
  return meshes


def params(mesh, tree):
  """A NamedSharding for every parameter of `tree`; norms are replicated."""
  def one(path, _):
    return NamedSharding(mesh, _SPECS.get(path[-1].key, PartitionSpec()))
  return jax.tree_util.tree_map_with_path(one, tree)


def kv(mesh):
  """Cache arrays and migrating pages: split by kv head."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def whole(mesh):
  """Replicated."""
  return NamedSharding(mesh, PartitionSpec())
