"""Hand-offs between processes, as a fleet sees them.

The source offers copies of the pages under a number that cannot be guessed,
and the target pulls them (exchange.py). Both are told at once; neither waits
for the server in between, unless the source's address is about to change. Where
both have the same memory the target is told once they are there, and where.
"""

import secrets
import time
from typing import TYPE_CHECKING, Any

from dsjax.config.checks import StartError
from dsjax.runtime import landing, migration
from dsjax.runtime.cluster import messages
from dsjax.scheduling.events import Migrate

if TYPE_CHECKING:
  from dsjax.runtime.cluster.remote import RemoteEngine

LOOK_S = 2e-3  # between two looks while something starts
TRIAL_S = 120.0  # for a hand-off that no fleet looks at


class RemoteTransfer:
  """A hand-off in flight between two processes: a Transfer.

  The target pulls as soon as it may and writes its pages by itself, in the
  order of its messages: so what has not landed when a Drop comes never does.
  """

  def __init__(self, uuid: int, source: 'RemoteEngine',
               target: 'RemoteEngine', command: Migrate, checksum: bool
               ) -> None:
    self.command, self.checksum = command, checksum
    self.bytes, self.start_s = 0, time.perf_counter()
    self.landed, self._begun = False, False
    self._maps = landing.maps(source, target)
    self._withdrawn = source.withdrawn  # before it is offered
    self._uuid, self._ends = uuid, (source, target)
    self._offered: messages.Offered | None = None
    self._arrived: messages.Landed | None = None
    self._why = ''
    for engine in self._ends:
      engine.transfers[uuid] = self

  def begin(self) -> None:
    """Has the target pull, once, as soon as it is known where: at what the
    source told after the last offer that was taken back before this one, or
    in the memory that it told of."""
    source, target = self._ends
    where = self._offered.where if self._offered else ()
    is_known = (where != () if self._maps else
                source.moved == self._withdrawn)
    if is_known and not self._begun:
      self._begun = True
      target.send_if_there(messages.Pull(
          self._uuid, source.index, source.address, self.command,
          self.checksum, where))

  def hear(self, message: Any) -> None:
    """One of its ends says how far it is."""
    if isinstance(message, messages.Offered):
      self._offered, self.bytes = message, message.bytes
      self.begin()
    elif isinstance(message, messages.Landed):
      self._arrived = message
    else:
      self._why = message.why

  def has_arrived(self) -> bool:
    """Whether the target holds it all.

    Raises:
      RuntimeError: it failed at one of the ends.
    """
    for engine in self._ends:
      engine.hear()
    if self._why:
      raise RuntimeError(self._why)
    if self._offered is None or self._arrived is None:
      return False
    if self._offered.kind != self._arrived.kind:
      raise migration.Damaged('shapes or dtypes arrived that were not sent')
    return True

  def wait(self) -> None:
    """Waits until it has landed, where no fleet looks at it.

    Raises:
      RuntimeError: it failed, one of its ends did, or nothing came in TRIAL_S.
    """
    until_s = time.monotonic() + TRIAL_S
    while not self.has_arrived():
      for engine in self._ends:
        engine.check()
      if time.monotonic() > until_s:
        raise RuntimeError(f'nothing came in {TRIAL_S:g} s')
      self._ends[0].news.wait(LOOK_S)  # of both ends
      self._ends[0].news.clear()
    self.land()

  def land(self) -> None:
    """It has landed by itself."""
    self.landed = True
    if not self.checksum:
      self._settle(pulled=True)

  def is_ready(self) -> bool:
    return self.landed

  def check(self) -> None:
    """Raises Damaged unless the checksums agree."""
    if self._offered and self._arrived:
      migration.compare(self._offered.checksum, self._arrived.checksum)
    self._settle(pulled=True)

  def drop(self) -> None:
    """Gives it up: the target writes nothing, the source keeps nothing."""
    self._ends[1].send_if_there(messages.Drop(self._uuid))
    self._settle(pulled=self._arrived is not None)

  def _settle(self, pulled: bool) -> None:
    """Both ends forget it; what was not pulled is taken back."""
    source, target = self._ends
    target.transfers.pop(self._uuid, None)
    source.end_offer(self._uuid, pulled)


class RemoteRoute:
  """How KV goes from one process to another: the target pulls."""

  def __init__(self, source: 'RemoteEngine', target: 'RemoteEngine') -> None:
    self.source, self.target = source, target

  def start(self, command: Migrate, checksum: bool = False) -> RemoteTransfer:
    """Has the source offer the KV and the target pull it."""
    source, target, uuid = self.source, self.target, (
        secrets.randbits(63))  # what a puller must know
    transfer = RemoteTransfer(uuid, source, target, command, checksum)
    try:
      source.send(messages.Offer(uuid, target.index, command, checksum))
      transfer.begin()
    except BaseException:
      transfer.drop()
      raise
    return transfer

  def warm(self, checksum: bool = False) -> None:
    """One hand-off of nothing: whether one can reach the other. What it
    compiles, the processes have.

    Raises:
      StartError: they cannot.
    """
    what = f'KV from instance {self.source.index} to {self.target.index}'
    transfer = self.start(migration.nowhere(
        self.source.capacity, self.target.capacity), checksum)
    try:
      transfer.wait()  # both may compile first
    except RuntimeError as error:
      raise StartError(f'{what}: {error}') from error
    if checksum:
      transfer.check()
