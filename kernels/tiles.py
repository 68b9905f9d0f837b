"""What both attention references share: page tiles and online softmax."""

import importlib.util
import warnings

import jax
import jax.numpy as jnp

NEVER = -1e30  # finite, so that a fully masked tile gives no NaN


IMPLS = ('xla', 'pallas', 'pallas_interpret')


def pick(impl, platform=None):
  """The implementation to use: the named one, or the platform's.

  Args:
    impl: one of IMPLS, or None: 'pallas' on a GPU, 'xla' elsewhere, and where
      JAX has no Triton lowering any more (a warning says so once).
    platform: of the devices that run it; None: the default one's.

  Raises:
    ValueError: impl is unknown, or this JAX does not have it.
  """
  if impl not in (None, *IMPLS):
    raise ValueError(f'impl={impl!r}: must be None or one of {IMPLS}')
  gpu = (platform or jax.default_backend()) in ('gpu', 'cuda')
  if impl == 'xla' or impl is None and not gpu:
    return 'xla'
  if importlib.util.find_spec('jax.experimental.pallas.triton'):
    return impl or 'pallas'
  if impl is None:
    warnings.warn('This JAX has no Triton lowering: attention runs in plain '
                  'XLA.', stacklevel=2)
    return 'xla'
  raise ValueError(f'impl={impl!r}: this JAX has no jax.experimental.pallas.'
                   "triton; must be None or 'xla'")


def gather(x_KPCH, scale_KPC, table_Bm):
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


def cap(scores, softcap):
  """softcap tanh(scores / softcap); 0 for none."""
  return softcap * jnp.tanh(scores / softcap) if softcap else scores


def clip(table_BM, first_B, span, page_size):
  """The part of each table that holds `span` tokens from first_B on.

  Returns:
    (table_BM of as many pages as that may take, tokens left out before them).
  """
  M = min(table_BM.shape[1], (span + page_size - 2) // page_size + 1)
  skip_B = first_B // page_size
  page_BM = skip_B[:, None] + jnp.arange(M)[None, :]
  return (jnp.take_along_axis(table_BM, page_BM, 1, mode='clip'),
          skip_B * page_size)


def attend(tile, weigh, shape, table_BM, page_size, length, size):
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
