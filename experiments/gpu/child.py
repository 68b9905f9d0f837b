"""How every task of experiments.gpu begins: its flags, its file, its card.

`python -m experiments.gpu.child` prints `machine` as JSON.
"""

import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from experiments.common import cli, provenance
from experiments.gpu.lines import Lines, Target

Item = TypeVar('Item')
FLAGS = {
    'lines': cli.Flag(None, "The part's file.", str),
    'task': cli.Flag(None, 'Its name.', str),
    'seconds': cli.Flag(60.0, 'That it has.', low=1.0),
    'tiny': cli.Flag(False, 'Shapes that a CPU runs in seconds.'),
}


AFTER_S = 15  # its time is up: it ends, also where no runner is left


def main(run: Callable[[Target, Lines], Any]) -> None:
  """Runs a task with what the command line says; what it raises ends it."""
  def start(options, console):
    target = Target(pathlib.Path(options.lines), options.task,
                    options.seconds, options.tiny)
    signal.alarm(round(target.seconds) + AFTER_S)
    if target.tiny:
      cli.prepare(2, None)
    run(target, target.lines())
  cli.main(start, FLAGS)


def machine() -> dict[str, Any]:
  """The device, driver, versions and date that figures belong to."""
  import jax
  import jaxlib
  import numpy as np

  device = jax.devices()[0]
  return provenance.machine() | {
      'platform': jax.default_backend(), 'commit': provenance.commit(),
      'date': datetime.date.today().isoformat(),
      'device': device.device_kind, 'driver': driver(),
      'memory_bytes': (device.memory_stats() or {}).get('bytes_limit'),
      'jaxlib': jaxlib.__version__, 'numpy': np.__version__}


def each(target: Target, lines: Lines, items: Iterable[Item],
         name: Callable[[Item], str], share: float = 0.3
         ) -> Iterator[tuple[str, Item]]:
  """(name, item) of each that the task's lines have not yet, while there is
  time. One that takes more than a share of the time, for a compiler that is
  slow or a kernel that hangs, or that ends this process's CUDA context, costs
  only itself: the task begins anew, with what is left."""
  known, limit_s = {row['what'] for row in lines.read()}, max(
      share * target.seconds, 1)
  for item in items:
    what = name(item)
    if what in known:
      continue
    if lines.late():
      lines.write(what, None, skipped='out of time')
      continue
    timer = threading.Timer(limit_s, _give_up, (target, lines, what, limit_s))
    timer.daemon = True
    timer.start()
    yield what, item
    timer.cancel()
    if is_lost():
      again(target, lines)


def _give_up(target, lines, what, limit_s):
  lines.write(what, False, says=f'no end after {limit_s:.0f} s')
  again(target, lines)


def is_lost() -> bool:
  """Whether an error has ended this process's use of the device."""
  import jax
  try:
    jax.block_until_ready(jax.device_put(0) + 1)
  except jax.errors.JaxRuntimeError:
    return True
  return False


def again(target: Target, lines: Lines) -> None:
  """Begins the task anew, in this process's place, in what time is left."""
  left_s = max(target.seconds - lines.gone_s(), 1)
  kept = [x for x in sys.orig_argv[1:] if not x.startswith('--seconds=')]
  os.execv(sys.executable, [sys.executable, *kept, f'--seconds={left_s}'])


def driver() -> str | None:
  """The version of NVIDIA's driver; None where there is none."""
  try:
    said = subprocess.run(
        ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
        capture_output=True, text=True, timeout=30).stdout.split()
  except (OSError, subprocess.TimeoutExpired):
    return None
  return said[0] if said else None


if __name__ == '__main__':
  print(json.dumps(machine()))
