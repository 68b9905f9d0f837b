"""Chunked prefill: rows first, prompts in what the step has left.

Sarathi-Serve, Agrawal et al., OSDI 2024: a step takes every row and as many
prompt tokens as a budget leaves; the budget is the largest whose step meets
TPOT. Here it is that of the rows of now, or a fixed one.
"""

import dataclasses

from dsjax.config.placement import Slo
from dsjax.policies.predict import prompt_tokens
from dsjax.scheduling.policy import (
  DISTSERVE,
  InstanceView,
  Policy,
  PrefillBudget,
  View,
)

LEAST = 16  # tokens: else a long prompt never ends


def policy(slo: Slo, chunk: int | None = None) -> Policy:
  """chunk: tokens of a step, rows included; None: what meets slo.tpot_s."""

  def batch(view: View, instance: InstanceView) -> PrefillBudget:
    del view
    most = instance.config.prefill_tokens - instance.turn_rows
    tokens = (prompt_tokens(instance, slo.tpot_s) if chunk is None
              else chunk - instance.turn_rows)
    return PrefillBudget(max(0, min(most, max(tokens, LEAST))), False, True)

  return dataclasses.replace(
      DISTSERVE, name='chunked' if chunk is None else f'chunked {chunk}',
      batch=batch, needs=('mixes', *('latencies',) * (chunk is None)))
