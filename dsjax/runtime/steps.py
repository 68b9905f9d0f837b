"""The compiled steps of a stage of an instance."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.config.checks import InputError, require
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.model import ModelConfig
from dsjax.kernels import cpu, tiles
from dsjax.model import kv_cache as kv
from dsjax.model import products, sampling, sharding, transformer
from dsjax.scheduling import page_pool


class Shapes(NamedTuple):
  """What the compiled steps of a stage depend on, buckets apart."""

  layout: sharding.Layout
  span: tuple[int, int]
  mesh: Mesh
  num_pages: int
  page_size: int
  num_slots: int
  max_len: int
  dtype: str
  kv_dtype: str
  attention: str
  panels: bool = False  # weights are packed, see products.py

  @property
  def model(self) -> ModelConfig:
    return self.layout.padded

  @property
  def table_width(self) -> int:
    return page_pool.pages_for(self.max_len, self.page_size)

  @property
  def first(self) -> bool:
    return self.span[0] == 0

  @property
  def last(self) -> bool:
    return self.span[1] == self.model.num_layers


@functools.cache
def abstract(shapes: Shapes) -> tuple[Any, Any, Any]:
  """(params, cache, slots) as sharded ShapeDtypeStructs; made once, as every
  bucket asks, and not to be changed."""
  cache = jax.eval_shape(lambda: kv.init(
      shapes.model, shapes.num_pages, shapes.page_size, shapes.kv_dtype,
      shapes.span[1] - shapes.span[0]))
  slots = jax.eval_shape(lambda: sampling.init(
      shapes.num_slots, shapes.max_len, shapes.model.vocab_size))
  whole = sharding.replicated(shapes.mesh)

  def shard(tree, to):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=to), tree)

  params = sharding.abstract_params(shapes.layout, shapes.span, shapes.mesh,
                                    shapes.dtype)
  if shapes.panels:
    params = products.packed_tree(params, shapes.mesh)
  return (params, shard(cache, sharding.kv(shapes.mesh)),
          shard(slots, whole))


def empty_rows(shapes: Shapes, count: int) -> transformer.Rows:
  """An empty decode batch, in numpy."""
  return transformer.Rows(_zeros(count), _zeros(count), _zeros(count, bool),
                          _zeros((count, shapes.table_width)))


def empty_packed(shapes: Shapes, count: int) -> transformer.Packed:
  """An empty prefill batch, in numpy."""
  return transformer.Packed(
      _zeros(count + 1), _zeros(count), _zeros(count), _zeros(count, bool),
      _zeros((count, shapes.table_width)))


def _zeros(shape: int | tuple[int, int], dtype: Any = np.int32) -> Any:
  """In numpy, to be filled; a step gets it as a jax.Array."""
  return np.zeros(shape, dtype)


# By jitted step: the (sequences, rows) that it has run with.
RAN: weakref.WeakKeyDictionary[Callable[..., Any], set[tuple[int, int]]] = (
    weakref.WeakKeyDictionary())


@functools.cache
def make_step(shapes: Shapes, kind: str, size: Any = 0) -> Callable[..., Any]:
  """A jitted step; made once a process for every equal key.

  kind: init; decode; prefill (size: packed tokens; with rows for the chunked
  role); admit; feed; gather (size: the target's page size and dtype);
  scatter; checksum. `Engine.warm` runs it once for every bucket, so that
  nothing compiles while serving.
  """
  _, cache, slots = abstract(shapes)
  kept = jax.tree.map(lambda x: x.sharding, (cache, slots))
  whole, moved = sharding.replicated(shapes.mesh), sharding.kv(shapes.mesh)
  common = dict(impl=shapes.attention, mesh=shapes.mesh, span=shapes.span)
  portable = tiles.portable(shapes.attention)

  def init():
    return (kv.init(shapes.model, shapes.num_pages, shapes.page_size,
                    shapes.kv_dtype, len(range(*shapes.span))),
            sampling.init(shapes.num_slots, shapes.max_len,
                          shapes.model.vocab_size))

  def decode(params, cache, slots, x_BD, rows, need):
    return transformer.decode_step(shapes.model, params, cache, slots, rows,
                                   need, x_BD=x_BD, **common)

  def prefill(params, cache, slots, x_SD, packed, rows, need):
    return transformer.prefill_step(shapes.model, params, cache, slots, packed,
                                    size, need, rows, x_SD=x_SD, **common)

  def feed(slots, slot_R, pos_R, token_R):
    return slots.replace(tokens_ET=slots.tokens_ET.at[slot_R, pos_R].set(
        token_R, mode='drop'))

  heads, every = moved.spec, whole.spec

  def gather(cache, page_m, room_B=None):
    if room_B is not None:
      return cpu.gather(jax.tree.leaves(cache), page_m, room_B)
    return sharding.shard_map(
        shapes.mesh, lambda cache, page_m: kv.gather_pages(
            cache, page_m, *size, impl=portable),
        (heads, every), heads)(cache, page_m)

  def scatter(cache, page_m, pages):
    return sharding.shard_map(
        shapes.mesh, lambda *args: kv.scatter_pages(*args, impl=portable),
        (heads, every, heads), heads)(cache, page_m, pages), page_m + 1

  def checksum(pages, start, stop):
    heads = shapes.layout.kv_heads
    once = [h if h not in heads[:i] else -1 for i, h in enumerate(heads)]
    return kv.checksum(pages, np.array(once), shapes.span[0], start, stop)

  stepped = (*kept, whole, whole) if shapes.last else (kept[0], whole)
  donated = (1, 2) if shapes.last else (1,)  # the first stage keeps its slots
  fn, donate, out = {
      'init': (init, (), kept),
      'decode': (decode, donated, stepped),
      'prefill': (prefill, donated, stepped),
      'admit': (sampling.admit, (0,), kept[1]),
      'feed': (feed, (0,), kept[1]),
      'gather': (gather, (), moved),
      'scatter': (scatter, (0,), (kept[0], whole)),
      'checksum': (checksum, (), whole),
  }[kind]
  return jax.jit(fn, donate_argnums=donate, out_shardings=out)


def seqs_bucket(capacity: InstanceConfig, tokens: int) -> int:
  """Sequences a prefill of this many packed tokens has room for."""
  if tokens == capacity.prefill_tokens:
    return capacity.prefill_seqs  # the largest bucket takes any batch
  return min(capacity.prefill_seqs, max(1, tokens // 16))


def stage_shapes(config: ModelConfig, meshes: Sequence[Mesh], role: str,
                 engine_config: EngineConfig, capacity: InstanceConfig
                 ) -> list[Shapes]:
  """The Shapes of each stage of an instance."""
  layout = sharding.cut(config, meshes[0].size)
  kv_dtype, device = engine_config.kv_dtype_of(role), meshes[0].devices.flat[0]
  attention = _attention(engine_config, layout.padded, device,
                         capacity.page_size, kv_dtype)
  # Also beside XLA's attention, of KV that the CPU's own does not take.
  panels = attention == 'cpu' or engine_config.attention is None and (
      device.platform == 'cpu' and not cpu.lacks())
  return [Shapes(layout, span, mesh, capacity.num_pages, capacity.page_size,
                 engine_config.max_seqs, engine_config.max_len,
                 engine_config.dtype, kv_dtype, attention, panels)
          for span, mesh in zip(sharding.spans(config.num_layers, len(meshes)),
                                meshes, strict=True)]


def _attention(config: EngineConfig, model: ModelConfig, device: jax.Device,
               page_size: int, kv_dtype: str) -> str:
  """The implementation of attention on these devices: see tiles.pick."""
  asked, platform = config.attention, device.platform
  require(asked not in ('pallas', 'mosaic')
          or platform in ('gpu', 'cuda'), 'EngineConfig.attention', asked,
          f"None, 'xla', 'cpu' or 'pallas_interpret' on a {platform}")
  q = jax.ShapeDtypeStruct((1, model.num_heads, model.head_dim), config.dtype)
  k = jax.ShapeDtypeStruct((model.num_kv_heads, 1, page_size, model.head_dim),
                           kv_dtype)
  try:
    return tiles.pick(asked, platform, (q, k), device.device_kind)
  except ValueError as error:
    raise InputError(f'EngineConfig.attention: {error}') from None


def abstract_step(shapes: Shapes, tokens: int, rows: int, sequences: int = 0
                  ) -> tuple[Any, tuple]:
  """(jitted step, abstract arguments) of a bucket.

  Args:
    tokens: packed ones of a prefill that has room for `sequences`; 0: a
      decode step. rows: of a decode step, or of those beside a prefill.
  """
  params, cache, slots = abstract(shapes)
  whole = sharding.replicated(shapes.mesh)

  def put(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        np.shape(x), x.dtype, sharding=whole), tree)

  x = None if shapes.first else put(np.empty(
      (tokens + rows, shapes.model.d_model), shapes.dtype))
  decoded = empty_rows(shapes, rows) if rows else None
  batch = ((empty_packed(shapes, sequences), decoded) if tokens else
           (decoded,))
  args = (params, cache, slots if shapes.first or shapes.last else None, x,
          *put(batch), put(np.int32(0)) if shapes.last else None)
  return make_step(shapes, *(('prefill', tokens) if tokens else
                             ('decode',))), args


def abstract_steps(shapes: Shapes, capacity: InstanceConfig
                   ) -> list[tuple[Any, tuple]]:
  """The largest steps of a stage, each as abstract_step."""
  steps = []
  if capacity.decodes:
    steps.append(abstract_step(shapes, 0, capacity.max_seqs))
  if capacity.prefills:
    steps.append(abstract_step(
        shapes, capacity.prefill_tokens,
        capacity.max_seqs if capacity.mixes else 0, capacity.prefill_seqs))
  return steps
