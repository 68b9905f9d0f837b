"""How fast a machine is now, beside when it was profiled.

The same step takes a tenth more or less from one hour to the next where others
share the host. A few steps of idle instances, timed as the profile's were, tell
by how much: before and after what is compared with a simulation. They are
compared with what the same steps took then, not with what was fitted, which is
off by some for each of them. How much two instances slow each other changes
too, by more and within seconds, so that is timed anew.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from dsjax.config.engine import EngineConfig
from dsjax.runtime import grid, slowing
from dsjax.runtime.protocols import Engine
from dsjax.simulation.latency import Affine

ROUNDS = 3
Kind = TypeVar('Kind', str, slowing.Pair)


def kinds(engine: Engine) -> list[str]:
  """The kinds of step that an engine has."""
  does = engine.capacity
  return (['prefill'] * does.prefills + ['decode', 'single'] * does.decodes
          + ['mixed'] * does.mixes)


def of(engines: Iterable[Engine], config: EngineConfig) -> dict[str, float]:
  """{kind of step: seconds of a typical one} of idle engines of plan 1x1, which
  keep nothing in a prefix cache; the kinds that they have."""
  taken = []
  for engine in engines:
    with grid.cells_of(engine) as cells:
      taken.append(grid.typical_s(cells, config, kinds(engine), ROUNDS))
  return mean(taken)


def beside(engines: Sequence[Engine], config: EngineConfig
           ) -> dict[slowing.Pair, float]:
  """{(kind, other): how many times as long it takes beside the other} of two
  idle engines of plan 1x1, of the kinds that they have: of one size, beside
  all sizes of the other in turn."""
  sizes = grid.of_several_sizes(config)
  cells = [{kind: sizes[kind] for kind in kinds(engine)} for engine in engines]
  middle = [{kind: own[len(own) // 2:][:1] for kind, own in each.items()}
            for each in cells]
  with grid.cells_of(engines[0]) as first, grid.cells_of(engines[1]) as second:
    taken = slowing.ratios(first, middle[0], second, cells[1])
    if engines[0].capacity.role != engines[1].capacity.role:
      taken |= slowing.ratios(second, middle[1], first, cells[0])
  return {pair: max(1.0, ratio) for pair, ratio in taken.items()}


def mean(paces: Sequence[Mapping[Kind, float]]) -> dict[Kind, float]:
  """Of several, by kind."""
  known = dict.fromkeys(kind for pace in paces for kind in pace)
  return {kind: statistics.mean(pace[kind] for pace in paces if kind in pace)
          for kind in known}


def times(now_s: Mapping[str, float], then_s: Mapping[str, float]
          ) -> dict[str, float]:
  """{kind: how many times as long its steps take now as then}, of the kinds
  that are known of both; a single row counts with decode."""
  ratios: dict[str, list[float]] = {}
  for kind in now_s.keys() & then_s.keys():
    ratios.setdefault('decode' if kind == 'single' else kind, []).append(
        now_s[kind] / then_s[kind])
  return {kind: statistics.mean(own) for kind, own in ratios.items()}


def scaled(model: Affine, pace: Mapping[str, float]) -> Affine:
  """An Affine whose kinds of step take so many times as long; as it is where
  nothing is known."""
  def times(constants, kind):
    return constants and tuple(pace.get(kind, 1.0) * x for x in constants)

  return dataclasses.replace(
      model, prefill=times(model.prefill, 'prefill'),
      decode=times(model.decode, 'decode'),
      decode_large=times(model.decode_large, 'decode'),
      mixed=times(model.mixed, 'mixed'),
      piece_s=model.piece_s * pace.get('prefill', 1.0))
