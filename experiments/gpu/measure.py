"""Step times of Llama-3-8B on this device, fitted: a latency that ships.

What experiments.measure does, with two instances on one device and a grid that
fits in the time.
"""

import dataclasses
import pathlib
import tempfile

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Plan
from dsjax.runtime import profiling
from dsjax.simulation import fitting, profiles
from experiments.gpu import card, child
from experiments.gpu.lines import Lines, Target

MODEL = 'llama-3-8b'


def engine(tiny: bool) -> EngineConfig:
  """The EngineConfig that is profiled, and then served and simulated."""
  if tiny:
    return EngineConfig(max_len=96, max_seqs=4, num_pages=32,
                        prefill_tokens=32, chunk_tokens=32, prefill_seqs=2)
  return EngineConfig(
      max_len=2048, max_seqs=32, num_pages=3072, prefill_tokens=512,
      chunk_tokens=512, prefill_seqs=4, dtype='bfloat16')


def model(tiny: bool) -> Model:
  """What is profiled."""
  return (card.random_model(card.TINY, 'float32') if tiny
          else card.published(MODEL))


def run(target: Target, lines: Lines) -> None:
  """Measures; the profile and every cell go into the part's file."""
  profile, cells = profiling.measure(
      model(target.tiny), (Plan(),), engine(target.tiny),
      rounds=2 if target.tiny else 3, points=3, side_by_side=False,
      devices=card.device_twice(),
      report=lambda done, total, what: print(what, done, total, flush=True))
  profile = dataclasses.replace(profile, source=(
      f'{profile.source}, driver {child.driver()}, experiments.gpu'))
  fitted, timed = profile.latencies[Plan()], cells[Plan()]
  errors = sorted(abs(fitting.predict_s(fitted, cell) / cell.seconds - 1)
                  for cell in timed)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'profile.json')
    profiles.save(path, profile)
    text = path.read_text()
  lines.write('profile', None, profile=text,
              cells=[cell._asdict() for cell in timed],
              figure=f'{len(timed)} cells within '
              f'{errors[len(errors) // 2]:.0%} (median), {errors[-1]:.0%}')


if __name__ == '__main__':
  child.main(run)
