"""Quiet runs: what an instance will decide while only completions happen.

A simulator leaps over them; see scheduler.Run.quiet and Run.follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsjax.scheduling import batches, prefix_cache
from dsjax.scheduling.events import RunDecode

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run

Told = tuple[list[int], list[int]]  # micro-batches in turn, steps of each


def tell(run: Run, index: int, most: int) -> Told | None:
  """The decode commands that will follow those in flight, told in advance.

  As long as nothing but completions happens to the instance, each of them is
  answered by one of these commands, their rows the same. It sleeps from now
  on: no apply for its completions, but one `follow` for all of them, at the
  latest when the commands told here have been issued.

  Args:
    run: a scheduler.Run. most: commands to tell.

  Returns:
    (micro-batches in turn, steps of each command), or None where something
    is to be decided: a row ends or pages may be short soon, or work waits
    that may find room at a completion.
  """
  inst, depth = run.instances[index], run.config.depth
  if (inst.asleep or inst.ending or inst.queue or inst.prefilling
      or len(inst.inflight) < inst.depth):
    return None
  pp = len(inst.batches)
  order = [g % pp for g in range(inst.turn, inst.turn + pp)
           if inst.batches[g % pp].size]
  if (not order or [g for _, g in inst.inflight] != order * depth
      or any([type(c) is not RunDecode for c, _ in inst.inflight])):
    return None
  turns = [inst.batches[g] for g in order]
  ticks = min([b.end(run.seqs) - b.tick for b in turns])
  if ticks > 1:
    ticks = min(ticks, _covered(inst, turns))
  if pp == 1 and not inst.pulls and inst.residents == turns[0].size:
    ticks = min(ticks, most * inst.run_ahead)
    steps = _boundaries(turns[0], ticks, inst)
  else:
    steps = [1] * (min(ticks - 1, most // len(turns)) * len(turns))
  if len(steps) < 2:
    return None
  inst.asleep = True
  return order, steps


def follow(run: Run, index: int, told: Told, count: int) -> None:
  """Ends a quiet run in which `count` of its commands have been issued.

  The commands in flight then carry the rows as they are now.
  """
  inst, (order, steps) = run.instances[index], told
  inst.asleep = False
  sent, rows = [], []
  for n in range(count):
    g = order[n % len(order)]
    batch = inst.batches[g]
    if batch.until() <= batch.tick:
      rows += [(batch, id) for id in batch.renew(
          run.seqs, inst.config.page_size)]
    sent.append((inst.number + n, batch.tick, steps[n], g))
    batch.tick += steps[n]
  if rows:
    batches.extend(run, inst, rows)
  for number, tick, n, g in sent[-len(inst.inflight):]:
    inst.inflight.popleft()
    inst.inflight.append((RunDecode(
        index, number, tick, n, inst.batches[g].row_values()), g))
  if count:
    inst.turn, inst.value = (g + 1) % len(inst.batches), None
    inst.number += count


def _covered(inst, turns):
  """Ticks of these micro-batches for which the free pages suffice."""
  # Each row wants a page when it is due and then every page_size ticks.
  due = []
  for batch in turns:
    for tick, ids in (batch.due or batch.sort()).items():
      due += [tick - batch.tick] * len(ids)
  free = prefix_cache.num_free(inst.pool)
  if inst.host:  # what is evicted is to be told
    free -= prefix_cache.num_idle(inst.pool)
  rounds, more = divmod(free, len(due))
  return sorted(due)[more] + rounds * inst.config.page_size


def _boundaries(batch, ticks, inst):
  """Steps of the commands of the next `ticks` ticks, the last left out."""
  tick, stop, steps = batch.tick, batch.tick + ticks, []
  due = {t for start, ids in (batch.due or batch.sort()).items() if ids
         for t in range(start, stop, inst.config.page_size)}
  due.add(stop)
  for until in sorted(due):
    while tick < until:
      steps.append(min(until - tick, inst.run_ahead))
      tick += steps[-1]
  return steps[:-1]
