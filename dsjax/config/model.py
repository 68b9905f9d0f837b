"""The shape of a decoder-only transformer."""

import dataclasses

from dsjax.config.checks import (
    is_integer,
    is_nonnegative,
    is_positive,
    require,
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the trained context.

  kind: 'linear' (every frequency divided by factor) or 'llama3' (those with
  a wavelength above original_len / low_freq_factor divided by factor, those
  below original_len / high_freq_factor kept, a ramp in between).
  """

  kind: str
  factor: float
  original_len: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0

  def __post_init__(self) -> None:
    require(self.kind in ('linear', 'llama3'), 'RopeScaling.kind', self.kind,
            "'linear' or 'llama3'")
    require(is_positive(self.factor),
            'RopeScaling.factor', self.factor, 'a number above 0')
    if self.kind == 'llama3':
      require(is_integer(1, 2**31 - 1)(self.original_len),
              'RopeScaling.original_len', self.original_len, 'tokens')
      require(0 < self.low_freq_factor < self.high_freq_factor,
              'RopeScaling.high_freq_factor', self.high_freq_factor,
              f'above low_freq_factor={self.low_freq_factor} > 0')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer (notation: docs/design.md).

  The defaults are the llama family; the other fields are what the others
  change.

  Attributes:
    num_layers: L. d_model: D. num_heads: N. num_kv_heads: K. head_dim: H.
    d_ff: F (of one expert, where there are experts). vocab_size: V.
    max_len: context length in tokens.
    rope_base: base of the rotary frequencies; rope_local_base: that of
      windowed layers, where it differs (Gemma 3).
    rope_scaling: a RopeScaling or None; never of windowed layers that have
      a base of their own.
    norm_eps: epsilon of every norm.
    tied: the output head is the embedding.
    bos_id, eos_ids: token ids; a stream ends at any of eos_ids.
    norm: 'rms', or 'layer' (mean and bias too).
    positions: 'rope', or 'learned' (a table added to the embedding).
    activation: 'silu', 'relu', 'gelu' (exact) or 'gelu_tanh'.
    gated: the feed-forward has a gate: down(act(gate x) * up x).
    qkv_bias, out_bias, mlp_bias: these projections add a bias.
    qk_norm: RMSNorm over H of every query and key head, before rotation.
    post_norms: attention and feed-forward outputs are normed before they are
      added (Gemma 2, 3).
    windows: sliding window of each layer in tokens, itself included; 0 where
      a layer sees everything. Empty: every layer does.
    attn_softcap, logit_softcap: x -> cap tanh(x / cap); 0 for none.
    attn_scale: of q k^T; None for 1 / sqrt(H).
    embed_scale: factor of the embedding (Gemma: sqrt(D)).
    num_experts: E; 0 for a dense feed-forward. experts_per_token: how many
      are summed; renormalize: their weights sum to one.
  """

  name: str
  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  vocab_size: int
  max_len: int
  rope_base: float = 1e4
  norm_eps: float = 1e-5
  tied: bool = True
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()
  norm: str = 'rms'
  positions: str = 'rope'
  activation: str = 'silu'
  gated: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  rope_local_base: float | None = None
  rope_scaling: RopeScaling | None = None
  windows: tuple[int, ...] = ()
  attn_softcap: float = 0.0
  logit_softcap: float = 0.0
  attn_scale: float | None = None
  embed_scale: float = 1.0
  num_experts: int = 0
  experts_per_token: int = 0
  renormalize: bool = True

  def __post_init__(self) -> None:
    for field in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads',
                  'head_dim', 'd_ff', 'vocab_size', 'max_len'):
      value = getattr(self, field)
      require(isinstance(value, int) and value > 0, f'ModelConfig.{field}',
              value, 'an integer above 0')
    require(self.num_heads % self.num_kv_heads == 0, 'ModelConfig.num_heads',
            self.num_heads, f'a multiple of num_kv_heads={self.num_kv_heads}')
    require(self.head_dim % 2 == 0 or self.positions != 'rope',
            'ModelConfig.head_dim', self.head_dim, 'even (rotary pairs)')
    for field, allowed in (
        ('norm', ('rms', 'layer')), ('positions', ('rope', 'learned')),
        ('activation', ('silu', 'relu', 'gelu', 'gelu_tanh'))):
      value = getattr(self, field)
      require(value in allowed, f'ModelConfig.{field}', value,
              f'one of {allowed}')
    object.__setattr__(self, 'windows', tuple(self.windows))
    require(len(self.windows) in (0, self.num_layers)
            and all(is_integer(0, 2**31 - 1)(w) for w in self.windows),
            'ModelConfig.windows', self.windows,
            f'empty or {self.num_layers} integers of 0 or more')
    for field in ('attn_softcap', 'logit_softcap'):
      value = getattr(self, field)
      require(is_nonnegative(value), f'ModelConfig.{field}', value,
              '0 (none) or above')
    require(is_integer(0, 2**31 - 1)(self.num_experts),
            'ModelConfig.num_experts', self.num_experts, '0 or more')
    require(0 <= self.experts_per_token <= self.num_experts
            and bool(self.num_experts) == bool(self.experts_per_token),
            'ModelConfig.experts_per_token', self.experts_per_token,
            f'1 to num_experts={self.num_experts}, 0 without experts')
    require(not self.num_experts or (self.gated and not self.mlp_bias),
            'ModelConfig.num_experts', self.num_experts,
            '0 unless the feed-forward is gated and has no bias')

  @property
  def top_leaves(self) -> tuple[str, ...]:
    """Names of the parameters outside the layers."""
    names = ['embed_VD', 'norm_D']
    names += ['pos_TD'] * (self.positions == 'learned')
    names += ['norm_bias_D'] * (self.norm == 'layer')
    return tuple(names + ['head_VD'] * (not self.tied))

  @property
  def layer_leaves(self) -> tuple[str, ...]:
    """Names of the parameters of a layer: weights are output-first."""
    names = ['attn_norm_D', 'q_NHD', 'k_KHD', 'v_KHD', 'o_DNH', 'mlp_norm_D']
    if self.norm == 'layer':
      names += ['attn_norm_bias_D', 'mlp_norm_bias_D']
    if self.qkv_bias:
      names += ['q_bias_NH', 'k_bias_KH', 'v_bias_KH']
    names += ['o_bias_D'] * self.out_bias
    names += ['q_norm_H', 'k_norm_H'] * self.qk_norm
    if self.post_norms:
      names += ['attn_post_norm_D', 'mlp_post_norm_D']
    if self.num_experts:
      return tuple(names + ['router_ED', 'gate_EFD', 'up_EFD', 'down_EDF'])
    names += ['gate_FD'] * self.gated + ['up_FD', 'down_DF']
    return tuple(names + ['up_bias_F', 'down_bias_D'] * self.mlp_bias)

  def leaf_shape(self, leaf: str) -> tuple[int, ...]:
    """The shape that a parameter's name says."""
    sizes = dict(V=self.vocab_size, D=self.d_model, F=self.d_ff,
                 N=self.num_heads, K=self.num_kv_heads, H=self.head_dim,
                 E=self.num_experts, T=self.max_len)
    return tuple(sizes[letter] for letter in leaf.rsplit('_', 1)[1])

  def window(self, layer: int) -> int:
    """The sliding window of a layer; 0 for none."""
    return self.windows[layer] if self.windows else 0

  def kv_bytes_per_token(self, itemsize: int = 4) -> int:
    """Bytes of keys and values one token keeps over all layers."""
    return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
