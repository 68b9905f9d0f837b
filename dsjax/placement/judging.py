"""How one candidate of a placement search is judged.

By the scheduler that serves, under simulated time: nothing here decides how
requests are served.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.placement import candidates, goodput
from dsjax.placement.candidates import SearchProblem
from dsjax.scheduling import scheduler
from dsjax.simulation import latency, simulator
from dsjax.workload.named import Source
from dsjax.workload.requests import exactly

# A run lasts this many times what a request may take within its objectives,
# so that queues of an overloaded system have time to grow past them.
LIFETIMES = 10
# Objectives of hours would ask for millions of requests: where a candidate's
# runs would have more than LONGEST times as many, they have this many at most,
# or so many times SearchProblem.most_requests (see Judge).
MOST_REQUESTS, MOST_TIMES, LONGEST = 4000, 4, 4


class Instant:
  """A phase that takes no time, where the other one is judged alone.

  A latency and a link: see dsjax.simulation.latency.
  """

  host_s, pp, beside = 0.0, 1, False

  def prefill_s(self, pieces: latency.Pieces) -> float:
    del pieces
    return 0.0

  def decode_s(self, batch: int, context: float) -> float:
    del batch, context
    return 0.0

  def decode_line(self, batch: int) -> tuple[float, float]:
    del batch
    return 0.0, 0.0

  def mixed_s(self, pieces: latency.Pieces, batch: int,
              context: float) -> float:
    del pieces, batch, context
    return 0.0

  def migrate_s(self, num_tokens: int) -> float:
    del num_tokens
    return 0.0


class Candidate(NamedTuple):
  """What is judged: a placement, or (phase) one instance of it alone.

  phase: '' for the whole; 'prefill': the first token is all that is asked
  for; 'decode': prefill takes no time. bound_per_s: no rate above it.
  guess_per_s: about what to expect; says what is tried first. price: of the
  devices of what is judged (clusters.price); None: their number.
  """

  placement: Placement
  prefill_tokens: int | None
  aligned: bool
  bound_per_s: float
  phase: str = ''
  guess_per_s: float = 0.0
  price: float | None = None

  @property
  def plans(self) -> list[Plan]:
    """Of the placement, or of the one instance that is judged."""
    return [plan for role, plan in self.placement.instances
            if self.phase in ('', role)]

  @property
  def devices(self) -> float:
    """How many devices it counts as: goodput is per device."""
    return self.price or sum(plan.num_devices for plan in self.plans)

  @property
  def bound_per_device(self) -> float:
    return self.bound_per_s / self.devices


class Setup(NamedTuple):
  """What a candidate's runs share; output_len: of each request, None for its
  own."""

  config: scheduler.Config
  latencies: Sequence[latency.Latency]
  link: latency.LinkLike
  slo: Slo
  output_len: int | None = None


def setup(problem: SearchProblem, candidate: Candidate) -> Setup:
  """The Setup of a candidate.

  Raises:
    InputError: as build.
  """
  config, latencies, link = candidates.build(problem, candidate.placement,
                                  candidate.prefill_tokens, candidate.aligned)
  if isinstance(problem.workload, Source):  # of no request's blocks are known
    config = dataclasses.replace(config, prefix_cache=False)
  slo, instant = problem.slo, Instant()
  if candidate.phase == 'prefill':
    config = dataclasses.replace(config, instances=config.instances[:1])
    slo = dataclasses.replace(slo, tpot_s=math.inf)
    return Setup(config, latencies[:1], instant, slo, output_len=1)
  if candidate.phase == 'decode':
    ample = InstanceConfig('prefill', 2**16, problem.page_size, 4096,
                           problem.max_len, problem.prefill_seqs)
    config = dataclasses.replace(
        config, instances=(ample, config.instances[-1]))
    slo = dataclasses.replace(slo, ttft_s=math.inf)
    return Setup(config, [instant, latencies[-1]], instant, slo)
  return Setup(config, latencies, link, slo)


def run(problem: SearchProblem, system: Setup, rate_per_s: float, n: int,
        on_event: simulator.OnEvent | None = None) -> list[Record]:
  """The records of n requests at a rate; on_event: see simulate, live."""
  return simulator.simulate(
      system.config, _requests(problem, system, rate_per_s, n),
      system.latencies, system.link, on_event=on_event, live=True).records


def _requests(problem, system, rate_per_s, n):
  """n requests at a rate, as this Setup has them."""
  requests = problem.workload(rate_per_s, n)
  if system.output_len:
    sampling = exactly(system.output_len)
    requests = [dataclasses.replace(r, sampling=sampling) for r in requests]
  return requests


class Runs:
  """Whether requests attained, of runs at one rate after another.

  The first run at a rate is as long as is asked. Where more is asked for, one
  run then goes on from where it was each time: the first n requests are those
  of a longer run, whose later requests come as well. While no rate passes yet
  it does not wait for the last of the n: what still runs once twice as many
  have come counts as a hit, which hides no rate that fails. Where requests
  wait for others, or are in no order, each n is a run of its own.
  """

  def __init__(self, problem: SearchProblem, system: Setup, judge: 'Judge',
               most: int) -> None:
    """most: requests of a run at most, unless the judge wants more."""
    self.problem, self.system, self.judge = problem, system, judge
    self.least_most = most
    self.rate_per_s: float | None = None
    self.going: _Run | None = None

  def __call__(self, rate_per_s: float, n: int) -> list[bool]:
    """Of the first n requests at a rate, those after the warm-up."""
    if rate_per_s != self.rate_per_s:
      self.rate_per_s, self.going = rate_per_s, None
    elif self.going is None:
      self.going = _Run(self, rate_per_s, n)
    if self.going is None or not self.going.is_ordered:
      return goodput.steady_hits(run(self.problem, self.system, rate_per_s, n),
                                 self.judge.objectives(rate_per_s))
    return goodput.steady(self.going.hits(n))

  def most(self, rate_per_s: float) -> int:
    """Requests of a run at a rate at most."""
    return max(self.least_most, self.judge.length(rate_per_s))


class _Run:
  """A run that goes on; ids: of its requests, by arrival, those that it took.
  attained: of those that ended, by id."""

  def __init__(self, runs, rate_per_s, n):
    self.runs, self.rate_per_s = runs, rate_per_s
    self.ids: list[int] = []
    self.attained: dict[int, bool] = {}
    self.done = 0  # the first so many ended
    first = _requests(runs.problem, runs.system, rate_per_s, n)
    self.is_ordered = all([r.after is None for r in first]) and all([
        a.id < b.id and a.arrival_s <= b.arrival_s
        for a, b in itertools.pairwise(first)])
    system = runs.system
    self.records = simulator.stream(system.config, self._coming(first),
                                    system.latencies, system.link)

  def _coming(self, requests):
    """These requests and then more, as many again each time."""
    most = max(len(requests), self.runs.most(self.rate_per_s))
    while True:
      more = requests[len(self.ids):]
      for request in more:
        self.ids.append(request.id)
        yield request
      if not more or len(requests) >= most:
        return
      requests = _requests(self.runs.problem, self.runs.system,
                           self.rate_per_s, min(2 * len(requests), most))

  def hits(self, n):
    """Whether each of the first n requests attained; see Runs."""
    judge, ids = self.runs.judge, self.ids
    slo = judge.objectives(self.rate_per_s)
    passes = n >= judge.length(self.rate_per_s)
    while self.done < n:
      if self.done < len(ids) and ids[self.done] in self.attained:
        self.done += 1
        continue
      if not passes and len(ids) >= 2 * n:
        break
      record = next(self.records, None)
      if record is None:
        break
      self.attained[record.id] = metrics.attains(record, slo)
    return [self.attained[id] if passes else self.attained.get(id, True)
            for id in ids[:n]]


class Judge:
  """How long a run must be, and what its requests must meet.

  A run lasts LIFETIMES of what a request may take. Where objectives are loose,
  or inf, that is too much at the highest rate of a candidate: then it has
  `most` requests, and objectives are those of which LIFETIMES fit into it, so
  that a queue that grows still shows; but no less than what a busy instance
  takes.
  """

  def __init__(self, problem: SearchProblem, system: Setup,
               bound_per_s: float, phase: str = '') -> None:
    """bound_per_s: no rate above it."""
    outputs = [o for _, o in candidates.lengths(problem, 256)]
    self.slo, self.least = system.slo, problem.requests
    self.mean = sum(outputs) / len(outputs)
    self.life_s = problem.slo.ttft_s if phase == 'prefill' else max(
        problem.slo.ttft_s, problem.slo.tpot_s * self.mean)
    self.most = max(MOST_REQUESTS, MOST_TIMES * problem.most_requests)
    asked = bound_per_s * LIFETIMES * self.life_s
    if asked <= LONGEST * self.most:
      self.most = max(self.most, math.ceil(asked))
    rows, pieces = problem.max_seqs, ((0, problem.max_len),)
    self.busy_s = 2 * max(
        seconds.mixed_s(pieces, rows, rows * problem.max_len / 2)
        for seconds in system.latencies)

  def length(self, rate_per_s: float) -> int:
    """Requests of a run at this rate."""
    asked = rate_per_s * LIFETIMES * self.life_s
    return max(self.least, math.ceil(min(asked, self.most)))

  def objectives(self, rate_per_s: float) -> Slo:
    """What its requests must meet."""
    if rate_per_s * LIFETIMES * self.life_s <= self.most:
      return self.slo
    life_s = self.most / rate_per_s / LIFETIMES
    return Slo(min(self.slo.ttft_s, max(life_s, self.busy_s)),
               min(self.slo.tpot_s, max(life_s / self.mean, self.busy_s)))


def loosened(problem: SearchProblem, candidate: Candidate,
             rate_per_s: float) -> str:
  """What a candidate was to meet at a rate, in words; '' where that is what
  the problem asks for."""
  judge = Judge(problem, setup(problem, candidate), candidate.bound_per_s)
  slo = judge.objectives(rate_per_s)
  if slo == problem.slo:
    return ''
  return (' Runs that last as long as these objectives ask for would have '
          f'{rate_per_s * LIFETIMES * judge.life_s:.2g} requests at '
          f'{rate_per_s:.3g}/s, so {candidate.placement} was to meet a TTFT of '
          f'{slo.ttft_s:.3g} s and a TPOT of {slo.tpot_s:.3g} s there.')


class Task(NamedTuple):
  """A Candidate to measure, and how.

  beat_per_s: see goodput.Bisection. effort: as many times the requests.
  tight: intervals that hold, see goodput.Bisection, and half the tolerance.
  start_per_s: the first rate; None: near the candidate's guess.
  """

  candidate: Candidate
  target: float
  beat_per_s: float | None = None
  effort: float = 1.0
  tight: bool = False
  start_per_s: float | None = None


def measure(problem: SearchProblem, task: Task) -> goodput.Goodput:
  """The Goodput of a Task. A pure function: any process may run it."""
  candidate, bound = task.candidate, task.candidate.bound_per_s
  if not bound:
    return goodput.Goodput(0.0, 0.0, 0.0, 'floor', 0.0, 0)
  system = setup(problem, candidate)
  judge = Judge(problem, system, bound, candidate.phase)
  most = math.ceil(problem.most_requests * task.effort)
  best = goodput.search(
      Runs(problem, system, judge, most), task.target,
      task.start_per_s or max(candidate.guess_per_s, bound / 16),
      1 + problem.tolerance / (2 if task.tight else 1),
      math.ceil(problem.requests * (task.effort if task.tight else 1)),
      most, goodput.Bisection(
          stride=1.1 if task.tight else 1.4, least_per_s=bound / 4**6,
          most_per_s=bound, full=judge.length,
          beat_per_s=task.beat_per_s, tight=task.tight,
          looks_from=problem.requests))
  return dataclasses.replace(best, high_per_s=min(best.high_per_s, bound))
