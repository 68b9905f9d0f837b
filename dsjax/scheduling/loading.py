"""Pages of a prompt that come from elsewhere instead of being computed.

A request whose prompt goes on, after its hits in the memory of its instance,
with hits in the host memory of the instance, or with what another instance has
kept, takes pages for them and is `loading`. Nothing waits for it: others of its
queue may be computed before it. Then it is `prefilling` as any other, with
that much less to compute.

- From host memory (host_tier.py): a Load, where it is predicted to end sooner
  than the tokens are computed; always, where nothing predicts.
- From another instance, the lender: a Migrate of kept pages, where the policy
  has answered a Fetch, and the lender has kept more than is here.
- What is copied has it as an owner until its copy has ended, well or not.
  After one that failed the tokens are computed; slots of the host are then
  forgotten, as they may be bad. It costs the request no try.
- AHEAD are in flight at a time, of an instance.

A row that was swapped comes back by a Load as well, and is a row again.

Functions of a scheduler.Run, and of its instances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsjax.scheduling import host_tier, prefix_cache
from dsjax.scheduling.events import Load, Migrate
from dsjax.scheduling.live import LiveInstance, LiveSeq
from dsjax.scheduling.state import Loading

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run

AHEAD = 2


def is_full(inst: LiveInstance) -> bool:
  """Whether no other load may start now."""
  return len(inst.loading) >= AHEAD


def loads(run: Run, inst: LiveInstance, seq: Any) -> bool:
  """Whether a request, in the queue, is to load when it is admitted."""
  if borrows(run, inst, seq):
    return True
  if not inst.host:
    return False
  start = _kept(inst, seq)
  return bool(_slots(run, inst, seq, start, seq.stop))


def borrows(run: Run, inst: LiveInstance, seq: Any) -> int:
  """Tokens that a request's lender has kept, if these are more than are kept
  here, in whole pages of both; else 0."""
  if seq.lender < 0:
    return 0
  lender = run.instances[seq.lender]
  unit = math.lcm(inst.page_size, lender.page_size)
  stop = _kept(lender, seq) // unit * unit
  return stop if stop > _kept(inst, seq) else 0


def unit_of(run: Run, inst: LiveInstance, seq: Any) -> int:
  """Tokens of which a request's hits are a multiple: of a page; if it borrows
  what follows, of a page of both."""
  size = inst.page_size
  if not borrows(run, inst, seq):
    return size
  return math.lcm(size, run.instances[seq.lender].page_size)


def _kept(inst, seq):
  """Tokens of a prompt that an instance has kept."""
  size = inst.page_size
  return size * len(prefix_cache.hits(
      inst.pool, inst.hashes(seq)[:(seq.stop - 1) // size]))


def _slots(run, inst, seq, start, stop):
  """The hashes of the slots that are worth loading, behind token `start`; not
  all of the first `stop` tokens are needed."""
  size = inst.page_size
  hashes = inst.hashes(seq)[start // size:(stop - 1) // size]
  hashes = hashes[:len(prefix_cache.hits(inst.host.slots, hashes))]
  return hashes if hashes and _pays(
      run, inst, seq, start, start + len(hashes) * size) else ()


def _pays(run, inst, seq, start, stop):
  """Whether to load tokens [start, stop) is predicted to take less time than
  to compute them."""
  link, latency = run.config.host_link, inst.latency
  if link is None or latency is None:
    return True
  spared_s = (latency.prefill_s(((start, seq.stop),))
              - latency.prefill_s(((stop, seq.stop),)))
  return link.migrate_s(stop - start) < spared_s


def pin(run: Run, inst: LiveInstance, seq: LiveSeq, start: int) -> None:
  """A request that takes pages, and has hits up to token `start`, will load
  what follows: it stays until then where it is."""
  stop = borrows(run, inst, seq)
  if stop > start:
    lender = run.touch(seq.lender)
    lender.pool, held = prefix_cache.hold(
        lender.pool, _hashes(lender, seq, start, stop))
  elif inst.host:
    hashes = _slots(run, inst, seq, start, seq.stop)
    if not hashes:
      return
    slots, held = prefix_cache.hold(inst.host.slots, hashes)
    inst.host = inst.host._replace(slots=slots)
  else:
    return
  inst.loading = (*inst.loading, Loading(
      seq.id, seq.lender if stop > start else -1, held))


def begin(run: Run, inst: LiveInstance, seq: LiveSeq) -> bool:
  """A request has taken its pages: starts its copy, if there is one."""
  if not inst.loading or inst.loading[-1].id != seq.id:
    return False
  _, index, held = inst.loading[-1]
  seq.epoch += 1
  run.move(seq, 'loading')
  tokens, size = _tokens(run, inst, inst.loading[-1]), inst.page_size
  pages = seq.pages[seq.done // size:(seq.done + tokens) // size]
  run.commands.append(
      Load(seq.id, seq.epoch, inst.index, held, pages, tokens, seq.done)
      if index < 0 else
      Migrate(seq.id, seq.epoch, index, held, inst.index, pages, tokens,
              seq.done, kept=True))
  return True


def _tokens(run, inst, entry):
  source = run.instances[entry.lender] if entry.lender >= 0 else inst
  return len(entry.held) * source.page_size


def _hashes(inst, seq, start, stop) -> Sequence[int]:
  size = inst.page_size
  return inst.hashes(seq)[start // size:stop // size]


def entry_of(run: Run, seq: Any) -> Loading | None:
  """What a request waits for, or None."""
  return next((entry for entry in run.instances[seq.instance].loading
               if entry.id == seq.id), None) if seq.instance >= 0 else None


def let_go(run: Run, inst: LiveInstance, entry: Loading, whole: bool) -> int:
  """The copy of an entry has ended: what was read has an owner less. Slots
  that may be bad are forgotten.

  Returns:
    how many tokens it was to bring.
  """
  seq, tokens = run.seqs[entry.id], _tokens(run, inst, entry)
  inst.loading = tuple([other for other in inst.loading if other is not entry])
  stop = seq.done + tokens
  if entry.lender >= 0:
    lender = run.touch(entry.lender)
    lender.pool = prefix_cache.release(
        lender.pool, entry.held, _hashes(lender, seq, seq.done, stop),
        len(entry.held))
  elif seq.done == seq.prompt_len:  # those of a row, which nothing else has
    host_tier.release(inst, entry.held)
  elif whole:
    host_tier.release(inst, entry.held, _hashes(inst, seq, seq.done, stop))
  else:
    inst.host = inst.host._replace(slots=prefix_cache.forget(
        inst.host.slots, entry.held, _hashes(inst, seq, seq.done, stop)))
  return tokens
