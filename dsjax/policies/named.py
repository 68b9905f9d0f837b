"""A shipped policy by its name: 'arrow', 'static:prefills=2+deadlines'."""

import importlib
import inspect
from typing import Any

from dsjax.config.checks import InputError, require
from dsjax.config.placement import Slo
from dsjax.policies.deadlines import with_deadlines
from dsjax.scheduling.policy import DISTSERVE, Policy

NAMES = ('adaptive', 'arrow', 'chunked', 'colocated', 'dynamo', 'dynaserve',
         'ecoserve', 'llm_d', 'llumnix', 'mooncake', 'planner', 'ppd',
         'replan', 'splitwise', 'static', 'taichi')
DEADLINES = '+deadlines'


def named(text: str, slo: Slo) -> Policy:
  """The Policy of a text.

  Args:
    text: NAME, or NAME:option=value:... with options of the file's `policy`;
      and +deadlines behind it for that order of its queues. 'distserve', or
      nothing, is the default.
    slo: the objectives that it is made for.

  Raises:
    InputError.
  """
  base = text.removesuffix(DEADLINES)
  name, *options = base.split(':')
  if name in ('', DISTSERVE.name):
    require(not options, 'policy', text, f'{DISTSERVE.name!r} without options')
    policy = DISTSERVE
  else:
    require(name in NAMES, 'policy', text,
            f'one of {(DISTSERVE.name, *NAMES)}, or path.py:name')
    make = importlib.import_module(f'dsjax.policies.{name}').policy
    known = list(inspect.signature(make).parameters)[1:]  # slo is first
    given: dict[str, Any] = {}
    for option in options:
      key, _, value = option.partition('=')
      require(key in known, f'policy {name}', option,
              f'option=value with options of {known}')
      given[key] = _value(f'policy {name}: {key}', value)
    policy = make(slo, **given)
  return with_deadlines(policy, slo) if base != text else policy


def _value(field: str, text: str) -> Any:
  """A number, a truth or a word."""
  if text in ('True', 'False'):
    return text == 'True'
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      continue
  if not text.isidentifier():
    raise InputError(f'{field}={text!r}: must be a number, True, False or a '
                     'word')
  return text
