"""EcoServe: members of a group take turns in prefilling.

Du et al., arXiv 2504.18154; the rule as we know it, from memory. An instance is
in one phase at a time. A request goes to the member whose turn it is while its
queue meets TTFT, the queue fits into what its rows have saved against TPOT, and
the KV fits; else to the next. What they have saved is the least of them here,
not their mean: rows of long outputs save so much that nothing would bound it,
and short ones miss. Groups are not split and merged: there is one.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies import colocated
from dsjax.policies.predict import free_tokens, prefill_s, queue_s
from dsjax.scheduling.policy import InstanceView, Policy, RequestView, View


def policy(slo: Slo, margin: float = 0.6) -> Policy:
  """Every flexible instance is a member of the one group.

  margin: share of an objective that a prediction may take.
  """
  base = colocated.policy(slo)

  def saved_s(view: View, instance: InstanceView) -> float:
    """Seconds that the row which has saved least is ahead of TPOT."""
    saved = [row.num_out * slo.tpot_s - (view.time_s - row.first_s)
             for row in instance.rows() if row.first_s is not None]
    return min(saved, default=slo.ttft_s)

  def newest(instance: InstanceView) -> int:
    """The latest arrival that it holds: whose it is, it is that one's turn."""
    return max([r.order for r in (*instance.waiting(), *instance.prefilling(),
                                  *instance.rows()[-1:])], default=-1)

  def route(view: View, request: RequestView) -> int:
    members = view.prefills
    turn = max(range(len(members)), key=lambda n: (newest(members[n]), -n))
    for n in range(len(members)):
      member = members[(turn + n) % len(members)]
      taken_s = queue_s(member) + prefill_s(member, request)
      if (taken_s <= margin * min(slo.ttft_s, saved_s(view, member))
          and request.prompt_len + member.backlog <= free_tokens(member)):
        return member.index
    return min(members, key=queue_s).index

  return dataclasses.replace(base, name='ecoserve', route=route,
                             needs=('latencies',))
