"""Instances that share cores or memory: each slows the steps of the others.

Devices of their own need none of this. Where they share (the CPU devices of
one process, parts of one accelerator), what a step takes depends on what the
others do meanwhile. This is processor sharing: a step is work, in seconds of
a device left alone, and progresses at a rate that changes whenever another
instance starts, ends or changes the kind of its step.

Where instances are processes with cores of their own, three things still take
of these. An instance dispatches a command while the one before it runs. A
server without a core of its own works at the end of each step: beside
an instance that is idle it costs nothing, else all instances alike. And a
hand-off is read, sent, pulled and written by threads of its two ends: where an
end is at work, both take turns, and each is as much later.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsjax.config.checks import is_nonnegative, is_number, require
from dsjax.simulation.latency import Pieces, check_constants

KINDS = ('prefill', 'decode', 'mixed', 'single')


def kind_of(pieces: Pieces, batch: int) -> str:
  """The kind of a step of prompt pieces and decode rows. A decode step of one
  row is 'single': it has no work for several cores."""
  if pieces:
    return 'mixed' if batch else 'prefill'
  return 'decode' if batch > 1 else 'single'


@dataclasses.dataclass(frozen=True)
class Contention:
  """How much kinds of steps slow each other.

  Attributes:
    factors: {(kind, other): factor}, each 1 or more: seconds of a step of
      `kind` beside steps of `other` on another instance, over its seconds
      alone; 1 where it is not named. What several others take adds up.
    server_s: seconds of a core that the server takes for a step, of those of
      the instances.
    read_s, write_s: (a, b): a + b tokens seconds of a core that a hand-off
      takes of its source, and of its target.
    command_s: (a, b): a + b steps seconds of a core that an instance takes for
      a command that comes while another runs.
  """

  factors: dict[tuple[str, str], float]
  server_s: float = 0.0
  read_s: tuple[float, float] = (0.0, 0.0)
  write_s: tuple[float, float] = (0.0, 0.0)
  command_s: tuple[float, float] = (0.0, 0.0)

  def __post_init__(self):
    for pair, factor in self.factors.items():
      require(isinstance(pair, tuple) and len(pair) == 2
              and all(kind in KINDS for kind in pair), 'Contention.factors',
              pair, f'pairs of {KINDS}')
      require(is_number(1, math.inf)(factor),
              f'Contention.factors.{_name(*pair)}', factor, '1 or more')
    require(is_nonnegative(self.server_s), 'Contention.server_s',
            self.server_s, 'seconds, 0 or more')
    for field in ('read_s', 'write_s', 'command_s'):
      object.__setattr__(self, field, check_constants(
          f'Contention.{field}', getattr(self, field), 2))

  def factor(self, kind: str, others: Iterable[str]) -> float:
    """Seconds of a step beside these, over its seconds alone."""
    return 1 + sum(self.factors.get((kind, other), 1.0) - 1 for other in others)


def _name(kind: str, other: str) -> str:
  return f'{kind}>{other}'


def by_name(pairs: Mapping[tuple[str, str], float]) -> dict[str, float]:
  """{(kind, other): factor} as files have it: {'kind>other': factor}."""
  return {_name(*pair): factor for pair, factor in pairs.items()}


def by_pair(names: Mapping[str, float]) -> dict[tuple[str, str], float]:
  """What `by_name` made, read again; a name without > is a pair with ''."""
  pairs: dict[tuple[str, str], float] = {}
  for name, factor in names.items():
    kind, _, other = name.partition('>')
    pairs[kind, other] = factor
  return pairs


class _Work:
  """A command in an instance's queue: seconds alone of each of its steps, the
  one under way with what is left of it, and the times of those that ended."""

  __slots__ = ('tag', 'kind', 'ready_s', 'steps', 'at', 'left_s', 'times')

  def __init__(self, tag, kind, ready_s, steps):
    self.tag, self.kind, self.ready_s, self.steps = tag, kind, ready_s, steps
    self.at, self.left_s, self.times = 0, steps[0], []


class Devices:
  """The queues of instances under a Contention, in virtual time.

  busy_s: seconds that each instance was at work.
  """

  def __init__(self, contention: Contention, count: int) -> None:
    self.contention, self.now_s = contention, 0.0
    self.queues = [collections.deque() for _ in range(count)]
    self.busy_s = [0.0] * count
    self.started: dict[int, _Work] = {}  # the work under way

  def add(self, index: int, tag: Any, kind: str | None,
          steps: Sequence[float], ready_s: float) -> None:
    """Puts work behind what the instance has to do.

    Args:
      tag: what `until` gives back. kind: of KINDS, or None for what slows
        nothing. steps: seconds alone of each. ready_s: it starts no sooner.
    """
    self.queues[index].append(_Work(tag, kind, ready_s, steps))
    self.look(index)

  def look(self, index: int) -> None:
    """Starts the first of a queue if it is ready."""
    queue = self.queues[index]
    if (index not in self.started and queue
        and queue[0].ready_s <= self.now_s):
      self.started[index] = queue[0]

  def share(self, index: int, seconds: float) -> float:
    """Something else takes so long of an instance's core: the step under way
    ends later by it. Returns by how much the other does: 0.0 beside none."""
    work = self.started.get(index)
    if work is None:
      return 0.0
    work.left_s += seconds
    return seconds

  def _serve(self) -> None:
    """The server takes its part, at the end of a step."""
    count = len(self.queues)
    if len(self.started) == count and self.contention.server_s:
      for index in self.started:
        self.share(index, self.contention.server_s / count)

  def factors(self) -> dict[int, float]:
    """{instance: what slows it now}, of those at work."""
    kinds = {i: work.kind for i, work in sorted(self.started.items())}
    return {i: self.contention.factor(kind, [
        other for j, other in kinds.items() if j != i])
        for i, kind in kinds.items()}

  def until(self, bound_s: float) -> tuple[int, Any, list[float]] | None:
    """Goes on until some work is done, at most until bound_s.

    Returns:
      (instance, tag, times of its steps), or None at bound_s, before what is
      done at that moment.
    """
    while True:
      factors = self.factors()
      ends = [(self.now_s + self.started[i].left_s * factor, i)
              for i, factor in factors.items()]
      ends += [(q[0].ready_s, i) for i, q in enumerate(self.queues)
               if q and i not in self.started]
      end_s, index = min(ends, default=(math.inf, -1))
      stop_s = min(end_s, bound_s)
      if stop_s == math.inf:
        return None
      for i, factor in factors.items():
        self.started[i].left_s -= (stop_s - self.now_s) / factor
        self.busy_s[i] += stop_s - self.now_s
      self.now_s = stop_s
      if end_s >= bound_s:
        return None
      work = self.started.get(index)
      if work is None:
        self.look(index)
        continue
      work.times.append(end_s)
      work.at += 1
      if work.at < len(work.steps):
        work.left_s = work.steps[work.at]
        self._serve()
        continue
      self.queues[index].popleft()
      del self.started[index]
      self.look(index)
      self._serve()
      return index, work.tag, work.times
