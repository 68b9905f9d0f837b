"""Packages that only an extra of pyproject.toml installs."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
  """Around imports of an extra's packages: where one is missing, the program
  ends with the line that installs it, and exit code 2."""
  try:
    yield
  except ModuleNotFoundError as error:
    print(f'error: {error}: this needs the extra `{extra}`: pip install -e '
          f"'.[{extra}]'", file=sys.stderr)
    sys.exit(2)
