"""Looks for faster configs of the kernels, at the shapes that serve.

What it finds goes to kernels/tuned.json here, for the tasks after it, and into
the part's file, for --ingest.
"""

import contextlib
import dataclasses
import os

import jax

from dsjax.kernels import cases, paged, tiles, timing, tuned
from experiments.gpu import child
from experiments.gpu.lines import Lines, Target


def run(target: Target, lines: Lines) -> None:
  """A line a case: the heuristic's config and seconds, the tuned ones."""
  if target.tiny:
    fastest = timing.tune(
        Toy(), lambda config: None,
        lambda config: lambda: abs(config.num_warps - 4) + 1)
    lines.write('toy', fastest == Toy(4), figure=f'{fastest}')
    return
  limits, gains, kind = paged.device(), [], tiles.device_kind()
  wanted = cases.wanted(('llama-3-8b',), list(cases.OPS), kind)
  for what, case in child.each(
      target, lines, wanted, lambda case: ', '.join((
          case.op, case.impl, case.text, case.kv)), 0.5):
    args = cases.arguments(case)
    config, shape, check = cases.plan(case, args, limits)
    arrays = timing.fill(args)

    def build(config, case=case, arrays=arrays):
      if lines.late(0.95):
        raise ValueError('out of time')
      run = timing.timed(cases.call(case, config), arrays,
                         cases.UPDATED.get(case.op))
      return lambda: run(repeats=2, least_s=0.004)

    try:
      best = timing.tune(config, check, build, os.cpu_count() or 1)
      before_s, best_s = build(config)(), build(best)()
    except (ValueError, jax.errors.JaxRuntimeError) as error:
      lines.write(what, None, says=str(error)[-500:])
      continue
    op = cases.tuned_op(case)
    if best_s < 0.98 * before_s:  # less is noise
      with contextlib.suppress(OSError):  # of a checkout that is read-only
        tuned.save(op, shape, best)
    else:
      best = config
    gains.append(before_s / best_s)
    lines.write(what, None, kind=kind, op=op, shape=shape,
                before=str(config), before_s=before_s, seconds=best_s,
                config=dataclasses.asdict(best), kept=best != config)
  if gains:
    gains.sort()
    lines.write('all', figure=f'{len(gains)} shapes, median '
                f'{gains[len(gains) // 2]:.2f} times as fast')


@dataclasses.dataclass(frozen=True)
class Toy:
  """A config of nothing, to tune on a CPU."""

  num_warps: int = 1


if __name__ == '__main__':
  child.main(run)
