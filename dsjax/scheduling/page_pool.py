"""The page pool of one instance, as a value.

The set of free pages is one Python integer: bit p is set while page p is
free. Allocation, release and the disjointness check are a few operations on
that integer, whatever the pool's history, and two equal pools compare equal.
They take longer the larger the pool is; a simulation, in which nothing has an
address, counts its pages instead (`Counted`).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_WINDOW = (1 << 256) - 1


class Pool(NamedTuple):
  """num_pages pages, of which the bits set in `free` are free."""

  num_pages: int
  free: int


class Counted:
  """num_pages pages, `free` of them free; all have the id 0. No tuple,
  as compiled code makes and reads these faster."""

  __slots__ = ('num_pages', 'free')

  def __init__(self, num_pages: int, free: int):
    self.num_pages, self.free = num_pages, free

  def __eq__(self, other: object) -> bool:
    return type(other) is Counted and (self.num_pages, self.free) == (
        other.num_pages, other.free)

  def __repr__(self) -> str:
    return f'Counted({self.num_pages}, {self.free})'

  def __reduce__(self) -> tuple[type, tuple[int, int]]:
    return Counted, (self.num_pages, self.free)


def init(num_pages: int) -> Pool:
  """A pool with every page free."""
  return Pool(num_pages, (1 << num_pages) - 1)


def counted(num_pages: int) -> Counted:
  """The same without ids."""
  return Counted(num_pages, num_pages)


def pages_for(num_tokens: int, page_size: int) -> int:
  """Pages that hold num_tokens tokens."""
  return -(-num_tokens // page_size)


def num_free(pool: Pool | Counted) -> int:
  """How many pages are free."""
  return pool.free if type(pool) is Counted else pool.free.bit_count()


def alloc(pool: Pool | Counted, count: int
          ) -> tuple[Pool | Counted, tuple[int, ...]]:
  """Takes the `count` lowest free pages: (pool, pages).

  Raises:
    ValueError: fewer than `count` pages are free.
  """
  free = pool.free
  if type(pool) is Counted:
    if count > free:
      raise _too_few(pool, count)
    return Counted(pool.num_pages, free - count), (0,) * count
  if count > free.bit_count():
    raise _too_few(pool, count)
  pages: list[int] = []
  while count:
    # In a window of few bits arithmetic costs less than in the whole.
    first = (free & -free).bit_length() - 1
    window = free >> first & _WINDOW
    run, taken = (1 << count) - 1, 0
    if window & run == run:  # the rest is one contiguous run
      pages.extend(range(first, first + count))
      free ^= run << first
      break
    while window and count:
      low = window & -window
      pages.append(first + low.bit_length() - 1)
      window ^= low
      taken |= low
      count -= 1
    free ^= taken << first
  return Pool(pool.num_pages, free), tuple(pages)


def _too_few(pool: Pool | Counted, count: int) -> ValueError:
  return ValueError(f'{count} pages asked for, {num_free(pool)} free')


def release(pool: Pool | Counted, pages: Sequence[int]) -> Pool | Counted:
  """Gives pages back.

  Raises:
    ValueError: a page is out of range, free already or named twice.
  """
  if type(pool) is Counted:
    if pool.free + len(pages) > pool.num_pages:
      raise ValueError(f'{len(pages)} pages released, of which only '
                       f'{pool.num_pages - pool.free} are owned')
    return Counted(pool.num_pages, pool.free + len(pages))
  first = min(pages, default=0)
  bits = bytearray((max(pages, default=0) - first >> 3) + 1)
  for page in pages:
    bits[page - first >> 3] |= 1 << (page - first & 7)
  mask = int.from_bytes(bits, 'little') << first
  if (mask & pool.free or mask >> pool.num_pages
      or mask.bit_count() < len(pages)):
    raise ValueError(f'page {_wrong(pool, pages)} released but not owned')
  return Pool(pool.num_pages, pool.free | mask)


def _wrong(pool, pages):
  """The first page that is out of range, free or named before."""
  return next(page for n, page in enumerate(pages) if page >= pool.num_pages
              or pool.free >> page & 1 or page in pages[:n])


def check(pool: Pool | Counted, owned: Iterable[Sequence[int]]) -> None:
  """Raises unless every page is free or in exactly one tuple of `owned`."""
  if type(pool) is Counted:
    held = sum(map(len, owned))
    if pool.free + held != pool.num_pages:
      raise AssertionError(f'{pool.free} pages free and {held} owned, of '
                           f'{pool.num_pages}')
    return
  seen = pool.free
  for pages in owned:
    for page in pages:
      if seen >> page & 1:
        raise AssertionError(f'page {page} owned twice, or owned and free')
      seen |= 1 << page
  if seen != (1 << pool.num_pages) - 1:
    lost = ((1 << pool.num_pages) - 1) ^ seen
    raise AssertionError(f'pages leaked: {lost.bit_count()} of '
                         f'{pool.num_pages}')
