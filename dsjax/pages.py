"""The page pool of one instance, as a value.

The set of free pages is one Python integer: bit p is set while page p is
free. Allocation, release and the disjointness check are a few operations on
that integer, whatever the pool's history, and two equal pools compare equal.
"""

from typing import NamedTuple


class Pool(NamedTuple):
  """num_pages pages, of which the bits set in `free` are free."""

  num_pages: int
  free: int


def init(num_pages):
  """A pool with every page free."""
  return Pool(num_pages, (1 << num_pages) - 1)


def pages_for(num_tokens, page_size):
  """Pages that hold num_tokens tokens."""
  return -(-num_tokens // page_size)


def num_free(pool):
  """How many pages are free."""
  return pool.free.bit_count()


def alloc(pool, count):
  """Takes the `count` lowest free pages: (pool, pages).

  Raises:
    ValueError: fewer than `count` pages are free.
  """
  if count > pool.free.bit_count():
    raise ValueError(f'{count} pages asked for, {num_free(pool)} free')
  free, pages = pool.free, []
  while count:
    low = free & -free
    first = low.bit_length() - 1
    run = ((1 << count) - 1) << first
    if free & run == run:  # the rest is one contiguous run
      pages.extend(range(first, first + count))
      free ^= run
      break
    pages.append(first)
    free ^= low
    count -= 1
  return Pool(pool.num_pages, free), tuple(pages)


def release(pool, pages):
  """Gives pages back.

  Raises:
    ValueError: a page is out of range, free already or named twice.
  """
  mask = 0
  for page in pages:
    bit = 1 << page
    if page >= pool.num_pages or (pool.free | mask) & bit:
      raise ValueError(f'page {page} released but not owned')
    mask |= bit
  return Pool(pool.num_pages, pool.free | mask)


def check(pool, owned):
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
