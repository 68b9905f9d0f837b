import dataclasses

import ml_dtypes
import numpy as np
import pytest

from dsjax.checkpoints import checkpoint
from dsjax.checkpoints.families import gemma2, gemma3
from dsjax.checkpoints.family import GgufKeys
from dsjax.checkpoints.weights import random_params, stored_shape, tree
from dsjax.config import rope
from dsjax.config.checks import InputError
from dsjax.config.model import ModelConfig

gguf = pytest.importorskip('gguf')

gguf = pytest.importorskip('gguf')

L, D, N, K, H, F, V = 2, 32, 4, 2, 8, 64, 24
NAME = 'smollm2-135m-instruct'
CONFIG = ModelConfig(
    name='tiny', num_layers=L, d_model=D, num_heads=N, num_kv_heads=K,
    head_dim=H, d_ff=F, vocab_size=V, max_len=128, rope_base=1e4,
    norm_eps=2**-17, tied=True, bos_id=1, eos_ids=(2, 3))
KEYS = {
    'general.architecture': 'llama', 'general.name': 'tiny',
    'llama.block_count': L, 'llama.context_length': 128,
    'llama.embedding_length': D, 'llama.feed_forward_length': F,
    'llama.attention.head_count': N, 'llama.attention.head_count_kv': K,
    'llama.attention.layer_norm_rms_epsilon': 2**-17,
    'llama.rope.dimension_count': H, 'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 3, 'tokenizer.ggml.eot_token_id': 2,
    'tokenizer.ggml.tokens': [f't{i}' for i in range(V)]}


def tiny_tensors():
  """Random matrices of a tiny model under the names and order of a file."""
  rng = np.random.default_rng(0)
  shapes = {'token_embd': (V, D), 'output_norm': (D,)}
  for layer in range(L):
    shapes |= {f'blk.{layer}.{name}': shape for name, shape in {
        'attn_norm': (D,), 'attn_q': (N * H, D), 'attn_k': (K * H, D),
        'attn_v': (K * H, D), 'attn_output': (D, N * H), 'ffn_norm': (D,),
        'ffn_gate': (F, D), 'ffn_up': (F, D), 'ffn_down': (D, F)}.items()}
  return {f'{name}.weight': rng.standard_normal(shape, np.float32)
          for name, shape in shapes.items()}


def add_key(writer, key, value):
  if isinstance(value, list):
    writer.add_array(key, value)
  elif isinstance(value, str):
    writer.add_string(key, value)
  elif isinstance(value, float):
    writer.add_float32(key, value)
  else:
    writer.add_uint32(key, value)


def save(path, keys=KEYS, tensors=None, kind=None):
  """Writes a GGUF with these keys and tensors; matrices as `kind` if given."""
  writer = gguf.GGUFWriter(path, keys.get('general.architecture', ''))
  for key, value in keys.items():
    if key != 'general.architecture' and value is not None:
      add_key(writer, key, value)
  for name, array in (tiny_tensors() if tensors is None else tensors).items():
    if kind is not None and array.ndim == 2:
      writer.add_tensor(name, gguf.quants.quantize(array, kind),
                        raw_dtype=kind)
    else:
      writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.gguf'


def error_of(path, call=checkpoint.load_gguf):
  """The loader's message, which must name the file."""
  with pytest.raises(InputError) as error:
    call(path)
  assert str(path) in str(error.value)
  return str(error.value)


def leaves(params):
  """[(name, array)] of a params tree."""
  return [(k, v) for k, v in params.items() if k != 'layers'] + [
      pair for layer in params['layers'] for pair in layer.items()]


# --- a good file -------------------------------------------------------------


def test_config_is_read(path):
  assert checkpoint.load_gguf(save(path))[0] == CONFIG


def test_name_falls_back_to_the_file(path):
  save(path, KEYS | {'general.name': None})
  assert checkpoint.load_gguf(path)[0].name == 'model'


def test_key_value_heads_default_to_heads(path):
  tensors = tiny_tensors()
  for name in tensors:
    if 'attn_k' in name or 'attn_v' in name:
      tensors[name] = tiny_tensors()[name.replace('_k', '_q').replace(
          '_v', '_q')]
  save(path, KEYS | {'llama.attention.head_count_kv': None}, tensors)
  assert checkpoint.load_gguf(path)[0].num_kv_heads == N


def test_an_output_matrix_unties_the_head(path):
  head_VD = np.ones((V, D), np.float32)
  config, params = checkpoint.load_gguf(
      save(path, tensors=tiny_tensors() | {'output.weight': head_VD}))
  assert not config.tied
  np.testing.assert_array_equal(params['head_VD'], head_VD)


def interleaved(x_NH, position):
  """Rotary on neighbouring pairs, as ggml applies it to llama files."""
  angle = position * 1e4 ** (-np.arange(0, H, 2) / H)
  cos, sin = np.cos(angle), np.sin(angle)
  out_NH = np.empty_like(x_NH)
  out_NH[:, 0::2] = x_NH[:, 0::2] * cos - x_NH[:, 1::2] * sin
  out_NH[:, 1::2] = x_NH[:, 0::2] * sin + x_NH[:, 1::2] * cos
  return out_NH


def half_split(x_NH, position):
  """Rotary on pairs half a head apart, as dsjax applies it."""
  angle = position * 1e4 ** (-np.arange(0, H, 2) / H)
  cos, sin = np.cos(angle), np.sin(angle)
  a, b = x_NH[:, :H // 2], x_NH[:, H // 2:]
  return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=1)


def test_half_split_rotary_scores_as_interleaved_did(path):
  tensors = tiny_tensors()
  layer = checkpoint.load_gguf(save(path))[1]['layers'][1]
  x_D = np.random.default_rng(1).standard_normal(D)
  for start, stop in ((0, 0), (3, 11)):
    q_NH = (tensors['blk.1.attn_q.weight'] @ x_D).reshape(N, H)
    k_KH = (tensors['blk.1.attn_k.weight'] @ x_D).reshape(K, H)
    want_NK = interleaved(q_NH, stop) @ interleaved(k_KH, start).T
    got_NK = (half_split(layer['q_NHD'] @ x_D, stop)
              @ half_split(layer['k_KHD'] @ x_D, start).T)
    np.testing.assert_allclose(got_NK, want_NK, rtol=1e-9)


@pytest.mark.parametrize('kind', ['Q4_0', 'Q4_1', 'Q5_1', 'Q8_0', 'F16',
                                  'BF16'])
def test_quantised_matrices_are_dequantised(path, kind):
  kind = gguf.GGMLQuantizationType[kind]
  params = checkpoint.load_gguf(save(path, kind=kind))[1]
  stored = tiny_tensors()['blk.0.ffn_down.weight']
  want = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind)
  np.testing.assert_array_equal(params['layers'][0]['down_DF'], want)
  assert np.abs(want - stored).max() < 0.4


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_leaf_has_the_dtype_and_is_contiguous(path, dtype):
  params = checkpoint.load_gguf(save(path), dtype)[1]
  for _, array in leaves(params):
    assert array.dtype == dtype and array.flags.c_contiguous
    assert array.flags.writeable  # a copy, not a view of the file


def test_bfloat16_is_rounded_float32(path):
  save(path)
  wide = leaves(checkpoint.load_gguf(path)[1])
  narrow = leaves(checkpoint.load_gguf(path, 'bfloat16')[1])
  for (_, a), (_, b) in zip(wide, narrow, strict=True):
    np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16), b)


def test_smollm2_is_found_and_loads():
  config, params = checkpoint.load_gguf(checkpoint.find(NAME))
  assert (config.num_layers, config.d_model, config.d_ff) == (30, 576, 1536)
  assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
  assert (config.vocab_size, config.max_len, config.tied) == (
      49152, 8192, True)
  assert (config.bos_id, config.eos_ids) == (1, (2,))
  assert config.rope_base == 1e5
  assert config.norm_eps == pytest.approx(1e-5)
  assert sum(a.size for _, a in leaves(params)) == 134_515_008


# --- bad files ---------------------------------------------------------------


def test_any_corrupt_byte_of_the_header_is_survived(path):
  data = bytearray(save(path).read_bytes())
  rng = np.random.default_rng(0)
  for at in rng.integers(4, 2500, 300):
    bad = data.copy()
    bad[at] ^= 1 << rng.integers(8)
    path.write_bytes(bad)
    try:
      checkpoint.load_gguf(path)
    except InputError as error:
      assert str(path) in str(error)


def test_another_architecture(path):
  message = error_of(save(path, KEYS | {'general.architecture': 'mamba'}))
  assert 'mamba' in message and 'llama' in message


@pytest.mark.parametrize('key', [
    'llama.block_count', 'llama.embedding_length',
    'llama.attention.head_count', 'llama.feed_forward_length',
    'llama.context_length', 'llama.attention.layer_norm_rms_epsilon'])
def test_a_missing_key(path, key):
  message = error_of(save(path, KEYS | {key: None}))
  assert key in message and 'missing' in message


@pytest.mark.parametrize('key, value, words', [
    ('llama.block_count', 'two', 'llama.block_count'),
    ('llama.block_count', 0, 'num_layers'),
    ('llama.block_count', 10**9, 'block_count'),
    ('llama.attention.head_count', [4, 4], 'llama.attention.head_count'),
    ('llama.attention.head_count', 0, 'num_heads'),
    ('llama.attention.head_count', 3, 'num_heads'),
    ('llama.attention.layer_norm_rms_epsilon', 'small', 'epsilon'),
    ('llama.rope.freq_base', -1.0, 'llama.rope.freq_base'),
    ('llama.attention.key_length', 0, 'head width 0'),
    ('llama.rope.dimension_count', 6, 'llama.rope.dimension_count'),
    ('llama.vocab_size', V - 1, 'llama.vocab_size'),
    ('tokenizer.ggml.eos_token_id', V, 'tokenizer.ggml.eos_token_id'),
    ('general.alignment', 0, 'general.alignment'),
    ('general.alignment', 'x', 'general.alignment')])
def test_a_bad_value(path, key, value, words):
  keys = KEYS | {'llama.attention.key_length': H, key: value}
  assert words in error_of(save_raw(path, keys))


def save_raw(path, keys):
  """save(), also for an alignment that the writer would act on."""
  align = keys.pop('general.alignment', None)
  save(path, keys if align is None else keys | {'general.alignmenX': align})
  path.write_bytes(path.read_bytes().replace(b'alignmenX', b'alignment'))
  return path


@pytest.mark.parametrize('key, value', [
    ('rope.scaling.type', 'longrope'), ('rope.scaling.factor', 2.0),
    ('rope.scale_linear', 4.0), ('logit_scale', 0.5),
    ('attention.sliding_window', 512)])
def test_an_unsupported_hyperparameter(path, key, value):
  message = error_of(save(path, KEYS | {f'llama.{key}': value}))
  assert key in message and 'not supported' in message


@pytest.mark.parametrize('key, value', [
    ('rope.scaling.type', 'none'), ('rope.scaling.factor', 1.0),
    ('expert_count', 0)])
def test_a_neutral_hyperparameter(path, key, value):
  save(path, KEYS | {f'llama.{key}': value})
  assert checkpoint.load_gguf(path)[0] == CONFIG


@pytest.mark.parametrize('name, hint', [
    ('blk.0.attn_q.bias', 'biases'),
    ('blk.1.ffn_gate_exps.weight', 'mixture of experts'),
    ('blk.0.ffn_gate_inp.weight', 'mixture of experts'),
    ('blk.2.attn_q.weight', 'unexpected')])
def test_an_unsupported_tensor(path, name, hint):
  extra = {name: np.ones(4, np.float32)}
  message = error_of(save(path, tensors=tiny_tensors() | extra))
  assert name in message and hint in message


@pytest.mark.parametrize('name', [
    'token_embd.weight', 'output_norm.weight', 'blk.1.attn_k.weight'])
def test_a_missing_tensor(path, name):
  tensors = tiny_tensors()
  del tensors[name]
  message = error_of(save(path, tensors=tensors))
  assert name in message and 'missing' in message


@pytest.mark.parametrize('name', [
    'token_embd.weight', 'output_norm.weight', 'blk.0.ffn_down.weight'])
def test_a_wrong_shape(path, name):
  tensors = tiny_tensors()
  tensors[name] = np.concatenate([tensors[name]] * 2)
  message = error_of(save(path, tensors=tensors))
  assert name in message and str(tensors[name].shape) in message


def test_an_unsupported_tensor_type(path):
  tensors = tiny_tensors()
  tensors['output_norm.weight'] = np.ones(D, np.int8)
  message = error_of(save(path, tensors=tensors))
  assert 'output_norm.weight' in message and 'I8' in message


def test_an_unknown_dtype(path):
  with pytest.raises(InputError, match='float16'):
    checkpoint.load_gguf(path, 'float16')


# --- other families ----------------------------------------------------------

T = gguf.MODEL_TENSOR
# Our leaves -> the package's names.
NAMES = {
    'embed_VD': T.TOKEN_EMBD, 'pos_TD': T.POS_EMBD, 'norm_D': T.OUTPUT_NORM,
    'head_VD': T.OUTPUT, 'attn_norm_D': T.ATTN_NORM, 'q_NHD': T.ATTN_Q,
    'k_KHD': T.ATTN_K, 'v_KHD': T.ATTN_V, 'o_DNH': T.ATTN_OUT,
    'q_norm_H': T.ATTN_Q_NORM, 'k_norm_H': T.ATTN_K_NORM,
    'attn_post_norm_D': T.ATTN_POST_NORM, 'mlp_norm_D': T.FFN_NORM,
    'mlp_post_norm_D': T.FFN_POST_NORM, 'gate_FD': T.FFN_GATE,
    'up_FD': T.FFN_UP, 'down_DF': T.FFN_DOWN, 'router_ED': T.FFN_GATE_INP,
    'gate_EFD': T.FFN_GATE_EXP, 'up_EFD': T.FFN_UP_EXP,
    'down_EDF': T.FFN_DOWN_EXP, 'norm_bias_D': T.OUTPUT_NORM,
    'attn_norm_bias_D': T.ATTN_NORM, 'mlp_norm_bias_D': T.FFN_NORM,
    'q_bias_NH': T.ATTN_Q, 'k_bias_KH': T.ATTN_K, 'v_bias_KH': T.ATTN_V,
    'o_bias_D': T.ATTN_OUT, 'up_bias_F': T.FFN_UP, 'down_bias_D': T.FFN_DOWN}
GEMMA1 = dict(norm_eps=2**-20, activation='gelu_tanh', embed_scale=D**0.5)
GEMMA = GEMMA1 | dict(post_norms=True, attn_softcap=50.0, logit_softcap=30.0)
# Architecture -> (what its config has beyond CONFIG, its keys).
FAMILIES = {
    'qwen2': (dict(qkv_bias=True), {}),
    'qwen3': (dict(qk_norm=True, tied=False, head_dim=16), {
        'attention.key_length': 16, 'attention.value_length': 16,
        'rope.dimension_count': None}),
    'qwen3moe': (dict(qk_norm=True, num_experts=3, experts_per_token=2,
                      d_ff=16), {
        'expert_count': 3, 'expert_used_count': 2,
        'expert_feed_forward_length': 16}),
    'llama': (dict(num_experts=3, experts_per_token=2), {
        'expert_count': 3, 'expert_used_count': 2}),
    'gemma': (GEMMA1, {}),
    'gemma2': (GEMMA | dict(attn_scale=H**-0.5, windows=(16, 0)), {
        'attention.sliding_window': 16, 'attn_logit_softcapping': 50.0,
        'final_logit_softcapping': 30.0}),
    'gemma3': (GEMMA | dict(
        attn_softcap=0.0, logit_softcap=0.0, attn_scale=H**-0.5, qk_norm=True,
        windows=(16, 16), rope_base=1e6, rope_local_base=1e4,
        rope_divisors=(8.0,) * 4), {
            'attention.sliding_window': 16, 'rope.freq_base': 1e6,
            'rope.scaling.type': 'linear', 'rope.scaling.factor': 8.0}),
    'gpt2': (dict(
        norm='layer', positions='learned', activation='gelu_tanh',
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True,
        num_kv_heads=N), {
            'attention.layer_norm_epsilon': 2**-17,
            'attention.layer_norm_rms_epsilon': None,
            'attention.head_count_kv': None, 'rope.dimension_count': None}),
}


def family(arch):
  """(config, params, keys, tensors) of a tiny model."""
  fields, more = FAMILIES[arch]
  config = dataclasses.replace(CONFIG, **fields)
  keys = {name.replace('llama.', f'{arch}.'): value
          for name, value in KEYS.items()}
  keys |= {'general.architecture': arch,
           f'{arch}.attention.layer_norm_rms_epsilon': config.norm_eps}
  keys |= {f'{arch}.{name}': value for name, value in more.items()}
  params = random_params(config, 0)
  tensors = {}

  def store(leaf, layer):
    array = (params if layer is None else params['layers'][layer])[leaf]
    array = array.reshape(stored_shape(config, leaf))
    if arch == 'llama' and leaf in ('q_NHD', 'k_KHD'):  # to interleaved rows
      array = array.reshape(-1, 2, H // 2, D).swapaxes(1, 2).reshape(-1, D)
    name = gguf.TENSOR_NAMES[NAMES[leaf]].format(bid=layer)
    tensors[name + ('.bias' if 'bias' in leaf else '.weight')] = array

  tree(config, store)
  if arch == 'gpt2':
    for layer in range(L):
      for kind in ('weight', 'bias'):
        tensors[f'blk.{layer}.attn_qkv.{kind}'] = np.concatenate(
            [tensors.pop(f'blk.{layer}.attn_{x}.{kind}') for x in 'qkv'])
  return config, params, keys, tensors


@pytest.mark.parametrize('arch', sorted(FAMILIES))
def test_other_families_are_read(path, arch):
  config, params, keys, tensors = family(arch)
  read, loaded = checkpoint.load_gguf(save(path, keys, tensors))
  assert read == config
  for (name, want), (other, got) in zip(leaves(params), leaves(loaded),
                                        strict=True):
    assert name == other
    np.testing.assert_array_equal(got, want, name)


@pytest.mark.parametrize('arch, known, layers', [
    ('gemma2', gemma2, 46), ('gemma3', gemma3, 62)])
def test_the_largest_gemmas_scale_by_their_width(arch, known, layers):
  base = dict(num_layers=layers, d_model=D, num_heads=N, head_dim=H + 1)
  keys = {f'{arch}.attention.sliding_window': 8}
  fields = known.FAMILY.gguf.fields(GgufKeys(keys, arch), base)
  assert fields['attn_scale'] == (D / N)**-0.5
  assert fields['windows'][:7] == ((8, 0) * 4)[:7] if arch == 'gemma2' else (
      (8,) * 5 + (0, 8))


@pytest.mark.parametrize('arch, name', [
    ('qwen2', 'blk.1.attn_k.bias'), ('qwen3', 'blk.0.attn_q_norm.weight'),
    ('gemma2', 'blk.0.post_ffw_norm.weight'), ('gpt2', 'blk.1.attn_qkv.bias'),
    ('gpt2', 'position_embd.weight'), ('llama', 'blk.1.ffn_up_exps.weight')])
def test_a_missing_tensor_of_another_family(path, arch, name):
  _, _, keys, tensors = family(arch)
  tensors.pop(name)
  message = error_of(save(path, keys, tensors))
  assert name in message and 'missing' in message


def test_experts_need_to_know_how_many_are_used(path):
  assert 'expert_used_count' in error_of(
      save(path, KEYS | {'llama.expert_count': 8}))


def divisors(factor, length, low=1.0, high=4.0, width=H, base=1e4):
  """rope_freqs as llama.cpp's converter writes it for llama3."""
  factors = []
  for i in range(width // 2):
    wavelength = 2 * np.pi * base**(2 * i / width)
    if wavelength < length / high:
      factors.append(1.0)
    elif wavelength > length / low:
      factors.append(factor)
    else:
      smooth = (length / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


def test_divisors_are_read_as_they_stand(path):
  """Of any scaling: those of llama3 as llama.cpp's converter writes them."""
  freqs = divisors(8.0, 1000)
  config, _ = checkpoint.load_gguf(save(
      path, tensors=tiny_tensors() | {'rope_freqs.weight': freqs}))
  assert config.rope_divisors == tuple(freqs.tolist())


@pytest.mark.parametrize('factor, width, base', [(8.0, 128, 5e5),
                                                 (32.0, 64, 5e5)])
def test_llama3_of_published_models_is_that_of_the_converter(
    factor, width, base):
  np.testing.assert_allclose(
      rope.llama3(width, base, factor, 8192),
      divisors(factor, 8192, width=width, base=base), rtol=1e-6)


@pytest.mark.parametrize('freqs', [
    np.full(4, np.nan), np.array([1, 2, 8, np.inf]), -np.ones(4), np.zeros(4),
    np.ones(3)], ids=str)
def test_other_divisors_are_refused(path, freqs):
  tensors = tiny_tensors() | {'rope_freqs.weight': freqs.astype(np.float32)}
  message = error_of(save(path, tensors=tensors))
  assert 'rope_freqs.weight' in message and 'RoPE scaling' in message


@pytest.mark.parametrize('kind, want', [
    ('linear', dict(rope_divisors=(2.0,) * 4)),
    ('yarn', dict(rope_divisors=rope.yarn(H, 1e4, 2.0, 128), max_len=256,
                  rope_gain=rope.yarn_gain(2.0)))])
def test_scaling_by_keys(path, kind, want):
  keys = KEYS | {'llama.rope.scaling.type': kind,
                 'llama.rope.scaling.factor': 2.0}
  config, _ = checkpoint.load_gguf(save(path, keys))
  assert config == dataclasses.replace(CONFIG, **want)
  tensors = tiny_tensors() | {'rope_freqs.weight': divisors(8.0, 1000)}
  assert 'rope.scaling.type' in error_of(save(path, keys, tensors))
