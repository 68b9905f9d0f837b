"""Processes that a runner starts, while signals that stop it are its own."""

import concurrent.futures
import contextlib
import gc
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import context, resource_tracker
from typing import Any

from dsjax.runtime.orphans import end_with_parent
from experiments.fast import finder

STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class _Child(context.SpawnProcess):
  """A process that SIGTERM does not end."""

  def terminate(self) -> None:
    self.kill()


class _Spawn(context.SpawnContext):
  Process = _Child


def _begin(begin: Callable[..., object] | None, args: tuple[Any, ...]) -> None:
  end_with_parent()
  if begin:
    begin(*args)


class _Pool(concurrent.futures.ProcessPoolExecutor):
  """Starts its processes, at its first task, with signals blocked."""

  def __init__(self, *args: Any) -> None:
    super().__init__(*args)
    # Else they come one by one, and the end of one is not seen before another
    # task ends.
    self._safe_to_dynamically_spawn_children = False

  def submit(self, *args: Any, **kwargs: Any) -> Any:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
      return super().submit(*args, **kwargs)
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def spawned(count: int, begin: Callable[..., object] | None = None,
            args: tuple[Any, ...] = ()
            ) -> Iterator[concurrent.futures.Executor]:
  """So many processes, in which begin(*args) is called first. They are killed
  at the end of the block, whatever they do, and end if their parent is killed.

  A terminal sends Ctrl-C to all of them, as `timeout` and batch systems do
  SIGTERM. They inherit that it is blocked, so that none of them hears it, even
  while it still imports; it reaches the parent after they have been started.

  Raises:
    ChildProcessError: one of them was killed by something else.
  """
  # The tracker would let it through again, and a hang-up would end it.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
  try:
    resource_tracker.ensure_running()
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  pool = _Pool(count, _Spawn(), _begin, (begin, args))
  try:
    yield pool
  except BrokenProcessPool as error:
    raise ChildProcessError('one of the processes of this run was killed; is '
                            'there memory for all of them?') from error
  finally:
    for process in list((pool._processes or {}).values()):
      process.kill()
    pool.shutdown(cancel_futures=True)


def simulating(count: int
               ) -> contextlib.AbstractContextManager[
                   concurrent.futures.Executor]:
  """As `spawned`, of processes that do nothing but simulate: they look for
  garbage as seldom as a runner that does (cli.main)."""
  return spawned(count, gc.set_threshold, (finder.OBJECTS,))


@contextlib.contextmanager
def processes(count: int) -> Iterator[Callable[..., Iterable]]:
  """A map of so many processes; of this one alone if it is one.

  They leave Ctrl-C to the parent, and end with it.
  """
  if count == 1:
    yield map
    return
  with simulating(count) as pool:
    yield pool.map
