"""What each kernel does, moves and takes, at the shapes of published models.

  python -m kernels.bench [--gpu=A100] [--models=...] [--ops=...] [--tune]

Prints for each op and shape on one device of a tensor-parallel instance: the
operations; the floor of bytes, and the bytes that the kernel's loads and
stores ask for (kernels/work.py counts both from grid, config and lengths);
the programs; and, for a GPU on which the kernel compiles (or that
tests/goldens/aot.json has), registers, shared memory, and how many programs a
core holds at once. "at least" is the roofline: the longer of the operations
and the floor's bytes at the device's peaks.

Where a GPU is present it also times the kernel (the least of 5 means over many
calls in one program), beside jax.nn.dot_product_attention on the same
sequences laid out densely (cuDNN's where it has it) and JAX's own paged
attention kernel.
--tune then looks for faster configs, one field at a time, and writes what it
finds to kernels/tuned.json. Without a GPU it says what it could not measure;
--gpu names the one that is described instead.

Exit codes: 0; 2 for bad input; 130 when stopped, after a table of what there
is.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import ShapeDtypeStruct as Shape
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dsjax.kernels import (
    compiled,
    decode_attention,
    kv_write,
    page_copy,
    paged,
    prefill_attention,
    tiles,
    tuned,
    work,
)

# Query heads, kv heads, head width; tensor parallelism of prefill, of decode.
MODELS = {'llama-3-8b': (32, 8, 128, 2, 4), 'llama-3-70b': (64, 8, 128, 2, 4),
          'opt-13b': (40, 40, 128, 2, 1), 'opt-66b': (72, 72, 128, 4, 2)}
OPS: dict[str, Any] = {
    'decode': decode_attention, 'prefill': prefill_attention,
    'kv_write': kv_write, 'pack': page_copy, 'unpack': page_copy}
# Operations (dense, 16 bits) and bytes a second: NVIDIA's data sheets.
PEAKS = {'A100': (312e12, 2039e9), 'H100': (989e12, 3350e9),
         'H200': (989e12, 4800e9)}
PAGE, DTYPE = 16, 'bfloat16'
GOLDEN = (pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'goldens'
          / 'aot.json')
# What --tune tries for each field of a config.
TRIES = dict(block_heads=(1, 2, 4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8),
             block_rows=(16, 32, 64, 128), block_tokens=(16, 32, 64, 128, 256),
             num_stages=(1, 2, 3, 4), splits=(1, 2, 3, 4, 6, 8, 12, 16, 32),
             block=(256, 512, 1024, 2048, 4096), num_warpgroups=(1, 2))


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


def cases(model: str) -> list[Case]:
  """The Cases of a model."""
  N, K, H, prefill_tp, decode_tp = MODELS[model]

  def of(tp):
    return N // tp, K // tp, H

  decode, prefill, found = of(decode_tp), of(prefill_tp), []
  for rows, tokens in ((1, 2048), (8, 2048), (64, 512), (64, 2048)):
    found.append(Case('decode', model, decode, ((1, tokens - 1),) * rows))
  found += [Case('decode', model, decode, ((1, 2047),) * 64, kv)
            for kv in ('int8', 'float8_e4m3fn')]
  for count, now, before in ((1, 2048, 0), (16, 128, 0), (1, 512, 1536)):
    found.append(Case('prefill', model, prefill, ((now, before),) * count))
  found.append(Case('prefill', model, prefill, ((2048, 0),), 'float8_e4m3fn'))
  for heads, count, kv in ((prefill, 2048, DTYPE), (decode, 64, DTYPE),
                           (decode, 64, 'float8_e4m3fn')):
    found.append(Case('kv_write', model, heads, ((1, 0),) * count, kv))
  found += [Case('pack', model, prefill, (), pages=64),
            Case('unpack', model, decode, (), pages=64)]
  return found


def wanted(models: Sequence[str], ops: Sequence[str], kind: str) -> list[Case]:
  """The Cases of models and ops on a device; attention also in Mosaic."""
  found = []
  for case in (c for model in models for c in cases(model) if c.op in ops):
    if case.op in ('decode', 'prefill'):
      args = arguments(case)
      if not tiles.mosaic_lacks((args['q'], args['k']), kind):
        found.append(case._replace(impl='mosaic'))
    found.append(case)
  return found


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
  op = getattr(OPS[case.op], case.op + '_attention' * attention)

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


# --- machine code -------------------------------------------------------------


def code(case: Case, args: dict[str, Any], config: Any, done: work.Work,
         name: str, dump: str) -> compiled.Kernel | None:
  """The compiled.Kernel of a case, from a compilation or the golden table."""
  kernel = case.op + '_attention' * (case.op in ('decode', 'prefill'))
  if compiled.available(name):
    fn = call(case, config)
    found = compiled.compile(name, dump, lambda named: fn(**named), (args,))
    if kernel not in found:
      raise RuntimeError(f'{case.op}, {case.text}: no {kernel} among the '
                         f'kernels that XLA wrote to {dump}: {list(found)}')
    return found[kernel]
  if case.kv == DTYPE and GOLDEN.exists():
    # Programs of a prefill's first axis follow its number of sequences.
    grid = [str(n) for n in (*done.grid, 1)[:3]][case.op == 'prefill':]
    for row in json.loads(GOLDEN.read_text())['rows']:
      found = row['kernels'].get(kernel)
      if (found and (row['gpu'], row['model']) == (name.lower(), case.model)
          and found['threads'] == done.threads
          and found['grid'].split(', ')[-len(grid):] == grid):
        return compiled.Kernel(found['registers'], found['spilled'],
                               done.grid, done.threads, found['shared'])
  return None


# --- on a GPU -----------------------------------------------------------------


def fill(args: dict[str, Any], seed: int = 0) -> dict[str, Any]:
  """Arrays on the device in place of abstract ones."""
  keys = iter(jax.random.split(jax.random.key(seed), 16))

  def make(x):
    if not isinstance(x, Shape):
      return jnp.asarray(x)
    if x.dtype == jnp.int8:
      return jax.random.randint(next(keys), x.shape, -127, 128, jnp.int8)
    return jax.random.normal(next(keys), x.shape, DTYPE).astype(x.dtype)

  return jax.tree.map(make, args)


def timed(fn: Callable[..., Any], args: dict[str, Any],
          name: str | None = None,
          loops: int = 16) -> Callable[..., float]:
  """Compiles calls of fn; (repeats, least_s) -> seconds of a call.

  That is the least of `repeats` means over least_s or more. Calls run `loops`
  in a row in one program, so that the host's time to start one does not
  count, and each waits for the one before.

  name: of the argument that the call gives back updated.
  """
  def body(_, named):
    out = fn(**named)
    return named | ({name: out} if name else _after(named, out))

  step = jax.jit(lambda named: jax.lax.fori_loop(0, loops, body, named),
                 donate_argnums=0).lower(args).compile()

  def run(repeats: int = 5, least_s: float = 0.02) -> float:
    held = jax.tree.map(jnp.copy, args)

    def mean(times):
      nonlocal held
      began = time.perf_counter()
      for _ in range(times):
        held = step(held)
      jax.block_until_ready(held)
      return (time.perf_counter() - began) / (times * loops)

    mean(1)
    times = max(1, round(least_s / max(mean(1) * loops, 1e-6)))
    return min(mean(times) for _ in range(repeats))

  return run


def seconds(fn: Callable[..., Any], args: dict[str, Any],
            name: str | None = None, repeats: int = 5,
            least_s: float = 0.02, loops: int = 16) -> float:
  """Seconds of a call, as `timed` says."""
  return timed(fn, args, name, loops)(repeats, least_s)


def _after(named: dict[str, Any], out: Any) -> dict[str, jax.Array]:
  """The first array of floats, as it was, but not known before `out` is."""
  name, x = next((name, x) for name, x in named.items() if isinstance(
      x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating))
  number = jax.tree.leaves(out)[0]
  number = number[(0,) * number.ndim].astype(x.dtype)
  first = (0,) * x.ndim
  return {name: x.at[first].set(jnp.where(jnp.isnan(number), 0, x[first]))}


UPDATED = {'kv_write': 'held', 'unpack': 'x'}


def dense(
    case: Case, args: dict[str, Any]
) -> tuple[Callable[..., jax.Array], dict[str, Any]] | None:
  """jax.nn.dot_product_attention of a case's sequences, or None.

  Returns:
    (function of q, k, v and the lengths, its arguments), filled.
  """
  pieces = set(case.pieces)
  if (case.op not in ('decode', 'prefill') or case.kv != DTYPE
      or len(pieces) > 1 or case.op == 'prefill' and pieces.pop()[1]):
    return None
  N, K, H = case.heads
  B, (now, before) = len(case.pieces), case.pieces[0]
  named = fill(dict(q=Shape((B, now, N, H), DTYPE),
                    k=Shape((B, now + before, K, H), DTYPE),
                    v=Shape((B, now + before, K, H), DTYPE)))

  def fn(q, k, v, impl):
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=case.op == 'prefill', implementation=impl)

  return fn, named


def rivals(case: Case, args: dict[str, Any]) -> dict[str, float | None]:
  """{name: seconds} of what else computes a case, None where it cannot."""
  found = {}
  if other := dense(case, args):
    fn, named = other
    for impl in ('cudnn', 'xla'):
      found[impl] = _try(functools.partial(fn, impl=impl), named)
  if case.op == 'decode' and case.kv == DTYPE:
    try:
      module = importlib.import_module(
          'jax.experimental.pallas.ops.gpu.paged_attention')
    except ImportError:
      return found
    found['JAX paged'] = _try(
        lambda q, k, v, table, len: module.paged_attention(
            q, k, v, table, len), {n: args[n] for n in (
                'q', 'k', 'v', 'table', 'len')})
  return found


def _try(fn, named):
  """Seconds, or None if this device cannot."""
  try:
    return seconds(fn, named)
  except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError,
          RuntimeError, AssertionError):
    return None


def tune(config: Any, check: Callable[[Any], None],
         build: Callable[[Any], Callable[[], float]], jobs: int = 1) -> Any:
  """The fastest config found from `config` on, a field at a time.

  build: config -> what times it, compiled; `jobs` of them at a time. What
    does not suit, compile or run is left out.
  """
  best, best_s = config, build(config)()
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    for _ in range(3):
      before = best
      for field in dataclasses.fields(config):
        others = [dataclasses.replace(best, **{field.name: value})
                  for value in TRIES[field.name]]
        others = [x for x in others if x != best and _suits(x, check)]
        built = [pool.submit(build, other) for other in others]
        for other, run in zip(others, built, strict=True):
          try:
            other_s = run.result()()
          except (ValueError, jax.errors.JaxRuntimeError):
            continue
          if other_s < best_s:
            best, best_s = other, other_s
      if best == before:
        break
  return best


def _suits(config, check):
  try:
    check(config)
  except ValueError:
    return False
  return True


def tuned_op(case: Case) -> str:
  """The name of a case's op in kernels/tuned.json."""
  if case.impl == 'mosaic':
    return f'mosaic_{case.op}'
  return OPS[case.op].__name__.rsplit('.', 1)[1]


# --- a run --------------------------------------------------------------------


def row(case: Case, limits: paged.Device, dump: str, present: bool,
        tuning: bool = False) -> dict[str, Any]:
  """What is known of a case: a dict of columns."""
  args = arguments(case)
  config, shape, check = plan(case, args, limits)
  out = {}
  if present:
    arrays = fill(args)

    def build(config):
      return timed(call(case, config), arrays, UPDATED.get(case.op))

    if tuning:
      config = tune(config, check, build, os.cpu_count() or 1)
      tuned.save(tuned_op(case), shape, config)
    out = dict(seconds=build(config)(), rivals=rivals(case, arrays))
  done = count(case, args, config)
  peak, bandwidth = PEAKS[limits.name]
  out |= dict(case=case, config=config, work=done, least_s=max(
      done.flops / peak, done.floor_bytes / bandwidth), bound='flops' if
      done.flops / peak > done.floor_bytes / bandwidth else 'bytes')
  if kernel := code(case, args, config, done, limits.name, dump):
    out |= dict(kernel=kernel, occupancy=work.occupancy(
        limits, kernel.registers, kernel.threads, kernel.shared))
  return out


COUNTED = ('op', 'as', 'model', 'shape', 'KV', 'GFLOP', 'floor MB', 'moves MB',
           'ratio', 'at least us', 'by', 'config', 'programs', 'regs', 'smem',
           'spills', 'a core', 'warps', 'bound by')
TIMED = ('us', 'GB/s', 'TFLOP/s', 'roofline', 'cuDNN us', 'XLA us',
         'JAX paged us')


def table(rows: Sequence[dict[str, Any]], name: str, present: bool) -> Table:
  """A rich table of rows."""
  out = Table(title=f'Kernels on {"one" if present else "a described"} {name}')
  for column in COUNTED + TIMED * present:
    out.add_column(column, no_wrap=True, justify='left' if column in (
        'op', 'as', 'model', 'shape', 'KV', 'by', 'bound by') else 'right')
  last = None
  for r in rows:
    case, done = r['case'], r['work']
    if last not in (None, case.model):
      out.add_section()
    last = case.model
    lowering = 'Mosaic' if case.impl == 'mosaic' else 'Triton'
    cells = [case.op, lowering, case.model, case.text,
             case.kv.replace('float', 'f'),
             f'{done.flops / 1e9:.2f}', f'{done.floor_bytes / 1e6:.2f}',
             f'{done.moved_bytes / 1e6:.2f}',
             f'{done.moved_bytes / done.floor_bytes:.2f}',
             f'{r["least_s"] * 1e6:.1f}', r['bound'],
             '/'.join(map(str, dataclasses.astuple(r['config']))),
             'x'.join(map(str, done.grid))]
    if kernel := r.get('kernel'):
      fit = r['occupancy']
      cells += [str(kernel.registers), str(kernel.shared), str(kernel.spilled),
                str(fit.programs), f'{fit.share:.0%}', fit.bound]
    else:
      cells += ['-'] * 6
    if present:
      s, other = r['seconds'], r['rivals']
      cells += [f'{s * 1e6:.1f}', f'{done.floor_bytes / s / 1e9:.0f}',
                f'{done.flops / s / 1e12:.1f}', f'{r["least_s"] / s:.0%}']
      cells += [f'{other[n] * 1e6:.1f}' if other.get(n) else '-'
                for n in ('cudnn', 'xla', 'JAX paged')]
    out.add_row(*cells)
  return out


def unmeasured(rows: Sequence[dict[str, Any]], present: bool) -> list[str]:
  """Sentences about the columns that are not there."""
  found = []
  if not present:
    found.append('Not measured, for want of a GPU: seconds, GB/s, TFLOP/s, '
                 'share of the roofline, cuDNN, XLA, JAX\'s paged kernel.')
  if missing := sum('kernel' not in r for r in rows):
    found.append(f'Registers and what follows from them are missing in '
                 f'{missing} of {len(rows)} rows: `make .venv-aot/installed`, '
                 'then .venv-aot/bin/python -m kernels.bench compiles them.')
  return found


def run(console: Console, name: str, kind: str | None, asked: Sequence[Case],
        tuning: bool = False) -> int:
  """Prints the table of Cases; the exit code. kind: None for a GPU here."""
  rows, stopped, limits = [], False, paged.device(kind)
  with tempfile.TemporaryDirectory() as dump:
    if compiled.available(name):
      os.environ.update(compiled.environment(dump))
    try:
      for case in track(asked, console=console, transient=True,
                        description='counting' if kind else 'timing'):
        if kind:
          with compiled.described(kind):
            rows.append(row(case, limits, dump, False))
        else:
          rows.append(row(case, limits, dump, True, tuning))
    except KeyboardInterrupt:
      stopped = True
  console.print(table(rows, name, not kind))
  for line in unmeasured(rows, not kind):
    console.print(line, soft_wrap=True)
  return 130 if stopped else 0


def driver() -> bool:
  """Whether NVIDIA's driver is here; JAX's plugin is noisy where it is not."""
  try:
    ctypes.CDLL('libcuda.so.1')
  except OSError:
    return False
  return True


def define_flags() -> flags.FlagValues:
  """Defines this program's flags; absl's FLAGS."""
  flags.DEFINE_string('gpu', None, 'Described, not run: A100 or H100; None for '
                      'the GPU that is here, H100 where there is none.')
  flags.DEFINE_list('models', list(MODELS), 'Of these.')
  flags.DEFINE_list('ops', list(OPS), 'Of these.')
  flags.DEFINE_bool('tune', False, 'Write kernels/tuned.json (needs a GPU).')
  return flags.FLAGS


def check_flags(given: flags.FlagValues) -> tuple[str, str | None]:
  """Raises ValueError naming a flag and what is allowed."""
  for field, allowed in (('models', MODELS), ('ops', OPS)):
    for value in getattr(given, field):
      if value not in allowed:
        raise ValueError(f'--{field}={value}: must be of {list(allowed)}')
  if given.gpu not in (None, *compiled.GPUS):
    raise ValueError(f'--gpu={given.gpu}: must be of {list(compiled.GPUS)}')
  here = given.gpu is None and jax.default_backend() in ('gpu', 'cuda')
  if given.tune and not here:
    raise ValueError('--tune: there is no GPU here')
  if not here:
    name = given.gpu or 'H100'
    return name, compiled.GPUS[name][2]
  kind = tiles.device_kind()
  if paged.device().name not in kind:
    raise ValueError(f'the GPU here, {kind}: must be one of '
                     f'{[d.name for d in paged.DEVICES]}')
  return paged.device().name, None


def read_flags(argv: Sequence[str]) -> list[str]:
  """FLAGS of a command line; ends the program with 2 for bad ones."""
  try:
    return FLAGS(argv)
  except flags.Error as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except SystemExit:  # --help, which absl takes for a failure
    sys.exit(0)


def main(_: Sequence[str]) -> None:
  """What `python -m kernels.bench` does."""
  logging.set_verbosity(logging.WARNING)
  if FLAGS.gpu or not driver():
    jax.config.update('jax_platforms', 'cpu')
  try:
    name, kind = check_flags(FLAGS)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  console = Console()
  if not console.is_terminal:
    console.width = 250
  sys.exit(run(console, name, kind, wanted(
      FLAGS.models, FLAGS.ops, kind or tiles.device_kind()), FLAGS.tune))


if __name__ == '__main__':
  FLAGS = define_flags()
  app.run(main, flags_parser=read_flags)
