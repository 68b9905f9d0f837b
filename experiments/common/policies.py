"""A policy on the command line: a shipped one, or --policy=path.py:name."""

import pathlib
import runpy
import sys
from typing import Any

from dsjax.config.checks import InputError, require
from dsjax.config.placement import Slo
from dsjax.placement.api import SLO
from dsjax.policies.deadlines import with_deadlines
from dsjax.policies.named import DEADLINES, named, remade
from dsjax.scheduling.policy import Policy


def load(text: str, slo: Slo = SLO) -> Policy:
  """A shipped Policy, or the one that a Python file calls `name`: the file is
  run.

  Args:
    text: as policies.named takes it, or 'path.py:name', and +deadlines behind
      it for that order in place of the file's own.
    slo: the objectives that a shipped one is made for.

  Raises:
    InputError: no such file or policy, or `name` in it is no Policy.
  """
  require(text, '--policy', text, 'a name, distserve for the default, or '
          'path.py:name')
  base = text.removesuffix(DEADLINES)
  path, _, name = base.rpartition(':')
  if not path.endswith('.py') or not name:
    return named(text, slo)
  if not pathlib.Path(path).is_file():
    raise InputError(f'--policy={text}: no such file: {path}')
  folder = str(pathlib.Path(path).resolve().parent)
  sys.path.insert(0, folder)  # what lies beside it, as for a script
  try:
    policy: Any = runpy.run_path(path).get(name)
  except (Exception, SystemExit) as error:
    raise InputError(f'--policy={text}: {path} cannot be run: '
                     f'{type(error).__name__}: {error}') from error
  finally:
    sys.path.remove(folder)
  require(isinstance(policy, Policy), '--policy', text,
          f'the name of a dsjax.Policy in {path}')
  policy = policy if base == text else with_deadlines(policy, slo)
  return remade(policy, load, text, slo)
