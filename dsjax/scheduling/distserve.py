"""DistServe's choices: the hooks of the default policy, see policy.py."""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from dsjax.scheduling.views import InstanceView, RequestView, View


class PrefillBudget(NamedTuple):
  """What the next step of an instance may hold of prompts.

  Attributes:
    tokens: most prompt tokens; 0: none now, the rows decode.
    whole: a prompt joins others only where all of it fits.
    rows: the rows whose turn it is take a decode step in it too, where the
      instance mixes.
  """

  tokens: int
  whole: bool = True
  rows: bool = False


_BACKLOG = attrgetter('backlog', 'residents')


def shortest_queue(view: View, request: RequestView) -> int:
  """The instance with the fewest prompt tokens to go (DistServe 4.3)."""
  del request
  return min(view.prefills, key=_BACKLOG).index


def _load(instance: InstanceView) -> int:
  return instance.residents + instance.num_pulls + instance.num_swapped


def stays(view: View, request: RequestView) -> bool:
  """Whether it was prefilled where rows decode too."""
  home = view.instances[request.instance]
  return home.decodes and home in view.may_decode


def others(instances: Sequence[InstanceView], avoid: int
           ) -> Sequence[InstanceView]:
  """Without the one that has just failed, if any are left."""
  if avoid < 0:
    return instances
  return [i for i in instances if i.index != avoid] or instances


def least_loaded(view: View, request: RequestView, avoid: int) -> int:
  """Where it was prefilled, if that decodes too; else the decode instance with
  the fewest requests, there or on their way."""
  if stays(view, request):
    return request.instance
  return min(others(view.decodes, avoid), key=_load).index


def fill_budget(view: View, instance: InstanceView) -> PrefillBudget:
  """Prompts before rows: as many whole ones as L_m takes, or, on an instance
  that mixes, what the rows of the step leave of its token budget. One that has
  become a prefill instance mixes until the rows that it still has are gone."""
  del view
  tokens = instance.config.prefill_tokens
  if instance.mixes or (instance.flips and instance.role == 'prefill'
                        and instance.turn_rows):
    return PrefillBudget(tokens - instance.turn_rows, False, True)
  return PrefillBudget(tokens)


def leave_room_to_grow(view: View, instance: InstanceView,
                       request: RequestView, pages: int) -> bool:
  """Where rows grow, each resident keeps a page to grow into: an admission
  would else preempt one at once, or itself again and again."""
  del view, request
  spare = instance.residents if instance.decodes else 0
  return instance.free_pages >= pages + spare


def latest_arrival(view: View, instance: InstanceView,
                   residents: Sequence[RequestView]) -> RequestView:
  """The one that came last has the least to lose."""
  del view, instance
  return max(residents, key=attrgetter('order'))
