"""The paper's figures and tables beside ours.

  python -m experiments.reproduce --figure=all --out=out/reproduce

Prints for each a table (paper | paper rules | ours | why they differ) and
writes FIGURE.png, FIGURE.pdf and FIGURE.json. The published values are in
experiments/paper/reported.py, the two sets of rules in comparison.py, the
figures in figures.py (1, 3, 4, 5, 10, 12), end_to_end.py (8, 9, 11, tables 2
and 3, and 'rules': from one set of rules to the other, a rule at a time) and
causes.py ('causes': from the published values to the paper's rules).
Everything is simulated on the constants that DistServe released for A100s;
nothing here ran on a GPU. --quick takes seconds and its figures say little.
Table, picture and file say what lengths they are of. Ctrl-C
keeps what is finished. Exit codes: 0; 2 for bad input; 130 by Ctrl-C.
"""

import os
import pathlib
import time
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dsjax.config.checks import require
from experiments.common import cli, pictures, provenance, terminal
from experiments.paper import causes, comparison, end_to_end, figures

FIGURES = {name: (figures.FIGURES | end_to_end.FIGURES | causes.FIGURES)[name]
           for name in ('1', '3', '4', '5', '8', '9', 'rules', 'causes', '10',
                        '11', '12', 'table2', 'table3')}


# The data sets of a figure's requests; of those not named, all are equal.
DATA = dict.fromkeys(('8', '10', '11', '12', 'table2'), ('sharegpt',)) | {
    '9': ('humaneval', 'longbench'), 'rules': ('sharegpt', 'longbench'),
    **dict.fromkeys(('causes', 'table3'), (
        'sharegpt', 'humaneval', 'longbench'))}


class Options(NamedTuple):
  """What a figure is asked: see the flags."""

  seed: int
  quick: bool
  traces: pathlib.Path
  validate: pathlib.Path | None
  tell: Callable = print


FLAGS = {
    'figure': cli.Flag('all', f"'all', or of {', '.join(FIGURES)}; several "
                       'with commas.'),
    'quick': cli.Flag(False, 'Seconds each; says little.'),
    'out': 'out/reproduce', 'seed': 0,
    'traces': 'traces',
    'validate': cli.Flag('out/validate/summary.json', 'What '
                         'experiments.validate wrote, for table2.'),
}


def names_of(text: str) -> list[str]:
  """The figures that --figure names.

  Raises:
    InputError.
  """
  names = list(FIGURES) if text == 'all' else text.split(',')
  for name in names:
    require(name in FIGURES, '--figure', name,
            f"'all', or of {', '.join(FIGURES)}")
  require(len(set(names)) == len(names), '--figure', text, 'each once')
  return names


def _cell(value):
  return '-' if value is None else str(value)


def show(console: Console, name: str, data: Mapping[str, Any], took_s: float
         ) -> None:
  """The table of a figure and why it differs from the paper's."""
  title = f'figure {name}' if name.isdigit() else name
  out = Table(title=f'{title}  ({took_s:.0f} s)', title_justify='left')
  out.add_column('')
  for column in data.get('columns', ('paper', 'paper rules', 'ours')):
    out.add_column(column, justify='right', overflow='fold')
  for row in data['rows']:
    out.add_row(*map(_cell, row))
  console.print(out)
  console.print(f'Lengths: {data["data"]}.', highlight=False, soft_wrap=True)
  console.print(f'Why they differ: {data["why"]}\n', highlight=False)


def save(out: pathlib.Path, name: str, data: dict[str, Any],
         draw: Callable[[dict[str, Any], Figure], object],
         options: Mapping[str, Any],
         read: Iterable[str | os.PathLike[str] | None]) -> None:
  """NAME.json, NAME.png and NAME.pdf.

  options: a dict, see cli.asked. read: files of data.
  """
  figure = Figure(figsize=(11, 4), layout='constrained')
  draw(data, figure)
  figure.supxlabel(f'Lengths: {data["data"]}', fontsize=7, x=0.01, ha='left')
  pictures.save(figure, out / f'{name}.png', colours=48)
  provenance.save_json(out / f'{name}.json', data, options, read)


def _read(name, options):
  """The data that a figure is of."""
  read = [comparison.lengths_of(data, options.traces)
          for data in DATA.get(name, ())]
  if name == 'table2' and options.validate.is_file():
    read.append(options.validate)
  return read


def run(values: types.SimpleNamespace, console: Console) -> int:
  """Computes, draws and shows what --figure names."""
  names, out = names_of(values.figure), pathlib.Path(values.out)
  require(not out.exists() or out.is_dir(), '--out', values.out, 'a folder')
  folder = pathlib.Path(values.traces)
  require(folder.is_dir() or values.traces == FLAGS['traces'],
          '--traces', values.traces, 'a folder')
  out.mkdir(parents=True, exist_ok=True)
  options = Options(values.seed, values.quick, folder,
                    pathlib.Path(values.validate))
  now_and_then = terminal.now_and_then(console)
  done, stopped = [], False
  try:
    for name in names:
      start = time.perf_counter()
      with console.status(f'{name}') as status:
        def tell(text, name=name, status=status, start=start):
          line = f'{name}: {text} ({time.perf_counter() - start:.0f} s)'
          status.update(line)
          now_and_then(line)
        compute, draw = FIGURES[name]
        data = compute(options._replace(tell=tell)) | {
            'data': comparison.data_of(DATA.get(name, ()), options.traces)}
      save(out, name, data, draw, cli.asked(values, FLAGS),
           _read(name, options))
      show(console, name, data, time.perf_counter() - start)
      done.append(name)
  except KeyboardInterrupt:
    stopped = True
    console.print('Stopped; what is finished stays.')
  if done:
    terminal.written(console, out, *(
        f'{name}.{kind}' for name in done for kind in ('png', 'json')))
  return 130 if stopped else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
