"""Steps that a live engine runs to be timed: a grid of batch x length."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from dsjax.config.engine import EngineConfig
from dsjax.config.request import Sampling
from dsjax.scheduling.events import Chunk, Row, RunDecode, RunPrefill

STEPS = 4  # decode steps of a timed run: the device takes them in a row
Shape = tuple[tuple[tuple[int, int], ...], int, int]  # pieces, rows, context


def spread(low: int, high: int, points: int) -> list[int]:
  """At most `points` integers from low to high, evenly by ratio."""
  if high <= low:
    return [high]
  return sorted({round(low * (high / low)**(i / (points - 1)))
                 for i in range(points)})


def shapes(config: EngineConfig, points: int) -> list[Shape]:
  """The (pieces, batch, context of a row) of every cell of the grid."""
  limit, rows = config.prefill_tokens, config.max_seqs
  room = config.max_len - STEPS - 1  # context of a row
  lengths = spread(min(16, -(-limit // 2)), min(limit, config.max_len),
                   points)
  cells = [(((0, n),) * b, 0, 0) for n in lengths
           for b in spread(1, min(rows, config.prefill_seqs), 3)
           if n * b <= limit]
  starts = spread(16, config.max_len - lengths[-2], points)[1:]
  cells += [(((s, s + n),), 0, 0) for s in starts for n in lengths
            if s + n <= config.max_len]
  contexts = spread(min(16, room), room, points)
  cells += [((), b, c) for b in config.row_buckets for c in contexts]
  # A row is left for the prompt, and rows take of what a step may hold.
  mixed = [(((s, s + min(n, limit - b)),), b, c) for s in (0, starts[0])
           for n in lengths for b in (-(-rows // 4), rows - 1)
           if 0 < b < min(rows, limit) and s + n <= config.max_len
           for c in (contexts[0], contexts[-1])]
  return list(dict.fromkeys(cells + mixed))


class Cells:
  """An instance driven by hand-made commands: no scheduler, no server.

  Every row has pages of its own. What they hold means nothing: no time
  depends on it.
  """

  def __init__(self, instance: Any) -> None:
    self.instance = instance
    each = -(-instance.config.max_len // instance.capacity.page_size)
    count = instance.config.max_seqs
    most = instance.capacity.num_pages // each
    self.pages = [tuple(range((r % most) * each, (r % most + 1) * each))
                  for r in range(count)]
    for id in range(count):
      instance.admit(id, [1] * (instance.config.max_len // 2), 1, Sampling())

  def run(self, pieces: tuple, batch: int, each: int, steps: int = STEPS
          ) -> tuple[Any, int]:
    """Dispatches a cell, with so many decode steps if it is of those; returns
    (arrays to wait for, steps)."""
    rows = tuple(Row(r, each - 1, STEPS, self.pages[r])
                 for r in range(batch))
    if not pieces:
      outs, _ = self.instance.decode(RunDecode(0, 0, 0, steps, rows))
      return outs[-1].token_R, steps
    size = self.instance.capacity.page_size
    chunks = tuple(
        Chunk(batch + i, start, stop,
              self.pages[batch + i][:-(-stop // size)], True)
        for i, (start, stop) in enumerate(pieces))
    outs, _ = self.instance.prefill(RunPrefill(0, 0, chunks, 0, rows))
    return outs[-1].token_R, 1

  def seconds(self, pieces: tuple, batch: int, each: int,
              count: int = 1) -> float:
    """Seconds of a step of a cell, of `count` commands in a row.

    An instance that is a process says itself when each step was done: so they
    are behind one more command, and what it takes to begin is not in them. Of
    what is seen from here it is at most half.
    """
    stamps = getattr(self.instance, 'stamps', None)
    several = count + (stamps is not None)
    start = time.perf_counter()
    out, steps = [self.run(pieces, batch, each) for _ in range(several)][-1]
    jax.block_until_ready(out)
    seen_s = (time.perf_counter() - start) / several / steps
    if stamps is None:
      return seen_s
    ended_s = [stamp.wall_s for stamp in stamps][-1 - count * steps:]
    return max((ended_s[-1] - ended_s[0]) / (count * steps), seen_s / 2)

  def command_s(self, batch: int, each: int, steps: int, count: int) -> float:
    """Seconds of a command of decode steps of an instance that is a process,
    where each of `count` comes while the one before it runs, as a server sends
    them."""
    before = None
    for _ in range(count + 1):
      out, _ = self.run((), batch, each, steps)
      if before is not None:
        jax.block_until_ready(before)
      before = out
    jax.block_until_ready(before)
    ended_s = [stamp.wall_s for stamp in self.instance.stamps]
    return (ended_s[-1] - ended_s[-1 - count * steps]) / count


@contextlib.contextmanager
def cells_of(instance: Any) -> Iterator[Cells]:
  """Cells of an idle instance of a server, which has its slots back then."""
  yield Cells(instance)
  for id in list(instance.slot_of):
    instance.forget(id)


def context_of(pieces: tuple, batch: int, each: int) -> float:
  """Tokens that the decode rows of a cell attend to, in a mean step."""
  return batch * (each + (0 if pieces else (STEPS - 1) / 2))


class Stopped(KeyboardInterrupt):
  """Ctrl-C among rounds, one of which was whole: their median seconds."""

  def __init__(self, medians: list[float]) -> None:
    super().__init__()
    self.medians = medians


def in_rounds(timed: Sequence[Callable[[], float]], rounds: int,
              tick: Callable[[], object]) -> list[float]:
  """Median seconds of each function; a first round is not counted.

  Raises:
    Stopped: by Ctrl-C, after a round that counts.
  """
  taken = [[] for _ in timed]
  try:
    for i in range(rounds + 1):
      for seconds, once in zip(taken, timed, strict=True):
        took_s = once()
        if i:
          seconds.append(took_s)
        tick()
  except KeyboardInterrupt:
    if not all(taken):
      raise
    raise Stopped([statistics.median(seconds) for seconds in taken]) from None
  return [statistics.median(seconds) for seconds in taken]


def typical(config: EngineConfig) -> dict[str, Shape]:
  """{kind: a cell of the middle of the grid}."""
  tokens = min(config.prefill_tokens, config.max_len) // 2
  rows, each = max(1, config.max_seqs // 2), config.max_len // 2
  return {'prefill': (((0, tokens),), 0, 0), 'decode': ((), rows, each),
          'mixed': (((0, tokens),), max(1, rows // 2), each),
          'single': ((), 1, each)}


def of_several_sizes(config: EngineConfig) -> dict[str, list[Shape]]:
  """{kind: its cells of the least, a middle and the largest size that are
  compiled}, half of the context full."""
  def three(sizes):
    return sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
  each = config.max_len // 2
  tokens = three([size for size in config.token_buckets(config.prefill_tokens)
                  if size <= config.max_len])
  few = max(1, min(config.max_seqs // 4, tokens[0] // 2))  # rows of a mixed one
  rows = three([size for size in config.row_buckets if size > 1] or [1])
  return {'prefill': [(((0, size),), 0, 0) for size in tokens],
          'decode': [((), size, each) for size in rows],
          'mixed': [(((0, size - few),), few, each) for size in tokens],
          'single': [((), 1, each)]}


def typical_s(bare: Cells, config: EngineConfig, kinds: Iterable[str],
              rounds: int) -> dict[str, float]:
  """{kind: median seconds} of a typical step of each of some kinds, of an idle
  instance."""
  cells = typical(config)
  return {kind: statistics.median(bare.seconds(*cells[kind])
                                  for _ in range(rounds)) for kind in kinds}
