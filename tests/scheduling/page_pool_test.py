"""The page pool against hand-written cases and a plain set of free pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.scheduling import page_pool


def _pool(num_pages, *free):
  return page_pool.Pool(num_pages, sum(1 << page for page in free))


def _free(pool):
  return {page for page in range(pool.num_pages) if pool.free >> page & 1}


def test_a_new_pool_is_all_free():
  assert page_pool.init(5) == _pool(5, 0, 1, 2, 3, 4)
  assert page_pool.num_free(page_pool.init(5)) == 5


@pytest.mark.parametrize('tokens, size, count', [
    (0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (7, 1, 7)])
def test_pages_for(tokens, size, count):
  assert page_pool.pages_for(tokens, size) == count


@pytest.mark.parametrize('free, count, taken', [
    ((0, 1, 2, 3), 0, ()),
    ((0, 1, 2, 3), 3, (0, 1, 2)),  # one contiguous run
    ((4, 5, 6), 3, (4, 5, 6)),
    ((1, 3, 6), 2, (1, 3)),  # single pages, lowest first
    ((1, 3, 4, 5, 7), 4, (1, 3, 4, 5)),  # a page, then a run
    ((0, 1, 3, 7), 4, (0, 1, 3, 7))])
def test_alloc_takes_the_lowest(free, count, taken):
  pool, got = page_pool.alloc(_pool(8, *free), count)
  assert got == taken
  assert _free(pool) == set(free) - set(taken)


def test_alloc_beyond_the_free_pages_raises():
  with pytest.raises(ValueError, match='3 pages asked for, 2 free'):
    page_pool.alloc(_pool(8, 2, 5), 3)


def test_release_gives_back_in_any_order():
  assert page_pool.release(_pool(8, 0), (5, 2)) == _pool(8, 0, 2, 5)
  assert page_pool.release(_pool(8, 0), ()) == _pool(8, 0)


@pytest.mark.parametrize('given_back, named', [
    ((3, 0), 0),  # free already
    ((3, 4, 3), 3),  # twice
    ((8,), 8)])  # not of this pool
def test_release_of_what_is_not_owned_raises(given_back, named):
  with pytest.raises(ValueError, match=f'page {named} released'):
    page_pool.release(_pool(8, 0, 1), given_back)


def test_check_accepts_a_partition():
  page_pool.check(_pool(6, 1, 4), [(0, 3), (), (5, 2)])


@pytest.mark.parametrize('owned, message', [
    ([(0, 3)], 'leaked: 2 of 6'),
    ([(0, 3), (2, 5, 3)], 'page 3 owned twice'),
    ([(0, 3, 0), (2, 5)], 'page 0 owned twice'),
    ([(0, 3, 1), (2, 5)], 'page 1 owned twice, or owned and free')])
def test_check_finds_leaks_and_two_owners(owned, message):
  with pytest.raises(AssertionError, match=message):
    page_pool.check(_pool(6, 1, 4), owned)


@given(st.integers(1, 70), st.lists(st.integers(-8, 40), max_size=30))
def test_against_a_set(num_pages, actions):
  """At or above 0: take that many; below: give back an owner's pages."""
  pool, free, owned = page_pool.init(num_pages), set(range(num_pages)), []
  for action in actions:
    if action > len(free):
      with pytest.raises(ValueError, match='asked for'):
        page_pool.alloc(pool, action)
    elif action >= 0:
      pool, got = page_pool.alloc(pool, action)
      assert list(got) == sorted(free)[:action]
      free -= set(got)
      owned.append(got)
    elif owned:
      got = owned.pop(action % len(owned))
      pool = page_pool.release(pool, got)
      free |= set(got)
    assert _free(pool) == free and page_pool.num_free(pool) == len(free)
    page_pool.check(pool, owned)


@given(st.lists(st.integers(0, 12), max_size=30))
def test_a_counted_pool_counts_as_one_with_ids(sizes):
  """A size: allocated where it fits, else the oldest is released."""
  pools, held = [page_pool.init(40), page_pool.counted(40)], []
  for size in sizes:
    if size > page_pool.num_free(pools[1]):
      for n, pages in enumerate(held.pop(0)):
        pools[n] = page_pool.release(pools[n], pages)
    else:
      pools, pages = zip(*(page_pool.alloc(pool, size) for pool in pools),
                         strict=True)
      pools = list(pools)
      held.append(pages)
      assert [len(each) for each in pages] == [size, size]
    assert len({page_pool.num_free(pool) for pool in pools}) == 1
    for n, pool in enumerate(pools):
      page_pool.check(pool, [pages[n] for pages in held])


def test_a_counted_pool_refuses_what_one_with_ids_does():
  pool, pages = page_pool.alloc(page_pool.counted(4), 3)
  with pytest.raises(ValueError, match='2 pages asked for, 1 free'):
    page_pool.alloc(pool, 2)
  with pytest.raises(ValueError, match='4 pages released'):
    page_pool.release(pool, (*pages, 0))
  with pytest.raises(AssertionError, match='1 pages free and 2 owned, of 4'):
    page_pool.check(pool, [pages[:2]])
