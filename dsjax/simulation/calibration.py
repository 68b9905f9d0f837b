"""Latencies moved onto a served run.

`observe` reads the steps out of its event log; `fit_contention` says how its
instances slowed each other; `calibrate` and `calibrate_link` move a measured
latency onto them.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsjax.analysis import pairing
from dsjax.config.checks import require
from dsjax.simulation.contention import KINDS, Contention, kind_of
from dsjax.simulation.fitting import Cell, nonnegative, predict_s
from dsjax.simulation.latency import Affine, Latency, Link


class Step(NamedTuple):
  """One step of a served run.

  cell: what it held and the seconds from its start to its end. start_s: when
  its command was issued, or the step before it on the instance ended, the
  later of the two. idle: the instance had nothing before it, so the seconds
  hold the host's time to dispatch too. beside_s: {kind: seconds of other
  instances' steps of that kind meanwhile}, of contention.KINDS.
  """

  instance: int
  cell: Cell
  start_s: float
  idle: bool
  beside_s: dict[str, float]

  @property
  def kind(self) -> str:
    """Of contention.KINDS."""
    return kind_of(self.cell.pieces, self.cell.batch)

  @property
  def overlap(self) -> float:
    """Share of the seconds in which other instances were at work."""
    beside_s, seconds = sum(self.beside_s.values()), self.cell.seconds
    return min(1.0, beside_s / seconds) if seconds else 0.0


class Copy(NamedTuple):
  """One migration of a served run: seconds after the one before it on its
  link. behind: its source had something to do before its pages were read."""

  num_tokens: int
  seconds: float
  behind: bool


def observe(log: pairing.Log) -> tuple[list[Step], list[Copy]]:
  """The steps and copies of a served run's event log, as they completed.

  For instances of one pipeline stage: their commands run one by one.
  """
  steps, copies, free_s = [], [], {}
  for ended in pairing.ended(log):
    if not ended.done:
      continue
    if isinstance(ended, pairing.Execution):
      steps += steps_of(ended)
      continue
    command = ended.command
    link = command.source, command.target
    start_s = max(ended.issued_s, free_s.get(link, -np.inf))
    free_s[link] = ended.ended_s
    copies.append(Copy(command.num_tokens, ended.ended_s - start_s,
                       ended.behind))
  return _overlaps(steps), copies


def steps_of(execution: pairing.Execution) -> list[Step]:
  """The Steps of a command that completed."""
  command, start_s = execution.command, execution.started_s
  pieces = tuple((chunk.start, chunk.stop) for chunk in command.chunks)
  batch = len(command.rows)
  context = sum(row.base for row in command.rows) + batch * (command.tick + 1)
  idle, steps = start_s == execution.issued_s, []
  for n, end_s in enumerate(execution.steps_s):
    cell = Cell(pieces, batch, context + n * batch, end_s - start_s)
    steps.append(Step(command.instance, cell, start_s, idle and not n, {}))
    start_s = end_s
  return steps


def _overlaps(steps):
  """Steps with their beside_s."""
  lines = {}
  for key in sorted({(s.instance, s.kind) for s in steps}):
    own = [(s.start_s, s.cell.seconds) for s in steps
           if (s.instance, s.kind) == key]
    times_s = np.array([t for start, d in own for t in (start, start + d)])
    busy_s = np.cumsum([x for _, d in own for x in (0.0, d)])
    lines[key] = times_s, busy_s
  overlapped = []
  for s in steps:
    ends, beside_s = (s.start_s, s.start_s + s.cell.seconds), {}
    for (index, kind), line in lines.items():
      seconds = float(np.diff(np.interp(ends, *line))[0])
      if index != s.instance and seconds > 0:
        beside_s[kind] = beside_s.get(kind, 0.0) + seconds
    overlapped.append(s._replace(beside_s=beside_s))
  return overlapped


def net_s(model: Latency, step: Step) -> float:
  """Seconds of a Step less the host's time to dispatch it."""
  return max(step.cell.seconds - model.host_s * step.idle,
             step.cell.seconds / 2)


def alone_s(model: Latency, step: Step, contention: Contention) -> float:
  """Seconds that a Step would have taken on a device left alone."""
  seconds = net_s(model, step)
  spent = sum(s * (1 - 1 / contention.factor(step.kind, [other]))
              for other, s in step.beside_s.items())
  return max(seconds - spent, seconds / 8)


LEAST_SHARE = 0.1  # of a kind's seconds, for a rate of its own


def fit_contention(models: Sequence[Latency],
                   steps: Sequence[Step]) -> Contention:
  """The Contention that a served run shows.

  For each kind of step: its work, in predicted seconds, is its seconds alone
  at one rate plus its seconds beside each other kind at another. A kind that
  was beside it for less than LEAST_SHARE of the seconds has the rate of the
  kind that was there most; where less than this was alone, a device alone is
  taken to do what was predicted.

  Args:
    models: of each instance. steps: of observe.
  """
  factors = {}
  for kind in KINDS:
    own = [s for s in steps if s.kind == kind]
    beside = {other: sum(s.beside_s.get(other, 0.0) for s in own)
              for other in KINDS}
    total_s = sum(s.cell.seconds for s in own)
    most = max(beside, key=lambda other: beside[other])
    if len(own) < 4 or beside[most] < LEAST_SHARE * total_s:
      continue
    rated = [k for k in KINDS if beside[k] >= LEAST_SHARE * total_s]
    rows, work = [], []
    for s in own:
      column = {k: s.beside_s.get(k, 0.0) for k in rated}
      column[most] += sum(v for k, v in s.beside_s.items() if k not in rated)
      alone = max(0.0, net_s(models[s.instance], s) - sum(column.values()))
      rows.append((alone, *column.values()))
      work.append(predict_s(models[s.instance], s.cell))
    known = sum(row[0] for row in rows) >= LEAST_SHARE * total_s
    if not known:
      work = [max(w - row[0], w / 8) for w, row in zip(work, rows,
                                                       strict=True)]
      rows = [row[1:] for row in rows]
    rates, _ = nonnegative(rows, work, work)  # long steps are what counts
    alone, rates = (rates[0], rates[1:]) if known else (1.0, rates)
    for other in KINDS:
      rate = rates[rated.index(other if other in rated else most)]
      factors[kind, other] = float(min(max(1.0, alone / max(rate, 1e-9)), 8.0))
  return Contention(factors)


def correction(predicted: Sequence[float],
               seconds: Sequence[float]) -> tuple[float, float]:
  """(a, b), 0 or more: a + b predicted is nearest to seconds (squares), with
  the same sum: what a simulation adds up is right on average."""
  x, y = np.asarray(predicted, float), np.asarray(seconds, float)
  require(len(y) and x.sum() > 0 and y.sum() > 0, 'seconds', seconds,
          'above 0')
  spread = x - x.mean()
  b = float(spread @ y / (spread @ spread)) if np.ptp(x) > 1e-12 else -1.0
  a = float(y.mean() - b * x.mean())
  if b < 0:
    return 0.0, float(y.sum() / x.sum())
  return (a, b) if a >= 0 else (0.0, float(y.sum() / x.sum()))


def calibrate(model: Affine, steps: Sequence[Step],
              contention: Contention | None = None) -> Affine:
  """An Affine moved onto the Steps of a served run.

  Each kind's seconds become a + b times what they were (see correction), so
  they include what the measurement does not know. Kinds of fewer than four
  steps stay.

  Args:
    contention: what will be simulated with it; None: the seconds include what
      other instances took, time-weighted over that run.
  """
  contention = contention or Contention({})
  changes = {}
  for kind in ('prefill', 'decode', 'mixed'):
    own = [s for s in steps if s.cell.kind == kind]
    if len(own) >= 4:
      changes[kind] = correction([predict_s(model, s.cell) for s in own],
                                 [alone_s(model, s, contention) for s in own])

  def moved(constants: tuple[float, ...], kind: str) -> tuple[float, ...]:
    a, b = changes.get(kind, (0.0, 1.0))
    return (a + b * constants[0], *(b * x for x in constants[1:]))
  piece = changes.get('prefill', changes.get('mixed', (0.0, 1.0)))[1]
  return dataclasses.replace(
      model, prefill=moved(model.prefill, 'prefill'),
      decode=moved(model.decode, 'decode'),
      decode_large=model.decode_large and moved(model.decode_large, 'decode'),
      mixed=model.mixed and moved(model.mixed, 'mixed'),
      piece_s=model.piece_s * piece)


def calibrate_link(link: Link, copies: Sequence[Copy],
                   host_s: float = 0.0) -> Link:
  """A Link scaled to the seconds of the Copies of a served run.

  If some copies were behind nothing, only these count.
  """
  copies = [c for c in copies if not c.behind] or copies
  if not copies:
    return link
  ratio = (sum(max(c.seconds - host_s, c.seconds / 2) for c in copies)
           / sum(link.migrate_s(c.num_tokens) for c in copies))
  return dataclasses.replace(link, base_s=link.base_s * ratio,
                             bytes_per_s=link.bytes_per_s / ratio)
