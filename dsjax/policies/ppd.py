"""PPD: later turns may be prefilled where their conversation decodes.

arXiv 2603.13358, of which we know the abstract alone: a turn after the first is
prefilled at a prefill instance or, appended to the KV that is kept there, at
the decode instance, by a weighted score of the TTFT and the TPOT that are
predicted. Needs a prefix cache and flexible instances.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.policies.predict import decode_s, prefill_s, queue_s, rest_s
from dsjax.scheduling.policy import (
  Because,
  InstanceView,
  Policy,
  RequestView,
  View,
  others,
  shortest_queue,
)


def policy(slo: Slo, prefills: int = 1, weight: float = 0.5) -> Policy:
  """weight: of the TTFT in the score; the rest is the TPOT's."""
  base = static.policy(slo, prefills)

  def score(instance: InstanceView, request: RequestView, rows: InstanceView,
            stall: float) -> float:
    """rows: where it decodes; stall: seconds a token that they wait for it."""
    ttft_s = queue_s(instance) + prefill_s(instance, request)
    tpot_s = decode_s(rows, 1, request.prompt_len) + stall
    return weight * ttft_s / slo.ttft_s + (1 - weight) * tpot_s / slo.tpot_s

  def route(view: View, request: RequestView) -> int | Because:
    remote = view.instances[shortest_queue(view, request)]
    here = [i for i in view.may_prefill if i.decodes]
    near = max(here, key=lambda i: i.hit_tokens(request), default=remote)
    if near is remote or not near.hit_tokens(request):
      return remote.index
    stall_s = prefill_s(near, request) / max(1.0, view.load.output_len)
    scores = {i.index: score(i, request, near, stall_s * (i is near))
              for i in (near, remote)}
    return Because(min(scores, key=lambda index: scores[index]), ', '.join(
        [f'{index} scores {value:.3f}' for index, value in scores.items()]))

  def hand_off(view: View, request: RequestView, avoid: int) -> int:
    return min(others(view.decodes, avoid),
               key=lambda i: rest_s(view, i, request)).index

  return dataclasses.replace(base, name=f'ppd {prefills}', route=route,
                             hand_off=hand_off, needs=('latencies', 'link'))
