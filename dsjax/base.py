"""The values every layer shares: configurations, requests, events, commands.

Plain frozen data; nothing here reads a clock, a file or a device.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

ROLES = ('prefill', 'decode', 'colocated', 'chunked')
KV_DTYPES = ('float32', 'bfloat16', 'int8', 'float8_e4m3fn', 'float8_e5m2')
STAGES = ('prefill_queue', 'prefill', 'migrate', 'decode_queue', 'decode')


class InputError(ValueError):
  """Bad input from outside: names the field and what it may be."""


def require(ok, field, value, allowed):
  """Raises InputError naming the field, its value and the allowed values."""
  if not ok:
    text = repr(value)
    text = text if len(text) <= 120 else f'{text[:100]} ... {text[-15:]}'
    raise InputError(f'{field}={text}: must be {allowed}')


def _number(low, high, low_open=False):
  def test(value):
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value) and value <= high
            and (value > low if low_open else value >= low))
  return test


def _integer(low, high):
  def test(value):
    return (isinstance(value, int) and not isinstance(value, bool)
            and low <= value <= high)
  return test


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

  def __post_init__(self):
    require(self.kind in ('linear', 'llama3'), 'RopeScaling.kind', self.kind,
            "'linear' or 'llama3'")
    require(_number(0, math.inf, low_open=True)(self.factor),
            'RopeScaling.factor', self.factor, 'a number above 0')
    if self.kind == 'llama3':
      require(_integer(1, 2**31 - 1)(self.original_len),
              'RopeScaling.original_len', self.original_len, 'tokens')
      require(0 < self.low_freq_factor < self.high_freq_factor,
              'RopeScaling.high_freq_factor', self.high_freq_factor,
              f'above low_freq_factor={self.low_freq_factor} > 0')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer (notation: README).

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

  def __post_init__(self):
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
            and all(_integer(0, 2**31 - 1)(w) for w in self.windows),
            'ModelConfig.windows', self.windows,
            f'empty or {self.num_layers} integers of 0 or more')
    for field in ('attn_softcap', 'logit_softcap'):
      value = getattr(self, field)
      require(_number(0, math.inf)(value), f'ModelConfig.{field}', value,
              '0 (none) or above')
    require(_integer(0, 2**31 - 1)(self.num_experts),
            'ModelConfig.num_experts', self.num_experts, '0 or more')
    require(0 <= self.experts_per_token <= self.num_experts
            and bool(self.num_experts) == bool(self.experts_per_token),
            'ModelConfig.experts_per_token', self.experts_per_token,
            f'1 to num_experts={self.num_experts}, 0 without experts')
    require(not self.num_experts or (self.gated and not self.mlp_bias),
            'ModelConfig.num_experts', self.num_experts,
            '0 unless the feed-forward is gated and has no bias')

  @property
  def top_leaves(self):
    """Names of the parameters outside the layers."""
    names = ['embed_VD', 'norm_D']
    names += ['pos_TD'] * (self.positions == 'learned')
    names += ['norm_bias_D'] * (self.norm == 'layer')
    return tuple(names + ['head_VD'] * (not self.tied))

  @property
  def layer_leaves(self):
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

  def leaf_shape(self, leaf):
    """The shape that a parameter's name says."""
    sizes = dict(V=self.vocab_size, D=self.d_model, F=self.d_ff,
                 N=self.num_heads, K=self.num_kv_heads, H=self.head_dim,
                 E=self.num_experts, T=self.max_len)
    return tuple(sizes[letter] for letter in leaf.rsplit('_', 1)[1])

  def window(self, layer):
    """The sliding window of a layer; 0 for none."""
    return self.windows[layer] if self.windows else 0

  def kv_bytes_per_token(self, itemsize=4):
    """Bytes of keys and values one token keeps over all layers."""
    return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


@dataclasses.dataclass(frozen=True)
class Plan:
  """Parallelism of one instance: tp tensor shards x pp pipeline stages."""

  tp: int = 1
  pp: int = 1

  def __post_init__(self):
    for field in ('tp', 'pp'):
      value = getattr(self, field)
      require(isinstance(value, int) and value > 0, f'Plan.{field}', value,
              'an integer above 0')

  @property
  def num_devices(self):
    return self.tp * self.pp


@dataclasses.dataclass(frozen=True)
class Placement:
  """Which instances run, each with its Plan, in device order.

  Either prefill and decode are both given (disaggregated), or colocated
  (prefill-priority continuous batching), or chunked (chunked prefill with a
  token budget). Instances are numbered prefill, decode, colocated, chunked.
  """

  prefill: tuple[Plan, ...] = ()
  decode: tuple[Plan, ...] = ()
  colocated: tuple[Plan, ...] = ()
  chunked: tuple[Plan, ...] = ()

  def __post_init__(self):
    for role in ROLES:
      plans = getattr(self, role)
      require(isinstance(plans, (tuple, list))
              and all(isinstance(p, Plan) for p in plans),
              f'Placement.{role}', plans, 'a list of Plan')
      object.__setattr__(self, role, tuple(plans))
    kinds = [bool(self.prefill or self.decode), bool(self.colocated),
             bool(self.chunked)]
    require(sum(kinds) == 1 and bool(self.prefill) == bool(self.decode),
            'Placement', self, 'prefill and decode together, or colocated, '
            'or chunked')

  @property
  def instances(self):
    """((role, Plan), ...) in device order."""
    return tuple((role, p) for role in ROLES for p in getattr(self, role))

  @property
  def num_devices(self):
    return sum(plan.num_devices for _, plan in self.instances)

  @property
  def mode(self):
    return 'disaggregated' if self.prefill else self.instances[0][0]


@dataclasses.dataclass(frozen=True)
class Slo:
  """Latency objectives; a request attains when it meets both (DistServe 1)."""

  ttft_s: float
  tpot_s: float

  def __post_init__(self):
    for field in ('ttft_s', 'tpot_s'):
      value = getattr(self, field)
      require(isinstance(value, (int, float)) and value > 0
              and math.isfinite(value), f'Slo.{field}', value,
              'seconds above 0')


MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request's tokens are chosen and when it stops.

  temperature 0 is greedy. The random draw at a position depends only on
  (seed, position), never on batch, instance or mesh. Penalties follow their
  usual definitions: repetition (over prompt and output, multiplicative),
  presence and frequency (over output, subtractive). `logprobs` asks for the
  log-probability of the chosen token and of that many most likely ones,
  taken from the raw logits. `stop` strings end the text before their first
  occurrence; `stop_token_ids` and the model's EOS end it at that token,
  which is not part of the text. What would end it within the first
  `min_tokens` tokens is passed over (an EOS may be among them).
  """

  max_tokens: int | None = None
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: tuple[tuple[int, float], ...] = ()
  seed: int = 0
  logprobs: int | None = None
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  min_tokens: int = 0

  def __post_init__(self):
    bias = self.logit_bias
    if isinstance(bias, dict):
      bias = bias.items()
    for field, value in (
        ('logit_bias', tuple(tuple(b) for b in bias)),
        ('stop', (self.stop,) if isinstance(self.stop, str) else
         tuple(self.stop)),
        ('stop_token_ids', tuple(self.stop_token_ids))):
      object.__setattr__(self, field, value)
    inf = float('inf')
    tests = (
        ('max_tokens', lambda v: v is None or _integer(1, inf)(v),
         'an integer of 1 or more, or None for the rest of the context'),
        ('temperature', _number(0, 100), 'a number from 0 to 100'),
        ('top_k', _integer(0, 2**31 - 1), '0 (off) or more'),
        ('top_p', _number(0, 1, low_open=True), 'a number in (0, 1]'),
        ('min_p', _number(0, 1), 'a number in [0, 1]'),
        ('repetition_penalty', _number(0, 100, low_open=True),
         'a number in (0, 100]'),
        ('presence_penalty', _number(-100, 100), 'a number in [-100, 100]'),
        ('frequency_penalty', _number(-100, 100), 'a number in [-100, 100]'),
        ('logit_bias', lambda v: len(v) <= MAX_LOGIT_BIAS and all(
            len(b) == 2 and _integer(0, 2**31 - 1)(b[0])
            and _number(-100, 100)(b[1]) for b in v)
         and len({b[0] for b in v}) == len(v),
         f'at most {MAX_LOGIT_BIAS} distinct (token id, number in '
         '[-100, 100])'),
        ('seed', _integer(0, 2**32 - 1), 'an integer in [0, 2**32)'),
        ('logprobs', lambda v: v is None or _integer(0, MAX_LOGPROBS)(v),
         f'None or 0 to {MAX_LOGPROBS}'),
        ('stop', lambda v: len(v) <= 16 and all(
            isinstance(s, str) and s for s in v),
         'at most 16 non-empty strings'),
        ('stop_token_ids', lambda v: all(_integer(0, 2**31 - 1)(t)
                                         for t in v), 'token ids'),
        ('ignore_eos', lambda v: isinstance(v, bool), 'True or False'),
        ('min_tokens', lambda v: _integer(0, self.max_tokens or inf)(v),
         'an integer from 0 to max_tokens'),
    )
    for field, test, allowed in tests:
      value = getattr(self, field)
      require(test(value), f'Sampling.{field}', value, allowed)


@dataclasses.dataclass(frozen=True)
class Request:
  """One request of a workload: prompt token ids, when it arrives, how it ends.

  A workload made from lengths alone has ids without meaning and ignore_eos.
  A simulation reads only len(prompt).
  """

  id: int
  arrival_s: float
  prompt: Sequence[int]
  sampling: Sampling = Sampling()


# --- the scheduler's view of an instance ------------------------------------


@dataclasses.dataclass(frozen=True)
class InstanceConfig:
  """Capacity of one instance, as the scheduler sees it.

  Attributes:
    role: prefill | decode | colocated | chunked.
    num_pages: pages in its pool; page_size: tokens a page (C).
    max_seqs: requests that may hold pages at a time, of all micro-batches
      together (also the largest decode batch).
    prefill_tokens: tokens of a prefill batch; L_m of the paper for prefill
      and colocated, the token budget (decode rows included) for chunked. A
      longer prompt is run in chunks of this size.
    prefill_seqs: most requests in one prefill batch.
    pp: pipeline stages; as many disjoint micro-batches decode in turn.
  """

  role: str
  num_pages: int
  page_size: int
  max_seqs: int
  prefill_tokens: int
  prefill_seqs: int
  pp: int = 1

  def __post_init__(self):
    require(self.role in ROLES, 'InstanceConfig.role', self.role,
            f'one of {ROLES}')
    for field in ('num_pages', 'page_size', 'max_seqs', 'prefill_tokens',
                  'prefill_seqs', 'pp'):
      value = getattr(self, field)
      require(_integer(1, 2**31 - 1)(value), f'InstanceConfig.{field}', value,
              'an integer of 1 or more')
    require(self.role != 'chunked' or self.prefill_tokens > self.max_seqs,
            'InstanceConfig.prefill_tokens', self.prefill_tokens,
            f'above max_seqs={self.max_seqs} in the chunked role, where '
            'decode rows share the budget')


def _buckets(limit, first, factor):
  sizes = [min(first, limit)]
  while sizes[-1] < limit:
    sizes.append(min(sizes[-1] * factor, limit))
  return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Shapes and limits of the instances of a run. Every size is in tokens,
  requests or pages; compiled shapes come from the buckets.

  Attributes:
    max_len: most tokens of prompt and output together.
    page_size: tokens a page (C). decode_page_size: of decode instances, if
      not the same; None: page_size.
    num_pages: pages an instance; None for what fits beside the weights and
      the steps' temporaries in memory_bytes, or, where that is unknown, for
      max_seqs sequences of max_len.
    memory_bytes: of each device; None for what an accelerator says is free
      (a CPU does not say).
    max_seqs: requests resident on an instance; the largest decode batch.
    prefill_tokens: L_m, tokens of a prefill batch (longer prompts run in
      chunks of it). prefill_seqs: most prompts in a batch.
    chunk_tokens: token budget of a step in the chunked role.
    depth, run_ahead: see scheduler.Config.
    transfer_pages: most pages a migration copies at a time.
    dtype: of weights: float32 or bfloat16.
    kv_dtype: of the KV cache, one of KV_DTYPES (of a byte: with a scale for
      every token and kv head); None for dtype. decode_kv_dtype: the same for
      the decode role; None for kv_dtype.
    checksum: compare a checksum of the KV on both sides of every migration.
    attention: implementation of attention and of what reads and writes
      pages: 'xla', 'pallas' (GPU kernels), 'pallas_interpret' (the same
      kernels interpreted on CPU, slowly) or 'mosaic' (attention in kernels
      for Hopper GPUs, the rest as 'pallas'; its interpreter moves data
      implicitly, which serving forbids); None to choose by device and shapes.
    tries: faults that a request survives; the next one fails it.
    lease_s: that a hand-off may take before its target must stop.
    stall_s: without a step of its oldest command an instance counts as lost.
    restarts: how often in a row, without a command completed between, a
      lost instance is started again, empty; then it is given up.
    restart_s: how long after its loss.
  """

  max_len: int = 1024
  page_size: int = 16
  num_pages: int | None = None
  memory_bytes: int | None = None
  max_seqs: int = 16
  prefill_tokens: int = 512
  prefill_seqs: int = 8
  chunk_tokens: int = 256
  depth: int = 2
  run_ahead: int | None = None
  transfer_pages: int = 64
  dtype: str = 'float32'
  kv_dtype: str | None = None
  decode_kv_dtype: str | None = None
  checksum: bool = False
  attention: str | None = None
  decode_page_size: int | None = None
  tries: int = 3
  lease_s: float = 30.0
  stall_s: float = 300.0
  restarts: int = 8
  restart_s: float = 0.5

  def __post_init__(self):
    for field in ('max_len', 'page_size', 'max_seqs', 'prefill_tokens',
                  'prefill_seqs', 'chunk_tokens', 'depth', 'transfer_pages'):
      value = getattr(self, field)
      require(_integer(1, 2**31 - 1)(value), f'EngineConfig.{field}', value,
              'an integer of 1 or more')
    for field in ('num_pages', 'memory_bytes', 'run_ahead',
                  'decode_page_size'):
      value = getattr(self, field)
      require(value is None or _integer(1, 2**31 - 1)(value),
              f'EngineConfig.{field}', value,
              'None or an integer of 1 or more')
    require(self.max_len >= 2, 'EngineConfig.max_len', self.max_len,
            '2 or more')
    require(self.dtype in ('float32', 'bfloat16'), 'EngineConfig.dtype',
            self.dtype, "'float32' or 'bfloat16'")
    for field in ('kv_dtype', 'decode_kv_dtype'):
      value = getattr(self, field)
      require(value in (None, *KV_DTYPES), f'EngineConfig.{field}', value,
              f'None or one of {KV_DTYPES}')
    require(self.attention in (None, 'xla', 'pallas', 'pallas_interpret',
                               'mosaic'), 'EngineConfig.attention',
            self.attention, "None, 'xla', 'pallas', 'pallas_interpret' or "
            "'mosaic'")
    self._check_faults()

  def _check_faults(self):
    for field in ('tries', 'restarts'):
      value = getattr(self, field)
      require(_integer(0, 2**31 - 1)(value), f'EngineConfig.{field}', value,
              'an integer of 0 or more')
    for field in ('lease_s', 'stall_s', 'restart_s'):
      value, zero = getattr(self, field), field == 'restart_s'
      require(_number(0, math.inf, low_open=not zero)(value),
              f'EngineConfig.{field}', value,
              'seconds, 0 or more' if zero else 'seconds above 0')

  def kv_dtype_of(self, role):
    """The dtype of the KV cache of an instance in this role."""
    kv_dtype = self.kv_dtype or self.dtype
    return self.decode_kv_dtype or kv_dtype if role == 'decode' else kv_dtype

  @property
  def row_buckets(self):
    """Decode batch sizes that are compiled."""
    return _buckets(self.max_seqs, 1, 2)

  def token_buckets(self, limit):
    """Packed prefill sizes that are compiled, up to `limit`."""
    return _buckets(limit, 32, 2)

  @property
  def page_buckets(self):
    """Numbers of pages that a migration copies at a time."""
    return _buckets(self.transfer_pages, 1, 4)

  def instance(self, role, pp=1):
    """The InstanceConfig of an instance of `pp` stages in this role."""
    size = self.page_size
    if role == 'decode' and self.decode_page_size is not None:
      size = self.decode_page_size
    pages = self.num_pages
    if pages is None:
      pages = self.max_seqs * -(-self.max_len // size)
    tokens = self.chunk_tokens if role == 'chunked' else self.prefill_tokens
    return InstanceConfig(role, pages, size, self.max_seqs, tokens,
                          self.prefill_seqs, pp)


# --- what the scheduler is told ---------------------------------------------


class Arrived(NamedTuple):
  """A request: prompt tokens, most tokens to generate.

  more: another arrival of the same moment follows at once, so nothing starts
  yet (or the first of a burst would be prefilled alone).
  """
  time_s: float
  id: int
  prompt_len: int
  max_tokens: int
  more: bool = False


class Cancelled(NamedTuple):
  """The client is gone, or asked for the end."""
  time_s: float
  id: int


class PrefillDone(NamedTuple):
  """RunPrefill `number` of `instance` completed; `ended` met EOS or a stop.

  stages_s: when each pipeline stage but the last had done its part.
  """
  time_s: float
  instance: int
  number: int
  ended: tuple[int, ...] = ()
  stages_s: tuple[float, ...] = ()


class DecodeDone(NamedTuple):
  """RunDecode `number` of `instance` completed.

  steps_s: completion time of each of its steps, all of them. ended: (id,
  step) pairs: the request met EOS or a stop with the token of that step
  (0-based). stages_s: when each pipeline stage but the last had done its
  part of each step.
  """
  time_s: float
  instance: int
  number: int
  steps_s: tuple[float, ...] = ()
  ended: tuple[tuple[int, int], ...] = ()
  stages_s: tuple[float, ...] = ()


class Migrated(NamedTuple):
  """The target holds the whole KV of request `id` (hand-off `epoch`)."""
  time_s: float
  id: int
  epoch: int


class MigrateFailed(NamedTuple):
  """Hand-off `epoch` is over and no good; the target writes no more."""
  time_s: float
  id: int
  epoch: int
  reason: str = 'the copy failed'


class Timer(NamedTuple):
  """The lease of hand-off `epoch` ran out: it took too long."""
  time_s: float
  id: int
  epoch: int


class InstanceDown(NamedTuple):
  """An instance is lost with all it held.

  steps_s, ended: of the oldest command in flight, as in DecodeDone: the steps
  whose tokens are out already, fewer than all. back: it may come up again.
  """
  time_s: float
  instance: int
  steps_s: tuple[float, ...] = ()
  ended: tuple[tuple[int, int], ...] = ()
  back: bool = True


class InstanceUp(NamedTuple):
  """An instance is there again, empty; or is to be drained no longer."""
  time_s: float
  instance: int


class Drain(NamedTuple):
  """An instance is to take no more work that another could do."""
  time_s: float
  instance: int


# --- what the scheduler decides ---------------------------------------------


class Chunk(NamedTuple):
  """Prompt tokens [start, stop) of a request; `last`: sample its next token."""
  id: int
  start: int
  stop: int
  pages: tuple[int, ...]
  last: bool


class Row(NamedTuple):
  """A request in a decode batch; at tick t its input token is at base + t.

  The row's pages cover positions up to and including base + until - 1; the
  row takes part in ticks below `until`.
  """
  id: int
  base: int
  until: int
  pages: tuple[int, ...]


class RunPrefill(NamedTuple):
  """Run packed chunks, and, in the chunked role, one tick of decode rows."""
  instance: int
  number: int
  chunks: tuple[Chunk, ...]
  tick: int = 0
  rows: tuple[Row, ...] = ()


class RunDecode(NamedTuple):
  """Run `steps` decode steps of these rows, the first at tick `tick`."""
  instance: int
  number: int
  tick: int
  steps: int
  rows: tuple[Row, ...]


class Migrate(NamedTuple):
  """Copy the KV of `num_tokens` tokens from source pages to target pages."""
  id: int
  epoch: int
  source: int
  source_pages: tuple[int, ...]
  target: int
  target_pages: tuple[int, ...]
  num_tokens: int


class Preempt(NamedTuple):
  """Request lost its pages on `instance`; it will be prefilled again.

  cause: pages (they ran short) or fault (the instance was lost).
  """
  id: int
  instance: int
  cause: str = 'pages'


class Abort(NamedTuple):
  """Hand-off `epoch` is over: `target` must not write its pages any more.

  It must take effect before any later command to the target.
  """
  id: int
  epoch: int
  target: int


class Finish(NamedTuple):
  """Request ended: stop (EOS or a stop condition), length or cancelled."""
  id: int
  reason: str


class Fail(NamedTuple):
  """Request ended by faults; `reason` says which in plain words."""
  id: int
  reason: str


class Reject(NamedTuple):
  """Request can never be served; `reason` says why in plain words."""
  id: int
  reason: str


# --- what a request experienced ---------------------------------------------


@dataclasses.dataclass
class Record:
  """One request's life. Times in seconds on the run's clock.

  token_s holds the completion time of each output token. stage_s sums the
  seconds spent in each of STAGES over the whole life (a preempted request
  visits some twice); they add up to finish_s - arrival_s. finish_s is the
  time of the event that ended it; status is then its Finish's reason.
  preemptions: times its pages were taken for want of pages. retries: times it
  was taken up again after a fault (a lost instance, a failed hand-off).
  """

  id: int
  arrival_s: float
  prompt_len: int
  max_tokens: int
  token_s: list[float] = dataclasses.field(default_factory=list)
  stage_s: dict[str, float] = dataclasses.field(
      default_factory=lambda: dict.fromkeys(STAGES, 0.0))
  finish_s: float | None = None
  # running | stop | length | cancelled | rejected | failed
  status: str = 'running'
  reason: str = ''
  preemptions: int = 0
  migrated_tokens: int = 0
  instances: tuple[int, ...] = ()
  retries: int = 0

  @property
  def ttft_s(self):
    """Arrival to first token."""
    return self.token_s[0] - self.arrival_s if self.token_s else None

  @property
  def tpot_s(self):
    """Mean time per output token after the first; 0 for a single token."""
    if not self.token_s:
      return None
    if len(self.token_s) == 1:
      return 0.0
    return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

  @property
  def itl_s(self):
    """Gaps between successive output tokens."""
    return [b - a for a, b in zip(self.token_s, self.token_s[1:],
                                  strict=False)]


# --- the event log ----------------------------------------------------------

_LOGGED = {t.__name__: t for t in (
    Arrived, Cancelled, PrefillDone, DecodeDone, Migrated, MigrateFailed,
    Timer, InstanceDown, InstanceUp, Drain, Chunk, Row, RunPrefill, RunDecode,
    Migrate, Abort, Preempt, Finish, Fail, Reject)}


def encode(value):
  """An event or command (or a tuple of them) as JSON-ready lists."""
  if isinstance(value, tuple):
    named = [type(value).__name__] if hasattr(value, '_fields') else []
    return named + [encode(v) for v in value]
  return value


def decode(data):
  """The inverse of encode.

  Raises:
    InputError: a name or a field count is unknown.
  """
  if not isinstance(data, list):
    return data
  if data and isinstance(data[0], str):
    kind = _LOGGED.get(data[0])
    require(kind is not None and len(data) - 1 <= len(kind._fields)
            if kind else False, 'log entry', data[0], sorted(_LOGGED))
    return kind(*(decode(v) for v in data[1:]))
  return tuple(decode(v) for v in data)
