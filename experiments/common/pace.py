"""How fast a machine is now, beside when it was profiled.

The same step takes a tenth more or less from one hour to the next where others
share the host. A few steps of idle instances, timed as the profile's were, tell
by how much: before and after what is compared with a simulation.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

from dsjax.config.engine import EngineConfig
from dsjax.config.latency import Latency
from dsjax.runtime import profiling
from dsjax.runtime.protocols import Engine
from dsjax.simulation import fitting
from dsjax.simulation.contention import kind_of
from dsjax.simulation.latency import Affine

ROUNDS = 3


def of(engines: Iterable[Engine], model: Latency, config: EngineConfig
       ) -> dict[str, float]:
  """{kind of step: seconds now over what `model` predicts} of idle engines,
  which keep nothing in a prefix cache; the kinds that they have, a single row
  counted with decode.

  Args:
    engines: of 1x1, each with the latency `model`.
  """
  ratios = {}
  for engine in engines:
    does = engine.capacity
    has = {'prefill': does.prefills, 'decode': does.decodes,
           'single': does.decodes, 'mixed': does.mixes}
    cells = profiling.Cells(engine)
    for shape in profiling.typical(config).values():
      cell = fitting.Cell(shape[0], shape[1], profiling.context_of(*shape), 1.0)
      if has[kind_of(cell.pieces, cell.batch)]:
        seconds = statistics.median(cells.seconds(*shape)
                                    for _ in range(ROUNDS))
        ratios.setdefault(cell.kind, []).append(
            seconds / fitting.predict_s(model, cell))
    for id in list(engine.slot_of):
      engine.forget(id)
  return {kind: statistics.mean(of) for kind, of in ratios.items()}


def mean(paces: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Of several, by kind."""
  return {kind: statistics.mean(pace[kind] for pace in paces)
          for kind in paces[0]}


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
