"""The scheduler's state as a value, and its check.

The stages of a request are told in lifecycle.py.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsjax.config.engine import InstanceConfig
from dsjax.config.latency import Latency, LinkLike
from dsjax.config.placement import FIRST_ROLE
from dsjax.scheduling import blocks, lifecycle, page_pool, prefix_cache
from dsjax.scheduling.events import Row
from dsjax.scheduling.policy import DISTSERVE, Policy
from dsjax.scheduling.recent import Cohort

RUN_AHEAD = 4


@dataclasses.dataclass(frozen=True)
class Config:
  """Instances, the longest sequence, commands in flight, decode run-ahead.

  Attributes:
    max_len: most tokens of prompt and output together.
    depth: commands in flight of each micro-batch of an instance that decodes
      (an instance has as many micro-batches as pipeline stages).
    prefill_depth: commands in flight in the prefill role; 1, so that a
      finished prompt's pages can be read out before the next batch occupies
      the device. With more pipeline stages, as many as there are stages.
    run_ahead: most decode steps of one command while nothing waits; always 1
      under pipeline stages. None: RUN_AHEAD for decode instances, and 1 where
      prompts run too, as one that arrives would wait behind all of them.
    away: indices of instances that are down at first, until an InstanceUp.
    tries: faults (a hand-off that failed, an instance that died) that a
      request survives; the next one fails it.
    policy: every choice, see policy.py.
    latencies: of each instance, link: between two of them, for policies that
      predict; None: such a policy has nothing to go by.
    prefix_cache: full pages stay for requests that begin alike; what an
      instance that takes prompts evicts goes to its host memory, if it has
      some.
    stream_kv: KV of a prompt in chunks leaves chunk by chunk (streaming.py).
    host_link: between an instance's memory and its host's, to predict what a
      load takes; None: it is taken to pay.
  """

  instances: tuple[InstanceConfig, ...]
  max_len: int
  depth: int = 2
  prefill_depth: int = 1
  run_ahead: int | None = None
  away: tuple[int, ...] = ()
  tries: int = 3
  policy: Policy = DISTSERVE
  latencies: tuple[Latency, ...] | None = None
  link: LinkLike | None = None
  prefix_cache: bool = False
  stream_kv: bool = False
  host_link: LinkLike | None = None

  @functools.cached_property
  def block_size(self) -> int:
    """Tokens of a block, whose hash an arrival tells."""
    return blocks.size_for([c.page_size for c in self.instances])

  @functools.cached_property
  def longest(self) -> int:
    """Most tokens of prompt and output together that every pool can hold."""
    return min([self.max_len, *(
        c.num_pages * c.page_size + 1 for c in self.instances)])


class ImpossibleEvent(ValueError):
  """An event that no run of this state can see: an internal error."""


class Seq(NamedTuple):
  """A live request.

  prompt_len counts the tokens to prefill (after a preemption: the tokens
  emitted so far too), stop those of them to prefill where it is; input_len
  those that arrived; limit is these plus max_tokens. stage: one of
  lifecycle.STAGES. instance, target: -1 while it waits for one. tries: faults
  that it has been recovered from. first_s: when its first token was there, or
  None. done: tokens whose KV is there, or being made; of a row those of when
  it became one. blocks: the hashes of its full blocks that are known. hit,
  sent: while its KV is streamed to target_pages, the tokens that were kept
  there, and those after them that were sent; sent is -1 where that has ended
  early: all of it will go over whole. lender: the instance that has kept more
  of its prompt, which is to be copied; -1: none.
  """

  id: int
  order: int
  prompt_len: int
  limit: int
  stage: str
  instance: int
  pages: tuple[int, ...] = ()
  done: int = 0
  target: int = -1
  target_pages: tuple[int, ...] = ()
  epoch: int = 0
  tries: int = 0
  arrival_s: float = 0.0
  input_len: int = 0
  first_s: float | None = None
  stop: int = 0
  blocks: tuple[int, ...] = ()
  hit: int = 0
  sent: int = 0
  lender: int = -1


class Loading(NamedTuple):
  """What a request in stage loading, or abandoned while it was, waits for.

  held: until its copy has ended: pages that `lender` has kept, or, where that
  is -1, slots of its instance's host memory.
  """

  id: int
  lender: int
  held: tuple[int, ...]


class Batch(NamedTuple):
  """A decode micro-batch and the decode ticks issued for it. least: the least
  `until` of its rows; -1: there are none."""

  rows: tuple[Row, ...] = ()
  tick: int = 0
  least: int = -1


class Instance(NamedTuple):
  """Queues and pool of one instance.

  queue: ids in stage queued, by arrival. prefilling: ids. pulls: ids in
  stage prefilled that this decode instance will pull. batches: a decode
  micro-batch a pipeline stage. turn: which of them goes next. number:
  commands issued. inflight: (command, its micro-batch or -1) not yet done.
  ending: (number, id): release when command `number` is done.
  residents: requests owning pages here. backlog: prompt tokens waiting.
  status: up, draining (takes no work that another could), down, or gone (down
  for good). role: what it does now, its config's unless that is flexible.
  since_s: when its oldest command in flight could start. pace: what steps took
  of late over what Config.latencies predict, see pace.Paced. streams: ids in
  stage prefilling elsewhere whose KV comes here meanwhile. host: what it has
  of host memory, if it has some. loading: what comes to requests that have
  pages here, but for hand-offs.
  """

  pool: prefix_cache.Pages
  batches: tuple[Batch, ...]
  queue: tuple[int, ...] = ()
  prefilling: tuple[int, ...] = ()
  pulls: tuple[int, ...] = ()
  turn: int = 0
  number: int = 0
  inflight: tuple[tuple, ...] = ()
  ending: tuple[tuple[int, int], ...] = ()
  residents: int = 0
  backlog: int = 0
  status: str = 'up'
  role: str = ''
  since_s: float = 0.0
  pace: tuple[float, float] = (1.0, 1.0)
  streams: tuple[int, ...] = ()
  host: prefix_cache.Host | None = None
  loading: tuple[Loading, ...] = ()

  @property
  def rows(self) -> tuple[Row, ...]:
    """The rows of every micro-batch."""
    return tuple(r for b in self.batches for r in b.rows)


class State(NamedTuple):
  """Everything the scheduler knows; a value (never change `seqs` in place).

  waiting: ids of those that need an instance while none of its kind is up.
  arrived, ended: of late, see recent.Recent.
  """

  seqs: dict[int, Seq]
  instances: tuple[Instance, ...]
  arrivals: int = 0
  waiting: tuple[int, ...] = ()
  arrived: tuple[Cohort, ...] = ()
  ended: tuple[Cohort, ...] = ()


def init(config: Config, counted: bool = False) -> State:
  """The state before the first event.

  Args:
    counted: for one who owns the state for long: pages have no ids, see
      page_pool.Counted, or what is kept changes in place.
  """
  def pool(num_pages: int) -> prefix_cache.Pages:
    if config.prefix_cache:
      return prefix_cache.init(num_pages, counted)
    return (page_pool.counted if counted else page_pool.init)(num_pages)

  def host(c: InstanceConfig) -> prefix_cache.Host | None:
    return prefix_cache.Host(prefix_cache.init(
        c.host_pages, counted)) if c.host_pages else None

  return State({}, tuple(
      Instance(pool(c.num_pages), (Batch(),) * c.pp, host=host(c),
               status='down' if index in config.away else 'up',
               role=FIRST_ROLE if c.flips else c.role)
      for index, c in enumerate(config.instances)))


def idle(state: State) -> bool:
  """No request lives and no command is in flight."""
  return not state.seqs and not any(i.inflight for i in state.instances)


def never_fits(config: Config, prompt_len: int, max_tokens: int
               ) -> str | None:
  """Why a request can never be served, in plain words, or None."""
  limit = prompt_len + max_tokens
  if prompt_len < 1 or max_tokens < 1:
    return (f'prompt of {prompt_len} tokens and max_tokens={max_tokens}: both '
            'must be 1 or more')
  if limit <= config.longest:
    return None
  if limit > config.max_len:
    return (f'prompt of {prompt_len} tokens and max_tokens={max_tokens} exceed '
            f'the context of {config.max_len} tokens')
  for index, c in enumerate(config.instances):
    need = page_pool.pages_for(limit - 1, c.page_size)
    if need > c.num_pages:
      return (f'prompt of {prompt_len} tokens and max_tokens={max_tokens} need '
              f'{need} pages; instance {index} ({c.role}) has {c.num_pages}')
  return None


def room(inst: Any, config: InstanceConfig, tokens: int,
         hits: Sequence[prefix_cache.Kept] = ()) -> int:
  """Pages for a new resident holding `tokens` tokens; 0: there is no room.

  Args:
    inst: an Instance, or a live one. config: its InstanceConfig.
    tokens: 1 or more.
    hits: pages that are kept of these tokens, fewer than all; not counted.
  """
  if inst.residents >= config.max_seqs:
    return 0
  need = page_pool.pages_for(tokens, config.page_size) - len(hits)
  idle = sum([not kept.owners for kept in hits]) if hits else 0
  return need if need + idle <= prefix_cache.num_free(inst.pool) else 0


def check(state: State) -> None:
  """Raises AssertionError unless the state is sound.

  Every page is free or owned once; every request is in exactly one place,
  the one its stage names; micro-batches are disjoint; counts agree.
  """
  places = {}

  def at(id, stage, index):
    assert id not in places, f'request {id} in two places'
    places[id] = (stage, index)

  for index, inst in enumerate(state.instances):
    for id in inst.queue:
      at(id, 'queued', index)
    orders = [state.seqs[id].order for id in inst.queue]
    assert orders == sorted(orders), f'instance {index}: queue by arrival'
    for id in inst.prefilling:
      at(id, 'prefilling', index)
    for batch in inst.batches:
      assert batch.least == min([r.until for r in batch.rows], default=-1), (
          f'instance {index}: {batch.least} is not the least of its rows')
    for row in inst.rows:
      at(row.id, 'decoding', index)
      assert row.pages == state.seqs[row.id].pages, f'row {row.id}: pages'
    for _, id in inst.ending:
      assert state.seqs[id].stage in lifecycle.ENDING, (
          f'request {id} is not ending')
      at(id, state.seqs[id].stage, index)
    for id in inst.pulls:
      at(id, 'prefilled', state.seqs[id].instance)
    owned = [s.pages for s in state.seqs.values() if s.instance == index]
    owned += [s.target_pages for s in state.seqs.values()
              if s.target == index]
    holders = sum(1 for p in owned if p)
    owned += [entry.held for other in state.instances
              for entry in other.loading if entry.lender == index]
    prefix_cache.check(inst.pool, owned)
    assert inst.residents == holders, f'instance {index}: residents'
    waiting = [state.seqs[i] for i in inst.queue + inst.prefilling]
    waiting += _check_loading(state, index, inst)
    for id, *_ in inst.host.swapped if inst.host else ():
      at(id, 'swapped', index)
    assert inst.backlog == sum(s.stop - s.done for s in waiting), (
        f'instance {index}: backlog')
    streamed = {s.id for s in state.seqs.values()
                if s.stage == 'prefilling' and s.target == index}
    assert sorted(inst.streams) == sorted(streamed), (
        f'instance {index}: streams')
  for id in state.waiting:
    at(id, state.seqs[id].stage, state.seqs[id].instance)
  for seq in state.seqs.values():
    held = seq.stage == 'migrating' or (
        seq.stage in ('abandoned', 'prefilling') and seq.target >= 0)
    assert bool(seq.target_pages) == held, f'request {seq.id}: target'
    assert seq.sent <= max(seq.done - seq.hit, 0) and (
        held or seq.sent <= 0 == seq.hit), f'request {seq.id}: sent'
    if seq.stage in ('migrating', 'loading', 'abandoned'):
      at(seq.id, seq.stage, seq.instance)
    elif seq.stage == 'prefilling' and seq.done == seq.stop:
      places.setdefault(seq.id, ('prefilling', seq.instance))
    assert places.get(seq.id) == (seq.stage, seq.instance), (
        f'request {seq.id} is {seq.stage} but at {places.get(seq.id)}')


def _check_loading(state, index, inst):
  """Each slot is free, kept, or a copy's; those that load here are known.

  Returns:
    the requests that load.
  """
  if inst.host:
    prefix_cache.check(inst.host.slots, [
        *[entry.held for entry in inst.loading if entry.lender < 0],
        *[slots for _, slots, _ in inst.host.offloads],
        *[slots for _, slots, _ in inst.host.swapped]])
    orders = [state.seqs[id].order for id, *_ in inst.host.swapped]
    assert orders == sorted(orders), f'instance {index}: swapped by arrival'
  loading = [state.seqs[entry.id] for entry in inst.loading]
  assert all(s.instance == index and s.stage in ('loading', 'abandoned')
             for s in loading), f'instance {index}: {loading} do not load'
  assert len({s.id for s in loading}) == len(loading)
  return [s for s in loading if s.stage == 'loading']
