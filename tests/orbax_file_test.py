import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsjax import checkpoint
from dsjax.base import InputError, ModelConfig, RopeScaling
from dsjax.hf import load_hf
from dsjax.orbax_file import load_orbax, read_config, save_orbax
from dsjax.weights import random_params
from tests import hf_test

CONFIG = ModelConfig(
    name='tiny', num_layers=2, d_model=32, num_heads=4, num_kv_heads=4,
    head_dim=8, d_ff=64, vocab_size=64, max_len=128, eos_ids=(2, 3),
    windows=(0, 8), rope_scaling=RopeScaling('llama3', 8.0, 64))
PARAMS = random_params(CONFIG, 0)


def split(mesh):
  """Matrices by their first axis, o and down by their second."""
  def one(path, leaf):
    name = path[-1].key
    spec = (PartitionSpec() if len(leaf.shape) == 1 else
            PartitionSpec(None, 'model') if name in ('o_DNH', 'down_DF') else
            PartitionSpec('model'))
    return NamedSharding(mesh, spec)
  return lambda tree: jax.tree_util.tree_map_with_path(one, tree)


@pytest.fixture
def mesh():
  return Mesh(np.array(jax.devices()[:4]), ('model',))


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


def test_numpy_round_trip(saved):
  config, params = load_orbax(saved)
  assert config == CONFIG
  assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
  jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
  assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))


def test_every_leaf_has_the_asked_sharding(saved, mesh):
  _, params = load_orbax(saved, split(mesh))
  wanted = split(mesh)(PARAMS)
  for leaf, sharding, want in zip(
      *map(jax.tree.leaves, (params, wanted, PARAMS)), strict=True):
    assert leaf.sharding == sharding
    np.testing.assert_array_equal(leaf, want)


def test_no_array_is_whole_on_the_host(saved, mesh, monkeypatch):
  """orbax reads each shard into np.zeros of the shard's shape; see them all.

  And tensorstore decodes chunks, which are smaller than an array too.
  """
  made, zeros = [], np.zeros

  def spy(shape, *args, **kwargs):
    made.append(tuple(np.atleast_1d(shape)))
    return zeros(shape, *args, **kwargs)

  monkeypatch.setattr(np, 'zeros', spy)
  load_orbax(saved, split(mesh))
  monkeypatch.undo()
  shards = [s.shard_shape(leaf.shape) for s, leaf in zip(
      jax.tree.leaves(split(mesh)(PARAMS)), jax.tree.leaves(PARAMS),
      strict=True)]
  for shape in set(shards):  # read once for each place
    assert made.count(shape) >= shards.count(shape), shape
  whole = {leaf.shape for leaf in jax.tree.leaves(PARAMS) if leaf.ndim > 1}
  assert whole.isdisjoint(made)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    stored = reader.metadata(saved / 'params').item_metadata.tree
  for leaf in jax.tree.leaves(stored, is_leaf=lambda x: hasattr(x, 'storage')):
    assert np.prod(leaf.storage.chunk_shape) * 4 <= 1024


def test_a_sharded_model_is_saved(tmp_path, mesh):
  params = jax.tree.map(jax.device_put, PARAMS, split(mesh)(PARAMS))
  save_orbax(tmp_path / 'model', CONFIG, params)
  jax.tree.map(np.testing.assert_array_equal,
               load_orbax(tmp_path / 'model')[1], PARAMS)


@pytest.mark.parametrize('sharded', [False, True])
def test_bfloat16(saved, mesh, sharded):
  _, params = load_orbax(saved, split(mesh) if sharded else None, 'bfloat16')
  for leaf, want in zip(*map(jax.tree.leaves, (params, PARAMS)), strict=True):
    assert leaf.dtype == 'bfloat16'
    np.testing.assert_array_equal(leaf, want.astype(leaf.dtype))


def test_load_knows_such_a_folder(saved):
  model = checkpoint.load(saved)
  assert model.config == CONFIG and model.tokenizer is None
  np.testing.assert_array_equal(model.params['norm_D'], PARAMS['norm_D'])


@pytest.mark.parametrize('kind', ['opt', 'gemma3_text', 'qwen3_moe'])
def test_other_families(tmp_path, kind):
  (tmp_path / 'hf').mkdir()
  config, params = load_hf(hf_test.save(tmp_path / 'hf', *hf_test.make(kind)))
  save_orbax(tmp_path / 'orbax', config, params)
  again, loaded = load_orbax(tmp_path / 'orbax')
  assert again == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_sharding_that_does_not_fit_is_not_the_file_s_fault(saved, mesh):
  odd = NamedSharding(Mesh(mesh.devices[:3], ('model',)),
                      PartitionSpec('model'))
  with pytest.raises(ValueError, match='evenly divide') as error:
    load_orbax(saved, lambda tree: jax.tree.map(lambda _: odd, tree))
  assert not isinstance(error.value, InputError)


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
    ('rope_scaling', {'kind': 'yarn', 'factor': 2.0}), ('rope_scaling', 3),
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
