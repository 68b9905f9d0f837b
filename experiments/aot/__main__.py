"""Compiles production steps for H100 and A100 meshes on a machine without.

  make aot        (an environment with XLA's CUDA plugin and NVIDIA's ptxas)

Both sides of a disaggregated server of four published models, on sub-meshes
of a described machine of 8 GPUs, with the kernels that each GPU gets
(attention: Mosaic's on H100, Triton's on A100), down to machine code, for
every pipeline stage: the largest prefill and decode step at full depth, a
small bucket of each with 2 layers a stage, and the migration's pack (also
into int8 pages of another size), pieces and unpack. KV write is a kernel of
both steps. Children do the work, one a model and GPU: what crashes is a row
that says so, and another child goes on after it.

The table says, for each step: its layers; calls of our kernels; collectives
(as written: a loop's count once); peak memory and its share of the device;
the part of the KV cache that is updated in place; copies of an array as large
as a layer's keys; and of each kernel its grid, threads, registers, shared
memory of a program, and spilled bytes, as `ptxas -v` says of every kernel of
the step. What must hold: peak below 0.9 of the device, everything donated is
used in place, no copy, our kernels there and without spills. (XLA's own sort
spills a few bytes; --xla_gpu_fail_ptx_compilation_on_register_spilling would
refuse the whole step for it.) All must equal tests/goldens/aot.json too, bytes
within 5 %, if jax and ptxas are the versions it was made with. --update
writes it.

What this does not show: times, numerics of tensor cores, the tiles of matrix
products that XLA would choose with a GPU at hand.

Exit codes: see experiments.common.cli.
"""

import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from dsjax.config.checks import InputError, require
from dsjax.kernels import compiled
from experiments.aot import report as aot_report
from experiments.aot import steps as aot_steps
from experiments.common import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 300  # of one step


def environment(dump: str) -> dict[str, str]:
  """What a child runs in. XLA and Mosaic write each kernel's PTX to `dump`."""
  return os.environ | compiled.environment(dump) | {
      'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}


def child(model: str, gpu: str, start: int,
          running: list[subprocess.Popen[str]],
          command: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
  """Rows of a model's steps from number `start` on, as they come.

  Ends early if the child does; raises RuntimeError with the last line that it
  said. running: a list that holds the process while it runs.
  """
  with tempfile.TemporaryDirectory() as dump:
    said = pathlib.Path(dump) / 'stderr'
    with said.open('w') as stderr, subprocess.Popen(
        command or [sys.executable, '-m', 'experiments.aot.steps', model, gpu,
                    str(start), dump],
        cwd=ROOT, env=environment(dump), stdout=subprocess.PIPE,
        stderr=stderr, text=True) as process:
      running.append(process)
      late = threading.Event()

      def stop():
        late.set()
        process.kill()

      timer = threading.Timer(LIMIT_S, stop)
      timer.start()
      assert process.stdout  # a pipe
      for line in process.stdout:
        timer.cancel()
        timer = threading.Timer(LIMIT_S, stop)
        timer.start()
        if line.startswith('{'):
          yield json.loads(line)
      process.wait()
      timer.cancel()
      running.remove(process)
    if process.returncode:
      lines = said.read_text().strip().splitlines() or ['']
      raise RuntimeError(f'took over {LIMIT_S} s' if late.is_set() else
                         f'exit code {process.returncode}: {lines[-1][:300]}')


def compile_all(model: str, gpu: str, running: list[subprocess.Popen[str]],
                report: Callable[[], object],
                command: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """A row of every step of a model; of one that crashes, its error."""
  names, rows = aot_steps.names(model), []
  while len(rows) < len(names) and running is not None:
    try:
      for row in child(model, gpu, len(rows), running, command):
        rows.append(row)
        report()
      if len(rows) < len(names):
        raise RuntimeError('the child ended without a word')
    except RuntimeError as error:
      rows.append(dict(gpu=gpu, model=model, step=names[len(rows)],
                       error=str(error)))
      report()
  return rows


def compile_pairs(console: Console, pairs: Sequence[tuple[str, str]],
                  jobs: int) -> list[dict[str, Any]]:
  """Rows of all (model, gpu), `jobs` children at a time."""
  total, running = sum(len(aot_steps.names(m)) for m, _ in pairs), []
  with Progress(console=console, transient=True) as progress:
    task = progress.add_task('compiling', total=total)
    if not console.is_terminal:
      console.print(f'Compiling {total} steps')
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
      pending = [pool.submit(compile_all, *pair, running,
                             lambda: progress.advance(task))
                 for pair in pairs]
      for done, future in enumerate(
          concurrent.futures.as_completed(pending), 1):
        rows = future.result()
        if not console.is_terminal:
          console.print(f'{done} of {len(pairs)}: {rows[0]["model"]} for '
                        f'{rows[0]["gpu"]}')
      return [row for future in pending for row in future.result()]
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
      for process in list(running):
        with contextlib.suppress(OSError):
          process.kill()


def run(console: Console, pairs: Sequence[tuple[str, str]], jobs: int,
        update: bool) -> int:
  """Compiles for each (model, gpu); prints; the exit code."""
  began = time.perf_counter()
  rows = compile_pairs(console, pairs, jobs)
  versions = aot_steps.versions()
  golden: dict[str, Any] = aot_report.golden()
  if update:
    kept = golden['rows'] if golden['versions'] == versions else []
    golden = dict(versions=versions, rows=aot_report.merge(kept, rows))
    aot_report.save(aot_report.GOLDEN, golden)
  same = golden['versions'] == versions
  console.print(aot_report.tables(rows))
  wrong = aot_report.faults(rows, golden['rows'] if same else None)
  for fault in wrong:
    console.print(fault, style='red', soft_wrap=True)
  if not same:
    console.print(f'no {aot_report.GOLDEN.name} of {versions}: not compared',
                  style='yellow')
  console.print(f'{len(rows)} steps in {time.perf_counter() - began:.0f} s; '
                f'{len(wrong)} faults')
  return 1 if wrong else 0


FLAGS = {
    'models': cli.Flag(list(aot_steps.SETUPS), 'Of these.'),
    'gpus': cli.Flag(list(aot_steps.GPUS), 'Of these.'),
    'jobs': cli.Flag(min(2, os.cpu_count() or 1), 'Children at a time.',
                     low=1),
    'update': cli.Flag(False, 'Write the golden table.'),
}


def main(options: types.SimpleNamespace, console: Console) -> int:
  """Compiles what the flags name; returns the exit code."""
  for name, allowed in (('models', aot_steps.SETUPS),
                        ('gpus', aot_steps.GPUS)):
    asked = getattr(options, name)
    require(asked and set(asked) <= set(allowed), f'--{name}', asked,
            f'of {list(allowed)}')
  try:
    aot_steps.versions()
  except importlib.metadata.PackageNotFoundError as error:
    raise InputError(f'{error.name} is not installed: `make aot` makes an '
                     'environment that has it') from error
  try:
    return run(console, [(model, gpu) for model in options.models
                         for gpu in options.gpus],
               options.jobs, options.update)
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    os._exit(130)  # threads that wait for children are not waited for


if __name__ == '__main__':
  cli.main(main, FLAGS)
