"""Ours: no ratio set by hand, no search beforehand.

Per request and step: prompts by deadline; into a step go as many prompt tokens
as the rows have saved against TPOT; a prompt goes where it is predicted to be
done first, and its row stays there unless another instance would be faster.

Rows leave an instance that becomes one that prefills: what a few of them allow
a step would hold up all prompts.

Over time: how many instances only prefill, and whether the others only decode,
mix, or mix in short steps (their role is then colocated), is decided by
rollouts. The simulator, which is this scheduler, plays the load of late under
each choice; the best one is taken if it attains clearly more than the present
one.
"""

import dataclasses
import math

from dsjax.config.placement import Slo
from dsjax.policies.deadlines import MOST_WAIT, with_deadlines
from dsjax.policies.predict import (
  decode_s,
  prefill_s,
  prompt_tokens,
  queue_s,
)
from dsjax.policies.roles import leave_prefills
from dsjax.policies.rollouts import better
from dsjax.scheduling.policy import (
  DISTSERVE,
  InstanceView,
  Policy,
  PrefillBudget,
  RequestView,
  View,
  others,
)

CATCH_UP = 16  # tokens
SHORT = 0.75  # of TPOT: the longest of short steps. Prompts overtake sooner.
LEAST = 16  # tokens of an aged prompt in a step: so nothing waits for ever


def policy(slo: Slo, margin: float = 0.925, tick_s: float = 2.0) -> Policy:
  """Args:
    margin: share of what the step of a lone row leaves of TPOT that steps are
      made for. What varies, and is predicted wrong, are the prompts in it.
    tick_s: seconds between two looks at the roles.
  """
  flexible = _per_step(slo, margin)

  def resize(view: View) -> dict[int, str]:
    known = [i for i in view.may_prefill if i.flips]
    if (count := len(known)) < 2:
      return {}
    now = sum([i.role == 'prefill' for i in known])
    return better(flexible, slo, view, known, [
        ('chunked',) * count, ('colocated',) * count, *(
            ('prefill',) * n + (others,) * (count - n)
            for n in sorted({1, count // 2, now - 1, now, now + 1})
            if 0 < n < count
            for others in ('decode', 'chunked'))])

  return dataclasses.replace(flexible, name='adaptive', tick_s=tick_s,
                             resize=resize, rebalance=leave_prefills)


def _per_step(slo: Slo, margin: float) -> Policy:
  """Order, batch, route and hand-off."""
  def aim_s(instance: InstanceView) -> float:
    """Seconds that steps are made for."""
    lone_s = instance.latency.decode_s(1, 1) + instance.latency.host_s
    return slo.tpot_s - (1 - margin) * max(0.0, slo.tpot_s - lone_s)

  def allowed_s(view: View, instance: InstanceView, least: int = 0) -> float:
    """Seconds that the rows of at least so many tokens allow a step; one that
    is late makes up for it over CATCH_UP tokens."""
    now_s, tpot_s = view.time_s, aim_s(instance)
    saved_s = min([(row.first_s or now_s) + row.num_out * tpot_s
                   for row in instance.rows() if row.num_out >= least],
                  default=now_s + tpot_s) - now_s - tpot_s
    step_s = tpot_s + (saved_s if saved_s > 0 else saved_s / CATCH_UP)
    short_s = SHORT * tpot_s if instance.role == 'colocated' else step_s
    return min(step_s, short_s)

  def waits_s(view: View, instance: InstanceView) -> float:
    """How long the oldest prompt there has waited."""
    prompts = (*instance.prefilling(), *instance.waiting()[:1])
    return view.time_s - min([r.arrival_s for r in prompts],
                             default=view.time_s)

  def batch(view: View, instance: InstanceView) -> PrefillBudget:
    most = instance.config.prefill_tokens
    if not instance.num_rows:
      return PrefillBudget(most)
    tokens = prompt_tokens(instance, allowed_s(view, instance))
    if tokens < LEAST:
      waits = waits_s(view, instance) / slo.ttft_s / MOST_WAIT
      tokens = 0 if waits < 1 else prompt_tokens(
          instance, allowed_s(view, instance, CATCH_UP))
      if tokens < LEAST:
        tokens = LEAST if waits > 4 else 0
    return PrefillBudget(min(tokens, most - instance.turn_rows), False,
                         instance.config.mixes)

  def done_s(instance: InstanceView, request: RequestView) -> float:
    """Predicted seconds until its prompt is done there."""
    alone_s = queue_s(instance) + prefill_s(instance, request)
    if not instance.num_rows:
      return alone_s
    tokens = prompt_tokens(instance, step_s := aim_s(instance))
    steps = (instance.backlog + request.prompt_len) / max(tokens, 0.1)
    return max(alone_s, steps * step_s)

  def route(view: View, request: RequestView) -> int:
    return min(view.prefills, key=lambda i: (done_s(i, request), i.index)).index

  def hand_off(view: View, request: RequestView, avoid: int) -> int:
    steps = {i.index: decode_s(i, 1, request.prompt_len)
             for i in others(view.decodes, avoid)}
    best = min(steps, key=steps.__getitem__)
    home_s = steps.get(request.instance, math.inf)
    stays = home_s <= max(0.8 * aim_s(view.instances[request.instance]),
                          1.1 * steps[best])
    return request.instance if stays else best

  return with_deadlines(dataclasses.replace(
      DISTSERVE, name='adaptive', route=route, batch=batch,
      hand_off=hand_off, needs=('latencies', 'link')), slo)
