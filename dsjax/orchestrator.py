"""The shell around the scheduler: real clock, real meshes, no choices.

One thread. Whoever wants something (generate, stream, run) drives the loop:
`poll` turns completed device work into events, steps the scheduler and
performs its commands. Nothing blocks while a mesh has work.
"""

import collections
import contextlib
import dataclasses
import json
import time

import jax
import numpy as np
from rich import progress

from dsjax import (
  base,
  engine,
  metrics,
  migrate,
  scheduler,
  sharding,
  tokenizer,
)

# The pause between polls that found nothing: a share of the wait so far, so
# that a long step is not interrupted and a short one not noticed late.
PAUSE_SHARE, LEAST_PAUSE_S, MOST_PAUSE_S = 1 / 16, 5e-5, 2e-3


@dataclasses.dataclass(frozen=True)
class Output:
  """A finished request.

  text ends before a stop string or an ending token; tokens has every sampled
  id, the ending one included. reason: stop | length | cancelled. logprobs: a
  token each (log-probability, ((id, log-probability), ...)) when asked for.
  """

  id: int
  text: str
  tokens: tuple[int, ...]
  reason: str
  record: base.Record
  logprobs: tuple = ()


class _Live:
  """The host's view of a request: its tokens and its text so far."""

  def __init__(self, request, ends, vocabulary):
    self.request, self.ends = request, ends
    self.tokens, self.logprobs = [], []
    self.ended, self.reason, self.error = False, None, None
    self.stream = tokenizer.Stream(vocabulary) if vocabulary else None
    self.stops = tokenizer.StopMatcher(request.sampling.stop)
    self.pieces = collections.deque()

  @property
  def finished(self):
    return self.reason is not None or self.error is not None

  def push(self, token):
    """Takes the next token; True when the request ends with it."""
    self.tokens.append(token)
    may_end = len(self.tokens) >= self.request.sampling.min_tokens
    self.ended = token in self.ends and may_end
    if not self.ended and self.stream:
      text, hit = self.stream.push(token), False
      if may_end:
        text, hit = self.stops.push(text)
      self.pieces.append(text)
      self.ended = hit
    if self.ended or len(self.tokens) == self.request.sampling.max_tokens:
      self.flush()
    return self.ended

  def flush(self):
    """Lets out what a stop string or half a character held back."""
    if self.stream and not self.stops.hit:
      text, hit = self.stops.push(self.stream.finish())
      self.pieces.append(text if hit else text + self.stops.finish())
    self.stream = None


class _Running:
  """A command in flight and the outputs of its steps."""

  def __init__(self, command, outputs, marks):
    self.command, self.outputs = command, collections.deque(outputs)
    self.marks = collections.deque(marks)  # what each stage but the last sent
    self.times, self.ended, self.stages = [], [], []


class Orchestrator:
  """Serves a model over a placement. Use it as a context manager.

  Attributes:
    records: a Record a request, in order of arrival.
    log: (event, commands) pairs, of the whole run unless keep_events.
    observers: functions called with each (event, commands).
    copied_bytes, copy_s: what migrations moved and the seconds they took,
      from dispatch to completion, summed.
    host_s, steps: host seconds of polls that found work; device steps done.
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
    config = config or base.EngineConfig()
    base.require(config.max_len <= model.config.max_len,
                 'EngineConfig.max_len', config.max_len,
                 f'at most {model.config.max_len}, the context of '
                 f'{model.config.name}')
    roles = [role for role, _ in placement.instances]
    meshes = sharding.make_meshes(model.config, placement,
                                  jax.devices() if devices is None
                                  else devices)
    self.model, self.placement, self.config = model, placement, config
    limits = tuple(engine.fit(model.config, stages, role, config)
                   for role, stages in zip(roles, meshes, strict=True))
    self.plan = scheduler.Config(limits, config.max_len, config.depth,
                                 run_ahead=config.run_ahead)
    self.engines = [engine.Engine(model, stages, role, config, one)
                    for role, stages, one in zip(roles, meshes, limits,
                                                 strict=True)]
    self.routes = {}
    if report:
      self._warm(report)
    else:
      with progress.Progress(transient=True) as bar:
        task = bar.add_task('')
        self._warm(lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name))
    self.state = scheduler.init(self.plan)
    self.recorder = metrics.Recorder()
    self.log = [] if keep_events is None else collections.deque(
        maxlen=keep_events)
    self.observers = []
    self.live, self.requests, self.seen = {}, {}, set()
    self.running = [collections.deque() for _ in roles]
    self.transfers = []
    self.copied_bytes, self.copy_s = 0, 0.0
    self.host_s, self.steps, self.next_id = 0.0, 0, 0
    self.origin, self.found_s = time.perf_counter(), 0.0
    self.closed = False

  def _warm(self, report):
    total, done = sum(len(e.shapes_needed()) for e in self.engines), 0
    for index, one in enumerate(self.engines):
      for name in one.warm():
        done += 1
        report(done, total, f'{one.role} {index}: {name}')
    for source in self.engines:
      for target in self.engines:
        if source.role == 'prefill' and target.role == 'decode':
          route = migrate.Route(source, target)
          route.warm(self.config.checksum)
          self.routes[source, target] = route

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Cancels what is left and lets the devices finish."""
    if not self.closed:
      for id in list(self.live):
        self.cancel(id)
      while any(self.running) or self.transfers:
        self.poll()
      self.closed = True

  @property
  def now(self):
    """Seconds since the clock's origin."""
    return time.perf_counter() - self.origin

  @property
  def records(self):
    return self.recorder.records

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
      base.require(vocabulary is not None, 'prompt', prompt,
                   'token ids: this model has no tokenizer')
      if isinstance(prompt, str):
        prompt = [{'role': 'user', 'content': prompt}]
      ids = vocabulary.chat(list(prompt))
    else:
      ids = list(prompt) if isinstance(prompt, (list, tuple, range)) else []
    size = self.model.config.vocab_size
    base.require(_are_ids(ids, size), 'prompt', prompt,
                 f'text, messages or token ids in [0, {size}), not empty')
    return tuple(int(i) for i in ids)

  def submit(self, prompt, arrival_s=None, **params):
    """Queues a request; returns its id. See Sampling for the parameters.

    Raises:
      InputError: bad prompt or parameters, or a request that can never fit.
    """
    ids = self.encode(prompt)
    try:
      params = base.Sampling(**params)
    except TypeError as error:
      raise base.InputError(f'unknown sampling parameter: {error}') from None
    if params.max_tokens is None:
      room = max(1, self.config.max_len - len(ids))
      params = dataclasses.replace(params, max_tokens=room)
    at = self.now if arrival_s is None else arrival_s
    self.next_id += 1
    id = self.next_id - 1
    self.enqueue(base.Request(id, at, ids, params))
    if self.requests[id].error:
      raise base.InputError(self.requests.pop(id).error)
    return id

  def enqueue(self, request, more=False):
    """Queues a Request of a workload; a rejection is left in its record.

    more: another one follows at once (see base.Arrived).
    """
    self._check_new(request)
    ends = set(request.sampling.stop_token_ids)
    if not request.sampling.ignore_eos:
      ends.update(self.model.config.eos_ids)
    self.requests[request.id] = self.live[request.id] = _Live(
        request, ends, self.model.tokenizer)
    self.seen.add(request.id)
    self.next_id = max(self.next_id, request.id + 1)
    self._event(base.Arrived(request.arrival_s, request.id,
                             len(request.prompt), request.sampling.max_tokens,
                             more))

  def _check_new(self, request):
    """Raises InputError unless the request can be queued here."""
    base.require(not self.closed, 'server', 'closed', 'open')
    base.require(request.id not in self.seen, 'Request.id', request.id,
                 'new to this server')
    self.check(request.prompt, request.sampling)

  def check(self, prompt, params):
    """Raises InputError unless these ids and this Sampling suit the model.

    Whether they fit is the scheduler's to say (scheduler.never_fits). Reads
    nothing that changes: any thread may ask.
    """
    size = self.model.config.vocab_size
    base.require(_are_ids(prompt, size), 'Request.prompt', prompt,
                 f'token ids in [0, {size}), not empty')
    base.require(params.max_tokens is not None, 'Sampling.max_tokens', None,
                 'set in a workload')
    base.require(all(t < size for t, _ in params.logit_bias),
                 'Sampling.logit_bias', params.logit_bias, f'ids below {size}')
    base.require(not params.stop or self.model.tokenizer is not None,
                 'Sampling.stop', params.stop, 'empty without a tokenizer')

  def cancel(self, id):
    """Ends a request now; one that has ended is left alone."""
    self._event(base.Cancelled(self.now, id))

  def output(self, id):
    """The finished request's Output; drops it from the server's memory."""
    live = self.requests.pop(id)
    record = next(r for r in reversed(self.records) if r.id == id)
    return Output(id, ''.join(live.pieces), tuple(live.tokens), live.reason,
                  record, tuple(live.logprobs))

  def forget(self, id):
    """Drops all memory of a request that has ended; returns its Record."""
    self.requests.pop(id)
    self.seen.discard(id)
    return self.recorder.forget(id)

  def generate(self, prompt, **params):
    """Serves one request to its end: an Output."""
    id = self.submit(prompt, **params)
    while not self.requests[id].finished:
      self.poll()
    return self.output(id)

  def stream(self, prompt, **params):
    """Yields pieces of text as they come; leaving early cancels."""
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
      base.require(counts[request.id] == 1, 'Request.id', request.id,
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

  # --- the loop -------------------------------------------------------------

  def poll(self):
    """Handles what has completed; pauses a moment if nothing has."""
    began = time.perf_counter()
    with jax.transfer_guard('disallow'):
      some = self._poll_transfers() | self._poll_steps()
    if some:
      self.host_s += time.perf_counter() - began
      self.found_s = self.now
    else:
      pause = (self.now - self.found_s) * PAUSE_SHARE
      time.sleep(min(max(pause, LEAST_PAUSE_S), MOST_PAUSE_S))
    return some

  def _poll_transfers(self):
    done = [t for t in self.transfers if t.is_ready()]
    for transfer in done:
      self.transfers.remove(transfer)
      if self.config.checksum:
        transfer.check()
      c = transfer.command
      self.copied_bytes += transfer.bytes
      self.copy_s += time.perf_counter() - transfer.start_s
      self.engines[c.source].forget(c.id)
      self._event(base.Migrated(self.now, c.id, c.epoch))
    return bool(done)

  def _poll_steps(self):
    some = False
    # What these completions start is left to the next poll, however fast the
    # device: arrivals and cancels get their turn.
    for queue, count in [(q, len(q)) for q in self.running]:
      while count and self._advance(queue[0]):
        some, count = True, count - 1
        done = queue.popleft()
        c, at = done.command, done.times[-1]
        if isinstance(c, base.RunDecode):
          event = base.DecodeDone(at, c.instance, c.number, tuple(done.times),
                                  tuple(done.ended), tuple(done.stages))
        else:
          event = base.PrefillDone(at, c.instance, c.number,
                                   tuple(id for id, _ in done.ended),
                                   tuple(done.stages))
        self._event(event)
    return some

  def _advance(self, running):
    """Takes in the steps that are ready; True when the command is done."""
    while running.marks and running.marks[0].is_ready():
      running.marks.popleft()
      running.stages.append(self.now)
    while running.outputs:
      if not running.outputs[0].token_R.is_ready():
        return False
      out, step = running.outputs.popleft(), len(running.times)
      running.times.append(self.now)
      self.steps += 1
      c = running.command
      ids = [(r, row.id) for r, row in enumerate(c.rows)]
      if isinstance(c, base.RunPrefill):
        first = out.token_R.shape[0] - self.engines[c.instance].sequences(c)
        ids += [(first + b, chunk.id) for b, chunk in enumerate(c.chunks)
                if chunk.last]
      tokens = jax.device_get(out.token_R)
      full = None
      for r, id in ids:
        live = self.live.get(id)
        if live is None or live.ended:
          continue
        if live.request.sampling.logprobs is not None:
          full = full or jax.device_get(
              (out.logprob_R, out.top_id_RA, out.top_logprob_RA))
          live.logprobs.append(_logprobs(live, r, *full))
        if live.push(int(tokens[r])):
          running.ended.append((id, step))
    return True

  def _event(self, event):
    self.state, commands = scheduler.step(self.plan, self.state, event)
    self.log.append((event, commands))
    self.recorder.observe(event, commands)
    for observe in self.observers:
      observe(event, commands)
    with jax.transfer_guard('disallow'):
      for command in commands:
        _PERFORM[type(command)](self, command)
    if not self.live and scheduler.idle(self.state):
      scheduler.check(self.state)

  def _step(self, command):
    """RunPrefill and RunDecode: admit who is new here, dispatch."""
    one = self.engines[command.instance]
    for chunk in getattr(command, 'chunks', ()):
      self._admit(command.instance, chunk.id)
    dispatch = (one.prefill if isinstance(command, base.RunPrefill)
                else one.decode)
    self.running[command.instance].append(
        _Running(command, *dispatch(command)))

  def _admit(self, index, id):
    one, live = self.engines[index], self.live.get(id)
    if live is not None and id not in one.slot_of:
      prompt = live.request.prompt
      one.admit(id, [*prompt, *live.tokens], len(prompt),
                live.request.sampling)

  def _migrate(self, command):
    self._admit(command.target, command.id)
    route = self.routes[self.engines[command.source],
                        self.engines[command.target]]
    self.transfers.append(route.start(command, self.config.checksum))

  def _preempt(self, command):
    self.engines[command.instance].forget(command.id)

  def _finish(self, command):
    live = self.live.pop(command.id)
    live.flush()
    live.reason = command.reason
    for one in self.engines:
      one.forget(command.id)

  def _reject(self, command):
    self.live.pop(command.id).error = command.reason

  def save_log(self, path):
    """Writes the event log of this run so far."""
    write_log(path, self.log)


_PERFORM = {
    base.RunPrefill: Orchestrator._step,
    base.RunDecode: Orchestrator._step,
    base.Migrate: Orchestrator._migrate,
    base.Preempt: Orchestrator._preempt,
    base.Finish: Orchestrator._finish,
    base.Reject: Orchestrator._reject,
}


def _are_ids(ids, vocab_size):
  return len(ids) > 0 and all(type(i) is int or isinstance(i, np.integer)
                              for i in ids) and (
      min(ids) >= 0 and max(ids) < vocab_size)


def _logprobs(live, r, logprob_R, top_id_RA, top_logprob_RA):
  count = live.request.sampling.logprobs
  top = zip(top_id_RA[r, :count].tolist(), top_logprob_RA[r, :count].tolist(),
            strict=True)
  return float(logprob_R[r]), tuple(top)


def serve(model, placement, config=None, **options):
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
    file.writelines(json.dumps(base.encode(pair)) + '\n' for pair in log)


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
