"""Mooncake's conductor: least predicted TTFT, early rejection.

Qin et al., FAST 2025, section 4: the prefill instance of the least predicted
TTFT, the decode instance of the least predicted time between tokens; a request
whose predictions miss an objective is refused at once. What a prefix cache
keeps of a prompt at an instance counts in its prediction; that it be copied
from another prefill instance first, where that is sooner, is left out.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.policies.predict import decode_s, prefill_s, queue_s
from dsjax.scheduling.policy import (
  Because,
  Policy,
  Refuse,
  RequestView,
  View,
  others,
)


def policy(slo: Slo, prefills: int = 1, rejects: bool = True) -> Policy:
  """rejects: whether it refuses what would miss an objective."""
  base = static.policy(slo, prefills)

  def route(view: View, request: RequestView) -> Because | Refuse:
    def ttft_s(instance):
      return queue_s(instance) + prefill_s(instance, request)

    choice = min(view.prefills, key=ttft_s)
    if rejects and request.first_s is None:
      waited_s = view.time_s - request.arrival_s
      if waited_s + ttft_s(choice) > slo.ttft_s:
        return Refuse('its first token would come too late: try again later')
      tokens = request.prompt_len
      # None: all of them are lost, and may come back.
      steps_s = [decode_s(i, 1, tokens) for i in view.decodes]
      if steps_s and min(steps_s) > slo.tpot_s:
        return Refuse('tokens would come too slowly: try again later')
    return Because(choice.index, f'first token in {ttft_s(choice):.3f} s, '
                   f'{choice.hit_tokens(request)} tokens kept')

  def hand_off(view: View, request: RequestView, avoid: int) -> Because:
    def step_s(instance):
      return decode_s(instance, 1, request.prompt_len)

    choice = min(others(view.decodes, avoid),
                 key=lambda i: (step_s(i), i.index))
    return Because(choice.index, f'a step takes {step_s(choice):.4f} s')

  return dataclasses.replace(base, name=f'mooncake {prefills}', route=route,
                             hand_off=hand_off)
