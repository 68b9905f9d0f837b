import functools
import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dsjax
from dsjax.checkpoints.hf_weights import load_hf
from dsjax.checkpoints.weights import tree
from dsjax.config.checks import InputError

# Models that transformers wrote, of random weights: see make_families.
FAMILIES = pathlib.Path(__file__).parents[1] / 'goldens' / 'families'
NAMES = sorted(path.name for path in FAMILIES.iterdir())


@functools.cache
def _stored(name):
  """({key: value}, {tensor name: array}) of a folder, in float32."""
  tensors = {}
  for file in sorted((FAMILIES / name).glob('*.safetensors')):
    tensors |= load_file(file)
  return (json.loads((FAMILIES / name / 'config.json').read_text()),
          {key: x.astype(np.float32) for key, x in tensors.items()})


def config_of(name, **changes):
  """config.json of a tiny model with other values; 'absent': without."""
  return {k: v for k, v in (_stored(name)[0] | changes).items()
          if not (isinstance(v, str) and v == 'absent')}


def make(name, **changes):
  """(config.json, tensors) of a tiny model."""
  return config_of(name, **changes), dict(_stored(name)[1])


def save(path, keys, tensors):
  (path / 'config.json').write_text(json.dumps(keys))
  save_file(tensors, path / 'model.safetensors')
  return path


def error_of(path, call=load_hf):
  with pytest.raises(InputError) as error:
    call(path)
  assert str(path) in str(error.value)
  return str(error.value)


# --- good folders ------------------------------------------------------------


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_leaf_has_its_shape_and_dtype(name, dtype):
  config, params = load_hf(FAMILIES / name, dtype)

  def check(leaf, layer):
    array = (params if layer is None else params['layers'][layer])[leaf]
    assert array.shape == config.leaf_shape(leaf) and array.dtype == dtype
    assert array.flags.c_contiguous and array.flags.writeable
    assert np.isfinite(array).all() and array.astype(np.float32).std() > 0
    return array

  assert str(tree(config, check)) == str(params)  # and no other leaf
  assert config.name == name


@pytest.mark.parametrize('prefix', ['transformer.', ''])
def test_gpt2_with_and_without_its_prefix(tmp_path, prefix):
  keys, tensors = make('gpt2')
  want = load_hf(save(tmp_path, keys, tensors))[1]
  tensors = {prefix + name.removeprefix('transformer.'): a
             for name, a in tensors.items()}
  got = load_hf(save(tmp_path, keys, tensors))[1]
  np.testing.assert_array_equal(got['embed_VD'], want['embed_VD'])


@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe'])
def test_experts_are_stacked_also_from_fused_names(tmp_path, kind):
  keys, tensors = make(kind)
  config, params = load_hf(save(tmp_path, keys, tensors))
  moe, names = (('block_sparse_moe', ('w1', 'w3', 'w2')) if kind == 'mixtral'
                else ('mlp', ('gate_proj', 'up_proj', 'down_proj')))
  for layer in range(config.num_layers):
    at = f'model.layers.{layer}.'
    leaves = [params['layers'][layer][leaf]
              for leaf in ('gate_EFD', 'up_EFD', 'down_EDF')]
    for e in range(config.num_experts):
      for leaf, name in zip(leaves, names, strict=True):
        np.testing.assert_array_equal(
            leaf[e], tensors.pop(f'{at}{moe}.experts.{e}.{name}.weight'))
    tensors[f'{at}mlp.gate.weight'] = tensors.pop(f'{at}{moe}.gate.weight')
    tensors[f'{at}mlp.experts.gate_up_proj'] = np.concatenate(leaves[:2], 1)
    tensors[f'{at}mlp.experts.down_proj'] = leaves[2]
  fused = load_hf(save(tmp_path, keys, tensors))[1]
  for a, b in zip(fused['layers'], params['layers'], strict=True):
    for leaf in a:
      np.testing.assert_array_equal(a[leaf], b[leaf], leaf)


def test_a_head_under_its_other_name(tmp_path):
  keys, tensors = make('gpt_neox')
  tensors['lm_head.weight'] = tensors.pop('embed_out.weight')
  params = load_hf(save(tmp_path, keys, tensors))[1]
  np.testing.assert_array_equal(params['head_VD'], tensors['lm_head.weight'])


@pytest.mark.parametrize('name, head, embed', [
    ('llama_linear', 'lm_head.weight', 'model.embed_tokens.weight'),
    ('gpt2', 'lm_head.weight', 'transformer.wte.weight'),
    ('gpt_neox', 'embed_out.weight', 'gpt_neox.embed_in.weight')])
def test_a_head_that_is_tied_and_differs(tmp_path, name, head, embed):
  keys, tensors = make(name, tie_word_embeddings=True)
  tensors[head] = tensors[embed].copy()
  load_hf(save(tmp_path, keys, tensors))  # the same twice is harmless
  tensors[head][3, 5] += 1
  message = error_of(save(tmp_path, keys, tensors))
  assert head in message and 'tie_word_embeddings' in message
  keys['tie_word_embeddings'] = False
  params = load_hf(save(tmp_path, keys, tensors))[1]
  np.testing.assert_array_equal(params['head_VD'], tensors[head])


@pytest.mark.parametrize('stored', [np.float16, ml_dtypes.bfloat16])
def test_narrow_files_are_widened_exactly(tmp_path, stored):
  keys, tensors = make('gemma2')
  tensors = {name: array.astype(stored) for name, array in tensors.items()}
  params = load_hf(save(tmp_path, keys, tensors))[1]
  np.testing.assert_array_equal(
      params['embed_VD'],
      tensors['model.embed_tokens.weight'].astype(np.float32))
  np.testing.assert_array_equal(
      params['norm_D'], 1 + tensors['model.norm.weight'].astype(np.float32))


def shard(path, keys, tensors):
  """Two files and their index."""
  files = ('model-00001-of-00002.safetensors',
           'model-00002-of-00002.safetensors')
  table = {name: files[i % 2] for i, name in enumerate(tensors)}
  for file in files:
    save_file({n: tensors[n] for n in tensors if table[n] == file},
              path / file)
  (path / 'config.json').write_text(json.dumps(keys))
  write_index(path, table)
  return table


def write_index(path, table):
  (path / 'model.safetensors.index.json').write_text(
      json.dumps({'metadata': {'total_size': 1}, 'weight_map': table}))


def test_sharded_is_the_same(tmp_path):
  keys, tensors = make('llama')
  shard(tmp_path, keys, tensors)
  params = load_hf(tmp_path)[1]
  np.testing.assert_array_equal(params['norm_D'], tensors['model.norm.weight'])
  np.testing.assert_array_equal(params['head_VD'], tensors['lm_head.weight'])


@pytest.mark.parametrize('kind, name', [
    ('gemma2', 'model.layers.0.self_attn.rotary_emb.inv_freq'),
    ('gpt2', 'transformer.h.0.attn.bias'),
    ('gpt_neox', 'gpt_neox.layers.1.attention.masked_bias')])
def test_harmless_extra_tensors_are_ignored(tmp_path, kind, name):
  keys, tensors = make(kind)
  load_hf(save(tmp_path, keys, tensors | {name: np.ones(3, np.float32)}))


# --- bad folders -------------------------------------------------------------


def test_sizes_beyond_reason_are_refused_by_shape(tmp_path):
  keys, tensors = make('llama', vocab_size=10**15)[0], make('llama')[1]
  message = error_of(save(tmp_path, keys, tensors))
  assert 'shape of tensor' in message and 'model.safetensors' in message


@pytest.mark.parametrize('kind, name', [
    ('llama', 'model.layers.1.self_attn.k_proj.weight'),
    ('llama', 'lm_head.weight'), ('gpt2', 'transformer.h.0.attn.c_attn.bias'),
    ('mixtral', 'model.layers.1.block_sparse_moe.experts.2.w3.weight')])
def test_a_missing_tensor_is_named(tmp_path, kind, name):
  keys, tensors = make(kind)
  del tensors[name]
  message = error_of(save(tmp_path, keys, tensors))
  assert name.split('.', 1)[1] in message and 'missing' in message


@pytest.mark.parametrize('kind, name', [
    ('llama', 'model.layers.1.self_attn.k_proj.weight'),
    ('opt', 'model.decoder.embed_positions.weight'),
    ('gpt2', 'transformer.h.0.attn.c_attn.weight'),
    ('mixtral', 'model.layers.1.block_sparse_moe.experts.2.w3.weight')])
def test_a_shape_off_by_one_is_named(tmp_path, kind, name):
  keys, tensors = make(kind)
  tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])
  message = error_of(save(tmp_path, keys, tensors))
  assert name in message and str(tensors[name].shape) in message


@pytest.mark.parametrize('name', [
    'model.layers.2.self_attn.k_proj.weight', 'score.weight',
    'model.layers.0.self_attn.q_proj.bias'])
def test_an_unexpected_tensor_is_named(tmp_path, name):
  keys, tensors = make('llama')
  tensors[name] = np.ones(4, np.float32)
  assert name.removeprefix('model.') in error_of(save(tmp_path, keys, tensors))


def test_a_tensor_of_integers_is_named(tmp_path):
  keys, tensors = make('llama')
  tensors['model.norm.weight'] = np.ones(32, np.int8)
  message = error_of(save(tmp_path, keys, tensors))
  assert 'model.norm.weight' in message and 'I8' in message


def test_a_truncated_file(tmp_path):
  path = save(tmp_path, *make('llama')) / 'model.safetensors'
  data = path.read_bytes()
  for size in (0, 4, 8, 100, 2000, len(data) - 1):
    path.write_bytes(data[:size])
    assert 'model.safetensors' in error_of(tmp_path)


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n'


@pytest.mark.parametrize('name', ('config.json', 'model.safetensors',
                                  'tokenizer.json', 'tokenizer_config.json'))
def test_a_pointer_of_git_lfs(tmp_path, name):
  save(tmp_path, *make('llama'))
  if name == 'tokenizer_config.json':  # it is read beside another
    (tmp_path / 'tokenizer.json').write_text('{}')
  (tmp_path / name).write_bytes(POINTER)
  assert f'{name}: is a pointer of Git LFS' in error_of(tmp_path, dsjax.load)


def _header(table):
  text = table if isinstance(table, bytes) else json.dumps(table).encode()
  return struct.pack('<Q', len(text)) + text


@pytest.mark.parametrize('data', [
    struct.pack('<Q', 1 << 60) + b'{}' + bytes(64), _header(b'[1, 2]'),
    _header({'a': {'dtype': 'F32', 'shape': [4],
                   'data_offsets': [-16, 0]}}) + bytes(16),
    _header({'a': {'dtype': 'F32', 'shape': [1 << 60],
                   'data_offsets': [0, 16]}}) + bytes(16),
    _header({'a': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]},
             'b': {'dtype': 'F32', 'shape': [4], 'data_offsets': [8, 24]}})
    + bytes(24)], ids=['huge header', 'a list', 'negative', 'too large',
                       'overlapping'])
def test_a_corrupt_header(tmp_path, data):
  save(tmp_path, *make('llama'))
  (tmp_path / 'model.safetensors').write_bytes(data)
  assert 'corrupt' in error_of(tmp_path)


def test_a_header_whose_length_starts_like_a_pickle(tmp_path):
  path = save(tmp_path, *make('llama')) / 'model.safetensors'
  data = path.read_bytes()
  size, = struct.unpack('<Q', data[:8])
  padded = 0x10280  # b'\x80\x02\x01\x00...'
  path.write_bytes(struct.pack('<Q', padded) + data[8:8 + size].ljust(padded)
                   + data[8 + size:])
  load_hf(tmp_path)


@pytest.mark.parametrize('start', [b'PK\x03\x04', b'\x80\x02}q\x00'])
def test_a_pickle_is_never_opened(tmp_path, start):
  save(tmp_path, *make('llama'))
  (tmp_path / 'model.safetensors').write_bytes(start + b'model' * 20)
  assert 'pickle' in error_of(tmp_path)
  (tmp_path / 'model.safetensors').rename(tmp_path / 'pytorch_model.bin')
  message = error_of(tmp_path)
  assert 'pytorch_model.bin is a pickle' in message


@pytest.mark.parametrize('file', [
    '../x.safetensors', '/etc/x.safetensors', 'a/x.safetensors',
    'pytorch_model.bin', 3, '..', 'gone.safetensors'])
def test_an_index_names_files_of_its_folder(tmp_path, file):
  table = shard(tmp_path, *make('llama'))
  write_index(tmp_path, table | {'model.norm.weight': file})
  assert str(file) in error_of(tmp_path)


@pytest.mark.parametrize('table', [None, [], {}])
def test_an_index_without_a_table(tmp_path, table):
  shard(tmp_path, *make('llama'))
  write_index(tmp_path, table)
  assert 'weight_map' in error_of(tmp_path)


def test_an_index_with_a_tensor_that_is_not_there(tmp_path):
  table = shard(tmp_path, *make('llama'))
  write_index(tmp_path, table | {'x.weight': table['lm_head.weight']})
  assert 'x.weight' in error_of(tmp_path)


def test_no_weights(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(config_of('llama')))
  assert 'no model.safetensors' in error_of(tmp_path)
