"""One instance: parameters, cache and slots, and what its steps do to them.

The sole owner of donated buffers. Every operation on an instance consumes the
cache of the one before, so operations run in the order they are given, and a
page may be written by a later one as soon as it has been given.

Under pipeline parallelism an instance is a row of stages, each a mesh with a
run of layers and its own compiled steps. Activations and sampled tokens go
from mesh to mesh by explicit copies, and nothing waits: consecutive commands
overlap in the stages because every dispatch is asynchronous.
"""

import collections
import functools

import jax
import numpy as np

from dsjax.checkpoints.orbax_file import Stored
from dsjax.config.checks import require
from dsjax.config.request import Sampling
from dsjax.model import sampling, sharding
from dsjax.runtime import migration
from dsjax.runtime.arrays import is_sound
from dsjax.runtime.memory import fit
from dsjax.runtime.steps import (
  empty_packed,
  empty_rows,
  make_step,
  seqs_bucket,
  stage_shapes,
)


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
    if not is_sound(self.params):
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
    require(dtypes == {config.dtype}, 'EngineConfig.dtype', config.dtype,
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
    return seqs_bucket(self.limits, tokens)

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
    self.admit('nobody', (), 0, Sampling())
    self.forget('nobody')
    for tokens, rows in self.shapes_needed():
      packed = empty_packed(self.shapes, self._seqs_bucket(tokens))
      batch = empty_rows(self.shapes, rows)
      outs = (self._run('prefill', tokens, (packed, batch if rows else None),
                        (), ())
              if tokens else self._run('decode', 0, (batch,), (), ()))
      self._feed(None)
      jax.block_until_ready((outs, self.stages[0].slots))
      yield ' + '.join([f'prefill {tokens}'] * bool(tokens)
                       + [f'decode {rows}'] * bool(rows))

  @property
  def devices(self):
    """Its devices, stage by stage."""
    return tuple(d for mesh in self.where[2] for d in mesh.devices.flat)

  def route_to(self, target):
    """How KV goes from this engine to another."""
    return migration.Route(self, target)

  # --- faults ---------------------------------------------------------------

  def is_sound(self):
    """Its buffers are there. False: it can do nothing but start again."""
    return all(is_sound((s.params, s.cache, s.slots)) for s in self.stages)

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
    packed = empty_packed(self.shapes, self._seqs_bucket(size))
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
    batch = empty_rows(self.shapes, count)
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
