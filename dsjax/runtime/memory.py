"""How many pages fit beside the weights, the steps and a hand-off."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig, InstanceConfig, with_host
from dsjax.config.model import ModelConfig
from dsjax.runtime.landing import KEPT
from dsjax.runtime.steps import abstract, abstract_steps, stage_shapes
from dsjax.scheduling import page_pool


def _device_bytes(tree: Any) -> int:
  """Bytes of sharded ShapeDtypeStructs on each of their devices."""
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def check_host(host_bytes: int, instances: int) -> None:
  """Raises InputError unless this machine has so much memory for each."""
  has = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  require(host_bytes * instances <= has, 'EngineConfig.host_bytes', host_bytes,
          f'at most {has // instances} bytes, as this machine has {has} for '
          f'{instances} instances')


def size_pages(config: ModelConfig, meshes: Sequence[Mesh], role: str,
               engine_config: EngineConfig) -> InstanceConfig:
  """The InstanceConfig of an instance, with the pages that fit in memory.

  Nothing is allocated; the largest steps are compiled for the temporaries
  that they need, if memory bounds the pages. An instance that hands off, or is
  handed to, has room for the copy of max_len tokens too.

  Raises:
    InputError: it does not fit; says by how many bytes.
  """
  capacity = engine_config.instance(role, len(meshes))
  if engine_config.host_bytes:
    page_bytes = sum(
        x.size * x.dtype.itemsize // shapes.num_pages
        for shapes in stage_shapes(config, meshes, role, engine_config,
                                   capacity)
        for x in jax.tree.leaves(abstract(shapes)[1]))
    capacity = with_host(capacity, engine_config.host_bytes, page_bytes,
                         'EngineConfig')
  budget = engine_config.memory_bytes or _free_bytes(meshes)
  if budget is None:
    return capacity
  least = page_pool.pages_for(engine_config.max_len, capacity.page_size)
  asked = engine_config.num_pages or least
  copied = KEPT * least if capacity.flips or (
      capacity.prefills != capacity.decodes) else 0

  def check(need: int, what: str, stage: int) -> None:
    require(need <= budget, 'EngineConfig.memory_bytes', budget,
            f'{need - budget} bytes more for the {what} of stage {stage} '
            f'of a {role} instance, tp={meshes[0].size}, '
            f'pp={len(meshes)}, of {config.name}')

  fixed, each = [], []
  for i, shapes in enumerate(stage_shapes(config, meshes, role, engine_config,
                                          capacity)):
    params, cache, slots = map(_device_bytes, abstract(shapes))
    each.append(cache // shapes.num_pages)
    fixed.append(params + (slots if shapes.first or shapes.last else 0))
    check(fixed[-1], 'weights', i)
  for i, (weights, page) in enumerate(zip(fixed, each, strict=True)):
    check(weights + asked * page, f'weights and {asked} pages', i)

  def fitted() -> InstanceConfig:  # at most what all sequences can use
    room = min((budget - f) // e for f, e in zip(fixed, each, strict=True))
    room = max(room - copied, asked)  # the last check says if it is too little
    return dataclasses.replace(
        capacity, num_pages=min(room, capacity.num_pages))

  tried = fitted()
  for i, shapes in enumerate(stage_shapes(config, meshes, role, engine_config,
                                          tried)):
    fixed[i] += max(step.lower(*args).compile().memory_analysis()
                    .temp_size_in_bytes for step, args in
                    abstract_steps(shapes, tried))
    check(fixed[i] + (asked + copied) * each[i], 'weights, temporaries and '
          f'{asked + copied} pages'
          + f', {copied} of a hand-off,' * bool(copied), i)
  return fitted()


def _free_bytes(meshes: Sequence[Mesh]) -> int | None:
  """The least free memory of the devices; None where they do not say."""
  stats = [d.memory_stats() for m in meshes for d in m.devices.flat]
  if not all(s and 'bytes_limit' in s for s in stats):
    return None
  return min(s['bytes_limit'] - s['bytes_in_use'] for s in stats)
