"""What each kernel does, moves and takes, at the shapes of published models.

  python -m kernels.bench [--gpu=A100] [--models=...] [--ops=...] [--tune]

Prints for each op and shape on one device of a tensor-parallel instance: the
operations; the floor of bytes, and the bytes that the kernel's loads and
stores ask for (kernels/work.py counts both from grid, config and lengths);
the programs; and, for a GPU on which the kernel compiles (or that
tests/goldens/aot.json has), registers, shared memory, and how many programs a
core holds at once. "at least" is the roofline: the longer of the operations
and the floor's bytes at the device's peaks.

Where a GPU is present it also times the kernel (the least of 5 means over many
calls in one program), beside jax.nn.dot_product_attention on the same
sequences laid out densely (cuDNN's where it has it) and JAX's own paged
attention kernel.
--tune then looks for faster configs, one field at a time, and writes what it
finds to kernels/tuned.json. Without a GPU it says what it could not measure;
--gpu names the one that is described instead.

Exit codes: 0; 2 for bad input; 130 when stopped, after a table of what there
is.
"""

import ctypes
import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsjax.kernels import cases, compiled, paged, tiles, timing, tuned, work
from dsjax.kernels.cases import MODELS, OPS, Case

# Operations (dense, 16 bits) and bytes a second: NVIDIA's data sheets.
PEAKS = {'A100': (312e12, 2039e9), 'H100': (989e12, 3350e9),
         'H200': (989e12, 4800e9)}
GOLDEN = (pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'goldens'
          / 'aot.json')


def code(case: Case, args: dict[str, Any], config: Any, done: work.Work,
         name: str, dump: str) -> compiled.Kernel | None:
  """The compiled.Kernel of a case, from a compilation or the golden table."""
  kernel = case.kernel
  if compiled.available(name):
    fn = cases.call(case, config)
    made = compiled.compile(name, dump, lambda named: fn(**named), (args,))
    if kernel not in made:
      raise RuntimeError(f'{case.op}, {case.text}: no {kernel} among the '
                         f'kernels that XLA wrote to {dump}: {list(made)}')
    return made[kernel]
  if case.kv == cases.DTYPE and GOLDEN.exists():
    grid = cases.cuda_grid(case, done)
    if case.op == 'prefill':  # an axis follows the number of sequences
      grid[int(case.impl == 'mosaic')] = r'\d+'
    for row in json.loads(GOLDEN.read_text())['rows']:
      made = row['kernels'].get(kernel)
      if (made and (row['gpu'], row['model']) == (name.lower(), case.model)
          and made['threads'] == done.threads
          and re.fullmatch(', '.join(grid), made['grid'])):
        return compiled.Kernel(made['registers'], made['spilled'],
                               done.grid, done.threads, made['shared'])
  return None


def row(case: Case, limits: paged.Device, dump: str, present: bool,
        tuning: bool = False) -> dict[str, Any]:
  """What is known of a case: a dict of columns."""
  args = cases.arguments(case)
  config, shape, check = cases.plan(case, args, limits)
  out = {}
  if present:
    arrays = timing.fill(args)

    def build(config):
      return timing.timed(cases.call(case, config), arrays,
                          cases.UPDATED.get(case.op))

    if tuning:
      config = timing.tune(config, check, build, os.cpu_count() or 1)
      tuned.save(cases.tuned_op(case), shape, config)
    out = dict(seconds=build(config)(), rivals=timing.rivals(case, arrays))
  done = cases.count(case, args, config)
  peak, bandwidth = PEAKS[limits.name]
  out |= dict(case=case, config=config, work=done, least_s=max(
      done.flops / peak, done.floor_bytes / bandwidth), bound='flops' if
      done.flops / peak > done.floor_bytes / bandwidth else 'bytes')
  if kernel := code(case, args, config, done, limits.name, dump):
    out |= dict(kernel=kernel, occupancy=work.occupancy(
        limits, kernel.registers, kernel.threads, kernel.shared))
  return out


COUNTED = ('op', 'as', 'model', 'shape', 'KV', 'GFLOP', 'floor MB', 'moves MB',
           'ratio', 'at least us', 'by', 'config', 'programs', 'regs', 'smem',
           'spills', 'a core', 'warps', 'bound by')
TIMED = ('us', 'GB/s', 'TFLOP/s', 'roofline', 'cuDNN us', 'XLA us',
         'JAX paged us')


def table(rows: Sequence[dict[str, Any]], name: str, present: bool) -> Table:
  """A rich table of rows."""
  out = Table(title=f'Kernels on {"one" if present else "a described"} {name}')
  for column in COUNTED + TIMED * present:
    out.add_column(column, no_wrap=True, justify='left' if column in (
        'op', 'as', 'model', 'shape', 'KV', 'by', 'bound by') else 'right')
  last = None
  for r in rows:
    case, done = r['case'], r['work']
    if last not in (None, case.model):
      out.add_section()
    last = case.model
    lowering = 'Mosaic' if case.impl == 'mosaic' else 'Triton'
    cells = [case.op, lowering, case.model, case.text,
             case.kv.replace('float', 'f'),
             f'{done.flops / 1e9:.2f}', f'{done.floor_bytes / 1e6:.2f}',
             f'{done.moved_bytes / 1e6:.2f}',
             f'{done.moved_bytes / done.floor_bytes:.2f}',
             f'{r["least_s"] * 1e6:.1f}', r['bound'],
             '/'.join(map(str, dataclasses.astuple(r['config']))),
             'x'.join(map(str, done.grid))]
    if kernel := r.get('kernel'):
      fit = r['occupancy']
      cells += [str(kernel.registers), str(kernel.shared), str(kernel.spilled),
                str(fit.programs), f'{fit.share:.0%}', fit.bound]
    else:
      cells += ['-'] * 6
    if present:
      s, other = r['seconds'], r['rivals']
      cells += [f'{s * 1e6:.1f}', f'{done.floor_bytes / s / 1e9:.0f}',
                f'{done.flops / s / 1e12:.1f}', f'{r["least_s"] / s:.0%}']
      cells += [f'{other[n] * 1e6:.1f}' if other.get(n) else '-'
                for n in ('cudnn', 'xla', 'JAX paged')]
    out.add_row(*cells)
  return out


def unmeasured(rows: Sequence[dict[str, Any]], present: bool) -> list[str]:
  """Sentences about the columns that are not there."""
  notes = []
  if not present:
    notes.append('Not measured, for want of a GPU: seconds, GB/s, TFLOP/s, '
                 'share of the roofline, cuDNN, XLA, JAX\'s paged kernel.')
  if missing := sum('kernel' not in r for r in rows):
    notes.append(f'Registers and what follows from them are missing in '
                 f'{missing} of {len(rows)} rows: `make .venv-aot/installed`, '
                 'then .venv-aot/bin/python -m kernels.bench compiles them.')
  return notes


def run(console: Console, name: str, kind: str | None, asked: Sequence[Case],
        tuning: bool = False, dump: str = '') -> int:
  """Prints the table of Cases; the exit code.

  kind: None for a GPU here. dump: see compiled.environment, which is set.
  """
  rows, stopped, limits = [], False, paged.device(kind)
  try:
    for case in track(asked, console=console, transient=True,
                      description='counting' if kind else 'timing'):
      if kind:
        with compiled.described(kind):
          rows.append(row(case, limits, dump, False))
      else:
        rows.append(row(case, limits, dump, True, tuning))
  except KeyboardInterrupt:
    stopped = True
  console.print(table(rows, name, not kind))
  for line in unmeasured(rows, not kind):
    console.print(line, soft_wrap=True)
  return 130 if stopped else 0


def driver() -> bool:
  """Whether NVIDIA's driver is here; JAX's plugin is noisy where it is not."""
  try:
    ctypes.CDLL('libcuda.so.1')
  except OSError:
    return False
  return True


def define_flags() -> flags.FlagValues:
  """Defines this program's flags; absl's FLAGS."""
  flags.DEFINE_string('gpu', None, 'Described, not run: A100 or H100; None for '
                      'the GPU that is here, H100 where there is none.')
  flags.DEFINE_list('models', list(MODELS), 'Of these.')
  flags.DEFINE_list('ops', list(OPS), 'Of these.')
  flags.DEFINE_bool('tune', False, 'Write kernels/tuned.json (needs a GPU).')
  return flags.FLAGS


def check_flags(given: flags.FlagValues) -> tuple[str, str | None]:
  """Raises ValueError naming a flag and what is allowed."""
  for field, allowed in (('models', MODELS), ('ops', OPS)):
    for value in getattr(given, field):
      if value not in allowed:
        raise ValueError(f'--{field}={value}: must be of {list(allowed)}')
  if given.gpu not in (None, *compiled.GPUS):
    raise ValueError(f'--gpu={given.gpu}: must be of {list(compiled.GPUS)}')
  here = given.gpu is None and compiled.is_here()
  if given.tune and not here:
    raise ValueError('--tune: there is no GPU here')
  if not here:
    name = given.gpu or 'H100'
    return name, compiled.GPUS[name][1]
  kind = tiles.device_kind()
  if paged.device().name not in kind:
    raise ValueError(f'the GPU here, {kind}: must be one of '
                     f'{[d.name for d in paged.DEVICES]}')
  return paged.device().name, None


def read_flags(argv: Sequence[str]) -> list[str]:
  """FLAGS of a command line; ends the program with 2 for bad ones."""
  try:
    return FLAGS(argv)
  except flags.Error as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except SystemExit:  # --help, which absl takes for a failure
    sys.exit(0)


def main(_: Sequence[str]) -> None:
  """What `python -m kernels.bench` does."""
  logging.set_verbosity(logging.WARNING)
  if FLAGS.gpu or not driver():
    jax.config.update('jax_platforms', 'cpu')
  with tempfile.TemporaryDirectory() as dump:
    os.environ.update(compiled.environment(dump))
    try:
      name, kind = check_flags(FLAGS)
    except ValueError as error:
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)
    console = Console()
    if not console.is_terminal:
      console.width = 250
    sys.exit(run(console, name, kind, cases.wanted(
        FLAGS.models, FLAGS.ops, kind or tiles.device_kind()), FLAGS.tune,
                 dump))


if __name__ == '__main__':
  FLAGS = define_flags()
  app.run(main, flags_parser=read_flags)
