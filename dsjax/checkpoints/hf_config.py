"""config.json of a Hugging Face folder as a ModelConfig.

A key that this model would ignore in silence is refused. Defaults and rules
follow transformers (src/transformers/models/*/configuration_*.py).
"""

import contextlib
import dataclasses
import math
import pathlib

from dsjax.config.checks import InputError, parse_json, require
from dsjax.config.model import ModelConfig, RopeScaling

CONFIG = 'config.json'


@contextlib.contextmanager
def naming(path):
  """Puts the file's name before an InputError's message."""
  try:
    yield
  except InputError as error:
    raise InputError(f'{path}: {error}') from error


def read_json(path):
  """The JSON object in a file. Raises InputError naming the file."""
  try:
    text = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise InputError(f'{path}: {error.strerror}') from error
  value = parse_json(path, text)
  if not isinstance(value, dict):
    raise InputError(f'{path}: must hold a JSON object')
  return value


_KINDS = {int: 'an integer', float: 'a finite number', bool: 'true or false',
          str: 'a string', list: 'a list', dict: 'an object'}
# Keys that change nothing in a forward pass without dropout.
_IGNORED = frozenset('''
  _name_or_path activation_dropout architectures
  attention_dropout attention_probs_dropout_prob attn_implementation
  attn_pdrop begin_suppress_tokens bos_token_id cache_implementation
  chunk_size_feed_forward classifier_dropout do_sample dropout dtype
  embd_pdrop eos_token_id finetuning_task gradient_checkpointing
  hidden_dropout id2label init_std initializer_range is_decoder
  keys_to_ignore_at_inference label2id layerdrop length_penalty max_length
  model_type n_ctx num_beam_groups num_beams num_return_sequences
  output_attentions output_hidden_states output_past output_router_logits
  output_scores pad_token_id predict_special_tokens prefix pretraining_tp
  problem_type reorder_and_upcast_attn repetition_penalty resid_pdrop
  return_dict return_dict_in_generate router_aux_loss_coef sep_token_id
  summary_activation summary_first_dropout summary_proj_to_labels summary_type
  summary_use_proj suppress_tokens task_specific_params temperature
  tokenizer_class top_k top_p torch_dtype torchscript transformers_version
  typical_p unk_token_id unsloth_fixed unsloth_version use_cache'''.split())
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


# model_type -> (architecture, the fields of its config).
_FAMILIES = {
    'opt': ('OPTForCausalLM', _opt),
    'gpt2': ('GPT2LMHeadModel', _gpt2),
    'llama': ('LlamaForCausalLM', _llama),
    'mistral': ('MistralForCausalLM', _mistral),
    'qwen2': ('Qwen2ForCausalLM', _qwen2),
    'qwen3': ('Qwen3ForCausalLM', _qwen3),
    'gemma2': ('Gemma2ForCausalLM', _gemma2),
    'gemma3_text': ('Gemma3ForCausalLM', _gemma3),
    'mixtral': ('MixtralForCausalLM', _mixtral),
    'qwen3_moe': ('Qwen3MoeForCausalLM', _qwen3_moe),
}
MODEL_TYPES = tuple(_FAMILIES)


def _model_type(keys):
  """The family that model_type, or else architectures, names."""
  kind, listed = keys.get('model_type'), keys.get('architectures')
  if kind is None:
    kind = next((k for k, (architecture, _) in _FAMILIES.items()
                 if listed == [architecture]), None)
  require(isinstance(kind, str) and kind in _FAMILIES, 'model_type',
          kind or listed, f'one of {sorted(_FAMILIES)}')
  architecture = _FAMILIES[kind][0]
  require(listed in (None, [architecture]), 'architectures', listed,
          f'{[architecture]} for model_type={kind!r}')
  return kind


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
  """(ModelConfig, model_type) of a folder.

  From its config.json and, for special tokens, generation_config.json. Ids
  outside the vocabulary are dropped: no token has them.

  Raises:
    InputError: names the file and key: unreadable, another architecture, or
      a hyperparameter that this model does not compute.
  """
  path = pathlib.Path(path)
  raw, more = read_json(path / CONFIG), {}
  if (path / 'generation_config.json').is_file():
    more = read_json(path / 'generation_config.json')
  with naming(path / CONFIG):
    kind, keys = _model_type(raw), _Keys(raw)
    fields = _FAMILIES[kind][1](keys)
    keys.finish()
    config = ModelConfig(name=path.resolve().name, **fields)
    bos, eos = (sorted({i for i in ids if 0 <= i < config.vocab_size})
                for ids in _ids(more, raw))
    return dataclasses.replace(config, bos_id=bos[0] if bos else None,
                               eos_ids=tuple(eos)), kind
