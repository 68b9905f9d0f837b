"""Choices of a policy: its hooks are asked, and their answers are checked.

Functions of a scheduler.Run. What a hook raises, and what the mechanism could
not carry out, is a PolicyError that names the hook.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsjax.config.checks import plain
from dsjax.config.placement import ROLES
from dsjax.scheduling.events import Decided
from dsjax.scheduling.live import LiveBatch, LiveInstance, LiveSeq
from dsjax.scheduling.policy import (
  Because,
  Fetch,
  Move,
  PrefillBudget,
  Refuse,
  RequestView,
  Split,
  can_lend,
  index_of,
)

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run

GIVEN = tuple(name for name, role in ROLES.items() if not role.flips)


def ask(run: Run, hook: str, *args: Any,
        read: Callable[[Any], Any] | None = None) -> Any:
  """What a hook of the policy answers, read as told."""
  try:
    answer = getattr(run.policy, hook)(run.view, *args)
    return read(answer) if read else answer
  except Exception as error:
    raise run.policy.failed(hook, error) from error


def several(run: Run, hook: str, most: int, *args: Any) -> list[Any]:
  """What a hook answers one after another; no more than most + 1."""
  def read(answer: Any) -> list[Any]:
    if isinstance(answer, set | frozenset):  # else no run would replay
      raise TypeError('a set has no order: must be a list')
    return list(itertools.islice(answer, most + 1))

  return ask(run, hook, *args, read=read)


def because(run: Run, hook: str, *args: Any) -> tuple[Any, str]:
  """What a hook answers, and why: '' where it does not say."""
  answer = ask(run, hook, *args)
  if not isinstance(answer, Because):
    return answer, ''
  if type(answer.reason) is not str or isinstance(answer.answer, Because):
    raise run.policy.refuse(hook, answer, 'a Because of an answer and a text')
  return answer


def explain(run: Run, seq: LiveSeq, hook: str, inst: LiveInstance,
            reason: str) -> None:
  """Tells why a hook chose an instance, if it said so."""
  if reason:
    run.commands.append(Decided(seq.id, hook, inst.index, reason))


def one_of(run: Run, instances: Sequence[LiveInstance], hook: str, answer: Any
           ) -> LiveInstance:
  """The one of these instances whose index a hook answered."""
  index = index_of(answer)
  for inst in instances:
    if inst.index == index:
      return inst
  raise run.policy.refuse(hook, answer, 'the index of one of instances '
                          f'{[i.index for i in instances]}')


def entry(run: Run, seq: LiveSeq) -> tuple[LiveInstance, int] | Refuse:
  """The instance that prefills a request, or goes on with it, and up to which
  of its tokens; or why it is not served."""
  if len(run.open_entries) > 1:
    run.rouse(run.open_entries)
  answer, reason = because(run, 'route', RequestView(seq))
  seq.lender = -1
  if isinstance(answer, Refuse):
    if type(answer.reason) is not str:
      raise run.policy.refuse('route', answer, 'a Refuse with a text')
    return answer
  instances = run.open_entries
  if seq.done:  # what may pull from there, see policy.may_go_on
    home = run.instances[seq.instance]
    instances = [i for i in instances if i is home or i.able.decodes] or [home]
  if isinstance(answer, Fetch):
    inst = one_of(run, instances, 'route', answer.index)
    seq.lender = _lender(run, seq, inst, answer)
    explain(run, seq, 'route', inst, reason)
    return inst, seq.prompt_len
  if not isinstance(answer, Split):
    inst = one_of(run, instances, 'route', answer)
    explain(run, seq, 'route', inst, reason)
    return inst, seq.prompt_len
  inst, stop = one_of(run, instances, 'route', answer[0]), index_of(answer[1])
  if not (seq.done < stop < seq.prompt_len
          and (inst.able.flips or not inst.able.decodes)):
    raise run.policy.refuse(
        'route', answer, 'a Split of an instance that is flexible or only '
        f'prefills, with tokens between {seq.done} and {seq.prompt_len}')
  explain(run, seq, 'route', inst, reason)
  return inst, stop


def _lender(run, seq, inst, answer):
  """The index of the instance that lends what it has kept, of a Fetch."""
  lenders = [i.index for i in run.instances if can_lend(i, inst)]
  index = index_of(answer.lender)
  if seq.done or not run.policy.fetches or index not in lenders:
    raise run.policy.refuse(
        'route', answer, 'a Fetch of a whole prompt, by a policy that says '
        f'fetches=True, from an instance with equal KV: {lenders}')
  return index


def _id(request: Any) -> int:
  """The id of what a hook answers as a request; -1 for what has none."""
  try:
    return index_of(request.id)
  except Exception:  # a hook's own object may raise anything
    return -1


def in_order(run: Run, inst: LiveInstance, queue: Sequence[int]
             ) -> Sequence[int]:
  """The ids of a queue in the policy's order; itself where that is its own:
  by arrival, or, of finished prefills, by their end."""
  if run.policy.order is None or len(queue) < 2:
    return queue
  answer = several(run, 'order', len(queue), run.view.instances[inst.index],
                   tuple([RequestView(run.seqs[id]) for id in queue]))
  ids = [_id(request) for request in answer]
  if sorted(ids) != sorted(queue):
    raise run.policy.refuse('order', answer, 'the requests that wait, each '
                            f'once: {sorted(queue)}')
  return ids


def budget(run: Run, inst: LiveInstance, batch: LiveBatch) -> PrefillBudget:
  """The PrefillBudget of an instance's next step."""
  answer = ask(run, 'batch', run.view.instances[inst.index])
  most = inst.config.prefill_tokens
  if type(answer) is PrefillBudget:
    given, whole, rows = budget = answer
    if not (type(given) is int and type(whole) is bool and type(rows) is bool):
      budget = PrefillBudget(index_of(given), plain(whole), plain(rows))
    tokens, whole, rows = budget
    if rows is True and inst.able.mixes:
      most -= batch.size
    if (0 <= tokens <= most and type(whole) is bool
        and (rows is False or rows is True and inst.able.mixes)):
      return budget
  raise run.policy.refuse('batch', answer, 'a PrefillBudget of 0 to '
                          f'{most} tokens, whole True or False' + (
                              '' if inst.able.mixes else ', without rows'))


def admits(run: Run, inst: LiveInstance, seq: Any, pages: int) -> bool:
  """Whether a request may take so many free pages now."""
  answer = ask(run, 'admit', run.view.instances[inst.index], RequestView(seq),
               pages)
  if type(answer) is bool:
    return answer
  if type(plain(answer)) is not bool:
    raise run.policy.refuse('admit', answer, 'True or False')
  return bool(answer)


def decoder(run: Run, seq: LiveSeq, avoid: int) -> LiveInstance:
  """The instance where a request decodes."""
  inst, reason = preferred(run, seq, avoid)
  explain(run, seq, 'hand_off', inst, reason)
  return inst


def preferred(run: Run, seq: LiveSeq, avoid: int) -> tuple[LiveInstance, str]:
  """The same, and why, for one who may not go by it."""
  if len(run.open_decoders) > 1:
    run.rouse(run.open_decoders)
  answer, reason = because(run, 'hand_off', RequestView(seq), avoid)
  return one_of(run, run.open_decoders, 'hand_off', answer), reason


def stays(run: Run, inst: LiveInstance, seq: LiveSeq) -> bool:
  """Whether a request decodes where it is prefilled."""
  if not inst.able.flips or seq.prompt_len + 1 >= seq.limit:
    return inst.able.decodes
  if inst not in run.open_decoders:
    return False
  target, reason = preferred(run, seq, -1)
  if target is inst:  # else it is asked once more, at the prompt's end
    explain(run, seq, 'hand_off', inst, reason)
  return target is inst


def victim(run: Run, inst: LiveInstance) -> int:
  """The id of the resident that is preempted."""
  residents = [id for b in inst.batches for id in b.rows] + inst.prefilling
  answer = ask(run, 'victim', run.view.instances[inst.index],
               tuple([RequestView(run.seqs[id]) for id in residents]))
  id = _id(answer)
  if id not in residents:
    raise run.policy.refuse('victim', answer, 'one of the requests that it '
                            f'was given, itself: {residents}')
  return id


def roles(run: Run, answer: Any) -> dict[int, str]:
  """{index: role} of an answer of resize, of those whose role changes."""
  most = len(run.instances)
  try:  # a hook's own object may raise anything, and may have no end
    pairs = list(itertools.islice(
        answer.items() if isinstance(answer, Mapping) else answer, most + 1))
    given = {index_of(index): role for index, role in pairs}
  except Exception:
    pairs, given = [], {-1: ''}
  flexible = [i.index for i in run.instances if i.able.flips]
  if not (len(pairs) <= most and given.keys() <= set(flexible)
          and all([type(role) is str and role in GIVEN
                   for role in given.values()])):
    raise run.policy.refuse('resize', answer, '{index: role}, indices of '
                            f'{flexible}, roles of {GIVEN}')
  return {index: role for index, role in given.items()
          if run.instances[index].role != role}


def row_and_target(run: Run, move: Any) -> tuple[LiveSeq, int]:
  """The row of a Move, and the index of the instance that it goes to."""
  id, target = move if type(move) is Move else (-1, -1)
  seq, index = run.seqs.get(index_of(id)), index_of(target)
  if (seq is None or seq.stage != 'decoding'
      or not run.instances[seq.instance].able.flips
      or index not in [i.index for i in run.open_decoders
                       if i.index != seq.instance]):
    raise run.policy.refuse(
        'rebalance', move, 'a Move of a row of a flexible instance to '
        f'another of instances {[i.index for i in run.open_decoders]}')
  return run.own(seq.id), index
