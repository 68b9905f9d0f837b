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
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dsjax.analysis.record import Record
from dsjax.analysis.recorder import Recorder
from dsjax.config.checks import require
from dsjax.config.request import Request
from dsjax.scheduling import blocks, events, scheduler
from dsjax.scheduling.events import Arrived, Finish, Tick
from dsjax.simulation import executors, latency
from dsjax.simulation.contention import Contention
from dsjax.simulation.instance import stage_shares

IDLE_TICKS = 1000
# Called with (state, event, commands) after each event.
OnEvent = Callable[
    [scheduler.State, events.Event, Sequence[events.Command]], object]


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
             contention: Contention | None = None) -> Result:
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

  Raises:
    InputError: bad requests or latencies that do not fit the instances.
  """
  each = (latencies if isinstance(latencies, Sequence)
          else (latencies,) * len(config.instances))
  _check(config, each, link, share, contention)
  if config.latencies is None and not config.policy.is_distserve:
    config = dataclasses.replace(config, latencies=tuple(each), link=link)
  told = log or on_event is not None  # page ids too
  run = scheduler.Run(config, scheduler.init(config, counted=not told))
  recorder = Recorder()
  arrivals = _Arrivals(list(requests), config)
  copies = executors.Copies(link, share, arrivals.heap, config.host_link)
  if contention:
    executor = executors.Shared(each, copies, contention)
  else:
    executor = executors.Alone(config.instances, each, copies, leap)
    if leap and not told and config.policy.is_distserve:
      executor.leap(run, recorder)
      run.ends_alone = not arrivals.followers
  kept, steps, ticks = [] if log else None, 0, _Ticks(config, copies.heap)
  while (event := executor.next()) is not None:
    commands = run.apply(event)
    steps += 1
    if type(event) is Tick:
      ticks.follow(event, run)
    recorder.observe(event, commands)
    if kept is not None:
      kept.append((event, tuple(commands)))
    executor.perform(commands, event.time_s)
    if arrivals.followers:
      arrivals.follow(commands, event.time_s)
    if on_event is not None:
      on_event(run.freeze(), event, tuple(commands))
  return Result(recorder.records, kept, steps, executor.leapt,
                executor.busy_s, copies.link_s, run.freeze())


class _Ticks:
  """A Tick every Policy.tick_s, from 0 on, while there is work.

  Where nothing is in flight and nothing is to come the policy lets nothing
  start; it is asked IDLE_TICKS times more.
  """

  def __init__(self, config, heap):
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
  has_host = config.prefix_cache and any(
      c.prefills and c.host_pages for c in config.instances)
  require(config.host_link is not None or not has_host, 'Config.host_link',
          None, 'given where instances have host_pages')
  require(not contention or all(c.pp == 1 for c in config.instances),
          'contention', contention, 'None where an instance has '
          'several stages')
  for seconds, instance in zip(latencies, config.instances, strict=True):
    pp = instance.pp
    require(seconds.pp == pp and len(stage_shares(seconds, pp)) == pp,
            'latency.pp', seconds.pp, f'the pp={pp} of its instance')


class _Arrivals:
  """A workload's arrivals: those that come at their own times are on the
  heap, others once the request that they follow has been answered."""

  def __init__(self, requests, config):
    self.size = config.block_size if config.prefix_cache else 0
    self.heap, self.followers = [], {}
    seen = set()
    for request in requests:
      require(request.id not in seen, 'Request.id', request.id,
              'different for each request')
      require(0 <= request.arrival_s < float('inf'), 'Request.arrival_s',
              request.arrival_s, 'seconds, 0 or more')
      require(request.sampling.max_tokens is not None, 'Sampling.max_tokens',
              None, 'set in a workload')
      seen.add(request.id)
      if request.after is not None:
        self.followers.setdefault(request.after, []).append(request)
    require(self.followers.keys() <= seen, 'Request.after',
            list(self.followers.keys() - seen)[:3], 'ids of other requests')
    first = sorted([r for r in requests if r.after is None],
                   key=lambda r: r.arrival_s)
    coming = [r.id for r in first]
    for id in coming:  # it grows
      coming += [r.id for r in self.followers.get(id, ())]
    require(len(coming) == len(requests), 'Request.after',
            sorted(seen.difference(coming))[:3],
            'of requests that do not wait for each other in a circle')
    sizes = sorted({r.block_tokens for r in requests if r.blocks}
                   if self.size else ())
    require(len(sizes) < 2, 'Request.block_tokens', sizes[:3],
            'the same for all requests that have blocks')
    for n, request in enumerate(first):
      more = (n + 1 < len(first)
              and first[n + 1].arrival_s == request.arrival_s)
      self.heap.append(self.entry(request, request.arrival_s, n, more))
    self.count = len(first)

  def entry(self, request, now_s, number, more=False):
    """The heap's entry of an arrival."""
    hashes = blocks.resized(
        request.blocks, request.block_tokens, self.size
    ) if self.size and request.blocks else ()
    return (now_s, executors.ARRIVED, number, 0, Arrived(
        now_s, request.id, len(request.prompt), request.sampling.max_tokens,
        more, hashes))

  def follow(self, commands, now_s):
    """Those that wait for requests that these commands end."""
    for command in commands:
      if type(command) is Finish:
        for request in self.followers.pop(command.id, ()):
          heapq.heappush(self.heap, self.entry(
              request, now_s + request.arrival_s, self.count))
          self.count += 1
