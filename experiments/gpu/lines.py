"""What a task found, a line of JSON each, written as it goes.

Lines of several processes may share a file: each is one append. A line has
`task`, `what` and `ok` (null: not judged), and figures; one with `figure` (a
few words) speaks for its task in the table. What is read may be damaged, or
not by this program: what is no such line is left out.
"""

import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

from experiments.common import provenance

MOST_BYTES = 15 * 2**20  # of a part's file: larger ones do not travel


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
    line = json.loads(json.dumps(dict(
        task=self.task, what=what, ok=ok, at_s=round(self.gone_s(), 2),
        **facts), default=_plain))
    text = (json.dumps(provenance.finite(line)) + '\n').encode()
    with open(self.path, 'a+b', buffering=0) as file:
      if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b'\n':  # another was killed as it wrote
          text = b'\n' + text
      file.write(text)

  def read(self) -> list[dict[str, Any]]:
    """The task's own lines so far."""
    return [row for row in read(self.path) if row['task'] == self.task]

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


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a part; none of what is no file, or over MOST_BYTES."""
  if path.is_symlink() or not path.is_file():
    return []
  with path.open('rb') as file:
    data = file.read(MOST_BYTES + 1)
  if len(data) > MOST_BYTES:
    return []
  rows = []
  for text in data.decode(errors='replace').split('\n'):
    try:
      row = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
      continue
    if _is_line(row):
      rows.append(row)
  return rows


def _is_line(row):
  return (isinstance(row, dict) and isinstance(row.get('task'), str)
          and isinstance(row.get('what'), str)
          and any(row.get('ok', 0) is x for x in (True, False, None))
          and isinstance(row.get('figure', ''), str))
