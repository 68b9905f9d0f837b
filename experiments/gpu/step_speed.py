"""Whole steps and hand-offs of published models against their floors.

The floor of a step is dsjax's own roofline with the rates of rates.py: weights
and KV read once, products at the rate of a large one. Beside it: the host's
time to dispatch a step, a hand-off against a plain copy of its bytes, and a
decode step of the same layers in torch, where torch is.
"""

import statistics
import time
from collections.abc import Iterable
from typing import Any, TypeAlias

import jax
import numpy as np

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan
from dsjax.model import kv_cache
from dsjax.runtime import grid, profiling
from dsjax.runtime.engine import Engine
from dsjax.simulation.hardware import Hardware
from dsjax.simulation.roofline import Roofline
from experiments.gpu import card, child, rates
from experiments.gpu.lines import Lines, Target

ROUNDS = 5
# Rows of the largest decode batch: what fits beside the weights in 80 GB.
MODELS = {'llama-3-8b': 64, 'opt-13b': 16}
PAGES = 64  # a row; what pages hold means nothing, and rows may share them
CONTEXT = 1024  # tokens of each decode row
# (what, pieces, batch, context of a row).
TimedStep: TypeAlias = tuple[str, tuple[tuple[int, int], ...], int, int]


def engine(rows: int, tiny: bool) -> EngineConfig:
  """The EngineConfig that holds `rows` rows."""
  if tiny:
    return EngineConfig(max_len=64, max_seqs=2, num_pages=16,
                        prefill_tokens=32, chunk_tokens=32, prefill_seqs=2)
  return EngineConfig(
      max_len=2048, max_seqs=rows, num_pages=rows * PAGES, prefill_tokens=2048,
      chunk_tokens=2048, prefill_seqs=4, dtype='bfloat16')


def steps(config: EngineConfig) -> list[TimedStep]:
  """(what, pieces, batch, context of a row) of each timed step."""
  top, context = config.prefill_tokens, min(CONTEXT, config.max_len // 2)
  timed: list[TimedStep] = [
      (f'decode {rows} rows of {context}', (), rows, context)
      for rows in sorted({1, min(8, config.max_seqs), config.max_seqs})]
  return timed + [(f'prefill {count} x {top // 4 // count}',
                   ((0, top // 4 // count),) * count, 0, 0)
                  for count in (1, 2)] + [
                      (f'prefill 1 x {top}', ((0, top),), 0, 0)]


def buckets(config: EngineConfig, timed: Iterable[TimedStep]
            ) -> list[tuple[int, int]]:
  """(packed tokens, rows) of the compiled steps that these need."""
  needed = set()
  for _, pieces, batch, _ in timed:
    total = sum(stop - start for start, stop in pieces)
    needed.add((next(n for n in config.token_buckets(config.prefill_tokens)
                     if n >= total), 0) if pieces else (
        0, next(n for n in config.row_buckets if n >= batch)))
  return sorted(needed)


def run(target: Target, lines: Lines) -> None:
  """Each model's steps, then its hand-off."""
  reached = rates.measure(target.tiny)
  shares = []
  for name, rows in ({'tiny': 2} if target.tiny else MODELS).items():
    if lines.late(0.6):
      lines.write(name, None, skipped='out of time')
      continue
    model = (card.random_model(card.TINY, 'float32') if target.tiny
             else card.published(name))
    try:
      shares += time_steps(model, engine(rows, target.tiny), reached, lines)
    except (InputError, jax.errors.JaxRuntimeError) as error:  # no room
      lines.write(name, False, says=str(error)[-1000:])
  if shares:
    lines.write('all', figure=f'{min(shares):.0%} to {max(shares):.0%} of '
                'the floor')


def time_steps(model: Model, config: EngineConfig, reached: rates.Rates,
               lines: Lines) -> list[float]:
  """Shares of the floor that a model's steps reach; a line each."""
  instance = profiling.build(model, Plan(), 'colocated', config,
                             jax.devices())
  timed = steps(config)
  began = time.perf_counter()
  list(instance.compile(buckets(config, timed)))
  lines.write(f'{model.config.name}: compiled',
              seconds=time.perf_counter() - began)
  item = np.dtype(config.dtype).itemsize
  floor = Roofline(model.config, Hardware(
      'here', reached.flops_per_s, reached.bytes_per_s, 1.0, 1.0, 1.0, ''),
      itemsize=item, kv_itemsize=item)
  cells, shares = grid.Cells(instance), []
  for what, pieces, batch, context in timed:
    took = [once(cells, pieces, batch, context) for _ in range(ROUNDS + 1)]
    step_s, host_s = (statistics.median(x) for x in zip(*took[1:],
                                                        strict=True))
    least_s = floor.mixed_s(pieces, batch, grid.context_of(
        pieces, batch, context))
    shares.append(least_s / step_s)
    lines.write(f'{model.config.name}: {what}', None, seconds=step_s,
                host_s=host_s, least_s=least_s, share=least_s / step_s,
                tokens_per_s=(batch or sum(b - a for a, b in pieces)) / step_s,
                torch_s=None if pieces else torch_decode_s(
                    model.config, batch, context))
  hand_off(model, config, instance, reached, lines)
  return shares


def once(cells: grid.Cells, pieces: tuple[tuple[int, int], ...],
         batch: int, context: int) -> tuple[float, float]:
  """(seconds a step, the host's part: until it is dispatched)."""
  began = time.perf_counter()
  out, count = cells.run(pieces, batch, context)
  host_s = time.perf_counter() - began
  jax.block_until_ready(out)
  return (time.perf_counter() - began) / count, host_s / count


def hand_off(model: Model, config: EngineConfig, source: Engine,
             reached: rates.Rates, lines: Lines) -> None:
  """A hand-off to a second instance of the device, in bytes a second."""
  lengths = grid.spread(config.page_size, config.max_len // 2, 3)
  target = profiling.build(model, Plan(), 'decode', config,
                           card.device_twice())
  took = profiling.transfer_times(source, target, lengths, 3, lambda: None)
  each = kv_cache.bytes_per_token(model.config, config.kv_dtype_of('decode'),
                                  model.config.num_layers)
  for tokens, seconds in zip(lengths, took, strict=True):
    moved = tokens * each
    lines.write(f'{model.config.name}: hand-off of {tokens} tokens', None,
                seconds=seconds, bytes=moved, bytes_per_s=moved / seconds,
                of_a_copy=moved / seconds / (reached.bytes_per_s / 2))


def torch_decode_s(config: ModelConfig, batch: int, context: int,
                   layers: int = 4) -> float | None:
  """Seconds of a decode step of these shapes in torch, in a CUDA graph.

  `layers` of the layers are run and scaled; the head is not. KV is dense.
  None where torch or a GPU is missing, or the model is not gated.
  """
  try:
    import torch
  except ImportError:
    return None
  if not torch.cuda.is_available() or not config.gated:
    return None
  try:
    return torch_layers_s(torch, config, batch, context, layers, 'cuda')
  except RuntimeError as error:  # of memory that JAX has, say
    print(f'torch: {error}', flush=True)
    return None


def torch_layers_s(torch: Any, config: ModelConfig, batch: int, context: int,
                   layers: int, where: str) -> float:
  """See torch_decode_s; where: 'cuda', or 'cpu' without a graph."""
  D, N, K, H, F = (config.d_model, config.num_heads, config.num_kv_heads,
                   config.head_dim, config.d_ff)
  made = dict(device=where, dtype=torch.bfloat16)
  x_BD = torch.randn(batch, D, **made)
  weights = [[torch.randn(*shape, **made) * 0.02 for shape in (
      (D, (N + 2 * K) * H), (N * H, D), (D, 2 * F), (F, D))]
      for _ in range(layers)]
  held = [[torch.randn(batch, K, context, H, **made) for _ in 'kv']
          for _ in range(layers)]
  attend = torch.nn.functional.scaled_dot_product_attention
  norm = torch.nn.functional.rms_norm

  def step():
    y_BD = x_BD
    for (qkv, o, up, down), (k, v) in zip(weights, held, strict=True):
      q = (norm(y_BD, (D,)) @ qkv)[:, :N * H].view(batch, N, 1, H)
      seen = attend(q, k, v, enable_gqa=N != K).reshape(batch, N * H)
      y_BD = y_BD + seen @ o
      gate, value = (norm(y_BD, (D,)) @ up).chunk(2, -1)
      y_BD = y_BD + (torch.nn.functional.silu(gate) * value) @ down
    return y_BD

  with torch.inference_mode():
    step()
    if where == 'cpu':
      began = time.perf_counter()
      step()
      return (time.perf_counter() - began) / layers * config.num_layers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      step()
    took = []
    for _ in range(ROUNDS + 1):
      torch.cuda.synchronize()
      began = time.perf_counter()
      graph.replay()
      torch.cuda.synchronize()
      took.append(time.perf_counter() - began)
  return statistics.median(took[1:]) / layers * config.num_layers


if __name__ == '__main__':
  child.main(run)
