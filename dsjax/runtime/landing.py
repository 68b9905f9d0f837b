"""Memory that a hand-off comes into, of two CPU devices at once.

CPU devices of a process share its memory. So pages go from a pool to a Landing
and from there to another device's pool: two copies, where three take a gather,
a copy between devices and a scatter. So it is between processes of a host that
share one (cluster/shared_memory.py); else each side has its own, and bytes are
what is pulled. A Landing is kept, as the first touch of new
memory costs more than the copy.

XLA takes a Landing for an operand that is only read; the order of who writes
and who reads it is the Transfer's affair, which holds it alone, and reads it
once what wrote it is done.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsjax.kernels import cpu
from dsjax.runtime.protocols import Pending

KEPT = 1  # of a target; memory.py counts them
# Of an array that is pulled: malloc gives larger ones new memory each time, and
# their pull is slower.
PART_BYTES = 4 * 2**20


class Landing:
  """`size` bytes; `last`: what has to be ready before they are used anew."""

  def __init__(self, size: int, memory: np.ndarray | None = None) -> None:
    """memory: of so many bytes; None: new."""
    self._memory = next(cpu.room([size])) if memory is None else memory
    self._on: dict[jax.Device, jax.Array] = {}
    self.last: Sequence[Pending] = ()

  def on(self, device: jax.Device) -> jax.Array:
    """Its bytes, as an array of this CPU device.

    Raises:
      RuntimeError: jax has copied them.
    """
    if device not in self._on:
      self._on[device] = _shared(self._memory, device)
    return self._on[device]

  def parts(self, size: int, device: jax.Device) -> list[jax.Array]:
    """Its first `size` bytes, as arrays of `part_sizes`; they are read for as
    long as one of these is in use."""
    parts, start = [], 0
    for part in part_sizes(size):
      parts.append(_shared(self._memory[start:start + part], device))
      start += part
    return parts

  def fill(self, parts: Sequence[Any]) -> None:
    """Copies what `parts` gave, at another process, to its first bytes."""
    start = 0
    for part in parts:
      self._memory[start:start + part.size] = np.from_dlpack(part)
      start += part.size

  def is_free(self) -> bool:
    """Whether nothing writes or reads it any more."""
    return not any(x.is_deleted() or not x.is_ready() for x in self.last)


class Landings:
  """Those of one engine.

  Attributes:
    make: of their size, a new one. keeps: how many at most.
  """

  def __init__(self, size: int) -> None:
    self.size, self.keeps = size, KEPT
    self.make: Callable[[int], Landing] = Landing
    self.kept: list[Landing] = []

  def take(self) -> Landing:
    """One that is free, kept or new."""
    for landing in self.kept:
      if landing.is_free():
        self.kept.remove(landing)
        return landing
    return self.make(self.size)

  def give(self, landing: Landing, last: Sequence[Pending]) -> None:
    """Takes one back, which `last` still uses; keeps the newest."""
    landing.last = last
    self.kept = [landing, *self.kept][:self.keeps]


def part_sizes(size: int) -> list[int]:
  """Bytes of each array in which so many are pulled."""
  return [min(PART_BYTES, size - start) for start in range(0, size, PART_BYTES)]


def _shared(memory: np.ndarray, device: jax.Device) -> jax.Array:
  array = jax.device_put(memory, device)
  if array.unsafe_buffer_pointer() != memory.ctypes.data:
    raise RuntimeError(f'memory of this process was copied to {device}')
  return array


def shares(source: Any, target: Any) -> bool:
  """Whether pages go from one engine to another through Landings: as they
  are, from one CPU device to another. Either may be a Peer."""
  return (source.by_kernel and target.by_kernel
          and source.capacity.kv_dtype == target.capacity.kv_dtype
          and source.capacity.page_size == target.capacity.page_size)


def maps(source: Any, target: Any) -> bool:
  """Whether they do so through one Landing that both have: of two processes of
  a host."""
  return shares(source, target) and source.memory == target.memory != ''
