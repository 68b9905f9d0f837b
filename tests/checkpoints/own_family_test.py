"""A family that dsjax does not know, described in a user's own file."""

import dataclasses

import numpy as np
import pytest

from dsjax.checkpoints import checkpoint
from dsjax.checkpoints.families import FAMILIES, llama
from dsjax.checkpoints.family import Family, Gguf
from dsjax.checkpoints.hf_names import conv1d, norms
from dsjax.checkpoints.hf_weights import load_hf
from dsjax.config.checks import InputError
from tests.checkpoints import gguf_model_test, hf_weights_test

# --- the family: Llama whose attention has other keys and other tensors ------


def _fields(keys):
  keys.only('residual_multiplier', 1.0)
  return llama.shared_fields(keys, tied=True) | dict(
      attn_scale=keys.read('attention_multiplier', float),
      qk_norm=keys.read('use_qk_norm', bool, False))


PEBBLE = Family(
    'pebble', 'PebbleForCausalLM', _fields,
    llama.TENSORS | {'o_DNH': conv1d('layers.{l}.self_attn.dense.weight')}
    | norms({'mlp_norm': 'ln_2'}, 'layers.{l}.'),
    gguf=Gguf('pebble', lambda get, base: dict(
        attn_scale=get('attention.scale', float)), ('attention.scale',)))

# --- files of it are read -----------------------------------------------------


def saved(path, **changes):
  """(tensors under Llama's names) of a tiny folder of the family."""
  keys, tensors = hf_weights_test.make('llama', tie_word_embeddings=True)
  keys |= dict(model_type='pebble', architectures=['PebbleForCausalLM'],
               attention_multiplier=0.25, residual_multiplier=1.0) | changes
  renamed = {}
  for name, array in tensors.items():
    if 'lm_head' in name:
      continue
    if 'o_proj' in name:
      name, array = name.replace('o_proj', 'dense'), array.T.copy()
    renamed[name.replace('post_attention_layernorm', 'ln_2')] = array
  hf_weights_test.save(path, keys, renamed)
  return tensors


def test_a_folder_of_it_is_read(tmp_path):
  tensors = saved(tmp_path)
  model = checkpoint.load(tmp_path, family=PEBBLE)
  config, params = model.config, model.params
  assert config.attn_scale == 0.25 and config.tied and not config.qk_norm
  layer = params['layers'][1]
  np.testing.assert_array_equal(
      layer['o_DNH'].reshape(config.d_model, -1),
      tensors['model.layers.1.self_attn.o_proj.weight'])
  np.testing.assert_array_equal(
      layer['mlp_norm_D'],
      tensors['model.layers.1.post_attention_layernorm.weight'])


def test_a_gguf_of_it_is_read(tmp_path):
  path = tmp_path / 'model.gguf'
  keys = {key.replace('llama.', 'pebble.'): value
          for key, value in gguf_model_test.KEYS.items()}
  gguf_model_test.save(path, keys | {
      'general.architecture': 'pebble', 'pebble.attention.scale': 0.5})
  config, _ = checkpoint.load_gguf(path, family=PEBBLE)
  assert config == dataclasses.replace(gguf_model_test.CONFIG, attn_scale=0.5)


@pytest.mark.parametrize('changes, part', [
    (dict(residual_multiplier=0.5), 'residual_multiplier=0.5: must be 1.0'),
    (dict(surprise=1), 'surprise=1: must be absent'),
    (dict(model_type='llama'), "must be one of ['pebble']"),
    (dict(architectures=['LlamaForCausalLM']), 'PebbleForCausalLM'),
    (dict(use_qk_norm=True), 'q_norm.weight')])
def test_its_files_are_checked_like_any_other(tmp_path, changes, part):
  saved(tmp_path, **changes)
  with pytest.raises(InputError) as error:
    load_hf(tmp_path, family=PEBBLE)
  assert part in str(error.value) and str(tmp_path) in str(error.value)


def test_unasked_it_is_unknown(tmp_path):
  saved(tmp_path)
  with pytest.raises(InputError, match="model_type='pebble': must be one of"):
    load_hf(tmp_path)


def test_a_leaf_that_the_family_does_not_name(tmp_path):
  saved(tmp_path)
  nameless = dataclasses.replace(PEBBLE, tensors={
      leaf: name for leaf, name in PEBBLE.tensors.items() if leaf != 'o_DNH'})
  with pytest.raises(InputError, match="leaf='o_DNH'"):
    load_hf(tmp_path, family=nameless)


def test_known_families_are_told_apart():
  for names in ([f.model_type for f in FAMILIES],
                [f.architecture for f in FAMILIES],
                [f.gguf.architecture for f in FAMILIES if f.gguf]):
    assert len(names) == len(set(names))
