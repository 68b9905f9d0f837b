"""A loop and its thread: whatever a client asks is done between two polls."""

import threading
from collections.abc import Callable
from typing import Any

from dsjax.runtime.loop import Loop
from dsjax.runtime.worker import Job, Worker
from dsjax.scheduling.policy import PolicyError

MEANWHILE_S = 0.05  # between two calls of what a client wants called


class LoopThread:
  """Serves a loop in a Worker while a client waits for an answer.

  What observers raised meanwhile is raised after a call, or logged where the
  call itself raises.
  """

  def __init__(self, loop: Loop, stall_s: float) -> None:
    """stall_s: after which a call that does not return is an error."""
    self.loop, self.stall_s, self.worker = loop, stall_s, Worker()

  @property
  def thread(self) -> threading.Thread:
    return self.worker.thread

  @property
  def is_here(self) -> bool:
    """Whether the caller is the thread itself, as an observer is."""
    return self.worker.is_here

  def call(self, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in the thread, between two transitions."""
    if self.is_here:
      return function(*args)
    return self.worker.wait(
        self.post(lambda: self._whole(function, *args)), self._beat)

  def post(self, function: Callable[[], Any]) -> Job:
    """Asks for a call in the thread and does not wait for it."""
    return self._woken(self.worker.post(function))

  def _woken(self, job: Job) -> Job:
    """A job, for which the thread ends its pause."""
    self.loop.wake()
    return job

  def until(self, answer: Callable[[], Any],
            more: Callable[[], bool] = lambda: False,
            meanwhile: Callable[[], object] | None = None) -> Any:
    """Serves until `answer`, asked in the thread after each poll, gives one.

    Args:
      more: whether requests are still to come.
      meanwhile: called here, every MEANWHILE_S.

    Raises:
      PolicyError: nothing is in flight, and the policy lets nothing start.
    """
    self.check_may_wait()
    job = self._woken(self.worker.post(lambda: self._whole(answer),
                                       lambda: self._drive(more())))
    if meanwhile is None:
      return self.worker.wait(job, self._beat)
    return self.worker.wait(job, lambda: (self._beat(), meanwhile()),
                            MEANWHILE_S)

  def check_may_wait(self) -> None:
    """Raises RuntimeError in an observer: nothing goes on meanwhile."""
    if self.is_here:
      raise RuntimeError('an observer cannot wait for its own server')

  def give_time(self, job: Job) -> None:
    """Waits for a job for a moment, where the thread can get to it."""
    if not self.is_here and self.worker.stuck_s < 1:
      job.wait(1.0 if self.thread.is_alive() else 0)

  def _whole(self, function: Callable[..., Any], *args: Any) -> Any:
    try:
      result = function(*args)
    except BaseException:
      self.loop.log_raised()
      raise
    self.loop.tell()
    return result

  def _drive(self, more: bool) -> None:
    """Polls, and pauses where nothing was to do."""
    some = self.loop.poll()
    self.loop.tell()
    if some:
      return
    if not more:
      self.loop.check_stalled()
    self.loop.pause()

  def _beat(self) -> None:
    """Raises where a call in the thread does not return."""
    if self.worker.stuck_s > self.stall_s:
      what = f'no answer for {self.worker.stuck_s:.1f} s'
      if self.loop.deciding:
        policy = self.loop.scheduler_config.policy.name
        raise PolicyError(f'policy {policy!r}: {what}')
      raise RuntimeError(f'the server is stuck: {what}')
