"""Many arrays of a device side by side in a few, and back.

A pull takes some 70 us for each array, however small it is.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from dsjax.runtime.landing import PART_BYTES

Groups: TypeAlias = tuple[tuple[int, ...], ...]


def groups(like: Sequence[Any]) -> Groups:
  """Places of the arrays that go into one: they have one dtype, and
  PART_BYTES at most where they are several.

  Args:
    like: arrays, or their ShapeDtypeStructs.
  """
  made: list[list[int]] = []
  last: dict[Any, tuple[list[int], int]] = {}  # by dtype, with its bytes
  for place, x in enumerate(like):
    size = math.prod(x.shape) * x.dtype.itemsize
    group, held = last.get(x.dtype, ([], PART_BYTES + 1))
    if held + size > PART_BYTES:
      group, held = [], 0
      made.append(group)
    group.append(place)
    last[x.dtype] = group, held + size
  return tuple(map(tuple, made))


def packed_like(like: Sequence[jax.ShapeDtypeStruct]
                ) -> list[jax.ShapeDtypeStruct]:
  """What `pack` makes of arrays like these."""
  return [jax.ShapeDtypeStruct(
      (sum(math.prod(like[i].shape) for i in places),), like[places[0]].dtype,
      sharding=like[places[0]].sharding) for places in groups(like)]


def pack(arrays: Sequence[jax.Array]) -> list[jax.Array]:
  """Arrays of one device as few, of one axis."""
  return _pack(tuple(arrays), groups(arrays))


def unpack(packed: Sequence[jax.Array],
           like: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
  """The inverse; like: the arrays that were packed."""
  return _unpack(tuple(packed), groups(like), tuple(
      tuple(x.shape) for x in like))


@functools.partial(jax.jit, static_argnums=1)
def _pack(arrays, of):
  return [jnp.concatenate([arrays[i].reshape(-1) for i in places])
          for places in of]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _unpack(packed, of, shapes):
  arrays = [packed[0]] * len(shapes)
  for x, places in zip(packed, of, strict=True):
    start = 0
    for i in places:
      size = math.prod(shapes[i])
      arrays[i] = x[start:start + size].reshape(shapes[i])
      start += size
  return arrays
