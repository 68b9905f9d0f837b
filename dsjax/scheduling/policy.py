"""A scheduling policy: one frozen value of plain functions.

The scheduler keeps the mechanism (pages, epochs, stages, commands in flight);
what could be decided otherwise, it asks of a `Policy`. Each hook sees a view
that it cannot change and answers with data, so no answer can lose a request
or corrupt a page: one that the mechanism cannot carry out is a `PolicyError`
that names the hook. Time reaches a policy only as the time of the event.

A policy of one's own replaces what it changes:

    def shortest_first(view, instance, waiting):
      return sorted(waiting, key=lambda request: request.prompt_len)

    mine = dataclasses.replace(DISTSERVE, name='shortest', order=shortest_first)

The same value serves, simulates, is searched with and is explored for faults.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dsjax.config.checks import is_positive, require
from dsjax.config.placement import ROLES
from dsjax.scheduling.distserve import (
  PrefillBudget,
  fill_budget,
  latest_arrival,
  least_loaded,
  leave_room_to_grow,
  shortest_queue,
)
from dsjax.scheduling.distserve import others as others
from dsjax.scheduling.distserve import stays as stays
from dsjax.scheduling.views import InstanceView, Load, RequestView, View

__all__ = ('Because', 'DISTSERVE', 'Fetch', 'InstanceView', 'Load', 'Move',
           'Policy', 'PolicyError', 'PrefillBudget', 'Refuse', 'RequestView',
           'Split', 'View')


class PolicyError(ValueError):
  """A hook of a policy answered what the scheduler cannot do."""


def index_of(answer: Any) -> int:
  """An integer of any kind; -1 for what is none."""
  if type(answer) is int:
    return answer
  try:
    return -1 if isinstance(answer, bool) else operator.index(answer)
  except Exception:  # a hook's own object may raise anything
    return -1


class Refuse(NamedTuple):
  """Of a route: the request is not served, and its client is told why."""

  reason: str


class Split(NamedTuple):
  """Of a route: the prompt is prefilled up to `tokens` at instance `index`.
  Then its KV goes where the route, asked again, has the rest prefilled."""

  index: int
  tokens: int


class Fetch(NamedTuple):
  """Of a route: the prompt is prefilled at instance `index`, and what
  instance `lender` has kept of it is copied there first, if that is more than
  is kept there. The policy says fetches=True."""

  index: int
  lender: int


class Because(NamedTuple):
  """Of a route or a hand_off: an answer, and why. The reason is kept in the
  request's record."""

  answer: int | Split | Fetch
  reason: str


class Move(NamedTuple):
  """Of a rebalance: the row of request `id` goes on at instance `target`."""

  id: int
  target: int

Route = Callable[[View, RequestView], int | Split | Fetch | Refuse | Because]
Order = Callable[[View, InstanceView, Sequence[RequestView]],
                 Sequence[RequestView]]
Batch = Callable[[View, InstanceView], PrefillBudget]
HandOff = Callable[[View, RequestView, int], int | Because]
Admit = Callable[[View, InstanceView, RequestView, int], bool]
Victim = Callable[[View, InstanceView, Sequence[RequestView]], RequestView]
Resize = Callable[[View], Mapping[int, str]]
Rebalance = Callable[[View], Iterable[Move]]

NEEDS = {
    'latencies': 'latencies, as it predicts: simulate has them, serve takes '
                 'latency=, runners --latency',
    'link': 'the link between instances, as it predicts hand-offs: a latency '
            'that was measured with one, or serve(link=)',
    'mixes': 'flexible or chunked instances only, as prompts and rows share '
             'its steps'}
HOOKS = ('route', 'order', 'batch', 'hand_off', 'admit', 'victim', 'resize',
         'rebalance')


def can_lend(lender: Any, instance: Any) -> bool:
  """Whether a Fetch to an instance may name another as its lender. Both are
  InstanceViews, or what these show."""
  return (lender.index != instance.index
          and lender.status in ('up', 'draining')
          and lender.config.kv_dtype == instance.config.kv_dtype)


def may_go_on(view: View, request: RequestView) -> Sequence[InstanceView]:
  """Where the rest of a split prompt may be prefilled: where its first part
  was, and on those of view.may_prefill that hold rows too."""
  home = view.instances[request.instance]
  return [i for i in view.may_prefill if i is home or i.config.decodes] or [
      home]


@dataclasses.dataclass(frozen=True)
class Policy:
  """Every choice of the scheduler; the defaults are DistServe's.

  Attributes:
    name: in tables and errors.
    route: (view, request) -> index of the instance, of view.may_prefill,
      whose queue it joins; or a Split, whose instance is flexible or only
      prefills; or a Fetch; or a Refuse. Asked at its arrival, when it is
      prefilled again, and at each cut of a Split (done is then above 0): there
      for the index of one of may_go_on(view, request), or a Split there.
      Because says why.
    order: (view, instance, waiting) -> the same requests, first to go first.
      waiting: its prefill queue, by arrival, before each of its prefill
      batches; or the finished prefills that it will pull, by their end,
      before each pull. None: first come, first served.
    batch: (view, instance) -> PrefillBudget of its next step. 0 tokens: not
      now; it is asked again at every event, and at no other time.
    hand_off: (view, request, avoid) -> index of the instance, of
      view.may_decode, that pulls its KV; of what a flexible instance
      prefilled perhaps its own: then it stays. Asked before the step that
      ends such a prompt, and, unless it stays, at the prompt's end. Because
      says why. avoid: one that has just failed at it, or -1.
    admit: (view, instance, request, pages) -> whether it may take so many
      pages now; asked only where they are free and a place is. False: the
      queue waits, and it is asked again at every event.
    victim: (view, instance, residents) -> of these, the one whose pages are
      taken where rows run short of them; it is prefilled again.
    tick_s: seconds between two Ticks, at which the next two are asked; None:
      never.
    resize: (view) -> {index: role} of flexible instances that get another
      role. Nothing that they hold is moved by it.
    rebalance: (view) -> a Move of each row that is to go on elsewhere, from a
      flexible instance to any that decodes.
    fetches: whether its route may answer a Fetch: instances are then joined
      for it when a server starts.
    needs: of NEEDS, what it cannot do without.
  """

  name: str = 'distserve'
  route: Route = shortest_queue
  order: Order | None = None
  batch: Batch = fill_budget
  hand_off: HandOff = least_loaded
  admit: Admit = leave_room_to_grow
  victim: Victim = latest_arrival
  tick_s: float | None = None
  resize: Resize | None = None
  rebalance: Rebalance | None = None
  fetches: bool = False
  needs: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    require(type(self.name) is str, 'Policy.name', self.name, 'a text')
    for hook in HOOKS:
      require(callable(getattr(self, hook))
              or getattr(self, hook) is None and getattr(Policy, hook) is None,
              f'Policy.{hook}', getattr(self, hook), 'a function')
    require(type(self.fetches) is bool, 'Policy.fetches', self.fetches,
            'True or False')
    require(self.tick_s is None or is_positive(self.tick_s),
            'Policy.tick_s', self.tick_s, 'None or seconds above 0')
    require(self.tick_s is not None
            or not (self.resize or self.rebalance), 'Policy.tick_s', None,
            'seconds where there is a resize or a rebalance')
    require(isinstance(self.needs, tuple) and set(self.needs) <= set(NEEDS),
            'Policy.needs', self.needs, f'a tuple, of {tuple(NEEDS)}')

  def check(self, roles: Sequence[str], latencies: object, link: object
            ) -> None:
    """Before a run: whether there is what it needs.

    Args:
      roles: of the instances. latencies, link: see scheduler.Config.

    Raises:
      InputError: it names the need.
    """
    known = [ROLES[role] for role in roles]
    apart = len(known) > 1 and not all([
        role.prefills and role.decodes and not role.flips for role in known])
    there = {'latencies': latencies is not None,
             'link': link is not None or not apart,
             'mixes': all([role.mixes or not role.prefills for role in known])}
    for need in self.needs:
      require(there[need], 'policy', self.name, f'given {NEEDS[need]}')

  @property
  def is_distserve(self) -> bool:
    """Whether every hook is the default's, whatever the name."""
    return all(getattr(self, field.name) == getattr(DISTSERVE, field.name)
               for field in dataclasses.fields(Policy) if field.name != 'name')

  @property
  def says_not_yet(self) -> bool:
    """Whether an answer may tell a queue to wait that could go on."""
    return (self.admit is not leave_room_to_grow
            or self.batch is not fill_budget)

  def failed(self, hook: str, error: Exception) -> PolicyError:
    """The error that says what a hook raised."""
    return PolicyError(f'policy {self.name!r}, hook {hook}: raised '
                       f'{type(error).__name__}: {error}')

  def refuse(self, hook: str, answer: object, allowed: str) -> PolicyError:
    """The error that says what a hook answered and what it may answer."""
    try:
      text = repr(answer)
    except Exception:  # its own
      text = f'a {type(answer).__name__}'
    text = text if len(text) <= 80 else f'{text[:80]} ...'
    return PolicyError(f'policy {self.name!r}, hook {hook}: answered {text}: '
                       f'must be {allowed}')


DISTSERVE = Policy()
