"""What is kept of requests that are gone, against a plain model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.scheduling import blocks, page_pool, prefix_cache
from dsjax.scheduling.prefix_cache import Kept


def pool(num_pages=8, in_place=False):
  return prefix_cache.init(num_pages, in_place)


def of(cache):
  """{hash: (page, owners)} of what is kept."""
  return {hash: entry[:2] for hash, entry in cache.kept.items()}


def order(cache):
  """The hashes of the idle ones, the next to be evicted first."""
  return [hash for _, hash in sorted(cache.idle.items())]


def filled(cache, hashes):
  """A request has come, filled a page a hash, and gone."""
  cache, ids = prefix_cache.alloc(cache, len(hashes))
  return prefix_cache.release(cache, ids, hashes, len(hashes))


@pytest.mark.parametrize('in_place', [False, True])
def test_pages_of_one_that_is_gone_are_there_for_the_next(in_place):
  cache = filled(pool(in_place=in_place), [11, 12, 13])
  assert of(cache) == {11: (0, 0), 12: (1, 0), 13: (2, 0)}
  assert prefix_cache.num_free(cache) == 8
  assert len(prefix_cache.hits(cache, [11, 12, 99, 13])) == 2
  cache, ids = prefix_cache.hold(cache, [11, 12])
  assert ids == (0, 1)
  assert of(cache) == {11: (0, 1), 12: (1, 1), 13: (2, 0)}
  assert prefix_cache.num_free(cache) == 6
  prefix_cache.check(cache, [ids])


def test_no_hit_without_the_first_page():
  cache = filled(pool(), [11, 12])
  assert prefix_cache.hits(cache, [12]) == [Kept(1, 0, 0)]
  assert prefix_cache.hits(cache, [10, 12]) == []
  assert prefix_cache.hits(page_pool.init(3), [12]) == []


def test_the_last_page_of_the_longest_unused_goes_first():
  cache = filled(filled(pool(6), [11, 12, 13]), [21, 22])
  assert order(cache) == [13, 12, 11, 22, 21]
  cache, ids = prefix_cache.alloc(cache, 3)
  assert ids == (1, 2, 5)
  assert set(of(cache)) == {11, 21, 22}
  cache = prefix_cache.release(*prefix_cache.hold(cache, [11]), [11], 1)
  assert order(cache) == [22, 21, 11]


class Looked(prefix_cache.Table):
  """Counts what is asked for."""

  looks = 0

  def get(self, key, default=None):
    self.looks += 1
    return super().get(key, default)


@pytest.mark.parametrize('count', [1, 3])
def test_an_eviction_does_not_pass_all_hits_since_the_last(count):
  cache = filled(pool(8)._replace(kept=Looked(), idle=Looked()), [11, 12])
  for _ in range(1000):
    cache = prefix_cache.release(*prefix_cache.hold(cache, [12]), [12], 1)
  cache = filled(cache, [21, 22, 23, 24, 25, 26])
  cache.idle.looks = 0
  gone = order(cache)[:count]
  assert [h for h, _ in prefix_cache.doomed(cache, count)] == gone
  cache, _ = prefix_cache.alloc(cache, count)
  assert not set(gone) & set(of(cache)) and len(of(cache)) == 8 - count
  cache, _ = prefix_cache.alloc(cache, 1)
  assert cache.idle.looks < 60


def test_what_has_owners_is_not_evicted():
  cache = filled(pool(4), [11, 12, 13])
  cache, _ = prefix_cache.hold(cache, [11, 12])
  assert prefix_cache.num_free(cache) == 2
  with pytest.raises(ValueError, match='3 pages asked for'):
    prefix_cache.alloc(cache, 3)
  cache, ids = prefix_cache.alloc(cache, 2)
  assert ids == (2, 3) and set(of(cache)) == {11, 12}


def test_of_two_equal_pages_the_first_is_kept():
  cache, first = prefix_cache.alloc(pool(), 2)
  cache, second = prefix_cache.alloc(cache, 2)
  cache = prefix_cache.keep(cache, first, [11, 12])
  cache = prefix_cache.keep(cache, second, [11, 12])
  assert of(cache) == {11: (0, 1), 12: (1, 1)}
  cache = prefix_cache.release(cache, second, [11, 12], 2)
  assert prefix_cache.num_free(cache) == 6
  prefix_cache.check(cache, [first])


def test_what_is_not_full_is_not_kept():
  cache, ids = prefix_cache.alloc(pool(), 3)
  cache = prefix_cache.release(cache, ids, [11, 12, 13], 2)
  assert set(of(cache)) == {11, 12}


def test_a_hand_off_that_failed_keeps_nothing_new():
  cache, hit = prefix_cache.hold(filled(pool(), [11]), [11])
  cache, more = prefix_cache.alloc(cache, 2)
  cache = prefix_cache.release(cache, hit + more, [11, 12, 13], 0)
  assert of(cache) == {11: (0, 0)} and prefix_cache.num_free(cache) == 8


def test_emptied_is_of_the_same_kind():
  for cache in (pool(3), pool(3, True), page_pool.init(3),
                page_pool.counted(3)):
    assert prefix_cache.emptied(cache) == cache
    assert type(prefix_cache.emptied(cache)) is type(cache)
  assert type(prefix_cache.emptied(pool(3, True)).kept) is prefix_cache.Table


@pytest.mark.parametrize('change, words', [
    (lambda c: c._replace(pool=page_pool.init(4)), 'owned and free'),
    (lambda c: c._replace(kept=c.kept.set(11, Kept(0, 2, -1))),
     'page 0 is kept, not by 2 owners'),
    (lambda c: c._replace(kept=c.kept.set(11, Kept(0, 1, 5))), 'stamp 5'),
    (lambda c: c._replace(idle=c.idle.set(7, 11)), 'order of idle'),
    (lambda c: c._replace(next=0), 'beyond their bounds'),
    (lambda c: c._replace(kept=c.kept.delete(11)), 'pages leaked'),
])
def test_check_sees(change, words):
  cache, ids = prefix_cache.hold(filled(pool(4), [11, 12]), [11])
  owned = [ids] if 'leaked' not in words else []
  prefix_cache.check(cache, [ids])
  with pytest.raises(AssertionError, match=words):
    prefix_cache.check(change(cache), owned)


class Model:
  """What is kept, as lists: an LRU of pages by hash."""

  def __init__(self, num_pages):
    self.num_pages, self.lru, self.held = num_pages, [], {}
    self.private = 0

  def free(self):
    return self.num_pages - len(self.held) - self.private

  def take(self, hashes, count):
    hits = 0
    while hits < len(hashes) and (hashes[hits] in self.lru
                                  or hashes[hits] in self.held):
      hits += 1
    for hash in hashes[:hits]:
      self.held[hash] = self.held.get(hash, 0) + 1
      if hash in self.lru:
        self.lru.remove(hash)
    self.private += count - hits
    while self.private + len(self.held) + len(self.lru) > self.num_pages:
      del self.lru[0]
    return hits

  def give(self, hashes, hits, count):
    for place in reversed(range(count)):
      hash = hashes[place] if place < len(hashes) else None
      if place >= hits:
        self.private -= 1
        if hash is not None and hash not in self.held and (
            hash not in self.lru):
          self.lru.append(hash)
        continue
      self.held[hash] -= 1
      if not self.held[hash]:
        del self.held[hash]
        self.lru.append(hash)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.booleans())
def test_any_order_of_requests_as_the_model_says(data, in_place):
  cache, model, running = pool(7, in_place), Model(7), []
  for _ in range(data.draw(st.integers(1, 25))):
    if running and data.draw(st.booleans()):
      hashes, hits, ids = running.pop(data.draw(
          st.integers(0, len(running) - 1)))
      cache = prefix_cache.release(cache, ids, hashes, len(hashes))
      model.give(hashes, hits, len(ids))
    else:
      stem = data.draw(st.sampled_from([1, 2, 3]))
      depth = data.draw(st.integers(0, 4))
      hashes = [1 + 10 * k if k < 2 else stem + 10 * k for k in range(depth)]
      count = depth + data.draw(st.integers(1, 2))
      hits = prefix_cache.hits(cache, hashes)
      idle = sum(not entry.owners for entry in hits)
      if count - len(hits) > prefix_cache.num_free(cache) - idle:
        continue
      cache, ids = prefix_cache.hold(cache, hashes[:len(hits)])
      cache, more = prefix_cache.alloc(cache, count - len(hits))
      assert model.take(hashes, count) == len(hits)
      running.append((hashes, len(hits), ids + more))
    prefix_cache.check(cache, [ids for *_, ids in running])
    assert prefix_cache.num_free(cache) == model.free()
    assert order(cache) == model.lru


# --- hashes -----------------------------------------------------------------


def test_equal_beginnings_have_equal_hashes_and_no_others():
  first = blocks.hashes(range(10), 4)
  assert len(first) == 2
  assert blocks.hashes([*range(8), 99, 98, 97, 96], 4)[:2] == first
  assert blocks.hashes([1, *range(1, 8)], 4)[1] != first[1]
  assert blocks.hashes([4, 5, 6, 7], 4)[0] != first[1]
  assert blocks.hashes(range(4, 10), 4, before=first[0]) == first[1:]
  assert blocks.hashes(range(3), 4) == blocks.hashes([], 4) == ()


def test_pages_of_several_blocks():
  assert blocks.size_for([16, 24]) == 8
  small = blocks.hashes(range(40), 8)
  assert blocks.of_pages(small, 8, 8) == small
  assert blocks.of_pages(small, 16, 8) == (small[1], small[3])
  assert blocks.of_pages(small, 24, 8) == (small[2],)


def test_resized_blocks():
  assert blocks.resized((5, 7, 9), 8, 16) == (7,)
  assert blocks.resized((5, 7), 16, 4) == (20, 21, 22, 23, 28, 29, 30, 31)
  with pytest.raises(ValueError, match='block_tokens=6.*multiple'):
    blocks.resized((5,), 6, 4)
