"""Lowering for CUDA on a machine without a GPU."""

import inspect
import warnings

from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh


def lower(step, *args):
  """The StableHLO of a jitted function, lowered for an H100.

  Newer JAX wants to know the device, and says that Pallas's Triton backend
  is deprecated: known, and no error here.
  """
  named = dict(device_kind='NVIDIA H100 80GB HBM3', num_cores=132)
  if 'platform' in inspect.signature(AbstractDevice).parameters:
    named['platform'] = 'gpu'
  mesh = AbstractMesh((), (), abstract_device=AbstractDevice(**named))
  with use_abstract_mesh(mesh), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'The Pallas Triton backend is dep')
    return step.trace(*args).lower(lowering_platforms=('cuda',)).as_text()
