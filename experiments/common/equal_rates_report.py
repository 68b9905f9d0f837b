"""The lines, tables and pictures of experiments.equal_rates."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from dsjax.policies.named import DEADLINES
from experiments.common import pictures
from experiments.common.policies_report import shown

JOIN = '; '  # between the rivals of a line, and so on
VERDICTS = ('ahead', 'level', 'behind')


class Line(NamedTuple):
  """A line of equal_rates.csv: a question (its first fields up to `effort`,
  which says how it was measured) and its answer.

  rate_per_s: of the whole cluster. rivals, shares: what each of them attained,
  nan of those that were not run in full (see equal_rates.contenders).
  attained: by `policy`. rival: the best of the rivals. ahead, low, high: share
  that `policy` attains more than that one, over all seeds; of_seeds: in each.
  flips: of roles, after the warm-up.
  """

  model: str
  cluster: str
  workload: str
  objective: str
  ttft_s: float
  tpot_s: float
  rate_per_s: float
  policy: str
  rivals: str
  effort: str
  attained: float
  rival: str
  ahead: float
  low: float
  high: float
  verdict: str
  flips: int
  of_seeds: str
  shares: str


def key(line: Line) -> tuple[object, ...]:
  """A Line's question."""
  return line[:Line._fields.index('effort') + 1]


def title_of(line: Line) -> tuple[str, ...]:
  """What the lines of a table have in common."""
  return line.model, line.cluster, line.policy


def name_of(policy: str) -> str:
  """A policy's name without its settings and +deadlines."""
  base = policy.removesuffix(DEADLINES)
  return base if '.py:' in base else base.partition(':')[0]


def verdict(low: float, high: float) -> str:
  """Of VERDICTS: whether an interval of what is ahead excludes 0."""
  return 'ahead' if low > 0 else 'behind' if high < 0 else 'level'


def points(line: Line) -> str:
  """What a policy is ahead, with its interval."""
  mean, low, high = (100 * x for x in (line.ahead, line.low, line.high))
  return f'{mean:+.1f} [{low:+.1f}, {high:+.1f}]'


def words(line: Line) -> str:
  """A Line on a line."""
  return (f'{line.model} {line.workload} {line.objective}, '
          f'{line.rate_per_s:.4g}/s: {line.policy} {line.attained:.1%}, '
          f'{points(line)} points beside {line.rival}: {line.verdict}; '
          f'{line.flips} flips')


def table(lines: Sequence[Line]) -> Table:
  """Of one model, cluster and policy: a row a cell, a column a rival with its
  best setting; the best rival has a star."""
  first, rows = lines[0], []
  for line in lines:
    rows.append(own := {})
    for rival, share in zip(line.rivals.split(JOIN), line.shares.split(JOIN),
                            strict=True):
      name = name_of(rival)
      own[name] = max(own.get(name, 0.0), float(share))
  names = list(dict.fromkeys(name for own in rows for name in own))
  out = Table(title=f'{first.model}, {first.cluster}: share that attained at '
              f'the same rate; * the best but {shown(first.policy)}, and the '
              'points ahead of it')
  out.add_column('objective')
  out.add_column('workload')
  for name in ('ms', 'requests/s', *map(shown, (first.policy, *names)),
               'points ahead'):
    out.add_column(name, justify='right')
  out.add_column('verdict')
  out.add_column('flips', justify='right')
  for line, own in zip(lines, rows, strict=True):
    out.add_row(
        line.objective, line.workload,
        f'{1e3 * line.ttft_s:.0f}/{1e3 * line.tpot_s:.1f}',
        f'{line.rate_per_s:.4g}', f'{line.attained:.1%}',
        *(f'{own[name]:.1%}' + '*' * (name == name_of(line.rival))
          if name in own else '-' for name in names),
        points(line), line.verdict, str(line.flips))
  return out


def counts(lines: Sequence[Line]) -> dict[str, int]:
  """{verdict: cells}."""
  verdicts = [line.verdict for line in lines]
  return {name: verdicts.count(name) for name in VERDICTS}


def summary(policy: str, lines: Sequence[Line]) -> str:
  """How many cells have which verdict, and those that are behind."""
  behind = [f'{line.model} {line.workload} {line.objective}'
            for line in lines if line.verdict == 'behind']
  return (f'{policy}, {len(lines)} cells: '
          + ', '.join(f'{n} {name}' for name, n in counts(lines).items())
          + (f': {", ".join(behind)}' if behind else '')
          + f'. Were all level, up to {0.025 * len(lines):.1f} would be behind '
          'by chance.')


def draw(path: pathlib.Path, lines: Sequence[Line]) -> None:
  """Points ahead with intervals: a panel an objective, and side by side those
  of the policies; workloads across, a marker a cluster, filled where the
  interval excludes 0."""
  objectives = list(dict.fromkeys(line.objective for line in lines))
  loads = list(dict.fromkeys(line.workload for line in lines))
  tested = list(dict.fromkeys(line.policy for line in lines))
  systems = list(dict.fromkeys((line.model, line.cluster) for line in lines))
  looks = {system: pictures.look(number)
           for number, system in enumerate(systems)}
  figure = Figure(figsize=(3.4 * len(tested), 0.9 + 1.4 * len(objectives)
                           + 0.12 * len(systems)), layout='constrained')
  axes = figure.subplots(len(objectives), len(tested), squeeze=False,
                         sharex=True, sharey='row')
  panels = {(objective, policy): axes[row][column]
            for row, objective in enumerate(objectives)
            for column, policy in enumerate(tested)}
  for line in lines:
    system = (line.model, line.cluster)
    look, side = looks[system], systems.index(system) - (len(systems) - 1) / 2
    _interval(panels[line.objective, line.policy], line, look,
              loads.index(line.workload) + 0.7 * side / len(systems))
  for (objective, policy), panel in panels.items():
    panel.axhline(0.0, color='0.4', linewidth=0.8, zorder=0)
    panel.set_xlim(-0.5, len(loads) - 0.5)
    panel.set_xticks(range(len(loads)), loads, fontsize=7, rotation=30,
                     ha='right')
    for edge in range(1, len(loads)):
      panel.axvline(edge - 0.5, color='0.9', linewidth=0.6, zorder=0)
    panel.tick_params(axis='y', labelsize=7)
    panel.set_title(shown(policy) + f', {objective}', fontsize=8)
    panel.spines[['top', 'right']].set_visible(False)
  figure.supylabel('points ahead of the best of the others', fontsize=8)
  handles = [Line2D([], [], label=f'{model}, {cluster}', markersize=4,
                    **looks[model, cluster] | {'linestyle': ''})
             for model, cluster in systems]
  handles.append(Line2D([], [], label='hollow: level', markersize=4, marker='o',
                        color='0.4', linestyle='', fillstyle='none'))
  figure.legend(handles=handles, fontsize=6, frameon=False, handletextpad=0.2,
                columnspacing=0.8, loc='outside lower center',
                ncols=len(tested))
  pictures.save(figure, path)


def _interval(panel, line: Line, look: Mapping[str, object], x: float) -> None:
  """A marker and its interval."""
  panel.errorbar(
      x, 100 * line.ahead, markersize=4, elinewidth=0.9, capsize=1.5,
      yerr=[[100 * (line.ahead - line.low)], [100 * (line.high - line.ahead)]],
      fillstyle='none' if line.verdict == 'level' else 'full', **look)
