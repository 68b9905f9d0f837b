"""Models from Hugging Face folders: config.json and safetensors.

What config.json says becomes a ModelConfig; a key that this model would
ignore in silence is refused, as is a tensor that has no place. Names and
rules follow transformers (src/transformers/models/*/modeling_*.py). Pickled
weights (.bin, .pt) can run any code and are never opened.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import safetensors

from dsjax import weights
from dsjax.base import InputError, ModelConfig, RopeScaling, require

CONFIG = 'config.json'
_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


@contextlib.contextmanager
def _naming(path):
  """Puts the file's name before an InputError's message."""
  try:
    yield
  except InputError as error:
    raise InputError(f'{path}: {error}') from error


def read_json(path):
  """The JSON object in a file. Raises InputError naming the file."""
  try:
    value = json.loads(pathlib.Path(path).read_text('utf-8'))
  except OSError as error:
    raise InputError(f'{path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path}: not JSON: {error}') from error
  if not isinstance(value, dict):
    raise InputError(f'{path}: must hold a JSON object')
  return value


# --- config.json -------------------------------------------------------------

_KINDS = {int: 'an integer', float: 'a finite number', bool: 'true or false',
          str: 'a string', list: 'a list', dict: 'an object'}
# Keys that change nothing in a forward pass without dropout.
_IGNORED = frozenset('''
  _name_or_path activation_dropout add_cross_attention architectures
  attention_dropout attention_probs_dropout_prob attn_implementation
  attn_pdrop begin_suppress_tokens bos_token_id cache_implementation
  chunk_size_feed_forward classifier_dropout do_sample dropout dtype embd_pdrop
  eos_token_id finetuning_task gradient_checkpointing hidden_dropout id2label
  init_std initializer_range is_decoder label2id layerdrop max_length
  model_type n_ctx output_attentions output_hidden_states output_router_logits
  output_scores pad_token_id prefix pretraining_tp problem_type
  reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate
  router_aux_loss_coef sep_token_id summary_activation
  summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
  suppress_tokens task_specific_params temperature tokenizer_class top_k top_p
  torch_dtype torchscript transformers_version unk_token_id
  unsloth_fixed unsloth_version use_cache'''.split())
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'relu': 'relu',
                'gelu': 'gelu', 'gelu_new': 'gelu_tanh',
                'gelu_pytorch_tanh': 'gelu_tanh'}


class _Keys:
  """config.json's keys, each checked as it is read; leftovers are refused."""

  def __init__(self, keys):
    self._keys = {k: v for k, v in keys.items() if k not in _IGNORED}

  def read(self, key, kind=int, *default):
    """A key's value; null counts as absent, and absent is `default`."""
    value = self._keys.pop(key, None)
    if value is None and default:
      return default[0]
    require(value is not None, key, value, f'given ({_KINDS[kind]})')
    kinds = (int, float) if kind is float else kind
    require(isinstance(value, kinds)
            and (kind is bool) == isinstance(value, bool)
            and (kind is not float or math.isfinite(value)), key, value,
            _KINDS[kind])
    return value

  def only(self, key, value):
    """A key that must have this value, or be absent."""
    found = self._keys.pop(key, None)
    require(found is None or found == value, key, found,
            f'{value!r} (others are not supported)')

  def count(self, key, other=None):
    """Layers or experts: few enough to be listed; of either key."""
    key = other if self._keys.get(key) is None and other else key
    value = self.read(key)
    require(1 <= value <= 9999, key, value, 'from 1 to 9999')
    return value

  def ignore(self, *keys):
    for key in keys:
      self._keys.pop(key, None)

  def finish(self):
    for key, value in self._keys.items():
      require(value in (None, False, [], {}), key, value,
              'absent (it is not supported)')


def _above_zero(key, value):
  require(value > 0, key, value, 'above 0')
  return value


def _rope_fields(rope, key):
  """(base, RopeScaling or None) of one set of rotary parameters."""
  require(isinstance(rope, dict), key, rope, 'an object')
  keys = _Keys(rope)
  try:
    kind = keys.read('rope_type', str, None)
    kind = keys.read('type', str, None) if kind is None else kind
    keys.ignore('type')
    base = _above_zero('rope_theta', float(keys.read('rope_theta', float, 1e4)))
    keys.only('partial_rotary_factor', 1.0)
    require(kind in (None, 'default', 'linear', 'llama3'), 'rope_type', kind,
            "'default', 'linear' or 'llama3'")
    scaling = None
    if kind == 'linear':
      scaling = RopeScaling('linear', float(keys.read('factor', float)))
      keys.ignore('original_max_position_embeddings')
    elif kind == 'llama3':
      scaling = RopeScaling(
          'llama3', float(keys.read('factor', float)),
          keys.read('original_max_position_embeddings'),
          float(keys.read('low_freq_factor', float)),
          float(keys.read('high_freq_factor', float)))
    keys.finish()
  except InputError as error:
    raise InputError(f'{key}: {error}') from error
  return base, scaling


def _rope(keys, default_base=1e4):
  """rope_base and rope_scaling, from the keys of any transformers.

  Before version 5: rope_theta and rope_scaling; since then: rope_parameters.
  """
  base = float(keys.read('rope_theta', float, default_base))
  scaling = keys.read('rope_scaling', dict, None)
  rope = keys.read('rope_parameters', dict, scaling)
  key = 'rope_parameters' if scaling is None else 'rope_scaling'
  base, scaling = _rope_fields({'rope_theta': base} | (rope or {}), key)
  keys.only('partial_rotary_factor', 1.0)
  return dict(rope_base=base, rope_scaling=scaling)


def _activation(keys, key, default):
  name = keys.read(key, str, default)
  require(name in _ACTIVATIONS, key, name, f'one of {sorted(_ACTIVATIONS)}')
  return _ACTIVATIONS[name]


def _shape_fields(keys):
  """The fields that every llama-like configuration spells alike."""
  d_model, num_heads = (keys.read('hidden_size'),
                        keys.read('num_attention_heads'))
  return dict(
      num_layers=keys.count('num_hidden_layers'), d_model=d_model,
      num_heads=num_heads,
      num_kv_heads=keys.read('num_key_value_heads', int, num_heads),
      head_dim=keys.read('head_dim', int, d_model // max(num_heads, 1)),
      vocab_size=keys.read('vocab_size'),
      max_len=keys.read('max_position_embeddings'),
      norm_eps=float(keys.read('rms_norm_eps', float, 1e-6)))


def _llama_like(keys, tied=False, rope=_rope):
  return _shape_fields(keys) | rope(keys) | dict(
      d_ff=keys.read('intermediate_size'),
      activation=_activation(keys, 'hidden_act', 'silu'),
      tied=keys.read('tie_word_embeddings', bool, tied))


def _biases(keys):
  bias = keys.read('attention_bias', bool, False)
  return dict(qkv_bias=bias, out_bias=bias)


def _windows(keys, num_layers, slides, default=None):
  """Windows of the layers that layer_types, or else slides(layer), names."""
  window = keys.read('sliding_window', int, default) or 0
  names = ('full_attention', 'sliding_attention')
  types = keys.read('layer_types', list, None)
  if types is None:
    types = [names[bool(slides(layer))] for layer in range(num_layers)]
  require(len(types) == num_layers and all(t in names for t in types),
          'layer_types', types, f'{num_layers} of {names}')
  windows = tuple(window * names.index(kind) for kind in types)
  return dict(windows=windows if any(windows) else ())


def _llama(keys):
  keys.only('mlp_bias', False)  # transformers' would bias the gate too
  return _llama_like(keys) | _biases(keys)


def _mistral(keys):
  fields = _llama_like(keys)
  return fields | _windows(keys, fields['num_layers'], lambda layer: True)


def _qwen2(keys):
  fields = _llama_like(keys)
  first = keys.read('max_window_layers', int, 28)
  if not keys.read('use_sliding_window', bool, False):
    keys.ignore('sliding_window', 'layer_types')
  return fields | dict(qkv_bias=True) | _windows(
      keys, fields['num_layers'], lambda layer: layer >= first)


def _qwen3(keys):
  return _qwen2(keys) | _biases(keys) | dict(qk_norm=True)


def _mixtral(keys):
  keys.ignore('router_jitter_noise')
  return _mistral(keys) | dict(
      num_experts=keys.count('num_local_experts'),
      experts_per_token=keys.read('num_experts_per_tok'))


def _qwen3_moe(keys):
  keys.only('use_sliding_window', False)
  keys.only('decoder_sparse_step', 1)
  keys.only('mlp_only_layers', [])
  keys.ignore('sliding_window', 'max_window_layers')
  return _llama_like(keys) | _biases(keys) | dict(
      d_ff=keys.read('moe_intermediate_size'), qk_norm=True,
      num_experts=keys.count('num_experts', 'num_local_experts'),
      experts_per_token=keys.read('num_experts_per_tok'),
      renormalize=keys.read('norm_topk_prob', bool, False))


def _gemma2(keys, rope=_rope, slides=lambda layer: layer % 2 == 0):
  keys.ignore('hidden_act', 'sliding_window_size')  # unused by transformers
  keys.only('use_bidirectional_attention', False)
  fields = _llama_like(keys, tied=True, rope=rope) | _biases(keys)
  return fields | dict(
      activation=_activation(keys, 'hidden_activation', 'gelu_pytorch_tanh'),
      post_norms=True, embed_scale=fields['d_model']**0.5,
      attn_scale=_above_zero('query_pre_attn_scalar', keys.read(
          'query_pre_attn_scalar', float, 256))**-0.5,
      attn_softcap=float(keys.read('attn_logit_softcapping', float, 0)),
      logit_softcap=float(keys.read('final_logit_softcapping', float, 0)),
  ) | _windows(keys, fields['num_layers'], slides, 4096)


def _gemma3_rope(keys):
  """Full layers' base and scaling, sliding layers' base."""
  local = _above_zero('rope_local_base_freq', float(
      keys.read('rope_local_base_freq', float, 1e4)))
  both = keys.read('rope_parameters', dict, None)
  if both is None:
    return _rope(keys, 1e6) | dict(rope_local_base=local)
  require(both.keys() == {'full_attention', 'sliding_attention'},
          'rope_parameters', sorted(both),
          "{'full_attention': ..., 'sliding_attention': ...}")
  keys.ignore('rope_theta', 'rope_scaling')
  full, sliding = (_rope_fields(both[name], f'rope_parameters.{name}')
                   for name in ('full_attention', 'sliding_attention'))
  require(sliding[1] is None, 'rope_parameters.sliding_attention', sliding[1],
          'of the default type')
  return dict(rope_base=full[0], rope_scaling=full[1],
              rope_local_base=sliding[0])


def _gemma3(keys):
  pattern = keys.read('sliding_window_pattern', int, None)
  pattern = keys.read('_sliding_window_pattern', int, pattern or 6)
  _above_zero('_sliding_window_pattern', pattern)
  return dict(qk_norm=True) | _gemma2(
      keys, _gemma3_rope, lambda layer: (layer + 1) % pattern)


def _opt(keys):
  keys.only('do_layer_norm_before', True)
  keys.only('_remove_final_layer_norm', False)
  keys.only('layer_norm_elementwise_affine', True)
  d_model, num_heads = (keys.read('hidden_size'),
                        keys.read('num_attention_heads'))
  keys.only('word_embed_proj_dim', d_model)
  bias = keys.read('enable_bias', bool, True)
  return dict(
      num_layers=keys.count('num_hidden_layers'), d_model=d_model,
      num_heads=num_heads, num_kv_heads=num_heads,
      head_dim=d_model // max(num_heads, 1), d_ff=keys.read('ffn_dim'),
      vocab_size=keys.read('vocab_size'),
      max_len=keys.read('max_position_embeddings'), norm='layer',
      positions='learned', gated=False, qkv_bias=bias, out_bias=bias,
      mlp_bias=bias, norm_eps=1e-5,
      activation=_activation(keys, 'activation_function', 'relu'),
      tied=keys.read('tie_word_embeddings', bool, True))


def _gpt2(keys):
  keys.only('scale_attn_weights', True)
  keys.only('scale_attn_by_inverse_layer_idx', False)
  d_model, num_heads = keys.read('n_embd'), keys.read('n_head')
  return dict(
      num_layers=keys.count('n_layer'), d_model=d_model, num_heads=num_heads,
      num_kv_heads=num_heads, head_dim=d_model // max(num_heads, 1),
      d_ff=keys.read('n_inner', int, 4 * d_model),
      vocab_size=keys.read('vocab_size'), max_len=keys.read('n_positions'),
      norm='layer', positions='learned', gated=False, qkv_bias=True,
      out_bias=True, mlp_bias=True,
      norm_eps=float(keys.read('layer_norm_epsilon', float, 1e-5)),
      activation=_activation(keys, 'activation_function', 'gelu_new'),
      tied=keys.read('tie_word_embeddings', bool, True))


# --- names of tensors --------------------------------------------------------


class _Take(NamedTuple):
  """A tensor that is not stored as its leaf: its name, shape and cut.

  shape: from the leaf's stored_shape to the file's; cut: the array back.
  """
  name: str
  shape: Callable
  cut: Callable


def _conv1d(name):
  """GPT-2's Conv1D: [inputs, outputs]."""
  return _Take(name, lambda s: s[::-1], np.transpose)


def _third(name, part):
  """Queries, keys or values of one tensor, its last axis packed."""
  return _Take(name, lambda s: (*s[1:], 3 * s[0]),
               lambda x: np.split(x.T, 3)[part])


def _half(name, part):
  """Gate or up of all experts: [E, 2 F, D]."""
  return _Take(name, lambda s: (s[0], 2 * s[1], s[2]),
               lambda x: np.split(x, 2, axis=1)[part])


# Leaf -> tensor, without 'model.' or 'transformer.'; {l} layer, {e} expert.
def _linears(leaves, prefix):
  """Weight and bias of projections: {'q': 'self_attn.q_proj'} and so on."""
  suffixes = dict(q='NHD', k='KHD', v='KHD', o='DNH', gate='FD', up='FD',
                  down='DF')
  biases = dict(q='NH', k='KH', v='KH', o='D', up='F', down='D', gate='F')
  return ({f'{k}_{suffixes[k]}': f'{prefix}.{name}.weight'
           for k, name in leaves.items()}
          | {f'{k}_bias_{biases[k]}': f'{prefix}.{name}.bias'
             for k, name in leaves.items()})


def _norms(leaves, prefix):
  return ({f'{k}_D': f'{prefix}{name}.weight' for k, name in leaves.items()}
          | {f'{k}_bias_D': f'{prefix}{name}.bias'
             for k, name in leaves.items()})


_HEAD = {'head_VD': 'lm_head.weight'}
_LLAMA = (
    _HEAD | {'embed_VD': 'embed_tokens.weight'} | _norms({'norm': 'norm'}, '')
    | _norms({'attn_norm': 'input_layernorm',
              'mlp_norm': 'post_attention_layernorm'}, 'layers.{l}.')
    | _linears({k: f'self_attn.{k}_proj' for k in 'qkvo'}, 'layers.{l}')
    | _linears({k: f'mlp.{k}_proj' for k in ('gate', 'up', 'down')},
               'layers.{l}')
    | {f'{k}_norm_H': f'layers.{{l}}.self_attn.{k}_norm.weight' for k in 'qk'})
_GEMMA = _LLAMA | _norms(
    {'attn_post_norm': 'post_attention_layernorm',
     'mlp_norm': 'pre_feedforward_layernorm',
     'mlp_post_norm': 'post_feedforward_layernorm'}, 'layers.{l}.')
_MOE = 'layers.{l}.block_sparse_moe.'
_MIXTRAL = _LLAMA | {
    'router_ED': f'{_MOE}gate.weight',
    'gate_EFD': f'{_MOE}experts.{{e}}.w1.weight',
    'up_EFD': f'{_MOE}experts.{{e}}.w3.weight',
    'down_EDF': f'{_MOE}experts.{{e}}.w2.weight'}
_MLP = 'layers.{l}.mlp.'
_QWEN3_MOE = _LLAMA | {
    'router_ED': f'{_MLP}gate.weight',
    'gate_EFD': f'{_MLP}experts.{{e}}.gate_proj.weight',
    'up_EFD': f'{_MLP}experts.{{e}}.up_proj.weight',
    'down_EDF': f'{_MLP}experts.{{e}}.down_proj.weight'}
_FUSED = {
    'router_ED': f'{_MLP}gate.weight',
    'gate_EFD': _half(f'{_MLP}experts.gate_up_proj', 0),
    'up_EFD': _half(f'{_MLP}experts.gate_up_proj', 1),
    'down_EDF': f'{_MLP}experts.down_proj'}
_OPT = (
    _HEAD | {'embed_VD': 'decoder.embed_tokens.weight'}
    | {'pos_TD': _Take('decoder.embed_positions.weight',
                       lambda s: (s[0] + 2, s[1]), lambda x: x[2:])}
    | _norms({'norm': 'final_layer_norm'}, 'decoder.')
    | _norms({'attn_norm': 'self_attn_layer_norm',
              'mlp_norm': 'final_layer_norm'}, 'decoder.layers.{l}.')
    | _linears({'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj',
                'v': 'self_attn.v_proj', 'o': 'self_attn.out_proj',
                'up': 'fc1', 'down': 'fc2'}, 'decoder.layers.{l}'))
_GPT2 = (
    _HEAD | {'embed_VD': 'wte.weight', 'pos_TD': 'wpe.weight'}
    | _norms({'norm': 'ln_f'}, '')
    | _norms({'attn_norm': 'ln_1', 'mlp_norm': 'ln_2'}, 'h.{l}.')
    | {leaf: _third('h.{l}.attn.c_attn.weight', i)
       for i, leaf in enumerate(('q_NHD', 'k_KHD', 'v_KHD'))}
    | {leaf: _third('h.{l}.attn.c_attn.bias', i)
       for i, leaf in enumerate(('q_bias_NH', 'k_bias_KH', 'v_bias_KH'))}
    | {leaf: _conv1d(f'h.{{l}}.{name}') for leaf, name in {
        'o_DNH': 'attn.c_proj.weight', 'o_bias_D': 'attn.c_proj.bias',
        'up_FD': 'mlp.c_fc.weight', 'up_bias_F': 'mlp.c_fc.bias',
        'down_DF': 'mlp.c_proj.weight', 'down_bias_D': 'mlp.c_proj.bias'
    }.items()})


class _Family(NamedTuple):
  """model_type's way: fields of its config, names of its tensors.

  norm_offset: what is added to a norm's stored gain.
  """
  architecture: str
  fields: Callable
  names: dict
  norm_offset: int = 0


_FAMILIES = {
    'opt': _Family('OPTForCausalLM', _opt, _OPT),
    'gpt2': _Family('GPT2LMHeadModel', _gpt2, _GPT2),
    'llama': _Family('LlamaForCausalLM', _llama, _LLAMA),
    'mistral': _Family('MistralForCausalLM', _mistral, _LLAMA),
    'qwen2': _Family('Qwen2ForCausalLM', _qwen2, _LLAMA),
    'qwen3': _Family('Qwen3ForCausalLM', _qwen3, _LLAMA),
    'gemma2': _Family('Gemma2ForCausalLM', _gemma2, _GEMMA, 1),
    'gemma3_text': _Family('Gemma3ForCausalLM', _gemma3, _GEMMA, 1),
    'mixtral': _Family('MixtralForCausalLM', _mixtral, _MIXTRAL),
    'qwen3_moe': _Family('Qwen3MoeForCausalLM', _qwen3_moe, _QWEN3_MOE),
}
# Stored by some versions, and not parameters.
_NOT_PARAMETERS = re.compile(
    r'rotary_emb\.inv_freq$|^h\.\d+\.attn\.(masked_)?bias$')


def _family(keys):
  """The _Family that model_type, or else architectures, names."""
  kind, listed = keys.get('model_type'), keys.get('architectures')
  if kind is None:
    kind = next((k for k, f in _FAMILIES.items()
                 if listed == [f.architecture]), None)
  require(isinstance(kind, str) and kind in _FAMILIES, 'model_type',
          kind or listed, f'one of {sorted(_FAMILIES)}')
  family = _FAMILIES[kind]
  require(listed in (None, [family.architecture]), 'architectures', listed,
          f'{[family.architecture]} for model_type={kind!r}')
  return family


def _ids(*sources):
  """bos_id and eos_ids: the first file that gives an id wins."""
  found = {}
  for key in ('bos_token_id', 'eos_token_id'):
    values = [s[key] for s in sources if s.get(key) is not None] + [[]]
    ids = values[0] if isinstance(values[0], list) else [values[0]]
    require(all(type(i) is int for i in ids), key, values[0],
            'a token id or a list of them')
    found[key] = ids
  return found['bos_token_id'], found['eos_token_id']


def read_config(path):
  """The ModelConfig of a folder's config.json (and generation_config.json).

  Special token ids outside the vocabulary are dropped: no token has them.

  Raises:
    InputError: names the file and key: unreadable, another architecture, or
      a hyperparameter that this model does not compute.
  """
  return _read_config(pathlib.Path(path))[0]


def _read_config(path):
  raw, more = read_json(path / CONFIG), {}
  if (path / 'generation_config.json').is_file():
    more = read_json(path / 'generation_config.json')
  with _naming(path / CONFIG):
    family, keys = _family(raw), _Keys(raw)
    fields = family.fields(keys)
    keys.finish()
    config = ModelConfig(name=path.resolve().name, **fields)
    bos, eos = (sorted({i for i in ids if 0 <= i < config.vocab_size})
                for ids in _ids(more, raw))
    return dataclasses.replace(config, bos_id=bos[0] if bos else None,
                               eos_ids=tuple(eos)), family


# --- tensors -----------------------------------------------------------------


def _open(file):
  """An open safetensors file; its header is checked by the package."""
  try:
    with open(file, 'rb') as stream:
      start = stream.read(8)
    # A header's length comes first, below 2^32: its last four bytes are zero.
    if start[:4] == b'PK\x03\x04' or start[:1] == b'\x80' and any(start[4:]):
      raise InputError(f'{file}: a pickle, which is never opened: must be '
                       'safetensors')
    return safetensors.safe_open(file, framework='np')
  except OSError as error:
    raise InputError(f'{file}: {error.strerror or error}') from error
  except safetensors.SafetensorError as error:
    raise InputError(f'{file}: truncated or corrupt: {error}') from error


def _files(path):
  """{tensor name: file} of a folder."""
  if (path / _WEIGHTS).is_file():
    file = path / _WEIGHTS
    with _open(file) as tensors:
      return dict.fromkeys(tensors.keys(), file)
  if not (path / _INDEX).is_file():
    pickles = [f'; {file.name} is a pickle, which is never opened: convert it '
               'to safetensors' for file in sorted(path.iterdir())
               if file.suffix in _PICKLES]
    raise InputError(f'{path}: no {_WEIGHTS} or {_INDEX}{"".join(pickles[:1])}')
  table = read_json(path / _INDEX).get('weight_map')
  with _naming(path / _INDEX):
    require(isinstance(table, dict) and table, 'weight_map', table,
            'an object of file names')
    for name, file in table.items():
      require(isinstance(file, str) and file.endswith('.safetensors')
              and pathlib.PurePath(file).name == file,
              f'weight_map[{name!r}]', file,
              'a .safetensors file in the same folder')
  held = {}
  for file in sorted(set(table.values())):
    with _open(path / file) as tensors:
      held[file] = set(tensors.keys())
  for name, file in table.items():
    if name not in held[file]:
      raise InputError(f'{path / file}: tensor {name!r} of {_INDEX} is missing')
  return {name: path / file for name, file in table.items()}


class _Folder:
  """A folder's tensors by their names without 'model.', read one by one."""

  def __init__(self, path):
    self._files = {}
    for name, file in _files(path).items():
      short = name.removeprefix('model.').removeprefix('transformer.')
      require(short not in self._files, 'tensor', name, 'there only once')
      self._files[short] = name, file
    self._open = {}
    self.path = path

  def names(self):
    return self._files.keys()

  def _tensor(self, name):
    """(file, name in it, the open file)."""
    if name not in self._files:
      raise InputError(f'{self.path}: tensor {name!r} is missing')
    full_name, file = self._files[name]
    if file not in self._open:
      self._open[file] = _open(file)
    return file, full_name, self._open[file]

  def check(self, name, shape):
    """Raises InputError unless these are floats of this shape."""
    file, full_name, tensors = self._tensor(name)
    stored = tensors.get_slice(full_name)
    with _naming(file):
      require(stored.get_dtype() in _FLOATS, f'type of tensor {full_name!r}',
              stored.get_dtype(), f'one of {_FLOATS}')
      require(tuple(stored.get_shape()) == shape,
              f'shape of tensor {full_name!r}', tuple(stored.get_shape()),
              shape)

  def read(self, name):
    """A copy of a tensor, of its own dtype."""
    _, full_name, tensors = self._tensor(name)
    return tensors.get_tensor(full_name)


def _take(names, leaf, layer):
  """How a leaf is stored: a _Take whose name may still want an expert."""
  take = names[leaf]
  if isinstance(take, str):
    take = _Take(take, lambda s: s, lambda x: x)
  return take._replace(name=take.name.replace('{l}', str(layer)))


def _check_tensors(config, names, folder):
  """Raises InputError unless the folder holds exactly the model's tensors."""
  used = {'lm_head.weight'} if config.tied else set()

  def check(leaf, layer):
    take, shape = _take(names, leaf, layer), weights.stored_shape(config, leaf)
    for expert in range(config.num_experts if '{e}' in take.name else 1):
      name = take.name.format(e=expert)
      folder.check(name, shape[1:] if '{e}' in take.name else take.shape(shape))
      used.add(name)

  weights.tree(config, check)
  for name in sorted(folder.names() - used):
    if not _NOT_PARAMETERS.search(name):
      raise InputError(f'{folder.path}: tensor {name!r} is not supported')


def load_hf(path, dtype='float32'):
  """A model from a Hugging Face folder: config.json and *.safetensors.

  One model.safetensors, or files with model.safetensors.index.json. Families:
  the keys of _FAMILIES. The tree is that of dsjax.weights; rotary rows are
  half-split, as stored; Gemma's norm gains become 1 + w.

  Cost: the files are mapped and read once; 4 or 2 bytes a parameter, and one
  tensor as stored.

  Returns:
    (ModelConfig, params as numpy arrays of `dtype`, C-contiguous).
  Raises:
    InputError: names the file, and the key or tensor: unreadable, truncated,
      pickled, of another architecture, or with what this model does not
      compute.
  """
  weights.check_dtype(dtype)
  path = pathlib.Path(path)
  config, family = _read_config(path)
  folder = _Folder(path)
  fused = any('experts.gate_up_proj' in name for name in folder.names())
  names = family.names | (_FUSED if fused else {})
  _check_tensors(config, names, folder)

  def make(leaf, layer):
    take, shape = _take(names, leaf, layer), weights.stored_shape(config, leaf)
    out = np.empty(shape, weights.DTYPES[dtype])
    if '{e}' in take.name:
      for expert, matrix in enumerate(out):
        matrix[...] = folder.read(take.name.format(e=expert))
    elif family.norm_offset and 'norm' in leaf:
      out[...] = family.norm_offset + folder.read(take.name).astype(np.float32)
    else:
      out[...] = take.cut(folder.read(take.name))
    return out.reshape(config.leaf_shape(leaf))

  return config, weights.tree(config, make)
