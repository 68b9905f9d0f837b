"""Ours: no ratio set by hand, no search beforehand.

Per request and step: prompts by deadline; into a step go as many prompt tokens
as the rows have saved against TPOT; a prompt goes where it is predicted to be
done first, and its row stays there unless another instance would be faster.

Rows leave an instance that becomes one that prefills: what a few of them allow
a step would hold up all prompts.

Over time: whether all mix, all mix and lend (their role is then colocated), or
how many only prefill while the others decode or mix, is decided by rollouts.
Rows lend a prompt what nearly all of them save before they end: it is done
sooner, and those that end earlier are late. The simulator, which is this
scheduler, plays the load of late under each choice; the best one is taken if it
attains clearly more than the present one.
"""

import dataclasses
import math

from dsjax.config.placement import Slo
from dsjax.policies.deadlines import (
  MOST_WAIT,
  ahead,
  attained,
  due_s,
  fitting_tokens,
  punctual_tokens,
  with_deadlines,
)
from dsjax.policies.predict import (
  CATCH_UP,
  TOO_LATE,
  allowed_s,
  decode_s,
  known_tokens,
  least_output,
  prefill_s,
  prompt_tokens,
  queue_s,
  room,
  unknown_tokens,
)
from dsjax.policies.roles import choices_of, leave_prefills
from dsjax.policies.rollouts import better
from dsjax.scheduling.policy import (
  DISTSERVE,
  InstanceView,
  Policy,
  PrefillBudget,
  Refuse,
  RequestView,
  View,
  others,
)

LEAST = 16  # tokens of a step. An old prompt has as many, whatever rows allow.
GROWS = 0.95  # as `margin`, of steps without prompts: rows grow till they end


def policy(slo: Slo, margin: float = 0.99, tick_s: float = 2.0,
           rejects: bool = False) -> Policy:
  """Args:
    margin: share of what the step of a lone row leaves of TPOT that steps are
      made for. What varies, and is predicted wrong, are the prompts in it.
    tick_s: seconds between two looks at the roles.
    rejects: whether it refuses what is predicted to miss TTFT, else served once
      there is time. Where memory is full more of the others attain then.
  """
  flexible = _per_step(slo, margin, rejects)

  def resize(view: View) -> dict[int, str]:
    seen = 0.0 if rejects else attained(view, slo)  # those refused are gone
    return better(flexible, slo, view, choices_of(view), seen)

  return dataclasses.replace(flexible, name='adaptive', tick_s=tick_s,
                             resize=resize, rebalance=leave_prefills)


def _per_step(slo: Slo, margin: float, rejects: bool) -> Policy:
  """Order, batch, route and hand-off."""
  def aim_s(instance: InstanceView, share: float = margin) -> float:
    """Seconds that steps are made for."""
    lone_s = instance.latency.decode_s(1, 1) + instance.latency.host_s
    return share * slo.tpot_s + (1 - share) * min(slo.tpot_s, lone_s)

  def allowed(view: View, instance: InstanceView, least: int = 0) -> int:
    """Prompt tokens that rows of at least `least` tokens allow a step."""
    sure = least_output(view.load) if instance.role == 'colocated' else 0.0
    return prompt_tokens(instance, allowed_s(
        view, instance, aim_s(instance), least, sure))

  def batch(view: View, instance: InstanceView) -> PrefillBudget:
    most = instance.config.prefill_tokens
    if not instance.num_rows:
      more = room(view, instance, lambda home: aim_s(home, GROWS))
      return PrefillBudget(min(most, fitting_tokens(view, instance, slo, more)))
    tokens = allowed(view, instance)
    if tokens < LEAST:
      prompts = (*instance.prefilling(), *instance.waiting(1))
      waited_s = max([view.time_s - r.arrival_s for r in prompts], default=0)
      most_s = MOST_WAIT * slo.ttft_s
      tokens = allowed(view, instance, CATCH_UP) if waited_s > most_s else 0
      tokens = max(tokens, LEAST) if waited_s > 4 * most_s else tokens
    tokens = punctual_tokens(view, instance, slo, tokens)
    return PrefillBudget(min(tokens, most - instance.turn_rows), False,
                         instance.config.mixes)

  def route(view: View, request: RequestView) -> int | Refuse:
    mixing = [prompt_tokens(i, aim_s(i)) for i in view.prefills if i.num_rows]
    tokens = max(LEAST, sum(mixing) / max(1, len(mixing)))  # of a step

    def done_s(instance: InstanceView) -> float:
      """Predicted seconds until its prompt is done there. Rows change sooner
      than a queue: all instances that have some are predicted alike."""
      queue = ahead(view, instance, slo)
      alone_s = queue_s(instance, queue) + prefill_s(instance, request)
      left = request.prompt_len - known_tokens(instance, request)
      steps = (unknown_tokens(instance, queue) + left) / tokens
      return max(alone_s, steps * aim_s(instance) * bool(instance.num_rows))

    seconds, *_, best = min([(done_s(i), i.backlog, i.residents, i.index)
                             for i in view.prefills])
    if (rejects and request.first_s is None
        and view.time_s + seconds > due_s(request, slo)):
      return Refuse(TOO_LATE)
    return best

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
