"""How a model is cut for a Plan: stages, shards, meshes and PartitionSpecs.

Pipeline parallelism is a sub-mesh and a run of layers for each stage. Tensor
parallelism is the mesh axis 'model': heads, feed-forward, vocabulary and
experts are split over it. Sizes that tp does not divide are padded with
zeros, and kv heads are replicated where there are fewer of them than shards
(`cut`), so that every plan runs the same program on equal shards.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax.config.checks import require
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement, Plan

AXIS = 'model'
Span = tuple[int, int]  # layers [first, last)
Make = Callable[[str, int | None], Any]  # of a leaf's name and layer
_SPLIT = 'VNKFE'  # letters of axes that are split
_REPLICATED = ('router_ED',)  # every shard chooses the experts of every token


@dataclasses.dataclass(frozen=True)
class Layout:
  """A model cut for tp shards.

  Attributes:
    model: the model; padded: its shape with the arrays' head counts and d_ff
      (the vocabulary's rows are padded too, but its size stays).
    tp: shards.
    heads, kv_heads: the model's head held at each place of the arrays; -1
      where there is none (zeros).
  """

  model: ModelConfig
  padded: ModelConfig
  tp: int
  heads: tuple[int, ...]
  kv_heads: tuple[int, ...]

  def shape(self, leaf: str) -> tuple[int, ...]:
    """The shape of a parameter as it lies on the mesh."""
    shape = list(self.padded.leaf_shape(leaf))
    letters = leaf.rsplit('_', 1)[1]
    if 'V' in letters:
      axis = letters.index('V')
      shape[axis] += -shape[axis] % self.tp
    return tuple(shape)

  def source(self, leaf: str, index: Sequence[slice]) -> tuple[slice, ...]:
    """The part of a stored parameter that a shard begins with; zeros follow.

    That is all of a shard, since its heads are a run (`cut`): of several
    places for kv heads that a shard has, none is a copy.

    Args:
      index: a slice an axis of the parameter as it lies on the mesh.
    """
    held = {'N': self.heads, 'K': self.kv_heads}
    part = []
    for letter, places, size in zip(
        leaf.rsplit('_', 1)[1], index, self.model.leaf_shape(leaf),
        strict=True):
      real = [i for i in held.get(letter, range(size))[places] if i >= 0]
      part.append(slice(real[0], real[-1] + 1) if real else slice(0, 0))
    return tuple(part)

  def pad(self, leaf: str,
          array: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """A parameter of the model as it lies on the mesh: itself, or numpy."""
    letters, want = leaf.rsplit('_', 1)[1], self.shape(leaf)
    if array.shape == want and self.heads == tuple(range(len(self.heads))):
      return array
    padded = np.asarray(array)
    for axis, letter in enumerate(letters):
      if letter in 'NK':
        held = np.array(self.heads if letter == 'N' else self.kv_heads)
        padded = np.take(padded, np.maximum(held, 0), axis)
        padded[(slice(None),) * axis + (held < 0,)] = 0
      elif padded.shape[axis] < want[axis]:
        extra = [(0, 0)] * padded.ndim
        extra[axis] = (0, want[axis] - padded.shape[axis])
        padded = np.pad(padded, extra)
    return padded


def cut(config: ModelConfig, tp: int) -> Layout:
  """The Layout of a model over tp shards.

  Every shard has `slots` places for a kv head, each with the same number of
  query heads. With more places than kv heads, each kv head takes as many
  places as there are for all, and its query heads are dealt out to them
  (Megatron and vLLM replicate alike where tp is a multiple of K).

  Raises:
    InputError: more shards than query heads, or experts that tp does not
      divide.
  """
  N, K = config.num_heads, config.num_kv_heads
  require(tp <= N, 'Plan.tp', tp, f'at most the {N} heads of '
          f'{config.name}')
  require(config.num_experts % tp == 0, 'Plan.tp', tp,
          f'a divisor of the {config.num_experts} experts of '
          f'{config.name}')
  slots = tp * -(-K // tp)
  copies = slots // K
  group = N // K
  share = -(-group // copies)
  heads, kv_heads = [], []
  for slot in range(slots):
    kv, copy = divmod(slot, copies)
    kv_heads.append(kv if kv < K else -1)
    for i in range(copy * share, (copy + 1) * share):
      heads.append(kv * group + i if kv < K and i < group else -1)
  d_ff = config.d_ff
  if not config.num_experts:
    d_ff += -d_ff % tp
  padded = dataclasses.replace(
      config, num_heads=len(heads), num_kv_heads=slots, d_ff=d_ff,
      joint_norm=config.joint_norm and (N, K * copies))
  return Layout(config, padded, tp, tuple(heads), tuple(kv_heads))


def spans(num_layers: int, pp: int) -> tuple[Span, ...]:
  """The layers [first, last) of each pipeline stage, as even as they go.

  The last stages are the smaller ones: the last one has the head to run.
  """
  require(pp <= num_layers, 'Plan.pp', pp,
          f'at most the {num_layers} layers')
  size, more = divmod(num_layers, pp)
  ends = [s * size + min(s, more) for s in range(pp + 1)]
  return tuple(zip(ends[:-1], ends[1:], strict=True))


def make_meshes(config: ModelConfig, placement: Placement,
                devices: Sequence[jax.Device]) -> list[tuple[Mesh, ...]]:
  """The meshes of each instance, one a stage, devices taken in order.

  Raises:
    InputError: more devices are asked for than exist, or a plan that the
      model cannot run.
  """
  require(placement.num_devices <= len(devices), 'Placement',
          f'{placement.num_devices} devices',
          f'at most the {len(devices)} that exist')
  require(not any(plan.kind for _, plan in placement.instances), 'Plan.kind',
          placement, "'': devices of one kind serve")
  instances, taken = [], 0
  for _, plan in placement.instances:
    instances.append(stage_meshes(config, plan, devices[taken:]))
    taken += plan.num_devices
  return instances


def stage_meshes(config: ModelConfig, plan: Plan,
                 devices: Sequence[jax.Device]) -> tuple[Mesh, ...]:
  """The meshes of an instance, one a stage, of the first devices.

  Raises:
    InputError: a plan that the model cannot run.
  """
  cut(config, plan.tp)
  spans(config.num_layers, plan.pp)
  return tuple(Mesh(np.array(devices[stage * plan.tp:(stage + 1) * plan.tp]),
                    (AXIS,)) for stage in range(plan.pp))


def stage_leaves(config: ModelConfig, span: Span) -> tuple[str, ...]:
  """Names of the parameters outside the layers that a stage needs."""
  first, last = span[0] == 0, span[1] == config.num_layers
  ends = {'embed_VD': first or (last and config.tied), 'pos_TD': first}
  return tuple(leaf for leaf in config.top_leaves if ends.get(leaf, last))


def stage_tree(config: ModelConfig, span: Span,
               make: Make) -> dict[str, Any]:
  """The tree of a stage with make(leaf name, layer number or None)."""
  top = {leaf: make(leaf, None) for leaf in stage_leaves(config, span)}
  return top | {'layers': tuple(
      {leaf: make(leaf, layer) for leaf in config.layer_leaves}
      for layer in range(*span))}


def abstract_params(layout: Layout, span: Span, mesh: Mesh,
                    dtype: str) -> dict[str, Any]:
  """The parameters of a stage as sharded ShapeDtypeStructs."""
  return stage_tree(layout.model, span, lambda leaf, _: jax.ShapeDtypeStruct(
      layout.shape(leaf), dtype, sharding=NamedSharding(mesh, spec(leaf))))


def place_params(layout: Layout, span: Span, mesh: Mesh,
                 params: Mapping[str, Any]) -> dict[str, Any]:
  """The parameters of a stage on its mesh.

  One at a time, so that what is padded is not kept on the host.
  """
  def put(leaf: str, layer: int | None) -> jax.Array:
    source = params if layer is None else params['layers'][layer]
    return jax.device_put(layout.pad(leaf, source[leaf]),
                          NamedSharding(mesh, spec(leaf)))

  return stage_tree(layout.model, span, put)


def spec(leaf: str) -> PartitionSpec:
  """The PartitionSpec of a parameter: its first axis that can be split."""
  letters = leaf.rsplit('_', 1)[1]
  if leaf in _REPLICATED:
    return PartitionSpec()
  axes = [AXIS if letter in _SPLIT else None for letter in letters]
  if AXIS not in axes:
    return PartitionSpec()
  return PartitionSpec(*axes[:axes.index(AXIS) + 1])


def on_host(mesh: Mesh, x: jax.Array) -> list[np.ndarray]:
  """The part of each device of an array's mesh. Of CPU devices no copies."""
  held = {shard.device: shard.data for shard in x.addressable_shards}
  with jax.transfer_guard_device_to_host('allow'):  # it is meant to
    return [np.asarray(held[device]) for device in mesh.devices.flat]


def from_host(like: jax.ShapeDtypeStruct,
              parts: Sequence[np.ndarray]) -> jax.Array:
  """The inverse of on_host. A CPU device has the parts themselves, where they
  begin at a multiple of 64 bytes, which nothing may write to any more."""
  return jax.make_array_from_single_device_arrays(
      like.shape, like.sharding, [
          jax.device_put(part, device) for part, device in zip(
              parts, like.sharding.mesh.devices.flat, strict=True)])


def kv(mesh: Mesh) -> NamedSharding:
  """Cache arrays and migrating pages: split by kv head."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every shard."""
  return NamedSharding(mesh, PartitionSpec())


def shard_map(mesh: Mesh | None, op: Callable[..., Any], in_specs: Any,
              out_specs: Any) -> Callable[..., Any]:
  """op on each shard's part of its arguments; itself where nothing is cut.

  For what XLA cannot cut by itself: kernels. What it gives of an axis that is
  not cut has to be the same on every shard.
  """
  if mesh is None or mesh.size == 1:
    return op
  return jax.shard_map(op, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
                       check_vma=False)
