"""What each instance is given to build, wherever its process is started."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError, naming, require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement
from dsjax.runtime.cluster import hosts, local, messages, ray_address
from dsjax.runtime.cluster.handoff import LOOK_S
from dsjax.runtime.cluster.processes import Launcher
from dsjax.runtime.cluster.remote import RemoteEngine
from dsjax.runtime.migration import hands_off
from dsjax.runtime.protocols import Engine, MakeEngine


def check(cluster: Any) -> None:
  """Raises InputError unless this says how instances may be started: None, in
  this process; 'local'; 'ray' or 'ray:ADDRESS', where somebody listens if it is
  HOST:PORT; 'hosts:FILE', a file that says what hosts.read takes."""
  kind, _, rest = (cluster if isinstance(cluster, str) else '').partition(':')
  require(cluster is None or cluster in ('local', 'ray')
          or kind in ('ray', 'hosts') and rest, 'cluster', cluster,
          "None, 'local', 'ray', 'ray:ADDRESS' or 'hosts:FILE'")
  if kind == 'hosts':
    with naming(f'cluster={cluster!r}'):
      hosts.read(rest)
  if kind == 'ray':
    ray_address.check(rest)


def build(model: Model, placement: Placement, config: EngineConfig,
          make_engine: MakeEngine, cluster: str, fetches: bool
          ) -> list[Engine]:
  """An engine an instance, each a process that has built its own.

  Args:
    make_engine: what each makes its engine with: of a module, by name.
    cluster: what starts them, as `check` takes it. fetches: see Policy.

  Raises:
    InputError: the placement or the config cannot be served, or the model
      cannot be made again by another process.
    StartError: a process ended or is silent.
  """
  require(not any(plan.kind for _, plan in placement.instances), 'Plan.kind',
          placement, "'': devices of one kind serve")
  if model.recipe is None:
    raise InputError(f"model={model.config.name!r}: must be what dsjax.load "
                     f'gave, without a family, with cluster={cluster!r}: each '
                     'process loads it again')
  recipe = model.recipe._asdict()
  if model.recipe.config is not None:
    recipe['config'] = dataclasses.asdict(model.recipe.config)
  name = getattr(make_engine, '__qualname__', '.')
  require(name.isidentifier() and make_engine.__module__ != '__main__',
          'make_engine', make_engine, 'a class or function of a module that '
          f'others can import, with cluster={cluster!r}')
  capacities = [config.instance(role, plan.pp)
                for role, plan in placement.instances]
  moves = [any(hands_off(a, b, fetches) or hands_off(b, a, fetches)
               for j, b in enumerate(capacities) if j != i)
           for i, a in enumerate(capacities)]
  engines: list[RemoteEngine] = []
  news = threading.Event()
  launcher = _launcher(cluster, placement, config)
  try:
    for index, (role, plan) in enumerate(placement.instances):
      fields = {'recipe': recipe, 'model': repr(model.config), 'role': role,
                'plan': dataclasses.asdict(plan), 'moves': moves[index],
                'config': dataclasses.asdict(config), 'capacity': None,
                'engine': f'{make_engine.__module__}:{name}'}
      engines.append(RemoteEngine(index, config, fields, launcher, engines,
                                  news))
    for engine in engines:  # all are known by now: an interrupt closes them
      with engine.naming():
        engine.start()
    _await_built(engines)
    _introduce(engines, placement, fetches)
  except BaseException:
    for engine in engines:
      engine.close()
    launcher.close()
    raise
  return list(engines)


def _launcher(cluster: str, placement: Placement, config: EngineConfig
              ) -> Launcher:
  """What starts the processes of a placement."""
  kind, _, rest = cluster.partition(':')
  if kind == 'ray':
    # Where Ray is not installed this is an error of its own.
    from dsjax.runtime.cluster import on_ray
    return on_ray.RayLauncher(placement, rest)
  if kind == 'hosts':
    with naming(f'cluster={cluster!r}'):
      return hosts.HostsLauncher(placement, rest, config.silent_s)
  return local.LocalLauncher(placement)


def _await_built(engines: Sequence[RemoteEngine]) -> None:
  """Waits until each has loaded its weights."""
  for engine in engines:
    with engine.naming():
      while not engine.is_built:
        engine.check()
        time.sleep(LOOK_S)


def _introduce(engines: Sequence[RemoteEngine], placement: Placement,
               fetches: bool) -> None:
  """Says to each who its peers are. The first of each shape begins to compile
  at once, the others when it is their turn, and find it in the cache."""
  known = {str(engine.index): {
      'capacity': dataclasses.asdict(engine.capacity), 'tp': plan.tp,
      'by_kernel': engine.by_kernel, 'memory': engine.memory}
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
      with engine.naming():
        engine.begin_warm()
