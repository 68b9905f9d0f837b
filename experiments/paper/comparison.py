"""Systems under two sets of rules: the paper's, and ours.

*Ours*: every system has the same latency constants (but what is called vLLM
has vLLM's own), the KV memory that there is, KV transfers that take time, runs
long enough for queues to show, a warm-up left out, both objectives met by the
same request, 95 % intervals. No prompt is cut but by chunked prefill, and no
step runs ahead of arrivals: both are what serves the colocated baselines best.

*Paper*: the released simulator's and scripts' rules, imitated with our
scheduler: each engine's own constants with the authors' factors in them, 2 ms
and 0.1 us a token of context for Ray, 1 ms x pp for each stage of a prefill,
KV pages without limit but 50,000 tokens of context in a decode step (see
Turns), transfers that take no time, runs of a fixed number of requests from an
empty system, P90 of TTFT and P90 of TPOT judged apart.

Not imitated: prefill batches up to the KV capacity (8,192 tokens here, the
scripts' limit of the engine), a TPOT divided by all tokens, the seeds of its
workloads.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dsjax import workload
from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.latency import LinkLike
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.placement import candidates, goodput, judging
from dsjax.placement.candidates import LatencyOf, SearchProblem, Workload
from dsjax.placement.clusters import Cluster
from dsjax.scheduling import scheduler
from dsjax.simulation import hardware, simulator
from dsjax.simulation.latency import Affine
from dsjax.workload import Source
from experiments.paper.reported import Case

# What the released simulator adds to a step, to its tokens of context, and to
# each stage of a prefill times its stages; tokens of one of its decode steps.
HOST_S, RAY_S, STAGE_S, STEP_TOKENS = 2e-3, 1e-7, 1e-3, 50_000
AMPLE = 2**15  # pages
TARGET = 0.9


class Rules(NamedTuple):
  """name: 'paper' or 'ours'. quick: short runs, for tests."""

  name: str
  seed: int = 0
  quick: bool = False


@dataclasses.dataclass(frozen=True)
class Turns:
  """An Affine of which a decode step holds STEP_TOKENS of context at most.

  Rows above that wait for the next step, those that waited longest first, so
  a token of each row takes context / STEP_TOKENS steps.
  """

  affine: Any  # an Affine

  def __getattr__(self, name: str) -> Any:
    return getattr(self.affine, name)

  def decode_s(self, batch: int, context: float) -> float:
    turns = max(1.0, context / STEP_TOKENS)
    rows: Any = batch / turns  # a share of a batch, as in the release
    return (turns * self.affine.decode_s(rows, context / turns)
            + (turns - 1) * self.affine.host_s)


class System(NamedTuple):
  """What simulates a placement: see simulator.simulate."""

  label: str
  devices: int
  config: scheduler.Config
  latencies: list[Any]
  link: LinkLike | None


def latency_of(model: str, engine: str = 'distserve', realigned: bool = True,
               rules: Rules | None = None
               ) -> Callable[[Plan], Affine | None]:
  """Plan -> seconds of its steps, or None where nothing is known.

  OPT-175B has no public profile: OPT-66B's constants of the same tp are
  multiplied by the ratio of weights; what grows with attention by the ratio
  of KV bytes. A fit in the repository's history (tp 3 pp 3, tp 4 pp 3) is
  within 7 % of it.

  Args:
    engine, realigned: see hardware.published.
    rules: the paper's add what the released simulator does; else a hop
      between stages takes 1 ms.
  """
  weights = attention = 1.0
  known = model
  if model == 'opt-175b':
    a, b = zoo.config('opt-66b'), zoo.config(model)
    known, attention = 'opt-66b', (b.kv_bytes_per_token(2)
                                   / a.kv_bytes_per_token(2))
    weights = b.num_layers * b.d_model**2 / (a.num_layers * a.d_model**2)
  released = rules is not None and rules.name == 'paper'

  def find(plan):
    try:
      profile = hardware.published(known, plan, realigned, HOST_S,
                                   0.0 if released else 1e-3, engine)
    except InputError:
      return None
    stages_s, ray_s = ((STAGE_S * plan.pp**2, RAY_S) if released
                       else (0.0, 0.0))
    def times(constants, shares, fixed_s=0.0):
      a, b, c = (x * share for x, share in zip(constants, shares, strict=True))
      return a + fixed_s, b + ray_s, c
    decode = (weights, attention, weights)
    return dataclasses.replace(
        profile, prefill=times(profile.prefill, (weights, weights, attention),
                               stages_s),
        decode=times(profile.decode, decode),
        decode_large=times(profile.decode_large, decode))
  return find


def problem(model: str, slo: Slo, make: Workload, longest: int,
            seconds: LatencyOf, nodes: int = 1, devices: int = 8,
            **kwargs: Any) -> SearchProblem:
  """A SearchProblem on A100-80GB nodes; seconds: a latency_of."""
  return SearchProblem(
      zoo.config(model), Cluster(nodes, devices, reads_beside=True), slo, make,
      seconds, TARGET, max_len=max(longest, 2048), strict=None, **kwargs)


SHAREGPT = 'sharegpt_lengths_distserve.csv'  # in traces/lengths


def lengths_of(name: str, traces: pathlib.Path) -> str:
  """What workload.source takes: the measured file if there, or a mixture."""
  path = traces / 'lengths' / SHAREGPT
  return str(path) if name == 'sharegpt' and path.is_file() else name


def data_of(names: Iterable[str], traces: pathlib.Path) -> str:
  """What lengths figures of these cases' data sets are of, in words."""
  texts = []
  for name in names:
    if lengths_of(name, traces) != name:
      texts.append(f'{SHAREGPT}, as the paper sampled it')
      continue
    texts.append(f'a mixture with the published means of {name}')
    if name == 'sharegpt':
      texts[-1] += f' ({SHAREGPT} is not in {traces}/lengths)'
  return '; '.join(texts) or 'equal requests'


def fixed(prompt_len: int, output_len: int, seed: int) -> Source:
  """(rate_per_s, n) -> n equal requests, Poisson arrivals."""
  return workload.source(f'fixed:{prompt_len}x{output_len}', seed)


def build(rules: Rules, ask: SearchProblem, label: str, where: Placement,
          chunk: int | None = None) -> System:
  """A System: what a placement has under the rules.

  Args:
    ask: a SearchProblem with the system's own latencies under the rules.
    where: a Placement, KV inside nodes where it is disaggregated.
  """
  if rules.name == 'paper':
    # Weights must fit, KV need not: the original enforces none.
    assert isinstance(ask.cluster, Cluster)
    ask = dataclasses.replace(ask, cluster=dataclasses.replace(
        ask.cluster, memory_bytes=1e15))
  config, late, link = candidates.build(ask, where, chunk, aligned=True)
  released = rules.name == 'paper'
  if released:
    late, link = [Turns(x) for x in late], judging.Instant()
  changes: dict[str, Any] = {'prefill_tokens': ask.max_len}
  if released:
    changes = dict(num_pages=AMPLE, max_seqs=1024, prefill_seqs=128,
                   prefill_tokens=8192)
  if chunk:
    changes.update(prefill_tokens=chunk, max_seqs=256)
  # A prompt that arrives waits for what is in flight, so run-ahead, which
  # hides the host, is what colocated instances cannot afford.
  return System(label, where.num_devices, dataclasses.replace(
      config, run_ahead=1,
      depth=1 if released else config.depth,
      instances=tuple(dataclasses.replace(instance, **changes)
                      for instance in config.instances)), late, link)


def records(system: System, make: Workload, rate_per_device: float, n: int
            ) -> list[Record]:
  """Records of n requests at a rate."""
  sent = make(rate_per_device * system.devices, n)
  # Turns is not a line in the context, so each step is added up.
  straight = not any(isinstance(x, Turns) for x in system.latencies)
  return metrics.by_arrival(simulator.simulate(
      system.config, sent, system.latencies, system.link,
      leap=straight).records)


def count(rules: Rules, system: System, rate_per_device: float, slo: Slo,
          per_gpu: int) -> int:
  """Requests of a run: the paper's, or ten lifetimes, from 400 to 1,500."""
  if rules.name == 'paper':
    n = per_gpu * system.devices
  else:
    life_s = max(slo.ttft_s, 200 * slo.tpot_s)
    n = max(400, math.ceil(10 * life_s * rate_per_device * system.devices))
  return min(n, 120 if rules.quick else 1500)


def steady(rules: Rules, sent: list[Record]) -> list[Record]:
  """The records that count: without our rules' warm-up."""
  return sent if rules.name == 'paper' else sent[len(sent) // 5:]


def curve(rules: Rules, system: System, make: Workload,
          rates: Iterable[float], slo: Slo, per_gpu: int
          ) -> list[tuple[float, float, float, float]]:
  """[(rate per device, share, low, high)] of joint attainment."""
  out = []
  for rate in rates:
    n = count(rules, system, rate, slo, per_gpu)
    counted = steady(rules, records(system, make, rate, n))
    out.append((rate, *metrics.attainment(counted, slo)))
  return out


def scales(rules: Rules, system: System, make: Workload, rate: float,
           slo: Slo, per_gpu: int, factors: Iterable[float]
           ) -> list[tuple[float, float]]:
  """[(factor on both objectives, share attained)] of one run."""
  n = count(rules, system, rate, slo, per_gpu)
  needs = [metrics.slo_scale(r, slo) for r in steady(
      rules, records(system, make, rate, n))]
  return [(f, sum(x <= f for x in needs) / len(needs)) for f in factors]


def scale_at(rules: Rules, system: System, make: Workload, rate: float,
             slo: Slo, per_gpu: int) -> float:
  """The least factor on both objectives at which 90 % attain."""
  n = count(rules, system, rate, slo, per_gpu)
  needs = sorted(metrics.slo_scale(r, slo) for r in steady(
      rules, records(system, make, rate, n)))
  return needs[math.ceil(TARGET * len(needs)) - 1]


def apart(seen: Sequence[Record], slo: Slo) -> list[bool]:
  """Hits of the objective that fewer requests meet: P90s judged apart."""
  only = (dataclasses.replace(slo, tpot_s=1e9),
          dataclasses.replace(slo, ttft_s=1e9))
  return min(([metrics.attains(r, limit) for r in seen] for limit in only),
             key=sum)


def best_rate(rules: Rules, system: System, make: Workload, slo: Slo,
              per_gpu: int, start: float = 0.5, ratio: float = 1.08
              ) -> tuple[float, float, float]:
  """(goodput, low, high) per device; paper's rules have no interval."""
  def hits_at(rate, n):
    n = count(rules, system, rate, slo, per_gpu)
    seen = records(system, make, rate, n)
    if rules.name == 'paper':
      return apart(seen, slo)
    return goodput.steady_hits(seen, slo)
  best = goodput.search(hits_at, TARGET, start, 1.2 if rules.quick else ratio,
                         1, 1, goodput.Bisection(most_per_s=64 * start,
                                                 least_per_s=start / 64))
  return best.rate_per_s, best.low_per_s, best.high_per_s


def tuned(rules: Rules, ask: SearchProblem, make: Workload, slo: Slo,
          per_gpu: int, role: str, plans: Iterable[Plan],
          chunks: Sequence[int] = (512, 1024)
          ) -> tuple[tuple[float, float, float], str, System]:
  """The best colocated or chunked System of a few plans, and its goodput."""
  out = []
  for plan in plans:
    for chunk in chunks if role == 'chunked' else (None,):
      of_role: dict[str, Any] = {role: [plan]}
      where = Placement(**of_role)
      try:
        system = build(rules, ask, f'tuned {role}', where, chunk)
      except InputError:
        continue  # does not fit, or nobody has measured it
      rate = best_rate(rules, system, make, slo, per_gpu, ratio=1.2)
      out.append((rate, str(plan) + (
          f', {chunk} tokens' if chunk else ''), system))
  return max(out, key=lambda x: x[0][0])


def distserve(rules: Rules, case: Case, ask: SearchProblem) -> System:
  return build(rules, ask, 'DistServe', case.placement)


def vllm(rules: Rules, case: Case, ask: SearchProblem) -> System:
  """The colocated baseline at the paper's fixed tp."""
  return build(rules, ask, 'vLLM', Placement(colocated=[Plan(case.tp)]))


def mii(rules: Rules, case: Case, ask: SearchProblem) -> System:
  """Chunked prefill at the paper's fixed tp, budget 512 (an assumption)."""
  where = Placement(chunked=[Plan(case.tp)])
  return build(rules, ask, 'chunked', where, 512)


def requests(case: Case, rules: Rules, traces: pathlib.Path
             ) -> tuple[Source, int]:
  """(make, longest) of a case."""
  make = workload.source(lengths_of(case.lengths, traces), rules.seed)
  return make, make.longest

