"""Seconds of a step: prefill, decode, mixed (chunked), a KV transfer.

Three forms (predictions are arithmetic; `fitting` makes them
from measurements):

- `Affine`: prefill A + B sum(l) + C sum(l^2), decode A + B context + C batch
  with two pieces of batch sizes (the form that DistServe's code profiles).
  `appendix_a` gives the one of the paper's five constants.
- `roofline.Roofline`: operations and bytes counted from the model's shape
  against a device's peaks, for hardware that has not been measured.
- `Link`: a KV transfer.

The protocols `Latency` and `LinkLike` (config.latency) say what simulations
and searches ask of them; anything that has these methods will do.
"""

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from dsjax.config.checks import (
  is_nonnegative,
  is_positive,
  is_positive_int,
  require,
)
from dsjax.config.latency import Latency, Pieces
from dsjax.config.latency import LinkLike as LinkLike
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan


class Buckets(NamedTuple):
  """Sizes that are compiled: a batch costs what the next one costs.

  tokens of a prefill, rows of a decode, rows that join a prefill. Empty: a
  batch costs its own size.
  """

  tokens: tuple[int, ...] = ()
  rows: tuple[int, ...] = ()
  mixed_rows: tuple[int, ...] = ()


class Costs(NamedTuple):
  """Tokens or rows of a line that a step of each bucket costs, as measured:
  a kernel is better at some sizes than at others. Empty: the bucket's size.

  tokens of a prefill; tokens and rows of a mixed step.
  """

  tokens: tuple[float, ...] = ()
  mixed_tokens: tuple[float, ...] = ()
  mixed_rows: tuple[float, ...] = ()


BUCKETS_OF = {'tokens': 'tokens', 'mixed_tokens': 'tokens',
              'mixed_rows': 'mixed_rows'}  # field of Costs: of Buckets


def round_up(size: int, buckets: Sequence[int],
             costs: Sequence[float] = ()) -> float:
  """What a size costs: its bucket, or what that costs. Above the largest
  itself, and what the largest costs beyond its own size."""
  index = bisect_left(buckets, size)
  if index < len(buckets):
    return (costs or buckets)[index]
  return size + costs[-1] - buckets[-1] if costs else size


def sums(pieces: Pieces) -> tuple[int, int]:
  """(tokens, stop^2 - start^2) of pieces, summed: a chunk attends to what
  lies before it too, so chunks of a prompt add up to the whole prompt."""
  tokens = squares = 0
  for start, stop in pieces:
    tokens += stop - start
    squares += stop * stop - start * start
  return tokens, squares


def check_constants(name: str, values: Sequence[float], count: int
                    ) -> tuple[float, ...]:
  """So many numbers of 0 or more. Raises InputError naming them."""
  require(isinstance(values, (tuple, list)) and len(values) == count
          and all(is_nonnegative(v) for v in values), name, values,
          f'{count} numbers, each 0 or more')
  return tuple(map(float, values))


def check_common(latency: Latency) -> None:
  """Raises InputError unless host_s and pp are what a latency may have."""
  kind = type(latency).__name__
  require(is_nonnegative(latency.host_s), f'{kind}.host_s', latency.host_s,
          'seconds, 0 or more')
  require(is_positive_int(latency.pp), f'{kind}.pp', latency.pp,
          'stages, 1 or more')


@dataclasses.dataclass(frozen=True)
class Affine:
  """Linear in what a batch holds; every constant is 0 or more.

  Attributes:
    prefill: (A, B, C): A + B tokens + C sum(stop^2 - start^2).
    decode: (A, B, C): A + B context + C batch.
    decode_large: the same, of batches above `split`; None: `decode` is.
    split: largest batch of `decode`; None without decode_large.
    mixed: (A, B, C, D): A + B (tokens + batch) + C sum(stop^2 - start^2)
      + D context, where it was measured. None: the weights are read once and
      the tokens of both kinds share the matrix products, so these take the
      longer of the prefill's line and the decode's line over all tokens, and
      each kind adds its own attention:
        max(A_p + B_p n, A_d + C_d n) + C_p squares + B_d context,
        n = tokens + batch;
      never more than the two steps one after the other.
    piece_s: seconds of each piece after the first, prefill or mixed (its own
      blocks of attention, its row of the output head).
    buckets: tokens and rows round up to these.
    costs: tokens and rows of the lines that each bucket costs.
  """

  prefill: tuple[float, ...]
  decode: tuple[float, ...]
  decode_large: tuple[float, ...] | None = None
  split: int | None = None
  mixed: tuple[float, ...] | None = None
  host_s: float = 0.0
  pp: int = 1
  buckets: Buckets = Buckets()
  piece_s: float = 0.0
  costs: Costs = Costs()

  def __post_init__(self):
    for field, count in (('prefill', 3), ('decode', 3), ('decode_large', 3),
                         ('mixed', 4)):
      value = getattr(self, field)
      if value is not None or field in ('prefill', 'decode'):
        object.__setattr__(self, field, check_constants(
            f'Affine.{field}', value, count))
    require((self.split is None) == (self.decode_large is None)
            and (self.split is None or is_positive_int(self.split)),
            'Affine.split', self.split,
            'a batch size, with decode_large and only with it')
    require(len(self.buckets) == 3, 'Affine.buckets', self.buckets,
            'tokens, rows, mixed_rows')
    for field, sizes in zip(Buckets._fields, self.buckets, strict=True):
      require(all(map(is_positive_int, sizes))
              and list(sizes) == sorted(set(sizes)),
              f'Affine.buckets.{field}', sizes, 'growing sizes')
    object.__setattr__(self, 'buckets', Buckets(*map(tuple, self.buckets)))
    require(len(self.costs) == 3, 'Affine.costs', self.costs,
            f'of {", ".join(Costs._fields)}')
    for (field, of), costs in zip(BUCKETS_OF.items(), self.costs, strict=True):
      sizes = getattr(self.buckets, of)
      require(len(costs) in (0, len(sizes)) and all(map(
          is_nonnegative, costs)), f'Affine.costs.{field}', costs,
              f'none, or one for each of buckets.{of}={sizes}, 0 or more')
    object.__setattr__(self, 'costs', Costs(*map(tuple, self.costs)))
    require(is_nonnegative(self.piece_s), 'Affine.piece_s', self.piece_s,
            'seconds, 0 or more')
    check_common(self)

  def prefill_s(self, pieces: Pieces) -> float:
    """Seconds of a prefill batch; 0 of an empty one."""
    if not pieces:
      return 0.0
    tokens, squares = sums(pieces)
    a, b, c = self.prefill
    n = round_up(tokens, self.buckets.tokens, self.costs.tokens)
    return a + b * n + c * squares + self.piece_s * (len(pieces) - 1)

  def decode_line(self, batch: int) -> tuple[float, float]:
    """(a, b): a step of `batch` rows takes a + b context."""
    a, b, c = self._decode(batch)
    return a + c * round_up(batch, self.buckets.rows), b

  def _decode(self, batch):
    if self.decode_large is None or batch <= (self.split or 0):
      return self.decode
    return self.decode_large

  def decode_s(self, batch: int, context: float) -> float:
    """Seconds of a decode step; 0 of an empty one."""
    a, b = self.decode_line(batch)
    return a + b * context if batch else 0.0

  def mixed_s(self, pieces: Pieces, batch: int, context: float) -> float:
    """Seconds of a chunked step: prompt pieces and decode rows together."""
    if not pieces or not batch:
      return self.prefill_s(pieces) + self.decode_s(batch, context)
    tokens, squares = sums(pieces)
    buckets, costs = self.buckets, self.costs
    n = (round_up(tokens, buckets.tokens, costs.mixed_tokens)
         + round_up(batch, buckets.mixed_rows, costs.mixed_rows))
    more = self.piece_s * (len(pieces) - 1)
    if self.mixed is not None:
      a, b, c, d = self.mixed
      return a + b * n + c * squares + d * context + more
    (a, b, c), (a_d, b_d, c_d) = self.prefill, self._decode(batch)
    joint = max(a + b * n, a_d + c_d * n) + c * squares + b_d * context + more
    return min(joint, self.prefill_s(pieces) + self.decode_s(batch, context))


def appendix_a(config: ModelConfig, constants: Sequence[float],
               block: int = 16, tp: int = 1, host_s: float = 0.0) -> Affine:
  """The latency of DistServe's Appendix A.

    T_prefill = C1 (4 t h^2 + 2 t h m) + C2 3 h t2 / b + C3
    T_decode  = C4 (4 h^2 + 2 h m) + C5 3 h t

  h: D; m: F; b: the attention kernel's block; t: tokens (decode: context);
  t2: sum of squares. The paper's model has as many kv heads as heads and no
  gate. tp divides the work of every product (the paper divides h and m;
  of each product one side only is split). The layers are in the constants.

  Args:
    constants: (C1, ..., C5), seconds.
  """
  c1, c2, c3, c4, c5 = check_constants('appendix_a.constants', constants, 5)
  (_, b, s), (w, t) = appendix_a_features(config, block, tp)
  return Affine((c3, c1 * b, c2 * s), (c4 * w, c5 * t, 0.0), host_s=host_s)


def appendix_a_features(
    config: ModelConfig, block: int = 16,
    tp: int = 1) -> tuple[tuple[float, float, float], tuple[float, float]]:
  """((1, per token, per square), (weights, per context token)): what C3, C1,
  C2 and C4, C5 multiply."""
  h, m = config.d_model, config.d_ff
  matrix, reads = (4 * h * h + 2 * h * m) / tp, 3 * h / tp
  return (1.0, matrix, reads / block), (matrix, reads)


def scale(latency: Affine, config: ModelConfig, plan: Plan,
          speedup: float | None = None, itemsize: float = 2,
          tensor_bytes_per_s: float = math.inf,
          pipe_bytes_per_s: float = math.inf, hop_s: float = 0.0) -> Affine:
  """An Affine measured on one device, for another plan.

  Rules:
    - tensor: every constant is divided by the speed-up K of DistServe's Eq. 3
      (1 <= K <= tp; measure it: `speedup`); then each layer adds two
      all-reduces, 2 (tp - 1) / tp of the activations over the link each, and
      2 hop_s.
    - pipeline: the pass over all layers stays, and each of the pp - 1 hops
      adds the activations over the link and hop_s.

  Args:
    latency: of Plan(1, 1). speedup: K; None for tp, the ideal.
    tensor_bytes_per_s, pipe_bytes_per_s: of the links, one direction.
    hop_s: fixed seconds of a message.
  """
  faster = plan.tp if speedup is None else speedup
  require(1 <= faster <= plan.tp, 'speedup', faster, f'from 1 to tp={plan.tp}')
  require(latency.pp == 1, 'latency.pp', latency.pp,
          '1: a latency of one device is scaled')
  token = config.d_model * itemsize
  tensor = 4 * config.num_layers * (plan.tp - 1) / plan.tp
  each = (tensor * token / tensor_bytes_per_s
          + (plan.pp - 1) * token / pipe_bytes_per_s)
  fixed = hop_s * ((plan.pp - 1)
                   + 2 * config.num_layers * (plan.tp > 1))

  def scaled(constants: tuple[float, ...], token_at: int) -> tuple[float, ...]:
    out = [x / faster for x in constants]
    out[0] += fixed
    out[token_at] += each
    return tuple(out)
  return dataclasses.replace(
      latency, piece_s=latency.piece_s / faster,
      prefill=scaled(latency.prefill, 1),
      decode=scaled(latency.decode, 2),
      decode_large=latency.decode_large and scaled(latency.decode_large, 2),
      mixed=latency.mixed and scaled(latency.mixed, 1), pp=plan.pp)


def speedup(single: Latency, sharded: Latency, pieces: Pieces) -> float:
  """K of DistServe's Eq. 3: how much faster `sharded` prefills."""
  return single.prefill_s(pieces) / sharded.prefill_s(pieces)


@dataclasses.dataclass(frozen=True)
class Link:
  """KV from one instance to another: base_s + bytes / bytes_per_s.

  kv_bytes: of a token, all layers. beside: pages are read while the source's
  steps go on; else behind those in flight, which own the cache in turn, as on
  our engine.
  """

  base_s: float
  bytes_per_s: float
  kv_bytes: float
  beside: bool = False

  def __post_init__(self):
    require(is_nonnegative(self.base_s), 'Link.base_s', self.base_s,
            '0 or more')
    require(isinstance(self.beside, bool), 'Link.beside', self.beside,
            'true or false')
    for field in ('bytes_per_s', 'kv_bytes'):
      value = getattr(self, field)
      require(is_positive(value), f'Link.{field}', value, 'above 0')

  def migrate_s(self, num_tokens: int) -> float:
    """Seconds of a migration of so many tokens, alone on the link."""
    return self.base_s + num_tokens * self.kv_bytes / self.bytes_per_s


def saturation_tokens(latency: Latency, share: float = 0.95,
                      limit: int = 32768,
                      prompt_len: int | None = None) -> int:
  """L_m: the fewest tokens of a prefill batch that reach this share of the
  best prefill throughput (tokens/s) of any batch up to `limit`.

  Args:
    prompt_len: the batch is made of prompts this long; None: of one prompt,
      whose attention grows with its length.
  """
  require(0 < share <= 1, 'share', share, 'in (0, 1]')

  def rate(n):
    each = prompt_len or n
    pieces = [(0, min(each, n - start)) for start in range(0, n, each)]
    seconds = latency.prefill_s(tuple(pieces))
    return n / seconds if seconds else math.inf

  sizes = sorted({*(round(1.02**i) for i in range(
      int(math.log(limit, 1.02)) + 1)), limit, *(
          b for b in getattr(latency, 'buckets', Buckets()).tokens
          if b <= limit)})
  rates = [rate(n) for n in sizes]
  enough = share * max(rates)
  first = next(i for i, r in enumerate(rates) if r >= enough)
  low, high = (sizes[first - 1] if first else 0), sizes[first]
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if rate(middle) >= enough else (middle, high)
  return high


def largest_batch(latency: Latency, tpot_s: float, context: int,
                  limit: int = 4096) -> int:
  """The largest decode batch within tpot_s; 0: not even one row is.

  Args:
    context: tokens of each row. limit: the largest that is tried.
  """
  return max((b for b in range(1, limit + 1)
              if latency.decode_s(b, b * context) + latency.host_s <= tpot_s),
             default=0)
