"""The loop around the scheduler: what happens goes in, commands come out.

It belongs to one thread, that of its server, and knows of no client: they ask
through orchestrator.py, which also tells the life of a request.
"""

import collections
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

from rich import progress
from rich.console import Console

from dsjax.analysis.recorder import Recorder
from dsjax.config.engine import EngineConfig
from dsjax.config.latency import Latency, LinkLike
from dsjax.runtime.fleet import Fleet, Prefix, StepDone
from dsjax.runtime.looks import pause_s
from dsjax.runtime.output import RequestFailed, RequestOutputState
from dsjax.runtime.protocols import Engine, Observer, Report
from dsjax.scheduling import blocks, planning, scheduler
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  Command,
  Decided,
  DecodeDone,
  Event,
  Fail,
  Finish,
  InstanceDown,
  InstanceUp,
  PrefillDone,
  Reject,
  Tick,
)
from dsjax.scheduling.policy import Policy, PolicyError

LOG = logging.getLogger(__name__)
# Between polls that found nothing.
LEAST_PAUSE_S, MOST_PAUSE_S = 5e-5, 2e-3
MOST_WAIT_S = 0.05  # where what happens wakes the loop: for what is late
MOST_ASKED = 100  # events that observers ask for while one is applied


class Loop:
  """The scheduler's state, and what performs its commands.

  Attributes:
    fleet: the instances. state: the scheduler's, of scheduler_config.
    log, observers: see Orchestrator. recorder: a Record a request.
    unfinished: {id: RequestOutputState} of requests that have not ended.
    host_s: host seconds of polls that found work. next_s: when something is to
    be asked of it that nothing will wake it for.
    deciding: whether a hook of the policy may be running.
    closed: whether it serves no more; broken: why it was given up.
  """

  def __init__(self, engines: Sequence[Engine], config: EngineConfig,
               report: Report | None, keep_events: int | None,
               policy: Policy, latencies: tuple[Latency, ...] | None,
               link: LinkLike | None, planner: Executor | None) -> None:
    """Warms up every instance; see Orchestrator."""
    self.unfinished: dict[int, RequestOutputState] = {}
    # By instance: (id, step) of those that ended in its oldest command; ids
    # of those that got their last token by it.
    self._ended: dict[int, list[tuple[int, int]]] = {}
    self._full: dict[int, list[int]] = {}
    self.fleet = Fleet(engines, config, self._prefix_of, lambda: self.now,
                       policy.fetches)
    self.scheduler_config = scheduler.Config(
        self.fleet.capacities, config.max_len, config.depth,
        run_ahead=config.run_ahead, away=config.away, tries=config.tries,
        policy=policy, latencies=latencies, link=link,
        prefix_cache=config.prefix_cache, stream_kv=config.stream_kv)
    if report:
      self.fleet.warm(report)
    else:
      # Standard output is the caller's.
      with progress.Progress(console=Console(stderr=True),
                             transient=True) as bar:
        task = bar.add_task('')
        self.fleet.warm(lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name))
    self.state = scheduler.init(self.scheduler_config)
    self.recorder = Recorder()
    self.log: Any = [] if keep_events is None else collections.deque(
        maxlen=keep_events)
    self.observers: list[Observer] = []
    self.origin, self.moved_s, self.host_s = time.perf_counter(), 0.0, 0.0
    self.next_s = math.inf
    self.closed, self.broken = False, ''
    self._tick_s = 0.0  # when the next Tick is due
    # Instances that are away, of which the log was told.
    self._told_of: list[int] = []
    # Events that were asked for, and those that are being applied.
    self._asked: collections.deque[Event] = collections.deque()
    self.planner = planner
    self._planned: Future[planning.Roles] | None = None
    self._planner_failed = False
    self._todo: collections.deque[Event] = collections.deque()
    self._applying = self.deciding = False
    self._raised: list[BaseException] = []  # by observers and hooks

  @property
  def now(self) -> float:
    """Seconds since the clock's origin."""
    return time.perf_counter() - self.origin

  @property
  def busy(self) -> bool:
    """Whether there are requests, or something is in flight."""
    return not self.closed and (self._waits or not scheduler.idle(self.state))

  @property
  def _waits(self) -> bool:
    """Whether an event is still to be applied."""
    return bool(self._asked or self._todo)

  def pause(self) -> None:
    """Waits before the next poll, where one found nothing."""
    news = self.fleet.engines[0].news
    if news is None:
      time.sleep(pause_s(self.now - self.moved_s, LEAST_PAUSE_S, MOST_PAUSE_S))
    else:
      next_s, self.next_s = self.next_s, math.inf
      news.wait(min(MOST_WAIT_S, max(0.0, next_s - self.now)))
      news.clear()

  def wake(self) -> None:
    """Ends a pause, from any thread: something is asked."""
    news = self.fleet.engines[0].news
    if news is not None:
      news.set()

  # --- what is asked --------------------------------------------------------

  def arrive(self, output: RequestOutputState, more: bool) -> None:
    """Takes a request. more: see events.Arrived."""
    request = output.request
    self._tick()
    if not self.unfinished:
      self._told_of = []
    self.unfinished[request.id] = output
    self.event(Arrived(request.arrival_s, request.id, len(request.prompt),
                       request.sampling.max_tokens or 0, more,
                       self._blocks(request.prompt)))

  def cancel(self, id: int) -> None:
    """Ends a request now; one that has ended is left alone."""
    if id in self.unfinished and not self.closed:
      self.event(Cancelled(self.now, id))

  def kill(self, instance: int, back_s: float | None) -> None:
    """Loses an instance; back_s: seconds until it starts again, or None."""
    self.event(self._with_ended(self.fleet.stop(
        instance, 'it was killed',
        None if back_s is None else self.now + back_s)))

  def restore(self, instance: int) -> bool:
    """Ends a drain, or starts an instance that is lost again; whether it is
    there, see restored.

    Raises:
      RuntimeError: its devices refuse; it stays lost.
    """
    event: Event | None = InstanceUp(self.now, instance)
    if instance in self.fleet.down:
      event = self.fleet.start(instance)
    if event:
      self.event(self._with_ended(event))
    if isinstance(event, InstanceDown):
      raise RuntimeError(self.fleet.faults[-1][1])
    return event is not None

  def restored(self, instance: int) -> bool | None:
    """True once an instance that was started is there.

    Raises:
      RuntimeError: it did not start; it stays lost.
    """
    if instance in self.fleet.starting:
      return None
    if instance in self.fleet.down:
      raise RuntimeError(self.fleet.faults[-1][1])
    return True

  def settled(self, until_s: float) -> bool | None:
    """True once nothing is in flight; from until_s on what is stuck is lost."""
    if self.now > until_s:
      for index, queue in enumerate(self.fleet.running):
        if queue:
          self.kill(index, None)
    return not self.fleet.busy or None

  def give_up(self, reason: str) -> None:
    """Fails every request and closes: an event has no answer, and without its
    commands nothing goes on."""
    known = {record.id for record in self.recorder.records}
    lost = Cancelled(self.now, -1)  # no request's: only its time is read
    self.recorder.observe(lost, [Fail(id, reason) for id in self.unfinished
                                 if id in known])
    for output in self.unfinished.values():
      output.fail(reason)
    self.unfinished.clear()
    self._asked.clear()
    self._todo.clear()
    self.closed, self.broken = True, f'closed: {reason}'

  # --- what happens ---------------------------------------------------------

  def poll(self) -> bool:
    """Handles what has completed; whether anything had."""
    if self.closed or self._applying:  # an observer may call it
      return False
    began, some = time.perf_counter(), self._waits
    if self.unfinished:
      self._tick()
    self._take_asked()
    for done in self.fleet.poll():
      some = True
      if isinstance(done, StepDone):
        self._fold(done)
      else:
        self._todo.append(self._with_ended(done))
        self._apply()
    if some:
      self.host_s += time.perf_counter() - began
      self.moved_s = self.now
    return some

  def _tick(self) -> None:
    """Tells the policy that a tick has passed, if one has."""
    tick_s, now_s = self.scheduler_config.policy.tick_s, self.now
    if tick_s is not None and now_s >= self._tick_s:
      is_first = not self._tick_s  # at 0, as a simulator's: roles of a start
      self._tick_s = now_s + tick_s
      self.event(Tick(0.0) if is_first else Tick(now_s, self._roles(now_s)))

  def _roles(self, now_s: float) -> planning.Roles | None:
    """What the policy has answered beside the loop, and asks it again; ()
    where it has not or cannot, None where it is asked in the loop."""
    if self.planner is None or not self.scheduler_config.policy.resize:
      return None
    roles: planning.Roles = ()
    if self._planner_failed:
      return roles
    error: BaseException | None = None
    try:
      if self._planned is not None:
        if not self._planned.done():
          return roles
        error = self._planned.exception()
        roles = () if error else self._planned.result()
      if not error:
        self._planned = self.planner.submit(
            planning.roles_of, self.scheduler_config, self.state, now_s)
    except Exception as raised:  # its executor was shut down
      error = raised
    if error:
      LOG.error('the planner failed, roles stay as they are: %r', error)
      self._planner_failed = True
    return roles

  def check_stalled(self) -> None:
    """Of a server to which no more requests may come.

    Raises:
      PolicyError: nothing is in flight, and the policy lets nothing start.
      RequestFailed: requests wait for instances that are away, and for
        stall_s none was restored.
    """
    why, is_policy = self._standstill()
    if is_policy:
      self.give_up(why)
      raise PolicyError(why)
    if why and self._late():
      raise RequestFailed(why)

  def overdue(self) -> tuple[str, list[int]]:
    """(why, requests) of those that have waited stall_s while nothing was in
    flight; of a server to which more may come, which may let these start."""
    why, _ = self._standstill()
    return why, self._late() if why else []

  def _late(self) -> list[int]:
    """Requests that wait for longer than stall_s, with nothing done."""
    until_s = self.now - self.fleet.config.stall_s
    return [id for id, state in self.unfinished.items()
            if max(self.moved_s, state.request.arrival_s) < until_s]

  def _standstill(self) -> tuple[str, bool]:
    """(why nothing goes on, whether it is the policy that lets nothing start)
    of requests that wait; '' where something goes on. Warns of instances that
    are away and that only `restore` starts."""
    if not self.unfinished or self._waits or self.fleet.busy or (
        self.fleet.starting):
      return '', False
    down = [index for index, instance in enumerate(self.state.instances)
            if instance.status == 'down']
    if not down:
      return (f'policy {self.scheduler_config.policy.name!r}: nothing is in '
              f'flight and it lets none of the {len(self.unfinished)} '
              'requests go on that wait'), True
    if any(self.fleet.down.get(index) is not None for index in down):
      return '', False
    since_s = max(self.moved_s, min(
        [state.request.arrival_s for state in self.unfinished.values()]))
    names = ', '.join(f'{index} ({self.fleet.engines[index].role})'
                      for index in down)
    words = (f'nothing is in flight, and instances are away: {names}; restore '
             'starts one')
    if self._told_of != down:  # once for all that wait together
      self._told_of = down
      LOG.warning('%d requests wait: %s', len(self.unfinished), words)
    return f'after {self.now - since_s:.1f} s {words}', False

  def tell(self) -> None:
    """Raises the first of what others raised; the state is whole."""
    raised = self._raised or self.fleet.raised
    error = raised.pop(0) if raised else None
    self.log_raised()
    if error:
      raise error

  def log_raised(self) -> None:
    """Logs what others raised during a call that ends with another error."""
    for error in self._raised + self.fleet.raised:
      LOG.error('raised too: %r', error)
    self._raised.clear()
    self.fleet.raised.clear()

  def _fold(self, done: StepDone) -> None:
    """Adds a step's tokens to their requests; some end with them."""
    for id, token, logprobs in done.sampled:
      state = self.unfinished.get(id)
      if state and not state.ended:
        if state.push(token, logprobs):
          self._ended.setdefault(done.instance, []).append((id, done.step))
        if state.full:
          self._full.setdefault(done.instance, []).append(id)

  def _with_ended(self, event: Event) -> Event:
    """An event of the fleet, with the requests that ended in its command."""
    if not isinstance(event, PrefillDone | DecodeDone | InstanceDown):
      return event
    ended = tuple(self._ended.pop(event.instance, ()))
    full = self._full.pop(event.instance, ())
    if isinstance(event, InstanceDown):
      return event._replace(ended=ended)
    if self.scheduler_config.prefix_cache:
      answers = [(id, self._answer(id)) for id in full]
      event = event._replace(blocks=tuple([a for a in answers if a[1]]))
    if isinstance(event, PrefillDone):
      return event._replace(ended=tuple(id for id, _ in ended))
    return event._replace(ended=ended)

  def _blocks(self, tokens: Sequence[int], before: int = 0
              ) -> tuple[int, ...]:
    """The hashes of full blocks, for a prefix cache."""
    config = self.scheduler_config
    if not config.prefix_cache:
      return ()
    return blocks.hashes(tokens, config.block_size, before)

  def _answer(self, id: int) -> tuple[int, ...]:
    """The blocks of a request that has its last token, behind those that are
    known. That token's KV is not there."""
    state, seq = self.unfinished.get(id), self.state.seqs.get(id)
    if state is None or seq is None:
      return ()
    known = seq.blocks
    tokens = [*state.request.prompt, *state.tokens[:-1]]
    return self._blocks(tokens[len(known) * self.scheduler_config.block_size:],
                        known[-1] if known else 0)

  def _prefix_of(self, id: int) -> Prefix | None:
    """A request's tokens so far, for an engine; None: it has ended."""
    state = self.unfinished.get(id)
    if state is None:
      return None
    request = state.request
    return Prefix([*request.prompt, *state.tokens], len(request.prompt),
                  request.sampling)

  def event(self, event: Event) -> None:
    """Tells the scheduler an event. One that an observer asks for waits for
    the next call or poll, so that devices are served between two of them.

    Raises:
      RuntimeError: see check_room.
    """
    self.check_room()
    self._asked.append(event)
    self._take_asked()

  def _take_asked(self) -> None:
    """Applies what was asked for, unless it is an observer that asks."""
    if not self._applying:
      self._todo += self._asked
      self._asked.clear()
      self._apply()

  def check_room(self) -> None:
    """Raises RuntimeError in an observer, where too many events wait that
    observers have asked for."""
    if self._applying and len(self._asked) >= MOST_ASKED:
      raise RuntimeError(f'{MOST_ASKED} events wait that observers have asked '
                         'for: an observer may not ask for more')

  def _apply(self) -> None:
    """Applies the events that wait, and those of what fails in answer to them.

    An event is taken off once it is applied: what stops a hook of the policy
    for once (SystemExit) is raised later, and the event tried again.
    """
    self._applying = True
    try:
      while self._todo:
        try:
          state, commands = self._decide(self._todo[0])
        except Exception:
          raise
        except BaseException as error:
          self._raised.append(error)
          return
        self.state, event = state, self._todo.popleft()
        self._perform(event, commands)
      if not self.unfinished and scheduler.idle(self.state):
        scheduler.check(self.state)
    except BaseException as error:  # it has no answer, so nothing goes on
      self.give_up(f'{type(error).__name__}: {error}')
      raise
    finally:
      self._applying = False

  def _decide(self, event: Event
              ) -> tuple[scheduler.State, tuple[Command, ...]]:
    self.deciding = True
    try:
      return scheduler.step(self.scheduler_config, self.state, event)
    finally:
      self.deciding = False

  def _perform(self, event: Event, commands: tuple[Command, ...]) -> None:
    """Logs and tells an event, and performs its commands, all of them first:
    what one of them loses may be in the others."""
    self.log.append((event, commands))
    self.recorder.observe(event, commands)
    for observe in self.observers:
      try:
        observe(event, commands)
      except BaseException as error:  # told once the state is whole
        self._raised.append(error)
    for command in commands:
      if isinstance(command, Decided):
        continue  # the record has it
      failed = (self._end(command)
                if isinstance(command, Finish | Fail | Reject)
                else self.fleet.perform(command))
      self._todo += map(self._with_ended, failed)

  def _end(self, command: Finish | Fail | Reject) -> Sequence[Event]:
    """A request has ended; the events of what failed in forgetting it."""
    state = self.unfinished.pop(command.id)
    if isinstance(command, Reject):
      if command.refused:
        state.refuse(command.reason)
      else:
        state.error = command.reason
      return ()
    end = state.finish if isinstance(command, Finish) else state.fail
    end(command.reason)
    return self.fleet.forget(command.id)
