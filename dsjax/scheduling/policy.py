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
from operator import attrgetter
from typing import Any, NamedTuple

from dsjax.config.checks import is_positive, require
from dsjax.config.engine import InstanceConfig
from dsjax.config.latency import LinkLike
from dsjax.config.placement import ROLES
from dsjax.scheduling import prefix_cache
from dsjax.scheduling.pace import Paced


class PolicyError(ValueError):
  """A hook of a policy answered what the scheduler cannot do."""


def index_of(answer: Any) -> int:
  """An integer of any kind; -1 for what is none."""
  if type(answer) is int:
    return answer
  try:
    return -1 if isinstance(answer, bool) else operator.index(answer)
  except TypeError:
    return -1


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


class RequestView:
  """A request, to be read.

  Attributes:
    id, order: order counts arrivals.
    arrival_s: when it arrived. first_s: when its first token was there; None:
      not yet.
    input_len: tokens of its prompt.
    prompt_len: tokens to prefill; after a preemption those emitted too.
    done: of these, tokens prefilled or being prefilled. stop: of these, those
      to prefill where it is; fewer than all where its prompt is split.
    context: tokens in its KV cache, what is in flight included. num_out: of
      these those that it has generated, and the newest one.
    limit: tokens of prompt and output together, at most.
    stage: see lifecycle.STAGES. instance, target: indices, -1 for none.
    tries: faults that it survived.
  """

  __slots__ = ('_request', '_context')

  def __init__(self, request: Any, context: int = -1):
    self._request, self._context = request, context

  def __repr__(self) -> str:
    return f'request {self.id}'

  @property
  def id(self) -> int:
    return self._request.id

  @property
  def order(self) -> int:
    return self._request.order

  @property
  def arrival_s(self) -> float:
    return self._request.arrival_s

  @property
  def first_s(self) -> float | None:
    return self._request.first_s

  @property
  def input_len(self) -> int:
    return self._request.input_len

  @property
  def context(self) -> int:
    return self._request.done if self._context < 0 else self._context

  @property
  def num_out(self) -> int:
    return max(0, self.context - self._request.input_len + 1)

  @property
  def prompt_len(self) -> int:
    return self._request.prompt_len

  @property
  def done(self) -> int:
    return self._request.done

  @property
  def stop(self) -> int:
    return self._request.stop

  @property
  def limit(self) -> int:
    return self._request.limit

  @property
  def stage(self) -> str:
    return self._request.stage

  @property
  def instance(self) -> int:
    return self._request.instance

  @property
  def target(self) -> int:
    return self._request.target

  @property
  def tries(self) -> int:
    return self._request.tries


class InstanceView:
  """An instance, to be read.

  Attributes:
    index, config: which, and its InstanceConfig.
    prefills, decodes, mixes: what it does now, see config.placement.Role.
    flips: it may do all of it. role: of now.
    latency: predicts the seconds of its steps, corrected by what they took.
    status: up | draining | down | gone.
    backlog: prompt tokens that wait here or are being prefilled.
    residents: requests that own pages here. free_pages: of its pool.
    num_waiting: requests in its prefill queue. num_pulls: finished prefills
      whose KV it will pull. num_swapped: rows that wait in its host memory to
      come back. num_in_flight: commands. pieces: (start, stop) of
    the prompts in them.
  """

  __slots__ = ('_instance', '_requests')

  def __repr__(self) -> str:
    return f'instance {self.index}'

  def __init__(self, instance: Any, requests: dict[int, Any]):
    self._instance, self._requests = instance, requests

  @property
  def index(self) -> int:
    return self._instance.index

  @property
  def config(self) -> InstanceConfig:
    return self._instance.config

  @property
  def prefills(self) -> bool:
    return self._instance.prefills

  @property
  def decodes(self) -> bool:
    return self._instance.decodes

  @property
  def mixes(self) -> bool:
    return self._instance.mixes

  @property
  def flips(self) -> bool:
    return self._instance.able.flips

  @property
  def role(self) -> str:
    return self._instance.role

  @property
  def latency(self) -> Paced:
    return Paced(_given(self._instance.latency, 'latencies'),
                 *self._instance.pace)

  @property
  def status(self) -> str:
    return self._instance.status

  @property
  def backlog(self) -> int:
    return self._instance.backlog

  @property
  def residents(self) -> int:
    return self._instance.residents

  @property
  def free_pages(self) -> int:
    return prefix_cache.num_free(self._instance.pool)

  @property
  def num_waiting(self) -> int:
    return len(self._instance.queue)

  @property
  def num_pulls(self) -> int:
    return len(self._instance.pulls)

  @property
  def num_swapped(self) -> int:
    host = self._instance.host
    return len(host.swapped) if host else 0

  @property
  def num_in_flight(self) -> int:
    return len(self._instance.inflight)

  @property
  def pieces(self) -> tuple[tuple[int, int], ...]:
    return tuple([(chunk.start, chunk.stop)
                  for command, _ in self._instance.inflight
                  for chunk in command.chunks])

  @property
  def num_steps(self) -> int:
    """Steps of the commands in flight that have no prompts."""
    return sum([command.steps for command, _ in self._instance.inflight
                if not command.chunks])

  @property
  def num_rows(self) -> int:
    """Rows of every micro-batch."""
    return sum([batch.size for batch in self._instance.batches])

  @property
  def context(self) -> int:
    """Tokens that its rows have in their KV, all rows together."""
    return sum([sum([row[1] for row in batch.rows.values()])
                + batch.tick * batch.size
                for batch in self._instance.batches])

  @property
  def turn_rows(self) -> int:
    """Rows of the micro-batch whose turn it is."""
    return self._instance.batches[self._instance.turn].size

  def hit_tokens(self, request: RequestView) -> int:
    """Tokens of a prompt that need not be computed here: their KV is kept, in
    the instance's memory or, after these, in its host's."""
    return sum(self.hits(request))

  def host_hit_tokens(self, request: RequestView) -> int:
    """Of these, those in host memory: they are to be loaded."""
    return self.hits(request)[1]

  def load_s(self, tokens: int) -> float:
    """Predicted seconds to load so many from host memory."""
    link = self._instance.host_link
    return link.migrate_s(tokens) if link else 0.0

  def hits(self, request: RequestView) -> tuple[int, int]:
    """(tokens that are kept in its memory, those after them in its host's)"""
    inst, seq = self._instance, request._request
    size = inst.config.page_size
    hashes = inst.hashes(seq)[:(seq.prompt_len - 1) // size]
    count = len(prefix_cache.hits(inst.pool, hashes))
    more = (len(prefix_cache.hits(inst.host.slots, hashes[count:]))
            if inst.host else 0)
    return count * size, more * size

  def rows(self) -> tuple[RequestView, ...]:
    """The requests that decode here."""
    requests = self._requests
    return tuple([RequestView(requests[id], row[1] + batch.tick)
                  for batch in self._instance.batches
                  for id, row in batch.rows.items()])

  def prefilling(self) -> tuple[RequestView, ...]:
    """Requests that own pages here and have prompt tokens left to prefill."""
    return self._views(self._instance.prefilling)

  def waiting(self) -> tuple[RequestView, ...]:
    """Requests in its prefill queue, by arrival."""
    return self._views(self._instance.queue)

  def pulls(self) -> tuple[RequestView, ...]:
    """Finished prefills whose KV it will pull, by their end."""
    return self._views(self._instance.pulls)

  def _views(self, ids: Sequence[int]) -> tuple[RequestView, ...]:
    return tuple([RequestView(self._requests[id]) for id in ids])


def _given(value, field):
  """A prediction's means."""
  if value is None:
    raise LookupError(f'this policy predicts: {field} must be given')
  return value


class Load(NamedTuple):
  """What has come of late; the newest requests count.

  Attributes:
    rate_per_s: arrivals a second; 0 before the second one.
    prompt_len, longest: tokens of their prompts, mean and 9th decile.
    output_len: tokens of an output, by the requests that came last: all that
      they have had so far over the number of them that ended, as those that
      end first are short. 1 before the first.
  """

  rate_per_s: float
  prompt_len: float
  longest: float
  output_len: float


class View:
  """All that a policy may see.

  Attributes:
    time_s: of the event that is answered.
    instances: all of them.
    prefills: those whose role is to take prompts, that are up, else being
      drained; where there are none, those that could.
    decodes: the same, of those that take rows.
    may_prefill, may_decode: all of those that could, whatever their role now:
      what a route or a hand_off may answer.
    load: of late. link: predicts the seconds of a hand-off, if it is known.
  """

  __slots__ = ('_instances', '_now', '_recent', '_link')

  def __init__(self, instances: Sequence[Any], requests: dict[int, Any],
               now: list[Any], recent: Any, link: LinkLike | None):
    """now: time, instances that take prompts, that take rows, that could do
    either; kept current. recent: what arrived and was served, see live.Recent.

    Not the Run itself: a cycle would keep every state of a log alive.
    """
    self._instances = tuple([InstanceView(i, requests) for i in instances])
    self._now, self._recent, self._link = now, recent, link

  @property
  def instances(self) -> tuple[InstanceView, ...]:
    return self._instances

  @property
  def time_s(self) -> float:
    return self._now[0]

  @property
  def prefills(self) -> tuple[InstanceView, ...]:
    return self._views(1)

  @property
  def decodes(self) -> tuple[InstanceView, ...]:
    return self._views(2)

  @property
  def may_prefill(self) -> tuple[InstanceView, ...]:
    return self._views(3)

  @property
  def may_decode(self) -> tuple[InstanceView, ...]:
    return self._views(4)

  @property
  def knows_link(self) -> bool:
    return self._link is not None

  @property
  def link(self) -> LinkLike:
    return _given(self._link, 'link')

  @property
  def load(self) -> Load:
    arrived, served = self._recent.arrived, self._recent.served
    lengths = sorted([prompt_len for _, prompt_len in arrived]) or [1]
    span_s = arrived[-1][0] - arrived[0][0] if arrived else 0.0
    return Load((len(arrived) - 1) / span_s if span_s > 0 else 0.0,
                sum(lengths) / len(lengths), lengths[len(lengths) * 9 // 10],
                self._output_len(served))

  def _output_len(self, served: Sequence[tuple[int, int]]) -> float:
    """See Load. The requests that came last: as many as there are rows and
    as are remembered of those that ended."""
    if not served:
      return 1.0
    rows = [(row.order, row.num_out) for i in self._instances
            for row in i.rows()]
    first = max([*rows, *served])[0] + 1 - len(served) - len(rows)
    ended = [tokens for order, tokens in served if order >= first]
    running = [tokens for order, tokens in rows if order >= first]
    return (sum(ended) + sum(running)) / len(ended) if ended else 1.0

  def _views(self, place: int) -> tuple[InstanceView, ...]:
    views = self._instances
    return tuple([views[i.index] for i in self._now[place]])


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
_BACKLOG = attrgetter('backlog', 'residents')


def shortest_queue(view: View, request: RequestView) -> int:
  """The instance with the fewest prompt tokens to go (DistServe 4.3)."""
  del request
  return min(view.prefills, key=_BACKLOG).index


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

  def refuse(self, hook: str, answer: Any, allowed: str) -> PolicyError:
    """The error that says what a hook answered and what it may answer."""
    text = repr(answer)
    text = text if len(text) <= 80 else f'{text[:80]} ...'
    return PolicyError(f'policy {self.name!r}, hook {hook}: answered {text}: '
                       f'must be {allowed}')


DISTSERVE = Policy()
