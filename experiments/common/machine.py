"""What else went on while something was measured: programs, compilations."""

import contextlib
import gc
import os
import pathlib
import time
from collections.abc import Iterator

import jax.monitoring

_STAT = pathlib.Path('/proc/stat')
_WORK = (0, 1, 2, 5, 6)  # user, nice, system, irq, softirq


def _busy_s():
  """(seconds all cores worked, seconds this process did and those that it has
  started, such as instances), None if unknown."""
  try:
    ticks = [int(x) for x in _STAT.read_text().split('\n')[0].split()[1:]]
  except (OSError, ValueError):
    return None
  own = sum(os.times()[:4])  # those that have ended included
  return (sum(ticks[i] for i in _WORK) / os.sysconf('SC_CLK_TCK'),
          own + sum(_started()))


def _started():
  """CPU seconds of each process that this one has started and that runs."""
  ended = contextlib.suppress(OSError)
  for file in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with ended:
      fields = file.read_text().rsplit(') ', 1)[1].split()
      if int(fields[1]) == os.getpid():
        yield sum(map(int, fields[11:13])) / os.sysconf('SC_CLK_TCK')


class Others:
  """Cores that other processes use, from its making on; Linux only."""

  def __init__(self) -> None:
    self._busy, self._start_s = _busy_s(), time.perf_counter()

  def cores(self) -> float | None:
    """Mean cores taken by others so far; None where it cannot be known."""
    now, span_s = _busy_s(), time.perf_counter() - self._start_s
    if now is None or self._busy is None or span_s < 0.1:
      return None
    (all_s, own_s), (all_0_s, own_0_s) = now, self._busy
    return max(0.0, (all_s - all_0_s - own_s + own_0_s) / span_s)


@contextlib.contextmanager
def settled() -> Iterator[None]:
  """What is there stays meanwhile: the collector does not look at it, which
  takes 90 ms of a server's core after some 800 steps."""
  gc.collect()
  gc.freeze()
  try:
    yield
  finally:
    gc.unfreeze()


@contextlib.contextmanager
def compilations() -> Iterator[list[float]]:
  """A list that grows with each program that is compiled."""
  seen = []

  def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del kwargs
    if event == '/jax/core/compile/backend_compile_duration':
      seen.append(duration_secs)
  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield seen
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
