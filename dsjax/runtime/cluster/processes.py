"""The processes of instances, and what starts them, as an engine sees them."""

from typing import Protocol

from dsjax.runtime.cluster.channel import Channel


class Process(Protocol):
  """A process that was started for an instance, however that was done.

  Attributes:
    channel: None until it has come. failed: why it cannot come, or ''.
    missing: what it waits for before it can come, or ''. heard_s: when it was
    begun or last said something, on time.monotonic; None: it waits to begin.
  """

  @property
  def channel(self) -> Channel | None: ...

  @property
  def failed(self) -> str: ...

  @property
  def missing(self) -> str: ...

  @property
  def heard_s(self) -> float | None: ...

  @property
  def pid(self) -> int | None: ...

  def exit_code(self) -> int | None: ...

  def kill(self, wait_s: float = 0.0) -> None: ...


class Launcher(Protocol):
  """Starts the processes of the instances of a placement."""

  def start(self, index: int, incarnation: int) -> Process: ...

  def close(self) -> None:
    """Ends what it has of its own; may be called twice."""
    ...
