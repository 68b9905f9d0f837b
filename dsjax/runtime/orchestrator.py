"""The shell around the scheduler: real clock, real meshes, no choices.

The life of a request:

1. `submit` (or `generate`, `stream`, `generate_all`, `run`) makes token ids
   and a Sampling of what the client gave and checks both, once (requests.py).
   It gives the request a RequestOutputState and tells the scheduler: Arrived.
2. The scheduler, a pure function, answers every event with commands that carry
   every page id. The loop (loop.py) logs both, tells the recorder and the
   observers, and then has the fleet perform the commands, in order.
3. RunPrefill: the fleet admits the request to the instance's engine, whose
   slot takes its tokens so far (`_prefix_of`), and dispatches the compiled
   step. Nothing waits for the device.
4. The loop's `poll` asks the fleet what has completed. A step comes back as
   its sampled tokens; `_fold` adds them to the output states, which know text,
   stop strings and EOS, and remembers which requests ended.
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

All of it happens in one thread (worker.py), whatever thread asks: a Ctrl-C, or
another client, never comes between a decision and what performs it. Nothing
blocks while a mesh has work.
"""

import contextlib
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypedDict, TypeVar, Unpack

import jax

from dsjax.analysis.record import Record
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import (
  InputError,
  is_integer,
  is_nonnegative,
  is_number,
  naming,
  plain,
  require,
)
from dsjax.config.engine import EngineConfig
from dsjax.config.latency import Latency, LinkLike
from dsjax.config.placement import Placement
from dsjax.config.request import Request, Sampling, SamplingFields
from dsjax.placement.api import Named, latency_of, profile_of
from dsjax.runtime.cluster import starting
from dsjax.runtime.engine import Engine
from dsjax.runtime.fleet import build
from dsjax.runtime.loop import Loop
from dsjax.runtime.loop_thread import LoopThread
from dsjax.runtime.output import (
  Interrupted,
  Output,
  RequestOutputState,
  Update,
  raise_unless_served,
)
from dsjax.runtime.planner import check_planner
from dsjax.runtime.prompts import Prompt
from dsjax.runtime.protocols import Engine as AnyEngine
from dsjax.runtime.protocols import MakeEngine, Observer, Report
from dsjax.runtime.replay import Replay
from dsjax.runtime.requests import Requests, listed
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Drain
from dsjax.scheduling.policy import DISTSERVE, Policy

T = TypeVar('T')


class Orchestrator:
  """Serves a model over a placement. Use it as a context manager.

  Attributes:
    records: a Record a request, in order of arrival.
    log: (event, commands) pairs, of the whole run unless keep_events.
    observers: functions called with each (event, commands).
    fleet: the instances; engines, routes: its own.
    requests: {id: RequestOutputState}, until its output is asked for;
      unfinished: those that have not ended.
    loop: what serves, in a thread of its own.
  """

  def __init__(self, model: Model, placement: Placement,
               config: EngineConfig | None = None,
               devices: Sequence[jax.Device] | None = None,
               report: Report | None = None, keep_events: int | None = None,
               make_engine: MakeEngine = Engine,
               policy: Policy = DISTSERVE, latency: Named | None = None,
               link: LinkLike | None = None,
               planner: Executor | None = None,
               cluster: str | None = None) -> None:
    """Builds and warms up every instance.

    Args:
      devices: where; jax.devices() by default.
      report: called with (done, total, name) as each step is compiled; a
        progress bar by default.
      keep_events: how many of the newest events `log` keeps; None: all.
      make_engine: builds each instance; tests give a fake one.
      policy: every choice of the scheduler, see scheduling/policy.py.
      latency: for a policy that predicts: as `simulate` takes it, best a file
        that experiments.measure wrote of this machine. link: of its hand-offs;
        None: the one measured with latency.
      planner: where the policy's resize is asked, so that a long search holds
        up no step: planner_process(), if the policy can be pickled, or any
        other Executor; closing it is the caller's. None: in the loop.
      cluster: None: instances share this process. Else each is a process of
        its own, which loads the model itself: 'local' on this host, 'ray' or
        'ray:ADDRESS' where Ray has room, 'hosts:FILE' on those of a file.

    Raises:
      InputError: the placement or the config cannot be served.
      StartError: the process of an instance did not start.
    """
    config = config or EngineConfig()
    starting.check(cluster)
    require(cluster is None or devices is None, 'devices', devices,
            f'None with cluster={cluster!r}: processes have their own')
    require(isinstance(policy, Policy), 'policy', policy, 'a dsjax.Policy')
    require(config.max_len <= model.config.max_len,
            'EngineConfig.max_len', config.max_len,
            f'at most {model.config.max_len}, the context of '
            f'{model.config.name}')
    require(set(config.away) <= set(range(len(placement.instances))),
            'EngineConfig.away', config.away,
            f'of instances 0 to {len(placement.instances) - 1}')
    self.model, self.placement, self.config = model, placement, config
    latencies = self._latencies(latency)
    link = link or self._link(latency)
    policy.check([role for role, _ in placement.instances], latencies, link)
    check_planner(planner, policy, latencies, link)
    engines = (
        build(model, placement, config, jax.devices() if devices is None
              else devices, make_engine) if cluster is None else
        starting.build(model, placement, config, make_engine, cluster,
                       policy.fetches))
    self._close = weakref.finalize(self, _close_all, engines)
    try:
      self.loop = Loop(engines, config, report, keep_events, policy, latencies,
                       link, planner)
    except BaseException:
      self._close()
      raise
    self.log, self.unfinished = self.loop.log, self.loop.unfinished
    self.fleet = self.loop.fleet
    self.engines, self.routes = self.fleet.engines, self.fleet.routes
    self.scheduler_config = self.loop.scheduler_config
    self._asked = Requests(model, self.loop)
    self.requests, self.seen = self._asked.states, self._asked.seen
    self._thread = LoopThread(self.loop, config.stall_s)
    self._stop = weakref.finalize(self, self._thread.worker.stop)

  def _latencies(self, named: Named | None) -> tuple[Latency, ...] | None:
    """What predicts the steps of each instance."""
    if named is None:
      return None
    of_plan = latency_of(named, self.model.config)
    latencies = []
    for _, plan in self.placement.instances:
      seconds = of_plan(plan)
      if seconds is None:
        raise InputError(f'latency={named!r}: must be known for {plan}')
      latencies.append(seconds)
    return tuple(latencies)

  def _link(self, named: Named | None) -> LinkLike | None:
    """The link that was measured with latencies, if one was."""
    profile = profile_of(named) if named else None
    return next(iter(profile.links.values()), None) if profile else None

  def __enter__(self) -> 'Orchestrator':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Cancels what is left and lets the devices finish, for lease_s at most.

    What is not done by then is left behind with its instance. A client that
    waits for a request meanwhile gets a RequestFailed, also where a Ctrl-C
    ends this.
    """
    if self.closed:
      self._stop()
      self._close()
      return
    try:
      self.call(self._asked.cancel_all)
      until_s = self.now + self.config.lease_s
      self._thread.until(lambda: self.loop.settled(until_s))
    finally:
      self._thread.post(self._end)
      self._stop()
      self._close()
      self.loop.closed = True  # where the thread is stuck

  def _end(self) -> None:
    """Closes at once; what was not cancelled has failed."""
    if self.unfinished:
      self.loop.give_up('the server was closed')
    self.loop.closed = True

  def fail(self, reason: str) -> None:
    """Fails every request and closes, at once."""
    if not self.closed:
      self.call(self.loop.give_up, reason)
      self._stop()
      self._close()

  # --- the thread -----------------------------------------------------------

  def call(self, function: Callable[..., T], *args: Any) -> T:
    """Calls a function in the server's thread, between two transitions.

    What observers raised meanwhile is raised after it, or logged where the
    function raises.
    """
    return self._thread.call(function, *args)

  def _drop(self, ids: Sequence[int], keep: bool = False) -> None:
    """Cancels requests whose client has been interrupted, and forgets their
    outputs; keep: but for those that have ended.

    It waits a moment, so that the client finds it done.
    """
    self._thread.give_time(
        self._thread.post(lambda: self._asked.drop(ids, keep)))

  @property
  def thread(self) -> threading.Thread:
    """The thread that serves."""
    return self._thread.thread

  @property
  def now(self) -> float:
    """Seconds since the clock's origin."""
    return self.loop.now

  @property
  def records(self) -> list[Record]:
    return self.loop.recorder.records

  @property
  def observers(self) -> list[Observer]:
    """Who hears of each event: a list to be added to, or to be replaced."""
    return self.loop.observers

  @observers.setter
  def observers(self, observers: Iterable[Observer]) -> None:
    self.loop.observers[:] = observers

  @property
  def copied_bytes(self) -> int:
    """Bytes that migrations moved."""
    return self.fleet.copied_bytes

  @property
  def host_bytes(self) -> int:
    """Bytes of KV copied to host memory and from there."""
    return self.fleet.host_bytes

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
  def state(self) -> scheduler.State:
    """The scheduler's."""
    return self.loop.state

  @property
  def stamps(self) -> dict[int, list[Any]]:
    """What each instance that is a process has stamped lately (stamps.Stamp),
    in seconds of the clock."""
    return {index: [stamp._replace(began_s=stamp.began_s - self.origin,
                                   wall_s=stamp.wall_s - self.origin)
                    for stamp in list(engine.stamps)]
            for index, engine in enumerate(self.engines)
            if hasattr(engine, 'stamps')}

  @property
  def origin(self) -> float:
    """Of the clock, on time.perf_counter."""
    return self.loop.origin

  @property
  def host_s(self) -> float:
    """Host seconds of polls that found work."""
    return self.loop.host_s

  @property
  def closed(self) -> bool:
    return self.loop.closed

  @property
  def is_open(self) -> bool:
    """Whether it takes requests."""
    return self._asked.is_open

  @property
  def next_id(self) -> int:
    """Of the next request that is given none."""
    return self._asked.next_id

  @property
  def busy(self) -> bool:
    return self.loop.busy

  # --- requests -------------------------------------------------------------

  def prepare(self, prompt: Prompt, **params: Unpack[SamplingFields]
              ) -> tuple[tuple[int, ...], Sampling]:
    """Checked token ids and Sampling of a request.

    Without max_tokens, as many as the context and the pools leave.

    Raises:
      InputError: bad prompt (see prompts.prompt_ids) or parameters.
    """
    return self._asked.prepare(prompt, **params)

  def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
    """Raises InputError unless these ids and this Sampling suit the model.

    Whether they fit is the scheduler's to say (scheduler.never_fits).
    """
    self._asked.check(prompt, sampling)

  def submit(self, prompt: Prompt, arrival_s: float | None = None,
             **params: Unpack[SamplingFields]) -> int:
    """Queues a request; returns its id. See Sampling for the parameters.

    Raises:
      InputError: bad prompt or parameters, or a request that can never fit.
      RequestFailed: no instance is left that could serve it.
    """
    ids: list[int] = []
    try:
      self._submit(ids, prompt, params, arrival_s)
      return ids[0]
    except BaseException:
      self._drop(ids)
      raise

  def _submit(self, ids: list[int], prompt: Prompt,
              params: SamplingFields, arrival_s: float | None = None
              ) -> None:
    """Queues a request, and adds its id to `ids` before anything can fail."""
    require(arrival_s is None or is_number(-math.inf, math.inf)(arrival_s),
            'arrival_s', arrival_s, 'seconds, or None for now')
    self._asked.check_open()
    self.call(self._asked.queue, ids, [self.prepare(prompt, **params)],
              arrival_s)

  def enqueue(self, request: Request, more: bool = False) -> None:
    """Queues a Request that `check` has passed.

    A rejection is left in its record. more: another one follows at once (see
    events.Arrived).

    Raises:
      InputError: the server is closed, or has served this id.
    """
    self.call(self._asked.enqueue, request, more)

  def cancel(self, id: int) -> None:
    """Ends a request now; one that has ended is left alone.

    Raises:
      InputError: there was none of this id.
    """
    require(is_integer(0, math.inf)(id) and id in self.seen, 'id', id,
            'that of a request of this server')
    self.call(self.loop.cancel, plain(id))

  def take(self, ids: Iterable[int]) -> list[tuple[int, Update]]:
    """(id, what came since the last call) of those of `ids` that have news.

    Raises:
      InputError: there is none of this id any more.
    """
    return self.call(self._asked.take, ids)

  def output(self, id: int) -> Output:
    """The finished request's Output; drops it from the server's memory.

    Raises:
      InputError: it has not ended, which loses nothing; or there is none of
        this id any more.
    """
    output = self.call(self._asked.output, plain(id))
    self.requests.pop(id, None)  # not before it is here
    return output

  def forget(self, id: int) -> Record:
    """Drops all memory of a request that has ended; returns its Record.

    Raises:
      InputError: as output.
    """
    return self.call(self._asked.forget, id)

  def generate(self, prompt: Prompt, **params: Unpack[SamplingFields]
               ) -> Output:
    """Serves one request to its end. Any number of threads may.

    Raises:
      InputError, RequestFailed: as submit; or faults ended it, or `close`.
    """
    self._thread.check_may_wait()
    ids: list[int] = []
    outputs: list[Output] = []
    try:
      self._submit(ids, prompt, params)
      self._thread.until(lambda: self._asked.collect(ids, outputs))
    except BaseException:
      self._drop(ids)
      raise
    output, = outputs
    raise_unless_served(output, self.is_open)
    return output

  def stream(self, prompt: Prompt, **params: Unpack[SamplingFields]
             ) -> Iterator[str]:
    """Yields pieces of text as they come; leaving early cancels.

    Raises:
      InputError, RequestFailed: as generate, after the pieces that came
        before; or the request was cancelled elsewhere.
    """
    self._thread.check_may_wait()
    ids: list[int] = []
    try:
      self._submit(ids, prompt, params)
      state = self.requests[ids[0]]
      finished = False
      while not finished:
        finished, pieces = self._thread.until(lambda: self._pieces(state))
        yield from pieces
      output = self.output(ids[0])
    except BaseException:
      self._drop(ids)
      raise
    raise_unless_served(output, self.is_open, whole=True)

  def _pieces(self, state: RequestOutputState
              ) -> tuple[bool, list[str]] | None:
    """(whether these are the last, the new pieces), or None."""
    finished = state.finished
    pieces = [piece for piece in state.take_pieces() if piece]
    return (finished, pieces) if finished or pieces else None

  def generate_all(self, prompts: Iterable[Prompt],
                   sampling: Sequence[SamplingFields] | None = None,
                   errors: str = 'raise', **params: Unpack[SamplingFields]
                   ) -> list[Output]:
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
    self._thread.check_may_wait()
    require(errors in ('raise', 'return'), 'errors', errors,
            "'raise' or 'return'")
    prompts = listed('prompts', prompts, 'a list of prompts')
    allowed = f'parameters by name, as many as the prompts, {len(prompts)}'
    each: list[SamplingFields] = (
        [{} for _ in prompts] if sampling is None
        else listed('sampling', sampling, allowed))
    require(len(each) == len(prompts) and all(
        isinstance(own, Mapping) and all(isinstance(name, str) for name in own)
        for own in each), 'sampling', sampling, allowed)
    requests = []
    for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
      with naming(f'prompts[{index}]'):
        both: SamplingFields = {**params, **own}
        requests.append(self.prepare(prompt, **both))
    self._asked.check_open()
    ids: list[int] = []
    outputs: list[Output] = []
    try:
      self.call(self._asked.queue, ids, requests, None, errors == 'raise')
      self._thread.until(lambda: self._asked.collect(ids, outputs))
    except KeyboardInterrupt:
      raise Interrupted(
          self.call(self._asked.end_all, ids, outputs)) from None
    except BaseException:
      self._drop(ids)
      raise
    if errors == 'raise':
      for output in outputs:
        raise_unless_served(output, self.is_open, outputs)
    return outputs

  def run(self, requests: Iterable[Request],
          on_poll: Callable[[], object] | None = None) -> list[Record]:
    """Replays a workload, each request at its arrival time from now on.

    Open loop: arrivals never wait for answers. on_poll() is called here, at
    first and some twenty times a second. Returns the records of these requests.
    An interrupt cancels those that have not ended.

    Raises:
      InputError: a request that cannot be queued here, before any is.
    """
    self._thread.check_may_wait()
    ordered = self._asked.check_workload(requests)
    replay = Replay(ordered, self.now)
    try:
      if on_poll:
        self.call(self._asked.replayed, replay)
        on_poll()
      self._thread.until(lambda: self._asked.replayed(replay),
                         lambda: bool(replay.todo), on_poll)
    except BaseException:
      self._drop([r.id for r in ordered], keep=True)
      raise
    ids = {r.id for r in ordered}
    return [r for r in self.records if r.id in ids]

  # --- faults ---------------------------------------------------------------

  def kill(self, instance: int, back_s: float | None = None) -> None:
    """Loses an instance with all it holds, as a fault would.

    Its requests go on elsewhere. back_s: seconds after which it is started
    again, empty; None: it is given up, until `restore`. Meanwhile requests
    that no other instance can serve wait, or, if it is given up, fail.

    Raises:
      InputError: no such instance, or not seconds of 0 or more.
    """
    instance = self._index_of(instance)
    require(back_s is None or is_nonnegative(back_s), 'back_s', back_s,
            'None or seconds of 0 or more')
    self.call(self.loop.kill, instance, plain(back_s))

  def drain(self, instance: int) -> None:
    """Gives an instance no more work that another could do, until `restore`.

    Raises:
      InputError: no such instance.
    """
    index = self._index_of(instance)
    self.call(lambda: self.loop.event(Drain(self.now, index)))

  def restore(self, instance: int) -> None:
    """Ends a drain, or starts an instance that is lost again, empty, and
    serves until it is there; an observer does not wait.

    Raises:
      InputError: no such instance.
      RuntimeError: its devices refuse; it stays lost.
    """
    index = self._index_of(instance)
    is_there = self.call(self.loop.restore, index)
    if not is_there and not self._thread.is_here:
      self._thread.until(lambda: self.loop.restored(index))

  def _index_of(self, instance: int) -> int:
    """The number of an instance, checked."""
    most = len(self.engines) - 1
    require(is_integer(0, most)(instance), 'instance', instance,
            f'0 to {most}')
    return plain(instance)

  def poll(self) -> bool:
    """Handles what has completed; False after a pause, if nothing has."""
    some = self.call(self.loop.poll)
    if not some:
      self.loop.pause()
    return some


def _close_all(engines: Sequence[AnyEngine]) -> None:
  for engine in engines:
    engine.close()


class ServeOptions(TypedDict, total=False):
  """What `serve` takes beside model, placement and config."""

  devices: Sequence[jax.Device] | None
  report: Report | None
  keep_events: int | None
  make_engine: MakeEngine
  policy: Policy
  latency: Named | None
  link: LinkLike | None
  planner: Executor | None
  cluster: str | None


def check_served(model: Model, placement: Placement | str,
                 config: EngineConfig | None) -> Placement:
  """The Placement of what `serve` is given.

  Raises:
    InputError.
  """
  require(isinstance(model, Model), 'model', model,
          'a Model, such as dsjax.load returns')
  if isinstance(placement, str):
    placement = Placement.parse(placement)
  require(isinstance(placement, Placement), 'placement', placement,
          'a Placement or its text')
  require(config is None or isinstance(config, EngineConfig), 'config', config,
          'a dsjax.EngineConfig')
  return placement


def serve(model: Model, placement: Placement | str,
          config: EngineConfig | None = None,
          devices: Sequence[jax.Device] | None = None,
          report: Report | None = None, keep_events: int | None = None,
          make_engine: MakeEngine = Engine, policy: Policy = DISTSERVE,
          latency: Named | None = None, link: LinkLike | None = None,
          planner: Executor | None = None,
          cluster: str | None = None) -> Orchestrator:
  """An Orchestrator for a model over a placement.

  `with dsjax.serve(model, placement) as server: server.generate('Hi')`. If
  JAX has not started, a machine without accelerators gets as many CPU devices
  as the placement asks for.

  Args:
    placement: a Placement or its text, such as 'prefill=2x1,decode=1x1'.
    the rest: see Orchestrator.__init__, which also says what is raised.
  """
  placement = check_served(model, placement, config)
  with contextlib.suppress(RuntimeError):  # it has started: use what is there
    if cluster is None and (
        jax.config.values['jax_num_cpu_devices'] < placement.num_devices):
      jax.config.update('jax_num_cpu_devices', placement.num_devices)
  return Orchestrator(model, placement, config, devices, report, keep_events,
                      make_engine, policy, latency, link, planner, cluster)
