"""Which instances run, with which parallelism, and the latency objectives."""

import dataclasses

from dsjax.config.checks import is_positive, require


@dataclasses.dataclass(frozen=True)
class Role:
  """What an instance may do.

  Attributes:
    prefills: it takes prompts. decodes: it holds rows and continues them.
    mixes: prompts and rows share a step, within one budget of tokens.
  """

  prefills: bool
  decodes: bool
  mixes: bool = False


ROLES = {
    'prefill': Role(prefills=True, decodes=False),
    'decode': Role(prefills=False, decodes=True),
    'colocated': Role(prefills=True, decodes=True),
    'chunked': Role(prefills=True, decodes=True, mixes=True),
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Parallelism of one instance: tp tensor shards x pp pipeline stages."""

  tp: int = 1
  pp: int = 1

  def __post_init__(self):
    for field in ('tp', 'pp'):
      value = getattr(self, field)
      require(isinstance(value, int) and value > 0, f'Plan.{field}', value,
              'an integer above 0')

  @property
  def num_devices(self):
    return self.tp * self.pp


@dataclasses.dataclass(frozen=True)
class Placement:
  """Which instances run, each with its Plan, in device order.

  Prefill and decode together are disaggregated; colocated is prefill-priority
  continuous batching, chunked is chunked prefill with a token budget. Roles
  may be mixed: prompts that a prefill instance has done go to any that
  decodes. Instances are numbered in the order of ROLES.
  """

  prefill: tuple[Plan, ...] = ()
  decode: tuple[Plan, ...] = ()
  colocated: tuple[Plan, ...] = ()
  chunked: tuple[Plan, ...] = ()

  def __post_init__(self):
    for role in ROLES:
      plans = getattr(self, role)
      require(isinstance(plans, (tuple, list))
              and all(isinstance(p, Plan) for p in plans),
              f'Placement.{role}', plans, 'a list of Plan')
      object.__setattr__(self, role, tuple(plans))
    roles = [ROLES[role] for role, _ in self.instances]
    require(any(r.prefills for r in roles) and any(r.decodes for r in roles)
            and (any(not r.decodes for r in roles)
                 or all(r.prefills for r in roles)),
            'Placement', self, 'instances that prefill and instances that '
            'decode, those that only decode beside some that only prefill')

  @property
  def instances(self):
    """((role, Plan), ...) in device order."""
    return tuple((role, p) for role in ROLES for p in getattr(self, role))

  @property
  def num_devices(self):
    return sum(plan.num_devices for _, plan in self.instances)

  @property
  def mode(self):
    """disaggregated, colocated or chunked; mixed for other combinations."""
    roles = {role for role, _ in self.instances}
    if roles == {'prefill', 'decode'}:
      return 'disaggregated'
    return roles.pop() if len(roles) == 1 else 'mixed'


@dataclasses.dataclass(frozen=True)
class Slo:
  """Latency objectives; a request attains when it meets both (DistServe 1)."""

  ttft_s: float
  tpot_s: float

  def __post_init__(self):
    for field in ('ttft_s', 'tpot_s'):
      value = getattr(self, field)
      require(is_positive(value), f'Slo.{field}', value, 'seconds above 0')
