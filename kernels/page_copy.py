"""Pages out of a pool, side by side, and back: what a migration copies."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from dsjax.kernels import paged, tiles, tuned


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How the kernels cut their work: numbers of one page a program copies."""

  block: int = 4096
  num_warps: int = 4
  num_stages: int = 1

  def check(self, size: int) -> None:
    """Raises ValueError unless it suits pages of `size` numbers a head."""
    if size % self.block or self.block != paged.power(self.block):
      raise ValueError(f'TuningConfig.block={self.block}: must be a power of '
                       f'two that divides the {size} numbers of a page')


def heuristic(size: int) -> TuningConfig:
  """A TuningConfig: a page's largest power of two, up to 4096 numbers."""
  block = math.gcd(size, 4096)
  return TuningConfig(block, 4 if block >= 1024 else 1)


def shape_class(pages: tuple[int, int, int], dtype: DTypeLike) -> str:
  """What a tuned config is for: [K, m, I] numbers, up to a power of two."""
  K, m, size = pages
  return f'{dtype}, I {size}, K m {paged.power(K * m)}'


def default(pages: tuple[int, int, int], dtype: DTypeLike) -> TuningConfig:
  """The tuned config, or the heuristic's."""
  return tuned.find(
      'page_copy', shape_class(pages, dtype), TuningConfig,
      lambda config: config.check(pages[2])) or heuristic(pages[2])


def pack(x_KPC: jax.Array, page_m: jax.Array, impl: str | None = None, *,
         config: TuningConfig | None = None) -> jax.Array:
  """Pages page_m of a pool, [K, m, C, ...].

  Args:
    x_KPC: [K, P, C] or [K, P, C, H]. page_m: valid ids, any number of times.
    impl: 'xla', 'pallas', 'pallas_interpret', or None to choose by platform.
    config: a TuningConfig of the kernel; None for the default.

  Raises:
    ValueError: impl is unknown or not available, or config does not suit.
  """
  K, P, *rest = x_KPC.shape
  flat_KPI = x_KPC.reshape(K, P, -1)
  if (impl := tiles.pick(impl)) == 'xla':  # a gather of blocks is twice as slow
    out_KmI = flat_KPI.at[:, page_m].get(mode='promise_in_bounds',
                                         wrap_negative_indices=False)
  else:
    shape = K, page_m.shape[0], flat_KPI.shape[2]
    out_KmI = _copy(_pack, shape, shape, x_KPC.dtype, impl, config)(
        page_m, flat_KPI)
  return out_KmI.reshape(K, page_m.shape[0], *rest)


def unpack(x_KPC: jax.Array, page_m: jax.Array, new_KmC: jax.Array,
           impl: str | None = None, *,
           config: TuningConfig | None = None) -> jax.Array:
  """The inverse of pack: the pool with pages page_m replaced.

  Ids of P, all last, are dropped; the others differ. See pack.
  """
  page_m = jnp.asarray(page_m)
  if (impl := tiles.pick(impl)) == 'xla':
    return _unpack_reference(x_KPC, page_m, new_KmC)
  K, P = x_KPC.shape[:2]
  new_KmI = new_KmC.reshape(K, page_m.shape[0], -1)
  shape = K, P, new_KmI.shape[2]
  copy = _copy(_unpack, new_KmI.shape, shape, x_KPC.dtype, impl, config,
               {2: 0})
  return copy(page_m, new_KmI, x_KPC.reshape(shape)).reshape(x_KPC.shape)


def _unpack_reference(x_KPC, page_m, new_KmC):
  """A loop of whole-page updates in place: XLA's CPU scatter of blocks goes
  element by element."""
  def put(i, x_KPC):
    page_K1C = jax.lax.dynamic_slice_in_dim(new_KmC, i, 1, 1)
    return jax.lax.dynamic_update_slice_in_dim(
        x_KPC, page_K1C.astype(x_KPC.dtype), page_m[i], 1)

  live = jnp.sum(page_m < x_KPC.shape[1])
  return jax.lax.fori_loop(0, live, put, x_KPC)


def _copy(program, pages, out, dtype, impl, config, aliases=None):
  """The pallas_call of a program a block of each page of [K, m, I]."""
  K, m, size = pages
  config = config or default(pages, dtype)
  config.check(size)
  return paged.call(functools.partial(program, config.block),
                    (m, K, size // config.block),
                    jax.ShapeDtypeStruct(out, dtype), config,
                    impl != 'pallas', program.__name__[1:], aliases)


def _at(block):
  return (pl.program_id(0), pl.program_id(1),
          pl.ds(pl.program_id(2) * block, block))


def _pack(block, page_ref, x_ref, out_ref):
  i, head, where = _at(block)
  out_ref[head, i, where] = x_ref[head, page_ref[i], where]


def _unpack(block, page_ref, new_ref, _, out_ref):
  i, head, where = _at(block)
  page = page_ref[i]

  @pl.when(page < out_ref.shape[1])
  def _():
    out_ref[head, page, where] = new_ref[head, i, where].astype(out_ref.dtype)
