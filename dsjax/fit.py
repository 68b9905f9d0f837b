"""Latencies from measurements: relative error, constants never below 0.

The linear forms are solved exactly: of every subset of the constants, the
least-squares solution that has none below 0 and the smallest error is the
non-negative optimum (its support is one of the subsets; at most five
constants, so 31). The roofline's shares enter through maxima and are found
with optax.

`observe` reads the steps of a served run out of its event log;
`fit_contention` says how its instances slowed each other; `calibrate` and
`calibrate_link` move a measured latency onto them.
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsjax import base, latency
from dsjax.base import require
from dsjax.contention import KINDS, Contention, kind_of


class Cell(NamedTuple):
  """One measured step. pieces, batch and context as latency has them."""

  pieces: tuple[tuple[int, int], ...]
  batch: int
  context: int
  seconds: float

  @property
  def kind(self):
    """prefill | decode | mixed."""
    if self.pieces:
      return 'mixed' if self.batch else 'prefill'
    return 'decode'


class Residual(NamedTuple):
  """How far a latency is from what was measured of one kind of step.

  mape: mean of |predicted / measured - 1|; worst: the largest of them, at
  `cell`.
  """

  count: int
  mape: float
  worst: float
  cell: Cell


def predict_s(model, cell):
  """The seconds of a Cell, as a latency has them."""
  return model.mixed_s(cell.pieces, cell.batch, cell.context)


def residuals(model, cells):
  """{kind: Residual} of a latency against measured cells."""
  out = {}
  for kind in ('prefill', 'decode', 'mixed'):
    errors = [(abs(predict_s(model, c) / c.seconds - 1), c) for c in cells
              if c.kind == kind]
    if errors:
      worst, cell = max(errors, key=lambda e: e[0])
      out[kind] = Residual(len(errors), float(np.mean(
          [e for e, _ in errors])), worst, cell)
  return out


def nonnegative(features, seconds, weights=None):
  """argmin over c >= 0 of sum_i (w_i ((features_i . c) / seconds_i - 1))^2.

  Args:
    features: [cells, constants], at most 10 constants. seconds: above 0.
    weights: of the relative errors; None: 1 each. seconds: absolute errors.

  Returns:
    (constants, sum of squared relative errors), float64.

  Raises:
    InputError: no cells, or seconds that are not above 0.
  """
  x, y = np.asarray(features, float), np.asarray(seconds, float)
  require(len(y) and np.isfinite(y).all() and (y > 0).all(), 'seconds',
          seconds, 'at least one, each above 0')
  require(x.ndim == 2 and x.shape[0] == len(y) and 1 <= x.shape[1] <= 10
          and np.isfinite(x).all(), 'features', x.shape,
          f'[{len(y)}, 1 to 10] of finite numbers')
  w = np.ones(len(y)) if weights is None else np.asarray(weights, float)
  x = x * (w / y)[:, None]
  size = np.linalg.norm(x, axis=0)
  size[size == 0] = 1.0
  x = x / size
  best, least = np.zeros(x.shape[1]), float(w @ w)  # c = 0 misses all by 1
  for count in range(1, x.shape[1] + 1):
    for chosen in itertools.combinations(range(x.shape[1]), count):
      c = np.linalg.lstsq(x[:, chosen], w, rcond=None)[0]
      if (c < 0).any():
        continue
      error = float(np.sum((x[:, chosen] @ c - w)**2))
      if error < least:
        best, least = np.zeros(x.shape[1]), error
        best[list(chosen)] = c
  return best / size, least


def _up(cell, buckets):
  rows = buckets.mixed_rows if cell.pieces else buckets.rows
  tokens = latency.sums(cell.pieces)[0]
  return (latency.round_up(tokens, buckets.tokens),
          latency.round_up(cell.batch, rows))


def _prefill_row(cell, buckets):
  return (1.0, _up(cell, buckets)[0], latency.sums(cell.pieces)[1],
          len(cell.pieces) - 1)


def _decode_row(cell, buckets):
  return 1.0, cell.context, _up(cell, buckets)[1]


def _mixed_row(cell, buckets):
  return (1.0, sum(_up(cell, buckets)), latency.sums(cell.pieces)[1],
          cell.context)


def _solve(cells, row, buckets):
  return nonnegative([row(c, buckets) for c in cells],
                     [c.seconds for c in cells])


LEAST_BATCHES, LEAST_GAIN = 2, 0.5


def _fit_decode(cells, buckets):
  """(decode, decode_large, split): two pieces only where they halve the
  squared error and each has cells of two batch sizes and more cells than
  constants."""
  whole, error = _solve(cells, _decode_row, buckets)
  best, least = (whole, None, None), error * LEAST_GAIN
  sizes = sorted({c.batch for c in cells})
  for at in range(LEAST_BATCHES, len(sizes) - LEAST_BATCHES + 1):
    split = sizes[at - 1]
    sides = ([c for c in cells if c.batch <= split],
             [c for c in cells if c.batch > split])
    if min(map(len, sides)) <= 3:
      continue
    (small, a), (large, b) = (_solve(s, _decode_row, buckets) for s in sides)
    if a + b < least:
      best, least = (small, large, split), a + b
  return best


def fit_affine(cells, buckets=None, host_s=0.0, pp=1):
  """The Affine nearest to measured steps, by relative error.

  Args:
    cells: [Cell], prefills and decodes; mixed ones too, or the latency says
      them from the other two.
    buckets: latency.Buckets of the engine that was measured.

  Raises:
    InputError: no cell of prefill or of decode, or seconds not above 0.
  """
  buckets = buckets or latency.Buckets()
  of = {kind: [c for c in cells if c.kind == kind]
        for kind in ('prefill', 'decode', 'mixed')}
  for kind in ('prefill', 'decode'):
    require(of[kind], 'cells', len(cells), f'some of kind {kind}')
  (*prefill, piece_s), _ = _solve(of['prefill'], _prefill_row, buckets)
  small, large, split = _fit_decode(of['decode'], buckets)
  mixed = None
  if of['mixed']:
    # What a further piece costs is known from the prefills; a cell keeps at
    # least half of its seconds, whatever that takes away.
    rest = [c._replace(seconds=max(c.seconds / 2, c.seconds - piece_s * (
        len(c.pieces) - 1))) for c in of['mixed']]
    mixed, _ = _solve(rest, _mixed_row, buckets)
  return latency.Affine(
      *(None if c is None else tuple(map(float, c))
        for c in (prefill, small, large)), split,
      mixed if mixed is None else tuple(map(float, mixed)), host_s, pp,
      buckets, float(piece_s))


def fit_appendix_a(cells, config, block=16, tp=1):
  """(C1, ..., C5) of DistServe's Appendix A, seconds; see latency.appendix_a.

  Mixed cells are left out: the paper has none.
  """
  prefill, decode = latency.appendix_a_features(config, block, tp)
  one = latency.Buckets()
  rows = {'prefill': lambda c: np.multiply(prefill, _prefill_row(c, one)[:3]),
          'decode': lambda c: np.multiply(decode, (1.0, c.context))}
  found = {}
  for kind, row in rows.items():
    of = [c for c in cells if c.kind == kind]
    require(of, 'cells', len(cells), f'some of kind {kind}')
    found[kind], _ = nonnegative([row(c) for c in of],
                                 [c.seconds for c in of])
  (c3, c1, c2), (c4, c5) = found['prefill'], found['decode']
  return tuple(map(float, (c1, c2, c3, c4, c5)))


def fit_roofline(cells, model, steps=4000):
  """A Roofline with the shares of the peaks that measured steps reach.

  Adam on the mean squared relative error; compute and memory stay in (0, 1)
  as logistic values, step_s above 0 as a softplus of the shortest step.

  Args:
    cells: [Cell]. model: a roofline.Roofline; its compute, memory and step_s
      are replaced.
  """
  require(cells, 'cells', cells, 'at least one')
  parts, messages = zip(*(model.parts(c.pieces, c.batch, c.context)
                          for c in cells), strict=True)
  peaks = (model.hardware.flop_per_s, model.hardware.bytes_per_s)
  y = np.array([c.seconds for c in cells])
  part_s = jnp.asarray(np.array(parts) / np.array(peaks) / y[:, None, None])
  fixed = jnp.asarray(np.array(messages) / y)
  unit_s = float(y.min())
  step = jnp.asarray(unit_s / y)

  def loss(free):
    share = jax.nn.sigmoid(free[:2])
    total = (jnp.max(part_s / share[None, None, :], -1).sum(-1)
             + fixed + jax.nn.softplus(free[2]) * step)
    return jnp.mean((total - 1)**2)

  rate = optax.cosine_decay_schedule(0.05, steps)
  search = optax.adam(rate)

  def update(carry, _):
    free, state = carry
    grad = jax.grad(loss)(free)
    change, state = search.update(grad, state)
    return (optax.apply_updates(free, change), state), None

  free = jnp.array([0.0, 0.0, -2.0])
  (free, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, length=steps))(
      (free, search.init(free)))
  compute, memory = map(float, jax.nn.sigmoid(free[:2]))
  return dataclasses.replace(
      model, compute=compute, memory=memory,
      step_s=float(jax.nn.softplus(free[2])) * unit_s)


def fit_link(tokens, seconds, kv_bytes):
  """A latency.Link from migrations of so many tokens.

  Raises:
    InputError: no measurements, or they do not grow with the tokens.
  """
  (base_s, each), _ = nonnegative([(1.0, n) for n in tokens], seconds)
  require(each > 0, 'seconds', seconds, 'longer for more tokens')
  return latency.Link(float(base_s), float(kv_bytes / each), kv_bytes)


# --- from a served run ------------------------------------------------------


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
  sent, copies, last, freed = {}, {}, {}, {}
  steps, moved = [], []
  for event, commands in log:
    if isinstance(event, (base.PrefillDone, base.DecodeDone)):
      command, at = sent.pop((event.instance, event.number))
      begin = last.get(event.instance, -np.inf)
      steps += _steps_of(command, at, begin, event)
      last[event.instance] = event.time_s
    elif isinstance(event, base.Migrated) and (
        event.id, event.epoch) in copies:
      c, at, behind = copies.pop((event.id, event.epoch))
      start = max(at, freed.get((c.source, c.target), -np.inf))
      freed[c.source, c.target] = event.time_s
      moved.append(Copy(c.num_tokens, event.time_s - start, behind))
    elif isinstance(event, base.InstanceDown):
      sent = {k: v for k, v in sent.items() if k[0] != event.instance}
    for c in commands:
      if isinstance(c, (base.RunPrefill, base.RunDecode)):
        sent[c.instance, c.number] = c, event.time_s
      elif isinstance(c, base.Migrate):
        copies[c.id, c.epoch] = c, event.time_s, any(
            index == c.source for index, _ in sent)
  return _overlaps(steps), moved


def _steps_of(command, at, begin, event):
  """The Steps of a command issued at `at`, behind one that ended at begin."""
  pieces = tuple((c.start, c.stop) for c in getattr(command, 'chunks', ()))
  batch = len(command.rows)
  context = sum(r.base for r in command.rows) + batch * (command.tick + 1)
  start, idle, found = max(at, begin), at >= begin, []
  times = getattr(event, 'steps_s', ()) or (event.time_s,)
  for i, end in enumerate(times):
    cell = Cell(pieces, batch, context + i * batch, end - start)
    found.append(Step(event.instance, cell, start, idle and not i, {}))
    start = end
  return found


def _overlaps(steps):
  """Steps with their beside_s."""
  lines = {}
  for key in {(s.instance, s.kind) for s in steps}:
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
