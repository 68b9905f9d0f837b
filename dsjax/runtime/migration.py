"""KV pages from one instance's meshes to another's: the only place they move.

Any (tp, pp) to any (tp', pp'). A pure planner says which heads of which
layers go from which device to which; the shell cuts them out on the source
device, copies device to device, explicitly, never through the host, and joins
them on the target device. Pages are re-cut and numbers converted on the
source, before the copy, so that no more is copied than the target keeps.
(`jax.device_put` between meshes of unequal shard shapes reads the whole
array on the host, so it is never asked to reshard.)
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.model import kv_cache as kv
from dsjax.model import sharding
from dsjax.runtime.arrays import is_ready
from dsjax.runtime.protocols import Pending
from dsjax.scheduling import page_pool
from dsjax.scheduling.events import Migrate

if TYPE_CHECKING:
  from dsjax.runtime.engine import Engine

Span: TypeAlias = tuple[int, int]  # layers [first, last) of a stage
# How an engine holds the model, and where: its spans and meshes, by stage.
Where: TypeAlias = tuple[sharding.Layout, Sequence[Span], Sequence[Mesh]]


class Piece(NamedTuple):
  """KV that one device sends to another, for each page.

  layers: [first, last) of the model. source, target: (stage, shard).
  places: where the heads are in the source's shard, in the order in which
  they lie in the target's; heads: which of the model's they are.
  """

  layers: tuple[int, int]
  source: tuple[int, int]
  target: tuple[int, int]
  places: tuple[int, ...]
  heads: tuple[int, ...]


def plan_pieces(source: sharding.Layout, source_spans: Sequence[Span],
                target: sharding.Layout, target_spans: Sequence[Span]
                ) -> tuple[Piece, ...]:
  """The pieces of a migration between two plans of one model.

  Returns:
    Pieces by target stage, layer, target shard, head: every target shard
    gets each head that it holds once, from one of its holders.
  """
  heads = [_plan_heads(source, target, shard) for shard in range(target.tp)]
  return tuple(
      Piece((max(a[0], b[0]), min(a[1], b[1])), (s, shard), (t, to), places,
            held)
      for t, b in enumerate(target_spans)
      for s, a in enumerate(source_spans) if a[0] < b[1] and b[0] < a[1]
      for to in range(target.tp) for shard, places, held in heads[to])


def _plan_heads(source: sharding.Layout, target: sharding.Layout, to: int
                ) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
  """[(source shard, places, heads)] of the heads of target shard `to`."""
  each = len(source.kv_heads) // source.tp
  holders = collections.defaultdict(list)
  for place, head in enumerate(source.kv_heads):
    holders[head].append(divmod(place, each))
  size = len(target.kv_heads) // target.tp
  by_shard = {}
  for head in target.kv_heads[to * size:(to + 1) * size]:
    if head >= 0:  # replicas take turns as senders
      shard, place = holders[head][to % len(holders[head])]
      places, heads = by_shard.setdefault(shard, ([], []))
      places.append(place)
      heads.append(head)
  return [(shard, tuple(p), tuple(h))
          for shard, (p, h) in by_shard.items()]


def ratio(pieces: Sequence[Piece], source: sharding.Layout) -> float:
  """Heads copied over heads that the model has: above 1, replicas."""
  copied = sum(len(p.heads) * (p.layers[1] - p.layers[0]) for p in pieces)
  config = source.model
  return copied / (config.num_layers * config.num_kv_heads)


@functools.partial(jax.jit, static_argnums=1)
def _take(x_KmC: jax.Array, places: tuple[int, ...]) -> jax.Array:
  low = places[0]
  if places == tuple(range(low, low + len(places))):
    return x_KmC[low:low + len(places)]
  return jnp.stack([x_KmC[p] for p in places])


@functools.partial(jax.jit, static_argnums=1)
def _join(parts: Sequence[jax.Array], empty: int) -> jax.Array:
  """Heads side by side, and `empty` places of zeros after them."""
  x = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
  return jnp.pad(x, [(0, empty)] + [(0, 0)] * (x.ndim - 1))


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: str, device: jax.Device
           ) -> jax.Array:
  return jax.device_put(np.zeros(shape, dtype), device)


def move(trees: Sequence[kv.Cache], pieces: Sequence[Piece], source: Where,
         target: Where) -> tuple[list[kv.Cache], int]:
  """Pages on the move, a Cache a source stage, as a Cache a target stage.

  Returns:
    (the target's Caches, bytes copied).
  """
  layout, spans, meshes = target
  devices = [list(m.devices.flat) for m in source[2]], [
      list(m.devices.flat) for m in meshes]
  shards = [[[{s.device: s.data for s in x.addressable_shards} for x in layer]
             for layer in kv.by_layer(tree)] for tree in trees]
  parts, to = [], []
  for piece in pieces:
    stage, shard = piece.source
    first = source[1][stage][0]
    for layer in range(*piece.layers):
      for x in shards[stage][layer - first]:
        data = x[devices[0][stage][shard]]
        whole = piece.places == tuple(range(data.shape[0]))
        parts.append(data if whole else _take(data, piece.places))
        to.append(devices[1][piece.target[0]][piece.target[1]])
  landed = iter(jax.device_put(parts, to))
  placed = collections.defaultdict(list)  # layer, part, shard -> arrays
  for piece in pieces:
    for layer in range(*piece.layers):
      for part in range(len(shards[0][0])):
        placed[layer, part, piece.target[1]].append(next(landed))
  size = len(layout.kv_heads) // layout.tp

  def whole(layer: int, part: int, mesh: Mesh, stage: int) -> jax.Array:
    ready = []
    for shard in range(layout.tp):
      heads = placed.get((layer, part, shard))
      if heads is None:
        like = next(v for k, v in placed.items() if k[:2] == (layer, part))[0]
        ready.append(_zeros((size, *like.shape[1:]), like.dtype.name,
                            devices[1][stage][shard]))
      else:
        held = sum(x.shape[0] for x in heads)
        ready.append(heads[0] if len(heads) == 1 and held == size
                     else _join(heads, size - held))
    shape = (len(layout.kv_heads), *ready[0].shape[1:])
    return jax.make_array_from_single_device_arrays(
        shape, sharding.kv(mesh), ready)

  caches = [kv.from_layers([tuple(
      whole(layer, part, mesh, stage) for part in range(len(shards[0][0])))
      for layer in range(*span)])
            for stage, (span, mesh) in enumerate(
                zip(spans, meshes, strict=True))]
  return caches, sum(x.nbytes for x in parts)


class Damaged(RuntimeError):
  """What arrived is not what was sent."""


@dataclasses.dataclass(eq=False)
class Transfer:
  """A hand-off in flight.

  Its KV first comes into buffers of its own on the target's meshes, and only
  `land` writes the target's pages. So a copy that is late, lost or given up
  before that delays no request and has written nothing; after it, the target's
  operations come in order, so whatever uses these pages anew comes later.

  Attributes:
    route, command: what goes where.
    moved: (target pages, first token, Caches) of each batch, until it lands.
    bytes: copied between devices, the last batch's padding included.
    start_s: when it was dispatched, on time.perf_counter.
    sent, arrived: checksums of each stage and batch, when asked for.
  """

  route: 'Route'
  command: Migrate
  moved: list[tuple[list[int], int, list[kv.Cache]]]
  bytes: int
  start_s: float
  checksum: bool = False
  sent: list[Pending] = dataclasses.field(default_factory=list)
  arrived: list[Pending] = dataclasses.field(default_factory=list)
  landed: bool = False

  def __post_init__(self) -> None:
    self._arrays = jax.tree.leaves([tree for *_, tree in self.moved])
    self._left = list(self._arrays)

  def has_arrived(self) -> bool:
    """Whether the target's meshes hold every byte.

    Raises:
      RuntimeError: a copy failed.
    """
    while self._left and is_ready(self._left[-1]):
      self._left.pop()
    if self._left:
      return False
    jax.block_until_ready(self._arrays)  # at once; raises what went wrong
    return True

  def land(self) -> list[jax.Array]:
    """Dispatches the writing of the target's pages.

    Returns:
      arrays that are ready when the pages are in place.
    """
    target, done, self.landed = self.route.target, [], True
    for ids, first, caches in self.moved:
      done += target.scatter(ids, caches)
      if self.checksum:
        most = target.capacity.num_pages - 1
        self.arrived += target.checksum(
            target.gather([min(p, most) for p in ids]), first,
            self.command.num_tokens)
    self.moved, self._arrays = [], []
    return done

  def is_ready(self) -> bool:
    """Whether it has landed, and its checksums, if asked for, are there."""
    return self.landed and all(map(is_ready, self.sent + self.arrived))

  def check(self) -> None:
    """Raises Damaged unless the checksums agree. Call when ready."""
    sent, arrived = (sum(map(int, jax.device_get(s))) % 2**32
                     for s in (self.sent, self.arrived))
    if sent != arrived:
      raise Damaged(f'KV checksum {arrived:#x} arrived, {sent:#x} was sent')


def batches(count: int, buckets: Sequence[int]) -> list[int]:
  """Copy sizes that make up `count`: few and large."""
  sizes = []
  while count > 0:
    sizes.append(max((b for b in buckets if b <= count), default=buckets[0]))
    count -= sizes[-1]
  return sizes


class Route:
  """How KV goes from one Engine to another: pieces and page sizes."""

  def __init__(self, source: 'Engine', target: 'Engine') -> None:
    self.source, self.target = source, target
    self.pieces = plan_pieces(*source.where[:2], *target.where[:2])
    sizes = source.capacity.page_size, target.capacity.page_size
    self.tokens = math.lcm(*sizes)  # of the least that both sides can cut
    self.each = tuple(self.tokens // size for size in sizes)
    self.buckets = tuple(sorted({
        max(1, n // self.each[0]) for n in source.config.page_buckets}))

  def start(self, command: Migrate, checksum: bool = False) -> Transfer:
    """Dispatches the copies of a Migrate: a Transfer, which is to land."""
    source, target = self.source, self.target
    began, stop = time.perf_counter(), command.num_tokens
    batch, sent, copied, done = [], [], 0, 0  # done: in self.tokens
    for size in batches(page_pool.pages_for(stop, self.tokens), self.buckets):
      ids = [list(p[done * n:(done + size) * n]) for p, n in zip(
          (command.source_pages, command.target_pages), self.each,
          strict=True)]
      pads = (0, target.capacity.num_pages)  # any page; no page
      ids = [p + [pad] * (size * n - len(p)) for p, pad, n in zip(
          ids, pads, self.each, strict=True)]
      read = source.gather(ids[0], target.capacity.page_size,
                           target.config.kv_dtype_of(target.role))
      moved, size_bytes = move(read, self.pieces, source.where, target.where)
      first = done * self.tokens
      batch.append((ids[1], first, moved))
      if checksum:
        sent += source.checksum(read, first, stop)
      copied += size_bytes
      done += size
    return Transfer(self, command, batch, copied, began, checksum, sent)

  def warm(self, checksum: bool = False) -> None:
    """Copies pages nowhere in each size, so that nothing compiles later."""
    for size in self.buckets:
      here, there = (size * n for n in self.each)
      transfer = self.start(Migrate(
          0, 0, 0, (0,) * here, 0, (self.target.capacity.num_pages,) * there,
          size * self.tokens), checksum)
      done = transfer.land()
      jax.block_until_ready((done, transfer.sent, transfer.arrived))
