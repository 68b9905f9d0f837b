"""What a person sees while a run goes on, and how they stop it.

On a terminal a table that renews itself; elsewhere a plain line now and then.
It only reads the orchestrator.
"""

import collections
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from dsjax.config.placement import Placement
from dsjax.scheduling import lifecycle, prefix_cache

TABLE_S, LINE_S, RATE_S, FIRST_S = 0.25, 5.0, 2.0, 2.0
STAGES = ('queued', 'prefilling', 'migrating', 'decoding')
_STAGE = dict.fromkeys(lifecycle.ENDING) | lifecycle.SHOWN_AS | {
    'prefilled': 'migrating'}


def short(text: str, limit: int = 70) -> str:
  """One line of at most `limit` characters, printable ones only."""
  text = ' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())
  return text if len(text) <= limit else text[:limit - 1] + '…'


def written(console: Console, folder: str | os.PathLike[str],
            *names: str) -> None:
  """One line: every file that a run wrote, a PDF beside each picture too."""
  files = [file for name in names for file in (
      (name, f'{name[:-4]}.pdf') if name.endswith('.png') else (name,))]
  console.print(f'Written to {folder}: {", ".join(files)}', soft_wrap=True,
                highlight=False)


def stopped(console: Console, by: str) -> None:
  """One line where a run was ended before its end, by Ctrl-C or a flag."""
  if by:
    console.print(f'Stopped by {by}: this is what was known.')


def counts(server: Any) -> list[dict[str, int]]:
  """Requests per instance and stage, and pages in use.

  A request that waits for its KV to be pulled counts as migrating, at the
  instance that holds it.

  Returns:
    [{stage: requests, 'pages': used, 'of': all}, ...] by instance.
  """
  rows = []
  for inst in server.state.instances:
    free = prefix_cache.num_free(inst.pool)
    rows.append(dict.fromkeys(STAGES, 0) | {
        'pages': inst.pool.num_pages - free, 'of': inst.pool.num_pages})
  for seq in server.state.seqs.values():
    stage = _STAGE.get(seq.stage, seq.stage)
    if stage and seq.instance >= 0:  # else it waits for a lost instance
      rows[seq.instance][stage] += 1
  return rows


def now_and_then(console: Console, every_s: float = 10.0,
                 clock: Callable[[], float] = time.monotonic
                 ) -> Callable[..., None]:
  """A function that prints a line of progress, after FIRST_S seconds and then
  every `every_s`; `begins`: of a new part, at once. On a terminal, where a bar
  moves, it prints none."""
  due_s = clock() + FIRST_S

  def tell(line, begins=False):
    nonlocal due_s
    if not console.is_terminal and (begins or clock() >= due_s):
      due_s = clock() + every_s
      console.print(line, soft_wrap=True, highlight=False)
  return tell


class Interrupts:
  """Ctrl-C as a flag, so that it stops a run between two polls; says so at
  once on stderr, since a step may take seconds.

  The second one is Python's own KeyboardInterrupt.
  """

  def __init__(self) -> None:
    self.seen = False

  def __enter__(self) -> Self:
    self._usable = threading.current_thread() is threading.main_thread()
    if self._usable:
      self._old = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *_: object) -> None:
    if self._usable:
      signal.signal(signal.SIGINT, self._old)

  def _note(self, *_):
    self.seen = True
    # Not print: a signal may come while the main thread prints.
    with contextlib.suppress(OSError):  # closed, or full
      os.write(2, b'stopping after the current step (Ctrl-C again: at once)\n')
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def halt(self) -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed."""
    if self.seen:
      raise KeyboardInterrupt


class Screen:
  """Shows one mode after another on a rich console.

  Args:
    console: a rich Console.
    halt: called often; raises KeyboardInterrupt when the run is to stop.
  """

  def __init__(self, console: Console, halt: Callable[[], object]) -> None:
    self.console, self.halt = console, halt
    self._shown, self._every = None, LINE_S
    self._next_s = 0.0

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()

  def _start(self, shown):
    self._stop()
    self._shown = shown
    shown.start()

  def _stop(self):
    if self._shown:
      self._shown.stop()
      self._shown = None

  # --- warming up -----------------------------------------------------------

  def begin(self, mode: str, placement: Placement, total: int) -> None:
    """A mode begins; `total` requests will be sent."""
    self.mode, self.placement, self.total = mode, placement, total
    self.began_s, self._next_s = time.perf_counter(), 0.0
    self._line_s = LINE_S  # after it began
    self._bar = Progress(
        TextColumn(f'{mode}: compiling'), BarColumn(), MofNCompleteColumn(),
        TextColumn('{task.description}'), console=self.console,
        transient=True)
    self._task = self._bar.add_task('')
    if self.console.is_terminal:
      self._start(self._bar)
    else:
      self.console.print(f'{mode}: compiling')

  def warming(self, done: int, total: int, name: str) -> None:
    """The orchestrator's report while it compiles."""
    self.halt()
    self._bar.update(self._task, completed=done, total=total, description=name)
    spent_s = time.perf_counter() - self.began_s
    if done == total:
      self._stop()
      self.console.print(f'{self.mode}: {total} steps compiled and warmed up '
                         f'in {spent_s:.1f} s')
    elif not self.console.is_terminal and spent_s > self._line_s:
      self._line_s = spent_s + LINE_S
      self.console.print(f'{self.mode}: {done} of {total} steps compiled')

  # --- serving --------------------------------------------------------------

  def serving(self, server: Any) -> None:
    """Called between polls: shows the state a few times a second."""
    self.halt()
    now_s = time.perf_counter()
    if now_s < self._next_s:
      return
    if self._next_s == 0.0:
      self._began_s = now_s
      self._past = collections.deque([(now_s, 0)])
      if self.console.is_terminal:
        self._start(Live(console=self.console, auto_refresh=False,
                         transient=True))
    live = self._shown
    self._next_s = now_s + (TABLE_S if live else LINE_S)
    rate = self._rate(now_s, sum(len(r.token_s) for r in server.records))
    if live:
      live.update(Group(self._table(server, now_s, rate),
                        *self._texts(server)), refresh=True)
    elif now_s > self._began_s:
      self.console.print(self._line(server, now_s, rate), soft_wrap=True)

  def served(self) -> None:
    """The mode is over: the table goes."""
    self._stop()

  def _rate(self, now_s, tokens):
    past = self._past
    while len(past) > 1 and now_s - past[0][0] > max(RATE_S, TABLE_S):
      past.popleft()
    span_s, before = now_s - past[0][0], past[0][1]
    past.append((now_s, tokens))
    return (tokens - before) / span_s if span_s > 0 else 0.0

  def _title(self, server, now_s, rate):
    done = sum(r.finish_s is not None for r in server.records)
    return (f'{self.mode}: {now_s - self._began_s:5.1f} s, '
            f'{len(server.records)} of {self.total} sent, {done} done, '
            f'{rate:.0f} output tokens/s')

  def _line(self, server, now_s, rate):
    rows = counts(server)
    parts = [f'{sum(r[s] for r in rows)} {s}' for s in STAGES]
    used = '+'.join(f'{r["pages"]}/{r["of"]}' for r in rows)
    return (f'{self._title(server, now_s, rate)}; {", ".join(parts)}; '
            f'pages {used}')

  def _table(self, server, now_s, rate):
    table = Table(title=self._title(server, now_s, rate),
                  title_justify='left')
    table.add_column('instance')
    for stage in (*STAGES, 'pages'):
      table.add_column(stage, justify='right')
    for name, row in zip(self.placement.names, counts(server), strict=True):
      table.add_row(name, *(str(row[s]) if row[s] else '·' for s in STAGES),
                    f'{row["pages"]}/{row["of"]}')
    return table

  def _texts(self, server):
    """The end of what the two oldest running answers say so far."""
    width = max(20, self.console.width - 14)
    shown = [(id, state.text) for id, state in server.unfinished.items()]
    for id, text in [x for x in shown if x[1]][:2]:
      text = short(text, 10_000)
      yield Text(f'request {id:3d}: ' + text[-width:], style='dim',
                 no_wrap=True)
