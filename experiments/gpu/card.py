"""A model on the device that is here, and two instances that share it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dsjax.checkpoints import weights
from dsjax.checkpoints.checkpoint import Model
from dsjax.config import zoo
from dsjax.config.model import ModelConfig

# Heads that every kernel takes; as large as a test needs.
SMALL = ModelConfig(name='small', num_layers=4, d_model=512, num_heads=8,
                    num_kv_heads=2, head_dim=64, d_ff=1024, vocab_size=1024,
                    max_len=2048, tied=False)
TINY = ModelConfig(name='tiny-64', num_layers=2, d_model=64, num_heads=2,
                   num_kv_heads=1, head_dim=64, d_ff=96, vocab_size=128,
                   max_len=256, tied=False)


def device_twice() -> Sequence[jax.Device]:
  """The first device, for two instances of one device each."""
  return [jax.devices()[0]] * 2


def random_model(config: ModelConfig, dtype: str) -> Model:
  """Random weights made where they are used: nothing as large is copied.

  Matrices are normal with deviation 1/sqrt(inputs), gains 1, biases 0.
  """
  key = jax.random.key(0)

  def make(leaf: str, layer: int | None) -> jax.Array:
    shape = config.leaf_shape(leaf)
    _, *inputs = weights.stored_shape(config, leaf)
    if not inputs:
      return jnp.full(shape, 0.0 if 'bias' in leaf else 1.0, dtype)
    salt = hash_of(f'{leaf}/{layer}')
    return _normal(jax.random.fold_in(key, salt), shape, dtype,
                   inputs[-1]**-0.5)

  return Model(config, weights.tree(config, make))


def hash_of(name: str) -> int:
  """A number of a name, the same in every process."""
  return int.from_bytes(name.encode()[-4:], 'big') ^ len(name) << 20


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype, scale):
  return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


def published(name: str, dtype: str = 'bfloat16') -> Model:
  """A model of dsjax.config.zoo with random weights."""
  return random_model(zoo.config(name), dtype)
