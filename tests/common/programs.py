"""Runners started in this process, with a command line of their own."""

import contextlib
import io
from typing import NamedTuple

from rich.console import Console

from experiments.common import cli


class Ended(NamedTuple):
  """Exit code of a runner, what it said, and on stderr."""

  code: int
  text: str
  error: str


def ended(runner, *args):
  """What became of `python -m RUNNER ARGS`, off a terminal."""
  console, error = Console(file=io.StringIO(), width=150), io.StringIO()
  with contextlib.redirect_stderr(error):
    code = cli.exit_code(runner.run, cli.parse(runner.FLAGS, args), console)
  return Ended(code, console.file.getvalue(), error.getvalue())
