"""DistServe's static split: so many instances prefill, the others decode.

Zhong et al., OSDI 2024, 4.3: shortest prefill queue, least loaded decode
instance, first come first served. The policy of prefill and decode instances
too, where nothing is flexible.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies.roles import home_roles
from dsjax.scheduling.policy import DISTSERVE, Policy, View

ONCE_S = 1e9  # a tick at the start and no more


def policy(slo: Slo, prefills: int = 1) -> Policy:
  """Of the flexible instances the first `prefills` only prefill."""
  del slo  # the search chooses the split for it

  def resize(view: View) -> dict[int, str]:
    return home_roles(view, prefills)

  return dataclasses.replace(DISTSERVE, name=f'static {prefills}',
                             tick_s=ONCE_S, resize=resize)
