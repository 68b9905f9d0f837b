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
import itertools
import math
from collections.abc import Callable

from dsjax import (
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

USABLE = 0.9  # of a device's memory, for weights and KV
# A run lasts this many times what a request may take within its objectives,
# so that queues of an overloaded system have time to grow past them.
LIFETIMES = 10


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
  memory_bytes: float = 80e9
  intra_bytes_per_s: float = 300e9
  inter_bytes_per_s: float = 25e9 / 8
  hand_off_s: float = 1e-3

  def __post_init__(self):
    for field in ('nodes', 'devices_per_node'):
      value = getattr(self, field)
      require(isinstance(value, int) and value >= 1, f'Cluster.{field}', value,
              'an integer of 1 or more')
    for field in ('memory_bytes', 'intra_bytes_per_s', 'inter_bytes_per_s'):
      value = getattr(self, field)
      require(isinstance(value, (int, float)) and 0 < value < math.inf,
              f'Cluster.{field}', value, 'a number above 0')

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
    tolerance: ratio of rates at which bisection ends.
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

  def __post_init__(self):
    require(0 < self.target < 1, 'Problem.target', self.target,
            'a share in (0, 1)')
    require(self.tolerance > 0, 'Problem.tolerance', self.tolerance,
            'above 0')


@dataclasses.dataclass(frozen=True)
class Row:
  """A placement and what it serves.

  goodput: goodput.Goodput of the whole placement. aligned: KV moves inside a
  node. chunk_tokens: of a chunked placement.
  """

  placement: Placement
  goodput: goodput.Goodput
  aligned: bool = False
  chunk_tokens: int | None = None

  @property
  def per_device(self):
    return self.goodput.rate_per_s / self.placement.num_devices

  @property
  def interval_per_device(self):
    n = self.placement.num_devices
    return self.goodput.low_per_s / n, self.goodput.high_per_s / n


@dataclasses.dataclass(frozen=True)
class Answer:
  """rows: by goodput per device, best first. verdict: in words.

  simulations: runs of the simulator; pruned: candidates that a bound ruled
  out; unfit: plans whose weights and one sequence exceed the memory;
  unmeasured: plans without latencies.
  """

  rows: tuple[Row, ...]
  verdict: str
  simulations: int
  pruned: int
  unfit: tuple[Plan, ...]
  unmeasured: tuple[Plan, ...]


# --- what fits ----------------------------------------------------------------


def kv_tokens(problem, plan):
  """Tokens of KV that an instance holds beside its weights; 0: none.

  The fullest stage counts: it has ceil(L / pp) layers, and kv heads are
  replicated where there are fewer than shards.
  """
  config, memory = problem.model, USABLE * problem.cluster.memory_bytes
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

  Prefill batches stop at the plan's saturation length L_m; chunked ones at
  chunk_tokens.

  Raises:
    InputError: a plan does not fit, or nobody has measured it.
  """
  instances, late = [], []
  for role in ('prefill', 'decode', 'colocated', 'chunked'):
    for plan in getattr(placement, role):
      seconds = problem.latency_of(plan)
      require(seconds is not None, 'Placement', plan, 'a plan with latencies')
      size = chunk_tokens if role == 'chunked' else _saturation(seconds)
      found = instance(problem, role, plan, size)
      require(found is not None, 'Placement', plan,
              'a plan whose weights and one sequence fit in the memory')
      instances.append(found)
      late.append(seconds)
  return (scheduler.Config(tuple(instances), problem.max_len), late,
          _link(problem, aligned))


# --- goodput ------------------------------------------------------------------


class _Search:
  """The problem, and what was tried."""

  def __init__(self, problem, report):
    self.problem, self.report = problem, report or (lambda *_: None)
    self.simulations, self.pruned = 0, 0
    self.unfit, self.unmeasured, self.rows = set(), set(), []
    sample = problem.workload(1.0, 256)
    self.lengths = [(len(r.prompt), r.sampling.max_tokens) for r in sample]
    require(all(i + o <= problem.max_len for i, o in self.lengths),
            'Problem.max_len', problem.max_len, 'the longest request or more')
    self.mean_output = sum(o for _, o in self.lengths) / len(self.lengths)

  def seconds(self, plan):
    """The latencies of a plan, or None."""
    found = self.problem.latency_of(plan)
    if found is None:
      self.unmeasured.add(plan)
    return found

  def instance(self, role, plan, prefill_tokens):
    found = instance(self.problem, role, plan, prefill_tokens)
    if found is None:
      self.unfit.add(plan)
    return found

  def measure(self, instances, latencies, link, slo, bound, first=None):
    """Goodput of instances, below a bound that no rate can pass.

    first: tokens that a request gets, None for all of its own.
    """
    p = self.problem
    life_s = min(slo.ttft_s, p.slo.ttft_s) if first else max(
        p.slo.ttft_s, p.slo.tpot_s * self.mean_output)
    config = scheduler.Config(tuple(instances), p.max_len)

    def hits_at(rate_per_s, n):
      self.simulations += 1
      n = max(n, math.ceil(rate_per_s * LIFETIMES * life_s))
      requests = p.workload(rate_per_s, n)
      if first:
        requests = [dataclasses.replace(r, sampling=dataclasses.replace(
            r.sampling, max_tokens=first)) for r in requests]
      result = simulator.simulate(config, requests, latencies, link)
      return goodput.steady_hits(result.records, slo)

    found = goodput.search(
        hits_at, p.target, bound / 4, 1 + p.tolerance, p.requests,
        p.most_requests, most_per_s=bound, least_per_s=bound / 4**6)
    return dataclasses.replace(found, high_per_s=min(found.high_per_s, bound))

  def work_s(self, seconds, phase):
    """Least seconds of all stages that a mean request takes of an instance.

    A batch shares what it costs whatever it holds, at best among as many
    requests as it may have; no other order of work is cheaper where costs are
    affine with non-negative constants.
    """
    if phase == 'prefill':
      most = self.problem.prefill_seqs
      each = [seconds.prefill_s(((0, i),) * most) / most
              for i, _ in self.lengths]
    else:
      shares = []
      for batch in (2**k for k in range(self.problem.max_seqs.bit_length())):
        fixed, slope = seconds.decode_line(batch)
        shares.append((fixed / batch, slope))
      share, slope = (min(x) for x in zip(*shares, strict=True))
      each = [(o - 1) * (share + slope * i) for i, o in self.lengths]
    return sum(each) / len(each)

  def bound(self, plan, *phases):
    """Requests a second that an instance can serve at most."""
    seconds = self.seconds(plan)
    return plan.pp / max(sum(self.work_s(seconds, p) for p in phases), 1e-9)

  def add(self, row):
    self.rows.append(row)
    self.report(row)
    return row

  def worse(self, bound_per_device, mode):
    """Counts and says whether a bound rules a candidate out."""
    best = max((r.interval_per_device[0] for r in self.rows
                if r.placement.mode == mode), default=0.0)
    pruned = bound_per_device < best
    self.pruned += pruned
    return pruned


def _link(problem, aligned):
  config, cluster = problem.model, problem.cluster
  return latency.Link(
      cluster.hand_off_s, cluster.intra_bytes_per_s if aligned
      else cluster.inter_bytes_per_s,
      config.kv_bytes_per_token(problem.itemsize))


def _saturation(seconds):
  return latency.saturation_tokens(seconds, limit=8192)


def _joint(search, counts, decode, prefill, aligned):
  """The Row of n x prefill and m x decode, simulated as a whole."""
  problem, (n, m) = search.problem, counts
  placement = Placement(prefill=[prefill] * n, decode=[decode] * m)
  config, late, link = build(problem, placement, aligned=aligned)
  bound = min(n * search.bound(prefill, 'prefill'),
              m * search.bound(decode, 'decode'))
  found = search.measure(config.instances, late, link, problem.slo, bound)
  return search.add(Row(placement, found, aligned))


def _usable(search, most):
  """Plans that fit and have latencies."""
  return [p for p in plans(search.problem, most)
          if search.seconds(p) is not None
          and search.instance('decode', p, 64) is not None]


def _counts(search, prefill_per_s, decode_per_s, sizes):
  """(n, m) that balance the phases in the devices that there are.

  The paper replicates for a given total rate (algorithm 1, line 15 on); per
  device, the best small ratio is the same thing.
  """
  total = search.problem.cluster.num_devices
  best = None
  for n, m in itertools.product(range(1, 9), repeat=2):
    devices = n * sizes[0] + m * sizes[1]
    if devices <= total and math.gcd(n, m) == 1:
      rate = min(n * prefill_per_s, m * decode_per_s) / devices
      if best is None or rate > best[0] * (1 + 1e-9):
        best = rate, (n, m)
  return best[1] if best else None


def high_affinity(search):
  """Algorithm 1: the best plan of each phase alone, then how many of each."""
  problem = search.problem
  ttft = dataclasses.replace(problem.slo, tpot_s=1e9)
  tpot = dataclasses.replace(problem.slo, ttft_s=1e9)
  best = {}
  for plan in _usable(search, problem.cluster.num_devices - 1):
    seconds = search.seconds(plan)
    size, instant = _saturation(seconds), Instant()
    for phase in ('prefill', 'decode'):
      bound = search.bound(plan, phase)
      if phase in best and bound / plan.num_devices < best[phase][0]:
        search.pruned += 1
        continue
      if phase == 'prefill':
        found = search.measure([search.instance('prefill', plan, size)],
                               [seconds], instant, ttft, bound, first=1)
      else:
        ample = InstanceConfig('prefill', 2**16, problem.page_size, 4096,
                               problem.max_len, problem.prefill_seqs)
        found = search.measure([ample, search.instance('decode', plan, size)],
                               [instant, seconds], instant, tpot, bound)
      per_device = found.rate_per_s / plan.num_devices
      if per_device > best.get(phase, (0.0,))[0]:
        best[phase] = per_device, plan, found.rate_per_s
  if len(best) == 2:
    (_, prefill, p_rate), (_, decode, d_rate) = (best['prefill'],
                                                 best['decode'])
    counts = _counts(search, p_rate, d_rate,
                     (prefill.num_devices, decode.num_devices))
    if counts:
      _joint(search, counts, decode, prefill, aligned=False)


def low_affinity(search):
  """Algorithm 2: stages of both phases side by side in a node.

  An instance of pp stages is cut into segments, a prefill and a decode
  segment of the same layers in one node, so KV stays inside nodes.
  """
  cluster = search.problem.cluster
  usable = set(_usable(search, cluster.num_devices - 1))
  options = []
  for prefill, decode in itertools.product(usable, repeat=2):
    segments = math.gcd(prefill.pp, decode.pp)
    in_node = (prefill.num_devices + decode.num_devices) // segments
    if (in_node <= cluster.devices_per_node
        and segments <= cluster.nodes):
      devices = prefill.num_devices + decode.num_devices
      bound = min(search.bound(prefill, 'prefill'),
                  search.bound(decode, 'decode'))
      options.append((bound / devices, prefill, decode))
  for bound, prefill, decode in sorted(
      options, key=lambda o: (-o[0], o[1].num_devices, str(o[1:]))):
    if not search.worse(bound, 'disaggregated'):
      _joint(search, (1, 1), decode, prefill, aligned=True)


def colocated(search):
  """Prefill-priority and chunked placements of one instance, any plan."""
  problem = search.problem
  for plan in _usable(search, problem.cluster.num_devices):
    seconds = search.seconds(plan)
    bound = search.bound(plan, 'prefill', 'decode')
    modes = [('colocated', _saturation(seconds))]
    modes += [('chunked', c) for c in problem.chunks if c > problem.max_seqs]
    for role, size in modes:
      if search.worse(bound / plan.num_devices, role):
        continue
      placement = Placement(**{role: [plan]})
      chunk = size if role == 'chunked' else None
      config, late, link = build(problem, placement, chunk)
      found = search.measure(config.instances, late, link, problem.slo, bound)
      search.add(Row(placement, found, False, chunk))


def search(problem, algorithms=(low_affinity, colocated), report=None):
  """The best placements for a problem: an Answer.

  Args:
    algorithms: of high_affinity, low_affinity, colocated.
    report: called with each Row as it is found.

  Raises:
    InputError: no plan fits, none is measured, or the objectives are below
      the latency of an idle machine (says the floor).
  """
  state = _Search(problem, report)
  _check_floor(state)
  for algorithm in algorithms:
    algorithm(state)
  rows = tuple(sorted(state.rows, key=lambda r: -r.per_device))
  return Answer(rows, verdict(rows), state.simulations, state.pruned,
                tuple(sorted(state.unfit, key=str)),
                tuple(sorted(state.unmeasured, key=str)))


def _check_floor(state):
  problem = state.problem
  usable = _usable(state, problem.cluster.num_devices)
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


def verdict(rows):
  """Disaggregate or not, by how much, and how sure that is."""
  def best(disaggregated):
    return next((r for r in rows if (r.placement.mode == 'disaggregated')
                 == disaggregated and r.goodput.rate_per_s > 0), None)

  def name(row):
    return row.placement.mode + (f' ({row.chunk_tokens} tokens)'
                                 if row.chunk_tokens else '')

  split, together = best(True), best(False)
  if split is None and together is None:
    return 'No placement meets the objectives at any rate.'
  if split is None or together is None:
    only = split or together
    return f'Only {name(only)} placements meet the objectives.'
  first, second = ((split, together) if split.per_device > together.per_device
                   else (together, split))
  ratio = first.per_device / second.per_device
  sure = first.interval_per_device[0] > second.interval_per_device[1]
  what = ('Disaggregate' if first is split else 'Do not disaggregate')
  if not sure:
    return (f'No clear winner: {name(first)} serves {ratio:.2f} times what '
            f'{name(second)} does per device, within the intervals.')
  return (f'{what}: {name(first)} serves {ratio:.2f} times what {name(second)} '
          f'does per device ({first.per_device:.3g} against '
          f'{second.per_device:.3g} requests/s).')
