"""The serving run without the hardware: a heap of events over scheduler.Run.

The scheduler that serves decides everything; here its commands take virtual
time on virtual instances, and their completions are its next events. Records
and event log are those of a real run.

What the orchestrator does, and what this models of it:

- A command reaches its device `host_s` after the event that it answers. With
  two commands in flight (scheduler.Config.depth) that hides behind the one
  still running; with one, the device waits for it. Commands of one event do
  not delay each other, though the real host is one thread.
- An instance runs its commands in order, through `pp` stages, each with a
  queue without bound before it. A command enters stage 1 when that is free
  and the tokens it starts from have left the last stage.
- A migration is dispatched like a command. Its pages are read behind what its
  source has in flight, as the steps there own the cache in turn (not where
  link.beside says otherwise); then it takes its link for itself. It lands in
  buffers of its own and delays no step of its target; that its pages are
  written there, before the next step, is part of its own time.
- So it is with copies to host memory and from there, but that the latter wait
  for no step. Each direction of each instance is a link of its own.
- Instances that share cores slow each other (contention.py).
- Arrivals of one moment are told together (Arrived.more). At one moment
  arrivals come first, then copies, then steps, as in a poll.
- Nothing is known of EOS: every request runs to its max_tokens, which is
  thus its output length.
"""

import dataclasses
import heapq
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from dsjax.analysis.record import Record
from dsjax.analysis.recorder import Recorder
from dsjax.config.checks import require
from dsjax.config.request import Request
from dsjax.scheduling import blocks, events, scheduler
from dsjax.scheduling.events import Arrived, Finish, Tick
from dsjax.simulation import executors, latency, running
from dsjax.simulation.contention import Contention
from dsjax.simulation.instance import stage_shares
from dsjax.simulation.running import Running

LEAST_TICK_S = 1e-3  # else there are ticks and nothing else
IDLE_TICKS = 1000
# Called with (state, event, commands) after each event.
OnEvent = Callable[[Any, events.Event, Sequence[events.Command]], object]


class Result(NamedTuple):
  """A simulated run.

  Attributes:
    records: one a request, in order of arrival.
    log: (event, commands) pairs, or None.
    steps: events applied; leapt: decode completions that were leapt over.
    busy_s: seconds of each instance's stages at work, summed over stages.
    link_s: seconds that links were taken, summed.
    state: the scheduler's last.
  """

  records: list[Record]
  log: list[tuple[events.Event, tuple[events.Command, ...]]] | None
  steps: int
  leapt: int
  busy_s: tuple[float, ...]
  link_s: float
  state: scheduler.State


def simulate(config: scheduler.Config, requests: Iterable[Request],
             latencies: latency.Latency | Sequence[latency.Latency],
             link: latency.LinkLike | None = None, log: bool = False,
             leap: bool = True, share: str = 'pair',
             on_event: OnEvent | None = None,
             contention: Contention | None = None,
             live: bool = False) -> Result:
  """Serves a workload in virtual time.

  Quiet runs are leapt over (see executors.py), but not with a log, on_event,
  contention or a policy of one's own, which may look at what a quiet run does
  not keep current: then every event is applied by itself.

  Args:
    requests: in any order; only the length of a prompt is read.
    latencies: of each instance, or one for all. Optionally with stage_share,
      the part of each of the pp stages in a step's seconds (equal parts
      without it).
    link: None where nothing migrates.
    log: keep the event log.
    leap: False applies every event and adds up every decode step.
    share: 'pair' for a link of its own for every (source, target); 'nic'
      where all copies from one source, and all to one target, queue.
    contention: of the instances, each of one stage; None: each has a device
      of its own.
    live: on_event gets the scheduler.Run, to look at while it is called, and
      no scheduler.State; pages have no names then.

  Raises:
    InputError: bad requests or latencies that do not fit the instances.
  """
  recorder, told = Recorder(), log or on_event is not None
  requests = list(requests)
  if not any([request.blocks for request in requests]):
    config = dataclasses.replace(config, prefix_cache=False)  # nothing can hit
  run = _Simulation(config, _Arrivals.of(requests, config), latencies,
                    link, recorder, share, leap, told, contention,
                    named=log or told and not live)
  kept: list | None = [] if log else None
  while run.advance():
    if kept is not None:
      kept.append((run.event, tuple(run.commands)))
    if on_event is not None:
      on_event(run.scheduler if live else run.scheduler.freeze(), run.event,
               tuple(run.commands))
  return Result(recorder.records, kept, run.steps, run.executor.leapt,
                run.executor.busy_s, run.copies.link_s, run.scheduler.freeze())


def stream(config: scheduler.Config, requests: Iterable[Request],
           latencies: latency.Latency | Sequence[latency.Latency],
           link: latency.LinkLike | None = None,
           share: str = 'pair', rows: Iterable[Running] = ()
           ) -> Iterator[Record]:
  """The records of `simulate`, each as its request ends.

  Memory does not grow with the number of requests: these are taken as they
  arrive, one ahead, and a record is not kept.

  Args:
    requests: by arrival, with growing ids, none after another; they may go on
      for ever.
    rows: that run already, at second 0; there are records of them too.

  Raises:
    InputError: as simulate; of a request once it would arrive.
  """
  ended: list[Record] = []
  rows = list(rows)
  sent = _in_order(requests, {row.id for row in rows})
  run = _Simulation(config, _Arrivals(sent, config), latencies, link,
                    Recorder(on_end=ended.append), share)
  run.begin(rows)
  while run.advance():
    if ended:
      yield from sorted(ended, key=_FINISH)
      ended.clear()


_FINISH = operator.attrgetter('finish_s', 'id')


class _Simulation:
  """A run in virtual time; `advance` takes it on, event by event.

  told: of every event somebody is told: nothing is leapt over. named: pages
  have names. event, commands: the newest one, and what answered it.
  """

  event: events.Event
  commands: list[events.Command]

  def __init__(self, config: scheduler.Config, arrivals: '_Arrivals',
               latencies: latency.Latency | Sequence[latency.Latency],
               link: latency.LinkLike | None, recorder: Recorder, share: str,
               leap: bool = True, told: bool = False,
               contention: Contention | None = None,
               named: bool = False) -> None:
    each = (latencies if isinstance(latencies, Sequence)
            else (latencies,) * len(config.instances))
    _check(config, each, link, share, contention)
    config.policy.check([c.role for c in config.instances], each, link)
    predicts = config.host_link is not None or not config.policy.is_distserve
    if config.latencies is None and predicts:
      config = dataclasses.replace(config, latencies=tuple(each), link=link)
    self.recorder, self.arrivals, self.steps = recorder, arrivals, 0
    run = self.scheduler = scheduler.Run(
        config, scheduler.init(config, counted=not named))
    self.copies = executors.Copies(link, share, arrivals.heap,
                                   config.host_link)
    self.executor: executors.Alone | executors.Shared
    if contention:
      self.executor = executors.Shared(each, self.copies, contention)
    else:
      alone = self.executor = executors.Alone(config.instances, each,
                                              self.copies, leap)
      if leap and not told and config.policy.is_distserve:
        alone.leap(run, recorder)
        run.ends_alone = not arrivals.followers
    self.ticks = _Ticks(config, self.copies.heap)

  def begin(self, rows: Iterable[Running]) -> None:
    """Puts rows on the instances, before the first event."""
    told = running.begin(self.scheduler, rows)
    for event, commands in told:
      self.recorder.observe(event, commands)
    # At once: the scheduler has all of them in flight already.
    self.executor.perform([c for _, commands in told for c in commands], 0.0)

  def advance(self) -> bool:
    """Takes it to the next event; False at the end."""
    event, arrivals = self.executor.next(), self.arrivals
    if event is None:
      return False
    if type(event) is Arrived:
      arrivals.push()
    commands = self.scheduler.apply(event)
    self.event, self.commands = event, commands
    self.steps += 1
    if type(event) is Tick:
      self.ticks.follow(event, self.scheduler)
    self.recorder.observe(event, commands)
    self.executor.perform(commands, event.time_s)
    if arrivals.followers:
      arrivals.follow(commands, event.time_s)
    return True


class _Ticks:
  """A Tick every Policy.tick_s, from 0 on, while there is work.

  Where nothing is in flight and nothing is to come the policy lets nothing
  start; it is asked IDLE_TICKS times more.
  """

  def __init__(self, config: scheduler.Config, heap: list[tuple]) -> None:
    self.tick_s, self.heap, self.idle = config.policy.tick_s, heap, 0
    if self.tick_s is not None:
      self.push(0)

  def push(self, count):
    now_s = count * self.tick_s
    heapq.heappush(self.heap, (now_s, executors.TICK, count, 0, Tick(now_s)))

  def follow(self, event, run):
    """Another one is to come, unless all is over."""
    moving = self.heap or any([inst.inflight for inst in run.instances])
    self.idle = 0 if moving else self.idle + 1
    if moving or run.seqs and self.idle <= IDLE_TICKS:
      self.push(round(event.time_s / self.tick_s) + 1)


def _check(config, latencies, link, share, contention):
  """Raises InputError where what simulates does not fit the instances."""
  count = len(config.instances)
  require(len(latencies) == count, 'latencies', len(latencies),
          f'one for each of {count} instances')
  require(share in ('pair', 'nic'), 'share', share, "'pair' or 'nic'")
  decodes = [c.decodes for c in config.instances]
  hands_off = (any(decodes) and not all(decodes) or len(decodes) > 1
               and any(c.flips for c in config.instances))
  require(link is not None or not hands_off, 'link', link,
          'given where prefill and decode are apart')
  has_host = any(c.host_pages for c in config.instances)
  require(config.host_link is not None or not has_host, 'Config.host_link',
          None, 'given where instances have host_pages')
  require(not contention or all(c.pp == 1 for c in config.instances),
          'contention', contention, 'None where an instance has '
          'several stages')
  require((config.policy.tick_s or 1.0) >= LEAST_TICK_S, 'Policy.tick_s',
          config.policy.tick_s, f'{LEAST_TICK_S} or more where it is simulated')
  for seconds, instance in zip(latencies, config.instances, strict=True):
    pp = instance.pp
    require(seconds.pp == pp and len(stage_shares(seconds, pp)) == pp,
            'latency.pp', seconds.pp, f'the pp={pp} of its instance')


class _Arrivals:
  """A workload's arrivals: of those that come at their own times the next one
  is on the heap, others once the request that they follow is answered."""

  def __init__(self, first: Iterable[Request], config: scheduler.Config):
    self.size = config.block_size if config.prefix_cache else 0
    self.heap: list[tuple] = []
    self.followers: dict[int, list[Request]] = {}
    self.coming, self.count = iter(first), 0
    self.later = 0  # of those that follow: behind all others of a moment
    self.ahead = next(self.coming, None)
    self.push()

  @classmethod
  def of(cls, requests: list[Request], config: scheduler.Config) -> Self:
    """Of requests in any order."""
    seen: set[int] = set()
    followers: dict[int, list[Request]] = {}
    for request in requests:
      _check_request(request)
      require(request.id not in seen, 'Request.id', request.id,
              'different for each request')
      seen.add(request.id)
      if request.after is not None:
        followers.setdefault(request.after, []).append(request)
    require(followers.keys() <= seen, 'Request.after',
            list(followers.keys() - seen)[:3], 'ids of other requests')
    first = sorted([r for r in requests if r.after is None],
                   key=lambda r: r.arrival_s)
    coming = [r.id for r in first]
    for id in coming:  # it grows
      coming += [r.id for r in followers.get(id, ())]
    require(len(coming) == len(requests), 'Request.after',
            sorted(seen.difference(coming))[:3],
            'of requests that do not wait for each other in a circle')
    sizes = sorted({r.block_tokens for r in requests if r.blocks}
                   if config.prefix_cache else ())
    require(len(sizes) < 2, 'Request.block_tokens', sizes[:3],
            'the same for all requests that have blocks')
    arrivals = cls(first, config)
    arrivals.followers, arrivals.later = followers, len(first)
    return arrivals

  def push(self) -> None:
    """Puts the next one on the heap."""
    request = self.ahead
    if request is not None:
      self.ahead = next(self.coming, None)
      more = (self.ahead is not None
              and self.ahead.arrival_s == request.arrival_s)
      heapq.heappush(self.heap, self.entry(request, request.arrival_s,
                                           self.count, more))
      self.count += 1

  def entry(self, request: Request, now_s: float, number: int,
            more: bool = False) -> tuple:
    """The heap's entry of an arrival."""
    hashes = blocks.resized(
        request.blocks, request.block_tokens, self.size
    ) if self.size and request.blocks else ()
    return (now_s, executors.ARRIVED, number, 0, Arrived(
        now_s, request.id, len(request.prompt),
        request.sampling.max_tokens or 0, more, hashes))

  def follow(self, commands: Iterable[events.Command], now_s: float) -> None:
    """Those that wait for requests that these commands end."""
    for command in commands:
      if type(command) is Finish:
        for request in self.followers.pop(command.id, ()):
          heapq.heappush(self.heap, self.entry(
              request, now_s + request.arrival_s, self.later))
          self.later += 1


def _check_request(request):
  """Raises InputError where a request is not one of a workload."""
  require(0 <= request.arrival_s < float('inf'), 'Request.arrival_s',
          request.arrival_s, 'seconds, 0 or more')
  require(request.sampling.max_tokens is not None, 'Sampling.max_tokens',
          None, 'set in a workload')


def _in_order(requests, taken):
  """The requests, each checked against the one before, and ids of rows."""
  last, block_tokens = (-math.inf, -math.inf), None
  for request in requests:
    _check_request(request)
    place = request.arrival_s, request.id
    require(place[0] >= last[0] and place[1] > last[1], 'Request', place,
            f'no earlier than, and with a greater id than, {last}: by arrival')
    require(request.id not in taken, 'Request.id', request.id,
            'of no row that runs already')
    require(request.after is None, 'Request.after', request.after,
            'None where records are streamed')
    if request.blocks:
      block_tokens = block_tokens or request.block_tokens
      require(request.block_tokens == block_tokens, 'Request.block_tokens',
              request.block_tokens, f'{block_tokens}, as of those before')
    last = place
    yield request
