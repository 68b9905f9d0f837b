"""What a call has to do, what its kernel does, and how many programs fit.

Counted from sizes, configs and lengths; nothing is run or timed. The floor
reads and writes each number once. What a kernel moves is every byte that the
loads and stores of all its programs ask for, so numbers that another program
reads again, rows that only fill a block, and the last token, which fills the
last tile, count each time, whether a cache of the device serves them or not.
Mosaic's copies are of whole pages; each of its warpgroups loads the integers.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from dsjax.kernels import decode_attention, paged, prefill_attention
from dsjax.kernels.kv_write import TuningConfig as WriteConfig
from dsjax.kernels.kv_write import largest
from dsjax.kernels.page_copy import TuningConfig as CopyConfig
from dsjax.kernels.shapes import Shaped

if TYPE_CHECKING:
  from dsjax.kernels import mosaic  # not every JAX has it

INT = 4  # bytes of a table's entry, a length, a position


class Work(NamedTuple):
  """Of one call. grid: programs of each axis; threads: of a program."""

  flops: int
  floor_bytes: int
  moved_bytes: int
  grid: tuple[int, ...]
  threads: int


class Occupancy(NamedTuple):
  """Programs that a core holds at once, its share of warps, what binds."""

  programs: int
  share: float
  bound: str


def _token_bytes(k_KPCH):
  """Bytes of a token's key and value of one head, with their scales."""
  item = np.dtype(k_KPCH.dtype).itemsize
  return 2 * (k_KPCH.shape[3] * item + (4 if largest(k_KPCH.dtype) else 0))


def _up(x, size):
  return -(-x // size)


def decode(config: decode_attention.TuningConfig, q_BNH: Shaped, k_KPCH: Shaped,
           len_B: np.ndarray, window: int = 0) -> Work:
  """Work of decode_attention, the joining of splits included."""
  B, N, H = q_BNH.shape
  K, _, C, _ = k_KPCH.shape
  item, token = np.dtype(q_BNH.dtype).itemsize, _token_bytes(k_KPCH)
  len_B = np.asarray(len_B, np.int64)
  start_B = np.maximum(len_B - window, 0) if window else np.zeros_like(len_B)
  seen = int(np.sum(len_B - start_B))
  pages = int(np.sum((len_B - 1) // C - start_B // C + 1))
  floor = K * seen * token + 2 * B * N * H * item + (pages + B) * INT
  rows, size, splits = config.block_heads, config.block_tokens, config.splits
  blocks = _up(N // K, rows)
  each_B = _up(_up(len_B - start_B, size), splits) * size
  tiles = 0
  for split in range(splits):
    first_B = start_B + split * each_B
    last_B = np.minimum(len_B, first_B + each_B)
    tiles += int(np.sum(_up(np.maximum(last_B - first_B, 0), size)))
  programs = B * K * blocks * splits
  moved = K * blocks * tiles * size * (token + INT) + programs * (
      rows * H * item + INT)
  if splits == 1:
    moved += programs * rows * H * item
  else:
    moved += programs * rows * (H + 2) * 4
    moved += splits * B * N * (H + 2) * 4 + B * N * H * item
  return Work(4 * N * H * seen, floor, moved, (B, K * blocks, splits),
              32 * config.num_warps)


def prefill(config: prefill_attention.TuningConfig, q_SNH: Shaped,
            k_KPCH: Shaped, start_A: np.ndarray, pos_B: np.ndarray,
            window: int = 0) -> Work:
  """Work of prefill_attention, the cutting into blocks not included."""
  S, N, H = q_SNH.shape
  K, _, C, _ = k_KPCH.shape
  item, token = np.dtype(q_SNH.dtype).itemsize, _token_bytes(k_KPCH)
  rows, size = config.block_rows, config.block_tokens
  each = rows // (N // K)
  pairs, read, pages, blocks, tiles = 0, 0, 0, 0, 0
  counts = np.diff(start_A)
  for count, pos in zip(counts.tolist(), np.asarray(pos_B).tolist(),
                        strict=True):
    context = pos + 1 + np.arange(count, dtype=np.int64)
    pairs += int(np.sum(np.minimum(context, window) if window else context))
    if count:
      low = max(pos + 1 - window, 0) if window else 0
      read += pos + count - low
      pages += (pos + count - 1) // C - low // C + 1
    first = np.arange(0, count, each)
    low = np.maximum(pos + first + 1 - window, 0) if window else 0
    high = pos + np.minimum(first + each, count)
    blocks += len(first)
    tiles += int(np.sum(_up(high - low, size)))
  B, used = len(counts), int(counts.sum())
  floor = (K * read * token + 2 * used * N * H * item
           + (pages + 2 * B + 1) * INT)
  grid = (S + B * (each - 1)) // each, K
  moved = (grid[0] * K * 5 * INT + blocks * K * 2 * rows * H * item
           + tiles * K * size * (token + INT))
  return Work(4 * N * H * pairs, floor, moved, grid, 32 * config.num_warps)


def mosaic_decode(config: 'mosaic.TuningConfig', q_BNH: Shaped, k_KPCH: Shaped,
                  len_B: np.ndarray, window: int = 0) -> Work:
  """Work of decode_attention in Mosaic, what XLA does around it included."""
  B, N, H = q_BNH.shape
  K, _, C, _ = k_KPCH.shape
  G, T, W = N // K, config.block_tokens, config.num_warpgroups
  splits, item = config.splits, np.dtype(q_BNH.dtype).itemsize
  like = decode_attention.TuningConfig()
  flops, floor, *_ = decode(like, q_BNH, k_KPCH, len_B, window)
  len_B = np.asarray(len_B, np.int64)
  from_B = (np.maximum(len_B - window, 0) if window else 0 * len_B) // C * C
  each_B = _up(_up(len_B - from_B, T), splits) * T
  tiles = 0
  for split in range(splits):
    first_B = from_B + split * each_B
    last_B = np.minimum(len_B, first_B + each_B)
    tiles += int(np.sum(_up(np.maximum(last_B - first_B, 0), T)))
  asked = W * (_up(G, 8) * 8 if W == 1 else 64)
  programs = splits * B * K
  moved = K * tiles * (2 * T * H * item + T // C * INT) + programs * (
      asked * H * item + (W + 1) * INT)
  if asked > G:
    moved += B * N * H * item + B * K * asked * H * item
  if splits == 1:
    moved += programs * G * H * item
  else:
    moved += programs * (G * H + 2 * W * 64) * 4
    moved += splits * B * N * (H + 2) * 4 + B * N * H * item
  return Work(flops, floor, moved, (splits, B, K), 128 * (W + 1))


def mosaic_prefill(config: 'mosaic.TuningConfig', q_SNH: Shaped, k_KPCH: Shaped,
                   start_A: np.ndarray, pos_B: np.ndarray,
                   window: int = 0) -> Work:
  """Work of prefill_attention in Mosaic, but for the cutting into blocks."""
  S, N, H = q_SNH.shape
  C, T, W = k_KPCH.shape[2], config.block_tokens, config.num_warpgroups
  item, size = np.dtype(q_SNH.dtype).itemsize, 64 * W
  like = prefill_attention.TuningConfig(64 * N)
  flops, floor, *_ = prefill(like, q_SNH, k_KPCH, start_A, pos_B, window)
  blocks, tiles, counts = 0, 0, np.diff(start_A)
  for count, pos in zip(counts.tolist(), np.asarray(pos_B).tolist(),
                        strict=True):
    first = np.arange(0, count, size)
    low = np.maximum(pos + first + 1 - window, 0) if window else 0 * first
    blocks += len(first)
    tiles += int(np.sum(_up(pos + np.minimum(first + size, count)
                            - low // C * C, T)))
  grid = (S + len(counts) * (size - 1)) // size, N
  moved = grid[0] * N * (W + 1) * 5 * INT + N * (
      tiles * (2 * T * H * item + T // C * INT)
      + (blocks * size + int(counts.sum())) * H * item)
  return Work(flops, floor, moved, grid, 128 * (W + 1))


def kv_write(config: WriteConfig, k_SKH: Shaped, held: Shaped,
             turned: bool = True) -> Work:
  """Work of kv_write of tokens that are all kept."""
  S, K, H = k_SKH.shape
  new = 2 * K * H * np.dtype(k_SKH.dtype).itemsize
  kept = K * _token_bytes(held)
  turn = 4 * H if turned else 0  # half of the cosines, half of the sines
  programs = K // config.block_heads
  return Work((6 if turned else 0) * S * K * H // 2,
              S * (new + kept + turn + 2 * INT),
              S * (new + kept + programs * (turn + 2 * INT)), (S, programs),
              32 * config.num_warps)


def page_copy(config: CopyConfig, pages: tuple[int, int, int],
              dtype: DTypeLike) -> Work:
  """Work of pack or unpack of `pages`: K heads, m pages, numbers a page."""
  K, m, size = pages
  both = 2 * K * m * size * np.dtype(dtype).itemsize
  grid = m, K, size // config.block
  return Work(0, both + m * INT, both + m * K * grid[2] * INT, grid,
              32 * config.num_warps)


def occupancy(limits: paged.Device, registers: int, threads: int,
              shared: int) -> Occupancy:
  """The Occupancy of a paged.Device (sm_80, sm_90).

  Each quarter of a core has 16,384 registers, which warps get in lots of 256;
  a core has 64 places for warps, 32 for programs, and a kilobyte of shared
  memory of each program is the driver's (CUDA programming guide, compute
  capabilities; CUDA occupancy calculator).
  """
  warps = _up(threads, 32)
  lot = _up(registers * 32, 256) * 256
  most = {'registers': 4 * (16384 // lot) // warps,
          'shared memory': (limits.shared_bytes + 1024) // (shared + 1024),
          'warps': 64 // warps, 'programs': 32}
  bound = min(most, key=lambda what: most[what])
  return Occupancy(most[bound], most[bound] * warps / 64, bound)
