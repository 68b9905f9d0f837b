"""What is offered of an instance's pages, and what its puller expects.

The pieces of a batch (migration.cut_pieces), each of one device, as few arrays
(parcels.py); or the parts of a Landing, where a kernel copies pages at both
ends.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from dsjax.model import kv_cache
from dsjax.runtime import migration
from dsjax.runtime.cluster import parcels
from dsjax.runtime.engine import Engine
from dsjax.runtime.landing import part_sizes
from dsjax.runtime.protocols import Pending


def cut(engine: Engine, route: migration.Route, batch: migration.Batch,
        checksum: bool, stop: int = 0
        ) -> tuple[list[jax.Array], list[Pending]]:
  """What the source offers of a batch, and the sums of what it has read."""
  read = route.read(batch)
  sums = engine.checksum(read, batch.first, stop) if checksum else []
  return [x for piece in _by_piece(route, migration.cut_pieces(
      read, route.pieces, engine.where)) for x in parcels.pack(piece)], sums


def like(engine: Engine, route: migration.Route, command: Any
         ) -> list[list[jax.ShapeDtypeStruct]]:
  """What comes to the target: of each batch, or of the source's Landing."""
  if route.shares:
    return [bytes_like(engine, route, command)]
  return [[x for piece in _by_piece(route, _cut_like(engine, route, batch))
           for x in parcels.packed_like(piece)]
          for batch in route.batches(command)]


def bytes_like(engine: Engine, route: migration.Route, command: Any
               ) -> list[jax.ShapeDtypeStruct]:
  """The parts of a Landing."""
  to = SingleDeviceSharding(engine.devices[0])
  return [jax.ShapeDtypeStruct((size,), np.uint8, sharding=to)
          for size in part_sizes(route.bytes_shared(command, engine))]


def unpacked(engine: Engine, route: migration.Route, batch: migration.Batch,
             packed: Sequence[jax.Array]) -> list[jax.Array]:
  """What the source has cut of a batch, of what came to the target."""
  arrays, left = [], iter(packed)
  for piece in _by_piece(route, _cut_like(engine, route, batch)):
    arrays += parcels.unpack([next(left) for _ in parcels.groups(piece)], piece)
  return arrays


def kind(arrays: Sequence[Any]) -> int:
  """A hash of shapes and dtypes."""
  return zlib.crc32(repr([(tuple(x.shape), str(x.dtype)) for x in arrays]
                         ).encode())


def _cut_like(engine: Engine, route: migration.Route, batch: migration.Batch
              ) -> list[jax.ShapeDtypeStruct]:
  """What the source cuts of a batch, on the target's devices."""
  made = []
  for piece in route.pieces:
    stage, shard = piece.target
    span, mesh = engine.where[1][stage], engine.where[2][stage]
    layers = kv_cache.by_layer(engine.stages[stage].cache)
    to = SingleDeviceSharding(mesh.devices.flat[shard])
    made += [jax.ShapeDtypeStruct(
        (len(piece.places), len(batch.target), *x.shape[2:]), x.dtype,
        sharding=to) for layer in range(*piece.layers)
             for x in layers[layer - span[0]]]
  return made


def _by_piece(route: migration.Route, parts: Sequence[Any]
              ) -> list[Sequence[Any]]:
  """What cut_pieces gave, a piece each: all of it is of one device."""
  layers = [len(range(*piece.layers)) for piece in route.pieces]
  each, pieces, start = len(parts) // sum(layers), [], 0
  for count in layers:
    pieces.append(parts[start:start + count * each])
    start += count * each
  return pieces
