"""How every task of experiments.gpu begins: its flags, its file, its card."""

import datetime
import pathlib
import subprocess
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


def main(run: Callable[[Target, Lines], Any]) -> None:
  """Runs a task with what the command line says; what it raises ends it."""
  def start(options, console):
    target = Target(pathlib.Path(options.lines), options.task,
                    options.seconds, options.tiny)
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
      'commit': provenance.commit(), 'date': datetime.date.today().isoformat(),
      'device': device.device_kind, 'driver': driver(),
      'memory_bytes': (device.memory_stats() or {}).get('bytes_limit'),
      'jaxlib': jaxlib.__version__, 'numpy': np.__version__}


def driver() -> str | None:
  """The version of NVIDIA's driver; None where there is none."""
  try:
    said = subprocess.run(
        ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
        capture_output=True, text=True, timeout=30).stdout.split()
  except (OSError, subprocess.TimeoutExpired):
    return None
  return said[0] if said else None
