"""The second tier of a prefix cache: host memory, for what is evicted.

An instance may have slots of host memory, each of one page. They are known by
hash and evicted least recently used, as pages are: a Cache of slots
(prefix_cache.Host).

- A kept page that is evicted from an instance that takes prompts goes to a
  slot, unless its hash has one. The Offload comes before whatever writes the
  page anew, and the device runs what it is given in order.
- A slot is a hit once its copy has ended, no sooner (copied.py). How it comes
  back is told in loading.py.
- Rows that are preempted may go there too (swapping.py).
- What the host has of an instance is forgotten when the instance is lost.

Functions of a scheduler.Run, and of its instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsjax.scheduling import prefix_cache
from dsjax.scheduling.events import Offload
from dsjax.scheduling.live import LiveInstance

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run


def offload(run: Run, inst: LiveInstance, count: int) -> None:
  """Before `count` pages are taken: what this evicts goes to the host.

  What is there already is as new. Of more than has room it is the last that
  are evicted: those used last, and the beginnings of prompts.
  """
  host = inst.host
  evicted = prefix_cache.doomed(inst.pool, count)
  if not evicted:
    return
  slots, fresh = host.slots, []
  for hash, page in evicted:
    if hash in slots.kept:
      slots, ids = prefix_cache.hold(slots, (hash,))
      slots = prefix_cache.release(slots, ids, (hash,), 1)
    else:
      fresh.append((hash, page))
  room = prefix_cache.num_free(slots)
  fresh = fresh[max(0, len(fresh) - room):]
  number = host.number
  if fresh:
    hashes, pages = zip(*fresh, strict=True)
    slots, ids = prefix_cache.alloc(slots, len(pages))
    host = host._replace(offloads=(*host.offloads, (number, ids, hashes)),
                         number=number + 1)
    run.commands.append(Offload(
        inst.index, number, pages, ids, len(ids) * inst.page_size))
  inst.host, inst.value = host._replace(slots=slots), None


def waits(inst: LiveInstance) -> bool:
  """Whether a swapped row waits to come back: nothing else is admitted."""
  return bool(inst.host and inst.host.swapped)


def release(inst: LiveInstance, slots: Sequence[int],
            hashes: Sequence[int] = (), whole: bool = True) -> None:
  """An owner gives slots back: those of these hashes stay, unless they are
  not whole, the first of them to be evicted first."""
  inst.host = inst.host._replace(slots=prefix_cache.release(
      inst.host.slots, slots, hashes, len(slots) if whole else 0))
