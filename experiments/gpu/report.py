"""The table of a run."""

from collections.abc import Sequence

from rich.table import Table

from experiments.gpu.runner import Outcome


def table(outcomes: Sequence[Outcome], where: str) -> Table:
  """Part, task, verdict, seconds, figure; 80 columns."""
  shown = Table(title=f'dsjax on {where}', title_justify='left', width=80)
  shown.add_column('part')
  shown.add_column('task')
  shown.add_column('verdict', overflow='fold', max_width=24)
  shown.add_column('s', justify='right')
  shown.add_column('figure', overflow='fold')
  last = None
  for outcome in outcomes:
    if last not in (None, outcome.task.part):
      shown.add_section()
    last = outcome.task.part
    shown.add_row(last, outcome.task.name, outcome.verdict,
                  f'{outcome.seconds:.0f}', outcome.figure,
                  style=None if outcome.ok else 'red')
  return shown
