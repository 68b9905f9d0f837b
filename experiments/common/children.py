"""Processes that a runner starts, and leaves Ctrl-C to itself."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing import pool, resource_tracker
from typing import Any


def spawned(count: int, begin: Callable[..., object] | None = None,
            args: tuple[Any, ...] = ()) -> pool.Pool:
  """A Pool of so many processes, in which begin(*args) is called first.

  A terminal sends Ctrl-C to all of them. They inherit that it is blocked, so
  that none of them hears it, even while it still imports; it reaches the
  parent after they have been started.
  """
  resource_tracker.ensure_running()  # which would let it through again
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    return multiprocessing.get_context('spawn').Pool(count, begin, args)
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
