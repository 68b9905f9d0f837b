"""What a policy may see: read-only views of requests and instances."""

from collections.abc import Sequence
from typing import Any

from dsjax.config.engine import InstanceConfig
from dsjax.config.latency import LinkLike
from dsjax.scheduling import prefix_cache
from dsjax.scheduling.pace import Paced
from dsjax.scheduling.recent import Load, Recent


class RequestView:
  """A request, to be read.

  Attributes:
    id, order: order counts arrivals.
    arrival_s: when it arrived. first_s: when its first token was there; None:
      not yet.
    input_len: tokens of its prompt.
    prompt_len: tokens to prefill; after a preemption those emitted too.
    done: of these, tokens prefilled or being prefilled. stop: of these, those
      to prefill where it is; fewer than all where its prompt is split; not yet
      known while it is routed.
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
      the prompts in them. num_last: of these prompts, those that will be
      computed and are no rows yet.
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
  def num_last(self) -> int:
    """Prompts whose last tokens are in flight, and that are no rows yet."""
    chunks = [chunk for command, _ in self._instance.inflight
              for chunk in command.chunks if chunk.last]
    known = [self._requests.get(chunk.id) for chunk in chunks]
    return sum([r is not None and r.stage == 'prefilling' for r in known])

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
    if not inst.block_size:
      return 0, 0
    size = inst.page_size
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

  def waiting(self, most: int | None = None) -> tuple[RequestView, ...]:
    """Requests in its prefill queue, by arrival; the first `most` of them."""
    return self._views(self._instance.queue[:most])

  def newest(self, most: int) -> tuple[RequestView, ...]:
    """Of those that wait so many that came last, by arrival."""
    return self._views(self._instance.queue[-most:])

  def pulls(self) -> tuple[RequestView, ...]:
    """Finished prefills whose KV it will pull, by their end."""
    return self._views(self._instance.pulls)

  def _views(self, ids: Sequence[int]) -> tuple[RequestView, ...]:
    return tuple([RequestView(self._requests[id]) for id in ids])


def _given(value: Any, field: str) -> Any:
  """A prediction's means."""
  if value is None:
    raise LookupError(f'this policy predicts: {field} must be given')
  return value


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

  __slots__ = ('_instances', '_requests', '_now', '_recent', '_link', '_shown')

  def __init__(self, instances: Sequence[Any], requests: dict[int, Any],
               now: list[Any], recent: Recent, link: LinkLike | None):
    """now: time, instances that take prompts, that take rows, that could do
    either; kept current. recent: what came of late, see recent.Recent.

    Not the Run itself: a cycle would keep every state of a log alive.
    """
    self._instances = tuple([InstanceView(i, requests) for i in instances])
    self._requests = requests
    self._now, self._recent, self._link = now, recent, link
    # Of each list of `now`: it, and its views.
    self._shown: list[Any] = [(None, ())] * len(now)

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
    requests, rows = self._requests, []
    for i in self._instances:  # as rows() and num_out, in less time
      for batch in i._instance.batches:
        for id, row in batch.rows.items():
          request = requests[id]
          rows.append((request.order, max(
              0, row[1] + batch.tick - request.input_len + 1)))
    return self._recent.load(self.time_s, rows)

  def _views(self, place: int) -> tuple[InstanceView, ...]:
    known, views = self._shown[place]
    if known is not self._now[place]:
      known, each = self._now[place], self._instances
      views = tuple([each[i.index] for i in known])
      self._shown[place] = known, views
    return views
