"""Continuous batching that prefills first: vLLM of 2023, DistServe's baseline.

Every instance does both. Whole prompts go before rows, as many as a batch
takes.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies.static import ONCE_S
from dsjax.scheduling.policy import DISTSERVE, Policy, View


def policy(slo: Slo) -> Policy:
  """Every flexible instance is colocated."""
  del slo
  return dataclasses.replace(DISTSERVE, name='colocated', tick_s=ONCE_S,
                             resize=roles)


def roles(view: View) -> dict[int, str]:
  """Of every flexible instance the same."""
  return {i.index: 'colocated' for i in view.instances if i.flips}
