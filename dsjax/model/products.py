"""Products with weights, stored output-first or packed for a CPU."""

import functools
import math
from typing import Any

import flax.struct
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.kernels import cpu

SMALL = 16  # tokens up to which a product reads W first
# Leaves that products read; embed_VD too, where it is the head.
PACKED = {'q_NHD', 'k_KHD', 'v_KHD', 'o_DNH', 'up_FD', 'gate_FD', 'down_DF',
          'head_VD'}
INPUTS = {'o_DNH': 2}  # input axes of a leaf, where there are several


@flax.struct.dataclass
class Panels:
  """A weight as cpu.pack makes it. outputs: its output axes."""

  w_QIp: jax.Array
  outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.outputs, self.w_QIp.shape[1])


Weight = jax.Array | Panels


def packed_tree(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
  """A stage's parameters, or ShapeDtypeStructs of them, as products take them
  fastest on a CPU. The tree is taken apart: one leaf at a time is held twice.
  """
  whole = NamedSharding(mesh, PartitionSpec())

  def put(array: Any) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=whole)
    return jax.device_put(array, whole)

  is_head = 'norm_D' in params and 'head_VD' not in params
  wanted = PACKED | ({'embed_VD'} if is_head else set())
  for leaves in (params, *params['layers']):
    for leaf in wanted & leaves.keys():
      weight = leaves.pop(leaf)
      pack = functools.partial(_packed, len(weight.shape) - INPUTS.get(leaf, 1))
      leaves[leaf] = jax.tree.map(put, (
          jax.eval_shape(pack, weight)
          if isinstance(weight, jax.ShapeDtypeStruct) else pack(weight)))
  return params


@functools.partial(jax.jit, static_argnums=0)
def _packed(axes: int, weight: jax.Array) -> Panels:
  """axes: how many are those of its outputs."""
  outputs = weight.shape[:axes]
  return Panels(cpu.pack(weight.reshape(math.prod(outputs), -1)), outputs)


def project(weight: Weight, x_SI: jax.Array, inputs: int = 1) -> jax.Array:
  """x W^T; W has any number of output axes first, then its input axes.

  Up to SMALL tokens a weight that is not packed is the left operand: 1.7 times
  faster on CPU, which then streams W instead of repacking it.
  """
  if isinstance(weight, Panels):
    outputs = weight.outputs
    y_SO = cpu.multiply(x_SI, weight.w_QIp)[:, :math.prod(outputs)]
  else:
    outputs = weight.shape[:-inputs]
    w_OI = weight.reshape(-1, x_SI.shape[1])
    if x_SI.shape[0] <= SMALL:
      y_SO = jax.lax.dot_general(w_OI, x_SI, (((1,), (1,)), ((), ()))).T
    else:
      y_SO = jax.lax.dot_general(x_SI, w_OI, (((1,), (1,)), ((), ())))
  return y_SO.reshape(x_SI.shape[0], *outputs)


def rows_of(weight: Weight, row_S: jax.Array) -> jax.Array:
  """Rows of a weight of one output axis."""
  if not isinstance(weight, Panels):
    return weight[row_S]
  p = weight.w_QIp.shape[2]
  return weight.w_QIp[row_S // p, :, row_S % p]
