"""Dynamo's conditional disaggregation: by length, by load, or by either.

The rules of its KV router: a prompt is prefilled where it decodes if it is
short (`length`), if the prefill instance that it would go to has more at work
than a share of a batch (`load`), or in either case (`either`); never where the
decode instance is short of pages. Prefix hits are zero here, so only the bound
on the length is left of the first.
"""

import dataclasses

from dsjax.config.checks import require
from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.scheduling.policy import (
  Policy,
  RequestView,
  View,
  shortest_queue,
)


def policy(slo: Slo, prefills: int = 1, by: str = 'either',
           shortest: int = 256, busy: float = 1.0, full: float = 0.9
           ) -> Policy:
  """Args:
    by: length, load or either.
    shortest: a prompt of fewer tokens is short.
    busy: batches at work above which a prefill instance is busy.
    full: share of its pages in use above which a decode instance is.
  """
  require(by in ('length', 'load', 'either'), 'by', by,
          "'length', 'load' or 'either'")
  base = static.policy(slo, prefills)

  def route(view: View, request: RequestView) -> int:
    remote = view.instances[shortest_queue(view, request)]
    here = [i for i in view.may_prefill if i.decodes
            and i.free_pages > (1 - full) * i.config.num_pages]
    is_short = by != 'load' and request.prompt_len < shortest
    is_busy = (by != 'length'
               and remote.backlog > busy * remote.config.prefill_tokens)
    if here and (is_short or is_busy):
      return min(here, key=lambda i: i.residents + i.num_waiting).index
    return remote.index

  return dataclasses.replace(base, name=f'dynamo {prefills}', route=route)
