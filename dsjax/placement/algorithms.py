"""What is tried in a search: DistServe's two algorithms, and the baselines.

Algorithm 1 (`high_affinity`) chooses each phase's plan by itself, for clusters
whose network moves KV between any two devices; algorithm 2 (`low_affinity`)
chooses both together, stage beside stage in one node. Colocated and chunked
placements are searched as hard.

An algorithm is a function of a `Search`. It makes candidates and races them;
those that ran are in the result. One of your own, of the widest plan alone:

  def widest(search):
    plans = search.usable(search.problem.cluster.num_devices)
    plan = max(plans, key=lambda plan: plan.tp)
    search.race([search.candidate(Placement(colocated=[plan]))])

  search.search(problem, algorithms=(widest,))
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Protocol

from dsjax.config.checks import require
from dsjax.config.placement import Placement, Plan
from dsjax.placement import clusters
from dsjax.placement.candidates import SearchProblem
from dsjax.placement.goodput import Goodput
from dsjax.placement.judging import Candidate


class Search(Protocol):
  """What an algorithm works with."""

  @property
  def problem(self) -> SearchProblem:
    """What is asked."""
    ...

  def usable(self, most: int) -> list[Plan]:
    """Plans of at most `most` devices that fit and have latencies."""
    ...

  def candidate(self, placement: Placement, tokens: int | None = None,
                aligned: bool = False, phase: str = '') -> Candidate:
    """A Candidate with a bound on its rate, by the work of a request.

    Args:
      placement: of usable plans.
      tokens: of a prefill batch; None: what suits each plan. A chunked
        placement needs it.
      aligned: KV moves inside a node.
      phase: '', or the one phase to judge: see Candidate.
    """
    ...

  def race(self, contenders: Iterable[Candidate], incumbent: float = 0.0
           ) -> tuple[Candidate, Goodput] | None:
    """The best per device, above `incumbent`; None: there is none.

    Each candidate is simulated, or ruled out by a bound.

    Those that are run get a line in the result, unless they are of one phase.

    Args:
      incumbent: requests/s per device.
    """
    ...


  def without(self, reason: str) -> None:
    """Says why an algorithm has no candidates here."""
    ...


_TWO = 'disaggregation takes 2 devices with latencies'
Algorithm = Callable[[Search], object]


def _balanced(problem, prefill, decode, prefill_per_s, decode_per_s):
  """(n, m) instances of each phase: for the rate that is asked for, or those
  that balance best per device in the cluster (algorithm 1, line 15)."""
  def fits(n, m):
    return clusters.fits(problem.cluster, Placement(
        prefill=[prefill] * n, decode=[decode] * m))

  if problem.rate_per_s:
    n = math.ceil(problem.rate_per_s / prefill_per_s)
    m = math.ceil(problem.rate_per_s / decode_per_s)
    need = n * prefill.num_devices + m * decode.num_devices
    require(fits(n, m), 'SearchProblem.rate_per_s', problem.rate_per_s,
            f'less: {n} prefill and {m} decode instances need {need} devices, '
            f'the cluster has {problem.cluster.num_devices}')
    return n, m
  best = None
  for n, m in itertools.product(range(1, 9), repeat=2):
    if math.gcd(n, m) == 1 and fits(n, m):
      rate = min(n * prefill_per_s, m * decode_per_s) / clusters.price(
          problem.cluster, *[prefill] * n, *[decode] * m)
      if best is None or rate > best[0] * (1 + 1e-9):
        best = rate, (n, m)
  return best[1] if best else None


def high_affinity(search: Search) -> None:
  """Algorithm 1: the best plan of each phase alone, then how many of each."""
  problem = search.problem
  usable = search.usable(problem.cluster.num_devices - 1)
  if not usable:
    search.without(_TWO)
    return
  prefills, decodes = ([search.candidate(
      Placement(prefill=[plan], decode=[plan]), phase=phase)
                        for plan in usable] for phase in ('prefill', 'decode'))
  prefill, decode = search.race(prefills), search.race(decodes)
  if prefill is None or decode is None:
    return
  prefill_plan = prefill[0].placement.prefill[0]
  decode_plan = decode[0].placement.decode[0]
  counts = _balanced(problem, prefill_plan, decode_plan,
                     prefill[1].rate_per_s, decode[1].rate_per_s)
  if counts:
    search.race([search.candidate(Placement(
        prefill=[prefill_plan] * counts[0],
        decode=[decode_plan] * counts[1]))])


def low_affinity(search: Search) -> None:
  """Algorithm 2: stages of both phases side by side in a node.

  An instance of pp stages is cut into segments, a prefill and a decode
  segment of the same layers in one node, so KV stays inside nodes. Beyond
  the paper, up to SearchProblem.replicas instances of a phase share that node.

  In a cluster of several kinds the phases may also be on two of them: then KV
  crosses the border between these, and each kind must have the devices.
  """
  problem = search.problem
  cluster = problem.cluster
  usable = search.usable(cluster.num_devices - 1)
  contenders = []
  counts = [(n, m) for n, m in itertools.product(
      range(1, problem.replicas + 1), repeat=2) if math.gcd(n, m) == 1]
  for prefill, decode, (n, m) in itertools.product(usable, usable, counts):
    placement = Placement(prefill=[prefill] * n, decode=[decode] * m)
    nodes = clusters.nodes_of(cluster, prefill)
    segments = math.gcd(prefill.pp, decode.pp)
    if (clusters.fits(cluster, placement) if prefill.kind != decode.kind else
        placement.num_devices // segments <= nodes.devices_per_node
        and segments <= nodes.nodes):
      contenders.append(search.candidate(placement, aligned=True))
  if not contenders:
    sizes = sorted({nodes.devices_per_node for nodes in cluster.kinds.values()})
    search.without(_TWO if cluster.num_devices < 2 else
                   'no two plans fit side by side in a node of '
                   f'{", ".join(map(str, sizes))} devices')
  search.race(contenders)


def colocated(search: Search) -> None:
  """Prefill-priority and chunked placements of one instance, any plan."""
  problem = search.problem
  usable = search.usable(problem.cluster.num_devices)
  search.race([search.candidate(Placement(colocated=[plan]))
               for plan in usable])
  search.race([search.candidate(Placement(chunked=[plan]), size)
               for plan in usable for size in problem.chunks
               if size > problem.max_seqs])
