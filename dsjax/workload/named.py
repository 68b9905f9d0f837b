"""Workloads from what a user writes: a name, a file, pairs of lengths."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from dsjax.config.checks import (
    is_integer,
    is_number,
    is_positive,
    naming_file,
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
    draws,
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
  with naming_file('lengths', lengths, f'{", ".join(sorted(traffic.MIXTURES))}'
                   ', fixed:PROMPTxOUTPUT, or a file of lengths'):
    return read_lengths(lengths)


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


def wave_of(process: str) -> traffic.Wave | None:
  """The Wave of a process with rates of its own; None for another one.

  Raises:
    InputError: neither a Wave's text nor one of PROCESSES.
  """
  wave = traffic.wave(process) if isinstance(process, str) else None
  require(wave or process in PROCESSES, 'process', process,
          f'one of {PROCESSES}, or sine:low=5:high=45:period_s=60, or '
          'step:low=5:high=45:period_s=60')
  return wave


def arrivals_of(process: str, rate_per_s: float | None, n: int, seed: int = 0,
                cv: float = 1.0, entries: Sequence[Entry] | None = None
                ) -> tuple[float, ...]:
  """Arrival times of n requests, not decreasing.

  Args:
    process: one of PROCESSES: see requests.arrivals; 'resample' has the
      burstiness of `entries` and, where rate_per_s is None, their rate. Or
      the text of a traffic.Wave: at its own rates where rate_per_s is None,
      else scaled so that this is their mean.

  Raises:
    InputError.
  """
  wave = wave_of(process)
  if wave:
    require(rate_per_s is None or is_positive(rate_per_s), 'rate_per_s',
            rate_per_s, 'None or a number above 0')
    scale = 1.0 if rate_per_s is None else rate_per_s / wave.mean_per_s
    return traffic.vary(arrivals('poisson', 1.0, n, seed), [
        (seconds, scale * rate) for seconds, rate in wave.segments()])
  if process == 'resample':
    history = traffic.fit(entries or ())
    process, cv = 'gamma', history.cv
    rate_per_s = rate_per_s or history.rate_per_s
  return arrivals(process, rate_per_s, n, seed, cv, entries)


class Phases(NamedTuple):
  """Equal parts of a period after which a workload is as before."""

  period_s: float
  names: tuple[str, ...]


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
    parts: where lengths mix or shift: a Source of each kind of them; entries
      are all of theirs. each_s: seconds of each part, in turn; None: every
      request is of one of them, with equal odds. names: of the parts.
  """

  entries: tuple[Entry, ...]
  seed: int = 0
  process: str = 'poisson'
  cv: float = 1.0
  mixture: traffic.Mixture | None = None
  context: int | None = None
  cut: int = 0
  parts: tuple[Self, ...] = ()
  each_s: float | None = None
  names: tuple[str, ...] = ()

  def __call__(self, rate_per_s: float | None, n: int) -> list[Request]:
    n = self._most(n)
    return self._at(arrivals_of(self.process, rate_per_s, n, self.seed,
                                self.cv, self.entries))

  def lengths(self, n: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of the first n requests, at any rate; where
    lengths shift with time, of each kind in turn."""
    n = self._most(n)
    times = [i * (self.each_s or 0.0) for i in range(n)]
    return [(e.prompt_len, e.output_len) for e in self.entries_at(times)]

  def entries_at(self, times: Sequence[float]) -> Sequence[Entry]:
    """The lengths of requests that arrive at these times, in their order."""
    n = len(times)
    if self.parts:
      of_parts = [part.entries_at(times) for part in self.parts]
      kinds = (draws(self.seed, n, len(self.parts)) if self.each_s is None else
               [int(t / self.each_s) % len(self.parts) for t in times])
      return [of_parts[kind][i] for i, kind in enumerate(kinds)]
    if self.mixture:
      return _within(traffic.draw(self.mixture, n, self.seed), self.context)
    if self.process == 'trace':
      return self.entries[:n]
    return [self.entries[i] for i in draws(self.seed, n, len(self.entries))]

  @property
  def phases(self) -> Phases | None:
    """Of lengths that shift, or else of a rate that does; None: of neither."""
    if self.each_s:
      return Phases(len(self.parts) * self.each_s, self.names)
    wave = wave_of(self.process)
    if wave is None:
      return None
    return Phases(wave.period_s, traffic.WAVES[wave.kind])

  def _most(self, n: int) -> int:
    return min(n, len(self.entries)) if self.process == 'trace' else n

  def _at(self, times: Sequence[float]) -> list[Request]:
    return from_lengths(self.entries_at(times), len(times), times,
                        in_order=True)[0]

  @property
  def longest(self) -> int:
    """Tokens of the longest request there can be, prompt and output."""
    if self.parts:
      return max(part.longest for part in self.parts)
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
        cut=self.beyond(context),
        parts=tuple(part.within(context) for part in self.parts))


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
  """The Source of these lengths and arrivals.

  Args:
    lengths: as lengths_of takes them; 'mix:NAME+NAME': each request of one
      of several; 'shift:SECONDS:NAME+NAME': so many seconds of each, in
      turn, for ever.
    process, cv: see arrivals_of.

  Raises:
    InputError.
  """
  wave_of(process)
  require(is_number(0.01, 100)(cv), 'cv', cv, 'a number from 0.01 to 100')
  if isinstance(lengths, str) and lengths.startswith(('mix:', 'shift:')):
    return _of_several(lengths, seed, process, cv)
  mixture = traffic.MIXTURES.get(lengths) if isinstance(
      lengths, str) else lengths
  return Source(lengths_of(lengths, SAMPLE, seed), seed, process, cv,
                mixture if isinstance(mixture, traffic.Mixture) else None)


def _of_several(text: str, seed: int, process: str, cv: float) -> Source:
  """The Source of lengths that mix or shift."""
  kind, *seconds, names = text.split(':', 1 if text.startswith('mix') else 2)
  each_s = None
  if kind == 'shift':
    try:
      each_s = float(*seconds)
    except (ValueError, TypeError):
      each_s = 0.0
  each = tuple(names.split('+'))
  require(len(each) > 1 and (
      each_s is None or traffic.LEAST_S <= each_s < math.inf), 'lengths', text,
          'mix:NAME+NAME or shift:SECONDS:NAME+NAME, '
          f'{traffic.LEAST_S} s or more')
  require(process not in ('burst', 'trace', 'resample'), 'process', process,
          f'one with arrivals of its own, beside lengths={text}')
  parts = tuple(source(name, seed + 1 + n, process, cv)  # streams of its own
                for n, name in enumerate(each))
  return Source(tuple(e for part in parts for e in part.entries), seed,
                process, cv, parts=parts, each_s=each_s, names=each)
