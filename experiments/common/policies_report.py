"""The files, tables and pictures of experiments.policies."""

import csv
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from dsjax.config.checks import InputError, require
from experiments.common import pictures

FAR = 1.6  # see draw


class Line(NamedTuple):
  """A line of policies.csv; variant: of the policy, the best. phases: of a
  load that shifts, what attains in each. effort: how it was measured."""

  model: str
  cluster: str
  workload: str
  ttft_s: float
  tpot_s: float
  policy: str
  goodput_per_device: float
  low: float
  high: float
  binds: str
  objective: str
  variant: str
  phases: str = ''
  effort: str = ''


def key(line: Line) -> tuple[str, ...]:
  """What tells a line from every other."""
  return (line.model, line.cluster, line.workload, line.objective,
          line.policy, line.effort)


def title_of(line: Line) -> tuple[str, ...]:
  """What the lines of a table have in common."""
  return (line.model, line.cluster, line.objective)


def shown(policy: str) -> str:
  """A policy's name where there is little room: path.py:name without the
  folder."""
  return policy.rpartition('/')[2]


def words(line: Line) -> str:
  """A Line on a line."""
  return (f'{line.model} {line.workload} {line.objective} {line.policy}: '
          f'{line.goodput_per_device:.3g} [{line.low:.3g}, {line.high:.3g}] '
          f'{line.binds} {line.variant}'
          + (f'; {line.phases}' if line.phases else ''))


def read(path: pathlib.Path, kind: Any = Line, flag: str = '--out'
         ) -> list[Any]:
  """The lines of a .csv; none where there is no file.

  Args:
    kind: of a line, a NamedTuple of numbers and texts. flag: that names the
      folder.
  """
  if not path.exists():
    return []
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      names, *rows = [row for row in csv.reader(file) if row] or [kind._fields]
    require(sorted(names) == sorted(kind._fields)
            and all(len(row) == len(names) for row in rows), flag, str(path),
            f'a folder whose {path.name} has the columns {kind._fields} in '
            'each line')
    return [kind(**{name: _value(kind.__annotations__[name], name, text)
                    for name, text in zip(names, row, strict=True)})
            for row in rows]
  except InputError:
    raise
  except (OSError, ValueError, csv.Error) as error:  # no UTF-8, no numbers
    raise InputError(f'{flag}: {path}: {error}') from error


def _value(kind: Any, name: str, text: str) -> Any:
  """What a cell of a .csv says: a text or a finite number."""
  value = kind(text)
  if kind is float and not math.isfinite(value):
    raise ValueError(f'{name}={text}: must be a finite number')
  return value


def table(lines: Sequence[Line]) -> Table:
  """Of one model and objective: policies down, workloads across; the best of
  each column in bold."""
  first = lines[0]
  known = {(line.policy, line.workload): line for line in lines}
  slos = {line.workload: f'{1e3 * line.ttft_s:.0f}/{1e3 * line.tpot_s:.1f}'
          for line in lines}
  out = Table(title=f'{first.model}, {first.cluster}, {first.objective}: '
              'requests/s a device, what bound it [surely, surely not]')
  out.add_column('policy')
  for workload, slo in slos.items():
    out.add_column(f'{workload}\n{slo} ms', justify='right')
  best = {w: max(line.goodput_per_device for line in lines
                 if line.workload == w) for w in slos}
  for policy in dict.fromkeys(line.policy for line in lines):
    row: list[str | Text] = []
    for workload in slos:
      line = known.get((policy, workload))
      if line is None:
        row.append('-')
        continue
      goodput = line.goodput_per_device
      text = f'{goodput:.3g} {line.binds}'
      row.append(Text.assemble(
          (text, 'bold' if goodput >= best[workload] else ''),
          f'\n[{line.low:.3g}, {line.high:.3g}]'))
    out.add_row(shown(policy), *row)
  return out


def draw(out: pathlib.Path, lines: list[Line]) -> None:
  """A panel a model and workload: each policy's goodput over the highest one
  under the same objectives, a marker an objective, and a line from what surely
  attains to what surely does not, up to FAR times the highest."""
  models = list(dict.fromkeys(line.model for line in lines))
  loads = list(dict.fromkeys(line.workload for line in lines))
  names = list(dict.fromkeys(line.policy for line in lines))[::-1]
  objectives = sorted({line.objective for line in lines})
  figure = Figure(figsize=(2.4 + 2.4 * len(loads),
                           (1.4 + 0.2 * len(names)) * len(models)),
                  layout='constrained')
  axes = figure.subplots(len(models), len(loads), sharey=True, squeeze=False)
  for (model, workload), panel in zip(itertools.product(models, loads),
                                      axes.flat, strict=True):
    for number, objective in enumerate(objectives):
      own = {line.policy: line for line in lines if (
          line.model, line.workload, line.objective) == (
              model, workload, objective)}
      base = max([line.goodput_per_device for line in own.values()], default=0)
      if base:
        look = pictures.look(number)
        for name, line in own.items():
          panel.plot([line.low / base, line.high / base],
                     [names.index(name)] * 2, color=look['color'],
                     linewidth=0.8)
        panel.plot([line.goodput_per_device / base for line in own.values()],
                   [names.index(name) for name in own], label=objective,
                   fillstyle='none', **look | {'linestyle': ''})
    panel.axvline(1.0, color='0.7', linewidth=0.8)
    panel.set_xlim(0, FAR)
    panel.set_title(f'{model}\n{workload}', fontsize=9)
    panel.set_xlabel('times the highest goodput', fontsize=8)
    panel.set_yticks(range(len(names)), map(shown, names), fontsize=8)
  labelled = {text: handle for panel in axes.flat for handle, text in zip(
      *panel.get_legend_handles_labels(), strict=True)}
  figure.legend(labelled.values(), labelled.keys(), fontsize=8, ncols=3,
                loc='outside upper right')
  pictures.save(figure, out / 'policies.png')
