"""Splitwise: a pool of prompts, a pool of tokens, and a mixed one between.

Patel et al., ISCA 2024, and the rule of its simulator: a prompt goes to the
least loaded instance of the prompt pool, unless that has more waiting than a
limit; then to one of the token pool, which then prefills too, and decodes what
it prefilled. An instance is mixed for as long as it holds such work, so it goes
home by itself.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.scheduling.policy import (
  InstanceView,
  Policy,
  RequestView,
  View,
  others,
  stays,
)


def policy(slo: Slo, prefills: int = 1, most_waiting: int = 2048) -> Policy:
  """most_waiting: prompt tokens of an instance of the prompt pool."""
  base = static.policy(slo, prefills)

  def waiting(instance: InstanceView) -> tuple[int, int]:
    return instance.backlog, instance.residents

  def route(view: View, request: RequestView) -> int:
    choice = min(view.prefills, key=waiting)
    if choice.backlog and choice.backlog + request.prompt_len > most_waiting:
      mixed = [i for i in view.may_prefill if i.decodes
               and i.backlog + request.prompt_len <= most_waiting]
      choice = min(mixed, key=waiting, default=choice)
    return choice.index

  def hand_off(view: View, request: RequestView, avoid: int) -> int:
    if stays(view, request):
      return request.instance
    return min(others(view.decodes, avoid),
               key=lambda i: (-i.free_pages, i.residents)).index

  return dataclasses.replace(base, name=f'splitwise {prefills}', route=route,
                             hand_off=hand_off)
