"""Whether the results of what was dispatched are there, or are lost."""

from typing import Any

import jax

from dsjax.runtime.protocols import Pending


def is_ready(array: Pending) -> bool:
  """Whether the array's value is there.

  Raises:
    RuntimeError: its buffer was deleted (jax 0.10's own is_ready would end
      the process).
  """
  if array.is_deleted():
    raise RuntimeError(f'a buffer of {array.size} numbers was deleted')
  return array.is_ready()


def is_sound(tree: Any) -> bool:
  """Whether no array of a tree was deleted, or is the result of a failure."""
  arrays = jax.tree.leaves(tree)
  if any(x.is_deleted() for x in arrays):
    return False
  try:  # returns at once: those that are ready
    jax.block_until_ready([x for x in arrays if x.is_ready()])
  except RuntimeError:
    return False
  return True
