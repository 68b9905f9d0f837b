"""The search for a placement: what fits, bounds, floors, verdicts."""

import dataclasses
import math
import re

import pytest

from dsjax import base, goodput, hardware, latency, placement, workload, zoo
from dsjax.base import InputError, Placement, Plan, Slo
from dsjax.placement import Cluster, Problem
from tests import tiny

MODEL = dataclasses.replace(tiny.CONFIG, num_heads=8, num_kv_heads=8)
ONE = latency.Affine((0.01, 1e-4, 0.0), (0.01, 1e-6, 1e-4), host_s=0.001)


def measured(plan, most_tp=4):
  """Twice as fast on two devices, less on more."""
  if plan.tp > most_tp:
    return None
  return latency.scale(ONE, MODEL, plan, speedup=plan.tp**0.9)


def work(rate_per_s, n):
  at = workload.arrivals('poisson', rate_per_s, n, seed=3)
  entries = [workload.Entry(None, 60 + 17 * (i % 5), 4 + 3 * (i % 7))
             for i in range(n)]
  return workload.from_lengths(entries, n, at)[0]


def problem(**changes):
  return Problem(**dict(
      model=MODEL, cluster=Cluster(1, 3), slo=Slo(0.2, 0.03), workload=work,
      latency_of=measured, max_len=256, max_seqs=16, prefill_seqs=4,
      chunks=(64,), requests=100, most_requests=400, tolerance=0.2) | changes)


# --- what fits ----------------------------------------------------------------


@pytest.mark.parametrize('plan', ((1, 1), (2, 1), (4, 1)))
def test_kv_capacity_is_near_what_the_paper_lists(plan):
  p = problem(model=zoo.config('opt-13b'), cluster=Cluster(1, 8))
  found = placement.kv_tokens(p, Plan(*plan))
  assert found == pytest.approx(
      hardware.PUBLISHED_TOKENS['opt-13b', *plan], rel=0.2)


def test_kv_heads_are_not_split_further_than_there_are():
  p = problem(model=zoo.config('llama-3-8b'))
  eight, sixteen = (placement.kv_tokens(p, Plan(tp)) for tp in (8, 16))
  assert sixteen < 1.1 * eight


def test_plans_divide_heads_and_layers_and_stay_in_a_node():
  p = problem(model=zoo.config('opt-66b'), cluster=Cluster(2, 4))
  found = placement.plans(p, 8)
  assert Plan(3, 2) in found and Plan(4, 2) in found
  assert all(72 % x.tp == 0 and 64 % x.pp == 0 and x.tp <= 4
             and x.num_devices <= 8 for x in found)


def test_what_cannot_be_used_is_named():
  small = Cluster(1, 2, memory_bytes=1e5)
  with pytest.raises(InputError, match='2 do not fit in memory|3 do not fit'):
    placement.search(problem(cluster=small))
  with pytest.raises(InputError, match='have no latencies'):
    placement.search(problem(latency_of=lambda plan: None))
  answer = placement.search(problem(
      latency_of=lambda plan: measured(plan, 1), cluster=Cluster(1, 2)))
  assert answer.unmeasured == (Plan(2, 1),)


@pytest.mark.parametrize('slo, field', (
    (Slo(0.005, 1.0), 'Slo.ttft_s=0.005: must be above 0.01'),
    (Slo(1.0, 0.001), 'Slo.tpot_s=0.001: must be above 0.00')))
def test_an_impossible_objective_names_the_floor(slo, field):
  with pytest.raises(InputError, match=field):
    placement.search(problem(slo=slo))


@pytest.mark.parametrize('changes, field', (
    (dict(target=1.0), 'Problem.target'), (dict(tolerance=0), 'tolerance'),
    (dict(max_len=64), 'Problem.max_len=64')))
def test_bad_problems(changes, field):
  with pytest.raises(InputError, match=field):
    placement.search(problem(**changes))


@pytest.mark.parametrize('field, value', (
    ('nodes', 0), ('devices_per_node', 1.5), ('memory_bytes', 0),
    ('inter_bytes_per_s', math.inf)))
def test_bad_clusters(field, value):
  with pytest.raises(InputError, match=f'Cluster.{field}='):
    Cluster(**{field: value})


# --- the search ---------------------------------------------------------------


def test_the_best_is_that_of_a_search_without_pruning(monkeypatch):
  pruned = placement.search(problem())
  monkeypatch.setattr(placement._Search, 'worse', lambda *_: False)
  whole = placement.search(problem())
  assert pruned.pruned and not whole.pruned
  assert pruned.rows[0] == whole.rows[0] and len(whole.rows) > len(pruned.rows)
  modes = [r.placement.mode for r in whole.rows]
  assert set(modes) == {'disaggregated', 'colocated', 'chunked'}
  best = [r.per_device for r in whole.rows]
  assert best == sorted(best, reverse=True)
  for row in whole.rows:
    assert row.placement.num_devices <= 3
    assert (row.chunk_tokens == 64) == (row.placement.mode == 'chunked')


def test_no_placement_beats_its_bound():
  p = problem()
  state = placement._Search(p, None)
  for row in placement.search(p).rows:
    late = [state.seconds(plan) for _, plan in row.placement.instances]
    phases = {'disaggregated': (('prefill',), ('decode',))}.get(
        row.placement.mode, (('prefill', 'decode'),))
    bound = min(one.pp / sum(state.work_s(one, phase) for phase in part)
                for one, part in zip(late, phases, strict=True))
    assert row.goodput.rate_per_s <= bound * 1.001
    assert row.goodput.high_per_s <= bound * 1.001


def test_algorithm_1_replicates_phases_to_balance_them():
  slow = latency.Affine((0.0, 1e-3, 0.0), (0.001, 0.0, 1e-5))
  answer = placement.search(
      problem(latency_of=lambda plan: slow if plan == Plan() else None,
              cluster=Cluster(1, 4), slo=Slo(1.0, 0.05)),
      (placement.high_affinity,))
  row, = answer.rows
  assert len(row.placement.prefill) > len(row.placement.decode) == 1
  assert set(row.placement.instances) == {('prefill', Plan()),
                                          ('decode', Plan())}


# --- the verdict --------------------------------------------------------------


def row(mode, rate, spread=0.02, **plans):
  plans = plans or ({'prefill': [Plan()], 'decode': [Plan()]}
                    if mode == 'disaggregated' else {mode: [Plan()] * 2})
  found = goodput.Goodput(rate, rate * (1 - spread), rate * (1 + spread),
                          'target', 0.9, 1)
  return placement.Row(Placement(**plans), found,
                       chunk_tokens=64 if mode == 'chunked' else None)


@pytest.mark.parametrize('rows, begins', (
    ((), 'No placement meets'),
    ((row('disaggregated', 0.0), row('colocated', 0.0)), 'No placement meets'),
    ((row('disaggregated', 3.0), row('colocated', 0.0)),
     'Only disaggregated'),
    ((row('disaggregated', 3.0), row('colocated', 2.0)),
     'Disaggregate: disaggregated serves 1.50 times what colocated'),
    ((row('chunked', 3.0), row('disaggregated', 2.0), row('colocated', 1.0)),
     r'Do not disaggregate: chunked \(64 tokens\) serves 1.50 times'),
    ((row('disaggregated', 2.01), row('colocated', 2.0)),
     'No clear winner: disaggregated serves 1.00 times')))
def test_verdict(rows, begins):
  assert re.match(begins, placement.verdict(rows))


def test_a_row_is_a_placement_that_serves():
  best = placement.search(problem(), (placement.colocated,)).rows[0]
  assert isinstance(best.placement, base.Placement)
  low, high = best.interval_per_device
  assert low <= best.per_device <= high
