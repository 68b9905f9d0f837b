"""The child of experiments.aot: the steps of a model, compiled for a GPU.

  python -m experiments.aot.steps MODEL GPU START DUMP    (see experiments.aot)

Prints a line of JSON a step, from number START on. XLA must dump PTX to the
folder DUMP, and so must Mosaic: see compiled.environment.
"""

import importlib.metadata
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan
from dsjax.kernels import compiled
from experiments.aot import report as aot_report


class Setup(NamedTuple):
  """Plans of both sides on one machine of 8 GPUs, and pages an instance."""

  prefill: Plan
  decode: Plan
  num_pages: int


# OPT's are the paper's placements (section 6.2); tp differs in all of them.
SETUPS = {'llama-3-8b': Setup(Plan(2), Plan(4), 4096),
          'llama-3-70b': Setup(Plan(2, 2), Plan(4), 4096),
          'opt-13b': Setup(Plan(2), Plan(1), 3072),
          'opt-66b': Setup(Plan(4), Plan(2, 2), 4096)}
GPUS = {'h100': 'H100', 'a100': 'A100'}  # as compiled.GPUS has them
SIZES = {'prefill': (2048, 128), 'decode': (64, 8)}  # full depth, then SHORT
SHORT = 2  # layers a stage
PAGES = 64  # of a migration's largest copy


class Step(NamedTuple):
  """A program: a jitted function and abstract arguments.

  cache: the KV that it updates in place, None if it does not. layers: of it.
  """

  name: str
  mesh: Any
  fn: Any
  args: tuple
  cache: Any = None
  layers: int = 0


def names(model: str) -> list[str]:
  """The names of a model's steps, in order."""
  steps = []
  for role in ('prefill', 'decode'):
    pp = getattr(SETUPS[model], role).pp
    for stage in range(pp):
      of = f' stage {stage}' if pp > 1 else ''
      steps += [f'{role} {size}{of}' for size in SIZES[role]]
      steps += ([f'pack {PAGES}{of}', f'pack to int8{of}']
                if role == 'prefill' else [f'unpack {PAGES}{of}'])
  return [*steps, 'pieces']


def steps(model: str, gpu: str) -> Iterator[Step]:
  """The Steps of a model on a described GPU."""
  import jax
  import numpy as np

  from dsjax.config import zoo
  from dsjax.model import sharding
  devices = compiled.devices(GPUS[gpu], 8)
  config, setup, sides = zoo.config(model), SETUPS[model], {}
  for role in ('prefill', 'decode'):
    plan = getattr(setup, role)
    meshes = [jax.sharding.Mesh(np.array([
        devices.pop(0) for _ in range(plan.tp)]), (sharding.AXIS,))
        for _ in range(plan.pp)]
    sides[role] = sharding.cut(config, plan.tp), sharding.spans(
        config.num_layers, plan.pp), meshes
    for stage in range(plan.pp):
      yield from stage_steps(config, meshes, role, stage, setup.num_pages)
  yield from pieces(sides['prefill'], sides['decode'])


def stage_steps(config: ModelConfig, meshes: Sequence[Any], role: str,
                stage: int, num_pages: int) -> Iterator[Step]:
  """The Steps of one stage of an instance, as `names` has them."""
  import dataclasses

  import jax

  from dsjax.runtime import steps
  of = f' stage {stage}' if len(meshes) > 1 else ''
  short = dataclasses.replace(config, num_layers=SHORT * len(meshes))
  largest: Any = None  # the shapes of `config`, and its cache
  cache: Any = None
  for model, size in zip((config, short), SIZES[role], strict=True):
    asked = EngineConfig(
        max_len=2048, num_pages=num_pages, transfer_pages=PAGES,
        dtype='bfloat16', max_seqs=size if role == 'decode' else 64,
        prefill_tokens=size if role == 'prefill' else 2048)
    limits = asked.instance(role, len(meshes))
    shapes = steps.stage_shapes(model, meshes, role, asked, limits)[stage]
    (fn, args), = steps.abstract_steps(shapes, limits)
    yield Step(f'{role} {size}{of}', shapes.mesh, fn, args, args[1],
               len(range(*shapes.span)))
    if model is config:
      largest, cache = shapes, args[1]
  shapes, layers = largest, len(range(*largest.span))
  ids = jax.ShapeDtypeStruct((PAGES,), 'int32')
  if role == 'prefill':
    for name, to in ((f'pack {PAGES}', (None, None)),
                     ('pack to int8', (2 * shapes.page_size, 'int8'))):
      yield Step(name + of, shapes.mesh, steps.make_step(shapes, 'gather', to),
                 (cache, ids), layers=layers)
    return
  pages = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (x.shape[0], PAGES, *x.shape[2:]), x.dtype, sharding=x.sharding), cache)
  yield Step(f'unpack {PAGES}{of}', shapes.mesh,
             steps.make_step(shapes, 'scatter'), (cache, ids, pages), cache,
             layers)


def pieces(source: tuple[Any, ...], target: tuple[Any, ...]
           ) -> Iterator[Step]:
  """One Step: all cuts and joins of heads that a migration does."""
  import jax

  from dsjax.model import sharding
  from dsjax.runtime import migration
  each = [len(side[0].kv_heads) // side[0].tp for side in (source, target)]
  mesh = jax.sharding.Mesh(source[2][0].devices.flat[:1], (sharding.AXIS,))
  page = 16, source[0].model.head_dim

  def heads(count):
    return jax.ShapeDtypeStruct((count, PAGES, *page), 'bfloat16',
                                sharding=sharding.replicated(mesh))

  plan = migration.plan_pieces(*source[:2], *target[:2])
  cuts = sorted({p.places for p in plan if len(p.places) < each[0]})
  joins = set()
  for stage, shard in {p.target for p in plan}:
    first = target[1][stage][0]
    parts = tuple(len(p.places) for p in plan
                  if p.target == (stage, shard)
                  and p.layers[0] <= first < p.layers[1])
    if parts != (each[1],):
      joins.add(parts)

  def pieces(whole, parts):
    return ([migration._take(whole, places) for places in cuts],
            [migration._join(x, each[1] - sum(x_.shape[0] for x_ in x))
             for x in parts])

  yield Step('pieces', mesh, jax.jit(pieces), (
      heads(each[0]), [[heads(n) for n in parts] for parts in sorted(joins)]))


def compile_step(step: Step, gpu: str, dump: str) -> dict[str, Any]:
  """What a Step is made of."""
  import jax
  lowered, made, kernels = compiled.compile_step(
      dump, step.fn, step.args, step.mesh)
  text, memory = made.as_text(), made.memory_analysis()
  cache = jax.tree.leaves(step.cache)
  donated = [x for x, info in zip(jax.tree.leaves(step.args),
                                  jax.tree.leaves(lowered.args_info),
                                  strict=True) if info.donated]
  least = min((_size(x) for x in cache if x.ndim == 4), default=0)
  return dict(
      layers=step.layers, tp=step.mesh.size,
      calls=len(re.findall('custom_call_target="(?:__gpu[$]xla.gpu.triton|'
                           'mosaic_gpu_v2)"', text)),
      collectives=aot_report.collectives(text),
      copies=aot_report.copies(text, least) if least else 0,
      kv_bytes=sum(_size(x) * x.dtype.itemsize for x in cache),
      donated_bytes=sum(_size(x) * x.dtype.itemsize for x in donated),
      alias_bytes=memory.alias_size_in_bytes,
      peak_bytes=memory.peak_memory_in_bytes, **aot_report.kernels(kernels))


def _size(x):
  return math.prod(x.sharding.shard_shape(x.shape))


def versions() -> dict[str, str]:
  """What a golden table holds for."""
  return {name: importlib.metadata.version(name)
          for name in ('jax', 'nvidia-cuda-nvcc')}


def main(model: str, gpu: str, start: str, dump: str) -> None:
  for step, name in list(zip(steps(model, gpu), names(model),
                             strict=True))[int(start):]:
    if step.name != name:
      raise RuntimeError(f'step {step.name}, not {name}')
    row = dict(gpu=gpu, model=model, step=name)
    print(json.dumps(row | compile_step(step, gpu, dump)), flush=True)


if __name__ == '__main__':
  if len(sys.argv) != 5:
    sys.exit(__doc__)
  main(*sys.argv[1:])
