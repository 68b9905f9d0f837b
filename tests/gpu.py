"""Lowering for CUDA on a machine without a GPU."""

import inspect
import warnings

from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def described(kind='NVIDIA H100 80GB HBM3'):
  """A context in which this is the device; newer JAX wants to know it."""
  named = dict(device_kind=kind, num_cores=132)
  if 'platform' in inspect.signature(AbstractDevice).parameters:
    named['platform'] = 'gpu'
  return use_abstract_mesh(AbstractMesh(
      (), (), abstract_device=AbstractDevice(**named)))


def lower(step, *args):
  """The StableHLO of a jitted function, lowered for an H100.

  Newer JAX says that Pallas's Triton backend is deprecated: known, and no
  error here.
  """
  with described(), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'The Pallas Triton backend is dep')
    return step.trace(*args).lower(lowering_platforms=('cuda',)).as_text()
