"""The load of late: what arrived, and what was generated.

Lengths of outputs are told by the requests that came last, those that run and
those that ended: of all that end, those that end first are short. So ends are
counted by the order of arrivals, and of as many requests as run and more, or
outputs would be told too long as soon as short ones were forgotten.
"""

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

RECENT = 256  # requests that the load is told from, at least
COHORT = 32  # requests that came one after another
COHORTS = 256  # of which something ended, that are remembered

LIVES = 4  # of a request: in less, too few of those that are long have ended


class Load(NamedTuple):
  """What has come of late; the newest requests count.

  Attributes:
    rate_per_s: arrivals a second up to now; 0 before the second one.
    prompt_len, longest: tokens of their prompts, mean and 9th decile.
    output_len: tokens of an output, by the requests that came last: all that
      they have had so far over the number of them that ended. 1 before the
      first has ended.
    output_cv: standard deviation of these tokens over their mean; 1 before
      some have ended.
  """

  rate_per_s: float
  prompt_len: float
  longest: float
  output_len: float
  output_cv: float = 1.0


class Ended(NamedTuple):
  """Of COHORT requests that came one after another, those that ended by
  themselves: how many, and the tokens that they generated, and the squares of
  these, together.

  cohort: counts from 0.
  """

  cohort: int
  number: int
  tokens: int
  squares: int


class Recent:
  """What arrived and what ended of late; a State has both as tuples.

  arrived: (time, prompt tokens) of the newest RECENT requests, a tuple until it
  changes. ended: Ended of the newest COHORTS by cohort.
  """

  __slots__ = ('arrived', 'ended')

  def __init__(self, arrived: tuple[tuple[float, int], ...],
               ended: tuple[Ended, ...]):
    self.arrived: Any = arrived
    self.ended = {each.cohort: each for each in ended}

  def add_arrived(self, entry: tuple[float, int]) -> None:
    """One has arrived."""
    if type(self.arrived) is tuple:
      self.arrived = collections.deque(self.arrived, RECENT)
    self.arrived.append(entry)

  def add_ended(self, order: int, tokens: int) -> None:
    """The request of this place in the order of arrivals has had its last
    token."""
    cohort = order // COHORT
    known = self.ended.get(cohort) or Ended(cohort, 0, 0, 0)
    self.ended[cohort] = Ended(cohort, known.number + 1, known.tokens + tokens,
                               known.squares + tokens * tokens)
    if len(self.ended) > COHORTS:
      del self.ended[min(self.ended)]

  def load(self, time_s: float, rows: Sequence[tuple[int, int]]) -> Load:
    """What has come until now.

    Args:
      rows: (place in the order of arrivals, tokens so far) of those that run.
    """
    arrived = self.arrived
    lengths = sorted([prompt_len for _, prompt_len in arrived]) or [1]
    span_s = time_s - arrived[0][0] if arrived else 0.0
    return Load((len(arrived) - 1) / span_s if span_s > 0 else 0.0,
                sum(lengths) / len(lengths), lengths[len(lengths) * 9 // 10],
                *self._outputs(rows))

  def _outputs(self, rows: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """output_len and output_cv. Of those that came last: as many as run, and
    LIVES times as many, or RECENT."""
    if not self.ended:
      return 1.0, 1.0
    newest = max([order for order, _ in rows] + [COHORT * max(self.ended)])
    asked = len(rows) + max(LIVES * len(rows), RECENT)
    first = max(0, newest - asked) // COHORT
    if len(self.ended) == COHORTS:
      first = max(first, min(self.ended))  # those before it are forgotten
    ended = [each for each in self.ended.values() if each.cohort >= first]
    number = sum([each.number for each in ended])
    if not number:
      return 1.0, 1.0
    running = [so_far for order, so_far in rows if order >= COHORT * first]
    mean = (sum([each.tokens for each in ended]) + sum(running)) / number
    square = (sum([each.squares for each in ended])
              + sum([so_far * so_far for so_far in running])) / number
    return mean, (math.sqrt(max(0.0, square / mean**2 - 1))
                  if number >= COHORT else 1.0)
