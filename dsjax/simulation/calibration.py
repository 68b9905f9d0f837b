"""Latencies moved onto a served run.

`observe` reads the steps out of its event log; `fit_contention` says how its
instances slowed each other; `calibrate` and `calibrate_link` move a measured
latency onto them.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dsjax.analysis import pairing
from dsjax.config.checks import require
from dsjax.simulation.contention import KINDS, Contention, kind_of
from dsjax.simulation.fitting import Cell, nonnegative, predict_s


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
  beside_s: dict

  @property
  def kind(self):
    """Of contention.KINDS."""
    return kind_of(self.cell.pieces, self.cell.batch)

  @property
  def overlap(self):
    """Share of the seconds in which other instances were at work."""
    beside_s, seconds = sum(self.beside_s.values()), self.cell.seconds
    return min(1.0, beside_s / seconds) if seconds else 0.0


class Copy(NamedTuple):
  """One migration of a served run: seconds after the one before it on its
  link. behind: its source had something to do before its pages were read."""

  num_tokens: int
  seconds: float
  behind: bool


def observe(log):
  """What a served run's event log says of its steps and copies.

  For instances of one pipeline stage: their commands run one by one.

  Returns:
    ([Step], [Copy]), each in order of completion.
  """
  steps, copies, free_s = [], [], {}
  for ended in pairing.ended(log):
    if not ended.done:
      continue
    if isinstance(ended, pairing.Execution):
      steps += _steps_of(ended)
      continue
    command = ended.command
    link = command.source, command.target
    start_s = max(ended.issued_s, free_s.get(link, -np.inf))
    free_s[link] = ended.ended_s
    copies.append(Copy(command.num_tokens, ended.ended_s - start_s,
                       ended.behind))
  return _overlaps(steps), copies


def _steps_of(execution):
  """The Steps of a command that completed."""
  command, start_s = execution.command, execution.started_s
  pieces = tuple((chunk.start, chunk.stop) for chunk in execution.chunks)
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
    at = np.array([t for start, d in own for t in (start, start + d)])
    busy = np.cumsum([x for _, d in own for x in (0.0, d)])
    lines[key] = at, busy
  found = []
  for s in steps:
    ends, beside_s = (s.start_s, s.start_s + s.cell.seconds), {}
    for (index, kind), line in lines.items():
      seconds = float(np.diff(np.interp(ends, *line))[0])
      if index != s.instance and seconds > 0:
        beside_s[kind] = beside_s.get(kind, 0.0) + seconds
    found.append(s._replace(beside_s=beside_s))
  return found


def net_s(model, step):
  """Seconds of a Step less the host's time to dispatch it."""
  return max(step.cell.seconds - model.host_s * step.idle,
             step.cell.seconds / 2)


def alone_s(model, step, contention):
  """Seconds that a Step would have taken on a device left alone."""
  seconds = net_s(model, step)
  spent = sum(s * (1 - 1 / contention.factor(step.kind, [other]))
              for other, s in step.beside_s.items())
  return max(seconds - spent, seconds / 8)


LEAST_SHARE = 0.1  # of a kind's seconds, for a rate of its own


def fit_contention(models, steps):
  """The Contention that a served run shows.

  Of each kind of step: the work of its steps, in predicted seconds, is the
  seconds alone at one rate plus those beside each other kind at another. A
  kind that was beside less than LEAST_SHARE of the seconds has the rate of
  the kind that was there most; where so few were alone, a device alone is
  taken to do what was predicted.

  Args:
    models: of each instance. steps: [Step], of observe.
  """
  factors = {}
  for kind in KINDS:
    of = [s for s in steps if s.kind == kind]
    beside = {other: sum(s.beside_s.get(other, 0.0) for s in of)
              for other in KINDS}
    total_s = sum(s.cell.seconds for s in of)
    most = max(beside, key=beside.get)
    if len(of) < 4 or beside[most] < LEAST_SHARE * total_s:
      continue
    own = [k for k in KINDS if beside[k] >= LEAST_SHARE * total_s]
    rows, work = [], []
    for s in of:
      column = {k: s.beside_s.get(k, 0.0) for k in own}
      column[most] += sum(v for k, v in s.beside_s.items() if k not in own)
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
      rate = rates[own.index(other if other in own else most)]
      factors[kind, other] = float(min(max(1.0, alone / max(rate, 1e-9)), 8.0))
  return Contention(factors)


def correction(predicted, seconds):
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


def calibrate(model, steps, contention=None):
  """An Affine moved onto the Steps of a served run.

  Each kind's seconds become a + b times what they were (see correction), so
  they hold what the measurement does not know. Kinds without at least four
  steps stay.

  Args:
    contention: what is to be simulated with it; None: what other instances
      took is part of the seconds then, time-weighted over that run.
  """
  contention = contention or Contention({})
  changes = {}
  for kind in ('prefill', 'decode', 'mixed'):
    of = [s for s in steps if s.cell.kind == kind]
    if len(of) >= 4:
      changes[kind] = correction([predict_s(model, s.cell) for s in of],
                                 [alone_s(model, s, contention) for s in of])

  def moved(field, kind):
    constants, (a, b) = getattr(model, field), changes.get(kind, (0.0, 1.0))
    if constants is None:
      return None
    return (a + b * constants[0], *(b * x for x in constants[1:]))
  piece = changes.get('prefill', changes.get('mixed', (0.0, 1.0)))[1]
  return dataclasses.replace(
      model, prefill=moved('prefill', 'prefill'),
      decode=moved('decode', 'decode'),
      decode_large=moved('decode_large', 'decode'),
      mixed=moved('mixed', 'mixed'), piece_s=model.piece_s * piece)


def calibrate_link(link, copies, host_s=0.0):
  """A Link moved onto the Copies of a served run: all of it scaled.

  By those that were behind nothing, if there are any.
  """
  copies = [c for c in copies if not c.behind] or copies
  if not copies:
    return link
  ratio = (sum(max(c.seconds - host_s, c.seconds / 2) for c in copies)
           / sum(link.migrate_s(c.num_tokens) for c in copies))
  return dataclasses.replace(link, base_s=link.base_s * ratio,
                             bytes_per_s=link.bytes_per_s / ratio)
