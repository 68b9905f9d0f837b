"""Flexible instances: roles that change, and rows that move.

Transitions of scheduler.Run, at a Tick, as a policy's resize and rebalance
say. Nothing that owns pages is moved by a change of roles; a row that moves is
handed off as a finished prefill is, once what is in flight for it is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsjax.scheduling import choices, streaming
from dsjax.scheduling.events import Flip, Tick
from dsjax.scheduling.live import LiveInstance

if TYPE_CHECKING:
  from dsjax.scheduling.scheduler import Run


def tick(run: Run, e: Tick) -> None:
  """Roles change, then rows move, as the policy says."""
  if e.roles is not None:
    flip(run, choices.roles(run, e.roles))
  elif run.policy.resize:
    flip(run, choices.roles(run, choices.ask(run, 'resize')))
  if run.policy.rebalance:
    for move in choices.several(run, 'rebalance', len(run.seqs)):
      depart(run, move)


def flip(run: Run, roles: Mapping[int, str]) -> None:
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
    inst.own_queue().remove(id)
    inst.backlog -= seq.stop
    run.enqueue(seq)
  while pulls and streaming.give_way(run, inst):
    pass  # they go over whole
  for id in list(inst.pulls):
    seq = run.own(id)
    if prompts if seq.done < seq.prompt_len else pulls:
      inst.pulls.remove(id)
      run.offer(seq)


def depart(run: Run, move: Any) -> None:
  """A row is to move to another instance, with its KV."""
  seq, target = choices.row_and_target(run, move)
  batch = run.instances[seq.instance].home(seq.id)
  seq.prompt_len = seq.done = batch.rows[seq.id][1] + batch.tick
  seq.target = target
  run.leave(seq, 'leaving')
