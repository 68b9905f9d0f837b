"""What others have published: peaks of devices, DistServe's profile."""

from typing import NamedTuple

from dsjax.config.checks import require
from dsjax.config.placement import Plan
from dsjax.simulation.latency import Affine

GIGA, TERA, MS, MICRO = 1e9, 1e12, 1e-3, 1e-6


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


class Hardware(NamedTuple):
  """A device: its peaks, dense 16-bit matrix products, and what is reached.

  Attributes:
    memory_bytes: as the device reports it.
    link_bytes_per_s, node_bytes_per_s: to devices of its node, and of other
      nodes; one direction.
    shares: fitted to measured operators, see SHARES_SOURCE.
  """

  name: str
  flop_per_s: float
  bytes_per_s: float
  memory_bytes: float
  link_bytes_per_s: float
  node_bytes_per_s: float
  source: str
  shares: Shares = Shares()


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
        'directions together; reports 79 GiB; a 400 Gb/s card a GPU',
        Shares(.70, .90, .54, 54 * MICRO)),
    'h200-141g': Hardware(
        'NVIDIA H200-SXM-141GB', 989 * TERA, 4800 * GIGA, 150 * GIGA,
        450 * GIGA, 50 * GIGA, 'NVIDIA H200 data sheet: the H100 with 4.8 '
        'TB/s; reports 140 GiB; a 400 Gb/s card a GPU',
        Shares(.71, .87, .60, 54 * MICRO)),
    'b200-180g': Hardware(
        'NVIDIA B200-SXM-180GB', 2250 * TERA, 8000 * GIGA, 191 * GIGA,
        900 * GIGA, 100 * GIGA, 'NVIDIA HGX B200 data sheet: 4.5 PFLOP/s BF16 '
        'with sparsity (half of it dense), 8 TB/s, NVLink 1.8 TB/s both '
        'directions together; reports 178 GiB; an 800 Gb/s card a GPU',
        Shares(.62, .92, .42, 51 * MICRO, 4.5 * MICRO)),
    'gb200-186g': Hardware(
        'NVIDIA GB200-186GB', 2500 * TERA, 8000 * GIGA, 186 * GIGA,
        900 * GIGA, 900 * GIGA, 'NVIDIA GB200 NVL72 data sheet, of a GPU: 5 '
        'PFLOP/s BF16 with sparsity (half of it dense), 8 TB/s, 186 GB, NVLink '
        '1.8 TB/s both directions together, within the rack',
        Shares(.62, .90, .47, 49 * MICRO)),
    'l40s-48g': Hardware(
        'NVIDIA L40S-48GB', 362 * TERA, 864 * GIGA, 48 * GIGA,
        32 * GIGA, 50 * GIGA, 'NVIDIA L40S data sheet: 362 TFLOP/s BF16 '
        'dense, 864 GB/s, 48 GB, PCIe 4.0 x16: 64 GB/s both directions '
        'together; a 400 Gb/s card a GPU',
        Shares(.57, .76, .51, 23 * MICRO)),
}
# Between the nodes of the paper's cluster (DistServe 6.1): 25 Gbps.
PAPER_NODE_BYTES_PER_S = 25e9 / 8

# DistServe's released profile of its engine on A100-80GB, in ms, by (model,
# tp): prefill (A, B, C), decode of at most 95 rows, decode of more. Source:
# the repository's simdistserve data, main branch. Its prefill constants were
# multiplied by 1.1 after the fit (commit 4c68ed9, "Realign the curve").
PUBLISHED_SPLIT, PUBLISHED_REALIGNED = 95, 1.1
PUBLISHED_MS = {
    ('opt-13b', 1): ((18.1025, .101912, 7.12226e-6),
                     (19.9347, 6.26936e-4, .0385070),
                     (7.16619, 5.79800e-4, .158311)),
    ('opt-13b', 2): ((14.7430, .0685772, 2.44957e-6),
                     (13.2948, 3.41092e-4, .0629639),
                     (10.6387, 3.11834e-4, .0856291)),
    ('opt-13b', 4): ((12.0623, .0380814, 5.22625e-7),
                     (10.2562, 1.87867e-4, .0326927),
                     (10.4835, 1.71209e-4, .0456665)),
    ('opt-66b', 2): ((43.0588, .274229, 2.24780e-5),
                     (48.2880, 9.42434e-4, .127550),
                     (28.7277, 4.74485e-4, .296178)),
    ('opt-66b', 3): ((32.9982, .195683, 1.22052e-5),
                     (35.8015, 5.84500e-4, .0952670),
                     (22.6539, 5.35849e-4, .208514)),
    ('opt-66b', 4): ((29.4416, .151352, 8.31745e-6),
                     (30.7603, 4.51948e-4, .0632842),
                     (27.4708, 4.04685e-4, .124807)),
    ('opt-66b', 8): ((25.4907, .106592, 3.39105e-6),
                     (23.1551, 2.26915e-4, .0480064),
                     (21.7177, 3.75809e-4, .0897861)),
}
# KV capacity in tokens that the same repository lists, by (model, tp, pp).
PUBLISHED_TOKENS = {
    ('opt-13b', 1, 1): 66144, ('opt-13b', 2, 1): 163008,
    ('opt-13b', 4, 1): 356736, ('opt-66b', 2, 1): 11600,
    ('opt-66b', 4, 1): 78496, ('opt-66b', 2, 2): 78512,
    ('opt-66b', 8, 1): 212304, ('opt-175b', 3, 3): 76192,
    ('opt-175b', 4, 3): 126160, ('opt-175b', 8, 1): 59520,
    ('opt-175b', 8, 8): 992400,
}


def published(model: str, plan: Plan, realigned: bool = True,
              host_s: float = 0.0, hop_s: float = 1e-3) -> Affine:
  """The latency of DistServe's engine on A100-80GB.

  Args:
    model: 'opt-13b' or 'opt-66b'. plan: its tp as it was profiled.
    realigned: as released; False takes the prefill's factor 1.1 out again.
    host_s: the released simulator adds 2 ms a step.
    hop_s: added for every stage after the first (derived: the released
      simulator's 1 ms a stage; its profile has no pipelines).

  Raises:
    InputError: nothing is published for them.
  """
  require((model, plan.tp) in PUBLISHED_MS, 'published', (model, plan.tp),
          f'one of {sorted(PUBLISHED_MS)}')
  hops = (plan.pp - 1) * hop_s
  prefill, small, large = ([x * MS for x in c]
                           for c in PUBLISHED_MS[model, plan.tp])
  if not realigned:
    prefill = [x / PUBLISHED_REALIGNED for x in prefill]
  for constants in (prefill, small, large):
    constants[0] += hops
  return Affine(tuple(prefill), tuple(small), tuple(large), PUBLISHED_SPLIT,
                host_s=host_s, pp=plan.pp)
