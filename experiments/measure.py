"""Profiles the compiled steps of a live engine and fits latencies to them.

  python -m experiments.measure --model=smollm2-135m-instruct --out=out/measure

Every plan of --plans is built on the devices at hand and timed, as
dsjax.runtime.profiling says.

With --cluster=local instances are processes with cores of their own, as they
serve: KV is timed over that border.

--hardware=h100-80g also fits the shares of a device's peaks that all plans
together reach (a Roofline), and --predict=4x1,8x1 adds to the file what other
plans would take at these shares, so that a search may consider them.

--from=cells.csv takes the steps from a file, timed on any engine: columns
tokens (of a prompt), batch, context (of its rows, all together), seconds, and
plan where it is not 1x1. --model then only names the model.

--from=aiconfigurator:h200_sxm --model=qwen2.5-7b --plans=1x1,2x1 sums the
operators that NVIDIA measured on that GPU, of the engine --engine, and fits
the sums (experiments.common.operators; docs/placement.md). It wants
`pip install -e '.[tables]'`. --model is a name of dsjax.config.zoo or a folder
with a config.json.

--from=records.csv --placement=prefill=2x1,decode=1x1 fits what clients saw of a
run that this placement served, on any engine: arrival, tokens of prompt and
output, times of the first and the last token, under the names that load
generators give them (dsjax.workload.served), CSV or JSON lines. --model is a
name of dsjax.config.zoo; --hardware, --memory_gb, --batch_tokens and
--max_seqs say what the engine had, --weights and --kv how it stored numbers
(of a file of steps too). The last 30 % of the requests are held out.

Files in --out: latency-DEVICE-MODEL.json (dsjax.simulation.profiles.load reads
it), cells-DEVICE-MODEL.jsonl (every cell, measured and fitted),
latency-....png.

Ctrl-C keeps what was timed: plans with a whole round, and what else there is of
them. Exit codes: 0; 2 for bad input; 130 when stopped by Ctrl-C.

--model is what dsjax.load takes; --set changes a field of EngineConfig, such
as --set=max_len=512.
"""

import csv
import dataclasses
import json
import math
import pathlib
import re
import statistics
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import dsjax
from dsjax.config.checks import InputError, naming, require
from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan
from dsjax.runtime import profiling
from dsjax.simulation import (
    fitting,
    hardware,
    latency,
    profiles,
    roofline,
    roofline_fit,
)
from experiments.common import (
  cli,
  machine,
  operators,
  pictures,
  provenance,
  served,
  terminal,
)
from experiments.common import overrides as configs

MOST = 10**12  # of a number in a CSV, and of 1 / seconds
# Bytes of a number, by its name in --weights and --kv.
BYTES = {'float32': 4.0, 'float16': 2.0, 'bfloat16': 2.0, 'fp8': 1.0,
         'fp8_static': 1.0, 'int8': 1.0, 'int4': 0.5}
FEWEST = 3  # sizes of a kind of step, to know how time grows with them
FLAGS = {
    'model': cli.Flag('smollm2-135m-instruct', 'See dsjax.load.'),
    'out': None,
    'from': cli.Flag('', 'A CSV of steps timed elsewhere, to fit; with '
                     '--placement, requests as their clients saw them; or '
                     'aiconfigurator:GPU, such as aiconfigurator:h200_sxm.'),
    'engine': cli.Flag('vllm', 'Whose operators, with aiconfigurator:GPU.',
                       choices=tuple(operators.ENGINES)),
    'version': cli.Flag('current', 'Of that engine.'),
    'weights': cli.Flag('bfloat16', 'As they are stored where --from was '
                        'measured, such as fp8_static.'),
    'kv': cli.Flag('bfloat16', 'As it is stored there, such as fp8.'),
    'tables': cli.Flag('', 'A folder of other tables of that package.'),
    'placement': cli.Flag('', 'That served the requests of --from.'),
    **dict.fromkeys(cli.CLUSTER),
    'batch_tokens': cli.Flag(2048, 'Of its prefill batches, or of its chunked '
                             'steps.', low=1),
    'max_seqs': cli.Flag(256, 'Of each of its instances.', low=1),
    'plans': cli.Flag(['1x1'], 'Plans TPxPP to measure.'),
    'hardware': cli.Flag('', 'The device, for a Roofline of all plans.',
                         choices=('', *sorted(hardware.HARDWARE))),
    'predict': cli.Flag([], 'Plans TPxPP not measured, for the file; with '
                        '--hardware.'),
    'set': (), 'rounds': 5,
    'points': cli.Flag(4, 'Lengths of each part of the grid, the least and '
                       'the most included.', low=2),
    'tpot_s': 0.1,
    'cluster': cli.CLUSTER_FLAG, 'compilation_cache': cli.CACHE,
}


def _number(where: str, row: Mapping[str, str], name: str, whole: bool = True
            ) -> Any:
  """A number of a row of a CSV, 0 to MOST."""
  try:
    value = (int if whole else float)(row[name])
  except (TypeError, ValueError):
    value = None
  require(value is not None and 0 <= value <= MOST, f'{where}: {name}',
          row[name], f'a {"whole " * whole}number from 0 to {MOST:g}')
  return value


def read_cells(path: str | pathlib.Path) -> dict[Plan, list[fitting.Cell]]:
  """{Plan: Cells} of a CSV (see above).

  Raises:
    InputError naming the file, the line and the column.
  """
  columns = ('tokens', 'batch', 'context', 'seconds')
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8-sig').splitlines()
  except (OSError, ValueError) as error:
    raise InputError(f'{path}: cannot be read: {error}') from error
  reader = csv.DictReader(lines, restval='')
  require(set(columns) <= set(reader.fieldnames or ()), f'{path}: columns',
          reader.fieldnames, f'{columns}, and plan if there are several; of '
          'what clients saw --placement says what served it')
  names = reader.fieldnames or ()
  require(len(names) == len(set(names)), f'{path}: columns', names,
          'of different names')
  cells = {}
  for row in reader:
    where = f'{path}: line {reader.line_num}'
    require(None not in row, where, row.get(None), 'as long as the first line')
    plan = Plan.parse(row.get('plan') or '1x1', f'{where}: plan')
    tokens, batch = (_number(where, row, name) for name in columns[:2])
    context, seconds = (_number(where, row, name, False)
                        for name in columns[2:])
    require(tokens or batch, f'{where}: tokens', tokens,
            'above 0 where batch is 0')
    require(batch or not context, f'{where}: context', context,
            '0 where batch is 0: it is of rows of decode')
    require(seconds >= 1 / MOST, f'{where}: seconds', seconds,
            f'{1 / MOST:g} or more')
    cells.setdefault(plan, []).append(fitting.Cell(
        ((0, tokens),) if tokens else (), batch, context, seconds))
  require(cells, f'{path}: rows', 0, 'at least one')
  return cells


def stored(options: types.SimpleNamespace) -> tuple[float, float]:
  """Bytes of a weight and of a number of KV, as --weights and --kv say.

  Raises:
    InputError: a name that is not known.
  """
  for flag in ('weights', 'kv'):
    name = getattr(options, flag)
    require(name in BYTES, f'--{flag}', name, f'one of {list(BYTES)}')
  return BYTES[options.weights], BYTES[options.kv]


def fit_file(path: str | pathlib.Path, model: str, device: str
             ) -> tuple[profiles.Profile, dict[Plan, list[fitting.Cell]]]:
  """(Profile, {Plan: Cells}) of steps that were timed elsewhere."""
  cells = read_cells(path)
  latencies = {}
  for plan, own in cells.items():
    with naming(f'{path}: plan {plan}'):
      latencies[plan] = fitting.fit_affine(own, pp=plan.pp)
  return profiles.Profile(
      model, device, latencies, source=f'fitted to {pathlib.Path(path).name}',
      errors={plan: {kind: (error.mape, error.worst) for kind, error in
                     fitting.residuals(latencies[plan], own).items()}
              for plan, own in cells.items()}), cells


def sum_operators(options: types.SimpleNamespace, console: Console,
                  system: str) -> tuple[
                      profiles.Profile, Mapping[Plan, list[fitting.Cell]]]:
  """(Profile, {Plan: Cells}) of operators measured on a GPU; shows errors."""
  plans = parse_plans(options.plans)
  profile, cells, held = operators.fit_operators(
      operators.Asked(system, options.engine, options.version,
                      options.weights, options.kv, options.tables),
      options.model, plans, options.hardware or system)
  for plan in plans:
    if plan not in cells:
      console.print(f'plan {plan}: left out, its weights have no room',
                    style='yellow')
      continue
    for what, own in (('', cells[plan]), (', sizes not fitted to', held[plan])):
      console.print(f'plan {plan}{what}', highlight=False)
      show_errors(console, profile.latencies[plan], own)
  console.print(profile.source, highlight=False, soft_wrap=True)
  return profile, cells


def fit_roofline(cells: Mapping[Plan, Sequence[fitting.Cell]],
                 config: EngineConfig, model_config: ModelConfig,
                 name: str) -> roofline.Roofline:
  """The Roofline of the device `name` that the cells of all plans reach."""
  peaks = roofline.Roofline(
      model_config, hardware.HARDWARE[name],
      itemsize=np.dtype(config.dtype).itemsize,
      kv_itemsize=np.dtype(config.kv_dtype_of('decode')).itemsize)
  return dataclasses.replace(peaks, shares=roofline_fit.fit_shares([
      (dataclasses.replace(peaks, tp=plan.tp, pp=plan.pp), own)
      for plan, own in cells.items()]))


def predict(profile: profiles.Profile,
            cells: Mapping[Plan, Sequence[fitting.Cell]],
            fitted: roofline.Roofline, plans: Sequence[Plan]
            ) -> profiles.Profile:
  """The Profile with Affines of further plans, from a Roofline."""
  measured = list(profile.latencies.values())
  host_s = statistics.median(model.host_s for model in measured)
  predicted = {plan: roofline_fit.affine_of(
      fitted, plan, next(iter(cells.values())), measured[0].buckets, host_s)
               for plan in plans}
  names = ', '.join(map(str, plans))
  return dataclasses.replace(
      profile, latencies=predicted | profile.latencies,
      source=f'{profile.source}; predicted, not measured: {names}')


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


def warn_of_few(console: Console, plan: Plan,
                cells: Sequence[fitting.Cell]) -> None:
  """Says where a fit had too little to tell how time grows with a step's
  size: fewer sizes that differ than its line or curve has constants."""
  for what, sizes in (
      ('lengths of prompts', {cell.pieces for cell in cells
                              if cell.kind == 'prefill'}),
      ('rows and contexts', {(cell.batch, cell.context) for cell in cells
                             if cell.kind == 'decode'})):
    if len(sizes) < FEWEST:
      console.print(f'plan {plan}: {len(sizes)} different {what}: steps of '
                    f'others are a guess, give {FEWEST} or more',
                    style='yellow')


def show_errors(console: Console, model: latency.Latency,
                cells: Sequence[fitting.Cell]) -> None:
  """The errors of a fit, by kind of step."""
  for kind, error in fitting.residuals(model, cells).items():
    console.print(f'  {kind}: mean error {error.mape:.1%} of {error.count} '
                  f'cells, worst {error.worst:.1%} at {_say(error.cell)}',
                  highlight=False)


def show(console: Console, profile: profiles.Profile,
         cells: Mapping[Plan, Sequence[fitting.Cell]], tpot_s: float,
         config: EngineConfig, model_config: ModelConfig) -> None:
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
    show_errors(console, model, cells[plan])
    paper = latency.appendix_a(model_config, fitting.fit_appendix_a(
        cells[plan], model_config))
    alone = [c for c in cells[plan] if c.kind != 'mixed']
    console.print('  mean error of DistServe Appendix A, five constants: '
                  + ', '.join(f'{kind} {error.mape:.1%}' for kind, error in
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
  shared = profile.contention
  if shared and (shared.server_s or any(shared.read_s + shared.write_s)):
    base_s, step_s = shared.command_s
    console.print(f'Of cores: the server {1e3 * shared.server_s:.3f} ms a '
                  f'step; a command {1e3 * base_s:.3f} ms + '
                  f'{1e3 * step_s:.3f} ms a step; a hand-off ' + ', '.join(
                      f'{1e3 * a:.3f} ms + {1e6 * b:.2f} us a token {what}'
                      for what, (a, b) in (('of its source', shared.read_s),
                                           ('of its target', shared.write_s))
                  ), highlight=False, soft_wrap=True)
  if shared and shared.factors:
    console.print('A step of two 1x1 instances side by side, over one alone: '
                  + ', '.join(f'{kind} beside {other} {x:.2f}' for
                              (kind, other), x in
                              shared.factors.items()),
                  highlight=False, soft_wrap=True)


def show_roofline(console: Console, fitted: roofline.Roofline,
                  cells: Mapping[Plan, Sequence[fitting.Cell]]) -> None:
  """The shares of a Roofline, and its error for each measured plan."""
  console.print(f'Shares of the peaks of {fitted.hardware.name}: '
                f'{fitted.shares}', highlight=False)
  for plan, own in cells.items():
    model = dataclasses.replace(fitted, tp=plan.tp, pp=plan.pp)
    console.print(f'  plan {plan}: mean error ' + ', '.join(
        f'{kind} {error.mape:.1%}' for kind, error in
        fitting.residuals(model, own).items()), highlight=False)


def draw(path: str | pathlib.Path, profile: profiles.Profile,
         cells: Mapping[Plan, Sequence[fitting.Cell]]) -> None:
  """Measured (dots) against fitted (lines), a row of panels a plan."""
  figure = Figure(figsize=(13, 3.8 * len(cells)), layout='constrained')
  axes = figure.subplots(len(cells), 3, squeeze=False)
  for row, (plan, measured) in zip(axes, cells.items(), strict=True):
    model = profile.latencies[plan]
    _draw_prefill(row[0], model, measured)
    _draw_decode(row[1], model, measured)
    _draw_errors(row[2], model, measured)
    row[0].set_ylabel(f'plan {plan}\nms a step')
  figure.suptitle(f'{profile.model} on {profile.device}: measured (dots) and '
                  'fitted (lines)', fontsize=11)
  pictures.save(figure, path)


def _draw_prefill(axis, model, cells):
  alone = [c for c in cells if c.kind == 'prefill' and c.pieces[0][0] == 0]
  for i, count in enumerate(sorted({len(c.pieces) for c in alone})):
    of = sorted((latency.sums(c.pieces)[0], c.seconds) for c in alone
                if len(c.pieces) == count)
    n = np.unique(np.geomspace(of[0][0], of[-1][0], 200).astype(int))
    _fitted(axis, i, [(x, 1e3 * s) for x, s in of], [
        (x, 1e3 * model.prefill_s(((0, x // count),) * count))
        for x in n.tolist()], f'{count} prompt{"s" * (count > 1)}')
  axis.set(title='prefill', xlabel='tokens of the batch')
  axis.set_ylim(bottom=0)
  _legend(axis)


def _fitted(axis, number, measured, fitted, label):
  """Points and a line through others, told apart in grey; a legend has both."""
  look = pictures.look(number)
  axis.plot(*zip(*measured, strict=True), **look | {'linestyle': ''})
  axis.plot(*zip(*fitted, strict=True), **look | {'marker': ''}, lw=1)
  axis.plot([], [], **look, lw=1, label=label)


def _legend(axis):
  count = len(axis.get_legend_handles_labels()[0])
  if count > 4:  # above the lines
    axis.set_ylim(top=axis.get_ylim()[1] * (1.1 + 0.06 * math.ceil(count / 3)))
  if count:
    axis.legend(frameon=False, fontsize=8, ncols=3 if count > 4 else 1)


def _draw_decode(axis, model, cells):
  sizes = sorted({c.batch for c in cells if c.kind == 'decode'})
  for i, batch in enumerate(sizes):
    of = sorted((c.context / batch, c.seconds) for c in cells
                if c.kind == 'decode' and c.batch == batch)
    _fitted(axis, i, [(n, 1e3 * s) for n, s in of], [
        (x, 1e3 * model.decode_s(batch, batch * x))
        for x in np.linspace(of[0][0], of[-1][0], 50).tolist()],
            f'{batch} row{"s" * (batch > 1)}')
  axis.set(title='decode', xlabel='context of a row, tokens')
  axis.set_ylim(bottom=0)
  _legend(axis)


def _draw_errors(axis, model, cells):
  for i, (kind, error) in enumerate(fitting.residuals(model, cells).items()):
    of = [c for c in cells if c.kind == kind]
    axis.plot([1e3 * c.seconds for c in of],
              [100 * (fitting.predict_s(model, c) / c.seconds - 1) for c in of],
              **pictures.look(i) | {'linestyle': ''}, ms=4,
              label=f'{kind}: mean {error.mape:.1%}, worst {error.worst:.1%}')
  axis.axhline(0, color='0.6', lw=0.8)
  axis.set(title='error of the fit', xlabel='measured ms', ylabel='%',
           xscale='log')
  axis.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
  axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
  axis.xaxis.set_minor_formatter(NullFormatter())
  _legend(axis)


def write(out: str | pathlib.Path, profile: profiles.Profile,
          cells: Mapping[Plan, Sequence[fitting.Cell]],
          options: Mapping[str, Any]) -> tuple[str, str, str]:
  """Writes the three files; returns their names, the profile's first.

  options: a dict, see cli.asked.
  """
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  slug = '-'.join(re.sub('[^a-z0-9.]+', '-', x.lower()).strip('-')
                  for x in (profile.device, profile.model))
  names = f'latency-{slug}.json', f'cells-{slug}.jsonl', f'latency-{slug}.png'
  provenance.save_json(out / names[0], profiles.as_json(profile), options)
  with open(out / names[1], 'w', encoding='utf-8') as file:
    for plan, measured in cells.items():
      for c in measured:
        file.write(json.dumps({'plan': str(plan), 'kind': c.kind}
                              | c._asdict() | {'fitted_s': fitting.predict_s(
                                  profile.latencies[plan], c)}) + '\n')
  draw(out / names[2], profile, cells)
  return names


def parse_plans(texts: Sequence[str], field: str = '--plans'
                ) -> tuple[Plan, ...]:
  """Plans of 'TPxPP' texts. Raises InputError."""
  plans = tuple(Plan.parse(text, field) for text in texts)
  require(len(set(plans)) == len(plans), field, texts,
          'different ones')
  return plans


def reporter(bar: Progress, halt: Callable[[], object]
             ) -> Callable[[int, int, str], None]:
  """What profiling reports to: a task of a rich Progress for each part.

  halt: raises KeyboardInterrupt to stop.
  """
  tasks, tell = {}, terminal.now_and_then(bar.console)

  def report(done, total, what):
    halt()
    begins = what not in tasks
    if begins:
      tasks[what] = bar.add_task(what, total=total)
    bar.update(tasks[what], completed=done)
    tell(f'{what}: {done} of {total}', begins)
  return report


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Measures, or reads, then shows and writes."""
  require(options.out, '--out', options.out, 'a folder')
  name, path = pathlib.Path(options.model).name, getattr(options, 'from')
  if options.placement:
    require(path and not path.startswith(operators.START), '--from', path,
            'a file of requests, with --placement')
    return served.run(options, console, path, stored(options),
                      cli.asked(options, FLAGS))
  if path:
    require(not options.predict, '--predict', options.predict,
            'left out with --from')
    if path.startswith(operators.START):
      profile, cells = sum_operators(options, console,
                                     path.removeprefix(operators.START))
    else:
      weight, kv = stored(options)
      profile, cells = fit_file(path, name, options.hardware or 'own')
      profile = dataclasses.replace(profile, bytes_per_weight=weight,
                                    bytes_per_kv=kv)
      for plan, model in profile.latencies.items():
        console.print(f'plan {plan}')
        warn_of_few(console, plan, cells[plan])
        show_errors(console, model, cells[plan])
    terminal.written(console, options.out, *write(
        options.out, profile, cells, cli.asked(options, FLAGS)))
    return 0
  tpot_s = options.tpot_s
  require(math.isfinite(tpot_s) and tpot_s > 0, '--tpot_s', tpot_s,
          'seconds above 0')
  config = configs.override(profiling.ENGINE, options.set)
  plans = parse_plans(options.plans)
  further = parse_plans(options.predict, '--predict') if options.predict else ()
  require(options.hardware or not further, '--predict', options.predict,
          'given with --hardware')
  cluster = cli.cluster_of(options)
  console.print(f'Loading {name}')
  cli.prepare(2 * max(plan.num_devices for plan in plans),
              options.compilation_cache, max(plan.tp for plan in plans))
  loaded = dsjax.load(options.model, config.dtype, weights=cluster is None)
  others = machine.Others()
  with terminal.Interrupts() as interrupts, Progress(
      TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
      console=console, transient=True) as bar:
    profile, cells = profiling.measure(
        loaded, plans, config, options.rounds, options.points,
        reporter(bar, interrupts.halt), name, cluster=cluster)
  show(console, profile, cells, tpot_s, config, loaded.config)
  if options.hardware:
    fitted = fit_roofline(cells, config, loaded.config, options.hardware)
    show_roofline(console, fitted, cells)
    if further:
      profile = predict(profile, cells, fitted, further)
  busy = others.cores()
  if busy is not None and busy > 0.2:
    console.print(f'Other programs used {busy:.1f} cores meanwhile: these '
                  'times are too long.', style='yellow')
  terminal.written(console, options.out, *write(
      options.out, profile, cells, cli.asked(options, FLAGS)))
  if interrupts.seen:
    console.print(f'Stopped by Ctrl-C: {len(cells)} of {len(plans)} plans, '
                  f'{len(profile.links)} links; the rest was not timed.')
  return 130 if interrupts.seen else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, profiling.ENGINE)
