"""A policy of one's own on the command line: --policy=path.py:name."""

import dataclasses
import pathlib
import runpy
import sys

from dsjax.config.checks import InputError, require
from dsjax.scheduling.policy import DISTSERVE, Policy


@dataclasses.dataclass(frozen=True)
class _Loaded(Policy):
  """A Policy that another process reads again from its file."""

  source: str = ''

  def __reduce__(self):
    return load, (self.source,)


def load(text: str) -> Policy:
  """The Policy that a Python file calls `name`. The file is run.

  Args:
    text: 'path.py:name'; '' or 'distserve' for the default.

  Raises:
    InputError: no such file, or `name` in it is no Policy.
  """
  if text in ('', DISTSERVE.name):
    return DISTSERVE
  path, colon, name = text.rpartition(':')
  require(colon and path and name, '--policy', text,
          f'path.py:name, or {DISTSERVE.name!r}')
  if not pathlib.Path(path).is_file():
    raise InputError(f'--policy={text}: no such file: {path}')
  folder = str(pathlib.Path(path).resolve().parent)
  sys.path.insert(0, folder)  # what lies beside it, as for a script
  try:
    policy = runpy.run_path(path).get(name)
  except (Exception, SystemExit) as error:
    raise InputError(f'--policy={text}: {path} cannot be run: '
                     f'{type(error).__name__}: {error}') from error
  finally:
    sys.path.remove(folder)
  require(isinstance(policy, Policy), '--policy', text,
          f'the name of a dsjax.Policy in {path}')
  hooks = {field.name: getattr(policy, field.name)
           for field in dataclasses.fields(Policy)}
  return _Loaded(**hooks, source=text)
