"""Two instances on one device serve a small model: tokens, pages, faults.

Greedy tokens of float32 must be those of the XLA reference in every mode; of
bfloat16 and of quantised KV most must be. Nothing compiles and nothing is
moved implicitly while requests run, all pages come back, an instance dies and
starts again, and errors of the device come late.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement
from dsjax.runtime import orchestrator
from dsjax.scheduling import prefix_cache, scheduler
from experiments.common import machine
from experiments.gpu import card, child
from experiments.gpu.lines import Lines, Target
from experiments.verify.faults import Injector

MODES = {'disaggregated': 'prefill=1x1,decode=1x1',
         'colocated': 'colocated=1x1', 'chunked': 'chunked=1x1'}
QUANTISED = ('int8', 'float8_e4m3fn', 'float8_e5m2')
FAULTS = (('prefill', 'raise after'), ('decode', 'raise after'),
          ('decode', 'unreadable'), ('decode', 'delete'),
          ('scatter', 'raise after'))


def engine(tiny: bool) -> EngineConfig:
  """The EngineConfig of all servers."""
  return EngineConfig(
      max_len=128 if tiny else 512, page_size=16, max_seqs=4,
      num_pages=64 if tiny else 256, prefill_tokens=64 if tiny else 256,
      prefill_seqs=2, chunk_tokens=64 if tiny else 128, checksum=True,
      tries=50, restarts=50, restart_s=0.0)


def prompts(config: ModelConfig, tiny: bool) -> list[tuple[list[int], int]]:
  """Token ids of prompts of many lengths, and how many tokens each gives."""
  rng = np.random.default_rng(0)
  longest = 100 if tiny else 400
  return [(rng.integers(3, config.vocab_size, n).tolist(), 6 if tiny else 32)
          for n in (1, 15, 16, 17, 33, longest // 2, longest)]


def outputs(server: orchestrator.Orchestrator,
            work: Sequence[tuple[Sequence[int], int]],
            between: Callable[[int], object] = lambda polls: None
            ) -> list[tuple[int, ...]]:
  """Tokens of each prompt, all of them served together.

  between: called between two polls, with how many there were.
  """
  ids = [server.submit(prompt, max_tokens=count, ignore_eos=True)
         for prompt, count in work]
  polls = 0
  while server.busy:
    server.poll()
    polls += 1
    between(polls)
  return [server.output(id).tokens for id in ids]


def tidy(server: orchestrator.Orchestrator) -> bool:
  """Whether every page and slot has come back."""
  scheduler.check(server.state)
  return scheduler.idle(server.state) and all(
      prefix_cache.num_free(i.pool) == i.pool.num_pages
      for i in server.state.instances)


def same(got: Sequence[Sequence[int]], want: Sequence[Sequence[int]]) -> float:
  """Share of tokens that are equal, position by position."""
  pairs = [(x, y) for a, b in zip(got, want, strict=True)
           for x, y in zip(a, b, strict=True)]
  return sum(x == y for x, y in pairs) / len(pairs)


def variants(tiny: bool) -> list[tuple[str, str, dict[str, Any], float]]:
  """[(name, placement, changes to the engine, least share of tokens)]."""
  split = MODES['disaggregated']
  made = [(f'disaggregated, {kv} at decode', split, dict(decode_kv_dtype=kv),
           0.3) for kv in QUANTISED[:1 if tiny else 3]]
  if tiny:  # a fault's server is disaggregated, in float32
    return made
  made += [(f'{mode}, {dtype}', text, dict(dtype=dtype), least)
           for mode, text in MODES.items()
           for dtype, least in (('float32', 1.0), ('bfloat16', 0.5))]
  return [*made, ('disaggregated, pages of 16 to 32', split,
                  dict(decode_page_size=32), 1.0)]


def run(target: Target, lines: Lines) -> None:
  """All variants, then faults."""
  jax.config.update('jax_default_matmul_precision', 'highest')
  config = card.TINY if target.tiny else card.SMALL
  plain = engine(target.tiny)
  models = {dtype: card.random_model(config, dtype)
            for dtype in ('float32', 'bfloat16')}
  work = prompts(config, target.tiny)
  with orchestrator.serve(
      models['float32'], MODES['colocated'],
      dataclasses.replace(plain, attention='xla'),
      devices=card.device_twice(), report=lambda *_: None) as server:
    want = outputs(server, work)
  right = total = 0
  for name, text, changes, least in variants(target.tiny):
    if lines.late(0.7):
      lines.write(name, None, skipped='out of time')
      continue
    asked = dataclasses.replace(plain, **changes)
    with orchestrator.serve(
        models[asked.dtype], Placement.parse(text), asked,
        devices=card.device_twice(), report=lambda *_: None) as server:
      with machine.compilations() as compiled:
        share = same(outputs(server, work), want)
      ok = (share >= least and not compiled and tidy(server)
            and not server.faults)
      right, total = right + ok, total + 1
      lines.write(name, ok, tokens_equal=share, compiled=len(compiled),
                  tidy=tidy(server), faults=len(server.faults),
                  copied_bytes=server.copied_bytes)
  faults(models['float32'], plain, work, want, lines)
  lines.write('all', figure=f'{right} of {total} variants')


def faults(model: Model, plain: EngineConfig,
           work: Sequence[tuple[Sequence[int], int]],
           want: Sequence[Sequence[int]], lines: Lines) -> None:
  """An instance is killed, and calls go wrong: the same tokens come."""
  with orchestrator.serve(
      model, MODES['disaggregated'], plain, devices=card.device_twice(),
      report=lambda *_: None) as server:
    for instance in (0, 1):
      def kill(polls, instance=instance):
        if polls == 6:
          server.kill(instance, back_s=0.0)

      got = outputs(server, work, kill)
      lines.write(f'kill of instance {instance}', got == want and tidy(server),
                  tokens_equal=same(got, want), tidy=tidy(server))
    for method, kind in FAULTS:
      with Injector(server) as injector:
        injector.arm(int(method != 'prefill'), method, kind)
        ok = outputs(server, work) == want and tidy(server)
        for instance in (0, 1):
          server.restore(instance)
        lines.write(f'{method}: {kind}', ok and bool(injector.fired))


if __name__ == '__main__':
  child.main(run)
