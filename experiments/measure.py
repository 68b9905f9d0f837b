"""Profiles the compiled steps of a live engine and fits latencies to them.

  python -m experiments.measure --model=smollm2-135m-instruct --out=out/measure

Every plan of --plans is built on the devices at hand and timed over a grid of
batch x length: prefills, later chunks, decode steps, mixed (chunked) steps,
migrations between each pair of plans, what the serving loop adds to a decode
step (host), and how two instances of plan 1x1 slow each other: nothing on
devices of their own, much on the CPU devices of one process. All cells are
timed in turn, round after round, and the median of each counts, so that a
busy moment spoils no single cell. Buckets are part of the result: a batch
costs what its compiled size costs.

Files in --out: latency-DEVICE-MODEL.json (dsjax.simulation.profiles.load reads
it), cells-DEVICE-MODEL.jsonl (every cell, measured and fitted),
latency-....png.

Exit codes: 0; 2 for bad input; 130 when stopped by Ctrl-C.

--model is `tiny` or what dsjax.load takes; --set changes a field of
EngineConfig, such as --set=max_len=512.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import statistics
import sys
import time
import types

os.environ.setdefault('NPROC', '32')  # room for collectives of many devices

import jax
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import dsjax
from dsjax import workload
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import Sampling
from dsjax.model import kv_cache, sharding
from dsjax.runtime import engine, migration, orchestrator
from dsjax.scheduling.events import (
  Chunk,
  DecodeDone,
  Migrate,
  Row,
  RunDecode,
  RunPrefill,
)
from dsjax.simulation import contention, fitting, latency, profiles
from experiments.common import machine, terminal, tiny
from experiments.common import overrides as configs

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 4  # decode steps of a timed run: the device takes them in a row
HOST_TOKENS = 24  # output tokens of the requests that find the host's time
ENGINE = EngineConfig(max_len=1024, max_seqs=16, prefill_tokens=512,
                      chunk_tokens=512, prefill_seqs=8)


def define_flags():
  """Flags of a run of this file; other runners have some of these names."""
  return types.SimpleNamespace(
      model=flags.DEFINE_string(
          'model', 'smollm2-135m-instruct',
          '`tiny`, or a name or file of a checkpoint.'),
      out=flags.DEFINE_string('out', None, 'Folder for the files.'),
      plans=flags.DEFINE_list('plans', ['1x1'], 'Plans TPxPP to measure.'),
      set=flags.DEFINE_multi_string(
          'set', [], 'A field of EngineConfig to change: name=value.'),
      rounds=flags.DEFINE_integer(
          'rounds', 5, 'Timed rounds of every cell.', lower_bound=1),
      points=flags.DEFINE_integer(
          'points', 4, 'Lengths of each part of the grid, the least and the '
          'most included.', lower_bound=2),
      tpot_s=flags.DEFINE_float(
          'tpot_s', 0.1, 'Objective of the largest decode batch.',
          lower_bound=0),
      cache=flags.DEFINE_string(
          'compilation_cache', str(ROOT / '.cache' / 'jax'),
          'Folder of compiled programs, kept between runs; empty for none.'))


# --- the grid ---------------------------------------------------------------


def spread(low, high, points):
  """At most `points` integers from low to high, evenly by ratio."""
  if high <= low:
    return [high]
  return sorted({round(low * (high / low)**(i / (points - 1)))
                 for i in range(points)})


def shapes(config, points):
  """The (pieces, batch, context of a row) of every cell of the grid."""
  limit, rows = config.prefill_tokens, config.max_seqs
  room = config.max_len - STEPS - 1  # context of a row
  lengths = spread(min(16, -(-limit // 2)), min(limit, config.max_len),
                   points)
  found = [(((0, n),) * b, 0, 0) for n in lengths
           for b in spread(1, min(rows, config.prefill_seqs), 3)
           if n * b <= limit]
  starts = spread(16, config.max_len - lengths[-2], points)[1:]
  found += [(((s, s + n),), 0, 0) for s in starts for n in lengths
            if s + n <= config.max_len]
  contexts = spread(min(16, room), room, points)
  found += [((), b, c) for b in config.row_buckets for c in contexts]
  found += [(((s, s + n),), b, c) for s in (0, starts[0])
            for n in lengths for b in sorted({-(-rows // 4), rows})
            if n + b <= limit and s + n <= config.max_len
            and b < rows  # a row is left for the prompt
            for c in (contexts[0], contexts[-1])]
  return found


class Cells:
  """An instance driven by hand-made commands: no scheduler, no server.

  Every row has pages of its own. What they hold means nothing: no time
  depends on it.
  """

  def __init__(self, one):
    self.one = one
    each = -(-one.config.max_len // one.limits.page_size)
    count = one.config.max_seqs
    most = one.limits.num_pages // each
    self.pages = [tuple(range((r % most) * each, (r % most + 1) * each))
                  for r in range(count)]
    for id in range(count):
      one.admit(id, [1] * (one.config.max_len // 2), 1, Sampling())

  def run(self, pieces, batch, each):
    """Dispatches a cell; returns (arrays to wait for, steps)."""
    rows = tuple(Row(r, each - 1, STEPS, self.pages[r])
                 for r in range(batch))
    if not pieces:
      outs, _ = self.one.decode(RunDecode(0, 0, 0, STEPS, rows))
      return outs[-1].token_R, STEPS
    size = self.one.limits.page_size
    chunks = tuple(
        Chunk(batch + i, start, stop,
              self.pages[batch + i][:-(-stop // size)], True)
        for i, (start, stop) in enumerate(pieces))
    outs, _ = self.one.prefill(RunPrefill(0, 0, chunks, 0, rows))
    return outs[-1].token_R, 1

  def seconds(self, pieces, batch, each):
    """Seconds of a step of a cell, waited for."""
    start = time.perf_counter()
    out, steps = self.run(pieces, batch, each)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / steps


def context_of(pieces, batch, each):
  """Tokens that the decode rows of a cell attend to, in a mean step."""
  return batch * (each + (0 if pieces else (STEPS - 1) / 2))


def in_rounds(timed, rounds, tick):
  """Median seconds of each function; a first round is not counted."""
  taken = [[] for _ in timed]
  for i in range(rounds + 1):
    for one, fn in zip(taken, timed, strict=True):
      seconds = fn()
      if i:
        one.append(seconds)
      tick()
  return [statistics.median(x) for x in taken]


# --- what else takes time ---------------------------------------------------


def decode_span(server, batch):
  """(seconds a step, first step's context of a row, steps) of the decodes of
  all `batch` requests together in a server's log; None: there are none."""
  sent, times, first = {}, [], None
  for event, commands in server.log:
    for c in commands:
      if isinstance(c, RunDecode):
        sent[c.number] = c
    if isinstance(event, DecodeDone):
      command = sent.get(event.number)
      if command and len(command.rows) == batch:
        first = first or command.rows[0].base + command.tick + 1
        times += event.steps_s
  if len(times) < 3:
    return None
  return (times[-1] - times[0]) / (len(times) - 1), first, len(times)


def host_times(loaded, config, plan, bare, rounds):
  """Seconds that the serving loop adds to a decode step, one a round.

  A full batch is served, and the same steps are run bare, in turn.
  """
  batch, prompt = config.max_seqs, min(16, config.prefill_tokens)
  tokens = min(HOST_TOKENS, config.max_len - prompt)
  rng = np.random.default_rng(0)
  found = []
  with orchestrator.serve(loaded, Placement(colocated=[plan]), config,
                          report=lambda *_: None) as server:
    for i in range(rounds + 1):
      ids = rng.integers(3, loaded.config.vocab_size, (batch, prompt))
      requests = workload.from_prompts(
          ids.tolist(), (0.0,) * batch,
          Sampling(max_tokens=tokens, ignore_eos=True))
      server.log.clear()
      server.run([dataclasses.replace(r, id=i * batch + r.id)
                  for r in requests])
      span = decode_span(server, batch)
      if span is None:
        continue
      step_s, first, steps = span
      bare_s = statistics.median(
          bare.seconds((), batch, min(first + steps // 2,
                                      config.max_len - STEPS))
          for _ in range(3))
      if i:
        found.append(step_s - bare_s)
  return found


def transfer_times(source, target, lengths, rounds, tick):
  """Median seconds of a migration of each length."""
  route = migration.Route(source, target)
  route.warm()

  def timed(n):
    def run():
      ids = [tuple(range(-(-n // e.limits.page_size)))
             for e in (source, target)]
      start = time.perf_counter()
      moved = route.start(Migrate(0, 1, 0, ids[0], 1, ids[1], n))
      jax.block_until_ready(moved.land())
      return time.perf_counter() - start
    return run
  return in_rounds([timed(n) for n in lengths], rounds, tick)


# --- side by side -----------------------------------------------------------

BESIDE_S = 0.2  # least seconds of a step timed beside others


def typical(config):
  """{kind: a cell of the middle of the grid}."""
  tokens = min(config.prefill_tokens, config.max_len) // 2
  rows, each = max(1, config.max_seqs // 2), config.max_len // 2
  return {'prefill': (((0, tokens),), 0, 0), 'decode': ((), rows, each),
          'mixed': (((0, tokens),), max(1, rows // 2), each),
          'single': ((), 1, each)}


def beside(mine, theirs, config, rounds, tick):
  """The Contention of two instances of one stage, driven as Cells.

  A typical step of each kind is timed again and again, alone and while the
  other instance has steps of each kind to do; the median of the ratios of
  each round counts. A first round, which compiles, is not counted.
  """
  cells = typical(config)

  def alone(bare, cell):
    return bare.seconds(*cell) * (1 if cell[0] else STEPS)

  def ratio(kind, kind_beside):
    cell, cell_beside = cells[kind], cells[kind_beside]
    alone_s = alone(mine, cell)
    each_s = alone(theirs, cell_beside)
    repeats = max(1, math.ceil(BESIDE_S / alone_s))
    # Twice as slow, and some more, so that the other one never runs dry.
    for _ in range(math.ceil(3 * repeats * alone_s / each_s) + 1):
      busy = theirs.run(*cell_beside)[0]
    start = time.perf_counter()
    for _ in range(repeats):
      jax.block_until_ready(mine.run(*cell)[0])
    seconds = (time.perf_counter() - start) / repeats
    jax.block_until_ready(busy)
    tick()
    return seconds / alone_s

  pairs = list(itertools.product(contention.KINDS, repeat=2))
  found = [[ratio(*pair) for pair in pairs] for _ in range(rounds + 1)]
  return contention.Contention({
      pair: max(1.0, statistics.median(x)) for pair, x in zip(
          pairs, zip(*found[1:], strict=True), strict=True)})


# --- the whole --------------------------------------------------------------


def buckets_of(config):
  """The latency.Buckets of an engine's compiled steps."""
  rows = config.max_seqs
  return latency.Buckets(config.token_buckets(config.prefill_tokens),
                         config.row_buckets,
                         tuple(sorted({-(-rows // 4), rows})))


def build(loaded, plan, role, config, devices):
  """An Engine of one plan on the first of these devices."""
  placement = Placement(colocated=[plan])
  meshes, = sharding.make_meshes(loaded.config, placement, devices)
  return engine.Engine(loaded, meshes, role, config)


def measure(loaded, plans, config, rounds=5, points=4, bar=None, name=None):
  """Profiles every plan.

  Args:
    config: an EngineConfig; chunk_tokens must be prefill_tokens.
    bar: a rich Progress, or None. name: the model's, for the profile.

  Returns:
    (latency.Profile, {Plan: [fit.Cell]}).

  Raises:
    InputError: a plan does not fit on the devices, or the config is not as
      described.
  """
  require(config.chunk_tokens == config.prefill_tokens,
          'EngineConfig.chunk_tokens', config.chunk_tokens,
          f'prefill_tokens={config.prefill_tokens}: one engine measures '
          'both kinds of step')
  require(config.max_len >= 64, 'EngineConfig.max_len', config.max_len,
          '64 or more to measure')
  most = max(p.num_devices for p in plans)
  devices = jax.devices()
  require(2 * most <= len(devices), 'plans', plans,
          f'of at most {len(devices) // 2} devices: migrations need a '
          'source and a target')
  bar = bar or Progress(disable=True)
  grid, cells, models, links = shapes(config, points), {}, {}, {}
  shared = None
  lengths = spread(config.page_size, config.max_len, points)
  kv_bytes = kv_cache.bytes_per_token(
      loaded.config, config.kv_dtype_of('decode'), loaded.config.num_layers)
  for plan in plans:
    label = str(plan)
    one = build(loaded, plan, 'chunked', config, devices)
    task = bar.add_task(f'{label}: compiling', total=len(one.shapes_needed()))
    for _ in one.warm():
      bar.advance(task)
    bare = Cells(one)
    task = bar.add_task(f'{label}: steps', total=(rounds + 1) * len(grid))
    medians = in_rounds([lambda s=s, bare=bare: bare.seconds(*s)
                         for s in grid], rounds, lambda t=task: bar.advance(t))
    cells[plan] = [fitting.Cell(s[0], s[1], context_of(*s), seconds)
                   for s, seconds in zip(grid, medians, strict=True)]
    task = bar.add_task(f'{label}: host', total=1)
    host = host_times(loaded, config, plan, bare, rounds)
    bar.advance(task)
    models[plan] = fitting.fit_affine(
        cells[plan], buckets_of(config),
        max(0.0, statistics.median(host)) if host else 0.0, plan.pp)
    for to in plans:
      target = build(loaded, to, 'decode', config, devices[most:])
      task = bar.add_task(f'{label}: to {to}',
                          total=(rounds + 1) * len(lengths))
      seconds = transfer_times(one, target, lengths, rounds,
                               lambda t=task: bar.advance(t))
      if seconds[-1] > seconds[0]:  # else noise hides the bandwidth
        links[plan, to] = fitting.fit_link(lengths, seconds, kv_bytes)
    if plan == Plan():
      other = build(loaded, plan, 'chunked', config, devices[most:])
      task = bar.add_task(f'{label}: side by side', total=(
          rounds + 1) * len(contention.KINDS)**2)
      shared = beside(bare, Cells(other), config, rounds,
                      lambda t=task: bar.advance(t))
  return profiles.Profile(
      name or loaded.config.name, devices[0].device_kind, models, links,
      f'experiments.measure, {rounds} rounds, {config.dtype}, '
      f'jax {jax.__version__}', shared), cells


# --- what a person looks at -------------------------------------------------


def _say(cell):
  parts = []
  if cell.pieces:
    start, stop = cell.pieces[0]
    many = f'{len(cell.pieces)} x ' * (len(cell.pieces) > 1)
    parts.append(f'{many}[{start}, {stop})')
  if cell.batch:
    parts.append(f'{cell.batch} rows of {cell.context / cell.batch:.0f}')
  return ' + '.join(parts)


def show(console, profile, cells, tpot_s, config, model_config):
  """Tables: every cell, and what follows from the fits."""
  max_len = config.max_len
  for plan, model in profile.latencies.items():
    table = Table(title=f'plan {plan}', title_justify='left')
    for column in ('kind', 'cell', 'measured ms', 'fitted ms', 'error'):
      table.add_column(column, justify='left' if column in ('kind', 'cell')
                       else 'right')
    for c in cells[plan]:
      fitted = fitting.predict_s(model, c)
      table.add_row(c.kind, _say(c), f'{1e3 * c.seconds:.3f}',
                    f'{1e3 * fitted:.3f}', f'{fitted / c.seconds - 1:+.1%}')
    console.print(table)
    for kind, r in fitting.residuals(model, cells[plan]).items():
      console.print(f'  {kind}: mean error {r.mape:.1%} of {r.count} cells, '
                    f'worst {r.worst:.1%} at {_say(r.cell)}', highlight=False)
    paper = latency.appendix_a(model_config, fitting.fit_appendix_a(
        cells[plan], model_config))
    alone = [c for c in cells[plan] if c.kind != 'mixed']
    console.print('  mean error of DistServe Appendix A, five constants: '
                  + ', '.join(f'{kind} {r.mape:.1%}' for kind, r in
                              fitting.residuals(paper, alone).items()),
                  highlight=False)
    limit, rows = model.buckets.tokens[-1], model.buckets.rows[-1]
    batch = latency.largest_batch(model, tpot_s, max_len // 2, rows)
    console.print(
        f'  L_m {latency.saturation_tokens(model, limit=limit)} of at most '
        f'{limit} tokens; host {1e3 * model.host_s:.3f} ms a step; largest '
        f'decode batch within {tpot_s:g} s, of rows of {max_len // 2}: '
        f'{batch} of {rows}', highlight=False)
  for (a, b), link in profile.links.items():
    console.print(f'KV {a} to {b}: '
                  f'{1e3 * link.base_s:.3f} ms + '
                  f'{link.bytes_per_s / 1e9:.2f} GB/s', highlight=False)
  if profile.contention:
    console.print('A step of two 1x1 instances side by side, over one alone: '
                  + ', '.join(f'{kind} beside {other} {x:.2f}' for
                              (kind, other), x in
                              profile.contention.factors.items()),
                  highlight=False, soft_wrap=True)


def draw(path, profile, cells):
  """Measured (dots) against fitted (lines), a row of panels a plan."""
  figure = Figure(figsize=(13, 3.8 * len(cells)), layout='constrained')
  axes = figure.subplots(len(cells), 3, squeeze=False)
  for row, (plan, found) in zip(axes, cells.items(), strict=True):
    model = profile.latencies[plan]
    _draw_prefill(row[0], model, found)
    _draw_decode(row[1], model, found)
    _draw_errors(row[2], model, found)
    row[0].set_ylabel(f'plan {plan}\nms a step')
  figure.suptitle(f'{profile.model} on {profile.device}: measured (dots) and '
                  'fitted (lines)', fontsize=11)
  figure.savefig(path, dpi=130)


def _draw_prefill(axis, model, cells):
  alone = [c for c in cells if c.kind == 'prefill' and c.pieces[0][0] == 0]
  for count, colour in zip(sorted({len(c.pieces) for c in alone}),
                           ('C0', 'C1', 'C2', 'C3'), strict=False):
    of = sorted((latency.sums(c.pieces)[0], c.seconds) for c in alone
                if len(c.pieces) == count)
    axis.plot(*zip(*((n, 1e3 * s) for n, s in of), strict=True), 'o',
              color=colour, label=f'{count} prompts' if count > 1 else
              '1 prompt')
    n = np.unique(np.geomspace(of[0][0], of[-1][0], 200).astype(int))
    axis.plot(n, [1e3 * model.prefill_s(((0, x // count),) * count)
                  for x in n.tolist()], color=colour, lw=1)
  axis.set(title='prefill', xlabel='tokens of the batch')
  axis.set_ylim(bottom=0)
  axis.legend(frameon=False, fontsize=8)


def _draw_decode(axis, model, cells):
  sizes = sorted({c.batch for c in cells if c.kind == 'decode'})
  for i, batch in enumerate(sizes):
    of = sorted((c.context / batch, c.seconds) for c in cells
                if c.kind == 'decode' and c.batch == batch)
    axis.plot(*zip(*((n, 1e3 * s) for n, s in of), strict=True), 'o',
              color=f'C{i % 10}', label=f'{batch} rows' if batch > 1 else
              '1 row')
    each = np.linspace(of[0][0], of[-1][0], 50)
    axis.plot(each, [1e3 * model.decode_s(batch, batch * x) for x in each],
              color=f'C{i % 10}', lw=1)
  axis.set(title='decode', xlabel='context of a row, tokens')
  axis.set_ylim(bottom=0)
  axis.legend(frameon=False, fontsize=8)


def _draw_errors(axis, model, cells):
  for i, (kind, r) in enumerate(fitting.residuals(model, cells).items()):
    of = [c for c in cells if c.kind == kind]
    axis.plot([1e3 * c.seconds for c in of],
              [100 * (fitting.predict_s(model, c) / c.seconds - 1) for c in of],
              'o', color=f'C{i}', ms=4,
              label=f'{kind}: mean {r.mape:.1%}, worst {r.worst:.1%}')
  axis.axhline(0, color='0.6', lw=0.8)
  axis.set(title='error of the fit', xlabel='measured ms', ylabel='%',
           xscale='log')
  axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
  axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
  axis.xaxis.set_minor_formatter(NullFormatter())
  axis.legend(frameon=False, fontsize=8)


def write(out, profile, cells):
  """Writes the three files; returns the profile's path."""
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  slug = '-'.join(re.sub('[^a-z0-9.]+', '-', x.lower()).strip('-')
                  for x in (profile.device, profile.model))
  profiles.save(out / f'latency-{slug}.json', profile)
  with open(out / f'cells-{slug}.jsonl', 'w', encoding='utf-8') as file:
    for plan, found in cells.items():
      for c in found:
        file.write(json.dumps({'plan': str(plan), 'kind': c.kind}
                              | c._asdict() | {'fitted_s': fitting.predict_s(
                                  profile.latencies[plan], c)}) + '\n')
  draw(out / f'latency-{slug}.png', profile, cells)
  return out / f'latency-{slug}.json'


def parse_plans(texts):
  """Plans of 'TPxPP' texts. Raises InputError."""
  plans = tuple(Plan.parse(text, '--plans') for text in texts)
  require(len(set(plans)) == len(plans), '--plans', texts,
          'different ones')
  return plans


def run(console):
  """Measures as the flags say."""
  require(FLAGS.out.value, '--out', FLAGS.out.value, 'a folder')
  tpot_s = FLAGS.tpot_s.value
  require(math.isfinite(tpot_s) and tpot_s > 0, '--tpot_s', tpot_s,
          'seconds above 0')
  config, plans = configs.override(ENGINE, FLAGS.set.value), parse_plans(
      FLAGS.plans.value)
  most = max(p.num_devices for p in plans)
  if jax.config.jax_platforms in (None, '', 'cpu'):
    jax.config.update('jax_num_cpu_devices', 2 * most)
  if FLAGS.cache.value:
    jax.config.update('jax_compilation_cache_dir', FLAGS.cache.value)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  loaded = (tiny.load(config.dtype) if FLAGS.model.value == 'tiny'
            else dsjax.load(FLAGS.model.value, config.dtype))
  others = machine.Others()
  with Progress(TextColumn('{task.description}'), BarColumn(),
                MofNCompleteColumn(), console=console,
                transient=True) as bar:
    profile, cells = measure(loaded, plans, config, FLAGS.rounds.value,
                             FLAGS.points.value, bar,
                             pathlib.Path(FLAGS.model.value).name)
  show(console, profile, cells, tpot_s, config, loaded.config)
  busy = others.cores()
  if busy is not None and busy > 0.2:
    console.print(f'Other programs used {busy:.1f} cores meanwhile: these '
                  'times are too long.', style='yellow')
  console.print(f'wrote {write(FLAGS.out.value, profile, cells)}')


def main(_):
  try:
    with terminal.one_error():
      run(Console())
  except KeyboardInterrupt:
    print('stopped: nothing was written', file=sys.stderr)
    sys.exit(130)


if __name__ == '__main__':
  FLAGS = define_flags()
  app.run(main)
