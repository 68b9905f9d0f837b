"""What the parts of a server expect of each other.

`Fleet` runs any `Engine`: engine.Engine on devices, or a fake of the tests
that compiles nothing. Nothing here does anything.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from jax.sharding import Mesh

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.request import Sampling
from dsjax.scheduling.events import (
  Command,
  Event,
  Load,
  Migrate,
  Offload,
  RunDecode,
  RunPrefill,
)


class Pending(Protocol):
  """An array whose value may be on its way, such as a jax.Array."""

  @property
  def size(self) -> int: ...

  def is_ready(self) -> bool: ...

  def is_deleted(self) -> bool: ...


class StepOutput(Protocol):
  """What a step samples, as model.sampling.Sampled: arrays that
  jax.device_get reads."""

  token_R: Any
  logprob_R: Any
  top_id_RA: Any
  top_logprob_RA: Any


# The outputs of a command's steps, and what each stage but the last sent on.
Dispatched: TypeAlias = tuple[Sequence[StepOutput], Sequence[Pending]]


class Transfer(Protocol):
  """A hand-off in flight; see migration.Transfer."""

  command: Migrate
  bytes: int
  start_s: float
  checksum: bool
  landed: bool

  def has_arrived(self) -> bool: ...

  def land(self) -> Any: ...

  def is_ready(self) -> bool: ...

  def check(self) -> None: ...

  def drop(self) -> None: ...


class Route(Protocol):
  """How KV goes from one engine to another; see migration.Route."""

  def start(self, command: Migrate, checksum: bool = False) -> Transfer: ...

  def warm(self, checksum: bool = False) -> None: ...


# What a HostMemory performs.
HostCopy: TypeAlias = Offload | Load


class HostMemory(Protocol):
  """Pages of an engine in host memory; see host_memory.HostMemory."""

  copied_bytes: int

  @property
  def busy(self) -> bool: ...

  def offload(self, command: Offload) -> None: ...

  def load(self, command: Load) -> None: ...

  def poll(self, lease_s: float
           ) -> Iterator[tuple[HostCopy, BaseException | None]]: ...

  def clear(self) -> None: ...

  def warm(self) -> None: ...


class Engine(Protocol):
  """The effects of one instance; see engine.Engine.

  Whether it is of this process, or stands for one (cluster/remote.py), a
  Fleet does not know.

  Attributes:
    capacity: its capacity. slot_of: slots of the requests that are admitted.
    spare: slots that are free. devices: its devices; str() tells which.
    news: set when it, or another of its fleet, may have something to tell;
      None: it is to be looked at.
  """

  role: str
  config: EngineConfig
  capacity: InstanceConfig
  slot_of: dict[int, int]
  spare: list[int]

  @property
  def news(self) -> threading.Event | None: ...

  @property
  def devices(self) -> Sequence[Any]: ...

  def shapes_needed(self) -> Sequence[tuple[int, int]]: ...

  def warm(self) -> Iterator[str]: ...

  def admit(self, id: int, tokens: Sequence[int], prompt_len: int,
            sampling: Sampling, /) -> None: ...

  def forget(self, id: int) -> None: ...

  def prefill(self, command: RunPrefill) -> Dispatched: ...

  def decode(self, command: RunDecode) -> Dispatched: ...

  def sequences(self, command: RunPrefill) -> int: ...

  def route_to(self, target: Any) -> Route: ...

  def host_memory(self, checksum: bool) -> HostMemory: ...

  def is_sound(self) -> bool: ...

  def check(self) -> None:
    """Raises what ended it, if something has."""
    ...

  def stop(self) -> None: ...

  def start(self) -> bool:
    """Begins anew, empty; whether it is there. If not, ask again."""
    ...

  def close(self) -> None:
    """It is not used any more; may be called twice."""
    ...


# (model, a mesh a pipeline stage, role, config, capacity) -> an Engine.
MakeEngine: TypeAlias = Callable[
    [Model, Sequence[Mesh], str, EngineConfig, InstanceConfig], Engine]
# (steps compiled, of how many, name of the last): called after each.
Report: TypeAlias = Callable[[int, int, str], object]


class Observer(Protocol):
  """Hears each event and the commands that answer it, before these are
  performed."""

  def __call__(self, event: Event, commands: tuple[Command, ...], /
               ) -> None: ...
