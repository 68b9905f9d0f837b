"""The kernels of cpu.cc: products on packed weights, decode attention.

  python -m dsjax.kernels.cpu

compiles them for this machine, where it finds a C++ compiler ($CXX, c++, g++,
clang++), into the user's cache folder; `make setup` does it. Without them
everything runs in XLA.

Why: of a matrix that is not packed, XLA's CPU products stream half of what
memory gives, and its attention gathers each page before it is read.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.kernels.shapes import Shaped

SOURCE = pathlib.Path(__file__).with_name('cpu.cc')
FLAGS = ('-O3', '-std=c++17', '-shared', '-fPIC', '-fno-math-errno')
DTYPES = (jnp.float32, jnp.bfloat16)  # of weights and of KV
COMPILERS = ('c++', 'g++', 'clang++')  # but for $CXX
TARGETS = ('multiply', 'attend')


def path() -> pathlib.Path:
  """Where the library for this source, JAX and processor lies, if built."""
  info = pathlib.Path('/proc/cpuinfo')
  features = platform.processor() if not info.exists() else next(
      (line for line in info.read_text().splitlines()
       if line.startswith(('flags', 'Features'))), '')
  key = hashlib.sha256('\n'.join((
      SOURCE.read_text(), *FLAGS, jax.__version__, platform.machine(),
      features)).encode()).hexdigest()[:16]
  cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(cache).expanduser() / 'dsjax' / f'cpu-{key}.so'


def build() -> str:
  """Compiles the library unless it is there; what is missing, or ''."""
  target = path()
  if target.exists():
    return ''
  named = os.environ.get('CXX')
  compiler = next(filter(None, map(
      shutil.which, (named,) if named else COMPILERS)), None)
  if compiler is None:
    return 'no C++ compiler was found'
  native = '-march' if platform.machine() in ('x86_64', 'AMD64') else '-mcpu'
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
      made = pathlib.Path(folder, 'cpu.so')
      done = subprocess.run(
          (compiler, *FLAGS, f'{native}=native', '-isystem',
           jax.ffi.include_dir(), str(SOURCE), '-o', str(made)),
          capture_output=True, text=True, check=False)
      if done.returncode:
        return f'{compiler} failed: {done.stderr.strip()[-500:]}'
      made.replace(target)
  except OSError as error:
    return str(error)
  library.cache_clear()
  return ''


@functools.cache
def library() -> ctypes.CDLL | None:
  """The library, its kernels known to XLA; None where it was not built."""
  try:
    loaded = ctypes.CDLL(str(path()))
  except OSError:
    return None
  for name in TARGETS:
    jax.ffi.register_ffi_target(
        f'dsjax_{name}', jax.ffi.pycapsule(getattr(loaded, f'dsjax_{name}')),
        platform='cpu')
  return loaded


def lacks(call: tuple[Shaped, Shaped] | None = None) -> str:
  """What the kernels need and do not have, a sentence; or ''.

  Args:
    call: (queries, keys) of an attention, or None for any op.
  """
  if library() is None:
    return 'not built here; `python -m dsjax.kernels.cpu` does it'
  if call and call[1].dtype not in DTYPES:
    return f'KV of {call[1].dtype}; must be float32 or bfloat16'
  return ''


def panel() -> int:
  """Outputs that a panel of weights holds."""
  loaded = library()
  assert loaded is not None, lacks()
  return loaded.dsjax_panel()


def pack(w_OI: jax.Array) -> jax.Array:
  """Weights as panels w_QIp of p = panel() outputs; zeros fill the last."""
  p, (outputs, inputs) = panel(), w_OI.shape
  padded_OI = jnp.pad(w_OI, ((0, -outputs % p), (0, 0)))
  return padded_OI.reshape(-1, p, inputs).swapaxes(1, 2)


def multiply(x_SI: jax.Array, w_QIp: jax.Array) -> jax.Array:
  """x W^T: y_SO in x's dtype, O = Q p with what fills the last panel."""
  Q, _, p = w_QIp.shape
  out = jax.ShapeDtypeStruct((x_SI.shape[0], Q * p), jnp.float32)
  return jax.ffi.ffi_call('dsjax_multiply', out)(
      x_SI.astype(jnp.float32), w_QIp).astype(x_SI.dtype)


def attend(
    q_BNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    len_B: jax.Array, scale: float, softcap: float, window: int, *_: object
) -> jax.Array:
  """Attention of one new token a row: see decode_attention. It reads no page
  that a row does not need."""
  out = jax.ShapeDtypeStruct(q_BNH.shape, jnp.float32)
  return jax.ffi.ffi_call('dsjax_attend', out)(
      q_BNH.astype(jnp.float32), k_KPCH, v_KPCH, table_BM, len_B,
      scale=np.float32(scale), softcap=np.float32(softcap),
      window=np.int64(window)).astype(q_BNH.dtype)


if __name__ == '__main__':
  missing = build()
  print(f'CPU kernels: {missing}: steps run in XLA' if missing else
        f'CPU kernels: {path()}')
