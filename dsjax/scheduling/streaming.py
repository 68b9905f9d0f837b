"""Streamed KV: pages of a long prompt leave while its next chunk runs.

Functions of a scheduler.Run; Config.stream_kv turns them on.

A prompt that runs in chunks on an instance that will not decode it gets pages
for all of it at its target with the first of these chunks for which there is
room. What each chunk completes then follows it as a part (a Migrate with
`more`), issued right behind the RunPrefill, so that on the device it is read
after this chunk and before the next one. The last chunk's completion sends the
rest, as the hand-off of any prompt, and its Migrated ends them all: parts and
rest have one epoch.

A stream is help that nothing waits for. A hand-off of a finished prompt or a
row that lacks pages takes those of a stream, the youngest first. A stream that
ends early, for this or by a fault, costs the request no try: its prefill goes
on, and its KV goes over whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsjax.scheduling import choices, host_tier, page_pool, residents
from dsjax.scheduling.events import Abort, Chunk, Migrate
from dsjax.scheduling.live import LiveInstance, LiveSeq

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run


def follow(run: Run, inst: LiveInstance, chunks: Iterable[Chunk]) -> None:
  """Sends the pages that the chunks of a RunPrefill just issued complete."""
  if inst.able.decodes and not inst.able.flips:
    return  # what is prefilled here decodes here
  for chunk in chunks:
    seq = run.own(chunk.id)
    if (chunk.last or seq.stop < seq.prompt_len or seq.sent < 0
        or not (seq.target_pages or _reserve(run, inst, seq))):
      continue
    sizes = inst.page_size, run.instances[seq.target].page_size
    unit = math.lcm(*sizes)
    stop, sent = chunk.stop // unit * unit, seq.sent
    if stop > seq.hit + sent:
      seq.sent = stop - seq.hit
      copy(run, seq, seq.hit, sent, stop, more=True)


def _reserve(run, inst, seq):
  """Gives a request all its pages at its target, if there is room now."""
  if seq.prompt_len + 1 >= seq.limit or not run.open_decoders:
    return False
  target, reason = choices.preferred(run, seq, -1)
  if target is inst or target.pulls or host_tier.waits(target):
    return False
  run.touch(target.index)
  taken = residents.take_over(run, target, seq, seq.prompt_len)
  if taken is None:
    return False
  seq.target, (seq.target_pages, seq.hit) = target.index, taken
  seq.epoch += 1
  target.streams.append(seq.id)
  choices.explain(run, seq, 'hand_off', target, reason)
  return True


def rest(run: Run, seq: LiveSeq) -> None:
  """A streamed prompt is done: sends what its last chunk has completed."""
  run.touch(seq.target).streams.remove(seq.id)
  run.move(seq, 'migrating')
  copy(run, seq, seq.hit, seq.sent, seq.done)
  seq.hit = seq.sent = 0


def copy(run: Run, seq: LiveSeq, hit: int, sent: int, stop: int,
         more: bool = False) -> None:
  """Sends tokens up to stop of a request that has pages at its target, but
  for the hit + sent that are there, or on their way."""
  start = hit + sent
  run.commands.append(Migrate(
      seq.id, seq.epoch, seq.instance,
      _pages(seq.pages, run.instances[seq.instance], start, stop),
      seq.target, _pages(seq.target_pages, run.instances[seq.target],
                         start, stop), stop - start, start, sent, more))


def _pages(pages: tuple[int, ...], inst: LiveInstance, start: int, stop: int
           ) -> tuple[int, ...]:
  """Those of tokens [start, stop): there may be room for tokens to come."""
  size = inst.page_size
  return pages[start // size:page_pool.pages_for(stop, size)]


def end(run: Run, seq: LiveSeq) -> None:
  """The target is told to write no more; its pages are free."""
  run.commands.append(Abort(seq.id, seq.epoch, seq.target))
  residents.free_target(run, seq)


def give_way(run: Run, inst: LiveInstance) -> bool:
  """Ends the youngest stream to an instance, for its pages; False: none."""
  if not inst.streams:
    return False
  end(run, run.own(inst.streams[-1]))
  return True
