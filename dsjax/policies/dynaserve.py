"""DynaServe: a request is cut where both of its instances end together.

arXiv 2504.09285; the rule as we know it, from memory. A request is its prompt
and the output that is expected. Its first tokens run where the queue is
shortest, the rest where it is the next shortest, cut so that both are done
with it at the same time, by a search over a dozen places. Where that lies in
the output, the prompt stays whole, and its row where it is. Steps hold as
many prompt tokens beside rows as TPOT allows.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import chunked
from dsjax.policies.predict import decode_s, most, queue_s
from dsjax.scheduling.policy import (
  InstanceView,
  Policy,
  RequestView,
  Split,
  View,
  may_go_on,
)


def policy(slo: Slo, least: int = 256) -> Policy:
  """least: tokens of the smallest part: less is not worth a hand-off."""

  def part_s(view: View, instance: InstanceView, start: int, stop: int,
             length: int) -> float:
    """Seconds until these tokens are prefilled; of the last ones, until the
    output is out as well."""
    more = view.load.output_len if start < stop == length else 0
    return (queue_s(instance) + instance.latency.prefill_s(((start, stop),))
            + more * decode_s(instance, 1, length))

  def route(view: View, request: RequestView) -> int | Split:
    length = request.prompt_len
    if request.done:
      places = may_go_on(view, request)
      others = [i for i in places if i.index != request.instance]
      return min(others or places, key=queue_s).index
    first, *others = sorted(view.may_prefill, key=queue_s)
    if not others or not first.flips or length < 2 * least:
      return first.index

    def ends_first(cut: int) -> bool:
      return part_s(view, first, 0, cut, length) <= (
          view.link.migrate_s(cut)
          + part_s(view, others[0], cut, length, length))

    cut = most(ends_first, length)
    if least <= cut <= length - least:
      return Split(first.index, cut)
    return first.index

  return dataclasses.replace(chunked.policy(slo), name='dynaserve',
                             route=route,
                             needs=('mixes', 'latencies', 'link'))
