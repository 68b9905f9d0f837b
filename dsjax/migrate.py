"""KV pages from one instance's mesh to another's: the only place they move.

Copies are device to device and explicit, never through the host. A pure
planner says which slice of which source shard each target device needs; the
shell slices on the source device, copies, and joins on the target device.
(`jax.device_put` between meshes of unequal shard shapes reads the whole
array on the host, so it is never asked to reshard.)
"""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp

from dsjax import sharding


def plan_heads(num_kv_heads, source_tp, target_tp):
  """For each target shard, the (source shard, low, high) heads it needs.

  Low and high count within the source shard. The pieces of a target shard,
  in order, are its heads, in order.
  """
  from_size, to_size = num_kv_heads // source_tp, num_kv_heads // target_tp
  pieces = []
  for shard in range(target_tp):
    first, last = shard * to_size, (shard + 1) * to_size
    pieces.append([
        (s, max(first, s * from_size) - s * from_size,
         min(last, (s + 1) * from_size) - s * from_size)
        for s in range(source_tp)
        if s * from_size < last and (s + 1) * from_size > first])
  return pieces


@functools.partial(jax.jit, static_argnums=(1, 2))
def _slice(x_Kmch, low, high):
  return x_Kmch[low:high]


@jax.jit
def _join(parts):
  return jnp.concatenate(parts)


def _devices(mesh):
  return list(mesh.devices.flat)


def move(tree, source_mesh, target_mesh):
  """A tree of pages [K, m, C, H], sharded by head, onto another mesh."""
  target = sharding.kv(target_mesh)
  leaves, treedef = jax.tree.flatten(tree)
  if source_mesh.size == target_mesh.size == 1:
    return jax.device_put(tree, target)
  pieces = plan_heads(leaves[0].shape[0], source_mesh.size, target_mesh.size)
  moved = []
  for x in leaves:
    shards = {s.device: s.data for s in x.addressable_shards}
    sources = [shards[d] for d in _devices(source_mesh)]
    placed = []
    for device, needed in zip(_devices(target_mesh), pieces, strict=True):
      parts = [jax.device_put(
          sources[s] if high - low == sources[s].shape[0]
          else _slice(sources[s], low, high), device)
               for s, low, high in needed]
      placed.append(parts[0] if len(parts) == 1 else _join(parts))
    moved.append(jax.make_array_from_single_device_arrays(
        x.shape, target, placed))
  return jax.tree.unflatten(treedef, moved)


@dataclasses.dataclass
class Transfer:
  """A hand-off in flight. bytes: copied, the last batch's padding included."""

  command: object
  done: list
  bytes: int
  start_s: float

  def is_ready(self):
    """The target holds every page."""
    return all(d.is_ready() for d in self.done)


def batches(count, buckets):
  """Copy sizes for `count` pages: few and large, the last one padded."""
  sizes = []
  while count > 0:
    sizes.append(max((b for b in buckets if b <= count), default=buckets[0]))
    count -= sizes[-1]
  return sizes


def start(source, target, command):
  """Dispatches the copies of a Migrate between two Engines."""
  done, copied, at = [], 0, 0
  began = time.perf_counter()
  for size in batches(len(command.source_pages), source.config.page_buckets):
    read = source.gather(command.source_pages[at:at + size])
    moved = move(read, source.shapes.mesh, target.shapes.mesh)
    done.append(target.scatter(command.target_pages[at:at + size], moved))
    copied += sum(x.nbytes for x in jax.tree.leaves(moved))
    at += size
  return Transfer(command, done, copied, began)


def warm(source, target):
  """Copies pages nowhere in each size, so that nothing compiles later."""
  for size in source.config.page_buckets:
    nowhere = (target.shapes.num_pages,) * size  # dropped by the target
    read = source.gather((0,) * size)
    moved = move(read, source.shapes.mesh, target.shapes.mesh)
    jax.block_until_ready(target.scatter(nowhere, moved))
