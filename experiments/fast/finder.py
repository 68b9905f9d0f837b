"""Loads compiled modules in place of their sources.

A copy of this file lies in .venv-fast, whose every Python calls `install`; see
build.py. A module whose source has changed since is an error, and is not
loaded as it was. With DSJAX_FAST=0 in the environment nothing is compiled.
"""

import gc
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType

FOLDER = pathlib.Path(__file__).parent / 'dsjax_fast_modules'
MANIFEST = 'manifest.json'
# New objects before the garbage collector looks for cycles, of which a
# simulation makes none: a tenth of its time by default (700).
OBJECTS = 500_000


def digest(source: pathlib.Path) -> str:
  """What a source is known by."""
  return hashlib.sha256(source.read_bytes()).hexdigest()


class Finder:
  """Finds the compiled modules of a folder: its manifest has the digest of
  each one's source."""

  def __init__(self, folder: pathlib.Path) -> None:
    self.folder = folder
    self.digests = json.loads((folder / MANIFEST).read_text())

  def find_spec(self, name: str, path: Sequence[str] | None = None,
                target: ModuleType | None = None
                ) -> importlib.machinery.ModuleSpec | None:
    """As of any finder on sys.meta_path.

    Raises:
      ImportError: the source is another than the one that was compiled.
    """
    del target
    if name not in self.digests or not path:
      return None
    parts = name.split('.')
    source = pathlib.Path(path[0], f'{parts[-1]}.py')
    if digest(source) != self.digests[name]:
      raise ImportError(f'{source} has changed since it was compiled: `make '
                        'fast` again, or set DSJAX_FAST=0')
    compiled = self.folder.joinpath(*parts[:-1]) / (
        parts[-1] + importlib.machinery.EXTENSION_SUFFIXES[0])
    return importlib.util.spec_from_file_location(name, compiled)


def install(folder: pathlib.Path = FOLDER) -> None:
  """Compiled modules come first from now on, and garbage is looked for less
  often."""
  if os.environ.get('DSJAX_FAST') != '0' and (folder / MANIFEST).exists():
    sys.path.append(str(folder))  # what all of them share is a module too
    sys.meta_path.insert(0, Finder(folder))
    gc.set_threshold(OBJECTS)
