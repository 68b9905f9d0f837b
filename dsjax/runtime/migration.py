"""KV pages from one instance's meshes to another's: the only place they move.

Any (tp, pp) to any (tp', pp'). A pure planner says which heads of which
layers go from which device to which; the shell cuts them out on the source
device, copies device to device, explicitly, never through the host, and joins
them on the target device. Pages are re-cut and numbers converted on the
source, before the copy, so that no more is copied than the target keeps.
(`jax.device_put` between meshes of unequal shard shapes reads the whole
array on the host, so it is never asked to reshard.)

From one CPU device to another whose pages have the same bytes, they go through
memory of both (landing.py), in one program on either side.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.model import kv_cache as kv
from dsjax.model import sharding
from dsjax.runtime.arrays import is_ready
from dsjax.runtime.landing import Landing, maps, shares
from dsjax.runtime.protocols import Pending
from dsjax.scheduling import page_pool
from dsjax.scheduling.events import Migrate

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


def cut_pieces(trees: Sequence[kv.Cache], pieces: Sequence[Piece],
               source: Where) -> list[jax.Array]:
  """Pages on the move, a Cache a source stage, as arrays of one device each:
  for each piece, layer and part of a layer's cache in turn."""
  devices = _devices(source)
  shards = [[[{s.device: s.data for s in x.addressable_shards} for x in layer]
             for layer in kv.by_layer(tree)] for tree in trees]
  parts = []
  for piece in pieces:
    stage, shard = piece.source
    first = source[1][stage][0]
    for layer in range(*piece.layers):
      for x in shards[stage][layer - first]:
        data = x[devices[stage][shard]]
        whole = piece.places == tuple(range(data.shape[0]))
        parts.append(data if whole else _take(data, piece.places))
  return parts


def join_pieces(parts: Sequence[jax.Array], pieces: Sequence[Piece],
                target: Where) -> list[kv.Cache]:
  """What cut_pieces gave, on the target's devices, as a Cache a target
  stage."""
  layout, spans, meshes = target
  devices, landed = _devices(target), iter(parts)
  count = len(parts) // sum(len(range(*piece.layers)) for piece in pieces)
  placed = collections.defaultdict(list)  # layer, part, shard -> arrays
  for piece in pieces:
    for layer in range(*piece.layers):
      for part in range(count):
        placed[layer, part, piece.target[1]].append(next(landed))
  size = len(layout.kv_heads) // layout.tp

  def whole(layer: int, part: int, mesh: Mesh, stage: int) -> jax.Array:
    ready = []
    for shard in range(layout.tp):
      heads = placed.get((layer, part, shard))
      if heads is None:
        like = next(v for k, v in placed.items() if k[:2] == (layer, part))[0]
        ready.append(_zeros((size, *like.shape[1:]), like.dtype.name,
                            devices[stage][shard]))
      else:
        held = sum(x.shape[0] for x in heads)
        ready.append(heads[0] if len(heads) == 1 and held == size
                     else _join(heads, size - held))
    shape = (len(layout.kv_heads), *ready[0].shape[1:])
    return jax.make_array_from_single_device_arrays(
        shape, sharding.kv(mesh), ready)

  return [kv.from_layers([tuple(
      whole(layer, part, mesh, stage) for part in range(count))
      for layer in range(*span)])
          for stage, (span, mesh) in enumerate(
              zip(spans, meshes, strict=True))]


def _devices(where: Where) -> list[list[jax.Device]]:
  """The devices of each stage."""
  return [list(mesh.devices.flat) for mesh in where[2]]


def move(trees: Sequence[kv.Cache], pieces: Sequence[Piece], source: Where,
         target: Where) -> tuple[list[kv.Cache], int]:
  """Pages on the move, a Cache a source stage, as a Cache a target stage.

  Returns:
    (the target's Caches, bytes copied).
  """
  parts, devices = cut_pieces(trees, pieces, source), _devices(target)
  count = len(parts) // sum(len(range(*piece.layers)) for piece in pieces)
  to = [devices[piece.target[0]][piece.target[1]] for piece in pieces
        for _ in range(len(range(*piece.layers)) * count)]
  return (join_pieces(jax.device_put(parts, to), pieces, target),
          sum(x.nbytes for x in parts))


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
    moved: (target pages, Caches) of each batch, until it lands; with a
      landing, what is ready when that holds them in place of the Caches.
    bytes: copied between devices, the last batch's padding included.
    start_s: when it was dispatched, on time.perf_counter.
    sent, arrived: checksums of each stage and batch, when asked for.
    lent: the landing is not the target's.
  """

  route: 'Route'
  command: Migrate
  moved: Sequence[tuple[Sequence[int], list[Any]]]
  bytes: int
  start_s: float
  checksum: bool = False
  sent: list[Pending] = dataclasses.field(default_factory=list)
  landing: Landing | None = None
  arrived: list[Pending] = dataclasses.field(default_factory=list)
  landed: bool = False
  lent: bool = False

  def __post_init__(self) -> None:
    self._arrays = jax.tree.leaves([tree for _, tree in self.moved])
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
    landing, self.landing = self.landing, None
    for ids, caches in self.moved:
      if landing:
        jax.block_until_ready(caches)  # at once, if it has arrived
        caches = [landing.on(target.devices[0])]
      done += target.scatter(ids, caches)
    if landing and not self.lent:
      target.landings.give(landing, done)
    if self.checksum:
      most = target.capacity.num_pages - 1
      for batch in self.route.batches(self.command):
        self.arrived += target.checksum(
            target.gather([min(p, most) for p in batch.target]), batch.first,
            self.command.num_tokens)
    self.moved, self._arrays = [], []
    return done

  def wait(self) -> None:
    """Waits until it has landed, where no fleet looks at it."""
    jax.block_until_ready(self.land())

  def is_ready(self) -> bool:
    """Whether it has landed, and its checksums, if asked for, are there."""
    return self.landed and all(map(is_ready, self.sent + self.arrived))

  def check(self) -> None:
    """Raises Damaged unless the checksums agree. Call when ready."""
    compare(total(self.sent), total(self.arrived))

  def drop(self) -> None:
    """Gives it up: it writes nothing any more."""
    if self.landing:
      self.route.target.landings.give(self.landing, self._arrays)
    self.moved, self._arrays, self._left = [], [], []
    self.landing = None


def total(sums: Sequence[Pending]) -> int:
  """The checksum that these are the shares of."""
  return sum(map(int, jax.device_get(sums))) % 2**32


def compare(sent: int, arrived: int) -> None:
  """Raises Damaged unless two checksums agree."""
  if sent != arrived:
    raise Damaged(f'KV checksum {arrived:#x} arrived, {sent:#x} was sent')


def batches(count: int, buckets: Sequence[int]) -> list[int]:
  """Copy sizes that make up `count`: few and large."""
  sizes = []
  while count > 0:
    sizes.append(max((b for b in buckets if b <= count), default=buckets[0]))
    count -= sizes[-1]
  return sizes


class Batch(NamedTuple):
  """Pages that are copied at once: ids at the source, at the target, and the
  first token that they hold. The source's are padded with any page, the
  target's with none."""

  source: list[int]
  target: list[int]
  first: int


class Peer(NamedTuple):
  """An engine of another process, as a Route needs it; `where` has no
  meshes. by_kernel: see Engine. memory: see messages.Built."""

  role: str
  config: EngineConfig
  capacity: InstanceConfig
  where: Where
  by_kernel: bool
  memory: str = ''


def hands_off(source: InstanceConfig, target: InstanceConfig, fetches: bool
              ) -> bool:
  """Whether KV may go from one instance to another, a different one.

  fetches: see Policy; what is kept goes to any that takes prompts.
  """
  return ((source.flips or not source.decodes) and target.decodes
          or fetches and target.prefills and source.kv_dtype == target.kv_dtype)


def nowhere(source: InstanceConfig, target: InstanceConfig, size: int = 1
            ) -> Migrate:
  """A Migrate of `size` times the fewest tokens, which writes no page."""
  tokens = size * math.lcm(source.page_size, target.page_size)
  return Migrate(0, 0, 0, (0,) * (tokens // source.page_size), 0,
                 (target.num_pages,) * (tokens // target.page_size), tokens)


class Route:
  """How KV goes from one Engine to another: pieces and page sizes.

  One of the two may be a Peer: the other half is then for its process.
  """

  def __init__(self, source: Any, target: Any) -> None:
    self.source, self.target = source, target
    self.pieces = plan_pieces(*source.where[:2], *target.where[:2])
    sizes = source.capacity.page_size, target.capacity.page_size
    self.tokens = math.lcm(*sizes)  # of the least that both sides can cut
    self.each = tuple(self.tokens // size for size in sizes)
    # What a request can have, in self.tokens.
    self.most = page_pool.pages_for(source.config.max_len, self.tokens)
    self.buckets = tuple(sorted({
        min(self.most, max(1, n // self.each[0]))
        for n in source.config.page_buckets}))
    self.shares, self.maps = shares(source, target), maps(source, target)

  def batches(self, command: Migrate) -> list[Batch]:
    """The copies that a Migrate takes."""
    made, done = [], 0  # done: in self.tokens
    pads = (0, self.target.capacity.num_pages)  # any page; no page
    for size in batches(page_pool.pages_for(command.num_tokens, self.tokens),
                        self.buckets):
      here, there = (list(p[done * n:(done + size) * n]) for p, n in zip(
          (command.source_pages, command.target_pages), self.each,
          strict=True))
      here, there = (p + [pad] * (size * n - len(p)) for p, pad, n in zip(
          (here, there), pads, self.each, strict=True))
      made.append(Batch(here, there, done * self.tokens))
      done += size
    return made

  def read(self, batch: Batch) -> list[kv.Cache]:
    """The source's pages, as the target would hold them."""
    target = self.target
    return self.source.gather(batch.source, target.capacity.page_size,
                              target.config.kv_dtype_of(target.role))

  def start(self, command: Migrate, checksum: bool = False) -> Transfer:
    """Dispatches the copies of a Migrate: a Transfer, which is to land."""
    if self.shares:
      return self._start_shared(command, checksum)
    began, stop = time.perf_counter(), command.num_tokens
    moving, sent, copied = [], [], 0
    for batch in self.batches(command):
      read = self.read(batch)
      moved, size_bytes = move(read, self.pieces, self.source.where,
                               self.target.where)
      moving.append((batch.target, moved))
      if checksum:
        sent += self.source.checksum(read, batch.first, stop)
      copied += size_bytes
    return Transfer(self, command, moving, copied, began, checksum, sent)

  def _start_shared(self, command: Migrate, checksum: bool) -> Transfer:
    """As start, through a Landing: in one batch, whatever its size."""
    began, target = time.perf_counter(), self.target
    landing = target.landings.take()
    read = self.read_shared(command, landing)
    sent = self.sums(command) if checksum else []
    return Transfer(self, command, [(self.filled(
        command.target_pages, target), read)], self.bytes_shared(
            command, target), began, checksum, sent, landing)

  def read_shared(self, command: Migrate, landing: Landing) -> list[Any]:
    """Dispatches the reading of the source's pages; what is ready then."""
    source = self.source
    return source.gather(self.filled(command.source_pages, source), None, None,
                         landing.on(source.devices[0]))

  def sums(self, command: Migrate) -> list[Pending]:
    """Checksums of the source's pages, of each batch."""
    return [share for batch in self.batches(command) for share in
            self.source.checksum(self.read(batch), batch.first,
                                 command.num_tokens)]

  def filled(self, pages: Sequence[int], end: Any) -> list[int]:
    """As many ids as a Landing has room for; `end`: of which pages."""
    return [*pages, *[end.capacity.num_pages] * (self.most - len(pages))]

  def bytes_shared(self, command: Migrate, end: Any) -> int:
    """Bytes of a Migrate in a Landing; `end`: the source or the target, an
    Engine."""
    return end.landings.size // self.most * len(command.source_pages)

  def nowhere(self, size: int) -> Migrate:
    """A Migrate of `size` x self.tokens tokens that writes no page."""
    return nowhere(self.source.capacity, self.target.capacity, size)

  def warm(self, checksum: bool = False) -> None:
    """Copies pages nowhere in each size, so that nothing compiles later."""
    for size in self.buckets if checksum or not self.shares else (1,):
      transfer = self.start(self.nowhere(size), checksum)
      done = transfer.land()
      jax.block_until_ready((done, transfer.sent, transfer.arrived))
