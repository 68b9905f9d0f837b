"""Pages that stay when the requests that filled them are gone.

The tokens of a full page, and all before them, are known by one number: its
hash (blocks.py). A `Cache` is a pool that remembers, of some pages, the hash;
a request whose prompt begins with the same tokens takes such a page instead of
computing it. A kept page has as many owners as requests hold it. Without an
owner it is idle: free for others, the one that was used longest
ago first, and of one request its last page before the first.

Nothing writes to a kept page: it is full, and the page that a request writes
is never one that it took from here. A page is kept from the moment on that
what wrote it is done, so no request can take one whose writer may fail yet.

The functions take every kind of pool; one that is no Cache keeps nothing.
"""

import collections
import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self, final

import immutables

from dsjax.scheduling import page_pool
from dsjax.scheduling.page_pool import Counted, Pool


class Kept(NamedTuple):
  """A page that is kept. stamp: its place among the idle ones; -1: it has
  owners."""

  page: int
  owners: int
  stamp: int


class Table(dict[int, Any]):
  """An immutables.Map that changes in place, for one who owns the state."""

  def mutate(self) -> Self:
    return self

  def finish(self) -> Self:
    return self


@final
class Cache(NamedTuple):
  """A pool, and what is kept.

  pool: its free pages are neither owned nor kept. kept: by hash. idle: stamp
  -> hash of those without an owner. oldest: no stamp is below. next: the next
  stamp.
  """

  pool: Pool | Counted
  kept: Any
  idle: Any
  oldest: int = 0
  next: int = 0

  @property
  def num_pages(self) -> int:
    return self.pool.num_pages


Pages = Pool | Counted | Cache


class Host(NamedTuple):
  """What an instance has of host memory: slots, of a page each; see
  host_tier.py.

  slots: as a Cache of pages. offloads: (number, slots, hashes) of the copies on
  their way there. number: of the next one. swapped: (id, slots, number) of
  preempted rows, by arrival; number: of the copy on its way there, or -1.
  """

  slots: Cache
  offloads: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()
  number: int = 0
  swapped: tuple[tuple[int, tuple[int, ...], int], ...] = ()


def init(num_pages: int, in_place: bool = False) -> Cache:
  """A pool with every page free, and nothing kept.

  in_place: what is kept changes in place; for one who owns the state.
  """
  table = Table if in_place else immutables.Map
  return Cache(page_pool.init(num_pages), table(), table())


def emptied(pages: Pages) -> Pages:
  """A pool of the same kind and size with every page free."""
  if type(pages) is Cache:
    return init(pages.num_pages, type(pages.kept) is Table)
  make = page_pool.counted if type(pages) is Counted else page_pool.init
  return make(pages.num_pages)


def num_free(pages: Pages) -> int:
  """How many pages can be had."""
  if type(pages) is Counted:  # of most simulations
    return pages.free
  if type(pages) is Cache:
    return page_pool.num_free(pages.pool) + len(pages.idle)
  return page_pool.num_free(pages)


def num_idle(pages: Pages) -> int:
  """How many are kept without an owner."""
  return len(pages.idle) if type(pages) is Cache else 0


def alloc(pages: Pages, count: int) -> tuple[Pages, tuple[int, ...]]:
  """Takes `count` pages, idle ones only where no other is free.

  Raises:
    ValueError: fewer can be had.
  """
  if type(pages) is not Cache:
    return page_pool.alloc(pages, count)
  cache: Cache = pages
  lacks = count - page_pool.num_free(cache.pool)
  if not 0 < lacks <= len(cache.idle):
    pool, ids = page_pool.alloc(cache.pool, count)
    return cache._replace(pool=pool), ids
  cache, evicted = _evict(cache, lacks)
  pool, ids = page_pool.alloc(cache.pool, count - lacks)
  return cache._replace(pool=pool), tuple(sorted((*ids, *evicted)))


def doomed(cache: Pages, count: int) -> list[tuple[int, int]]:
  """(hash, page)s that alloc would evict for `count` pages, in order."""
  if type(cache) is not Cache:
    return []
  lacks = count - page_pool.num_free(cache.pool)
  if not 0 < lacks <= len(cache.idle):
    return []
  return [(hash, cache.kept[hash].page) for _, hash in _oldest(cache, lacks)]


def _oldest(cache, count):
  """(stamp, hash)s of the `count` idle pages that were used longest ago."""
  stamp, oldest, idle = cache.oldest, [], cache.idle
  # Pages that are hit again and again leave stamps without a page: no more of
  # them are passed than there are pages to sort instead.
  most = stamp + count + len(idle)
  while len(oldest) < count and stamp < most:
    hash = idle.get(stamp)
    if hash is not None:
      oldest.append((stamp, hash))
    stamp += 1
  if len(oldest) < count:
    oldest += heapq.nsmallest(count - len(oldest), [
        entry for entry in idle.items() if entry[0] >= stamp])
  return oldest


def _evict(cache, count):
  """Forgets the `count` idle pages that were used longest ago: (cache, these
  pages, neither kept nor free)."""
  oldest = _oldest(cache, count)
  kept, idle = cache.kept.mutate(), cache.idle.mutate()
  evicted = []
  for stamp, hash in oldest:
    evicted.append(kept[hash].page)
    del kept[hash], idle[stamp]
  return cache._replace(kept=kept.finish(), idle=idle.finish(),
                        oldest=oldest[-1][0] + 1), evicted


def hits(pages: Pages, hashes: Iterable[int]) -> list[Kept]:
  """What is kept of a prompt: the first pages, those of these hashes."""
  if type(pages) is not Cache:
    return []
  entries: list[Kept] = []
  for hash in hashes:
    entry = pages.kept.get(hash)
    if entry is None:
      break
    entries.append(entry)
  return entries


def hold(pages: Pages, hashes: Sequence[int]) -> tuple[Pages, tuple[int, ...]]:
  """Another owner for the kept pages of these hashes: (pool, pages)."""
  if type(pages) is not Cache:
    return pages, ()
  kept, idle, ids = pages.kept.mutate(), pages.idle.mutate(), []
  for hash in hashes:
    page, owners, stamp = kept[hash]
    if not owners:
      del idle[stamp]
    kept[hash] = Kept(page, owners + 1, -1)
    ids.append(page)
  return pages._replace(kept=kept.finish(), idle=idle.finish()), tuple(ids)


def keep(pages: Pages, ids: Iterable[int], hashes: Iterable[int]) -> Pages:
  """Remembers pages, of one owner, that are full and will not change. Where
  another page with the same tokens is kept already, that one stays."""
  if type(pages) is not Cache:
    return pages
  kept = pages.kept.mutate()
  for page, hash in zip(ids, hashes, strict=False):
    if hash not in kept:
      kept[hash] = Kept(page, 1, -1)
  return pages._replace(kept=kept.finish())


def release(pages: Pages, ids: Sequence[int], hashes: Sequence[int],
            full: int) -> Pages:
  """An owner gives pages back; those that are kept stay.

  hashes: of the first pages. full: how many of these are whole: what is not
  kept of them yet is kept now.

  Raises:
    ValueError: a page is out of range, free already or named twice.
  """
  if type(pages) is not Cache:
    return page_pool.release(pages, ids)
  if not hashes:
    return pages._replace(pool=page_pool.release(pages.pool, ids))
  pool, _, _, oldest, stamp = pages
  kept, idle = pages.kept.mutate(), pages.idle.mutate()
  private = []
  for place in range(len(ids) - 1, -1, -1):
    page = ids[place]
    hash = hashes[place] if place < len(hashes) else None
    if hash is None:
      private.append(page)
      continue
    entry = kept.get(hash)
    if (entry.page != page if entry else place >= full):
      private.append(page)
      continue
    owners = entry.owners - 1 if entry else 0
    if owners:
      kept[hash] = Kept(page, owners, -1)
      continue
    kept[hash] = Kept(page, 0, stamp)
    idle[stamp] = hash
    stamp += 1
  return Cache(page_pool.release(pool, private), kept.finish(), idle.finish(),
               oldest, stamp)


def forget(cache: Cache, ids: Iterable[int], hashes: Iterable[int]) -> Cache:
  """An owner gives kept pages back that are no good: they stay only while
  others own them."""
  pool, kept = cache.pool, cache.kept.mutate()
  for page, hash in zip(ids, hashes, strict=True):
    owners = kept[hash].owners - 1
    if owners:
      kept[hash] = Kept(page, owners, -1)
    else:
      del kept[hash]
      pool = page_pool.release(pool, (page,))
  return cache._replace(pool=pool, kept=kept.finish())


def check(pages: Pages, owned: Iterable[Sequence[int]]) -> None:
  """Raises AssertionError unless every page is in one place: free, in one of
  `owned`, or kept, with as many owners as have it in `owned`."""
  if type(pages) is not Cache:
    page_pool.check(pages, owned)
    return
  owners = collections.Counter(itertools.chain.from_iterable(owned))
  idle = {}
  for hash, (page, count, stamp) in pages.kept.items():
    if owners.pop(page, 0) != count:
      raise AssertionError(f'page {page} is kept, not by {count} owners')
    if (stamp < 0) != bool(count):
      raise AssertionError(f'page {page} of {count} owners, stamp {stamp}')
    if not count:
      idle[stamp] = hash
  if idle != dict(pages.idle.items()):
    raise AssertionError('the order of idle pages is another')
  if idle and not pages.oldest <= min(idle) <= max(idle) < pages.next:
    raise AssertionError('stamps of idle pages beyond their bounds')
  everywhere = [(page,) for page, count in owners.items() for _ in range(count)]
  everywhere += [(entry.page,) for entry in pages.kept.values()]
  page_pool.check(pages.pool, everywhere)
