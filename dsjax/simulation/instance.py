"""An instance in virtual time: what its commands take, stage by stage."""

import collections
from collections.abc import Collection, Iterable

from dsjax.scheduling.events import Row, RunDecode, RunPrefill
from dsjax.scheduling.pace import steps_s
from dsjax.simulation import latency
from dsjax.simulation.contention import kind_of


def stage_shares(seconds: latency.Latency, pp: int) -> tuple[float, ...]:
  """The part of a step's seconds that each stage takes."""
  return getattr(seconds, 'stage_share', None) or (1 / pp,) * pp


def work(seconds: latency.Latency,
         command: RunDecode | RunPrefill) -> tuple[str, list[float]]:
  """(kind, seconds of each step) of a command on a device left alone."""
  pieces = [(chunk.start, chunk.stop) for chunk in command.chunks]
  return kind_of(pieces, len(command.rows)), steps_s(seconds, command)


class VirtualInstance:
  """When each stage of an instance is free, and when rows have tokens.

  Attributes:
    free_s: when each stage is free. is_pipelined: there are several.
    token_s: id -> when its newest token is there (pp > 1 only).
    busy_s: seconds of its stages at work, summed.
    due: what is in flight: (number, times of its steps, whether it decodes).
    serial: of its newest entry on the executor's heap.
  """

  def __init__(self, seconds: latency.Latency, pp: int) -> None:
    self.seconds, self.host_s = seconds, seconds.host_s
    self.shares = stage_shares(seconds, pp)
    self.free_s, self.busy_s = (0.0,) * pp, 0.0
    self.is_pipelined = pp > 1
    self.token_s: dict[int, float] = {}
    self.line = (0, 0.0, 0.0)  # decode_line of the batch size seen last
    self.due: collections.deque[tuple] = collections.deque()
    self.serial = 0

  def prefill(self, ready_s: float, command: RunPrefill) -> list[float]:
    """Times of the end of a prefill or mixed command."""
    total_s, = steps_s(self.seconds, command)
    done_s = self.stages(self.after(ready_s, command.rows), total_s)
    if self.is_pipelined:
      self.token_s.update((chunk.id, done_s) for chunk in command.chunks
                          if chunk.last)
      self.note([row[0] for row in command.rows], done_s)
    return [done_s]

  def decode(self, ready_s: float, command: RunDecode,
             closed_form: bool) -> list[float]:
    """Completion time of each step of a decode command."""
    rows = command.rows
    ready_s = self.after(ready_s, rows)
    if closed_form:
      batch = len(rows)
      context = sum([r[1] for r in rows]) + batch * (command.tick + 1)
      times = self.same_rows(ready_s, batch, context, command.steps)
    else:
      times = []
      for step_s in steps_s(self.seconds, command):
        ready_s = self.stages(ready_s, step_s)
        times.append(ready_s)
    if self.is_pipelined:
      self.note([row[0] for row in rows], times[-1])
    return times

  def same_rows(self, ready_s: float, batch: int, context: int,
                steps: int) -> list[float]:
    """Times of decode steps of the same rows, in closed form."""
    if self.line[0] != batch:
      self.line = (batch, *self.seconds.decode_line(batch))
    _, fixed_s, token_s = self.line
    first_s = fixed_s + token_s * context
    if self.is_pipelined:
      return [self.stages(ready_s, first_s)]
    start_s = self.free_s[0]
    if ready_s > start_s:
      start_s = ready_s
    if steps == 1:
      times = [start_s + first_s]
    else:
      more_s = token_s * batch / 2
      times = [start_s + n * first_s + more_s * n * (n - 1)
               for n in range(1, steps + 1)]
    done_s = times[-1]
    self.free_s = (done_s,)
    self.busy_s += done_s - start_s
    return times

  def stages(self, ready_s: float, total_s: float) -> float:
    """Sends one step through the stages; when it leaves the last."""
    left_s = []
    self.busy_s += total_s
    for stage_s, part in zip(self.free_s, self.shares, strict=True):
      if stage_s > ready_s:
        ready_s = stage_s
      ready_s += part * total_s
      left_s.append(ready_s)
    self.free_s = tuple(left_s)
    return ready_s

  def after(self, ready_s: float, rows: Collection[Row]) -> float:
    """No sooner than the newest token of each row has left the last stage."""
    if not self.is_pipelined or not rows:
      return ready_s
    return max(ready_s, max([self.token_s.get(r[0], 0.0) for r in rows]))

  def note(self, ids: Iterable[int], token_s: float) -> None:
    """Rows of these requests have their newest token at token_s; of interest
    where there are several stages."""
    self.token_s.update(dict.fromkeys(ids, token_s))
