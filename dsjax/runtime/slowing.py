"""How much two live instances slow each other, driven as Cells."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax

from dsjax.config.engine import EngineConfig
from dsjax.runtime.grid import STEPS, Cells, Shape, of_several_sizes
from dsjax.simulation.contention import Contention

LEAST_S = 0.1  # of a step that is timed alone, and beside others
Pair = tuple[str, str]  # a kind of step, and the kind beside it


def _command_s(bare: Cells, cell: Shape, repeats: int = 1) -> float:
  return bare.seconds(*cell, repeats) * (1 if cell[0] else STEPS)


def ratios(mine: Cells, own: Mapping[str, Sequence[Shape]], theirs: Cells,
           others: Mapping[str, Sequence[Shape]],
           tick: Callable[[], object] = lambda: None) -> dict[Pair, float]:
  """{(kind, other): how many times as long the own cells of a kind take, on
  average, beside the other instance's of a kind, of all sizes in turn}."""
  other_s = {kind: sum(_command_s(theirs, cell) for cell in cells)
             for kind, cells in others.items()}
  slowed: dict[Pair, list[float]] = {}
  for kind, cells in own.items():
    for cell in cells:
      repeats = math.ceil(LEAST_S / _command_s(mine, cell))
      alone_s = _command_s(mine, cell, repeats)
      for other, beside in others.items():
        # Twice as slow, and some more, so that the other one never runs dry.
        lasts_s, busy = 3 * (repeats + 1) * alone_s, None
        for _ in range(math.ceil(lasts_s / other_s[other])):
          for shape in beside:
            busy = theirs.run(*shape)[0]
        slowed.setdefault((kind, other), []).append(
            _command_s(mine, cell, repeats) / alone_s)
        jax.block_until_ready(busy)
        tick()
  return {pair: statistics.mean(times) for pair, times in slowed.items()}


def count(config: EngineConfig) -> int:
  """How often a round of `measure` ticks."""
  cells = of_several_sizes(config)
  return len(cells) * sum(map(len, cells.values()))


def measure(mine: Cells, theirs: Cells, config: EngineConfig, rounds: int,
            tick: Callable[[], object]) -> Contention:
  """The Contention of two instances of one stage that do all kinds of step.

  Of several sizes of each kind: short prompts slow others more than long ones.
  The mean of the rounds counts: where the memory is also others', what a step
  takes beside another changes within seconds, between few values, and a served
  run has some of each. A first round, which compiles, is not counted.
  """
  cells, counted = of_several_sizes(config), []
  for _ in range(rounds + 1):
    counted.append(ratios(mine, cells, theirs, cells, tick))
  return Contention({pair: max(1.0, statistics.mean(
      each[pair] for each in counted[1:])) for pair in counted[0]})
