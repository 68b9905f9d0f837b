"""What a task found, a line of JSON each, written as it goes.

Lines of several processes may share a file: each is one short append. A line
has `task`, `what` and `ok` (null: not judged), and figures; one with `figure`
(a few words) speaks for its task in the table.
"""

import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple


class Lines:
  """The file of a part, for one task.

  Args:
    seconds: that the task has; `late` says when nine tenths are gone.
  """

  def __init__(self, path: pathlib.Path, task: str,
               seconds: float = math.inf) -> None:
    self.path, self.task = path, task
    self.began_s, self.seconds = time.monotonic(), seconds

  def write(self, what: str, ok: bool | None = None, **facts: Any) -> None:
    """Appends a line."""
    line = dict(task=self.task, what=what, ok=ok,
                at_s=round(self.gone_s(), 2), **facts)
    with open(self.path, 'a') as file:
      file.write(json.dumps(line, default=_plain) + '\n')

  def gone_s(self) -> float:
    """Seconds since the task began."""
    return time.monotonic() - self.began_s

  def late(self, share: float = 0.9) -> bool:
    """Whether this share of the task's seconds is gone."""
    return self.gone_s() > share * self.seconds


class Target(NamedTuple):
  """What every task is told: the part's file, seconds, tiny shapes or not."""

  path: pathlib.Path
  task: str
  seconds: float
  tiny: bool

  def lines(self) -> Lines:
    """The Lines that it writes."""
    return Lines(self.path, self.task, self.seconds)


def _plain(value):
  """Numbers of numpy and dataclasses as JSON has them."""
  if hasattr(value, 'item'):
    return value.item()
  return str(value)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a part; a last one that was cut short is left out."""
  rows = []
  if os.path.exists(path):
    with open(path) as file:
      for text in file:
        try:
          rows.append(json.loads(text))
        except ValueError:
          continue
  return rows
