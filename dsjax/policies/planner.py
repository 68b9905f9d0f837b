"""Dynamo's SLA planner: as many of each role as the load needs.

Its floor: n = ceil(arrivals a second / what an instance serves within its
objective at the lengths of late), for each role, one change a tick.
Instances are not started and stopped here, so those left over decode; where
there are too few, the roles share them in proportion. A change needs
more than half an instance of difference, so that a constant load never makes
it swing.

Reactive: an instance more where every one of a role is predicted to miss its
objective, one fewer where every one would meet it by far with the load of one
more. As one role's gain is the other's loss here, both must hold at once.
"""

import dataclasses
from collections.abc import Sequence

from dsjax.config.checks import require
from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.policies.predict import (
  LEAST_S,
  decode_s,
  free_tokens,
  queue_s,
  rows_within,
)
from dsjax.policies.roles import home_roles
from dsjax.scheduling.policy import InstanceView, Load, Policy, View

SWING = 0.65  # instances: more than the half at which a count is rounded
BY_FAR = 0.8  # of an objective
LEAST = 32  # tokens of output of late, before which nothing is known


def wanted(instance: InstanceView, load: Load, slo: Slo, count: int) -> float:
  """Instances of `count`, a fraction, that should prefill."""
  alone_s = max(LEAST_S,
                instance.latency.prefill_s(((0, int(load.prompt_len)),)))
  # A queue of equal services at a share u waits u / (2 (1 - u)) of one.
  spare = max(slo.ttft_s / alone_s - 1, 0.0)
  share = 2 * spare / (1 + 2 * spare)
  tokens = load.prompt_len + load.output_len / 2
  rows = rows_within(instance, slo.tpot_s, tokens)
  row_s = instance.latency.decode_s(max(rows, 1), max(rows, 1) * tokens)
  prefill = load.rate_per_s * alone_s / max(share, 0.05)
  decode = load.rate_per_s * load.output_len * row_s / max(rows, 1)
  return count * prefill / (prefill + decode)


def reactive(view: View, slo: Slo) -> float:
  """How many more instances should prefill: 1, 0 or -1."""
  alone_s = view.may_prefill[0].latency.prefill_s(
      ((0, int(view.load.prompt_len)),))

  def more(instances: Sequence[InstanceView]) -> float:
    """Times the load of each, were there one fewer."""
    return len(instances) / max(len(instances) - 1, 0.1)

  entries, decoders = view.prefills, view.decodes
  late = all([queue_s(i) + alone_s > slo.ttft_s for i in entries])
  slow = all([decode_s(i) > slo.tpot_s for i in decoders])
  early = all([more(entries) * queue_s(i) < BY_FAR * (slo.ttft_s - alone_s)
               for i in entries])
  extra = more(decoders) - 1
  fast = all([
      decode_s(i, int(extra * i.num_rows), int(extra * i.context))
      < BY_FAR * slo.tpot_s and extra * i.context < free_tokens(i)
      for i in decoders])
  return (late and fast) - (slow and early)


def policy(slo: Slo, prefills: int = 1, tick_s: float = 5.0,
           by: str = 'floor') -> Policy:
  """prefills: at the start. tick_s: seconds between two plans. by: floor or
  reactive."""
  require(by in ('floor', 'reactive'), 'by', by, "'floor' or 'reactive'")
  base = static.policy(slo, prefills)

  def resize(view: View) -> dict[int, str]:
    if view.time_s == 0:
      return home_roles(view, prefills)
    flexible = [i for i in view.may_prefill if i.flips]
    now = sum([i.role == 'prefill' for i in flexible])
    load = view.load
    if len(flexible) < 2 or load.output_len < LEAST or not load.rate_per_s:
      return {}
    need = (now + reactive(view, slo) if by == 'reactive' else
            wanted(flexible[0], load, slo, len(flexible)))
    if need > now + SWING and now < len(flexible) - 1:
      return {min([i for i in flexible if i.role != 'prefill'],
                  key=lambda i: i.num_rows).index: 'prefill'}
    if need < now - SWING and now > 1:
      return {min([i for i in flexible if i.role == 'prefill'],
                  key=lambda i: i.backlog).index: 'decode'}
    return {}

  return dataclasses.replace(base, name='planner', tick_s=tick_s,
                             resize=resize, needs=('latencies',))
