"""An order for any policy: by deadline, what cannot attain put back.

Moore and Hodgson's rule on predicted seconds: by TTFT deadline; where the sum
passes one, the longest prompt so far goes to the back, and is served when
nothing else is on time, or once it has waited `most_wait` objectives: so
nothing waits for ever.
"""

import bisect
import dataclasses
from collections.abc import Sequence

from dsjax.config.placement import Slo
from dsjax.policies.predict import prefill_s
from dsjax.scheduling.policy import InstanceView, Policy, RequestView, View

MOST_WAIT = 100.0  # times TTFT
MOST = 256  # requests that may attain; those behind them keep their order


def with_deadlines(policy: Policy, slo: Slo, most_wait: float = MOST_WAIT
                   ) -> Policy:
  """The policy with this order of its prefill queues.

  Args:
    most_wait: times TTFT after which a request goes first, whatever it is.
  """
  def order(view: View, instance: InstanceView,
            waiting: Sequence[RequestView]) -> Sequence[RequestView]:
    if waiting[0].stage != 'queued':
      return waiting  # finished prefills: by their end
    aged, timely, late, rest, end_s = [], [], [], [], view.time_s
    for request in waiting:
      waited_s = view.time_s - request.arrival_s
      if waited_s > slo.ttft_s:
        (aged if waited_s > most_wait * slo.ttft_s else late).append(request)
        continue
      if len(timely) == MOST:
        rest.append(request)
        continue
      seconds = prefill_s(instance, request)
      bisect.insort(timely, (seconds, request.order, request))
      end_s += seconds
      if end_s > request.arrival_s + slo.ttft_s:
        seconds, _, longest = timely.pop()
        end_s -= seconds
        late.append(longest)
    on_time = sorted([request for *_, request in timely],
                     key=lambda request: request.order)
    late.sort(key=lambda request: request.order)
    return [*aged, *on_time, *rest, *late]

  return dataclasses.replace(policy, name=f'{policy.name} + deadlines',
                             order=order, needs=(*policy.needs, 'latencies'))
