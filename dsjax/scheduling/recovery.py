"""Faults and what follows from them, as transitions of scheduler.Run.

Rules:

- What an instance held is gone when it goes down. What its clients were told
  is not: the prompt of a request then has the tokens that are out, and the
  next one it samples is the next one its client sees.
- A hand-off that fails is tried again from the source, which still holds the
  pages, by another decode instance if there is one.
- One that fails while its prompt is still prefilled, a stream, is no try: the
  whole goes over when the prefill is done.
- The lease of a hand-off bounds how long it may take. When it runs out, Abort
  takes the target's right to write; it reaches the target before any command
  that uses these pages anew, as an instance's commands come in order.
- Each of these counts as a try of each request that it hits. One more than
  Config.tries and the request fails, with the reason.
- Where no instance of a kind is up, the requests that need one wait until one
  comes back, and fail when all of them are gone for good.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dsjax.scheduling import (
  copied,
  flexible,
  lifecycle,
  loading,
  prefix_cache,
  residents,
  streaming,
)
from dsjax.scheduling.events import (
  Abort,
  Drain,
  Event,
  Fail,
  InstanceDown,
  InstanceUp,
  MigrateFailed,
  Preempt,
  RunDecode,
  RunPrefill,
  Timer,
)
from dsjax.scheduling.live import LiveInstance, LiveSeq
from dsjax.scheduling.state import ImpossibleEvent, init

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run


def instance_down(run: Run, e: InstanceDown) -> None:
  """An instance and all it held are lost."""
  inst = _instance(run, e)
  if inst.status in ('up', 'draining'):
    _partly(e, inst.inflight[0][0] if inst.inflight else None)
  before = _turn(run, inst, 'InstanceDown' if e.back else 'InstanceGone')
  if not before:
    return
  if before == 'down':  # nothing is left to lose
    place(run)
    return
  for id, _ in e.ended:
    run.ended(id)
  known = _known(run, inst, len(e.steps_s))
  hit = sorted([s.id for s in run.seqs.values()
                if e.instance in (s.instance, s.target)],
               key=lambda id: run.seqs[id].order)
  _end_loans(run, inst)
  _empty(run, inst)
  reason = f'instance {e.instance} ({inst.config.role}) was lost'
  for id in hit:
    seq = run.own(id)
    if seq.target == e.instance:
      run.cause = 'TargetDown'
      _target_lost(run, seq, reason)
    else:
      run.cause = 'InstanceDown'
      _source_lost(run, seq, known[id], reason)
  run.cause = 'InstanceDown'
  place(run)


def instance_up(run: Run, e: InstanceUp) -> None:
  """An instance is there, empty, or is to be drained no longer."""
  if _turn(run, _instance(run, e), 'InstanceUp'):
    place(run)


def drain(run: Run, e: Drain) -> None:
  """An instance takes no more work that another could do."""
  inst = _instance(run, e)
  if (not _turn(run, inst, 'Drain') or inst in run.open_entries
      or inst in run.open_decoders):
    return  # it is drained or down already, or no other can
  flexible.send_off(run, inst, prompts=True, pulls=True)


def migrate_failed(run: Run, e: MigrateFailed) -> None:
  """The target gave a hand-off up and writes no more."""
  seq = run.handed(e)
  if seq is not None:
    _again(run, seq, f'its hand-off failed: {e.reason}')


def timer(run: Run, e: Timer) -> None:
  """The lease of a hand-off ran out: the target is told to stop."""
  seq = run.handed(e)
  if seq is not None:
    run.commands.append(Abort(seq.id, seq.epoch, seq.target
                              if seq.target_pages else seq.instance))
    _again(run, seq, 'the lease of its hand-off ran out')


def place(run: Run) -> None:
  """Finds an instance for those who waited for one."""
  ids, run.waiting = run.waiting, []
  for id in ids:
    seq = run.own(id)
    if seq.stage == 'queued':
      run.enqueue(seq)
    else:
      run.offer(seq)


def fail(run: Run, seq: LiveSeq, reason: str, refused: bool = False
         ) -> None:
  """Ends a request that holds nothing but perhaps its source's pages."""
  run.commands.append(Fail(seq.id, reason, refused))
  if seq.pages:
    run.drop(seq)
  else:
    run.forget(seq)


def samples(e: Event, command: RunPrefill | RunDecode,
            ended: Sequence[int]) -> None:
  """Raises ImpossibleEvent unless the command samples a token of each id."""
  sampled = {c.id for c in command.chunks if c.last}
  sampled.update([r.id for r in command.rows])
  if not sampled.issuperset(ended):
    raise ImpossibleEvent(f'{e}: it samples tokens of {sorted(sampled)}')


def _partly(e, command):
  """Raises ImpossibleEvent unless a part of this command can be out."""
  steps = command.steps if command else 1
  if len(e.steps_s) >= steps:
    raise ImpossibleEvent(f'{e}: of {command} fewer steps can be out')
  if any([step >= len(e.steps_s) for _, step in e.ended]):
    raise ImpossibleEvent(f'{e}: an end after the last step that is out')
  if command:
    samples(e, command, [id for id, _ in e.ended])


def _instance(run, e):
  if not 0 <= e.instance < len(run.instances):
    raise ImpossibleEvent(f'{e}: there are {len(run.instances)} instances')
  return run.instances[e.instance]


def _turn(run, inst, event):
  """Changes an instance's status; what it was, '' where it stays."""
  before, after = inst.status, lifecycle.STATUS[inst.status, event]
  if before == after:
    return ''
  run.touch(inst.index).status = after
  run.roster()
  return before


def _known(run, inst, told):
  """Tokens that are known of each request: prompt, and those that are out.

  told: steps of the oldest command in flight whose tokens are out.
  """
  lost = collections.Counter()
  for n, (command, _) in enumerate(inst.inflight):
    steps = command.steps - (0 if n else told)
    for row in command.rows:
      lost[row.id] += steps
    lost.update([c.id for c in command.chunks
                 if c.last and run.seqs[c.id].stage != 'prefilling'])
  known = {s.id: s.prompt_len for s in run.seqs.values()
           if s.instance == inst.index}
  for batch in inst.batches:
    for id, row in batch.rows.items():
      known[id] = row.base + batch.tick + 1
  for id in known:
    seq = run.seqs[id]
    if seq.stage == 'finishing':
      known[id] = seq.limit
    if seq.done == seq.prompt_len:
      known[id] += seq.stage in ('prefilled', 'migrating', 'leaving',
                                 'swapped', 'loading')
    known[id] -= lost[id]
  return known


def _empty(run, inst):
  """Forgets what an instance held; its commands count on."""
  fresh = init(run.config).instances[inst.index]
  fresh = fresh._replace(
      pool=prefix_cache.emptied(inst.pool), number=inst.number,
      status=inst.status, role=inst.role,
      host=inst.host and inst.host._replace(
          slots=prefix_cache.emptied(inst.host.slots), offloads=(),
          swapped=()))
  again = LiveInstance(run.config, inst.index, fresh)
  for field in (*fresh._fields, 'value'):
    setattr(inst, field, getattr(again, field))


def _end_loans(run, lost):
  """What comes to an instance that is lost, or from it, comes no more."""
  for entry in lost.loading:
    if entry.lender >= 0:
      loading.let_go(run, lost, entry, whole=False)
  run.cause = 'SourceDown'
  for inst in run.instances:
    for entry in inst.loading:
      if entry.lender == lost.index:
        seq = run.own(entry.id)
        run.commands.append(Abort(seq.id, seq.epoch, seq.instance))
        copied.go_on(run, seq, whole=False)


def _target_lost(run, seq, reason):
  if seq.stage == 'leaving':
    seq.target = -1
    return
  if seq.stage == 'prefilled':
    run.offer(seq)
    return
  seq.target, seq.target_pages = -1, ()
  if seq.stage == 'prefilling':
    seq.hit, seq.sent = 0, -1
  else:
    _retry(run, seq, reason)


def _source_lost(run, seq, known, reason):
  if seq.target_pages:
    streaming.end(run, seq)
  elif seq.stage == 'prefilled':
    run.unpull(seq)
  seq.target, seq.pages = -1, ()
  if seq.stage in ('over', 'abandoned'):
    run.forget(seq)
    return
  seq.done, seq.prompt_len = 0, known
  if seq.stage != 'queued':
    run.commands.append(Preempt(seq.id, seq.instance, 'fault'))
    if not _spared(run, seq, reason):
      return
  run.enqueue(seq)


def _again(run, seq, reason):
  """The hand-off is over and its target may be used anew."""
  if not seq.target_pages:  # it was none
    copied.go_on(run, seq, whole=False)
    return
  target = seq.target
  residents.free_target(run, seq)
  if seq.stage != 'prefilling':
    _retry(run, seq, reason, target)


def _retry(run, seq, reason, but=-1):
  if seq.stage == 'abandoned':
    run.drop(seq)
  elif _spared(run, seq, reason):
    run.offer(seq, but)


def _spared(run, seq, reason):
  """Counts a fault of a request; False where it was one too many."""
  seq.tries += 1
  if seq.tries <= run.config.tries:
    return True
  fail(run, seq, f'given up after {seq.tries} faults; the last: {reason}')
  return False


APPLY: dict[type, Callable[..., None]] = {
    InstanceDown: instance_down,
    InstanceUp: instance_up,
    Drain: drain,
    MigrateFailed: migrate_failed,
    Timer: timer,
}
