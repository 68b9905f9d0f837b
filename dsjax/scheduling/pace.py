"""Seconds of a command as predicted, and as corrected by what steps took."""

import dataclasses

from dsjax.config.latency import Latency, Pieces
from dsjax.scheduling.events import RunDecode, RunPrefill

# Every so many commands one is compared: an odd number, as prompts and rows
# may take turns. Its weight.
EVERY, WEIGHT = 7, 0.15


@dataclasses.dataclass(frozen=True)
class Paced:
  """A Latency times what steps took of late, against its own predictions.

  Attributes:
    prefill, decode: of steps with prompts, and of those without.
  """

  base: Latency
  prefill: float = 1.0
  decode: float = 1.0

  @property
  def pp(self) -> int:
    return self.base.pp

  @property
  def host_s(self) -> float:
    return self.base.host_s

  def prefill_s(self, pieces: Pieces) -> float:
    return self.prefill * self.base.prefill_s(pieces)

  def decode_s(self, batch: int, context: float) -> float:
    return self.decode * self.base.decode_s(batch, context)

  def decode_line(self, batch: int) -> tuple[float, float]:
    fixed_s, token_s = self.base.decode_line(batch)
    return self.decode * fixed_s, self.decode * token_s

  def mixed_s(self, pieces: Pieces, batch: int, context: float) -> float:
    return self.prefill * self.base.mixed_s(pieces, batch, context)


def steps_s(latency: Latency, command: RunPrefill | RunDecode) -> list[float]:
  """Seconds of each step of a command, on a device left alone."""
  rows, pieces = command.rows, tuple([
      (chunk.start, chunk.stop) for chunk in command.chunks])
  if not rows:
    return [latency.prefill_s(pieces)]
  batch = len(rows)
  context = sum([row[1] for row in rows]) + batch * (command.tick + 1)
  if pieces:
    return [latency.mixed_s(pieces, batch, context)]
  return [latency.decode_s(batch, context + n * batch)
          for n in range(command.steps)]


def corrected(pace: tuple[float, float], latency: Latency,
              command: RunPrefill | RunDecode, took_s: float
              ) -> tuple[float, float]:
  """(of steps with prompts, of those without) after a command."""
  ratio = took_s / max(latency.host_s + sum(steps_s(latency, command)), 1e-9)
  prefill, decode = pace
  if command.chunks:
    return prefill + WEIGHT * (ratio - prefill), decode
  return prefill, decode + WEIGHT * (ratio - decode)
