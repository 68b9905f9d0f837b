"""The shape of a decoder-only transformer."""

import dataclasses

from dsjax.config.checks import (
    is_integer,
    is_nonnegative,
    is_positive,
    is_positive_int,
    make_plain,
    require,
)


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
    rope_width: how many numbers of a head rotate, R; None for all H.
    rope_divisors: of the R / 2 frequencies (config/rope.py), or empty;
      rope_gain: factor of cos and sin. Neither is of windowed layers that
      have a base of their own.
    rotated: whether each layer rotates; empty: every layer does.
    norm_eps: epsilon of every norm.
    tied: the output head is the embedding.
    bos_id, eos_ids: token ids; a stream ends at any of eos_ids.
    norm: 'rms', or 'layer' (mean and bias too).
    positions: 'rope', or 'learned' (a table added to the embedding).
    activation: 'silu', 'relu', 'gelu' (exact) or 'gelu_tanh'.
    gated: the feed-forward has a gate: down(act(gate x) * up x).
    qkv_bias, out_bias, mlp_bias: these projections add a bias.
    qk_norm: RMSNorm over H of every query and key head, before rotation.
    joint_norm: (N, K) where that norm is over all heads together (OLMo 2);
      empty for each by itself. Of a model cut for shards: how many heads
      count, replicas too and padding not.
    pre_norms: attention and feed-forward inputs are normed. post_norms: their
      outputs are, before they are added (Gemma 2, 3; OLMo 2: only these).
    parallel: attention and feed-forward read the same hidden states, and both
      are added to them (GPT-NeoX).
    windows: sliding window of each layer in tokens, itself included; 0 where
      a layer sees everything. Empty: every layer does.
    attn_softcap, logit_softcap: x -> cap tanh(x / cap); 0 for none.
    attn_scale: of q k^T; None for 1 / sqrt(H).
    embed_scale: factor of the embedding (Gemma: sqrt(D)); residual_scale: of
      what a layer adds; logit_scale: of the logits (Granite).
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
  joint_norm: tuple[int, ...] = ()
  pre_norms: bool = True
  post_norms: bool = False
  parallel: bool = False
  rope_local_base: float | None = None
  rope_width: int | None = None
  rope_divisors: tuple[float, ...] = ()
  rope_gain: float = 1.0
  rotated: tuple[bool, ...] = ()
  windows: tuple[int, ...] = ()
  attn_softcap: float = 0.0
  logit_softcap: float = 0.0
  attn_scale: float | None = None
  embed_scale: float = 1.0
  residual_scale: float = 1.0
  logit_scale: float = 1.0
  num_experts: int = 0
  experts_per_token: int = 0
  renormalize: bool = True

  def __post_init__(self) -> None:
    make_plain(self)
    for field in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads',
                  'head_dim', 'd_ff', 'vocab_size', 'max_len'):
      value = getattr(self, field)
      require(is_positive_int(value), f'ModelConfig.{field}', value,
              'an integer above 0')
    require(self.num_heads % self.num_kv_heads == 0, 'ModelConfig.num_heads',
            self.num_heads, f'a multiple of num_kv_heads={self.num_kv_heads}')
    require(self.norm == 'rms' or (self.pre_norms and not self.post_norms),
            'ModelConfig.norm', self.norm,
            "'rms' unless inputs are normed and outputs are not")
    for field in ('joint_norm', 'rope_divisors', 'rotated', 'windows',
                  'eos_ids'):
      object.__setattr__(self, field, tuple(getattr(self, field)))
    self._check_rope()
    for field, allowed in (
        ('norm', ('rms', 'layer')), ('positions', ('rope', 'learned')),
        ('activation', ('silu', 'relu', 'gelu', 'gelu_tanh'))):
      value = getattr(self, field)
      require(value in allowed, f'ModelConfig.{field}', value,
              f'one of {allowed}')
    require(len(self.windows) in (0, self.num_layers)
            and all(is_integer(0, 2**31 - 1)(w) for w in self.windows),
            'ModelConfig.windows', self.windows,
            f'empty or {self.num_layers} integers of 0 or more')
    require(is_nonnegative(self.norm_eps), 'ModelConfig.norm_eps',
            self.norm_eps, '0 or above')
    for field in ('rope_base', 'rope_local_base', 'rope_gain', 'attn_scale',
                  'embed_scale', 'residual_scale', 'logit_scale'):
      value = getattr(self, field)
      require(is_positive(value) or value is None
              and getattr(ModelConfig, field) is None, f'ModelConfig.{field}',
              value, 'a number above 0')
    for field in ('attn_softcap', 'logit_softcap'):
      value = getattr(self, field)
      require(is_nonnegative(value), f'ModelConfig.{field}', value,
              '0 (none) or above')
    require(is_integer(0, 2**31 - 1)(self.num_experts),
            'ModelConfig.num_experts', self.num_experts, '0 or more')
    require(is_integer(0, self.num_experts)(self.experts_per_token)
            and bool(self.num_experts) == bool(self.experts_per_token),
            'ModelConfig.experts_per_token', self.experts_per_token,
            f'1 to num_experts={self.num_experts}, 0 without experts')
    require(not self.num_experts or (self.gated and not self.mlp_bias),
            'ModelConfig.num_experts', self.num_experts,
            '0 unless the feed-forward is gated and has no bias')

  def _check_rope(self) -> None:
    require(self.head_dim % 2 == 0 or self.positions != 'rope',
            'ModelConfig.head_dim', self.head_dim, 'even (rotary pairs)')
    width = self.head_dim if self.rope_width is None else self.rope_width
    require(is_integer(2, self.head_dim)(width) and width % 2 == 0
            or self.rope_width is None, 'ModelConfig.rope_width',
            self.rope_width, f'even, from 2 to head_dim={self.head_dim}')
    require(len(self.rope_divisors) in (0, width // 2)
            and all(map(is_positive, self.rope_divisors)),
            'ModelConfig.rope_divisors', self.rope_divisors,
            f'empty or {width // 2} numbers above 0')
    require(len(self.rotated) in (0, self.num_layers), 'ModelConfig.rotated',
            self.rotated, f'empty or {self.num_layers} of true and false')

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
    attn, mlp = (['attn_norm_D'], ['mlp_norm_D']) if self.pre_norms else (
        [], [])
    names = [*attn, 'q_NHD', 'k_KHD', 'v_KHD', 'o_DNH', *mlp]
    if self.norm == 'layer':
      names += ['attn_norm_bias_D', 'mlp_norm_bias_D']
    if self.qkv_bias:
      names += ['q_bias_NH', 'k_bias_KH', 'v_bias_KH']
    names += ['o_bias_D'] * self.out_bias
    if self.qk_norm:
      names += (['q_norm_NH', 'k_norm_KH'] if self.joint_norm else
                ['q_norm_H', 'k_norm_H'])
    names += ['attn_post_norm_D', 'mlp_post_norm_D'] * self.post_norms
    if self.num_experts:
      return tuple(names + ['router_ED', 'gate_EFD', 'up_EFD', 'down_EDF'])
    names += ['gate_FD'] * self.gated + ['up_FD', 'down_DF']
    names += ['gate_bias_F'] * (self.gated and self.mlp_bias)
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

  def kind(self, layer: int) -> tuple[int, bool]:
    """(window, whether it rotates) of a layer: layers of a kind are alike."""
    rotates = self.rotated[layer] if self.rotated else True
    return self.window(layer), rotates and self.positions == 'rope'

  def kv_bytes_per_token(self, itemsize: float = 4) -> float:
    """Bytes of keys and values one token keeps over all layers."""
    return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize
