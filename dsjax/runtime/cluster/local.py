"""Every instance a process of this host: what each is given, and its start."""

import contextlib
import dataclasses
import glob
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError, naming, require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.runtime.cluster import messages
from dsjax.runtime.cluster.channel import Channel, Door
from dsjax.runtime.cluster.handoff import LOOK_S
from dsjax.runtime.cluster.instance import KEY
from dsjax.runtime.cluster.remote import RemoteEngine
from dsjax.runtime.migration import hands_off
from dsjax.runtime.protocols import Engine, MakeEngine

# Settings of this process's jax that instances have too.
SHARED = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs',
          'persistent_cache_min_entry_size_bytes',
          'persistent_cache_enable_xla_caches', 'platforms',
          'default_matmul_precision', 'numpy_rank_promotion')
# Fields of an EngineConfig that processes do not know yet.
NOT_YET = ('stream_', 'host_')


class LocalProcess:
  """A process of this host: a remote.Process."""

  def __init__(self, index: int, incarnation: int, env: dict[str, str],
               cores: Sequence[int]) -> None:
    """cores: those that it may run on; (): any."""
    self._door = Door(index, incarnation)
    self._popen = subprocess.Popen(
        [sys.executable, '-m', 'dsjax.runtime.cluster.instance',
         self._door.address, str(index), str(incarnation)],
        env=env | {KEY: self._door.key.hex()}, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True)  # a Ctrl-C is the server's
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
  def pid(self) -> int:
    return self._popen.pid

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


def build(model: Model, placement: Placement, config: EngineConfig,
          make_engine: MakeEngine, fetches: bool) -> list[Engine]:
  """An engine an instance, each a process that has built its own.

  Args:
    make_engine: what each makes its engine with: of a module, by name.
    fetches: see Policy.

  Raises:
    InputError: the placement or the config cannot be served, or the model
      cannot be made again by another process.
    RuntimeError: a process ended or is silent.
  """
  for name in [field.name for field in dataclasses.fields(config)]:
    default = getattr(EngineConfig, name)
    require(not name.startswith(NOT_YET) or getattr(config, name) == default,
            f'EngineConfig.{name}', getattr(config, name),
            f"{default} with cluster='local': it is not there yet")
  require(not any(plan.kind for _, plan in placement.instances), 'Plan.kind',
          placement, "'': devices of one kind serve")
  if model.recipe is None:
    raise InputError(f"model={model.config.name!r}: must be what dsjax.load "
                     "gave, without a family, with cluster='local': each "
                     'process loads it again')
  recipe = model.recipe._asdict()
  if model.recipe.config is not None:
    recipe['config'] = dataclasses.asdict(model.recipe.config)
  name = getattr(make_engine, '__qualname__', '.')
  require(name.isidentifier() and make_engine.__module__ != '__main__',
          'make_engine', make_engine, "a class or function of a module that "
          "others can import, with cluster='local'")
  capacities = [config.instance(role, plan.pp)
                for role, plan in placement.instances]
  moves = [any(hands_off(a, b, fetches) or hands_off(b, a, fetches)
               for j, b in enumerate(capacities) if j != i)
           for i, a in enumerate(capacities)]
  engines: list[RemoteEngine] = []
  try:
    for index, ((role, plan), env, cores) in enumerate(zip(
        placement.instances, environments(placement),
        split_cores(placement), strict=True)):
      fields = {'recipe': recipe, 'role': role,
                'plan': dataclasses.asdict(plan), 'moves': moves[index],
                'config': dataclasses.asdict(config), 'capacity': None,
                'engine': f'{make_engine.__module__}:{name}'}
      engines.append(RemoteEngine(
          index, config, fields,
          lambda incarnation, index=index, env=env, cores=cores: LocalProcess(
              index, incarnation, env, cores)))
    _await_built(engines)
    _introduce(engines, placement, fetches)
  except BaseException:
    for engine in engines:
      engine.close()
    raise
  return list(engines)


def _await_built(engines: Sequence[RemoteEngine]) -> None:
  """Waits until each has loaded its weights."""
  for engine in engines:
    with saying(engine):
      while not engine.is_built:
        engine.check()
        time.sleep(LOOK_S)


@contextlib.contextmanager
def saying(engine: RemoteEngine) -> Any:
  """An error from inside says which instance it is about."""
  what = f'instance {engine.index} ({engine.role})'
  try:
    with naming(what):
      yield
  except RuntimeError as error:
    raise RuntimeError(f'{what} did not start: {error}') from error


def _introduce(engines: Sequence[RemoteEngine], placement: Placement,
               fetches: bool) -> None:
  """Says to each who its peers are. The first of each shape begins to compile
  at once, the others when it is their turn, and find it in the cache."""
  known = {str(engine.index): {
      'capacity': dataclasses.asdict(engine.capacity), 'tp': plan.tp}
           for engine, (_, plan) in zip(engines, placement.instances,
                                        strict=True)}
  shapes = set()
  for engine, (_, plan) in zip(engines, placement.instances, strict=True):
    others = [other for other in engines if other is not engine]
    engine.peers = messages.Warm(
        {str(other.index): known[str(other.index)] for other in others
         if hands_off(other.capacity, engine.capacity, fetches)},
        {str(other.index): known[str(other.index)] for other in others
         if hands_off(engine.capacity, other.capacity, fetches)})
    if (engine.capacity, plan) not in shapes:
      shapes.add((engine.capacity, plan))
      engine.begin_warm()


def environments(placement: Placement) -> list[dict[str, str]]:
  """The environment of each instance's process: its devices, and jax as it is
  set here.

  Raises:
    InputError: more GPUs are asked for than there are.
  """
  shared = dict(os.environ)
  shared['PYTHONPATH'] = os.pathsep.join(
      path or os.getcwd() for path in sys.path)
  shared['XLA_FLAGS'] = re.sub(
      r'--xla_force_host_platform_device_count=\d+', '',
      shared.get('XLA_FLAGS', ''))
  for name in SHARED:
    value = jax.config.values.get(f'jax_{name}')
    if value is not None:
      shared[f'JAX_{name.upper()}'] = str(value)
  gpus = visible_gpus()
  require(gpus is None or placement.num_devices <= len(gpus), 'Placement',
          f'{placement.num_devices} devices',
          f'at most the {len(gpus or ())} that exist')
  environments, taken = [], 0
  for _, plan in placement.instances:
    count = plan.num_devices
    own = ({'JAX_NUM_CPU_DEVICES': str(count)} if gpus is None else
           {'CUDA_VISIBLE_DEVICES': ','.join(gpus[taken:taken + count])})
    environments.append(shared | own)
    taken += count
  return environments


def visible_gpus() -> list[str] | None:
  """Names of the GPUs that jax would use; None: it would use the CPU.

  Asked without starting jax, which would take their memory.
  """
  if (jax.config.values['jax_platforms'] or '').startswith('cpu'):
    return None
  listed = os.environ.get('CUDA_VISIBLE_DEVICES')
  if listed is not None:
    return [name for name in listed.split(',') if name] or None
  there = [path for path in glob.glob('/dev/nvidia*')
           if re.fullmatch(r'/dev/nvidia\d+', path)]
  return [str(i) for i in range(len(there))] or None


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
