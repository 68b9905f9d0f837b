"""What a bench leaves behind, also where Ctrl-C ends it."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from experiments.common import cli, provenance, terminal


def until_stopped(measure: Callable[..., object], *args: Any) -> bool:
  """Calls measure(*args); whether Ctrl-C ended it."""
  try:
    measure(*args)
  except KeyboardInterrupt:
    return True
  return False


def end(console: Console, results: Mapping[str, Any], stopped: bool,
        options: Any, defined: dict[str, Any]) -> int:
  """Writes to --out what there is, says if it is not all; the exit code.

  options, defined: see cli.asked.
  """
  if options.out:
    provenance.save_json(options.out, results, cli.asked(options, defined))
    path = pathlib.Path(options.out)
    terminal.written(console, path.parent, path.name)
  if stopped:
    console.print('Stopped by Ctrl-C: this is what was measured by then.')
  return 130 if stopped else 0
