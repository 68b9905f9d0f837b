"""Models from Hugging Face folders: config.json and safetensors.

hf_config reads the configuration; here its tensors become our leaves, and one
that has no place is refused. Names follow transformers
(src/transformers/models/*/modeling_*.py). Pickled weights (.bin, .pt) can run
any code and are never opened.
"""

import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import safetensors

from dsjax.checkpoints import weights
from dsjax.checkpoints.hf_config import naming, read_config, read_json
from dsjax.config.checks import InputError, require

_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


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
_NAMES = {
    'opt': _OPT, 'gpt2': _GPT2, 'llama': _LLAMA, 'mistral': _LLAMA,
    'qwen2': _LLAMA, 'qwen3': _LLAMA, 'gemma2': _GEMMA, 'gemma3_text': _GEMMA,
    'mixtral': _MIXTRAL, 'qwen3_moe': _QWEN3_MOE}
_GAIN_LESS_ONE = ('gemma2', 'gemma3_text')  # norms are stored as gain - 1
# Stored by some versions, and not parameters.
_NOT_PARAMETERS = re.compile(
    r'rotary_emb\.inv_freq$|^h\.\d+\.attn\.(masked_)?bias$')


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
  with naming(path / _INDEX):
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
    with naming(file):
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
  hf_config.MODEL_TYPES. The tree is that of dsjax.checkpoints.weights; rotary
  rows are half-split, as stored; Gemma's norm gains become 1 + w.

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
  config, kind = read_config(path)
  folder = _Folder(path)
  fused = any('experts.gate_up_proj' in name for name in folder.names())
  names = _NAMES[kind] | (_FUSED if fused else {})
  _check_tensors(config, names, folder)

  def make(leaf, layer):
    take, shape = _take(names, leaf, layer), weights.stored_shape(config, leaf)
    out = np.empty(shape, weights.DTYPES[dtype])
    if '{e}' in take.name:
      for expert, matrix in enumerate(out):
        matrix[...] = folder.read(take.name.format(e=expert))
    elif kind in _GAIN_LESS_ONE and 'norm' in leaf:
      out[...] = 1 + folder.read(take.name).astype(np.float32)
    else:
      out[...] = take.cut(folder.read(take.name))
    return out.reshape(config.leaf_shape(leaf))

  return config, weights.tree(config, make)
