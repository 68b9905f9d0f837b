import itertools
import json
import pathlib

import pytest

from dsjax.checkpoints.families import FAMILIES
from dsjax.checkpoints.hf_config import read_config
from dsjax.config import rope
from dsjax.config.checks import InputError
from tests.checkpoints.hf_weights_test import NAMES, config_of

DEFAULTS = json.loads((pathlib.Path(__file__).parents[1] / 'goldens'
                       / 'defaults.json').read_text())


def write(path, keys):
  (path / 'config.json').write_text(json.dumps(keys))


def read(path, name, **changes):
  """The ModelConfig of a tiny model's config.json with changes."""
  write(path, config_of(name, **changes))
  return read_config(path)[0]


def error_of(path):
  with pytest.raises(InputError) as error:
    read_config(path)
  assert str(path) in str(error.value)
  return str(error.value)


def test_every_family_has_a_golden():
  kinds = {family.model_type for family in FAMILIES}
  assert kinds == {config_of(name)['model_type'] for name in NAMES}
  assert kinds == DEFAULTS.keys()


# --- keys that are not there, or change nothing -------------------------------


@pytest.mark.parametrize('kind', sorted(DEFAULTS))
def test_an_absent_key_is_what_transformers_says_or_refused(tmp_path, kind):
  """Each key alone, and all that may be absent at once."""
  full = {'model_type': kind} | DEFAULTS[kind]
  write(tmp_path, full)
  want, _ = read_config(tmp_path)
  spare = []
  for key in DEFAULTS[kind]:
    write(tmp_path, {k: v for k, v in full.items() if k != key})
    try:
      config, _ = read_config(tmp_path)
    except InputError as error:
      assert key in str(error)
    else:
      assert config == want, key
      spare.append(key)
  write(tmp_path, {k: v for k, v in full.items() if k not in spare})
  assert read_config(tmp_path)[0] == want
  assert len(spare) > len(full) / 3


NEUTRAL = dict(
    is_llama_config=True, _attn_implementation_autoset=True, _num_labels=2,
    loss_type='ForCausalLM', num_labels=3, label2id={'a': 0},
    id2label={'0': 'a'}, _name_or_path='x', _commit_hash='abc',
    _flash_attn_2_enabled=True, output_router_logits=True,
    router_z_loss_coef=0.1, embedding_dropout=0.1, attn_pdrop=0.1,
    initializer_range=0.02, torch_dtype='bfloat16', dtype='float16',
    transformers_version='4.50.0', unsloth_version='2025.1',
    auto_map={'AutoModel': 'modeling.Model'},
    image_token_index=7, boi_token_id=5, decoder_start_token_id=0,
    do_sample=True, temperature=0.6, max_new_tokens=7, use_cache=False,
    pretraining_tp=2, gradient_checkpointing=True, quantization_config=None,
    problem_type='x', tf_legacy_loss=True, use_flash_attention_2=True,
    bf16=True, pad_token='<pad>', new_switch=False,
    architectures=None) | {'transformers.js_config': {'dtype': 'q4'}}


@pytest.mark.parametrize('name', ['llama', 'opt', 'gemma3', 'mixtral'])
def test_keys_that_change_nothing_are_read_over(tmp_path, name):
  want = read(tmp_path, name)
  assert read(tmp_path, name, **NEUTRAL) == want
  for key, value in NEUTRAL.items():
    read(tmp_path, name, **{key: value})


@pytest.mark.parametrize('name, keys', [
    ('phi3', dict(full_attn_mod=1, interpolate_factor=1)),
    *((name, {key: 64}) for name in ('llama', 'mistral', 'qwen2') for key in (
        'max_sequence_length', 'max_seq_len', 'model_max_length',
        'seq_length')),
    ('starcoder2', dict(layer_norm_epsilon=1e-5,
                        attention_softmax_in_fp32=True, scale_attn_weights=True,
                        scale_attention_softmax_in_fp32=True))])
def test_keys_that_change_nothing_in_a_family(tmp_path, name, keys):
  if 64 in keys.values():
    keys = dict.fromkeys(keys, config_of(name)['max_position_embeddings'])
  assert read(tmp_path, name, **keys) == read(tmp_path, name)
  for key in keys:
    if 'fp32' not in key:
      write(tmp_path, config_of(name, **{key: 2}))
      assert f'{key}=2' in error_of(tmp_path)


def test_yarn_may_be_finetuned(tmp_path):
  scaling = dict(rope_type='yarn', factor=2.0)
  assert read(tmp_path, 'llama', rope_scaling=scaling) == read(
      tmp_path, 'llama', rope_scaling=scaling | dict(finetuned=True))


@pytest.mark.parametrize('name, known', [
    ('gelu_fast', 'gelu_tanh'), ('gelu_accurate', 'gelu_tanh'),
    ('gelu_python', 'gelu')])
def test_other_names_of_gelu(tmp_path, name, known):
  assert read(tmp_path, 'gpt_neox', hidden_act=name).activation == known


@pytest.mark.parametrize('name, key', [
    ('llama', 'rms_norm_eps'), ('gpt2', 'layer_norm_epsilon'),
    ('gpt_neox', 'layer_norm_eps'), ('starcoder2', 'norm_epsilon')])
def test_no_epsilon_is_negative(tmp_path, name, key):
  assert read(tmp_path, name, **{key: 0}).norm_eps == 0
  write(tmp_path, config_of(name, **{key: -1}))
  assert 'norm_eps=-1' in error_of(tmp_path)


def test_ids_outside_the_vocabulary_are_dropped(tmp_path):
  config = read(tmp_path, 'gpt2', bos_token_id=50256, eos_token_id=50256)
  assert config.bos_id is None and config.eos_ids == ()


# --- windows and rotation -----------------------------------------------------


def test_mistral_and_qwen_windows(tmp_path):
  def windows(name, **changes):
    return read(tmp_path, name, **changes).windows

  assert windows('mistral') == (7, 7)
  assert windows('mistral', sliding_window=None) == ()
  assert windows('mistral', sliding_window='absent') == (4096, 4096)
  assert windows('qwen2') == ()
  assert windows('qwen2', use_sliding_window=True) == (0, 6)
  assert windows('qwen2', use_sliding_window=True, layer_types=[
      'sliding_attention', 'full_attention']) == (6, 0)


def test_softcaps_of_gemma2_are_on_unless_null(tmp_path):
  def caps(value):
    config = read(tmp_path, 'gemma2', attn_logit_softcapping=value,
                  final_logit_softcapping=value)
    return config.attn_softcap, config.logit_softcap

  assert caps('absent') == (50, 30) and caps(None) == (0, 0)


def test_gemma3_old_and_new_rope_are_one(tmp_path):
  config = read(tmp_path, 'gemma3')
  assert (config.rope_base, config.rope_local_base) == (1e6, 1e4)
  assert config.rope_divisors == (8.0,) * 8 and config.windows == (6, 6, 0, 6)
  new = read(
      tmp_path, 'gemma3', sliding_window_pattern='absent',
      rope_theta='absent',
      rope_local_base_freq='absent', rope_scaling='absent',
      layer_types=['sliding_attention'] * 2 + ['full_attention']
      + ['sliding_attention'], rope_parameters={
          'full_attention': dict(rope_type='linear', factor=8.0,
                                 rope_theta=1e6),
          'sliding_attention': dict(rope_type='default', rope_theta=1e4)})
  assert new == config


_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)
_YARN = dict(factor=2.0, original_max_position_embeddings=512)


@pytest.mark.parametrize('changes, want', [
    (dict(rope_theta=5e5, rope_scaling=dict(rope_type='llama3', **_LLAMA3)),
     rope.llama3(8, 5e5, 8.0, 16)),
    (dict(rope_parameters=dict(rope_type='llama3', rope_theta=5e5, **_LLAMA3)),
     rope.llama3(8, 5e5, 8.0, 16)),
    (dict(rope_theta=5e5, rope_scaling=dict(type='linear', factor=2)),
     (2.0,) * 4),
    (dict(rope_theta=5e5, rope_scaling=dict(type='dynamic', factor=2)), ()),
    (dict(rope_theta=5e5, rope_scaling=dict(type='yarn', **_YARN)),
     rope.yarn(8, 5e5, 2.0, 512)),
    (dict(rope_theta=5e5, rope_scaling=dict(type='yarn', factor=2.0)),
     rope.yarn(8, 5e5, 2.0, 512)),
    (dict(rope_parameters=dict(rope_type='default', rope_theta=500000)), ())])
def test_rope_of_old_and_new_versions(tmp_path, changes, want):
  changes = dict(rope_parameters='absent') | changes
  config = read(tmp_path, 'llama', **changes)
  assert config.rope_base == 5e5 and config.rope_divisors == want
  assert config.max_len == (1024 if 'yarn' in str(changes) else 512)


def test_longrope_ends_where_other_divisors_would_begin(tmp_path):
  config = read(tmp_path, 'phi3')
  assert config.max_len == 64 and config.rope_divisors == (1.0, 1.1, 1.3, 1.8)
  scaling = config_of('phi3')['rope_scaling']
  for kind, key in itertools.product(('su', 'yarn', 'longrope'),
                                     ('type', 'rope_type')):
    older = {k: v for k, v in scaling.items() if k != 'type'} | {key: kind}
    assert read(tmp_path, 'phi3', rope_scaling=older) == config


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
    ('llama', 'rope_scaling', {'type': 'proportional', 'factor': 2.0}),
    ('llama', 'rope_scaling', {'rope_type': 'yarn', 'factor': -4.0}),
    ('llama', 'rope_scaling', {'rope_type': 'yarn', 'factor': 4.0,
                               'surprise': 1}),
    ('phi3', 'rope_scaling', {'type': 'longrope', 'short_factor': [1.0],
                              'long_factor': [1.0]}),
    ('llama', 'alibi', True),
    ('llama', 'output_multiplier_scale', 2.0), ('llama', 'rope_version', 2),
    ('llama', 'logit_scale', 0.5), ('llama', 'quantization_config', {'b': 4}),
    ('llama', 'is_encoder_decoder', True), ('llama', 'num_experts', 4),
    ('mistral', 'layer_types', ['sliding_attention', 'full_attention']),
    ('smollm3', 'no_rope_layers', [1, 2, 0, 1]),
    ('smollm3', 'no_rope_layers', [1]), ('olmo3', 'rope_theta', 1e4),
    ('granite', 'logits_scaling', 0), ('gemma', 'hidden_activation', 'relu'),
    ('gpt_neox', 'rotary_pct', 0.1), ('gpt_neox', 'rotary_pct', 1.5),
    ('llama', 'rope_scaling', {'rope_type': 'linear'}),
    ('llama', 'rope_scaling', {'rope_type': 'linear', 'factor': 2.0,
                               'attention_factor': 2.0}),
    ('opt', 'do_layer_norm_before', False), ('opt', 'word_embed_proj_dim', 8),
    ('opt', '_remove_final_layer_norm', True),
    ('gpt2', 'scale_attn_by_inverse_layer_idx', True),
    ('gemma2', 'layer_types', ['sliding_attention']),
    ('gemma2', 'layer_types', ['sliding_attention', 'chunked_attention']),
    ('gemma2', 'query_pre_attn_scalar', 0),
    ('gemma3', 'rope_local_base_freq', -1.0),
    ('gemma3', '_sliding_window_pattern', 0), ('llama3', 'rope_theta', 0),
    ('gemma3', 'use_bidirectional_attention', True),
    ('gemma3', 'rope_parameters', {'rope_theta': 1e4}),
    ('qwen3_moe', 'decoder_sparse_step', 2),
    ('qwen3_moe', 'mlp_only_layers', [0]),
    ('mixtral', 'num_local_experts', 10**9)])
def test_a_bad_hyperparameter_is_named(tmp_path, kind, key, value):
  write(tmp_path, config_of(kind, **{key: value}))
  message = error_of(tmp_path)
  spelled = {'rotary_pct': 'rope_width'}  # as the ModelConfig names it
  assert spelled.get(key, key) in message and 'config.json' in message
