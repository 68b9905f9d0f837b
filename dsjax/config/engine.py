"""Shapes and limits of instances."""

import dataclasses
import math

from dsjax.config.checks import is_integer, is_number, make_plain, require
from dsjax.config.placement import ROLES

KV_DTYPES = ('float32', 'bfloat16', 'int8', 'float8_e4m3fn', 'float8_e5m2')


@dataclasses.dataclass(frozen=True)
class InstanceConfig:
  """Capacity of one instance, as the scheduler sees it.

  Attributes:
    role: prefill | decode | colocated | chunked | flexible.
    num_pages: pages in its pool; page_size: tokens a page (C).
    max_seqs: requests that may hold pages at a time, of all micro-batches
      together (also the largest decode batch).
    prefill_tokens: tokens of a prefill batch; L_m of the paper for prefill
      and colocated, the token budget (decode rows included) for chunked, the
      most that a policy may let into a step for flexible. A longer prompt is
      run in chunks of this size.
    prefill_seqs: most requests in one prefill batch.
    pp: pipeline stages; as many disjoint micro-batches decode in turn.
    host_pages: of host memory, for what its prefix cache evicts and for rows
      that are preempted; 0: none.
    kv_dtype: of its KV cache. Instances of another one do not lend what they
      have kept.
  """

  role: str
  num_pages: int
  page_size: int
  max_seqs: int
  prefill_tokens: int
  prefill_seqs: int
  pp: int = 1
  host_pages: int = 0
  kv_dtype: str = ''

  def __post_init__(self):
    make_plain(self)
    require(is_integer(0, 2**31 - 1)(self.host_pages),
            'InstanceConfig.host_pages', self.host_pages,
            'an integer of 0 or more')
    require(self.role in ROLES, 'InstanceConfig.role', self.role,
            f'one of {tuple(ROLES)}')
    require(self.kv_dtype in ('', *KV_DTYPES), 'InstanceConfig.kv_dtype',
            self.kv_dtype, f"'' or one of {KV_DTYPES}")
    for field in ('num_pages', 'page_size', 'max_seqs', 'prefill_tokens',
                  'prefill_seqs', 'pp'):
      value = getattr(self, field)
      require(is_integer(1, 2**31 - 1)(value), f'InstanceConfig.{field}', value,
              'an integer of 1 or more')
    require(not self.mixes or self.prefill_tokens > self.max_seqs,
            'InstanceConfig.prefill_tokens', self.prefill_tokens,
            f'above max_seqs={self.max_seqs} in the {self.role} role, where '
            'decode rows share the budget')

  @property
  def prefills(self) -> bool:
    """It takes prompts."""
    return ROLES[self.role].prefills

  @property
  def decodes(self) -> bool:
    """It holds rows and continues them."""
    return ROLES[self.role].decodes

  @property
  def mixes(self) -> bool:
    """Prompts and rows share a step."""
    return ROLES[self.role].mixes

  @property
  def flips(self) -> bool:
    """It may do all of this; a policy says what it does now."""
    return ROLES[self.role].flips


def with_host(instance: InstanceConfig, host_bytes: float, page_bytes: int,
              owner: str) -> InstanceConfig:
  """An instance with as many pages of host memory as so many bytes hold.

  Raises:
    InputError: these are fewer than a page's, or too many; it names
      owner.host_bytes.
  """
  require(page_bytes <= host_bytes < page_bytes * 2**31 or not host_bytes,
          f'{owner}.host_bytes', host_bytes,
          f'0, or {page_bytes} to {page_bytes * 2**31 - 1}: pages of '
          f'{page_bytes} bytes')
  return dataclasses.replace(instance,
                             host_pages=int(host_bytes // page_bytes))


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
    least_tokens: of the smallest prefill that is compiled; the next is twice
      as large, and so on. least_rows: the same of a decode batch.
    depth, run_ahead: see scheduler.Config.
    transfer_pages: most pages a migration copies at a time.
    dtype: of weights: float32 or bfloat16.
    kv_dtype: of the KV cache, one of KV_DTYPES (of a byte: with a scale for
      every token and kv head); None for dtype. decode_kv_dtype: the same for
      the decode role; None for kv_dtype.
    away: instances, by number, that are not there when the server opens. They
      are built and compiled, and give their cache back; `restore` lets one
      join.
    checksum: compare a checksum of the KV on both sides of every migration.
    prefix_cache: full pages stay until their room is needed, for requests
      that begin with the same tokens. Comparisons that are to have none, as
      published baselines, say False.
    stream_kv: the KV of a prompt that runs in chunks goes to its decode
      instance chunk by chunk, not after the last.
    host_bytes: host memory of each instance, for what the prefix cache of one
      that takes prompts evicts, and for rows that are preempted; 0: none.
    attention: implementation of attention and of what reads and writes
      pages: 'xla', 'cpu' (attention and products in C++, where it was built;
      weights are packed beside those that were loaded), 'pallas' (GPU
      kernels), 'pallas_interpret' (the same kernels interpreted on CPU,
      slowly) or 'mosaic' (attention in kernels for Hopper GPUs, the rest as
      'pallas'; its interpreter moves data implicitly, which serving forbids);
      None to choose by device and shapes.
    tries: faults that a request survives; the next one fails it.
    lease_s: that a hand-off may take before its target must stop.
    stall_s: without a step of its oldest command an instance counts as lost.
    silent_s: without an answer its process does (of a cluster), or without a
      word (then 10 s at least) one that starts.
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
  least_tokens: int = 32
  least_rows: int = 1
  depth: int = 2
  run_ahead: int | None = None
  transfer_pages: int = 64
  dtype: str = 'float32'
  kv_dtype: str | None = None
  decode_kv_dtype: str | None = None
  checksum: bool = False
  prefix_cache: bool = True
  stream_kv: bool = False
  host_bytes: int = 0
  attention: str | None = None
  decode_page_size: int | None = None
  tries: int = 3
  lease_s: float = 30.0
  stall_s: float = 300.0
  silent_s: float = 30.0
  restarts: int = 8
  restart_s: float = 0.5
  away: tuple[int, ...] = ()

  def __post_init__(self):
    make_plain(self)
    for field in ('max_len', 'page_size', 'max_seqs', 'prefill_tokens',
                  'prefill_seqs', 'chunk_tokens', 'least_tokens', 'least_rows',
                  'depth', 'transfer_pages'):
      value = getattr(self, field)
      require(is_integer(1, 2**31 - 1)(value), f'EngineConfig.{field}', value,
              'an integer of 1 or more')
    for field in ('num_pages', 'memory_bytes', 'run_ahead',
                  'decode_page_size'):
      value = getattr(self, field)
      require(value is None or is_integer(1, 2**31 - 1)(value),
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
    require(self.attention in (None, 'xla', 'cpu', 'pallas',
                               'pallas_interpret', 'mosaic'),
            'EngineConfig.attention', self.attention, "None, 'xla', 'cpu', "
            "'pallas', 'pallas_interpret' or 'mosaic'")
    for field in ('checksum', 'prefix_cache', 'stream_kv'):
      value = getattr(self, field)
      require(isinstance(value, bool), f'EngineConfig.{field}', value,
              'True or False')
    require(is_integer(0, 2**63)(self.host_bytes), 'EngineConfig.host_bytes',
            self.host_bytes, 'an integer of 0 or more')
    self._check_faults()

  def _check_faults(self):
    if isinstance(self.away, list):  # of JSON
      object.__setattr__(self, 'away', tuple(self.away))
    require(isinstance(self.away, tuple) and all(
        is_integer(0, 2**31 - 1)(index) for index in self.away),
            'EngineConfig.away', self.away, 'a tuple of instance numbers')
    for field in ('tries', 'restarts'):
      value = getattr(self, field)
      require(is_integer(0, 2**31 - 1)(value), f'EngineConfig.{field}', value,
              'an integer of 0 or more')
    for field in ('lease_s', 'stall_s', 'silent_s', 'restart_s'):
      value, zero = getattr(self, field), field == 'restart_s'
      require(is_number(0, math.inf, low_open=not zero)(value),
              f'EngineConfig.{field}', value,
              'seconds, 0 or more' if zero else 'seconds above 0')

  def kv_dtype_of(self, role: str) -> str:
    """The dtype of the KV cache of an instance in this role."""
    kv_dtype = self.kv_dtype or self.dtype
    if ROLES[role].prefills:
      return kv_dtype
    return self.decode_kv_dtype or kv_dtype

  @property
  def row_buckets(self) -> tuple[int, ...]:
    """Decode batch sizes that are compiled."""
    return _buckets(self.max_seqs, self.least_rows, 2)

  def token_buckets(self, limit: int) -> tuple[int, ...]:
    """Packed prefill sizes that are compiled, up to `limit`."""
    return _buckets(limit, self.least_tokens, 2)

  @property
  def page_buckets(self) -> tuple[int, ...]:
    """Numbers of pages that a migration copies at a time."""
    return _buckets(self.transfer_pages, 1, 4)

  def instance(self, role: str, pp: int = 1) -> InstanceConfig:
    """The InstanceConfig of an instance of `pp` stages in this role."""
    does, size = ROLES[role], self.page_size
    if not does.prefills and self.decode_page_size is not None:
      size = self.decode_page_size
    pages = self.num_pages
    if pages is None:
      pages = self.max_seqs * -(-self.max_len // size)
    tokens = (self.chunk_tokens if does.mixes and not does.flips
              else self.prefill_tokens)
    return InstanceConfig(role, pages, size, self.max_seqs, tokens,
                          self.prefill_seqs, pp,
                          kv_dtype=self.kv_dtype_of(role))
