import json

import pytest

from dsjax.checkpoints.families import FAMILIES
from dsjax.checkpoints.hf_config import read_config
from dsjax.config.checks import InputError
from dsjax.config.model import RopeScaling
from tests.checkpoints.hf_weights_test import CONFIGS, config_of


def write(path, keys):
  (path / 'config.json').write_text(json.dumps(keys))


def read(path, kind, **changes):
  """The ModelConfig of a tiny model's config.json with changes."""
  write(path, config_of(kind, **changes))
  config, found = read_config(path)
  assert found.model_type == kind
  return config


def error_of(path):
  with pytest.raises(InputError) as error:
    read_config(path)
  assert str(path) in str(error.value)
  return str(error.value)


def test_every_family_is_tried():
  assert sorted(CONFIGS) == sorted(f.model_type for f in FAMILIES)


def test_mistral_and_qwen_windows(tmp_path):
  def windows(kind, **changes):
    return read(tmp_path, kind, **changes).windows

  assert windows('mistral') == (8, 8)
  assert windows('mistral', sliding_window=None) == ()
  assert windows('qwen2') == ()
  assert windows('qwen2', use_sliding_window=True) == (0, 8)
  assert windows('qwen2', use_sliding_window=True, layer_types=[
      'sliding_attention', 'full_attention']) == (8, 0)


def test_gemma3_old_and_new_rope_are_one(tmp_path):
  config = read(tmp_path, 'gemma3_text')
  assert config.windows == (8, 0) and config.qk_norm
  assert (config.rope_base, config.rope_local_base) == (1e6, 1e4)
  assert config.rope_scaling == RopeScaling('linear', 8.0)
  new = read(
      tmp_path, 'gemma3_text', sliding_window_pattern='absent',
      rope_theta='absent',
      rope_local_base_freq='absent', rope_scaling='absent',
      layer_types=['sliding_attention', 'full_attention'], rope_parameters={
          'full_attention': dict(rope_type='linear', factor=8.0,
                                 rope_theta=1e6),
          'sliding_attention': dict(rope_type='default', rope_theta=1e4)})
  assert new == config


_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)


@pytest.mark.parametrize('changes, want', [
    (dict(rope_theta=5e5, rope_scaling=dict(rope_type='llama3', **_LLAMA3)),
     RopeScaling('llama3', 8.0, 16, 1.0, 4.0)),
    (dict(rope_parameters=dict(rope_type='llama3', rope_theta=5e5, **_LLAMA3)),
     RopeScaling('llama3', 8.0, 16, 1.0, 4.0)),
    (dict(rope_theta=5e5, rope_scaling=dict(type='linear', factor=2)),
     RopeScaling('linear', 2.0)),
    (dict(rope_parameters=dict(rope_type='default', rope_theta=500000)),
     None)])
def test_rope_of_old_and_new_versions(tmp_path, changes, want):
  config = read(tmp_path, 'llama', **changes)
  assert config.rope_base == 5e5 and config.rope_scaling == want


def test_generation_config_has_the_last_word_on_ends(tmp_path):
  (tmp_path / 'generation_config.json').write_text(
      json.dumps({'eos_token_id': [7, 3], 'temperature': 0.6}))
  config = read(tmp_path, 'llama')
  assert config.eos_ids == (3, 7) and config.bos_id == 1


def test_no_folder(tmp_path):
  assert 'config.json: No such file' in error_of(tmp_path / 'none')


@pytest.mark.parametrize('text', ['', '{', '[]', '"x"', '[' * 99999, '\xff'])
def test_config_that_is_not_an_object(tmp_path, text):
  (tmp_path / 'config.json').write_text(text, encoding='latin-1')
  assert 'config.json' in error_of(tmp_path)


@pytest.mark.parametrize('kind, key, value', [
    ('llama', 'model_type', 'mamba'), ('llama', 'model_type', ['llama']),
    ('llama', 'architectures', ['LlamaForTokenClassification']),
    ('llama', 'hidden_size', 'absent'), ('llama', 'hidden_size', '16'),
    ('llama', 'hidden_size', True), ('llama', 'hidden_size', 16.5),
    ('llama', 'num_hidden_layers', 10**9), ('llama', 'num_hidden_layers', 0),
    ('llama', 'rms_norm_eps', float('nan')), ('llama', 'hidden_act', 'tanh'),
    ('llama', 'quantization_config', {'bits': 4}),
    ('llama', 'surprise', 1), ('llama', 'partial_rotary_factor', 0.5),
    ('llama', 'eos_token_id', 'x'), ('llama', 'rope_scaling', 'linear'),
    ('llama', 'rope_scaling', {'type': 'dynamic', 'factor': 2.0}),
    ('llama', 'rope_scaling', {'rope_type': 'yarn', 'factor': 4.0}),
    ('llama', 'rope_scaling', {'rope_type': 'linear'}),
    ('llama', 'rope_scaling', {'rope_type': 'linear', 'factor': 2.0,
                               'attention_factor': 2.0}),
    ('opt', 'do_layer_norm_before', False), ('opt', 'word_embed_proj_dim', 8),
    ('opt', '_remove_final_layer_norm', True),
    ('llama', 'mlp_bias', True),
    ('gpt2', 'scale_attn_by_inverse_layer_idx', True),
    ('gemma2', 'layer_types', ['sliding_attention']),
    ('gemma2', 'layer_types', ['sliding_attention', 'chunked_attention']),
    ('gemma2', 'query_pre_attn_scalar', 0),
    ('gemma3_text', 'rope_local_base_freq', -1.0),
    ('gemma3_text', '_sliding_window_pattern', 0), ('llama', 'rope_theta', 0),
    ('gemma3_text', 'use_bidirectional_attention', True),
    ('gemma3_text', 'rope_parameters', {'rope_theta': 1e4}),
    ('qwen3_moe', 'decoder_sparse_step', 2),
    ('qwen3_moe', 'mlp_only_layers', [0]),
    ('mixtral', 'num_local_experts', 10**9)])
def test_a_bad_hyperparameter_is_named(tmp_path, kind, key, value):
  write(tmp_path, config_of(kind, **{key: value}))
  message = error_of(tmp_path)
  assert key in message and 'config.json' in message
