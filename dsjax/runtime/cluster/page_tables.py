"""The pages of requests, as both sides of a channel know them."""

import array
import itertools
import sys
from collections.abc import Iterator

from dsjax.runtime.cluster.messages import Run
from dsjax.scheduling.events import Chunk, Row, RunDecode, RunPrefill


class PageTables:
  """The pages of each request as of the last command of an instance.

  Both sides keep them: a command has a row's pages whole, which is most of
  it, and the wire has how many of them are as before, and the others.
  """

  def __init__(self) -> None:
    self._pages: dict[int, tuple[int, ...]] = {}

  def pack(self, command: RunPrefill | RunDecode) -> Run:
    """A command as it is sent."""
    numbers, new = [], []
    for id, base, until, pages in command.rows:
      kept = self._kept(id, pages)
      numbers += id, base, until, kept, len(pages) - kept
      new += pages[kept:]
    for id, start, stop, pages, last, hit in command.chunks:
      kept = self._kept(id, pages)
      numbers += id, start, stop, last, hit, kept, len(pages) - kept
      new += pages[kept:]
    return Run(isinstance(command, RunPrefill), command.instance,
               command.number, command.tick, command.steps,
               len(command.chunks), len(command.rows),
               _swapped(array.array('q', numbers + new)).tobytes())

  def _kept(self, id: int, pages: tuple[int, ...]) -> int:
    """How many pages are as before; remembers these."""
    before = self._pages.get(id, ())
    self._pages[id] = pages
    if pages[:len(before)] == before:
      return len(before)
    return next((i for i, (a, b) in enumerate(zip(before, pages, strict=False))
                 if a != b), len(pages))

  def unpack(self, run: Run) -> RunPrefill | RunDecode:
    """The inverse of pack, at the other side.

    Raises:
      ValueError: it was not packed so.
    """
    numbers = array.array('q')
    numbers.frombytes(run.numbers)
    values = iter(_swapped(numbers).tolist())
    of_rows = _lines(values, run.rows, 5)
    of_chunks = _lines(values, run.chunks, 7)
    rows = tuple([
        Row(id, base, until, self._whole(id, kept, count, values))
        for id, base, until, kept, count in of_rows])
    chunks = tuple([
        Chunk(id, start, stop, self._whole(id, kept, count, values),
              bool(last), hit)
        for id, start, stop, last, hit, kept, count in of_chunks])
    if run.prefills:
      return RunPrefill(run.instance, run.number, chunks, run.tick, rows)
    return RunDecode(run.instance, run.number, run.tick, run.steps, rows)

  def forget(self, id: int) -> None:
    """The request has left."""
    self._pages.pop(id, None)

  def _whole(self, id: int, kept: int, count: int, values: Iterator[int]
             ) -> tuple[int, ...]:
    pages = self._pages.get(id, ())
    if kept > len(pages):
      raise ValueError(f'{kept} pages of request {id} are as before, it had '
                       f'{len(pages)}')
    if count or kept < len(pages):
      pages = (*pages[:kept], *itertools.islice(values, count))
      self._pages[id] = pages
    return pages


def _lines(values: Iterator[int], count: int, width: int
           ) -> list[tuple[int, ...]]:
  """The next `count` times `width` values."""
  flat = list(itertools.islice(values, count * width))
  if len(flat) < count * width:
    raise ValueError('fewer numbers came than were told')
  return list(zip(*[iter(flat)] * width, strict=True))


def _swapped(numbers: array.array) -> array.array:
  """To the order of bytes on the wire, or from there."""
  if sys.byteorder == 'big':
    numbers.byteswap()
  return numbers
