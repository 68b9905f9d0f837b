"""Any plan to any plan: tokens, checksums, host reads, pages.

  python -m tests.runtime.plans_test          # the sample of `.ci/run`
  python -m tests.runtime.plans_test --full   # all pairs of 15 plans: minutes

It needs 48 CPU devices, so it runs in a process of its own.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
import time

import pytest

PLANS = tuple(itertools.product((1, 2, 3, 4, 8), (1, 2, 3)))
# Every tp and every pp on each side; with and without fewer kv heads.
SAMPLE = (((1, 3), (4, 1), 2), ((2, 1), (3, 2), 8), ((3, 2), (8, 1), 2),
          ((4, 1), (1, 3), 8), ((8, 1), (2, 2), 2))


@pytest.mark.slow
def test_a_sample_of_plans():
  env = dict(os.environ, NPROC='64')  # 0.10 can deadlock with few threads
  done = subprocess.run(
      [sys.executable, '-m', 'tests.runtime.plans_test'], env=env,
      capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count(' ok, ') == len(SAMPLE)


def main(full):
  import jax
  jax.config.update('jax_num_cpu_devices', 48)
  jax.config.update('jax_numpy_rank_promotion', 'raise')
  jax.config.update('jax_compilation_cache_dir', '.cache/jax')
  from jax._src.array import ArrayImpl

  from dsjax.checkpoints import checkpoint
  from dsjax.config.engine import EngineConfig
  from dsjax.config.placement import Placement, Plan
  from dsjax.config.request import Request, Sampling
  from dsjax.runtime import migration, orchestrator
  from dsjax.scheduling import prefix_cache, scheduler
  from tests.common import tiny

  reads, value = [], ArrayImpl._value.fget
  ArrayImpl._value = property(lambda x: reads.append(x.size) or value(x))
  config = EngineConfig(
      max_len=32, page_size=4, num_pages=12, max_seqs=2, prefill_tokens=32,
      prefill_seqs=2, transfer_pages=4, checksum=True)
  work = [(tiny.prompt(5), 0.0), (tiny.prompt(13), 0.8), (tiny.prompt(9), 0.0),
          (tiny.prompt(17), 0.8)]

  def serve(placement, devices, kv_heads):
    shape = dataclasses.replace(tiny.UNTIED, num_layers=3, num_heads=8,
                                num_kv_heads=kv_heads, d_ff=50)
    model = checkpoint.Model(shape, tiny.params(shape))
    with orchestrator.serve(model, placement, config, devices=devices,
                            report=lambda *_: None) as server:
      reads.clear()
      records = server.run([
          Request(i, 0.0, prompt, Sampling(
              max_tokens=10, temperature=hot, seed=i, ignore_eos=True))
          for i, (prompt, hot) in enumerate(work)])
      assert [r.status for r in records] == ['length'] * len(work)
      assert reads and max(reads) <= 2 * config.max_seqs, reads
      scheduler.check(server.state)
      assert scheduler.idle(server.state)
      for inst, engine in zip(server.state.instances, server.engines,
                              strict=True):
        assert prefix_cache.num_free(inst.pool) == engine.capacity.num_pages
      return [server.output(i).tokens for i in range(len(work))], server

  def plain(kv_heads):
    return serve(Placement(colocated=[Plan()]), jax.devices(),
                 kv_heads)[0]

  want = {k: plain(k) for k in (2, 8)}
  pairs = SAMPLE
  if full:
    pairs = [(a, b, k) for k in (2, 8) for a in PLANS for b in PLANS]
  for source, target, kv_heads in pairs:
    start = time.perf_counter()
    placement = Placement(prefill=[Plan(*source)],
                          decode=[Plan(*target)])
    used = placement.prefill[0].num_devices
    devices = jax.devices()[:used] + jax.devices()[24:]  # shared programs
    tokens, server = serve(placement, devices, kv_heads)
    assert tokens == want[kv_heads], (source, target, tokens)
    route, = server.routes.values()
    ratio = migration.ratio(route.pieces, server.engines[0].where[0])
    print(f'tp, pp {source} -> {target}, {kv_heads} kv heads: ok, copied '
          f'{ratio:.2f} of the bytes, {time.perf_counter() - start:.1f} s',
          flush=True)


if __name__ == '__main__':
  main('--full' in sys.argv)
