"""Models as orbax checkpoints: read straight onto a mesh, shard by shard.

A folder of two things: `params`, an orbax checkpoint of the tree, and
`dsjax.json`, the ModelConfig, written last.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsjax import weights
from dsjax.base import InputError, ModelConfig, RopeScaling
from dsjax.hf_config import read_json

CONFIG = 'dsjax.json'
_PARAMS = 'params'
CHUNK_BYTES = 16 * 2**20  # the least that is read of an array


def save_orbax(path, config, params, chunk_bytes=CHUNK_BYTES):
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
  path = pathlib.Path(path).resolve()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise InputError(f'{path}: must not exist, or be an empty folder')
  args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes),
                      params)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
    writer.save(path / _PARAMS, args=ocp.args.PyTreeSave(params, args))
  (path / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=2))


def read_config(path):
  """The ModelConfig of a folder. Raises InputError naming the file."""
  file = pathlib.Path(path) / CONFIG
  fields = read_json(file)
  try:
    if fields.get('rope_scaling') is not None:
      fields['rope_scaling'] = RopeScaling(**fields['rope_scaling'])
    fields['eos_ids'] = tuple(fields.get('eos_ids', ()))
    return ModelConfig(**fields)
  except (TypeError, InputError) as error:  # a field too many, or too few
    raise InputError(f'{file}: {error}') from error


def _restore_args(shape, dtype, sharding):
  if sharding is None:
    return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
  sharding.shard_shape(shape)  # a ValueError of its own when it does not fit
  return ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype,
                              sharding=sharding, global_shape=shape)


def load_orbax(path, shardings=None, dtype='float32'):
  """A model that save_orbax wrote.

  With shardings, every device's shard is read into an array of its own shape
  and put on its devices: no array is whole on the host, beyond what is
  replicated. Casting is done on the way, shard by shard.

  Args:
    path: the folder.
    shardings: a function from the tree of jax.ShapeDtypeStruct to the tree of
      shardings, as `lambda tree: sharding.params(mesh, tree)`; None for numpy
      arrays.
    dtype: of the loaded arrays.
  Returns:
    (ModelConfig, params).
  Raises:
    InputError: names the folder: no such, of another tree or other shapes,
      or unreadable.
  """
  weights.check_dtype(dtype)
  path = pathlib.Path(path).resolve()
  config = read_config(path)
  dtype = weights.DTYPES[dtype]
  tree = weights.tree(config, lambda leaf, _: jax.ShapeDtypeStruct(
      config.leaf_shape(leaf), dtype))
  wanted = (jax.tree.map(lambda _: None, tree) if shardings is None else
            shardings(tree))
  leaves, structure = jax.tree.flatten(tree)
  args = structure.unflatten([
      _restore_args(leaf.shape, dtype, sharding) for leaf, sharding in
      zip(leaves, structure.flatten_up_to(wanted), strict=True)])
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      _check(reader.metadata(path / _PARAMS).item_metadata, tree)
      return config, reader.restore(
          path / _PARAMS, args=ocp.args.PyTreeRestore(tree, restore_args=args))
  except InputError as error:
    raise InputError(f'{path / _PARAMS}: {error}') from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path / _PARAMS}: unreadable: {error}') from error


def _check(stored, tree):
  """Raises InputError unless the stored tree has these names and shapes."""
  if stored is None:
    raise InputError('not an orbax checkpoint')

  def shapes(nodes):
    return {jax.tree_util.keystr(at): tuple(leaf.shape)
            for at, leaf in jax.tree_util.tree_leaves_with_path(
                nodes, is_leaf=lambda node: hasattr(node, 'shape'))}

  found, want = shapes(stored.tree), shapes(tree)
  for name in sorted(found.keys() ^ want.keys()):
    raise InputError(f'{name} is ' + ('missing' if name in want else
                                      'not a parameter'))
  for name, shape in want.items():
    if found[name] != shape:
      raise InputError(f'shape of {name}={found[name]}: must be {shape}')
