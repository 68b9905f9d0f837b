"""kernels.bench: what it counts, against the kernels executed and counted."""

import contextlib
import gc
import inspect
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct as Shape
from rich.console import Console

from dsjax.config import zoo
from dsjax.kernels import (
  bench,
  cases,
  compiled,
  decode_attention,
  kv_write,
  mosaic,
  page_copy,
  paged,
  prefill_attention,
  timing,
  tuned,
  work,
)
from dsjax.simulation import hardware

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
    found = self.array[self._at(index)]
    self.total[0] += found.nbytes
    return jnp.asarray(found)

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


def test_the_shapes_are_those_of_the_models_and_the_devices_known():
  for name, (N, K, H, *_) in cases.MODELS.items():
    model = zoo.config(name)
    assert (N, K, H) == (model.num_heads, model.num_kv_heads, model.head_dim)
  for key, name in (('a100-80g', 'A100'), ('h100-80g', 'H100')):
    peaks = hardware.HARDWARE[key]
    assert bench.PEAKS[name] == (peaks.flop_per_s, peaks.bytes_per_s)
  assert bench.PEAKS.keys() == {d.name for d in paged.DEVICES}


@pytest.mark.parametrize('name', compiled.GPUS)
@pytest.mark.parametrize('model', ['llama-3-8b', 'opt-13b'])
def test_the_steps_that_are_compiled_have_these_kernels(name, model):
  rows = json.loads(bench.GOLDEN.read_text())['rows']
  golden = {(kernel, k['grid'], k['threads']) for row in rows
            if (row['gpu'], row['model']) == (name.lower(), model)
            for kernel, k in row['kernels'].items()}
  for case in cases.of_steps(model, compiled.GPUS[name][1]):
    args, limits = cases.arguments(case), paged.device(name)
    done = cases.count(case, args, cases.plan(case, args, limits)[0])
    grid = (*done.grid, 1)[:3] if case.impl != 'mosaic' else (
        *done.grid[::-1], 1)[:3]  # whose last axis is CUDA's first
    assert (case.kernel, ', '.join(map(str, grid)), done.threads) in golden


# --- the runner --------------------------------------------------------------

TINY = cases.Case('decode', 'llama-3-8b', (4, 2, 16), ((1, 20),) * 2)


@pytest.mark.parametrize('case', [
    TINY, TINY._replace(op='prefill', pieces=((5, 0), (5, 0))),
    TINY._replace(kv='int8'), TINY._replace(op='kv_write', kv='float8_e4m3fn'),
    TINY._replace(op='pack', pieces=(), pages=2),
    TINY._replace(op='unpack', pieces=(), pages=2)], ids=lambda c: c.op)
def test_every_op_can_be_timed(case):
  """Here with the references; what is updated in place is threaded."""
  arrays = timing.fill(cases.arguments(case))
  assert 0 < timing.seconds(cases.call(case, impl='xla'), arrays,
                           cases.UPDATED.get(case.op), 1, 1e-4) < 10
  if other := timing.dense(case, cases.arguments(case)):
    fn, named = other
    assert fn(**named, impl='xla').shape == named['q'].shape


def test_tuning_finds_the_fastest_and_leaves_out_what_does_not_run():
  def build(config):
    if config.num_warps == 8:
      raise ValueError('does not fit')
    return lambda: (abs(config.block_tokens - 32) + abs(config.splits - 6)
                    + abs(config.num_warps - 7) + 1)

  def check(config):
    config.check(Shape((2, 64, 128), 'bfloat16'),
                 Shape((2, 9, 16, 128), 'bfloat16'), A100)

  found = timing.tune(decode_attention.TuningConfig(), check, build)
  assert (found.block_tokens, found.splits, found.num_warps) == (32, 6, 4)


def printed(*args):
  console = Console(width=260, file=io.StringIO())
  code = bench.run(console, *args)
  return code, console.file.getvalue()


def test_without_a_gpu_it_counts_and_says_what_is_missing(monkeypatch):
  monkeypatch.setattr(compiled, 'available', lambda name: False)
  wanted = [c for c in cases.of_model('opt-13b') if c.op != 'kv_write']
  code, text = printed('A100', compiled.GPUS['A100'][1], wanted)
  assert code == 0 and 'Not measured, for want of a GPU: seconds' in text
  line, = (x for x in text.splitlines() if '64 rows of 2048' in x
           and 'bf16' in x.replace('bfloat16', 'bf16'))
  floor = 64 * 40 * 128 * 2 * 2 * (2048 + 1) + 64 * (128 + 1) * 4
  assert f' {floor / 1e6:.2f} ' in line  # keys, values; q, o; tables, lengths
  assert 'missing in' in text and 'roofline ' not in text


def test_with_a_gpu_it_times_and_tunes_and_keeps_the_table_when_stopped(
    monkeypatch, tmp_path):
  calls = iter(range(10))

  def timed(fn, args, name=None, loops=0):
    if next(calls) == 4:
      raise KeyboardInterrupt
    return lambda *_: 1e-3

  monkeypatch.setattr(timing, 'timed', timed)
  monkeypatch.setattr(timing, 'tune', lambda config, *_: config)
  monkeypatch.setattr(tuned, 'PATH', tmp_path / 'tuned.json')
  monkeypatch.setattr(compiled, 'available', lambda name: False)
  gc.disable()  # JAX's callback would report the exception on its way
  try:
    code, text = printed('A100', None, [TINY, TINY], True)
  finally:
    gc.enable()
  assert code == 130 and text.count('2 rows of 21') == 1
  assert '1000.0' in text and 'roofline' in text
  assert list(json.loads(tuned.PATH.read_text())) == ['cpu']


@pytest.mark.parametrize('given, says', [
    (['--gpu=B200'], '--gpu=B200: must be of .*A100'),
    (['--ops=sort'], '--ops=sort: must be of .*decode'),
    (['--models=gpt-5'], '--models=gpt-5: must be of .*llama'),
    (['--tune'], '--tune: there is no GPU here')])
def test_bad_input_is_one_clear_error(given, says):
  flags = types.SimpleNamespace(gpu=None, tune=False, models=[], ops=[])
  for item in given:
    name, _, value = item[2:].partition('=')
    setattr(flags, name, [value] if name in ('models', 'ops')
            else value or True)
  with pytest.raises(ValueError, match=says):
    bench.check_flags(flags)


def test_a_gpu_that_is_not_known_is_one_clear_error(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  given = types.SimpleNamespace(gpu=None, tune=True, models=[], ops=[])
  with compiled.described('NVIDIA L4'), pytest.raises(
      ValueError, match="the GPU here, NVIDIA L4: must be one of .*'A100'"):
    bench.check_flags(given)
  with compiled.described():
    assert bench.check_flags(given) == ('H100', None)


@pytest.mark.parametrize('model', cases.MODELS)
def test_no_two_tokens_are_written_to_one_place(model):
  for case in cases.of_model(model):
    if case.op == 'kv_write':
      args = cases.arguments(case)
      places = {*zip(args['page'].tolist(), args['offset'].tolist(),
                     strict=True)}
      assert len(places) == len(case.pieces)
      assert args['page'].max() < args['held'][0].shape[1]


# --- machine code ------------------------------------------------------------

SAID = """
ptxas info    : Compiling entry function 'unpack' for 'sm_80'
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 17 registers, 384 bytes cmem[0]
"""
LAUNCH = ('001: kCustomKernel [x] unpack grid: [64, 2, 1] threads: [128, 1, 1]'
          '  shared_memory: 32 bytes\n')


def test_registers_and_launches_are_read():
  assert compiled.read(SAID, LAUNCH) == {
      'unpack': compiled.Kernel(17, 12, (64, 2, 1), 128, 32)}


# --- tuned.json --------------------------------------------------------------

KIND, SHAPE = compiled.GPUS['H100'][1], 'float32 into float32, H 8, K 2, S 8'


@contextlib.contextmanager
def written(text, monkeypatch, tmp_path):
  path = tmp_path / 'tuned.json'
  path.write_text(text if isinstance(text, str) else json.dumps(text))
  monkeypatch.setattr(tuned, 'PATH', path)
  with compiled.described():
    yield
  tuned.load.cache_clear()


FIELDS = dict(block_heads=2, num_warps=4, num_stages=1)


def lookup():
  return kv_write.default(jnp.zeros((5, 2, 8)), 'float32')


def test_a_tuned_config_is_the_default_on_its_device(monkeypatch, tmp_path):
  config = kv_write.TuningConfig(**FIELDS)
  with written({KIND: {'kv_write': {SHAPE: FIELDS}}}, monkeypatch, tmp_path):
    assert lookup() == config != kv_write.heuristic(jnp.zeros((5, 2, 8)))
    with compiled.described(compiled.GPUS['A100'][1]):
      assert lookup() == kv_write.heuristic(jnp.zeros((5, 2, 8)))


def test_the_kernels_take_it(monkeypatch, tmp_path):
  q, k = jnp.ones((2, 4, 8)), jnp.ones((2, 3, 16, 8))
  shape = decode_attention.shape_class(q, k, 32)
  fields = dict(block_heads=16, block_tokens=16, splits=5, num_warps=4,
                num_stages=2)
  seen = []
  monkeypatch.setattr(decode_attention, '_program',
                      lambda config, *_: seen.append(config))
  with written({KIND: {'decode_attention': {shape: fields}}}, monkeypatch,
               tmp_path):
    decode_attention.decode_attention(
        q, k, k, np.zeros((2, 2), np.int32), np.ones(2, np.int32),
        'pallas_interpret')
  assert seen[0] == decode_attention.TuningConfig(**fields)


@pytest.mark.parametrize('text, says', [
    ('{', 'not JSON'), ([], 'the file: .*must be a JSON object'),
    ({KIND: {'sort': {}}}, "'sort': must be one of"),
    ({KIND: 3}, 'H100.*3: must be a JSON object'),
    ({KIND: {'kv_write': {SHAPE: FIELDS | {'num_warps': 'four'}}}},
     "num_warps: 'four': must be an integer"),
    ({KIND: {'kv_write': {SHAPE: FIELDS | {'num_warps': True}}}},
     'True: must be an integer'),
    ({KIND: {'kv_write': {SHAPE: {'block_heads': 2}}}},
     r"must be of the fields \['block_heads', 'num_stages', 'num_warps'\]"),
    ({KIND: {'kv_write': {SHAPE: FIELDS | {'block_heads': 3}}}},
     'block_heads=3: must be a power')])
def test_a_malformed_file_is_one_clear_error(text, says, monkeypatch,
                                             tmp_path):
  with written(text, monkeypatch, tmp_path), pytest.raises(
      ValueError, match=f'^tuned.json: .*{says}'):
    lookup()


def test_what_is_saved_is_found_and_the_rest_kept(monkeypatch, tmp_path):
  held = {'other': {'kv_write': {SHAPE: FIELDS}}}
  with written(held, monkeypatch, tmp_path):
    config = kv_write.TuningConfig(1, 2, 3)
    tuned.save('kv_write', SHAPE, config)
    assert lookup() == config
    assert json.loads(tuned.PATH.read_text())['other'] == held['other']


def test_no_file_is_shipped_that_no_device_wrote():
  for kind in tuned.load(tuned.PATH):
    assert paged.device(kind).name in kind
