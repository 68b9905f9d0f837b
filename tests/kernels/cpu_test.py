"""The kernels of cpu.cc beside numpy, and what happens where they are not.

Attention is also checked with the other implementations, in
attention_test.py.
"""

import functools
import pathlib
import shlex
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import build_cpu, cpu, tiles
from dsjax.kernels.decode_attention import decode_attention
from dsjax.kernels.prefill_attention import prefill_attention
from tests.kernels.attention_test import decode_case, decode_oracle

multiply = jax.jit(cpu.multiply)
BUILT = cpu.path()
needed = pytest.mark.skipif(bool(build_cpu.build()), reason='no C++ compiler')


def weights(outputs, inputs, dtype=jnp.float32):
  rng = np.random.default_rng(outputs)
  return rng.standard_normal((outputs, inputs)).astype(dtype)


def test_it_is_built_where_there_is_a_compiler():
  """Else all that needs it is left out, and nothing says that it is broken."""
  assert build_cpu.build() in ('', 'no C++ compiler was found')


def packed(w_OI):
  p, (outputs, inputs) = cpu.panel(), w_OI.shape
  to_QIp = np.zeros((-(-outputs // p), inputs, p), w_OI.dtype)
  cpu.pack(w_OI, to_QIp)
  return to_QIp


@needed
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('outputs', [1, 47, 48, 49, 200])
def test_a_product_is_that_of_float64(outputs, dtype):
  w_OI = weights(outputs, 37, dtype)
  w_QIp = packed(w_OI)
  rng = np.random.default_rng(0)
  for count in (1, 2, 5, 6, 7, 8, 9, 15, 16, 33):
    x_SI = rng.standard_normal((count, 37)).astype(np.float32)
    want_SO = x_SI.astype(np.float64) @ np.asarray(w_OI, np.float64).T
    got_SO = multiply(x_SI, w_QIp)
    np.testing.assert_allclose(got_SO[:, :outputs], want_SO, atol=2e-5)
    assert not np.any(got_SO[:, outputs:])  # what fills the last panel


@needed
@pytest.mark.parametrize('inputs', [0, 65, 1536, 9000])
def test_a_row_is_the_same_bits_in_any_batch(inputs):
  """300: of several tasks, in one group of them, in three, and each its own."""
  w_QIp = packed(weights(100, inputs))
  x_SI = np.random.default_rng(1).standard_normal((300, inputs)).astype(
      np.float32)
  got_SO = np.asarray(multiply(x_SI, w_QIp))
  for row in range(300):
    np.testing.assert_array_equal(multiply(x_SI[row:row + 1], w_QIp)[0],
                                  got_SO[row])


def test_a_room_is_side_by_side_on_huge_pages_and_put_without_a_copy():
  first, second = cpu.room([100, 4096])
  assert first.ctypes.data % cpu.HUGE_PAGE == 0
  assert second.ctypes.data == first.ctypes.data + 128
  first[:], second[:] = 1, 2
  assert (first.size, first.sum()) == (100, 100)
  put = jax.device_put(second.view(np.float32), jax.devices()[3])
  assert put.unsafe_buffer_pointer() == second.ctypes.data


@needed
@pytest.mark.parametrize('heads', [1, 4, 15, 20, 64, 80])
def test_heads_of_any_width(heads):
  rng = np.random.default_rng(heads)
  q_BNH = rng.standard_normal((2, 6, heads)).astype(np.float32)
  k_KPCH, v_KPCH = rng.standard_normal((2, 2, 5, 4, heads)).astype(np.float32)
  table_BM = np.array([[4, 0, 2], [1, 3, 0]], np.int32)
  args = q_BNH, k_KPCH, v_KPCH, table_BM, np.array([9, 12], np.int32)
  got, want = [jax.jit(functools.partial(decode_attention, impl=impl))(*args)
               for impl in ('cpu', 'xla')]
  np.testing.assert_allclose(got, want, atol=1e-5)
  args = (q_BNH.repeat(4, 0), *args[1:4],  # the last token is of no prompt
          np.array([0, 3, 7], np.int32), np.array([9, 0], np.int32))
  got, want = [jax.jit(functools.partial(prefill_attention, impl=impl))(*args)
               for impl in ('cpu', 'xla')]
  np.testing.assert_allclose(got[:7], want[:7], atol=1e-5)
  assert not np.any(got[7])


@needed
def test_what_is_no_page_and_no_token_reads_a_page():
  """Ids and lengths that are wrong, where memory beside the pool is others'."""
  args, _ = decode_case((4, 4, 2), [9, 5, 1, 8])
  q_BNH, k_KPCH, v_KPCH, table_BM, len_B = args
  last, width = k_KPCH.shape[1] - 1, table_BM.shape[1] * 4
  table_BM[0, :3] = last, 0, 7
  wrong_BM, wrong_B = table_BM.copy(), len_B.copy()
  wrong_BM[0, :2] = last + 1, -1
  wrong_B[1:3], len_B[1:3] = (0, width + 9), (1, width)
  table_BM[2], wrong_BM[2] = 3, 3
  k_KPCH[:, 3] = v_KPCH[:, 3] = k_KPCH[:, 7] = v_KPCH[:, 7] = 1
  for each in (k_KPCH, v_KPCH):
    each[:, [0, last]] = 2
  step = jax.jit(functools.partial(decode_attention, impl='cpu'))
  np.testing.assert_array_equal(step(q_BNH, k_KPCH, v_KPCH, wrong_BM, wrong_B),
                                step(*args))
  step = jax.jit(functools.partial(prefill_attention, impl='cpu'))
  rest = k_KPCH, v_KPCH, table_BM
  for start_A, pos_B, right_A, right_B in (
      ([0, 1, 9], [0, 3], [0, 1, 4], [0, 3]),  # more rows than there are
      ([0, 1, 0], [0, 3], [0, 1, 1], [0, 3]),
      ([-3, 1, 4], [-9, width], [0, 1, 4], [0, width - 3])):
    wrong, right = ([np.array(x, np.int32) for x in (start, pos)] for start, pos
                    in ((start_A, pos_B), (right_A, right_B)))
    np.testing.assert_array_equal(
        step(q_BNH, *(x[:2] if x is table_BM else x for x in rest), *wrong),
        step(q_BNH, *(x[:2] if x is table_BM else x for x in rest), *right))


@needed
def test_calls_from_many_threads_end_and_are_right():
  args, sequences = decode_case((16, 6, 2), [300] * 4)
  step = jax.jit(functools.partial(decode_attention, impl='cpu'))
  want = decode_oracle(args[0], sequences)
  wrong = []

  def client():
    for _ in range(50):
      if not np.allclose(step(*args), want, atol=1e-5):
        wrong.append(1)

  threads = [threading.Thread(target=client, daemon=True) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert not wrong and not any(thread.is_alive() for thread in threads)


def pools(pages, seed):
  """Of one cache: keys of bytes, their scales, values of float32."""
  rng = np.random.default_rng(seed)
  return [rng.integers(-99, 99, (2, pages, *rest)).astype(dtype)
          for rest, dtype in (((4, 8), np.int8), ((4,), np.float32),
                              ((4, 8), np.float32))]


def room_of(size):
  assert cpu.loaded()  # its kernels are known from then on
  room, = cpu.room([size])
  return room, jax.device_put(room, jax.devices()[0])


@needed
def test_pages_go_to_a_room_and_back_in_place():
  """Those of its ids, up to the first that is none's, and no other."""
  have, want, ids = pools(6, 0), pools(9, 1), [3, 0, 5]
  memory, room = room_of(3 * 2 * (32 + 16 + 128) + 64)
  done = jax.jit(cpu.gather)(have, np.array([*ids, 6, 1], np.int32), room)
  np.testing.assert_array_equal(done, [1])
  np.testing.assert_array_equal(memory[:-64], np.concatenate([
      x[:, ids].reshape(-1).view(np.uint8) for x in have]))
  assert not np.any(memory[-64:])
  held = [jnp.array(x) for x in want]
  where = [x.unsafe_buffer_pointer() for x in held]
  for to in ([8, 2, 7, 9, 0], [9] * 5):  # to nowhere
    held = jax.jit(cpu.scatter, donate_argnums=0)(
        held, np.array(to, np.int32), room)
    assert [x.unsafe_buffer_pointer() for x in held] == where
    for x, from_, got in zip(want, have, held, strict=True):
      x[:, [8, 2, 7]] = from_[:, ids]
      np.testing.assert_array_equal(got, x)


@needed
@pytest.mark.parametrize('op', (cpu.gather, cpu.scatter))
def test_more_pages_than_there_is_room_for_are_an_error(op):
  have, (_, room) = pools(6, 0), room_of(2 * 2 * (32 + 16 + 128))
  jax.block_until_ready(jax.jit(op)(have, np.array([1, 2], np.int32), room))
  with pytest.raises(jax.errors.JaxRuntimeError, match='more pages than'):
    jax.block_until_ready(jax.jit(op)(have, np.array([1, 2, 3], np.int32),
                                      room))


@needed
def test_it_takes_no_weights_of_another_dtype():
  w_QIp = packed(weights(9, 5)).astype(np.float16)
  with pytest.raises(ValueError, match='weights of float16; must be float32'):
    multiply(np.zeros((2, 5), np.float32), w_QIp)


@needed
def test_it_takes_no_kv_of_a_byte():
  args, _ = decode_case((4, 4, 2), [5])
  byte = jnp.zeros(args[1].shape, jnp.int8)
  scale = jnp.ones(args[1].shape[:3])
  with pytest.raises(ValueError, match='KV of int8; must be float32 or bf'):
    decode_attention(args[0], byte, byte, *args[3:], impl='cpu',
                     k_scale_KPC=scale, v_scale_KPC=scale)


def call(kv):
  return (jax.ShapeDtypeStruct((4, 6, 80), jnp.float32),
          jax.ShapeDtypeStruct((2, 8, 16, 80), kv))


@needed
@pytest.mark.parametrize('kv, picked', [
    ('float32', 'cpu'), ('bfloat16', 'cpu'), ('int8', 'xla'),
    ('float8_e4m3fn', 'xla')])
def test_none_picks_it_where_it_can(kv, picked):
  assert tiles.pick(None, 'cpu', call(kv)) == picked
  assert tiles.pick(None, 'cpu') == 'xla'  # writes and copies of pages


def test_a_gpu_has_none():
  with pytest.raises(ValueError, match="impl='cpu': a cuda; must be a CPU"):
    tiles.pick('cpu', 'cuda')


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """A user's cache folder where nothing is built."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  cpu.loaded.cache_clear()
  yield tmp_path
  monkeypatch.undo()
  cpu.loaded.cache_clear()
  cpu.loaded()


def test_where_it_is_not_built_its_name_says_how(elsewhere):
  args, _ = decode_case((4, 4, 2), [5])
  with pytest.raises(ValueError, match='not built here; `python -m dsjax'):
    decode_attention(*args, impl='cpu')
  assert tiles.pick(None, 'cpu', args[:2]) == 'xla'
  jax.jit(decode_attention)(*args)


@pytest.mark.parametrize(('compiler', 'says'), [
    ('false', 'false failed'), ('/no/such/thing', 'no C++ compiler'),
    ('true', 'cpu.so: cannot open'), ('c++ "', 'No closing quotation')])
def test_a_compiler_that_fails_is_told(elsewhere, monkeypatch, compiler, says):
  monkeypatch.setenv('CXX', compiler)
  assert says in build_cpu.build()
  assert not list(elsewhere.glob('dsjax/*'))


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  cpu.loaded.cache_clear()
  assert 'file' in build_cpu.build()


def test_who_has_no_home_has_none_built(monkeypatch):
  def no_home(path):
    raise RuntimeError('no home')

  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(pathlib.Path, 'expanduser', no_home)
  cpu.loaded.cache_clear()
  assert 'not built' in cpu.lacks() and build_cpu.build() == 'no home'
  monkeypatch.undo()
  cpu.loaded.cache_clear()


@needed
def test_what_cannot_be_loaded_is_built_again(elsewhere, monkeypatch):
  """And $CXX has options; its compiler here copies a file."""
  monkeypatch.setattr(jax.ffi, 'register_ffi_target', lambda *_, **__: None)
  cpu.path().parent.mkdir()
  cpu.path().touch()  # as a full disk leaves it, or another system
  for file, says in ((elsewhere / 'none', 'sh failed'), (cpu.SOURCE, 'cpu.so'),
                     (BUILT, '')):
    script = f'for to; do :; done; cp {file} "$to"'
    monkeypatch.setenv('CXX', shlex.join(('sh', '-c', script)))
    told = build_cpu.build()
    assert says in told and bool(told) == bool(says)
    assert bool(cpu.loaded()) == (not says)
  assert [*cpu.path().parent.iterdir()] == [cpu.path()]
