"""Copies that have ended, other than hand-offs, as transitions of a Run.

To host memory and from there, and of kept pages from another instance; see
host_tier.py, swapping.py and loading.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsjax.scheduling import (
  batches,
  host_tier,
  loading,
  residents,
  swapping,
)
from dsjax.scheduling.events import Loaded, LoadFailed, Offloaded
from dsjax.scheduling.live import LiveSeq
from dsjax.scheduling.state import ImpossibleEvent

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run


def offloaded(run: Run, e: Offloaded) -> None:
  """The slots of an Offload are hits from now on, or hold a row; or, where it
  failed, they are free again."""
  inst = (run.instances[e.instance]
          if 0 <= e.instance < len(run.instances) else None)
  if inst is None or inst.host is None or e.number >= inst.host.number:
    raise ImpossibleEvent(f'{e}: no such offload')
  if swapping.went(run, inst, e.number, e.failed):
    return
  for entry in inst.host.offloads:
    if entry[0] == e.number:
      _, slots, hashes = entry
      inst.host = inst.host._replace(offloads=tuple(
          [other for other in inst.host.offloads if other is not entry]))
      host_tier.release(inst, slots[::-1], hashes[::-1], not e.failed)
      # Who is first in the queue may load now; a quiet run has no queue.
      inst.fresh, inst.value = inst.fresh or bool(inst.queue), None


def loaded(run: Run, e: Loaded | LoadFailed) -> None:
  """A request has its pages from host memory, or computes them.

  Raises:
    ImpossibleEvent: it is not the one that is awaited.
  """
  seq = run.seqs.get(e.id)
  if seq is None or e.epoch < seq.epoch:
    return
  if e.epoch > seq.epoch:
    raise ImpossibleEvent(f'{e}: its last copy is {seq.epoch}')
  entry = loading.entry_of(run, seq)
  if entry is not None and entry.lender < 0:
    go_on(run, run.own(e.id), isinstance(e, Loaded))


def go_on(run: Run, seq: LiveSeq, whole: bool) -> None:
  """The copy that a request waits for has ended, well or not."""
  inst, entry = run.touch(seq.instance), loading.entry_of(run, seq)
  was_row = seq.done == seq.prompt_len
  tokens = loading.let_go(run, inst, entry, whole) if entry else 0
  if was_row and not whole:
    seq.done = 0  # none of its pages is to be kept
  if seq.stage == 'abandoned':
    run.drop(seq)
  elif was_row and whole:
    residents.keep(inst, seq, 0, seq.done)
    batches.join(run, inst, seq)
  elif was_row:
    residents.free(run, seq)
    swapping.again(run, seq)
  else:
    if whole:
      start, seq.done = seq.done, seq.done + tokens
      residents.keep(inst, seq, start, seq.done)
      inst.backlog -= tokens
    run.move(seq, 'prefilling')
    inst.prefilling.append(seq.id)


APPLY: dict[type, Callable[..., None]] = {
    Offloaded: offloaded, Loaded: loaded, LoadFailed: loaded}
