"""The placement with the highest goodput per device (DistServe section 4).

Algorithm 1 (`high_affinity`) chooses each phase's plan by itself, for clusters
whose network moves KV between any two devices; algorithm 2 (`low_affinity`)
chooses both together, stage beside stage in one node. Colocated and chunked
placements are searched as hard. Every candidate is judged by the scheduler
that serves, under simulated time: nothing here decides how requests are
served.

The answer is a table with intervals and a verdict: disaggregate or not, by
how much.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dsjax.config.checks import InputError, require
from dsjax.config.placement import Placement, Plan
from dsjax.placement import bounds
from dsjax.placement.candidates import (
  Candidate,
  Cluster,
  Problem,
  Row,
  Task,
  batch_tokens,
  build,
  instance,
  kv_tokens,
  lengths,
  link_of,
  measure,
  plans,
  saturation,
)
from dsjax.placement.verdict import limit, verdict

__all__ = ['Answer', 'Candidate', 'Cluster', 'Problem', 'Progress', 'Row',
           'Task', 'batch_tokens', 'build', 'colocated', 'high_affinity',
           'instance', 'kv_tokens', 'limit', 'low_affinity', 'measure',
           'plans', 'saturation', 'search', 'verdict']

# Candidates judged against one incumbent at a time. A constant, so that the
# answer does not depend on how many processes there are.
WAVE = 4
FINAL_EFFORT = 4.0  # requests of the best placements' runs: this many times


class Progress(NamedTuple):
  """Candidates known so far, judged or not; the newest Row."""

  row: Row | None
  done: int
  pruned: int
  total: int
  simulations: int


@dataclasses.dataclass(frozen=True)
class Answer:
  """rows: by goodput per device, best first. verdict: in words.

  simulations: runs of the simulator; pruned: candidates that a bound ruled
  out; unfit: plans whose weights and one sequence exceed the memory;
  unmeasured: plans without latencies. strict: Rows of the best placements at
  Problem.strict. limits: what binds the best placement of each kind, by its
  mode. stopped: the search was interrupted.
  """

  rows: tuple[Row, ...]
  verdict: str
  simulations: int
  pruned: int
  unfit: tuple[Plan, ...]
  unmeasured: tuple[Plan, ...]
  strict: tuple[Row, ...] = ()
  limits: dict = dataclasses.field(default_factory=dict)
  stopped: bool = False


# --- the search ---------------------------------------------------------------


class _Search:
  """The problem, and what was tried."""

  def __init__(self, problem, report, run):
    self.problem, self.report = problem, report or (lambda *_: None)
    self.run = run
    self.simulations = self.pruned = self.done = self.total = 0
    self.unfit, self.unmeasured, self.rows = set(), set(), []
    self.strict, self.limits, self.bounds = [], {}, {}
    self.lengths = lengths(problem, 1024)
    longest = max(i + o for i, o in self.lengths)
    require(longest <= problem.max_len, 'Problem.max_len', problem.max_len,
            f'the longest request ({longest}) or more')

  def seconds(self, plan):
    """The latencies of a plan, or None."""
    found = self.problem.latency_of(plan)
    if found is None:
      self.unmeasured.add(plan)
    return found

  def tokens(self, plan):
    """batch_tokens of a plan, computed once."""
    if ('tokens', plan) not in self.bounds:
      self.bounds['tokens', plan] = batch_tokens(self.problem,
                                                 self.seconds(plan))
    return self.bounds['tokens', plan]

  def usable(self, most):
    """Plans that fit and have latencies."""
    found = []
    for plan in plans(self.problem, most):
      if self.seconds(plan) is None:
        continue
      if instance(self.problem, 'decode', plan, 64) is None:
        self.unfit.add(plan)
      else:
        found.append(plan)
    return found

  def capacity(self, role, plan, tokens):
    """bounds.capacity_per_s of an instance, computed once."""
    key = role, plan, tokens
    if key not in self.bounds:
      seconds = self.seconds(plan)
      one = instance(self.problem, role, plan, tokens or self.tokens(plan))
      self.bounds[key] = bounds.capacity_per_s(seconds, one, self.lengths)
    return self.bounds[key]

  def guess(self, role, plan, tokens):
    """bounds.ttft_guess_per_s of an instance, computed once."""
    if role == 'decode':
      return math.inf
    key = 'guess', role, plan
    if key not in self.bounds:
      seconds, p = self.seconds(plan), self.problem
      one = instance(p, role, plan, tokens or self.tokens(plan))
      self.bounds[key] = bounds.ttft_guess_per_s(
          seconds, one, self.lengths, p.slo.ttft_s, p.target)
    return self.bounds[key]

  def candidate(self, placement, tokens=None, aligned=False, phase=''):
    """A Candidate with its bound; 0 where too few requests can attain."""
    split, link = placement.mode == 'disaggregated', None
    sums, guesses = {}, {}
    for role, plan in placement.instances:
      if phase in ('', role):
        sums[role] = sums.get(role, 0.0) + self.capacity(role, plan, tokens)
        guesses[role] = guesses.get(role, 0.0) + self.guess(role, plan, tokens)
    bound = min(sums.values())
    if split and not phase:
      link = link_of(self.problem, aligned)
      bound = min(bound, bounds.link_per_s(
          link, len(placement.prefill) * len(placement.decode), self.lengths))
    if not phase and self.hopeless(placement, tokens, link):
      bound = 0.0
    return Candidate(placement, tokens, aligned, bound, phase,
                     min(0.9 * bound, *guesses.values()))

  def hopeless(self, placement, tokens, link):
    """Whether too many requests miss an objective on an idle machine."""
    ends = []
    for role, plan in (placement.instances[0], placement.instances[-1]):
      seconds = self.seconds(plan)
      ends.append((seconds, instance(self.problem, role, plan,
                                     tokens or self.tokens(plan))))
    key = 'idle', *placement.instances[0], *placement.instances[-1], tokens
    if key not in self.bounds:
      self.bounds[key] = bounds.idle_share(self.problem.slo, *ends, link,
                                           self.lengths)
    return bounds.out_of_reach(self.bounds[key], self.problem.target,
                               len(self.lengths))

  def tell(self, row=None):
    self.report(Progress(row, self.done, self.pruned, self.total,
                         self.simulations))

  def measured(self, tasks):
    """(candidate, Goodput) of each task, in order."""
    work = functools.partial(measure, self.problem)
    for task, found in zip(tasks, self.run(work, tasks), strict=True):
      self.simulations += found.runs
      yield task.candidate, found

  def race(self, candidates, incumbent=0.0):
    """The best of candidates per device, above `incumbent`, or None.

    In waves against the best so far, the most promising first: who fails at
    the rate that equals it is beaten by that run; who cannot reach it by its
    bound is not run. Adds a Row for each that is (not of single phases).
    """
    best, wave = None, WAVE // 2
    order = sorted(candidates, key=lambda c: (
        -c.guess_per_s / c.num_devices, -c.bound_per_device, str(c)))
    self.total += len(order)
    while order:
      hopeful = [c for c in order if c.bound_per_device > incumbent]
      self.pruned += len(order) - len(hopeful)
      self.done += len(order) - len(hopeful)
      tasks = [Task(c, self.problem.target, incumbent * c.num_devices or None)
               for c in hopeful[:wave]]
      order, wave = hopeful[wave:], WAVE
      for candidate, found in self.measured(tasks):
        self.done += 1
        row = None if candidate.phase else self.keep(candidate, found)
        per_device = found.rate_per_s / candidate.num_devices
        if per_device > incumbent:
          incumbent, best = per_device, (candidate, found)
        self.tell(row)
    return best

  def keep(self, candidate, found):
    """Adds a Row, in place of what was known of the same candidate."""
    row = Row(candidate.placement, found, candidate.aligned,
              candidate.prefill_tokens)
    self.rows = [r for r in self.rows if _key(r) != _key(row)] + [row]
    return row

  def tops(self):
    """The best Row of each mode that serves anything."""
    found = {}
    for row in _sorted(self.rows):
      if row.goodput.rate_per_s:
        found.setdefault(row.placement.mode, row)
    return list(found.values())

  def again(self, row, tokens=None):
    """The Candidate of a Row, of another L_m where that is given."""
    return self.candidate(row.placement, tokens or row.prefill_tokens,
                          row.aligned)

  def finish(self):
    """The best of each mode: other batches, tight, then the second target.

    A tight estimate may fall below a row that was second; then that one is
    raced against it with as many requests, twice at most.
    """
    problem, tight = self.problem, {}
    for row in self.tops():
      if not row.placement.chunked:
        plan = row.placement.instances[0][1]
        base = self.tokens(plan)
        sizes = {saturation(self.seconds(plan)), 2 * base} - {base}
        self.race([self.again(row, size) for size in sorted(sizes)],
                  row.per_device)
    for _ in range(3):
      rows = [r for r in self.tops() if _key(r) not in tight.values()]
      beat = {r.placement.mode: r.per_device for r in self.rows
              if _key(r) in tight.values()}
      tasks = [Task(self.again(r), problem.target, r.placement.num_devices
                    * beat.get(r.placement.mode, 0.0) or None, FINAL_EFFORT,
                    r.goodput.rate_per_s) for r in rows]
      for candidate, found in self.measured(tasks):
        row = self.keep(candidate, found)
        if found.binds != 'beaten':
          tight[row.placement.mode] = _key(row)
        self.tell(row)
    if problem.strict:
      tasks = [Task(self.again(r), problem.strict, None,
                    problem.strict_effort,
                    0.7 * r.goodput.rate_per_s) for r in self.tops()]
      for candidate, found in self.measured(tasks):
        self.strict.append(Row(candidate.placement, found, candidate.aligned,
                               candidate.prefill_tokens))
        self.tell()
    rows = self.tops()
    work = functools.partial(limit, problem)
    for row, words in zip(rows, self.run(work, rows), strict=True):
      self.limits[row.placement.mode] = words


def _key(row):
  return row.placement, row.prefill_tokens, row.aligned


def _balanced(search, prefill, decode, prefill_per_s, decode_per_s):
  """(n, m) instances of each phase: for the rate that is asked for, or those
  that balance best per device in the cluster (algorithm 1, line 15)."""
  problem = search.problem
  total = problem.cluster.num_devices
  if problem.rate_per_s:
    n = math.ceil(problem.rate_per_s / prefill_per_s)
    m = math.ceil(problem.rate_per_s / decode_per_s)
    need = n * prefill.num_devices + m * decode.num_devices
    require(need <= total, 'Problem.rate_per_s', problem.rate_per_s,
            f'less: {n} prefill and {m} decode instances need {need} devices, '
            f'the cluster has {total}')
    return n, m
  best = None
  for n, m in itertools.product(range(1, 9), repeat=2):
    devices = n * prefill.num_devices + m * decode.num_devices
    if devices <= total and math.gcd(n, m) == 1:
      rate = min(n * prefill_per_s, m * decode_per_s) / devices
      if best is None or rate > best[0] * (1 + 1e-9):
        best = rate, (n, m)
  return best[1] if best else None


def high_affinity(search):
  """Algorithm 1: the best plan of each phase alone, then how many of each."""
  usable = search.usable(search.problem.cluster.num_devices - 1)
  best = [search.race([search.candidate(
      Placement(prefill=[plan], decode=[plan]), phase=phase)
                       for plan in usable])
          for phase in ('prefill', 'decode')]
  if None in best:
    return
  (p, p_found), (d, d_found) = best
  prefill, decode = p.placement.prefill[0], d.placement.decode[0]
  counts = _balanced(search, prefill, decode, p_found.rate_per_s,
                     d_found.rate_per_s)
  if counts:
    placement = Placement(prefill=[prefill] * counts[0],
                          decode=[decode] * counts[1])
    search.race([search.candidate(placement)])


def low_affinity(search):
  """Algorithm 2: stages of both phases side by side in a node.

  An instance of pp stages is cut into segments, a prefill and a decode
  segment of the same layers in one node, so KV stays inside nodes. Beyond
  the paper, up to Problem.replicas instances of a phase share that node.
  """
  problem = search.problem
  cluster = problem.cluster
  usable = search.usable(cluster.num_devices - 1)
  candidates = []
  counts = [(n, m) for n, m in itertools.product(
      range(1, problem.replicas + 1), repeat=2) if math.gcd(n, m) == 1]
  for prefill, decode, (n, m) in itertools.product(usable, usable, counts):
    segments = math.gcd(prefill.pp, decode.pp)
    devices = n * prefill.num_devices + m * decode.num_devices
    if (devices // segments <= cluster.devices_per_node
        and segments <= cluster.nodes):
      candidates.append(search.candidate(
          Placement(prefill=[prefill] * n, decode=[decode] * m),
          aligned=True))
  search.race(candidates)


def colocated(search):
  """Prefill-priority and chunked placements of one instance, any plan."""
  problem = search.problem
  usable = search.usable(problem.cluster.num_devices)
  search.race([search.candidate(Placement(colocated=[plan]))
               for plan in usable])
  search.race([search.candidate(Placement(chunked=[plan]), size)
               for plan in usable for size in problem.chunks
               if size > problem.max_seqs])


def search(problem: Problem,
           algorithms: Iterable[Callable] = (low_affinity, colocated),
           report: Callable[[Progress], object] | None = None,
           map: Callable[..., Iterable] = map) -> Answer:
  """The best placements for a problem: an Answer.

  A KeyboardInterrupt ends the search; the Answer has what is known.

  Args:
    algorithms: of high_affinity, low_affinity, colocated.
    report: called with a Progress as candidates are done.
    map: (function, items) -> results in order; where problem can be pickled,
      also a process pool's. The answer does not depend on it.

  Raises:
    InputError: no plan fits, none is measured, the objectives are below
      the latency of an idle machine (says the floor), or no placement can
      serve rate_per_s.
  """
  state = _Search(problem, report, map)
  _check_floor(state)
  stopped = False
  try:
    for algorithm in algorithms:
      algorithm(state)
    state.finish()
  except KeyboardInterrupt:
    stopped = True
  rows = _sorted(state.rows)
  return Answer(rows, verdict(rows, problem), state.simulations, state.pruned,
                tuple(sorted(state.unfit, key=repr)),
                tuple(sorted(state.unmeasured, key=repr)),
                _sorted(state.strict), state.limits, stopped)


def _sorted(rows):
  return tuple(sorted(rows, key=lambda r: (
      -r.per_device, -r.interval_per_device[1], repr(r.placement))))


def _check_floor(state):
  problem = state.problem
  usable = state.usable(problem.cluster.num_devices)
  if not usable:
    raise InputError(
        f'Cluster: no plan of {problem.model.name} is usable on '
        f'{problem.cluster.num_devices} devices: '
        f'{len(state.unfit)} do not fit in memory, '
        f'{len(state.unmeasured)} have no latencies')
  middle = sorted(i for i, _ in state.lengths)[len(state.lengths) // 2]
  floors = [(f'Slo.{name}', asked, min(floor(state.seconds(p))
                                       for p in usable))
            for name, asked, floor in (
                ('ttft_s', problem.slo.ttft_s,
                 lambda seconds: seconds.prefill_s(((0, middle),))),
                ('tpot_s', problem.slo.tpot_s,
                 lambda seconds: seconds.decode_s(1, middle)))]
  for field, asked, floor in floors:
    require(asked > floor, field, asked,
            f'above {floor:.4g} s, what a median request takes on an idle '
            'machine under the fastest plan')
  if problem.rate_per_s:
    most = problem.cluster.num_devices * max(
        state.capacity(role, p, None) / p.num_devices
        for p in usable for role in ('prefill', 'decode'))
    require(problem.rate_per_s <= most, 'Problem.rate_per_s',
            problem.rate_per_s, f'at most {most:.4g}, the capacity of the '
            'cluster by the work of a request')
