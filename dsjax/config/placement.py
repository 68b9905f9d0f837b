"""Which instances run, with which parallelism, and the latency objectives."""

import dataclasses

from dsjax.config.checks import is_positive, require

ROLES = ('prefill', 'decode', 'colocated', 'chunked')


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

  Either prefill and decode are both given (disaggregated), or colocated
  (prefill-priority continuous batching), or chunked (chunked prefill with a
  token budget). Instances are numbered prefill, decode, colocated, chunked.
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
    kinds = [bool(self.prefill or self.decode), bool(self.colocated),
             bool(self.chunked)]
    require(sum(kinds) == 1 and bool(self.prefill) == bool(self.decode),
            'Placement', self, 'prefill and decode together, or colocated, '
            'or chunked')

  @property
  def instances(self):
    """((role, Plan), ...) in device order."""
    return tuple((role, p) for role in ROLES for p in getattr(self, role))

  @property
  def num_devices(self):
    return sum(plan.num_devices for _, plan in self.instances)

  @property
  def mode(self):
    return 'disaggregated' if self.prefill else self.instances[0][0]


@dataclasses.dataclass(frozen=True)
class Slo:
  """Latency objectives; a request attains when it meets both (DistServe 1)."""

  ttft_s: float
  tpot_s: float

  def __post_init__(self):
    for field in ('ttft_s', 'tpot_s'):
      value = getattr(self, field)
      require(is_positive(value), f'Slo.{field}', value, 'seconds above 0')
