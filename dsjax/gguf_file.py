"""GGUF files: a model of the llama architecture as numpy arrays.

GGUF is ggml's single-file format: key-value metadata, a table of tensors, an
aligned data section (github.com/ggml-org/ggml, docs/gguf.md). The header is
parsed here with every read checked against the file's size; the `gguf`
package supplies the types and the dequantisation.
"""

import math
import pathlib
import struct
from typing import NamedTuple

import gguf
import numpy as np

from dsjax import weights
from dsjax.base import InputError, ModelConfig, require

# --- the file format ---------------------------------------------------------


class Tensor(NamedTuple):
  """A stored tensor: ggml type, logical shape (rows first), raw bytes."""
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  data: np.ndarray


_NUMBERS = {gguf.GGUFValueType[name]: code for name, code in zip(
    'UINT8 INT8 UINT16 INT16 UINT32 INT32 UINT64 INT64 FLOAT32 FLOAT64 BOOL'
    .split(), 'BbHhIiQqfd?', strict=True)}
_VERSIONS = (2, 3)
_MAX_DIMS = 4


class _Header:
  """A cursor over the header; every read is checked against the file's end."""

  def __init__(self, path, data):
    self.path = path
    self.data = memoryview(data)
    self.at = 0

  def fail(self, what):
    raise InputError(f'{self.path}: {what}')

  def take(self, count):
    """The next `count` bytes."""
    if count > len(self.data) - self.at:
      self.fail(f'truncated: its header needs {count} bytes at offset '
                f'{self.at}, the file has {len(self.data)}')
    self.at += count
    return self.data[self.at - count:self.at]

  def numbers(self, code, count):
    size = struct.calcsize(f'<{code}') * count
    return list(struct.unpack(f'<{count}{code}', self.take(size)))

  def number(self, code):
    return self.numbers(code, 1)[0]

  def text(self):
    try:
      return str(self.take(self.number('Q')), 'utf-8')
    except UnicodeDecodeError:
      self.fail(f'corrupt: text before offset {self.at} is not UTF-8')

  def value(self, raw_kind, nested=False):
    """A metadata value of a GGUFValueType; arrays become lists."""
    if raw_kind == gguf.GGUFValueType.STRING:
      return self.text()
    if raw_kind in _NUMBERS:
      return self.number(_NUMBERS[raw_kind])
    if raw_kind != gguf.GGUFValueType.ARRAY or nested:
      self.fail(f'corrupt: metadata type {raw_kind} at offset {self.at}')
    raw_kind, count = self.number('I'), self.number('Q')
    if raw_kind in _NUMBERS:
      return self.numbers(_NUMBERS[raw_kind], count)
    return [self.value(raw_kind, nested=True) for _ in range(count)]

  def metadata(self, count):
    meta = {}
    for _ in range(count):
      key = self.text()
      if key in meta:
        self.fail(f'corrupt: metadata key {key!r} twice')
      meta[key] = self.value(self.number('I'))
    return meta

  def table(self, count):
    """{tensor name: (type, shape, offset in the data section)}."""
    rows = {}
    for _ in range(count):
      name, num_dims = self.text(), self.number('I')
      if name in rows or not 1 <= num_dims <= _MAX_DIMS:
        self.fail(f'corrupt: tensor {name!r} twice or of {num_dims} dims')
      shape = tuple(reversed(self.numbers('Q', num_dims)))
      raw_kind, offset = self.number('I'), self.number('Q')
      try:
        kind = gguf.GGMLQuantizationType(raw_kind)
      except ValueError:
        self.fail(f'tensor {name!r} has unknown type {raw_kind}')
      rows[name] = kind, shape, offset
    return rows

  def tensor(self, name, start, kind, shape, offset):
    """The table's row as a Tensor over the file's bytes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
      self.fail(f'tensor {name!r} has rows of {shape[-1]}, not a multiple of '
                f"{kind.name}'s {block}")
    byte_shape = (*shape[:-1], shape[-1] // block * block_bytes)
    start, size = start + offset, math.prod(byte_shape)
    if start + size > len(self.data):
      self.fail(f'truncated: tensor {name!r} ends at byte {start + size}, the '
                f'file has {len(self.data)}')
    data = np.frombuffer(self.data[start:start + size], np.uint8)
    return Tensor(kind, shape, data.reshape(byte_shape))


def read_gguf(path):
  """Metadata and tensors of a GGUF file; the tensors' bytes stay on disk.

  Cost: the header is read (0.1 s for a vocabulary of 50,000), the data is
  mapped into memory and only read when used.

  Returns:
    ({key: number, bool, str or list of them}, {name: Tensor}).
  Raises:
    InputError: missing, not a GGUF, of an unknown version, or truncated.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'{path}: no such file')
  try:
    with open(path, 'rb') as file:
      magic = file.read(4)
    if magic != b'GGUF':
      raise InputError(f'{path}: not a GGUF file (starts with {magic!r})')
    head = _Header(path, np.memmap(path, np.uint8, 'r'))
  except OSError as error:
    raise InputError(f'{path}: {error.strerror}') from error
  head.take(len(magic))
  version = head.number('I')
  if version not in _VERSIONS:
    head.fail(f'GGUF version {version}: must be one of {_VERSIONS} '
              '(little-endian)')
  num_tensors, num_keys = head.numbers('Q', 2)
  meta = head.metadata(num_keys)
  rows = head.table(num_tensors)
  align = meta.get('general.alignment', gguf.GGUF_DEFAULT_ALIGNMENT)
  if not isinstance(align, int) or align < 1:
    head.fail(f'corrupt: general.alignment={align!r}')
  start = -(-head.at // align) * align
  return meta, {name: head.tensor(name, start, *row)
                for name, row in rows.items()}


# --- the llama architecture --------------------------------------------------

ARCHITECTURES = ('llama',)
# Our leaf -> tensor of the file (+ '.weight'); the suffix is the shape.
_TOP = {'embed_VD': 'token_embd', 'norm_D': 'output_norm',
        'head_VD': 'output'}
_LAYER = {
    'attn_norm_D': 'attn_norm', 'q_NHD': 'attn_q', 'k_KHD': 'attn_k',
    'v_KHD': 'attn_v', 'o_DNH': 'attn_output', 'mlp_norm_D': 'ffn_norm',
    'gate_FD': 'ffn_gate', 'up_FD': 'ffn_up', 'down_DF': 'ffn_down',
}
# Hyperparameters that are read, and values of others that change nothing.
# Any other one would be ignored in silence, so it is refused.
_READ = ('block_count', 'context_length', 'embedding_length',
         'feed_forward_length', 'attention.head_count',
         'attention.head_count_kv', 'attention.key_length',
         'attention.value_length', 'attention.layer_norm_rms_epsilon',
         'rope.dimension_count', 'rope.freq_base', 'vocab_size')
_NEUTRAL = {'rope.scaling.type': 'none', 'rope.scaling.factor': 1.0,
            'rope.scale_linear': 1.0, 'expert_count': 0,
            'expert_used_count': 0, 'attention.causal': True}
_HINTS = (('.bias', 'biases'), ('rope_freqs', 'RoPE scaling'),
          ('exp', 'mixture of experts'), ('gate_inp', 'mixture of experts'))


def _number(meta, key, kind=int, default=None):
  value = meta.get(key, default)
  if value is None:
    raise InputError(f'metadata key {key!r} is missing')
  require(isinstance(value, kind) and not isinstance(value, bool), key, value,
          f'one {kind.__name__} (a value per layer is not supported)')
  return value


def _token(meta, name, vocab_size):
  """A special token's id, or None when the file names none."""
  key = f'tokenizer.ggml.{name}_token_id'
  value = meta.get(key)
  require(value is None or value in range(vocab_size), key, value,
          f'an integer below V={vocab_size}')
  return value


def _config(meta, tied, name):
  """The ModelConfig that the metadata describes."""
  arch = meta.get('general.architecture')
  require(arch in ARCHITECTURES, 'general.architecture', arch,
          f'one of {ARCHITECTURES}')
  prefix = f'{arch}.'
  for key in meta:
    short = key.removeprefix(prefix)
    if key.startswith(prefix) and short not in _READ and (
        short not in _NEUTRAL or meta[key] != _NEUTRAL[short]):
      raise InputError(f'{key}={meta[key]!r} is not supported')
  d_model = _number(meta, f'{prefix}embedding_length')
  num_heads = _number(meta, f'{prefix}attention.head_count')
  rope_dim = meta.get(f'{prefix}rope.dimension_count')
  head_dim = _number(meta, f'{prefix}attention.key_length',
                     default=rope_dim or d_model // max(num_heads, 1))
  for key in ('attention.value_length', 'rope.dimension_count'):
    value = _number(meta, prefix + key, default=head_dim)
    require(value == head_dim, prefix + key, value, f'the head width '
            f'{head_dim} (others are not supported)')
  tokens = meta.get('tokenizer.ggml.tokens', ())
  vocab_size = _number(meta, f'{prefix}vocab_size',
                       default=len(tokens) or None)
  require(len(tokens) <= vocab_size, f'{prefix}vocab_size', vocab_size,
          f'at least the {len(tokens)} tokens of the tokenizer')
  ends = [_token(meta, end, vocab_size) for end in ('eos', 'eot', 'eom')]
  return ModelConfig(
      name=meta.get('general.name') or name,
      num_layers=_number(meta, f'{prefix}block_count'),
      d_model=d_model,
      num_heads=num_heads,
      num_kv_heads=_number(meta, f'{prefix}attention.head_count_kv',
                           default=num_heads),
      head_dim=head_dim,
      d_ff=_number(meta, f'{prefix}feed_forward_length'),
      vocab_size=vocab_size,
      max_len=_number(meta, f'{prefix}context_length'),
      rope_base=_number(meta, f'{prefix}rope.freq_base', float, 1e4),
      norm_eps=_number(meta, f'{prefix}attention.layer_norm_rms_epsilon',
                       float),
      tied=tied,
      bos_id=_token(meta, 'bos', vocab_size),
      eos_ids=tuple(sorted({end for end in ends if end is not None})))


def _half_split(matrix, num_heads, head_dim):
  """Rows of q or k from interleaved to half-split rotary order.

  GGUF stores the pair that rotates together in neighbouring rows (2i, 2i + 1)
  of a head; half-split rotary pairs rows (i, i + H/2).
  """
  pairs = matrix.reshape(num_heads, head_dim // 2, 2, -1)
  return pairs.swapaxes(1, 2)


def _name(leaf, layer):
  return (f'{_TOP[leaf]}.weight' if layer is None else
          f'blk.{layer}.{_LAYER[leaf]}.weight')


def _check_tensors(config, tensors):
  """Raises InputError unless the file holds exactly the expected tensors."""
  require(config.num_layers <= len(tensors), 'block_count', config.num_layers,
          f'below the {len(tensors)} tensors of the file')
  expected = {}
  weights.tree(config, lambda leaf, layer: expected.update(
      {_name(leaf, layer): leaf}))
  for name in sorted(tensors.keys() - expected.keys()):
    hint = next((why for part, why in _HINTS if part in name), 'unexpected')
    raise InputError(f'tensor {name!r} is not supported ({hint})')
  for name, leaf in expected.items():
    if name not in tensors:
      raise InputError(f'tensor {name!r} is missing')
    shape, want = tensors[name].shape, weights.stored_shape(config, leaf)
    require(shape == want, f'shape of tensor {name!r}', shape, want)


def load_gguf(path, dtype='float32'):
  """A llama-architecture model from a GGUF file, dequantised.

  The tree, weights output-first, all of `dtype` and C-contiguous:

    {'embed_VD', 'norm_D', 'head_VD' (absent when tied), 'layers': L dicts of
     'attn_norm_D', 'q_NHD', 'k_KHD', 'v_KHD', 'o_DNH', 'mlp_norm_D',
     'gate_FD', 'up_FD', 'down_DF'}

  Rows of q and k are returned in half-split rotary order (see _half_split).
  Cost: about 1.5 s for 135M parameters; 4 or 2 bytes a parameter.

  Returns:
    (ModelConfig, params as numpy arrays).
  Raises:
    InputError: names the file, and the key or tensor: unreadable, not of the
      llama architecture, or using what this model does not compute (RoPE
      scaling, biases, experts, an unknown hyperparameter or tensor).
  """
  weights.check_dtype(dtype)
  path = pathlib.Path(path)
  meta, tensors = read_gguf(path)

  def make(leaf, layer):
    name = _name(leaf, layer)
    kind, _, data = tensors[name]
    try:
      matrix = gguf.quants.dequantize(data, kind)
    except NotImplementedError:
      raise InputError(
          f'tensor {name!r} is of unsupported type {kind.name}') from None
    shape = config.leaf_shape(leaf)
    if leaf in ('q_NHD', 'k_KHD'):
      matrix = _half_split(matrix, *shape[:2])
    return np.array(matrix, weights.DTYPES[dtype],
                    order='C').reshape(shape)

  try:
    config = _config(meta, 'output.weight' not in tensors, path.stem)
    _check_tensors(config, tensors)
    return config, weights.tree(config, make)
  except InputError as error:
    raise InputError(f'{path}: {error}') from error
