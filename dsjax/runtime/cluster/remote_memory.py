"""Host memory of an instance that is a process, as a fleet sees it."""

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dsjax.runtime.cluster import messages
from dsjax.runtime.protocols import HostCopy

if TYPE_CHECKING:
  from dsjax.runtime.cluster.remote import RemoteEngine


class RemoteHostMemory:
  """A HostMemory whose slots the process has: it is told what to copy, in the
  order of its commands, and tells what is over, or was not within the lease.

  Attributes:
    copied_bytes: of pages that were copied, either way.
  """

  def __init__(self, engine: 'RemoteEngine') -> None:
    self.copied_bytes, self._engine, self._sent = 0, engine, 0
    self._copies: dict[int, HostCopy] = {}
    self._over: collections.deque[messages.Copied] = collections.deque()

  @property
  def busy(self) -> bool:
    """Whether a copy is on its way."""
    return bool(self._copies)

  def clear(self) -> None:
    """Gives up every copy: its process has ended."""
    self._copies.clear()
    self._over.clear()

  def warm(self) -> None:
    """Its process has compiled what it needs."""

  def offload(self, command: HostCopy) -> None:
    """Has the process begin an Offload, or a Load."""
    self._sent += 1
    self._engine.send(messages.Copy(self._sent, command))
    self._copies[self._sent] = command

  load = offload

  def hear(self, message: messages.Copied) -> None:
    """A copy is over."""
    self._over.append(message)

  def poll(self, lease_s: float
           ) -> Iterator[tuple[HostCopy, BaseException | None]]:
    """Yields the copies that are over, with what went wrong or None."""
    del lease_s  # the process has it
    while self._over:
      message = self._over.popleft()
      command = self._copies.pop(message.number, None)
      if command is not None:
        self.copied_bytes += message.bytes
        yield command, RuntimeError(message.why) if message.why else None
