"""Runs tasks as processes, each within its time; what crashes costs itself."""

import contextlib
import os
import pathlib
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.common.cli import ROOT
from experiments.gpu import lines
from experiments.gpu.tasks import Task

POLL_S = 0.05
SAID_BYTES = 2**18  # the end of what a task prints, which is kept
MOST_SAID_BYTES = 2**26  # one that prints more is stopped: disks are finite
MOST_VERDICT, MOST_FIGURE = 140, 240  # characters in the table
KILLED_S = 10  # that a killed process may take to end


class Outcome(NamedTuple):
  """How a task ended. verdict: right, done, or what went wrong in words."""

  task: Task
  verdict: str
  seconds: float
  figure: str

  @property
  def ok(self) -> bool:
    """Whether nothing went wrong."""
    return self.verdict in ('right', 'done')


class Running:
  """A task's process."""

  def __init__(self, task: Task, target: lines.Target, cache: str,
               log: pathlib.Path) -> None:
    self.task, self.target, self.log = task, target, log
    self.began_s = time.monotonic()
    self.stopped = ''  # why, in words
    self.said = tempfile.TemporaryFile()
    self.process = subprocess.Popen(
        task.command(target), cwd=ROOT, stdout=self.said, stderr=self.said,
        env=task.environment(target, cache), stdin=subprocess.DEVNULL,
        start_new_session=True)

  def kill(self) -> None:
    """Ends it and all that it started; what a driver holds is left behind."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
      self.process.wait(KILLED_S)

  def is_over(self) -> bool:
    """Whether it has ended; ends it when its time is up, or what it writes is
    too much, and what it leaves running."""
    path = self.target.path
    if self.process.poll() is None:
      if time.monotonic() - self.began_s > self.target.seconds:
        self.stopped = f'stopped after {self.target.seconds:.0f} s'
      elif os.fstat(self.said.fileno()).st_size > MOST_SAID_BYTES:
        self.stopped = f'stopped: printed over {MOST_SAID_BYTES >> 20} MiB'
      elif path.exists() and path.stat().st_size > lines.MOST_BYTES:
        self.stopped = f'stopped: wrote over {lines.MOST_BYTES >> 20} MiB'
      else:
        return False
    self.kill()
    if path.exists() and path.stat().st_size > lines.MOST_BYTES:
      os.truncate(path, lines.MOST_BYTES // 2)  # room for the part's others
    return True

  def outcome(self) -> Outcome:
    """Of a task that is over; what it printed goes to the log."""
    said = self._said()
    rows = [r for r in lines.read(self.target.path)
            if r['task'] == self.target.task]
    figures = [r['figure'] for r in rows if 'figure' in r]
    return Outcome(
        self.task, self._verdict(rows, said.splitlines())[:MOST_VERDICT],
        time.monotonic() - self.began_s,
        figures[-1][:MOST_FIGURE] if figures else '')

  def _verdict(self, rows, said):
    code, wrong = self.process.returncode, [r for r in rows
                                            if r['ok'] is False]
    if self.stopped:
      return self.stopped
    if code < 0:
      names = {s.value: s.name for s in signal.Signals}
      return f'crashed: {names.get(-code, f"signal {-code}")}'
    if wrong:
      return f'{len(wrong)} wrong: {wrong[0]["what"]}'
    if code:
      return f'failed: {said[-1][:200] if said else f"exit code {code}"}'
    if not rows:
      return 'failed: it wrote nothing'
    return 'right' if any(r['ok'] for r in rows) else 'done'

  def _said(self):
    """What it printed, the last SAID_BYTES, which it adds to the log."""
    with self.said as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - SAID_BYTES))
      said = file.read().decode(errors='replace').strip()
    log(self.log, f'--- {self.task.part}/{self.task.name}\n{said}\n\n')
    return said


def log(path: pathlib.Path, text: str) -> None:
  """Appends to the log; a full disk keeps no task from running."""
  with contextlib.suppress(OSError), path.open('a') as file:
    file.write(text)


def run(stages: Sequence[Sequence[Task]], folder: pathlib.Path, cache: str,
        seconds: float, tiny: bool,
        tell: Callable[[str], Any] = lambda text: None) -> list[Outcome]:
  """Runs stages one after another, tasks of one side by side.

  Args:
    folder: for a file a part, PART.jsonl, and log.txt.
    seconds: for all of them. Each stage may take its share of what is left.

  Returns:
    an Outcome a task; those that Ctrl-C stopped or did not let begin say so.
  """
  ends_s = time.monotonic() + seconds
  outcomes, running = [], []
  try:
    for number, stage in enumerate(stages):
      weights = [max(t.seconds for t in s) for s in stages[number:]]
      mine = (ends_s - time.monotonic()) * weights[0] / sum(weights)
      for task in stage:
        running.append(Running(task, lines.Target(
            folder / f'{task.part}.jsonl', task.name, max(mine, 1.0), tiny),
            cache, folder / 'log.txt'))
      tell(f'{", ".join(f"{t.part}/{t.name}" for t in stage)}: '
           f'{mine:.0f} s at most')
      while running:
        for process in [r for r in running if r.is_over()]:
          running.remove(process)
          outcomes.append(process.outcome())
          tell(f'{process.task.part}/{process.task.name}: '
               f'{outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s')
        time.sleep(POLL_S)
  except KeyboardInterrupt:
    for process in running:
      process.stopped = 'interrupted'
  finally:
    for process in running:
      process.kill()
  outcomes += [process.outcome() for process in running]
  ended = {o.task for o in outcomes}
  return outcomes + [Outcome(task, 'not begun', 0.0, '') for stage in stages
                     for task in stage if task not in ended]
