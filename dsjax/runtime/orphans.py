"""Processes of multiprocessing end where the one that started them is killed.

Else one waits for ever for the tasks of a parent that `kill -9` has ended.
"""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
  """Called first in a process that multiprocessing has started."""
  threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
  parent = multiprocessing.parent_process()
  if parent:
    parent.join()
    os._exit(1)
