"""The simulator against closed forms, hand-made timelines and itself."""

import collections
import dataclasses
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax import workload
from dsjax.analysis import metrics, recorder, timeline
from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.scheduling import event_log, page_pool, scheduler
from dsjax.scheduling.events import Finish, Migrated, Reject
from dsjax.simulation import simulator
from dsjax.simulation.contention import Contention
from experiments.paper import queueing
from tests.common.simulated import PD, Affine, Link, plan, random_run, requests


def tokens(result):
  return [r.token_s for r in result.records]


# --- timelines by hand ------------------------------------------------------


@pytest.mark.parametrize('leap', [True, False])
def test_disaggregated_by_hand(leap):
  # A prefills in [0, 1], B in [1, 2]. A is copied until 1.5 and runs its two
  # steps as one command; B, there from 2.5, comes after it.
  result = simulator.simulate(
      plan(PD, prefill_seqs=1), requests((0, 10, 3), (0, 10, 2)), Affine(),
      Link(), leap=leap)
  assert tokens(result) == [pytest.approx([1, 3.11, 4.73]),
                            pytest.approx([2, 4.73 + 1.61])]
  a, b = result.records
  assert a.stage_s == pytest.approx(dict(
      prefill_queue=0, prefill=1, migrate=0.5, decode_queue=0, decode=3.23))
  assert b.stage_s['prefill_queue'] == pytest.approx(1)
  assert (a.finish_s, a.status, a.instances) == (a.token_s[-1], 'length',
                                                 (0, 1))
  assert result.busy_s == pytest.approx((2, 3.23 + 1.61))
  assert result.link_s == pytest.approx(1)


@pytest.mark.parametrize('roles, share, second', [
    (PD, 'pair', 3.0), (PD, 'nic', 3.0), ((*PD, 'decode'), 'pair', 2.5),
    ((*PD, 'decode'), 'nic', 3.0)])
def test_copies_queue_at_their_link(roles, share, second):
  # Both prompts are one batch of 2 s; each copy takes 0.5 s.
  result = simulator.simulate(plan(roles), requests((0, 10, 2), (0, 10, 2)),
                              Affine(), Link(), log=True, share=share)
  copied = [e.time_s for e, _ in result.log if isinstance(e, Migrated)]
  assert copied == pytest.approx([2.5, second])


def test_copies_of_one_moment_begin_in_one_step():
  # A and B prefill beside each other, and each has a link of its own.
  result = simulator.simulate(
      plan(('prefill', 'prefill', 'decode')), requests((0, 10, 2), (0, 10, 2)),
      Affine(), Link(), log=True)
  (first, nothing), (second, (command,)) = [
      moved for moved in result.log if isinstance(moved[0], Migrated)]
  assert (first.more, second.more, nothing) == (True, False, ())
  assert len(command.rows) == 2


@pytest.mark.parametrize('apart_s, tpot_s', [
    (0.0, (2.72, 2.72)), (1e-9, (2.11, 3.72))])
def test_copies_that_begin_one_by_one_cost_the_second_a_step(apart_s, tpot_s):
  """A nanosecond apart, they are planned as those of one moment once were."""
  result = simulator.simulate(
      plan(('prefill', 'prefill', 'decode')),
      requests((0, 10, 2), (apart_s, 10, 2)), Affine(), Link())
  assert [r.tpot_s for r in result.records] == pytest.approx(tpot_s)


def test_a_copy_delays_no_step_of_its_target():
  # A decodes commands of a step, in flight when B's copy lands at 2.5.
  result = simulator.simulate(
      plan(PD, prefill_seqs=1, run_ahead=1, depth=2),
      requests((0, 10, 9), (0, 10, 2)), Affine(), Link(0.5), log=True)
  assert [e.time_s for e, _ in result.log
          if isinstance(e, Migrated)] == pytest.approx([1.5, 2.5])
  steps = np.diff([1.5, *result.records[0].token_s[1:]])
  # B is in the third, the first that was issued after it came.
  assert steps == pytest.approx([1.61, 1.62, 2.24, 1.64, 1.65, 1.66, 1.67,
                                 1.68])


@pytest.mark.parametrize('contention', [None, Contention({})])
@pytest.mark.parametrize('beside, landed', [(False, 6.5), (True, 5.23)])
def test_pages_are_read_behind_what_their_source_does(contention, beside,
                                                      landed):
  # Decode has a place for one: A until 4.73. B, prefilled at 2, is pulled then,
  # while C is prefilled from 4 to 6: its pages are read at 6.
  config = plan(PD, prefill_seqs=1)
  config = dataclasses.replace(config, instances=(
      config.instances[0],
      dataclasses.replace(config.instances[1], max_seqs=1)))
  result = simulator.simulate(
      config, requests((0, 10, 3), (0, 10, 2), (4, 20, 1)), Affine(),
      Link(beside=beside), log=True, contention=contention)
  assert [e.time_s for e, _ in result.log
          if isinstance(e, Migrated)] == pytest.approx([1.5, landed])


def test_colocated_by_hand():
  # B waits for A's decode step, which was sent behind A's prefill.
  result = simulator.simulate(
      plan(['colocated'], run_ahead=1), requests((0, 10, 3), (0.5, 10, 1)),
      Affine())
  assert tokens(result) == [pytest.approx([1, 2.61, 3.61 + 1.62]),
                            pytest.approx([3.61])]


def test_chunked_by_hand():
  # [A 0:8], [A 8:10, B 0:4], then A's tick with C's prompt.
  result = simulator.simulate(
      plan(['chunked'], prefill_tokens=8, max_seqs=4),
      requests((0, 10, 2), (0, 4, 1), (0.5, 2, 1)), Affine())
  assert tokens(result) == [pytest.approx([1.4, 1.4 + 0.2 + 1.61]),
                            pytest.approx([1.4]),
                            pytest.approx([1.4 + 0.2 + 1.61])]


def test_two_stages_by_hand():
  # Prefill overlaps by half. A's pages are read behind B's prefill, at 1.5;
  # then two steps of A go. The second, which waits for the first's token, is in
  # the first stage until 3.75, and B's first is behind it.
  result = simulator.simulate(
      plan(PD, prefill_seqs=1, pp=2), requests((0, 10, 3), (0, 10, 3)),
      Affine(context_s=0.0, pp=2), Link(0.0))
  assert tokens(result) == [pytest.approx([1.0, 3.0, 4.5]),
                            pytest.approx([1.5, 5.25, 6.75])]
  shares = Affine(context_s=0.0, pp=2, stage_share=(0.2, 0.8))
  result = simulator.simulate(plan(PD, prefill_seqs=1, pp=2),
                              requests((0, 10, 1), (0, 10, 1)), shares, Link())
  assert tokens(result) == [pytest.approx([1.0]), pytest.approx([1.8])]


def test_two_stages_colocated_wait_for_the_prompts_token():
  # The first decode step starts from a token that leaves stage 2 at 1.0.
  result = simulator.simulate(plan(['colocated'], pp=2), requests((0, 10, 2)),
                              Affine(context_s=0.0, pp=2))
  assert tokens(result) == [pytest.approx([1.0, 2.5])]


@pytest.mark.parametrize('depth, gap', [(1, 0.3), (2, 0.0)])
def test_host_time_hides_behind_a_command_in_flight(depth, gap):
  result = simulator.simulate(
      plan(PD, depth=depth, run_ahead=1), requests((0, 10, 4)),
      Affine(context_s=0.0, host_s=0.3), Link())
  first = 0.3 + 1 + 0.3 + 0.5 + 0.3 + 1.5
  assert tokens(result)[0] == pytest.approx(
      [1.3, first, first + 1.5 + gap, first + 3 + 2 * gap])


def test_bad_input():
  run = simulator.simulate
  sent = requests((0, 10, 2))
  for call in (lambda: run(plan(PD), sent, Affine()),
               lambda: run(plan(PD), sent, [Affine()], Link()),
               lambda: run(plan(PD, pp=2), sent, Affine(), Link()),
               lambda: run(plan(PD), sent, Affine(), Link(), share='x'),
               lambda: run(plan(PD), sent * 2, Affine(), Link()),
               lambda: run(plan(PD), [dataclasses.replace(
                   sent[0], arrival_s=math.nan)], Affine(), Link())):
    with pytest.raises(InputError):
      call()
  assert run(plan(PD), [], Affine(), Link()).records == []
  alone = run(plan(['prefill']), requests((0, 10, 1)), Affine()).records
  assert [r.ttft_s for r in alone] == [1.0]  # nothing to migrate: no link
  rejected = run(plan(PD), requests((0, 99, 9)), Affine(), Link()).records
  assert [r.status for r in rejected] == ['rejected']


# --- closed forms -----------------------------------------------------------


def interval(values, batches=30):
  """Mean and half of its 99 % interval, by batch means after a warm-up."""
  means = [part.mean() for part in np.array_split(
      np.asarray(values)[len(values) // 10:], batches)]
  return np.mean(means), 2.756 * np.std(means, ddof=1) / math.sqrt(batches)


def prefill_only(config, rate, service, n, pp=1, seed=0):
  arrivals_s = workload.arrivals('poisson', rate, n, seed)
  latency = Affine(token_s=service / 10, pp=pp)
  return simulator.simulate(
      config, requests(*((t, 10, 1) for t in arrivals_s)), latency,
      Link()).records


@pytest.mark.parametrize('rho', [0.3, 0.8])
def test_m_d_1(rho):
  records = prefill_only(plan(PD, prefill_seqs=1), rho, 1.0, 8_000)
  mean, half = interval([r.ttft_s for r in records])
  assert abs(mean - queueing.md1_ttft_s(rho, 1.0)) < half < 0.25 * mean
  waits = np.array([r.stage_s['prefill_queue'] for r in records])
  for wait in (0.0, 0.7, 2.5):
    share, half = interval(waits <= wait + 1e-9)
    assert abs(share - queueing.md1_wait_cdf(rho, 1.0, wait)) < half


def test_m_d_1_of_two_stages():
  records = prefill_only(plan(PD, prefill_seqs=1, pp=2), 1.4, 1.0, 8_000,
                         pp=2)
  mean, half = interval([r.ttft_s for r in records])
  assert abs(mean - queueing.pipeline_ttft_s(1.4, 1.0)) < half < 0.1 * mean


def test_two_instances_are_between_their_bounds():
  records = prefill_only(plan(('prefill', *PD), prefill_seqs=1), 1.4, 1.0,
                         8_000)
  mean, half = interval([r.ttft_s for r in records])
  low, high = queueing.mdc_ttft_bounds_s(1.4, 1.0, 2)
  assert low - half < mean < high + half
  assert high - low > 4 * half


def test_overloaded_d_d_1():
  records = simulator.simulate(
      plan(PD, prefill_seqs=1), requests(*((n * 0.75, 10, 1) for n in
                                           range(50))), Affine(), Link())
  assert [r.ttft_s for r in records.records] == pytest.approx(
      [queueing.dd1_time_s(0.75, 1.0, n) for n in range(50)])


def test_batches_of_all_that_waits():
  class Fixed(Affine):
    def prefill_s(self, pieces):
      return 1.0 + 0.2 * len(pieces)
  arrivals_s = workload.arrivals('poisson', 2.0, 5_000, 0)
  records = simulator.simulate(
      plan(PD, num_pages=4096, max_seqs=512, prefill_seqs=512,
           prefill_tokens=10_000),
      requests(*((t, 10, 1) for t in arrivals_s)),
      Fixed(), Link()).records
  mean, half = interval([r.ttft_s for r in records])
  bound = queueing.batch_ttft_bound_s(2.0, 1.0, 0.2)
  assert 0.95 * bound - half < mean < bound + half


def test_fluid_decode():
  rate, n = 4.0, 1600
  arrivals_s = workload.arrivals('poisson', rate, n, 0)
  latency = Affine(1e-4, 0.02, 2e-4, 1e-6)
  records = simulator.simulate(
      plan(PD, num_pages=20_000, max_seqs=500, run_ahead=1, max_len=500),
      requests(*((t, 100, 200) for t in arrivals_s)), latency,
      Link(1e-6)).records
  mean, half = interval([r.tpot_s for r in records])
  fluid = queueing.decode_tpot_s(
      rate, 199, 0.02, 2e-4, 1e-6, queueing.mean_context([100], [200]))
  assert fluid - half < mean < 1.06 * fluid + half


# --- identities -------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_leaping_is_stepping(seed):
  run = random_run(seed)
  leapt = simulator.simulate(*run)
  stepped = simulator.simulate(*run, leap=False, log=True)
  assert leapt.steps + leapt.leapt == stepped.steps
  for record, other in zip(leapt.records, stepped.records, strict=True):
    for field in ('token_s', 'stage_s', 'finish_s'):
      assert getattr(record, field) == pytest.approx(
          getattr(other, field), rel=0, abs=1e-9)
    for field in ('instances', 'preemptions', 'migrated_tokens', 'status'):
      assert getattr(record, field) == getattr(other, field)
  assert leapt.busy_s == pytest.approx(stepped.busy_s)
  again = [event_log.replay(run[0], stepped.log),
           timeline.timeline(stepped.log)['traceEvents'] == []]
  assert again == [None, False]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_lost(seed):
  config, sent, latency, link = random_run(seed)
  counts, last = collections.Counter(), [0.0]

  def watch(state, event, commands):
    scheduler.check(state)
    assert event.time_s >= last[0]
    last[0] = event.time_s
    counts.update(c.id for c in commands
                  if isinstance(c, (Finish, Reject)))

  result = simulator.simulate(config, sent, latency, link, on_event=watch)
  assert counts == {r.id: 1 for r in sent}
  assert scheduler.idle(result.state)
  for c, inst in zip(config.instances, result.state.instances, strict=True):
    assert inst.pool == page_pool.init(c.num_pages)
  for r in result.records:
    assert r.status == 'length' and len(r.token_s) == r.max_tokens
    assert all(a <= b for a, b in itertools.pairwise(r.token_s))
    assert sum(r.stage_s.values()) == pytest.approx(r.finish_s - r.arrival_s)


def test_preemption_and_leaps_are_in_the_sample():
  kinds = collections.Counter()
  for seed in range(40):
    result = simulator.simulate(*random_run(seed))
    kinds['preempted'] += sum(r.preemptions for r in result.records)
    kinds['leapt'] += result.leapt
  assert kinds['preempted'] > 50 and kinds['leapt'] > 1000


@pytest.mark.parametrize('seed', range(4))
def test_the_live_run_shows_what_its_states_do(seed):
  run, looks = random_run(seed), []
  for live in (False, True):
    seen: list[tuple] = []

    def look(state, event, commands, seen=seen):
      del commands
      seen.append((event, [
          (i.residents, page_pool.num_free(i.pool), list(i.queue),
           list(i.pulls)) for i in state.instances]))
    records = simulator.simulate(*run, on_event=look, live=live).records
    looks.append((seen, records))
  assert looks[0] == looks[1]


@pytest.mark.parametrize('seed', range(12))
def test_a_stream_tells_the_records_of_the_whole(seed):
  config, sent, latency, link = random_run(seed)
  whole = simulator.simulate(config, sent, latency, link).records
  told = list(simulator.stream(config, iter(sent), latency, link))
  assert sorted(told, key=lambda r: r.id) == whole


def test_a_stream_takes_requests_one_ahead_and_keeps_none(monkeypatch):
  monkeypatch.setattr(recorder, 'CHAIN', 50)
  taken = [0]

  def forever():
    for n in itertools.count():
      taken[0] = n
      yield Request(n, n * 0.2, range(20), Sampling(max_tokens=8))

  told = simulator.stream(
      plan(PD, max_seqs=64), forever(), Affine(1e-4, 0.005, 1e-4, 1e-6),
      Link(0.001, 1e-5))
  collections.deque(itertools.islice(told, 300), 0)
  tracemalloc.start()
  last, = collections.deque(itertools.islice(told, 400), 1)
  peak_bytes = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert taken[0] - last.id < 20
  assert peak_bytes < 60_000  # 400 records take some 400 kB


@pytest.mark.parametrize('change, field', [
    (dict(id=0), 'Request'), (dict(arrival_s=0.0), 'Request'),
    (dict(after=0), 'Request.after')])
def test_a_stream_wants_requests_in_order(change, field):
  sent = requests((1.0, 5, 5), (2.0, 5, 5))
  sent[1] = dataclasses.replace(sent[1], **change)
  with pytest.raises(InputError, match=f'^{field}='):
    list(simulator.stream(plan(PD), sent, Affine(1e-4, 0.005, 1e-4, 1e-6),
                          Link(0.001, 1e-5)))


def test_ticks_are_not_endless():
  config = plan(PD)
  config = dataclasses.replace(config, policy=dataclasses.replace(
      config.policy, tick_s=1e-6))
  with pytest.raises(InputError, match='^Policy.tick_s=1e-06: .*0.001'):
    simulator.simulate(config, requests((0, 10, 1)), Affine(), Link())


def test_littles_law():
  config, sent, latency, link = random_run(1)
  area, last = [0.0, 0], [0.0]

  def watch(state, event, commands):
    area[0] += area[1] * (event.time_s - last[0])
    area[1], last[0] = len(state.seqs), event.time_s

  config = plan(PD, num_pages=40)
  result = simulator.simulate(config, sent, dataclasses.replace(
      latency, pp=1), link, on_event=watch)
  assert area[0] == pytest.approx(
      sum(r.finish_s - r.arrival_s for r in result.records))


def test_time_scales():
  config, sent, latency, link = random_run(2)
  twice = [dataclasses.replace(r, arrival_s=2 * r.arrival_s) for r in sent]
  slow = dataclasses.replace(latency, **{
      f: 2 * getattr(latency, f) for f in
      ('token_s', 'fixed_s', 'row_s', 'context_s', 'host_s')})
  records = simulator.simulate(config, sent, latency, link).records
  slower = simulator.simulate(config, twice, slow,
                              Link(2 * link.fixed_s, 2 * link.token_s)).records
  assert [2 * r.ttft_s for r in records] == pytest.approx(
      [r.ttft_s for r in slower])
  summary = metrics.summarize(records, Slo(1, 1), 2)
  assert summary.counts == {'length': len(sent)}
