"""Memory that a hand-off comes into, of two CPU devices at once.

CPU devices of a process share its memory. So pages go from a pool to a Landing
and from there to another device's pool: two copies, where three take a gather,
a copy between devices and a scatter. A Landing is kept, as the first touch of
new memory costs more than the copy.

XLA takes a Landing for an operand that is only read; the order of who writes
and who reads it is the Transfer's affair, which holds it alone, and reads it
once what wrote it is done.
"""

from collections.abc import Sequence
from typing import Any

import jax

from dsjax.kernels import cpu
from dsjax.runtime.protocols import Pending

KEPT = 1  # of a target; memory.py counts them


class Landing:
  """`size` bytes; `last`: what has to be ready before they are used anew."""

  def __init__(self, size: int) -> None:
    self._memory, = cpu.room([size])
    self._on: dict[jax.Device, jax.Array] = {}
    self.last: Sequence[Pending] = ()

  def on(self, device: jax.Device) -> jax.Array:
    """Its bytes, as an array of this CPU device.

    Raises:
      RuntimeError: jax has copied them.
    """
    if device not in self._on:
      array = jax.device_put(self._memory, device)
      if array.unsafe_buffer_pointer() != self._memory.ctypes.data:
        raise RuntimeError(f'memory of this process was copied to {device}')
      self._on[device] = array
    return self._on[device]

  def is_free(self) -> bool:
    """Whether nothing writes or reads it any more."""
    return not any(x.is_deleted() or not x.is_ready() for x in self.last)


class Landings:
  """Those of one target."""

  def __init__(self, size: int) -> None:
    self.size = size
    self.kept: list[Landing] = []

  def take(self) -> Landing:
    """One that is free, kept or new."""
    for landing in self.kept:
      if landing.is_free():
        self.kept.remove(landing)
        return landing
    return Landing(self.size)

  def give(self, landing: Landing, last: Sequence[Pending]) -> None:
    """Takes one back, which `last` still uses; keeps the newest."""
    landing.last = last
    self.kept = [landing, *self.kept][:KEPT]


def shares(source: Any, target: Any) -> bool:
  """Whether pages go from one engine to another through a Landing: as they
  are, from one CPU device of this process to another."""
  meshes = [*source.where[2], *target.where[2]]  # a Peer has none
  return (len(source.where[2]) == len(target.where[2]) == 1
          and all(mesh.size == 1 for mesh in meshes)
          and source.shapes.attention == target.shapes.attention == 'cpu'
          and source.shapes.kv_dtype == target.shapes.kv_dtype
          and source.capacity.page_size == target.capacity.page_size)
