"""jax.transfer_guard on CPU devices as on a GPU.

To read an array of a CPU is no transfer, so the guard never refuses it there.
"""

from jax._src import array
from jax._src.lib import guard_lib

LEVELS = guard_lib.TransferGuardLevel


def guard_reads():
  """From now on a guard that disallows refuses implicit reads of arrays."""
  kind = array.ArrayImpl
  copy, value = kind.copy_to_host_async, kind._value.fget

  def copy_to_host_async(self):
    _check('copy_to_host_async')
    copy(self)

  def _value(self):
    _check('the value of an array')
    return value(self)

  kind.copy_to_host_async, kind._value = copy_to_host_async, property(_value)


def _check(what):
  here = guard_lib.thread_local_state()
  level = here.device_to_host
  if level is None:
    level = guard_lib.global_state().device_to_host
  if level == LEVELS.DISALLOW_EXPLICIT or (
      level == LEVELS.DISALLOW and not here.explicit_device_get):
    raise RuntimeError(f'Disallowed device-to-host transfer: {what}')
