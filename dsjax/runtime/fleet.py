"""The instances of a server: performs commands, says what came of them.

Whatever fails is an event as whatever completes is:

- A call of an engine that raises, a result that cannot be read (its buffer is
  gone, or what made it failed) and an instance that is stuck lose the instance
  with all it held: InstanceDown. It is started again, empty, after a while.
- A hand-off that raises, or whose checksums differ, has failed: MigrateFailed.
  The source still holds the pages. Where an engine's buffers are gone, it is
  lost instead.
- A hand-off whose lease ran out: Timer. The scheduler answers with Abort.

Nothing that was in flight when an instance was lost can touch it later: jax
arrays are values, so a late step writes buffers that nobody reads any more.
"""

import collections
import logging
import time
import traceback

import jax

from dsjax.model import sharding
from dsjax.runtime import engine, memory, migration
from dsjax.scheduling.events import (
  Abort,
  DecodeDone,
  InstanceDown,
  InstanceUp,
  Migrate,
  Migrated,
  MigrateFailed,
  Preempt,
  PrefillDone,
  RunDecode,
  RunPrefill,
  Timer,
)

LOG = logging.getLogger(__name__)
NEWEST = 1000  # faults that are remembered


class Running:
  """A command in flight and the outputs of its steps.

  times, stages: when its steps, and their stages but the last, were done.
  ended: (id, step) of requests that ended.
  """

  def __init__(self, command, outputs, marks):
    self.command, self.outputs = command, collections.deque(outputs)
    self.marks = collections.deque(marks)  # what each stage but the last sent
    self.times, self.ended, self.stages = [], [], []

  def event(self):
    """What the scheduler is told when all of its steps are done."""
    c, ended = self.command, tuple(self.ended)
    if isinstance(c, RunDecode):
      return DecodeDone(self.times[-1], c.instance, c.number,
                        tuple(self.times), ended, tuple(self.stages))
    return PrefillDone(self.times[-1], c.instance, c.number,
                       tuple(id for id, _ in ended), tuple(self.stages))


class Fleet:
  """Engines, what they run, and what moves between them.

  Attributes:
    engines: by instance. routes: (source, target) engines -> Route.
    running: commands in flight of each instance, in order.
    transfers: hand-offs in flight.
    down: instances that are lost -> when to start them again, or None.
    faults: (time, what happened) of the newest.
    copied_bytes, copy_s: what migrations moved and the seconds they took,
      from dispatch to arrival, summed. steps: device steps done.
  """

  def __init__(self, model, placement, config, devices, live, clock):
    """Builds every instance; `warm` compiles.

    Args:
      live: {id: answer.Live} of the requests that run, kept by the caller.
      clock: seconds now, on the clock of the events.

    Raises:
      InputError: the placement or the config cannot be served.
    """
    self.config, self.live, self.clock = config, live, clock
    roles = [role for role, _ in placement.instances]
    meshes = sharding.make_meshes(model.config, placement, devices)
    self.limits = tuple(memory.fit(model.config, stages, role, config)
                        for role, stages in zip(roles, meshes, strict=True))
    self.engines = [engine.Engine(model, stages, role, config, one)
                    for role, stages, one in zip(roles, meshes, self.limits,
                                                 strict=True)]
    self.routes, self.transfers = {}, []
    self.running = [collections.deque() for _ in roles]
    self.moved_s = [0.0] * len(roles)  # when each made progress
    self.down, self.losses = {}, [0] * len(roles)  # in a row
    self.faults = collections.deque(maxlen=NEWEST)
    self.copied_bytes, self.copy_s, self.steps = 0, 0.0, 0

  def warm(self, report):
    """Compiles every step; report(done, total, name) after each."""
    total, done = sum(len(e.shapes_needed()) for e in self.engines), 0
    for index, one in enumerate(self.engines):
      for name in one.warm():
        done += 1
        report(done, total, f'{one.role} {index}: {name}')
    for source in self.engines:
      for target in self.engines:
        if source.role == 'prefill' and target.role == 'decode':
          route = migration.Route(source, target)
          route.warm(self.config.checksum)
          self.routes[source, target] = route

  @property
  def busy(self):
    """Something is in flight."""
    return any(self.running) or bool(self.transfers)

  # --- commands -------------------------------------------------------------

  def perform(self, command):
    """Performs a command; the events of what failed in doing so.

    One for an instance that is lost, which the scheduler may not know yet,
    is passed over: InstanceDown takes it back.
    """
    moves = isinstance(command, Migrate)
    where = ((command.source, command.target) if moves
             else (getattr(command, 'instance', None),))
    if any(i in self.down for i in where):
      return ()
    try:
      _PERFORM[type(command)](self, command)
    except Exception as error:  # whatever an engine raises
      if moves:
        return self._hand_off_failed(command, error)
      return (self._lose(command.instance, error),)
    return ()

  def forget(self, id):
    """A request has ended."""
    for one in self.engines:
      one.forget(id)

  def _step(self, command):
    """RunPrefill and RunDecode: admit who is new here, dispatch."""
    index = command.instance
    one, queue = self.engines[index], self.running[index]
    for chunk in getattr(command, 'chunks', ()):
      self._admit(index, chunk.id)
    dispatch = (one.prefill if isinstance(command, RunPrefill)
                else one.decode)
    if not queue:
      self.moved_s[index] = self.clock()
    queue.append(Running(command, *dispatch(command)))

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

  def _abort(self, command):
    """The target's right to write ends. A copy that has landed by now is
    before whatever comes to these pages next; another one never lands."""
    self.transfers[:] = [t for t in self.transfers
                         if (t.command.id, t.command.epoch)
                         != (command.id, command.epoch)]
    self.engines[command.target].forget(command.id)

  # --- completions ----------------------------------------------------------

  def poll(self):
    """Yields the events of what has completed, or failed, since last time."""
    yield from self._poll_transfers()
    yield from self._poll_steps()
    for index, at_s in list(self.down.items()):
      if at_s is not None and self.clock() >= at_s:
        yield self.start(index)

  def _poll_transfers(self):
    for transfer in list(self.transfers):
      if transfer in self.transfers:  # no event of this poll has ended it
        yield from self._advance(transfer)

  def _advance(self, transfer):
    """Takes a hand-off as far as it will go."""
    c = transfer.command
    try:
      if not transfer.landed and transfer.has_arrived():
        transfer.land()
      done = transfer.is_ready()
      if done and transfer.checksum:
        transfer.check()
    except Exception as error:  # whatever jax raises for a broken copy
      return self._hand_off_failed(c, error)
    took_s = time.perf_counter() - transfer.start_s
    if done:
      self.transfers.remove(transfer)
      self.copied_bytes += transfer.bytes
      self.copy_s += took_s
      self.engines[c.source].forget(c.id)
      return (Migrated(self.clock(), c.id, c.epoch),)
    if took_s > self.config.lease_s:
      self._note(f'the hand-off of request {c.id} from instance {c.source} to '
                 f'{c.target} failed', f'no end after {took_s:.1f} s')
      return (Timer(self.clock(), c.id, c.epoch),)
    return ()

  def _poll_steps(self):
    # What these completions start is left to the next poll, however fast the
    # device: arrivals and cancels get their turn.
    for index, count in enumerate(map(len, list(self.running))):
      queue = self.running[index]
      while count and queue:
        event = self._next(index, queue[0])
        if event is None:
          break
        count -= 1
        yield event

  def _next(self, index, running):
    """The event of an instance's oldest command; None: nothing yet."""
    while True:
      try:
        read = self._read(index, running)
      except Exception as error:  # whatever jax raises for what has no value
        return self._lose(index, error)
      if read is None:
        break
      self._tell(running, *read)
    if not running.outputs:
      self.running[index].popleft()
      self.losses[index] = 0
      return running.event()
    idle_s = self.clock() - self.moved_s[index]
    if idle_s > self.config.stall_s:
      return self._lose(index, f'no step for {idle_s:.1f} s')
    return None

  def _read(self, index, running):
    """The next step, if it is ready: (told, tokens, log-probabilities).

    told: (entry of the tokens, id) of those that still want one. All of a step
    is read before any of it is told.
    """
    while running.marks and engine.is_ready(running.marks[0]):
      running.marks.popleft()
      running.stages.append(self.clock())
      self.moved_s[index] = self.clock()
    if not running.outputs or not engine.is_ready(running.outputs[0].token_R):
      return None
    out = running.outputs[0]
    token_R, full = jax.device_get(out.token_R), None
    told = [(r, id) for r, id in self._entries(running.command, len(token_R))
            if id in self.live and not self.live[id].ended]
    if any(self.live[id].wants_logprobs for _, id in told):
      full = jax.device_get((out.logprob_R, out.top_id_RA, out.top_logprob_RA))
    running.outputs.popleft()
    self.moved_s[index] = self.clock()
    return told, token_R, full

  def _entries(self, command, size):
    """(entry of the tokens, id) of what a step of a command samples."""
    found = [(r, row.id) for r, row in enumerate(command.rows)]
    if isinstance(command, RunPrefill):
      first = size - self.engines[command.instance].sequences(command)
      found += [(first + b, chunk.id) for b, chunk in enumerate(command.chunks)
                if chunk.last]
    return found

  def _tell(self, running, told, token_R, full):
    """Gives requests the tokens of a step: told is (row, id) pairs."""
    step = len(running.times)
    running.times.append(self.clock())
    self.steps += 1
    for r, id in told:
      live = self.live[id]
      if live.wants_logprobs:
        live.push_logprobs(r, *full)
      if live.push(int(token_R[r])):
        running.ended.append((id, step))

  # --- faults ---------------------------------------------------------------

  def stop(self, index, why, back_s=None):
    """An instance is lost with all it held: an InstanceDown.

    back_s: when to start it again; None: never, unless asked.
    """
    self._note(f'instance {index} ({self.engines[index].role}) was lost', why)
    queue, steps, ended = self.running[index], (), ()
    if queue:
      steps, ended = tuple(queue[0].times), tuple(queue[0].ended)
    queue.clear()
    self.transfers[:] = [t for t in self.transfers
                         if t.command.target != index]
    self.engines[index].stop()
    self.down[index] = back_s
    return InstanceDown(self.clock(), index, steps, ended,
                        back_s is not None)

  def start(self, index):
    """Starts a lost instance again, empty: an InstanceUp, or, where its
    devices refuse, another InstanceDown."""
    try:
      self.engines[index].start()
    except Exception as error:  # whatever jax raises for lack of memory
      return self._lose(index, error)
    del self.down[index]
    return InstanceUp(self.clock(), index)

  def _lose(self, index, why):
    self.losses[index] += 1
    again = self.losses[index] <= self.config.restarts
    return self.stop(index, why, self.clock() + self.config.restart_s
                     if again else None)

  def _hand_off_failed(self, c, error):
    """Events: the engines whose buffers are gone are lost, or just the copy.

    Its target writes no more.
    """
    self._abort(Abort(c.id, c.epoch, c.target))
    lost = [i for i in (c.source, c.target) if i not in self.down
            and not self.engines[i].is_sound()]
    if lost:
      return tuple(self._lose(i, error) for i in lost)
    self._note(f'the hand-off of request {c.id} from instance {c.source} to '
               f'{c.target} failed', error)
    return (MigrateFailed(self.clock(), c.id, c.epoch, _text(error)),)

  def _note(self, what, why):
    self.faults.append((self.clock(), f'{what}: {_text(why)}'))
    # As text: a traceback would hold on to buffers.
    trace = (traceback.format_exception(why) if isinstance(why, Exception)
             else ())
    LOG.warning('%s: %s%s', what, _text(why), ''.join(['\n', *trace]).rstrip())


def _text(why):
  """An error, or a reason, in one line."""
  line = ' '.join((str(why) or type(why).__name__).split())
  return line if len(line) <= 200 else line[:200] + ' ...'


_PERFORM = {
    RunPrefill: Fleet._step,
    RunDecode: Fleet._step,
    Migrate: Fleet._migrate,
    Preempt: Fleet._preempt,
    Abort: Fleet._abort,
}
