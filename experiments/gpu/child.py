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
from collections.abc import Callable
from typing import Any

from experiments.common import cli, provenance
from experiments.gpu.lines import Lines, Target

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


def restart_if_lost(target: Target, lines: Lines) -> None:
  """After an error of the device: where that has ended this process's CUDA
  context, the task begins anew with the time that is left, and must pass over
  what its file has already."""
  import jax
  try:
    jax.block_until_ready(jax.device_put(0) + 1)
  except jax.errors.JaxRuntimeError:
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
