"""Takes what a run on a GPU wrote into the repository.

README.md has the table between two comments, docs/gpu.md the details between
two more; profiles go to experiments/profiles, with the machine they belong to,
tuned configs to kernels/tuned.json, registers to experiments/aot/measured.json
and the figure to docs/figures/gpu.png. Nothing is written unless all can be.
"""

import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from dsjax.config.checks import InputError, require
from dsjax.kernels import cases, compiled, mosaic, paged, tuned
from dsjax.simulation import profiles
from experiments.common.cli import ROOT
from experiments.gpu import lines, pages, tasks

BEGIN, END = '<!-- gpu: by experiments.gpu --ingest -->', '<!-- /gpu -->'
NAMED = ('device', 'driver', 'jax', 'python', 'date')  # of a machine: text
# A Hopper GPU's kernels are those that were compiled for the H100.
CHIPS = {'A100': 'a100', 'H100': 'h100', 'H200': 'h100'}
CONFIGS = {module.__name__.rsplit('.', 1)[1]: module.TuningConfig
           for module in cases.OPS.values()} | {
               f'mosaic_{op}': mosaic.TuningConfig
               for op in ('decode', 'prefill')}


def run(folder: pathlib.Path, console: Console, root: pathlib.Path = ROOT
        ) -> int:
  """Takes in the files of `folder`; the exit code.

  Raises:
    InputError: it holds no results, results of a CPU or of several machines,
      or a profile or configs that are none.
  """
  rows = {part: lines.read(folder / f'{part}.jsonl') for part in tasks.PARTS}
  machine = machine_of(rows, folder)
  measured = registers(rows['right'], machine)
  files = dict([
      profile(rows['measure'], machine), configs(rows['tune'], machine, root),
      ('experiments/aot/measured.json', measured and json.dumps(
          measured, indent=1) + '\n'),
      inserted(root, 'README.md', pages.summary(rows, machine)),
      inserted(root, 'docs/gpu.md', pages.details(rows, machine, measured))])
  texts = {name: str(text) for name, text in files.items() if text}
  written = list(texts)
  for name, text in texts.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  if pages.draw(rows, machine, root / 'docs' / 'figures' / 'gpu.png'):
    written.append('docs/figures/gpu.png')
  console.print('wrote ' + ', '.join(written), soft_wrap=True)
  return 0


def machine_of(rows: Mapping[str, Sequence[Mapping[str, Any]]],
               folder: pathlib.Path) -> dict[str, str]:
  """The machine that all parts name, each in the line that the run begins
  with.

  Raises:
    InputError: a part names none, or they differ, or it is no NVIDIA GPU.
  """
  require(any(rows.values()), '--ingest', str(folder),
          'a folder with the files of a run')
  machines = []
  for part, of_part in rows.items():
    if of_part:
      machine = {name: of_part[0].get(name) for name in NAMED}
      require(of_part[0]['what'] == 'machine' and machine['device'],
              '--ingest', f'{part}.jsonl', 'to begin with the machine')
      require('nvidia' in str(machine['device']).lower()
              and all(isinstance(x, str) for x in machine.values()),
              '--ingest', f'{part}.jsonl: results of {machine}',
              'results of a GPU')
      machines.append({n: pages.cell(str(x)) for n, x in machine.items()})
  first, *others = machines
  for machine in others:
    require(all(machine[n] == first[n] for n in NAMED if n != 'date'),
            '--ingest', f'{first} and {machine}', 'of one machine')
  return first


def short(device: str) -> str:
  """'h100' of 'NVIDIA H100 80GB HBM3'."""
  words = re.findall('[a-z0-9]+', device.lower().replace('nvidia', ''))
  return words[0] if words else 'gpu'


def profile(rows: Iterable[Mapping[str, Any]], machine: Mapping[str, str]
            ) -> tuple[str, str | None]:
  """(path, text) of the measured profile; no text where there is none."""
  text = next((row['profile'] for row in rows
               if isinstance(row.get('profile'), str)), None)
  if text is None:
    return 'experiments/profiles', None
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'profile.json')
    path.write_text(text)
    fitted = profiles.load(path)
    require(re.fullmatch(r'[a-z0-9.-]+', fitted.model), 'Profile.model',
            fitted.model, 'the name of a model')
    profiles.save(path, dataclasses.replace(
        fitted, source=f'{pages.cell(fitted.source)}; '
        f'{pages.described(machine)}'))
    return (f'experiments/profiles/latency-{short(machine["device"])}-'
            f'{fitted.model}.json'), path.read_text()


def configs(rows: Iterable[Mapping[str, Any]], machine: Mapping[str, str],
            root: pathlib.Path) -> tuple[str, str | None]:
  """(path, text) of kernels/tuned.json with the kept configs added.

  Raises:
    InputError: one of them is none.
  """
  name = f'kernels/{tuned.PATH.name}'
  kept = [row for row in rows if row.get('kept') is True]
  if not kept:
    return name, None
  held = dict(tuned.load(root / name))
  for row in kept:
    op, config, shape = (row.get(n) for n in ('op', 'config', 'shape'))
    fields = {f.name for f in dataclasses.fields(CONFIGS.get(str(op), Empty))}
    require(fields and isinstance(shape, str) and isinstance(config, dict)
            and set(config) == fields, 'tune.jsonl', row['what'],
            'a config of a kernel')
    ops = held[machine['device']] = dict(held.get(machine['device'], {}))
    ops[op] = ops.get(op, {}) | {shape: config}
  try:
    tuned.checked(held)
  except ValueError as error:
    raise InputError(f'tune.jsonl: {error}') from None
  return name, json.dumps(held, indent=1, sort_keys=True) + '\n'


@dataclasses.dataclass
class Empty:
  """No config at all."""


def registers(rows: Iterable[Mapping[str, Any]], machine: Mapping[str, str]
              ) -> dict[str, Any] | None:
  """What experiments/aot/measured.json holds; None: no kernel was compiled."""
  kernels = []
  for row in rows:
    kernel = row.get('compiled')
    if (isinstance(kernel, dict) and kernel.keys() == set(
        compiled.Kernel._fields) and all(
            isinstance(kernel[n], str if n == 'grid' else int)
            for n in kernel) and re.fullmatch(r'[\d, ]{1,99}', kernel['grid'])
        and all(isinstance(row.get(n), str) and row[n].replace(
            '-', '_').isidentifier() for n in ('model', 'kernel'))):
      kernels.append(dict(model=row['model'], kernel=row['kernel'], **kernel))
  if not kernels:
    return None
  chip = CHIPS.get(paged.device(machine['device']).name)
  return dict(gpu=chip, machine=pages.described(machine), rows=kernels)


def inserted(root: pathlib.Path, name: str, text: str) -> tuple[str, str]:
  """(name, a file's text with `text` between the two comments).

  Raises:
    InputError: they are not.
  """
  held = (root / name).read_text()
  require(held.count(BEGIN) == held.count(END) == 1, name, 'its text',
          f'to have {BEGIN} and {END} once')
  before, _, rest = held.partition(BEGIN)
  return name, f'{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}'
