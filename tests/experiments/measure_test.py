"""The profiler: its grid, its clock, and one pass over a live tiny engine."""

import collections
import dataclasses
import io
import itertools
import json
import signal
import types

import pytest
from rich.console import Console
from rich.progress import Progress

import dsjax
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.runtime import grid, profiling, slowing
from dsjax.runtime.cluster import local
from dsjax.simulation import fitting, latency, profiles
from dsjax.simulation.contention import KINDS
from experiments import measure
from experiments.common import cli
from tests.common import processes
from tests.common.results import check_written, made_by

CONFIG = EngineConfig(max_len=64, max_seqs=2, prefill_tokens=32,
                      chunk_tokens=32, prefill_seqs=2, transfer_pages=4)


@pytest.mark.parametrize('config, points', [
    (CONFIG, 2), (profiling.ENGINE, 4), (profiling.ENGINE, 7),
    (EngineConfig(max_len=100, max_seqs=3, prefill_tokens=512,
                  chunk_tokens=512, prefill_seqs=9), 3),
    (EngineConfig(max_len=64, max_seqs=1, prefill_tokens=8,
                  chunk_tokens=8), 2)])
def test_every_cell_of_the_grid_can_run(config, points):
  cells = grid.shapes(config, points)
  assert len(cells) == len(set(cells))
  kinds = {fitting.Cell(p, b, c, 1.0).kind for p, b, c in cells}
  assert {'prefill', 'decode'} <= kinds
  assert config.max_seqs == 1 or 'mixed' in kinds
  for pieces, batch, each in cells:
    tokens = sum(stop - start for start, stop in pieces)
    assert tokens + batch * bool(pieces) <= config.prefill_tokens
    assert batch + len(pieces) <= config.max_seqs
    assert all(0 <= start < stop <= config.max_len for start, stop in pieces)
    assert each + grid.STEPS <= config.max_len
    assert (each > 0) == (batch > 0)
  for kind in kinds:
    assert sum(fitting.Cell(p, b, c, 1.0).kind == kind
               for p, b, c in cells) >= 2


def test_spread():
  assert grid.spread(16, 1024, 4) == [16, 64, 256, 1024]
  assert grid.spread(16, 16, 4) == [16]
  assert grid.spread(20, 5, 3) == [5]


def test_rounds_are_in_turn_and_the_first_is_not_counted():
  seen, ticks = [], []
  a, b = iter([99, 3, 1, 2]), iter([99, 7, 9, 8])

  def timed(name, values):
    def run():
      seen.append(name)
      return next(values)
    return run
  medians = grid.in_rounds([timed('a', a), timed('b', b)], 3,
                              lambda: ticks.append(1))
  assert medians == [2, 8]
  assert seen == ['a', 'b'] * 4 and len(ticks) == 8


def test_rounds_that_are_whole_survive_ctrl_c():
  def halted(after):
    ticks = itertools.count(1)

    def tick():
      if next(ticks) == after:
        raise KeyboardInterrupt
    return tick
  timed = [iter([99, 3, 1]).__next__, iter([99, 7, 9]).__next__]
  with pytest.raises(grid.Stopped) as stopped:
    grid.in_rounds(timed, 5, halted(5))
  assert stopped.value.medians == [2, 7]
  with pytest.raises(KeyboardInterrupt) as nothing:
    grid.in_rounds([iter([99, 1]).__next__] * 2, 5, halted(2))
  assert not isinstance(nothing.value, grid.Stopped)


class Faked(profiling._Profiler):
  """A profiler whose parts take no time; `halt_at` says where Ctrl-C comes."""

  halt_at = ''

  def engine(self, plan):
    self.report(0, 1, f'{plan}: compiling')

  def cells(self, plan, bare):
    self.report(0, 1, f'{plan}: steps')
    return [fitting.Cell(((0, 8),), 0, 0, 1.0), fitting.Cell((), 1, 8, 1.0)]

  def link(self, plan, source, to):
    self.report(0, 1, f'{plan}: to {to}')
    return latency.Link(0.0, 1.0, 1.0)

  def contention(self, bare):
    self.report(0, 1, f'{Plan()}: side by side')


@pytest.mark.parametrize('halt_at, plans, links', [
    ('1x2: compiling', 1, 2), ('1x1: to 1x2', 1, 1), ('1x1: host', 1, 0),
    ('1x2: host', 2, 2), ('1x1: side by side', 1, 0), ('never', 2, 4),
    ('1x1: compiling', 0, 0)])
def test_ctrl_c_keeps_what_was_timed(monkeypatch, halt_at, plans, links):
  monkeypatch.setattr(profiling, '_Profiler', Faked)
  monkeypatch.setattr(profiling, 'Cells', lambda engine: None)
  monkeypatch.setattr(profiling, 'host_times', lambda *_: ([0.25], []))
  monkeypatch.setattr(profiling, 'typical_s', lambda *_: {'prefill': 0.5})

  def report(done, total, what):
    del done, total
    if what == halt_at:
      raise KeyboardInterrupt
  args = dsjax.load('tiny'), (Plan(), Plan(1, 2)), CONFIG, 1, 2, report
  if not plans:
    with pytest.raises(KeyboardInterrupt):
      profiling.measure(*args)
    return
  profile, cells = profiling.measure(*args)
  assert len(profile.latencies) == len(cells) == plans
  assert len(profile.links) == links
  assert ('stopped by Ctrl-C' in profile.source) == (halt_at != 'never')
  assert bool(profile.typical_s) == (halt_at != '1x1: host')


def test_the_runner_writes_what_was_timed_and_exits_130(tmp_path, monkeypatch):
  def measured(loaded, plans, config, rounds, points, report, name, cluster):
    assert cluster is None
    model = latency.Affine((1.0, 0.1, 0.0), (1.0, 0.0, 0.1), buckets=(
        latency.Buckets((32,), (1, 2), (1, 2))))
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      report(0, 1, 'what')
    cells = [fitting.Cell(((0, n),), 0, 0, 1.0 + n) for n in (8, 16)] + [
        fitting.Cell((), b, 8 * b, 1.0 + b) for b in (1, 2)]
    return profiles.Profile(name, 'cpu', {Plan(): model}), {Plan(): cells}
  monkeypatch.setattr(profiling, 'measure', measured)
  text, options = io.StringIO(), cli.parse(measure.FLAGS, [
      '--model=tiny', f'--out={tmp_path}', '--plans=1x1,1x2',
      '--compilation_cache='])
  assert measure.run(options, Console(file=text, width=100)) == 130
  assert 'Stopped by Ctrl-C: 1 of 2 plans' in text.getvalue()
  check_written(text.getvalue(), tmp_path)
  path, = tmp_path.glob('latency-*.json')
  assert Plan() in profiles.load(path).latencies
  assert made_by(tmp_path)['options']['plans'] == ['1x1', '1x2']


def test_each_part_is_told_as_it_begins():
  console = Console(file=io.StringIO(), force_terminal=False)
  with Progress(console=console, disable=True) as bar:
    report = measure.reporter(bar, lambda: None)
    for done, total, what in ((0, 20, 'a'), (1, 20, 'a'), (0, 3, 'b')):
      report(done, total, what)
  assert console.file.getvalue() == 'a: 0 of 20\nb: 0 of 3\n'


class Timed:
  """An instance with a clock of its own: a command takes host_s until it
  begins, and its steps step_s each on a device."""

  config, capacity = CONFIG, CONFIG.instance('chunked')

  def __init__(self, monkeypatch, host_s, step_s, is_process):
    self.host_s, self.step_s, self.now_s, self.free_s = host_s, step_s, 0.0, 0.0
    if is_process:
      self.stamps = collections.deque()
    monkeypatch.setattr(grid, 'time', types.SimpleNamespace(
        perf_counter=lambda: self.now_s))
    monkeypatch.setattr(grid.jax, 'block_until_ready', self.wait)

  def admit(self, *_):
    pass

  def wait(self, end_s):
    self.now_s = max(self.now_s, end_s)

  def decode(self, command):
    self.now_s += self.host_s
    self.free_s = max(self.free_s, self.now_s)
    for _ in range(command.steps):
      self.free_s += self.step_s
      if hasattr(self, 'stamps'):
        self.stamps.append(types.SimpleNamespace(wall_s=self.free_s))
    return [types.SimpleNamespace(token_R=self.free_s)], []


@pytest.mark.parametrize('count', (1, 3))
@pytest.mark.parametrize('host_s, is_process', [
    (0.5, False), (0.5, True), (0.0, True), (99.0, True)])
def test_steps_of_a_process_are_timed_behind_another(
    monkeypatch, host_s, is_process, count):
  """Else what dispatching takes is in them; never is it all."""
  cells = grid.Cells(Timed(monkeypatch, host_s, 1.0, is_process))
  took_s = cells.seconds((), 2, 8, count)
  want = 1.0 if is_process else (host_s + 4.0 * count) / count / 4
  if host_s > 9:  # the device waits for the host
    want = host_s / 4
  assert took_s == pytest.approx(want)


def test_plans():
  assert measure.parse_plans(['1x1', '2x3']) == (Plan(1, 1), Plan(2, 3))
  for bad in (['1by1'], ['1x1', '1x1'], ['0x1']):
    with pytest.raises(InputError):
      measure.parse_plans(bad)


@pytest.mark.slow  # examples/placement_from_measurements.py profiles too
def test_a_live_engine_from_cells_to_files(tmp_path, monkeypatch):
  monkeypatch.setattr(slowing, 'LEAST_S', 0.01)
  loaded = dsjax.load('tiny')
  plans = (Plan(), Plan(1, 2))
  profile, cells = profiling.measure(loaded, plans, CONFIG, 1, 2)
  assert tuple(profile.latencies) == tuple(cells) == plans
  assert set(profile.links) <= {(a, b) for a in plans for b in plans}
  assert profile.latencies[Plan(1, 2)].pp == 2
  model, timed = profile.latencies[Plan()], cells[Plan()]
  assert (profile.model, model.pp) == ('tiny', 1)
  assert (profile.bytes_per_weight, profile.bytes_per_kv) == (4, 4)
  assert model.buckets == latency.Buckets((32,), (1, 2), (1, 2))
  assert model.mixed is not None and model.host_s >= 0
  assert all(c.seconds > 0 for c in timed)
  assert set(fitting.residuals(model, timed)) == {'prefill', 'decode', 'mixed'}
  assert set(profile.contention.factors) == set(itertools.product(
      KINDS, repeat=2))
  out = tmp_path / 'out'
  path = out / measure.write(out, profile, cells, {'model': 'tiny'})[0]
  assert profiles.load(path) == profile
  rows = [json.loads(line) for line in
          next((tmp_path / 'out').glob('cells-*.jsonl')).read_text()
          .splitlines()]
  assert len(rows) == 2 * len(timed) and rows[0]['fitted_s'] > 0
  assert next((tmp_path / 'out').glob('*.png')).stat().st_size > 10_000
  text = io.StringIO()
  measure.show(Console(file=text, width=100), profile, cells, 0.1, CONFIG,
               loaded.config)
  for part in ('L_m', 'largest decode batch', 'worst', 'Appendix A',
               'measured ms', 'decode beside prefill'):
    assert part in text.getvalue()
  fitted = measure.fit_roofline(cells, CONFIG, loaded.config, 'a100-80g')
  assert all(0 < x <= 1 for x in fitted.shares[:3])
  measure.show_roofline(Console(file=text, width=100), fitted, cells)
  assert 'of the operations' in text.getvalue()
  more = measure.predict(profile, cells, fitted, (Plan(2, 2), Plan()))
  assert more.latencies[Plan()] == model  # what is measured stays
  assert more.latencies[Plan(2, 2)].buckets == model.buckets
  profiles.save(path, more)
  assert profiles.load(path) == more


@pytest.mark.slow
@pytest.mark.usefixtures('no_hang')
def test_processes_are_timed_as_they_serve(monkeypatch):
  """Steps of one with its own cores, KV over the border; nothing is left."""
  monkeypatch.setattr(profiling, 'BESIDE_ROUNDS', 1)
  before = processes.children()
  halted, beside = [], []

  def report(done, total, what):
    if what == f'{Plan()}: side by side':
      beside.append((done, total))
    if what == f'{Plan()}: host' and done:
      halted.append(len(processes.children() - before))

  profile, cells = profiling.measure(
      dsjax.load('tiny', weights=False), (Plan(),), CONFIG, 1, 2, report,
      cluster='local')
  assert halted == [2]  # those of the steps; the server's have ended
  assert set(fitting.residuals(profile.latencies[Plan()], cells[Plan()])) == {
      'prefill', 'decode', 'mixed'}
  assert all(c.seconds > 0 for c in cells[Plan()])
  assert set(profile.links) <= {(Plan(), Plan())}
  pairs = set(itertools.product(KINDS, repeat=2))
  total = 2 * slowing.count(CONFIG)
  assert len(beside) == total + 1 and beside[-1] == (total, total)
  shared = profile.contention
  assert set(shared.factors) == pairs
  assert all(sum(line) > 0 for line in (shared.read_s, shared.write_s))
  assert all(x >= 0 for x in shared.command_s)
  assert set(profile.typical_s) == set(KINDS)
  assert bool(shared.server_s) != local.has_own_core(
      Placement(chunked=[Plan(), Plan()]))
  assert 'cluster=local' in profile.source
  assert profile.device == 'cpu' and processes.children() <= before


@pytest.mark.parametrize('change, part', [
    ({'chunk_tokens': 16}, 'chunk_tokens'), ({'max_len': 32}, 'max_len')])
def test_what_cannot_be_measured(change, part):
  config = dataclasses.replace(CONFIG, **change)
  with pytest.raises(InputError, match=part):
    profiling.measure(dsjax.load('tiny'), (Plan(),), config)
  with pytest.raises(InputError, match='source and a target'):
    profiling.measure(dsjax.load('tiny'), (Plan(8, 1),), CONFIG)


STEPS = [(n, 0, 0) for n in (64, 512, 2048)] + [
    (0, rows, rows * n) for rows in (1, 8, 64) for n in (128, 2048)]


def test_steps_timed_elsewhere_are_fitted(tmp_path):
  truth = latency.Affine((2e-3, 4e-5, 1e-9), (5e-3, 3e-8, 1e-5))
  path = tmp_path / 'cells.csv'
  path.write_text('plan,tokens,batch,context,seconds\n' + ''.join(
      f'{plan},{n},{rows},{context},'
      f'{truth.mixed_s(((0, n),) if n else (), rows, context)}\n'
      for plan in ('2x1', '') for n, rows, context in STEPS))
  text = io.StringIO()
  options = cli.parse(measure.FLAGS, [
      f'--from={path}', '--model=llama-3-8b', f'--out={tmp_path / "out"}',
      '--hardware=h100-80g', '--weights=fp8_static'])
  assert cli.exit_code(measure.run, options, Console(file=text)) == 0
  profile = profiles.load(next((tmp_path / 'out').glob('latency-*.json')))
  assert (profile.model, profile.device) == ('llama-3-8b', 'h100-80g')
  assert profile.source == 'fitted to cells.csv'
  assert (profile.bytes_per_weight, profile.bytes_per_kv) == (1, 2)
  for plan in (Plan(), Plan(2, 1)):
    fitted = profile.latencies[plan]
    assert fitted.prefill == pytest.approx(truth.prefill, rel=1e-4)
    assert fitted.decode == pytest.approx(truth.decode, rel=1e-4)
    assert profile.errors[plan]['decode'][1] < 1e-6
  assert 'plan 2x1' in text.getvalue() and 'mean error 0.0%' in text.getvalue()


HEAD = 'tokens,batch,context,seconds'


@pytest.mark.parametrize('rows, few', [
    (STEPS, []), (STEPS[:1] + STEPS[3:], ['1 different lengths of prompts']),
    (STEPS[:5], ['2 different rows and contexts']),
    (STEPS[1:4], ['2 different lengths', '1 different rows'])])
def test_too_few_sizes_are_said(rows, few):
  text = io.StringIO()
  measure.warn_of_few(Console(file=text, width=200), Plan(), [
      fitting.Cell(((0, n),) if n else (), batch, context, 1.0)
      for n, batch, context in rows])
  said = text.getvalue().splitlines()
  assert [part in line for part, line in zip(few, said, strict=True)] == [
      True] * len(few)


@pytest.mark.parametrize('text, part', [
    ('', 'columns'), ('tokens,batch,seconds\n1,1,1', 'columns'),
    (HEAD, 'rows=0'), (f'{HEAD}\n8,0,0,0', 'line 2: seconds=0'),
    (f'{HEAD}\n8,0,0,1\n0,0,9,1', 'line 3: tokens=0'),
    (f'{HEAD}\n8,0,0,nan', "line 2: seconds='nan'"),
    (f'{HEAD}\n8,0,0,inf', "line 2: seconds='inf'"),
    (f'{HEAD}\n8.5,0,0,1', "line 2: tokens='8.5'"),
    (f'{HEAD}\n8,-1,0,1', "line 2: batch='-1'"),
    (f'{HEAD}\n8,1', "line 2: context=''"),
    (f'{HEAD}\n8,1,9,1,7', r"line 2=\['7'\]: must be as long"),
    (f'{HEAD},tokens\n8,1,9,1,7', 'columns=.*different names'),
    (f'{HEAD}\n8,0,9,1', 'line 2: context=9.0: must be 0 where'),
    (f'{HEAD}\n{10**23},0,0,1', 'line 2: tokens=.*0 to 1e'),
    (f'{HEAD}\n8,1,1e300,1', 'line 2: context=.*0 to 1e'),
    (f'{HEAD}\n8,0,0,1e-320', 'line 2: seconds=1e-320: must be 1e-12'),
    (f'{HEAD},plan\n8,0,0,1,3', 'line 2: plan'),
    (f'{HEAD}\n8,0,0,1', 'plan 1x1: .*kind decode')])
def test_a_csv_that_cannot_be_fitted(tmp_path, text, part):
  path = tmp_path / 'cells.csv'
  path.write_text(text)
  with pytest.raises(InputError, match=f'cells.csv: .*{part}'):
    measure.fit_file(path, 'm', 'own')
  with pytest.raises(InputError, match='cannot be read'):
    measure.fit_file(tmp_path / 'none.csv', 'm', 'own')


# --- from clients' timings ----------------------------------------------------


def test_what_clients_saw_becomes_a_file(tmp_path, capsys):
  """Simulated with a latency, fitted, and searched with what was fitted."""
  truth = latency.Affine((0.01, 1e-4, 0.0), (0.02, 1e-6, 1e-4))
  records = dsjax.simulate('colocated=1x1', latency=truth, rate_per_s=2.0,
                           lengths='fixed:200x20', requests=120,
                           max_seqs=256).records
  path = tmp_path / 'records.jsonl'
  path.write_text('\n'.join(json.dumps(r.row()) for r in records))
  text = io.StringIO()
  options = cli.parse(measure.FLAGS, [
      f'--from={path}', '--placement=colocated=1x1', '--model=opt-13b',
      f'--out={tmp_path / "out"}', '--kv=fp8'])
  assert cli.exit_code(measure.run, options, Console(file=text)) == 0
  assert 'TTFT p50' in text.getvalue() and 'TPOT p95' in text.getvalue()
  written, = (tmp_path / 'out').glob('latency-*.json')
  fitted = profiles.load(written)
  assert (fitted.bytes_per_weight, fitted.bytes_per_kv) == (2, 1)
  assert fitted.model == 'opt-13b' and 'held out: TTFT p50' in fitted.source
  assert fitted.latencies[Plan()].prefill_s(((0, 200),)) == pytest.approx(
      truth.prefill_s(((0, 200),)), rel=0.1)
  assert set(made_by(tmp_path / 'out')['data']) == {'records.jsonl'}
  assert dsjax.simulate('colocated=1x1', latency=str(written), rate_per_s=1.0,
                        lengths='fixed:200x20', requests=20).records


@pytest.mark.parametrize('flags, message', (
    (['--placement=colocated=1x1'], '--from='),
    (['--from=none.csv', '--placement=colocated=1x1'], 'cannot be read'),
    (['--from=none.csv', '--placement=1x1'], '--placement='),
    (['--from={}', '--placement=colocated=1x1'], '40 or more'),
    (['--from={}'], '--placement says what served it'),
    (['--from={}', '--placement=colocated=1x1', '--kv=nf3'],
     "--kv='nf3': must be one of ['float32'"),
    (['--from={}', '--placement=colocated=1x1', '--model=tiny-none'],
     'tiny-none')))
def test_bad_records_are_one_clear_error(flags, message, tmp_path, capsys):
  path = tmp_path / 'records.csv'
  path.write_text('arrival,prompt_tokens,output_tokens,ttft,latency\n'
                  + '0,100,3,0.5,1.5\n' * 3)
  options = cli.parse(measure.FLAGS, [
      '--model=opt-13b', '--out=out', *(f.format(path) for f in flags)])
  assert cli.exit_code(measure.run, options, Console(file=io.StringIO())) == 2
  line, = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and message in line
