"""What others have published: peaks of devices, DistServe's profile."""

from typing import NamedTuple

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
