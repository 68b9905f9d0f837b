"""Seconds of a step: prefill, decode, mixed (chunked), a KV transfer.

Three forms, one interface (host core: predictions are arithmetic; `fit`
makes them from measurements):

- `Affine`: prefill A + B sum(l) + C sum(l^2), decode A + B context + C batch
  with two pieces of batch sizes (the form that DistServe's code profiles).
  `appendix_a` gives the one of the paper's five constants.
- `Roofline`: operations and bytes counted from the model's shape against a
  device's peaks, for hardware that nobody has measured.
- `Link`: a KV transfer.

A latency has `prefill_s(pieces)`, `decode_s(batch, context)`,
`decode_line(batch)`, `mixed_s(pieces, batch, context)`, `host_s` and `pp`.
pieces: (start, stop) token ranges of prompts, start > 0 for a later chunk;
context: tokens attended to, over all rows. Seconds are those of one batch on
its whole way through the `pp` stages of the instance; a stage takes 1 / pp of
them. host_s is the host's time between two steps, not part of a step.
"""

import dataclasses
import json
import math
import pathlib
from bisect import bisect_left
from typing import NamedTuple

from dsjax.base import InputError, ModelConfig, Plan, require

GIGA, TERA, MS = 1e9, 1e12, 1e-3


class Buckets(NamedTuple):
  """Sizes that are compiled: a batch costs what the next one costs.

  tokens of a prefill, rows of a decode, rows that join a prefill. Empty: a
  batch costs its own size.
  """

  tokens: tuple[int, ...] = ()
  rows: tuple[int, ...] = ()
  mixed_rows: tuple[int, ...] = ()


def round_up(size, buckets):
  """The bucket that a size costs; itself above the largest."""
  at = bisect_left(buckets, size)
  return buckets[at] if at < len(buckets) else size


def sums(pieces):
  """(tokens, stop^2 - start^2) of pieces, summed: a chunk attends to what
  lies before it too, so chunks of a prompt add up to the whole prompt."""
  tokens = squares = 0
  for start, stop in pieces:
    tokens += stop - start
    squares += stop * stop - start * start
  return tokens, squares


def _constants(name, values, count):
  require(isinstance(values, (tuple, list)) and len(values) == count
          and all(_finite(v) for v in values), name, values,
          f'{count} numbers, each 0 or more')
  return tuple(map(float, values))


def _finite(value):
  return (isinstance(value, (int, float)) and not isinstance(value, bool)
          and math.isfinite(value) and value >= 0)


def _positive(value):
  return _finite(value) and value > 0


def _whole(value):
  return (isinstance(value, int) and not isinstance(value, bool)
          and value > 0)


def _check_common(latency):
  kind = type(latency).__name__
  require(_finite(latency.host_s), f'{kind}.host_s', latency.host_s,
          'seconds, 0 or more')
  require(_whole(latency.pp), f'{kind}.pp', latency.pp, 'stages, 1 or more')


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
  """

  prefill: tuple[float, float, float]
  decode: tuple[float, float, float]
  decode_large: tuple[float, float, float] | None = None
  split: int | None = None
  mixed: tuple[float, float, float, float] | None = None
  host_s: float = 0.0
  pp: int = 1
  buckets: Buckets = Buckets()
  piece_s: float = 0.0

  def __post_init__(self):
    for field, count in (('prefill', 3), ('decode', 3), ('decode_large', 3),
                         ('mixed', 4)):
      value = getattr(self, field)
      if value is not None or field in ('prefill', 'decode'):
        object.__setattr__(self, field, _constants(
            f'Affine.{field}', value, count))
    require((self.split is None) == (self.decode_large is None)
            and (self.split is None or _whole(self.split)), 'Affine.split',
            self.split, 'a batch size, with decode_large and only with it')
    require(len(self.buckets) == 3, 'Affine.buckets', self.buckets,
            'tokens, rows, mixed_rows')
    for field, sizes in zip(Buckets._fields, self.buckets, strict=True):
      require(all(map(_whole, sizes))
              and list(sizes) == sorted(set(sizes)),
              f'Affine.buckets.{field}', sizes, 'growing sizes')
    object.__setattr__(self, 'buckets', Buckets(*map(tuple, self.buckets)))
    require(_finite(self.piece_s), 'Affine.piece_s', self.piece_s,
            'seconds, 0 or more')
    _check_common(self)

  def prefill_s(self, pieces):
    """Seconds of a prefill batch; 0 of an empty one."""
    if not pieces:
      return 0.0
    tokens, squares = sums(pieces)
    a, b, c = self.prefill
    return (a + b * round_up(tokens, self.buckets.tokens) + c * squares
            + self.piece_s * (len(pieces) - 1))

  def decode_line(self, batch):
    """(a, b): a step of `batch` rows takes a + b context."""
    a, b, c = self._decode(batch)
    return a + c * round_up(batch, self.buckets.rows), b

  def _decode(self, batch):
    large = self.split is not None and batch > self.split
    return self.decode_large if large else self.decode

  def decode_s(self, batch, context):
    """Seconds of a decode step; 0 of an empty one."""
    a, b = self.decode_line(batch)
    return a + b * context if batch else 0.0

  def mixed_s(self, pieces, batch, context):
    """Seconds of a chunked step: prompt pieces and decode rows together."""
    if not pieces or not batch:
      return self.prefill_s(pieces) + self.decode_s(batch, context)
    tokens, squares = sums(pieces)
    n = (round_up(tokens, self.buckets.tokens)
         + round_up(batch, self.buckets.mixed_rows))
    more = self.piece_s * (len(pieces) - 1)
    if self.mixed is not None:
      a, b, c, d = self.mixed
      return a + b * n + c * squares + d * context + more
    (a, b, c), (a_d, b_d, c_d) = self.prefill, self._decode(batch)
    joint = max(a + b * n, a_d + c_d * n) + c * squares + b_d * context + more
    return min(joint, self.prefill_s(pieces) + self.decode_s(batch, context))


def appendix_a(config, c, block=16, tp=1, host_s=0.0):
  """The latency of DistServe's Appendix A.

    T_prefill = C1 (4 t h^2 + 2 t h m) + C2 3 h t2 / b + C3
    T_decode  = C4 (4 h^2 + 2 h m) + C5 3 h t

  h: D; m: F; b: the attention kernel's block; t: tokens (decode: context);
  t2: sum of squares. The paper's model has as many kv heads as heads and no
  gate. tp divides the work of every product (the paper divides h and m;
  of each product one side only is split). The layers are in the constants.

  Args:
    config: a ModelConfig. c: (C1, ..., C5), seconds.
  """
  c1, c2, c3, c4, c5 = _constants('appendix_a.c', c, 5)
  (_, b, s), (w, t) = appendix_a_features(config, block, tp)
  return Affine((c3, c1 * b, c2 * s), (c4 * w, c5 * t, 0.0), host_s=host_s)


def appendix_a_features(config, block=16, tp=1):
  """((1, per token, per square), (weights, per context token)): what C3, C1,
  C2 and C4, C5 multiply."""
  h, m = config.d_model, config.d_ff
  matrix, reads = (4 * h * h + 2 * h * m) / tp, 3 * h / tp
  return (1.0, matrix, reads / block), (matrix, reads)


def scale(latency, config, plan, speedup=None, itemsize=2,
          tensor_bytes_per_s=math.inf, pipe_bytes_per_s=math.inf, hop_s=0.0):
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
  k = plan.tp if speedup is None else speedup
  require(1 <= k <= plan.tp, 'speedup', k, f'from 1 to tp={plan.tp}')
  require(latency.pp == 1, 'latency.pp', latency.pp,
          '1: a latency of one device is scaled')
  token = config.d_model * itemsize
  tensor = 4 * config.num_layers * (plan.tp - 1) / plan.tp
  each = (tensor * token / tensor_bytes_per_s
          + (plan.pp - 1) * token / pipe_bytes_per_s)
  fixed = hop_s * ((plan.pp - 1)
                   + 2 * config.num_layers * (plan.tp > 1))

  def scaled(constants, token_at):
    if constants is None:
      return None
    out = [x / k for x in constants]
    out[0] += fixed
    out[token_at] += each
    return tuple(out)
  return dataclasses.replace(
      latency, piece_s=latency.piece_s / k,
      prefill=scaled(latency.prefill, 1),
      decode=scaled(latency.decode, 2),
      decode_large=scaled(latency.decode_large, 2),
      mixed=scaled(latency.mixed, 1), pp=plan.pp)


def speedup(one, many, pieces):
  """K of DistServe's Eq. 3: how much faster `many` prefills than `one`."""
  return one.prefill_s(pieces) / many.prefill_s(pieces)


# --- hardware ---------------------------------------------------------------


class Hardware(NamedTuple):
  """Peaks of a device, dense 16-bit matrix products."""

  name: str
  flop_per_s: float
  bytes_per_s: float
  memory_bytes: float
  link_bytes_per_s: float  # to devices of its node, one direction
  source: str


HARDWARE = {
    'a100-80g': Hardware(
        'NVIDIA A100-SXM4-80GB', 312 * TERA, 2039 * GIGA, 80 * GIGA,
        300 * GIGA, 'NVIDIA A100 data sheet: 312 TFLOP/s BF16 dense, 2,039 '
        'GB/s, NVLink 600 GB/s both directions together'),
    'h100-80g': Hardware(
        'NVIDIA H100-SXM5-80GB', 989 * TERA, 3350 * GIGA, 80 * GIGA,
        450 * GIGA, 'NVIDIA H100 data sheet: 1,979 TFLOP/s BF16 with '
        'sparsity (half of it dense), 3.35 TB/s, NVLink 900 GB/s both '
        'directions together'),
}
# Between the nodes of the paper's cluster (DistServe 6.1): 25 Gbps.
PAPER_NODE_BYTES_PER_S = 25e9 / 8


# --- counts -----------------------------------------------------------------


def _size(config, leaf):
  return math.prod(config.leaf_shape(leaf))


def _matrix(leaf):
  return len(leaf.rsplit('_', 1)[1]) > 1


def _expert(leaf):
  return leaf.rsplit('_', 1)[1].startswith('E') and 'F' in leaf


def experts_touched(config, tokens):
  """Experts of a layer that some token chose: E (1 - (1 - k / E)^tokens), if
  every choice is as likely as any other."""
  E, k = config.num_experts, config.experts_per_token
  return E * (1 - (1 - k / E)**tokens) if E else 0.0


def layer_flops(config):
  """Operations of a token in the matrix products of all layers: 2 a weight;
  k of the E experts."""
  share = config.experts_per_token / max(1, config.num_experts)
  return 2 * config.num_layers * sum(
      _size(config, leaf) * (share if _expert(leaf) else 1)
      for leaf in config.layer_leaves if _matrix(leaf)
      and leaf not in ('q_bias_NH', 'k_bias_KH', 'v_bias_KH'))


def layer_weights(config, tokens):
  """Weights that a step of so many tokens reads in all layers."""
  share = experts_touched(config, tokens) / max(1, config.num_experts)
  return config.num_layers * sum(
      _size(config, leaf) * (share if _expert(leaf) else 1)
      for leaf in config.layer_leaves)


def num_params(config):
  """Weights of the whole model."""
  return (config.num_layers * sum(_size(config, x)
                                  for x in config.layer_leaves)
          + sum(_size(config, x) for x in config.top_leaves))


def _pairs_below(n, window):
  """(query, key) pairs of the first n queries of a causal layer."""
  w = min(window, n) if window else n
  return w * (w + 1) // 2 + (n - w) * w


def attended(config, pieces):
  """(pairs, keys): (query, key) pairs and cached tokens read, of all layers.

  A piece reads each token that it can see once (as flash attention does),
  at most the window's.
  """
  pairs = keys = 0
  for window, count in _windows(config):
    for start, stop in pieces:
      pairs += count * (_pairs_below(stop, window)
                        - _pairs_below(start, window))
      keys += count * (stop - (max(0, start - window + 1) if window else 0))
  return pairs, keys


def _windows(config):
  if not config.windows:
    return ((0, config.num_layers),)
  return tuple((w, config.windows.count(w)) for w in set(config.windows))


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Each part of a step takes the longer of its operations and its bytes.

  Parts: the layers' matrix products (weights read once, experts as they are
  touched), the output head of one row a sequence, attention of the prompts,
  attention of the decode rows; then all-reduces and hops. Activations other
  than KV are taken to stay on chip. In decode, windowed layers are charged
  their whole context (a line has no other way), so an upper bound there.

  tensor: operations and bytes are divided by tp, kv heads as they are dealt
  (ceil(K / tp) a device); each layer has two all-reduces of 2 (tp - 1) / tp
  of the activations, over the device's link. pipeline: pp - 1 hops of the
  activations.

  Attributes:
    itemsize, kv_itemsize: bytes of a weight or activation; of a cached value.
    compute, memory: the shares of the peaks that are reached; 1 is a floor
      of the time, not an estimate.
    step_s: fixed seconds of a step. message_s: of an all-reduce or hop.
    pipe_bytes_per_s: between stages; None: the device's link.
  """

  config: ModelConfig
  hardware: Hardware
  tp: int = 1
  pp: int = 1
  itemsize: int = 2
  kv_itemsize: float = 2
  compute: float = 1.0
  memory: float = 1.0
  step_s: float = 0.0
  host_s: float = 0.0
  message_s: float = 0.0
  pipe_bytes_per_s: float | None = None

  def __post_init__(self):
    _check_common(self)
    require(_whole(self.tp), 'Roofline.tp', self.tp, '1 or more')
    for field in ('itemsize', 'kv_itemsize', 'compute', 'memory'):
      value = getattr(self, field)
      require(_positive(value), f'Roofline.{field}', value, 'above 0')
    for field in ('step_s', 'message_s'):
      value = getattr(self, field)
      require(_finite(value), f'Roofline.{field}', value, '0 or more')

  def parts(self, pieces, batch, context):
    """((operations, bytes), ...) of a device, and its seconds of messages.

    Each pair takes the longer of the two; pieces, batch, context: of a step.
    """
    c, tp = self.config, self.tp
    tokens = sum(stop - start for start, stop in pieces) + batch
    rows = len(pieces) + batch
    head = c.vocab_size * c.d_model / tp
    flops = 4 * -(-c.num_heads // tp) * c.head_dim
    size = 2 * -(-c.num_kv_heads // tp) * c.head_dim * self.kv_itemsize
    pairs, keys = attended(c, pieces)
    reads = c.num_layers * context
    moved = tokens * c.d_model * self.itemsize
    link = self.hardware.link_bytes_per_s
    messages_s = (self.pp - 1) * (
        moved / (self.pipe_bytes_per_s or link) + self.message_s)
    if tp > 1:
      messages_s += 2 * c.num_layers * (
          2 * (tp - 1) / tp * moved / link + self.message_s)
    return ((tokens * layer_flops(c) / tp,
             layer_weights(c, tokens) * self.itemsize / tp),
            (2 * rows * head, head * self.itemsize),
            (flops * pairs, size * keys),
            (flops * reads, size * reads)), messages_s

  def prefill_s(self, pieces):
    """Seconds of a prefill batch; 0 of an empty one."""
    return self.mixed_s(pieces, 0, 0)

  def decode_line(self, batch):
    """(a, b): a step of `batch` rows takes a + b context."""
    flops, size = self.parts((), 1, 1)[0][3]
    return self.mixed_s((), batch, 0), max(
        flops / (self.hardware.flop_per_s * self.compute),
        size / (self.hardware.bytes_per_s * self.memory))

  def decode_s(self, batch, context):
    """Seconds of a decode step; 0 of an empty one."""
    return self.mixed_s((), batch, context)

  def mixed_s(self, pieces, batch, context):
    """Seconds of a chunked step: the weights are read once for both."""
    if not pieces and not batch:
      return 0.0
    parts, messages_s = self.parts(pieces, batch, context)
    flop_per_s = self.hardware.flop_per_s * self.compute
    bytes_per_s = self.hardware.bytes_per_s * self.memory
    return self.step_s + messages_s + sum(
        max(flops / flop_per_s, size / bytes_per_s) for flops, size in parts)


# --- transfers --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Link:
  """KV from one instance to another: base_s + bytes / bytes_per_s."""

  base_s: float
  bytes_per_s: float
  kv_bytes: float  # of a token, all layers

  def __post_init__(self):
    require(_finite(self.base_s), 'Link.base_s', self.base_s, '0 or more')
    for field in ('bytes_per_s', 'kv_bytes'):
      value = getattr(self, field)
      require(_positive(value), f'Link.{field}', value, 'above 0')

  def migrate_s(self, num_tokens):
    """Seconds of a migration of so many tokens, alone on the link."""
    return self.base_s + num_tokens * self.kv_bytes / self.bytes_per_s


# --- what a latency implies -------------------------------------------------


def saturation_tokens(latency, share=0.95, limit=32768, prompt_len=None):
  """L_m: the fewest tokens of a prefill batch that reach this share of the
  best prefill throughput (tokens/s) of any batch up to `limit`.

  Args:
    prompt_len: the batch is made of prompts this long; None: of one prompt,
      whose attention grows with its length.
  """
  require(0 < share <= 1, 'share', share, 'in (0, 1]')

  def rate(n):
    each = prompt_len or n
    pieces = [(0, min(each, n - at)) for at in range(0, n, each)]
    return n / latency.prefill_s(tuple(pieces))

  sizes = sorted({*(round(1.02**i) for i in range(
      int(math.log(limit, 1.02)) + 1)), limit, *(
          b for b in getattr(latency, 'buckets', Buckets()).tokens
          if b <= limit)})
  rates = [rate(n) for n in sizes]
  enough = share * max(rates)
  at = next(i for i, r in enumerate(rates) if r >= enough)
  low, high = (sizes[at - 1] if at else 0), sizes[at]
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if rate(middle) >= enough else (middle, high)
  return high


def largest_batch(latency, tpot_s, context, limit=4096):
  """The largest decode batch within tpot_s; 0: not even one row is.

  Args:
    context: tokens of each row. limit: the largest that is tried.
  """
  return max((b for b in range(1, limit + 1)
              if latency.decode_s(b, b * context) + latency.host_s <= tpot_s),
             default=0)


# --- published --------------------------------------------------------------

# DistServe's released profile of its engine on A100-80GB, in ms, by (model,
# tp): prefill (A, B, C), decode of at most 95 rows, decode of more. Source:
# the repository's simdistserve data, main branch. Its prefill constants were
# multiplied by 1.1 after the fit (commit 4c68ed9, "Realign the curve").
PUBLISHED_SPLIT, PUBLISHED_REALIGNED = 95, 1.1
PUBLISHED_MS = {
    ('opt-13b', 1): ((18.1025, .101912, 7.12226e-6),
                     (19.9347, 6.26936e-4, .0385070),
                     (7.16619, 5.79800e-4, .158311)),
    ('opt-13b', 2): ((14.7430, .0685772, 2.44957e-6),
                     (13.2948, 3.41092e-4, .0629639),
                     (10.6387, 3.11834e-4, .0856291)),
    ('opt-13b', 4): ((12.0623, .0380814, 5.22625e-7),
                     (10.2562, 1.87867e-4, .0326927),
                     (10.4835, 1.71209e-4, .0456665)),
    ('opt-66b', 2): ((43.0588, .274229, 2.24780e-5),
                     (48.2880, 9.42434e-4, .127550),
                     (28.7277, 4.74485e-4, .296178)),
    ('opt-66b', 3): ((32.9982, .195683, 1.22052e-5),
                     (35.8015, 5.84500e-4, .0952670),
                     (22.6539, 5.35849e-4, .208514)),
    ('opt-66b', 4): ((29.4416, .151352, 8.31745e-6),
                     (30.7603, 4.51948e-4, .0632842),
                     (27.4708, 4.04685e-4, .124807)),
    ('opt-66b', 8): ((25.4907, .106592, 3.39105e-6),
                     (23.1551, 2.26915e-4, .0480064),
                     (21.7177, 3.75809e-4, .0897861)),
}
# KV capacity in tokens that the same repository lists, by (model, tp, pp).
PUBLISHED_TOKENS = {
    ('opt-13b', 1, 1): 66144, ('opt-13b', 2, 1): 163008,
    ('opt-13b', 4, 1): 356736, ('opt-66b', 2, 1): 11600,
    ('opt-66b', 4, 1): 78496, ('opt-66b', 2, 2): 78512,
    ('opt-66b', 8, 1): 212304, ('opt-175b', 3, 3): 76192,
    ('opt-175b', 4, 3): 126160, ('opt-175b', 8, 1): 59520,
    ('opt-175b', 8, 8): 992400,
}


def published(model, plan, realigned=True, host_s=0.0, hop_s=1e-3):
  """The latency of DistServe's engine on A100-80GB.

  Args:
    model: 'opt-13b' or 'opt-66b'. plan: a Plan; tp as it was profiled.
    realigned: as released; False takes the prefill's factor 1.1 out again.
    host_s: the released simulator adds 2 ms a step.
    hop_s: added for every stage after the first (derived: the released
      simulator's 1 ms a stage; its profile has no pipelines).

  Raises:
    InputError: nothing is published for them.
  """
  require((model, plan.tp) in PUBLISHED_MS, 'published', (model, plan.tp),
          f'one of {sorted(PUBLISHED_MS)}')
  hops = (plan.pp - 1) * hop_s
  prefill, small, large = ([x * MS for x in c]
                           for c in PUBLISHED_MS[model, plan.tp])
  if not realigned:
    prefill = [x / PUBLISHED_REALIGNED for x in prefill]
  for constants in (prefill, small, large):
    constants[0] += hops
  return Affine(tuple(prefill), tuple(small), tuple(large), PUBLISHED_SPLIT,
                host_s=host_s, pp=plan.pp)


# --- files ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Profile:
  """What was measured of a model on a device.

  latencies: {Plan: Affine}. links: {(Plan, Plan): Link}, prefill's plan to
  decode's. source: what measured it, in words.
  """

  model: str
  device: str
  latencies: dict[Plan, Affine]
  links: dict[tuple[Plan, Plan], Link] = dataclasses.field(
      default_factory=dict)
  source: str = ''


def _name(plan):
  return f'{plan.tp}x{plan.pp}'


def _plan(path, field, text):
  parts = text.split('x')
  if len(parts) != 2 or not all(p.isdecimal() and int(p) for p in parts):
    raise InputError(f'{path}: {field}={text!r}: must be a plan TPxPP, such '
                     'as 2x1')
  return Plan(*map(int, parts))


def save(path, profile):
  """Writes a Profile as JSON that `load` reads."""
  data = {
      'model': profile.model, 'device': profile.device,
      'source': profile.source,
      'latencies': {_name(plan): dataclasses.asdict(x) | {
          'buckets': x.buckets._asdict()}
                    for plan, x in profile.latencies.items()},
      'links': {f'{_name(a)}>{_name(b)}': dataclasses.asdict(link)
                for (a, b), link in profile.links.items()},
  }
  pathlib.Path(path).write_text(json.dumps(data, indent=1) + '\n')


def load(path):
  """Reads a Profile.

  Raises:
    InputError naming the file and the field.
  """
  try:
    data = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise InputError(f'{path}: is not JSON: {error}') from error
  data = _fields(path, '', data, ('model', 'device', 'latencies'),
                 ('links', 'source'))
  for field in ('model', 'device', 'source'):
    if not isinstance(data.get(field, ''), str):
      raise InputError(f'{path}: {field}={data[field]!r}: must be text')
  latencies, links = {}, {}
  for name, value in _fields(path, 'latencies', data['latencies']).items():
    where = f'latencies.{name}'
    plan = _plan(path, 'latencies', name)
    latencies[plan] = _made(path, where, Affine, value)
    if latencies[plan].pp != plan.pp:
      raise InputError(f'{path}: {where}.pp={latencies[plan].pp}: must be '
                       f'{plan.pp}')
  for name, value in _fields(path, 'links', data.get('links', {})).items():
    ends = name.split('>')
    if len(ends) != 2:
      raise InputError(f'{path}: links={name!r}: must be PLAN>PLAN, such as '
                       '2x1>1x1')
    links[tuple(_plan(path, 'links', e) for e in ends)] = _made(
        path, f'links.{name}', Link, value)
  return Profile(data['model'], data['device'], latencies, links,
                 data.get('source', ''))


def _fields(path, where, value, needed=(), more=None):
  name = where or 'the file'
  if not isinstance(value, dict):
    raise InputError(f'{path}: {name}={str(value)[:60]}: must be an object')
  dot = f'{where}.' if where else ''
  for field in needed:
    if field not in value:
      raise InputError(f'{path}: {dot}{field}: must be present')
  for field in value if more is not None else ():
    if field not in (*needed, *more):
      raise InputError(f'{path}: {dot}{field}: is not known: must be one of '
                       f'{(*needed, *more)}')
  return value


def _made(path, where, kind, value):
  fields = dataclasses.fields(kind)
  needed = [f.name for f in fields if f.default is dataclasses.MISSING]
  value = dict(_fields(path, where, value, needed, [
      f.name for f in fields if f.name not in needed]))
  if 'buckets' in value:
    found = _fields(path, f'{where}.buckets', value['buckets'],
                    Buckets._fields, ())
    for name, sizes in found.items():
      if not isinstance(sizes, list):
        raise InputError(f'{path}: {where}.buckets.{name}={sizes!r}: must be '
                         'a list')
    value['buckets'] = Buckets(**{k: tuple(v) for k, v in found.items()})
  try:
    return kind(**value)
  except InputError as error:
    raise InputError(f'{path}: {where}: {error}') from error
