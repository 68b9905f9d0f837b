"""The one thread in which a server's state changes.

Python raises what a signal's handler raises (Ctrl-C, a time limit) anywhere in
the main thread. In a thread of its own a transition is never torn: an
interrupt ends only the wait of the client that asked for it. It is also what
makes a server safe from threads: jobs are done one after another. Nothing of
what it does may move data implicitly.
"""

import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from dsjax.runtime.output import RequestFailed

BEAT_S = 0.1  # between two looks of a client that waits at the thread


class Job:
  """A function to be called in the thread: once, or until it has an answer.

  Attributes:
    drive: None: once. Else called in between, and pauses where it likes;
      what it raises, the client that has waited longest hears.
    gone: the client has left.
  """

  def __init__(self, function: Callable[[], Any],
               drive: Callable[[], object] | None = None) -> None:
    self.function, self.drive, self.gone = function, drive, False
    self.answer: Any = None
    self.error: BaseException | None = None
    self._done = threading.Lock()
    self._done.acquire()

  def look(self) -> bool:
    """Calls the function; whether that was the last time."""
    if self.gone:
      return True
    try:
      self.answer = self.function()
    except BaseException as error:  # the client's, whatever it is
      return self.fail(error)
    if self.drive and self.answer is None:
      return False
    self._done.release()
    return True

  def fail(self, error: BaseException) -> bool:
    """Ends it with an error."""
    self.error = error
    self._done.release()
    return True

  def wait(self, seconds: float) -> bool:
    """Whether it has ended; waits so long at most."""
    return self._done.acquire(timeout=seconds)

  def result(self) -> Any:
    """What the function returned; raises what it raised."""
    if self.error is None:
      return self.answer
    try:
      raise self.error
    finally:
      self.error = None  # no cycle of frames


class Worker:
  """The thread. It holds no server: one that is dropped can be freed.

  Attributes:
    thread: daemon, until `stop`.
  """

  def __init__(self, name: str = 'dsjax server') -> None:
    self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    self._began: list[float] = []  # of what it is doing now
    self.thread = threading.Thread(
        target=_guarded, args=(self._jobs, self._began), name=name,
        daemon=True)
    self.thread.start()

  @property
  def is_here(self) -> bool:
    """Whether the caller is the thread itself."""
    return threading.current_thread() is self.thread

  @property
  def stuck_s(self) -> float:
    """Seconds for which it has been at one thing; 0.0: it waits."""
    began = self._began[-1:]
    return time.monotonic() - began[0] if began else 0.0

  def post(self, function: Callable[[], Any],
           drive: Callable[[], object] | None = None) -> Job:
    """Asks for a job, in order, and does not wait."""
    job = Job(function, drive)
    self._jobs.put(job)
    return job

  def wait(self, job: Job, beat: Callable[[], object],
           every_s: float = BEAT_S) -> Any:
    """The result of a job; without the thread, as after `stop`, it is done
    here. beat: called every_s; what it raises ends the wait."""
    try:
      while not job.wait(every_s if self.thread.is_alive() else 0):
        if not self.thread.is_alive() and not job.wait(0):
          if not job.look():
            job.fail(RequestFailed('the server was closed'))
          break
        beat()
    except BaseException:
      job.gone = True
      raise
    return job.result()

  def stop(self) -> None:
    """Ends the thread after the jobs that were asked for."""
    self._jobs.put(None)
    if not self.is_here and self.thread.is_alive():
      self.thread.join(1.0)  # longer only where a call never returns


def call_lasting(function: Callable[[], Any]) -> Any:
  """Calls it in a thread that lasts as long as this process; what it returns,
  or raises. A Ctrl-C ends the wait, and not the call."""
  worker = _lasting(os.getpid())
  return worker.wait(worker.post(function), lambda: None)


@functools.cache
def _lasting(pid: int) -> Worker:
  del pid  # one that was forked has no threads of the other
  return Worker('dsjax starts')


def _guarded(jobs: queue.SimpleQueue[Job | None], began: list[float]) -> None:
  with jax.transfer_guard('disallow'):
    _work(jobs, began)


def _work(jobs: queue.SimpleQueue[Job | None], began: list[float]) -> None:
  waiting: list[Job] = []
  while True:
    job = None
    # Never a get with a time limit: CPython 3.11 waits for ever where a short
    # job runs out between its two looks.
    if not waiting or not jobs.empty():
      job = jobs.get()
      if job is None:
        break
    began.append(time.monotonic())
    if job is not None and not job.look():
      waiting.append(job)
    waiting[:] = [job for job in waiting if not job.gone]
    if waiting and (job is None or jobs.empty()):
      _drive(waiting)
      waiting[:] = [job for job in waiting if not job.look()]
    began.clear()
  for job in waiting:
    if not job.look():
      job.fail(RequestFailed('the server was closed'))


def _drive(waiting: list[Job]) -> None:
  drive = waiting[0].drive
  try:
    if drive:
      drive()
  except BaseException as error:
    waiting.pop(0).fail(error)
