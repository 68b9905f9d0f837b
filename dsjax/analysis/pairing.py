"""Commands paired with what ended them, for readers of an event log.

A log is what a run was told and what it answered: (event, commands) in order.
A command is in flight from the event that it answers until its completion, or
until its instance is lost; a hand-off until it is copied, fails, times out,
or one of its two instances is lost. What ends a command that is not in
flight (issued before the log began, lost before) is passed over.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dsjax.scheduling.events import (
  Command,
  DecodeDone,
  Event,
  InstanceDown,
  Migrate,
  Migrated,
  MigrateFailed,
  PrefillDone,
  RunDecode,
  RunPrefill,
  Timer,
)

Log = Iterable[tuple[Event, Iterable[Command]]]


class Execution(NamedTuple):
  """A command of an instance that is no longer in flight.

  Attributes:
    issued_s: time of the event that it answered.
    started_s: issued_s or the end of the one before it on its instance, the
      later of the two.
    ended_s: when it completed or was lost.
    steps_s: the end of each of its steps; of a lost one, those whose tokens
      are out.
    stages_s: as in its completion: the end of each step in each pipeline stage
      but the last.
    done: False where it was lost with its instance.
  """

  command: RunPrefill | RunDecode
  issued_s: float
  started_s: float
  ended_s: float
  steps_s: tuple[float, ...]
  stages_s: tuple[float, ...]
  done: bool


class HandOff(NamedTuple):
  """A migration that is no longer in flight; of a stream, its last part.

  Attributes:
    behind: its source had commands in flight when it was issued.
    done: False where it failed, timed out or lost one of its instances.
  """

  command: Migrate
  issued_s: float
  ended_s: float
  behind: bool
  done: bool


class Pairing:
  """Follows the commands in flight; `observe` says which of them ended."""

  def __init__(self) -> None:
    self._running = {}  # instance -> {number: (command, issued_s)}
    self._ended_s = {}  # instance -> end of its newest execution
    self._moving = {}  # (id, epoch) -> (command, issued_s, behind)

  def observe(self, event: Event,
              commands: Iterable[Command]) -> list[Execution | HandOff]:
    """Folds an event and its answer; what the event ended, oldest first."""
    ended = self._end(event)
    for command in commands:
      if isinstance(command, (RunPrefill, RunDecode)):
        self._running.setdefault(command.instance, {})[command.number] = (
            command, event.time_s)
      elif isinstance(command, Migrate) and not command.more:
        self._moving[command.id, command.epoch] = (
            command, event.time_s, bool(self._running.get(command.source)))
    return ended

  def _end(self, event):
    if isinstance(event, (PrefillDone, DecodeDone)):
      entry = self._running.get(event.instance, {}).pop(event.number, None)
      if entry is None:
        return []
      steps_s = event.steps_s if isinstance(event, DecodeDone) else ()
      return [self._execution(entry, event.time_s, steps_s or (event.time_s,),
                              event.stages_s, True)]
    if isinstance(event, (Migrated, MigrateFailed, Timer)):
      entry = self._moving.pop((event.id, event.epoch), None)
      return [_hand_off(entry, event)] if entry else []
    return self._lose(event) if isinstance(event, InstanceDown) else []

  def _execution(self, entry, ended_s, steps_s, stages_s, done):
    command, issued_s = entry
    before_s = self._ended_s.get(command.instance, issued_s)
    self._ended_s[command.instance] = ended_s
    return Execution(command, issued_s, max(issued_s, before_s), ended_s,
                     steps_s, stages_s, done)

  def _lose(self, event):
    running = self._running.pop(event.instance, {}).values()
    ended: list[Execution | HandOff] = [
        self._execution(entry, event.time_s, () if n else event.steps_s, (),
                        False) for n, entry in enumerate(running)]
    for key, entry in list(self._moving.items()):
      if event.instance in (entry[0].source, entry[0].target):
        del self._moving[key]
        ended.append(_hand_off(entry, event))
    return ended


def _hand_off(entry, event):
  command, issued_s, behind = entry
  return HandOff(command, issued_s, event.time_s, behind,
                 isinstance(event, Migrated))


def ended(log: Log) -> Iterator[Execution | HandOff]:
  """The executions and hand-offs of a whole log, in the order they ended."""
  pairing = Pairing()
  for event, commands in log:
    yield from pairing.observe(event, commands)
