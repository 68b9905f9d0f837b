"""What a placement search is asked, and which plans and instances fit it."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from dsjax.config import checks
from dsjax.config.checks import InputError, require
from dsjax.config.engine import InstanceConfig, with_host
from dsjax.config.model import ModelConfig
from dsjax.config.placement import ROLES, Placement, Plan, Slo
from dsjax.config.request import Request
from dsjax.placement import clusters
from dsjax.placement.bounds import Lengths
from dsjax.placement.clusters import AnyCluster
from dsjax.scheduling import page_pool, scheduler
from dsjax.scheduling.policy import DISTSERVE, Policy
from dsjax.simulation import latency, roofline
from dsjax.workload.named import Source

# (rate_per_s, n) -> n Requests; None: at a trace's own times.
Workload = Callable[[float | None, int], Sequence[Request]]
# Seconds of a plan's steps, or None where they are not known.
LatencyOf = Callable[[Plan], latency.Latency | None]

# Of a device's memory: the share that is used, and what of it neither weights
# nor KV get (0.95 and 0.8 GB in DistServe's released table).
USABLE, RESERVE_BYTES = 0.95, 0.8 * 2**30
# What a caller who does not say gets, here and in the runners.
DEVICES, CHUNK, CHUNKS = 3, 512, (512, 1024, 2048)

HOST_SHARE = 0.8  # of the peak of a link to the host; an assumption

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
    max_len, page_size, max_seqs, prefill_seqs: of the instances. itemsize,
      kv_itemsize: bytes of a weight, and of a number of KV.
    requests, most_requests: simulated at first, and at most, at one rate;
      more where a run would be shorter than LIFETIMES.
    tolerance: rates differ by this share where bisection ends.
    replicas: most instances of a phase in a disaggregated candidate.
    effort: of the best placements' runs, this many times the requests, for
      intervals that hold. Near the limit of KV memory queues remember a
      thousand requests, and a run needs ten thousand.
    strict: a second target, of the best placements alone; None: none.
    strict_effort: of its runs; above 1 they give an interval as well, at
      several times the price of the search.
    rate_per_s: of the whole cluster; None: what counts is each device.
    policy: that every candidate is judged under.
    prefix_cache: see scheduler.Config; of a workload whose requests say which
      blocks they have. host_bytes: of host memory of each instance, for what
      it evicts and for rows that are preempted. stream_kv: see
      scheduler.Config.
  """

  model: ModelConfig
  cluster: AnyCluster
  slo: Slo
  workload: Workload
  latency_of: LatencyOf
  target: float = 0.9
  chunks: tuple[int, ...] = CHUNKS
  max_len: int = 2048
  page_size: int = 16
  max_seqs: int = 256
  prefill_seqs: int = 32
  itemsize: float = 2
  kv_itemsize: float = 2
  requests: int = 400
  most_requests: int = 3200
  tolerance: float = 0.05
  replicas: int = 3
  effort: float = 16.0
  strict: float | None = 0.99
  strict_effort: float = 0.5
  rate_per_s: float | None = None
  policy: Policy = DISTSERVE
  prefix_cache: bool = True
  host_bytes: float = 0.0
  stream_kv: bool = False
  links: Mapping[tuple[Plan, Plan], latency.Link] = dataclasses.field(
      default_factory=dict)

  def __post_init__(self):
    require(self.chunks and all(map(checks.is_positive_int, self.chunks)),
            'SearchProblem.chunks', self.chunks, 'integers above 0')
    for field in ('prefix_cache', 'stream_kv'):
      value = getattr(self, field)
      require(isinstance(value, bool), f'SearchProblem.{field}', value,
              'True or False')
    require(checks.is_nonnegative(self.host_bytes), 'SearchProblem.host_bytes',
            self.host_bytes, '0 or more')
    require(0 < self.target < 1, 'SearchProblem.target', self.target,
            'a share in (0, 1)')
    require(checks.is_positive(self.tolerance), 'SearchProblem.tolerance',
            self.tolerance, 'above 0')
    require(checks.is_positive_int(self.replicas), 'SearchProblem.replicas',
            self.replicas, 'an integer of 1 or more')
    require(self.strict is None or 0 < self.strict < 1, 'SearchProblem.strict',
            self.strict, 'None or a share in (0, 1)')
    for field in ('effort', 'strict_effort', 'itemsize', 'kv_itemsize'):
      value = getattr(self, field)
      require(checks.is_positive(value), f'SearchProblem.{field}', value,
              'above 0')
    require(self.rate_per_s is None or checks.is_positive(self.rate_per_s),
            'SearchProblem.rate_per_s', self.rate_per_s, 'None or above 0')


# --- what fits ----------------------------------------------------------------


def kv_tokens(problem: SearchProblem, plan: Plan) -> int:
  """Tokens of KV that an instance holds beside its weights; 0: none.

  The fullest stage counts: it has ceil(L / pp) layers, and kv heads are
  replicated where there are fewer than shards.
  """
  config = problem.model
  nodes = clusters.nodes_of(problem.cluster, plan)
  memory_bytes = USABLE * nodes.memory_bytes - RESERVE_BYTES
  layers = -(-config.num_layers // plan.pp)
  share = layers / config.num_layers / plan.tp
  heads = -(-config.num_kv_heads // plan.tp)
  weights_bytes = roofline.num_params(config) * problem.itemsize * share
  token_bytes = 2 * layers * heads * config.head_dim * problem.kv_itemsize
  return max(0, int((memory_bytes - weights_bytes) // token_bytes))


def instance(problem: SearchProblem, role: str, plan: Plan,
             prefill_tokens: int) -> InstanceConfig | None:
  """The InstanceConfig of a plan, or None where it does not fit."""
  longest = page_pool.pages_for(problem.max_len, problem.page_size)
  num_pages = min(kv_tokens(problem, plan) // problem.page_size,
                  problem.max_seqs * longest)
  if num_pages < longest:
    return None
  page_bytes = math.ceil(problem.page_size * problem.model.kv_bytes_per_token(
      problem.kv_itemsize))
  fitted = InstanceConfig(role, num_pages, problem.page_size, problem.max_seqs,
                          prefill_tokens, problem.prefill_seqs, plan.pp)
  return with_host(fitted, problem.host_bytes, page_bytes, 'SearchProblem')


def plans(problem: SearchProblem, most: int) -> list[Plan]:
  """Plans of at most `most` devices of a kind: tp inside a node, dividing the
  heads; pp dividing the layers."""
  config = problem.model
  return [Plan(tp, pp, kind)
          for kind, nodes in problem.cluster.kinds.items()
          for tp in range(1, nodes.devices_per_node + 1)
          if config.num_heads % tp == 0
          for pp in range(1, config.num_layers + 1)
          if config.num_layers % pp == 0
          and tp * pp <= min(most, nodes.num_devices)]


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
    nodes = clusters.nodes_of(problem.cluster, plan)
    seconds = problem.latency_of(plan)
    if seconds is None:
      raise InputError(f'Placement={plan}: must be a plan with latencies: '
                       f'{names(measured(problem))}')
    fitted = instance(problem, role, plan,
                      chunk_tokens or batch_tokens(problem, seconds))
    if fitted is None:
      raise InputError(f'Placement={plan}: must be a plan whose weights and '
                       'one sequence fit in the memory of '
                       f'{nodes.memory_bytes / 1e9:.4g} GB a device')
    instances.append(fitted)
    latencies.append(seconds)
  config = scheduler.Config(tuple(instances), problem.max_len,
                            depth=2 if placement.prefill else 1,
                            policy=problem.policy,
                            prefix_cache=problem.prefix_cache,
                            stream_kv=problem.stream_kv,
                            host_link=host_link_of(problem, placement)
                            if problem.host_bytes else None)
  return config, latencies, link_of(problem, aligned, placement)


def measured(problem: SearchProblem, most_tp: int = 16,
             most_pp: int = 8) -> list[Plan]:
  """The plans with latencies, whatever the cluster has room for."""
  return [plan for kind in problem.cluster.kinds
          for tp in range(1, most_tp + 1) for pp in range(1, most_pp + 1)
          if problem.model.num_heads % tp == 0
          and problem.model.num_layers % pp == 0
          and problem.latency_of(plan := Plan(tp, pp, kind)) is not None]


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
  """The link of a KV transfer, the slowest between the placement's plans.

  aligned: inside a node where both are of one kind, and then those that were
  measured, where all were.
  """
  kv_bytes = problem.model.kv_bytes_per_token(problem.kv_itemsize)
  pairs = [(source, target) for source in placement.prefill
           for role, target in placement.instances if ROLES[role].decodes
           ] or [placement.instances[0][1:] * 2]
  measured = [problem.links[pair] for pair in pairs if pair in problem.links]
  if not aligned or len(measured) < len(pairs):
    borders = {clusters.border(problem.cluster, *pair, aligned)
               for pair in pairs}
    measured = [latency.Link(b.hand_off_s, b.bytes_per_s, kv_bytes,
                             b.reads_beside) for b in borders]
  return max(measured, key=lambda link: link.migrate_s(512))


def host_link_of(problem: SearchProblem, placement: Placement) -> latency.Link:
  """Between an instance and host memory, each device by a link of its own:
  that of the slowest instance."""
  kv_bytes = problem.model.kv_bytes_per_token(problem.kv_itemsize)
  each = [(plan.num_devices, clusters.nodes_of(problem.cluster, plan))
          for _, plan in placement.instances]
  return max([latency.Link(
      nodes.hand_off_s, HOST_SHARE * count * nodes.host_bytes_per_s, kv_bytes)
              for count, nodes in each], key=lambda link: link.migrate_s(512))
