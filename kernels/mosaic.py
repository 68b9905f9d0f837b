"""Both attention ops for Hopper GPUs: TMA copies, wgmma, warp specialisation.

A program's last warpgroup copies tiles of whole pages into a ring of stages in
shared memory, each page found through the table, and signals on barriers. The
others multiply, each with 64 query rows of its own, and hand stages back.
(Online softmax as in FlashAttention-2, the division of labour as in
FlashAttention-3.) Pages are read whole: keys past the end are masked, values
past the end are blanked, so that what lies there may be anything at all.

Interpreted, everything but the two products is the same: JAX 0.10's
interpreter has no wgmma with a transposed operand, and none has one with an
operand in registers, so they are plain dots of the same shared memory there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsjax.kernels import paged, tiles
from dsjax.kernels.shapes import Shaped

ROWS = 64  # of a warpgroup's product
REGISTERS = (40, 232)  # of a thread that copies, that multiplies
RESERVED = 2304  # bytes of shared memory: Mosaic's own scratch, barriers


@dataclasses.dataclass(frozen=True)
class TuningConfig:
  """How a Mosaic kernel cuts its work.

  block_tokens: keys a tile, whole pages. num_stages: tiles in flight.
  num_warpgroups: that multiply, 64 rows each (query heads of one kv head in
  decode, tokens of one head in prefill); one more copies. splits: programs
  that share a row's tokens (decode).
  """

  block_tokens: int = 64
  num_stages: int = 2
  num_warpgroups: int = 1
  splits: int = 1

  def shared_bytes(self, head_dim: int) -> int:
    """Shared memory of a program: queries, outputs, tiles, barriers."""
    return (ROWS * self.num_warpgroups * head_dim
            * (2 + (4 if self.splits > 1 else 2)) + RESERVED
            + paged.tile_bytes(self.block_tokens, head_dim, 2,
                               self.num_stages))

  def check(self, head_dim: int, page_size: int, limits: paged.Device) -> None:
    """Raises ValueError unless it suits the shapes and a paged.Device."""
    def need(ok, field, rule):
      if not ok:
        raise ValueError(f'mosaic.TuningConfig.{field}={getattr(self, field)}'
                         f': must be {rule}')

    sizes = (64, 128) if head_dim <= 128 else (64,)  # others spill registers
    need(self.block_tokens in sizes and self.block_tokens % page_size == 0,
         'block_tokens', f'of {sizes} and whole pages of {page_size}')
    need(self.num_stages >= 1, 'num_stages', '1 or more')
    need(self.num_warpgroups in (1, 2), 'num_warpgroups',
         '1 or 2')
    need(self.splits >= 1, 'splits', '1 or more')
    used = self.shared_bytes(head_dim)
    need(used <= limits.shared_bytes, 'block_tokens',
         f'smaller, or num_stages: {used} bytes of shared memory are more '
         f'than the {limits.shared_bytes} of {limits.name}')


def decode_heuristic(q_BNH: Shaped, k_KPCH: Shaped, tokens: int,
                     limits: paged.Device) -> TuningConfig:
  """A TuningConfig of decode from the floor of bytes, for up to `tokens`.

  Bytes in flight are all that counts, and registers leave room for one
  program on a core: up to 4 tiles of 64 tokens, or of a page. Where programs
  are fewer than cores, rows are split, into no less than 4 tiles each.
  """
  B, N, H = q_BNH.shape
  K, _, C, _ = k_KPCH.shape
  size, groups = max(ROWS, C), -(-(N // K) // ROWS)
  splits = min(-(-limits.cores // (B * K)), max(tokens // (4 * size), 1))
  return _deepest(TuningConfig(size, 4, groups, splits), H, limits)


def prefill_heuristic(q_SNH: Shaped, k_KPCH: Shaped,
                      limits: paged.Device) -> TuningConfig:
  """A TuningConfig of prefill from the floor of bytes.

  Each tile serves all rows of a program: 128 rows and tiles of 128 tokens, or
  64 of both where the sums of heads wider than 128 fill the registers.
  """
  H = q_SNH.shape[2]
  config = TuningConfig(128, 2, 2) if H <= 128 else TuningConfig(64, 2, 1)
  return _deepest(config, H, limits)


def _deepest(config, head_dim, limits):
  """config, or with the most stages that fit."""
  while (config.shared_bytes(head_dim) > limits.shared_bytes
         and config.num_stages > 1):
    config = dataclasses.replace(config, num_stages=config.num_stages - 1)
  return config


def _check(config, head_dim, page_size, limits):
  if not isinstance(config, TuningConfig):
    raise ValueError(f'config={config}: must be a mosaic.TuningConfig')
  config.check(head_dim, page_size, limits)


class Shared(NamedTuple):
  """What the warpgroups of a program share: arrays and barriers.

  W rows of 64 for each warpgroup that multiplies, Z stages.
  """

  q_WRH: Any  # rows past the queries hold anything
  o_WRH: object
  k_ZTH: object
  v_ZTH: object
  asked_W: Any  # queries have come
  there_Z: Any  # keys and values of a stage have
  used_Z: Any  # a stage is free again
  clean: Any  # values past the end are blank


def decode(q_BNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array,
           table_BM: jax.Array, len_B: jax.Array, scale: float, softcap: float,
           window: int, interpret: bool = False,
           config: TuningConfig | None = None) -> list[jax.Array]:
  """The kernel of decode_attention; see there for the arguments.

  A program has the query heads of one kv head, one row, and one split of the
  tiles that hold the row's visible tokens.

  Returns:
    [o_BNH], or of more than one split (Z) what decode_attention.join takes:
    [o_ZBNH, top_ZBN, total_ZBN].
  """
  B, N, H = q_BNH.shape
  K, P, C, _ = k_KPCH.shape
  G, limits = N // K, paged.device(tiles.HOPPER[0])
  if config is None:
    tokens = table_BM.shape[1] * C
    config = decode_heuristic(q_BNH, k_KPCH, min(window or tokens, tokens),
                              limits)
  _check(config, H, C, limits)
  T, W, Z = config.block_tokens, config.num_warpgroups, config.splits
  if G > W * ROWS:
    raise ValueError(f'mosaic.TuningConfig.num_warpgroups={W}: must be more '
                     f'for {G} query heads of a kv head')
  asked = -(-G // 8) * 8 if W == 1 else ROWS  # shared memory's swizzle has 8
  q_IRH = jnp.pad(q_BNH.reshape(B * K, G, H), (
      (0, 0), (0, W * asked - G), (0, 0)))
  out = [jax.ShapeDtypeStruct(q_BNH.shape, q_BNH.dtype)]
  if Z > 1:
    out = [jax.ShapeDtypeStruct((Z, *shape), jnp.float32)
           for shape in ((B, N, H), (B, K, W * ROWS), (B, K, W * ROWS))]

  def body(q_ref, table_ref, len_ref, k_ref, v_ref, o_ref, *refs):
    sums, shared = refs[:len(out) - 1], Shared(*refs[len(out) - 1:])
    z, b, head, wg = (jax.lax.axis_index(name) for name in 'zbkw')
    stop = len_ref[b]
    start = jnp.maximum(stop - window, 0) if window else 0
    page, last = jax.lax.div(start, C), jax.lax.div(stop - 1, C)
    each = pl.cdiv(pl.cdiv(stop - page * C, T), Z)
    page += z * each * (T // C)
    stop = jnp.minimum(stop, page * C + each * T)
    count = pl.cdiv(jnp.maximum(stop - page * C, 0), T)

    def multiply():
      row = wg * ROWS
      _ask(shared, wg, q_ref.at[b * K + head, pl.ds(wg * asked, asked)])
      top_R, total_R, o_RH = _attend(
          shared, wg, count, 0, page * C, stop,
          lambda _, t_RT: (t_RT >= start) & (t_RT < stop), scale, softcap,
          interpret)
      for ref, x_R in zip(sums, (top_R, total_R), strict=False):
        _put(ref.at[z, b, head, pl.ds(row, ROWS)], x_R)
      if not sums:
        o_RH /= _across(total_R, o_RH.shape)
      to = o_ref.at[z] if sums else o_ref
      _store(shared, wg, o_RH, G if W == 1 else jnp.minimum(G - row, ROWS),
             lambda r, size: to.at[b, pl.ds(head * G + row + r, size)])

    _share(config, wg, multiply, lambda: _feed(
        shared, count, (table_ref, b, page, last), head * P, k_ref, v_ref))

  parts = _call(body, 'decode_attention', config, (Z, B, K), 'zbk', out,
                k_KPCH, interpret)(q_IRH, table_BM, len_B, _flat(k_KPCH),
                                   _flat(v_KPCH))
  return [parts[0]] + [x[..., :G].reshape(Z, B, N) for x in parts[1:]]


def prefill(
    q_SNH: jax.Array, k_KPCH: jax.Array, v_KPCH: jax.Array, table_BM: jax.Array,
    start_A: jax.Array, pos_B: jax.Array,
    cut: Callable[[jax.Array, int, int], tuple[jax.Array, jax.Array]],
    scale: float, softcap: float, window: int, interpret: bool = False,
    config: TuningConfig | None = None
) -> jax.Array:
  """The kernel of prefill_attention; see there for the arguments.

  A program has one head of a block of one sequence's tokens. A block may be
  loaded past its sequence's end; those rows are never stored.

  Args:
    cut: prefill_attention's.
  """
  S, N, H = q_SNH.shape
  K, P, C, _ = k_KPCH.shape
  G, limits = N // K, paged.device(tiles.HOPPER[0])
  config = config or prefill_heuristic(q_SNH, k_KPCH, limits)
  _check(config, H, C, limits)
  T, size = config.block_tokens, config.num_warpgroups * ROWS
  most = (S + pos_B.shape[0] * (size - 1)) // size
  out = jax.ShapeDtypeStruct(q_SNH.shape, q_SNH.dtype)

  def body(q_ref, table_ref, start_ref, pos_ref, seq_ref, first_ref, k_ref,
           v_ref, o_ref, *refs):
    shared = Shared(*refs)
    j, n, wg = (jax.lax.axis_index(name) for name in 'jnw')
    b, first = seq_ref[j], first_ref[j]
    start, pos = start_ref[b], pos_ref[b]
    tokens = start_ref[b + 1] - start
    page = (jax.lax.div(jnp.maximum(pos + first + 1 - window, 0), C)
            if window else 0)
    stop = pos + jnp.minimum(first + size, tokens)
    last, count = jax.lax.div(stop - 1, C), pl.cdiv(stop - page * C, T)

    def multiply():
      row = first + wg * ROWS
      whole = jax.lax.div(jnp.minimum(pos + row + 1, stop), T)

      def visible(row_RT, t_RT):
        back_RT = pos + row + row_RT - t_RT
        ok_RT = back_RT >= 0
        return ok_RT & (back_RT < window) if window else ok_RT

      _ask(shared, wg, q_ref.at[pl.ds(start + row, ROWS), n])
      _, total_R, o_RH = _attend(shared, wg, count, 0 if window else whole,
                                 page * C, stop, visible, scale, softcap,
                                 interpret)
      _store(shared, wg, o_RH / _across(total_R, o_RH.shape),
             jnp.minimum(jnp.maximum(tokens - row, 0), ROWS),
             lambda r, size: o_ref.at[pl.ds(start + row + r, size), n])

    @pl.when(first < tokens)
    def _():
      _share(config, wg, multiply, lambda: _feed(
          shared, count, (table_ref, b, page, last), jax.lax.div(n, G) * P,
          k_ref, v_ref))

  # TMA gives zeros past the end, not by a whole copy; its tiles have 8 rows.
  rows = -(-(S + size * (interpret or S < ROWS)) // 8) * 8
  if rows > S:
    q_SNH = jnp.pad(q_SNH, ((0, rows - S), (0, 0), (0, 0)))
  out, = _call(body, 'prefill_attention', config, (most, N), 'jn', [out],
               k_KPCH, interpret)(
                   q_SNH, table_BM, start_A, pos_B, *cut(start_A, size, most),
                   _flat(k_KPCH), _flat(v_KPCH))
  return out


def _flat(x_KPCH):
  """Heads and pages as one axis: TMA has five, of which tiling takes two."""
  return x_KPCH.reshape(-1, *x_KPCH.shape[2:])


def _call(body, name, config, grid, names, out, k_KPCH, interpret):
  """plgpu.kernel; body gets refs of a Shared after its other refs."""
  C, H, dtype = *k_KPCH.shape[2:], k_KPCH.dtype
  T, W, Z = config.block_tokens, config.num_warpgroups, config.num_stages
  swizzled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
  scratch: Any = Shared(
      plgpu.SMEM((W * ROWS, H), dtype, transforms=swizzled),
      plgpu.SMEM((W * ROWS, H), out[0].dtype),
      plgpu.SMEM((Z, T, H), dtype, transforms=swizzled),
      plgpu.SMEM((Z, T, H), dtype, transforms=swizzled),
      plgpu.Barrier(num_barriers=W),
      plgpu.Barrier(num_arrivals=2 * (T // C), num_barriers=Z),
      plgpu.Barrier(num_arrivals=W, num_barriers=Z),
      plgpu.Barrier(num_barriers=1))
  return plgpu.kernel(
      body, out_type=out, grid=grid, grid_names=tuple(names),
      num_threads=W + 1, thread_name='w', kernel_name=name,
      interpret=interpreter() if interpret else False,
      compiler_params=plgpu.CompilerParams(
          approx_math=True,
          lowering_semantics=plgpu.LoweringSemantics.Lane),
      scratch_types=scratch)


def interpreter() -> Any:
  """What interprets a kernel on CPU; private in JAX 0.10."""
  params = getattr(plgpu, 'InterpretGPUParams', None)
  if params is None:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    params = InterpretGPUParams
  return params()


def _share(config, wg, multiply, copy):
  """Runs what this warpgroup is for, with the registers that it needs."""
  few, many = REGISTERS

  @pl.when(wg < config.num_warpgroups)
  def _():
    plgpu.set_max_registers(many, action='increase')
    multiply()

  @pl.when(wg == config.num_warpgroups)
  def _():
    plgpu.set_max_registers(few, action='decrease')
    copy()


def _feed(shared, count, table, base, k_ref, v_ref):
  """Copies `count` tiles of pages of the flat pool.

  Where the last tile has room for pages past the end, the last comes again.

  Args:
    table: (ref, row, the first page's entry, the last's).
    base: of the kv head in the flat pool.
  """
  (Z, T, _), C = shared.k_ZTH.shape, k_ref.shape[1]
  table_ref, row, entry, last = table

  @pl.loop(0, count + Z)
  def _(i):
    stage = jax.lax.rem(i, Z)

    @pl.when(i >= Z)
    def _():
      plgpu.barrier_wait(shared.used_Z.at[stage])

    @pl.when(i < count)
    def _():
      first = entry + i * (T // C)
      pages = [table_ref[row, jnp.minimum(first + p, last)]
               for p in range(T // C)]
      for ref, to in ((k_ref, shared.k_ZTH), (v_ref, shared.v_ZTH)):
        for p, page in enumerate(pages):
          plgpu.copy_gmem_to_smem(
              ref.at[base + page], to.at[stage, pl.ds(p * C, C)],
              shared.there_Z.at[stage])


def _ask(shared, wg, rows_ref):
  """Loads a warpgroup's query rows."""
  plgpu.copy_gmem_to_smem(
      rows_ref, shared.q_WRH.at[pl.ds(wg * ROWS, rows_ref.shape[0])],
      shared.asked_W.at[wg])
  plgpu.barrier_wait(shared.asked_W.at[wg])


def _attend(shared, wg, count, whole, token, stop, visible, scale, softcap,
            interpret):
  """Online softmax of a warpgroup's rows over `count` tiles from `token` on.

  Args:
    whole: tiles, the first ones, that every row sees all of.
    stop: the first token past the end.
    visible: (row_RT, t_RT) -> ok_RT, which tokens a row sees; none from stop
      on.

  Returns:
    (top_R, total_R, o_RH), as paged.attend's.
  """
  Z, T, H = shared.k_ZTH.shape
  q_RH = shared.q_WRH.at[pl.ds(wg * ROWS, ROWS)]

  def layout(x):  # of a product; x[R] is one column of it
    layout = plgpu.Layout.WGMMA
    return x if interpret else plgpu.layout_cast(
        x, layout if x.ndim == 2 else layout.reduce(1))

  def tile(masked, i, carry):
    top_R, total_R, o_RH = carry
    stage, first = jax.lax.rem(i, Z), token + i * T
    plgpu.barrier_wait(shared.there_Z.at[stage])
    if masked:
      @pl.when(first + T > stop)
      def _():
        _blank(shared, wg, stage, stop - first, layout)
    s_RT = _scores(q_RH, shared.k_ZTH.at[stage], interpret)
    s_RT = _cap(s_RT, scale, softcap)
    if masked:
      row_RT, t_RT = (layout(jax.lax.broadcasted_iota(
          jnp.int32, s_RT.shape, axis)) for axis in (0, 1))
      s_RT = jnp.where(visible(row_RT, first + t_RT), s_RT, tiles.NEVER)
    new_R = jnp.maximum(top_R, jnp.max(s_RT, 1))
    fix_R = jnp.exp2(top_R - new_R)
    p_RT = jnp.exp2(s_RT - _across(new_R, s_RT.shape))
    total_R = total_R * fix_R + jnp.sum(p_RT, 1)
    o_RH *= _across(fix_R, o_RH.shape)
    total_R, p_RT, o_RH = jax.lax.optimization_barrier(
        (total_R, p_RT.astype(shared.v_ZTH.dtype), o_RH))  # frees registers
    o_RH = _weigh(p_RT, shared.v_ZTH.at[stage], o_RH, interpret)
    if interpret:  # dots read as threads do, which TMA waits for by a fence
      plgpu.commit_smem()
    plgpu.barrier_arrive(shared.used_Z.at[stage])
    return new_R, total_R, o_RH

  carry = (layout(jnp.full((ROWS,), tiles.NEVER)), layout(jnp.zeros((ROWS,))),
           layout(jnp.zeros((ROWS, H))))
  if not isinstance(whole, int):
    carry = jax.lax.fori_loop(
        0, whole, lambda i, carry: tile(False, i, carry), carry)
  return jax.lax.fori_loop(
      whole, count, lambda i, carry: tile(True, i, carry), carry)


def _across(x_R, shape):
  """x_R beside itself, as often as shape is wide."""
  return jax.lax.broadcast_in_dim(x_R, shape, (0,))


def _cap(s_RT, scale, softcap):
  """Scores scaled and capped, in powers of two.

  tanh from exp2, which is exact to float32; the hardware's tanh is not.
  """
  if not softcap:
    return s_RT * (scale * paged.LOG2E)
  e_RT = jnp.exp2(s_RT * (2 * paged.LOG2E * scale / softcap))
  return softcap * paged.LOG2E - 2 * softcap * paged.LOG2E / (e_RT + 1)


def _scores(q_ref, k_ref, interpret):
  """q k^T of arrays in shared memory, float32."""
  if interpret:
    return jax.lax.dot_general(q_ref[...], k_ref[...], (((1,), (1,)), ((), ())),
                               preferred_element_type=jnp.float32)

  def product(sum_ref):
    plgpu.wgmma(sum_ref, q_ref, k_ref.transpose((1, 0)))
    return sum_ref[...]

  return pl.run_scoped(product, plgpu.ACC((q_ref.shape[0], k_ref.shape[0]),
                                          jnp.float32))


def _weigh(p_RT, v_ref, o_RH, interpret):
  """o + p v, with p in registers."""
  if interpret:
    return o_RH + jax.lax.dot_general(p_RT, v_ref[...],
                                      (((1,), (0,)), ((), ())),
                                      preferred_element_type=jnp.float32)
  return pl.run_state(lambda sum_ref: plgpu.wgmma(sum_ref, p_RT, v_ref))(
      plgpu.ACC.init(o_RH))


def _blank(shared, wg, stage, live, layout):
  """Values of a stage become 0 from token `live` on; the others wait."""
  _, T, H = shared.v_ZTH.shape

  @pl.when(wg == 0)
  def _():
    for t in range(0, T, ROWS):
      t_RH = layout(jax.lax.broadcasted_iota(jnp.int32, (ROWS, 64), 0)) + t
      for h in range(0, H, 64):
        ref = shared.v_ZTH.at[stage, pl.ds(t, ROWS), pl.ds(h, 64)]
        ref[...] = jnp.where(t_RH < live, ref[...], 0)
    plgpu.commit_smem()
    if shared.asked_W.shape[0] > 1:
      plgpu.barrier_arrive(shared.clean.at[0])

  @pl.when(wg > 0)
  def _():
    plgpu.barrier_wait(shared.clean.at[0])


def _put(ref, x):
  """Stores to an array without swizzle, and so not without bank conflicts."""
  if store := getattr(plgpu, 'store', None):  # newer JAX must be told
    store(ref, x, optimized=False)
  else:
    ref[...] = x


def _store(shared, wg, o_RH, count, place):
  """Stores the first `count` of a warpgroup's rows.

  place: (row, how many) -> where they go. A static count is one copy; so are
  all rows, and of fewer each.
  """
  at = wg * ROWS
  _put(shared.o_WRH.at[pl.ds(at, ROWS)], o_RH.astype(shared.o_WRH.dtype))
  plgpu.commit_smem()

  def copy(row, size):
    plgpu.copy_smem_to_gmem(shared.o_WRH.at[pl.ds(at + row, size)],
                            place(row, size))

  if isinstance(count, int):
    copy(0, count)
  else:
    @pl.when(count == ROWS)
    def _():
      copy(0, ROWS)

    @pl.when(count < ROWS)
    def _():
      pl.loop(0, count)(lambda row: copy(row, 1))
  plgpu.wait_smem_to_gmem(0)
