"""One instance: parameters, cache, slots and their compiled steps.

The sole owner of donated buffers. Every operation on an instance consumes the
cache of the one before, so operations run in the order they are given, and a
page may be written by a later one as soon as it has been given.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsjax import base, model, pages, sampling, sharding
from dsjax import cache as kv


class Shapes(NamedTuple):
  """What the compiled steps of an instance depend on, buckets apart."""

  model: base.ModelConfig
  mesh: Mesh
  num_pages: int
  page_size: int
  num_slots: int
  max_len: int
  dtype: str
  attention: str | None

  @property
  def table_width(self):
    return pages.pages_for(self.max_len, self.page_size)


def _abstract(shapes):
  """(params, cache, slots) as sharded ShapeDtypeStructs."""
  s, dtype = shapes, jnp.dtype(shapes.dtype)
  params = model.abstract_params(s.model, dtype)
  cache = jax.eval_shape(lambda: kv.init(s.model, s.num_pages, s.page_size,
                                         dtype))
  slots = sampling.init(s.num_slots, s.max_len, s.model.vocab_size)
  whole = sharding.whole(s.mesh)

  def shard(x, to):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to)

  return (jax.tree.map(shard, params, sharding.params(s.mesh, params)),
          jax.tree.map(lambda x: shard(x, sharding.kv(s.mesh)), cache),
          jax.tree.map(lambda x: shard(x, whole), slots))


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

  kind: decode, prefill (size: packed tokens; with rows for the chunked
  role), admit, gather or scatter. `Engine.warm` runs it once for every
  bucket, so that nothing compiles while serving.
  """
  s = shapes
  _, cache, slots = _abstract(s)
  kept = jax.tree.map(lambda x: x.sharding, (cache, slots))
  whole, moved = sharding.whole(s.mesh), sharding.kv(s.mesh)

  def decode(params, cache, slots, rows, need):
    return model.decode_step(s.model, params, cache, slots, rows, need,
                             s.attention)

  def prefill(params, cache, slots, packed, rows, need):
    return model.prefill_step(s.model, params, cache, slots, packed, size,
                              need, rows, s.attention)

  def scatter(cache, page_m, pages):
    return kv.scatter_pages(cache, page_m, pages), page_m + 1

  fn, donate, out = {
      'decode': (decode, (1, 2), (*kept, whole, whole)),
      'prefill': (prefill, (1, 2), (*kept, whole, whole)),
      'admit': (sampling.admit, (0,), kept[1]),
      'gather': (kv.gather_pages, (), moved),
      'scatter': (scatter, (0,), (kept[0], whole)),
  }[kind]
  return jax.jit(fn, donate_argnums=donate, out_shardings=out)


class Engine:
  """The effects of one instance. It makes no choice: commands say it all."""

  def __init__(self, loaded, mesh, role, config):
    """Places parameters and an empty cache on `mesh`.

    Args:
      loaded: a checkpoint.Model.
      role: what the instance runs (decides which steps it needs).
      config: an EngineConfig.
    """
    instance = config.instance(role)
    self.role, self.config = role, config
    self.limits = instance
    self.shapes = Shapes(loaded.config, mesh, instance.num_pages,
                         instance.page_size, config.max_seqs, config.max_len,
                         config.dtype, config.attention)
    self.whole = sharding.whole(mesh)
    self.params = jax.device_put(
        loaded.params, sharding.params(mesh, loaded.params))
    cache, slots = _abstract(self.shapes)[1:]
    self.cache = jax.jit(
        lambda: kv.init(loaded.config, instance.num_pages, instance.page_size,
                        jnp.dtype(config.dtype)),
        out_shardings=jax.tree.map(lambda x: x.sharding, cache))()
    self.slots = jax.device_put(
        sampling.init(config.max_seqs, config.max_len,
                      loaded.config.vocab_size),
        jax.tree.map(lambda x: x.sharding, slots))
    self.need = [self._put(np.int32(n)) for n in range(3)]
    self.slot_of, self.mode_of = {}, {}
    self.spare = list(range(config.max_seqs))

  def _put(self, tree):
    return jax.device_put(tree, self.whole)

  def _seqs_bucket(self, tokens):
    """Sequences a prefill of this many packed tokens has room for."""
    most = self.limits.prefill_seqs
    if tokens == self.limits.prefill_tokens:
      return most  # the largest bucket takes any batch
    return min(most, max(1, tokens // 16))

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
      outs = (self._run_prefill(tokens, packed, batch if rows else None, ())
              if tokens else self._run_decode(batch, 1, ()))
      jax.block_until_ready(outs)
      yield ' + '.join([f'prefill {tokens}'] * bool(tokens)
                       + [f'decode {rows}'] * bool(rows))

  # --- requests -------------------------------------------------------------

  def admit(self, id, tokens, prompt_len, params):
    """Gives a request a slot holding its tokens so far."""
    slot = self.spare.pop()
    row = sampling.slot_row(tokens, prompt_len, params, self.shapes.max_len,
                            self.shapes.model.vocab_size)
    self.slots = make_step(self.shapes, 'admit')(
        self.slots, self._put(np.int32(slot)), self._put(row))
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
    ids = [c.id for c in chunks if c.last] + [r.id for r in rows]
    return self._run_prefill(size, packed, batch, ids)

  def decode(self, command):
    """Dispatches a RunDecode; returns a Sampled a step, unfinished."""
    rows = command.rows
    count = next(n for n in self.config.row_buckets if n >= len(rows))
    batch = self._batch(rows, command.tick, count)
    return self._run_decode(batch, command.steps, [r.id for r in rows])

  def _run_prefill(self, size, packed, batch, ids):
    packed, batch = self._put((packed, batch))
    self.cache, self.slots, _, out = make_step(self.shapes, 'prefill', size)(
        self.params, self.cache, self.slots, packed, batch, self._need(ids))
    out.token_R.copy_to_host_async()
    return [out]

  def _run_decode(self, batch, steps, ids):
    rows, need, outs = self._put(batch), self._need(ids), []
    step = make_step(self.shapes, 'decode')
    for _ in range(steps):
      self.cache, self.slots, rows, out = step(
          self.params, self.cache, self.slots, rows, need)
      out.token_R.copy_to_host_async()
      outs.append(out)
    return outs

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

  def _pages_bucket(self, ids):
    return next(n for n in self.config.page_buckets if n >= len(ids))

  def gather(self, ids):
    """Reads pages (at most transfer_pages): a tree of [K, m, C, H]."""
    page_m = np.zeros(self._pages_bucket(ids), np.int32)
    page_m[:len(ids)] = ids
    return make_step(self.shapes, 'gather')(self.cache, self._put(page_m))

  def scatter(self, ids, moved):
    """Writes pages; returns an array that is ready when they are in place."""
    page_m = np.full(self._pages_bucket(ids), self.shapes.num_pages, np.int32)
    page_m[:len(ids)] = ids
    self.cache, done_m = make_step(self.shapes, 'scatter')(
        self.cache, self._put(page_m), moved)
    return done_m
