"""What a step of a busy scheduler takes, and how it grows.

  python -m experiments.bench.scheduler_step --out=out/step.json

CPU microseconds of DecodeDones with 256 rows and 1,000 waiting: of a step in
which no row takes a page, and, a page, of one in which most do. Then with other
rows, others that wait, and blocks kept of a prefix cache; those of a panel in
turn, medians with quartiles. The picture lies beside --out. Ctrl-C keeps the
panels that were measured. Part (c) of bench.engine is the same with other
caches.
"""

import pathlib
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from dsjax.config.engine import InstanceConfig
from dsjax.scheduling import prefix_cache, scheduler
from dsjax.scheduling.events import (
  Arrived,
  DecodeDone,
  Event,
  Offload,
  Offloaded,
  PrefillDone,
  RunDecode,
  RunPrefill,
)
from experiments.bench import kept
from experiments.common import cli, pictures, terminal

FLAGS = {'out': cli.Flag(None, 'JSON file for the numbers.', str)}
RUNNING, WAITING, KEPT, TIMED = 256, 1000, 100_000, 320
# What grows, each with the others as they are: a panel of the picture. Kept
# blocks fill a pool that rows have to evict from, so not less than 10,000.
GROWTH = {'rows': (16, 64, 256, 1024), 'waiting': (0, 100, 1000, 10_000),
          'blocks kept': (0, 10_000, 30_000, 100_000)}
# What is kept when nobody has come yet, in pages and in slots of host memory.
CASES = {'no cache': None, 'cache': (0, 0),
         f'{KEPT:,} blocks kept': (KEPT, 0),
         'and in host memory': (KEPT, KEPT)}


def filled(pool: prefix_cache.Pages, hashes: Sequence[int]) -> Any:
  """A pool in which blocks are kept that nobody asks for."""
  pool, pages = prefix_cache.alloc(pool, len(hashes))
  return prefix_cache.release(pool, pages, hashes, len(hashes))


class Busy:
  """A colocated instance's scheduler, its rows running, its queue full.

  With blocks kept, each page that a row takes evicts one, which goes to a slot
  where there are any, and evicts what was there.
  """

  def __init__(self, blocks: tuple[int, int] | None, running: int = RUNNING,
               waiting: int = WAITING) -> None:
    pages, slots = blocks or (0, 0)
    self.running, self.waiting = running, waiting
    room = running * (20 if pages else 75)
    instance = InstanceConfig('colocated', pages + room, 16, running, 8192, 64,
                              host_pages=slots)
    self.config = scheduler.Config((instance,), 4096,
                                   prefix_cache=blocks is not None)
    self.state, self.pending = scheduler.init(self.config), []
    first, = self.state.instances
    if pages:
      first = first._replace(pool=filled(first.pool, range(-pages, 0)))
    if slots and first.host:
      first = first._replace(host=first.host._replace(
          slots=filled(first.host.slots, range(-pages - slots, -pages))))
    self.state = self.state._replace(instances=(first,))
    for id in range(running + waiting):
      self.step(Arrived(0.0, id, 300, 900, blocks=tuple(
          range(id * 100, id * 100 + 18)) if blocks is not None else ()))
    while len(self.state.instances[0].rows) < running:
      self.next()

  def row_pages(self) -> int:
    """Pages of all rows together."""
    return sum(len(row.pages) for row in self.state.instances[0].rows)

  def step(self, event: Event) -> float:
    """CPU seconds of a step."""
    start = time.process_time()
    self.state, commands = scheduler.step(self.config, self.state, event)
    taken = time.process_time() - start
    self.pending += [c for c in commands
                     if isinstance(c, RunPrefill | RunDecode | Offload)]
    return taken

  def next(self) -> float | None:
    """The oldest command is done: CPU seconds of its step, if it decodes."""
    command = self.pending.pop(0)
    if isinstance(command, RunDecode):
      return self.step(DecodeDone(0.0, 0, command.number,
                                  (0.0,) * command.steps))
    self.step(Offloaded(0.0, 0, command.number) if isinstance(command, Offload)
              else PrefillDone(0.0, 0, command.number))
    return None


def times_us(busy: Mapping[str, Busy]) -> dict[str, dict[str, np.ndarray]]:
  """CPU us of DecodeDones of {name: Busy}, in turn: by name, 'step' those in
  which no row takes a page, and 'page taken' by page those in which most
  do."""
  quiet, taking = ({name: [] for name in busy} for _ in range(2))
  for _ in range(TIMED):
    for name, each in busy.items():
      before = each.row_pages()
      while (took_s := each.next()) is None:
        pass
      pages = each.row_pages() - before
      if not pages:
        quiet[name].append(took_s)
      elif pages > each.running // 2:
        taking[name].append(took_s / pages)
  for each in busy.values():
    assert len(each.state.instances[0].queue) == each.waiting
    scheduler.check(each.state)
  return {name: {case: 1e6 * np.array(seconds)
                 for case, seconds in cases.items()}
          for name, cases in (('step', quiet), ('page taken', taking))}


def busy_with(what: str, count: int) -> Busy:
  """A Busy with so many of what GROWTH names."""
  if what == 'blocks kept':
    return Busy((count, 0))
  return Busy(None, **{{'rows': 'running'}.get(what, what): count})


def draw(path: pathlib.Path,
         panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
         ) -> None:
  """A panel for each of GROWTH: us over how many there are."""
  figure = Figure(figsize=(8, 3), layout='constrained')
  for axes, (what, lines) in zip(figure.subplots(1, len(panels), sharey=True,
                                                 squeeze=False)[0],
                                 panels.items(), strict=True):
    for number, (name, points) in enumerate(lines.items()):
      middle, low, high = np.array([*points.values()]).T
      axes.errorbar(range(len(points)), middle, (middle - low, high - middle),
                    label=f'{name}{", each" * number}', capsize=3,
                    fillstyle='none', **pictures.look(number))
    axes.set_xticks(range(len(points)), [f'{int(n):,}' for n in points])
    axes.set_xlabel(what)
    axes.spines[['top', 'right']].set_visible(False)
  figure.axes[0].set_ylim(0)  # of all, once all is drawn
  figure.axes[0].set_ylabel('CPU us')
  figure.axes[0].legend(fontsize=8, frameon=False)
  figure.suptitle(f'scheduler.step; {RUNNING} rows, {WAITING:,} waiting, no '
                  'cache but where it says', fontsize=9)
  pictures.save(figure, path, 64)


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Measures every panel, prints a line a point, and draws them."""
  panels = {}

  def measure():
    for what, counts in GROWTH.items():
      taken_us = times_us({str(n): busy_with(what, n) for n in counts})
      panels[what] = {name: {
          count: np.percentile(values, (50, 25, 75)).tolist()
          for count, values in points.items()}
          for name, points in taken_us.items()}
      for count in map(str, counts):
        step, page = (panels[what][name][count] for name in taken_us)
        console.print(
            f'{int(count):7,} {what:12} ' + '{:7.1f} us a step [{:.1f}, {:.1f}]'
            .format(*step) + ', {:6.2f} a page taken [{:.2f}, {:.2f}]'.format(
                *page), highlight=False)
  stopped = kept.until_stopped(measure)
  code = kept.end(console, {'panels': panels}, stopped, options, FLAGS)
  if options.out and panels:
    picture = pathlib.Path(options.out).with_suffix('.png')
    draw(picture, panels)
    terminal.written(console, picture.parent, picture.name)
  return code


if __name__ == '__main__':
  cli.main(run, FLAGS)
