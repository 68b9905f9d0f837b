"""What others have published: peaks of devices, DistServe's profiles.

The numbers that DistServe released are in distserve/ beside this file, as it
released them; its README says where they are from and what they mean.
"""

import csv
import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from dsjax.config.checks import is_nonnegative, is_positive, require
from dsjax.config.placement import Plan
from dsjax.simulation.latency import Affine

GIGA, TERA, MS, MICRO = 1e9, 1e12, 1e-3, 1e-6
# x16, one direction (PCI-SIG: 16 and 32 GT/s a lane).
PCIE4_BYTES_PER_S, PCIE5_BYTES_PER_S = 32 * GIGA, 64 * GIGA


class Shares(NamedTuple):
  """What measured steps reach of a device's peaks, and what they add.

  The default is the peaks themselves: a bound of the time, not an estimate.

  Attributes:
    compute, memory, link: shares of the three rates, above 0.
    layer_s: further seconds of a layer and step (norms, launches).
    message_s: fixed seconds of an all-reduce or hop.
  """

  compute: float = 1.0
  memory: float = 1.0
  link: float = 1.0
  layer_s: float = 0.0
  message_s: float = 0.0

  def __str__(self) -> str:
    return (f'{100 * self.compute:.3g} % of the operations, '
            f'{100 * self.memory:.3g} % of the bytes, '
            f'{100 * self.link:.3g} % of the link, '
            f'{1e6 * self.layer_s:.3g} us a layer and step')


@dataclasses.dataclass(frozen=True)
class Hardware:
  """A device: its peaks, dense 16-bit matrix products, and what is reached.

  Attributes:
    memory_bytes: as the device reports it.
    link_bytes_per_s, node_bytes_per_s: to devices of its node, and of other
      nodes; one direction.
    shares: fitted to measured operators, see SHARES_SOURCE.
    host_bytes_per_s: to the memory of its host, one direction; that of PCIe
      4.0 x16 where nothing is said.
  """

  name: str
  flop_per_s: float
  bytes_per_s: float
  memory_bytes: float
  link_bytes_per_s: float
  node_bytes_per_s: float
  source: str = ''
  shares: Shares = Shares()
  host_bytes_per_s: float = PCIE4_BYTES_PER_S

  def __post_init__(self) -> None:
    for field in ('name', 'source'):
      value = getattr(self, field)
      require(isinstance(value, str), f'Hardware.{field}', value, 'text')
    for field in (*_RATES, 'host_bytes_per_s'):
      value = getattr(self, field)
      require(is_positive(value), f'Hardware.{field}', value,
              'a number above 0')
    check_shares(self.shares, 'Hardware.shares')

  @classmethod
  def parse(cls, data: Mapping[str, Any]) -> Self:
    """The Hardware of a JSON object, its fields by name; shares is an object.

    Raises:
      InputError naming the field.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for field in data:
      require(field in known, 'Hardware: field', field, f'one of {known}')
    for field in ('name', *_RATES):
      require(field in data, 'Hardware: fields', sorted(data),
              f'{known}, {field} among them')
    shares = data.get('shares', {})
    require(isinstance(shares, dict) and set(shares) <= set(Shares._fields),
            'Hardware.shares', shares, f'an object with {Shares._fields}')
    return cls(**dict(data) | {'shares': Shares(**shares)})


_RATES = ('flop_per_s', 'bytes_per_s', 'memory_bytes', 'link_bytes_per_s',
          'node_bytes_per_s')


def check_shares(shares: Shares, name: str) -> None:
  """Raises InputError unless rates are above 0 and seconds 0 or more."""
  require(isinstance(shares, Shares), name, shares, 'Shares')
  for field, value in shares._asdict().items():
    rate = not field.endswith('_s')
    require(is_positive(value) if rate else is_nonnegative(value),
            f'{name}.{field}', value, 'above 0' if rate else '0 or more')


# One set a GPU for Llama 3 8B and 70B and Qwen3 32B, tp 1 to 8, all cells;
# least squares of the logarithms. L40S: tp 1 and 2.
SHARES_SOURCE = (
    "fitted to the operators of vLLM that dsjax's tables are made of "
    '(aiconfigurator-core 0.12.0, Apache-2.0)')
HARDWARE = {
    'a100-80g': Hardware(
        'NVIDIA A100-SXM4-80GB', 312 * TERA, 2039 * GIGA, 85 * GIGA,
        300 * GIGA, 25 * GIGA, 'NVIDIA A100 data sheet: 312 TFLOP/s BF16 '
        'dense, 2,039 GB/s, NVLink 600 GB/s both directions together; reports '
        '79.15 GiB; a 200 Gb/s card a GPU',
        Shares(.78, .75, .33, 73 * MICRO)),
    'h100-80g': Hardware(
        'NVIDIA H100-SXM5-80GB', 989 * TERA, 3350 * GIGA, 85 * GIGA,
        450 * GIGA, 50 * GIGA, 'NVIDIA H100 data sheet: 1,979 TFLOP/s BF16 '
        'with sparsity (half of it dense), 3.35 TB/s, NVLink 900 GB/s both '
        'directions together; reports 79 GiB; a 400 Gb/s card a GPU; PCIe 5.0 '
        'x16 to its host', Shares(.70, .90, .54, 54 * MICRO),
        PCIE5_BYTES_PER_S),
    'h200-141g': Hardware(
        'NVIDIA H200-SXM-141GB', 989 * TERA, 4800 * GIGA, 150 * GIGA,
        450 * GIGA, 50 * GIGA, 'NVIDIA H200 data sheet: the H100 with 4.8 '
        'TB/s; reports 140 GiB; a 400 Gb/s card a GPU',
        Shares(.71, .87, .60, 54 * MICRO), PCIE5_BYTES_PER_S),
    'b200-180g': Hardware(
        'NVIDIA B200-SXM-180GB', 2250 * TERA, 8000 * GIGA, 191 * GIGA,
        900 * GIGA, 100 * GIGA, 'NVIDIA HGX B200 data sheet: 4.5 PFLOP/s BF16 '
        'with sparsity (half of it dense), 8 TB/s, NVLink 1.8 TB/s both '
        'directions together; reports 178 GiB; an 800 Gb/s card a GPU; PCIe '
        '5.0 x16', Shares(.62, .92, .42, 51 * MICRO, 4.5 * MICRO),
        PCIE5_BYTES_PER_S),
    'gb200-186g': Hardware(
        'NVIDIA GB200-186GB', 2500 * TERA, 8000 * GIGA, 186 * GIGA,
        900 * GIGA, 900 * GIGA, 'NVIDIA GB200 NVL72 data sheet, of a GPU: 5 '
        'PFLOP/s BF16 with sparsity (half of it dense), 8 TB/s, 186 GB, NVLink '
        '1.8 TB/s both directions together, within the rack; NVLink-C2C 900 '
        'GB/s both directions together, for two GPUs',
        Shares(.62, .90, .47, 49 * MICRO), 225 * GIGA),
    'l40s-48g': Hardware(
        'NVIDIA L40S-48GB', 362 * TERA, 864 * GIGA, 48 * GIGA,
        32 * GIGA, 50 * GIGA, 'NVIDIA L40S data sheet: 362 TFLOP/s BF16 '
        'dense, 864 GB/s, 48 GB, PCIe 4.0 x16: 64 GB/s both directions '
        'together; a 400 Gb/s card a GPU',
        Shares(.57, .76, .51, 23 * MICRO)),
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
