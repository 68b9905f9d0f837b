"""Faults and what follows from them, as transitions of scheduler.Run.

Rules:

- What an instance held is gone when it goes down. What its clients were told
  is not: the prompt of a request then has the tokens that are out, and the
  next one it samples is the next one its client sees.
- A hand-off that fails is tried again from the source, which still holds the
  pages, by another decode instance if there is one.
- The lease of a hand-off bounds how long it may take. When it runs out, Abort
  takes the target's right to write; it reaches the target before any command
  that uses these pages anew, as an instance's commands come in order.
- Each of these counts as a try of each request that it hits. One more than
  Config.tries and the request fails, with the reason.
- Who needs an instance where none of the kind is up waits for one that comes
  back, and fails when all of them are gone for good.
"""

import collections

from dsjax import base, pages
from dsjax.state import ImpossibleEvent, LiveInstance, init


def instance_down(run, e):
  """An instance and all it held are lost."""
  inst = _instance(run, e)
  if inst.status in ('down', 'gone'):
    if inst.status == 'down' and not e.back:
      inst.status, inst.value = 'gone', None
      run.roster()
      place(run)
    return
  inst = run.touch(e.instance)
  first = inst.inflight[0][0] if inst.inflight else None
  if len(e.steps_s) >= max(1, getattr(first, 'steps', 1)):
    raise ImpossibleEvent(f'{e}: of {first} fewer steps can be out')
  for id, _ in e.ended:
    run.ended(id)
  known = _known(run, inst, len(e.steps_s))
  hit = sorted([s.id for s in run.seqs.values()
                if e.instance in (s.instance, s.target)],
               key=lambda id: run.seqs[id].order)
  _empty(run, inst, 'down' if e.back else 'gone')
  reason = f'instance {e.instance} ({inst.role}) was lost'
  for id in hit:
    seq = run.own(id)
    if seq.target == e.instance:
      _target_lost(run, seq, reason)
    else:
      _source_lost(run, seq, known[id], reason)
  place(run)


def instance_up(run, e):
  """An instance is there, empty, or is to be drained no longer."""
  inst = _instance(run, e)
  if inst.status != 'up':
    run.touch(e.instance).status = 'up'
    run.roster()
    place(run)


def drain(run, e):
  """An instance takes no more work that another could do."""
  inst = _instance(run, e)
  if inst.status != 'up':
    return
  inst = run.touch(e.instance)
  inst.status = 'draining'
  run.roster()
  if inst in run.open_entries or inst in run.open_decoders:
    return  # nobody else can
  queue, pulls = inst.queue, inst.pulls
  inst.queue, inst.pulls = [], []
  for id in queue:
    seq = run.own(id)
    inst.backlog -= seq.prompt_len
    run.enqueue(seq)
  for id in pulls:
    run.offer(run.own(id))


def migrate_failed(run, e):
  """The target gave a hand-off up and writes no more."""
  seq = run.handed(e)
  if seq is not None:
    _again(run, seq, f'its hand-off failed: {e.reason}')


def timer(run, e):
  """The lease of a hand-off ran out: the target is told to stop."""
  seq = run.handed(e)
  if seq is not None:
    run.commands.append(base.Abort(seq.id, seq.epoch, seq.target))
    _again(run, seq, 'the lease of its hand-off ran out')


def place(run):
  """Finds an instance for those who waited for one."""
  ids, run.waiting = run.waiting, []
  for id in ids:
    seq = run.own(id)
    if seq.stage == 'queued':
      run.enqueue(seq)
    else:
      run.offer(seq)


def fail(run, seq, reason):
  """Ends a request that holds nothing but perhaps its source's pages."""
  run.commands.append(base.Fail(seq.id, reason))
  if seq.pages:
    run.drop(seq)
  else:
    run.forget(seq.id)


def _instance(run, e):
  if not 0 <= e.instance < len(run.instances):
    raise ImpossibleEvent(f'{e}: there are {len(run.instances)} instances')
  return run.instances[e.instance]


def _known(run, inst, told):
  """Tokens that are known of each request: prompt, and those that are out.

  told: steps of the oldest command in flight whose tokens are out.
  """
  lost = collections.Counter()
  for n, (command, _) in enumerate(inst.inflight):
    steps = getattr(command, 'steps', 1) - (0 if n else told)
    for row in command.rows:
      lost[row.id] += steps
    if inst.role != 'prefill':
      lost.update([c.id for c in getattr(command, 'chunks', ()) if c.last])
  known = {s.id: s.prompt_len for s in run.seqs.values()
           if s.instance == inst.index}
  for batch in inst.batches:
    for id, row in batch.rows.items():
      known[id] = row.base + batch.tick + 1
  for id in known:
    seq = run.seqs[id]
    if seq.fate == 'length':
      known[id] = seq.limit
    known[id] += (seq.stage in ('prefilled', 'migrating')) - lost[id]
  return known


def _empty(run, inst, status):
  """Forgets what an instance held; its commands count on."""
  fresh = init(run.config).instances[inst.index]
  fresh = fresh._replace(number=inst.number, status=status)
  again = LiveInstance(run.config, inst.index, fresh)
  for field in (*fresh._fields, 'value'):
    setattr(inst, field, getattr(again, field))
  run.roster()


def _target_lost(run, seq, reason):
  if seq.stage == 'prefilled':
    run.offer(seq)
    return
  seq.target, seq.target_pages = -1, ()
  _retry(run, seq, reason)


def _source_lost(run, seq, known, reason):
  if seq.stage == 'migrating':
    run.commands.append(base.Abort(seq.id, seq.epoch, seq.target))
    _release_target(run, seq)
  elif seq.stage == 'prefilled':
    run.unpull(seq)
  seq.target, seq.pages = -1, ()
  if seq.fate in ('stop', 'cancelled'):
    run.forget(seq.id)
    return
  hit = seq.stage != 'queued'
  seq.stage, seq.fate, seq.done, seq.prompt_len = 'queued', '', 0, known
  if hit:
    run.commands.append(base.Preempt(seq.id, seq.instance, 'fault'))
    if not _spared(run, seq, reason):
      return
  run.enqueue(seq)


def _release_target(run, seq):
  inst = run.touch(seq.target)
  inst.pool = pages.release(inst.pool, seq.target_pages)
  inst.residents -= 1
  seq.target, seq.target_pages = -1, ()


def _again(run, seq, reason):
  """The hand-off is over and its target may be used anew."""
  target = seq.target
  _release_target(run, seq)
  _retry(run, seq, reason, target)


def _retry(run, seq, reason, but=-1):
  if seq.fate:
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


APPLY = {
    base.InstanceDown: instance_down,
    base.InstanceUp: instance_up,
    base.Drain: drain,
    base.MigrateFailed: migrate_failed,
    base.Timer: timer,
}
