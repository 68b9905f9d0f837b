"""What both attention kernels share: a block of queries over paged tokens.

Pallas kernels on whole arrays, which interpret on CPU and compile for sm_80
and newer through Triton. No load or store is masked. An index past the end is
moved back to the last one that counts instead, so that nothing unused is ever
read (not a page, not a page's tail, not a table's end), and the rows that only
fill a block repeat its last row and store the same numbers over it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from dsjax.kernels import tiles

LOG2E = math.log2(math.e)
LEAST = tiles.LEAST


class Device(NamedTuple):
  """Limits that a TuningConfig is checked against."""

  name: str
  cores: int  # streaming multiprocessors
  shared_bytes: int  # shared memory that one program may use
  capability: int  # compute capability, 80 for 8.0


DEVICES = (Device('A100', 108, 166912, 80), Device('H100', 132, 232448, 90),
           Device('H200', 132, 232448, 90))


def device(name: str | None = None) -> Device:
  """The Device of a device_kind (None: of the one in use), or the smallest."""
  name = name or tiles.device_kind()
  return next((d for d in DEVICES if d.name in name), DEVICES[0])


def power(size: int) -> int:
  """The least power of two that is no less than size."""
  return 1 << max(size - 1, 0).bit_length()


def parts(size: int) -> list[tuple[int, int]]:
  """size as powers of two, the only sizes Triton has: [(start, width)]."""
  widths, start = [], 0
  while start < size:
    width = 1 << ((size - start).bit_length() - 1)
    widths.append((start, width))
    start += width
  return widths


def fit_tokens(head_dim: int, k_bytes: int, stages: int, limit: int) -> int:
  """Tokens a tile: the most, up to 128, whose keys and values fit in limit."""
  tokens = 128
  while tokens > LEAST and tile_bytes(tokens, head_dim, k_bytes,
                                      stages) > limit:
    tokens //= 2
  return tokens


def tile_bytes(tokens: int, head_dim: int, k_bytes: int, stages: int) -> int:
  """Shared memory of `stages` tiles of keys and values in flight."""
  return 2 * stages * tokens * head_dim * k_bytes


def check(config: Any, rows: str, head_dim: int, k_bytes: int,
          limits: Device) -> None:
  """Raises ValueError unless a TuningConfig suits the shapes and a Device.

  rows: the field that says how many query rows a program has.
  """
  def need(ok, field, rule):
    if not ok:
      raise ValueError(f'TuningConfig.{field}={getattr(config, field)}: must '
                       f'be {rule}')

  for field in (rows, 'block_tokens'):
    size = getattr(config, field)
    need(size >= LEAST and size == power(size), field,
         f'a power of two of {LEAST} or more')
  need(config.num_warps in (1, 2, 4, 8, 16), 'num_warps', '1, 2, 4, 8 or 16')
  need(config.num_stages >= 1, 'num_stages', '1 or more')
  used = (tile_bytes(config.block_tokens, head_dim, k_bytes,
                     config.num_stages)
          + 2 * getattr(config, rows) * head_dim)
  need(used <= limits.shared_bytes, 'block_tokens',
       f'smaller, or num_stages: {used} bytes of shared memory are more than '
       f'the {limits.shared_bytes} of {limits.name}')


def check_heads(head_dim: int, interpret: bool) -> None:
  """Raises ValueError if Triton cannot compile heads of this width."""
  if interpret:
    return
  if not tiles.triton_has(head_dim):
    raise ValueError(f"impl='pallas': heads of {head_dim}; must be a multiple "
                     f"of {LEAST}, 256 at most, or impl 'xla'")


def call(kernel: Callable[..., None], grid: tuple[int, ...], out_shape: Any,
         config: Any, interpret: bool, name: str,
         aliases: dict[int, int] | None = None) -> Callable[..., Any]:
  """pl.pallas_call on whole arrays, lowered through Triton.

  config: has num_warps and num_stages. aliases: see input_output_aliases.
  """
  from jax.experimental.pallas import triton  # deprecated from jax 0.11 on
  return pl.pallas_call(
      kernel, grid=grid, out_shape=out_shape, interpret=interpret, name=name,
      input_output_aliases=aliases or {},
      compiler_params=triton.CompilerParams(
          num_warps=config.num_warps, num_stages=config.num_stages))


def compute_dtype(q_dtype: DTypeLike, k_dtype: DTypeLike) -> DTypeLike:
  """What products take: q's dtype, or a wider one where the KV's is."""
  if jnp.dtype(k_dtype).itemsize == 1:  # exact in every q_dtype
    return q_dtype
  return jnp.promote_types(q_dtype, k_dtype)


def by_bits(dtype: DTypeLike, limits: Device) -> bool:
  """Triton converts float8_e4m3fn only where the GPU does: from sm_89 on."""
  return dtype == jnp.float8_e4m3fn and limits.capability < 89


def widen(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """x, as pages keep it, in a dtype that holds it exactly.

  Float8_e4m3fn by its bits is a float16 whose exponent has the bias 15 in
  place of 7: 2^-8 of the number, subnormal ones too.
  """
  if not by_bits(x.dtype, device()):
    return x.astype(dtype)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16)
  bits = ((bits & 0x80) << 8) | ((bits & 0x7f) << 7)
  return (jax.lax.bitcast_convert_type(bits, jnp.float16) * 256).astype(dtype)


def narrow(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """x, float32, as pages keep it, rounded to the nearest, ties to even.

  Float8_e4m3fn by its bits, the inverse of `widen`: adding 1.5 * 2^20 of x's
  power of two (2^-6 at least), and taking it away, leaves 3 bits after it.
  """
  if not by_bits(dtype, device()):
    return x.astype(dtype)
  power = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7f800000
  large = jax.lax.bitcast_convert_type(
      jnp.maximum(power, 121 << 23) + (20 << 23) | 0x400000, jnp.float32)
  x = (x + large - large) * 2**-8
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)
  bits = ((bits >> 8) & 0x80) | ((bits & 0x7fff) >> 7)
  return jax.lax.bitcast_convert_type(bits.astype(jnp.uint8), dtype)


def load(ref: Any, *index: Any) -> list[jax.Array]:
  """The last axis of ref at this index, in parts."""
  return [ref[(*index, pl.ds(*part))] for part in parts(ref.shape[-1])]


def store(ref: Any, parts_of_x: Sequence[jax.Array], *index: Any) -> None:
  """The inverse of load."""
  for part, x in zip(parts(ref.shape[-1]), parts_of_x, strict=True):
    ref[(*index, pl.ds(*part))] = x.astype(ref.dtype)


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """a b summed over b's axis, float32; float32 inputs stay exact (no TF32)."""
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())),
                             precision=exact,
                             preferred_element_type=jnp.float32)


def attend(q: Sequence[jax.Array], token: jax.Array | int, tokens: jax.Array,
           visible: Callable[[jax.Array], jax.Array] | None,
           kv: tuple[Any, Any], table: tuple[Any, Any], size: int, scale: float,
           softcap: float) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """Online softmax of queries [R, H] over tokens [lo, hi) of one sequence.

  Args:
    q: parts of [R, H], in the dtype that products take.
    token: lo. tokens: hi; none at all if it is not above lo.
    visible: t_T -> ok_RT, or None for all of lo to hi.
    kv: head -> refs of keys and values (and their scales), see `call`.
    table: (ref, row).
    size: tokens a tile, T.

  Returns:
    (top_R, total_R, parts of out_RH): the largest score, in powers of two;
    the sum of 2^(score - top); the values weighted by it.
  """
  (k_ref, v_ref, *scales), head = kv
  table_ref, row = table
  R, C = q[0].shape[0], k_ref.shape[2]

  def body(i, carry):
    top_R, total_R, out = carry
    at_T = token + i * size + jnp.arange(size)
    t_T = jnp.minimum(at_T, tokens - 1)
    page_T, offset_T = table_ref[row, jax.lax.div(t_T, C)], jax.lax.rem(t_T, C)
    s_RT = sum(dot(a, widen(b, a.dtype), 1) for a, b in zip(
        q, load(k_ref, head, page_T, offset_T), strict=True))
    if scales:
      s_RT *= scales[0][head, page_T, offset_T][None, :]
    s_RT = tiles.cap(s_RT * scale, softcap) * LOG2E
    ok_RT = jnp.broadcast_to((at_T < tokens)[None, :], (R, size))
    if visible is not None:
      ok_RT &= visible(at_T)
    s_RT = jnp.where(ok_RT, s_RT, tiles.NEVER)
    new_R = jnp.maximum(top_R, jnp.max(s_RT, 1))
    p_RT = jnp.exp2(s_RT - new_R[:, None])
    fix_R = jnp.exp2(top_R - new_R)
    total_R = total_R * fix_R + jnp.sum(p_RT, 1)
    if scales:
      p_RT *= scales[1][head, page_T, offset_T][None, :]
    p_RT = p_RT.astype(q[0].dtype)
    out = [o * fix_R[:, None] + dot(p_RT, widen(v, p_RT.dtype), 0)
           for o, v in zip(out, load(v_ref, head, page_T, offset_T),
                           strict=True)]
    return new_R, total_R, out

  start = (jnp.full((R,), tiles.NEVER), jnp.zeros((R,)),
           [jnp.zeros((R, width)) for _, width in parts(k_ref.shape[3])])
  return jax.lax.fori_loop(
      0, pl.cdiv(jnp.maximum(tokens - token, 0), size), body, start)
