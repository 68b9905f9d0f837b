"""What a placement search is asked, and how one candidate is judged.

Every candidate is judged by the scheduler that serves, under simulated time:
nothing here decides how requests are served.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dsjax.analysis.record import Record
from dsjax.config import checks
from dsjax.config.checks import InputError, require
from dsjax.config.engine import InstanceConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request
from dsjax.placement import goodput
from dsjax.placement.bounds import Lengths
from dsjax.scheduling import page_pool, scheduler
from dsjax.scheduling.policy import DISTSERVE, Policy
from dsjax.simulation import latency, roofline, simulator
from dsjax.workload.named import Source

# (rate_per_s, n) -> n Requests; None: at a trace's own times.
Workload = Callable[[float | None, int], Sequence[Request]]
# Seconds of a plan's steps, or None where they are not known.
LatencyOf = Callable[[Plan], latency.Latency | None]

# Of a device's memory: the share that is used, and what of it neither weights
# nor KV get (0.95 and 0.8 GB in DistServe's released table).
USABLE, RESERVE_BYTES = 0.95, 0.8 * 2**30
A100_BYTES = 85e9  # what an "80 GB" A100 reports: 79.15 GiB
# What a caller who does not say gets, here and in the runners.
DEVICES, CHUNK, CHUNKS = 3, 512, (512, 1024, 2048)
# A run lasts this many times what a request may take within its objectives,
# so that queues of an overloaded system have time to grow past them.
LIFETIMES = 10
# Objectives of hours would ask for millions of requests: a run has this many
# at most, or so many times SearchProblem.most_requests (see Judge).
MOST_REQUESTS, MOST_TIMES = 4000, 4


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Nodes of equal devices.

  Attributes:
    nodes, devices_per_node: how many.
    memory_bytes: of a device.
    intra_bytes_per_s, inter_bytes_per_s: of a KV transfer inside a node and
      between nodes; hand_off_s: its fixed part. reads_beside: pages are
      read while their source computes, see latency.Link.
  """

  nodes: int = 1
  devices_per_node: int = 8
  memory_bytes: float = A100_BYTES
  intra_bytes_per_s: float = 300e9
  inter_bytes_per_s: float = 25e9 / 8
  hand_off_s: float = 1e-3
  reads_beside: bool = False

  def __post_init__(self):
    for field in ('nodes', 'devices_per_node'):
      value = getattr(self, field)
      require(checks.is_positive_int(value), f'Cluster.{field}', value,
              'an integer of 1 or more')
    for field in ('memory_bytes', 'intra_bytes_per_s', 'inter_bytes_per_s'):
      value = getattr(self, field)
      require(checks.is_positive(value), f'Cluster.{field}', value,
              'a number above 0')
    require(checks.is_nonnegative(self.hand_off_s), 'Cluster.hand_off_s',
            self.hand_off_s, 'seconds, 0 or more')
    require(isinstance(self.reads_beside, bool), 'Cluster.reads_beside',
            self.reads_beside, 'true or false')

  @property
  def num_devices(self) -> int:
    return self.nodes * self.devices_per_node


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


@dataclasses.dataclass(frozen=True)
class SearchProblem:
  """What a search is asked.

  Attributes:
    model, cluster, slo: of what, on what, how fast.
    workload: of the same seed at every rate, so that candidates share their
      lengths and arrivals (common random numbers).
    latency_of: of each plan; None where it was not measured. links: measured
      ones from prefill's plan to decode's, used inside a node; elsewhere the
      cluster's.
    target: share of requests that must meet both objectives.
    chunks: token budgets tried for chunked placements.
    max_len, page_size, max_seqs, prefill_seqs, itemsize: of the instances;
      itemsize is of weights and KV.
    requests, most_requests: simulated at first, and at most, at one rate;
      more where a run would be shorter than LIFETIMES.
    tolerance: rates differ by this share where bisection ends.
    replicas: most instances of a phase in a disaggregated candidate.
    strict: a second target, of the best placements alone; None: none.
    strict_effort: of its runs, see Task; above 1, intervals near a share of 1
      that say something, at several times the price of the search.
    rate_per_s: of the whole cluster; None: what counts is each device.
    policy: that every candidate is judged under.
  """

  model: ModelConfig
  cluster: Cluster
  slo: Slo
  workload: Workload
  latency_of: LatencyOf
  target: float = 0.9
  chunks: tuple[int, ...] = CHUNKS
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
  strict_effort: float = 0.5
  rate_per_s: float | None = None
  policy: Policy = DISTSERVE
  links: Mapping[tuple[Plan, Plan], latency.Link] = dataclasses.field(
      default_factory=dict)

  def __post_init__(self):
    require(self.chunks and all(map(checks.is_positive_int, self.chunks)),
            'SearchProblem.chunks', self.chunks, 'integers above 0')
    require(0 < self.target < 1, 'SearchProblem.target', self.target,
            'a share in (0, 1)')
    require(checks.is_positive(self.tolerance), 'SearchProblem.tolerance',
            self.tolerance, 'above 0')
    require(checks.is_positive_int(self.replicas), 'SearchProblem.replicas',
            self.replicas, 'an integer of 1 or more')
    require(self.strict is None or 0 < self.strict < 1, 'SearchProblem.strict',
            self.strict, 'None or a share in (0, 1)')
    require(checks.is_positive(self.strict_effort),
            'SearchProblem.strict_effort', self.strict_effort, 'above 0')
    require(self.rate_per_s is None or checks.is_positive(self.rate_per_s),
            'SearchProblem.rate_per_s', self.rate_per_s, 'None or above 0')


# --- what fits ----------------------------------------------------------------


def kv_tokens(problem: SearchProblem, plan: Plan) -> int:
  """Tokens of KV that an instance holds beside its weights; 0: none.

  The fullest stage counts: it has ceil(L / pp) layers, and kv heads are
  replicated where there are fewer than shards.
  """
  config = problem.model
  memory_bytes = USABLE * problem.cluster.memory_bytes - RESERVE_BYTES
  layers = -(-config.num_layers // plan.pp)
  share = layers / config.num_layers / plan.tp
  heads = -(-config.num_kv_heads // plan.tp)
  weights_bytes = roofline.num_params(config) * problem.itemsize * share
  token_bytes = 2 * layers * heads * config.head_dim * problem.itemsize
  return max(0, int((memory_bytes - weights_bytes) // token_bytes))


def instance(problem: SearchProblem, role: str, plan: Plan,
             prefill_tokens: int) -> InstanceConfig | None:
  """The InstanceConfig of a plan, or None where it does not fit."""
  longest = page_pool.pages_for(problem.max_len, problem.page_size)
  num_pages = min(kv_tokens(problem, plan) // problem.page_size,
                  problem.max_seqs * longest)
  if num_pages < longest:
    return None
  return InstanceConfig(role, num_pages, problem.page_size, problem.max_seqs,
                        prefill_tokens, problem.prefill_seqs, plan.pp)


def plans(problem: SearchProblem, most: int) -> list[Plan]:
  """Plans of at most `most` devices: tp inside a node, dividing the heads;
  pp dividing the layers."""
  config, cluster = problem.model, problem.cluster
  return [Plan(tp, pp)
          for tp in range(1, cluster.devices_per_node + 1)
          if config.num_heads % tp == 0
          for pp in range(1, config.num_layers + 1)
          if config.num_layers % pp == 0 and tp * pp <= most]


def build(
    problem: SearchProblem, placement: Placement,
    chunk_tokens: int | None = None, aligned: bool = False
) -> tuple[scheduler.Config, list[latency.Latency], latency.Link]:
  """What simulates a placement: its Config, latencies and link.

  Prefill batches stop at batch_tokens, or at chunk_tokens where that is
  given (it must be for a chunked placement). Where prompts and decode share
  an instance one command is in flight, not two: a prompt then waits for one
  only, which is worth more than the host time that a second would hide.

  Raises:
    InputError: a plan does not fit, or has no latencies.
  """
  require(chunk_tokens or not placement.chunked, 'chunk_tokens', chunk_tokens,
          'given for a chunked placement')
  instances, latencies = [], []
  for role, plan in placement.instances:
    seconds = problem.latency_of(plan)
    if seconds is None:
      raise InputError(f'Placement={plan}: must be a plan with latencies: '
                       f'{names(measured(problem))}')
    fitted = instance(problem, role, plan,
                      chunk_tokens or batch_tokens(problem, seconds))
    if fitted is None:
      raise InputError(f'Placement={plan}: must be a plan whose weights and '
                       'one sequence fit in the memory of '
                       f'{problem.cluster.memory_bytes / 1e9:.4g} GB a device')
    instances.append(fitted)
    latencies.append(seconds)
  config = scheduler.Config(tuple(instances), problem.max_len,
                            depth=2 if placement.prefill else 1,
                            policy=problem.policy)
  return config, latencies, link_of(problem, aligned, placement)


def measured(problem: SearchProblem, most_tp: int = 16,
             most_pp: int = 8) -> list[Plan]:
  """The plans with latencies, whatever the cluster has room for."""
  return [plan for tp in range(1, most_tp + 1) for pp in range(1, most_pp + 1)
          if problem.model.num_heads % tp == 0
          and problem.model.num_layers % pp == 0
          and problem.latency_of(plan := Plan(tp, pp)) is not None]


def names(plans: Iterable[Plan], most: int = 8) -> str:
  """Plans in words: '1x1, 2x1, and 3 more'."""
  texts = [str(plan) for plan in sorted(plans, key=lambda p: (
      p.num_devices, p.pp))]
  more = f', and {len(texts) - most} more' if len(texts) > most else ''
  return ', '.join(texts[:most]) + more or 'none'


def batch_tokens(problem: SearchProblem, seconds: latency.Latency) -> int:
  """Tokens of a prefill batch: L_m, or the longest prompt if that is more.

  The scheduler runs what is longer in pieces. The paper runs it whole, and
  each piece costs a start of its own: with L_m below the mean prompt, most
  prompts would pay twice.
  """
  longest = max(prompt_len for prompt_len, _ in lengths(problem, 256))
  return max(saturation(seconds), longest)


def saturation(seconds: latency.Latency) -> int:
  """The paper's L_m of a plan."""
  return latency.saturation_tokens(seconds, limit=8192)


def lengths(problem: SearchProblem, n: int) -> Lengths:
  """(prompt, output) tokens of the workload's first n requests."""
  if isinstance(problem.workload, Source):
    return problem.workload.lengths(n)
  return [(len(r.prompt), r.sampling.max_tokens or 0)
          for r in problem.workload(1.0, n)]


def link_of(problem: SearchProblem, aligned: bool,
            placement: Placement) -> latency.Link:
  """The link of a KV transfer: inside a node if aligned, and then the slowest
  of those measured between the placement's plans, where all were."""
  config, cluster = problem.model, problem.cluster
  measured = [problem.links.get((source, target))
              for source in placement.prefill for target in placement.decode]
  known = [link for link in measured if link is not None]
  if aligned and known and len(known) == len(measured):
    return max(known, key=lambda link: link.migrate_s(512))
  return latency.Link(
      cluster.hand_off_s, cluster.intra_bytes_per_s if aligned
      else cluster.inter_bytes_per_s,
      config.kv_bytes_per_token(problem.itemsize), cluster.reads_beside)


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
  def num_devices(self) -> int:
    """Of the placement, or of the one instance that is judged."""
    if self.phase:
      return getattr(self.placement, self.phase)[0].num_devices
    return self.placement.num_devices

  @property
  def bound_per_device(self) -> float:
    return self.bound_per_s / self.num_devices


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
  config, latencies, link = build(problem, candidate.placement,
                                  candidate.prefill_tokens, candidate.aligned)
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
  """The records of n requests at a rate."""
  requests = problem.workload(rate_per_s, n)
  if system.output_len:
    requests = [dataclasses.replace(r, sampling=dataclasses.replace(
        r.sampling, max_tokens=system.output_len)) for r in requests]
  return simulator.simulate(system.config, requests, system.latencies,
                            system.link, on_event=on_event).records


class Judge:
  """How long a run must be, and what its requests must meet.

  A run lasts LIFETIMES of what a request may take. Where that is more than
  `most` requests (objectives are loose, or inf), it has `most`, and objectives
  are those of which LIFETIMES fit into it, so that a queue that grows still
  shows; but no less than what a busy instance takes.
  """

  def __init__(self, problem: SearchProblem, system: Setup,
               phase: str = '') -> None:
    outputs = [o for _, o in lengths(problem, 256)]
    self.slo, self.least = system.slo, problem.requests
    self.most = max(MOST_REQUESTS, MOST_TIMES * problem.most_requests)
    self.mean = sum(outputs) / len(outputs)
    self.life_s = problem.slo.ttft_s if phase == 'prefill' else max(
        problem.slo.ttft_s, problem.slo.tpot_s * self.mean)
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


class Task(NamedTuple):
  """A Candidate to measure, and how.

  beat_per_s: see goodput.Bisection. effort: above 1, as many times the
  requests, its root less tolerance, and intervals as tight as they get.
  start_per_s: the first rate; None: near the candidate's guess.
  """

  candidate: Candidate
  target: float
  beat_per_s: float | None = None
  effort: float = 1.0
  start_per_s: float | None = None


def measure(problem: SearchProblem, task: Task) -> goodput.Goodput:
  """The Goodput of a Task. A pure function: any process may run it."""
  candidate, bound = task.candidate, task.candidate.bound_per_s
  system = setup(problem, candidate)
  judge = Judge(problem, system, candidate.phase)

  def hits_at(rate_per_s: float, n: int) -> list[bool]:
    return goodput.steady_hits(run(problem, system, rate_per_s, n),
                               judge.objectives(rate_per_s))

  best = goodput.search(
      hits_at, task.target,
      task.start_per_s or max(candidate.guess_per_s, bound / 16),
      1 + problem.tolerance * task.effort**-0.5, problem.requests,
      math.ceil(problem.most_requests * task.effort),
      goodput.Bisection(
          stride=1.1 if task.effort > 1 else 1.4, least_per_s=bound / 4**6,
          most_per_s=bound, full=judge.length,
          beat_per_s=task.beat_per_s, tight=task.effort > 1))
  return dataclasses.replace(best, high_per_s=min(best.high_per_s, bound))
