"""The process of an instance.

It is started for a server (begin.py, on_ray.py), which it has entered, and
owns an engine: it does what messages say, in their order, and tells each step
as it completes. It ends with its connection, so a server that dies leaves none
behind.

A thread waits for the steps, and wakes the loop as the channel does: a loop
that looks again and again takes some 8 % of a core that steps have too. What is
pulled is looked at, as are copies to host memory. Signs of life come from the
channel's reading thread, which touches no device.
"""

import collections
import contextlib
import dataclasses
import gc
import importlib
import os
import queue
import sys
import threading
import time
import zlib
from multiprocessing import connection as mp
from typing import Any, NamedTuple

import jax

from dsjax.checkpoints.checkpoint import Model, Recipe
from dsjax.config.checks import InputError, require
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan
from dsjax.config.request import Sampling
from dsjax.model import sharding
from dsjax.runtime import memory
from dsjax.runtime.arrays import is_ready
from dsjax.runtime.cluster import channel, messages, page_tables
from dsjax.runtime.cluster.exchange import Exchange
from dsjax.runtime.looks import pause_s
from dsjax.runtime.protocols import (
  Engine,
  HostCopy,
  HostMemory,
  Pending,
  StepOutput,
)
from dsjax.scheduling.events import Offload, RunDecode, RunPrefill

COMPILED = '/jax/core/compile/backend_compile_duration'
# Pauses between two looks at copies in flight, as of the server's loop.
LEAST_PAUSE_S, MOST_PAUSE_S = 2e-5, 4e-3
AT_MOST_S = 0.05  # without a look at steps in flight
FLUSH_S = 10.0  # for the last words
SAMPLED = 100  # weights of each array, of which a hash is made


class Running(NamedTuple):
  """A command in flight and what it is to give; began_s: when it came."""

  command: RunPrefill | RunDecode
  outputs: collections.deque[StepOutput]
  marks: collections.deque[Pending]
  began_s: float


class Instance:
  """An engine, and what it runs.

  Attributes:
    channel: to the server. host: where other instances reach it. engine,
      exchange, slots: once is_built; exchange: None where no KV comes or goes;
      slots: None without host memory.
    compiled: programs since it was ready.
  """

  engine: Engine
  exchange: Exchange | None
  model: ModelConfig
  config: EngineConfig

  def __init__(self, connection: mp.Connection, index: int, incarnation: int,
               host: str) -> None:
    self.host = host
    self.running: collections.deque[Running] = collections.deque()
    self.tables = page_tables.PageTables()
    self.num_logprobs: dict[int, int] = {}  # of requests that want some
    self.requests: set[int] = set()
    self.exchange, self.is_built, self.compiled = None, False, 0
    self.slots: HostMemory | None = None
    self.copies: dict[HostCopy, int] = {}  # to host memory, or from there
    self.channel = channel.connect(connection, index, incarnation, self.answer,
                                   _leave)
    self.awaited: queue.SimpleQueue[Pending] = queue.SimpleQueue()
    threading.Thread(target=self._await, daemon=True,
                     name='dsjax waiter').start()

  def answer(self, message: Any) -> messages.Pong | None:
    """In the reading thread: a sign of life."""
    return (messages.Pong(time.perf_counter())
            if isinstance(message, messages.Ping) else None)

  def _hear_compiled(self, name: str, *_: Any, **__: Any) -> None:
    self.compiled += name == COMPILED

  def serve(self) -> None:
    """Does what it is told, for ever."""
    moved_s = time.perf_counter()
    while True:
      some = False
      for message in self.channel.take():
        _DO[type(message)](self, message)
        some = True
      if self.exchange:
        some |= self.exchange.poll(self.channel.send)
      some |= self.poll() | self.poll_copies()
      if some:
        moved_s = time.perf_counter()
      elif self.copies or (self.exchange and self.exchange.looks):
        self.channel.wait(pause_s(time.perf_counter() - moved_s,
                                  LEAST_PAUSE_S, MOST_PAUSE_S))
      else:
        waits = self.running or (self.exchange and self.exchange.busy)
        self.channel.wait(AT_MOST_S if waits else None)

  # --- its life -------------------------------------------------------------

  def build(self, message: messages.Build) -> None:
    """Loads the model and makes the engine."""
    fields = message.fields
    recipe = Recipe(**fields['recipe'])
    if recipe.config is not None:
      recipe = recipe._replace(config=ModelConfig(**fields['recipe']['config']))
    model, plan = recipe.make(), Plan(**fields['plan'])
    require(repr(model.config) == fields['model'], 'model', model.config,
            f"what the server has under this name: {fields['model']}")
    self.model, self.config = model.config, EngineConfig(**fields['config'])
    meshes = sharding.stage_meshes(model.config, plan, jax.devices())
    capacity = (InstanceConfig(**fields['capacity']) if fields['capacity'] else
                memory.size_pages(model.config, meshes, fields['role'],
                                  self.config))
    module, name = fields['engine'].split(':')
    make = getattr(importlib.import_module(module), name)
    self.engine = make(model, meshes, fields['role'], self.config, capacity)
    if fields['moves']:
      self.exchange = Exchange(self.engine, self.host, self.awaited.put)
    if self.engine.capacity.host_pages:
      self.slots = self.engine.host_memory(self.config.checksum)
    self.is_built = True
    self.channel.send(messages.Built(
        dataclasses.asdict(self.engine.capacity),
        len(self.engine.shapes_needed()),
        self.exchange.address if self.exchange else '',
        {str(i): str(d) for i, d in enumerate(self.engine.devices)},
        _sampled(model),
        self.exchange.engine.by_kernel if self.exchange else False,
        self.exchange.memory if self.exchange else ''))

  def warm(self, message: messages.Warm) -> None:
    """Compiles everything that it can run."""
    for name in self.engine.warm():
      self.channel.send(messages.Warmed(name))
    if self.exchange:
      self.exchange.warm(message, self.model, self.config)
    if self.slots:
      self.slots.warm()
    jax.monitoring.register_event_duration_secs_listener(self._hear_compiled)
    gc.collect()
    gc.freeze()  # all there is stays: to look at it again takes two steps' time
    self.channel.send(messages.Ready())

  def count(self, message: messages.Count) -> None:
    moving = self.exchange
    self.channel.send(messages.Counted(
        len(self.requests), len(moving.offers) if moving else 0,
        len(self.copies) + (len(moving.pulling) + len(moving.landing)
                            if moving else 0),
        self.compiled))

  # --- commands -------------------------------------------------------------

  def admit(self, message: messages.Admit) -> None:
    sampling = Sampling(**message.sampling)
    self.engine.admit(message.id, message.tokens, message.prompt_len, sampling)
    self.requests.add(message.id)
    if sampling.logprobs is not None:
      self.num_logprobs[message.id] = sampling.logprobs

  def forget(self, message: messages.Forget) -> None:
    self.engine.forget(message.id)
    self.requests.discard(message.id)
    self.num_logprobs.pop(message.id, None)
    self.tables.forget(message.id)

  def run(self, message: messages.Run) -> None:
    began_s = time.perf_counter()
    command = self.tables.unpack(message)
    outputs, marks = (self.engine.prefill(command) if isinstance(
        command, RunPrefill) else self.engine.decode(command))
    self.running.append(Running(command, collections.deque(outputs),
                                collections.deque(marks), began_s))
    stages = len(marks) // len(outputs)
    for step, output in enumerate(outputs):
      for array in (*marks[step * stages:(step + 1) * stages], output.token_R):
        self.awaited.put(array)

  def _await(self) -> None:
    """In a thread: wakes the loop whenever a stage or step is done."""
    while True:
      with contextlib.suppress(RuntimeError):  # the loop meets it too
        jax.block_until_ready(self.awaited.get())
      self.channel.news.set()

  def offer(self, message: messages.Offer) -> None:
    self._hand_off(Exchange.offer, message)

  def pull(self, message: messages.Pull) -> None:
    self._hand_off(Exchange.pull, message)

  def _hand_off(self, begin: Any, message: Any) -> None:
    """Only the hand-off fails, where the engine is sound."""
    try:
      begin(self.exchange, message)
    except Exception as error:
      if not self.engine.is_sound():
        raise
      self.channel.send(messages.Broken(message.uuid, _text(error)))

  def copy(self, message: messages.Copy) -> None:
    assert self.slots is not None
    command = message.command
    self.copies[command] = message.number
    if isinstance(command, Offload):
      self.slots.offload(command)
    else:
      self.slots.load(command)

  # --- completions ----------------------------------------------------------

  def poll(self) -> bool:
    """Tells what has completed; whether anything had."""
    some = False
    while self.running:
      running = self.running[0]
      while running.marks and is_ready(running.marks[0]):
        running.marks.popleft()
        self.channel.send(messages.StageDone())
      if running.outputs and not is_ready(running.outputs[0].token_R):
        break
      some = True
      if running.outputs:
        self._tell(running, running.outputs.popleft())
      if not running.outputs:
        self.running.popleft()
    return some

  def poll_copies(self) -> bool:
    """Tells of copies to host memory, or from there, that are over."""
    if not self.copies or self.slots is None:
      return False
    before, some = self.slots.copied_bytes, False
    for command, error in self.slots.poll(self.config.lease_s):
      if error is not None and not self.engine.is_sound():
        raise error
      self.channel.send(messages.Copied(
          self.copies.pop(command), self.slots.copied_bytes - before,
          _text(error) if error else ''))
      before, some = self.slots.copied_bytes, True
    return some

  def _tell(self, running: Running, output: StepOutput) -> None:
    """The tokens of a step: of its rows, then of its chunks."""
    command = running.command
    token_R = jax.device_get(output.token_R).tolist()
    ids = [row.id for row in command.rows]
    places = list(range(len(ids)))
    if isinstance(command, RunPrefill):
      first = len(token_R) - self.engine.sequences(command)
      places += range(first, first + len(command.chunks))
      ids += [chunk.id for chunk in command.chunks]
    self.channel.send(messages.Stepped(
        command.number, tuple([token_R[place] for place in places]),
        self._logprobs(output, list(zip(places, ids, strict=True))),
        running.began_s, time.perf_counter(), time.process_time()))

  def _logprobs(self, output: StepOutput, entries: list[tuple[int, int]]
                ) -> tuple[Any, ...]:
    wanted = [(r, place, self.num_logprobs[id])
              for r, (place, id) in enumerate(entries)
              if id in self.num_logprobs]
    if not wanted:
      return ()
    logprob_R, top_id_RA, top_logprob_RA = jax.device_get(
        (output.logprob_R, output.top_id_RA, output.top_logprob_RA))
    return tuple([(r, float(logprob_R[place]),
                   tuple(top_id_RA[place, :count].tolist()),
                   tuple(top_logprob_RA[place, :count].tolist()))
                  for r, place, count in wanted])


_DO: dict[type, Any] = {
    messages.Build: Instance.build,
    messages.Warm: Instance.warm,
    messages.Count: Instance.count,
    messages.Admit: Instance.admit,
    messages.Forget: Instance.forget,
    messages.Run: Instance.run,
    messages.Offer: Instance.offer,
    messages.Pull: Instance.pull,
    messages.Withdraw: lambda self, message: self.exchange.withdraw(message),
    messages.Copy: Instance.copy,
    messages.Drop: lambda self, message: self.exchange.drop(message),
}


def _leave(why: str) -> None:
  """The server is gone: nothing is left to do."""
  try:
    if why != channel.CLOSED:
      print(f'an instance ends: {why}', file=sys.stderr)
  finally:  # what reads its output may be gone
    os._exit(0)


def _sampled(model: Model) -> int:
  """A hash of some of a model's weights, which another model under the same
  name has not; 0: its stages read them by themselves."""
  total = 0
  for leaf in jax.tree.leaves(model.params if isinstance(model.params, dict)
                              else {}):
    some = leaf.reshape(-1)[::leaf.size // SAMPLED + 1]
    total = zlib.crc32(some.tobytes(), total)
  return total


def _text(error: BaseException) -> str:
  return f'{type(error).__name__}: {error}'


def run(connection: mp.Connection, index: int, incarnation: int, host: str
        ) -> None:
  """Is the process of an instance: serves until the server ends it.

  connection: to the server, which it has entered. host: where other instances
  reach this one.
  """
  instance = Instance(connection, index, incarnation, host)
  try:
    with jax.transfer_guard('disallow'):
      instance.serve()
  except Exception as error:  # the server says it
    last = (messages.Lost(_text(error)) if instance.is_built else
            messages.Failed(isinstance(error, InputError), str(error)
                            if isinstance(error, InputError)
                            else _text(error)))
    instance.channel.send(last)
    instance.channel.flush(FLUSH_S)
  finally:
    os._exit(1)  # no thread of jax is waited for
