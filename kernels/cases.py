"""Calls of the kernels at the shapes of published models.

Each on one device of a tensor-parallel instance, with arguments that are
abstract but for the integers that the work depends on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import ShapeDtypeStruct as Shape

from dsjax.kernels import (
    decode_attention,
    kv_write,
    page_copy,
    paged,
    prefill_attention,
    tiles,
    work,
)

# Query heads, kv heads, head width; tensor parallelism of prefill, of decode.
MODELS = {'llama-3-8b': (32, 8, 128, 2, 4), 'llama-3-70b': (64, 8, 128, 2, 4),
          'opt-13b': (40, 40, 128, 2, 1), 'opt-66b': (72, 72, 128, 4, 2)}
OPS: dict[str, Any] = {
    'decode': decode_attention, 'prefill': prefill_attention,
    'kv_write': kv_write, 'pack': page_copy, 'unpack': page_copy}
UPDATED = {'kv_write': 'held', 'unpack': 'x'}  # arguments given back
PAGE, DTYPE = 16, 'bfloat16'


class Case(NamedTuple):
  """A call: pieces (tokens now, tokens before) of each sequence, or pages."""

  op: str
  model: str
  heads: tuple[int, int, int]  # N, K, H of a device
  pieces: tuple
  kv: str = DTYPE
  pages: int = 0
  impl: str = 'pallas'

  @property
  def kernel(self) -> str:
    """The name of its kernel in machine code."""
    return self.op + '_attention' * (self.op in ('decode', 'prefill'))

  @property
  def text(self) -> str:
    """How much is asked, in words."""
    if self.pages:
      return f'{self.pages} pages'
    now, before = self.pieces[0]
    if self.op == 'kv_write':
      return f'{len(self.pieces)} tokens'
    if self.op == 'decode':
      return f'{len(self.pieces)} rows of {before + 1}'
    return f'{len(self.pieces)} x {now}' + f' after {before}' * bool(before)


def of_model(model: str) -> list[Case]:
  """The Cases of a model."""
  N, K, H, prefill_tp, decode_tp = MODELS[model]

  def of(tp):
    return N // tp, K // tp, H

  decode, prefill, cases = of(decode_tp), of(prefill_tp), []
  for rows, tokens in ((1, 2048), (8, 2048), (64, 512), (64, 2048)):
    cases.append(Case('decode', model, decode, ((1, tokens - 1),) * rows))
  cases += [Case('decode', model, decode, ((1, 2047),) * 64, kv)
            for kv in ('int8', 'float8_e4m3fn')]
  for count, now, before in ((1, 2048, 0), (16, 128, 0), (1, 512, 1536)):
    cases.append(Case('prefill', model, prefill, ((now, before),) * count))
  cases.append(Case('prefill', model, prefill, ((2048, 0),), 'float8_e4m3fn'))
  for heads, count, kv in ((prefill, 2048, DTYPE), (decode, 64, DTYPE),
                           (decode, 64, 'float8_e4m3fn')):
    cases.append(Case('kv_write', model, heads, ((1, 0),) * count, kv))
  cases += [Case('pack', model, prefill, (), pages=64),
            Case('unpack', model, decode, (), pages=64)]
  return cases


def wanted(models: Sequence[str], ops: Sequence[str], kind: str) -> list[Case]:
  """The Cases of models and ops on a device; attention also in Mosaic."""
  return [lowered for model in models for case in of_model(model)
          if case.op in ops for lowered in lowerings(case, kind)]


def lowerings(case: Case, kind: str) -> list[Case]:
  """A Case in Mosaic, where a device can have it, and in Triton."""
  args = arguments(case)
  return [case._replace(impl='mosaic')] * (
      case.op in ('decode', 'prefill')
      and not tiles.mosaic_lacks((args['q'], args['k']), kind)) + [case]


def of_steps(model: str, kind: str) -> list[Case]:
  """The Cases of the steps that `make aot` compiles, as a device has them."""
  N, K, H, *tps = MODELS[model]
  (prefill, decode), row = [(N // tp, K // tp, H) for tp in tps], 2048
  cases = [Case('prefill', model, prefill, ((n // 8, row - n // 8),) * 8)
           for n in (2048, 128)]
  cases += [Case('decode', model, decode, ((1, row - 1),) * n)
            for n in (64, 8)]
  cases += [Case('kv_write', model, heads, ((1, 0),) * n) for heads, n in (
      (prefill, 2048), (prefill, 128), (decode, 64), (decode, 8))]
  cases += [Case('pack', model, prefill, (), pages=64),
            Case('unpack', model, decode, (), pages=64)]
  return [lowerings(case, kind)[0] for case in cases]


def arguments(case: Case) -> dict[str, Any]:
  """Abstract floats and concrete integers of a call, by name."""
  N, K, H = case.heads
  rng = np.random.default_rng(0)
  now, before = np.array(case.pieces or [(1, 0)], np.int32).T
  total = now + before
  M = -(-int(total.max()) // PAGE)
  P = max(len(total) * M * (1 + (case.op == 'kv_write')), 2 * case.pages)
  ids = rng.permutation(P).astype(np.int32)
  pool = Shape((K, P, PAGE, H), case.kv)
  scale = (Shape((K, P, PAGE), 'float32') if kv_write.largest(case.kv)
           else None)
  S = int(now.sum())
  common = dict(q=Shape((S, N, H), DTYPE), k=pool, v=pool,
                table=ids[:len(total) * M].reshape(-1, M))
  if case.op == 'decode':
    return dict(common, len=total, k_scale=scale, v_scale=scale)
  if case.op == 'prefill':
    start = np.cumsum([0, *now]).astype(np.int32)
    return dict(common, start=start, pos=before, k_scale=scale, v_scale=scale)
  if case.op == 'kv_write':
    new, turn = Shape((S, K, H), DTYPE), Shape((S, 1, H), 'float32')
    packed = np.arange(S) if S > 256 else np.arange(S) * (PAGE + 1)
    return dict(held=(pool, pool) + (scale, scale) * (scale is not None),
                k=new, v=new, page=ids[packed // PAGE % P],
                offset=(packed % PAGE).astype(np.int32),
                turn=None if case.model.startswith('opt') else (turn, turn))
  pages = dict(x=pool, page=ids[:case.pages])
  if case.op == 'unpack':
    pages['new'] = Shape((K, case.pages, PAGE, H), case.kv)
  return pages


ORDER = {'decode': ('q', 'k', 'v', 'table', 'len'),
         'prefill': ('q', 'k', 'v', 'table', 'start', 'pos'),
         'kv_write': ('held', 'k', 'v', 'page', 'offset', 'turn'),
         'pack': ('x', 'page'), 'unpack': ('x', 'page', 'new')}


def call(case: Case, config: Any = None,
         impl: str | None = None) -> Callable[..., Any]:
  """The op of a case as a function of its `arguments`."""
  attention = case.op in ('decode', 'prefill')
  op = getattr(OPS[case.op], case.kernel)

  def fn(**named):
    scales = {f'{n}_KPC': named[n] for n in ('k_scale', 'v_scale')
              if attention}
    return op(*(named[n] for n in ORDER[case.op]), impl or case.impl,
              config=config, **scales)

  return fn


def plan(case: Case, args: dict[str, Any],
         limits: paged.Device) -> tuple[Any, str, Callable[[Any], None]]:
  """(default config, its shape class, config -> what may be wrong)."""
  module = OPS[case.op]
  if case.impl == 'mosaic':
    what = (args['q'], args['k'], args['table'].shape[1] * PAGE)[
        :3 if case.op == 'decode' else 2]
    return (module.mosaic_default(*what), module.shape_class(*what),
            lambda config: config.check(case.heads[2], PAGE, limits))
  if case.op == 'decode':
    what = args['q'], args['k'], args['table'].shape[1] * PAGE
    return (module.default(*what, limits), module.shape_class(*what),
            lambda config: config.check(*what[:2], limits))
  if case.op == 'prefill':
    what = args['q'], args['k']
    return (module.default(*what, limits), module.shape_class(*what),
            lambda config: config.check(*what, limits))
  if case.op == 'kv_write':
    what = args['k'], case.kv
    return (module.default(*what), module.shape_class(*what),
            lambda config: config.check(args['k']))
  what = _pages(case), case.kv
  return (module.default(*what), module.shape_class(*what),
          lambda config: config.check(what[0][2]))


def _pages(case):
  return case.heads[1], case.pages, PAGE * case.heads[2]


def count(case: Case, args: dict[str, Any], config: Any) -> work.Work:
  """The Work of a case."""
  mosaic = case.impl == 'mosaic'
  if case.op == 'decode':
    return (work.mosaic_decode if mosaic else work.decode)(
        config, args['q'], args['k'], args['len'])
  if case.op == 'prefill':
    return (work.mosaic_prefill if mosaic else work.prefill)(
        config, args['q'], args['k'], args['start'], args['pos'])
  if case.op == 'kv_write':
    return work.kv_write(config, args['k'], args['held'][0],
                         args['turn'] is not None)
  return work.page_copy(config, _pages(case), case.kv)


def cuda_grid(case: Case, done: work.Work) -> list[str]:
  """A Work's grid in CUDA's order: the last axis of Mosaic's comes first."""
  turned = case.impl == 'mosaic'
  return [str(n) for n in (*done.grid[::-1 if turned else 1], 1)[:3]]


def tuned_op(case: Case) -> str:
  """The name of a case's op in kernels/tuned.json."""
  if case.impl == 'mosaic':
    return f'mosaic_{case.op}'
  return OPS[case.op].__name__.rsplit('.', 1)[1]
