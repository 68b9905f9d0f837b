"""Instances that slow each other: by hand, by conservation, and found again."""

import dataclasses
import itertools

import numpy as np
import pytest

from dsjax.config.checks import InputError
from dsjax.config.placement import Plan, Slo
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  DecodeDone,
  Migrate,
  Migrated,
  PrefillDone,
  RunDecode,
  RunPrefill,
)
from dsjax.simulation import (
  calibration,
  executors,
  fitting,
  latency,
  profiles,
  simulator,
)
from dsjax.simulation.contention import KINDS, Contention, Devices, kind_of
from experiments import validate
from experiments.common import served_profiles, served_runs

LINK = latency.Link(0.01, 1e6, 1e3)
ALONE = latency.Affine((0.02, 3e-4, 1e-7), (0.01, 2e-5, 1e-3),
                       mixed=(0.03, 4e-4, 1e-7, 2e-5))
SHARED = Contention({('prefill', 'decode'): 1.5, ('decode', 'prefill'): 3.0})
ROLES = {'disaggregated': ('prefill', 'decode'), 'chunked': ('chunked',) * 2}


def plan(mode):
  return scheduler.Config(tuple(validate.QUICK.instance(r)
                                for r in ROLES[mode]), validate.QUICK.max_len)


def sent(rate, n=60):
  return served_runs.requests(validate.QUICK, 100, rate, n, 3)


def run(mode, rate, contention=None, model=ALONE, **options):
  return simulator.simulate(plan(mode), sent(rate), model, LINK,
                            contention=contention, **options)


def test_a_step_is_as_slow_as_what_runs_beside_it():
  devices = Devices(SHARED, 2)
  devices.add(0, 'prompt', 'prefill', [3.0], 1.0)
  devices.add(1, 'rows', 'decode', [2.0, 1.0], 0.0)
  # From 0 to 1 the decode step is alone; of its other second a third is done
  # at 2, and so on: it ends at 4, the next one would at 7.
  assert devices.until(2.5) is None
  assert devices.now_s == 2.5
  # The prompt has 3 s at 1 / 1.5 from second 1 on.
  assert devices.until(9.0) == (0, 'prompt', [pytest.approx(5.5)])
  # Half of the second step is done: 1.5 s at a third. Alone, the rest is 0.5.
  assert devices.until(9.0) == (1, 'rows', [pytest.approx(4.0),
                                            pytest.approx(6.0)])
  assert devices.until(9.0) is None and devices.now_s == 9.0
  assert devices.busy_s == pytest.approx([4.5, 6.0])


def test_work_waits_for_its_turn_and_its_time():
  devices = Devices(Contention({}), 1)
  devices.add(0, 'a', 'decode', [1.0], 2.0)
  devices.add(0, 'b', 'decode', [1.0], 0.0)
  assert [devices.until(float('inf'))[2] for _ in 'ab'] == [[3.0], [4.0]]
  assert devices.until(float('inf')) is None


def test_what_several_others_take_adds_up():
  assert SHARED.factor('decode', ['prefill', 'prefill', 'mixed']) == 5.0
  assert SHARED.factor('mixed', ['decode']) == 1.0


@pytest.mark.parametrize('mode', ROLES)
def test_without_slowing_it_is_the_run_without_contention(mode):
  runs = run(mode, 20.0), run(mode, 20.0, Contention({}))
  for record, other in zip(*(made.records for made in runs), strict=True):
    assert record.token_s == pytest.approx(other.token_s, abs=1e-9)
    assert record.stage_s == pytest.approx(other.stage_s, abs=1e-9)


@pytest.mark.parametrize('mode', ROLES)
def test_equal_slowing_of_all_keeps_the_work(mode):
  """Two of everything: seconds beside another count half."""
  both = Contention({pair: 2.0 for pair in itertools.product(KINDS, KINDS)})
  result = run(mode, 30.0, both, log=True)
  steps, _ = calibration.observe(result.log)
  for s in steps:
    seconds = calibration.alone_s(ALONE, s, both)
    assert seconds == pytest.approx(fitting.predict_s(ALONE, s.cell))
  assert sum(result.busy_s) == pytest.approx(sum(
      calibration.net_s(ALONE, s) for s in steps))


@pytest.mark.parametrize('mode', ROLES)
def test_contention_is_found_in_a_served_run(mode):
  """Found at one rate, it predicts another; without it, it does not."""
  truth = Contention({(a, b): 1.4 + 0.3 * (a == 'decode') + 0.4 * (
      b == 'prefill') for a, b in itertools.product(KINDS, KINDS)})
  real = dataclasses.replace(
      ALONE, decode=tuple(1.2 * x for x in ALONE.decode))
  bench = served_profiles.Profiles((ALONE,) * 2, LINK)
  log = run(mode, 8.0, truth, real, log=True).log
  calibrated = bench.calibrated(log)
  seen = {(s.kind, other) for s in calibration.observe(log)[0]
          for other in s.beside_s}
  assert len(seen) > 1
  if mode == 'disaggregated':
    for pair in seen:
      assert calibrated.contention.factors[pair] == pytest.approx(
          truth.factors[pair], rel=0.02)
  slo = Slo(0.2, 0.03)
  there = served_runs.stats([run(mode, 24.0, truth, real).records], slo)
  errors = [served_runs.errors(there, served_runs.stats(
      [p.simulate(plan(mode), sent(24.0))], slo)) for p in (bench, calibrated)]
  for name in ('ttft_s', 'tpot_s'):
    assert abs(errors[1][name]['mean']) < 0.03
    assert errors[0][name]['mean'] < -0.15
  assert abs(errors[1]['attainment']) < 3 < abs(errors[0]['attainment'])


def test_nothing_beside_shows_nothing():
  steps, _ = calibration.observe(run('disaggregated', 0.5, log=True).log)
  few = [s._replace(beside_s={}) for s in steps]
  assert calibration.fit_contention((ALONE,) * 2, few) == Contention({})


def test_a_step_of_one_row_is_a_kind_of_its_own():
  assert [kind_of(*x) for x in (((), 1), ((), 2), (((0, 4),), 0),
                                (((0, 4),), 1))] == [
      'single', 'decode', 'prefill', 'mixed']
  log = run('disaggregated', 8.0, SHARED, log=True).log
  steps, _ = calibration.observe(log)
  assert {s.kind for s in steps} == {'single', 'decode', 'prefill'}
  lone = [s for s in steps if s.kind == 'single' and s.overlap > 0]
  assert lone and all(s.cell.seconds == pytest.approx(fitting.predict_s(
      ALONE, s.cell)) for s in lone)  # SHARED names 'decode' only


# --- the server and hand-offs -------------------------------------------------


def test_a_server_without_a_core_takes_its_part_where_all_are_at_work():
  devices = Devices(Contention({}, server_s=0.2), 2)
  devices.add(0, 'a', 'decode', [1.0, 1.0], 0.0)
  devices.add(1, 'b', 'decode', [2.0], 0.5)
  devices.add(0, 'c', 'decode', [3.0], 0.0)
  # a's first step ends at 1: both are at work, and each is 0.1 later. Its
  # other one ends at 2.1; behind it comes c, so both are at work again. b has
  # 2.5 + 0.2, behind which nothing comes, so that the server has its core.
  assert devices.until(9.0) == (0, 'a', pytest.approx([1.0, 2.1]))
  assert devices.until(9.0) == (1, 'b', [pytest.approx(2.7)])
  assert devices.until(9.0) == (0, 'c', [pytest.approx(5.2)])
  assert sum(devices.busy_s) == pytest.approx(5.2 + 2.2)


def hand_off(beside, contention):
  """(when KV of 10 tokens has arrived, when the target's step ends that began
  with it, when the source's next one does) of a hand-off after 1 s."""
  copies = executors.Copies(LINK, 'pair', [])
  shared = executors.Shared((ALONE,) * 2, copies, contention)
  shared.devices.add(0, RunPrefill(0, 0, (), 0, ()), 'prefill', [1.0], 0.0)
  if beside:
    shared.devices.add(1, RunDecode(1, 0, 0, 1, ()), 'decode', [4.0], 0.0)
  assert isinstance(shared.next(), PrefillDone)
  shared.perform([Migrate(0, 0, 0, (), 1, (), 10)], 1.0)
  shared.devices.add(0, RunPrefill(0, 1, (), 0, ()), 'prefill', [4.0], 1.0)
  ends = {type(event): event.time_s for event in iter(shared.next, None)}
  return ends[Migrated], ends.get(DecodeDone), ends[PrefillDone]


@pytest.mark.parametrize('beside', (False, True))
def test_a_hand_off_takes_its_part_of_both_ends(beside):
  """Beside a step both are later; an end that is idle has time for it."""
  taken = Contention({}, read_s=(0.2, 0.01), write_s=(0.1, 0.02))
  free = hand_off(beside, Contention({}))
  assert free == pytest.approx((1.02, 4.0 if beside else None, 5.0))
  read_s, write_s = 0.3, 0.3 * beside
  assert hand_off(beside, taken) == pytest.approx((
      1.02 + read_s + write_s, 4.0 + write_s if beside else None,
      5.0 + read_s))


def test_a_command_takes_its_part_of_a_step_that_runs():
  """An idle instance has time for it."""
  shared = executors.Shared((ALONE,) * 2, executors.Copies(LINK, 'pair', []),
                            Contention({}, command_s=(0.1, 0.02)))
  shared.devices.add(0, RunDecode(0, 0, 0, 1, ()), 'decode', [4.0], 0.0)
  shared.perform([RunDecode(0, 1, 1, 5, ()), RunDecode(1, 0, 0, 1, ())], 0.0)
  ends = [(event.instance, event.time_s) for event in iter(shared.next, None)
          if event.number == 0]
  assert dict(ends) == {0: pytest.approx(4.2), 1: pytest.approx(
      ALONE.decode_s(0, 0))}


@pytest.mark.parametrize('field, value', [
    ('server_s', -1.0), ('server_s', float('nan')), ('read_s', (1.0,)),
    ('write_s', (0.0, -1.0)), ('command_s', (0.0, 1.0, 2.0))])
def test_bad_parts_of_cores_are_named(field, value):
  with pytest.raises(InputError, match=f'Contention.{field}'):
    Contention({}, **{field: value})


def test_a_file_keeps_what_is_shared(tmp_path):
  for shared in (SHARED, dataclasses.replace(
      SHARED, server_s=5e-4, read_s=(1e-3, 2e-6), write_s=(3e-3, 0.0),
      command_s=(1e-3, 2e-4)),
                 Contention({}, write_s=(0.0, 1e-6))):
    profiles.save(tmp_path / 'a', profiles.Profile(
        'm', 'cpu', {Plan(): ALONE}, contention=shared))
    assert profiles.load(tmp_path / 'a').contention == shared
  text = (tmp_path / 'a').read_text().replace('"write_s": [', '"write_s": [1,')
  (tmp_path / 'a').write_text(text)
  with pytest.raises(InputError, match='write_s'):
    profiles.load(tmp_path / 'a')


# --- bad input ----------------------------------------------------------------


@pytest.mark.parametrize('factors, part', [
    ({('prefill', 'swap'): 2.0}, 'swap'), ({('decode', 'decode'): 0.5}, '0.5'),
    ({('decode', 'decode'): float('nan')}, 'nan'), ({'decode': 2.0}, 'decode')])
def test_bad_input(factors, part):
  with pytest.raises(InputError, match=part):
    Contention(factors)


def test_stages_do_not_share():
  config = plan('disaggregated')
  config = dataclasses.replace(config, instances=tuple(
      dataclasses.replace(c, pp=2) for c in config.instances))
  with pytest.raises(InputError, match='contention'):
    simulator.simulate(config, sent(5.0), dataclasses.replace(ALONE, pp=2),
                       LINK, contention=SHARED)


def test_every_step_of_a_run_is_told_once():
  result = run('disaggregated', 30.0, SHARED, log=True)
  told = [e for e, _ in result.log if isinstance(e, DecodeDone)]
  steps = [c.steps for _, cs in result.log for c in cs
           if isinstance(c, RunDecode)]
  assert [len(e.steps_s) for e in told] == steps
  assert all(np.diff(e.steps_s).min(initial=1) > 0 for e in told)


def test_a_search_says_that_it_leaves_contention_out(tmp_path):
  plans = {Plan(): ALONE}
  for name, shared in (('a', SHARED), ('b', None), ('c', Contention({}))):
    profiles.save(tmp_path / name, profiles.Profile('m', 'cpu', plans,
                                                    contention=shared))
  assert '3.00 times' in profiles.caveat(str(tmp_path / 'a'))
  for kind in (str(tmp_path / 'b'), str(tmp_path / 'c'), 'published',
               'tables:h100-80g'):
    assert profiles.caveat(kind) == ''
