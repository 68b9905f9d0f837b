"""Whether a process elsewhere is there, by when it says something.

What is awaited is late only for as long as this process has looked (looks.py).
"""

import time

from dsjax.runtime.cluster import messages
from dsjax.runtime.cluster.channel import Channel
from dsjax.runtime.cluster.processes import Process
from dsjax.runtime.looks import Looks

PING_S = 1.0  # from an answer to the next question
COMES_S = 300.0  # until a process says hello
LEAST_S = 10.0  # until it may count as silent before it has said hello
LOADS_S = 3600.0  # of loading weights, and of compiling one step


class Watch:
  """Over one incarnation of a process: one check at a time, and a `look`
  before it.

  Attributes:
    asked_s: when it was last asked for a sign of life, on time.monotonic, put
      off by the time in which nobody looked; None: not yet.
    pinged_s: the same, on time.perf_counter, not put off.
  """

  def __init__(self) -> None:
    self._began_s = self._word_s = time.monotonic()
    self._looks, self._away_s = Looks(self._began_s), 0.0
    self.asked_s: float | None = None
    self.pinged_s = 0.0

  def begin(self) -> None:
    """It has come, or is one thing further: the next has its whole time."""
    self._began_s = time.monotonic()

  def look(self) -> None:
    """Makes nothing late by the time in which nobody looked."""
    self._away_s = self._looks.away_s(time.monotonic())
    self._began_s += self._away_s

  def check_comes(self, process: Process, silent_s: float) -> None:
    """Raises RuntimeError where a process that was started does not come."""
    if time.monotonic() - self._began_s > COMES_S:
      raise RuntimeError(f'its process did not come in {COMES_S:g} s'
                         + process.missing)
    if process.heard_s is not None:
      self._word_s = max(self._word_s + self._away_s, process.heard_s)
      _check_silence(self._word_s, max(silent_s, LEAST_S))

  def check_loads(self) -> None:
    """Raises RuntimeError where it gets no further with what it loads or
    compiles."""
    if time.monotonic() - self._began_s > LOADS_S:
      raise RuntimeError(f'its process got no further in {LOADS_S:g} s')

  def ping(self, channel: Channel, silent_s: float) -> None:
    """Asks for a sign of life; raises RuntimeError where there is none."""
    now_s, asked_s = time.monotonic(), self.asked_s
    if asked_s is None or channel.heard_s >= asked_s:
      if asked_s is None or now_s - asked_s > PING_S:
        self.asked_s, self.pinged_s = now_s, time.perf_counter()
        channel.send(messages.Ping())
      return
    self.asked_s = asked_s + self._away_s
    _check_silence(self.asked_s, silent_s)


def _check_silence(since_s: float, most_s: float) -> None:
  silent_s = time.monotonic() - since_s
  if silent_s > most_s:
    raise RuntimeError(f'its process is silent for {silent_s:.1f} s')
