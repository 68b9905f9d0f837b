"""A policy that answers anything allowed, to doubt the scheduler with.

Every answer is drawn by a hash of what the hook sees, so it is a function of
the view: the same world gets the same answer, another one any other. It lets
something start where nothing is in flight, as a policy may starve a request
and then nothing would be left to explore.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeVar

from dsjax.scheduling.policy import (
  DISTSERVE,
  Fetch,
  InstanceView,
  Move,
  Policy,
  PrefillBudget,
  Refuse,
  RequestView,
  Split,
  View,
  can_lend,
  may_go_on,
  shortest_queue,
)

T = TypeVar('T')
_ROLES = ('prefill', 'decode', 'colocated', 'chunked')
# Numbers of hooks, so that two of them do not answer alike.
(_ROUTE, _ORDER, _BATCH, _HAND_OFF, _ADMIT, _VICTIM, _RESIZE, _MOVE,
 _SPLIT, _FETCH) = range(10)


def _lenders(view, index):
  return [i for i in view.instances if can_lend(i, view.instances[index])]


def fetching(view: View, request: RequestView) -> int | Fetch:
  """A route: to the shortest queue, where what any other has kept comes."""
  index = shortest_queue(view, request)
  lenders = _lenders(view, index)
  return Fetch(index, max(lenders, key=lambda i: i.hit_tokens(
      request)).index) if lenders else index


FETCHING = dataclasses.replace(DISTSERVE, name='fetching', route=fetching,
                               fetches=True)


def anything(seed: int, waits: bool = True, splits: bool = True,
             fetches: bool = False) -> Policy:
  """A Policy whose hooks answer what may be answered, another a seed.

  waits: it may tell a queue to wait that could go on. splits: it may split a
  prompt. fetches: it may have what another instance has kept copied.
  """

  def draw(choices: Sequence[T], hook: int, view: View, *seen: int) -> T:
    places = tuple([(i.residents, i.num_waiting, i.num_pulls, i.num_in_flight)
                    for i in view.instances])
    return choices[hash((seed, hook, seen, places)) % 1009 % len(choices)]

  def route(view: View, request: RequestView
            ) -> int | Split | Fetch | Refuse:
    instances = may_go_on(view, request) if request.done else view.may_prefill
    seen = request.id, request.prompt_len, *[request.done] * (request.done > 0)
    answer = draw([*[i.index for i in instances] * 4, Refuse('for no reason')],
                  _ROUTE, view, *seen)
    if fetches and not (isinstance(answer, Refuse) or request.done):
      draws = [Fetch(answer, i.index) for i in _lenders(view, answer)]
      fetch = draw([*draws * 2, None], _FETCH, view, *seen)
      if fetch:
        return fetch
    cuts = range(request.done + 1, request.prompt_len)
    if isinstance(answer, Refuse) or not splits or not cuts:
      return answer
    instance = view.instances[answer]
    if instance.config.decodes and not instance.flips:
      return answer
    return draw([answer, Split(answer, draw(cuts, _SPLIT, view, *seen))],
                _SPLIT, view, *seen, 1)

  def order(view: View, instance: InstanceView,
            waiting: Sequence[RequestView]) -> Sequence[RequestView]:
    ways = list(itertools.permutations(waiting[:4]))
    first = draw(ways, _ORDER, view, instance.index,
                 *[request.id for request in waiting])
    return [*first, *waiting[4:]]

  def batch(view: View, instance: InstanceView) -> PrefillBudget:
    rows = instance.flips or instance.mixes
    rows = rows and draw([True, False], _BATCH, view, instance.index)
    most = instance.config.prefill_tokens - instance.turn_rows * rows
    least = 0 if instance.num_in_flight or instance.num_rows else 1
    tokens = draw(range(least, most + 1), _BATCH, view, instance.index, rows)
    return PrefillBudget(tokens, draw([True, False], _BATCH, view, tokens),
                         rows)

  def hand_off(view: View, request: RequestView, avoid: int) -> int:
    return draw(view.may_decode, _HAND_OFF, view, request.id, avoid).index

  def admit(view: View, instance: InstanceView, request: RequestView,
            pages: int) -> bool:
    return not instance.num_in_flight or draw(
        [True, True, False], _ADMIT, view, instance.index, request.id, pages)

  def victim(view: View, instance: InstanceView,
             residents: Sequence[RequestView]) -> RequestView:
    return draw(residents, _VICTIM, view, instance.index)

  def resize(view: View) -> dict[int, str]:
    return {i.index: draw(_ROLES, _RESIZE, view, i.index)
            for i in view.instances if i.flips
            and draw([True, False], _RESIZE, view, i.index, 1)}

  def rebalance(view: View) -> list[Move]:
    moves = []
    for instance in view.instances:
      for row in instance.rows() if instance.flips else ():
        choices = [i.index for i in view.may_decode if i is not instance]
        if choices and draw([True, False], _MOVE, view, row.id):
          moves.append(Move(row.id, draw(choices, _MOVE, view, row.id, 1)))
    return moves

  policy = Policy(f'anything {seed}', route, order, victim=victim,
                  hand_off=hand_off, tick_s=1.0, resize=resize,
                  rebalance=rebalance, fetches=fetches)
  return (dataclasses.replace(policy, batch=batch, admit=admit) if waits
          else policy)
