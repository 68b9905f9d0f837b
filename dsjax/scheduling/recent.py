"""The load of late: what arrived, and what was generated.

Both are summed by COHORT requests that arrived one after another. What arrived
is told from as many of the newest requests as came alike: an even load is
known well, and a shift soon.

Lengths of outputs are told by the requests that came last, those that run and
those that ended: of all that end, those that end first are short. So ends are
counted by the order of arrivals, and of many times as many requests as run, or
outputs would be told too long as soon as short ones were forgotten. Of those
that run, half is still to come, on average.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

COHORT = 32  # requests that came one after another
COHORTS = 256  # that are remembered
NEWEST, MOST = 4, 64  # cohorts that arrivals are told from
CHANCE = 3.0  # standard errors that two halves of these may be apart
LEAST = 256  # requests that outputs are told from, at least
LIVES = 8  # of a request: in less, too few of those that are long have ended
MOST_VARIANCE = 4.0  # of logarithms: a cv of 7
GRAIN = 16  # parts of a unit that logarithms are rounded to


class Load(NamedTuple):
  """What has come of late; the newest requests count.

  Attributes:
    rate_per_s: arrivals a second up to now; 0 before the second one.
    prompt_len: tokens of their prompts, mean. output_len: tokens of an output,
      mean; 1 before the first has ended.
    prompt_cv, output_cv: standard deviation of these tokens over their mean;
      1 before there are enough. That of outputs is no more than that of
      lognormal lengths whose logarithms vary as theirs do: of a few hundred
      outputs the longest one would else decide.
    lives: how many times as many tokens as those outputs that run will have,
      those have that ended: the larger, the better outputs are known.
    longest_prompt: tokens, of these prompts; 0 before the first.
    arrived: requests that the rate is told from. Its standard error is the rate
      over the root of this.
  """

  rate_per_s: float
  prompt_len: float
  output_len: float
  prompt_cv: float = 1.0
  output_cv: float = 1.0
  lives: float = 0.0
  longest_prompt: int = 0
  arrived: int = 0


class Cohort(NamedTuple):
  """Of COHORT requests that came one after another, those that have arrived,
  or those that ended by themselves.

  place: of it, counts from 0. time_s: when the first of them arrived; 0 of
  those that ended. number: how many. tokens, squares: of their prompts, or of
  what they generated, the sum of them and of their squares, and the longest.
  logs, log_squares: the sums of their logarithms, in GRAINths, and of the
  squares of these.
  """

  place: int
  time_s: float
  number: int = 0
  tokens: int = 0
  squares: int = 0
  longest: int = 0
  logs: int = 0
  log_squares: int = 0


class Recent:
  """What arrived and what ended of late: Cohorts, by place once something is
  added; until then those of a State, not copied."""

  __slots__ = ('_arrived', '_ended')

  def __init__(self, arrived: tuple[Cohort, ...], ended: tuple[Cohort, ...]):
    self._arrived: Any = arrived
    self._ended: Any = ended

  @property
  def arrived(self) -> tuple[Cohort, ...]:
    return _values(self._arrived)

  @property
  def ended(self) -> tuple[Cohort, ...]:
    return _values(self._ended)

  def add_arrived(self, order: int, time_s: float, prompt_len: int) -> None:
    """The request of this place in the order of arrivals has come."""
    self._arrived = _added(self._arrived, order, time_s, prompt_len)

  def add_ended(self, order: int, tokens: int) -> None:
    """It has had its last token, and so many in all."""
    self._ended = _added(self._ended, order, 0.0, tokens)

  def load(self, time_s: float, rows: Sequence[tuple[int, int]]) -> Load:
    """What has come until now.

    Args:
      rows: (place in the order of arrivals, tokens so far) of those that run.
    """
    prompts = alike(self.arrived, time_s)
    prompt_len, prompt_cv = _lengths(prompts, ())
    ended, running = self._outputs(rows)
    output_len, output_cv = _lengths(ended, running)
    tokens = sum([cohort.tokens for cohort in ended])
    return Load(_rate_per_s(prompts, time_s), prompt_len, output_len, prompt_cv,
                min(output_cv, _spread(ended, running)),
                tokens / max(1, 2 * sum(running)),
                max([cohort.longest for cohort in prompts], default=0),
                sum([cohort.number for cohort in prompts]))

  def _outputs(self, rows: Sequence[tuple[int, int]]
               ) -> tuple[list[Cohort], list[int]]:
    """What ended, and tokens so far of what runs, of those that came last: as
    many as run, and LIVES times as many, or LEAST."""
    known = self.ended
    newest = max([order for order, _ in rows]
                 + [COHORT * cohort.place for cohort in known], default=0)
    asked = len(rows) + max(LIVES * len(rows), LEAST)
    first = max(0, newest - asked) // COHORT
    if len(known) == COHORTS:  # those before it are forgotten
      first = max(first, min([cohort.place for cohort in known]))
    return ([cohort for cohort in known if cohort.place >= first],
            [so_far for order, so_far in rows if order >= COHORT * first])


def _values(cohorts: Any) -> tuple[Cohort, ...]:
  return cohorts if type(cohorts) is tuple else tuple(cohorts.values())


def _added(cohorts: Any, order: int, time_s: float, tokens: int
           ) -> dict[int, Cohort]:
  """The Cohorts by place, with a request more."""
  if type(cohorts) is tuple:
    cohorts = {cohort.place: cohort for cohort in cohorts}
  place = order // COHORT
  known = cohorts.get(place) or Cohort(place, time_s)
  log = round(GRAIN * math.log(max(tokens, 1)))
  cohorts[place] = Cohort(
      place, known.time_s, known.number + 1, known.tokens + tokens,
      known.squares + tokens * tokens, max(known.longest, tokens),
      known.logs + log, known.log_squares + log * log)
  if len(cohorts) > COHORTS:
    del cohorts[min(cohorts)]
  return cohorts


def alike(arrived: Sequence[Cohort], time_s: float) -> Sequence[Cohort]:
  """The newest of them: NEWEST, and twice as many as long as the older half
  came at the rate of the newer one and with prompts as long, but for chance."""
  count = NEWEST
  while count < min(MOST, len(arrived)):
    newer, older = arrived[-count:], arrived[-2 * count:-count]
    number = sum([cohort.number for cohort in older])
    apart = CHANCE * math.sqrt(2 / number)
    rates = (_rate_per_s(newer, time_s), _rate_per_s(older, newer[0].time_s))
    (mean, cv), (other, other_cv) = _lengths(newer, ()), _lengths(older, ())
    if (not 1 / (1 + apart) <= rates[0] / max(rates[1], 1e-9) <= 1 + apart
        or abs(mean - other) > apart * max(cv * mean, other_cv * other)):
      break
    count *= 2
  return arrived[-count:]


def _rate_per_s(cohorts: Sequence[Cohort], time_s: float) -> float:
  """Arrivals a second until then, of cohorts that came one after another."""
  span_s = time_s - cohorts[0].time_s if cohorts else 0.0
  number = sum([cohort.number for cohort in cohorts])
  return (number - 1) / span_s if span_s > 0 else 0.0


def _lengths(whole: Sequence[Cohort], begun: Sequence[int]
             ) -> tuple[float, float]:
  """Mean and cv of lengths; of some, what they have had so far is known. Seen
  at a random time these have had any share of their lengths: half, in the
  mean, and a third of their squares."""
  ended = sum([cohort.number for cohort in whole])
  if not ended:
    return 1.0, 1.0
  number = ended + len(begun)
  mean = (sum([cohort.tokens for cohort in whole]) + 2 * sum(begun)) / number
  square = (sum([cohort.squares for cohort in whole])
            + 3 * sum([tokens * tokens for tokens in begun])) / number
  cv = math.sqrt(max(0.0, square / mean**2 - 1))
  return mean, cv if ended >= COHORT else 1.0


def _spread(whole: Sequence[Cohort], begun: Sequence[int]) -> float:
  """The cv of lognormal lengths whose logarithms vary as these. Of some, what
  they have had so far is known: seen at a random time the logarithm of that is
  1 less than that of all, and its variance 1 more."""
  ended = sum([cohort.number for cohort in whole])
  if ended < COHORT:
    return 1.0
  number = ended + len(begun)
  logs = [cohort.logs / GRAIN for cohort in whole]
  squares = [cohort.log_squares / GRAIN**2 for cohort in whole]
  for tokens in begun:
    log = math.log(max(tokens, 1)) + 1
    logs.append(log)
    squares.append(log * log - 1)
  mean = sum(logs) / number
  variance = max(0.0, sum(squares) / number - mean * mean)
  return math.sqrt(math.exp(min(variance, MOST_VARIANCE)) - 1)
