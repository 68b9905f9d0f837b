"""The grid of steps that are timed: dsjax/runtime/grid.py."""

import itertools

import pytest

from dsjax.config.engine import EngineConfig
from dsjax.runtime import grid, profiling
from dsjax.simulation import contention, latency

CONFIGS = [
    EngineConfig(max_len=192, max_seqs=8, prefill_tokens=128, chunk_tokens=128,
                 prefill_seqs=4),
    EngineConfig(max_len=96, max_seqs=4, prefill_tokens=32, chunk_tokens=32,
                 prefill_seqs=2),
    EngineConfig(max_len=64, max_seqs=2, prefill_tokens=64, chunk_tokens=64),
    profiling.ENGINE]


@pytest.mark.parametrize('config', CONFIGS)
@pytest.mark.parametrize('points', [2, 4])
def test_mixed_steps_are_timed_at_every_size_they_are_compiled_for(
    config, points):
  """Of 8 rows only steps beside 2 were timed, and none of the largest: these
  took a tenth longer than predicted."""
  buckets, seen = profiling.buckets_of(config), set()
  for pieces, rows, _ in grid.shapes(config, points):
    tokens = latency.sums(pieces)[0]
    assert tokens + rows <= config.prefill_tokens or not rows
    assert len(pieces) + rows <= config.max_seqs
    if pieces and rows:
      seen.add((latency.round_up(tokens, buckets.tokens),
                latency.round_up(rows, buckets.mixed_rows)))
  ends = {buckets.tokens[0], buckets.tokens[-1]}
  rows = {size for size in buckets.mixed_rows
          if size // 2 < config.max_seqs - 1}
  assert seen >= set(itertools.product(ends, rows)), seen


def test_a_grid_times_nothing_twice():
  cells = grid.shapes(profiling.ENGINE, 4)
  assert len(cells) == len(set(cells))


@pytest.mark.parametrize('config', [*CONFIGS, EngineConfig(
    max_len=64, max_seqs=256, prefill_tokens=64, chunk_tokens=64)])
def test_steps_side_by_side_are_of_the_least_and_the_largest_size(config):
  cells, buckets = grid.of_several_sizes(config), profiling.buckets_of(config)
  assert set(cells) == set(contention.KINDS)
  for kind, own in cells.items():
    sizes = []
    for pieces, rows, each in own:
      tokens = latency.sums(pieces)[0]
      assert contention.kind_of(pieces, rows) == kind or config.max_seqs == 1
      assert tokens + rows <= config.prefill_tokens or not pieces
      assert len(pieces) + rows <= config.max_seqs
      assert each + grid.STEPS < config.max_len
      sizes.append(latency.round_up(tokens, buckets.tokens) if pieces else rows)
    ends = {'single': (1, 1), 'decode': (min(2, config.max_seqs),
                                         config.max_seqs)}.get(
        kind, (buckets.tokens[0], buckets.tokens[-1]))
    assert (min(sizes), max(sizes)) == ends
    assert len(own) <= 3
