"""The transformer's parts by themselves: products, norms, angles, experts.

families_test has those that whole models show.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsjax.model import products, transformer
from tests.common import tiny

CONFIG = tiny.CONFIG
i32 = functools.partial(np.asarray, dtype=np.int32)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize('shape', [(12, 32), (4, 8, 32)], ids=str)
@pytest.mark.parametrize(
    'count', [1, products.SMALL, products.SMALL + 1, 40])
def test_project_is_a_product_with_the_transpose(shape, count):
  w, x = normal(*shape), normal(count, 32, seed=1)
  want = np.tensordot(x.astype(np.float64), w.astype(np.float64), (1, -1))
  got = jax.jit(products.project)(w, x)
  assert got.shape == (count, *shape[:-1])
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize('rope_base', [1e4, 1e5])
def test_rotary_is_a_complex_turn(rope_base):
  config = dataclasses.replace(CONFIG, rope_base=rope_base)
  x_SNH = normal(128, 3, config.head_dim)
  got = transformer.rotary(x_SNH, *transformer.angles(config, np.arange(128)))
  np.testing.assert_allclose(got, tiny.rotate(x_SNH, rope_base), rtol=0,
                             atol=1e-4)  # angles of 127 hold 1e-5


def test_rms_norm():
  x, gain = 3 * normal(5, 32), normal(32, seed=1)
  np.testing.assert_allclose(
      transformer.rms_norm(x, gain, 1e-5),
      tiny.norm(x.astype(np.float64), gain, 1e-5), rtol=0, atol=1e-5)
  zeros = np.zeros((2, 32), np.float32)
  assert not transformer.rms_norm(zeros, gain, 1e-5).any()


# --- experts -----------------------------------------------------------------

MOE = dataclasses.replace(CONFIG, num_experts=6, experts_per_token=2, d_ff=24)


@functools.cache
def expert_layer():
  return {leaf: normal(*MOE.leaf_shape(leaf), seed=n) / MOE.d_model**0.5
          for n, leaf in enumerate(('router_ED', 'gate_EFD', 'up_EFD',
                                    'down_EDF'))}


def experts_oracle(h_SD, layer, config):
  """A token and an expert at a time, in float64."""
  layer = {leaf: x.astype(np.float64) for leaf, x in layer.items()}
  out_SD = np.zeros(h_SD.shape)
  for s, h_D in enumerate(h_SD.astype(np.float64)):
    weight_E = np.exp(tiny.log_softmax(layer['router_ED'] @ h_D))
    best = np.argsort(-weight_E)[:config.experts_per_token]
    total = weight_E[best].sum() if config.renormalize else 1
    for e in best:
      gate_F = layer['gate_EFD'][e] @ h_D
      h_F = gate_F / (1 + np.exp(-gate_F)) * (layer['up_EFD'][e] @ h_D)
      out_SD[s] += weight_E[e] / total * (layer['down_EDF'][e] @ h_F)
  return out_SD


@pytest.mark.parametrize('tp', [1, 2, 3])
@pytest.mark.parametrize('renormalize', [True, False])
@pytest.mark.parametrize('count', [1, 5, 40])
def test_experts_equal_the_loop(count, renormalize, tp):
  config = dataclasses.replace(MOE, renormalize=renormalize)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:tp]), ('model',))
  h_SD = normal(count, MOE.d_model, seed=9)
  got = jax.jit(functools.partial(transformer.experts, config, mesh=mesh))(
      expert_layer(), h_SD)
  np.testing.assert_allclose(got, experts_oracle(
      h_SD, expert_layer(), config), rtol=0, atol=1e-5)


def test_all_tokens_of_one_expert():
  """Groups of no rows, and shards without work."""
  layer = expert_layer() | {'router_ED': np.zeros((6, 32), np.float32)}
  h_SD = normal(7, 32)
  three = jax.sharding.Mesh(np.array(jax.devices()[:3]), ('model',))
  for mesh in (None, three):  # ties go to experts 0 and 1
    experts = jax.jit(functools.partial(transformer.experts, MOE, mesh=mesh))
    np.testing.assert_allclose(experts(layer, h_SD),
                               experts_oracle(h_SD, layer, MOE),
                               rtol=0, atol=1e-5)


def test_a_token_of_infinities_leaves_the_others_alone():
  h_SD = normal(5, 32)
  bad_SD = h_SD.copy()
  bad_SD[3] = np.inf
  step = jax.jit(functools.partial(transformer.experts, MOE))
  good, got = (step(expert_layer(), x) for x in (h_SD, bad_SD))
  kept = [0, 1, 2, 4]
  np.testing.assert_allclose(got[kept, :], good[kept, :], rtol=0, atol=1e-6)


def test_sharded_experts_move_no_weights():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('model',))
  split, whole = (jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)) for axes in (['model'], []))
  layer = {leaf: jax.device_put(x, whole if leaf == 'router_ED' else split)
           for leaf, x in expert_layer().items()}
  text = jax.jit(functools.partial(transformer.experts, MOE, mesh=mesh)).lower(
      layer, jax.device_put(normal(5, 32), whole)).compile().as_text()
  assert 'all-gather' not in text and 'all-reduce' in text


def test_page_of():
  table = i32([[4, 2, 9], [7, 0, 1]])
  got = transformer.page_of(table, i32([0, 1, 1, 0]), i32([0, 8, 3, 11]),
                            np.array([True, True, True, False]), 4, 10)
  assert got.tolist() == [4, 1, 7, 10]
