"""Models from GGUF files: each architecture's keys and tensors as ours.

Names are those of the `gguf` package, rules those of llama.cpp
(src/llama-model.cpp).
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.checkpoints import weights
from dsjax.checkpoints.families import FAMILIES
from dsjax.checkpoints.family import Family, Gguf, GgufKeys
from dsjax.checkpoints.gguf_file import Tensor, package, read_gguf, token_id
from dsjax.config import rope
from dsjax.config.checks import InputError, naming, require
from dsjax.config.model import ModelConfig

# Our leaf -> tensor of the file ('blk.{layer}.' before those of a layer); the
# suffix of the leaf is its shape.
_TENSORS = {
    'embed_VD': 'token_embd.weight', 'pos_TD': 'position_embd.weight',
    'norm_D': 'output_norm.weight', 'norm_bias_D': 'output_norm.bias',
    'head_VD': 'output.weight',
    'attn_norm_D': 'attn_norm.weight', 'attn_norm_bias_D': 'attn_norm.bias',
    'q_NHD': 'attn_q.weight', 'q_bias_NH': 'attn_q.bias',
    'k_KHD': 'attn_k.weight', 'k_bias_KH': 'attn_k.bias',
    'v_KHD': 'attn_v.weight', 'v_bias_KH': 'attn_v.bias',
    'o_DNH': 'attn_output.weight', 'o_bias_D': 'attn_output.bias',
    'q_norm_H': 'attn_q_norm.weight', 'k_norm_H': 'attn_k_norm.weight',
    'attn_post_norm_D': 'post_attention_norm.weight',
    'mlp_norm_D': 'ffn_norm.weight', 'mlp_norm_bias_D': 'ffn_norm.bias',
    'gate_FD': 'ffn_gate.weight', 'up_FD': 'ffn_up.weight',
    'up_bias_F': 'ffn_up.bias', 'down_DF': 'ffn_down.weight',
    'down_bias_D': 'ffn_down.bias', 'router_ED': 'ffn_gate_inp.weight',
    'gate_EFD': 'ffn_gate_exps.weight', 'up_EFD': 'ffn_up_exps.weight',
    'down_EDF': 'ffn_down_exps.weight',
    'mlp_post_norm_D': 'post_ffw_norm.weight',
}
# Hyperparameters that are read, and values of others that change nothing.
# Any other one would be ignored in silence, so it is refused.
_READ = ('block_count', 'context_length', 'embedding_length',
         'feed_forward_length', 'attention.head_count',
         'attention.head_count_kv', 'attention.key_length',
         'attention.value_length', 'rope.dimension_count', 'rope.freq_base',
         'rope.scaling.type', 'rope.scaling.factor',
         'rope.scaling.original_context_length', 'vocab_size')
_NEUTRAL = {'rope.scale_linear': 1.0, 'expert_count': 0,
            'expert_used_count': 0, 'attention.causal': True}
_HINTS = (('.bias', 'biases'), ('rope_freqs', 'RoPE scaling'),
          ('exp', 'mixture of experts'), ('gate_inp', 'mixture of experts'))
_ROPE_FREQS = 'rope_freqs.weight'


def _rope(get: GgufKeys, tensors: Mapping[str, Tensor], head_dim: int,
          max_len: int) -> dict[str, Any]:
  """The rotary fields of the keys, and of the tensor of divisors if any."""
  base = get('rope.freq_base', float, 1e4)
  require(base > 0, get.name('rope.freq_base'), base, 'above 0')
  kind = get('rope.scaling.type', str, 'none')
  fields: dict[str, Any] = dict(rope_base=base)
  if kind == 'linear':
    fields |= dict(rope_divisors=rope.linear(
        head_dim, get('rope.scaling.factor', float)))
  elif kind == 'yarn':
    factor = get('rope.scaling.factor', float)
    original = get('rope.scaling.original_context_length', default=max_len)
    fields |= dict(
        max_len=max(max_len, round(original * factor)),
        rope_divisors=rope.yarn(head_dim, base, factor, original),
        rope_gain=rope.yarn_gain(factor))
  else:
    for key, neutral in (('type', 'none'), ('factor', 1.0)):
      value = get.raw(f'rope.scaling.{key}')
      if value not in (None, neutral):
        raise InputError(f"{get.name(f'rope.scaling.{key}')}={value!r} is not "
                         'supported')
  if _ROPE_FREQS in tensors:
    require(kind == 'none', get.name('rope.scaling.type'), kind,
            f'absent where {_ROPE_FREQS!r} is')
    divisors = _dequantize(_ROPE_FREQS, tensors[_ROPE_FREQS])
    require(divisors.shape == (head_dim // 2,) and np.isfinite(divisors).all()
            and (divisors > 0).all(), f'tensor {_ROPE_FREQS!r}', divisors,
            f'{head_dim // 2} numbers above 0 (RoPE scaling)')
    fields |= dict(rope_divisors=tuple(divisors.tolist()))
  return fields


def _gguf(meta: Mapping[str, Any], families: Sequence[Family]) -> Gguf:
  """The family's that the file's architecture names."""
  named = str(meta.get('general.architecture'))
  known = {family.gguf.architecture: family.gguf for family in families
           if family.gguf}
  require(named in known, 'general.architecture',
          meta.get('general.architecture'), f'one of {tuple(known)}')
  return known[named]


def _config(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str,
            family: Gguf) -> ModelConfig:
  """The ModelConfig that metadata and the names of tensors describe."""
  prefix = f'{family.architecture}.'
  known = (*_READ, family.norm_eps, *family.keys)
  for key in meta:
    short = key.removeprefix(prefix)
    if key.startswith(prefix) and short not in known and (
        short not in _NEUTRAL or meta[key] != _NEUTRAL[short]):
      raise InputError(f'{key}={meta[key]!r} is not supported')
  get = GgufKeys(meta, family.architecture)
  d_model, num_heads = get('embedding_length'), get('attention.head_count')
  rope_dim = get.raw('rope.dimension_count')
  head_dim = get('attention.key_length',
                 default=rope_dim or d_model // max(num_heads, 1))
  for key in ('attention.value_length', 'rope.dimension_count'):
    value = get(key, default=head_dim)
    require(value == head_dim, prefix + key, value, f'the head width '
            f'{head_dim} (others are not supported)')
  tokens = meta.get('tokenizer.ggml.tokens', ())
  vocab_size = get('vocab_size', default=len(tokens) or None)
  require(len(tokens) <= vocab_size, f'{prefix}vocab_size', vocab_size,
          f'at least the {len(tokens)} tokens of the tokenizer')
  num_layers, max_len = get('block_count'), get('context_length')
  require(num_layers <= len(tensors), f'{prefix}block_count', num_layers,
          f'below the {len(tensors)} tensors of the file')
  ends = [token_id(meta, end, vocab_size) for end in ('eos', 'eot', 'eom')]
  base: dict[str, Any] = dict(
      name=meta.get('general.name') or name,
      num_layers=num_layers, d_model=d_model, num_heads=num_heads,
      num_kv_heads=get('attention.head_count_kv', default=num_heads),
      head_dim=head_dim, vocab_size=vocab_size,
      max_len=max_len, norm_eps=get(family.norm_eps, float),
      tied='output.weight' not in tensors,
      bos_id=token_id(meta, 'bos', vocab_size),
      eos_ids=tuple(sorted({end for end in ends if end is not None})))
  ModelConfig(**base, d_ff=1)  # is checked before more is made of it
  fields = base | family.fields(get, base)
  if fields.get('positions') != 'learned':
    fields |= _rope(get, tensors, head_dim, max_len)
  if 'd_ff' not in fields:
    fields['d_ff'] = get('feed_forward_length')
  return ModelConfig(**fields)


def _half_split(matrix: np.ndarray, num_heads: int,
                head_dim: int) -> np.ndarray:
  """Rows of q or k from interleaved to half-split rotary order.

  GGUF stores the pair that rotates together in neighbouring rows (2i, 2i + 1)
  of a head; half-split rotary pairs rows (i, i + H/2).
  """
  pairs = matrix.reshape(num_heads, head_dim // 2, 2, -1)
  return pairs.swapaxes(1, 2)


class Reader:
  """A file's tensors as leaves of a config. meta: what it says besides."""

  def __init__(self, path: pathlib.Path, config: ModelConfig, family: Gguf,
               meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    self.path, self.config = path, config
    self.meta, self.tensors = meta, tensors
    self.packed = family.packed
    self.interleaved = ('q_NHD', 'k_KHD') if family.interleaved else ()

  def name(self, leaf: str, layer: int | None) -> str:
    """The tensor that holds a leaf."""
    name = self.packed[leaf][0] if leaf in self.packed else _TENSORS[leaf]
    return name if layer is None else f'blk.{layer}.{name}'

  def check(self) -> None:
    """Raises InputError unless the file holds exactly these tensors."""
    expected: dict[str, tuple[int, ...]] = {}

    def expect(leaf: str, layer: int | None) -> None:
      rows, *others = weights.stored_shape(self.config, leaf)
      rows *= 3 if leaf in self.packed else 1
      expected[self.name(leaf, layer)] = (rows, *others)

    weights.tree(self.config, expect)
    if self.config.positions == 'rope' and _ROPE_FREQS in self.tensors:
      expected[_ROPE_FREQS] = (self.config.head_dim // 2,)
    for name in sorted(self.tensors.keys() - expected.keys()):
      hint = next((why for part, why in _HINTS if part in name), 'unexpected')
      raise InputError(f'tensor {name!r} is not supported ({hint})')
    for name, want in expected.items():
      if name not in self.tensors:
        raise InputError(f'tensor {name!r} is missing')
      shape = self.tensors[name].shape
      require(shape == want, f'shape of tensor {name!r}', shape, want)

  def params(self, dtype: str) -> dict[str, Any]:
    """All leaves as numpy arrays; see load_gguf."""
    weights.check_dtype(dtype)
    with naming(self.path):
      return weights.tree(self.config,
                          lambda leaf, layer: self.read(leaf, layer, dtype))

  def read(self, leaf: str, layer: int | None, dtype: str) -> np.ndarray:
    """A leaf, dequantised."""
    name, shape = self.name(leaf, layer), self.config.leaf_shape(leaf)
    matrix = _dequantize(name, self.tensors[name])
    if leaf in self.packed:
      matrix = np.split(matrix, 3)[self.packed[leaf][1]]
    if leaf in self.interleaved:
      matrix = _half_split(matrix, *shape[:2])
    return np.array(matrix, weights.DTYPES[dtype], order='C').reshape(shape)


def _dequantize(name: str, tensor: Tensor) -> np.ndarray:
  try:
    return package().quants.dequantize(tensor.data, tensor.kind)
  except NotImplementedError:
    raise InputError(f'tensor {name!r} is of unsupported type '
                     f'{tensor.kind.name}') from None


def load_gguf(
    path: str | os.PathLike[str], dtype: str = 'float32',
    family: Family | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """A model from a GGUF file, dequantised.

  The tree is that of dsjax.checkpoints.weights, all of `dtype` and
  C-contiguous. Rows of q and k are returned in half-split rotary order: a file
  of the llama architecture has them interleaved (see _half_split). Gemma's
  norm gains are stored as 1 + w.

  Args:
    family: the file is of this one; None: of one in families/.

  Cost: about 1.5 s for 135M parameters; 4 or 2 bytes a parameter.

  Returns:
    (ModelConfig, params as numpy arrays).
  Raises:
    InputError: names the file, and the key or tensor: unreadable, of another
      architecture, or using what this model does not compute (an unknown
      hyperparameter or tensor).
  """
  weights.check_dtype(dtype)
  reader = open_gguf(path, family)
  return reader.config, reader.params(dtype)


def open_gguf(path: str | os.PathLike[str],
              family: Family | None = None) -> Reader:
  """A Reader of a file whose keys and tensors are all known.

  Raises:
    InputError: as load_gguf.
  """
  meta, tensors = read_gguf(path)
  with naming(path):
    path = pathlib.Path(path)
    form = _gguf(meta, (family,) if family else FAMILIES)
    reader = Reader(path, _config(meta, tensors, path.stem, form), form, meta,
                    tensors)
    reader.check()
  return reader
