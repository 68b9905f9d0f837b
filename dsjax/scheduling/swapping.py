"""Rows that are preempted go to host memory, and come back as rows.

Where an instance has slots of host memory (host_tier.py), a row that is
preempted goes there with all its pages, if there is room, and if that is
predicted to take less time than to compute them again; always, where nothing
predicts. It is `swapped`, and comes back to where it was by a Load, the first
to arrive first, before anything else is admitted there. What cannot be copied,
either way, is computed again; it costs the request no try.

Functions of a scheduler.Run, and of its instances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsjax.scheduling import (
  host_tier,
  loading,
  page_pool,
  prefix_cache,
  residents,
  streaming,
)
from dsjax.scheduling.events import Load, Offload, Preempt
from dsjax.scheduling.live import LiveInstance, LiveSeq
from dsjax.scheduling.state import Loading

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run


def swap(run: Run, inst: LiveInstance, seq: LiveSeq) -> bool:
  """Sends a preempted request to host memory, if it may and that pays.

  Only one that has had a token, and lacks the KV of no other but its newest.

  Returns:
    whether it went; else it still has its pages.
  """
  host = inst.host
  if (host is None or not inst.able.decodes or seq.first_s is None
      or seq.done + 1 != seq.prompt_len):
    return False
  count = page_pool.pages_for(seq.done, inst.page_size)
  if count > prefix_cache.num_free(host.slots) or not _pays(run, inst, seq):
    return False
  slots, ids = prefix_cache.alloc(host.slots, count)
  swapped = sorted((*host.swapped, (seq.id, ids, host.number)),
                   key=lambda entry: run.seqs[entry[0]].order)
  inst.host = host._replace(slots=slots, number=host.number + 1,
                            swapped=tuple(swapped))
  run.commands += (
      Preempt(seq.id, inst.index, 'swap'),
      Offload(inst.index, host.number, seq.pages[:count], ids, seq.done))
  residents.free(run, seq)
  seq.pages, seq.prompt_len = (), seq.done
  seq.stop = seq.done
  run.move(seq, 'swapped')
  return True


def _pays(run, inst, seq):
  """Whether to write and read a row's KV is predicted to take less time than
  to compute it where that is soonest done, and to hand it off."""
  link = run.config.host_link
  if link is None or inst.latency is None:
    return True
  again_s = min([entry.latency.prefill_s(((len(prefix_cache.hits(
      entry.pool, entry.hashes(seq)[:seq.done // entry.page_size]))
      * entry.page_size, seq.prompt_len),))
      for entry in run.open_entries], default=float('inf'))
  if run.config.link is not None and not inst.able.prefills:
    again_s += run.config.link.migrate_s(seq.done)
  return 2 * link.migrate_s(seq.done) < again_s


def come_back(run: Run, inst: LiveInstance) -> None:
  """Starts the loads of swapped rows for which there is room, in order."""
  while inst.host.swapped and not loading.is_full(inst):
    id, slots, number = inst.host.swapped[0]
    seq, size = run.seqs[id], inst.page_size
    if number >= 0:
      return
    taken = residents.take(run, inst, seq, seq.done + 1, seq.done, size)
    if taken is None:
      if streaming.give_way(run, inst):
        continue
      return
    seq = run.own(id)
    (seq.pages, hit), seq.sent = taken, 0
    seq.epoch += 1
    inst.host = inst.host._replace(swapped=inst.host.swapped[1:])
    inst.loading, inst.value = (*inst.loading, Loading(id, -1, slots)), None
    run.move(seq, 'loading')
    first = hit // size
    run.commands.append(Load(id, seq.epoch, inst.index, slots[first:],
                             seq.pages[first:len(slots)], seq.done - hit, hit,
                             True))


def give_up(run: Run, seq: LiveSeq) -> None:
  """A swapped request has ended: its slots are free, once what is on its way
  to them has come."""
  inst = run.touch(seq.instance)
  _, slots, number = _remove(inst, seq)
  if number < 0:
    host_tier.release(inst, slots)
  else:
    inst.host = inst.host._replace(
        offloads=(*inst.host.offloads, (number, slots, ())))


def again(run: Run, seq: LiveSeq) -> None:
  """A swapped request is computed again, with the tokens that are out."""
  run.commands.append(Preempt(seq.id, seq.instance, 'fault'))
  seq.pages, seq.prompt_len, seq.done = (), seq.prompt_len + 1, 0
  run.enqueue(seq)


def went(run: Run, inst: LiveInstance, number: int, failed: bool) -> bool:
  """Offload `number` is over; whether it was that of a row."""
  for entry in inst.host.swapped:
    if entry[2] == number:
      run.touch(inst.index)
      if failed:
        seq = run.own(entry[0])
        host_tier.release(inst, _remove(inst, seq)[1])
        again(run, seq)
      else:
        inst.host = inst.host._replace(swapped=tuple(
            [(*other[:2], -1) if other is entry else other
             for other in inst.host.swapped]))
      return True
  return False


def _remove(inst, seq):
  """Takes a request off those that are swapped: its entry."""
  entry, = [entry for entry in inst.host.swapped if entry[0] == seq.id]
  inst.host = inst.host._replace(swapped=tuple(
      [other for other in inst.host.swapped if other is not entry]))
  return entry
