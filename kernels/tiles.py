"""What both attention references share: page tiles and online softmax."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.kernels import cpu
from dsjax.kernels.shapes import Shaped

LEAST = 16  # rows, columns and depth of a tensor core's product
NEVER = -1e30  # finite, so that a fully masked tile gives no NaN


IMPLS = ('xla', 'cpu', 'pallas', 'pallas_interpret', 'mosaic',
         'mosaic_interpret')
HOPPER = ('H100', 'H20', 'H800')  # parts of device kinds; H200, GH200 too


def pick(impl: str | None, platform: str | None = None,
         call: tuple[Shaped, Shaped] | None = None,
         kind: str | None = None) -> str:
  """The implementation to use: the named one, or the platform's.

  Args:
    impl: one of IMPLS, or None: on a GPU 'mosaic' for what `mosaic_lacks`
      nothing for, or else 'pallas' for heads that Triton can have; on a CPU
      'cpu' for attention that `cpu.lacks` nothing for; 'xla' elsewhere, and
      where JAX has no Triton lowering any more (a warning says so once).
    platform: of the devices that run it; None: the default one's.
    call: (queries, keys) of an attention, arrays or their shapes; None for
      another op, which Mosaic has none of.
    kind: the devices' device_kind; None: of the mesh in context, or of the
      default device.

  Raises:
    ValueError: impl is unknown, this JAX does not have it, or it cannot do
      this call.
  """
  if impl not in (None, *IMPLS):
    raise ValueError(f'impl={impl!r}: must be None or one of {IMPLS}')
  platform = platform or jax.default_backend()
  gpu = platform in ('gpu', 'cuda')
  if impl == 'cpu' or impl is None and call and platform == 'cpu':
    lacks = (cpu.lacks(call) if platform == 'cpu' else
             f'a {platform}; must be a CPU')
    if not lacks:
      return 'cpu'
    if impl:
      raise ValueError(f'impl={impl!r}: {lacks}')
  if impl == 'xla' or impl is None and not gpu:
    return 'xla'
  if impl in (None, 'mosaic', 'mosaic_interpret'):
    kind = kind or device_kind()
    if impl == 'mosaic_interpret' or impl and 'NVIDIA' not in kind:
      kind = HOPPER[0]  # lowered here, if not interpreted, to run elsewhere
    lacks = mosaic_lacks(call, kind)
    if not lacks:
      return impl or 'mosaic'
    if impl:
      raise ValueError(f'impl={impl!r}: {lacks}')
  if importlib.util.find_spec('jax.experimental.pallas.triton'):
    triton = call is None or triton_has(call[0].shape[-1])
    return impl or ('pallas' if triton else 'xla')
  if impl is None:
    warnings.warn('This JAX has no Triton lowering: attention runs in plain '
                  'XLA.', stacklevel=2)
    return 'xla'
  raise ValueError(f'impl={impl!r}: this JAX has no jax.experimental.pallas.'
                   "triton; must be None or 'xla'")


def triton_has(head_dim: int) -> bool:
  """Whether Triton can compile heads of this width, as powers of two."""
  return head_dim <= 256 and head_dim % LEAST == 0


def device_kind() -> str:
  """The device_kind of the mesh in context, or of the default device."""
  target = jax.sharding.get_abstract_mesh().abstract_device
  return (target or jax.devices()[0]).device_kind


def mosaic_lacks(call: tuple[Shaped, Shaped] | None, kind: str) -> str:
  """What the Mosaic kernels need and do not have, a sentence; or ''.

  They take bfloat16 or float16 queries and KV of the same dtype (what wgmma
  multiplies, untouched), heads of 64, 128, 192 or 256, pages of 8 to 128
  tokens, a power of two, up to 128 query heads a kv head (of heads wider than
  128, up to 64 of both: the registers), and a Hopper GPU: later ones have no
  wgmma.

  Args:
    call, kind: see `pick`.
  """
  if not importlib.util.find_spec('jax.experimental.pallas.mosaic_gpu'):
    return 'this JAX has no jax.experimental.pallas.mosaic_gpu'
  if call is None:
    return 'it has attention only'
  if not any(name in kind for name in HOPPER):
    return f'a {kind}; must be a Hopper GPU (H100, H200)'
  q, k_KPCH = call
  (_, N, H), (K, _, C, _) = q.shape, k_KPCH.shape
  if q.dtype != k_KPCH.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
    return (f'queries of {q.dtype} and KV of {k_KPCH.dtype}; must be both '
            'bfloat16 or both float16')
  if H not in (64, 128, 192, 256):
    return f'heads of {H}; must be 64, 128, 192 or 256'
  most = 128 if H <= 128 else 64
  if C not in (8, 16, 32, 64, most):
    return (f'pages of {C} tokens of {H}; must be a power of two from 8 to '
            f'{most}')
  return '' if N // K <= most else (
      f'{N // K} query heads of {H} a kv head; must be {most} at most')


def portable(impl: str | None) -> str | None:
  """The implementation of what reads and writes pages beside attention's."""
  if impl in ('cpu', 'mosaic_interpret'):
    return 'xla'
  return pick(None, 'gpu') if impl == 'mosaic' else impl


def gather(x_KPCH: jax.Array, scale_KPC: jax.Array | None,
           table_Bm: jax.Array) -> jax.Array:
  """Pages of each row, side by side: [K, B, m * C, H], float32.

  scale_KPC: of every token, or None. Gathering whole pages as flat rows
  copies at memory speed on CPU; gathering [C, H] blocks does not.
  """
  K, P, C, H = x_KPCH.shape
  B, m = table_Bm.shape

  def rows(x_KPI):
    return x_KPI.at[:, table_Bm.reshape(B * m)].get(
        mode='promise_in_bounds', wrap_negative_indices=False)

  x = rows(x_KPCH.reshape(K, P, C * H)).reshape(K, B, m * C, H)
  x = x.astype(jnp.float32)
  if scale_KPC is None:
    return x
  return x * rows(scale_KPC).reshape(K, B, m * C)[..., None]


def cap(scores: Any, softcap: float) -> jax.Array:
  """softcap tanh(scores / softcap); 0 for none."""
  return softcap * jnp.tanh(scores / softcap) if softcap else scores


def clip(table_BM: jax.Array, first_B: jax.Array, span: int,
         page_size: int) -> tuple[jax.Array, jax.Array]:
  """The part of each table that holds `span` tokens from first_B on.

  Returns:
    (table_BM of as many pages as that may take, tokens left out before them).
  """
  M = min(table_BM.shape[1], (span + page_size - 2) // page_size + 1)
  skip_B = first_B // page_size
  page_BM = skip_B[:, None] + jnp.arange(M)[None, :]
  return (jnp.take_along_axis(table_BM, page_BM, 1, mode='clip'),
          skip_B * page_size)


def attend(tile: Callable[..., tuple[jax.Array, Any]],
           weigh: Callable[[jax.Array, Any], jax.Array], shape: tuple[int, ...],
           table_BM: jax.Array, page_size: int, length: jax.Array,
           size: int) -> jax.Array:
  """Online softmax over tiles of about `size` of `length` tokens.

  tile(start, width, table_Bm) gives masked scores [..., T] and the values;
  weigh(p, values) sums them. `shape` is the output's; its last axis is H.
  A tile that is masked whole before a query's first token counts for nothing
  afterwards; its values have to be finite.
  """
  M = table_BM.shape[1]
  m = min(max(1, size // page_size), M)
  width = m * page_size

  def body(i, carry):
    top, total, out = carry
    first = jnp.minimum(i * m, M - m)  # the last tile may overlap
    table_Bm = jax.lax.dynamic_slice_in_dim(table_BM, first, m, 1)
    s, values = tile(first * page_size, width, table_Bm)
    fresh = first * page_size + jnp.arange(width) >= i * width
    s = jnp.where(fresh, s, NEVER)
    new_top = jnp.maximum(top, jnp.max(s, -1))
    p = jnp.exp(s - new_top[..., None])
    scale = jnp.exp(top - new_top)
    return (new_top, total * scale + jnp.sum(p, -1),
            out * scale[..., None] + weigh(p, values))

  start = (jnp.full(shape[:-1], NEVER), jnp.zeros(shape[:-1]),
           jnp.zeros(shape))
  _, total, out = jax.lax.fori_loop(0, -(-length // width), body, start)
  return out / total[..., None]
