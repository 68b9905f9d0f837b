"""A workload on its way: each request at its arrival time, in an open loop."""

import collections
import dataclasses
import math
from collections.abc import Container, Iterator, Sequence

from dsjax.config.request import Request


class Replay:
  """What of a workload has arrived, and what has ended.

  Attributes:
    todo: requests that have not arrived.
  """

  def __init__(self, requests: Sequence[Request], start_s: float) -> None:
    """requests: by arrival, in seconds since start_s, which is on the clock
    of the server."""
    self.start_s = start_s
    self.todo = collections.deque(requests)
    self._left = collections.deque(requests)  # the first has not ended

  @property
  def next_s(self) -> float:
    """When the next one arrives, on the clock of the server."""
    return (self.start_s + self.todo[0].arrival_s if self.todo
            else math.inf)

  def arrive(self, now_s: float) -> Iterator[tuple[Request, bool]]:
    """Takes off what has arrived: (Request, whether another follows at once).
    """
    due_s = now_s - self.start_s
    while self.todo and self.todo[0].arrival_s <= due_s:
      request = self.todo.popleft()
      yield (dataclasses.replace(
          request, arrival_s=self.start_s + request.arrival_s),
             bool(self.todo) and self.todo[0].arrival_s <= due_s)

  def ended(self, unfinished: Container[int]) -> bool:
    """Whether all have arrived and none is in `unfinished`."""
    left = self._left
    while len(left) > len(self.todo) and left[0].id not in unfinished:
      left.popleft()
    return not left
