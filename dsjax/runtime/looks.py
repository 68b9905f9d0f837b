"""How long a process has not looked at what may be late.

A process that is stopped (SIGSTOP, a debugger, a machine that sleeps) cannot
see that something has happened: that time is no delay.
"""

PAUSE_SHARE = 1 / 16
AWAY_S = 1.0  # from one look to the next: what is more does not count


def pause_s(waited_s: float, least_s: float, most_s: float) -> float:
  """Until the next look at what nothing tells of: a share of the wait so far,
  so that a long step is not interrupted and a short one not noticed late."""
  return min(max(waited_s * PAUSE_SHARE, least_s), most_s)


class Looks:
  """The looks at something, on any clock."""

  def __init__(self, now_s: float) -> None:
    self._last_s = now_s

  def away_s(self, now_s: float) -> float:
    """Seconds since the last look that do not count: to be added to when what
    is awaited began. This is the next look."""
    away_s = max(0.0, now_s - self._last_s - AWAY_S)
    self._last_s = now_s
    return away_s
