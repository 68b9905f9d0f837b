"""Steps of other kernels serve: the tokens are those of the dense pass.

The interpreted ones of GPUs, and the CPU's own.
"""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsjax.checkpoints import checkpoint
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.kernels import build_cpu
from dsjax.model import products, sharding
from dsjax.runtime.orchestrator import serve
from dsjax.runtime.steps import abstract_steps, make_step, stage_shapes
from experiments.common import overrides as configs
from tests.common import gpu, tiny
from tests.common.samples import deep, thinned

CONFIG = tiny.UNTIED
MODEL = checkpoint.Model(CONFIG, tiny.params(CONFIG))
LIMITS = EngineConfig(
    max_len=48, page_size=8, num_pages=12, max_seqs=2, prefill_tokens=32,
    prefill_seqs=2, chunk_tokens=32, transfer_pages=1,
    attention='pallas_interpret')


def answers(placement, devices, limits=LIMITS):
  prompts = [tiny.prompt(n) for n in (5, 9, 37)]  # 37: in two chunks
  with serve(MODEL, placement, limits, devices=[
      jax.devices()[i] for i in devices]) as server:
    ids = [server.submit(p, max_tokens=4, ignore_eos=True) for p in prompts]
    while not all(server.requests[id].finished for id in ids):
      server.poll()
    return prompts, [list(server.output(id).tokens) for id in ids]


@pytest.mark.parametrize('placement, devices', [
    (Placement(prefill=[Plan(2)], decode=[Plan(1)]), (4, 5, 1)),
    *deep((Placement(chunked=[Plan()]), (0,)))], ids=('tp2_tp1', 'chunked'))
def test_the_tokens_are_those_of_the_dense_pass(placement, devices):
  prompts, got = answers(placement, devices)
  assert got == [tiny.greedy(p, 4, CONFIG) for p in prompts]


needs_compiler = pytest.mark.skipif(bool(build_cpu.build()),
                                    reason='no C++ compiler')
OWN = dataclasses.replace(LIMITS, attention='cpu')


@needs_compiler
@pytest.mark.parametrize('placement, devices', [
    (Placement(prefill=[Plan(1, 2)], decode=[Plan(3)]), (0, 1, 2, 3, 4)),
    (Placement(chunked=[Plan()]), (0,)),
    *deep((Placement(prefill=[Plan()], decode=[Plan(2)]), (0, 4, 5)))],
                         ids=str)
def test_the_cpus_own_kernels_serve(placement, devices):
  prompts, got = answers(placement, devices, OWN)
  assert got == [tiny.greedy(p, 4, CONFIG) for p in prompts]


@needs_compiler
@thinned('tp, tied, dtype', 5, [1, 2, 3], [False, True],
         ['float32', 'bfloat16'])
def test_packed_weights_are_those_that_were_loaded(tp, tied, dtype):
  config = dataclasses.replace(CONFIG, tied=tied)
  params = jax.tree.map(lambda x: x.astype(dtype), tiny.params(config))
  mesh = Mesh(np.array(jax.devices()[:tp]), (sharding.AXIS,))
  stage = sharding.cut(config, tp), (0, config.num_layers), mesh
  plain = sharding.place_params(*stage, params)
  packed = products.packed_tree(sharding.place_params(*stage, params), mesh)
  abstract = products.packed_tree(
      sharding.abstract_params(*stage, dtype), mesh)
  assert jax.tree.map(lambda x: (x.shape, x.sharding), packed) == jax.tree.map(
      lambda x: (x.shape, x.sharding), abstract)
  layers = plain['layers'][0], packed['layers'][0]
  x_SD = np.eye(config.d_model, dtype=dtype)
  for names in (products.QKV, products.UP_GATE):
    for want, got in zip(*(products.project_all(layer, names, x_SD)
                           for layer in layers), strict=True):
      np.testing.assert_array_equal(want, got)
  for leaf in ('o_DNH', 'down_DF'):
    inputs = products.INPUTS.get(leaf, 1)
    x_SI = np.eye(np.prod(layers[0][leaf].shape[1:]), dtype=dtype)
    np.testing.assert_array_equal(*(products.project(
        layer[leaf], x_SI, inputs) for layer in layers))
  rows = np.array([0, config.vocab_size // 2, config.vocab_size - 1])
  np.testing.assert_array_equal(*(products.rows_of(tree['embed_VD'], rows)
                                  for tree in (plain, packed)))
  assert isinstance(packed['embed_VD'], products.Panels) == tied


def test_the_setting_reaches_the_steps():
  config = configs.override(configs.load('demo'), (
      'engine.attention=pallas_interpret',))
  mesh = Mesh(np.array(jax.devices()[:1]), (sharding.AXIS,))
  shapes = [stage_shapes(CONFIG, [mesh], 'decode', c, c.instance('decode'))[0]
            for c in (config.engine, EngineConfig(attention='xla'))]
  assert [s.attention for s in shapes] == ['pallas_interpret', 'xla']
  assert not any(s.panels for s in shapes)


@needs_compiler
@pytest.mark.parametrize('tp, kv_dtype, picked', [
    (1, None, 'cpu'), (2, None, 'cpu'), (1, 'int8', 'xla')])
def test_none_is_the_cpus_own_where_it_is_built(tp, kv_dtype, picked):
  mesh = Mesh(np.array(jax.devices()[:tp]), (sharding.AXIS,))
  asked = EngineConfig(kv_dtype=kv_dtype)
  shapes, = stage_shapes(CONFIG, [mesh], 'decode', asked,
                         asked.instance('decode'))
  assert (shapes.attention, shapes.panels) == (picked, True)


def test_an_unknown_attention_is_an_error_that_names_the_allowed():
  with pytest.raises(InputError, match="EngineConfig.attention='flash': must "
                     "be None, 'xla', 'cpu', 'pallas', 'pallas_interpret' or"):
    EngineConfig(attention='flash')


def test_gpu_kernels_on_cpu_are_an_error_before_anything_is_placed():
  with pytest.raises(InputError, match="attention='pallas': must be None, "
                     "'xla', 'cpu' or 'pallas_interpret' on a cpu"):
    answers(Placement(colocated=[Plan()]), (0,), dataclasses.replace(
        LIMITS, attention='pallas'))


@pytest.mark.deep
def test_float8_pages_serve():
  """Kernels and references agree; most tokens are those of the dense pass."""
  limits = dataclasses.replace(LIMITS, kv_dtype='bfloat16', checksum=True,
                               decode_kv_dtype='float8_e4m3fn')
  placement = Placement(prefill=[Plan()], decode=[Plan(2)])
  prompts, got = answers(placement, (4, 0, 1), limits)
  assert got == answers(placement, (4, 0, 1), dataclasses.replace(
      limits, attention='xla'))[1]
  dense = [tiny.greedy(p, 4, CONFIG) for p in prompts]
  assert sum(a == b for x, y in zip(got, dense, strict=True)
             for a, b in zip(x, y, strict=True)) >= 8


@pytest.mark.parametrize('kv_dtype', ['bfloat16', *deep(
    'int8', 'float8_e4m3fn')])
def test_every_step_lowers_for_cuda(kv_dtype):
  config = dataclasses.replace(zoo.config('llama-3-8b'), num_layers=2)
  limits = EngineConfig(num_pages=64, dtype='bfloat16', max_seqs=4,
                        kv_dtype=kv_dtype)
  mesh = Mesh(np.array(jax.devices()[:2]), (sharding.AXIS,))
  calls = {}
  for role in ('prefill', 'decode', 'chunked'):
    instance = limits.instance(role)
    shapes = stage_shapes(config, [mesh], role, limits, instance)[0]._replace(
        attention='pallas')
    for step, args in abstract_steps(shapes, instance):
      text = gpu.lower(step, *args)
      calls[role, step.__name__] = text.count('@__gpu$xla.gpu.triton')
  cache, ids = args[1], jax.ShapeDtypeStruct((4,), np.int32)
  gather = make_step(shapes, 'gather', (None, None))
  pages = jax.eval_shape(gather, cache, ids)
  for step, args in ((gather, (cache, ids)),
                     (make_step(shapes, 'scatter'), (cache, ids, pages))):
    calls[step.__name__] = gpu.lower(step, *args).count('@__gpu$xla.gpu.trit')
  copied = len(jax.tree.leaves(cache))
  # Once for all layers alike: a write and the attention of it (or both).
  assert calls == {
      ('prefill', 'prefill'): 2, ('decode', 'decode'): 2,
      ('chunked', 'decode'): 2, ('chunked', 'prefill'): 3,
      'gather': copied, 'scatter': copied}


@pytest.mark.parametrize('kind, dtype, picked', [
    ('H100', 'bfloat16', 'mosaic'), ('H100', 'float32', 'pallas'),
    ('A100', 'bfloat16', 'pallas')])
def test_the_device_and_dtype_pick(kind, dtype, picked):
  device = types.SimpleNamespace(platform='cuda', device_kind=f'NVIDIA {kind}')
  mesh = types.SimpleNamespace(size=1, devices=np.array([device]))
  asked = EngineConfig(dtype=dtype, num_pages=9)

  def attention(asked):
    shape, = stage_shapes(zoo.config('llama-3-8b'), [mesh], 'decode', asked,
                          asked.instance('decode'))
    return shape.attention

  assert attention(asked) == picked
  named = dataclasses.replace(asked, attention='mosaic')
  if picked == 'mosaic':
    assert attention(named) == 'mosaic'
  else:
    with pytest.raises(InputError, match="EngineConfig.attention: impl='mosa"):
      attention(named)


def test_the_steps_lower_for_cuda_with_mosaic():
  config = dataclasses.replace(zoo.config('llama-3-8b'), num_layers=2)
  limits = EngineConfig(num_pages=64, dtype='bfloat16', max_seqs=4)
  mesh = Mesh(np.array(jax.devices()[:2]), (sharding.AXIS,))
  instance = limits.instance('chunked')
  shapes = stage_shapes(config, [mesh], 'chunked', limits, instance)[0]
  step, args = abstract_steps(shapes._replace(attention='mosaic'),
                              instance)[-1]
  text = gpu.lower(step, *args)
  assert text.count('custom_call @mosaic_gpu_v2') == 2  # prefill and decode
  assert text.count('@__gpu$xla.gpu.triton') == 1  # the write
