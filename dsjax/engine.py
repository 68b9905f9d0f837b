"""One instance: parameters, cache, slots and their compiled steps.

The sole owner of donated buffers. Every operation on an instance consumes the
cache of the one before, so operations run in the order they are given, and a
page may be written by a later one as soon as it has been given.

Under pipeline parallelism an instance is a row of stages, each a mesh with a
run of layers and its own compiled steps. Activations and sampled tokens go
from mesh to mesh by explicit copies, and nothing waits: consecutive commands
overlap in the stages because every dispatch is asynchronous.
"""

import collections
import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax import base, model, pages, sampling, sharding
from dsjax import cache as kv
from dsjax.kernels import tiles
from dsjax.orbax_file import Stored


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

  @property
  def model(self):
    return self.layout.padded

  @property
  def table_width(self):
    return pages.pages_for(self.max_len, self.page_size)

  @property
  def first(self):
    return self.span[0] == 0

  @property
  def last(self):
    return self.span[1] == self.model.num_layers


def _abstract(shapes):
  """(params, cache, slots) as sharded ShapeDtypeStructs."""
  s = shapes
  cache = jax.eval_shape(lambda: kv.init(
      s.model, s.num_pages, s.page_size, s.kv_dtype, s.span[1] - s.span[0]))
  slots = jax.eval_shape(lambda: sampling.init(
      s.num_slots, s.max_len, s.model.vocab_size))

  def shard(tree, to):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=to), tree)

  return (sharding.abstract_params(s.layout, s.span, s.mesh, s.dtype),
          shard(cache, sharding.kv(s.mesh)),
          shard(slots, sharding.whole(s.mesh)))


def _rows(shapes, count):
  """An empty decode batch, in numpy."""
  return model.Rows(np.zeros(count, np.int32), np.zeros(count, np.int32),
                    np.zeros(count, bool),
                    np.zeros((count, shapes.table_width), np.int32))


def _packed(shapes, count):
  """An empty prefill batch, in numpy."""
  return model.Packed(
      np.zeros(count + 1, np.int32), np.zeros(count, np.int32),
      np.zeros(count, np.int32), np.zeros(count, bool),
      np.zeros((count, shapes.table_width), np.int32))


@functools.cache
def make_step(shapes, kind, size=0):
  """A jitted step; made once a process for every equal key.

  kind: init; decode; prefill (size: packed tokens; with rows for the chunked
  role); admit; feed; gather (size: the target's page size and dtype);
  scatter; checksum. `Engine.warm` runs it once for every bucket, so that
  nothing compiles while serving.
  """
  s = shapes
  _, cache, slots = _abstract(s)
  kept = jax.tree.map(lambda x: x.sharding, (cache, slots))
  whole, moved = sharding.whole(s.mesh), sharding.kv(s.mesh)
  common = dict(impl=s.attention, mesh=s.mesh, span=s.span)
  portable = tiles.portable(s.attention)

  def init():
    return (kv.init(s.model, s.num_pages, s.page_size, s.kv_dtype,
                    len(range(*s.span))),
            sampling.init(s.num_slots, s.max_len, s.model.vocab_size))

  def decode(params, cache, slots, x_BD, rows, need):
    return model.decode_step(s.model, params, cache, slots, rows, need,
                             x_BD=x_BD, **common)

  def prefill(params, cache, slots, x_SD, packed, rows, need):
    return model.prefill_step(s.model, params, cache, slots, packed, size,
                              need, rows, x_SD=x_SD, **common)

  def feed(slots, slot_R, pos_R, token_R):
    return slots.replace(tokens_ET=slots.tokens_ET.at[slot_R, pos_R].set(
        token_R, mode='drop'))

  heads, every = moved.spec, whole.spec

  def gather(cache, page_m):
    return sharding.shard_map(
        s.mesh, lambda cache, page_m: kv.gather_pages(
            cache, page_m, *size, impl=portable),
        (heads, every), heads)(cache, page_m)

  def scatter(cache, page_m, pages):
    return sharding.shard_map(
        s.mesh, lambda *args: kv.scatter_pages(*args, impl=portable),
        (heads, every, heads), heads)(cache, page_m, pages), page_m + 1

  def checksum(pages, start, stop):
    heads = s.layout.kv_heads
    once = [h if h not in heads[:i] else -1 for i, h in enumerate(heads)]
    return kv.checksum(pages, np.array(once), s.span[0], start, stop)

  stepped = (*kept, whole, whole) if s.last else (kept[0], whole)
  donated = (1, 2) if s.last else (1,)  # the first stage keeps its slots
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


def _seqs_bucket(limits, tokens):
  """Sequences a prefill of this many packed tokens has room for."""
  if tokens == limits.prefill_tokens:
    return limits.prefill_seqs  # the largest bucket takes any batch
  return min(limits.prefill_seqs, max(1, tokens // 16))


def stage_shapes(config, meshes, role, engine_config, limits):
  """The Shapes of each stage of an instance."""
  c = engine_config
  layout = sharding.cut(config, meshes[0].size)
  kv_dtype = c.kv_dtype_of(role)
  attention = _attention(c, layout.padded, meshes[0].devices.flat[0],
                         limits.page_size, kv_dtype)
  return [Shapes(layout, span, mesh, limits.num_pages, limits.page_size,
                 c.max_seqs, c.max_len, c.dtype, kv_dtype, attention)
          for span, mesh in zip(sharding.spans(config.num_layers, len(meshes)),
                                meshes, strict=True)]


def _attention(config, model, device, page_size, kv_dtype):
  """The implementation of attention on these devices: see tiles.pick."""
  asked, platform = config.attention, device.platform
  base.require(asked not in ('pallas', 'mosaic')
               or platform in ('gpu', 'cuda'), 'EngineConfig.attention', asked,
               f"None, 'xla' or 'pallas_interpret' on a {platform}")
  q = jax.ShapeDtypeStruct((1, model.num_heads, model.head_dim), config.dtype)
  k = jax.ShapeDtypeStruct((model.num_kv_heads, 1, page_size, model.head_dim),
                           kv_dtype)
  try:
    return tiles.pick(asked, platform, (q, k), device.device_kind)
  except ValueError as error:
    raise base.InputError(f'EngineConfig.attention: {error}') from None


def abstract_steps(shapes, limits):
  """The largest steps of a stage: (jitted step, abstract arguments) each."""
  params, cache, slots = _abstract(shapes)
  whole, tokens = sharding.whole(shapes.mesh), limits.prefill_tokens

  def put(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        np.shape(x), x.dtype, sharding=whole), tree)

  def args(count, *batch):
    x = None if shapes.first else put(np.empty(
        (count, shapes.model.d_model), shapes.dtype))
    ends = shapes.first or shapes.last
    return (params, cache, slots if ends else None, x, *put(batch),
            put(np.int32(0)) if shapes.last else None)

  rows = _rows(shapes, limits.max_seqs)
  packed = _packed(shapes, limits.prefill_seqs)
  steps = []
  if limits.role != 'prefill':
    steps.append((make_step(shapes, 'decode'), args(limits.max_seqs, rows)))
  if limits.role != 'decode':
    mixed = rows if limits.role == 'chunked' else None
    count = tokens + (limits.max_seqs if mixed else 0)
    steps.append((make_step(shapes, 'prefill', tokens),
                  args(count, packed, mixed)))
  return steps


def _device_bytes(tree):
  """Bytes of sharded ShapeDtypeStructs on each of their devices."""
  return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))


def fit(config, meshes, role, engine_config):
  """The InstanceConfig of an instance, with the pages that fit in memory.

  Nothing is allocated; the largest steps are compiled for the temporaries
  that they need, if memory bounds the pages.

  Raises:
    InputError: it does not fit; says by how many bytes.
  """
  c = engine_config
  limits = c.instance(role, len(meshes))
  budget = c.memory_bytes or _free_bytes(meshes)
  if budget is None:
    return limits
  least = pages.pages_for(c.max_len, limits.page_size)
  asked = c.num_pages or least

  def check(need, what, stage):
    base.require(need <= budget, 'EngineConfig.memory_bytes', budget,
                 f'{need - budget} bytes more for the {what} of stage {stage} '
                 f'of a {role} instance, tp={meshes[0].size}, '
                 f'pp={len(meshes)}, of {config.name}')

  fixed, each = [], []
  for i, s in enumerate(stage_shapes(config, meshes, role, c, limits)):
    params, cache, slots = map(_device_bytes, _abstract(s))
    each.append(cache // s.num_pages)
    fixed.append(params + (slots if s.first or s.last else 0))
    check(fixed[-1], 'weights', i)
  for i, (weights, page) in enumerate(zip(fixed, each, strict=True)):
    check(weights + asked * page, f'weights and {asked} pages', i)

  def fitted():  # more than every sequence can use would serve nobody
    room = min((budget - f) // e for f, e in zip(fixed, each, strict=True))
    return dataclasses.replace(limits, num_pages=min(room, limits.num_pages))

  tried = fitted()
  for i, s in enumerate(stage_shapes(config, meshes, role, c, tried)):
    fixed[i] += max(step.lower(*args).compile().memory_analysis()
                    .temp_size_in_bytes for step, args in
                    abstract_steps(s, tried))
    check(fixed[i] + asked * each[i],
          f'weights, temporaries and {asked} pages', i)
  return fitted()


def _free_bytes(meshes):
  """The least free memory of the devices; None where they do not say."""
  stats = [d.memory_stats() for m in meshes for d in m.devices.flat]
  if not all(s and 'bytes_limit' in s for s in stats):
    return None
  return min(s['bytes_limit'] - s['bytes_in_use'] for s in stats)


def is_ready(array):
  """The array's value is there.

  Raises:
    RuntimeError: its buffer was deleted (jax 0.10's own is_ready would end
      the process).
  """
  if array.is_deleted():
    raise RuntimeError(f'a buffer of {array.size} numbers was deleted')
  return array.is_ready()


def _is_sound(tree):
  """No array of a tree was deleted, or is the result of what failed."""
  arrays = jax.tree.leaves(tree)
  if any(x.is_deleted() for x in arrays):
    return False
  try:  # returns at once: those that are ready
    jax.block_until_ready([x for x in arrays if x.is_ready()])
  except RuntimeError:
    return False
  return True


class _Stage:
  """Parameters, cache and, at both ends, slots on one mesh."""

  def __init__(self, shapes, params):
    self.shapes, self.whole = shapes, sharding.whole(shapes.mesh)
    place = (params.place if isinstance(params, Stored) else
             functools.partial(sharding.place_params, params=params))
    self._place = functools.partial(place, shapes.layout, shapes.span,
                                    shapes.mesh)
    self.params = self._place()
    self.empty()

  def empty(self):
    """Makes cache and slots anew, and puts weights again that were lost."""
    if not _is_sound(self.params):
      self.params = None  # makes room
      self.params = self._place()
    self.cache, self.slots = self.step(('init',))
    if not (self.shapes.first or self.shapes.last):
      self.slots = None

  def put(self, tree):
    return jax.device_put(tree, self.whole)

  def step(self, kind, *args):
    return make_step(self.shapes, *kind)(*args)


class Engine:
  """The effects of one instance. It makes no choice: commands say it all."""

  def __init__(self, loaded, meshes, role, config, limits=None):
    """Places parameters and an empty cache on the meshes.

    Args:
      loaded: a checkpoint.Model.
      meshes: one a pipeline stage.
      role: what the instance runs (decides which steps it needs).
      config: an EngineConfig.
      limits: what `fit` gave, if it was called.

    Raises:
      InputError: it does not fit in memory, or is of another dtype.
    """
    self.role, self.config = role, config
    self.limits = limits or fit(loaded.config, meshes, role, config)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(loaded.params)}
    base.require(dtypes == {config.dtype}, 'EngineConfig.dtype', config.dtype,
                 f"that of the model's weights, {' and '.join(dtypes)}")
    self.stages = [_Stage(shapes, loaded.params) for shapes in stage_shapes(
        loaded.config, meshes, role, config, self.limits)]
    self.where = (self.stages[0].shapes.layout, tuple(
        s.shapes.span for s in self.stages), tuple(meshes))
    self.shapes, self.last = self.stages[0].shapes, self.stages[-1]
    self._vacate()

  def _vacate(self):
    self.need = [self.last.put(np.int32(n)) for n in range(3)]
    self.slot_of, self.mode_of = {}, {}
    self.spare = list(range(self.config.max_seqs))
    self.fed = collections.deque()  # sampled tokens that stage 0 awaits

  def _seqs_bucket(self, tokens):
    return _seqs_bucket(self.limits, tokens)

  def _mixed_rows(self):
    full = self.config.max_seqs
    return sorted({-(-full // 4), full})

  def shapes_needed(self):
    """(packed tokens, decode rows) of every step this role can run."""
    c, role = self.config, self.role
    tokens = () if role == 'decode' else c.token_buckets(
        self.limits.prefill_tokens)
    rows = () if role == 'prefill' else c.row_buckets
    mixed = self._mixed_rows() if role == 'chunked' else ()
    return ([(size, 0) for size in tokens] + [(0, n) for n in rows]
            + [(size, n) for size in tokens for n in mixed])

  def warm(self):
    """Compiles and runs every step once, on no one; yields each's name."""
    self.admit('nobody', (), 0, base.Sampling())
    self.forget('nobody')
    for tokens, rows in self.shapes_needed():
      packed = _packed(self.shapes, self._seqs_bucket(tokens))
      batch = _rows(self.shapes, rows)
      outs = (self._run('prefill', tokens, (packed, batch if rows else None),
                        (), ())
              if tokens else self._run('decode', 0, (batch,), (), ()))
      self._feed(None)
      jax.block_until_ready((outs, self.stages[0].slots))
      yield ' + '.join([f'prefill {tokens}'] * bool(tokens)
                       + [f'decode {rows}'] * bool(rows))

  # --- faults ---------------------------------------------------------------

  def is_sound(self):
    """Its buffers are there. False: it can do nothing but start again."""
    return all(_is_sound((s.params, s.cache, s.slots)) for s in self.stages)

  def stop(self):
    """Lets go of all it held but weights and compiled steps.

    What is still in flight writes buffers that nobody reads any more.
    """
    for stage in self.stages:
      stage.cache = stage.slots = None
    self.slot_of, self.mode_of, self.spare = {}, {}, []
    self.fed.clear()

  def start(self):
    """Begins anew, empty. Nothing is compiled.

    Weights are put again only where their buffers were lost.

    Raises:
      RuntimeError and the like: the devices refuse.
    """
    for stage in self.stages:
      stage.empty()
    self._vacate()

  # --- requests -------------------------------------------------------------

  def admit(self, id, tokens, prompt_len, params):
    """Gives a request a slot holding its tokens so far."""
    slot = self.spare[-1]
    row = sampling.slot_row(tokens, prompt_len, params, self.shapes.max_len,
                            self.shapes.model.vocab_size)
    for stage in dict.fromkeys((self.stages[0], self.last)):
      stage.slots = stage.step(('admit',), stage.slots,
                               stage.put(np.int32(slot)), stage.put(row))
    self.spare.pop()
    self.slot_of[id], self.mode_of[id] = slot, sampling.mode(params)

  def forget(self, id):
    """Takes the slot back; safe while steps that write it are in flight."""
    if id in self.slot_of:
      self.spare.append(self.slot_of.pop(id))
      del self.mode_of[id]

  # --- steps ----------------------------------------------------------------

  def prefill(self, command):
    """Dispatches a RunPrefill; returns [Sampled] of its one step."""
    chunks, rows = command.chunks, command.rows
    size = self._size(chunks)
    packed = _packed(self.shapes, self._seqs_bucket(size))
    at = 0
    for b, c in enumerate(chunks):
      at += c.stop - c.start
      packed.start_A[b + 1:] = at
      packed.pos_B[b], packed.slot_B[b] = c.start, self.slot_of[c.id]
      packed.sample_B[b] = c.last
      packed.table_BM[b, :len(c.pages)] = c.pages
    batch = None
    if rows:
      count = next(n for n in self._mixed_rows() if n >= len(rows))
      batch = self._batch(rows, command.tick, count)
    ids = [r.id for r in rows] + [c.id for c in chunks if c.last]
    at = [(r, row.id, row.base + command.tick + 1)
          for r, row in enumerate(rows)]
    at += [(b + (batch.pos_B.size if rows else 0), c.id, c.stop)
           for b, c in enumerate(chunks) if c.last]
    self._feed([c.id for c in chunks] + ids)
    return self._run('prefill', size, (packed, batch), ids, at)

  def decode(self, command):
    """Dispatches a RunDecode; returns a Sampled a step, unfinished."""
    rows = command.rows
    count = next(n for n in self.config.row_buckets if n >= len(rows))
    batch = self._batch(rows, command.tick, count)
    ids = [r.id for r in rows]
    self._feed(ids)
    at = [(r, row.id, row.base + command.tick + 1)
          for r, row in enumerate(rows)]
    return self._run('decode', 0, (batch,), ids, at, command.steps)

  def _run(self, kind, size, batch, ids, at, steps=1):
    """Dispatches steps through the stages.

    at: (entry of token_R, id, position) of each token that is sampled.
    """
    batches = [stage.put(batch) for stage in self.stages]
    need, outs, marks = self._need(ids), [], []
    key = (kind, size) if size else (kind,)
    for step in range(steps):
      x = None
      for i, stage in enumerate(self.stages[:-1]):
        stage.cache, x = stage.step(key, stage.params, stage.cache,
                                    stage.slots, x, *batches[i], None)
        x = self.stages[i + 1].put(x)
        marks.append(x)
      last, put = self.last, batches[-1]
      last.cache, last.slots, rows, out = last.step(
          key, last.params, last.cache, last.slots, x, *put, need)
      batches[-1] = (*put[:-1], rows)
      out.token_R.copy_to_host_async()
      outs.append(out)
      if len(self.stages) > 1:
        self._await(out.token_R, [(r, id, pos + step) for r, id, pos in at])
        if step + 1 < steps:
          self._feed([id for _, id, _ in at])
          batches = [(*put[:-1], stage.put(rows))
                     for put, stage in zip(batches, self.stages, strict=True)]
    return outs, marks

  def _await(self, token_R, at):
    """Sends sampled tokens to the first stage, which takes them in later.

    Not at once: its next step must not wait for this one's last stage unless
    it continues one of these sequences.
    """
    slot_R = np.full(token_R.shape[0], self.shapes.num_slots, np.int32)
    pos_R = np.zeros_like(slot_R)
    for r, id, position in at:
      if id in self.slot_of:
        slot_R[r], pos_R[r] = self.slot_of[id], position
    self.fed.append(({id: self.slot_of.get(id) for _, id, _ in at},
                     *self.stages[0].put((slot_R, pos_R, token_R))))

  def _feed(self, ids):
    """Writes the tokens that these requests await; None: of all."""
    first, keep = self.stages[0], collections.deque()
    for slots, *args in self.fed:
      if ids is None or any(id in slots for id in ids):
        first.slots = first.step(('feed',), first.slots, *args)
      elif any(self.slot_of.get(id) == slot for id, slot in slots.items()):
        keep.append((slots, *args))  # else all of its requests are gone
    self.fed = keep

  def _size(self, chunks):
    total = sum(c.stop - c.start for c in chunks)
    return next(s for s in self.config.token_buckets(
        self.limits.prefill_tokens)
        if s >= total and self._seqs_bucket(s) >= len(chunks))

  def sequences(self, command):
    """Sequence entries at the end of a RunPrefill's Sampled."""
    return self._seqs_bucket(self._size(command.chunks))

  def _batch(self, rows, tick, count):
    batch = _rows(self.shapes, count)
    for b, row in enumerate(rows):
      batch.pos_B[b] = row.base + tick
      batch.slot_B[b] = self.slot_of.get(row.id, 0)
      batch.live_B[b] = row.id in self.slot_of
      batch.table_BM[b, :len(row.pages)] = row.pages
    return batch

  def _need(self, ids):
    return self.need[max((self.mode_of.get(i, 0) for i in ids), default=0)]

  # --- pages ----------------------------------------------------------------

  def gather(self, ids, page_size=None, dtype=None):
    """Reads pages, as a cache of that page size and dtype would hold them.

    ids: as many as one of the buckets. Returns a Cache a stage.
    """
    key = ('gather', (page_size, dtype))
    ids = np.array(ids, np.int32)
    return [stage.step(key, stage.cache, stage.put(ids))
            for stage in self.stages]

  def scatter(self, ids, moved):
    """Writes pages (a Cache a stage); ids of num_pages, all last, are dropped.

    Returns an array a stage that is ready when they are in place.
    """
    done, ids = [], np.array(ids, np.int32)
    for stage, new in zip(self.stages, moved, strict=True):
      stage.cache, done_m = stage.step(('scatter',), stage.cache,
                                       stage.put(ids), new)
      done.append(done_m)
    return done

  def checksum(self, read, start, stop):
    """cache.checksum of gathered pages that hold tokens from start: a stage's
    share each."""
    return [stage.step(('checksum',), tree, stage.put(np.int32(start)),
                       stage.put(np.int32(stop)))
            for stage, tree in zip(self.stages, read, strict=True)]
