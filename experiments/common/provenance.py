"""What every file of results says of its making, and how it is written."""

import contextlib
import csv
import datetime
import hashlib
import io
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import dsjax
from experiments.common import cli

KEY = 'made_by'


def commit() -> str | None:
  """The checkout's commit, '-dirty' where files differ; None if it is none."""
  if not (cli.ROOT / '.git').exists():
    return None
  with contextlib.suppress(OSError):
    done = subprocess.run(
        ['git', 'describe', '--always', '--dirty', '--abbrev=12',
         '--exclude=*'], cwd=cli.ROOT, check=False, text=True,
        capture_output=True)
    return done.stdout.strip() or None
  return None


def machine() -> dict[str, Any]:
  """What it ran on; jax and its devices only where jax is loaded."""
  cpu = platform.machine()
  with contextlib.suppress(OSError, StopIteration):
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    cpu = next(line.partition(': ')[2] for line in lines
               if line.startswith('model name'))
  told = {'system': platform.platform(), 'cpu': cpu, 'cores': os.cpu_count(),
          'python': platform.python_version()}
  if jax := sys.modules.get('jax'):
    told |= {'jax': jax.__version__,
             'devices': [device.device_kind for device in jax.devices()]}
  return told


def data(names: Iterable[str | os.PathLike[str] | None]) -> dict[str, str]:
  """{what was read: sha256 of a file, 'built in' of a name}."""
  told = {}
  for name in names:
    if name and pathlib.Path(name).is_file():
      with open(name, 'rb') as file:
        told[pathlib.Path(name).name] = hashlib.file_digest(
            file, 'sha256').hexdigest()
    elif name:
      told[str(name)] = 'built in'
  return told


def made_by(options: Mapping[str, Any],
            read: Iterable[str | os.PathLike[str] | None] = ()
            ) -> dict[str, Any]:
  """Version, commit, time, options, data and machine of this run.

  Args:
    options: what was asked for, see cli.asked.
    read: files and names of data, such as a trace or 'sharegpt'.
  """
  return {'dsjax': dsjax.__version__, 'commit': commit(),
          'time': datetime.datetime.now(datetime.UTC).isoformat(
              timespec='seconds'),
          'options': dict(options), 'data': data(read), 'machine': machine()}


def finite(value: Any) -> Any:
  """A value of JSON: keys are text, nan and inf, which it lacks, null."""
  if isinstance(value, Mapping):
    return {str(key): finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(
      value) else value


def save_json(path: str | os.PathLike[str], result: Mapping[str, Any],
              options: Mapping[str, Any],
              read: Iterable[str | os.PathLike[str] | None] = ()) -> None:
  """Writes a result, and under 'made_by' what made_by says of it.

  A folder that is missing is made: what was measured is not lost for it.
  """
  _write(path, json.dumps(finite({KEY: made_by(options, read), **result}),
                          indent=1, ensure_ascii=False) + '\n')


def save_trace(path: str | os.PathLike[str], trace: Mapping[str, Any],
               options: Mapping[str, Any],
               read: Iterable[str | os.PathLike[str] | None] = ()) -> None:
  """Writes a timeline, and last, where viewers pass it over, made_by."""
  _write(path, json.dumps({**trace, 'otherData': {
      KEY: finite(made_by(options, read))}}) + '\n')


def save_csv(path: str | os.PathLike[str], columns: Sequence[str],
             rows: Iterable[Sequence[Any]]) -> None:
  """Writes a table. A folder that is missing is made."""
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(columns)
  writer.writerows(rows)
  _write(path, text.getvalue())


def save_lines(out: pathlib.Path, name: str, kind: type[NamedTuple],
               lines: Iterable[Any], options: Mapping[str, Any],
               read: Iterable[str | os.PathLike[str] | None],
               key: str = 'lines') -> None:
  """Writes lines of a table, of this kind, as NAME.csv and NAME.json."""
  known = list(lines)
  save_csv(out / f'{name}.csv', kind._fields, known)
  save_json(out / f'{name}.json', {key: [line._asdict() for line in known]},
            options, read)


def _write(path, text):
  """Writes a file whole, or leaves what was there: a runner that goes on from
  its results may be killed while it writes them."""
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  if file.exists() and not file.is_file():  # such as /dev/stdout
    file.write_text(text, encoding='utf-8', newline='')
    return
  file = file.resolve()
  part = file.with_name(f'{file.name}.{os.getpid()}')
  try:
    part.write_text(text, encoding='utf-8', newline='')
    part.replace(file)
  finally:
    part.unlink(missing_ok=True)
