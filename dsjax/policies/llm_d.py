"""llm-d's decider: long prompts are prefilled apart, short ones where they go.

The rule of its prefix-based decider: the decode instance is chosen first; the
prompt is prefilled elsewhere only if it, less what is kept there, has at least
so many tokens. The decode instance is chosen by its load and by the share of
the prompt that it has kept, as its scorers do.
"""

import dataclasses
from collections.abc import Callable, Sequence

from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.scheduling.policy import (
  Because,
  InstanceView,
  Policy,
  RequestView,
  View,
  others,
  shortest_queue,
  stays,
)


def policy(slo: Slo, prefills: int = 1, least: float = 512,
           weight: float = 2.0) -> Policy:
  """Args:
    least: tokens of a prompt that is prefilled apart; 0: none is.
    weight: of the share that is kept; that of the load, as a share of the
      busiest one's, is 1.
  """
  base = static.policy(slo, prefills)

  def best(choices: Sequence[InstanceView], request: RequestView,
           load: Callable[[InstanceView], int]) -> InstanceView:
    busiest = max(1, *map(load, choices))
    return min(choices, key=lambda i: (
        load(i) / busiest
        - weight * i.hit_tokens(request) / request.prompt_len))

  def route(view: View, request: RequestView) -> Because:
    choices = [i for i in view.may_prefill if i.decodes] or view.may_prefill
    near = best(choices, request, lambda i: i.residents + i.num_waiting)
    fresh = request.prompt_len - near.hit_tokens(request)
    why = f'{fresh} tokens are not kept at {near.index}'
    if 0 < least <= fresh:
      return Because(shortest_queue(view, request), f'{why}: many')
    return Because(near.index, f'{why}: few')

  def hand_off(view: View, request: RequestView, avoid: int) -> int:
    if stays(view, request):
      return request.instance
    return best(others(view.decodes, avoid), request,
                lambda i: i.residents + i.num_pulls).index

  return dataclasses.replace(base, name=f'llm-d {prefills}', route=route,
                             hand_off=hand_off)
