"""The kernels of cpu.cc: products on packed weights, attention, pages.

`python -m dsjax.kernels.build_cpu` compiles them; `make setup` does it. Why:
of a matrix that is not packed, XLA's CPU products stream half of what memory
gives, its attention gathers each page before it is read, and its copies of
pages are a loop a layer.
"""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import pathlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.kernels.shapes import Shaped

SOURCE = pathlib.Path(__file__).with_name('cpu.cc')
FLAGS = ('-O3', '-std=c++17', '-shared', '-fPIC', '-fno-math-errno')
DTYPES = (jnp.float32, jnp.bfloat16)  # of weights and of KV
HUGE_PAGE = 1 << 21
TARGETS = ('multiply', 'attend', 'gather', 'scatter')


def path() -> pathlib.Path:
  """Where the library for this source, JAX and processor lies, if built.

  Raises:
    OSError, RuntimeError: the source is not there; the user has no home.
  """
  info = pathlib.Path('/proc/cpuinfo')
  features = platform.processor() if not info.exists() else next(
      (line for line in info.read_text().splitlines()
       if line.startswith(('flags', 'Features'))), '')
  key = hashlib.sha256('\n'.join((
      SOURCE.read_text(), *FLAGS, jax.__version__, platform.machine(),
      features)).encode()).hexdigest()[:16]
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(cache).expanduser() / 'dsjax' / f'cpu-{key}.so'


@functools.cache
def loaded() -> ctypes.CDLL | None:
  """The library, its kernels known to XLA; None where it was not built."""
  try:
    library = ctypes.CDLL(str(path()))
  except (OSError, RuntimeError):  # RuntimeError: the user has no home
    return None
  for name in TARGETS:
    jax.ffi.register_ffi_target(
        f'dsjax_{name}', jax.ffi.pycapsule(getattr(library, f'dsjax_{name}')),
        platform='cpu')
  return library


def lacks(call: tuple[Shaped, Shaped] | None = None) -> str:
  """What the kernels need and do not have, a sentence; or ''.

  Args:
    call: (queries, keys) of an attention, or None for any op.
  """
  if loaded() is None:
    return 'not built here; `python -m dsjax.kernels.build_cpu` does it'
  if call and call[1].dtype not in DTYPES:
    return f'KV of {call[1].dtype}; must be float32 or bfloat16'
  return ''


def panel() -> int:
  """Outputs that a panel of weights holds."""
  library = loaded()
  assert library is not None, lacks()
  return library.dsjax_panel()


def pack(w_OI: np.ndarray, to_QIp: np.ndarray) -> None:
  """Copies weights to panels of p = panel() outputs, where zeros are."""
  (outputs, inputs), p = w_OI.shape, to_QIp.shape[2]
  whole, rest = divmod(outputs, p)
  to_QpI = to_QIp.swapaxes(1, 2)
  to_QpI[:whole] = w_OI[:outputs - rest].reshape(whole, p, inputs)
  to_QpI[whole:whole + 1, :rest] = w_OI[outputs - rest:]


def room(sizes: Sequence[int]) -> Iterator[np.ndarray]:
  """Bytes for arrays of these sizes, side by side on huge pages where the
  system has them: weights stream a quarter faster from those."""
  ends = np.cumsum([size + -size % 64 for size in sizes])
  held = mmap.mmap(-1, int(ends[-1]) + HUGE_PAGE,
                   flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  if hasattr(mmap, 'MADV_HUGEPAGE'):
    with contextlib.suppress(OSError):  # a kernel without them
      held.madvise(mmap.MADV_HUGEPAGE)
  whole = np.frombuffer(held, np.uint8)
  start = -whole.ctypes.data % HUGE_PAGE
  for size, end in zip(sizes, ends, strict=True):
    yield whole[start + end - size - -size % 64:][:size]


def multiply(x_SI: jax.Array, w_QIp: jax.Array) -> jax.Array:
  """x W^T: y_SO in x's dtype, O = Q p with what fills the last panel.

  Raises:
    ValueError: weights of a dtype that it does not take.
  """
  if w_QIp.dtype not in DTYPES:
    raise ValueError(f'weights of {w_QIp.dtype}; must be float32 or bfloat16')
  Q, _, p = w_QIp.shape
  out = jax.ShapeDtypeStruct((x_SI.shape[0], Q * p), jnp.float32)
  return jax.ffi.ffi_call('dsjax_multiply', out)(
      x_SI.astype(jnp.float32), w_QIp).astype(x_SI.dtype)


def attend(
    q_SNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    start_A: jax.Array, pos_B: jax.Array, scale: float, softcap: float,
    window: int, *_: object
) -> jax.Array:
  """Attention of packed queries: see prefill_attention. It reads no page that
  they do not need."""
  out = jax.ShapeDtypeStruct(q_SNH.shape, jnp.float32)
  return jax.ffi.ffi_call('dsjax_attend', out)(
      q_SNH.astype(jnp.float32), k_KPCH, v_KPCH, table_BM, start_A, pos_B,
      scale=np.float32(scale), softcap=np.float32(softcap),
      window=np.int64(window)).astype(q_SNH.dtype)


def attend_rows(
    q_BNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    len_B: jax.Array, *options: Any
) -> jax.Array:
  """Attention of one new token a row: see decode_attention."""
  start_A = jnp.arange(q_BNH.shape[0] + 1, dtype=jnp.int32)
  return attend(q_BNH, k_KPCH, v_KPCH, table_BM, start_A, len_B - 1, *options)


def gather(pools: Sequence[jax.Array], page_m: jax.Array, room_B: jax.Array
           ) -> jax.Array:
  """Pages page_m of each pool [K, P, C, ...], written to bytes that others
  read; an array of one number that is ready when they are there.

  XLA takes room_B for what is only read. So it is memory that its owner keeps,
  as landing.Landing, and nothing else may use it meanwhile. What follows an id
  of P or more in page_m is left out.
  """
  return jax.ffi.ffi_call('dsjax_gather', jax.ShapeDtypeStruct(
      (1,), jnp.int32))(page_m, room_B, *pools)


def scatter(pools: Sequence[jax.Array], page_m: jax.Array, room_B: jax.Array
            ) -> Sequence[jax.Array]:
  """The pools with pages page_m as gather wrote them to room_B, in place.

  As many ids below P lead page_m as in gather's, or none, and pages have the
  same bytes.
  """
  return jax.ffi.ffi_call(
      'dsjax_scatter', [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in pools],
      input_output_aliases={i + 2: i for i in range(len(pools))})(
          page_m, room_B, *pools)
