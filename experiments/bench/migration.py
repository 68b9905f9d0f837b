"""KV from any plan to any plan: what is copied, how fast, what decode feels.

  python -m experiments.bench.migration --pairs=1x1:1x1,2x1:1x2 --tokens=1024

For each pair TPxPP:TPxPP it prints
  needed    bytes of the request's pages, once;
  copied    bytes sent from device to device, and the ratio: 1.00 unless kv
            heads are replicated on the target;
  copies    arrays sent (1: in memory of both, see runtime/landing.py);
  GB/s      copied bytes over the time from dispatch to the last page in
            place, and its share of what a plain `jax.device_put` of the same
            pieces to the same devices has (no gather, no scatter);
  step, x   a decode step of 4 rows on the target, and how many times as long
            it takes while one migration a step arrives there: the median of
            pairs, and in brackets the least and the most;
  hidden    the share of a migration's own time that decode does not feel: 0
            where nothing overlaps.
All are timed in turn and medians reported. CPU devices of one process share
cores and memory, and meshes of several devices take turns there, so overlap
shows on one-device instances only. Ctrl-C keeps the pairs that were measured.
"""

import dataclasses
import statistics
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console

import dsjax
from dsjax.checkpoints.weights import random_params
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement
from dsjax.config.request import Sampling
from dsjax.model import kv_cache, sharding
from dsjax.runtime import engine, migration
from dsjax.runtime.protocols import StepOutput
from dsjax.scheduling.events import Migrate, Row, RunDecode
from experiments.bench import kept
from experiments.common import cli
from experiments.common import overrides as configs

FLAGS = {
    'model': cli.Flag('smollm2-135m-instruct', "As dsjax.load takes it, or "
                      "'tiny'."),
    'pairs': cli.Flag(['1x1:1x1', '2x1:2x1', '2x1:1x1', '1x1:2x1', '3x1:2x1',
                       '1x2:1x1', '2x2:1x3', '4x1:1x4', '1x1:8x1'],
                      'Plans TPxPP of source and target.'),
    'tokens': cli.Flag(1024, 'Tokens of the request.', low=1),
    'rounds': 5, 'set': (),
    'devices': cli.Flag(16, 'CPU devices to make.'),
    'out': cli.Flag(None, 'JSON file for the numbers.', str),
}

STEPS, ROWS = 16, 4
CONFIG = EngineConfig(max_len=512, max_seqs=ROWS + 1, prefill_tokens=64,
                      prefill_seqs=1, transfer_pages=64, prefix_cache=False)


def load(name: str) -> dsjax.Model:
  """The Model; 'tiny' is random weights of a small shape."""
  if name != 'tiny':
    return dsjax.load(name)
  shape = ModelConfig('tiny', 4, 64, 9, 3, 16, 96, 128, 4096)
  return dsjax.Model(shape, random_params(shape, 0))


def clock(fn: Callable[[], object]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(fn())
  return time.perf_counter() - start


class Bench:
  """Two instances and a request of `tokens` tokens on its way."""

  def __init__(self, loaded: dsjax.Model, placement: Placement,
               config: EngineConfig, tokens: int) -> None:
    meshes = sharding.make_meshes(loaded.config, placement, jax.devices())
    source, self.target = (
        engine.Engine(loaded, stages, role, config)
        for stages, role in zip(meshes, ('prefill', 'decode'), strict=True))
    self.route = route = migration.Route(source, self.target)
    route.warm()
    first = ROWS * self.target.capacity.num_pages // (ROWS + 1)
    counts = [-(-tokens // e.capacity.page_size) for e in (source, self.target)]
    self.command = Migrate(0, 1, 0, tuple(range(counts[0])), 1,
                           tuple(range(first, first + counts[1])), tokens)
    for _ in self.target.warm():
      pass
    each = first // ROWS
    for id in range(ROWS):
      self.target.admit(id, [1] * 64, 64, Sampling())
    self.rows = tuple(Row(id, 64, STEPS, tuple(
        range(id * each, (id + 1) * each))) for id in range(ROWS))
    self.pieces, self.to = self._pieces(counts[1])

  def _pieces(self, pages):
    """Arrays shaped as what is sent, on their source devices; targets."""
    source, target = self.route.source, self.target
    arrays, to = [], []
    shapes = [(x.shape[2:], x.dtype)
              for x in kv_cache.by_layer(target.stages[0].cache)[0]]
    for piece in self.route.pieces:
      (stage, shard), (to_stage, to_shard) = piece.source, piece.target
      device = source.where[2][stage].devices.flat[shard]
      for _ in range(*piece.layers):
        for shape, dtype in shapes:
          arrays.append(jax.device_put(np.ones(  # no page of zeros
              (len(piece.heads), pages, *shape), dtype), device))
          to.append(target.where[2][to_stage].devices.flat[to_shard])
    return arrays, to

  def move(self) -> list[jax.Array]:
    return self.route.start(self.command).land()

  def put(self) -> list[jax.Array]:
    return jax.device_put(self.pieces, self.to)

  def decode(self, moving: bool = False
             ) -> tuple[list[StepOutput], list[jax.Array]]:
    """STEPS decode steps; moving: each followed by a migration."""
    outs, done = [], []
    for step in range(STEPS):
      outs += self.target.decode(RunDecode(1, step, step, 1, self.rows))[0]
      if moving:
        done += self.move()
    return outs, done

  def run(self, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    fns = (self.move, self.put, self.decode, lambda: self.decode(True))
    for fn in fns:
      clock(fn)
    taken = [[clock(fn) for fn in fns] for _ in range(rounds)]
    move, put, alone, both = map(statistics.median, zip(*taken, strict=True))
    slower = sorted(b / a for *_, a, b in taken)
    config = self.target.where[0].model
    transfer = self.route.start(self.command)
    needed = len(self.command.target_pages) * self.target.capacity.page_size * (
        kv_cache.bytes_per_token(
            config, self.target.config.kv_dtype_of('decode'),
            config.num_layers))
    return dict(
        needed_mb=needed / 1e6, copied_mb=transfer.bytes / 1e6,
        ratio=transfer.bytes / needed,
        copies=1 if self.route.shares else len(self.pieces) * len(
            self.route.batches(self.command)),
        gb_per_s=transfer.bytes / move / 1e9,
        put_gb_per_s=sum(x.nbytes for x in self.pieces) / put / 1e9,
        step_ms=alone / STEPS * 1e3, slower=statistics.median(slower),
        slower_range=(slower[0], slower[-1]),
        hidden=1 - (both - alone) / (STEPS * move))


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Measures every pair and prints a line each."""
  say = cli.says(console)
  for pair in options.pairs:
    require(pair.count(':') == 1, '--pairs', pair, 'TPxPP:TPxPP')
  pairs = [Placement.parse('prefill={},decode={}'.format(*pair.split(':')),
                           '--pairs') for pair in options.pairs]
  cli.prepare(options.devices, tp=max(pair.tp for pair in pairs))
  config = dataclasses.replace(CONFIG, max_len=max(512, options.tokens))
  config = configs.override(config, options.set)
  loaded, results = load(options.model), []
  say(f'{loaded.config.name}, {options.tokens} tokens, '
      f'{len(jax.devices())} {jax.devices()[0].device_kind} devices')
  say(f'{"tp x pp":9} {"needed":>8} {"copied":>8} {"ratio":>5} '
      f'{"copies":>6} {"GB/s":>5} {"share":>5} {"step ms":>7} '
      f'{"x":>5} {"":12}{"hidden":>7}')

  def measure():
    for name, placement in zip(options.pairs, pairs, strict=True):
      row = Bench(loaded, placement, config, options.tokens).run(options.rounds)
      results.append(dict(pair=name, **row))
      say(line(name, row))
  return kept.end(console, {'pairs': results}, kept.until_stopped(measure),
                  options, FLAGS)


def line(name: str, row: Mapping[str, Any]) -> str:
  """A row of the table."""
  least, most = row['slower_range']
  return (f'{name.replace(":", " > "):9} {row["needed_mb"]:7.1f}M '
          f'{row["copied_mb"]:7.1f}M {row["ratio"]:5.2f} {row["copies"]:6d} '
          f'{row["gb_per_s"]:5.2f} '
          f'{row["gb_per_s"] / row["put_gb_per_s"]:5.2f} '
          f'{row["step_ms"]:7.1f} {row["slower"]:5.2f} '
          f'[{least:.2f}, {most:.2f}]{row["hidden"]:7.2f}')


if __name__ == '__main__':
  cli.main(run, FLAGS, CONFIG)
