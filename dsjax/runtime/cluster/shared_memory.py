"""Memory that two processes of a host both have, for a hand-off's bytes.

The source makes it, as a file without a name that goes with the last process
that has it open, and tells where it is: the number of the process, and of the
file there. The target opens it, and reads pages straight from it. What it has
read it marks, in the memory itself: only then does the source use it anew. So
where a target dies, or never reads, that memory is not used again.
"""

import collections
import mmap
import os
import pathlib
import weakref

import numpy as np

from dsjax.runtime.landing import Landing

BEFORE = 4096  # bytes before those of the hand-off; the mark is the first 8
KEPT = 4  # of a source, and open at each of its targets


def of_host() -> str:
  """Tells the processes that can open each other's files; '': none can."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    names = [os.readlink(f'/proc/self/ns/{name}') for name in ('pid', 'user')]
    os.close(os.memfd_create('dsjax'))  # a sandbox may forbid it
  except (OSError, AttributeError):  # or it is not Linux
    return ''
  return ' '.join((boot, *names, str(os.getuid())))


class Shared(Landing):
  """A Landing in a file."""

  def __init__(self, size: int, file: int) -> None:
    memory = np.frombuffer(mmap.mmap(file, BEFORE + size), np.uint8)
    super().__init__(size, memory[BEFORE:])
    self.mark_1 = memory[:8].view(np.uint64)


class Own(Shared):
  """One that this process makes."""

  def __init__(self, size: int) -> None:
    self._file = os.memfd_create('dsjax')
    weakref.finalize(self, os.close, self._file)
    os.ftruncate(self._file, BEFORE + size)
    super().__init__(size, self._file)

  def where(self) -> tuple[int, int, int]:
    """Where a target finds it: process, file there, and its inode."""
    return os.getpid(), self._file, os.fstat(self._file).st_ino


class Unread:
  """Ready once a target has read a landing: what Landings.give takes."""

  size = 1

  def __init__(self, landing: Own, mark: int) -> None:
    self._landing, self._mark = landing, mark

  def is_ready(self) -> bool:
    return int(self._landing.mark_1[0]) == self._mark

  def is_deleted(self) -> bool:
    return False


class Opened:
  """What a target has open of one source's."""

  def __init__(self, size: int) -> None:
    self._size = size
    self._known: collections.OrderedDict[tuple[int, ...], Shared] = (
        collections.OrderedDict())

  def open(self, where: tuple[int, ...]) -> Shared:
    """The landing that is where Own.where tells.

    Raises:
      OSError: its process is gone, or may not be looked into.
      RuntimeError: it is another file by now.
    """
    landing = self._known.get(where)
    if landing is None:
      pid, number, inode = where
      file = os.open(f'/proc/{pid}/fd/{number}', os.O_RDWR)
      try:
        if os.fstat(file).st_ino != inode:
          raise RuntimeError(f'file {number} of process {pid} is another')
        landing = Shared(self._size, file)
      finally:
        os.close(file)
      self._known[where] = landing
    self._known.move_to_end(where)
    while len(self._known) > KEPT:
      self._known.popitem(last=False)
    return landing
