"""Models as orbax checkpoints: read straight onto a mesh, shard by shard.

A folder of two things: `params`, an orbax checkpoint of the tree, and
`dsjax.json`, the ModelConfig, written last. Shards are read by tensorstore,
which orbax writes with: orbax itself would read the same slice of every array
for equal places only, and a plan's heads may be replicated or have gaps.
Both are imported only when a checkpoint is written or read: half a second.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dsjax.checkpoints import weights
from dsjax.checkpoints.files import read_json
from dsjax.config.checks import InputError
from dsjax.config.model import ModelConfig
from dsjax.model import sharding

CONFIG = 'dsjax.json'
_PARAMS = 'params'
CHUNK_BYTES = 16 * 2**20  # the least that is read of an array


def save_orbax(path: str | os.PathLike[str], config: ModelConfig,
               params: Mapping[str, Any],
               chunk_bytes: int = CHUNK_BYTES) -> None:
  """Writes a model to a new folder.

  Arrays larger than chunk_bytes are cut into chunks, so that a shard is read
  without the rest of its array.

  Args:
    path: a folder that does not exist, or is empty.
    config: the ModelConfig.
    params: its tree, of numpy or jax arrays, sharded or not.
    chunk_bytes: the largest chunk.
  Raises:
    InputError: the folder holds something.
  """
  import orbax.checkpoint as ocp

  path = pathlib.Path(path).resolve()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise InputError(f'{path}: must not exist, or be an empty folder')
  args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes),
                      params)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
    writer.save(path / _PARAMS, args=ocp.args.PyTreeSave(params, args))
  (path / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2))


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
  """The ModelConfig of a folder. Raises InputError naming the file."""
  file = pathlib.Path(path) / CONFIG
  fields = read_json(file)
  try:
    return ModelConfig(**fields)
  except (TypeError, InputError) as error:  # a field too many, or too few
    raise InputError(f'{file}: {error}') from error


@dataclasses.dataclass(frozen=True)
class Stored:
  """The parameters of a folder that save_orbax wrote, not read yet."""

  path: pathlib.Path
  dtype: str

  def place(self, layout: sharding.Layout, span: sharding.Span,
            mesh: Mesh) -> dict[str, Any]:
    """The parameters of a stage on its mesh, as sharding.place_params.

    Every shard is read into an array of its own shape and cast there: no
    array is whole on the host, beyond what is replicated.

    Raises:
      InputError: names the folder: unreadable.
    """
    import tensorstore as ts

    context, dtype = ts.Context(), weights.DTYPES[self.dtype]

    def put(leaf: str, layer: int | None) -> jax.Array:
      name = leaf if layer is None else f'layers.{layer}.{leaf}'
      stored = ts.open(
          {'driver': 'zarr', 'kvstore': {
              'driver': 'ocdbt', 'base': f'file://{self.path}/',
              'path': name}}, open=True, read=True, context=context).result()
      shape = layout.shape(leaf)

      def read(index: Any) -> np.ndarray:
        source = layout.source(leaf, index)
        out = np.zeros([len(range(n)[part]) for n, part in zip(
            shape, index, strict=True)], dtype)
        filled = tuple(slice(part.stop - part.start) for part in source)
        ts.array(out)[filled].write(
            ts.cast(stored, dtype)[source][ts.d[:].translate_to[0]]).result()
        return out

      return jax.make_array_from_callback(
          shape, NamedSharding(mesh, sharding.spec(leaf)), read)

    with _naming(self.path):
      return sharding.stage_tree(layout.model, span, put)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Generator[None, None, None]:
  """Errors of what is read there become InputError."""
  try:
    yield
  except InputError as error:
    raise InputError(f'{path}: {error}') from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path}: unreadable: {error}') from error


def load_orbax(path: str | os.PathLike[str],
               dtype: str = 'float32') -> tuple[ModelConfig, Stored]:
  """A model that save_orbax wrote: its names and shapes are checked.

  Returns:
    (ModelConfig, Stored): its parameters as they will be read.
  Raises:
    InputError: names the folder: no such, of another tree or other shapes,
      or unreadable.
  """
  import orbax.checkpoint as ocp

  weights.check_dtype(dtype)
  path = pathlib.Path(path).resolve()
  config = read_config(path)
  tree = weights.tree(config, lambda leaf, _: jax.ShapeDtypeStruct(
      config.leaf_shape(leaf), weights.DTYPES[dtype]))
  path /= _PARAMS
  with _naming(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    _check(reader.metadata(path).item_metadata, tree)
  return config, Stored(path, dtype)


def _check(stored: Any, tree: Any) -> None:
  """Raises InputError unless the stored tree has these names and shapes."""
  if stored is None:
    raise InputError('not an orbax checkpoint')

  def shapes(nodes: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(place): tuple(leaf.shape)
            for place, leaf in jax.tree_util.tree_leaves_with_path(
                nodes, is_leaf=lambda node: hasattr(node, 'shape'))}

  given, want = shapes(stored.tree), shapes(tree)
  for name in sorted(given.keys() ^ want.keys()):
    raise InputError(f'{name} is ' + ('missing' if name in want else
                                      'not a parameter'))
  for name, shape in want.items():
    if given[name] != shape:
      raise InputError(f'shape of {name}={given[name]}: must be {shape}')
