"""Compiles cpu.cc for this machine, where there is a C++ compiler.

  python -m kernels.build_cpu

$CXX, or c++, g++ or clang++. The library goes into the user's cache folder.
"""

import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax

from dsjax.kernels import cpu

COMPILERS = ('c++', 'g++', 'clang++')


def build() -> str:
  """Compiles the library unless it is there; what is missing, or ''."""
  target = cpu.path()
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
          (compiler, *cpu.FLAGS, f'{native}=native', '-isystem',
           jax.ffi.include_dir(), str(cpu.SOURCE), '-o', str(made)),
          capture_output=True, text=True, check=False)
      if done.returncode:
        return f'{compiler} failed: {done.stderr.strip()[-500:]}'
      made.replace(target)
  except OSError as error:
    return str(error)
  cpu.library.cache_clear()
  return ''


if __name__ == '__main__':
  missing = build()
  print(f'CPU kernels: {missing}: steps run in XLA' if missing else
        f'CPU kernels: {cpu.path()}')
