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
from collections.abc import Callable
from typing import NamedTuple

from dsjax import (
    bounds,
    goodput,
    latency,
    pages,
    roofline,
    scheduler,
    simulator,
)
from dsjax.base import (
    InputError,
    InstanceConfig,
    ModelConfig,
    Placement,
    Plan,
    Slo,
    require,
)

# Of a device's memory: the share that is used, and what of it neither weights
# nor KV get (distserve.md 5: the released table's 0.95 and 0.8 GB).
USABLE, RESERVE_BYTES = 0.95, 0.8 * 2**30
A100_BYTES = 79.15 * 2**30  # what an "80 GB" A100 reports
# A run lasts this many times what a request may take within its objectives,
# so that queues of an overloaded system have time to grow past them.
LIFETIMES = 10
# Candidates judged against one incumbent at a time. A constant, so that the
# answer does not depend on how many processes there are.
WAVE = 4
FINAL_EFFORT = 4.0  # requests of the best placements' runs: this many times


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Nodes of equal devices.

  Attributes:
    nodes, devices_per_node: how many.
    memory_bytes: of a device.
    intra_bytes_per_s, inter_bytes_per_s: of a KV transfer inside a node and
      between nodes; hand_off_s: its fixed part.
  """

  nodes: int = 1
  devices_per_node: int = 8
  memory_bytes: float = A100_BYTES
  intra_bytes_per_s: float = 300e9
  inter_bytes_per_s: float = 25e9 / 8
  hand_off_s: float = 1e-3

  def __post_init__(self):
    for field in ('nodes', 'devices_per_node'):
      value = getattr(self, field)
      require(latency.whole(value), f'Cluster.{field}', value,
              'an integer of 1 or more')
    for field in ('memory_bytes', 'intra_bytes_per_s', 'inter_bytes_per_s'):
      value = getattr(self, field)
      require(latency.positive(value), f'Cluster.{field}', value,
              'a number above 0')
    require(latency.finite(self.hand_off_s), 'Cluster.hand_off_s',
            self.hand_off_s, 'seconds, 0 or more')

  @property
  def num_devices(self):
    return self.nodes * self.devices_per_node


class Instant:
  """A phase that takes no time, where the other one is judged alone."""

  host_s, pp = 0.0, 1

  def prefill_s(self, pieces):
    del pieces
    return 0.0

  def decode_s(self, batch, context):
    del batch, context
    return 0.0

  def decode_line(self, batch):
    del batch
    return 0.0, 0.0

  def mixed_s(self, pieces, batch, context):
    del pieces, batch, context
    return 0.0

  def migrate_s(self, num_tokens):
    del num_tokens
    return 0.0


@dataclasses.dataclass(frozen=True)
class Problem:
  """What a search is asked.

  Attributes:
    model, cluster, slo: of what, on what, how fast.
    workload: (rate_per_s, n) -> n Requests; the same seed at every rate, so
      that candidates share their lengths and arrivals (common random
      numbers).
    latency_of: Plan -> seconds of its steps (see simulator.simulate), or None
      where nobody has measured that plan.
    target: share of requests that must meet both objectives.
    chunks: token budgets tried for chunked placements.
    max_len, page_size, max_seqs, prefill_seqs, itemsize: of the instances;
      itemsize is of weights and KV.
    requests, most_requests: simulated at first, and at most, at one rate;
      more where a run would be shorter than LIFETIMES.
    tolerance: rates differ by this share where bisection ends.
    replicas: most instances of a phase in a disaggregated candidate.
    strict: a second target, of the best placements alone; None: none.
    rate_per_s: of the whole cluster; None: what counts is each device.
  """

  model: ModelConfig
  cluster: Cluster
  slo: Slo
  workload: Callable
  latency_of: Callable
  target: float = 0.9
  chunks: tuple[int, ...] = (256, 512, 1024, 2048)
  max_len: int = 2048
  page_size: int = 16
  max_seqs: int = 256
  prefill_seqs: int = 32
  itemsize: int = 2
  requests: int = 400
  most_requests: int = 3200
  tolerance: float = 0.05
  replicas: int = 3
  strict: float | None = 0.99
  rate_per_s: float | None = None

  def __post_init__(self):
    require(0 < self.target < 1, 'Problem.target', self.target,
            'a share in (0, 1)')
    require(latency.positive(self.tolerance), 'Problem.tolerance',
            self.tolerance, 'above 0')
    require(latency.whole(self.replicas), 'Problem.replicas', self.replicas,
            'an integer of 1 or more')
    require(self.strict is None or 0 < self.strict < 1, 'Problem.strict',
            self.strict, 'None or a share in (0, 1)')
    require(self.rate_per_s is None or latency.positive(self.rate_per_s),
            'Problem.rate_per_s', self.rate_per_s, 'None or above 0')


@dataclasses.dataclass(frozen=True)
class Row:
  """A placement and what it serves.

  goodput: goodput.Goodput of the whole placement. aligned: KV moves inside a
  node. prefill_tokens: of a batch; None: see batch_tokens.
  """

  placement: Placement
  goodput: goodput.Goodput
  aligned: bool = False
  prefill_tokens: int | None = None

  @property
  def per_device(self):
    return self.goodput.rate_per_s / self.placement.num_devices

  @property
  def interval_per_device(self):
    n = self.placement.num_devices
    return self.goodput.low_per_s / n, self.goodput.high_per_s / n


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


# --- what fits ----------------------------------------------------------------


def kv_tokens(problem, plan):
  """Tokens of KV that an instance holds beside its weights; 0: none.

  The fullest stage counts: it has ceil(L / pp) layers, and kv heads are
  replicated where there are fewer than shards.
  """
  config = problem.model
  memory = USABLE * problem.cluster.memory_bytes - RESERVE_BYTES
  layers = -(-config.num_layers // plan.pp)
  share = layers / config.num_layers / plan.tp
  heads = -(-config.num_kv_heads // plan.tp)
  weights = roofline.num_params(config) * problem.itemsize * share
  each = 2 * layers * heads * config.head_dim * problem.itemsize
  return max(0, int((memory - weights) // each))


def instance(problem, role, plan, prefill_tokens):
  """The InstanceConfig of a plan, or None where it does not fit."""
  count = min(kv_tokens(problem, plan) // problem.page_size,
              problem.max_seqs
              * pages.pages_for(problem.max_len, problem.page_size))
  if count < pages.pages_for(problem.max_len, problem.page_size):
    return None
  return InstanceConfig(role, count, problem.page_size, problem.max_seqs,
                        prefill_tokens, problem.prefill_seqs, plan.pp)


def plans(problem, most):
  """Plans of at most `most` devices: tp inside a node, dividing the heads."""
  config, cluster = problem.model, problem.cluster
  return [Plan(tp, pp)
          for tp in range(1, cluster.devices_per_node + 1)
          if config.num_heads % tp == 0
          for pp in range(1, config.num_layers + 1)
          if config.num_layers % pp == 0 and tp * pp <= most]


def build(problem, placement, chunk_tokens=None, aligned=False):
  """What simulates a placement: (scheduler.Config, latencies, link).

  Prefill batches stop at batch_tokens, or at chunk_tokens where that is
  given (it must be for a chunked placement).

  Raises:
    InputError: a plan does not fit, or nobody has measured it.
  """
  require(chunk_tokens or not placement.chunked, 'chunk_tokens', chunk_tokens,
          'given for a chunked placement')
  instances, late = [], []
  for role, plan in placement.instances:
    seconds = problem.latency_of(plan)
    require(seconds is not None, 'Placement', plan, 'a plan with latencies')
    found = instance(problem, role, plan,
                     chunk_tokens or batch_tokens(problem, seconds))
    require(found is not None, 'Placement', plan,
            'a plan whose weights and one sequence fit in the memory')
    instances.append(found)
    late.append(seconds)
  return (scheduler.Config(tuple(instances), problem.max_len), late,
          _link(problem, aligned))


def batch_tokens(problem, seconds):
  """Tokens of a prefill batch: L_m, or the longest prompt if that is more.

  The scheduler runs what is longer in pieces. The paper runs it whole, and
  each piece costs a start of its own: with L_m below the mean prompt, most
  prompts would pay twice.
  """
  return max(saturation(seconds), max(i for i, _ in _lengths(problem, 256)))


def saturation(seconds):
  """The paper's L_m of a plan."""
  return latency.saturation_tokens(seconds, limit=8192)


def _lengths(problem, n):
  return [(len(r.prompt), r.sampling.max_tokens)
          for r in problem.workload(1.0, n)]


def _link(problem, aligned):
  config, cluster = problem.model, problem.cluster
  return latency.Link(
      cluster.hand_off_s, cluster.intra_bytes_per_s if aligned
      else cluster.inter_bytes_per_s,
      config.kv_bytes_per_token(problem.itemsize))


# --- one candidate ------------------------------------------------------------


class Candidate(NamedTuple):
  """What is judged: a placement, or (phase) one instance of it alone.

  phase: '' for the whole; 'prefill': the first token is all that is asked
  for; 'decode': prefill takes no time. bound_per_s: no rate above it.
  guess_per_s: about what to expect; says what is tried first.
  """

  placement: Placement
  prefill_tokens: int | None
  aligned: bool
  bound_per_s: float
  phase: str = ''
  guess_per_s: float = 0.0

  @property
  def num_devices(self):
    if self.phase:
      return getattr(self.placement, self.phase)[0].num_devices
    return self.placement.num_devices

  @property
  def bound_per_device(self):
    return self.bound_per_s / self.num_devices


def _setup(problem, candidate):
  """(scheduler.Config, latencies, link, Slo, tokens) of a candidate's runs;
  tokens: that each request gets, None for its own."""
  config, late, link = build(problem, candidate.placement,
                             candidate.prefill_tokens, candidate.aligned)
  slo, instant = problem.slo, Instant()
  if candidate.phase == 'prefill':
    config = dataclasses.replace(config, instances=config.instances[:1])
    slo = dataclasses.replace(slo, tpot_s=1e9)
    return config, late[:1], instant, slo, 1
  if candidate.phase == 'decode':
    ample = InstanceConfig('prefill', 2**16, problem.page_size, 4096,
                           problem.max_len, problem.prefill_seqs)
    config = dataclasses.replace(
        config, instances=(ample, config.instances[-1]))
    slo = dataclasses.replace(slo, ttft_s=1e9)
    return config, [instant, late[-1]], instant, slo, None
  return config, late, link, slo, None


def _run(problem, setup, rate_per_s, n, on_event=None):
  """The records of a run."""
  config, late, link, _, tokens = setup
  requests = problem.workload(rate_per_s, n)
  if tokens:
    requests = [dataclasses.replace(r, sampling=dataclasses.replace(
        r.sampling, max_tokens=tokens)) for r in requests]
  return simulator.simulate(config, requests, late, link,
                            on_event=on_event).records


def full_length(problem, phase=''):
  """rate -> requests of a run that lasts LIFETIMES of a request."""
  mean = sum(o for _, o in _lengths(problem, 256)) / 256
  life_s = problem.slo.ttft_s if phase == 'prefill' else max(
      problem.slo.ttft_s, problem.slo.tpot_s * mean)
  return lambda rate: max(problem.requests,
                          math.ceil(rate * LIFETIMES * life_s))


class Task(NamedTuple):
  """A Candidate to measure, and how.

  beat_per_s: see goodput.search. final: from near start_per_s, with eight
  times the requests, half the tolerance and intervals as tight as they get.
  """

  candidate: Candidate
  target: float
  beat_per_s: float | None = None
  effort: float = 1.0
  start_per_s: float | None = None


def measure(problem, task):
  """The Goodput of a Task. A pure function: any process may run it."""
  candidate, bound = task.candidate, task.candidate.bound_per_s
  setup = _setup(problem, candidate)

  def hits_at(rate_per_s, n):
    return goodput.steady_hits(_run(problem, setup, rate_per_s, n), setup[3])

  found = goodput.search(
      hits_at, task.target,
      task.start_per_s or max(candidate.guess_per_s, bound / 16),
      1 + problem.tolerance * task.effort**-0.5, problem.requests,
      math.ceil(problem.most_requests * task.effort), most_per_s=bound,
      least_per_s=bound / 4**6, stride=1.1 if task.effort > 1 else 1.4,
      full=full_length(problem, candidate.phase), beat_per_s=task.beat_per_s,
      tight=task.effort > 1)
  return dataclasses.replace(found, high_per_s=min(found.high_per_s, bound))


# --- the search ---------------------------------------------------------------


class _Search:
  """The problem, and what was tried."""

  def __init__(self, problem, report, run):
    self.problem, self.report = problem, report or (lambda *_: None)
    self.run = run
    self.simulations = self.pruned = self.done = self.total = 0
    self.unfit, self.unmeasured, self.rows = set(), set(), []
    self.strict, self.limits, self.bounds = [], {}, {}
    self.lengths = _lengths(problem, 1024)
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
      link = _link(self.problem, aligned)
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
      tasks = [Task(self.again(r), problem.strict, None, 0.5,
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


def search(problem, algorithms=(low_affinity, colocated), report=None,
           map=map):
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
                tuple(sorted(state.unfit, key=str)),
                tuple(sorted(state.unmeasured, key=str)),
                _sorted(state.strict), state.limits, stopped)


def _sorted(rows):
  return tuple(sorted(rows, key=lambda r: (
      -r.per_device, -r.interval_per_device[1], str(r.placement))))


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


# --- what it means ------------------------------------------------------------


def limit(problem, row):
  """What binds a placement at 1.1 times its goodput, in words.

  The objective that more requests miss, and what they would have met it
  without: waiting for pages, the copy of KV, or neither.
  """
  candidate = Candidate(row.placement, row.prefill_tokens, row.aligned,
                        math.inf)
  setup, rate = _setup(problem, candidate), 1.1 * row.goodput.rate_per_s
  if not rate:
    return 'nothing is served'
  config, since, short_s, all_s = setup[0], [0.0], 0.0, 0.0
  short = False

  def on_event(state, event, commands):
    nonlocal short, short_s, all_s
    del commands
    short_s += (event.time_s - since[0]) * short
    all_s = since[0] = event.time_s
    short = any(_refused(state, one, c) for one, c in zip(
        state.instances, config.instances, strict=True))

  n = min(full_length(problem)(rate), 4 * problem.most_requests)
  records = _run(problem, setup, rate, n, on_event)[n // 5:]
  slo = problem.slo
  late = [r for r in records if r.token_s and r.ttft_s > slo.ttft_s]
  slow = [r for r in records if r.token_s and r.tpot_s > slo.tpot_s]
  waits = short_s > 0.2 * all_s
  if not late and not slow:
    return 'nothing up to 1.1 times its goodput'
  if len(late) >= len(slow):
    return 'KV memory (prompts wait for pages)' if waits else 'prefill compute'

  def without(stage):
    return sum(r.tpot_s - r.stage_s[stage] / (len(r.token_s) - 1)
               <= slo.tpot_s for r in slow) > len(slow) / 2
  if row.placement.mode == 'disaggregated':
    if without('migrate'):
      return 'link'
    if without('decode_queue'):
      return ('KV memory (finished prefills wait for pages)' if waits
              else 'decode batch')
    return 'decode steps (TPOT)'
  return ('KV memory (preemptions)' if sum(r.preemptions for r in slow)
          > len(slow) / 2 else 'decode steps and the prefills between them '
          '(TPOT)')


def _refused(state, one, config):
  """Whether something waits for pages or a place on an instance."""
  waiting = one.pulls if config.role == 'decode' else one.queue
  if not waiting:
    return False
  need = pages.pages_for(state.seqs[waiting[0]].prompt_len + 1,
                         config.page_size)
  spare = one.residents if config.role != 'prefill' else 0
  return (one.residents >= config.max_seqs
          or pages.num_free(one.pool) < need + spare)


def name(row):
  """A placement's mode, with its budget where it has one."""
  return row.placement.mode + (f' ({row.prefill_tokens} tokens)'
                               if row.placement.chunked else '')


def verdict(rows, problem=None):
  """Disaggregate or not, by how much, and how sure that is.

  The ratio's interval is from one's low over the other's high, and the other
  way round: at least as wide as 95 %.
  """
  def best(disaggregated):
    return next((r for r in rows if (r.placement.mode == 'disaggregated')
                 == disaggregated and r.goodput.rate_per_s > 0), None)

  split, together = best(True), best(False)
  if split is None and together is None:
    return 'No placement meets the objectives at any rate.'
  if split is None or together is None:
    only = split or together
    if only.placement.mode in {r.placement.mode for r in rows} and len(
        {r.placement.mode == 'disaggregated' for r in rows}) == 1:
      return (f'Only {name(only)} placements were judged: '
              f'{only.per_device:.3g} requests/s per device.'
              + _copies(only, problem))
    return f'Only {name(only)} placements meet the objectives.' + _copies(
        only, problem)
  first, second = ((split, together) if split.per_device > together.per_device
                   else (together, split))
  ratio = first.per_device / second.per_device
  (low, high), (other_low, other_high) = (first.interval_per_device,
                                          second.interval_per_device)
  between = (low / other_high if other_high else 0.0,
             high / other_low if other_low else math.inf)
  spread = f'[{between[0]:.2f}, {between[1]:.2f}]'
  if between[0] <= 1:
    text = (f'No clear winner: {name(first)} serves {ratio:.2f} {spread} '
            f'times what {name(second)} does per device, within the '
            'intervals.')
  else:
    what = 'Disaggregate' if first is split else 'Do not disaggregate'
    text = (f'{what}: {name(first)} serves {ratio:.2f} {spread} times what '
            f'{name(second)} does per device ({first.per_device:.3g} against '
            f'{second.per_device:.3g} requests/s).')
  return text + _copies(first, problem)


def _copies(row, problem):
  """How many copies serve the rate that is asked for, if one is."""
  if problem is None or not problem.rate_per_s:
    return ''
  copies = math.ceil(problem.rate_per_s / row.goodput.rate_per_s)
  need, have = copies * row.placement.num_devices, problem.cluster.num_devices
  return (f' {problem.rate_per_s:.4g} requests/s take {copies} of it: {need} '
          f'devices of {have}' + ('.' if need <= have else ', too many.'))
