"""Where a policy's resize is asked beside the serving loop."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor

from dsjax.runtime.orphans import end_with_parent


def planner_process() -> ProcessPoolExecutor:
  """A process of its own, for serve(planner=); it leaves Ctrl-C to this one,
  and ends where this one is killed.

  As with all of multiprocessing, the program that calls this must be safe to
  import: `if __name__ == '__main__':`.
  """
  return ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _begin)


def _begin() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  end_with_parent()
