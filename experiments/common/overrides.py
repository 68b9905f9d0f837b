"""Configurations of the runners: frozen dataclasses in Python files.

A config file defines `config`; the command line changes single fields of it.
"""

import dataclasses
import difflib
import pathlib
import re
import runpy
import textwrap
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from dsjax.config.checks import InputError, require
from dsjax.config.placement import Placement

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'
T = TypeVar('T')  # a dataclass


def names() -> list[str]:
  """Names that load() knows."""
  return sorted(path.stem for path in CONFIGS.glob('*.py')
                if path.stem != 'serve')


def load(name: str | pathlib.Path) -> Any:
  """The `config` of a file: a path that ends in .py, or a name in configs/.

  Raises:
    InputError: no such file (naming the nearest), it cannot be run, or it
      defines none.
  """
  path = pathlib.Path(name)
  if path.suffix != '.py':
    path = CONFIGS / f'{name}.py'
    require(path.is_file(), '--config', str(name), _nearest(name, names())
            + f'one of {names()}, or the path of a .py file')
  if not path.is_file():
    raise InputError(f'--config={name}: no such file')
  try:
    config = runpy.run_path(str(path)).get('config')
  except InputError:
    raise
  except (Exception, SystemExit) as error:
    raise InputError(f'--config={name}: cannot be run: '
                     f'{type(error).__name__}: {error}') from error
  require(dataclasses.is_dataclass(config), '--config', str(name),
          'a file that defines `config`, a dataclass')
  return config


def override(config: T, settings: Iterable[str]) -> T:
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
    known = [path for path, _, _ in _owners(config)]
    if path not in known:
      near = max(known, key=lambda p: _likeness(path, p))
      raise InputError(f'--set={setting}: no field {path!r}: did you mean '
                       f'{near!r}? Must be one of {", ".join(known)}')
    config = _changed(config, path.split('.'), path, text)
  return config


def _nearest(name, known):
  near = difflib.get_close_matches(str(name), known, 1, 0.3)
  return f'did you mean {near[0]!r}? Must be ' if near else ''


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
      return tuple(Placement.parse(part, path) for part in text.split('/'))
    parts = text.split(separators[0])
    kinds = options if options[-1] is not ... else options[:1] * len(parts)
    require(len(kinds) == len(parts), path, text,
            f'{len(kinds)} values with {separators[0]!r} between')
    return tuple(_parse(part, kind, path, separators[1:])
                 for part, kind in zip(parts, kinds, strict=True))
  if kind is bool:
    require(text.lower() in ('true', 'false'), path, text, 'true or false')
    return text.lower() == 'true'
  try:
    return kind(text)
  except ValueError:
    word = {int: 'an integer', float: 'a number'}[kind]
    raise InputError(f'{path}={text!r}: must be {word}') from None


# --- what there is to change --------------------------------------------------


def describe(config: Any) -> str:
  """The fields that override() knows: type, default and meaning of each.

  The meaning is what the `Attributes:` of its dataclass's docstring say.
  """
  lines = []
  for path, owner, name in _owners(config):
    kind = re.sub(r'[a-z_.]+\.(?=[A-Z])', '', str(_kind(owner, name)))
    lines.append(f'  {path}: {kind} = {_text(getattr(owner, name))}')
    if meaning := meanings(type(owner)).get(name):
      lines += textwrap.wrap(meaning, 79, initial_indent=' ' * 6,
                             subsequent_indent=' ' * 6)
  return '\n'.join(lines)


def _owners(config, prefix=''):
  """(dotted path, its dataclass, name) of each field that holds a value."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if _is_node(value):
      yield from _owners(value, f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name}', config, field.name


def _kind(owner, name):
  kind = typing.get_type_hints(type(owner))[name]
  return kind.__name__ if isinstance(kind, type) and (
      typing.get_origin(kind) is None) else kind


def _text(value):
  """A value as --set takes it."""
  if isinstance(value, tuple):
    between = '/' if any(isinstance(v, Placement) for v in value) else ','
    return between.join(map(_text, value)) or "''"
  if value is None or isinstance(value, bool):
    return str(value).lower()
  return str(value).removeprefix(f'{CONFIGS.parent}/')


def meanings(kind: type[Any]) -> dict[str, str]:
  """{field: what the Attributes of a dataclass's docstring say of it}.

  `a, b: words` speaks of both.
  """
  names = '|'.join(field.name for field in dataclasses.fields(kind))
  known = rf'(?:^|(?<=[ ;.])) ?((?:{names})(?:, (?:{names}))*): '
  told = {}
  for owner in reversed(kind.__mro__):
    text = ' '.join((owner.__doc__ or '').partition('Attributes:')[2].split())
    parts = re.split(known, text)
    told |= {name: words.strip().rstrip(';')
             for group, words in zip(parts[1::2], parts[2::2], strict=True)
             for name in group.split(', ')}
  return told
