"""Mooncake's conductor: least predicted TTFT, early rejection.

Qin et al., FAST 2025, section 4: the prefill instance of the least predicted
TTFT, the decode instance of the least predicted time between tokens; a request
whose predictions miss an objective is refused at once. What a prefix cache
keeps of a prompt at an instance counts in its prediction; where it is predicted
to be sooner, what another instance has kept is copied there first. The paper
copies it where it is longer than what is kept there by a factor.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.policies.predict import (
  TOO_LATE,
  decode_s,
  flight_s,
  prefill_s,
  queue_s,
)
from dsjax.scheduling.policy import (
  Because,
  Fetch,
  Policy,
  Refuse,
  RequestView,
  View,
  can_lend,
  others,
)


def soonest(view: View, request: RequestView) -> tuple[float, Fetch]:
  """Seconds until a first token, at the instance where they are fewest, and
  that instance: its lender is -1 where nothing is to be copied first."""
  kept = {i.index: i.hits(request)[0]
          for i in view.instances} if view.knows_link else {}
  choices = []
  for instance in view.prefills:
    wait_s = queue_s(instance)
    choices.append((wait_s + prefill_s(instance, request),
                    Fetch(instance.index, -1)))
    lender = max([i for i in view.instances if kept and can_lend(i, instance)],
                 key=lambda i: (kept[i.index], -i.index), default=None)
    if lender is None:
      continue
    fresh = kept[lender.index] - instance.hit_tokens(request)
    if fresh > 0:
      choices.append((
          wait_s + flight_s(lender) + view.link.migrate_s(fresh)
          + instance.latency.prefill_s((
              (kept[lender.index], request.prompt_len),)),
          Fetch(instance.index, lender.index)))
  return min(choices)


def policy(slo: Slo, prefills: int = 1, rejects: bool = True) -> Policy:
  """rejects: whether it refuses what would miss an objective."""
  base = static.policy(slo, prefills)

  def route(view: View, request: RequestView) -> Because | Refuse:
    ttft_s, choice = soonest(view, request)
    if rejects and request.first_s is None:
      waited_s = view.time_s - request.arrival_s
      if waited_s + ttft_s > slo.ttft_s:
        return Refuse(TOO_LATE)
      tokens = request.prompt_len
      # None: all of them are lost, and may come back.
      steps_s = [decode_s(i, 1, tokens) for i in view.decodes]
      if steps_s and min(steps_s) > slo.tpot_s:
        return Refuse('tokens would come too slowly: try again later')
    kept = view.instances[choice.index].hit_tokens(request)
    why = f'first token in {ttft_s:.3f} s, {kept} tokens kept'
    if choice.lender < 0:
      return Because(choice.index, why)
    return Because(choice, f'{why}, more at {choice.lender}')

  def hand_off(view: View, request: RequestView, avoid: int) -> Because:
    def step_s(instance):
      return decode_s(instance, 1, request.prompt_len)

    choice = min(others(view.decodes, avoid),
                 key=lambda i: (step_s(i), i.index))
    return Because(choice.index, f'a step takes {step_s(choice):.4f} s')

  return dataclasses.replace(base, name=f'mooncake {prefills}', route=route,
                             hand_off=hand_off, fetches=True,
                             needs=('latencies',))
