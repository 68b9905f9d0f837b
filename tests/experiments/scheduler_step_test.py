"""The bench of scheduler.step: that it measures what it says. No times."""

import pytest

from dsjax.scheduling import prefix_cache, scheduler
from dsjax.scheduling.events import Offload
from experiments.bench import scheduler_step


@pytest.mark.parametrize('kept', [None, (0, 0), (90, 0), (90, 40)])
def test_a_page_that_is_taken_evicts_one_where_many_are_kept(kept):
  busy = scheduler_step.Busy(kept, running=8, waiting=5)
  evicted, copied = set(), 0
  for _ in range(40):
    before = getattr(busy.state.instances[0].pool, 'kept', {})
    busy.next()
    inst, = busy.state.instances
    assert len(inst.rows) == 8 and len(inst.queue) == 5
    evicted |= set(before) - set(getattr(inst.pool, 'kept', {}))
    copied += sum(isinstance(c, Offload) for c in busy.pending)
  scheduler.check(busy.state)
  assert isinstance(inst.pool, prefix_cache.Cache) == (kept is not None)
  pages, slots = kept or (0, 0)
  assert bool(evicted) == bool(pages) and all(hash < 0 for hash in evicted)
  assert bool(copied) == bool(slots)
  if slots:
    on_the_way = [slot for _, ids, _ in inst.host.offloads for slot in ids]
    assert len(inst.host.slots.kept) + len(on_the_way) == slots
    assert max(inst.host.slots.kept) > -pages  # they came from pages


@pytest.mark.parametrize('what, count, want', [
    ('rows', 16, (16, 1000, 0)), ('waiting', 30, (256, 30, 0)),
    ('blocks kept', 20_000, (256, 1000, 20_000))])
def test_one_thing_grows_at_a_time(what, count, want):
  busy = scheduler_step.busy_with(what, count)
  inst, = busy.state.instances
  kept = getattr(inst.pool, 'kept', ())
  others = sum(hash < 0 for hash in kept)  # nobody asks for them
  assert (len(inst.rows), len(inst.queue), others) == want
