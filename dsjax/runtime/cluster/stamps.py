"""What instances say of when their work was done, on this process's clock."""

import time
from typing import NamedTuple


class Stamp(NamedTuple):
  """When something began and was done at an instance, on the clock
  time.perf_counter of the server.

  what: 'step' (number: of its command), or 'offered' or 'landed', KV for
  others or from there (number: of the request). cpu_s: CPU seconds of the
  process until then, which nothing else on the machine adds to.
  """

  what: str
  number: int
  began_s: float
  wall_s: float
  cpu_s: float = 0.0


class Clock:
  """That of another process, time.perf_counter there.

  Attributes:
    offset_s: what it is behind, by the fastest answer to a ping; fastest_s:
      what that one took.
  """

  def __init__(self) -> None:
    self.offset_s, self.fastest_s = 0.0, float('inf')

  def hear(self, asked_s: float, there_s: float) -> None:
    """An answer has come to what was asked at asked_s here; there_s: when it
    was sent.

    Half of the way to and fro is how wrong it may be: a clock that is nearer
    than that is the same clock.
    """
    now_s = time.perf_counter()
    took_s = now_s - asked_s
    if took_s < self.fastest_s:
      self.fastest_s = took_s
      offset_s = now_s - took_s / 2 - there_s
      self.offset_s = offset_s if abs(offset_s) > took_s else 0.0

  def stamp(self, what: str, number: int, began_s: float, wall_s: float,
            cpu_s: float) -> Stamp:
    """A Stamp of times there."""
    return Stamp(what, number, began_s + self.offset_s,
                 wall_s + self.offset_s, cpu_s)
