"""The GGUF file format: metadata and tensors.

GGUF is ggml's single-file format: key-value metadata, a table of tensors, an
aligned data section (github.com/ggml-org/ggml, docs/gguf.md). The header is
parsed here with every read checked against the file's size; the `gguf`
package supplies the types and the dequantisation.
"""

import math
import os
import pathlib
import struct
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from dsjax.config.checks import InputError, check_fetched, require

if TYPE_CHECKING:
  import gguf


class Tensor(NamedTuple):
  """A stored tensor: ggml type, logical shape (rows first), raw bytes."""
  kind: 'gguf.GGMLQuantizationType'
  shape: tuple[int, ...]
  data: np.ndarray


# Types of metadata: numbers by their struct code, and the others.
_NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?',
            10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32  # of tensors, where general.alignment does not say
_VERSIONS = (2, 3)
_MAX_DIMS = 4


def package() -> types.ModuleType:
  """The `gguf` package, imported only when a file is read.

  Raises:
    InputError: it is not installed.
  """
  try:
    import gguf
  except ImportError as error:
    raise InputError('reading a .gguf file needs the package gguf: '
                     'pip install gguf') from error
  return gguf


class _Header:
  """A cursor over the header; every read is checked against the file's end."""

  def __init__(self, path: pathlib.Path, data: np.ndarray) -> None:
    self.path = path
    self.data = data.data
    self.at = 0
    self.gguf = package()

  def fail(self, what: str) -> NoReturn:
    """Raises InputError naming the file."""
    raise InputError(f'{self.path}: {what}')

  def take(self, count: int) -> memoryview:
    """The next `count` bytes."""
    if count > len(self.data) - self.at:
      self.fail(f'truncated: its header needs {count} bytes at offset '
                f'{self.at}, the file has {len(self.data)}')
    self.at += count
    return self.data[self.at - count:self.at]

  def numbers(self, code: str, count: int) -> list[Any]:
    """The next numbers of a struct code."""
    size = struct.calcsize(f'<{code}') * count
    return list(struct.unpack(f'<{count}{code}', self.take(size)))

  def number(self, code: str) -> Any:
    """The next number."""
    return self.numbers(code, 1)[0]

  def text(self) -> str:
    """The next string."""
    try:
      return str(self.take(self.number('Q')), 'utf-8')
    except UnicodeDecodeError:
      self.fail(f'corrupt: text before offset {self.at} is not UTF-8')

  def value(self, raw_kind: int, nested: bool = False) -> Any:
    """A metadata value of a type; arrays become lists."""
    if raw_kind == _STRING:
      return self.text()
    if raw_kind in _NUMBERS:
      return self.number(_NUMBERS[raw_kind])
    if raw_kind != _ARRAY or nested:
      self.fail(f'corrupt: metadata type {raw_kind} at offset {self.at}')
    raw_kind, count = self.number('I'), self.number('Q')
    if raw_kind in _NUMBERS:
      return self.numbers(_NUMBERS[raw_kind], count)
    return [self.value(raw_kind, nested=True) for _ in range(count)]

  def metadata(self, count: int) -> dict[str, Any]:
    """{key: value} of so many pairs."""
    meta = {}
    for _ in range(count):
      key = self.text()
      if key in meta:
        self.fail(f'corrupt: metadata key {key!r} twice')
      meta[key] = self.value(self.number('I'))
    return meta

  def table(self, count: int) -> dict[str, tuple[Any, tuple[int, ...], int]]:
    """{tensor name: (type, shape, offset in the data section)}."""
    rows = {}
    for _ in range(count):
      name, num_dims = self.text(), self.number('I')
      if name in rows or not 1 <= num_dims <= _MAX_DIMS:
        self.fail(f'corrupt: tensor {name!r} twice or of {num_dims} dims')
      shape = tuple(reversed(self.numbers('Q', num_dims)))
      raw_kind, offset = self.number('I'), self.number('Q')
      try:
        kind = self.gguf.GGMLQuantizationType(raw_kind)
      except ValueError:
        self.fail(f'tensor {name!r} has unknown type {raw_kind}')
      rows[name] = kind, shape, offset
    return rows

  def tensor(self, name: str, start: int, kind: Any, shape: tuple[int, ...],
             offset: int) -> Tensor:
    """The table's row as a Tensor over the file's bytes."""
    block, block_bytes = self.gguf.GGML_QUANT_SIZES[kind]
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


def read_gguf(
    path: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Metadata and tensors of a GGUF file; the tensors' bytes stay on disk.

  Cost: the header is read (0.1 s for a vocabulary of 50,000), the data is
  mapped into memory and only read when used.

  Returns:
    ({key: number, bool, str or list of them}, {name: Tensor}).
  Raises:
    InputError: missing, not a GGUF, of an unknown version, or truncated; the
      package gguf is not installed.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f'{path}: no such file')
  try:
    with open(path, 'rb') as file:
      magic = file.read(4)
    check_fetched(path, magic)
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
  align = meta.get('general.alignment', _ALIGNMENT)
  if not isinstance(align, int) or align < 1:
    head.fail(f'corrupt: general.alignment={align!r}')
  start = -(-head.at // align) * align
  return meta, {name: head.tensor(name, start, *row)
                for name, row in rows.items()}


def token_id(meta: Mapping[str, Any], name: str, count: int) -> int | None:
  """A special token's id, such as that of 'bos'; None: the file names none.

  Raises:
    InputError: it is not below `count`, the size of the vocabulary.
  """
  key = f'tokenizer.ggml.{name}_token_id'
  value = meta.get(key)
  require(value is None or value in range(count), key, value,
          f'an integer below V={count}')
  return value
