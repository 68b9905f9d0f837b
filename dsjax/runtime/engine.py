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
import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.request import Sampling
from dsjax.model import sampling, sharding, transformer
from dsjax.model.kv_cache import Cache
from dsjax.runtime import host_memory, migration, weights
from dsjax.runtime.arrays import is_sound
from dsjax.runtime.landing import Landings
from dsjax.runtime.memory import size_pages
from dsjax.runtime.protocols import Dispatched, Pending
from dsjax.runtime.steps import (
  RAN,
  Shapes,
  abstract_step,
  empty_packed,
  empty_rows,
  make_step,
  seqs_bucket,
  stage_shapes,
)
from dsjax.scheduling import page_pool
from dsjax.scheduling.events import Chunk, Row, RunDecode, RunPrefill


class _Stage:
  """Parameters, cache and, at both ends, slots on one mesh."""

  def __init__(self, shapes: Shapes, params: Any) -> None:
    self.shapes, self.whole = shapes, sharding.replicated(shapes.mesh)
    self._place = weights.placing(shapes, params)
    self.params: dict[str, Any] | None = self._place()
    self.empty()

  def empty(self) -> None:
    """Makes cache and slots anew, and puts weights again that were lost."""
    if self.params is None or not is_sound(self.params):
      self.params = None  # makes room
      self.params = self._place()
    self.cache, self.slots = self.step(('init',))
    if not (self.shapes.first or self.shapes.last):
      self.slots = None

  def put(self, tree: Any) -> Any:
    return jax.device_put(tree, self.whole)

  def step(self, kind: tuple, *args: Any) -> Any:
    return make_step(self.shapes, *kind)(*args)


class Engine:
  """The effects of one instance. It makes no choice: commands say it all.

  Attributes:
    by_kernel: whether a kernel reads and writes all its pages at once, to
      memory that this process shares.
  """

  news: threading.Event | None = None  # it is looked at

  def __init__(self, loaded: Model, meshes: Sequence[Mesh], role: str,
               config: EngineConfig, capacity: InstanceConfig | None = None
               ) -> None:
    """Places parameters and an empty cache on the meshes.

    Args:
      meshes: one a pipeline stage.
      role: what the instance runs (decides which steps it needs).
      capacity: what `size_pages` gave, if it was called.

    Raises:
      InputError: it does not fit in memory, or is of another dtype.
    """
    self.role, self.config = role, config
    self.capacity = capacity or size_pages(loaded.config, meshes, role, config)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(loaded.params)}
    require(dtypes == {config.dtype}, 'EngineConfig.dtype', config.dtype,
            f"that of the model's weights, {' and '.join(dtypes)}")
    self.stages = [_Stage(shapes, loaded.params) for shapes in stage_shapes(
        loaded.config, meshes, role, config, self.capacity)]
    self.where = (self.stages[0].shapes.layout, tuple(
        s.shapes.span for s in self.stages), tuple(meshes))
    self.shapes, self.last = self.stages[0].shapes, self.stages[-1]
    self.memory = ''  # of a process: see messages.Built
    self.by_kernel = len(meshes) == meshes[0].size == 1 and (
        self.shapes.attention == 'cpu')
    self.landings = Landings(sum(
        x.nbytes // self.capacity.num_pages
        for x in jax.tree.leaves(self.stages[0].cache)) * page_pool.pages_for(
            config.max_len, self.capacity.page_size))
    self._vacate()

  def _vacate(self) -> None:
    self.need = [self.last.put(np.int32(n)) for n in range(3)]
    self.slot_of: dict[int, int] = {}
    self.mode_of: dict[int, int] = {}
    self.spare = list(range(self.config.max_seqs))
    self.fed: collections.deque[tuple] = collections.deque()  # for stage 0

  def _seqs_bucket(self, tokens: int) -> int:
    return seqs_bucket(self.capacity, tokens)

  def _mixed_rows(self) -> list[int]:
    buckets = self.config.row_buckets
    return sorted({max(buckets[0], -(-buckets[-1] // 4)), buckets[-1]})

  def shapes_needed(self) -> list[tuple[int, int]]:
    """(packed tokens, decode rows) of every step this role can run."""
    capacity = self.capacity
    tokens = () if not capacity.prefills else self.config.token_buckets(
        self.capacity.prefill_tokens)
    rows = self.config.row_buckets if capacity.decodes else ()
    mixed = self._mixed_rows() if capacity.mixes else ()
    return ([(size, 0) for size in tokens] + [(0, n) for n in rows]
            + [(size, n) for size in tokens for n in mixed])

  def compile(self, needed: Sequence[tuple[int, int]]
              ) -> Iterator[tuple[int, int]]:
    """Compiles steps, one a core at a time; yields each of `needed` then.

    needed: (packed tokens, decode rows) of each.
    """
    def make(tokens, rows):
      for stage in self.stages:
        step, args = abstract_step(stage.shapes, tokens, rows,
                                   self._seqs_bucket(tokens))
        step.lower(*args).compile()

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
      for shape, made in [(shape, pool.submit(make, *shape))
                          for shape in needed]:
        made.result()
        yield shape
    finally:  # a compilation cannot be stopped, nor is it waited for
      pool.shutdown(wait=False, cancel_futures=True)

  def warm(self) -> Iterator[str]:
    """Compiles and runs every step once, for no request; yields its name.

    But for those that an engine of this process with equal shapes has run.
    """
    self.admit(-1, (), 0, Sampling())
    self.forget(-1)
    cold = []
    for shape in self.shapes_needed():
      if all(entry in RAN.get(step, ()) for step, entry in self._runs(*shape)):
        yield _name(*shape)
      else:
        cold.append(shape)
    for tokens, rows in self.compile(cold):
      packed = empty_packed(self.shapes, self._seqs_bucket(tokens))
      batch = empty_rows(self.shapes, rows)
      outs = (self._run('prefill', tokens, (packed, batch if rows else None),
                        ())
              if tokens else self._run('decode', 0, (batch,), ()))
      self._feed(None)
      jax.block_until_ready((outs, self.stages[0].slots))
      for step, entry in self._runs(tokens, rows):
        RAN.setdefault(step, set()).add(entry)
      yield _name(tokens, rows)

  def _runs(self, tokens: int, rows: int
            ) -> list[tuple[Callable[..., Any], tuple[int, int]]]:
    """(jitted step, its entry in RAN) of each stage."""
    kind = ('prefill', tokens) if tokens else ('decode',)
    entry = self._seqs_bucket(tokens) if tokens else 0, rows
    return [(make_step(stage.shapes, *kind), entry) for stage in self.stages]

  @property
  def devices(self) -> tuple[jax.Device, ...]:
    """Its devices, stage by stage."""
    return tuple(d for mesh in self.where[2] for d in mesh.devices.flat)

  def route_to(self, target: 'Engine') -> migration.Route:
    """How KV goes from this engine to another."""
    return migration.Route(self, target)

  def host_memory(self, checksum: bool) -> host_memory.HostMemory:
    """Its slots of host memory."""
    return host_memory.HostMemory(self, checksum)

  # --- faults ---------------------------------------------------------------

  def is_sound(self) -> bool:
    """Whether its buffers are there; if not, it can only start again."""
    return all(is_sound((s.params, s.cache, s.slots)) for s in self.stages)

  def stop(self) -> None:
    """Lets go of all it held but weights and compiled steps.

    What is still in flight writes buffers that nothing reads any more.
    """
    for stage in self.stages:
      stage.cache = stage.slots = None
    self.slot_of, self.mode_of, self.spare = {}, {}, []
    self.fed.clear()

  def start(self) -> bool:
    """Begins anew, empty: True. Nothing is compiled.

    Weights are put again only where their buffers were lost.

    Raises:
      RuntimeError and the like: the devices refuse.
    """
    for stage in self.stages:
      stage.empty()
    self._vacate()
    return True

  def check(self) -> None:
    """Nothing ends it but a call, or a result that cannot be read."""

  def close(self) -> None:
    """Its buffers go with it."""

  # --- requests -------------------------------------------------------------

  def admit(self, id: int, tokens: Sequence[int], prompt_len: int,
            params: Sampling) -> None:
    """Gives a request a slot holding its tokens so far."""
    slot = self.spare[-1]
    row = sampling.slot_row(tokens, prompt_len, params, self.shapes.max_len,
                            self.shapes.model.vocab_size,
                            self.shapes.model.eos_ids)
    for stage in dict.fromkeys((self.stages[0], self.last)):
      stage.slots = stage.step(('admit',), stage.slots,
                               stage.put(np.int32(slot)), stage.put(row))
    self.spare.pop()
    self.slot_of[id], self.mode_of[id] = slot, sampling.mode(params)

  def forget(self, id: int) -> None:
    """Takes the slot back; safe while steps that write it are in flight."""
    if id in self.slot_of:
      self.spare.append(self.slot_of.pop(id))
      del self.mode_of[id]

  # --- steps ----------------------------------------------------------------

  def prefill(self, command: RunPrefill) -> Dispatched:
    """Dispatches a RunPrefill: the output of its one step, unfinished, and
    what each stage but the last sends on."""
    chunks, rows = command.chunks, command.rows
    size = self._size(chunks)
    packed = empty_packed(self.shapes, self._seqs_bucket(size))
    end = 0
    for b, chunk in enumerate(chunks):
      end += chunk.stop - chunk.start
      packed.start_A[b + 1:] = end
      packed.pos_B[b], packed.slot_B[b] = chunk.start, self.slot_of[chunk.id]
      packed.sample_B[b] = chunk.last
      packed.table_BM[b, :len(chunk.pages)] = chunk.pages
    batch = None
    if rows:
      count = next(n for n in self._mixed_rows() if n >= len(rows))
      batch = self._batch(rows, command.tick, count)
    sampled = [(r, row.id, row.base + command.tick + 1)
               for r, row in enumerate(rows)]
    sampled += [(b + (batch.pos_B.size if batch else 0), chunk.id, chunk.stop)
                for b, chunk in enumerate(chunks) if chunk.last]
    self._feed([chunk.id for chunk in chunks] + [row.id for row in rows])
    return self._run('prefill', size, (packed, batch), sampled)

  def decode(self, command: RunDecode) -> Dispatched:
    """Dispatches a RunDecode: as prefill, with an output a step."""
    rows = command.rows
    count = next(n for n in self.config.row_buckets if n >= len(rows))
    batch = self._batch(rows, command.tick, count)
    self._feed([row.id for row in rows])
    return self._run('decode', 0, (batch,), [
        (r, row.id, row.base + command.tick + 1)
        for r, row in enumerate(rows)], command.steps)

  def _run(self, kind: str, size: int, batch: tuple,
           sampled: Sequence[tuple[int, int, int]], steps: int = 1
           ) -> Dispatched:
    """Dispatches steps through the stages.

    sampled: (entry of token_R, id, position) of each token that is sampled.
    """
    batches = [stage.put(batch) for stage in self.stages]
    ids, outs = [id for _, id, _ in sampled], []
    need, marks = self._need(ids), []  # marks: what other stages send on
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
      with jax.transfer_guard_device_to_host('allow'):  # it is meant to
        out.token_R.copy_to_host_async()
      outs.append(out)
      if len(self.stages) > 1:
        self._await(out.token_R, [(r, id, position + step)
                                  for r, id, position in sampled])
        if step + 1 < steps:
          self._feed(ids)
          batches = [(*put[:-1], stage.put(rows))
                     for put, stage in zip(batches, self.stages, strict=True)]
    return outs, marks

  def _await(self, token_R: jax.Array,
             sampled: Sequence[tuple[int, int, int]]) -> None:
    """Sends sampled tokens to the first stage, which takes them in later.

    Not at once: its next step must not wait for this one's last stage unless
    it continues one of these sequences.
    """
    entries = [(r, id, self.slot_of[id], position)
               for r, id, position in sampled if id in self.slot_of]
    self.fed.append((entries, self.stages[0].put(token_R)))

  def _feed(self, ids: Sequence[int] | None) -> None:
    """Writes the tokens that these requests await; None: of all. Those of a
    request that has left go nowhere: its slot may be another's by now."""
    first, keep = self.stages[0], collections.deque()
    for entries, token_R in self.fed:
      here = [entry for entry in entries
              if self.slot_of.get(entry[1]) == entry[2]]
      if ids is None or any(entry[1] in ids for entry in here):
        slot_R = np.full(token_R.shape[0], self.shapes.num_slots, np.int32)
        pos_R = np.zeros_like(slot_R)
        for r, _, slot, position in here:
          slot_R[r], pos_R[r] = slot, position
        first.slots = first.step(('feed',), first.slots, *first.put(
            (slot_R, pos_R)), token_R)
      elif here:
        keep.append((here, token_R))
    self.fed = keep

  def _size(self, chunks: Sequence[Chunk]) -> int:
    total = sum(chunk.stop - chunk.start for chunk in chunks)
    return next(size for size in self.config.token_buckets(
        self.capacity.prefill_tokens)
        if size >= total and self._seqs_bucket(size) >= len(chunks))

  def sequences(self, command: RunPrefill) -> int:
    """Sequence entries at the end of a RunPrefill's Sampled."""
    return self._seqs_bucket(self._size(command.chunks))

  def _batch(self, rows: Sequence[Row], tick: int, count: int
             ) -> transformer.Rows:
    batch = empty_rows(self.shapes, count)
    for b, row in enumerate(rows):
      batch.pos_B[b] = row.base + tick
      batch.slot_B[b] = self.slot_of.get(row.id, 0)
      batch.live_B[b] = row.id in self.slot_of
      batch.table_BM[b, :len(row.pages)] = row.pages
    return batch

  def _need(self, ids: Sequence[int]) -> jax.Array:
    return self.need[max((self.mode_of.get(i, 0) for i in ids), default=0)]

  # --- pages ----------------------------------------------------------------

  def gather(self, ids: Sequence[int], page_size: int | None = None,
             dtype: str | None = None, *room: jax.Array) -> list[Any]:
    """Reads pages, as a cache of that page size and dtype would hold them.

    Args:
      ids: as many as one of the buckets.
      room: of a Landing, which they are written to as they are.

    Returns:
      a Cache a stage; with a room, an array that is ready when they are there.
    """
    key = ('gather', (page_size, dtype))
    page_m = np.array(ids, np.int32)
    return [stage.step(key, stage.cache, stage.put(page_m), *room)
            for stage in self.stages]

  def scatter(self, ids: Sequence[int], moved: Sequence[Cache | jax.Array]
              ) -> list[jax.Array]:
    """Writes pages (a Cache a stage, or a Landing's room); ids of num_pages,
    all last, are dropped.

    Returns an array a stage that is ready when they are in place.
    """
    done, page_m = [], np.array(ids, np.int32)
    for stage, new in zip(self.stages, moved, strict=True):
      stage.cache, done_m = stage.step(('scatter',), stage.cache,
                                       stage.put(page_m), new)
      done.append(done_m)
    return done

  def checksum(self, read: Sequence[Cache], start: int, stop: int
               ) -> list[Pending]:
    """kv_cache.checksum of gathered pages that hold tokens from start: a
    stage's share each."""
    return [stage.step(('checksum',), tree, stage.put(np.int32(start)),
                       stage.put(np.int32(stop)))
            for stage, tree in zip(self.stages, read, strict=True)]


def _name(tokens: int, rows: int) -> str:
  """A step, in words."""
  return ' + '.join([f'prefill {tokens}'] * bool(tokens)
                    + [f'decode {rows}'] * bool(rows))
