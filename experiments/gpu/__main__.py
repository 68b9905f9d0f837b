"""Is it right, does it serve, how fast, tuned, profiled, simulated: on a GPU.

  python -m experiments.gpu --minutes=9 --out=out/gpu
  python -m experiments.gpu --ingest=out/gpu       (afterwards, anywhere)

Parts, in order of worth: right (every kernel natively against its reference,
families against transformers, compute-sanitizer), serve (two instances on the
device, faults), speed (kernels, whole steps, hand-offs against floors), tune
(kernels/tuned.json), measure (a latency profile), simulate (served against
simulated). Each task is a process with its own time limit: what crashes or
hangs costs only itself. --only=PART,... leaves out the others; `simulate`
needs the file of `measure` in --out. On a CPU the same tasks run at tiny
shapes, interpreted, to see that they run.

Files in --out, eight at most: PART.jsonl (a line of JSON a finding, written as
it goes), log.txt (what tasks printed, and the table) and cache.tar.gz (JAX's
compiled programs: --cache=FILE takes them up again).

--ingest reads them: figures in docs/figures, the table in README.md, the
profile in experiments/profiles, tuned configs in kernels/tuned.json.

Exit codes: 0; 1 if a task found a fault or failed; 2 for bad input; 130 when
stopped, by Ctrl-C or SIGTERM, after the table.
"""

import datetime
import io
import pathlib
import shutil
import tempfile
import time
import types
from collections.abc import Collection

from rich.console import Console

from dsjax.config.checks import require
from experiments.common import cli
from experiments.gpu import cache, ingest, report, runner, tasks
from experiments.gpu.lines import Lines

FLAGS = {
    'minutes': cli.Flag(9.0, 'For everything.', low=0.01),
    'out': 'out/gpu',
    'only': cli.Flag([], f'Of {", ".join(tasks.PARTS)}; empty: all.'),
    'cache': cli.Flag('', 'A cache.tar.gz of an earlier run.'),
    'ingest': cli.Flag('', 'Folder that a run wrote: take its results in.'),
}


def stages(only: Collection[str]) -> list[list[tasks.Task]]:
  """The tasks of these parts, stage by stage."""
  kept = [[t for t in stage if not only or t.part in only]
          for stage in tasks.STAGES]
  return [stage for stage in kept if stage]


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Runs the tasks, or takes results in; returns the exit code."""
  for part in options.only:
    require(part in tasks.PARTS, '--only', part, f'of {list(tasks.PARTS)}')
  if options.ingest:
    return ingest.run(pathlib.Path(options.ingest), console)
  if options.cache:
    require(pathlib.Path(options.cache).is_file(), '--cache', options.cache,
            'a file that exists')
  ends_s = time.monotonic() + 60 * options.minutes
  out = pathlib.Path(options.out).resolve()  # tasks run elsewhere
  out.mkdir(parents=True, exist_ok=True)
  console.print('asking JAX which device is here ...')
  machine = tasks.machine()
  tiny = machine['platform'] == 'cpu'
  if tiny:
    console.print('no GPU: every task at tiny shapes, on the CPU')
  folder = pathlib.Path(tempfile.mkdtemp(prefix='dsjax-gpu-'))
  try:
    if options.cache:
      cache.unpack(pathlib.Path(options.cache), folder)
    wanted = stages(options.only)
    if not options.only:
      (out / 'log.txt').unlink(missing_ok=True)
    for part in {t.part for stage in wanted for t in stage}:
      path = out / f'{part}.jsonl'
      path.unlink(missing_ok=True)
      Lines(path, 'run').write('machine', **machine)
    outcomes = runner.run(wanted, out, str(folder), ends_s - time.monotonic(),
                          tiny, console.print)
    cache.pack(folder, out / 'cache.tar.gz')
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  table = report.table(outcomes, 'a CPU, tiny shapes' if tiny
                       else machine['device'])
  text = io.StringIO()
  Console(file=text, width=80).print(table)
  runner.log(out / 'log.txt', f'{text.getvalue()}'
             f'{datetime.datetime.now().isoformat(timespec="seconds")}\n')
  console.print(table)
  if any(o.verdict == 'interrupted' for o in outcomes):
    return 130
  return 0 if all(o.ok for o in outcomes) else 1


if __name__ == '__main__':
  cli.main(run, FLAGS)
