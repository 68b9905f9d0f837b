"""KV between processes: an instance's offers, and what it pulls.

Copies of the pages, in pieces of one device each (migration.cut_pieces), few
arrays a piece (parcels.py), are offered to jax's transfer server under a
number; the other side pulls them onto its devices and joins them there. Where a
kernel copies pages at both ends, it is the bytes of a Landing that are offered,
and one of the target that they are copied to. On one host the target reads the
source's Landing (shared_memory.py): messages say where it is, as a pull waits
for the step that runs. jax's server checks nothing: a hash of shapes and dtypes
goes along, and the checksum if asked for. What reaches its port may pull: it
listens on loopback, unless a host says otherwise.

A puller that dies during a copy keeps that server's buffers for good, and with
the last of them every later pull waits for ever (jax 0.10.2). So an offer that
was not pulled to its end is taken back with its server: the next ones are made
to a new one, whose address is told.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import transfer

from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.model import ModelConfig
from dsjax.model import sharding
from dsjax.runtime import migration
from dsjax.runtime.arrays import is_ready
from dsjax.runtime.cluster import messages, offered, shared_memory
from dsjax.runtime.cluster.channel import LOOPBACK, bracketed
from dsjax.runtime.engine import Engine
from dsjax.runtime.landing import Landing
from dsjax.runtime.protocols import Pending

# Else a server takes 24 buffers of 256 MiB; these were no slower.
COPIES, COPY_BYTES = 4, 4 * 2**20


class Sending(NamedTuple):
  """An offer whose checksum is still computed; parts: of a Landing, to be
  offered once `read` is ready."""
  told: messages.Offered
  sums: list[Pending]
  read: Sequence[Pending]
  parts: Sequence[jax.Array]


class Pulling(NamedTuple):
  """What is being pulled: for each batch its arrays, or the parts of a
  Landing."""
  asked: messages.Pull
  route: migration.Route
  kind: int
  connection: Any
  parts: list[list[Any]]
  began_s: float


class Written(NamedTuple):
  """What is written to its pages."""
  kind: int
  transfer: migration.Transfer
  began_s: float


class Exchange:
  """Of one instance.

  Attributes:
    server: makes what is offered next. offers: {number: the server of what is
    offered}; lent: {number: (the Landing that is offered, what is ready once it
    was read though it was pulled before)}. pulling, landing: {number: what
    comes in}.
  """

  def __init__(self, engine: Engine, host: str = LOOPBACK,
               awaited: Callable[[Pending], object] = lambda array: None
               ) -> None:
    """host: the address of this host that others reach. awaited: told what
    `poll` is to be called after."""
    self.engine, self.host, self.awaited = engine, host, awaited
    self.memory = ''  # see Built
    if getattr(engine, 'by_kernel', False):
      self.memory = shared_memory.of_host()
    if self.memory:
      engine.memory = self.memory
      engine.landings.make = shared_memory.Own
      engine.landings.keeps = shared_memory.KEPT
    self.server = self._new_server()
    self.offers: dict[int, Any] = {}
    self.lent: dict[int, tuple[Landing, Sequence[Pending]]] = {}
    self._moved: list[str] = []  # each new address, to be told
    self.sending: dict[int, Sending] = {}
    self.pulling: dict[int, Pulling] = {}
    self.landing: dict[int, Written] = {}
    self._from: dict[int, migration.Route] = {}
    self._to: dict[int, migration.Route] = {}
    self._connections: dict[int, tuple[str, Any]] = {}
    self._opened: dict[int, shared_memory.Opened] = {}
    self._reading: list[tuple[shared_memory.Shared, int, list[Any]]] = []

  def warm(self, peers: messages.Warm, model: ModelConfig,
           config: EngineConfig) -> None:
    """Compiles what hand-offs from and to these peers need."""
    for routes, fields, make in (
        (self._from, peers.sources, lambda peer: (peer, self.engine)),
        (self._to, peers.targets, lambda peer: (self.engine, peer))):
      for index, of in fields.items():
        routes[int(index)] = migration.Route(*make(_peer(of, model, config)))
    for route in self._to.values():
      if route.shares:
        landing = self.engine.landings.take()
        jax.block_until_ready(route.read_shared(route.nowhere(1), landing))
        self.engine.landings.give(landing, ())
      for command in map(route.nowhere, route.buckets):
        if not route.shares:
          batch, = route.batches(command)
          jax.block_until_ready(offered.cut(self.engine, route, batch,
                                            config.checksum))
        elif config.checksum:
          jax.block_until_ready(route.sums(command))
    for route in self._from.values():
      for size in (route.buckets if config.checksum or not route.shares
                   else (1,)):
        command = route.nowhere(size)
        parts = [[] if route.maps else [
            jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
            for x in batch] for batch in offered.like(self.engine, route,
                                                      command)]
        landed = self._join(route, command, config.checksum, parts)
        jax.block_until_ready((landed.land(), landed.arrived))

  def _new_server(self) -> Any:
    host = f'{bracketed(self.host)}:0'
    return transfer.start_transfer_server(
        self.engine.devices[0].client, host, [host],
        max_num_parallel_copies=COPIES, transfer_size=COPY_BYTES)

  @property
  def address(self) -> str:
    """Where others pull what is offered next."""
    return self.server.address()

  @property
  def busy(self) -> bool:
    """Whether `poll` may have something to tell."""
    return bool(self.sending or self.landing or self.looks or self._reading)

  @property
  def looks(self) -> bool:
    """Whether it may have something to tell that nothing awaits."""
    return bool(self.pulling or self._moved)

  # --- the source's side ----------------------------------------------------

  def offer(self, asked: messages.Offer) -> None:
    """Reads the pages and offers them; `poll` tells."""
    route, parts = self._to[asked.target], []
    where: tuple[int, ...] = ()
    sums: list[Pending] = []
    read: Sequence[Pending] = ()
    if route.shares:
      landing = self.engine.landings.take()
      read = route.read_shared(asked.command, landing)
      if asked.checksum:
        sums = route.sums(asked.command)
      size = route.bytes_shared(asked.command, self.engine)
      kind = offered.kind(offered.bytes_like(self.engine, route, asked.command))
      if route.maps and isinstance(landing, shared_memory.Own):
        where = landing.where()
        self.lent[asked.uuid] = landing, [shared_memory.Unread(
            landing, asked.uuid)]
      else:
        parts = landing.parts(size, self.engine.devices[0])
        self.lent[asked.uuid] = landing, ()
    else:
      for batch in route.batches(asked.command):
        cut, summed = offered.cut(self.engine, route, batch, asked.checksum,
                                  asked.command.num_tokens)
        parts += cut
        sums += summed
      size, kind = sum(x.nbytes for x in parts), offered.kind(parts)
      self.server.await_pull(asked.uuid, parts)
    self.offers[asked.uuid] = self.server
    self.sending[asked.uuid] = Sending(messages.Offered(
        asked.uuid, size, kind, 0, where=where), sums, read,
                                        parts if route.shares else ())
    for array in (*read, *sums):
      self.awaited(array)

  def withdraw(self, asked: messages.Withdraw) -> None:
    """Ends an offer. One that was not pulled ends with its server, once no
    other offer is left there."""
    self.sending.pop(asked.uuid, None)
    self.offers.pop(asked.uuid, None)
    lent = self.lent.pop(asked.uuid, None)
    if asked.pulled and lent:  # else somebody may read it
      self.engine.landings.give(*lent)
    if not asked.pulled:
      self.server = self._new_server()
      self._moved.append(self.address)

  # --- the target's side ----------------------------------------------------

  def pull(self, asked: messages.Pull) -> None:
    """Begins to pull; `poll` lands it.

    Raises:
      what goes wrong where nothing is to be pulled: then it is not landed.
    """
    began_s = time.perf_counter()
    route = self._from[asked.source]
    if asked.where:
      like = offered.bytes_like(self.engine, route, asked.command)
      self._land(asked, route, offered.kind(like), began_s, [],
                 self._open(asked.source, asked.where))
      return
    batches = offered.like(self.engine, route, asked.command)
    flat = [x for batch in batches for x in batch]
    connection = self._connection(asked)
    arrays = iter(connection.pull(asked.uuid, flat))
    self.pulling[asked.uuid] = Pulling(
        asked, route, offered.kind(flat), connection,
        [[next(arrays) for _ in batch] for batch in batches], began_s)

  def _connection(self, asked: messages.Pull) -> Any:
    address, known = self._connections.get(asked.source, ('', None))
    if address != asked.address:  # of another incarnation
      known = self.server.connect(asked.address)
      self._connections[asked.source] = asked.address, known
    return known

  def _join(self, route: migration.Route, command: Any, checksum: bool,
            parts: Sequence[list[jax.Array]], lent: Landing | None = None
            ) -> migration.Transfer:
    """The Transfer of parts that are here, or of a source's Landing."""
    now_s = time.perf_counter()
    if route.shares:
      landing = lent or self.engine.landings.take()
      if not lent:
        landing.fill(parts[0])
      there = route.filled(command.target_pages, self.engine)
      return migration.Transfer(route, command, [(there, [])], 0, now_s,
                                checksum, landing=landing,
                                lent=lent is not None)
    moved = [(batch.target, migration.join_pieces(
        offered.unpacked(self.engine, route, batch, packed), route.pieces,
        self.engine.where)) for batch, packed in zip(
            route.batches(command), parts, strict=True)]
    return migration.Transfer(route, command, moved, 0, now_s, checksum)

  def drop(self, asked: messages.Drop) -> None:
    """What has not landed never will. A connection that brought nothing may
    never do so: the next pull makes another."""
    self.landing.pop(asked.uuid, None)
    pulling = self.pulling.pop(asked.uuid, None)
    if pulling:
      self._connections.pop(pulling.asked.source, None)

  # --- both -----------------------------------------------------------------

  def poll(self, send: Callable[[messages.FromInstance], None]) -> bool:
    """Goes on with all of them, and tells; whether there was anything.

    Raises:
      what an engine raises: the instance is lost.
    """
    some = bool(self._moved)
    while self._moved:
      send(messages.Moved(self._moved.pop(0)))
    for uuid, sending in list(self.sending.items()):
      if all(map(is_ready, [*sending.read, *sending.sums])):
        del self.sending[uuid]
        if sending.parts:
          self.offers[uuid].await_pull(uuid, sending.parts)
        send(sending.told._replace(checksum=migration.total(sending.sums),
                                   wall_s=time.perf_counter(),
                                   cpu_s=time.process_time()))
        some = True
    for reading in list(self._reading):
      landing, mark, done = reading
      if all(map(is_ready, done)):
        landing.mark_1[0] = mark
        self._reading.remove(reading)
    for uuid, pulling in list(self.pulling.items()):
      arrays = [x for batch in pulling.parts for x in batch]
      try:
        if not all(map(is_ready, reversed(arrays))):
          continue
        jax.block_until_ready(arrays)  # at once; raises what went wrong
      except RuntimeError as error:
        del self.pulling[uuid]
        self._connections.pop(pulling.asked.source, None)  # of no more use
        send(messages.Broken(uuid, f'the copy failed: {error}'))
        continue
      some = True
      del self.pulling[uuid]
      try:
        self._land(pulling.asked, pulling.route, pulling.kind, pulling.began_s,
                   pulling.parts)
      except Exception as error:  # only the hand-off fails
        if not self.engine.is_sound():
          raise
        send(messages.Broken(uuid, f'the copy failed: {error}'))
    for uuid, landing in list(self.landing.items()):
      if landing.transfer.is_ready():
        del self.landing[uuid]
        send(messages.Landed(uuid, landing.kind, migration.total(
            landing.transfer.arrived), landing.began_s, time.perf_counter(),
                             time.process_time()))
        some = True
    return some

  def _land(self, asked: messages.Pull, route: migration.Route, kind: int,
            began_s: float, parts: Sequence[list[Any]],
            lent: shared_memory.Shared | None = None) -> None:
    """Writes what has come, or what a source's Landing has."""
    landed = self._join(route, asked.command, asked.checksum, parts, lent)
    done = landed.land()
    self.landing[asked.uuid] = Written(kind, landed, began_s)
    waits: list[Any] = [*landed.arrived]
    if lent:
      self._reading.append((lent, asked.uuid, done))
      waits += done
    for array in waits:
      self.awaited(array)

  def _open(self, source: int, where: tuple[int, ...]) -> shared_memory.Shared:
    """A source's Landing."""
    return self._opened.setdefault(source, shared_memory.Opened(
        self.engine.landings.size)).open(where)


def _peer(fields: dict[str, Any], model: ModelConfig, config: EngineConfig
          ) -> migration.Peer:
  """An instance of another process, of its capacity and tp."""
  capacity = InstanceConfig(**fields['capacity'])
  return migration.Peer(capacity.role, config, capacity, (
      sharding.cut(model, fields['tp']),
      sharding.spans(model.num_layers, capacity.pp), ()),
                        fields['by_kernel'], fields['memory'])
