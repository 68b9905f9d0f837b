"""The parameters of stages, as their steps take them."""

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dsjax.checkpoints.orbax_file import Stored
from dsjax.model import products, sharding
from dsjax.runtime.steps import Shapes, abstract


def placing(shapes: Shapes, params: Mapping[str, Any] | Stored
            ) -> Callable[[], dict[str, Any]]:
  """What puts a stage's parameters on its mesh, as often as they are lost.

  CPU devices share them: all stages of this process that are cut alike read
  one copy, which is there as long as one of them keeps this function.
  """
  if shapes.mesh.devices.flat[0].platform != 'cpu':
    return functools.partial(_place, shapes, params)
  key = (id(params), shapes.layout, shapes.span, shapes.dtype, shapes.panels)
  held = _HELD.get(key)
  if held is None:
    held = _HELD[key] = _Held(shapes, params)
  return functools.partial(held.put, shapes)


def _place(shapes: Shapes, params: Mapping[str, Any] | Stored
           ) -> dict[str, Any]:
  cut = shapes.layout, shapes.span, shapes.mesh
  placed = (params.place(*cut) if isinstance(params, Stored) else
            sharding.place_params(*cut, params))
  return (products.packed_tree(placed, shapes.mesh) if shapes.panels
          else placed)


class _Held:
  """Parameters in memory that CPU devices read."""

  def __init__(self, shapes: Shapes, params: Mapping[str, Any] | Stored
               ) -> None:
    self.source = params  # kept: its id is in the key
    self.parts = [sharding.on_host(shapes.mesh, x)
                  for x in jax.tree.leaves(_place(shapes, params))]

  def put(self, shapes: Shapes) -> dict[str, Any]:
    """The tree on a stage's mesh, nothing copied."""
    likes, tree = jax.tree.flatten(abstract(shapes)[0])
    return jax.tree.unflatten(tree, [
        sharding.from_host(like, parts)
        for like, parts in zip(likes, self.parts, strict=True)])


_HELD: weakref.WeakValueDictionary[tuple, _Held] = (
    weakref.WeakValueDictionary())
