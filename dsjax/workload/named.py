"""Workloads from what a user writes: a name, a file, pairs of lengths."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Self

from dsjax.config.checks import (
    InputError,
    is_integer,
    is_number,
    plain,
    require,
)
from dsjax.config.request import Request
from dsjax.workload import traffic
from dsjax.workload.files import MAX_LEN, Entry, read_lengths
from dsjax.workload.requests import (
    KINDS,
    MOST_ARRIVAL_S,
    arrivals,
    from_lengths,
)

PROCESSES = (*KINDS, 'resample')
SAMPLE = 4096  # entries drawn of a mixture
_FIXED = re.compile('fixed:([1-9][0-9]{0,8})x([1-9][0-9]{0,8})')

Lengths = str | traffic.Mixture | Sequence[Entry] | Sequence[tuple[int, int]]


def lengths_of(lengths: Lengths, n: int = SAMPLE,
               seed: int = 0) -> tuple[Entry, ...]:
  """The lengths that a workload draws from.

  Args:
    lengths: a name in traffic.MIXTURES; 'fixed:PROMPTxOUTPUT', in tokens; a
      file as read_lengths takes it; a Mixture; or a list of Entry or of
      (prompt, output) pairs, which is put in the order of its arrival times
      where it has them.
    n: how many are drawn of a mixture. seed: of the draw.

  Raises:
    InputError.
  """
  if isinstance(lengths, traffic.Mixture):
    return traffic.draw(lengths, n, seed)
  if not isinstance(lengths, str):
    require(isinstance(lengths, Sequence) and lengths, 'lengths', lengths,
            'a name, a file, or a list of (prompt, output) pairs')
    entries = tuple(_entry(f'lengths[{i}]', own)
                    for i, own in enumerate(lengths))
    if any(entry.arrival_s is None for entry in entries):
      return entries
    return tuple(sorted(entries, key=lambda entry: entry.arrival_s or 0.0))
  if lengths in traffic.MIXTURES:
    return traffic.draw(lengths, n, seed)
  if sizes := _FIXED.fullmatch(lengths):
    return (Entry(None, *map(int, sizes.groups())),)
  try:
    return read_lengths(lengths)
  except InputError as error:
    if '.' in lengths or '/' in lengths:
      raise
    raise InputError(f'lengths={lengths!r}: must be one of '
                     f"{sorted(traffic.MIXTURES)}, 'fixed:PROMPTxOUTPUT', or "
                     'a file of lengths') from error


def _entry(where: str, given: Any) -> Entry:
  """The Entry of an item of a user's own list, checked."""
  require(isinstance(given, Entry) or isinstance(given, tuple)
          and len(given) == 2, where, given,
          'a (prompt, output) pair, in tokens, or an Entry')
  values = list(map(plain, given))
  entry = Entry(*values) if isinstance(given, Entry) else Entry(None, *values)
  require(entry.arrival_s is None
          or is_number(0, MOST_ARRIVAL_S)(entry.arrival_s),
          f'{where}.arrival_s', entry.arrival_s,
          f'None, or seconds from the start, 0 to {MOST_ARRIVAL_S:.0e}')
  for field in ('prompt_len', 'output_len'):
    size = getattr(entry, field)
    require(is_integer(1, MAX_LEN)(size), f'{where}.{field}', size,
            f'an integer from 1 to {MAX_LEN}')
  return entry


def arrivals_of(process: str, rate_per_s: float | None, n: int, seed: int = 0,
                cv: float = 1.0, entries: Sequence[Entry] | None = None,
                swing: float = 0.0,
                period_s: float = 86400.0) -> tuple[float, ...]:
  """Arrival times of n requests, not decreasing.

  Args:
    process: one of PROCESSES: see requests.arrivals; 'resample' has the
      burstiness of `entries` and, where rate_per_s is None, their rate.
    swing, period_s: the rate goes up and down by this share of itself, in
      this time (traffic.diurnal).

  Raises:
    InputError.
  """
  require(process in PROCESSES, 'process', process, f'one of {PROCESSES}')
  require(not swing or process not in ('burst', 'trace'), 'swing', swing,
          f'0 with {process} arrivals')
  if process == 'resample':
    history = traffic.fit(entries or ())
    process, cv = 'gamma', history.cv
    rate_per_s = rate_per_s or history.rate_per_s
  if swing:
    if rate_per_s is None:
      raise InputError('rate_per_s=None: must be a number above 0')
    return traffic.vary(arrivals(process, 1.0, n, seed, cv),
                        traffic.diurnal(rate_per_s, swing, period_s))
  return arrivals(process, rate_per_s, n, seed, cv, entries)


@dataclasses.dataclass(frozen=True)
class Source:
  """Requests at any rate: `source(rate_per_s, n)` gives n of them.

  The same lengths, and the same gaps but for their scale, at every rate
  (common random numbers). It can be pickled, so that processes may share it.

  Attributes:
    entries: the lengths that are drawn; of a mixture, a sample.
    seed, process, cv: see arrivals_of. 'trace': the entries in their order,
      no more than there are, at their own times where rate_per_s is None.
    mixture: what every request has lengths of its own from; None: entries.
    context: longer requests are cut to it. cut: how many entries were.
  """

  entries: tuple[Entry, ...]
  seed: int = 0
  process: str = 'poisson'
  cv: float = 1.0
  mixture: traffic.Mixture | None = None
  context: int | None = None
  cut: int = 0

  def __call__(self, rate_per_s: float | None, n: int) -> list[Request]:
    n = self._most(n)
    return self._at(arrivals_of(self.process, rate_per_s, n, self.seed,
                                self.cv, self.entries))

  def lengths(self, n: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of the first n requests, at any rate."""
    return [(len(r.prompt), r.sampling.max_tokens or 0)
            for r in self._at((0.0,) * self._most(n))]

  def _most(self, n: int) -> int:
    return min(n, len(self.entries)) if self.process == 'trace' else n

  def _at(self, times: Sequence[float]) -> list[Request]:
    entries = self.entries
    if self.mixture:
      entries = _within(traffic.draw(self.mixture, len(times), self.seed),
                        self.context)
    return from_lengths(entries, len(times), times, seed=self.seed,
                        in_order=bool(self.mixture)
                        or self.process == 'trace')[0]

  @property
  def longest(self) -> int:
    """Tokens of the longest request there can be, prompt and output."""
    if self.mixture:
      most = self.mixture.prompt.high + self.mixture.output.high
      return min(most, self.context or most)
    return max(e.prompt_len + e.output_len for e in self.entries)

  def beyond(self, context: int) -> int:
    """How many entries are longer than a context, in tokens."""
    return sum(e.prompt_len + e.output_len > context for e in self.entries)

  def within(self, context: int) -> Self:
    """With longer requests cut: their prompt, and then their output."""
    require(context >= 2, 'context', context, '2 tokens or more')
    return dataclasses.replace(
        self, entries=_within(self.entries, context), context=context,
        cut=self.beyond(context))


def _within(entries: Sequence[Entry],
            context: int | None) -> tuple[Entry, ...]:
  """The entries, cut to a context of so many tokens."""
  if context is None:
    return tuple(entries)
  shorter = []
  for e in entries:
    prompt_len = min(e.prompt_len, max(1, context - e.output_len))
    shorter.append(e._replace(prompt_len=prompt_len, output_len=min(
        e.output_len, context - prompt_len)))
  return tuple(shorter)


def source(lengths: Lengths, seed: int = 0, process: str = 'poisson',
           cv: float = 1.0) -> Source:
  """The Source of these lengths and arrivals; see lengths_of, arrivals_of.

  Raises:
    InputError.
  """
  require(process in PROCESSES, 'process', process, f'one of {PROCESSES}')
  require(is_number(0.01, 100)(cv), 'cv', cv, 'a number from 0.01 to 100')
  mixture = traffic.MIXTURES.get(lengths) if isinstance(
      lengths, str) else lengths
  return Source(lengths_of(lengths, SAMPLE, seed), seed, process, cv,
                mixture if isinstance(mixture, traffic.Mixture) else None)
