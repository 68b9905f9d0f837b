"""What experiments.aot reads in compiled programs, and says of them."""

import collections
import itertools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

OURS = {'prefill': {'prefill_attention', 'kv_write'},
        'decode': {'decode_attention', 'kv_write'},
        'pack': {'pack'}, 'unpack': {'unpack'}, 'pieces': set()}
KINDS = ('all-gather', 'all-reduce', 'all-to-all', 'collective-broadcast',
         'collective-permute', 'ragged-all-to-all', 'reduce-scatter')
TOLERANCE = 0.05  # of bytes
MEASURED = ('registers', 'spilled', 'shared')  # of a kernel, also on a GPU
FOLDER = pathlib.Path(__file__).parent
GOLDEN = FOLDER.parents[1] / 'tests' / 'goldens' / 'aot.json'
MOST = 0.9  # of a device's memory
# What `kernel_key` makes of a kernel.
KernelKey: TypeAlias = tuple[str, str, str, str, int]


def collectives(text: str) -> dict[str, int]:
  """{kind: how many} in the text of an optimised HLO module."""
  kinds = re.findall(rf' ({"|".join(KINDS)})(?:-start)?\(', text)
  return dict(sorted(collections.Counter(kinds).items()))


def copies(text: str, least: int) -> int:
  """Copies of arrays of `least` numbers or more in an optimised module."""
  shapes = re.findall(r'= \(?\w+\[([\d,]*)\][^=]* copy(?:-start)?\(', text)
  return sum(math.prod(int(n) for n in shape.split(',') if n) >= least
             for shape in shapes)


def kernels(of_names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Of {name: compiled.Kernel}: our kernels, and who else spills.

  Returns:
    {'kernels': {name: its registers, spilled bytes, grid, threads, shared
    bytes}, 'spills': {name of XLA's own: bytes}}.
  """
  ours = set().union(*OURS.values())
  return dict(
      kernels={name: k._asdict() | {'grid': ', '.join(map(str, k.grid))}
               for name, k in sorted(of_names.items()) if name in ours},
      spills={name: k.spilled for name, k in sorted(of_names.items())
              if k.spilled and name not in ours})


def device_bytes(gpu: str) -> int:
  """Memory of a described GPU."""
  path = FOLDER / 'gpus' / f'{gpu}.txtpb'
  found = re.search(r'device_memory_size: (\d+)', path.read_text())
  assert found, path
  return int(found[1])


def must_hold(row: Mapping[str, Any]) -> list[str]:
  """What is wrong with a row whatever the versions: sentences."""
  if 'error' in row:
    return [row['error']]
  faults, size = [], device_bytes(row['gpu'])
  if row['peak_bytes'] > MOST * size:
    faults.append(f'peak of {row["peak_bytes"]} bytes is above {MOST} of the '
                  f"device's {size}")
  if not row['kv_bytes'] <= row['donated_bytes'] == row['alias_bytes']:
    faults.append(f'{row["alias_bytes"]} bytes are updated in place: KV has '
                  f'{row["kv_bytes"]}, {row["donated_bytes"]} are donated')
  if row['copies']:
    faults.append(f'{row["copies"]} copies of a cache array')
  kind = row['step'].split()[0]
  for name in sorted(OURS[kind] - set(row['kernels'])):
    faults.append(f'no kernel {name}')
  faults += [f'{name} spills {k["spilled"]} bytes'
             for name, k in row['kernels'].items() if k['spilled']]
  return faults


def differences(row: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
  """How a row differs from the golden one: sentences."""
  changes = []
  for field in sorted(row.keys() | want.keys()):
    value, was = row.get(field), want.get(field)
    close = (field.endswith('_bytes') and value is not None and was is not None
             and abs(value - was) <= TOLERANCE * was)
    if value != was and not close:
      changes.append(f'{field} is {value}, was {was}')
  return changes


def golden() -> dict[str, Any]:
  """The golden table: versions and rows."""
  return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else dict(
      versions=None, rows=[])


def kernel_key(gpu: str, model: str, name: str, kernel: Mapping[str, Any]
               ) -> KernelKey:
  """What tells kernels apart."""
  return gpu, model, name, kernel['grid'], kernel['threads']


def measured(path: pathlib.Path = FOLDER / 'measured.json'
             ) -> tuple[dict[KernelKey, dict[str, Any]], str]:
  """({kernel_key: kernel}, machine) of what experiments.gpu --ingest wrote;
  nothing where no GPU has."""
  if not path.exists():
    return {}, ''
  written = json.loads(path.read_text())
  return {kernel_key(written['gpu'], row['model'], row['kernel'], row): row
          for row in written['rows']}, written['machine']


def beside(kernel: Mapping[str, Any], real: Mapping[str, Any] | None,
           field: str) -> str:
  """A field as compiled, and as measured where that differs."""
  if real is None or real[field] == kernel[field]:
    return str(kernel[field])
  return f'{kernel[field]} ({real[field]})'


def key(row: Mapping[str, Any]) -> tuple[str, str, str]:
  """What tells rows apart."""
  return row['gpu'], row['model'], row['step']


def faults(rows: Iterable[Mapping[str, Any]],
           golden: Iterable[Mapping[str, Any]] | None) -> list[str]:
  """Sentences that begin with the row's key; golden: rows, or None."""
  known = {key(row): row for row in golden or ()}
  texts = []
  for row in rows:
    wrong = must_hold(row)
    if golden is not None and not wrong:
      want = known.get(key(row))
      wrong = (['it is not in the golden table'] if want is None
               else differences(row, want))
    texts += [f'{" ".join(key(row))}: {fault}' for fault in wrong]
  return texts


def merge(kept: Iterable[dict[str, Any]], rows: Iterable[dict[str, Any]]
          ) -> list[dict[str, Any]]:
  """Golden rows, with those of this run in place of their predecessors."""
  return list(({key(r): r for r in kept} | {key(r): r for r in rows}).values())


def save(path: pathlib.Path, golden: Mapping[str, Any]) -> None:
  """Writes a golden table, a line a row."""
  rows = ',\n'.join(json.dumps(row) for row in golden['rows'])
  path.write_text(f'{{"versions": {json.dumps(golden["versions"])},\n'
                  f'"rows": [\n{rows}\n]}}\n')


def _columns(title, left, right):
  """An empty Table that fits 80 columns."""
  made = Table(title=title, title_justify='left', box=box.SIMPLE,
               collapse_padding=True)
  for name in (*left, *right):
    made.add_column(name, no_wrap=True,
                    justify='left' if name in left else 'right')
  return made


def _step_cells(row):
  """What the table of steps says of a row."""
  step = row['step'].replace(' stage', '\nstage')
  if 'error' in row:
    return step, Text(row['error'][:24], 'red')
  share = row['peak_bytes'] / device_bytes(row['gpu'])
  return (step, '\n'.join(
      f'{count} {name}' for name, count in row['collectives'].items()) or '-',
          str(row['layers'] or '-'), str(row['tp']), str(row['calls']),
          f'{row["peak_bytes"] / 2**30:.1f} {share:.0%}',
          f'{min(row["alias_bytes"] / row["kv_bytes"], 1):.0%}'
          if row['kv_bytes'] else '-', str(row['copies']))


def _kernel_cells(row, real):
  """What the table of kernels says of a row, a line a kernel."""
  for name, kernel in row.get('kernels', {}).items():
    card = real.get(kernel_key(row['gpu'], row['model'], name, kernel))
    yield (name, kernel['grid'].replace(', ', 'x'), str(kernel['threads']), *(
        beside(kernel, card, field)
        for field in ('registers', 'shared', 'spilled')))
  for name, spilled in row.get('spills', {}).items():
    yield f"XLA's {name}", '', '', '', '', str(spilled)


def tables(rows: Iterable[Mapping[str, Any]],
           real: tuple[Mapping[KernelKey, Mapping[str, Any]], str] | None = None
           ) -> Group:
  """Of each GPU and model a table of its steps and one of their kernels.

  real: what `measured` gives; None: what it gives.
  """
  kernels_there, machine = measured() if real is None else real
  shown = []
  for (gpu, model), own in itertools.groupby(
      rows, key=lambda row: (row['gpu'], row['model'])):
    steps = _columns(f'{model} compiled for {gpu}', ('step', 'collectives'), (
        'layers', 'tp', 'calls', 'peak GiB', 'in place', 'copies'))
    launches = _columns('', ('step', 'kernel'), (
        'grid', 'threads', 'regs', 'shared', 'spills'))
    for row in own:
      steps.add_row(*_step_cells(row))
      step = row['step'].replace(' stage', '\nstage')
      for cells in _kernel_cells(row, kernels_there):
        launches.add_row(step, *cells)
        step = ''
    shown += [steps, launches]
  if machine:
    shown.append(f'In brackets where it differs: what ptxas says on {machine}')
  return Group(*shown)
