"""Kernels in machine code: registers and the like. Nothing is run.

For a GPU that is not here it needs XLA's CUDA plugin, NVIDIA's assembler (`make
.venv-aot/installed`) and a description of the GPU; for the GPU that is here,
the assembler alone.
"""

import contextlib
import importlib.util
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from dsjax.kernels import paged

# paged.Device: description, device_kind.
GPUS = {'A100': ('a100', 'NVIDIA A100-SXM4-80GB'),
        'H100': ('h100', 'NVIDIA H100 80GB HBM3')}
FOLDER = pathlib.Path(__file__).resolve().parent.parent.joinpath(
    'experiments', 'aot', 'gpus')
CUDA = pathlib.Path(sysconfig.get_path('purelib')) / 'nvidia' / 'cu13'


class Kernel(NamedTuple):
  """What a launch of a compiled kernel takes. shared: bytes a program."""

  registers: int
  spilled: int
  grid: tuple[int, ...]
  threads: int
  shared: int


def described(
    kind: str = GPUS['H100'][1]
) -> contextlib.AbstractContextManager[Any]:
  """A context in which this is the device; newer JAX wants to know it."""
  named: dict[str, Any] = dict(device_kind=kind,
                               num_cores=paged.device(kind).cores)
  if 'platform' in inspect.signature(AbstractDevice).parameters:
    named['platform'] = 'gpu'
  return use_abstract_mesh(AbstractMesh(
      (), (), abstract_device=AbstractDevice(**named)))


def is_here() -> bool:
  """Whether JAX uses a GPU that is here."""
  return jax.default_backend() in ('gpu', 'cuda')


def available(name: str) -> bool:
  """Whether kernels can be compiled for this paged.Device here."""
  return assembler() is not None and (is_here() or (
      name in GPUS and importlib.util.find_spec('jax_plugins') is not None
      and FOLDER.is_dir()))


def assembler() -> str | None:
  """NVIDIA's ptxas: of Python's packages, the PATH or the toolkit's folder."""
  return shutil.which('ptxas', path=os.pathsep.join((
      str(CUDA / 'bin'), os.environ.get('PATH', ''), '/usr/local/cuda/bin')))


def environment(dump: str | pathlib.Path) -> dict[str, str]:
  """To be set before jax is first used; `dump`: an empty folder."""
  data = f'--xla_gpu_cuda_data_dir={CUDA} ' * (CUDA / 'bin').is_dir()
  return {'MOSAIC_GPU_DUMP_TO': str(dump), 'XLA_FLAGS':
          f'{data}--xla_dump_to={dump} --xla_dump_emitter_re=ptx'}


def devices(name: str, count: int = 1) -> list[Any]:
  """Described GPUs of this name, on one machine."""
  from jax.experimental import topologies
  return list(topologies.get_topology_desc(
      '', platform='cuda', topology=f'1x1x{count}',
      target_config=(FOLDER / f'{GPUS[name][0]}.txtpb').read_text()).devices)


def compile(name: str, dump: str | pathlib.Path, fn: Callable[..., Any],
            args: Any, donate: tuple[int, ...] = ()) -> dict[str, Kernel]:
  """{kernel name: Kernel} of a function of abstract args on a paged.Device.

  That is the GPU that is here, if one is.
  """
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1] if is_here()
                                    else devices(name)), ('gpu',))
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=where), args)
  return compile_step(dump, jax.jit(fn, donate_argnums=donate), args, mesh)[2]


def compile_step(dump: str | pathlib.Path, step: Any, args: Any,
                 mesh: jax.sharding.Mesh) -> tuple[Any, Any, dict[str, Kernel]]:
  """A jitted step of abstract arguments on a mesh of `devices`.

  dump: that of `environment`; what was dumped before is removed.

  Returns:
    (jax.stages.Lowered, jax.stages.Compiled, {kernel name: Kernel}).
  """
  dump = pathlib.Path(dump)
  for path in dump.glob('*_*'):  # all but a log that may lie there
    shutil.rmtree(path) if path.is_dir() else path.unlink()
  with jax.set_mesh(mesh):
    lowered = step.lower(*args)
    made = lowered.compile()
  files = sorted(p for p in dump.glob('module_*') if p.is_file())
  arch = 'sm_' + mesh.devices.flat[0].compute_capability.replace('.', '')
  said = ''.join(assemble(p, 'sm_90a' if arch == 'sm_90' else arch)
                 for p in files if p.suffix == '.ptx' and p.stat().st_size)
  launches = ''.join(p.read_text() for p in files
                     if p.name.endswith('thunk_sequence.txt'))
  ours, calls = mosaic(dump, made.as_text())
  return lowered, made, read(said + ours, launches + calls)


_MADE = {}  # what `mosaic` found: it compiles a kernel once a process


def mosaic(dump: pathlib.Path, text: str) -> tuple[str, str]:
  """(what ptxas said, lines as in XLA's list) of the Mosaic kernels of `text`.

  Mosaic compiles its kernels itself, and writes what ptxas says and the
  launch, among much else, to `dump`.
  """
  hashes = dict.fromkeys(re.findall(r'kernel_hash = "(.*?)", module', text))
  new = [key for key in hashes if key not in _MADE]
  dumped = sorted(dump.glob('*.ptxas'))
  if len(new) != len(dumped) or len(new) > 1:
    raise RuntimeError(f'{len(new)} new Mosaic kernels, {len(dumped)} dumped')
  for key, path in zip(new, dumped, strict=True):
    name, *grid, threads, shared = re.findall(
        r'gpu.launch_func .*?@(\w+)_mosaic_gpu_kernel::.*?blocks in '
        r'\(%c(\d+)\w*, %c(\d+)\w*, %c(\d+)\w*\) threads in \(%c(\d+)'
        r'.*?dynamic_shared_memory_size %c(\d+)_i32',
        path.with_suffix('.mlir-passes.log').read_text())[0]
    _MADE[key] = (path.read_text().replace('_mosaic_gpu_kernel', ''),
                  f'{name} grid: [{", ".join(grid)}] threads: [{threads}, 1, '
                  f'1] shared_memory: {shared}\n')
  return (''.join(_MADE[key][0] for key in hashes),
          ''.join(_MADE[key][1] for key in hashes))


def assemble(path: pathlib.Path, arch: str) -> str:
  """What `ptxas -v` says of a PTX file."""
  with tempfile.NamedTemporaryFile() as out:
    return subprocess.run(
        [str(assembler()), '-v', f'-arch={arch}', path, '-o', out.name],
        capture_output=True, text=True, check=True).stderr


def read(said: str, launches: str) -> dict[str, Kernel]:
  """{name: Kernel} from what ptxas says and XLA's list of launches."""
  used = {}
  for part in said.split('Compiling entry function')[1:]:
    used[part.split("'")[1]] = (
        int(re.findall(r'Used (\d+) registers', part)[0]),
        sum(map(int, re.findall(r'(\d+) bytes spill', part))))
  matches = re.findall(r'(\w+) grid: \[([\d, ]+)\] threads: \[(\d+).*?'
                       r'shared_memory: (\d+)', launches)
  return {name: Kernel(*used[name], tuple(map(int, grid.split(','))),
                       int(threads), int(shared))
          for name, grid, threads, shared in matches if name in used}
