"""The page pool of one instance, as a value.

The set of free pages is one Python integer: bit p is set while page p is
free. Allocation, release and the disjointness check are a few operations on
that integer, whatever the pool's history, and two equal pools compare equal.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_WINDOW = (1 << 256) - 1


class Pool(NamedTuple):
  """num_pages pages, of which the bits set in `free` are free."""

  num_pages: int
  free: int


def init(num_pages: int) -> Pool:
  """A pool with every page free."""
  return Pool(num_pages, (1 << num_pages) - 1)


def pages_for(num_tokens: int, page_size: int) -> int:
  """Pages that hold num_tokens tokens."""
  return -(-num_tokens // page_size)


def num_free(pool: Pool) -> int:
  """How many pages are free."""
  return pool.free.bit_count()


def alloc(pool: Pool, count: int) -> tuple[Pool, tuple[int, ...]]:
  """Takes the `count` lowest free pages: (pool, pages).

  Raises:
    ValueError: fewer than `count` pages are free.
  """
  free, pages = pool.free, []
  if count > free.bit_count():
    raise ValueError(f'{count} pages asked for, {num_free(pool)} free')
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


def release(pool: Pool, pages: Sequence[int]) -> Pool:
  """Gives pages back.

  Raises:
    ValueError: a page is out of range, free already or named twice.
  """
  first, mask = min(pages, default=0), 0
  for page in pages:
    mask |= 1 << page - first
  mask <<= first
  if (mask & pool.free or mask >> pool.num_pages
      or mask.bit_count() < len(pages)):
    raise ValueError(f'page {_wrong(pool, pages)} released but not owned')
  return Pool(pool.num_pages, pool.free | mask)


def _wrong(pool, pages):
  """The first page that is out of range, free or named before."""
  return next(page for n, page in enumerate(pages) if page >= pool.num_pages
              or pool.free >> page & 1 or page in pages[:n])


def check(pool: Pool, owned: Iterable[Sequence[int]]) -> None:
  """Raises unless every page is free or in exactly one tuple of `owned`."""
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
