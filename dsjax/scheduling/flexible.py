"""Flexible instances: roles that change, and rows that move.

Transitions of scheduler.Run, at a Tick, as a policy's resize and rebalance
say. Nothing that owns pages is moved by a change of roles; a row that moves is
handed off as a finished prefill is, once what is in flight for it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsjax.config.placement import ROLES
from dsjax.scheduling.events import Flip, Tick
from dsjax.scheduling.live import LiveInstance
from dsjax.scheduling.policy import Move, index_of

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run

GIVEN = tuple(name for name, role in ROLES.items() if not role.flips)


def tick(run: Run, e: Tick) -> None:
  """Roles change, then rows move, as the policy says."""
  if e.roles is not None:
    flip(run, resized(run, e.roles))
  elif run.policy.resize:
    flip(run, resized(run, run.ask('resize')))
  if run.policy.rebalance:
    for move in run.several('rebalance', len(run.seqs)):
      depart(run, move)


def resized(run: Run, answer: Any) -> dict[int, str]:
  """The roles of a resize's answer that differ from those of now."""
  try:
    roles = {index_of(index): role for index, role in dict(answer).items()}
  except (TypeError, ValueError):
    roles = {-1: ''}
  flexible = [i.index for i in run.instances if i.able.flips]
  if not (roles.keys() <= set(flexible)
          and all([role in GIVEN for role in roles.values()])):
    raise run.policy.refuse('resize', answer, '{index: role}, indices of '
                            f'{flexible}, roles of {GIVEN}')
  return {index: role for index, role in roles.items()
          if run.instances[index].role != role}


def flip(run: Run, roles: dict[int, str]) -> None:
  """Gives instances another role. Prompts and hand-offs that wait there go
  where it is now done; what owns pages stays."""
  for index, role in roles.items():
    run.touch(index).assign(role)
    run.commands.append(Flip(index, role))
  run.roster()
  for index in roles:
    inst = run.instances[index]
    send_off(run, inst, not inst.prefills, not inst.decodes)


def send_off(run: Run, inst: LiveInstance, prompts: bool, pulls: bool) -> None:
  """Finds another place for what waits at an instance, without pages."""
  for id in list(inst.queue) if prompts else ():
    seq = run.own(id)
    inst.queue.remove(id)
    inst.backlog -= seq.prompt_len
    run.enqueue(seq)
  for id in list(inst.pulls) if pulls else ():
    inst.pulls.remove(id)
    run.offer(run.own(id))


def depart(run: Run, move: Any) -> None:
  """A row is to move to another instance, with its KV."""
  id, target = move if type(move) is Move else (-1, -1)
  seq = run.seqs.get(index_of(id))
  if (seq is None or seq.stage != 'decoding'
      or not run.instances[seq.instance].able.flips
      or index_of(target) not in [i.index for i in run.open_decoders
                                  if i.index != seq.instance]):
    raise run.policy.refuse(
        'rebalance', move, 'a Move of a row of a flexible instance to '
        f'another of instances {[i.index for i in run.open_decoders]}')
  seq = run.own(seq.id)
  batch = run.instances[seq.instance].home(seq.id)
  seq.prompt_len = seq.done = batch.rows[seq.id][1] + batch.tick
  seq.target = index_of(target)
  run.leave(seq, 'leaving')
