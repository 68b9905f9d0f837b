"""Real against simulated: the log read back, calibration, the runner."""

import contextlib
import dataclasses
import gc
import io
import json
import statistics
import types

import pytest
from rich.console import Console

from dsjax.analysis import record
from dsjax.config.checks import InputError
from dsjax.config.placement import Plan, Slo
from dsjax.runtime import grid
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Arrived, DecodeDone, Row, RunDecode
from dsjax.simulation import calibration, fitting, latency, profiles, simulator
from dsjax.simulation.contention import Contention
from experiments import validate
from experiments.common import (
  cli,
  pace,
  report,
  served_profiles,
  served_runs,
  validate_report,
)
from tests.common.results import check_written, made_by

LINK = latency.Link(0.01, 1e6, 1e3)
SLOW = latency.Affine((0.02, 3e-4, 1e-7), (0.01, 2e-5, 1e-3),
                      mixed=(0.03, 4e-4, 1e-7, 2e-5))
FEW = ('max_seqs=2', 'prefill_tokens=16', 'chunk_tokens=16',
       'prefill_seqs=1', 'max_len=64')


def options(out, **changes):
  return cli.options(validate.FLAGS, **{
      'model': 'tiny', 'quick': True, 'modes': ['disaggregated'],
      'rates': '40,50', 'seconds': 0.3, 'requests': 12, 'rounds': 1,
      'set': FEW, 'out': str(out)} | changes)


def plan(*roles):
  return scheduler.Config(tuple(validate.QUICK.instance(r) for r in roles),
                          validate.QUICK.max_len)


def sent(rate, n=40):
  return served_runs.requests(validate.QUICK, 100, rate, n, 3)


def simulated(roles, models, link=LINK, rate=12.0):
  return simulator.simulate(plan(*roles), sent(rate), models, link, log=True)


@pytest.mark.parametrize('roles', [
    ('prefill', 'decode'), ('colocated',), ('chunked', 'chunked')])
def test_a_simulated_log_gives_back_its_own_seconds(roles):
  steps, copies = calibration.observe(simulated(roles, SLOW).log)
  assert {s.cell.kind for s in steps} >= {'prefill', 'decode'}
  for s in steps:
    assert s.cell.seconds == pytest.approx(fitting.predict_s(SLOW, s.cell))
  assert bool(copies) == ('decode' in roles)
  for c in copies:
    assert c.seconds == pytest.approx(LINK.migrate_s(c.num_tokens))


def test_host_time_is_seen_only_where_a_device_was_idle():
  model = dataclasses.replace(SLOW, host_s=0.004)
  steps, _ = calibration.observe(simulated(('colocated',), model, None).log)
  assert {s.idle for s in steps} == {True, False}
  exact = {s.idle for s in steps
           if calibration.net_s(model, s) == pytest.approx(
               fitting.predict_s(model, s.cell))}
  assert exact == {True, False}
  assert all(s.cell.seconds >= fitting.predict_s(model, s.cell) - 1e-9
             for s in steps)


def test_overlap():
  rows = (Row(0, 4, 9, ()),)
  log = [(Arrived(0., 0, 4, 4), (RunDecode(0, 1, 0, 2, rows),)),
         (Arrived(1., 1, 4, 4), (RunDecode(1, 1, 0, 1, rows),)),
         (DecodeDone(3., 1, 1, (3.,)), ()),
         (DecodeDone(6., 0, 1, (2., 6.)), ())]
  steps, _ = calibration.observe(log)
  assert [(s.instance, s.start_s, s.cell.seconds, s.idle) for s in steps] == [
      (1, 1., 2., True), (0, 0., 2., True), (0, 2., 4., False)]
  assert [s.overlap for s in steps] == pytest.approx([1.0, 0.5, 0.25])
  assert [s.cell.context for s in steps[1:]] == [5, 6]


def test_correction_keeps_the_sum():
  a, b = calibration.correction([1, 2, 3, 4], [3.5, 5.5, 7.5, 9.5])
  assert (a, b) == pytest.approx((1.5, 2.0))
  for x, y in (([1, 2, 3], [9, 5, 1]), ([2, 2], [3, 5]), ([1, 2], [1, 9])):
    a, b = calibration.correction(x, y)
    assert min(a, b) >= 0
    assert sum(a + b * v for v in x) == pytest.approx(sum(y))


@pytest.mark.parametrize('roles', [('prefill', 'decode'), ('chunked',) * 2])
def test_calibration_finds_what_a_device_alone_did_not_show(
    roles, monkeypatch):
  """A 'real' run that is 1.6 times as slow as the profile, and fixed times
  longer; validated at another rate. Nothing is shared."""
  monkeypatch.setattr(calibration, 'fit_contention', lambda *_: None)
  truth = latency.Affine(
      *(tuple(1.6 * x + (0.005 if i == 0 else 0) for i, x in enumerate(c))
        for c in (SLOW.prefill, SLOW.decode)),
      mixed=tuple(1.6 * x for x in SLOW.mixed))
  far = dataclasses.replace(LINK, base_s=0.02, bytes_per_s=5e5)
  bench = served_profiles.Profiles((SLOW,) * 2, LINK)
  calibrated = bench.calibrated(simulated(roles, truth, far).log)
  if roles[0] == 'prefill':
    assert calibrated.latencies[0].prefill == pytest.approx(truth.prefill)
    assert calibrated.latencies[0].decode == SLOW.decode  # it ran none
    assert calibrated.latencies[1].decode == pytest.approx(truth.decode)
    assert calibrated.link.base_s == pytest.approx(far.base_s)
    assert calibrated.link.bytes_per_s == pytest.approx(far.bytes_per_s)
  else:
    assert calibrated.latencies[0] == calibrated.latencies[1]
    assert calibrated.latencies[0].mixed == pytest.approx(truth.mixed)
  config, slo = plan(*roles), Slo(0.5, 0.1)
  real = served_runs.stats([simulator.simulate(
      config, sent(20.), truth, far).records], slo)
  errors = [served_runs.errors(real, served_runs.stats(
      [p.simulate(config, sent(20.))], slo)) for p in (bench, calibrated)]
  assert abs(errors[1]['ttft_s']['mean']) < 1e-6
  assert abs(errors[1]['tpot_s']['p99']) < 1e-6
  assert errors[0]['tpot_s']['mean'] < -0.2  # the profile is too fast
  log = simulated(roles, truth, far, 20.).log
  rows = served_profiles.step_times(calibrated, [log])
  for r in rows:
    assert r['ratio'] == pytest.approx(1.0, abs=(
        0.1 if r['what'] == 'migrate' else 1e-6))  # some wait for a prefill


def test_requests_are_the_same_at_every_rate_but_for_time():
  slow, fast = sent(2.0), sent(4.0)
  for a, b in zip(slow, fast, strict=True):
    assert (a.prompt, a.sampling) == (b.prompt, b.sampling)
    assert a.arrival_s == pytest.approx(2 * b.arrival_s)
    assert (len(a.prompt) + a.sampling.max_tokens
            <= validate.QUICK.max_len)


@pytest.fixture
def hasty(monkeypatch):
  """Nothing is collected before a run: all that other tests have left."""
  monkeypatch.setattr(validate.machine, 'settled', contextlib.nullcontext)


@pytest.fixture(scope='module')
def profile(tmp_path_factory):
  path = tmp_path_factory.mktemp('profile') / 'latency.json'
  small = dataclasses.replace(SLOW, prefill=(1e-3, 1e-5, 0.0), decode=(
      5e-4, 0.0, 1e-5), mixed=(1e-3, 1e-5, 0.0, 0.0))
  profiles.save(path, profiles.Profile(
      'tiny', 'cpu', {Plan(): small}, {(Plan(),) * 2: LINK}))
  return str(path)


@pytest.mark.usefixtures('hasty')
def test_rows_files_and_ctrl_c(tmp_path, profile, monkeypatch):
  """Two rates are asked for, and Ctrl-C comes after the first."""
  def halt(_):
    if (tmp_path / 'events-disaggregated-40.00-0.jsonl').exists():
      raise KeyboardInterrupt
  monkeypatch.setattr(validate.terminal.Interrupts, 'halt', halt)
  text = io.StringIO()
  assert validate.run(options(tmp_path, latency=profile),
                      Console(file=text, width=160)) == 130
  row, = json.loads((tmp_path / 'summary.json').read_text())['rows']
  assert (row['mode'], row['rate_per_s'], row['requests']) == (
      'disaggregated', 40.0, 12)
  for kind in ('real', *validate.PROFILES):
    share, low, high = row[kind]['attainment']
    assert 0 <= low <= share <= high <= 1
    assert set(row[kind]['ttft_s']) == set(validate_report.STATS)
  assert [s['what'] for s in row['steps']['bench']] == [
      'prefill', 'decode', 'migrate']
  assert (tmp_path / 'validate.png').stat().st_size > 10_000
  assert (tmp_path / 'events-disaggregated-40.00-0.jsonl').exists()
  assert list(made_by(tmp_path)['data']) == ['latency.json']
  check_written(text.getvalue(), tmp_path)
  for part in ('Real against simulated', 'overlap', 'within', '40.00/s:'):
    assert part in text.getvalue()

  halts = validate.terminal.Interrupts
  monkeypatch.setattr(halts, 'halt', lambda _: None)
  text = io.StringIO()
  assert validate.run(options(tmp_path, resume=True),
                      Console(file=text, width=160)) == 0
  first, second = json.loads((tmp_path / 'summary.json').read_text())['rows']
  assert first == row and second['rate_per_s'] != 40.0
  assert f'{second["rate_per_s"]:.2f}/s:' in text.getvalue()
  assert '40.00/s:' not in text.getvalue()

  slower, kept = tmp_path / 'slower.json', profiles.load(profile)
  profiles.save(slower, dataclasses.replace(
      kept, latencies={Plan(): SLOW}))
  text = io.StringIO()
  assert validate.run(options(tmp_path, resume=True, latency=str(slower)),
                      Console(file=text, width=160)) == 0
  again, _ = json.loads((tmp_path / 'summary.json').read_text())['rows']
  assert text.getvalue().count('40.00/s:') == 1
  assert again['real'] == row['real']
  assert again['bench']['tpot_s']['mean'] > row['bench']['tpot_s']['mean']
  before, after = (of['steps']['bench'][1] for of in (row, again))
  assert before['real_s'] == after['real_s']
  assert before['predicted_s'] < after['predicted_s']
  log = tmp_path / 'events-disaggregated-40.00-0.jsonl'
  log.write_text(log.read_text()[:-9])
  with pytest.raises(InputError, match=f'{log.name}, line'):
    validate.run(options(tmp_path, resume=True, latency=str(slower)),
                 Console(file=text))

  with pytest.raises(InputError, match='--seeds'):
    validate.run(options(tmp_path, resume=True, seeds=['0', '1']),
                 Console(file=text))
  with pytest.raises(InputError, match='--resume'):
    validate.run(options(tmp_path, resume=True, modes=['chunked']),
                 Console(file=text))


@pytest.mark.usefixtures('hasty')
def test_a_row_of_two_seeds(tmp_path, profile):
  """Runs of the two, each with its log, and intervals of them."""
  text = io.StringIO()
  assert validate.run(options(
      tmp_path, latency=profile, rates='50', seeds=['0', '3'], requests=24,
      seconds=1.0), Console(file=text, width=160)) == 0
  row, = json.loads((tmp_path / 'summary.json').read_text())['rows']
  assert (row['requests'], row['seeds']) == (24, [0, 3])
  logs = [report.load_log(tmp_path / f'events-disaggregated-50.00-{seed}.jsonl')
          for seed in (0, 3)]
  prompts = [[event.prompt_len for event, _ in log
              if type(event) is Arrived] for log in logs]
  assert [len(own) for own in prompts] == [12, 12]
  assert prompts[0] != prompts[1]
  steps, _ = calibration.observe(logs[1])
  decodes = sum(s.cell.kind == 'decode' for s in steps)
  assert row['steps']['bench'][1]['count'] > decodes > 0
  assert ' ± ' in text.getvalue()


def test_intervals_are_of_the_runs():
  """Shares 1/2, 3/4 and 1/4 of three runs: t of two degrees is 4.303."""
  slo = Slo(1.0, 1.0)

  def run(hits):
    firsts = [i + (0.5 if i < hits else 2.0) for i in range(4)]
    return [record.Record(i, float(i), 1, 2, [first, first + 0.5],
                          finish_s=first + 0.5, status='length')
            for i, first in enumerate(firsts)]
  real = served_runs.stats([run(2), run(3), run(1)], slo)
  assert real['shares'] == [0.5, 0.75, 0.25]
  assert real['attainment'] == pytest.approx((0.5, 0.0, 1.0))
  close = served_runs.stats([run(2), run(2), run(3)] * 3, slo)
  half = 2.306 * statistics.stdev([0.5, 0.5, 0.75] * 3) / 3
  assert close['attainment'] == pytest.approx(
      (7 / 12, 7 / 12 - half, 7 / 12 + half), abs=1e-3)
  shifted = served_runs.stats([run(3), run(4), run(2)], slo)
  apart = served_runs.errors(real, shifted)
  assert apart['attainment'] == pytest.approx(25)
  assert apart['half_width'] == pytest.approx(0, abs=1e-9)
  alone = served_runs.errors(*(served_runs.stats([run(hits)], slo)
                            for hits in (4, 2)))
  assert (alone['attainment'], alone['half_width']) == (-50, None)


@pytest.mark.usefixtures('hasty')
def test_no_row_begins_later_than_asked(tmp_path, profile):
  text = io.StringIO()
  assert validate.run(options(tmp_path, latency=profile, minutes=1e-9),
                      Console(file=text, width=160)) == 0
  assert '2 rows are left: --resume' in text.getvalue()
  assert json.loads((tmp_path / 'summary.json').read_text())['rows'] == []


@pytest.mark.parametrize('change, part', [
    ({'modes': ['both']}, '--modes'), ({'modes': []}, '--modes'),
    ({'rates': 'fast'}, '--rates'), ({'rates': '-1'}, '--rates'),
    ({'ttft_s': 0.0}, '--ttft_s'),
    ({'seeds': ['0', '0']}, '--seeds'), ({'seeds': []}, '--seeds'),
    ({'latency': '/no/such'}, 'cannot be read')])
def test_bad_flags(tmp_path, change, part):
  with pytest.raises(InputError, match=part):
    validate.run(options(tmp_path, **change), Console(file=io.StringIO()))


def test_what_is_there_stays_while_it_is_served():
  with validate.machine.settled():
    assert gc.get_freeze_count() > 0
  assert gc.get_freeze_count() == 0


# --- the pace of a machine ----------------------------------------------------


def engines_at(monkeypatch, **times):
  """Idle engines whose steps take so many times what SLOW says, by kind."""
  class Paced:
    def __init__(self, engine):
      engine.slot_of[0] = 0

    def seconds(self, pieces, batch, each):
      cell = fitting.Cell(pieces, batch, grid.context_of(
          pieces, batch, each), 1.0)
      return times[cell.kind] * fitting.predict_s(SLOW, cell)

  monkeypatch.setattr(grid, 'Cells', Paced)
  return [types.SimpleNamespace(
      capacity=validate.QUICK.instance(role), slot_of=(slots := {}),
      forget=slots.pop) for role in ('prefill', 'decode', 'chunked')]


def test_the_pace_of_a_machine_is_that_of_steps_it_runs(monkeypatch):
  engines = engines_at(monkeypatch, prefill=1.5, decode=0.8, mixed=2.0)
  now_s = pace.of(engines, validate.QUICK)
  assert not any(engine.slot_of for engine in engines)
  assert set(pace.of(engines[:1], validate.QUICK)) == {'prefill'}
  then_s = pace.of(engines_at(monkeypatch, prefill=1.0, decode=1.0, mixed=1.0),
                   validate.QUICK)
  assert set(then_s) == {'prefill', 'decode', 'single', 'mixed'}
  assert pace.times(now_s, then_s) == pytest.approx(
      {'prefill': 1.5, 'decode': 0.8, 'mixed': 2.0})
  assert pace.times({'prefill': 1.0, 'decode': 3.0, 'single': 2.0},
                    {'decode': 2.0, 'single': 2.0}) == {'decode': 1.25}
  assert pace.mean([{'prefill': 0.5}, {'prefill': 1.5, 'mixed': 1.0}]) == (
      {'prefill': 1.0, 'mixed': 1.0})


class Side:
  """Cells whose steps take twice as long beside a decode step, and three times
  beside a prompt: while the other has commands that were not waited for."""

  def __init__(self, engine):
    self.engine, self.asked = engine, []
    engine.side = self

  def run(self, pieces, batch, each):
    self.asked.append(bool(pieces))
    return self, 1  # what is waited for

  def block_until_ready(self):
    self.asked = []

  def seconds(self, pieces, batch, each, count=1):
    del pieces, batch, each, count
    other = self.engine.other.side
    return 0.05 * (1 + (1 + other.asked[-1] if other.asked else 0))


def sides(monkeypatch, *roles):
  monkeypatch.setattr(grid, 'Cells', Side)
  engines = [types.SimpleNamespace(
      capacity=validate.QUICK.instance(role), slot_of={}) for role in roles]
  engines[0].other, engines[1].other = engines[1], engines[0]
  return engines


def test_how_much_instances_slow_each_other_is_timed_anew(monkeypatch):
  apart = pace.beside(sides(monkeypatch, 'prefill', 'decode'), validate.QUICK)
  assert apart == pytest.approx({
      ('prefill', 'decode'): 2.0, ('prefill', 'single'): 2.0,
      ('decode', 'prefill'): 3.0, ('single', 'prefill'): 3.0})
  alike = pace.beside(sides(monkeypatch, *['chunked'] * 2), validate.QUICK)
  kinds = ('prefill', 'decode', 'single', 'mixed')
  assert alike == pytest.approx({
      (kind, other): 3.0 if other in ('prefill', 'mixed') else 2.0
      for kind in kinds for other in kinds})


def test_what_was_timed_anew_counts_and_the_rest_stays():
  found = served_profiles.Profiles((SLOW,) * 2, LINK, Contention(
      {('decode', 'decode'): 1.5, ('prefill', 'decode'): 1.25}, 1e-3))
  now = found.at({}, {('decode', 'decode'): 1.125})
  assert now.contention == Contention(
      {('decode', 'decode'): 1.125, ('prefill', 'decode'): 1.25}, 1e-3)
  assert found.at({}).contention == found.contention
  alone = served_profiles.Profiles((SLOW,) * 2, LINK)
  assert alone.at({}, {('decode', 'decode'): 2.0}).contention is None


def test_profiles_are_simulated_at_the_pace_of_a_run():
  """Also those that were found at another one."""
  found = served_profiles.Profiles((SLOW,) * 2, LINK, typical_s={
      'prefill': 2.0, 'decode': 1.0})
  now = found.at({'prefill': 3.0, 'decode': 0.5, 'mixed': 7.0})
  model = now.latencies[0]
  pieces = ((0, 20), (0, 12))
  assert model.prefill_s(pieces) == pytest.approx(1.5 * SLOW.prefill_s(pieces))
  assert model.decode_s(4, 80) == pytest.approx(0.5 * SLOW.decode_s(4, 80))
  assert model.mixed == SLOW.mixed  # nothing is known
  assert now.at({'prefill': 3.0}).latencies[0] == model
  assert found.at({}).latencies[0] == SLOW and now.link is LINK
