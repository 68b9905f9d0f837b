"""A shipped policy by its name: 'arrow', 'static:prefills=2+deadlines'."""

import dataclasses
import importlib
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any

from dsjax.config.checks import is_integer, is_nonnegative, require
from dsjax.config.placement import Slo
from dsjax.policies.deadlines import with_deadlines
from dsjax.scheduling.policy import DISTSERVE, Policy

NAMES = ('adaptive', 'arrow', 'chunked', 'colocated', 'dynamo', 'dynaserve',
         'ecoserve', 'llm_d', 'llumnix', 'mooncake', 'planner', 'ppd',
         'replan', 'splitwise', 'static', 'taichi')
DEADLINES = '+deadlines'
# Of an option: type -> how it is read, a test, what is allowed.
_KINDS: dict[Any, tuple[Callable, Callable, str]] = {
    int: (int, is_integer(0, math.inf), 'an integer of 0 or more'),
    float: (float, is_nonnegative, 'a number of 0 or more'),
    bool: (('False', 'True').index, is_integer(0, 1), 'True or False'),
    str: (str, str.isidentifier, 'a word')}


@dataclasses.dataclass(frozen=True)
class Remade(Policy):
  """A Policy that another process makes again: its hooks are functions within
  functions, which cannot be pickled.

  Attributes:
    policy: as it was made. again: a function that makes it, and its arguments.
  """

  policy: Policy = DISTSERVE
  again: tuple[Any, ...] = ()

  def __reduce__(self) -> Any:
    same = [getattr(self, field.name) is getattr(self.policy, field.name)
            for field in dataclasses.fields(Policy)]
    if not all(same):  # a part of it was replaced
      return Policy, tuple([getattr(self, field.name)
                            for field in dataclasses.fields(Policy)])
    make, *given = self.again
    return make, tuple(given)


def remade(policy: Policy, make: Callable[..., Policy], *given: Any) -> Policy:
  """The policy, as a value that pickles as make(*given), which gave it."""
  hooks = {field.name: getattr(policy, field.name)
           for field in dataclasses.fields(Policy)}
  return Remade(**hooks, policy=policy, again=(make, *given))


def named(text: str, slo: Slo) -> Policy:
  """The Policy of a text. It can be pickled.

  Args:
    text: NAME, or NAME:option=value:... with options of the file's `policy`;
      and +deadlines behind it for that order of its queues, which `adaptive`
      has already. 'distserve', or nothing, is the default.
    slo: the objectives that it is made for.

  Raises:
    InputError.
  """
  base = text.removesuffix(DEADLINES)
  ordered = base != text
  name, *options = base.split(':')
  if name in ('', DISTSERVE.name):
    require(not options, 'policy', text, f'{DISTSERVE.name!r} without options')
    policy = DISTSERVE
  else:
    require(name in NAMES, 'policy', text,
            f'one of {(DISTSERVE.name, *NAMES)}, or path.py:name; '
            f'{DEADLINES} comes last')
    make = importlib.import_module(f'dsjax.policies.{name}').policy
    kinds = dict(typing.get_type_hints(make))
    known = list(inspect.signature(make).parameters)[1:]  # slo is first
    given: dict[str, Any] = {}
    if ordered and 'deadlines' in known:
      given['deadlines'] = True
    for option in options:
      key, _, value = option.partition('=')
      require(key in known and key not in given, f'policy {name}', option,
              f'option=value with options of {known}, each once')
      given[key] = _value(f'policy {name}: {key}', value, kinds[key])
    policy = make(slo, **given)
  if ordered and not policy.order:
    policy = with_deadlines(policy, slo)
  return policy if policy is DISTSERVE else remade(policy, named, text, slo)


def _value(field: str, text: str, kind: Any) -> Any:
  """The value of an option of this type.

  Raises:
    InputError.
  """
  kind = next(iter(typing.get_args(kind)), kind)
  read, test, allowed = _KINDS[kind]
  try:
    value = read(text)
  except ValueError:
    value = None
  require(value is not None and test(value), field, text, allowed)
  return kind(value)
