"""Makes calls of a server's engines go wrong, from outside.

The serving code knows nothing of it: a method of an Engine (or `copy`: the
copies of a hand-off to it) is wrapped, does its harm when it is due, and is
itself again otherwise.

An engine that is a process is made by `engine`, and looks for its orders in a
folder: a file each, named by instance, method and when it was given.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.runtime.cluster import messages
from dsjax.runtime.engine import Engine
from dsjax.runtime.orchestrator import Orchestrator

COPY = 'copy'
FOLDER = 'DSJAX_FAULTS'  # the environment variable that names it
RELEASED, FIRED = 'released', 'fired'
# What may be done to which call.
KINDS = {
    'prefill': ('raise', 'raise after', 'delete', 'delete weights',
                'unreadable', 'stall', 'twice'),
    'decode': ('raise', 'raise after', 'delete', 'delete weights',
               'unreadable', 'stall', 'twice'),
    'admit': ('raise', 'raise after', 'delete'),
    'gather': ('raise', 'delete'),
    'scatter': ('raise', 'raise after', 'delete', 'twice', 'damage'),
    'checksum': ('raise',),
    COPY: ('raise', 'unreadable', 'stall'),
}


class Injected(RuntimeError):
  """A fault that was asked for."""


class _Stuck:
  """An array that is not ready until it is `released`."""

  def __init__(self, released, array):
    self._released, self._array, self.size = released, array, array.size

  def is_ready(self):
    return self._released() and self._array.is_ready()

  def is_deleted(self):
    return self._array.is_deleted()

  def __array__(self, *args, **kwargs):
    return np.asarray(self._array)


def harm(engine: Engine, what: str, kind: str, call: Callable[..., Any],
         args: tuple, released: Callable[[], bool]) -> Any:
  """Calls a method of an engine, wrongly; what: it, in words. released: see
  Injector."""
  if kind == 'raise':
    raise Injected(f'{what} raises')
  if kind == 'damage':
    ids, moved = args
    return call(ids, jax.tree.map(lambda x: jax.device_put(
        np.zeros(x.shape, x.dtype), x.sharding), moved))
  if kind.startswith('delete'):
    for stage in engine.stages:
      lost = stage.params if kind == 'delete weights' else (
          stage.cache, stage.slots)
      for x in jax.tree.leaves(lost):
        x.delete()
  result = call(*args)
  if kind == 'raise after':
    raise Injected(f'{what} raises after it was done')
  if kind == 'twice':
    result = call(*args)
  if kind == 'unreadable':
    result[0][-1].token_R.delete()
  if kind == 'stall':
    last = result[0][-1]
    result[0][-1] = last.replace(token_R=_Stuck(released, last.token_R))
  return result


class Injector:
  """Arms faults in a server's engines; a context manager, which disarms.

  Attributes:
    fired: (instance, method, kind) of those that have happened.
    released: what is stuck may go on, late.
  """

  def __init__(self, server: Orchestrator) -> None:
    self.server, self._fired, self.released = server, [], False
    self._armed = {}  # (instance, method) -> [[kind, calls left, when]]

  @property
  def fired(self) -> list[tuple[int, str, str]]:
    return self._fired

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.disarm()

  def arm(self, instance: int, method: str, kind: str, nth: int = 1,
          when: Callable[..., bool] | None = None) -> None:
    """The nth call of `method` at `instance` from now on goes wrong, once.

    when: instead of once, every call for whose arguments this is true.
    """
    if kind not in KINDS[method]:
      raise ValueError(f'{kind} of {method}: one of {KINDS[method]}')
    key = instance, method
    if key not in self._armed:
      self._armed[key] = []
      for owner, name in self._owners(*key):
        setattr(owner, name, self._wrapped(key, getattr(owner, name)))
    self._armed[key].append([kind, nth, when])

  def disarm(self) -> None:
    """Every call is itself again."""
    for key in self._armed:
      for owner, name in self._owners(*key):
        delattr(owner, name)
    self._armed.clear()

  def _owners(self, instance, method):
    engine = self.server.engines[instance]
    if method != COPY:
      return [(engine, method)]
    return [(route, 'start') for (_, target), route
            in self.server.routes.items() if target is engine]

  def _wrapped(self, key, call):
    def wrapper(*args):
      for fault in list(self._armed[key]):
        kind, left, when = fault
        fault[1] = left - 1
        if when is None and left == 1:
          self._armed[key].remove(fault)
        if when(*args) if when else left == 1:
          self._fired.append((*key, kind))
          return self._harm(key, kind, call, args)
      return call(*args)
    return wrapper

  def _harm(self, key, kind, call, args):
    what = f'{key[1]} of instance {key[0]}'
    if key[1] != COPY or kind == 'raise':
      return harm(self.server.engines[key[0]], what, kind, call, args,
                  lambda: self.released)
    transfer = call(*args)
    if kind == 'stall':
      has_arrived = transfer.has_arrived
      transfer.has_arrived = lambda: self.released and has_arrived()
    else:
      self._spoil(transfer)
    return transfer

  def _spoil(self, transfer):
    """Its copy cannot be read."""
    jax.tree.leaves(transfer.moved[0][1])[0].delete()


# --- engines that are processes ----------------------------------------------


class ProcessInjector(Injector):
  """An Injector for a server whose engines are processes, made by `engine`.

  What is armed is armed for the process that comes next too. Copies go wrong
  at the server.
  """

  def __init__(self, server: Orchestrator) -> None:
    self._folder, self._given = pathlib.Path(os.environ[FOLDER]), 0
    super().__init__(server)
    self._clear('*')

  def _clear(self, pattern):
    for path in self._folder.glob(pattern):
      path.unlink(missing_ok=True)  # it may be fired meanwhile

  @property
  def fired(self) -> list[tuple[int, str, str]]:
    """In the order in which they happened; those of the server first."""
    told = sorted(self._folder.glob(f'{FIRED}.*'),
                  key=lambda path: path.stat().st_mtime_ns)
    return self._fired + [(int(index), method, kind) for index, method, kind
                          in (path.read_text().split('|') for path in told)]

  @property
  def released(self) -> bool:
    return (self._folder / RELEASED).exists()

  @released.setter
  def released(self, value: bool) -> None:
    path = self._folder / RELEASED
    path.touch() if value else path.unlink(missing_ok=True)

  def arm(self, instance: int, method: str, kind: str, nth: int = 1,
          when: Callable[..., bool] | None = None) -> None:
    """As of an Injector; `when` for copies only."""
    if method == COPY:
      super().arm(instance, method, kind, nth, when)
      return
    if when or kind not in KINDS[method]:
      raise ValueError(f'{kind} of {method}, {when}: one of {KINDS[method]}')
    self._given += 1
    _write(self._folder / f'order.{instance}.{method}.{self._given:06}',
           f'{nth}|{kind}')

  def disarm(self) -> None:
    super().disarm()
    self._clear('order.*')

  def _spoil(self, transfer):
    transfer.hear(messages.Broken(0, 'its copy cannot be read'))


def inject(server: Orchestrator) -> Injector:
  """An Injector for the engines of a server."""
  remote = hasattr(server.engines[0], 'pid')
  return (ProcessInjector if remote else Injector)(server)


def orders_in(folder: pathlib.Path) -> None:
  """Servers that are made from now on with `engine` have their orders in this
  folder; an Injector gives them to servers of the last one."""
  os.environ[FOLDER] = str(folder)


def _write(path, text):
  """At once: who reads it never sees a part."""
  whole = path.with_name(f'new.{path.name}')
  whole.write_text(text)
  whole.rename(path)


class Obedient(Engine):
  """has_served: whether it had a request."""

  has_served = False


def engine(model: Model, stages: Sequence[Mesh], role: str,
           config: EngineConfig, capacity: InstanceConfig) -> Engine:
  """The Engine of a process that obeys a ProcessInjector; made there. What it
  compiles before its first request goes right."""
  made = Obedient(model, stages, role, config, capacity)
  index = sys.argv[2]  # as cluster/instance.py is started
  for method in KINDS:
    if method != COPY:
      setattr(made, method, functools.partial(
          _obey, pathlib.Path(os.environ[FOLDER]), index, method, made,
          getattr(made, method)))
  return made


def _obey(folder, index, method, made, call, *args):
  """A call, as it was ordered to be."""
  made.has_served |= method == 'admit'
  if not made.has_served:
    return call(*args)
  for order in sorted(folder.glob(f'order.{index}.{method}.*')):
    left, kind = order.read_text().split('|')
    if left == '1':
      order.unlink()
      _write(folder / f'{FIRED}.{index}.{order.name}',
             f'{index}|{method}|{kind}')
      return harm(made, f'{method} of instance {index}', kind, call, args,
                  (folder / RELEASED).exists)
    _write(order, f'{int(left) - 1}|{kind}')
  return call(*args)
