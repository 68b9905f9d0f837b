"""An order for any policy: by deadline, what cannot attain put back.

Moore and Hodgson's rule on predicted seconds: by TTFT deadline; where the sum
passes one, the longest prompt so far goes to the back, and is served when
nothing else is on time. Seconds are those beside the rows, with as many prompt
tokens a step as the policy lets in: with those of a prompt alone, prompts that
miss would be kept, and all behind them would be late.

Once one has waited `most_wait` objectives it takes its turn ahead of those on
time: so nothing waits for ever. But only one does, and only while few of the
requests that are being served have waited so long. With all of them ahead,
those on time would be late, and would come back as these.
"""

import bisect
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence

from dsjax.config.placement import Slo
from dsjax.policies.predict import (
  known_tokens,
  mixed_time,
  prefill_s,
  prompt_tokens,
  unknown_tokens,
)
from dsjax.scheduling.policy import InstanceView, Policy, RequestView, View

MOST_WAIT = 100.0  # times TTFT
SHARE = 1 / 32  # of what is served, that has waited for so long
APART = 0.5  # of a step without prompts
LEAST = 16  # tokens of a step: where none may go now, some soon may
MOST = 256  # requests that may attain; those behind them keep their order
ORDER = operator.attrgetter('order')


def due_s(request: RequestView, slo: Slo) -> float:
  """When its prefill must be done: of one that has had tokens, when its next
  one is due."""
  if request.first_s is None:
    return request.arrival_s + slo.ttft_s
  if request.first_s - request.arrival_s > slo.ttft_s:
    return -math.inf  # it was late already
  return request.first_s + slo.tpot_s * max(  # as a row; before a preemption
      request.num_out, request.prompt_len - request.input_len)


def on_time(view: View, instance: InstanceView, slo: Slo
            ) -> list[RequestView]:
  """The prompts that wait there and may still be on time, by arrival; MOST that
  came last are looked at."""
  return [request for request in instance.newest(MOST)
          if view.time_s <= due_s(request, slo)]


def ahead(view: View, instance: InstanceView, slo: Slo) -> list[RequestView]:
  """The prompts that a new one comes behind: those that have begun there, and
  those on time."""
  return [*instance.prefilling(), *on_time(view, instance, slo)]


def attained(view: View, slo: Slo) -> float:
  """The share of the requests that are there now that has met the objectives
  so far: 1 where there are none. Late prompts wait for long, so where there are
  some it is rather too low."""
  met = [view.time_s <= due_s(request, slo) for instance in view.instances
         for request in (*instance.waiting(), *instance.prefilling(),
                         *instance.pulls(), *instance.rows())]
  return sum(met) / len(met) if met else 1.0


def fitting_tokens(view: View, instance: InstanceView, slo: Slo, more: int
                   ) -> int:
  """Tokens of the prompts there that have begun, and of so many more that wait,
  those on time first."""
  begun = unknown_tokens(instance, instance.prefilling())
  if more <= 0:
    return begun
  soon = on_time(view, instance, slo)
  late = [request for request in instance.waiting(more)
          if view.time_s > due_s(request, slo)]
  return begun + unknown_tokens(instance, (*soon, *late)[:more])


def punctual_tokens(view: View, instance: InstanceView, slo: Slo, limit: int
                    ) -> int:
  """Tokens of a step, up to a limit, that leaves the prompt that is due first
  on time; those of that prompt at least.

  Each step more costs one of the rows. So all that are on time go together
  where a prompt takes less than a step of the rows, on average, or where what
  would be left out takes less than APART of one.
  """
  timely = sorted([
      (due, request.stop, request.stop - known_tokens(instance, request))
      for request in ahead(view, instance, slo)
      if (due := due_s(request, slo)) >= view.time_s])
  if not timely:
    return limit
  due, _, tokens = timely[0]
  seconds_of, most_s = mixed_time(instance), due - view.time_s
  if tokens >= limit or seconds_of(limit) <= most_s:
    return limit
  tokens = max(tokens, prompt_tokens(instance, most_s, limit), LEAST)
  together = sum([count for *_, count in timely])
  mean = sum([stop for _, stop, _ in timely]) // len(timely)
  left_s = seconds_of(together) - seconds_of(tokens)
  rows_s = seconds_of(0)
  apart = left_s > APART * rows_s and seconds_of(mean) > 2 * rows_s
  return min(limit, tokens if apart else max(tokens, together))


def with_deadlines(policy: Policy, slo: Slo, most_wait: float = MOST_WAIT
                   ) -> Policy:
  """The policy with this order of its prefill queues.

  Args:
    most_wait: times TTFT after which a request takes its turn, whatever it is.
  """
  most_wait_s = most_wait * slo.ttft_s

  def few(view: View) -> bool:
    """Whether one more that has waited for long may be served."""
    served = [request for i in view.instances
              for request in (*i.prefilling(), *i.pulls(), *i.rows())]
    aged = sum([(request.first_s or view.time_s) - request.arrival_s
                > most_wait_s for request in served])
    return aged <= SHARE * len(served)

  def prefill_time(view: View, instance: InstanceView
                   ) -> Callable[[RequestView], float]:
    """What predicts the seconds of a prompt there."""
    tokens, _, mixes = (policy.batch(view, instance) if instance.turn_rows
                        else (0, 0, False))
    if not mixes:
      return functools.partial(prefill_s, instance)
    tokens = max(tokens, LEAST)
    token_s = mixed_time(instance)(tokens) / tokens
    return lambda request: token_s * (
        request.prompt_len - known_tokens(instance, request))

  def order(view: View, instance: InstanceView,
            waiting: Sequence[RequestView]) -> Sequence[RequestView]:
    if waiting[0].stage != 'queued':
      return waiting  # finished prefills: by their end
    now_s = view.time_s
    aged, soon, late, rest = [], [], [], []  # each by arrival, as `waiting` is
    for request in waiting:
      due = due_s(request, slo)
      if due >= now_s:
        soon.append((due, request.order, request))
      elif now_s - request.arrival_s > most_wait_s:
        aged.append(request)
      else:
        late.append(request)
    timely: list[tuple[float, int, float, RequestView]] = []
    put_back, end_s = [], now_s
    seconds_of = prefill_time(view, instance) if soon else float
    for due, place, request in sorted(soon):
      if len(timely) == MOST:
        rest.append(request)
        continue
      seconds = seconds_of(request)
      bisect.insort(timely, (seconds, place, due, request))
      end_s += seconds
      if end_s > due:
        seconds, *_, longest = timely.pop()
        end_s -= seconds
        put_back.append(longest)
    first = [request for *_, request in sorted(
        [(due, place, request) for _, place, due, request in timely])]
    if put_back:
      late = sorted(late + put_back, key=ORDER)
    turns = 1 if aged and few(view) else 0
    return [*aged[:turns], *first, *rest, *aged[turns:], *late]

  return dataclasses.replace(policy, name=f'{policy.name} + deadlines',
                             order=order, needs=(*policy.needs, 'latencies'))
