"""One call each: simulate a placement, search for the best one.

What a caller names is made into what the layers below take: a SearchProblem,
and from it the scheduler's Config, latencies and link.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from dsjax.analysis import attribution, metrics
from dsjax.analysis.record import Record
from dsjax.config import zoo
from dsjax.config.checks import (
  InputError,
  is_nonnegative,
  is_positive_int,
  naming,
  plain,
  require,
)
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request
from dsjax.placement import candidates, goodput
from dsjax.placement import search as searching
from dsjax.placement.algorithms import colocated, high_affinity, low_affinity
from dsjax.placement.candidates import SearchProblem
from dsjax.placement.clusters import AnyCluster, Cluster, MixedCluster
from dsjax.placement.search import SearchResult
from dsjax.scheduling import scheduler
from dsjax.scheduling.policy import DISTSERVE, Policy
from dsjax.simulation import latency, profiles, simulator
from dsjax.simulation.contention import Contention
from dsjax.simulation.hardware import Hardware
from dsjax.simulation.latency import Link
from dsjax.simulation.profiles import Profile
from dsjax.simulation.roofline import Roofline
from dsjax.workload import named as workload
from dsjax.workload.files import Entry
from dsjax.workload.requests import check_requests

WARMUP = 0.2  # share of the requests that counts in no statistic
SLO = Slo(ttft_s=0.25, tpot_s=0.1)
ALGORITHMS = {'low': low_affinity, 'high': high_affinity,
              'colocated': colocated}

Named = str | Profile | latency.Latency | candidates.LatencyOf | Hardware


def latency_of(named: Named, config: ModelConfig,
               host_ms: float = 2.0) -> candidates.LatencyOf:
  """A function Plan -> seconds of its steps, None where nothing is known.

  Args:
    named: a name or a file (see profiles.named), a Profile, such a
      function, one latency for every plan (see dsjax.simulation.latency), or
      a Hardware, for the roofline of a device of your own.
    host_ms: the host's time between two steps, where `named` does not say.

  Raises:
    InputError; also of a profile of another model.
  """
  require(is_nonnegative(host_ms), 'host_ms', host_ms, '0 or more')
  host_ms = plain(host_ms)
  if isinstance(named, str):
    return profiles.named(named, config, host_ms / 1e3)
  if isinstance(named, Profile):
    return named.of(config)
  if isinstance(named, Hardware):
    return profiles.of_hardware(named, config, host_ms / 1e3)
  if isinstance(named, latency.Latency) and not isinstance(named, type):
    return functools.partial(_probed, functools.partial(_same, named))
  require(callable(named) and not isinstance(named, type), 'latency', named,
          'a name, a file, a Profile, a function of a Plan, or what has '
          'prefill_s, decode_s and so on')
  return functools.partial(_probed, named)


def profile_of(named: Named) -> Profile | None:
  """The Profile that latencies are of: a file's or itself; None: of none."""
  if isinstance(named, str) and profiles.is_file(named):
    return profiles.load(named)
  return named if isinstance(named, Profile) else None


_KINDS = {'slo': (Slo,), 'policy': (Policy,),
          'cluster': (Cluster, MixedCluster), 'contention': (Contention,)}


def _check(**fields):
  """Raises InputError unless each field is what its name says."""
  for name, value in fields.items():
    if name in _KINDS:
      kinds = _KINDS[name]
      require(isinstance(value, kinds) or value is None
              and name in ('cluster', 'contention'), name, value,
              'a Contention, such as that of a Profile'
              if name == 'contention' else
              ' or '.join(f'a dsjax.{kind.__name__}' for kind in kinds))
    elif name in ('aligned', 'cut', 'log'):
      require(isinstance(value, bool), name, value, 'True or False')
    else:
      require(is_positive_int(value) or value is None
              and name in ('depth', 'run_ahead', 'max_len'), name, value,
              'an integer of 1 or more')


def _of_kinds(known: Mapping[str, candidates.LatencyOf],
              plan: Plan) -> latency.Latency | None:
  """The latency of a plan on the devices of its kind."""
  return plan.kind in known and known[plan.kind](
      dataclasses.replace(plan, kind='')) or None


def _known(cluster: AnyCluster, latency: Named, config: ModelConfig,
           host_ms: float) -> tuple[
               candidates.LatencyOf, dict[tuple[Plan, Plan], Link],
               tuple[float, float]]:
  """(latency_of, links) of the plans of a cluster, and the bytes of a weight
  and of a number of KV."""
  each: dict[str, candidates.LatencyOf] = {}
  links, stored = {}, {}
  for kind, own in cluster.kinds.items():
    named = latency if own.latency is None else own.latency
    with nullcontext() if own.latency is None else naming(
        f'MixedCluster.kinds.{kind}' if kind else 'Cluster'):
      each[kind] = latency_of(named, config, host_ms)
    profile = profile_of(named)
    links |= {tuple(dataclasses.replace(plan, kind=kind) for plan in pair): link
              for pair, link in (profile.links if profile else {}).items()}
    stored[kind] = ((profile.bytes_per_weight, profile.bytes_per_kv) if profile
                    else (named.itemsize, named.kv_itemsize)
                    if isinstance(named, Roofline) else (2, 2))
  require(len(set(stored.values())) == 1, 'MixedCluster.kinds', stored,
          'of latencies with the same bytes of a weight and of a number of KV')
  return (functools.partial(_of_kinds, each)
          if isinstance(cluster, MixedCluster) else each['']), links, next(
              iter(stored.values()))


def _same(every: latency.Latency, plan: Plan) -> latency.Latency | None:
  return every if every.pp == plan.pp else None


def _probed(of_plan: candidates.LatencyOf, plan: Plan
            ) -> latency.Latency | None:
  """A caller's own latency, whose seconds are looked at: a simulation could
  not go on with what are none."""
  own = of_plan(plan)
  if own is None or isinstance(own, latency.Affine):
    return own
  require(isinstance(own, latency.Latency), f'latency({plan})', own,
          'None, or what has prefill_s, decode_s and so on')
  seconds = {'host_s': own.host_s}
  for size in (1, 512):
    seconds |= {f'prefill_s(((0, {size}),))': own.prefill_s(((0, size),)),
                f'decode_s(1, {size})': own.decode_s(1, size)}
  for name, value in seconds.items():
    require(is_nonnegative(value), f'latency.{name}', value,
            'seconds, 0 or more')
  return own


def make_problem(model: str | ModelConfig = 'opt-13b', slo: Slo = SLO,
                 lengths: workload.Lengths = 'sharegpt',
                 latency: Named = 'published', *,
                 cluster: AnyCluster | None = None, process: str = 'poisson',
                 cv: float = 1.0, seed: int = 0, host_ms: float = 2.0,
                 max_len: int | None = None, cut: bool = False,
                 **more: Any) -> SearchProblem:
  """The candidates.SearchProblem of what a caller names; more: fields of it.

  Its workload is a workload.named.Source. Its instances have room for the
  longest request.

  Args:
    max_len: the context in tokens; None: the model's.
    cut: longer requests are cut to it. Else they are refused, but those of a
      mixture, which are served whole: its tail is ours, not a measurement.

  Raises:
    InputError.
  """
  config = model if isinstance(model, ModelConfig) else zoo.config(model)
  source = workload.source(lengths, seed, process, cv)
  context = max_len or config.max_len
  if cut:
    source = source.within(context)
  elif max_len or not source.mixture:
    require(source.longest <= context, 'lengths', source.longest,
            f'of at most {context} tokens, the context '
            + ('asked for' if max_len else f'of {config.name}')
            + f' ({source.beyond(context)} of {len(source.entries)} requests '
            'are longer): cut=True (--cut) cuts them')
  cluster = cluster or Cluster.of(latency)
  known, links, (weight, kv) = _known(cluster, latency, config, host_ms)
  stored: dict[str, Any] = {'itemsize': weight, 'kv_itemsize': kv}
  return SearchProblem(config, cluster, slo, source, known, links=links,
                       max_len=max_len or source.longest, **stored | more)


# --- simulate -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Simulated:
  """A simulated run.

  Attributes:
    records: of all requests, in order of arrival.
    kept: those after the warm-up, of which `summary` speaks.
    summary: attainment (share, low, high), latencies, goodput.
    unsteady: why the run was not in a steady state, or ''.
    config: the scheduler's.
    log: (event, commands) pairs, or None.
    cut: lengths of the workload that were cut to the context.
  """

  placement: Placement
  slo: Slo
  records: list[Record]
  kept: list[Record]
  summary: metrics.Summary
  unsteady: str
  config: scheduler.Config
  latencies: Sequence[latency.Latency]
  log: list | None = None
  cut: int = 0

  def explain(self) -> attribution.Attribution:
    """Why requests missed their objectives, and what would have saved them.

    Raises:
      InputError: there is no log.
    """
    if self.log is None:
      raise InputError('log=None: must be kept: simulate(..., log=True)')
    fold = attribution.of_log(self.log, self.latencies)
    return attribution.attribute(self.kept, fold.parts(), self.slo,
                                 no_load(self.config, self.latencies))

  def __str__(self) -> str:
    share, low, high = self.summary.attainment
    ttft_s, tpot_s = self.summary.ttft_s[1], self.summary.tpot_s[1]
    return (f'{self.placement}: {share:.0%} of {len(self.kept)} requests met '
            f'both objectives, 95 % interval [{low:.0%}, {high:.0%}]; p90 '
            f'TTFT {ttft_s:.3g} s, TPOT {tpot_s:.3g} s'
            + (f' ({self.unsteady})' if self.unsteady else '')
            + (f' ({self.cut} lengths cut)' if self.cut else ''))


def simulate(placement: Placement | str, model: str | ModelConfig = 'opt-13b',
             *, rate_per_s: float | None = None, slo: Slo = SLO,
             lengths: workload.Lengths | Sequence[Request] = 'sharegpt',
             latency: Named = 'published', requests: int = 400,
             process: str = 'poisson', cv: float = 1.0, seed: int = 0,
             cluster: AnyCluster | None = None, aligned: bool = True,
             chunk: int = candidates.CHUNK, depth: int | None = None,
             run_ahead: int | None = None, host_ms: float = 2.0,
             max_len: int | None = None, cut: bool = False,
             max_seqs: int = 256,
             contention: Contention | None = None,
             policy: Policy = DISTSERVE, prefix_cache: bool = True,
             host_bytes: float = 0.0, stream_kv: bool = False,
             log: bool = False) -> Simulated:
  """Serves a workload in virtual time with the scheduler that serves.

  Args:
    placement: a Placement, or its text: 'prefill=2x1,decode=1x1', in a
      MixedCluster 'prefill=2x1@fast,decode=1x1@slow'.
    model: a name in dsjax.config.zoo, or a ModelConfig.
    rate_per_s: requests a second; None for the times of a trace.
    slo: the objectives that attainment is about.
    lengths: see workload.named.lengths_of, or a list of Requests, which come
      at their own times.
    latency: seconds of a step; see latency_of.
    requests: how many; the first fifth counts in no statistic.
    process, cv: of arrivals; see workload.named.arrivals_of.
    seed: of lengths and arrivals.
    cluster: memory of a device and speed of a KV transfer; None: those of
      the device that latency names (Cluster.of).
    aligned: KV moves inside a node.
    chunk: token budget of a chunked placement.
    depth, run_ahead: see scheduler.Config; None for what the role suggests.
    host_ms: the host's time between two steps, where latency does not say.
    max_len, cut: the context, and what is done with longer requests; see
      make_problem. max_seqs: most requests of an instance.
    contention: of instances that share cores, such as Profile.contention.
    policy: every choice of the scheduler.
    prefix_cache: pages are kept for requests that begin alike, as their
      blocks say (Request.blocks: see workload.sessions); others have none.
      host_bytes: of host memory of each instance, for what it evicts and for
      rows that are preempted.
    stream_kv: KV of a prompt in chunks moves chunk by chunk.
    log: keep the event log, which `explain` needs.

  Raises:
    InputError.
  """
  _check(slo=slo, policy=policy, cluster=cluster, contention=contention,
         requests=requests, chunk=chunk, depth=depth, run_ahead=run_ahead,
         max_len=max_len, max_seqs=max_seqs, aligned=aligned, cut=cut, log=log)
  kinds = cluster.kinds if cluster else ('',)
  placement = (Placement.parse(placement, kinds=kinds)
               if isinstance(placement, str) else placement)
  require(isinstance(placement, Placement), 'placement', placement,
          'a Placement or its text')
  given = _requests(lengths)
  require(not (given and cut), 'cut', cut, 'False with requests of your own')
  sizes: Any = lengths
  if given:
    sizes = [Entry(None, len(r.prompt), r.sampling.max_tokens or 1)
             for r in given]
  problem = make_problem(
      model, slo, sizes, latency, cluster=cluster,
      process=process, cv=cv, seed=seed, host_ms=host_ms, max_len=max_len,
      cut=cut, max_seqs=max_seqs, policy=policy, prefix_cache=prefix_cache,
      host_bytes=host_bytes, stream_kv=stream_kv)
  config, latencies, link = build(problem, placement, chunk, aligned, depth,
                                  run_ahead)
  result = simulator.simulate(
      config, given or problem.workload(rate_per_s, requests), latencies, link,
      log=log, contention=contention)
  run = simulated(placement, slo, result.records, config, latencies,
                  result.log)
  return dataclasses.replace(run, cut=cut_of(problem))


def cut_of(problem: SearchProblem) -> int:
  """How many lengths of a problem's workload were cut."""
  source = problem.workload
  return source.cut if isinstance(source, workload.Source) else 0


def note(problem: SearchProblem) -> str:
  """What became of requests beyond the model's context, or ''."""
  source, context = problem.workload, problem.model.max_len
  if not isinstance(source, workload.Source):
    return ''
  beyond, of = source.beyond(context), f'of {len(source.entries)} lengths'
  if source.cut:
    return f'{source.cut} {of} are cut to the context.'
  return beyond and (f'{beyond} {of} are beyond the context of {context} '
                     f'tokens of {problem.model.name} and are served whole; '
                     '--cut cuts them.') or ''


def _requests(lengths: Any) -> list[Request]:
  """The requests, checked, where that is what was given as lengths."""
  if isinstance(lengths, Sequence) and any(
      isinstance(each, Request) for each in lengths):
    return check_requests('lengths', lengths)
  return []


def no_load(config: scheduler.Config,
            latencies: Sequence[latency.Latency]) -> attribution.NoLoad:
  """record -> (seconds of its prefill, of a decode step) with nothing beside.

  On the fastest instance of each phase; long prompts run in its chunks.
  """
  both = list(zip(config.instances, latencies, strict=True))

  def seconds(record: Record) -> tuple[float, float]:
    n, prefill_s, decode_s = record.prompt_len, math.inf, math.inf
    for instance, own in both:
      if instance.prefills:
        size = instance.prefill_tokens
        prefill_s = min(prefill_s, own.host_s + sum(
            own.prefill_s(((start, min(n, start + size)),))
            for start in range(0, n, size)))
      if instance.decodes:
        decode_s = min(decode_s, own.decode_s(1, n + 1))
    return prefill_s, decode_s
  return seconds


def build(problem: SearchProblem, placement: Placement,
          chunk: int = candidates.CHUNK,
          aligned: bool = True, depth: int | None = None,
          run_ahead: int | None = None
          ) -> tuple[scheduler.Config, list[latency.Latency], latency.Link]:
  """candidates.build with the scheduler's depth and run-ahead as asked for.

  Returns:
    (scheduler.Config, a latency for each instance, the link).
  """
  config, latencies, link = candidates.build(
      problem, placement, chunk if placement.chunked else None, aligned)
  config = dataclasses.replace(
      config, depth=config.depth if depth is None else depth,
      run_ahead=config.run_ahead if run_ahead is None else run_ahead)
  return config, latencies, link


def simulated(placement: Placement, slo: Slo, records: list[Record],
              config: scheduler.Config, latencies: Sequence[latency.Latency],
              log: list | None = None) -> Simulated:
  """The Simulated of a finished run."""
  kept = goodput.steady(metrics.by_arrival(records), WARMUP)
  return Simulated(
      placement, slo, records, kept,
      metrics.summarize(kept, slo, placement.num_devices),
      unsteady(records, slo, goodput.steady_hits(records, slo, WARMUP)),
      config, latencies, log)


def unsteady(records: Iterable[Record], slo: Slo,
             hits: Sequence[bool]) -> str:
  """Why a run was not in a steady state, or ''.

  Either waits grew: those of the last quarter of the arrivals are half as
  long again as those of the second, and longer by more than the TTFT
  objective (or a tenth of the run, if that is less). Or the 95 % intervals of
  both halves' attainment are apart.

  Args:
    hits: whether each request attained, in order of arrival.
  """
  records = list(records)
  left = sum(r.finish_s is None for r in records)
  if left:
    return f'{left} requests never ended: the policy leaves them waiting'
  sent = metrics.by_arrival(records)
  waits = [r.stage_s['prefill_queue'] + r.stage_s['decode_queue']
           for r in sent]
  quarter = len(waits) // 4
  if quarter:
    early = sum(waits[quarter:2 * quarter]) / quarter
    late = sum(waits[-quarter:]) / quarter
    span_s = sent[-1].arrival_s - sent[0].arrival_s
    grown_s = min(slo.ttft_s, span_s / 10) if span_s else slo.ttft_s
    if late > max(1.5 * early, early + grown_s):
      return (f'rate beyond capacity: waits grew from {early:.2g} s to '
              f'{late:.2g} s')
  half = len(hits) // 2
  first, last = metrics.interval(hits[:half]), metrics.interval(hits[half:])
  if first[1] > last[2] or last[1] > first[2]:
    return (f'not steady: {first[0]:.0%} attained in the first half, '
            f'{last[0]:.0%} in the second')
  return ''


# --- search -------------------------------------------------------------------


def search(model: str | ModelConfig = 'opt-13b', *,
           devices: int = candidates.DEVICES, nodes: int = 1, slo: Slo = SLO,
           lengths: workload.Lengths = 'sharegpt',
           latency: Named = 'published', target: float = 0.9,
           requests: int = 200, tolerance: float = 0.1, effort: float = 16.0,
           algorithms: Sequence[str] = ('low', 'colocated'),
           chunks: Sequence[int] = candidates.CHUNKS, replicas: int = 3,
           rate_per_s: float | None = None, strict: float | None = None,
           process: str = 'poisson', cv: float = 1.0, seed: int = 0,
           host_ms: float = 2.0, max_len: int | None = None,
           cut: bool = False, max_seqs: int = 256,
           cluster: AnyCluster | None = None,
           policy: Policy = DISTSERVE,
           report: searching.Report | None = None,
           map: Callable[..., Iterable] = map) -> SearchResult:
  """The placements with the highest goodput per device: DistServe section 4.

  Args:
    model, slo, lengths, latency, process, cv, seed, host_ms, max_len, cut,
      max_seqs: see simulate.
    devices: of each node; nodes: how many. cluster: instead of both, with
      the memory of a device and the speed of KV transfers, or a MixedCluster;
      else those of the device that latency names (Cluster.of).
    target: share of requests that must meet both objectives.
    requests: simulated at a rate, at first; four times as many at most.
    tolerance: of the rate, where a candidate's search ends.
    effort: of the best placements' runs: so many times the requests.
    algorithms: names of ALGORITHMS.
    chunks: token budgets tried for chunked placements, above max_seqs.
    replicas: most instances of a phase.
    rate_per_s: of the whole cluster; None: what counts is each device.
    strict: a second target, of the best placements alone; None: none.
    policy: every candidate is judged under it.
    report: called as candidates are done; `report=print` prints a line each.
    map: see search.search.

  Raises:
    InputError: bad input, or nothing that fits can meet the objectives.
  """
  _check(slo=slo, policy=policy, cluster=cluster, requests=requests,
         max_len=max_len, max_seqs=max_seqs, cut=cut)
  require(isinstance(algorithms, tuple | list) and algorithms, 'algorithms',
          algorithms, f'some of {sorted(ALGORITHMS)}')
  require(isinstance(chunks, tuple | list) and chunks and all(
      is_positive_int(size) and size > max_seqs for size in chunks), 'chunks',
          chunks, f'token budgets, each an integer above max_seqs={max_seqs}: '
          'decode rows share them')
  for name in algorithms:
    require(name in ALGORITHMS, 'algorithms', name,
            f'one of {sorted(ALGORITHMS)}')
  problem = make_problem(
      model, slo, lengths, latency,
      cluster=cluster or Cluster.of(latency, nodes=nodes,
                                    devices_per_node=devices),
      max_len=max_len, cut=cut,
      process=process, cv=cv, seed=seed, host_ms=host_ms, target=target,
      chunks=tuple(chunks), requests=requests, most_requests=4 * requests,
      tolerance=tolerance, effort=effort, replicas=replicas,
      rate_per_s=rate_per_s, strict=strict, max_seqs=max_seqs, policy=policy)
  answer = searching.search(
      problem, [ALGORITHMS[name] for name in algorithms], report, map)
  return dataclasses.replace(answer, cut=cut_of(problem))
