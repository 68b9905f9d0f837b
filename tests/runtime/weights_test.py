"""Stages that are cut alike read one copy of their weights."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsjax.checkpoints import checkpoint
from dsjax.config.engine import EngineConfig
from dsjax.kernels import build_cpu
from dsjax.model import sharding
from dsjax.runtime import weights
from dsjax.runtime.arrays import is_sound
from dsjax.runtime.engine import Engine
from tests.common import tiny

LIMITS = EngineConfig(max_len=16, page_size=8, num_pages=4, max_seqs=1,
                      prefill_tokens=16, prefill_seqs=1)
CONFIG = tiny.UNTIED
kinds = pytest.mark.parametrize('attention', ['xla', pytest.param(
    'cpu', marks=pytest.mark.skipif(bool(build_cpu.build()),
                                    reason='no C++ compiler'))])


def engine(model, attention, *devices):
  mesh = Mesh(np.array([jax.devices()[i] for i in devices]), (sharding.AXIS,))
  return Engine(model, [mesh], 'decode', dataclasses.replace(
      LIMITS, attention=attention))


def where(made):
  """Addresses of all weights."""
  return [part.data.unsafe_buffer_pointer()
          for x in jax.tree.leaves(made.stages[0].params)
          for part in x.addressable_shards]


def held(model):
  return [key for key in weights._HELD if key[0] == id(model.params)]


@kinds
def test_there_is_one_copy_of_each_cut(attention):
  gc.freeze()  # what other tests have left is not looked through
  model = checkpoint.Model(CONFIG, tiny.params(CONFIG) | {})
  one, two, cut = (engine(model, attention, *devices)
                   for devices in ((0,), (1,), (2, 3)))
  assert where(one) == where(two)
  assert len(where(cut)) == 2 * len(where(one))
  assert len(held(model)) == 2
  del one, two, cut
  gc.collect()
  assert not held(model)  # nor is there one that nobody reads


@kinds
def test_weights_that_one_lost_are_there_for_the_other(attention):
  model = checkpoint.Model(CONFIG, tiny.params(CONFIG) | {})
  one, two = (engine(model, attention, device) for device in (0, 1))
  was = where(one)
  for x in jax.tree.leaves(one.stages[0].params):
    x.delete()
  assert not one.is_sound() and is_sound(two.stages[0].params)
  one.start()
  assert one.is_sound() and where(one) == was
