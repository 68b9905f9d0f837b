"""Kernels on the GPU that is here, or without one: lowered, interpreted.

JAX_PLATFORMS=cuda python -m pytest runs the tests marked `native` on a GPU,
through the kernels' own machine code; without it they interpret the kernels.
"""

import contextlib
import dataclasses
import os
import threading
import types
import warnings
from unittest import mock

import jax
import pytest
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import (
  interpret_pallas_call,
  shared_memory,
)

from dsjax.kernels import mosaic, tiles
from dsjax.kernels.compiled import described

NATIVE = os.environ.get('JAX_PLATFORMS') in ('cuda', 'gpu')
PALLAS = 'pallas' if NATIVE else 'pallas_interpret'
MOSAIC = 'mosaic' if NATIVE else 'mosaic_interpret'
PATIENCE_S = 20  # that a thread of an interpreted kernel waits for a barrier


def skip_without_hopper():
  """Of a native test of Mosaic kernels."""
  if NATIVE and (lacks := tiles.mosaic_lacks(None, tiles.device_kind())
                 ) != 'it has attention only':
    pytest.skip(lacks)


def lower(step, *args):
  """The StableHLO of a jitted function, lowered for an H100.

  Newer JAX says that Pallas's Triton backend is deprecated: known, and no
  error here.
  """
  with described(), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'The Pallas Triton backend is dep')
    return step.trace(*args).lower(lowering_platforms=('cuda',)).as_text()


class _Condition(threading.Condition):
  def wait(self, timeout=None):
    if not super().wait(PATIENCE_S):
      raise RuntimeError(f'waited {PATIENCE_S} s for a barrier')


@contextlib.contextmanager
def racing(module=mosaic):
  """Mosaic kernels, interpreted inside, must not race; and cannot hang.

  On a GPU they run, and nothing looks for races.

  module: kernels.mosaic, or a mutant of it.

  JAX 0.10 compiles a kernel anew for each program of its grid and thread;
  here once. (What is compiled is no different.)
  """
  if NATIVE:
    yield
    return
  compiled, lock = {}, threading.Lock()

  def run(jaxpr, consts, *args):
    with lock:
      if id(jaxpr) not in compiled:
        compiled[id(jaxpr)] = jaxpr, jax.jit(
            lambda consts, *args: jax.core.eval_jaxpr(
                jaxpr, consts, *args)).lower(consts, *args).compile()
    compiled[id(jaxpr)][1](consts, *args)

  params = module.interpreter()
  impatient = types.SimpleNamespace(
      **vars(threading) | dict(Condition=_Condition))
  interpret_pallas_call.reset_gpu_interpret_mode_state()
  with contextlib.ExitStack() as patched:
    patched.enter_context(mock.patch.object(
        module, 'interpreter', lambda: dataclasses.replace(
            params, detect_races=True, num_tma_threads_per_device=7)))
    patched.enter_context(mock.patch.object(
        shared_memory, 'threading', impatient))
    if jax.__version_info__ < (0, 11):
      patched.enter_context(mock.patch.object(thread_map, '_run_jaxpr', run))
    yield
  assert not interpret_pallas_call.get_races().races_found, 'a race'
