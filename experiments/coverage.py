"""How often the intervals of a search hold the goodput they speak of.

  python -m experiments.coverage --out=out/coverage

Each of PROBLEMS is one placement whose goodput is known from --truth_seeds
long runs pooled (`truth`, with an interval of its own: Student's t over the
seeds). Then it is measured as experiments.place measures its best placements,
once a seed, with other seeds. An interval covers where it meets the truth's.
An interval of 95 % should cover 95 times of 100; intervals that never miss are
wider than they need be.

The verdict is checked as well: for each pair of PAIRS, how often the
intervals of one seed call the wrong one of two placements the better.

It prints a table and writes coverage.csv (problem, seed, low, high, truth_low,
truth_high, covered), verdicts.csv and coverage.json, as it goes. It takes over
an hour on two cores; --minutes ends it earlier, after the run or interval that
is being measured then, and Ctrl-C does at once, with what is known. The same
command goes on where one was ended, in the middle of a truth too: what its
folder holds is kept.
Columns: goodput, requests/s; covered, of how many seeds, and above and below,
the intervals that lie wholly there; width, the middle one's, as a share of the
goodput. Exit codes: 0; 2 for bad input; 130 by Ctrl-C.
"""

import csv
import functools
import json
import math
import os
import pathlib
import statistics
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsjax.config.checks import InputError, is_number, is_positive, require
from dsjax.config.placement import Placement, Slo
from dsjax.placement import candidates, goodput, judging, search
from dsjax.placement.api import make_problem
from dsjax.placement.goodput import Goodput
from experiments.common import cli, provenance, seeds, terminal
from experiments.common.children import processes


class Case(NamedTuple):
  """A placement whose goodput is asked for; aligned: KV stays in a node."""

  placement: str
  target: float = 0.9
  aligned: bool = True
  chunk: int | None = None


# OPT-13B, published latencies, ShareGPT lengths, 0.25 s and 0.1 s.
PROBLEMS = {
    'kv-limit': Case('prefill=2x1,decode=1x1'),
    'colocated': Case('colocated=2x1'),
    'chunked': Case('chunked=2x1', chunk=1024),
    'pipeline': Case('prefill=1x2,decode=1x1'),
    'two-links': Case('prefill=1x1,prefill=1x1,decode=1x1', aligned=False),
    'strict': Case('colocated=2x1', target=0.99),
}
PAIRS = (('kv-limit', 'colocated'), ('colocated', 'chunked'),
         ('pipeline', 'two-links'))
SLO = Slo(0.25, 0.1)
TRUTH_SEED = 10_000  # the first of the truth's seeds
FLAGS = {
    'problems': cli.Flag(list(PROBLEMS), f'Of {list(PROBLEMS)}.'),
    'seeds': cli.Flag(40, 'Intervals of each problem, a seed each.', low=1,
                      high=TRUTH_SEED),
    'truth_seeds': cli.Flag(20, 'Long runs at each rate of the truth.',
                            low=3),
    'truth_requests': cli.Flag(10000, 'Of each of them.', low=100),
    'requests': cli.Flag(200, 'As experiments.place --requests.', low=20),
    'tolerance': cli.Flag(0.1, 'As experiments.place --tolerance.'),
    'minutes': cli.Flag(600.0, 'At most, for truths and intervals.', low=0.0),
    'processes': cli.Flag(os.cpu_count() or 1, 'Beside each other.', low=1),
    'out': None,
}
# What a folder and the command that goes on with it have in common.
SAME = ('requests', 'tolerance', 'truth_seeds', 'truth_requests')
# Of the truth's rates: until one attains and one does not, and at the end.
STRIDE, RATIO = 1.1, 1.01


def problem_of(case: Case, seed: int, requests: int = 200,
               tolerance: float = 0.1) -> candidates.SearchProblem:
  """The SearchProblem of a case, as experiments.place has it."""
  return make_problem('opt-13b', SLO, target=case.target, seed=seed,
                      requests=requests, most_requests=4 * requests,
                      tolerance=tolerance)


def candidate_of(case: Case,
                 problem: candidates.SearchProblem) -> judging.Candidate:
  """What a search makes of the case's placement."""
  return search.candidate(problem, Placement.parse(case.placement),
                          case.chunk, case.aligned)


def estimate(requests: int, tolerance: float,
             task: tuple[str, int]) -> Goodput:
  """The Goodput of (problem, seed)."""
  case = PROBLEMS[task[0]]
  problem = problem_of(case, task[1], requests, tolerance)
  return search.measure(problem, candidate_of(case, problem))


def share(n: int, task: tuple[str, float, int]) -> float:
  """That attained, of n requests of (problem, rate, seed) after a warm-up."""
  name, rate_per_s, seed = task
  case = PROBLEMS[name]
  problem = problem_of(case, seed)
  system = judging.setup(problem, candidate_of(case, problem))
  hits = goodput.steady_hits(
      judging.run(problem, system, rate_per_s, n), problem.slo)
  return sum(hits) / len(hits)


def truth(shares_at: Callable[[float], list[float]], target: float,
          start_per_s: float) -> tuple[float, float, float]:
  """(goodput, low, high) of long runs pooled, requests/s.

  Args:
    shares_at: rate -> the share of each long run that attained.
    start_per_s: the rate to begin at.
  """
  known: dict[float, list[float]] = {}

  def attains(rate_per_s: float) -> bool:
    known[rate_per_s] = shares_at(rate_per_s)
    return statistics.fmean(known[rate_per_s]) >= target

  low = high = start_per_s
  if attains(start_per_s):
    while attains(high := STRIDE * low):
      low = high
  else:
    while not attains(low := high / STRIDE):
      high = low
  first = {rate: statistics.fmean(known[rate]) for rate in (low, high)}
  slope = (first[low] - first[high]) / math.log(high / low)
  while high / low > RATIO:
    middle = math.sqrt(low * high)
    low, high = (middle, high) if attains(middle) else (low, middle)
  near = known[low]
  rate = low * math.exp((statistics.fmean(near) - target) / slope)
  half = seeds.half_width(near) / slope
  return rate, rate * math.exp(-half), rate * math.exp(half)


class Interval(NamedTuple):
  """A line of coverage.csv: what a seed says; rates in requests/s."""

  problem: str
  seed: int
  low: float
  high: float
  truth_low: float
  truth_high: float

  @property
  def covered(self) -> bool:
    return self.low <= self.truth_high and self.high >= self.truth_low

  def per_device(self, of_truth: bool = False) -> tuple[float, float]:
    """(low, high) of this seed, or of the truth, requests/s per device."""
    low, high = ((self.truth_low, self.truth_high) if of_truth else
                 (self.low, self.high))
    devices = Placement.parse(PROBLEMS[self.problem].placement).num_devices
    return low / devices, high / devices


class Sign(NamedTuple):
  """A line of verdicts.csv: which placement a seed calls the better.

  says, truth: a problem; '' where intervals overlap.
  """

  first: str
  second: str
  seed: int
  says: str
  truth: str

  @property
  def wrong(self) -> bool:
    return bool(self.says) and self.says != self.truth


def better(first: Interval, second: Interval, of_truth: bool = False) -> str:
  """The problem that serves more per device, or ''."""
  low, high = first.per_device(of_truth)
  other_low, other_high = second.per_device(of_truth)
  if low > other_high:
    return first.problem
  return second.problem if other_low > high else ''


def signs(intervals: Iterable[Interval]) -> list[Sign]:
  """Those of all seeds that have both problems of a pair."""
  lines = {(line.problem, line.seed): line for line in intervals}
  return [Sign(first, second, seed, better(line, lines[second, seed]),
               better(line, lines[second, seed], of_truth=True))
          for (first, seed), line in lines.items()
          for name, second in PAIRS
          if name == first and (second, seed) in lines]


class Measured(NamedTuple):
  """truths: {problem: (goodput, low, high)}. begun: of those that are not
  known yet, {problem: {rate: shares of its long runs so far}}, the rate that
  it began at first. stopped: by what, '' if by nothing: Ctrl-C or --minutes.
  """

  truths: dict[str, tuple[float, float, float]]
  intervals: list[Interval]
  begun: dict[str, dict[float, list[float]]]
  stopped: str = ''


Keep = Callable[[Measured], None]


class TimeIsUp(Exception):
  """The minutes are over."""


def in_time(map: Callable[..., Iterable], clock: Callable[[], float],
            seconds: float) -> Callable[..., Iterator]:
  """A map whose answers end with TimeIsUp; one of all its calls is given at
  least, so that every command comes further."""
  end_s, spent = clock() + seconds, False

  def answers(function: Callable[[Any], Any], tasks: Sequence) -> Iterator:
    nonlocal spent
    answered = None
    for _ in tasks:
      if spent and clock() > end_s:
        raise TimeIsUp
      spent, answered = True, answered or iter(map(function, tasks))
      yield next(answered)

  return answers


def measure(options: types.SimpleNamespace, known: Measured, keep: Keep,
            bar: Progress, map: Callable[..., Iterable],
            clock: Callable[[], float] = time.monotonic) -> Measured:
  """The truth of each problem, then every seed of each, in turn.

  known: what is not measured again. keep: called with each that is.
  """
  measured = Measured(dict(known.truths), list(known.intervals), {
      name: {rate: list(shares) for rate, shares in rates.items()}
      for name, rates in known.begun.items()})
  answers = in_time(map, clock, 60 * options.minutes)
  interval = functools.partial(estimate, options.requests, options.tolerance)
  names = [name for name in options.problems if name not in measured.truths]
  line = bar.add_task('truth', total=len(names), more='')
  try:
    for name in names:
      bar.update(line, more=name)
      rates = measured.begun.setdefault(name, {})
      if not rates:
        guess, = answers(interval, [(name, TRUTH_SEED)])
        rates[guess.rate_per_s] = []

      def shares_at(rate_per_s, name=name, rates=rates):
        shares = rates.setdefault(rate_per_s, [])
        for each in answers(
            functools.partial(share, options.truth_requests),
            [(name, rate_per_s, TRUTH_SEED + i)
             for i in range(len(shares), options.truth_seeds)]):
          shares.append(each)
          keep(measured)
        return shares

      measured.truths[name] = truth(shares_at, PROBLEMS[name].target,
                                    next(iter(rates)))
      del measured.begun[name]
      keep(measured)
      bar.advance(line)
    told = {(line.problem, line.seed) for line in measured.intervals}
    tasks = [(name, seed) for seed in range(options.seeds)
             for name in options.problems if (name, seed) not in told]
    line = bar.add_task('intervals', total=len(tasks), more='')
    for (name, seed), answer in zip(tasks, answers(interval, tasks),
                                    strict=True):
      measured.intervals.append(Interval(
          name, seed, answer.low_per_s, answer.high_per_s,
          *measured.truths[name][1:]))
      keep(measured)
      bar.advance(line)
  except TimeIsUp:
    return measured._replace(stopped='--minutes')
  except KeyboardInterrupt:
    return measured._replace(stopped='Ctrl-C')
  return measured


def table(measured: Measured) -> Table:
  """A line a problem."""
  out = Table(title='goodput, requests/s: how often 95 % intervals cover it')
  for name in ('problem', 'goodput', 'covered', 'of', 'above', 'below',
               'width'):
    out.add_column(name, justify='left' if name == 'problem' else 'right')
  for name, (rate, low, high) in measured.truths.items():
    lines = [line for line in measured.intervals if line.problem == name]
    widths = [(line.high - line.low) / rate for line in lines]
    out.add_row(
        name, f'{rate:.3g} [{low:.3g}, {high:.3g}]',
        str(sum(line.covered for line in lines)), str(len(lines)),
        str(sum(line.low > high for line in lines)),
        str(sum(line.high < low for line in lines)),
        f'{statistics.median(widths):.0%}' if widths else '-')
  return out


def table_of_signs(lines: list[Sign]) -> Table:
  """A line a pair."""
  out = Table(title='which of two serves more per device')
  for name in ('pair', 'truth', 'right', 'wrong', 'no clear winner'):
    out.add_column(name, justify='left' if name == 'pair' else 'right')
  for first, second in PAIRS:
    told = [line for line in lines if (line.first, line.second)
            == (first, second)]
    if told:
      out.add_row(f'{first}, {second}', told[0].truth or 'equal',
                  str(sum(bool(t.says) and not t.wrong for t in told)),
                  str(sum(t.wrong for t in told)),
                  str(sum(not t.says for t in told)))
  return out


def save(out: pathlib.Path, options: types.SimpleNamespace,
         measured: Measured) -> None:
  """Writes coverage.csv, verdicts.csv and coverage.json."""
  for name, kind, lines, last in (
      ('coverage.csv', Interval, measured.intervals, 'covered'),
      ('verdicts.csv', Sign, signs(measured.intervals), 'wrong')):
    provenance.save_csv(out / name, (*kind._fields, last), [
        (*line, int(getattr(line, last))) for line in lines])
  provenance.save_json(
      out / 'coverage.json',
      {'truths': measured.truths, 'stopped': measured.stopped,
       'begun': {name: list(rates.items())
                 for name, rates in measured.begun.items()}},
      cli.asked(options, FLAGS), ['sharegpt', 'published'])


def read(out: pathlib.Path, options: types.SimpleNamespace) -> Measured:
  """What `save` wrote; nothing where it did not.

  Raises:
    InputError: it was measured in another way, or the files are others.
  """
  if not (out / 'coverage.json').exists():
    return Measured({}, [], {})
  try:
    written = json.loads((out / 'coverage.json').read_text())
    before = written['made_by']['options']
    asked = [before[name] for name in SAME]
    with open(out / 'coverage.csv', newline='') as file:
      lines = [Interval(line['problem'], int(line['seed']),
                        *(float(line[name]) for name in Interval._fields[2:]))
               for line in csv.DictReader(file)]
    truths = {name: (float(rate), float(low), float(high))
              for name, (rate, low, high) in written['truths'].items()}
    begun = {name: [(float(rate), [float(each) for each in shares])
                    for rate, shares in rates]
             for name, rates in written.get('begun', {}).items()}
  except (ValueError, KeyError, TypeError, AttributeError, OSError,
          OverflowError, RecursionError, csv.Error) as error:
    raise InputError(f'--out={out}: its coverage.json and coverage.csv cannot '
                     f'be gone on from: {error!r}') from error
  for name, value in zip(SAME, asked, strict=True):
    require(value == getattr(options, name), f'--{name}',
            getattr(options, name), f'{value}, as in {out}, or another --out')
  _check(out, options, truths, begun, lines)
  return Measured(truths, lines, {
      name: dict(rates) for name, rates in begun.items()})


def _check(out, options, truths, begun, lines):
  """Raises InputError, naming the file, for what no run writes."""
  for name, known in (('coverage.json', {*truths, *begun}),
                      ('coverage.csv', {line.problem for line in lines})):
    require(known <= {*PROBLEMS}, f'{out}/{name}: problem', sorted(known),
            f'of {list(PROBLEMS)}')
  for name, (rate, low, high) in truths.items():
    require(0 <= low <= rate <= high < math.inf and rate > 0,
            f'{out}/coverage.json: truths.{name}', [rate, low, high],
            'a rate above 0 within its interval')
  for name, rates in begun.items():
    require(name not in truths, f'{out}/coverage.json: begun', name,
            'a problem without a truth')
    require(len(dict(rates)) == len(rates), f'{out}/coverage.json: begun.'
            f'{name}', [rate for rate, _ in rates], 'each rate once')
    for rate, shares in rates:
      require(is_positive(rate) and len(shares) <= options.truth_seeds
              and all(map(is_number(0, 1), shares)),
              f'{out}/coverage.json: begun.{name}', [rate, shares],
              f'a rate above 0 and {options.truth_seeds} shares at most')
  for line in lines:
    require(0 <= line.seed < TRUTH_SEED and 0 <= line.low <= line.high,
            f'{out}/coverage.csv: {line.problem}',
            f'{line.seed}, {line.low}, {line.high}',
            f'a seed below {TRUTH_SEED} and an interval')
    require(truths.get(line.problem, ())[1:] == (
        line.truth_low, line.truth_high), f'{out}/coverage.csv: {line.problem}',
            f'{line.truth_low}, {line.truth_high}',
            'the truth of coverage.json, as the same run wrote both')
  require(len({line[:2] for line in lines}) == len(lines),
          f'{out}/coverage.csv: lines', len(lines), 'of a seed each')


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Measures, shows and writes."""
  for name in options.problems:
    require(name in PROBLEMS, '--problems', name, f'of {list(PROBLEMS)}')
  require(options.problems and len(set(options.problems)) == len(
      options.problems), '--problems', ','.join(options.problems),
          f'some of {list(PROBLEMS)}, each once')
  bar = Progress(TextColumn('{task.description}'), BarColumn(),
                 TextColumn('{task.completed}/{task.total} '
                            '{task.fields[more]}'),
                 TimeElapsedColumn(), console=console, transient=True)
  known, keep = Measured({}, [], {}), lambda measured: None
  if options.out:
    out = pathlib.Path(options.out)
    known, keep = read(out, options), functools.partial(save, out, options)
  tell = terminal.now_and_then(console)

  def kept(measured: Measured) -> None:
    keep(measured)
    tell(f'{len(measured.truths)} truths, {len(measured.intervals)} intervals')

  with processes(options.processes) as run_map, bar:
    measured = measure(options, known, kept, bar, run_map)
  console.print(table(measured))
  if lines := signs(measured.intervals):
    console.print(table_of_signs(lines))
  terminal.stopped(console, measured.stopped)
  if options.out:
    keep(measured)
    terminal.written(console, options.out, 'coverage.csv', 'verdicts.csv',
                     'coverage.json')
  return 130 if measured.stopped == 'Ctrl-C' else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
