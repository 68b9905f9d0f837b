"""Latencies from measurements: relative error, constants never below 0.

The linear forms are solved exactly: of every subset of the constants, the
least-squares solution that has none below 0 and the smallest error is the
non-negative optimum (its support is one of the subsets; at most five
constants, so 31). Then each compiled size costs what its cells took, not what
the line says of it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsjax.config.checks import require
from dsjax.config.model import ModelConfig
from dsjax.simulation import latency


class Cell(NamedTuple):
  """One measured step. pieces, batch and context as latency has them."""

  pieces: tuple[tuple[int, int], ...]
  batch: int
  context: float
  seconds: float

  @property
  def kind(self) -> str:
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


def predict_s(model: latency.Latency, cell: Cell) -> float:
  """The seconds of a Cell, as a latency has them."""
  return model.mixed_s(cell.pieces, cell.batch, cell.context)


def residuals(model: latency.Latency,
              cells: Sequence[Cell]) -> dict[str, Residual]:
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


def nonnegative(
    features: Sequence[Sequence[float]], seconds: Sequence[float],
    weights: Sequence[float] | None = None) -> tuple[np.ndarray, float]:
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
  unseen = size < 1e-100  # such a constant would overflow
  x[:, unseen], size[unseen] = 0.0, 1.0
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


def _up(cell, buckets, costs=None):
  """(tokens, rows) that a cell counts as."""
  tokens = latency.sums(cell.pieces)[0]
  costs = costs or latency.Costs()
  if not cell.batch:
    return latency.round_up(tokens, buckets.tokens, costs.tokens), 0
  if not tokens:
    return 0, latency.round_up(cell.batch, buckets.rows)
  return (latency.round_up(tokens, buckets.tokens, costs.mixed_tokens),
          latency.round_up(cell.batch, buckets.mixed_rows, costs.mixed_rows))


def _prefill_row(cell, buckets, costs=None):
  return (1.0, _up(cell, buckets, costs)[0], latency.sums(cell.pieces)[1],
          len(cell.pieces) - 1)


def _decode_row(cell, buckets):
  return 1.0, cell.context, _up(cell, buckets)[1]


def _mixed_row(cell, buckets, costs=None):
  return (1.0, sum(_up(cell, buckets, costs)), latency.sums(cell.pieces)[1],
          cell.context)


def _solve(cells, row, buckets, *costs):
  constants, error = nonnegative([row(c, buckets, *costs) for c in cells],
                                 [c.seconds for c in cells])
  return tuple(map(float, constants)), error


PASSES = 4  # of a line, and of what buckets cost beside it


def _with_costs(model, cells, field):
  """The Affine with what each bucket costs by its cells, in a field of Costs:
  what they take more than predicted goes to their bucket. One without cells
  stays as it is, and so do all where the line is flat."""
  of = latency.BUCKETS_OF[field]
  sizes = getattr(model.buckets, of)
  slope = (model.mixed if field.startswith('mixed') else model.prefill)[1]
  if not slope:
    return model
  costs = list(getattr(model.costs, field) or sizes)
  for i, size in enumerate(sizes):
    own = [c for c in cells if size == latency.round_up(
        c.batch if of == 'mixed_rows' else latency.sums(c.pieces)[0], sizes)]
    if own:
      squares = [c.seconds**-2 for c in own]  # relative errors count
      more_s = np.average([c.seconds - predict_s(model, c) for c in own],
                          weights=squares)
      costs[i] = max(0.0, float(costs[i] + more_s / slope))
  return dataclasses.replace(
      model, costs=model.costs._replace(**{field: tuple(costs)}))


LEAST_BATCHES, LEAST_GAIN = 2, 0.5


def _fit_decode(cells, buckets):
  """(decode, decode_large, split): two pieces only where they halve the
  squared error and each has cells of two batch sizes and more cells than
  constants."""
  whole, error = _solve(cells, _decode_row, buckets)
  best, least = (whole, None, None), error * LEAST_GAIN
  sizes = sorted({c.batch for c in cells})
  for split in sizes[LEAST_BATCHES - 1:len(sizes) - LEAST_BATCHES]:
    sides = ([c for c in cells if c.batch <= split],
             [c for c in cells if c.batch > split])
    if min(map(len, sides)) <= 3:
      continue
    (small, a), (large, b) = (_solve(s, _decode_row, buckets) for s in sides)
    if a + b < least:
      best, least = (small, large, split), a + b
  return best


def fit_affine(cells: Sequence[Cell], buckets: latency.Buckets | None = None,
               host_s: float = 0.0, pp: int = 1, compiled: bool = True
               ) -> latency.Affine:
  """The Affine nearest to measured steps, by relative error.

  Args:
    cells: prefills and decodes; without mixed ones, mixed steps follow from
      the other two.
    buckets: of the engine that was measured.
    compiled: each bucket is a size of its own, and costs what its cells took;
      else what the line says of it.

  Raises:
    InputError: no cell of prefill or of decode, or seconds not above 0.
  """
  buckets = buckets or latency.Buckets()
  by_kind = {kind: [c for c in cells if c.kind == kind]
             for kind in ('prefill', 'decode', 'mixed')}
  for kind in ('prefill', 'decode'):
    require(by_kind[kind], 'cells', len(cells), f'some of kind {kind}')
  decode, large, split = _fit_decode(by_kind['decode'], buckets)
  model = latency.Affine((0.0,) * 3, decode, large, split, None, host_s, pp,
                         buckets)
  for _ in range(PASSES):
    (*prefill, piece_s), _ = _solve(by_kind['prefill'], _prefill_row, buckets,
                                    model.costs)
    model = dataclasses.replace(model, prefill=tuple(prefill), piece_s=piece_s)
    if compiled:
      model = _with_costs(model, by_kind['prefill'], 'tokens')
  if by_kind['mixed']:
    # What a further piece costs is known from the prefills; a cell keeps at
    # least half of its seconds, whatever that takes away.
    rest = [c._replace(seconds=max(c.seconds / 2, c.seconds - model.piece_s * (
        len(c.pieces) - 1))) for c in by_kind['mixed']]
    for _ in range(PASSES):
      mixed, _ = _solve(rest, _mixed_row, buckets, model.costs)
      model = dataclasses.replace(model, mixed=mixed)
      for field in ('mixed_tokens', 'mixed_rows') if compiled else ():
        model = _with_costs(model, by_kind['mixed'], field)
  return model


def fit_appendix_a(cells: Sequence[Cell], config: ModelConfig,
                   block: int = 16, tp: int = 1) -> tuple[float, ...]:
  """(C1, ..., C5) of DistServe's Appendix A, seconds; see latency.appendix_a.

  Mixed cells are left out: the paper has none.
  """
  prefill, decode = latency.appendix_a_features(config, block, tp)
  none = latency.Buckets()
  rows = {'prefill': lambda c: np.multiply(
      prefill, _prefill_row(c, none)[:3]).tolist(),
          'decode': lambda c: np.multiply(decode, (1.0, c.context)).tolist()}
  constants = {}
  for kind, row in rows.items():
    own = [c for c in cells if c.kind == kind]
    require(own, 'cells', len(cells), f'some of kind {kind}')
    constants[kind], _ = nonnegative([row(c) for c in own],
                                     [c.seconds for c in own])
  (c3, c1, c2), (c4, c5) = constants['prefill'], constants['decode']
  return tuple(map(float, (c1, c2, c3, c4, c5)))


def fit_link(tokens: Sequence[int], seconds: Sequence[float],
             kv_bytes: float) -> latency.Link:
  """A latency.Link from migrations of so many tokens.

  Raises:
    InputError: no measurements, or they do not grow with the tokens.
  """
  (base_s, each), _ = nonnegative([(1.0, n) for n in tokens], seconds)
  require(each > 0, 'seconds', seconds, 'longer for more tokens')
  return latency.Link(float(base_s), float(kv_bytes / each), kv_bytes)
