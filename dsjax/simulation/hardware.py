"""What others have published: peaks of devices, DistServe's profiles.

The numbers that DistServe released are in distserve/ beside this file, as it
released them; its README says where they are from and what they mean.
"""

import csv
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsjax.config.checks import require
from dsjax.config.placement import Plan
from dsjax.simulation.latency import Affine

GIGA, TERA, MS = 1e9, 1e12, 1e-3


class Hardware(NamedTuple):
  """Peaks of a device, dense 16-bit matrix products."""

  name: str
  flop_per_s: float
  bytes_per_s: float
  memory_bytes: float
  link_bytes_per_s: float  # to devices of its node, one direction
  source: str


HARDWARE = {
    'a100-80g': Hardware(
        'NVIDIA A100-SXM4-80GB', 312 * TERA, 2039 * GIGA, 80 * GIGA,
        300 * GIGA, 'NVIDIA A100 data sheet: 312 TFLOP/s BF16 dense, 2,039 '
        'GB/s, NVLink 600 GB/s both directions together'),
    'h100-80g': Hardware(
        'NVIDIA H100-SXM5-80GB', 989 * TERA, 3350 * GIGA, 80 * GIGA,
        450 * GIGA, 'NVIDIA H100 data sheet: 1,979 TFLOP/s BF16 with '
        'sparsity (half of it dense), 3.35 TB/s, NVLink 900 GB/s both '
        'directions together'),
}
# Between the nodes of the paper's cluster (DistServe 6.1): 25 Gbps.
PAPER_NODE_BYTES_PER_S = 25e9 / 8

# What the authors multiplied fitted constants by, (prefill, decode), before
# they released them (commit 4c68ed9, "Realign the curve").
REALIGNED = {'distserve': (1.1, 1.0), 'vllm': (1.4, 1.2)}
RELEASED = pathlib.Path(__file__).parent / 'distserve'


@functools.cache
def released(engine: str = 'distserve') -> Mapping[tuple[str, int], Any]:
  """DistServe's profile of an engine as its file has it: {(model, tp): fit}.

  Raises:
    InputError: an engine that is not in REALIGNED.
  """
  require(engine in REALIGNED, 'engine', engine, f'one of {list(REALIGNED)}')
  data = json.loads(
      (RELEASED / f'profiler-a100-80g.{engine}.json').read_text())
  return {(name.removeprefix('facebook/'), int(tp)): fit
          for name, fits in data.items() for tp, fit in fits.items()}


@functools.cache
def released_tokens() -> Mapping[tuple[str, int, int], int]:
  """Tokens of KV cache that DistServe lists: {(model, tp, pp): tokens}."""
  lines = (RELEASED / 'max_num_tokens.csv').read_text().splitlines()
  return {(row['model'].removeprefix('facebook/'), int(row['tp']),
           int(row['pp'])): int(row['max_num_tokens'])
          for row in csv.DictReader(lines)}


def published(model: str, plan: Plan, realigned: bool = True,
              host_s: float = 0.0, hop_s: float = 1e-3,
              engine: str = 'distserve') -> Affine:
  """The latency of an engine on A100-80GB that DistServe released.

  Args:
    model: 'opt-13b' or 'opt-66b'. plan: its tp as it was profiled.
    realigned: as released; False takes the authors' factors out again.
    host_s: the released simulator adds 2 ms a step.
    hop_s: added for every stage after the first, an assumption: the profiles
      have no pipelines.
    engine: 'distserve' or 'vllm'.

  Raises:
    InputError: nothing is published for them, or a fit with a constant below
      0 (vLLM's of OPT-66B at tp 2), which Affine refuses.
  """
  fits = released(engine)
  require((model, plan.tp) in fits, 'published', (model, plan.tp),
          f'one of {sorted(fits)}')
  fit, (prefill, decode) = fits[model, plan.tp], (
      REALIGNED[engine] if not realigned else (1.0, 1.0))

  def seconds(name: str, factor: float) -> tuple[float, ...]:
    a, b, c = (x * MS / factor for x in fit[name])
    return a + (plan.pp - 1) * hop_s, b, c

  # Fewer rows than the threshold are few; `split` is the most that are.
  return Affine(seconds('prefill', prefill),
                seconds('decoding_smallbs', decode),
                seconds('decoding_largebs', decode),
                fit['decoding_large_small_bs_threshold'] - 1, host_s=host_s,
                pp=plan.pp)
