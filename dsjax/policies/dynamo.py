"""Dynamo's conditional disaggregation: by length, by load, or by either.

The rules of its KV router: a prompt is prefilled where it decodes if what is
not kept of it there is short (`length`), if the prefill instance that it would
go to has more at work than a share of a batch (`load`), or in either case
(`either`); never where the decode instance is short of pages.
"""

import dataclasses

from dsjax.config.checks import require
from dsjax.config.placement import Slo
from dsjax.policies import static
from dsjax.scheduling.policy import (
  Because,
  Policy,
  RequestView,
  View,
  shortest_queue,
)


def policy(slo: Slo, prefills: int = 1, by: str = 'either',
           shortest: int = 256, fresh: float = 1.0, busy: float = 1.0,
           full: float = 0.9) -> Policy:
  """Args:
    by: length, load or either.
    shortest: a prompt of fewer tokens that are not kept is short,
    fresh: if they are no larger share of it; Dynamo's is 0.7: none is short
      without a prefix cache.
    busy: batches at work above which a prefill instance is busy.
    full: share of its pages in use above which a decode instance is.
  """
  require(by in ('length', 'load', 'either'), 'by', by,
          "'length', 'load' or 'either'")
  base = static.policy(slo, prefills)

  def route(view: View, request: RequestView) -> Because:
    remote = view.instances[shortest_queue(view, request)]
    here = [i for i in view.may_prefill if i.decodes
            and i.free_pages > (1 - full) * i.config.num_pages]
    near = min(here, key=lambda i: (-i.hit_tokens(request), i.residents
                                    + i.num_waiting), default=remote)
    tokens = request.prompt_len - near.hit_tokens(request)
    is_short = (by != 'load' and tokens < shortest
                and tokens <= fresh * request.prompt_len)
    is_busy = (by != 'length'
               and remote.backlog > busy * remote.config.prefill_tokens)
    if near is not remote and (is_short or is_busy):
      return Because(near.index, f'{tokens} tokens are short' if is_short
                     else f'{remote.index} is busy')
    return Because(remote.index, f'{tokens} tokens are not kept where it '
                   'would decode')

  return dataclasses.replace(base, name=f'dynamo {prefills}', route=route)
