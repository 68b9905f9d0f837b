"""Seconds of a step from counts: the model's shape against a device's peaks.

For hardware that has not been measured. A Roofline is a latency: see latency.
"""

import dataclasses
import math

from dsjax.config.checks import is_positive, is_positive_int, require
from dsjax.config.model import ModelConfig
from dsjax.simulation.hardware import Hardware, Shares, check_shares
from dsjax.simulation.latency import Pieces, check_common


def _size(config, leaf):
  return math.prod(config.leaf_shape(leaf))


def _matrix(leaf):
  return len(leaf.rsplit('_', 1)[1]) > 1


def _expert(leaf):
  return leaf.rsplit('_', 1)[1].startswith('E') and 'F' in leaf


def experts_touched(config: ModelConfig, tokens: int) -> float:
  """Experts of a layer that some token chose: E (1 - (1 - k / E)^tokens), if
  every choice is as likely as any other."""
  E, k = config.num_experts, config.experts_per_token
  return E * (1 - (1 - k / E)**tokens) if E else 0.0


def layer_flops(config: ModelConfig) -> float:
  """Operations of a token in the matrix products of all layers: 2 a weight;
  k of the E experts."""
  share = config.experts_per_token / max(1, config.num_experts)
  return 2 * config.num_layers * sum(
      _size(config, leaf) * (share if _expert(leaf) else 1)
      for leaf in config.layer_leaves if _matrix(leaf)
      and leaf not in ('q_bias_NH', 'k_bias_KH', 'v_bias_KH'))


def layer_weights(config: ModelConfig, tokens: int) -> float:
  """Weights that a step of so many tokens reads in all layers."""
  share = experts_touched(config, tokens) / max(1, config.num_experts)
  return config.num_layers * sum(
      _size(config, leaf) * (share if _expert(leaf) else 1)
      for leaf in config.layer_leaves)


def num_params(config: ModelConfig) -> int:
  """Weights of the whole model."""
  return (config.num_layers * sum(_size(config, x)
                                  for x in config.layer_leaves)
          + sum(_size(config, x) for x in config.top_leaves))


def _pairs_below(n, window):
  """(query, key) pairs of the first n queries of a causal layer."""
  w = min(window, n) if window else n
  return w * (w + 1) // 2 + (n - w) * w


def attended(config: ModelConfig, pieces: Pieces) -> tuple[int, int]:
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
    shares: what is reached of the peaks; the default is a floor of the time,
      not an estimate.
    pipe_bytes_per_s: between stages; None: as over the device's link.
  """

  config: ModelConfig
  hardware: Hardware
  tp: int = 1
  pp: int = 1
  itemsize: int = 2
  kv_itemsize: float = 2
  shares: Shares = Shares()
  host_s: float = 0.0
  pipe_bytes_per_s: float | None = None

  def __post_init__(self):
    check_common(self)
    require(is_positive_int(self.tp), 'Roofline.tp', self.tp, '1 or more')
    for field in ('itemsize', 'kv_itemsize'):
      value = getattr(self, field)
      require(is_positive(value), f'Roofline.{field}', value, 'above 0')
    check_shares(self.shares, 'Roofline.shares')

  def parts(
      self, pieces: Pieces, batch: int, context: float
  ) -> tuple[tuple[tuple[float, float], ...], float, float]:
    """((operations, bytes), ...) of a device; bytes over its link; seconds
    of messages besides.

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
    layers = 2 * c.num_layers * (tp > 1)
    linked = layers * 2 * (tp - 1) / tp * moved
    fixed_s = self.shares.message_s * (layers + self.pp - 1)
    if self.pipe_bytes_per_s is None:
      linked += (self.pp - 1) * moved
    else:
      fixed_s += (self.pp - 1) * moved / self.pipe_bytes_per_s
    return ((tokens * layer_flops(c) / tp,
             layer_weights(c, tokens) * self.itemsize / tp),
            (2 * rows * head, head * self.itemsize),
            (flops * pairs, size * keys),
            (flops * reads, size * reads)), linked, fixed_s

  def prefill_s(self, pieces: Pieces) -> float:
    """Seconds of a prefill batch; 0 of an empty one."""
    return self.mixed_s(pieces, 0, 0)

  def decode_line(self, batch: int) -> tuple[float, float]:
    """(a, b): a step of `batch` rows takes a + b context."""
    flops, size = self.parts((), 1, 1)[0][3]
    flop_per_s, bytes_per_s, _ = self._rates()
    return self.mixed_s((), batch, 0), max(flops / flop_per_s,
                                           size / bytes_per_s)

  def _rates(self):
    """(operations, bytes of memory, bytes of the link) a second."""
    device, reached = self.hardware, self.shares
    return (device.flop_per_s * reached.compute,
            device.bytes_per_s * reached.memory,
            device.link_bytes_per_s * reached.link)

  def decode_s(self, batch: int, context: float) -> float:
    """Seconds of a decode step; 0 of an empty one."""
    return self.mixed_s((), batch, context)

  def mixed_s(self, pieces: Pieces, batch: int, context: float) -> float:
    """Seconds of a chunked step: the weights are read once for both."""
    if not pieces and not batch:
      return 0.0
    parts, linked, fixed_s = self.parts(pieces, batch, context)
    flop_per_s, bytes_per_s, link_bytes_per_s = self._rates()
    return (self.config.num_layers * self.shares.layer_s + fixed_s
            + linked / link_bytes_per_s + sum(
                max(flops / flop_per_s, size / bytes_per_s)
                for flops, size in parts))
