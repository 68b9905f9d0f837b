"""The second tier of a prefix cache: host memory, for what is evicted.

An instance that takes prompts may have slots of host memory, each of one page.
They are known by hash and evicted least recently used, as pages are: a Cache
of slots (prefix_cache.Host).

- A kept page that is evicted goes to a slot, unless its hash has one. The
  Offload comes before whatever writes the page anew, and the device runs what
  it is given in order. A slot is a hit once its copy has ended, no sooner.
- A request whose prompt goes on, after its hits in the instance's memory, with
  hits there takes pages for them and is `loading`. Nothing waits for it: others
  of its queue may be computed before it. Then it is `prefilling` as any other,
  with that much less to compute.
- Its slots have it as an owner until its copy has ended, well or not. After a
  copy that failed they are forgotten, and the tokens are computed.
- A load is taken where it is predicted to end sooner than the tokens are
  computed; always, where nothing predicts. AHEAD are in flight at a time.
- What the host has of an instance is forgotten when the instance is lost.

Functions of a scheduler.Run, and of its instances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dsjax.scheduling import prefix_cache
from dsjax.scheduling.events import (
  Load,
  Loaded,
  LoadFailed,
  Offload,
  Offloaded,
)
from dsjax.scheduling.live import LiveInstance, LiveSeq
from dsjax.scheduling.state import ImpossibleEvent

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run

AHEAD = 2


# --- from the instance to its host ------------------------------------------


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
        inst.index, number, pages, ids, len(ids) * inst.config.page_size))
  inst.host, inst.value = host._replace(slots=slots), None


def offloaded(run: Run, e: Offloaded) -> None:
  """The slots of an Offload are hits from now on, or free again."""
  inst = (run.instances[e.instance]
          if 0 <= e.instance < len(run.instances) else None)
  if inst is None or inst.host is None or e.number >= inst.host.number:
    raise ImpossibleEvent(f'{e}: no such offload')
  host = inst.host
  for entry in host.offloads:
    if entry[0] == e.number:
      _, ids, hashes = entry
      inst.host = host._replace(
          slots=prefix_cache.release(  # the first to go there goes first
              host.slots, ids[::-1], hashes[::-1],
              0 if e.failed else len(ids)),
          offloads=tuple([other for other in host.offloads
                          if other is not entry]))
      # Who is first in the queue may load now; a quiet run has no queue.
      inst.fresh, inst.value = inst.fresh or bool(inst.queue), None


# --- and back ----------------------------------------------------------------


def hits(inst: LiveInstance, seq: Any, start: int, stop: int
         ) -> Sequence[int]:
  """The hashes of the pages, from token `start` on, that the host has of a
  request's first `stop` tokens; not all of these are needed."""
  size = inst.config.page_size
  hashes = inst.hashes(seq)[start // size:(stop - 1) // size]
  return hashes[:len(prefix_cache.hits(inst.host.slots, hashes))]


def pin(run: Run, inst: LiveInstance, seq: LiveSeq, start: int, stop: int
        ) -> None:
  """A request that takes pages will load what the host has behind token
  `start`, if that is worth it: its slots stay until then."""
  hashes = hits(inst, seq, start, stop)
  if hashes and pays(run, inst, seq, start,
                     start + len(hashes) * inst.config.page_size):
    host = inst.host
    slots, ids = prefix_cache.hold(host.slots, hashes)
    inst.host = host._replace(slots=slots,
                              loading=(*host.loading, (seq.id, ids)))


def pays(run: Run, inst: LiveInstance, seq: Any, start: int, stop: int
         ) -> bool:
  """Whether to load tokens [start, stop) is predicted to take less time than
  to compute them."""
  link, latency = run.config.host_link, inst.latency
  if link is None or latency is None:
    return True
  spared_s = (latency.prefill_s(((start, seq.stop),))
              - latency.prefill_s(((stop, seq.stop),)))
  return link.migrate_s(stop - start) < spared_s


def load(run: Run, inst: LiveInstance, seq: LiveSeq) -> bool:
  """A request has taken its pages: starts its load, if it has slots."""
  loading = inst.host.loading
  if not loading or loading[-1][0] != seq.id:
    return False
  slots, first = loading[-1][1], seq.done // inst.config.page_size
  seq.epoch += 1
  run.move(seq, 'loading')
  run.commands.append(Load(
      seq.id, seq.epoch, inst.index, slots,
      seq.pages[first:first + len(slots)],
      len(slots) * inst.config.page_size, seq.done))
  return True


def loads(run: Run, inst: LiveInstance, seq: Any) -> bool:
  """Whether a request, in the queue, is to load when it is admitted."""
  size = inst.config.page_size
  start = size * len(prefix_cache.hits(
      inst.pool, inst.hashes(seq)[:(seq.stop - 1) // size]))
  count = len(hits(inst, seq, start, seq.stop))
  return bool(count) and pays(run, inst, seq, start, start + count * size)


def is_full(inst: LiveInstance) -> bool:
  """Whether no other load may start now."""
  return len(inst.host.loading) >= AHEAD


def loaded(run: Run, e: Loaded) -> None:
  """A request has its pages: it goes on with the rest of its prompt."""
  seq = _copied(run, e)
  if seq is None:
    return
  inst, start = run.touch(seq.instance), seq.done
  slots, hashes = _taken(inst, seq)
  inst.host = inst.host._replace(slots=prefix_cache.release(
      inst.host.slots, slots, hashes, len(slots)))
  first = start // inst.config.page_size
  inst.pool = prefix_cache.keep(
      inst.pool, seq.pages[first:first + len(slots)], hashes)
  seq.done += len(slots) * inst.config.page_size
  _go_on(run, inst, seq, start)


def load_failed(run: Run, e: LoadFailed) -> None:
  """A request computes its tokens; the slots may be bad, so they go."""
  seq = _copied(run, e)
  if seq is None:
    return
  inst = run.touch(seq.instance)
  slots, hashes = _taken(inst, seq)
  inst.host = inst.host._replace(slots=prefix_cache.forget(
      inst.host.slots, slots, hashes))
  _go_on(run, inst, seq, seq.done)


def _copied(run, e):
  """The request whose load this is about; None where it is over."""
  seq = run.seqs.get(e.id)
  if seq is None or e.epoch < seq.epoch:
    return None
  if e.epoch > seq.epoch:
    raise ImpossibleEvent(f'{e}: its last copy is {seq.epoch}')
  host = run.instances[seq.instance].host
  return run.own(e.id) if host is not None and any(
      [id == e.id for id, _ in host.loading]) else None


def _taken(inst, seq):
  """Takes a request off those that load: (its slots, their hashes)."""
  slots, = [slots for id, slots in inst.host.loading if id == seq.id]
  inst.host = inst.host._replace(loading=tuple(
      [entry for entry in inst.host.loading if entry[0] != seq.id]))
  first = seq.done // inst.config.page_size
  return slots, inst.hashes(seq)[first:first + len(slots)]


def _go_on(run, inst, seq, start):
  if seq.stage == 'abandoned':
    run.drop(seq)
    return
  inst.backlog -= seq.done - start
  run.move(seq, 'prefilling')
  inst.prefilling.append(seq.id)


APPLY: dict[type, Callable[..., None]] = {
    Offloaded: offloaded, Loaded: loaded, LoadFailed: load_failed}
