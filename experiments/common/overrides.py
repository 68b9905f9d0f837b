"""Configurations of the runners: frozen dataclasses in Python files.

A config file defines `config`; the command line changes single fields of it.
"""

import dataclasses
import difflib
import pathlib
import runpy
import types
import typing

from dsjax.config.checks import InputError, require
from dsjax.config.placement import Placement

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'


def names():
  """Names that load() knows."""
  return sorted(path.stem for path in CONFIGS.glob('*.py')
                if path.stem != 'serve')


def load(name):
  """The `config` of a file: a path that ends in .py, or a name in configs/.

  Raises:
    InputError: no such file (naming the nearest), or it defines none.
  """
  path = pathlib.Path(name)
  if path.suffix != '.py':
    path = CONFIGS / f'{name}.py'
    require(path.is_file(), '--config', str(name), _nearest(name, names())
            + f'one of {names()}, or the path of a .py file')
  if not path.is_file():
    raise InputError(f'--config={name}: no such file')
  found = runpy.run_path(str(path)).get('config')
  require(dataclasses.is_dataclass(found), '--config', str(name),
          'a file that defines `config`, a dataclass')
  return found


def override(config, settings):
  """A config with fields changed.

  Args:
    config: a dataclass, of dataclasses.
    settings: texts 'a.b=value', typed by the field: none, true and false are
      words; a tuple is its items with commas between; placements are as in
      Placement.parse, with '/' between.

  Raises:
    InputError: unknown field (naming the nearest), or a bad value.
  """
  for setting in settings:
    path, equals, text = setting.partition('=')
    require(equals, '--set', setting, 'field=value')
    known = _leaves(config)
    if path not in known:
      near = max(known, key=lambda p: _likeness(path, p))
      raise InputError(f'--set={setting}: no field {path!r}: did you mean '
                       f'{near!r}? Must be one of {", ".join(known)}')
    config = _changed(config, path.split('.'), path, text)
  return config


def _nearest(name, known):
  found = difflib.get_close_matches(str(name), known, 1, 0.3)
  return f'did you mean {found[0]!r}? Must be ' if found else ''


def _likeness(path, known):
  """How likely `known` was meant: its last name counts most."""
  (where, name), (known_where, known_name) = (
      p.rpartition('.')[::2] for p in (path, known))

  def ratio(a, b):
    return difflib.SequenceMatcher(None, a, b).ratio()
  return (2 * ratio(name, known_name) + known_name.startswith(name)
          + ratio(where, known_where))


def _is_node(value):
  return dataclasses.is_dataclass(value) and not isinstance(value, Placement)


def _leaves(config):
  """Dotted paths of the fields that are not dataclasses themselves."""
  paths = []
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    paths += ([f'{field.name}.{p}' for p in _leaves(value)]
              if _is_node(value) else [field.name])
  return paths


def _changed(config, names, path, text):
  name, *rest = names
  if rest:
    value = _changed(getattr(config, name), rest, path, text)
  else:
    kind = typing.get_type_hints(type(config))[name]
    value = _parse(text.strip(), kind, path)
  return dataclasses.replace(config, **{name: value})


def _parse(text, kind, path, separators=',:'):
  """The value of a text that a field of type `kind` may hold."""
  options = typing.get_args(kind)
  if isinstance(kind, types.UnionType):
    if type(None) in options and text.lower() == 'none':
      return None
    kind, = (k for k in options if k is not type(None))
    return _parse(text, kind, path)
  if typing.get_origin(kind) is tuple:
    if not text:
      return ()
    if options[0] is Placement:
      return tuple(Placement.parse(part) for part in text.split('/'))
    parts = text.split(separators[0])
    kinds = options if options[-1] is not ... else options[:1] * len(parts)
    require(len(kinds) == len(parts), path, text,
            f'{len(kinds)} values with {separators[0]!r} between')
    return tuple(_parse(part, one, path, separators[1:])
                 for part, one in zip(parts, kinds, strict=True))
  if kind is bool:
    require(text.lower() in ('true', 'false'), path, text, 'true or false')
    return text.lower() == 'true'
  try:
    return kind(text)
  except ValueError:
    word = {int: 'an integer', float: 'a number'}[kind]
    raise InputError(f'{path}={text!r}: must be {word}') from None
