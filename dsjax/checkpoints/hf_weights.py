"""Models from Hugging Face folders: config.json and safetensors.

hf_config reads the configuration; here its tensors become our leaves, and one
that has no place is refused. Pickled weights (.bin, .pt) can run any code and
are never opened.
"""

import os
import pathlib
import re
from collections.abc import Set
from typing import Any

import numpy as np

from dsjax.checkpoints import weights
from dsjax.checkpoints.families import FAMILIES
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.files import is_there, read_json
from dsjax.checkpoints.hf_config import read_config
from dsjax.checkpoints.hf_names import Names, Take
from dsjax.config.checks import InputError, check_fetched, naming, require
from dsjax.config.model import ModelConfig

_WEIGHTS = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


def _open(file: pathlib.Path) -> Any:
  """An open safetensors file; its header is checked by the package."""
  import safetensors

  try:
    with open(file, 'rb') as stream:
      start = stream.read(8)
    check_fetched(file, start)
    # A header's length comes first, below 2^32: its last four bytes are zero.
    if start[:4] == b'PK\x03\x04' or start[:1] == b'\x80' and any(start[4:]):
      raise InputError(f'{file}: a pickle, which is never opened: must be '
                       'safetensors')
    return safetensors.safe_open(file, framework='np')
  except OSError as error:
    raise InputError(f'{file}: {error.strerror or error}') from error
  except safetensors.SafetensorError as error:
    raise InputError(f'{file}: truncated or corrupt: {error}') from error


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """{tensor name: file} of a folder."""
  if is_there(path / _WEIGHTS):
    file = path / _WEIGHTS
    with _open(file) as tensors:
      return dict.fromkeys(tensors.keys(), file)
  if not is_there(path / _INDEX):
    pickles = [f'; {file.name} is a pickle, which is never opened: convert it '
               'to safetensors' for file in sorted(path.iterdir())
               if file.suffix in _PICKLES]
    raise InputError(f'{path}: no {_WEIGHTS} or {_INDEX}{"".join(pickles[:1])}')
  table: Any = read_json(path / _INDEX).get('weight_map')
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

  def __init__(self, path: pathlib.Path) -> None:
    self._files: dict[str, tuple[str, pathlib.Path]] = {}
    for name, file in _files(path).items():
      short = name.removeprefix('model.').removeprefix('transformer.')
      require(short not in self._files, 'tensor', name, 'there only once')
      self._files[short] = name, file
    self._open: dict[pathlib.Path, Any] = {}
    self.path = path

  def names(self) -> Set[str]:
    return self._files.keys()

  def _tensor(self, name: str) -> tuple[pathlib.Path, str, Any]:
    """(file, name in it, the open file)."""
    if name not in self._files:
      raise InputError(f'{self.path}: tensor {name!r} is missing')
    full_name, file = self._files[name]
    if file not in self._open:
      self._open[file] = _open(file)
    return file, full_name, self._open[file]

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises InputError unless these are floats of this shape."""
    file, full_name, tensors = self._tensor(name)
    stored = tensors.get_slice(full_name)
    with naming(file):
      require(stored.get_dtype() in _FLOATS, f'type of tensor {full_name!r}',
              stored.get_dtype(), f'one of {_FLOATS}')
      require(tuple(stored.get_shape()) == shape,
              f'shape of tensor {full_name!r}', tuple(stored.get_shape()),
              shape)

  def read(self, name: str) -> np.ndarray:
    """A copy of a tensor, of its own dtype."""
    _, full_name, tensors = self._tensor(name)
    return tensors.get_tensor(full_name)


def _take(names: Names, leaf: str, layer: int | None) -> Take:
  """How a leaf is stored: a Take whose name may still want an expert."""
  require(leaf in names, 'leaf', leaf, "one that the family's tensors name")
  take = names[leaf]
  if isinstance(take, str):
    take = Take(take, lambda s, _: s, lambda x, _: x)
  return take._replace(name=take.name.replace('{l}', str(layer)))


def _check_tensors(config: ModelConfig, names: Names, not_parameters: str,
                   folder: _Folder) -> None:
  """Raises InputError unless the folder holds exactly the model's tensors."""
  head = _take(names, 'head_VD', None).name
  used = {head} if config.tied else set()

  def check(leaf: str, layer: int | None) -> None:
    take, shape = _take(names, leaf, layer), weights.stored_shape(config, leaf)
    for expert in range(config.num_experts if '{e}' in take.name else 1):
      name = take.name.format(e=expert)
      folder.check(name, shape[1:] if '{e}' in take.name
                   else take.shape(shape, config))
      used.add(name)

  weights.tree(config, check)
  if config.tied and head in folder.names():
    embed = _take(names, 'embed_VD', None).name
    if not np.array_equal(folder.read(head), folder.read(embed)):
      raise InputError(
          f'{folder.path}: tensor {head!r} differs from {embed!r}, and '
          'tie_word_embeddings=true drops it: must be false, or the tensor '
          'absent')
  for name in sorted(folder.names() - used):
    if not re.search(not_parameters, name):
      raise InputError(f'{folder.path}: tensor {name!r} is not supported')


def load_hf(
    path: str | os.PathLike[str], dtype: str = 'float32',
    family: Family | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
  """A model from a Hugging Face folder: config.json and *.safetensors.

  One model.safetensors, or files with model.safetensors.index.json. The tree
  is that of dsjax.checkpoints.weights; rotary rows are half-split, as stored;
  Gemma's norm gains become 1 + w.

  Args:
    family: the folder is of this one; None: of one in families/.

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
  config, family = read_config(path, (family,) if family else FAMILIES)
  folder = _Folder(path)
  names = {'head_VD': 'lm_head.weight', **family.tensors}
  names |= {leaf: other for leaf, other in family.others.items()
            if _take(family.others, leaf, 0).name in folder.names()}
  _check_tensors(config, names, family.not_parameters, folder)

  def make(leaf: str, layer: int | None) -> np.ndarray:
    take, shape = _take(names, leaf, layer), weights.stored_shape(config, leaf)
    out = np.empty(shape, weights.DTYPES[dtype])
    if '{e}' in take.name:
      for expert, matrix in enumerate(out):
        matrix[...] = folder.read(take.name.format(e=expert))
    elif family.gain_less_one and 'norm' in leaf:
      out[...] = 1 + folder.read(take.name).astype(np.float32)
    else:
      array = take.cut(folder.read(take.name), config)
      out[...] = array.reshape(shape)
    return weights.rotary_order(config, leaf, out.reshape(
        config.leaf_shape(leaf)))

  return config, weights.tree(config, make)
