"""Arrow: stateless instances that take the other role when it is short.

Wu et al., arXiv 2505.11916, as shipped in xLLM's service. A prompt goes to the
shortest prefill queue, but to the decode instance of the shortest step where
that queue misses TTFT and the decode side has slack. A row goes to the first
decode instance that takes it: it meets TPOT with it, and has room for it; so
that others run empty. A prefill instance becomes a decode instance when none of
these takes one more and prefill has slack; a decode instance without rows goes
back. One of each role always stays.

Ours are: the margin; room, which xLLM's predictions know nothing of; and that a
decode instance goes back only where prompts wait, or it would swing. Roles are
looked at every tick_s, there at each request.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.policies.predict import (
  decode_s,
  free_tokens,
  prefill_s,
  queue_s,
)
from dsjax.policies.roles import home_roles
from dsjax.scheduling.policy import (
  InstanceView,
  Policy,
  RequestView,
  View,
  others,
)


def policy(slo: Slo, prefills: int = 1, margin: float = 0.7,
           tick_s: float = 1.0) -> Policy:
  """Args:
    margin: share of an objective that a prediction may take.
    tick_s: seconds between two looks at the roles.
  """
  ttft_s, tpot_s = margin * slo.ttft_s, margin * slo.tpot_s
  base = static.policy(slo, prefills)

  def takes(instance: InstanceView, tokens: int) -> bool:
    return (tokens <= free_tokens(instance)
            and instance.residents + instance.num_pulls
            < instance.config.max_seqs
            and decode_s(instance, 1, tokens) <= tpot_s)

  def route(view: View, request: RequestView) -> int:
    choice = min(view.prefills, key=queue_s)
    if not view.decodes:  # lost, and may come back
      return choice.index
    idlest = min(view.decodes, key=decode_s)
    slack = (len(view.decodes) - 1) / len(view.decodes)
    if (queue_s(choice) + prefill_s(choice, request) > ttft_s
        and idlest in view.may_prefill and queue_s(idlest) < queue_s(choice)
        and decode_s(idlest, 1, request.prompt_len) < slo.tpot_s * slack):
      return idlest.index
    return choice.index

  def hand_off(view: View, request: RequestView, avoid: int) -> int:
    choices, tokens = others(view.decodes, avoid), request.prompt_len
    shortest = min(choices, key=lambda i: decode_s(i, 1, tokens))
    return next((i for i in choices if takes(i, tokens)), shortest).index

  def resize(view: View) -> dict[int, str]:
    if view.time_s == 0:
      return home_roles(view, prefills)
    entries, decoders = view.prefills, view.decodes
    if not entries:  # lost, and may come back
      return {}
    flips = [i for i in entries if i.config.flips]
    mean_s = sum([queue_s(i) for i in entries]) / len(entries)
    tokens = int(view.load.prompt_len)
    if (flips and len(entries) > 1
        and not any([takes(i, tokens) for i in decoders])
        and (mean_s < ttft_s * (len(entries) - 1) / len(entries)
             or len(decoders) < len(entries))):
      return {min(flips, key=queue_s).index: 'decode'}
    idle = [i for i in decoders
            if i.config.flips and not i.num_rows and not i.num_pulls]
    if len(decoders) > 1 and idle and mean_s > ttft_s / 2:
      return {idle[-1].index: 'prefill'}
    return {}

  return dataclasses.replace(base, name='arrow', route=route,
                             hand_off=hand_off, tick_s=tick_s, resize=resize,
                             needs=('latencies',))
