"""Writing new tokens' keys, rotated, and values into their pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from dsjax.kernels import paged, shapes, tiles, tuned
from dsjax.kernels.shapes import Shaped

# What the largest number of a token's head becomes in pages that keep scales.
# Float8_e5m2 could hold more, but the weights of values are multiplied by the
# scales, and in float16 those products vanish where scales are that small.
LARGEST = {'int8': 127, 'float8_e4m3fn': 448, 'float8_e5m2': 448}


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How the kernel cuts its work: kv heads of one token a program has."""

  block_heads: int = 1
  num_warps: int = 1
  num_stages: int = 1

  def check(self, k_SKH: Shaped) -> None:
    """Raises ValueError unless it suits the new keys."""
    K, size = k_SKH.shape[1], self.block_heads
    if size < 1 or K % size or size != paged.power(size):
      raise ValueError(f'TuningConfig.block_heads={size}: must be a power of '
                       f'two that divides the {K} kv heads')


def heuristic(k_SKH: Shaped) -> TuningConfig:
  """A TuningConfig: as many of a token's heads as can be, up to 8."""
  K = k_SKH.shape[1]
  return TuningConfig(min(K & -K, 8))


def shape_class(k_SKH: Shaped, dtype: DTypeLike) -> str:
  """What a tuned config is for: tokens up to the next power of two."""
  S, K, H = k_SKH.shape
  return f'{k_SKH.dtype} into {dtype}, H {H}, K {K}, S {paged.power(S)}'


def default(k_SKH: Shaped, dtype: DTypeLike) -> TuningConfig:
  """The tuned config, or the heuristic's."""
  return tuned.find(
      'kv_write', shape_class(k_SKH, dtype), TuningConfig,
      lambda config: config.check(k_SKH)) or heuristic(k_SKH)


def kv_write(
    held: tuple[jax.Array, ...], k_SKH: jax.Array, v_SKH: jax.Array,
    page_S: jax.Array, offset_S: jax.Array,
    turn: tuple[jax.Array, jax.Array] | None = None, impl: str | None = None, *,
    config: TuningConfig | None = None
) -> tuple[jax.Array, ...]:
  """Puts token s into page page_S[s] at offset_S[s]; page P drops it.

  No two tokens that are kept may have the same place.

  Args:
    held: (k_KPCH, v_KPCH); of a dtype in LARGEST, with (k_scale_KPC,
      v_scale_KPC) too, and then keys and values are quantized.
    turn: (cos_S1H, sin_S1H), by which keys are rotated first; None: not.
    impl: 'xla', 'pallas', 'pallas_interpret', or None to choose by platform.
    config: a TuningConfig of the kernel; None for the default.

  Returns:
    held, updated: in place where the caller donates it.

  Raises:
    ValueError: shapes disagree, impl is unknown or not available, or config
      does not suit the shapes.
  """
  shapes.check(k_KPCH=held[0], k_SKH=k_SKH, v_SKH=v_SKH, page_S=page_S,
               offset_S=offset_S)
  shapes.check(k_KPCH=held[0], v_KPCH=held[1])
  if (impl := tiles.pick(impl)) == 'xla':
    return reference(held, k_SKH, v_SKH, page_S, offset_S, turn)
  return kernel(held, k_SKH, v_SKH, page_S, offset_S, turn, impl != 'pallas',
                config)


def rotary(x_SNH: jax.Array, cos_S1H: jax.Array,
           sin_S1H: jax.Array) -> jax.Array:
  """Rotates pairs (h, h + H/2) by the position's angles."""
  left, right = jnp.split(x_SNH.astype(jnp.float32), 2, -1)
  turned = jnp.concatenate((-right, left), -1)
  return (x_SNH * cos_S1H + turned * sin_S1H).astype(x_SNH.dtype)


def largest(dtype: DTypeLike) -> int | None:
  """The largest number in pages of this dtype; None if they have no scales."""
  return LARGEST.get(jnp.dtype(dtype).name)


def quantize(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
  """x[..., H] as a dtype in LARGEST and its scale[...]: x is about x8 * scale.

  Rounded to the nearest, ties to even. The most that x is wrong by: in int8
  scale / 2; in float8_e4m3fn 2^-4 of |x| or of 2^-6 scale, whichever is more;
  in float8_e5m2 2^-3 of |x| or of 2^-14 scale.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), -1) / LARGEST[jnp.dtype(dtype).name]
  x /= jnp.where(scale > 0, scale, 1.0)[..., None]
  if jnp.issubdtype(dtype, jnp.integer):
    x = jnp.round(x)
  return x.astype(dtype), scale


def reference(
    held: tuple[jax.Array, ...], k_SKH: jax.Array, v_SKH: jax.Array,
    page_S: jax.Array, offset_S: jax.Array,
    turn: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, ...]:
  """The XLA reference: a scatter for each array."""
  if turn is not None:
    k_SKH = rotary(k_SKH, *turn)
  new = [k_SKH, v_SKH]
  if len(held) > 2:
    new, scales = zip(*(quantize(x, held[0].dtype) for x in new), strict=True)
    new += scales
  return tuple(
      x_KPC.at[:, page_S, offset_S].set(
          new_SK.swapaxes(0, 1).astype(x_KPC.dtype), mode='drop')
      for x_KPC, new_SK in zip(held, new, strict=True))


def kernel(held: tuple[jax.Array, ...], k_SKH: jax.Array, v_SKH: jax.Array,
           page_S: jax.Array, offset_S: jax.Array,
           turn: tuple[jax.Array, jax.Array] | None, interpret: bool = False,
           config: TuningConfig | None = None) -> tuple[jax.Array, ...]:
  """The Pallas kernel: a program has some heads of one token.

  Halves of int8 are rounded up and not to even: Triton has no rounding but
  floor.
  """
  S, K, H = k_SKH.shape
  config = config or default(k_SKH, held[0].dtype)
  config.check(k_SKH)
  turn_SH = [] if turn is None else [x_S1H[:, 0] for x_S1H in turn]
  inputs = (page_S, offset_S, *turn_SH, k_SKH, v_SKH)
  return tuple(paged.call(
      functools.partial(_program, config.block_heads, len(held)),
      (S, K // config.block_heads),
      [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in held], config,
      interpret, 'kv_write',
      {len(inputs) + i: i for i in range(len(held))})(*inputs, *held))


def _program(heads, count, page_ref, offset_ref, *refs):
  *turn, k_ref, v_ref = refs[:-2 * count]
  out, dtype = refs[-count:], refs[-count].dtype
  s, head = pl.program_id(0), pl.ds(pl.program_id(1) * heads, heads)
  page, offset = page_ref[s], offset_ref[s]

  @pl.when(page < out[0].shape[1])
  def _():
    for part, ref in enumerate((k_ref, v_ref)):
      turned = turn if part == 0 else ()
      width = ref.shape[2] // 2 if turned else ref.shape[2]
      x, at = _rotated(ref, s, head, width, turned)
      if count > 2:
        top_K = functools.reduce(jnp.maximum, (
            jnp.max(jnp.abs(p), 1) for p in x))
        scale_K = top_K / LARGEST[jnp.dtype(dtype).name]
        out[2 + part][head, page, offset] = scale_K
        safe_K = jnp.where(scale_K > 0, scale_K, 1.0)
        x = [p / safe_K[:, None] for p in x]
        if jnp.issubdtype(dtype, jnp.integer):
          x = [jnp.floor(p + 0.5) for p in x]
      for piece, place in zip(x, at, strict=True):
        out[part][head, page, offset, place] = paged.narrow(piece, dtype)


def _rotated(ref, s, head, half, turn):
  """A token's heads in parts, float32, and where each lies in H.

  Without turn, half is all of H. What is rotated is rounded to ref's dtype,
  as the reference's is.
  """
  pieces, places = [], []
  for start, width in paged.parts(half):
    left = pl.ds(start, width)
    x = ref[s, head, left].astype(jnp.float32)
    places.append(left)
    if not turn:
      pieces.append(x)
      continue
    right = pl.ds(start + half, width)
    y = ref[s, head, right].astype(jnp.float32)
    cos, sin = (t[s, left][None, :] for t in turn)
    places.append(right)
    for turned in (x * cos - y * sin, y * cos + x * sin):
      pieces.append(turned.astype(ref.dtype).astype(jnp.float32))
  return pieces, places
