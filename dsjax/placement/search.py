"""The search for the placement with the highest goodput per device.

Candidates come from algorithms.py. Every one is judged by the scheduler that
serves, under simulated time: nothing here decides how requests are served. The
result is a table with intervals and a verdict: disaggregate or not, by how
much.
"""

import dataclasses
import functools
from collections.abc import (
  Callable,
  Hashable,
  Iterable,
  Iterator,
  Sequence,
)
from typing import Any, NamedTuple

from dsjax.config.checks import InputError, require
from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Placement, Plan
from dsjax.placement import bounds, candidates, clusters, judging
from dsjax.placement.algorithms import Algorithm, colocated, low_affinity
from dsjax.placement.candidates import SearchProblem
from dsjax.placement.goodput import Goodput
from dsjax.placement.judging import Candidate, Task
from dsjax.placement.verdict import (
  RankedPlacement,
  best_of,
  bottleneck,
  verdict,
)
from dsjax.simulation import latency

# Candidates judged against one incumbent at a time. A constant, so that the
# answer does not depend on how many processes there are.
WAVE = 4
# Placements of a mode that other batches are tried for, and how near the best
# they must be: these changed the goodput by up to 15 %, so what was second may
# be first.
RETRIED, NEAR = 3, 1.2
# Lines of a mode that are raced again where the best one's interval is below
# what they were beaten at.
RIVALS = 3
# Bounds are of the first SAMPLE lengths of the workload, whose mean is that of
# all within some hundredths: an interval may pass its bound by so much.
SAMPLE, SLACK = 1024, 1.1


class Progress(NamedTuple):
  """How far a search is; as text, a line for people: `report=print`.

  row: the newest line of the table, if there is a new one. done, total:
  candidates, judged or ruled out. best: the best line so far. doing: what
  begins now, where it takes long.
  """

  row: RankedPlacement | None
  done: int
  pruned: int
  total: int
  simulations: int
  best: RankedPlacement | None = None
  doing: str = ''
  unit: str = 'device'  # what goodput counts per

  def __str__(self) -> str:
    best = (f'; best {self.best.placement}: {self.best.per_device:.3g} '
            f'requests/s a {self.unit}' if self.best else '')
    return (f'{self.done} of {self.total} candidates, {self.pruned} by bounds, '
            f'{self.simulations} simulations{best}'
            + (self.doing and f'; {self.doing}'))


Report = Callable[[Progress], object]


@dataclasses.dataclass(frozen=True)
class SearchResult:
  """What a search found.

  Attributes:
    rows: by goodput per device, best first.
    verdict: disaggregate or not, in words.
    simulations: rates that were simulated, of all placements.
    pruned: candidates that a bound ruled out.
    unfit: plans whose weights and one sequence exceed the memory.
    unmeasured: plans without latencies.
    strict: the best placements at SearchProblem.strict.
    bottlenecks: what binds the best placement of each kind, by its mode.
    stopped: the search was interrupted.
    cut: lengths of the workload that were cut to the context.
  """

  rows: tuple[RankedPlacement, ...]
  verdict: str
  simulations: int
  pruned: int
  unfit: tuple[Plan, ...]
  unmeasured: tuple[Plan, ...]
  strict: tuple[RankedPlacement, ...] = ()
  bottlenecks: dict[str, str] = dataclasses.field(default_factory=dict)
  stopped: bool = False
  cut: int = 0


# --- the search ---------------------------------------------------------------


class _Search:
  """An algorithms.Search, and what it has tried."""

  def __init__(self, problem: SearchProblem, report: Report | None,
               map: Callable[..., Iterable]) -> None:
    self.problem, self.lengths = problem, candidates.lengths(problem, SAMPLE)
    self.report, self.map = report or (lambda _: None), map
    self.simulations = self.done = self.total = 0
    self.ruled_out: list[Candidate] = []  # by their bounds
    self.unfit: set[Plan] = set()
    self.unmeasured: set[Plan] = set()
    self.reasons: list[str] = []  # why an algorithm had no candidates
    self.rows: list[RankedPlacement] = []
    self.strict: list[RankedPlacement] = []
    self.bottlenecks: dict[str, str] = {}
    self.known: dict[Hashable, Any] = {}
    # What long runs have told of, and what other batches were tried for.
    self.judged: set[tuple] = set()
    self.retried: set[tuple] = set()
    longest = max(i + o for i, o in self.lengths)
    require(longest <= problem.max_len, 'SearchProblem.max_len',
            problem.max_len, f'the longest request ({longest}) or more')

  def without(self, reason: str) -> None:
    """Says why an algorithm has no candidates here."""
    self.reasons.append(reason)

  def seconds(self, plan: Plan) -> latency.Latency:
    """The latencies of a usable plan."""
    seconds = self.problem.latency_of(plan)
    if seconds is None:
      raise InputError(f'Candidate={plan}: must be a plan with latencies')
    return seconds

  def usable(self, most: int) -> list[Plan]:
    """Plans of at most `most` devices that fit and have latencies."""
    plans = []
    for plan in candidates.plans(self.problem, most):
      if self.problem.latency_of(plan) is None:
        self.unmeasured.add(plan)
      elif candidates.instance(self.problem, 'decode', plan, 64) is None:
        self.unfit.add(plan)
      else:
        plans.append(plan)
    return plans

  def candidate(self, placement: Placement, tokens: int | None = None,
                aligned: bool = False, phase: str = '') -> Candidate:
    """A Candidate with its bound; 0 where too few requests can attain."""
    link = None
    capacities_per_s: dict[str, float] = {}
    guesses_per_s: dict[str, float] = {}
    for role, plan in placement.instances:
      if phase in ('', role):
        capacities_per_s[role] = (capacities_per_s.get(role, 0.0)
                                  + self.capacity_per_s(role, plan, tokens))
        guesses_per_s[role] = (guesses_per_s.get(role, 0.0)
                               + self.guess_per_s(role, plan, tokens))
    bound_per_s = min(capacities_per_s.values())
    if placement.mode == 'disaggregated' and not phase:
      link = candidates.link_of(self.problem, aligned, placement)
      bound_per_s = min(bound_per_s, bounds.link_per_s(
          link, len(placement.prefill) * len(placement.decode), self.lengths))
    if not phase and self.hopeless(placement, tokens, link):
      bound_per_s = 0.0
    judged = Candidate(placement, tokens, aligned, bound_per_s, phase,
                       min(0.9 * bound_per_s, *guesses_per_s.values()))
    return judged._replace(price=clusters.price(
        self.problem.cluster, *judged.plans))

  def race(self, contenders: Iterable[Candidate], incumbent: float = 0.0
           ) -> tuple[Candidate, Goodput] | None:
    """In waves against the best so far, the most promising first.

    A candidate that fails at a rate half the tolerance above the best is beaten
    by that run: rates are not known better. One that cannot reach that by its
    bound is not run.
    """
    best, wave = None, WAVE // 2
    order = sorted(contenders, key=lambda c: (
        -c.guess_per_s / c.devices, -c.bound_per_device, str(c)))
    self.total += len(order)
    while order:
      beat = incumbent * (1 + self.problem.tolerance / 2)
      hopeful = [c for c in order if c.bound_per_device > beat]
      self.ruled_out += [c for c in order if c.bound_per_device <= beat]
      self.done += len(order) - len(hopeful)
      # What takes longest begins first, so that processes end together.
      tasks = [Task(c, self.problem.target, beat * c.devices or None)
               for c in sorted(hopeful[:wave], key=lambda c: -c.guess_per_s)]
      order, wave = hopeful[wave:], WAVE
      for candidate, goodput in self.measured(tasks):
        self.done += 1
        row = None if candidate.phase else self.keep(candidate, goodput)
        per_device = goodput.rate_per_s / candidate.devices
        if per_device > incumbent:
          incumbent, best = per_device, (candidate, goodput)
        self.tell(row)
    return best

  # --- bounds, each computed once -------------------------------------------

  def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
    """What `compute` gives for this key, computed once."""
    if key not in self.known:
      self.known[key] = compute()
    return self.known[key]

  def instance(self, role: str, plan: Plan, tokens: int | None
               ) -> tuple[latency.Latency, InstanceConfig]:
    """(seconds, InstanceConfig) of a plan in a role."""
    seconds = self.seconds(plan)
    config = candidates.instance(self.problem, role, plan,
                                 tokens or self.tokens(plan))
    if config is None:
      raise InputError(f'Candidate={plan}: must be a plan that fits')
    return seconds, config

  def tokens(self, plan: Plan) -> int:
    """candidates.batch_tokens of a plan."""
    return self.once(('tokens', plan), lambda: candidates.batch_tokens(
        self.problem, self.seconds(plan)))

  def capacity_per_s(self, role: str, plan: Plan,
                     tokens: int | None) -> float:
    return self.once((role, plan, tokens), lambda: bounds.capacity_per_s(
        *self.instance(role, plan, tokens), self.lengths))

  def guess_per_s(self, role: str, plan: Plan, tokens: int | None) -> float:
    problem = self.problem
    if role == 'decode':
      return self.once(('guess', role, plan), lambda: bounds.tpot_guess_per_s(
          *self.instance(role, plan, tokens), self.lengths,
          problem.slo.tpot_s))
    return self.once(('guess', role, plan), lambda: bounds.ttft_guess_per_s(
        *self.instance(role, plan, tokens), self.lengths, problem.slo.ttft_s,
        problem.target))

  def hopeless(self, placement: Placement, tokens: int | None,
               link: latency.Link | None) -> bool:
    """Whether too many requests miss an objective on an idle machine."""
    first, last = placement.instances[0], placement.instances[-1]
    share = self.once(
        ('idle', *first, *last, tokens), lambda: bounds.idle_share(
            self.problem.slo, self.instance(*first, tokens),
            self.instance(*last, tokens), link, self.lengths))
    return bounds.out_of_reach(share, self.problem.target, len(self.lengths))

  # --- what was tried -------------------------------------------------------

  def tell(self, row: RankedPlacement | None = None, doing: str = '') -> None:
    served = (line for line in self.rows if line.goodput.rate_per_s)
    self.report(Progress(
        row, self.done, len(self.ruled_out), self.total, self.simulations,
        max(served, key=lambda line: line.per_device, default=None), doing,
        clusters.unit(self.problem.cluster)))

  def measured(self, tasks: Sequence[Task]
               ) -> Iterator[tuple[Candidate, Goodput]]:
    """(candidate, Goodput) of each task, in order."""
    measure = functools.partial(judging.measure, self.problem)
    for task, goodput in zip(tasks, self.map(measure, tasks), strict=True):
      self.simulations += goodput.runs
      yield task.candidate, goodput

  def keep(self, candidate: Candidate, goodput: Goodput) -> RankedPlacement:
    """Adds a line, in place of what was known of the same candidate."""
    row = _row(candidate, goodput)
    self.rows = [r for r in self.rows if _key(r) != _key(row)] + [row]
    return row

  def best(self) -> list[RankedPlacement]:
    """The best line of each mode that serves anything."""
    return list(best_of(
        (row for row in _sorted(self.rows) if row.goodput.rate_per_s),
        lambda row: row.placement.mode).values())

  def rival(self, best: RankedPlacement) -> Candidate | None:
    """What may serve more than the best line of a mode, which has an interval:
    what was ruled out when a rough line was thought to serve more."""
    above, mode = best.interval_per_device[1], best.placement.mode
    hopes = [(row.per_device or row.interval_per_device[1]
              * row.goodput.attained / self.problem.target, self.again(row))
             for row in self.rows
             if row.placement.mode == mode and _key(row) not in self.judged
             and (row.per_device > best.per_device
                  or row.interval_per_device[1] > above)]
    hopes += [(each.guess_per_s / each.devices, each)
              for each in self.ruled_out
              if each.placement.mode == mode and not each.phase
              and each.bound_per_device > above]
    return max(hopes, key=lambda hope: (hope[0], str(hope[1])),
               default=(0.0, None))[1]

  def sizes(self, placement: Placement) -> list[int]:
    """Tokens of a prefill batch that are worth a try beside what suits it:
    what the paper has, and more prompts at once, which pays where they queue
    for a pipeline."""
    plan = placement.instances[0][1]
    base = self.tokens(plan)
    return sorted({candidates.saturation(self.seconds(plan)), 2 * base,
                   4 * base} - {base})

  def again(self, row: RankedPlacement,
            tokens: int | None = None) -> Candidate:
    """The Candidate of a line, of another batch where that is given."""
    return self.candidate(row.placement, tokens or row.prefill_tokens,
                          row.aligned)

  def finish(self) -> None:
    """Other batches for the first few of each mode, then of each the best: its
    interval, then the second target."""
    problem = self.problem
    self.retry(RETRIED)
    self.intervals()
    if self.retry(1):  # what was raced again may have won
      self.intervals()
    if problem.strict:
      tasks = [Task(self.again(r)._replace(bound_per_s=r.goodput.rate_per_s),
                    problem.strict, effort=problem.strict_effort,
                    tight=problem.strict_effort > 1,
                    start_per_s=0.7 * r.goodput.rate_per_s)
               for r in self.best()]
      for candidate, goodput in self.measured(tasks):
        self.strict.append(_row(candidate, goodput))
        self.tell()
    rows = self.best()
    binds = functools.partial(bottleneck, problem)
    for row, words in zip(rows, self.map(binds, rows), strict=True):
      self.bottlenecks[row.placement.mode] = words

  def retry(self, most: int) -> bool:
    """Races other batches of the first lines of each mode, so many of them;
    whether one serves more than the best."""
    won = False
    for best in self.best():
      # A short run may say more of another: the best goes first all the same.
      same = [row for row in (best, *_sorted(
          row for row in self.rows if row is not best))
              if row.placement.mode == best.placement.mode
              and not row.placement.chunked
              and NEAR * row.per_device >= best.per_device][:most]
      new = [row for row in same
             if (row.placement, row.aligned) not in self.retried]
      self.retried |= {(row.placement, row.aligned) for row in new}
      won |= bool(new and self.race(
          [self.again(row, size) for row in new
           for size in self.sizes(row.placement)], best.per_device))
    return won

  def intervals(self) -> None:
    """An interval of the best line of each mode.

    Where that is below what others were beaten at, the most promising of them
    are raced against it by runs as long, one after another.
    """
    problem = self.problem
    for _ in range(1 + RIVALS):
      tasks = []
      for best in best_of(
          (row for row in _sorted(self.rows)
           if row.goodput.rate_per_s or row.goodput.tight),
          lambda row: row.placement.mode).values():
        rival = (self.rival(best) if best.goodput.tight
                 else self.again(best))
        if rival is not None:
          tasks.append(Task(
              _slack(rival), problem.target, best.goodput.tight
              and best.per_device * rival.devices or None,
              effort=problem.effort, tight=True,
              start_per_s=best.goodput.rate_per_s))
      if not tasks:
        return
      self.tell(doing='now the intervals of '
                f'{", ".join(t.candidate.placement.mode for t in tasks)}, by '
                f'runs of {problem.effort:g} times as many requests')
      for candidate, goodput in self.measured(tasks):
        row = self.keep(candidate, goodput)
        self.judged.add(_key(row))
        self.ruled_out = [c for c in self.ruled_out
                          if _key(_row(c, goodput)) != _key(row)]
        self.tell(row)

  def check_floor(self) -> None:
    """Raises InputError where no placement can meet what is asked."""
    problem = self.problem
    usable = self.usable(problem.cluster.num_devices)
    if not usable:
      raise InputError(
          f'Cluster: no plan of {problem.model.name} is usable on '
          f'{problem.cluster.num_devices} devices: {len(self.unfit)} do not '
          f'fit in memory ({candidates.names(self.unfit)}), '
          f'{len(self.unmeasured)} have no latencies '
          f'({candidates.names(self.unmeasured)}); there are latencies of '
          f'{candidates.names(candidates.measured(problem))}: ask for as many '
          "devices as one of these takes, or for latency='roofline:a100-80g' "
          'and the like, which knows every plan')
    for plan in usable:
      require(self.capacity_per_s('colocated', plan, None)
              < plan.pp / bounds.LEAST_S, f'latency({plan})',
              self.seconds(plan),
              'steps that take some time: in 0 s every rate is served')
    middle = sorted(i for i, _ in self.lengths)[len(self.lengths) // 2]
    latencies = [self.seconds(plan) for plan in usable]
    for field, asked_s, floor_s in (
        ('Slo.ttft_s', problem.slo.ttft_s,
         min(seconds.prefill_s(((0, middle),)) for seconds in latencies)),
        ('Slo.tpot_s', problem.slo.tpot_s,
         min(seconds.decode_s(1, middle) for seconds in latencies)
         if any(o > 1 for _, o in self.lengths) else 0.0)):
      require(asked_s > floor_s, field, asked_s,
              f'above {floor_s:.4g} s, what a median request takes on an idle '
              'machine under the fastest plan')
    if problem.rate_per_s:
      most = sum(nodes.num_devices * max((
          self.capacity_per_s(role, plan, None) / plan.num_devices
          for plan in usable for role in ('prefill', 'decode')
          if plan.kind == kind), default=0.0)
                 for kind, nodes in problem.cluster.kinds.items())
      require(problem.rate_per_s <= most, 'SearchProblem.rate_per_s',
              problem.rate_per_s, f'at most {most:.4g}, the capacity of the '
              'cluster by the work of a request')

  def result(self, stopped: bool) -> SearchResult:
    if not self.total and not stopped:
      raise InputError('algorithms: no placement was judged: '
                       + ('; '.join(self.reasons) or 'they had no candidates'))
    rows = _sorted(self.rows)
    words = ('Stopped before a placement was judged.'
             if stopped and not rows else verdict(rows, self.problem))
    for row in self.best()[:1]:
      judged = self.again(row)
      words += judging.loosened(
          self.problem, _slack(judged) if row.goodput.tight else judged,
          row.goodput.rate_per_s)
    return SearchResult(
        rows, words, self.simulations, len(self.ruled_out),
        tuple(sorted(self.unfit, key=repr)),
        tuple(sorted(self.unmeasured, key=repr)), _sorted(self.strict),
        self.bottlenecks, stopped)


def candidate(problem: SearchProblem, placement: Placement,
              tokens: int | None = None, aligned: bool = True) -> Candidate:
  """The Candidate of a placement, for `measure`.

  Args:
    tokens: of a prefill batch or, if chunked, of a step. aligned: KV moves
      inside a node.
  """
  return _Search(problem, None, map).candidate(placement, tokens, aligned)


def measure(problem: SearchProblem, candidate: Candidate) -> Goodput:
  """The Goodput of a Candidate, as a search ends with its best."""
  rough = judging.measure(problem, Task(candidate, problem.target))
  return judging.measure(problem, Task(
      _slack(candidate), problem.target, effort=problem.effort, tight=True,
      start_per_s=rough.rate_per_s or None))


def _slack(candidate: Candidate) -> Candidate:
  """With a bound that holds whatever the lengths are."""
  return candidate._replace(bound_per_s=SLACK * candidate.bound_per_s)


def _row(candidate: Candidate, goodput: Goodput) -> RankedPlacement:
  return RankedPlacement(candidate.placement, goodput, candidate.aligned,
                         candidate.prefill_tokens, candidate.price)


def _key(row: RankedPlacement) -> tuple:
  return row.placement, row.prefill_tokens, row.aligned


def _sorted(rows: Iterable[RankedPlacement]) -> tuple[RankedPlacement, ...]:
  return tuple(sorted(rows, key=lambda r: (
      -r.per_device, -r.interval_per_device[1], repr(r.placement))))


def search(problem: SearchProblem,
           algorithms: Iterable[Algorithm] = (low_affinity, colocated),
           report: Report | None = None,
           map: Callable[..., Iterable] = map) -> SearchResult:
  """The best placements for a problem.

  A KeyboardInterrupt ends the search; the result has what is known.

  Args:
    algorithms: of algorithms.py, or your own.
    report: called as candidates are done; `print` will do.
    map: (function, items) -> results in order; where problem can be pickled,
      also a process pool's. The result does not depend on it.

  Raises:
    InputError: no plan fits, none is measured, the objectives are below
      the latency of an idle machine (says the floor), no placement can
      serve rate_per_s, or the algorithms have no candidates.
  """
  state, stopped = _Search(problem, report, map), False
  state.check_floor()
  try:
    for algorithm in algorithms:
      algorithm(state)
    state.finish()
  except KeyboardInterrupt:
    stopped = True
  return state.result(stopped)
