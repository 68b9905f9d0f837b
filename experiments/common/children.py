"""Processes that a runner starts, while signals that stop it are its own."""

import signal
from collections.abc import Callable
from multiprocessing import context, pool, resource_tracker
from typing import Any

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class _Child(context.SpawnProcess):
  """A process that SIGTERM does not end."""

  def terminate(self) -> None:
    self.kill()


class _Spawn(context.SpawnContext):
  Process = _Child


def spawned(count: int, begin: Callable[..., object] | None = None,
            args: tuple[Any, ...] = ()) -> pool.Pool:
  """A Pool of so many processes, in which begin(*args) is called first.

  A terminal sends Ctrl-C to all of them, as `timeout` and batch systems do
  SIGTERM. They inherit that it is blocked, so that none of them hears it, even
  while it still imports; it reaches the parent after they have been started.
  """
  resource_tracker.ensure_running()  # which would let it through again
  before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
  try:
    return _Spawn().Pool(count, begin, args)
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
