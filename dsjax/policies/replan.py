"""Replanning: the placement is searched again for the load of late.

Zhong et al., OSDI 2024, 4.3: rate and lengths are watched, and where they have
shifted the placement algorithm runs again on what came of late. Here devices
are flexible instances: the placements are every split of them, all colocated
and all chunked, each is played by the simulator, and roles change to those of
the best where it attains clearly more than the present one.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import chunked
from dsjax.policies.deadlines import with_deadlines
from dsjax.policies.roles import complete, home_roles, roles_now
from dsjax.policies.rollouts import better
from dsjax.scheduling.policy import (
  DISTSERVE,
  InstanceView,
  Policy,
  PrefillBudget,
  View,
)


def policy(slo: Slo, prefills: int = 1, tick_s: float = 5.0,
           deadlines: bool = False) -> Policy:
  """Args:
    prefills: at the start. tick_s: seconds between two searches.
    deadlines: whether prompts are ordered by deadline, in what the search
      plays as well.
  """
  mixing = chunked.policy(slo)

  def batch(view: View, instance: InstanceView) -> PrefillBudget:
    base = mixing if instance.mixes else DISTSERVE
    return base.batch(view, instance)

  placed = dataclasses.replace(DISTSERVE, name='replan', batch=batch)
  if deadlines:
    placed = with_deadlines(placed, slo)

  def resize(view: View) -> dict[int, str]:
    if view.time_s == 0:
      return home_roles(view, prefills)
    flexible, fixed = roles_now(view)
    count = len(flexible)
    if count == 0 or count + len(fixed) < 2:
      return {}
    splits = [('prefill',) * n + ('decode',) * (count - n)
              for n in range(count + 1)]
    known = (*splits, ('colocated',) * count, ('chunked',) * count)
    return better(placed, slo, view, [
        roles for roles in known if complete((*roles, *fixed))])

  return dataclasses.replace(placed, tick_s=tick_s, resize=resize,
                             needs=('latencies', 'link'))
