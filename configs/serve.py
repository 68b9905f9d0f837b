"""The fields of a config of `experiments.serve`. Not a config itself."""

import collections
import dataclasses
import math
import pathlib

from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Sampling
from dsjax.workload import KINDS, traffic

PROMPTS = pathlib.Path(__file__).resolve().parent.parent.joinpath(
    'experiments', 'prompts.jsonl')
SOURCES = ('prompts', 'trace', 'fixed', *traffic.MIXTURES)
ARRIVALS = (*KINDS, 'resample')

_ONE = Plan()
TWO_DEVICES = (Placement(prefill=[_ONE], decode=[_ONE]),
               Placement(colocated=[_ONE, _ONE]),
               Placement(chunked=[_ONE, _ONE]))


@dataclasses.dataclass(frozen=True)
class Workload:
  """What is sent, and when.

  Attributes:
    source: prompts (a file of them, workload.read_prompts), trace (lengths
      from a file, workload.read_lengths; ids without meaning), fixed
      (every prompt of prompt_len, every answer of output_len tokens) or a
      mixture of traffic.MIXTURES (sharegpt, humaneval, longbench).
    path: the file, for prompts and trace.
    num_requests: None for as many as the file has; a file of prompts is gone
      round again when there are more.
    arrivals, rate_per_s, cv: see workload.arrivals; 'resample' has the trace's
      own burstiness, and without rate_per_s its rate (traffic.fit).
    swing, period_s: the rate goes up and down by this share of itself, in
      this time (traffic.diurnal).
    seed: of arrivals, lengths and ids.
    max_prompt, max_output: lengths of a trace are cut to these.
  """

  source: str = 'prompts'
  path: str | None = None
  num_requests: int | None = None
  arrivals: str = 'poisson'
  rate_per_s: float | None = 1.0
  cv: float = 1.0
  swing: float = 0.0
  period_s: float = 86400.0
  seed: int = 0
  max_prompt: int | None = None
  max_output: int | None = None
  prompt_len: int = 256
  output_len: int = 64

  def __post_init__(self):
    require(self.source in SOURCES, 'workload.source', self.source,
            f'one of {SOURCES}')
    require(self.arrivals in ARRIVALS, 'workload.arrivals', self.arrivals,
            f'one of {ARRIVALS}')
    for field in ('num_requests', 'max_prompt', 'max_output', 'prompt_len',
                  'output_len'):
      value = getattr(self, field)
      require(value is None or value > 0, f'workload.{field}', value,
              'an integer of 1 or more')
    rate = self.rate_per_s
    require(rate is None or math.isfinite(rate) and rate > 0,
            'workload.rate_per_s', rate, 'a number above 0')


@dataclasses.dataclass(frozen=True)
class Serve:
  """A comparison: one workload on one model, placement after placement.

  Attributes:
    model: smollm2-135m-instruct, the path of a .gguf, or tiny (random
      weights).
    placements: the modes, of equally many devices.
    sampling: of the answers to prompts; request i draws with seed + i. A
      prompt's own max_tokens comes first. Answers to lengths have theirs.
    warmup_s: requests that arrive before it count in no statistic.
  """

  model: str = 'smollm2-135m-instruct'
  placements: tuple[Placement, ...] = TWO_DEVICES
  engine: EngineConfig = EngineConfig()
  workload: Workload = Workload(path=str(PROMPTS))
  sampling: Sampling = Sampling(max_tokens=48)
  slo: Slo = Slo(ttft_s=2.0, tpot_s=0.15)
  warmup_s: float = 0.0

  def __post_init__(self):
    sizes = [p.num_devices for p in self.placements]
    require(sizes and len(set(sizes)) == 1, 'placements', sizes,
            'one or more, of equally many devices')
    require(math.isfinite(self.warmup_s) and self.warmup_s >= 0, 'warmup_s',
            self.warmup_s, 'seconds, 0 or more')

  @property
  def num_devices(self):
    return self.placements[0].num_devices

  @property
  def modes(self):
    """A name for each placement."""
    counts = collections.Counter(p.mode for p in self.placements)
    return tuple(
        p.mode if counts[p.mode] == 1 else f'{p.mode}-{i}'
        for i, p in enumerate(self.placements, 1))
