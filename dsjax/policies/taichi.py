"""TaiChi: instances that prefill in large and in small chunks, and rows flow.

Wang et al., arXiv 2508.01989; the rule as we know it, from memory. Every
instance mixes: those that lean to prefill with large chunks, those that lean to
decode with small ones. A prompt goes to the weakest instance that meets TTFT.
Rows start where chunks are small; where pages run short the row with the most
slack moves to the others, and one whose TPOT nears the objective moves back.
Large chunks of all are aggregation; small ones of no tokens are disaggregation.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies.predict import decode_s, prefill_s, queue_s
from dsjax.scheduling.policy import (
  DISTSERVE,
  InstanceView,
  Move,
  Policy,
  PrefillBudget,
  RequestView,
  View,
)


def policy(slo: Slo, prefills: int = 1, large: int = 1024, small: int = 128,
           margin: float = 0.6, low: float = 0.1, near: float = 0.95,
           tick_s: float = 0.5) -> Policy:
  """Args:
    prefills: instances that lean to prefill. large, small: tokens of a step.
    margin: share of TTFT that a prediction may take.
    low: share of free pages below which a row moves away.
    near: share of TPOT above which one moves back.
  """
  def leans(instance: InstanceView) -> bool:
    return instance.index < prefills

  def batch(view: View, instance: InstanceView) -> PrefillBudget:
    del view
    chunk = large if leans(instance) else small
    tokens = min(chunk, instance.config.prefill_tokens) - instance.turn_rows
    return PrefillBudget(max(0, tokens), False, True)

  def route(view: View, request: RequestView) -> int:
    def finish_s(instance):
      chunk = large if leans(instance) else small
      steps = (instance.backlog + request.prompt_len) / max(chunk, 1)
      return (queue_s(instance) + prefill_s(instance, request)
              + steps * decode_s(instance))

    choices = [i for i in view.may_prefill if small or leans(i)]
    choices = choices or view.may_prefill
    meeting = [i for i in choices if finish_s(i) <= margin * slo.ttft_s]
    return max(meeting, key=finish_s, default=min(choices, key=finish_s)).index

  def hand_off(view: View, request: RequestView, avoid: int) -> int:
    choices = [i for i in view.may_decode if not leans(i) and i.index != avoid]
    home = view.instances[request.instance]
    if home in choices or not choices:
      return home.index if home in view.may_decode else view.may_decode[0].index
    return min(choices, key=lambda i: i.residents + i.num_pulls).index

  def rebalance(view: View) -> list[Move]:
    flexible = [i for i in view.may_decode if i.flips]
    heavy = [i for i in flexible if leans(i)]
    light = [i for i in flexible if not leans(i)]
    if not heavy or not light:
      return []
    moves = []
    for instance in light:
      rows = instance.rows()
      if rows and instance.free_pages < low * instance.config.num_pages:
        target = max(heavy, key=lambda i: i.free_pages)
        moves.append(Move(max(rows, key=lambda r: r.num_out).id, target.index))
    for row in [row for i in heavy for row in i.rows()]:
      spent_s = view.time_s - (row.first_s or view.time_s)
      if row.num_out > 1 and spent_s / (row.num_out - 1) > near * slo.tpot_s:
        target = max(light, key=lambda i: i.free_pages)
        if target.free_pages > low * target.config.num_pages:
          moves.append(Move(row.id, target.index))
    return moves

  return dataclasses.replace(
      DISTSERVE, name=f'taichi {prefills}', route=route, batch=batch,
      hand_off=hand_off, tick_s=tick_s, rebalance=rebalance,
      needs=('mixes', 'latencies'))
