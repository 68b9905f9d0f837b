"""What is asked of a GPU, in order of worth, and how long each may take.

Tasks of a stage run side by side, since nothing in it is timed. Seconds are
those of a run of 9 minutes; others scale them, and what one leaves over goes
to those after it. Each is a process of its own, and writes its part's file.
"""

import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

from dsjax.config.checks import InputError, require
from experiments.common.cli import ROOT
from experiments.gpu.lines import Target


class Task(NamedTuple):
  """One process. module: run as `python -m`; pytest: its arguments instead."""

  part: str
  name: str
  seconds: float
  module: str = ''
  pytest: tuple[str, ...] = ()
  own: tuple[str, ...] = ()  # a command, in place of both

  def command(self, target: Target) -> list[str]:
    """What is run; told the target by flags, or by `environment`."""
    if self.own:
      return list(self.own)
    if self.pytest:
      workers = 1 if target.tiny else 6
      tiny = ['-k', TINY] if target.tiny else []
      return [sys.executable, '-m', 'pytest', '-q', '--no-header', '-p',
              'no:cacheprovider', '-p', 'experiments.gpu.pytest_lines', '-m',
              'native', '-n', str(workers), *tiny, *self.pytest]
    return [sys.executable, '-m', f'experiments.gpu.{self.module}',
            f'--lines={target.path}', f'--task={target.task}',
            f'--seconds={target.seconds:.0f}',
            f'--tiny={str(target.tiny).lower()}']

  def environment(self, target: Target, cache: str) -> dict[str, str]:
    """What it runs in. cache: folder of compiled programs."""
    made = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': cache, 'PYTHONUNBUFFERED': '1',
        # Else the folder's path, another each time, is part of each key.
        'JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES': 'none',
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0' if target.tiny
        else '0.3',
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',  # tasks share the device
        'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92',
        'TF_CPP_MIN_LOG_LEVEL': '2', 'DSJAX_GPU_LINES': str(target.path),
        'DSJAX_GPU_TASK': target.task,
        'DSJAX_GPU_SECONDS': str(target.seconds)}
    if self.pytest:
      made['JAX_PLATFORMS'] = 'cpu' if target.tiny else 'cuda'
    return made


# Of the kernel tests, those that are run interpreted, on a CPU.
TINY = ('(test_decode_equals_the_reference and 0) '
        'or test_the_kernel_equals_the_reference or gpt2')
STAGES = (
    (Task('right', 'kernels', 140, pytest=('tests/kernels',)),
     Task('right', 'families', 140, pytest=(
        'tests/checkpoints/families_test.py',)),
     Task('right', 'sanitizer', 140, 'sanitizer'),
     Task('right', 'registers', 140, 'registers'),
     Task('serve', 'serve', 140, 'serve')),
    (Task('speed', 'kernels', 70, 'kernel_speed'),),
    (Task('speed', 'steps', 90, 'step_speed'),),
    (Task('tune', 'tune', 70, 'tune'),),
    (Task('measure', 'measure', 70, 'measure'),),
    (Task('simulate', 'simulate', 100, 'simulate'),))
PARTS = tuple(dict.fromkeys(t.part for stage in STAGES for t in stage))


def machine() -> dict[str, Any]:
  """child.machine, asked of a child: a parent would hold the device.

  Raises:
    InputError: JAX does not start, or finds no GPU though a driver is here.
  """
  try:
    asked = subprocess.run(
        [sys.executable, '-m', 'experiments.gpu.child'], cwd=ROOT,
        capture_output=True, text=True, timeout=120)
  except subprocess.TimeoutExpired:
    raise InputError('jax: no answer in two minutes') from None
  says = (asked.stderr.strip().splitlines() or [''])[-1][:500]
  require(asked.returncode == 0, 'jax', says, 'able to start')
  facts = json.loads(asked.stdout.strip().splitlines()[-1])
  require(facts['platform'] != 'cpu' or not facts['driver']
          or os.environ.get('JAX_PLATFORMS') == 'cpu', 'jax', says or 'no GPU',
          f"able to use the GPU here (NVIDIA's driver {facts['driver']})")
  return facts
