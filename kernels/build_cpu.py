"""Compiles cpu.cc for this machine, where there is a C++ compiler.

  python -m dsjax.kernels.build_cpu

$CXX with its options, or c++, g++ or clang++. The library goes into the user's
cache folder.
"""

import ctypes
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax

from dsjax.kernels import cpu

COMPILERS = ('c++', 'g++', 'clang++')


def build() -> str:
  """Compiles the library unless it is there; what is missing, or ''."""
  if cpu.loaded():
    return ''
  native = '-march' if platform.machine() in ('x86_64', 'AMD64') else '-mcpu'
  try:
    command = shlex.split(os.environ.get('CXX', '')) or [
        *filter(shutil.which, COMPILERS)][:1]
    if not command or not shutil.which(command[0]):
      return 'no C++ compiler was found'
    target = cpu.path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
      made = pathlib.Path(folder, 'cpu.so')
      done = subprocess.run(
          (*command, *cpu.FLAGS, f'{native}=native', '-isystem',
           jax.ffi.include_dir(), str(cpu.SOURCE), '-o', str(made)),
          capture_output=True, text=True, check=False)
      if done.returncode:
        return f'{command[0]} failed: {done.stderr.strip()[-500:]}'
      ctypes.CDLL(str(made))  # raises what keeps it from being loaded
      made.replace(target)
  except (OSError, RuntimeError, ValueError) as error:  # no home, open quotes
    return str(error)
  cpu.loaded.cache_clear()
  return ''


if __name__ == '__main__':
  missing = build()
  print(f'CPU kernels: {missing}: steps run in XLA' if missing else
        f'CPU kernels: {cpu.path()}')
