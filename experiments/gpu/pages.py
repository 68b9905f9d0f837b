"""What --ingest says of results: the README's table, docs/gpu.md, a figure.

Results may be damaged, or by anyone: text is made fit for a table's cell, and
a line without the numbers that a row needs has no row.
"""

import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.aot import report as aot_report

MOST = 1e15  # of a number that is one


def cell(text: str) -> str:
  """Text in a table's cell: one line, no bars, no comments, no markup."""
  return re.sub(r'\s+', ' ', re.sub(r'[^ -~]|[|<>`\\*]', ' ', text)).strip()[
      :300]


def number(x: Any) -> bool:
  """Whether this is a finite number, of some sense."""
  return type(x) in (int, float) and abs(x) < MOST


def has(row: Mapping[str, Any], *names: str) -> bool:
  """Whether a line has these numbers."""
  return all(number(row.get(name)) for name in names)


def described(machine: Mapping[str, str]) -> str:
  """The machine in words."""
  return (f'{machine["device"]}, driver {machine["driver"]}, jax '
          f'{machine["jax"]}, Python {machine["python"]}, {machine["date"]}')


def verdicts(rows: Mapping[str, Sequence[Mapping[str, Any]]]
             ) -> dict[str, str]:
  """{part: 'N right, M wrong', or 'measured'} of what was judged."""
  words = {}
  for part, of_part in rows.items():
    judged = [row['ok'] for row in of_part if row['ok'] is not None]
    wrong = judged.count(False)
    words[part] = ('not run' if not of_part else 'nothing measured' if all(
        row['what'] == 'machine' for row in of_part) else
                   'measured' if not judged else
                   f'{wrong} of {len(judged)} wrong' if wrong else 'right')
  return words


def summary(rows: Mapping[str, Sequence[Mapping[str, Any]]],
            machine: Mapping[str, str]) -> str:
  """The README's table: a line a part."""
  out = [f'On one {described(machine)}:', '', '| part | verdict | figures |',
         '|---|---|---|']
  for part, verdict in verdicts(rows).items():
    last = {row['task']: row['figure'] for row in rows[part]
            if 'figure' in row}
    out.append(f'| {part} | {verdict} | ' + cell('; '.join(
        f'{task}: {figure}' for task, figure in last.items())) + ' |')
  return '\n'.join(out)


def table(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table, with an empty one after it; none without rows."""
  if not rows:
    return []
  return [head, '|---' * head.strip('|').count('|') + '|---|',
          *(f'| {" | ".join(row)} |' for row in rows), '']


def scaled(x: Any, factor: float, digits: int) -> str:
  """A number that may be missing."""
  return f'{factor * x:.{digits}f}' if number(x) else '-'


def kernels(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
  """Of each kernel that was timed, beside what else does its work."""
  for row in rows:
    if 'op' in row and has(row, 'seconds', 'share'):
      others = row.get('others')
      yield (cell(row['what']), scaled(row['seconds'], 1e6, 1),
             f'{row["share"]:.0%}', *(
                 scaled(others.get(n) if isinstance(others, dict) else None,
                        1e6, 1) for n in ('cudnn', 'xla', 'JAX paged')))


def steps(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
  """Of each step that was timed, beside its floor."""
  for row in rows:
    if 'op' not in row and has(row, 'seconds', 'least_s', 'share', 'host_s'):
      yield (cell(row['what']), scaled(row['seconds'], 1e3, 2),
             scaled(row['least_s'], 1e3, 2), f'{row["share"]:.0%}',
             scaled(row['host_s'], 1e3, 2), scaled(row.get('torch_s'), 1e3, 2))


def served(row: Mapping[str, Any]) -> tuple[float, ...] | None:
  """(attained, low, high; simulated; TTFT's error, TPOT's) of a rate that was
  served and simulated, shares of one; None: it is no such line."""
  try:
    figures = (*row['real']['attainment'], row['simulated']['attainment'][0],
             *(row['errors'][n]['mean'] for n in ('ttft_s', 'tpot_s')))
  except (KeyError, TypeError, IndexError):
    return None
  return figures if (len(figures) == 6 and all(map(number, figures)) and has(
      row, 'requests', 'rate_per_s')) else None


def differences(measured: Mapping[str, Any] | None
                ) -> Iterator[tuple[str, ...]]:
  """Of kernels whose registers, spills or shared memory are not those that
  `make aot` finds."""
  golden = {aot_report.kernel_key(row['gpu'], row['model'], name, kernel):
            kernel for row in aot_report.golden()['rows']
            for name, kernel in row.get('kernels', {}).items()}
  if measured is None:
    return
  for row in measured['rows']:
    want = golden.get(aot_report.kernel_key(
        measured['gpu'], row['model'], row['kernel'], row))
    if want and any(want[n] != row[n] for n in aot_report.MEASURED):
      yield (row['kernel'], row['model'], row['grid'].replace(', ', 'x'), *(
          aot_report.beside(want, row, n) for n in aot_report.MEASURED))


def details(rows: Mapping[str, Sequence[Mapping[str, Any]]],
            machine: Mapping[str, str], measured: Mapping[str, Any] | None
            ) -> str:
  """Tables of docs/gpu.md: kernels, steps, hand-offs, simulation, faults."""
  speed = rows['speed']
  out = [f'On one {described(machine)}.', '']
  out += table('| kernel | us | share of what the device reaches | cuDNN us | '
               'XLA us | JAX paged us |', [*kernels(speed)])
  out += table('| step | ms | floor ms | share | host ms | torch ms |',
               [*steps(speed)])
  out += table('| hand-off | GB/s | of a plain copy |', [
      (cell(row['what']), scaled(row['bytes_per_s'], 1e-9, 1),
       f'{row["of_a_copy"]:.0%}') for row in speed
      if has(row, 'bytes_per_s', 'of_a_copy')])
  out += table('| served | real, attained | simulated | TTFT | TPOT |', [
      (f'{cell(row["what"])}, {row["requests"]} requests',
       f'{100 * share:.1f} [{100 * low:.0f}, {100 * high:.0f}] %',
       f'{100 * ours:.1f} %', f'{ttft:+.0%}', f'{tpot:+.0%}')
      for row in rows['simulate'] if (figures := served(row))
      for share, low, high, ours, ttft, tpot in [figures]])
  out += table('| kernel | model | grid | registers, `make aot` and here | '
               'spilled bytes | shared bytes |', [*differences(measured)])
  wrong = [row for part in rows.values() for row in part
           if row['ok'] is False]
  out += ['Wrong:' if wrong else 'Nothing was wrong.', '']
  out += [f'- {cell(row["task"])}: {cell(row["what"])}' for row in wrong]
  return '\n'.join(out).rstrip()


def draw(rows: Mapping[str, Sequence[Mapping[str, Any]]],
         machine: Mapping[str, str], path: pathlib.Path) -> bool:
  """Shares of the floor, and real against simulated; whether there is any."""
  shares = {}
  for row in rows['speed']:
    if has(row, 'share'):
      name = (f'{row["op"]}, {row.get("impl")}' if 'op' in row
              else ' '.join(row['what'].replace(':', '').split()[:2]))
      shares.setdefault(cell(name), []).append(row['share'])
  served_rows = [(row, figures) for row in rows['simulate']
                 if (figures := served(row))]
  if not shares and not served_rows:
    return False
  figure = Figure(figsize=(11, 4.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  names = list(shares)
  left.barh(names, [100 * statistics.median(shares[n]) for n in names],
            color='0.6', edgecolor='black')
  left.set(xlabel='share of what the device reaches, % (median)')
  left.invert_yaxis()
  for mode, marker in (('colocated', 'o'), ('chunked', 's')):
    own = [(row['rate_per_s'], figures) for row, figures in served_rows
           if row.get('mode') == mode]
    rates = [rate for rate, _ in own]
    right.plot(rates, [100 * figures[0] for _, figures in own], marker,
               color='black', label=f'{mode}, served')
    right.plot(rates, [100 * figures[3] for _, figures in own],
               '-' if marker == 'o' else '--', color='C0',
               label=f'{mode}, simulated')
  right.set(xlabel='requests a second', ylabel='attained both, %',
            ylim=(-3, 103))
  right.legend(frameon=False)
  figure.suptitle(described(machine))
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
  return True
