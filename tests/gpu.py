"""Lowering for CUDA on a machine without a GPU."""

import warnings

from dsjax.kernels.compiled import described


def lower(step, *args):
  """The StableHLO of a jitted function, lowered for an H100.

  Newer JAX says that Pallas's Triton backend is deprecated: known, and no
  error here.
  """
  with described(), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'The Pallas Triton backend is dep')
    return step.trace(*args).lower(lowering_platforms=('cuda',)).as_text()
