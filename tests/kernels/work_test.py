"""kernels.work: bytes and operations, against kernels executed and counted."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import (
  decode_attention,
  kv_write,
  mosaic,
  page_copy,
  paged,
  prefill_attention,
  work,
)

A100 = paged.device('NVIDIA A100')


class Counted:
  """A whole array that counts the bytes that a program loads and stores."""

  def __init__(self, array, total):
    self.array, self.total = np.array(array), total
    self.shape, self.dtype = self.array.shape, self.array.dtype

  def _at(self, index):
    index = index if isinstance(index, tuple) else (index,)
    return tuple(slice(int(i.start), int(i.start) + i.size)
                 if hasattr(i, 'size') and hasattr(i, 'start')
                 else np.asarray(i) for i in index)

  def __getitem__(self, index):
    part = self.array[self._at(index)]
    self.total[0] += part.nbytes
    return jnp.asarray(part)

  def __setitem__(self, index, value):
    at = self._at(index)
    self.total[0] += self.array[at].nbytes
    self.array[at] = value


def executed(monkeypatch, op, args):
  """Bytes that a kernel's programs ask for, each executed; its outputs.

  The grid, the program and the arrays are those of the pallas_call.
  """
  total = [0]

  def call(program, grid, out_shape, config, interpret, name, aliases=None):
    def run(*inputs):
      outs = jax.tree.leaves(out_shape)
      refs = [Counted(x, total) for x in inputs]
      if aliases:
        refs += [refs[source] for source in aliases]
      else:
        refs += [Counted(np.zeros(x.shape, x.dtype), total) for x in outs]
      for at in np.ndindex(*grid):
        monkeypatch.setattr(jax.experimental.pallas, 'program_id', lambda i,
                            at=at: at[i])
        program(*refs)
      made = [jnp.asarray(r.array) for r in refs[-len(outs):]]
      return made if isinstance(out_shape, list) else made[0]
    return run

  monkeypatch.setattr(paged, 'call', call)
  with jax.disable_jit():
    return op(*args), total[0]


def pool(K, P, C, H, dtype):
  x = np.random.default_rng(K).integers(-3, 4, (K, P, C, H))
  return jnp.asarray(x, dtype)


@pytest.mark.parametrize('config, window, kv', [
    ((16, 16, 1), 0, 'float32'), ((16, 16, 3), 0, 'bfloat16'),
    ((16, 16, 2), 9, 'int8')])
def test_decode_moves_what_its_programs_ask_for(config, window, kv,
                                                monkeypatch):
  config = decode_attention.TuningConfig(*config)
  k, lens = pool(2, 9, 8, 16, kv), np.array([1, 20, 33], np.int32)
  q = jnp.ones((3, 6, 16), 'float32')
  table = np.arange(15, dtype=np.int32).reshape(3, 5) % 9
  scale = jnp.ones((2, 9, 8)) if kv == 'int8' else None
  (got, moved), want = executed(
      monkeypatch, decode_attention.kernel,
      (q, k, k, table, lens, 0.3, 0.0, window, scale, scale, True, config)
  ), decode_attention.reference(q, k, k, table, lens, 0.3, 0.0, window, scale,
                                scale)
  np.testing.assert_allclose(got, want, atol=0.05)
  count = work.decode(config, q, k, lens, window)
  if config.splits > 1:  # the join is XLA's
    moved += config.splits * 3 * 6 * (16 + 2) * 4 + 3 * 6 * 16 * 4
  assert count.moved_bytes == moved
  seen = [min(n, window or n) for n in lens.tolist()]
  assert count.flops == 4 * 6 * 16 * sum(seen)
  pages = sum(len({t // 8 for t in range(n - s, n)})
              for n, s in zip(lens.tolist(), seen, strict=True))
  token = 2 * (16 * k.dtype.itemsize + 4 * (kv == 'int8'))
  assert count.floor_bytes == (2 * sum(seen) * token + 2 * q.nbytes
                               + 4 * (pages + 3))


@pytest.mark.parametrize('window', [0, 5])
def test_prefill_moves_what_its_programs_ask_for(window, monkeypatch):
  config = prefill_attention.TuningConfig(16, 16)
  k, q = pool(2, 12, 8, 16, 'bfloat16'), jnp.ones((28, 6, 16), 'bfloat16')
  table = np.arange(16, dtype=np.int32).reshape(4, 4) % 12
  start, pos = np.array([0, 7, 7, 20, 26]), np.array([0, 3, 9, 20])
  args = (q, k, k, table, start.astype(np.int32), pos.astype(np.int32))
  _, moved = executed(monkeypatch, prefill_attention.kernel, (
      *args, 0.3, 0.0, window, None, None, True, config))
  count = work.prefill(config, q, k, start, pos, window)
  assert count.moved_bytes == moved
  pairs, tokens, pages = 0, 0, 0
  for n, p in zip(np.diff(start).tolist(), pos.tolist(), strict=True):
    seen = [[t for t in range(p + i + 1) if not window or p + i - t < window]
            for i in range(n)]
    pairs += sum(map(len, seen))
    tokens += len({t for s in seen for t in s})
    pages += len({t // 8 for s in seen for t in s})
  assert count.flops == 4 * 6 * 16 * pairs
  assert count.floor_bytes == (2 * tokens * 2 * 16 * 2 + 2 * 26 * 6 * 16 * 2
                               + 4 * (pages + 9))


@pytest.mark.parametrize('kv, turned', [('float32', True), ('int8', False)])
def test_kv_write_moves_what_its_programs_ask_for(kv, turned, monkeypatch):
  config = kv_write.TuningConfig(2)
  held = [pool(4, 3, 8, 16, kv)] * 2
  held += [jnp.ones((4, 3, 8))] * 2 * (kv == 'int8')
  new, turn = jnp.ones((5, 4, 16)), (jnp.ones((5, 1, 16)),) * 2
  at = np.arange(5, dtype=np.int32)
  _, moved = executed(monkeypatch, kv_write.kernel, (
      tuple(held), new, new, at % 3, at, turn if turned else None, True,
      config))
  count = work.kv_write(config, new, held[0], turned)
  assert count.moved_bytes == moved
  assert moved - count.floor_bytes == 5 * (8 + turned * 64)  # once a program


def test_pages_move_what_the_programs_ask_for(monkeypatch):
  x, ids = pool(2, 5, 8, 16, 'bfloat16'), np.array([3, 1, 4])
  config = page_copy.TuningConfig(32)
  _, moved = executed(monkeypatch, lambda x, ids: page_copy.pack(
      x, ids, 'pallas_interpret', config=config), (x, ids.astype(np.int32)))
  count = work.page_copy(config, (2, 3, 128), x.dtype)
  assert count.moved_bytes == moved and count.grid == (3, 2, 4)


class Slice:
  """A place in a whole array, of which Mosaic's copies count the bytes."""

  def __init__(self, array, total):
    self.array, self.total = array, total
    self.shape, self.dtype, self.nbytes = (array.shape, array.dtype,
                                           array.nbytes)
    self.at = self

  def __getitem__(self, index):
    if index is Ellipsis:
      return jnp.asarray(self.array)
    index = index if isinstance(index, tuple) else (index,)
    if self.dtype == np.int32:  # integers are loaded, not copied
      self.total[0] += 4
      return jnp.asarray(self.array[tuple(map(int, index))])
    return Slice(self.array[tuple(
        slice(int(i.start), int(i.start) + int(i.size))
        if isinstance(i, jax.experimental.pallas.Slice) else int(i)
        for i in index)], self.total)

  def __setitem__(self, index, value):
    assert index is Ellipsis
    if self.total[1]:  # shared memory is not counted
      self.total[0] += self.nbytes


def mosaic_executed(monkeypatch, op, args):
  """Bytes that a Mosaic kernel's copies and stores ask for, each executed.

  All but the products; its integers are counted where they are loaded.
  """
  total, off = [0, True], [0, False]

  def copied(source, target, *_):
    total[0] += min(source.nbytes, target.nbytes)

  names = {name: getattr(mosaic.plgpu, name) for name in (
      'TilingTransform', 'SwizzleTransform')}
  monkeypatch.setattr(mosaic, 'plgpu', types.SimpleNamespace(
      **names, copy_gmem_to_smem=copied, copy_smem_to_gmem=copied,
      **{name: lambda *_, **__: None for name in (
          'set_max_registers', 'barrier_wait', 'barrier_arrive',
          'commit_smem', 'wait_smem_to_gmem')}))
  monkeypatch.setattr(mosaic, '_attend', lambda shared, *_: (
      jnp.zeros(64), jnp.ones(64), jnp.zeros((64, shared.k_ZTH.shape[2]))))

  def call(body, name, config, grid, names, out, k_KPCH, interpret):
    H, W, Z = k_KPCH.shape[3], config.num_warpgroups, config.num_stages
    tile = np.zeros((Z, config.block_tokens, H), k_KPCH.dtype)
    rows = np.zeros((W * 64, H), k_KPCH.dtype)
    to = np.zeros((W * 64, H), out[0].dtype)
    shared = [Slice(x, off) for x in (
        rows, to, tile, tile, *[np.zeros((8, 1))] * 4)]

    def run(*inputs):
      refs = [Slice(np.asarray(x), total) for x in inputs]
      outs = [Slice(np.zeros(x.shape, x.dtype), total) for x in out]
      for at in np.ndindex(*grid, W + 1):
        where = dict(zip((*names, 'w'), at, strict=True))
        monkeypatch.setattr(jax.lax, 'axis_index',
                            lambda name, where=where: jnp.int32(where[name]))
        body(*refs, *outs, *shared)
      return [jnp.asarray(x.array) for x in outs]
    return run

  monkeypatch.setattr(mosaic, '_call', call)
  with jax.disable_jit():
    op(*args)
  return total[0]


@pytest.mark.parametrize('splits, group, window', [(1, 8, 0), (3, 3, 20)])
def test_mosaic_decode_moves_what_it_copies(splits, group, window,
                                            monkeypatch):
  config = mosaic.TuningConfig(64, 2, 1, splits)
  k, lens = pool(2, 40, 16, 64, 'bfloat16'), np.array([1, 70, 150], np.int32)
  q = jnp.ones((3, 2 * group, 64), 'bfloat16')
  table = np.arange(36, dtype=np.int32).reshape(3, 12)
  moved = mosaic_executed(monkeypatch, mosaic.decode, (
      q, k, k, table, lens, 0.3, 0.0, window, True, config))
  asked = -(-group // 8) * 8
  if asked > group:  # rows are filled up by XLA
    moved += q.nbytes + 3 * 2 * asked * 64 * 2
  if splits > 1:  # and joined
    moved += splits * 3 * 2 * group * 66 * 4 + q.nbytes
  count = work.mosaic_decode(config, q, k, lens, window)
  assert count.moved_bytes == moved
  assert count[:2] == work.decode(decode_attention.TuningConfig(), q, k, lens,
                                  window)[:2]


@pytest.mark.parametrize('window, groups', [(0, 1), (30, 2)])
def test_mosaic_prefill_moves_what_it_copies(window, groups, monkeypatch):
  config = mosaic.TuningConfig(64, 2, groups)
  k, q = pool(2, 48, 16, 64, 'bfloat16'), jnp.ones((300, 4, 64), 'bfloat16')
  table = np.arange(48, dtype=np.int32).reshape(4, 12)
  start, pos = np.array([0, 70, 70, 201, 231]), np.array([40, 3, 0, 40])
  moved = mosaic_executed(monkeypatch, mosaic.prefill, (
      q, k, k, table, start.astype(np.int32), pos.astype(np.int32),
      prefill_attention.cut, 0.3, 0.0, window, True, config))
  count = work.mosaic_prefill(config, q, k, start, pos, window)
  assert count.moved_bytes == moved
  assert count.floor_bytes == work.prefill(
      prefill_attention.TuningConfig(), q, k, start, pos, window).floor_bytes


def test_the_count_sees_a_kernel_that_reads_more(monkeypatch):
  source = inspect.getsource(paged)
  mutant = types.ModuleType(paged.__name__)
  exec(source.replace('load(k_ref, head', 'load(v_ref, 0 * head, 0 * page_T, '
                      'offset_T) and load(k_ref, head'), mutant.__dict__)
  monkeypatch.setattr(paged, 'attend', mutant.attend)
  with pytest.raises(AssertionError):
    test_decode_moves_what_its_programs_ask_for(
        (16, 16, 1), 0, 'float32', monkeypatch)


@pytest.mark.parametrize('registers, threads, shared, programs, bound', [
    (32, 256, 0, 8, 'registers'), (255, 256, 0, 1, 'registers'),
    (96, 128, 38912, 4, 'shared memory'), (33, 1024, 0, 1, 'registers'),
    (16, 32, 0, 32, 'programs'), (16, 1024, 0, 2, 'warps'),
    (32, 128, 166912, 1, 'shared memory')])
def test_occupancy(registers, threads, shared, programs, bound):
  got = work.occupancy(A100, registers, threads, shared)
  assert got == (programs, programs * threads / 2048, bound)
