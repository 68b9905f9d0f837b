"""Pages of an engine in host memory, and the copies on their way.

Which page is in which slot, and what may be read, is up to the scheduler
(host_tier.py). A slot has the bytes of a page of every stage, in arrays that
are made once: so the budget holds.

A copy to the host is dispatched with its command: the device reads the pages
in the order of its commands, before any later one writes them, and the host
has them some polls later. A copy from the host goes to the device in pieces,
one a poll, into buffers of its own; only once all are there are the pages
written. No step waits for it.
"""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dsjax.model import sharding
from dsjax.runtime.arrays import is_ready
from dsjax.runtime.looks import Looks
from dsjax.runtime.migration import Damaged, batches
from dsjax.runtime.protocols import HostCopy, Pending
from dsjax.scheduling.events import Load, Offload

if TYPE_CHECKING:
  from dsjax.runtime.engine import Engine


@dataclasses.dataclass(eq=False)
class _Copy:
  """A command on its way.

  left: pieces, (pages, slots), that a load has still to send. moved: (pages,
  slots, a Cache a stage) on the move. sums: checksums of each page.
  """

  command: HostCopy
  start_s: float
  left: collections.deque[tuple[Sequence[int], Sequence[int]]]
  moved: list[tuple[Sequence[int], Sequence[int], list[Any]]] = (
      dataclasses.field(default_factory=list))
  sums: list[list[Pending]] = dataclasses.field(default_factory=list)
  landed: bool = False

  def is_ready(self) -> bool:
    """Whether all that was dispatched is there.

    Raises:
      RuntimeError: a copy failed.
    """
    arrays = jax.tree.leaves([trees for *_, trees in self.moved] + self.sums)
    if self.left or not all(map(is_ready, arrays)):
      return False
    jax.block_until_ready(arrays)  # at once; raises what went wrong
    return True


class HostMemory:
  """The slots of one engine.

  Attributes:
    copied_bytes: of pages that were copied, either way.
  """

  def __init__(self, engine: 'Engine', checksum: bool) -> None:
    """Makes capacity.host_pages slots."""
    self.engine, self.checksum, self.copied_bytes = engine, checksum, 0
    capacity, config = engine.capacity, engine.config
    self.buckets = config.page_buckets
    self.form = capacity.page_size, config.kv_dtype_of(engine.role)
    # By stage, the slots first, so that a slot is one piece of memory.
    self.slots = [jax.tree.map(lambda x: np.zeros(
        (capacity.host_pages, x.shape[0], *x.shape[2:]), x.dtype),
        stage.cache) for stage in engine.stages]
    self.places = [sharding.kv(mesh) for mesh in engine.where[2]]
    self.sums: dict[int, int] = {}  # by slot
    self.copies: list[_Copy] = []
    self._looks = Looks(time.perf_counter())

  @property
  def page_bytes(self) -> int:
    """Of a slot."""
    return sum(x[0].nbytes for x in jax.tree.leaves(self.slots))

  @property
  def busy(self) -> bool:
    """Whether a copy is on its way."""
    return bool(self.copies)

  def clear(self) -> None:
    """Gives up every copy: it writes nothing any more."""
    self.copies.clear()

  def offload(self, command: Offload) -> None:
    """Dispatches the reads of an Offload."""
    copy = _Copy(command, time.perf_counter(), collections.deque())
    for pages, slots in self._pieces(command, 0):
      trees = self.engine.gather(pages, *self.form)
      with jax.transfer_guard_device_to_host('allow'):  # it is meant to
        for x in jax.tree.leaves(trees):
          x.copy_to_host_async()
      copy.moved.append((pages, slots, trees))
    if self.checksum:
      copy.sums = self._checksums(command.pages)
    self.copies.append(copy)

  def load(self, command: Load) -> None:
    """Begins a Load."""
    self.copies.append(_Copy(command, time.perf_counter(), collections.deque(
        self._pieces(command, self.engine.capacity.num_pages))))

  def poll(self, lease_s: float
           ) -> Iterator[tuple[HostCopy, BaseException | None]]:
    """Takes every copy as far as it will go; yields those that are over, with
    what went wrong or None."""
    now_s = time.perf_counter()
    away_s = self._looks.away_s(now_s)
    for copy in list(self.copies):
      if copy not in self.copies:
        continue  # given up meanwhile
      copy.start_s = min(now_s, copy.start_s + away_s)
      error: BaseException | None = None
      try:
        over = self._advance(copy)
      except BaseException as raised:  # whatever jax raises for a broken copy
        over, error = True, raised
      took_s = now_s - copy.start_s
      if not over and took_s > lease_s:
        over, error = True, TimeoutError(f'no end after {took_s:.1f} s')
      if over:
        self.copies.remove(copy)
        yield copy.command, error

  def warm(self) -> None:
    """Copies pages to and fro in each size, so that nothing compiles later."""
    for size in self.buckets:
      trees = self.engine.gather([0] * size, *self.form)
      again = self._put(jax.tree.map(
          lambda x: np.moveaxis(x, 1, 0), jax.device_get(trees)))
      done = self.engine.scatter(
          [self.engine.capacity.num_pages] * size, again)
      jax.block_until_ready(done)
    if self.checksum:
      jax.block_until_ready(self._checksums((0,)))

  def _advance(self, copy: _Copy) -> bool:
    """Whether a copy is over. Raises what went wrong."""
    if isinstance(copy.command, Offload):
      if copy.is_ready():
        self._store(copy)
        return True
      return False
    if copy.left:
      pages, slots = copy.left.popleft()
      some = np.array(slots, np.int32)
      copy.moved.append((pages, slots, self._put(
          jax.tree.map(lambda x: x[some], self.slots))))
    if not copy.is_ready():
      return False
    if not copy.landed:
      for pages, _, trees in copy.moved:
        self.engine.scatter(pages, trees)
      copy.moved, copy.landed = [], True
      if self.checksum:
        copy.sums = self._checksums(copy.command.pages)
        return False
    for slot, total in zip(copy.command.slots, _totals(copy.sums),
                           strict=self.checksum):
      if total != self.sums[slot]:
        raise Damaged(f'KV checksum {total:#x} of a page came from the host, '
                      f'{self.sums[slot]:#x} went there')
    self.copied_bytes += len(copy.command.slots) * self.page_bytes
    return True

  def _store(self, copy: _Copy) -> None:
    """Writes what has arrived to its slots."""
    for _, slots, trees in copy.moved:
      some = np.array(slots, np.int32)
      for x, read in zip(jax.tree.leaves(self.slots),
                         jax.tree.leaves(jax.device_get(trees)), strict=True):
        x[some] = np.moveaxis(read, 1, 0)[:len(some)]
    self.sums.update(zip(copy.command.slots, _totals(copy.sums),
                         strict=self.checksum))
    self.copied_bytes += len(copy.command.slots) * self.page_bytes

  def _pieces(self, command: HostCopy, pad: int
              ) -> Iterator[tuple[list[int], list[int]]]:
    """(pages, slots) of as many pages as a bucket each; the last pages of the
    last one may be `pad`, without a slot, or with any."""
    start = 0
    for size in batches(len(command.pages), self.buckets):
      pages, slots = (list(ids[start:start + size])
                      for ids in (command.pages, command.slots))
      more = size - len(pages)
      pages += [pad] * more
      if isinstance(command, Load):
        slots += slots[:1] * more
      yield pages, slots
      start += size

  def _put(self, stages: Sequence[Any]) -> list[Any]:
    """Slots of each stage, as pages on its mesh."""
    return [jax.device_put(jax.tree.map(lambda x: np.moveaxis(x, 0, 1), tree),
                           place)
            for tree, place in zip(stages, self.places, strict=True)]

  def _checksums(self, pages: Sequence[int]) -> list[list[Pending]]:
    """Of each page: its stages' shares."""
    size = self.engine.capacity.page_size
    return [self.engine.checksum(
        self.engine.gather([page], *self.form), 0, size) for page in pages]


def _totals(sums: Sequence[Sequence[Pending]]) -> list[int]:
  """Checksums as numbers."""
  return [sum(map(int, shares)) % 2**32 for shares in jax.device_get(sums)]
