"""llm-d's decider: long prompts are prefilled apart, short ones where they go.

The rule of its prefix-based decider: the decode instance is chosen first; the
prompt is prefilled elsewhere only if it, less what is cached there, has at
least so many tokens.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.scheduling.policy import (
  Policy,
  RequestView,
  View,
  shortest_queue,
)


def policy(slo: Slo, prefills: int = 1, least: float = 512) -> Policy:
  """least: tokens of a prompt that is prefilled apart; 0: none is."""
  base = static.policy(slo, prefills)

  def route(view: View, request: RequestView) -> int:
    if 0 < least <= request.prompt_len:
      return shortest_queue(view, request)
    choices = [i for i in view.may_prefill if i.decodes] or view.may_prefill
    return min(choices, key=lambda i: i.residents + i.num_waiting).index

  return dataclasses.replace(base, name=f'llm-d {prefills}', route=route)
