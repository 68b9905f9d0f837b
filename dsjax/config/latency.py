"""What is asked of a latency and of a link: seconds, from sizes.

dsjax.simulation.latency has forms of both; anything with these methods will
do.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

# (start, stop) token ranges of prompts; start > 0 for a later chunk.
Pieces = Sequence[tuple[int, int]]


@runtime_checkable
class Latency(Protocol):
  """Seconds of one batch on its whole way through an instance.

  pp: stages of the instance; a stage takes 1 / pp of the seconds. host_s: the
  host's time between two steps, not part of a step. context: tokens that the
  rows of a batch attend to, all rows together.
  """

  @property
  def pp(self) -> int:
    """Pipeline stages."""
    ...

  @property
  def host_s(self) -> float:
    """Seconds of the host between two steps."""
    ...

  def prefill_s(self, pieces: Pieces) -> float:
    """Seconds of a prefill batch; 0 of an empty one."""
    ...

  def decode_s(self, batch: int, context: float) -> float:
    """Seconds of a decode step of `batch` rows; 0 of an empty one."""
    ...

  def decode_line(self, batch: int) -> tuple[float, float]:
    """(a, b): a decode step of `batch` rows takes a + b context."""
    ...

  def mixed_s(self, pieces: Pieces, batch: int, context: float) -> float:
    """Seconds of a step of prompt pieces and decode rows together."""
    ...


class LinkLike(Protocol):
  """Moves KV from one instance to another.

  beside: pages are read while the source's steps go on; else behind those in
  flight.
  """

  @property
  def beside(self) -> bool:
    """Whether pages are read while the source's steps go on."""
    ...

  def migrate_s(self, num_tokens: int) -> float:
    """Seconds of a migration of so many tokens, alone on the link."""
    ...
