"""What ptxas says of each kernel here: registers, spills, shared memory.

The kernels of the steps that `make aot` compiles, at the shapes that one
device of those has, compiled once more for the GPU that is here, with its
toolkit. --ingest puts them beside the table of `make aot`. In that command's
environment it compiles for a described H100 instead.
"""

import os
import tempfile

import jax

from dsjax.kernels import bench, cases, compiled, paged, tiles
from experiments.gpu import child
from experiments.gpu.lines import Lines, Target

MODELS = ('llama-3-8b', 'opt-13b')
DESCRIBED = 'H100'


def run(target: Target, lines: Lines) -> None:
  """A line a kernel, which must not spill."""
  with tempfile.TemporaryDirectory() as dump:
    os.environ.update(compiled.environment(dump))
    # What is taken from the cache writes no PTX.
    jax.config.update('jax_enable_compilation_cache', False)
    here = compiled.is_here()
    name = paged.device().name if here else DESCRIBED
    if not compiled.available(name):
      lines.write('all', figure='no ptxas here' if here else
                  'no CUDA plugin here: nothing compiled')
      return
    if here:
      spilled = compile_all(target, lines, tiles.device_kind(), dump)
    else:
      kind = compiled.GPUS[name][1]
      with compiled.described(kind):
        spilled = compile_all(target, lines, kind, dump)
    lines.write('all', figure=f'{len(spilled)} kernels, {sum(spilled)} spill')


def compile_all(target: Target, lines: Lines, kind: str, dump: str
                ) -> list[bool]:
  """Whether each kernel spills."""
  limits, spilled = paged.device(kind), []
  wanted = [c for model in MODELS[:1 if target.tiny else None]
            for c in cases.of_steps(model, kind)]
  for what, case in child.each(
      target, lines, wanted, lambda case: ', '.join((
          case.kernel, case.impl, case.model, case.text))):
    args = cases.arguments(case)
    config = cases.plan(case, args, limits)[0]
    try:
      kernel = bench.code(case, args, config, cases.count(case, args, config),
                          limits.name, dump)
    except (RuntimeError, ValueError) as error:  # of XLA, Mosaic, ptxas
      lines.write(what, False, says=str(error)[-1000:])
      continue
    spilled.append(kernel.spilled > 0)
    lines.write(what, not kernel.spilled, model=case.model, kernel=case.kernel,
                compiled=kernel._asdict() | {
                    'grid': ', '.join(map(str, kernel.grid))})
  return spilled


if __name__ == '__main__':
  child.main(run)
