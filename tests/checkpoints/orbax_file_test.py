import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsjax.checkpoints import checkpoint
from dsjax.checkpoints.hf_weights import load_hf
from dsjax.checkpoints.orbax_file import load_orbax, read_config, save_orbax
from dsjax.checkpoints.weights import random_params
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import Request, Sampling
from dsjax.model import sharding
from dsjax.runtime import orchestrator
from tests.checkpoints import hf_weights_test as hf_test
from tests.common import tiny

CONFIG = ModelConfig(
    name='tiny', num_layers=2, d_model=32, num_heads=4, num_kv_heads=4,
    head_dim=8, d_ff=64, vocab_size=64, max_len=128, eos_ids=(2, 3),
    windows=(0, 8), rope_divisors=(1.0, 1.0, 2.5, 8.0))
PARAMS = random_params(CONFIG, 0)


PLANS = ((1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2))
FEWER = dataclasses.replace(  # than shards of 3 or 4: replicated
    CONFIG, name='fewer', num_kv_heads=2, tied=False, vocab_size=63)
WIDE = dataclasses.replace(  # gaps: three heads a kv head, two places for it
    CONFIG, name='wide', num_heads=6, num_kv_heads=2, qkv_bias=True,
    mlp_bias=True, out_bias=True, d_ff=50)
MOE = dataclasses.replace(CONFIG, name='moe', num_experts=12,
                          experts_per_token=2)


def stages(config, tp, pp):
  """(layout, span, mesh) of each stage of a plan."""
  meshes, = sharding.make_meshes(
      config, Placement(colocated=[Plan(tp, pp)]), jax.devices())
  return [(sharding.cut(config, tp), span, mesh) for span, mesh in zip(
      sharding.spans(config.num_layers, pp), meshes, strict=True)]


def read(config, params):
  """All of it, on one device."""
  stage, = stages(config, 1, 1)
  return params.place(*stage)


def same(got, want):
  """Equal values, dtypes and shardings."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    assert x.dtype == y.dtype and x.sharding == y.sharding
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp('orbax') / 'model'
  save_orbax(path, CONFIG, PARAMS, chunk_bytes=1024)
  return path


def error_of(path, **arguments):
  with pytest.raises(InputError) as error:
    load_orbax(path, **arguments)
  assert str(path) in str(error.value)
  return str(error.value)


def test_round_trip(saved):
  config, params = load_orbax(saved)
  assert config == CONFIG
  got = read(config, params)
  assert jax.tree.structure(got) == jax.tree.structure(PARAMS)
  jax.tree.map(np.testing.assert_array_equal, got, PARAMS)


@pytest.mark.parametrize('config', (CONFIG, FEWER, WIDE, MOE),
                         ids=lambda c: c.name)
def test_every_plan_reads_what_it_would_place(tmp_path, config):
  params = random_params(config, 1)
  save_orbax(tmp_path / 'model', config, params, chunk_bytes=1024)
  _, stored = load_orbax(tmp_path / 'model')
  for plan in PLANS:
    for stage in stages(config, *plan):
      same(stored.place(*stage), sharding.place_params(*stage, params))


@pytest.mark.parametrize('config', (FEWER, WIDE, MOE), ids=lambda c: c.name)
@pytest.mark.parametrize('plan', ((2, 1), (3, 1), (2, 2)), ids=str)
def test_no_array_is_whole_on_the_host(tmp_path, config, plan, monkeypatch):
  """A shard is read into np.zeros of its shape, of its stage's leaves only.

  And tensorstore decodes chunks, which are smaller than an array too.
  """
  save_orbax(tmp_path / 'model', config, random_params(config, 1),
             chunk_bytes=1024)
  _, stored = load_orbax(tmp_path / 'model')
  made, zeros = [], np.zeros

  def spy(shape, *args, **kwargs):
    made.append(tuple(np.atleast_1d(shape).tolist()))
    return zeros(shape, *args, **kwargs)

  for stage in stages(config, *plan):
    made.clear()
    monkeypatch.setattr(np, 'zeros', spy)
    placed = stored.place(*stage)
    monkeypatch.undo()
    assert sorted(made) == sorted(
        piece for x in jax.tree.leaves(placed) for piece in
        [x.sharding.shard_shape(x.shape)]
        * (1 if x.sharding.is_fully_replicated else plan[0]))
    assert all(x.ndim == 1 or path[-1].key == 'router_ED'
               for path, x in jax.tree_util.tree_leaves_with_path(placed)
               if x.sharding.is_fully_replicated)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(stored.path).item_metadata.tree
  for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, 'storage')):
    assert np.prod(leaf.storage.chunk_shape) * 4 <= 1024


def test_a_sharded_model_is_saved(tmp_path):
  stage, = stages(CONFIG, 4, 1)
  save_orbax(tmp_path / 'model', CONFIG, sharding.place_params(*stage, PARAMS))
  jax.tree.map(np.testing.assert_array_equal,
               read(*load_orbax(tmp_path / 'model')), PARAMS)


def test_bfloat16(saved):
  stage, = stages(CONFIG, 3, 1)
  _, params = load_orbax(saved, 'bfloat16')
  same(params.place(*stage), sharding.place_params(*stage, jax.tree.map(
      lambda x: x.astype('bfloat16'), PARAMS)))


@pytest.mark.parametrize('plan', ((1, 1), (3, 2)), ids=str)
def test_it_is_served_from_the_folder(tmp_path, plan):
  config, params = tiny.UNTIED, tiny.params(tiny.UNTIED)
  save_orbax(tmp_path / 'model', config, params)
  model = checkpoint.load(tmp_path / 'model')
  assert model.config == config and model.tokenizer is None
  limits = EngineConfig(max_len=32, page_size=4, num_pages=12, max_seqs=2,
                        prefill_tokens=32, prefill_seqs=2)
  with orchestrator.serve(
      model, Placement(colocated=[Plan(*plan)]), limits,
      report=lambda *_: None) as server:
    server.run([Request(0, 0.0, tiny.prompt(9), Sampling(
        max_tokens=8, ignore_eos=True))])
    assert list(server.output(0).tokens) == tiny.greedy(
        tiny.prompt(9), 8, config)


@pytest.mark.parametrize('kind', ['opt', 'gemma3', 'qwen3_moe', 'olmo2'])
def test_other_families(tmp_path, kind):
  (tmp_path / 'hf').mkdir()
  config, params = load_hf(hf_test.save(tmp_path / 'hf', *hf_test.make(kind)))
  save_orbax(tmp_path / 'orbax', config, params)
  again, stored = load_orbax(tmp_path / 'orbax')
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, read(config, stored), params)


# --- bad folders -------------------------------------------------------------


def test_a_folder_in_use_is_not_written_over(tmp_path):
  (tmp_path / 'x').write_text('mine')
  with pytest.raises(InputError, match='empty'):
    save_orbax(tmp_path, CONFIG, PARAMS)
  assert (tmp_path / 'x').read_text() == 'mine'


def test_no_folder(tmp_path):
  assert 'dsjax.json' in error_of(tmp_path / 'none')


def write(path, **changes):
  fields = dataclasses.asdict(CONFIG) | changes
  (path / 'dsjax.json').write_text(json.dumps(
      {k: v for k, v in fields.items() if v != 'absent'}))
  return path


@pytest.mark.parametrize('field, value', [
    ('surprise', 1), ('d_model', 'absent'), ('d_model', 'x'), ('d_model', -1),
    ('rope_divisors', [1.0, 2.0]), ('rope_divisors', 3),
    ('eos_ids', 3)])
def test_a_bad_configuration(tmp_path, field, value):
  write(tmp_path, **{field: value})
  with pytest.raises(InputError, match='dsjax.json'):
    read_config(tmp_path)


@pytest.mark.parametrize('field, value, words', [
    ('d_ff', 65, '(32, 65)'), ('num_layers', 1, 'not a parameter'),
    ('tied', False, 'head_VD')])
def test_another_tree(saved, field, value, words):
  try:
    windows = {'windows': ()} if field == 'num_layers' else {}
    write(saved, **{field: value}, **windows)
    assert words in error_of(saved)
  finally:
    write(saved)


def test_no_params(tmp_path):
  assert 'params' in error_of(write(tmp_path))


def test_damaged_params(tmp_path):
  path = tmp_path / 'model'
  save_orbax(path, CONFIG, PARAMS)
  (path / 'params' / '_METADATA').write_text('{')
  assert 'params' in error_of(path)


def test_damaged_arrays(tmp_path):
  path = tmp_path / 'model'
  save_orbax(path, CONFIG, PARAMS)
  _, stored = load_orbax(path)
  for file in (path / 'params' / 'd').iterdir():
    file.write_bytes(file.read_bytes()[:-100])
  stage, = stages(CONFIG, 2, 1)
  with pytest.raises(InputError, match='unreadable') as error:
    stored.place(*stage)
  assert str(path) in str(error.value)
