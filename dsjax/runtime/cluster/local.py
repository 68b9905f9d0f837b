"""Every instance a process of this host: its start, its cores and devices."""

import contextlib
import fcntl
import functools
import glob
import importlib.metadata
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

import jax

from dsjax.config.checks import require
from dsjax.config.placement import Placement, Plan
from dsjax.runtime.cluster import begin
from dsjax.runtime.cluster.channel import LOOPBACK, Channel, Door

# Settings of this process's jax that instances have too.
SHARED = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs',
          'persistent_cache_min_entry_size_bytes',
          'persistent_cache_enable_xla_caches', 'platforms',
          'default_matmul_precision', 'numpy_rank_promotion')


class LocalLauncher:
  """Starts each instance as a process of this host."""

  def __init__(self, placement: Placement) -> None:
    self._given = [
        (env | threads(plan, cores), cores) for env, cores, (_, plan) in zip(
            environments(placement), split_cores(placement),
            placement.instances, strict=True)]

  def start(self, index: int, incarnation: int) -> 'LocalProcess':
    """The process of an incarnation of an instance."""
    return LocalProcess(index, incarnation, *self._given[index])

  def close(self) -> None:
    """Nothing of it is left beside the processes."""


class LocalProcess:
  """A process of this host: a processes.Process."""

  missing = ''

  def __init__(self, index: int, incarnation: int, env: dict[str, str],
               cores: Sequence[int]) -> None:
    """cores: those that it may run on; (): any."""
    self._door, self._began_s = Door(index, incarnation), time.monotonic()
    try:
      self._popen = popen(self._door.address, index, incarnation, LOOPBACK,
                          env | {begin.KEY: self._door.key.hex()})
    except BaseException:  # no port is left open
      self._door.close()
      raise
    if cores:
      with contextlib.suppress(OSError):  # it has ended, which is seen later
        os.sched_setaffinity(self._popen.pid, cores)

  @property
  def channel(self) -> Channel | None:
    return self._door.channel

  @property
  def failed(self) -> str:
    return self._door.failed

  @property
  def pid(self) -> int | None:
    """None once its end was seen: the number may be another's then."""
    return self._popen.pid if self._popen.returncode is None else None

  @property
  def heard_s(self) -> float:
    return self._door.heard_s or self._began_s

  def exit_code(self) -> int | None:
    """None: it runs."""
    return self._popen.poll()

  def kill(self, wait_s: float = 0.0) -> None:
    """Ends it; wait_s: how long to wait for that, at most."""
    self._door.close()
    self._popen.kill()
    if wait_s:
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._popen.wait(wait_s)
    elif self._popen.returncode is None:  # no zombie is left
      threading.Thread(target=self._popen.wait, daemon=True).start()


def popen(address: str, index: int, incarnation: int, host: str,
          env: dict[str, str]) -> subprocess.Popen[bytes]:
  """Starts the process of an instance, which comes to `address` and is reached
  at `host`. It ends with the thread that calls."""
  return _popen([sys.executable, '-P', begin.__file__, address, str(index),
                 str(incarnation), host, str(os.getpid())], env)


def _popen(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
  """Starts a process of a session of its own: a Ctrl-C is the server's."""
  end, held = os.pipe()  # nothing ever goes through it
  try:
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        pass_fds=(end,), start_new_session=True)
    _kill_with(end, process.pid)
    weakref.finalize(process, os.close, held)
  except BaseException:
    os.close(held)
    raise
  finally:
    os.close(end)
  return process


def _kill_with(end: int, pid: int) -> None:
  """Has Linux kill a process that holds this end of a pipe, once nobody holds
  the other: also where it was stopped before its first line."""
  if hasattr(fcntl, 'F_SETSIG'):
    fcntl.fcntl(end, fcntl.F_SETOWN, pid)
    fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(end, fcntl.F_SETFL, os.O_ASYNC)


def jax_settings(names: Sequence[str] = SHARED) -> dict[str, str]:
  """Jax as it is set here, as environment variables."""
  values = {name: jax.config.values.get(f'jax_{name}') for name in names}
  return {f'JAX_{name.upper()}': str(value) for name, value in values.items()
          if value is not None}


def settings() -> dict[str, str]:
  """Environment variables by which a process imports what this one does, and
  has jax as it is set here, but for the number of devices."""
  return {'PYTHONPATH': os.pathsep.join(
      path or os.getcwd() for path in sys.path), 'XLA_FLAGS': re.sub(
          r'--xla_force_host_platform_device_count=\d+', '',
          os.environ.get('XLA_FLAGS', ''))} | jax_settings()


def device_settings(first: int, count: int) -> dict[str, str]:
  """Environment variables that give a process the devices of this host from
  `first` on, and no others.

  Raises:
    InputError: there are not so many GPUs.
  """
  gpus = visible_gpus()
  if gpus is None:
    return {'JAX_NUM_CPU_DEVICES': str(count)}
  require(first + count <= len(gpus), 'Placement', f'{first + count} devices',
          f'at most the {len(gpus)} that exist')
  return {'CUDA_VISIBLE_DEVICES': ','.join(gpus[first:first + count])}


def environments(placement: Placement) -> list[dict[str, str]]:
  """The environment of each instance's process: its devices, and jax as it is
  set here.

  Raises:
    InputError: more GPUs are asked for than there are.
  """
  shared = dict(os.environ) | settings()
  environments, taken = [], 0
  for _, plan in placement.instances:
    environments.append(shared | device_settings(taken, plan.num_devices))
    taken += plan.num_devices
  return environments


def threads(plan: Plan, cores: Sequence[int]) -> dict[str, str]:
  """The environment variable by which an instance of one CPU device has a
  thread a core: more get into each other's way. Several devices wait for each
  other in threads, and keep what they have."""
  return {'NPROC': str(len(cores))} if cores and plan.num_devices == 1 else {}


def visible_gpus() -> list[str] | None:
  """Names of the GPUs that jax would use; None: it would use the CPU.

  Asked without starting jax, which would take their memory.
  """
  if not _has_cuda() or (
      jax.config.values['jax_platforms'] or '').startswith('cpu'):
    return None
  listed = os.environ.get('CUDA_VISIBLE_DEVICES')
  if listed is not None:  # up to the first that is none, such as -1
    return list(itertools.takewhile(
        re.compile(r'\d+|(GPU|MIG)-.+').fullmatch,
        map(str.strip, listed.split(',')))) or None
  there = [path for path in glob.glob('/dev/nvidia*')
           if re.fullmatch(r'/dev/nvidia\d+', path)]
  return [str(i) for i in range(len(there))] or None


@functools.cache
def _has_cuda() -> bool:
  """Whether the jax that is installed can use GPUs."""
  return any('cuda' in plugin.name for plugin in
             importlib.metadata.entry_points(group='jax_plugins'))


def has_own_core(placement: Placement) -> bool:
  """Whether the server has a core that no instance of the placement has: on
  GPUs it need not, and where cores are not known it is taken to."""
  if visible_gpus() is not None or not hasattr(os, 'sched_getaffinity'):
    return True
  taken = sum(map(len, split_cores(placement)))
  return 0 < taken < len(os.sched_getaffinity(0))


def split_cores(placement: Placement) -> list[list[int]]:
  """Cores of each instance on the CPU, none shared: in parts of equal size for
  each device. [] for each where they are too few, or devices are GPUs."""
  plans: list[Plan] = [plan for _, plan in placement.instances]
  cores = (sorted(os.sched_getaffinity(0))
           if hasattr(os, 'sched_getaffinity') else [])
  each = len(cores) // placement.num_devices
  if not each or visible_gpus() is not None:
    return [[] for _ in plans]
  parts, taken = [], 0
  for plan in plans:
    parts.append(cores[taken:taken + each * plan.num_devices])
    taken += each * plan.num_devices
  return parts
