"""The shell around the scheduler: real clock, real meshes, no choices.

One thread. Whoever wants something (generate, stream, run) drives the loop:
`poll` takes the events of the fleet (what completed, what failed), steps the
scheduler and has its commands performed. Nothing blocks while a mesh has work.
"""

import collections
import contextlib
import dataclasses
import json
import math
import time
from typing import Any

import jax
import numpy as np
from rich import progress

from dsjax.analysis.recorder import Recorder
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError, require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement
from dsjax.config.request import Request, Sampling
from dsjax.runtime.instances import Fleet
from dsjax.runtime.output import Live, Output, RequestFailed
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.events import (
  Arrived,
  Cancelled,
  Drain,
  Fail,
  Finish,
  InstanceDown,
  InstanceUp,
  Reject,
)

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
    host_s: host seconds of polls that found work.
  """

  def __init__(self, model, placement, config=None, devices=None,
               report=None, keep_events=None):
    """Builds and warms up every instance.

    Args:
      model: a checkpoint.Model.
      placement: a base.Placement.
      config: a base.EngineConfig.
      devices: where; jax.devices() by default.
      report: called with (done, total, name) as each step is compiled; a
        progress bar by default.
      keep_events: how many of the newest events `log` keeps; None: all.

    Raises:
      InputError: the placement or the config cannot be served.
    """
    config = config or EngineConfig()
    require(config.max_len <= model.config.max_len,
            'EngineConfig.max_len', config.max_len,
            f'at most {model.config.max_len}, the context of '
            f'{model.config.name}')
    self.model, self.placement, self.config = model, placement, config
    self.live, self.requests, self.seen = {}, {}, set()
    self.fleet = Fleet(
        model, placement, config,
        jax.devices() if devices is None else devices, self.live,
        lambda: self.now)
    self.engines, self.routes = self.fleet.engines, self.fleet.routes
    self.plan = scheduler.Config(
        self.fleet.limits, config.max_len, config.depth,
        run_ahead=config.run_ahead, tries=config.tries)
    if report:
      self.fleet.warm(report)
    else:
      with progress.Progress(transient=True) as bar:
        task = bar.add_task('')
        self.fleet.warm(lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name))
    self.state = scheduler.init(self.plan)
    self.recorder = Recorder()
    self.log = [] if keep_events is None else collections.deque(
        maxlen=keep_events)
    self.observers = []
    self.host_s, self.next_id = 0.0, 0
    self.origin, self.found_s = time.perf_counter(), 0.0
    self.closed = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Cancels what is left and lets the devices finish, for lease_s at most.

    What is not done by then is left behind with its instance.
    """
    if not self.closed:
      for id in list(self.live):
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
  def now(self):
    """Seconds since the clock's origin."""
    return time.perf_counter() - self.origin

  @property
  def records(self):
    return self.recorder.records

  @property
  def copied_bytes(self):
    """Bytes that migrations moved."""
    return self.fleet.copied_bytes

  @property
  def copy_s(self):
    """Seconds of migrations, each from dispatch to arrival, summed."""
    return self.fleet.copy_s

  @property
  def steps(self):
    """Device steps done."""
    return self.fleet.steps

  @property
  def faults(self):
    """(time, what happened) of the newest faults."""
    return list(self.fleet.faults)

  @property
  def busy(self):
    return not scheduler.idle(self.state)

  # --- requests -------------------------------------------------------------

  def encode(self, prompt):
    """Token ids of a prompt: a question, a list of messages, or ids.

    Text is one user turn of a chat. To complete a text as it stands, pass
    its ids: model.tokenizer.encode(text).

    Raises:
      InputError: it is none of these, empty, or has ids out of range.
    """
    vocabulary = self.model.tokenizer
    if isinstance(prompt, str) or (
        isinstance(prompt, (list, tuple)) and prompt
        and isinstance(prompt[0], dict)):
      require(vocabulary is not None, 'prompt', prompt,
              'token ids: this model has no tokenizer')
      if isinstance(prompt, str):
        prompt = [{'role': 'user', 'content': prompt}]
      ids = vocabulary.chat(list(prompt))
    else:
      ids = list(prompt) if isinstance(prompt, (list, tuple, range)) else []
    size = self.model.config.vocab_size
    require(_are_ids(ids, size), 'prompt', prompt,
            f'text, messages or token ids in [0, {size}), not empty')
    return tuple(int(i) for i in ids)

  def submit(self, prompt, arrival_s=None, **params):
    """Queues a request; returns its id. See Sampling for the parameters.

    Raises:
      InputError: bad prompt or parameters, or a request that can never fit.
      RequestFailed: nobody is left who could serve it.
    """
    ids = self.encode(prompt)
    try:
      params = Sampling(**params)
    except TypeError as error:
      raise InputError(f'unknown sampling parameter: {error}') from None
    if params.max_tokens is None:
      room = max(1, self.config.max_len - len(ids))
      params = dataclasses.replace(params, max_tokens=room)
    at = self.now if arrival_s is None else arrival_s
    self.next_id += 1
    id = self.next_id - 1
    self.enqueue(Request(id, at, ids, params))
    if self.requests[id].error:
      live = self.requests.pop(id)
      raise (RequestFailed if live.failed else InputError)(live.error)
    return id

  def enqueue(self, request, more=False):
    """Queues a Request of a workload; a rejection is left in its record.

    more: another one follows at once (see base.Arrived).
    """
    self._check_new(request)
    ends = set(request.sampling.stop_token_ids)
    if not request.sampling.ignore_eos:
      ends.update(self.model.config.eos_ids)
    self.requests[request.id] = self.live[request.id] = Live(
        request, ends, self.model.tokenizer)
    self.seen.add(request.id)
    self.next_id = max(self.next_id, request.id + 1)
    self._event(Arrived(request.arrival_s, request.id,
                        len(request.prompt), request.sampling.max_tokens,
                        more))

  def _check_new(self, request):
    """Raises InputError unless the request can be queued here."""
    require(not self.closed, 'server', 'closed', 'open')
    require(request.id not in self.seen, 'Request.id', request.id,
            'new to this server')
    self.check(request.prompt, request.sampling)

  def check(self, prompt, params):
    """Raises InputError unless these ids and this Sampling suit the model.

    Whether they fit is the scheduler's to say (scheduler.never_fits). Reads
    nothing that changes: any thread may ask.
    """
    size = self.model.config.vocab_size
    require(_are_ids(prompt, size), 'Request.prompt', prompt,
            f'token ids in [0, {size}), not empty')
    require(params.max_tokens is not None, 'Sampling.max_tokens', None,
            'set in a workload')
    require(all(t < size for t, _ in params.logit_bias),
            'Sampling.logit_bias', params.logit_bias, f'ids below {size}')
    require(not params.stop or self.model.tokenizer is not None,
            'Sampling.stop', params.stop, 'empty without a tokenizer')

  def cancel(self, id):
    """Ends a request now; one that has ended is left alone."""
    self._event(Cancelled(self.now, id))

  def output(self, id):
    """The finished request's Output; drops it from the server's memory."""
    live = self.requests.pop(id)
    record = next(r for r in reversed(self.records) if r.id == id)
    return Output(id, ''.join(live.pieces), tuple(live.tokens), record.status,
                  record, tuple(live.logprobs))

  def forget(self, id):
    """Drops all memory of a request that has ended; returns its Record."""
    self.requests.pop(id)
    self.seen.discard(id)
    return self.recorder.forget(id)

  def generate(self, prompt, **params):
    """Serves one request to its end: an Output.

    Raises:
      RequestFailed: faults ended it.
    """
    id = self.submit(prompt, **params)
    live = self.requests[id]
    while not live.finished:
      self.poll()
    output = self.output(id)
    if live.failed:
      raise RequestFailed(live.error)
    return output

  def stream(self, prompt, **params):
    """Yields pieces of text as they come; leaving early cancels.

    Raises:
      RequestFailed: faults ended it, after the pieces that came before.
    """
    id = self.submit(prompt, **params)
    live = self.requests[id]
    try:
      while not live.finished or live.pieces:
        while live.pieces:
          piece = live.pieces.popleft()
          if piece:
            yield piece
        if not live.finished:
          self.poll()
      if live.failed:
        raise RequestFailed(live.error)
    finally:
      if not live.finished:
        self.cancel(id)
      self.requests.pop(id)

  def run(self, requests, on_poll=None):
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
      self.poll()
      if on_poll:
        on_poll()
    return [r for r in self.records if r.id in counts]

  # --- faults ---------------------------------------------------------------

  def kill(self, instance, back_s=None):
    """Loses an instance with all it holds, as a fault would.

    Its requests go on elsewhere. back_s: seconds after which it is started
    again, empty; None: it is given up, until `restore`. Meanwhile requests
    that nobody else can serve wait, or, where it is given up, fail.

    Raises:
      InputError: no such instance, or not seconds of 0 or more.
    """
    self._check_instance(instance)
    require(back_s is None or 0 <= back_s < math.inf, 'back_s', back_s,
            'None or seconds of 0 or more')
    self._event(self.fleet.stop(instance, 'it was killed',
                                None if back_s is None else self.now + back_s))

  def drain(self, instance):
    """Gives an instance no more work that another could do, until `restore`.

    Raises:
      InputError: no such instance.
    """
    self._check_instance(instance)
    self._event(Drain(self.now, instance))

  def restore(self, instance):
    """Ends a drain, or starts an instance that is lost again, empty.

    Raises:
      InputError: no such instance.
      RuntimeError: its devices refuse; it stays lost.
    """
    self._check_instance(instance)
    event = InstanceUp(self.now, instance)
    if instance in self.fleet.down:
      with jax.transfer_guard('disallow'):
        event = self.fleet.start(instance)
    self._event(event)
    if isinstance(event, InstanceDown):
      raise RuntimeError(self.faults[-1][1])

  def _check_instance(self, instance):
    most = len(self.engines) - 1
    require(isinstance(instance, int) and 0 <= instance <= most,
            'instance', instance, f'0 to {most}')

  # --- the loop -------------------------------------------------------------

  def poll(self):
    """Handles what has completed; False after a pause, if nothing has."""
    began, steps, some = time.perf_counter(), self.fleet.steps, False
    with jax.transfer_guard('disallow'):
      for event in self.fleet.poll():
        self._event(event)
        some = True
    if some or self.fleet.steps > steps:  # of a command of several
      self.host_s += time.perf_counter() - began
      self.found_s = self.now
    else:
      pause = (self.now - self.found_s) * PAUSE_SHARE
      time.sleep(min(max(pause, LEAST_PAUSE_S), MOST_PAUSE_S))
      return False
    return True

  def _event(self, event):
    """Tells the scheduler an event, and those of what fails in answer to it.

    Commands of one event are all performed first: what one of them loses may
    be in the others.
    """
    todo = collections.deque([event])
    while todo:
      event = todo.popleft()
      self.state, commands = scheduler.step(self.plan, self.state, event)
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
            todo += self.fleet.perform(command)
    if not self.live and scheduler.idle(self.state):
      scheduler.check(self.state)

  def _finish(self, command):
    live = self.live.pop(command.id)
    live.flush()
    live.reason = command.reason
    self.fleet.forget(command.id)

  def _fail(self, command):
    self.live.pop(command.id).fail(command.reason)
    self.fleet.forget(command.id)

  def _reject(self, command):
    self.live.pop(command.id).error = command.reason

  def save_log(self, path):
    """Writes the event log of this run so far."""
    write_log(path, self.log)


_ENDS = {
    Finish: Orchestrator._finish,
    Fail: Orchestrator._fail,
    Reject: Orchestrator._reject,
}


def _are_ids(ids, vocab_size):
  return len(ids) > 0 and all(type(i) is int or isinstance(i, np.integer)
                              for i in ids) and (
      min(ids) >= 0 and max(ids) < vocab_size)


def serve(model: Model, placement: Placement,
          config: EngineConfig | None = None, **options: Any) -> Orchestrator:
  """An Orchestrator for a model over a placement; options as its __init__.

  `with dsjax.serve(model, placement) as server: server.generate('Hi')`. If
  JAX has not started, a machine without accelerators gets as many CPU devices
  as the placement asks for.
  """
  with contextlib.suppress(RuntimeError):  # it has started: use what is there
    if jax.config.jax_num_cpu_devices < placement.num_devices:
      jax.config.update('jax_num_cpu_devices', placement.num_devices)
  return Orchestrator(model, placement, config, **options)


def write_log(path, log):
  """Writes an event log: a JSON line for each (event, commands)."""
  with open(path, 'w') as file:
    file.writelines(json.dumps(event_log.encode(pair)) + '\n' for pair in log)


def replay(plan, log):
  """Steps the scheduler through a log's events.

  Returns:
    the index of the first entry whose commands differ, or None.
  """
  state = scheduler.init(plan)
  for index, (event, commands) in enumerate(log):
    state, again = scheduler.step(plan, state, event)
    if again != commands:
      return index
  return None
