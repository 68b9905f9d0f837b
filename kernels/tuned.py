"""Configs that were fastest on a device, by what they were timed on.

tuned.json beside this file is written by `python -m kernels.bench --tune` on a
real device and by nothing else: {device kind: {op: {shape class: {field of
the op's TuningConfig: number}}}}. Where it has no entry, or does not exist,
the op's heuristic decides.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from dsjax.kernels import tiles

PATH = pathlib.Path(__file__).with_name('tuned.json')
OPS = ('decode_attention', 'prefill_attention', 'kv_write', 'page_copy',
       'mosaic_decode', 'mosaic_prefill')


def find(op: str, shape: str, config_class: type[Any],
         check: Callable[[Any], None]) -> Any:
  """The config tuned for this device and shape class, or None.

  Args:
    op: one of OPS. shape: the class, in words.
    config_class: the op's TuningConfig.
    check: raises ValueError if a config does not suit this call.

  Raises:
    ValueError: the file is malformed, or its config does not suit.
  """
  kind = tiles.device_kind()
  fields = load(PATH).get(kind, {}).get(op, {}).get(shape)
  if fields is None:
    return None
  where = f'{kind}: {op}: {shape}'
  names = {f.name for f in dataclasses.fields(config_class)}
  _need(fields.keys() == names, where, fields, f'of the fields {sorted(names)}')
  config = config_class(**fields)
  try:
    check(config)
  except ValueError as error:
    raise ValueError(f'{PATH.name}: {where}: {error}') from error
  return config


def save(op: str, shape: str, config: Any) -> None:
  """Puts a config into the file, as this device's."""
  held = dict(load(PATH))
  ops = held[tiles.device_kind()] = dict(held.get(tiles.device_kind(), {}))
  ops[op] = ops.get(op, {}) | {shape: dataclasses.asdict(config)}
  written = PATH.with_suffix('.new')
  written.write_text(json.dumps(held, indent=1, sort_keys=True) + '\n')
  written.replace(PATH)
  load.cache_clear()


@functools.cache
def load(path: pathlib.Path) -> dict[str, Any]:
  """What the file holds; nothing where it does not exist.

  Raises:
    ValueError: it is malformed.
  """
  if not path.exists():
    return {}
  try:
    held = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path.name}: not JSON: {error}') from error
  return checked(held)


def checked(held: Any) -> dict[str, Any]:
  """held, if it is what the file may hold.

  Raises:
    ValueError: it is malformed.
  """
  _table(held, 'the file')
  for kind, ops in held.items():
    for op, shapes in _table(ops, kind).items():
      _need(op in OPS, kind, op, f'one of {OPS}')
      for shape, fields in _table(shapes, f'{kind}: {op}').items():
        where = f'{kind}: {op}: {shape}'
        for field, value in _table(fields, where).items():
          _need(type(value) is int and value > 0, f'{where}: {field}', value,
                'an integer of 1 or more')
  return held


def _table(value, where):
  _need(isinstance(value, dict), where, value, 'a JSON object')
  return value


def _need(ok, where, value, rule):
  if not ok:
    raise ValueError(f'{PATH.name}: {where}: {value!r}: must be {rule}')
