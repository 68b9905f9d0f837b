import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsjax.checkpoints.hf_weights import load_hf
from dsjax.checkpoints.weights import tree
from dsjax.config.checks import InputError

L, D, N, K, H, F, V, T, E = 2, 16, 4, 2, 4, 24, 20, 32, 3
_LLAMA = dict(
    num_hidden_layers=L, hidden_size=D, num_attention_heads=N,
    num_key_value_heads=K, intermediate_size=F, vocab_size=V,
    max_position_embeddings=T, hidden_act='silu', rms_norm_eps=1e-6,
    torch_dtype='float32', transformers_version='4.50.0', use_cache=True,
    attention_dropout=0.0, initializer_range=0.02, bos_token_id=1,
    eos_token_id=2)
_GEMMA = {k: v for k, v in _LLAMA.items() if k != 'hidden_act'} | dict(
    hidden_activation='gelu_pytorch_tanh', query_pre_attn_scalar=9,
    sliding_window=8, head_dim=6, attention_bias=False)
# config.json of a tiny model of each family, as published ones look.
CONFIGS = {
    'opt': dict(
        architectures=['OPTForCausalLM'], num_hidden_layers=L, hidden_size=D,
        num_attention_heads=N, ffn_dim=F, vocab_size=V,
        max_position_embeddings=T, word_embed_proj_dim=D, dropout=0.1,
        activation_function='relu', do_layer_norm_before=True, prefix='</s>',
        _remove_final_layer_norm=False, bos_token_id=2, eos_token_id=2),
    'gpt2': dict(
        architectures=['GPT2LMHeadModel'], n_layer=L, n_embd=D, n_head=N,
        n_positions=T, n_ctx=T, vocab_size=V, layer_norm_epsilon=1e-5,
        activation_function='gelu_new', summary_type='cls_index',
        summary_use_proj=True, bos_token_id=50256, eos_token_id=50256),
    'llama': _LLAMA | dict(architectures=['LlamaForCausalLM'],
                           pretraining_tp=1, rope_scaling=None),
    'mistral': _LLAMA | dict(sliding_window=8, rope_theta=1e6),
    'qwen2': _LLAMA | dict(use_sliding_window=False, sliding_window=8,
                           max_window_layers=1, tie_word_embeddings=True),
    'qwen3': _LLAMA | dict(head_dim=8, attention_bias=False),
    'gemma2': _GEMMA | dict(hidden_act='gelu_pytorch_tanh',
                            attn_logit_softcapping=50.0,
                            final_logit_softcapping=30),
    'gemma3_text': _GEMMA | dict(sliding_window_pattern=2, rope_theta=1e6,
                                 rope_local_base_freq=1e4, rope_scaling=dict(
                                     rope_type='linear', factor=8.0)),
    'mixtral': _LLAMA | dict(num_local_experts=E, num_experts_per_tok=2,
                             router_aux_loss_coef=0.02, sliding_window=None),
    'qwen3_moe': _LLAMA | dict(
        num_experts=E, num_experts_per_tok=2, moe_intermediate_size=8,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        head_dim=8, use_sliding_window=False, max_window_layers=1),
}


def config_of(kind, **changes):
  keys = {'model_type': kind} | CONFIGS[kind] | changes
  return {k: v for k, v in keys.items() if v != 'absent'}


def _linear(name, outputs, inputs, bias):
  return {f'{name}.weight': (outputs, inputs)} | (
      {f'{name}.bias': (outputs,)} if bias else {})


def _shapes(kind, keys):
  """{tensor name: shape}, written from transformers' modules."""
  if kind == 'opt':
    top, shapes = 'model.decoder.', {}
    for i in range(L):
      at = f'{top}layers.{i}.'
      for name in ('self_attn_layer_norm', 'final_layer_norm'):
        shapes |= {f'{at}{name}.weight': (D,), f'{at}{name}.bias': (D,)}
      for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
        shapes |= _linear(f'{at}self_attn.{name}', D, D, True)
      shapes |= _linear(f'{at}fc1', F, D, True)
      shapes |= _linear(f'{at}fc2', D, F, True)
    return shapes | {
        f'{top}embed_tokens.weight': (V, D), 'lm_head.weight': (V, D),
        f'{top}embed_positions.weight': (T + 2, D),
        f'{top}final_layer_norm.weight': (D,),
        f'{top}final_layer_norm.bias': (D,)}
  if kind == 'gpt2':
    shapes = {'wte.weight': (V, D), 'wpe.weight': (T, D),
              'ln_f.weight': (D,), 'ln_f.bias': (D,)}
    for i in range(L):
      at = f'h.{i}.'
      shapes |= {f'{at}ln_{j}.{x}': (D,) for j in (1, 2)
                 for x in ('weight', 'bias')}
      shapes[f'{at}attn.bias'] = (1, 1, T, T)
      for name, inputs, outputs in (
          ('attn.c_attn', D, 3 * D), ('attn.c_proj', D, D),
          ('mlp.c_fc', D, 4 * D), ('mlp.c_proj', 4 * D, D)):
        shapes |= {f'{at}{name}.weight': (inputs, outputs),
                   f'{at}{name}.bias': (outputs,)}
    return shapes
  gemma = kind.startswith('gemma')
  width = keys.get('head_dim', H)
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not keys.get('tie_word_embeddings', gemma):
    shapes['lm_head.weight'] = (V, D)
  for i in range(L):
    at = f'model.layers.{i}.'
    for name in ('input_layernorm', 'post_attention_layernorm',
                 *('pre_feedforward_layernorm',
                   'post_feedforward_layernorm') * gemma):
      shapes[f'{at}{name}.weight'] = (D,)
    bias = keys.get('attention_bias', kind == 'qwen2')
    for name, heads in (('q', N), ('k', K), ('v', K)):
      shapes |= _linear(f'{at}self_attn.{name}_proj', heads * width, D, bias)
    shapes |= _linear(f'{at}self_attn.o_proj', D, N * width,
                      bias and kind != 'qwen2')
    if kind in ('qwen3', 'qwen3_moe', 'gemma3_text'):
      shapes |= {f'{at}self_attn.{x}_norm.weight': (width,) for x in 'qk'}
    if kind == 'mixtral':
      shapes[f'{at}block_sparse_moe.gate.weight'] = (E, D)
      for e in range(E):
        expert = f'{at}block_sparse_moe.experts.{e}.'
        shapes |= {f'{expert}w1.weight': (F, D), f'{expert}w2.weight': (D, F),
                   f'{expert}w3.weight': (F, D)}
      continue
    mlps, inner = [f'{at}mlp.'], F
    if kind == 'qwen3_moe':
      shapes[f'{at}mlp.gate.weight'] = (E, D)
      mlps, inner = [f'{at}mlp.experts.{e}.' for e in range(E)], 8
    for mlp in mlps:
      shapes |= _linear(f'{mlp}gate_proj', inner, D, False)
      shapes |= _linear(f'{mlp}up_proj', inner, D, False)
      shapes |= _linear(f'{mlp}down_proj', D, inner, False)
  return shapes


def make(kind, **changes):
  """(config.json, tensors) of a tiny model."""
  keys, rng = config_of(kind, **changes), np.random.default_rng(0)
  return keys, {name: rng.standard_normal(shape, np.float32)
                for name, shape in _shapes(kind, keys).items()}


def save(path, keys, tensors):
  (path / 'config.json').write_text(json.dumps(keys))
  save_file(tensors, path / 'model.safetensors')
  return path


def saved(path, kind, **changes):
  """(tensors, ModelConfig, params) after a round through files."""
  keys, tensors = make(kind, **changes)
  return tensors, *load_hf(save(path, keys, tensors))


def error_of(path, call=load_hf):
  with pytest.raises(InputError) as error:
    call(path)
  assert str(path) in str(error.value)
  return str(error.value)


# --- good folders ------------------------------------------------------------


@pytest.mark.parametrize('kind', sorted(CONFIGS))
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_leaf_has_its_shape_and_dtype(tmp_path, kind, dtype):
  keys, tensors = make(kind)
  config, params = load_hf(save(tmp_path, keys, tensors), dtype)

  def check(leaf, layer):
    array = (params if layer is None else params['layers'][layer])[leaf]
    assert array.shape == config.leaf_shape(leaf) and array.dtype == dtype
    assert array.flags.c_contiguous and array.flags.writeable
    return array

  assert str(tree(config, check)) == str(params)  # and no other leaf
  assert config.name == tmp_path.name and config.num_layers == L


def test_llama_values(tmp_path):
  tensors, config, params = saved(tmp_path, 'llama')
  assert not config.tied and config.eos_ids == (2,) and config.windows == ()
  layer, at = params['layers'][1], 'model.layers.1.'
  for leaf, name in {
      'q_NHD': 'self_attn.q_proj', 'k_KHD': 'self_attn.k_proj',
      'v_KHD': 'self_attn.v_proj', 'o_DNH': 'self_attn.o_proj',
      'attn_norm_D': 'input_layernorm', 'up_FD': 'mlp.up_proj',
      'mlp_norm_D': 'post_attention_layernorm', 'gate_FD': 'mlp.gate_proj',
      'down_DF': 'mlp.down_proj'}.items():
    np.testing.assert_array_equal(
        layer[leaf].ravel(), tensors[f'{at}{name}.weight'].ravel(), leaf)
  np.testing.assert_array_equal(params['head_VD'], tensors['lm_head.weight'])


def test_llama_biases(tmp_path):
  tensors, config, params = saved(tmp_path, 'llama', attention_bias=True)
  assert config.qkv_bias and config.out_bias and not config.mlp_bias
  at = 'model.layers.0.self_attn.'
  for leaf, name in {'q_bias_NH': 'q_proj', 'o_bias_D': 'o_proj'}.items():
    np.testing.assert_array_equal(params['layers'][0][leaf].ravel(),
                                  tensors[f'{at}{name}.bias'])


def test_qwen3_has_head_norms(tmp_path):
  tensors, config, params = saved(tmp_path, 'qwen3')
  assert config.qk_norm and config.head_dim == 8
  np.testing.assert_array_equal(
      params['layers'][0]['k_norm_H'],
      tensors['model.layers.0.self_attn.k_norm.weight'])


def test_opt_drops_two_positions(tmp_path):
  tensors, config, params = saved(tmp_path, 'opt')
  assert (config.norm, config.positions, config.activation) == (
      'layer', 'learned', 'relu')
  assert config.tied and not config.gated and config.mlp_bias
  np.testing.assert_array_equal(
      params['pos_TD'], tensors['model.decoder.embed_positions.weight'][2:])
  np.testing.assert_array_equal(params['norm_bias_D'],
                                tensors['model.decoder.final_layer_norm.bias'])
  np.testing.assert_array_equal(
      params['layers'][1]['mlp_norm_bias_D'],
      tensors['model.decoder.layers.1.final_layer_norm.bias'])


def test_gpt2_is_transposed_and_unpacked(tmp_path):
  tensors, config, params = saved(tmp_path, 'gpt2')
  assert config.activation == 'gelu_tanh' and config.d_ff == 4 * D
  assert config.bos_id is None and config.eos_ids == ()  # not of these V
  layer, x_D = params['layers'][1], np.linspace(-1, 1, D, dtype=np.float32)
  packed = (x_D @ tensors['h.1.attn.c_attn.weight']
            + tensors['h.1.attn.c_attn.bias']).reshape(3, N, H)
  for i, leaf in enumerate(('q', 'k', 'v')):
    head = 'NH' if leaf == 'q' else 'KH'
    np.testing.assert_allclose(
        layer[f'{leaf}_{head}D'] @ x_D + layer[f'{leaf}_bias_{head}'],
        packed[i], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(layer['down_DF'],
                                tensors['h.1.mlp.c_proj.weight'].T)


@pytest.mark.parametrize('prefix', ['transformer.', ''])
def test_gpt2_with_and_without_its_prefix(tmp_path, prefix):
  keys, tensors = make('gpt2')
  want = load_hf(save(tmp_path, keys, tensors))[1]
  tensors = {prefix + name: a for name, a in tensors.items()}
  got = load_hf(save(tmp_path, keys, tensors))[1]
  np.testing.assert_array_equal(got['embed_VD'], want['embed_VD'])


def test_gemma2(tmp_path):
  tensors, config, params = saved(tmp_path, 'gemma2')
  assert config.windows == (8, 0) and config.attn_scale == 1 / 3
  assert (config.attn_softcap, config.logit_softcap) == (50, 30)
  assert config.embed_scale == 4 and config.activation == 'gelu_tanh'
  assert config.tied and config.post_norms and config.rope_local_base is None
  for leaf, name in {
      'attn_norm_D': 'input_layernorm',
      'attn_post_norm_D': 'post_attention_layernorm',
      'mlp_norm_D': 'pre_feedforward_layernorm',
      'mlp_post_norm_D': 'post_feedforward_layernorm'}.items():
    np.testing.assert_array_equal(
        params['layers'][1][leaf], 1 + tensors[f'model.layers.1.{name}.weight'])
  np.testing.assert_array_equal(params['norm_D'],
                                1 + tensors['model.norm.weight'])
  np.testing.assert_array_equal(params['embed_VD'],
                                tensors['model.embed_tokens.weight'])


def test_gemma3_head_norms(tmp_path):
  tensors, _, params = saved(tmp_path, 'gemma3_text')
  np.testing.assert_array_equal(
      params['layers'][0]['q_norm_H'],
      1 + tensors['model.layers.0.self_attn.q_norm.weight'])


@pytest.mark.parametrize('kind', ['mixtral', 'qwen3_moe'])
def test_experts_are_stacked_also_from_fused_names(tmp_path, kind):
  tensors, config, params = saved(tmp_path, kind)
  assert (config.num_experts, config.experts_per_token) == (E, 2)
  assert config.renormalize and config.d_ff == (F if kind == 'mixtral' else 8)
  moe, names = (('block_sparse_moe', ('w1', 'w3', 'w2')) if kind == 'mixtral'
                else ('mlp', ('gate_proj', 'up_proj', 'down_proj')))
  for layer in range(L):
    at = f'model.layers.{layer}.'
    leaves = [params['layers'][layer][leaf]
              for leaf in ('gate_EFD', 'up_EFD', 'down_EDF')]
    for e in range(E):
      for leaf, name in zip(leaves, names, strict=True):
        np.testing.assert_array_equal(
            leaf[e], tensors.pop(f'{at}{moe}.experts.{e}.{name}.weight'))
    tensors[f'{at}mlp.gate.weight'] = tensors.pop(f'{at}{moe}.gate.weight')
    tensors[f'{at}mlp.experts.gate_up_proj'] = np.concatenate(leaves[:2], 1)
    tensors[f'{at}mlp.experts.down_proj'] = leaves[2]
  fused = load_hf(save(tmp_path, config_of(kind), tensors))[1]
  for a, b in zip(fused['layers'], params['layers'], strict=True):
    for leaf in a:
      np.testing.assert_array_equal(a[leaf], b[leaf], leaf)


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


def test_harmless_extra_tensors_are_ignored(tmp_path):
  keys, tensors = make('gemma2')
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(
      3, np.float32)
  load_hf(save(tmp_path, keys, tensors))


FAMILIES = pathlib.Path(__file__).parents[1] / 'goldens' / 'families'


@pytest.mark.parametrize('path', sorted(p for p in FAMILIES.glob('*')),
                         ids=lambda p: p.name)
def test_models_that_transformers_wrote_are_read(path):
  config, params = load_hf(path)

  def check(leaf, layer):
    array = (params if layer is None else params['layers'][layer])[leaf]
    assert array.shape == config.leaf_shape(leaf)
    assert np.isfinite(array).all() and array.std() > 0
    return array

  assert str(tree(config, check)) == str(params)


# --- bad folders -------------------------------------------------------------


def test_sizes_beyond_reason_are_refused_by_shape(tmp_path):
  keys, tensors = make('llama', vocab_size=10**15)[0], make('llama')[1]
  message = error_of(save(tmp_path, keys, tensors))
  assert 'shape of tensor' in message and 'model.safetensors' in message


@pytest.mark.parametrize('kind, name', [
    ('llama', 'model.layers.1.self_attn.k_proj.weight'),
    ('llama', 'lm_head.weight'), ('gpt2', 'h.0.attn.c_attn.bias'),
    ('mixtral', 'model.layers.1.block_sparse_moe.experts.2.w3.weight')])
def test_a_missing_tensor_is_named(tmp_path, kind, name):
  keys, tensors = make(kind)
  del tensors[name]
  message = error_of(save(tmp_path, keys, tensors))
  assert name.removeprefix('model.') in message and 'missing' in message


@pytest.mark.parametrize('kind, name', [
    ('llama', 'model.layers.1.self_attn.k_proj.weight'),
    ('opt', 'model.decoder.embed_positions.weight'),
    ('gpt2', 'h.0.attn.c_attn.weight'),
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
  tensors['model.norm.weight'] = np.ones(D, np.int8)
  message = error_of(save(tmp_path, keys, tensors))
  assert 'model.norm.weight' in message and 'I8' in message


def test_a_truncated_file(tmp_path):
  path = save(tmp_path, *make('llama')) / 'model.safetensors'
  data = path.read_bytes()
  for size in (0, 4, 8, 100, 2000, len(data) - 1):
    path.write_bytes(data[:size])
    assert 'model.safetensors' in error_of(tmp_path)


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
