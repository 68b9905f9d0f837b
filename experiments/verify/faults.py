"""Makes calls of a server's engines go wrong, from outside.

The serving code knows nothing of it: a method of an Engine (or `copy`: the
copies of a hand-off to it) is wrapped, does its harm when it is due, and is
itself again otherwise.
"""

import jax
import numpy as np

COPY = 'copy'
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
  """An array that is not ready until the injector lets go."""

  def __init__(self, injector, array):
    self._injector, self._array, self.size = injector, array, array.size

  def is_ready(self):
    return self._injector.released and self._array.is_ready()

  def is_deleted(self):
    return self._array.is_deleted()

  def __array__(self, *args, **kwargs):
    return np.asarray(self._array)


class Injector:
  """Arms faults in a server's engines; a context manager, which disarms.

  Attributes:
    fired: (instance, method, kind) of those that have happened.
    released: what is stuck may go on, late.
  """

  def __init__(self, server):
    self.server, self.fired, self.released = server, [], False
    self._armed = {}  # (instance, method) -> [[kind, calls left, when]]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.disarm()

  def arm(self, instance, method, kind, nth=1, when=None):
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

  def disarm(self):
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
          self.fired.append((*key, kind))
          return self._harm(key, kind, call, args)
      return call(*args)
    return wrapper

  def _harm(self, key, kind, call, args):
    engine, what = self.server.engines[key[0]], f'{key[1]} of instance {key[0]}'
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
    if kind in ('unreadable', 'stall'):
      spoil = self._spoil_copy if key[1] == COPY else self._spoil_steps
      result = spoil(kind, result)
    return result

  def _spoil_copy(self, kind, transfer):
    if kind == 'stall':
      has_arrived = transfer.has_arrived
      transfer.has_arrived = lambda: self.released and has_arrived()
    else:
      jax.tree.leaves(transfer.moved[0][2])[0].delete()
    return transfer

  def _spoil_steps(self, kind, result):
    outs, marks = result
    if kind == 'unreadable':
      outs[-1].token_R.delete()
    else:
      outs[-1] = outs[-1].replace(token_R=_Stuck(self, outs[-1].token_R))
    return outs, marks
