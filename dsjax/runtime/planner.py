"""Where a policy's resize is asked beside the serving loop."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor


def planner_process() -> ProcessPoolExecutor:
  """A process of its own, for serve(planner=); it leaves Ctrl-C to this one.

  As with all of multiprocessing, the program that calls this must be safe to
  import: `if __name__ == '__main__':`.
  """
  return ProcessPoolExecutor(1, multiprocessing.get_context('spawn'),
                             signal.signal, (signal.SIGINT, signal.SIG_IGN))
