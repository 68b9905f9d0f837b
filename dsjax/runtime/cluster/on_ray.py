"""Instances that Ray places and starts: each an actor, which is the process.

A bundle holds the instances that share a node (Placement.groups): one, or with
an aligned placement of Algorithm 2 those whose KV stays inside it. Ray gives
each its devices (CUDA_VISIBLE_DEVICES). Commands, tokens and KV do not go
through Ray; a restart is a new actor, and where a node has died a new bundle,
as Ray's own restarts take seconds and wait for what is gone.
"""

import importlib
import os
import time
from typing import Any

from dsjax.config.checks import InputError, require
from dsjax.config.placement import Placement
from dsjax.runtime.cluster import begin, instance, ray_address
from dsjax.runtime.cluster.channel import Channel, Door
from dsjax.runtime.cluster.local import settings

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
try:
  ray: Any = importlib.import_module('ray')  # which few have installed
  strategies: Any = importlib.import_module('ray.util.scheduling_strategies')
except ImportError:
  raise InputError("cluster='ray': must be installed: pip install "
                   "'dsjax[cluster]'") from None

# What a device is to Ray: the first of these that a node has.
RESOURCES = ('GPU', 'TPU', 'device', 'CPU')
ROOM_S = 60.0  # until a bundle has its devices
ASK_S = 0.1  # between two questions whether an actor has ended


class Runner:
  """An actor that is the process of an instance."""

  def run(self, address: str, key: bytes, index: int, incarnation: int) -> None:
    """Serves until the server ends it."""
    instance.run(begin.enter(address, key), index, incarnation,
                 ray.util.get_node_ip_address())


class RayProcess:
  """The process of an instance as an actor: a processes.Process."""

  missing = ''

  def __init__(self, index: int, incarnation: int, options: dict[str, Any]
               ) -> None:
    self._door = Door(index, incarnation, ray.util.get_node_ip_address())
    self._asked_s, self._why = 0.0, ''
    self._code: int | None = None
    try:
      self._actor = ray.remote(Runner).options(**options).remote()
      self._end = self._actor.run.remote(
          self._door.address, self._door.key, index, incarnation)
    except BaseException:  # no port is left open
      self._door.close()
      raise

  @property
  def channel(self) -> Channel | None:
    return self._door.channel

  @property
  def failed(self) -> str:
    return self._door.failed or self._why

  @property
  def pid(self) -> int | None:
    return self._door.pid

  @property
  def heard_s(self) -> float | None:
    return self._door.heard_s

  def exit_code(self) -> int | None:
    """1: it ended before it came, as far as Ray was asked lately; None: not so
    (the end of one that has come is the end of its channel)."""
    now_s, awaited = time.monotonic(), self._door.channel is None
    if awaited and self._code is None and now_s - self._asked_s > ASK_S:
      self._asked_s = now_s
      if ray.wait([self._end], timeout=0)[0]:
        self._code = 1
        try:
          ray.get(self._end)
        except Exception as error:  # Ray has many
          self._why = ' '.join(str(error).split())
    return self._code

  def kill(self, wait_s: float = 0.0) -> None:
    """Ends it; wait_s: how long to wait for that, at most."""
    self._door.close()
    ray.kill(self._actor)
    if wait_s:
      ray.wait([self._end], timeout=wait_s)


class RayLauncher:
  """Starts instances in the bundles of a Ray cluster."""

  def __init__(self, placement: Placement, address: str = '') -> None:
    """Connects to Ray, and waits for room.

    Args:
      address: of the cluster; '': the one that this process has joined, or a
        new one of this host.

    Raises:
      InputError: no cluster is there, or no room for what must be in one node.
    """
    self._owns = not ray.is_initialized()
    if self._owns and address:
      try:
        ray.init(address, log_to_driver=False)
      except (ConnectionError, SystemExit) as error:  # Ray exits
        raise ray_address.absent(address, error) from error
    elif self._owns:
      ray.init('local', log_to_driver=False, include_dashboard=False,
               num_cpus=max(os.cpu_count() or 1, placement.num_devices))
    self._plans = [plan for _, plan in placement.instances]
    self._members = placement.groups
    self._of = {index: number for number, members in enumerate(self._members)
                for index in members}
    self._bundles: dict[int, Any] = {}
    try:
      self.resource = self._resource()
      self._check_room()
      for number in range(len(self._members)):
        self._bundles[number] = self._reserve(number)
      until_s = time.monotonic() + ROOM_S
      for number, bundle in self._bundles.items():
        require(bundle.wait(max(0.0, until_s - time.monotonic())), 'Placement',
                placement, f'instances for which Ray has room: bundle {number} '
                f'of {self._size(number)} {self.resource} had none in '
                f'{ROOM_S:g} s')
    except BaseException:
      self.close()
      raise

  def _resource(self) -> str:
    there = [node['Resources'] for node in ray.nodes() if node['Alive']]
    return next(name for name in RESOURCES
                if any(node.get(name) for node in there))

  def _size(self, number: int) -> int:
    return sum(self._plans[index].num_devices
               for index in self._members[number])

  def _check_room(self) -> None:
    """Else Ray would wait for ever."""
    most = max(int(node['Resources'].get(self.resource, 0))
               for node in ray.nodes() if node['Alive'])
    for plan in self._plans:
      require(plan.num_devices <= most, 'Plan', plan, f'of at most the {most} '
              f'{self.resource} of one node: an instance over several hosts is '
              'not there yet')
    for number in range(len(self._members)):
      require(self._size(number) <= most, 'Placement.aligned',
              f'{self._size(number)} devices side by side',
              f'at most the {most} {self.resource} of one node')

  def _reserve(self, number: int) -> Any:
    return ray.util.placement_group(
        [{self.resource: self._size(number)}], strategy='PACK')

  def _bundle(self, number: int) -> Any:
    """Its bundle: a new one where the node of the last has died."""
    bundle = self._bundles[number]
    table = ray.util.placement_group_table(bundle)
    alive = {node['NodeID'] for node in ray.nodes() if node['Alive']}
    nodes = set(table['bundles_to_node_id'].values())
    if table['state'] == 'RESCHEDULING' or not nodes <= alive | {''}:
      ray.util.remove_placement_group(bundle)
      bundle = self._bundles[number] = self._reserve(number)
    return bundle

  def start(self, index: int, incarnation: int) -> RayProcess:
    """The process of an incarnation of an instance."""
    count = self._plans[index].num_devices
    devices = ({'num_gpus': count} if self.resource == 'GPU' else
               {'num_cpus': count} if self.resource == 'CPU' else
               {'resources': {self.resource: count}})
    env = settings()
    if self.resource in ('CPU', 'device'):
      env['JAX_NUM_CPU_DEVICES'] = str(count)
    return RayProcess(index, incarnation, {'num_cpus': 0} | devices | {
        'max_restarts': 0, 'runtime_env': {'env_vars': env},
        'scheduling_strategy': strategies.PlacementGroupSchedulingStrategy(
            self._bundle(self._of[index]), 0)})

  def close(self) -> None:
    """Gives the bundles back, with what runs there."""
    bundles, self._bundles = self._bundles, {}
    for bundle in bundles.values():
      ray.util.remove_placement_group(bundle)
    if self._owns and ray.is_initialized():
      self._owns = False
      ray.shutdown()
