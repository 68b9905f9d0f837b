"""What requests hold on instances: their pages, and what is kept of them.

Functions of a scheduler.Run, and of its instances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsjax.scheduling import choices, host_tier, loading, prefix_cache
from dsjax.scheduling.events import (
  DecodeDone,
  PrefillDone,
  RunDecode,
  RunPrefill,
)
from dsjax.scheduling.live import LiveInstance, LiveSeq
from dsjax.scheduling.state import ImpossibleEvent, room

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run


def take(run: Run, inst: LiveInstance, seq: Any, tokens: int, stop: int,
         unit: int, loads: bool = False
         ) -> tuple[tuple[int, ...], int] | None:
  """Pages for a new resident holding `tokens` tokens; None: it must wait.

  loads: what its host or its lender has of it is to be copied (loading.py).

  Returns:
    (pages, how many of its first `stop` tokens are there already: a multiple
    of `unit`, and not all).
  """
  size = inst.page_size
  known: Sequence[int] = ()
  hits: list[prefix_cache.Kept] = []
  hit = 0
  if inst.block_size:
    known = inst.hashes(seq)[:(stop - 1) // unit * unit // size]
    hits = prefix_cache.hits(inst.pool, known)
    hit = len(hits) * size // unit * unit
    del hits[hit // size:]
  need = room(inst, inst.config, tokens, hits)
  if not need or not choices.admits(run, inst, seq, need):
    return None
  ids: tuple[int, ...] = ()
  if hits:
    inst.pool, ids = prefix_cache.hold(inst.pool, known[:len(hits)])
  if loads and (inst.host or seq.lender >= 0):
    loading.pin(run, inst, seq, hit)
  more = alloc(run, inst, need)
  inst.residents += 1
  return ids + more, hit


def take_over(run: Run, inst: LiveInstance, seq: Any, stop: int
              ) -> tuple[tuple[int, ...], int] | None:
  """Pages for a request whose KV comes from another instance, as `take`: of
  its first `stop` tokens, what is there is whole pages of both."""
  sizes = (run.instances[seq.instance].page_size,
           inst.page_size)
  return take(run, inst, seq, min(seq.prompt_len + 1, seq.limit - 1), stop,
              math.lcm(*sizes))


def alloc(run: Run, inst: LiveInstance, count: int) -> tuple[int, ...]:
  """Takes pages; what is evicted for them goes to the host, if there is."""
  if inst.host and inst.able.prefills:
    host_tier.offload(run, inst, count)
  inst.pool, ids = prefix_cache.alloc(inst.pool, count)
  inst.value = None
  return ids


def free(run: Run, seq: LiveSeq) -> None:
  """A request gives its pages back; what is full of them is kept."""
  inst = run.touch(seq.instance)
  inst.pool = prefix_cache.release(inst.pool, seq.pages, inst.hashes(seq),
                                   seq.done // inst.page_size)
  inst.residents -= 1


def free_target(run: Run, seq: LiveSeq) -> None:
  """The target of its hand-off writes no more, and keeps nothing new."""
  inst = run.touch(seq.target)
  inst.pool = prefix_cache.release(inst.pool, seq.target_pages,
                                   inst.hashes(seq), 0)
  inst.residents -= 1
  if seq.stage == 'prefilling':
    inst.streams.remove(seq.id)
    seq.hit, seq.sent = 0, -1
  seq.target, seq.target_pages = -1, ()


def keep(inst: LiveInstance, seq: Any, start: int, stop: int) -> None:
  """Full pages of tokens [start, stop) are there: others may have them."""
  size = inst.page_size
  pages = slice(start // size, stop // size)
  inst.pool = prefix_cache.keep(inst.pool, seq.pages[pages],
                                inst.hashes(seq)[pages])


def learn(run: Run, e: PrefillDone | DecodeDone,
          command: RunPrefill | RunDecode) -> None:
  """What the requests that end with a command have generated.

  Raises:
    ImpossibleEvent: it has not filled these blocks.
  """
  written = {row.id: row.base + command.tick + command.steps
             for row in command.rows}
  written.update((c.id, c.stop) for c in command.chunks if c.last)
  for id, more in e.blocks:
    known = len(run.seqs[id].blocks) + len(more) if id in written else 0
    if not 0 < known * run.config.block_size <= written.get(id, 0):
      raise ImpossibleEvent(f'{e}: it does not fill these blocks of {id}')
    run.own(id).blocks += more
