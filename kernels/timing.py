"""Times calls on the device that is here, and looks for faster configs."""

import concurrent.futures
import dataclasses
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from dsjax.kernels.cases import DTYPE, Case

# What --tune tries for each field of a config.
TRIES = dict(block_heads=(1, 2, 4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8),
             block_rows=(16, 32, 64, 128), block_tokens=(16, 32, 64, 128, 256),
             num_stages=(1, 2, 3, 4), splits=(1, 2, 3, 4, 6, 8, 12, 16, 32),
             block=(256, 512, 1024, 2048, 4096), num_warpgroups=(1, 2))


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
  seconds = {}
  if other := dense(case, args):
    fn, named = other
    for impl in ('cudnn', 'xla'):
      seconds[impl] = _try(functools.partial(fn, impl=impl), named)
  if case.op == 'decode' and case.kv == DTYPE:
    try:
      module = importlib.import_module(
          'jax.experimental.pallas.ops.gpu.paged_attention')
    except ImportError:
      return seconds
    seconds['JAX paged'] = _try(
        lambda q, k, v, table, len: module.paged_attention(
            q, k, v, table, len), {n: args[n] for n in (
                'q', 'k', 'v', 'table', 'len')})
  return seconds


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
