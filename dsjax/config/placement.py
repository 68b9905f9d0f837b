"""Which instances run, with which parallelism, and the latency objectives."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Self

from dsjax.config.checks import (
  is_positive,
  is_positive_int,
  make_plain,
  require,
)


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
KIND = '[A-Za-z0-9][A-Za-z0-9_.-]*'  # a name of devices
_PLAN = re.compile(f'([1-9][0-9]{{0,3}})x([1-9][0-9]{{0,3}})(?:@({KIND}))?')


def _read(text: str, kinds: Sequence[str]) -> tuple[
    re.Match[str] | None, str, str]:
  """(match of a plan's text, its form, what an example has behind it)."""
  match = _PLAN.fullmatch(text)
  if match and (match[3] or '') not in kinds:
    match = None
  if '' in kinds:
    return match, 'TPxPP', ''
  return match, f'TPxPP@KIND with KIND of {tuple(kinds)}', f'@{kinds[0]}'


@dataclasses.dataclass(frozen=True)
class Plan:
  """Parallelism of one instance: tp tensor shards x pp pipeline stages.

  kind: of its devices, in a cluster of several kinds (MixedCluster).
  """

  tp: int = 1
  pp: int = 1
  kind: str = ''

  def __post_init__(self) -> None:
    make_plain(self)
    for field in ('tp', 'pp'):
      value = getattr(self, field)
      require(is_positive_int(value), f'Plan.{field}', value,
              'an integer above 0')
    require(self.kind == '' or isinstance(self.kind, str)
            and re.fullmatch(KIND, self.kind), 'Plan.kind', self.kind,
            "'' or a name of letters, digits, _ . -")

  @classmethod
  def parse(cls, text: str, field: str = 'plan',
            kinds: Iterable[str] = ('',)) -> Self:
    """The Plan of 'TPxPP', such as '2x1'; with '@KIND' behind, where devices
    are of several kinds.

    Raises:
      InputError naming `field`.
    """
    require(isinstance(text, str), field, text, 'a plan TPxPP, such as 2x1')
    match, shape, example = _read(text, tuple(kinds))
    require(match, field, text, f'a plan {shape}, such as 2x1{example}')
    assert match
    return cls(int(match[1]), int(match[2]), match[3] or '')

  def __str__(self) -> str:
    return f'{self.tp}x{self.pp}' + (self.kind and f'@{self.kind}')

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

  aligned: prefill and decode instances lie beside each other in a node, as
  Algorithm 2 puts them, so that KV stays there: see `groups`. It says where
  instances are, not which: placements are equal without it.
  """

  prefill: Sequence[Plan] = ()
  decode: Sequence[Plan] = ()
  colocated: Sequence[Plan] = ()
  chunked: Sequence[Plan] = ()
  flexible: Sequence[Plan] = ()
  aligned: bool = dataclasses.field(default=False, compare=False)

  def __post_init__(self) -> None:
    for role in ROLES:
      plans = getattr(self, role)
      require(isinstance(plans, (tuple, list))
              and all(isinstance(p, Plan) for p in plans),
              f'Placement.{role}', plans, 'a list of Plan')
      object.__setattr__(self, role, tuple(plans))
    require(isinstance(self.aligned, bool), 'Placement.aligned', self.aligned,
            'True or False')
    roles = [ROLES[role] for role, _ in self.instances]
    require(any(r.prefills for r in roles) and any(r.decodes for r in roles)
            and (any(not r.decodes for r in roles)
                 or all(r.prefills for r in roles)),
            'Placement', str(self), 'instances that prefill and instances that '
            'decode, those that only decode beside some that only prefill')

  @classmethod
  def parse(cls, text: str, field: str = 'placement',
            kinds: Iterable[str] = ('',)) -> Self:
    """The Placement of 'prefill=2x1,decode=1x1' and the like.

    role=TPxPP for each instance; a role's further instances follow with commas
    and no name: 'colocated=1x1,1x1', 'prefill=2x1,decode=1x1,1x1'. Where
    devices are of several kinds, role=TPxPP@KIND. ',aligned' at the end: see
    Placement.

    Raises:
      InputError naming `field`.
    """
    require(isinstance(text, str), field, text, 'role=TPxPP, ...')
    plans, role, kinds = {}, None, tuple(kinds)
    named, comma, word = text.rpartition(',')
    aligned = bool(comma) and word.strip() == 'aligned'
    for item in (named if aligned else text).split(','):
      name, equals, plan = item.strip().rpartition('=')
      role = name if equals else role
      match, shape, example = _read(plan, kinds)
      require(role in ROLES and match, field, text,
              f'role={shape}, ... with roles of {tuple(ROLES)}, such as '
              f'prefill=1x1{example},decode=1x1{example}')
      plans.setdefault(role, []).append(Plan.parse(plan, field, kinds))
    return cls(**plans, aligned=aligned)

  def __str__(self) -> str:
    return ','.join(f'{role}=' + ','.join(map(str, plans))
                    for role in ROLES if (plans := getattr(self, role))
                    ) + ',aligned' * self.aligned

  @property
  def instances(self) -> tuple[tuple[str, Plan], ...]:
    """((role, Plan), ...) in device order."""
    return tuple((role, p) for role in ROLES for p in getattr(self, role))

  @property
  def groups(self) -> tuple[tuple[int, ...], ...]:
    """Instances that must share a node: each alone; of an aligned placement
    prefill and decode instances in as many equal groups as there can be."""
    n, m = len(self.prefill), len(self.decode)
    count = math.gcd(n, m) if self.aligned and n and m else 0
    beside = [(*range(g * n // count, (g + 1) * n // count),
               *range(n + g * m // count, n + (g + 1) * m // count))
              for g in range(count)]
    first = n + m if beside else 0
    return (*beside, *((i,) for i in range(first, len(self.instances))))

  @property
  def names(self) -> tuple[str, ...]:
    """What each instance is called in tables and timelines."""
    return tuple(f'{i} {role} {plan}'
                 for i, (role, plan) in enumerate(self.instances))

  @property
  def num_devices(self) -> int:
    return sum(plan.num_devices for _, plan in self.instances)

  @property
  def tp(self) -> int:
    """The most devices that one step runs on."""
    return max(plan.tp for _, plan in self.instances)

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
    make_plain(self)
    for field in ('ttft_s', 'tpot_s'):
      value = getattr(self, field)
      require(is_positive(value) or value == math.inf, f'Slo.{field}', value,
              'seconds above 0, or inf')
