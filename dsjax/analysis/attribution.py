"""Why requests missed their objectives, and which one change helps most.

A request's time from arrival to its last token is cut into CAUSES. Before
the first token lie `prefill_queue` and `prefill`, in every mode: the prefill
samples the first token, so the KV transfer comes after it. After the first
token lie `decode_queue` (no pages or no place in a batch), `transfer`,
`decode` and, on an instance that does both phases, `interference`: the time
in which it ran prompts, less what the same step takes without them. Before the
first token, what a prompt that was sent to its instance waits behind steps in
flight is `interference` where they only decode, else `prefill_queue`. From a
preemption until the request decodes again, all is `preemption`, wherever the
first token lies. A prompt that waits at an idle prefill instance waits for
pages that finished prompts still hold there: that part of its queue is
`transfer` while KV leaves the instance, else `decode_queue`. On colocated
instances a wait for pages stays `prefill_queue`.

Attribution is counterfactual, request by request: were the seconds of one
cause not there, would it attain? The others are held as they are; in truth
less of one cause also shortens queues elsewhere, so counts are of the run
seen and not a forecast. Waits fall to zero, execution (`prefill`, `decode`)
to what it takes on an empty system (Fold.least estimates it from a log). A
request that would miss even there has the cause `alone`.
"""

import bisect
import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from dsjax.analysis import metrics, pairing
from dsjax.analysis.record import Record
from dsjax.analysis.recorder import Recorder
from dsjax.config.placement import Slo
from dsjax.scheduling.events import (
  Command,
  Event,
  Migrate,
  Preempt,
  RunDecode,
  RunPrefill,
)

CAUSES = ('prefill_queue', 'prefill', 'transfer', 'decode_queue',
          'interference', 'preemption', 'decode')
# Causes that no removal mends: an objective below what the request takes on an
# empty system, and an end that was not its own.
ALONE, ENDED = 'alone', ('rejected', 'refused', 'failed')
ALL = (*CAUSES, ALONE, *ENDED)
# Of each cause: the change that removes it, and what a miss then suffered.
_CHANGE = {
    'prefill_queue': ('more prefill capacity', 'waited for prefill',
                      'that wait'),
    'prefill': ('a faster prefill (larger tp, shorter batches)',
                'were slow in prefill', 'its excess over an empty system'),
    'transfer': ('a faster link', 'waited for their KV to move', 'that wait'),
    'decode_queue': ('more decode capacity (KV memory or batch places)',
                     'waited for a place to decode', 'that wait'),
    'interference': ('prefill apart from decode (or smaller chunks)',
                     'were delayed by the other phase', 'that delay'),
    'preemption': ('more KV memory', 'lost their pages', 'that delay'),
    'decode': ('a faster decode (larger tp, smaller batches)',
               'were slow in decode', 'its excess over an empty system'),
}


class StepSeconds(Protocol):
  """The part of a latency that attribution asks for."""

  def decode_s(self, batch: int, context: int) -> float:
    """Seconds of a decode step of so many rows and tokens attended to."""
    ...


# record -> (seconds of its prefill, of a decode step) on an empty system.
NoLoad = Callable[[Record], tuple[float, float]]


class Parts(NamedTuple):
  """Seconds of each of CAUSES up to the first token, and from it to the last.

  before adds up to ttft_s, after to tpot_s * (tokens - 1).
  """

  before: dict[str, float]
  after: dict[str, float]


class Miss(NamedTuple):
  """cause: one of ALL. fixes: causes whose removal suffices."""

  id: int
  cause: str
  fixes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Attribution:
  """Of the misses of a run.

  Attributes:
    misses: a Miss each. causes: {cause: misses of that cause}; they add up
      to the misses. fixes: {cause: misses that would attain without it}; a
      miss may count in several or in none.
    advice: the removal that would turn most misses into hits, in words.
  """

  misses: tuple[Miss, ...]
  causes: dict[str, int]
  fixes: dict[str, int]
  advice: str


class _Curve:
  """A quantity that grows with time, linear between its points."""

  def __init__(self):
    self.times, self.sums = [0.0], [0.0]

  def to(self, time_s, more):
    self.times.append(time_s)
    self.sums.append(self.sums[-1] + more)

  def between(self, start_s, stop_s):
    return self._at(stop_s) - self._at(start_s)

  def _at(self, time_s):
    n = bisect.bisect_right(self.times, time_s)
    if n == len(self.times):
      return self.sums[-1]
    a, b = self.times[n - 1], self.times[n]
    low, high = self.sums[n - 1], self.sums[n]
    return low + (high - low) * (time_s - a) / (b - a)


class _Source:
  """A prefill instance: what it is at, and its idle time by what held it."""

  def __init__(self):
    self.steps = self.copies = 0
    self.since_s = 0.0
    self.held = {'transfer': _Curve(), 'decode_queue': _Curve()}

  def note(self, now_s, steps=0, copies=0):
    """Closes the time up to now; then steps and copies begin or end."""
    idle = (now_s - self.since_s) * (not self.steps)
    self.held['transfer'].to(now_s, idle * bool(self.copies))
    self.held['decode_queue'].to(now_s, idle * (not self.copies))
    self.since_s = now_s
    self.steps += steps
    self.copies += copies


class _Step(NamedTuple):
  """A completed command that ran prompts: its seconds, less pure decode's."""

  start_s: float
  stop_s: float
  base_s: float | None  # None: the median of the instance's pure steps


class Fold:
  """Folds a run's events and commands, as recorder.Recorder does, into Parts.

  The same for simulated runs (simulate(..., on_event=lambda state, event,
  commands: fold.observe(event, commands))) and for the log of a real one. A
  pipelined instance is seen at its last stage.

  Args:
    latencies: of each instance, which say what a mixed step would take
      without its prompts; None where only the log is known: then the median
      of the instance's steps without prompts, and no interference where all
      steps were mixed.
  """

  def __init__(self, latencies: Sequence[StepSeconds] | None = None) -> None:
    self._latencies = latencies
    self._spans, self._new = {}, []
    self._recorder = Recorder(lambda *span: self._new.append(span))
    self._prefilled_at, self._decoded_at = {}, {}
    self._preempted = set()
    self._pairing = pairing.Pairing()
    self._starts = {}  # id -> when its instance got to its prompt
    self._mixed = collections.defaultdict(list)
    self._decoding = collections.defaultdict(_Curve)
    self._pure_s = collections.defaultdict(list)
    self._sources = collections.defaultdict(_Source)

  @property
  def records(self) -> list[Record]:
    return self._recorder.records

  def observe(self, event: Event, commands: Iterable[Command]) -> None:
    """Folds one event and the commands issued in answer to it."""
    now_s = event.time_s
    for ended in self._pairing.observe(event, commands):
      if isinstance(ended, pairing.HandOff):
        self._sources[ended.command.source].note(now_s, copies=-1)
        continue
      if isinstance(ended.command, RunPrefill):
        self._sources[ended.command.instance].note(now_s, steps=-1)
      if ended.done:
        self._done(ended)
    self._recorder.observe(event, commands)
    for command in commands:
      if isinstance(command, RunPrefill):
        for chunk in command.chunks:
          self._prefilled_at[chunk.id] = command.instance
        self._sources[command.instance].note(now_s, steps=1)
      elif isinstance(command, Migrate) and not command.more:
        self._sources[command.source].note(now_s, copies=1)
    self._label()
    for command in commands:
      if isinstance(command, Preempt):
        self._preempted.add(command.id)
      elif isinstance(command, (RunPrefill, RunDecode)):
        for row in command.rows:
          self._decoded_at[row.id] = command.instance

  def _label(self):
    """Keeps the spans that ended, with their instance."""
    for id, stage, start_s, stop_s in self._new:
      where = self._prefilled_at if stage == 'prefill_queue' else (
          self._decoded_at)
      if stage == 'decode':
        self._preempted.discard(id)
      own = self._spans.setdefault(id, [])
      if stage == 'prefill':
        at_s = min(stop_s, max(start_s, self._starts.pop(id, start_s)))
        if id not in self._preempted and at_s > start_s:
          own.append(('behind', start_s, at_s, self._prefilled_at[id]))
          start_s = at_s
      if id in self._preempted:
        stage = 'preemption'
      if stop_s > start_s:
        own.append((stage, start_s, stop_s, where.get(id)))
    self._new.clear()

  def _done(self, execution):
    """A command of an instance completed: what it added to decode steps."""
    command, start_s = execution.command, execution.started_s
    i, stop_s = command.instance, execution.ended_s
    if isinstance(command, RunDecode):
      self._pure_s[i].append((stop_s - start_s) / command.steps)
      self._decoding[i].to(start_s, 0.0)
      self._decoding[i].to(stop_s, stop_s - start_s)
      return
    for chunk in command.chunks:
      self._starts.setdefault(chunk.id, start_s)
    base_s = 0.0
    if command.rows:
      base_s = None
      if self._latencies:
        batch = len(command.rows)
        base_s = self._latencies[i].decode_s(
            batch, sum(r.base for r in command.rows)
            + batch * (command.tick + 1))
    self._mixed[i].append(_Step(start_s, stop_s, base_s))

  def parts(self) -> dict[int, Parts]:
    """{id: Parts} of requests that ended and have a token."""
    # Instances that only prefill, as far as was seen.
    apart = (set(self._sources) - set(self._pure_s)
             - set(self._decoded_at.values()))
    curves = {i: self._curve(i) for i in self._mixed}
    parts = {}
    for r in self.records:
      if r.finish_s is None or not r.token_s:
        continue
      cuts = (r.arrival_s, r.token_s[0], r.token_s[-1])
      halves = []
      for low, high in zip(cuts, cuts[1:], strict=False):
        sums = dict.fromkeys(CAUSES, 0.0)
        for stage, start_s, stop_s, where in self._spans.get(r.id, ()):
          a, b = max(start_s, low), min(stop_s, high)
          if b > a:
            self._share(sums, stage, a, b, where, curves, apart)
        halves.append(sums)
      parts[r.id] = Parts(*halves)
    return parts

  def least(self) -> NoLoad:
    """A no_load for explain, from the run itself: the least that it saw.

    Its fastest prefill a prompt token and its fastest decode step. That is too
    little for prompts whose prefill is mostly a fixed cost: their excess
    counts as a little more than it was.
    """
    by_id = self.parts()
    each = [parts.before['prefill'] / r.prompt_len
            for r in self.records if (parts := by_id.get(r.id))]
    steps = [s for own in self._pure_s.values() for s in own]
    prefill_s, decode_s = min(each, default=0.0), min(steps, default=0.0)
    return lambda record: (prefill_s * record.prompt_len, decode_s)

  def _share(self, sums, stage, a, b, where, curves, apart):
    """Adds the seconds [a, b] of a stage to their causes."""
    rest = b - a
    if stage == 'decode' and where in curves:
      taken = min(rest, curves[where].between(a, b))
      sums['interference'] += taken
      rest -= taken
    elif stage == 'behind':
      taken = min(rest, self._decoding[where].between(a, b))
      sums['interference'] += taken
      stage, rest = 'prefill_queue', rest - taken
    elif stage == 'prefill_queue' and where in apart:
      for cause, curve in self._sources[where].held.items():
        taken = min(rest, curve.between(a, b))
        sums[cause] += taken
        rest -= taken
    sums['transfer' if stage == 'migrate' else stage] += rest

  def _curve(self, instance):
    """Seconds that prompts added to an instance's steps, over time."""
    usual_s = statistics.median(self._pure_s.get(instance, (math.inf,)))
    curve = _Curve()
    for start_s, stop_s, base_s in self._mixed[instance]:
      base_s = usual_s if base_s is None else base_s
      curve.to(start_s, 0.0)
      curve.to(stop_s, max(0.0, stop_s - start_s - base_s))
    return curve


def of_log(log: pairing.Log,
           latencies: Sequence[StepSeconds] | None = None) -> Fold:
  """The Fold of a log, in order."""
  fold = Fold(latencies)
  for event, commands in log:
    fold.observe(event, commands)
  return fold


def explain(record: Record, parts: Parts | None, slo: Slo,
            no_load: NoLoad | None = None) -> Miss:
  """The Miss of a record that did not attain.

  Its cause is the removal that takes most off the objectives missed, in
  shares of them: of those that suffice alone, or, where none does, of all.

  Args:
    parts: its Parts; None where it has none.
    no_load: None: what an empty system takes counts as excess too.
  """
  if record.status not in ('stop', 'length') or parts is None:
    cause = record.status if record.status in ENDED else 'failed'
    return Miss(record.id, cause, ())
  gaps = max(1, len(record.token_s) - 1)
  ttft_s, tpot_s = record.ttft_s or 0.0, record.tpot_s or 0.0
  prefill_s, decode_s = no_load(record) if no_load else (0.0, 0.0)
  if prefill_s > slo.ttft_s or decode_s > slo.tpot_s and record.tpot_s:
    return Miss(record.id, ALONE, ())
  late = ttft_s > slo.ttft_s, tpot_s > slo.tpot_s
  gain: dict[str, float] = {}
  fixes = []
  for cause in CAUSES:
    before, after = parts.before[cause], parts.after[cause]
    if cause == 'prefill':
      before = max(0.0, before - prefill_s)
    elif cause == 'decode':
      after = max(0.0, after - decode_s * (len(record.token_s) - 1))
    gain[cause] = (late[0] * before / slo.ttft_s
                   + late[1] * after / gaps / slo.tpot_s)
    if ttft_s - before <= slo.ttft_s and tpot_s - after / gaps <= slo.tpot_s:
      fixes.append(cause)
  cause = max(fixes or CAUSES, key=gain.__getitem__)
  if not gain[cause]:  # as fast as on an empty system
    cause = 'prefill' if late[0] else 'decode'
  return Miss(record.id, cause, tuple(fixes))


def attribute(records: Iterable[Record], parts: Mapping[int, Parts], slo: Slo,
              no_load: NoLoad | None = None) -> Attribution:
  """The Attribution of the misses among records.

  Args:
    records: any of a run (those that their client cancelled do not count).
    parts: Fold.parts() of the run. no_load: as in explain.
  """
  records = metrics.by_arrival(records)
  misses = tuple(explain(r, parts.get(r.id), slo, no_load)
                 for r in records
                 if not metrics.attains(r, slo))
  causes = collections.Counter(m.cause for m in misses)
  fixes = collections.Counter(c for m in misses for c in m.fixes)
  causes = {c: causes[c] for c in ALL}
  fixes = {c: fixes[c] for c in CAUSES}
  alone = {m.id for m in misses if m.cause == ALONE}
  late = sum(r.id in alone and no_load is not None
             and no_load(r)[0] > slo.ttft_s for r in records)
  return Attribution(misses, causes, fixes, _advice(
      len(misses), causes, fixes, 2 * late >= len(alone)))


def together(runs: Iterable[Attribution]) -> Attribution:
  """The Attribution of several runs of one system: their misses added up."""
  runs = list(runs)
  misses = tuple(miss for run in runs for miss in run.misses)
  causes = {c: sum(run.causes[c] for run in runs) for c in ALL}
  fixes = {c: sum(run.fixes[c] for run in runs) for c in CAUSES}
  return Attribution(misses, causes, fixes,
                     _advice(len(misses), causes, fixes))


def _advice(count: int, causes: dict[str, int], fixes: dict[str, int],
            late: bool = False) -> str:
  """What would help most. late: most that miss alone miss TTFT."""
  if not count:
    return 'no misses'
  best = max(CAUSES, key=fixes.__getitem__)
  most = max(causes, key=causes.__getitem__)
  if most == ALONE:
    change = ('a faster prefill (larger tp) or a looser TTFT' if late else
              'a faster decode (larger tp) or a looser TPOT')
    text = (f'{change}: {causes[ALONE]} of {count} misses cannot attain even '
            'alone')
    if fixes[best]:
      text += f'; {fixes[best]} {_CHANGE[best][1]}'
    return text
  if fixes[best]:
    change, suffered, removed = _CHANGE[best]
    text = (f'{change}: {fixes[best]} of {count} misses {suffered} and would '
            f'attain were {removed} zero')
    if 2 * fixes[best] < count:
      text += f'; {causes[most]} lost most to {most}'
    return text
  if most in ENDED:
    return (f'{causes[most]} of {count} misses {most}: see their reasons in '
            'the records (those still running never ended)')
  return (f'no single change: none alone would save one of {count} misses; '
          f'{causes[most]} lost most to {most}')
