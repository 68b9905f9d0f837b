"""The shell around the scheduler: real clock, real meshes, no choices.

The life of a request:

1. `submit` (or `generate`, `stream`, `generate_all`, `run`) makes token ids
   and a Sampling of what the client gave and checks both, once. `enqueue`
   gives the request a RequestOutputState and tells the scheduler: Arrived.
2. The scheduler, a pure function, answers every event with commands that carry
   every page id. `_event` logs both, tells the recorder and the observers,
   and then has the fleet perform the commands, in order.
3. RunPrefill: the fleet admits the request to the instance's engine, whose
   slot takes its tokens so far (`_prefix_of`), and dispatches the compiled
   step. Nothing waits for the device.
4. `poll` asks the fleet what has completed. A step comes back as its sampled
   tokens; `_fold` adds them to the output states, which know text, stop
   strings and EOS, and remembers which requests ended.
5. With the last step of a command comes its event, PrefillDone, to which
   `_with_ended` adds those that ended. Observers hear it before anything that
   it leads to is performed, so the first token leaves at once.
6. Where another instance decodes, Migrate: the pages go from device to device
   (migration.py), and Migrated lets the source's pages go.
7. RunDecode: the request is a row of the instance's batch, for several steps at
   a time, each told as it completes; DecodeDone. Preempt, or the loss of an
   instance, leads back to 3 with the tokens so far.
8. Finish (or Fail, or Reject): the last text is let out, the slots are free,
   the record is complete. `output` or `take` gives the client what it has not
   had yet; `output` and `forget` drop the state.

All of it happens in the thread that calls `poll`; orchestrator_thread.py has
one for asyncio. Nothing blocks while a mesh has work.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich import progress
from rich.console import Console

from dsjax.analysis.record import Record
from dsjax.analysis.recorder import Recorder
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError, require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement
from dsjax.config.request import Request, Sampling
from dsjax.runtime import batch
from dsjax.runtime.engine import Engine
from dsjax.runtime.fleet import Fleet, Prefix, StepDone
from dsjax.runtime.output import Output, RequestOutputState, Update
from dsjax.runtime.prompts import Prompt, check_ids, prompt_ids
from dsjax.runtime.protocols import MakeEngine, Observer, Report
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  Command,
  DecodeDone,
  Drain,
  Event,
  Fail,
  Finish,
  InstanceDown,
  InstanceUp,
  PrefillDone,
  Reject,
)
from dsjax.scheduling.policy import DISTSERVE, Policy, PolicyError

# The pause between polls that found nothing: a share of the wait so far, so
# that a long step is not interrupted and a short one not noticed late.
PAUSE_SHARE, LEAST_PAUSE_S, MOST_PAUSE_S = 1 / 16, 5e-5, 2e-3


class Orchestrator:
  """Serves a model over a placement. Use it as a context manager.

  Attributes:
    records: a Record a request, in order of arrival.
    log: (event, commands) pairs, of the whole run unless keep_events.
    observers: functions called with each (event, commands).
    fleet: the instances; engines, routes: its own.
    requests: {id: RequestOutputState}, until its output is asked for;
      unfinished: those that have not ended.
    host_s: host seconds of polls that found work.
  """

  def __init__(self, model: Model, placement: Placement,
               config: EngineConfig | None = None,
               devices: Sequence[jax.Device] | None = None,
               report: Report | None = None, keep_events: int | None = None,
               make_engine: MakeEngine = Engine,
               policy: Policy = DISTSERVE) -> None:
    """Builds and warms up every instance.

    Args:
      devices: where; jax.devices() by default.
      report: called with (done, total, name) as each step is compiled; a
        progress bar by default.
      keep_events: how many of the newest events `log` keeps; None: all.
      make_engine: builds each instance; tests give a fake one.
      policy: every choice of the scheduler, see scheduling/policy.py.

    Raises:
      InputError: the placement or the config cannot be served.
    """
    config = config or EngineConfig()
    require(isinstance(policy, Policy), 'policy', policy, 'a dsjax.Policy')
    require(config.max_len <= model.config.max_len,
            'EngineConfig.max_len', config.max_len,
            f'at most {model.config.max_len}, the context of '
            f'{model.config.name}')
    self.model, self.placement, self.config = model, placement, config
    self.requests: dict[int, RequestOutputState] = {}
    self.unfinished: dict[int, RequestOutputState] = {}
    self.seen: set[int] = set()
    # By instance: (id, step) of those that ended in its oldest command.
    self._ended: dict[int, list[tuple[int, int]]] = {}
    self.fleet = Fleet(
        model, placement, config,
        jax.devices() if devices is None else devices, make_engine,
        self._prefix_of, lambda: self.now)
    self.engines, self.routes = self.fleet.engines, self.fleet.routes
    self.scheduler_config = scheduler.Config(
        self.fleet.limits, config.max_len, config.depth,
        run_ahead=config.run_ahead, tries=config.tries, policy=policy)
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
    self.host_s, self.next_id = 0.0, 0
    self.origin, self.moved_s = time.perf_counter(), 0.0
    self.closed = False

  def __enter__(self) -> 'Orchestrator':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Cancels what is left and lets the devices finish, for lease_s at most.

    What is not done by then is left behind with its instance.
    """
    if not self.closed:
      for id in list(self.unfinished):
        self.cancel(id)
      until_s = self.now + self.config.lease_s
      while self.fleet.busy:
        self.poll()
        if self.now > until_s:
          for index, queue in enumerate(self.fleet.running):
            if queue:
              self.kill(index)
      self.closed = True

  @property
  def now(self) -> float:
    """Seconds since the clock's origin."""
    return time.perf_counter() - self.origin

  @property
  def records(self) -> list[Record]:
    return self.recorder.records

  @property
  def copied_bytes(self) -> int:
    """Bytes that migrations moved."""
    return self.fleet.copied_bytes

  @property
  def copy_s(self) -> float:
    """Seconds of migrations, each from dispatch to arrival, summed."""
    return self.fleet.copy_s

  @property
  def steps(self) -> int:
    """Device steps done."""
    return self.fleet.steps

  @property
  def faults(self) -> list[tuple[float, str]]:
    """(time, what happened) of the newest faults."""
    return list(self.fleet.faults)

  @property
  def busy(self) -> bool:
    return not self.closed and not scheduler.idle(self.state)

  # --- requests -------------------------------------------------------------

  def prepare(self, prompt: Prompt, **params: Any
              ) -> tuple[tuple[int, ...], Sampling]:
    """Checked token ids and Sampling of a request; any thread may ask.

    Without max_tokens, the rest of the context.

    Raises:
      InputError: bad prompt (see prompts.prompt_ids) or parameters.
    """
    ids = prompt_ids(self.model, prompt)
    try:
      sampling = Sampling(**params)
    except TypeError as error:
      raise InputError(f'unknown sampling parameter: {error}') from None
    if sampling.max_tokens is None:
      room = max(1, self.config.max_len - len(ids))
      sampling = dataclasses.replace(sampling, max_tokens=room)
    self._check_sampling(sampling)
    return ids, sampling

  def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
    """Raises InputError unless these ids and this Sampling suit the model.

    Whether they fit is the scheduler's to say (scheduler.never_fits). Reads
    nothing that changes: any thread may ask.
    """
    check_ids(self.model, prompt)
    self._check_sampling(sampling)

  def _check_sampling(self, sampling: Sampling) -> None:
    size = self.model.config.vocab_size
    require(sampling.max_tokens is not None, 'Sampling.max_tokens', None,
            'set in a workload')
    require(all(t < size for t, _ in sampling.logit_bias),
            'Sampling.logit_bias', sampling.logit_bias, f'ids below {size}')
    require(not sampling.stop or self.model.tokenizer is not None,
            'Sampling.stop', sampling.stop, 'empty without a tokenizer')

  def submit(self, prompt: Prompt, arrival_s: float | None = None,
             **params: Any) -> int:
    """Queues a request; returns its id. See Sampling for the parameters.

    Raises:
      InputError: bad prompt or parameters, or a request that can never fit.
      RequestFailed: no instance is left that could serve it.
    """
    request = Request(self.next_id,
                      self.now if arrival_s is None else arrival_s,
                      *self.prepare(prompt, **params))
    self.enqueue(request)
    state = self.requests[request.id]
    if state.error:
      del self.requests[request.id]
      raise state.failure or InputError(state.error)
    return request.id

  def enqueue(self, request: Request, more: bool = False) -> None:
    """Queues a Request that `check` has passed.

    A rejection is left in its record. more: another one follows at once (see
    events.Arrived).

    Raises:
      InputError: the server is closed, or has served this id.
    """
    self._check_new(request)
    ends = set(request.sampling.stop_token_ids)
    if not request.sampling.ignore_eos:
      ends.update(self.model.config.eos_ids)
    self.requests[request.id] = self.unfinished[request.id] = (
        RequestOutputState(request, ends, self.model.tokenizer))
    self.seen.add(request.id)
    self.next_id = max(self.next_id, request.id + 1)
    self._event(Arrived(request.arrival_s, request.id,
                        len(request.prompt), request.sampling.max_tokens,
                        more))

  def _check_new(self, request: Request) -> None:
    require(not self.closed, 'server', 'closed', 'open')
    require(request.id not in self.seen, 'Request.id', request.id,
            'new to this server')

  def cancel(self, id: int) -> None:
    """Ends a request now; one that has ended is left alone."""
    self._event(Cancelled(self.now, id))

  def take(self, ids: Iterable[int]) -> list[tuple[int, Update]]:
    """(id, what came since the last call) of those of `ids` that have news."""
    return [(id, self.requests[id].take()) for id in ids
            if self.requests[id].has_news]

  def output(self, id: int) -> Output:
    """The finished request's Output; drops it from the server's memory."""
    state = self.requests.pop(id)
    request = state.request
    lost = Record(id, request.arrival_s, len(request.prompt),
                  request.sampling.max_tokens or 0, status='failed',
                  reason=state.error or '')  # given up before it was told of
    record = next((r for r in reversed(self.records) if r.id == id), lost)
    return Output(id, state.text, tuple(state.tokens), record.status, record,
                  tuple(state.logprobs))

  def forget(self, id: int) -> Record:
    """Drops all memory of a request that has ended; returns its Record."""
    del self.requests[id]
    self.seen.discard(id)
    return self.recorder.forget(id)

  def generate(self, prompt: Prompt, **params: Any) -> Output:
    """Serves one request to its end.

    Raises:
      InputError, RequestFailed: as submit; or faults ended it.
    """
    id = self.submit(prompt, **params)
    state = self.requests[id]
    while not state.finished:
      self.wait()
    output = self.output(id)
    if state.failure:
      raise state.failure
    return output

  def stream(self, prompt: Prompt, **params: Any) -> Iterator[str]:
    """Yields pieces of text as they come; leaving early cancels.

    Raises:
      InputError, RequestFailed: as submit; or faults ended it, after the
        pieces that came before.
    """
    id = self.submit(prompt, **params)
    state = self.requests[id]
    try:
      finished = False
      while not finished:
        finished = state.finished  # before the pieces, or some would be left
        yield from filter(None, state.take_pieces())
        if not state.finished:
          self.wait()
      if state.failure:
        raise state.failure
    finally:
      if not state.finished:
        self.cancel(id)
      del self.requests[id]

  def generate_all(self, prompts: Iterable[Prompt],
                   sampling: Sequence[Mapping[str, Any]] | None = None,
                   errors: str = 'raise', **params: Any) -> list[Output]:
    """Serves many requests to their ends, all at once: an Output each, in
    the order of the prompts.

    Args:
      sampling: parameters of each request, over those that all share.
      errors: 'raise' a RequestFailed once every request has ended, or
        'return' the Output of a failed request like any other.

    Raises:
      InputError: a bad request, or one that can never fit, before any runs.
      RequestFailed: faults ended a request; its `outputs` has all of them.
      Interrupted: Ctrl-C, which cancels what is left; likewise.
    """
    return batch.generate_all(self, prompts, sampling, errors, params)

  def run(self, requests: Iterable[Request],
          on_poll: Callable[[], object] | None = None) -> list[Record]:
    """Replays a workload, each request at its arrival time from now on.

    Open loop: arrivals never wait for answers. on_poll() is called between
    polls. Returns the records of these requests.

    Raises:
      InputError: a request that cannot be queued here, before any is.
    """
    todo = collections.deque(sorted(requests, key=lambda r: r.arrival_s))
    counts = collections.Counter(r.id for r in todo)
    for request in todo:
      self._check_new(request)
      self.check(request.prompt, request.sampling)
      require(counts[request.id] == 1, 'Request.id', request.id,
              'different for each request')
    start = self.now
    while todo or self.busy:
      due_s = self.now - start
      while todo and todo[0].arrival_s <= due_s:
        request = todo.popleft()
        self.enqueue(dataclasses.replace(
            request, arrival_s=start + request.arrival_s),
            more=bool(todo) and todo[0].arrival_s <= due_s)
      (self.poll if todo else self.wait)()
      if on_poll:
        on_poll()
    return [r for r in self.records if r.id in counts]

  # --- faults ---------------------------------------------------------------

  def kill(self, instance: int, back_s: float | None = None) -> None:
    """Loses an instance with all it holds, as a fault would.

    Its requests go on elsewhere. back_s: seconds after which it is started
    again, empty; None: it is given up, until `restore`. Meanwhile requests
    that no other instance can serve wait, or, if it is given up, fail.

    Raises:
      InputError: no such instance, or not seconds of 0 or more.
    """
    self._check_instance(instance)
    require(back_s is None or 0 <= back_s < math.inf, 'back_s', back_s,
            'None or seconds of 0 or more')
    self._event(self._with_ended(self.fleet.stop(
        instance, 'it was killed',
        None if back_s is None else self.now + back_s)))

  def drain(self, instance: int) -> None:
    """Gives an instance no more work that another could do, until `restore`.

    Raises:
      InputError: no such instance.
    """
    self._check_instance(instance)
    self._event(Drain(self.now, instance))

  def restore(self, instance: int) -> None:
    """Ends a drain, or starts an instance that is lost again, empty.

    Raises:
      InputError: no such instance.
      RuntimeError: its devices refuse; it stays lost.
    """
    self._check_instance(instance)
    event = InstanceUp(self.now, instance)
    if instance in self.fleet.down:
      with jax.transfer_guard('disallow'):
        event = self._with_ended(self.fleet.start(instance))
    self._event(event)
    if isinstance(event, InstanceDown):
      raise RuntimeError(self.faults[-1][1])

  def _check_instance(self, instance: int) -> None:
    most = len(self.engines) - 1
    require(isinstance(instance, int) and 0 <= instance <= most,
            'instance', instance, f'0 to {most}')

  # --- the loop -------------------------------------------------------------

  def poll(self) -> bool:
    """Handles what has completed; False after a pause, if nothing has."""
    began, some = time.perf_counter(), False
    with jax.transfer_guard('disallow'):
      for done in self.fleet.poll():
        some = True
        if isinstance(done, StepDone):
          self._fold(done)
        else:
          self._event(self._with_ended(done))
    if some:
      self.host_s += time.perf_counter() - began
      self.moved_s = self.now
    else:
      pause = (self.now - self.moved_s) * PAUSE_SHARE
      time.sleep(min(max(pause, LEAST_PAUSE_S), MOST_PAUSE_S))
    return some

  def _fold(self, done: StepDone) -> None:
    """Adds a step's tokens to their requests; some end with them."""
    for id, token, logprobs in done.sampled:
      state = self.unfinished.get(id)
      if state and not state.ended and state.push(token, logprobs):
        self._ended.setdefault(done.instance, []).append((id, done.step))

  def _with_ended(self, event: Event) -> Event:
    """An event of the fleet, with the requests that ended in its command."""
    if not isinstance(event, PrefillDone | DecodeDone | InstanceDown):
      return event
    ended = tuple(self._ended.pop(event.instance, ()))
    if isinstance(event, PrefillDone):
      return event._replace(ended=tuple(id for id, _ in ended))
    return event._replace(ended=ended)

  def _prefix_of(self, id: int) -> Prefix | None:
    """A request's tokens so far, for an engine; None: it has ended."""
    state = self.unfinished.get(id)
    if state is None:
      return None
    request = state.request
    return Prefix([*request.prompt, *state.tokens], len(request.prompt),
                  request.sampling)

  def _event(self, event: Event) -> None:
    """Tells the scheduler an event, and those of what fails in answer to it.

    Commands of one event are all performed first: what one of them loses may
    be in the others.
    """
    todo = collections.deque([event])
    while todo:
      event = todo.popleft()
      try:
        self.state, commands = scheduler.step(self.scheduler_config,
                                              self.state, event)
      except BaseException as error:  # the event is lost, so nothing goes on
        self._give_up(f'{type(error).__name__}: {error}')
        raise
      self.log.append((event, commands))
      self.recorder.observe(event, commands)
      for observe in self.observers:
        observe(event, commands)
      with jax.transfer_guard('disallow'):
        for command in commands:
          end = _ENDS.get(type(command))
          if end:
            end(self, command)
          else:
            todo += map(self._with_ended, self.fleet.perform(command))
    if not self.unfinished and scheduler.idle(self.state):
      scheduler.check(self.state)

  def _give_up(self, reason: str) -> None:
    """Fails every request and closes: an event has no answer, and without its
    commands nothing goes on."""
    known = {record.id for record in self.records}
    lost = Cancelled(self.now, -1)  # no request's: only its time is read
    self.recorder.observe(lost, [Fail(id, reason) for id in self.unfinished
                                 if id in known])
    for output in self.unfinished.values():
      output.fail(reason)
    self.unfinished.clear()
    self.closed = True

  def wait(self) -> None:
    """A poll of a caller who sends no more requests.

    Raises:
      PolicyError: nothing is in flight, and the policy lets nothing start.
    """
    if not self.poll() and not self.fleet.busy and not self.fleet.down and (
        self.unfinished):
      reason = (f'policy {self.scheduler_config.policy.name!r}: nothing is in '
                f'flight and it lets none of the {len(self.unfinished)} '
                'requests go on that wait')
      self._give_up(reason)
      raise PolicyError(reason)

  def _finish(self, command: Finish) -> None:
    self.unfinished.pop(command.id).finish(command.reason)
    self.fleet.forget(command.id)

  def _fail(self, command: Fail) -> None:
    self.unfinished.pop(command.id).fail(command.reason)
    self.fleet.forget(command.id)

  def _reject(self, command: Reject) -> None:
    self.unfinished.pop(command.id).error = command.reason


_ENDS: dict[type, Callable[..., None]] = {
    Finish: Orchestrator._finish,
    Fail: Orchestrator._fail,
    Reject: Orchestrator._reject,
}


def serve(model: Model, placement: Placement | str,
          config: EngineConfig | None = None, **options: Any) -> Orchestrator:
  """An Orchestrator for a model over a placement; options as its __init__.

  `with dsjax.serve(model, placement) as server: server.generate('Hi')`. If
  JAX has not started, a machine without accelerators gets as many CPU devices
  as the placement asks for. The placement may be its text.
  """
  if isinstance(placement, str):
    placement = Placement.parse(placement)
  require(isinstance(placement, Placement), 'placement', placement,
          'a Placement or its text')
  with contextlib.suppress(RuntimeError):  # it has started: use what is there
    if jax.config.jax_num_cpu_devices < placement.num_devices:
      jax.config.update('jax_num_cpu_devices', placement.num_devices)
  return Orchestrator(model, placement, config, **options)


def write_log(path: str | os.PathLike,
              log: Iterable[tuple[Event, tuple[Command, ...]]]) -> None:
  """Writes an event log: a JSON line for each (event, commands)."""
  with open(path, 'w') as file:
    file.writelines(json.dumps(event_log.encode(pair)) + '\n' for pair in log)


def replay(config: scheduler.Config,
           log: Iterable[tuple[Event, tuple[Command, ...]]]) -> int | None:
  """Steps the scheduler through a log's events.

  Returns:
    the index of the first entry whose commands differ, or None.
  """
  state = scheduler.init(config)
  for index, (event, commands) in enumerate(log):
    state, again = scheduler.step(config, state, event)
    if again != commands:
      return index
  return None
