"""Llumnix: rows move from the most to the least loaded instance.

Sun et al., OSDI 2024, and the rules of its code: a request is sent to the least
loaded instance; of the most and the least loaded, one row moves if that
narrows the gap. Load: the share of its pages in use, and that waiting prompts
will use. Instances are colocated.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import colocated
from dsjax.policies.colocated import roles
from dsjax.scheduling.policy import (
  InstanceView,
  Move,
  Policy,
  RequestView,
  View,
)


def policy(slo: Slo, tick_s: float = 0.5) -> Policy:
  """tick_s: seconds between two looks at the loads."""
  base = colocated.policy(slo)

  def load(instance: InstanceView) -> float:
    config = instance.config
    used = config.num_pages - instance.free_pages
    return (used + instance.backlog / config.page_size) / config.num_pages

  def route(view: View, request: RequestView) -> int:
    del request
    return min(view.prefills, key=load).index

  def rebalance(view: View) -> list[Move]:
    ranked = sorted([i for i in view.may_decode if i.flips], key=load)
    if not ranked:  # none may move a row, or they are lost and may come back
      return []
    least, most = ranked[0], ranked[-1]
    gap = load(most) - load(least)
    for row in most.rows():
      config = most.config
      moved = -(-row.context // config.page_size) / config.num_pages
      if 0 < gap - 2 * moved < gap and load(least) + moved < 1:
        return [Move(row.id, least.index)]
    return []

  def resize(view: View) -> dict[int, str]:
    return {} if view.time_s else roles(view)

  return dataclasses.replace(base, name='llumnix', route=route, tick_s=tick_s,
                             resize=resize, rebalance=rebalance)
