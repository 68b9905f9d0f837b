"""The fields of a config of `experiments.serve`. Not a config itself."""

import collections
import dataclasses
import math
import pathlib

from dsjax.config.checks import (
    is_integer,
    is_nonnegative,
    is_number,
    is_positive,
    is_positive_int,
    naming,
    require,
)
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Sampling
from dsjax.workload import wave_of

PROMPTS = pathlib.Path(__file__).resolve().parent.parent.joinpath(
    'experiments', 'prompts.jsonl')

_ONE = Plan()
TWO_DEVICES = (Placement(prefill=[_ONE], decode=[_ONE]),
               Placement(colocated=[_ONE, _ONE]),
               Placement(chunked=[_ONE, _ONE]))


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is sent, and when.

  Attributes:
    prompts: a file of prompts (workload.read_prompts).
    lengths: instead of them ids without meaning, of these lengths: sharegpt,
      humaneval, longbench, fixed:PROMPTxOUTPUT (tokens), a file, mix:NAME+NAME
      or shift:SECONDS:NAME+NAME (workload.source).
    requests: how many; None for as many as the file has (100 of a mixture).
      Prompts are gone round again when there are more.
    process: of arrivals: poisson, gamma, uniform, burst, trace (the file's
      own times) or resample (its burstiness and, without rate_per_s, its
      rate), or sine:low=5:high=45:period_s=60 or step:...; see
      workload.arrivals_of.
    rate_per_s: requests a second; of sine and step the mean, None for
      theirs.
    cv: of the gaps of process gamma: their deviation over their mean.
    seed: of arrivals, lengths and ids.
    max_prompt, max_output: lengths are cut to these.
  """

  prompts: str = str(PROMPTS)
  lengths: str | None = None
  requests: int | None = None
  process: str = 'poisson'
  rate_per_s: float | None = 1.0
  cv: float = 1.0
  seed: int = 0
  max_prompt: int | None = None
  max_output: int | None = None

  def __post_init__(self) -> None:
    with naming('workload'):
      wave_of(self.process)
    for field in ('requests', 'max_prompt', 'max_output'):
      value = getattr(self, field)
      require(value is None or is_positive_int(value), f'workload.{field}',
              value, 'None or an integer of 1 or more')
    rate = self.rate_per_s
    require(rate is None or is_positive(rate), 'workload.rate_per_s', rate,
            'None or a number above 0')
    require(is_number(0.01, 100)(self.cv), 'workload.cv', self.cv,
            'a number from 0.01 to 100')
    require(is_integer(0, math.inf)(self.seed), 'workload.seed', self.seed,
            'an integer, 0 or more')


@dataclasses.dataclass(frozen=True)
class Serve:
  """A comparison: one workload on one model, placement after placement.

  Attributes:
    model: what dsjax.load takes: smollm2-135m-instruct, tiny (random
      weights), the path of a .gguf or of a folder.
    placements: the modes, of equally many devices, with '/' between.
    sampling: of the answers to prompts; request i draws with seed + i. A
      prompt's own max_tokens comes first. Answers to lengths have theirs.
    warmup_s: requests that arrive before it count in no statistic.
  """

  model: str = 'smollm2-135m-instruct'
  placements: tuple[Placement, ...] = TWO_DEVICES
  engine: EngineConfig = EngineConfig()
  workload: Workload = Workload()
  sampling: Sampling = Sampling(max_tokens=48)
  slo: Slo = Slo(ttft_s=2.0, tpot_s=0.15)
  warmup_s: float = 0.0

  def __post_init__(self) -> None:
    sizes = [p.num_devices for p in self.placements]
    require(sizes and len(set(sizes)) == 1, 'placements', sizes,
            'one or more, of equally many devices')
    require(is_nonnegative(self.warmup_s), 'warmup_s', self.warmup_s,
            'seconds, 0 or more')

  @property
  def num_devices(self) -> int:
    return self.placements[0].num_devices

  @property
  def tp(self) -> int:
    """Devices of the widest instance."""
    return max(placement.tp for placement in self.placements)

  @property
  def modes(self) -> tuple[str, ...]:
    """A name for each placement."""
    counts = collections.Counter(p.mode for p in self.placements)
    return tuple(
        p.mode if counts[p.mode] == 1 else f'{p.mode}-{i}'
        for i, p in enumerate(self.placements, 1))
