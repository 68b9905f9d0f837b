"""The smallest case of every kernel under NVIDIA's compute-sanitizer.

memcheck finds reads and writes outside an array (each has an allocation of its
own here), racecheck hazards in shared memory; neither is visible interpreted.
It runs this module once more for each, which then has BARE in its environment
and only runs the cases.
"""

import concurrent.futures
import functools
import os
import re
import shutil
import subprocess
import sys
from typing import Any

from experiments.gpu import child
from experiments.gpu.lines import Lines, Target

# What each says at its end where it has looked and found nothing; its options.
# Calls of the driver that JAX tries, and may fail, are no fault.
TOOLS = {'memcheck': ('ERROR SUMMARY: 0 errors', '--report-api-errors', 'no'),
         'racecheck': ('RACECHECK SUMMARY: 0 hazards',)}
BARE = 'DSJAX_GPU_BARE'


def cases(lines: Lines) -> None:
  """Runs every kernel once, natively, and looks at the results."""
  import jax
  import numpy as np

  from dsjax.kernels import decode_attention as decode
  from dsjax.kernels import kv_write, page_copy, tiles
  from dsjax.kernels import prefill_attention as prefill

  rng = np.random.default_rng(0)
  K, N, H, C, P, B = 1, 4, 64, 16, 6, 2
  on_gpu = jax.default_backend() in ('gpu', 'cuda')

  def normal(*shape):
    return np.asarray(rng.standard_normal(shape), 'bfloat16')

  pools = normal(K, P, C, H), normal(K, P, C, H)
  table_BM = np.array([[0, 3, P], [5, 1, 2]], np.int32)  # page P: not there
  lens_B = np.array([17, 40], np.int32)
  starts_A, pos_B = np.array([0, 5, 12], np.int32), lens_B - [5, 7]
  impls = ['pallas'] if on_gpu else ['pallas_interpret']
  if on_gpu and not tiles.mosaic_lacks((normal(B, N, H), pools[0]),
                                       tiles.device_kind()):
    impls.append('mosaic')
  want = {}
  for impl in ('xla', *impls):
    attended = jax.jit(lambda *args, impl=impl: (
        decode.decode_attention(*args[:5], impl),
        prefill.prefill_attention(*args[5:], impl)))(
            normal_q(B, N, H), *pools, table_BM, lens_B,
            normal_q(12, N, H), *pools, table_BM, starts_A,
            pos_B.astype(np.int32))
    want[impl] = [np.asarray(x, np.float32) for x in attended]
    if impl != 'xla':
      wrong = max(float(np.abs(x - y).max())
                  for x, y in zip(want[impl], want['xla'], strict=True))
      lines.write(f'attention, {impl}', wrong < 0.05, error=wrong)
  for impl in impls[:1]:
    page, offset = np.array([4, P, 0]), np.array([3, 0, 15])
    kept = jax.jit(lambda *args, impl=impl: (
        kv_write.kv_write(*args, None, impl), page_copy.pack(
            args[0][0], np.array([2, 0, 2]), impl), page_copy.unpack(
                args[0][1], np.array([1, P]), args[1].reshape(
                    K, -1, 1, H)[:, :2].repeat(C, 2), impl)))(
                        pools, normal(3, K, H), normal(3, K, H), page, offset)
    lines.write(f'writes and copies, {impl}', all(
        np.isfinite(np.asarray(x, np.float32)).all()
        for x in jax.tree.leaves(kept)))


def normal_q(*shape: int) -> Any:
  """Queries, the same for every implementation."""
  import numpy as np
  return np.asarray(np.random.default_rng(1).standard_normal(shape),
                    'bfloat16')


def run(target: Target, lines: Lines) -> None:
  """The cases under each tool; without the tools, the cases alone."""
  if os.environ.get(BARE):
    cases(lines)
    return
  tool = shutil.which('compute-sanitizer', path=os.pathsep.join((
      os.environ.get('PATH', ''), '/usr/local/cuda/bin')))
  if tool is None or target.tiny:
    cases(lines)
    lines.write('compute-sanitizer', figure='not found: cases run bare'
                if tool is None else 'cases run bare')
    return
  with concurrent.futures.ThreadPoolExecutor(len(TOOLS)) as pool:
    verdicts = pool.map(functools.partial(under, tool, target, lines), TOOLS)
  lines.write('all', figure=', '.join(verdicts))


def under(tool: str, target: Target, lines: Lines, name: str) -> str:
  """A line for the cases under a tool; its verdict in words."""
  try:
    done = subprocess.run(
        [tool, '--tool', name, *TOOLS[name][1:], '--error-exitcode', '9',
         '--print-limit', '5', sys.executable, *sys.orig_argv[1:]],
        capture_output=True, text=True, errors='replace',
        timeout=0.9 * target.seconds, env=os.environ | {
            BARE: name, 'XLA_PYTHON_CLIENT_ALLOCATOR': 'platform',
            'XLA_FLAGS': '--xla_gpu_enable_command_buffer='})
  except subprocess.TimeoutExpired:
    lines.write(name, None, skipped='out of time')
    return f'{name} out of time'
  says = (done.stdout + done.stderr).strip()
  print(says, flush=True)
  ok = judged(name, done.returncode, says)
  lines.write(name, ok, says=says[-1500:])
  return f'{name} ' + {True: 'clean', False: 'not clean',
                       None: 'did not run'}[ok]


def judged(name: str, code: int, says: str) -> bool | None:
  """Whether a tool found nothing; None where it could not look at all, as
  where the driver does not let it."""
  if not re.search('(ERROR|RACECHECK) SUMMARY', says) or (
      'Device not supported' in says):
    return None
  return code == 0 and TOOLS[name][0] in says


if __name__ == '__main__':
  child.main(run)
