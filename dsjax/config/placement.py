"""Which instances run, with which parallelism, and the latency objectives."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Self

from dsjax.config.checks import is_positive, require


@dataclasses.dataclass(frozen=True)
class Role:
  """What an instance may do.

  Attributes:
    prefills: it takes prompts. decodes: it holds rows and continues them.
    mixes: prompts and rows share a step, within one budget of tokens.
    flips: it may do all of it, and a policy says which of the other roles it
      has now; it may hand a request off, or keep it.
  """

  prefills: bool
  decodes: bool
  mixes: bool = False
  flips: bool = False


ROLES = {
    'prefill': Role(prefills=True, decodes=False),
    'decode': Role(prefills=False, decodes=True),
    'colocated': Role(prefills=True, decodes=True),
    'chunked': Role(prefills=True, decodes=True, mixes=True),
    'flexible': Role(prefills=True, decodes=True, mixes=True, flips=True),
}
FIRST_ROLE = 'chunked'  # of a flexible instance
_SIZES = re.compile('([1-9][0-9]{0,3})x([1-9][0-9]{0,3})')  # of a Plan


@dataclasses.dataclass(frozen=True)
class Plan:
  """Parallelism of one instance: tp tensor shards x pp pipeline stages."""

  tp: int = 1
  pp: int = 1

  def __post_init__(self) -> None:
    for field in ('tp', 'pp'):
      value = getattr(self, field)
      require(isinstance(value, int) and value > 0, f'Plan.{field}', value,
              'an integer above 0')

  @classmethod
  def parse(cls, text: str, field: str = 'plan') -> Self:
    """The Plan of 'TPxPP', such as '2x1'.

    Raises:
      InputError naming `field`.
    """
    require(_SIZES.fullmatch(text), field, text, 'a plan TPxPP, such as 2x1')
    return cls(*map(int, text.split('x')))

  def __str__(self) -> str:
    return f'{self.tp}x{self.pp}'

  @property
  def num_devices(self) -> int:
    return self.tp * self.pp


@dataclasses.dataclass(frozen=True)
class Placement:
  """Which instances run, each with its Plan, in device order.

  Prefill and decode together are disaggregated; colocated is prefill-priority
  continuous batching, chunked is chunked prefill with a token budget. What a
  flexible instance does, a policy says while it serves. Roles may be mixed:
  prompts that a prefill instance has done go to any that decodes. Instances
  are numbered in the order of ROLES.
  """

  prefill: Sequence[Plan] = ()
  decode: Sequence[Plan] = ()
  colocated: Sequence[Plan] = ()
  chunked: Sequence[Plan] = ()
  flexible: Sequence[Plan] = ()

  def __post_init__(self) -> None:
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

  @classmethod
  def parse(cls, text: str, field: str = 'placement') -> Self:
    """The Placement of 'prefill=2x1,decode=1x1' and the like.

    role=TPxPP for each instance; a role's further instances follow with commas
    and no name: 'colocated=1x1,1x1', 'prefill=2x1,decode=1x1,1x1'.

    Raises:
      InputError naming `field`.
    """
    plans, role = {}, None
    for item in text.split(','):
      name, equals, plan = item.strip().rpartition('=')
      role = name if equals else role
      require(role in ROLES and _SIZES.fullmatch(plan), field, text,
              f'role=TPxPP, ... with roles of {tuple(ROLES)}, such as '
              'prefill=1x1,decode=1x1')
      plans.setdefault(role, []).append(Plan.parse(plan))
    return cls(**plans)

  def __str__(self) -> str:
    return ','.join(f'{role}=' + ','.join(map(str, plans))
                    for role in ROLES if (plans := getattr(self, role)))

  @property
  def instances(self) -> tuple[tuple[str, Plan], ...]:
    """((role, Plan), ...) in device order."""
    return tuple((role, p) for role in ROLES for p in getattr(self, role))

  @property
  def names(self) -> tuple[str, ...]:
    """What each instance is called in tables and timelines."""
    return tuple(f'{i} {role} {plan}'
                 for i, (role, plan) in enumerate(self.instances))

  @property
  def num_devices(self) -> int:
    return sum(plan.num_devices for _, plan in self.instances)

  @property
  def mode(self) -> str:
    """disaggregated, colocated, chunked or flexible; mixed for other
    combinations."""
    roles = {role for role, _ in self.instances}
    if roles == {'prefill', 'decode'}:
      return 'disaggregated'
    return roles.pop() if len(roles) == 1 else 'mixed'


@dataclasses.dataclass(frozen=True)
class Slo:
  """Latency objectives; a request attains when it meets both (DistServe 1).

  Attributes:
    ttft_s: seconds from arrival to the first token.
    tpot_s: mean seconds of each token after it. inf: any.
  """

  ttft_s: float
  tpot_s: float

  def __post_init__(self) -> None:
    for field in ('ttft_s', 'tpot_s'):
      value = getattr(self, field)
      require(is_positive(value) or value == math.inf, f'Slo.{field}', value,
              'seconds above 0, or inf')
