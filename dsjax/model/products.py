"""Products with weights, stored output-first or packed for a CPU."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.kernels import cpu
from dsjax.model import sharding

SMALL = 16  # tokens up to which a product reads W first
# Leaves that read the same rows, so that one product has them all.
QKV, UP_GATE = ('q_NHD', 'k_KHD', 'v_KHD'), ('up_FD', 'gate_FD')
INPUTS = {'o_DNH': 2}  # input axes of a leaf, where there are several


@flax.struct.dataclass
class Panels:
  """Weights that read the same rows, as cpu.pack makes them, one after the
  other.

  parts: the output axes of each. mesh: what they are cut over, by their
  inputs or by their outputs; each shard's part is packed by itself.
  """

  w_QIp: Any  # or its ShapeDtypeStruct
  parts: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)
  mesh: Mesh = flax.struct.field(pytree_node=False)
  by_inputs: bool = flax.struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the only one of them."""
    outputs, = self.parts
    return (*outputs, self.w_QIp.shape[1])


Weight = jax.Array | Panels


def packed_tree(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
  """A stage's parameters, or ShapeDtypeStructs of them, as products take them
  fastest on a CPU. The tree is taken apart: one group of leaves at a time is
  held twice.
  """
  groups = [(leaves, names, _abstract(mesh, leaves, names))
            for leaves, names in _groups(params)]
  real = not isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
  sizes = [math.prod(panels.w_QIp.sharding.shard_shape(panels.w_QIp.shape))
           * panels.w_QIp.dtype.itemsize for _, _, panels in groups]
  rooms = [cpu.room(sizes) for _ in range(mesh.size * real)]
  for leaves, names, panels in groups:
    weights = [leaves.pop(name) for name in names]
    if real:
      panels = dataclasses.replace(panels, w_QIp=_packed(
          mesh, panels.w_QIp, names, weights, rooms))
    leaves[' '.join(names)] = panels
  return params


def _groups(params: dict[str, Any]
            ) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
  """The leaves that products read, and where they are: what has one product.
  embed_VD is among them where it is the head."""
  heads = ('head_VD',) if 'head_VD' in params else ('embed_VD',)
  if 'norm_D' in params:
    yield params, heads
  for leaves in params['layers']:
    for group in (QKV, ('o_DNH',), UP_GATE, ('down_DF',)):
      if names := tuple(name for name in group if name in leaves):
        yield leaves, names


def _spec(by_inputs: bool) -> PartitionSpec:
  """How panels [Q, I, p] lie."""
  return PartitionSpec(*(None,) * by_inputs, sharding.AXIS)


def _by_inputs(names: tuple[str, ...]) -> bool:
  return sharding.spec(names[0])[0] is None


def _abstract(mesh: Mesh, leaves: Mapping[str, Any],
              names: tuple[str, ...]) -> Panels:
  """The Panels of these leaves, nothing traced."""
  by_inputs, p = _by_inputs(names), cpu.panel()
  copies = 1 if by_inputs else mesh.size  # of what a shard packs
  shapes = [leaves[name].shape for name in names]
  parts = tuple(shape[:len(shape) - INPUTS.get(name, 1)]
                for name, shape in zip(names, shapes, strict=True))
  count = sum(-(-math.prod(part) // (copies * p)) for part in parts)
  inputs = math.prod(shapes[0][len(parts[0]):])
  return Panels(jax.ShapeDtypeStruct(
      (count * copies, inputs, p), leaves[names[0]].dtype,
      sharding=NamedSharding(mesh, _spec(by_inputs))), parts, mesh, by_inputs)


def _packed(mesh: Mesh, like: jax.ShapeDtypeStruct, names: tuple[str, ...],
            weights: list[jax.Array], rooms: Sequence[Iterator[np.ndarray]]
            ) -> jax.Array:
  """Panels of these weights, in the next place of each device's room."""
  shards, p, bits = [], like.shape[2], f'uint{like.dtype.itemsize * 8}'
  parts = zip(*(sharding.on_host(mesh, weight) for weight in weights),
              strict=True)
  for room, leaves in zip(rooms, parts, strict=True):
    to_QIp = next(room).view(bits).reshape(
        like.sharding.shard_shape(like.shape))
    shards.append(to_QIp.view(like.dtype))
    for name, leaf in zip(names, leaves, strict=True):
      outputs = math.prod(leaf.shape[:leaf.ndim - INPUTS.get(name, 1)])
      cpu.pack(leaf.view(bits).reshape(outputs, -1), to_QIp)
      to_QIp = to_QIp[-(-outputs // p):]
  return sharding.from_host(like, shards)


def project(weight: Weight, x_SI: jax.Array, inputs: int = 1) -> jax.Array:
  """x W^T; W has any number of output axes first, then its input axes.

  Up to SMALL tokens a weight that is not packed is the left operand: 1.7 times
  faster on CPU, which then streams W instead of repacking it.
  """
  if isinstance(weight, Panels):
    y_SO, = _multiply(weight, x_SI)
    return y_SO
  outputs = weight.shape[:-inputs]
  w_OI = weight.reshape(-1, x_SI.shape[1])
  if x_SI.shape[0] <= SMALL:
    y_SO = jax.lax.dot_general(w_OI, x_SI, (((1,), (1,)), ((), ()))).T
  else:
    y_SO = jax.lax.dot_general(x_SI, w_OI, (((1,), (1,)), ((), ())))
  return y_SO.reshape(x_SI.shape[0], *outputs)


def project_all(leaves: Mapping[str, Any], names: tuple[str, ...],
                x_SI: jax.Array) -> list[jax.Array]:
  """`project` of each of these leaves: QKV, UP_GATE or a part of it."""
  joint = leaves.get(' '.join(names))
  if isinstance(joint, Panels):
    return _multiply(joint, x_SI)
  return [project(leaves[name], x_SI) for name in names]


def _multiply(weight: Panels, x_SI: jax.Array) -> list[jax.Array]:
  """x W^T of each part."""
  tp = weight.mesh.size

  def shard(x_SI: jax.Array, w_QIp: jax.Array) -> list[jax.Array]:
    y_SO, parts, start = cpu.multiply(x_SI, w_QIp), [], 0
    if weight.by_inputs and tp > 1:
      y_SO = jax.lax.psum(y_SO, sharding.AXIS)
    for first, *others in weight.parts:
      outputs = (first if weight.by_inputs else first // tp, *others)
      size = math.prod(outputs)
      parts.append(y_SO[:, start:start + size].reshape(-1, *outputs))
      start += size + -size % w_QIp.shape[2]
    return parts

  rows, cut = PartitionSpec(), PartitionSpec(None, sharding.AXIS)
  return sharding.shard_map(
      weight.mesh, shard,
      (cut, cut) if weight.by_inputs else (rows, PartitionSpec(sharding.AXIS)),
      rows if weight.by_inputs else cut)(x_SI, weight.w_QIp)


def rows_of(weight: Weight, row_S: jax.Array) -> jax.Array:
  """Rows of a weight of one output axis."""
  if not isinstance(weight, Panels):
    return weight[row_S]
  Q, _, p = weight.w_QIp.shape
  tp = weight.mesh.size
  shard_S, at_S = jnp.divmod(row_S, weight.shape[0] // tp)
  return weight.w_QIp[shard_S * (Q // tp) + at_S // p, :, at_S % p]
