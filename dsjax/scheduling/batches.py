"""What an instance does next: pulls, prefill batches, decode steps.

Functions of a scheduler.Run. Whatever an event has changed, `plan` then pulls
finished prefills, admits prompts and issues commands until nothing more can
start, and preempts where rows lack pages.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsjax.scheduling import (
  choices,
  host_tier,
  loading,
  prefix_cache,
  residents,
  streaming,
  swapping,
)
from dsjax.scheduling.events import Chunk, Row, RunDecode, RunPrefill
from dsjax.scheduling.live import LiveBatch, LiveInstance, LiveSeq
from dsjax.scheduling.policy import RequestView

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run

SIZE = operator.attrgetter('size')


def plan(run: Run) -> None:
  """Pulls and issues until nothing more can start.

  Only what has changed can start anything; one decision may change another
  instance.
  """
  fetches = run.policy.fetches
  if fetches:
    _ask_borrowers(run, [i.index for i in run.instances if i.fresh])
  while _is_fresh(run.instances):
    pools = [inst.pool for inst in run.instances] if fetches else ()
    for inst in run.decoders:
      if inst.fresh and inst.host:
        swapping.come_back(run, inst)
      if inst.fresh and inst.pulls:
        _pull(run, inst)
    for inst in run.instances:
      if inst.fresh:
        inst.fresh = False
        _issue(run, inst)
        if inst.queue and (inst.host or fetches):
          _fetch(run, inst)
    if fetches:
      _ask_borrowers(run, [inst.index for inst, pool in zip(
          run.instances, pools, strict=True) if inst.pool is not pool])


def _is_fresh(instances: Sequence[LiveInstance]) -> bool:
  """Whether one has changed since it was planned."""
  for inst in instances:
    if inst.fresh:
      return True
  return False


def _ask_borrowers(run: Run, changed: Sequence[int]) -> None:
  """Whose lender, one of these, has kept more may load it now; less: may need
  fewer pages, as hits are no longer cut to pages of both."""
  for inst in run.instances:
    if inst.queue and not inst.fresh:
      ids = inst.queue if run.policy.order else inst.queue[:1]
      inst.fresh = any([run.seqs[id].lender in changed for id in ids])


def _pull(run: Run, inst: LiveInstance) -> None:
  """Admits finished prefills, in order, while they fit."""
  while inst.pulls:
    pulls = choices.in_order(run, inst, inst.pulls)
    seq = run.seqs[pulls[0]]
    taken = None if host_tier.waits(inst) else residents.take_over(
        run, inst, seq, seq.done)
    if taken is None and inst.asleep:
      run.wake(inst.index)
      continue
    if taken is None:
      if streaming.give_way(run, inst):
        continue
      id = next(filter(functools.partial(_may_stay, run), pulls), -1) if (
          inst.able.flips and _is_stuck(run, inst)) else -1
      if id < 0:
        return
      inst.pulls.remove(id)
      inst.value = None
      seq = run.own(id)
      seq.target = -1
      join(run, run.touch(seq.instance), seq)
      continue
    inst.pulls.remove(seq.id)
    seq = run.own(seq.id)
    run.move(seq, 'migrating')
    seq.target_pages, hit = taken
    seq.epoch += 1
    streaming.copy(run, seq, hit, 0, seq.done)


def _may_stay(run: Run, id: int) -> bool:
  """Whether what waits to be pulled could go on where it is."""
  seq = run.seqs[id]
  return (run.instances[seq.instance].able.flips
          or seq.done < seq.prompt_len)


def _is_stuck(run: Run, inst: LiveInstance) -> bool:
  """Nothing here will free a page by itself: what is here waits to be
  pulled. Two flexible instances could wait for each other so."""
  return not (inst.inflight or inst.prefilling or inst.ending
              or inst.loading
              or any([entry.lender == inst.index for other in run.instances
                      for entry in other.loading])
              or any([batch.size for batch in inst.batches])
              or any([seq.target_pages and seq.target == inst.index
                      for seq in run.seqs.values()]))


def _fetch(run: Run, inst: LiveInstance) -> None:
  """Starts the loads of those that come next in the queue, while the
  instance is at work with others."""
  while inst.queue and not loading.is_full(inst):
    waiting = choices.in_order(run, inst, inst.queue)
    if not (loading.loads(run, inst, run.seqs[waiting[0]])
            and _admit(run, inst, run.seqs[waiting[0]])):
      return


def _issue(run: Run, inst: LiveInstance) -> None:
  while len(inst.inflight) < inst.depth:
    if not ((inst.queue or inst.prefilling) and _prefill(run, inst)
            or inst.able.decodes and _decode(run, inst)):
      return


def _send(run: Run, inst: LiveInstance, command: RunPrefill | RunDecode, g: int
         ) -> None:
  """Issues a command, of micro-batch g or of none (-1)."""
  inst.value = None
  inst.number += 1
  if inst.latency is not None and not inst.inflight:
    inst.since_s = run.now[0]
  inst.inflight.append((command, g))
  if g >= 0:
    inst.batches[g].flying += 1
  run.commands.append(command)


def _ready(run: Run, inst: LiveInstance, batch: LiveBatch) -> bool:
  """The micro-batch may have another command, and pages for its tick."""
  return batch.flying < run.config.depth and _cover(run, inst, batch)


def _prefill(run: Run, inst: LiveInstance) -> bool:
  """Issues the next prefill batch of prompts that wait; False when none can
  be.

  It holds the prompts, or pieces of them, that the policy's budget admits;
  a prompt longer than a whole budget goes alone and in pieces. Where the
  budget says so, and the instance mixes, one tick of every row of the
  micro-batch whose turn it is (it may have none) goes with them.
  """
  batch = inst.batches[inst.turn]
  # Before the policy is asked, as rows may be preempted for want of pages.
  if inst.able.mixes and not _ready(run, inst, batch):
    return False
  budget, whole, mixed = choices.budget(run, inst, batch)
  if not budget:
    return False
  rows = batch.row_values() if mixed else ()
  ordered: list[int] | None = None  # asked for once those begun are done
  chunks: list[Chunk] = []
  last = []
  while len(chunks) < inst.config.prefill_seqs and budget > 0:
    if ordered is None and run.policy.order and not inst.prefilling:
      ordered = list(choices.in_order(run, inst, inst.queue))
    seq = _candidate(run, inst, ordered, budget, bool(chunks) and whole)
    if seq is None:
      break
    if seq.stage == 'loading':
      continue
    start, stop = seq.done, min(seq.stop, seq.done + budget)
    chunks.append(Chunk(seq.id, start, stop, seq.pages,
                        stop == seq.prompt_len,
                        start if seq.stage == 'queued' else 0))
    if seq.stage == 'queued':
      run.move(seq, 'prefilling')
    seq.done = stop
    inst.backlog -= stop - start
    budget -= stop - start
    if stop == seq.stop:
      inst.prefilling.remove(seq.id)
    if stop == seq.prompt_len:
      last.append(seq)
  if not chunks:
    return False
  number = inst.number
  _send(run, inst, RunPrefill(inst.index, number, tuple(chunks),
                             batch.tick, rows),
            inst.turn if mixed else -1)
  if run.config.stream_kv:
    streaming.follow(run, inst, chunks)
  if mixed:
    _advance(run, inst, inst.turn, 1 if rows else 0)
  for seq in last:
    if not seq.target_pages and choices.stays(run, inst, seq):
      join(run, inst, seq, number)
  return True


def _candidate(run: Run, inst: LiveInstance, ordered: list[int] | None,
              budget: int, whole: bool) -> LiveSeq | None:
  """The next request of a prefill batch, admitted, or None. It may have to
  load first.

  ordered: the ids of its queue as the policy has them; None: by arrival, or of
  no use yet.
  """
  ids = inst.prefilling or (inst.queue if ordered is None else ordered)
  if not ids:
    return None
  seq = run.seqs[ids[0]]
  if whole and seq.stop - seq.done > budget:
    hit = (run.view.instances[inst.index].hit_tokens(RequestView(seq))
           if seq.stage == 'queued' and inst.block_size else seq.done)
    if seq.stop - hit > budget:
      return None
  if seq.stage == 'queued':
    if not _admit(run, inst, seq):
      return None
    if ordered:
      del ordered[0]
  return run.own(seq.id)


def _admit(run: Run, inst: LiveInstance, seq: Any) -> bool:
  """Gives the first of those that wait its pages; False: it must wait."""
  if host_tier.waits(inst) or (inst.loading and loading.is_full(inst)
                              and loading.loads(run, inst, seq)):
    return False
  # Where it will decode too: room for its first tick.
  taken = residents.take(
      run, inst, seq, min(seq.prompt_len + inst.decodes, seq.limit - 1),
      seq.stop, loading.unit_of(run, inst, seq), loads=True)
  if taken is None:
    return False
  inst.own_queue().remove(seq.id)
  seq = run.own(seq.id)
  (seq.pages, seq.done), seq.sent = taken, 0
  inst.backlog -= seq.done
  if not (inst.loading and loading.begin(run, inst, seq)):
    inst.prefilling.append(seq.id)
  return True


def join(run: Run, inst: LiveInstance, seq: LiveSeq, number: int = -1) -> None:
  """A request goes on where its KV is: with the rest of its prompt, or as a
  row of the instance's decode batch.

  number: the prefill command in flight whose token a row starts from.
  """
  if inst.asleep:
    if inst.asleep.join(run, seq):
      return
    run.wake(inst.index)
  if seq.done < seq.prompt_len:
    run.move(seq, 'prefilling')
    inst.prefilling.append(seq.id)
    inst.backlog += seq.stop - seq.done
    return
  if seq.prompt_len + 1 >= seq.limit:
    run.move(seq, 'finishing')
    inst.ending.append((number, seq.id))
    return
  run.move(seq, 'decoding')
  batch = min(inst.batches, key=SIZE)
  start = seq.prompt_len - batch.tick
  batch.add(row_of(inst, seq, start))


def _decode(run: Run, inst: LiveInstance) -> bool:
  """Issues the next decode command; False when none can be.

  Micro-batches take strict turns, the empty ones left out. One that may not
  go yet is waited for: were it passed by, two commands of another would
  follow each other and the stages would idle between them, for ever.
  """
  while True:
    g = _following(inst)
    if g is None or not _ready(run, inst, inst.batches[g]):
      return False
    batch = inst.batches[g]
    if batch.size:  # else covering has preempted all of it
      break
  # A step waits for the one before to leave the last stage, and stages take
  # work in order: micro-batches whose commands had several steps would run
  # one after another, not side by side.
  steps = 1
  if (len(inst.batches) == 1 and not inst.queue and not inst.pulls
      and not host_tier.waits(inst)
      and inst.residents == batch.size + len(inst.ending)):
    steps = min(batch.until() - batch.tick, inst.run_ahead)
  _send(run, inst, RunDecode(inst.index, inst.number, batch.tick, steps,
                            batch.row_values()), g)
  _advance(run, inst, g, steps)
  return True


def _advance(run: Run, inst: LiveInstance, g: int, steps: int) -> None:
  """Ends a turn: ticks pass; rows that reached their limit leave."""
  batch = inst.batches[g]
  batch.tick += steps
  inst.turn = (g + 1) % len(inst.batches)
  for id in list(batch.short()):
    if batch.rows[id][1] + batch.tick >= run.seqs[id].limit - 1:
      part(run, inst, batch, id)


def part(run: Run, inst: LiveInstance, batch: LiveBatch, id: int) -> None:
  """A row leaves: its last token comes with the newest command."""
  batch.remove(id)
  inst.ending.append((inst.number - 1, id))
  seq = run.own(id)
  seq.done = seq.limit - 1
  run.move(seq, 'finishing')


def _cover(run: Run, inst: LiveInstance, batch: LiveBatch) -> bool:
  """Gives the micro-batch's rows a page for their next tick.

  Preempts if it must, of any micro-batch. Returns False while pages of a
  preempted request are still in use by a command in flight.
  """
  short = batch.short()
  if not short:
    return True
  while short and prefix_cache.num_free(inst.pool) < len(short):
    if inst.ending:
      return False
    if not streaming.give_way(run, inst):
      _preempt(run, inst)
    short = batch.short()
  if short:
    extend(run, inst, [(batch, id) for id in batch.renew(
        run.seqs, inst.page_size)])
  return True


def extend(run: Run, inst: LiveInstance,
           rows: Sequence[tuple[LiveBatch, int]]) -> None:
  """Gives rows, (micro-batch, id), a page for each time they are named."""
  ids = residents.alloc(run, inst, len(rows))
  for (_, id), page in zip(rows, ids, strict=True):
    seq = run.seqs[id]
    if type(seq) is LiveSeq:
      seq.pages += (page,)
    else:
      run.own_seqs()[id] = seq._replace(pages=(*seq.pages, page))
  for batch, id in dict.fromkeys(rows) if len(rows) > 1 else rows:
    batch.change(row_of(inst, run.seqs[id], batch.rows[id][1]))


def _preempt(run: Run, inst: LiveInstance) -> None:
  """Sends a request, the policy's choice, back to be recomputed.

  A request on its way in is no victim: a copy is landing on its pages. This
  cannot deadlock: what is short of a page is a row, so there is a victim, if
  need be the row itself; a copy ends however full the pool is; and where no
  other request is resident there is room for any that never_fits let in.
  Nor does it go on for ever: a row has emitted a token since its prefill
  began, so each of its preemptions leaves it fewer to emit, and a request
  preempted in its prefill gave way to a row that then emits one.
  """
  seq = run.own(choices.victim(run, inst))
  if seq.stage == 'decoding':
    batch = inst.home(seq.id)
    seq.prompt_len = batch.rows[seq.id][1] + batch.tick + 1
  run.leave(seq, 'yielding')


def _following(inst: LiveInstance) -> int | None:
  """The next micro-batch in turn that has rows, or None."""
  if inst.batches[inst.turn].size:
    return inst.turn
  pp = len(inst.batches)
  return next((g % pp for g in range(inst.turn, inst.turn + pp)
               if inst.batches[g % pp].size), None)


def row_of(inst: LiveInstance, seq: Any, start: int) -> Row:
  """A request's Row: `until` is the first tick that its pages or its limit
  do not cover."""
  until, last = len(seq.pages) * inst.page_size, seq.limit - 1
  if until > last:
    until = last
  return Row(seq.id, start, until - start, seq.pages)
