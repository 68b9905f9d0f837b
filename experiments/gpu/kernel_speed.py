"""Each kernel beside cuDNN and JAX's own, at the shapes of published models.

Seconds are of a call among many in one program, so what the device takes;
shares are of what it was just measured to reach (rates.py).
"""

import jax

from dsjax.kernels import cases, paged, tiles, timing
from experiments.gpu import child, rates
from experiments.gpu.lines import Lines, Target

TINY = cases.Case('decode', 'tiny', (4, 2, 64), ((1, 40),) * 2)
MODELS = ('llama-3-8b', 'opt-13b')


def wanted(tiny: bool) -> list[cases.Case]:
  """dsjax.kernels.cases.Cases in order of worth."""
  if tiny:
    return [TINY._replace(impl='xla'), TINY._replace(
        op='prefill', pieces=((24, 0),), impl='xla')]
  return cases.wanted(MODELS, list(cases.OPS), tiles.device_kind())


def run(target: Target, lines: Lines) -> None:
  """A line a case; the last says the median share of each op."""
  reached = rates.measure(target.tiny)
  lines.write('rates', **reached._asdict(), figure=(
      f'copy {reached.bytes_per_s / 1e9:.0f} GB/s, products '
      f'{reached.flops_per_s / 1e12:.1f} TFLOP/s'))
  limits, shares = paged.device(), {}
  for what, case in child.each(
      target, lines, wanted(target.tiny), lambda case: ', '.join((
          case.op, case.impl, case.model, case.text, case.kv))):
    args = cases.arguments(case)
    config, shape, _ = ((None, 'tiny', None) if target.tiny else
                        cases.plan(case, args, limits))
    arrays = timing.fill(args)
    try:
      took_s = timing.seconds(cases.call(case, config), arrays,
                              cases.UPDATED.get(case.op), repeats=3)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
      lines.write(what, False, says=str(error)[-1000:])
      continue
    facts = dict(op=case.op, impl=case.impl, model=case.model,
                 text=case.text, kv=case.kv, shape=shape, seconds=took_s)
    if config is not None:
      work = cases.count(case, args, config)
      least_s = reached.least_s(work.flops, work.floor_bytes)
      shares.setdefault((case.op, case.impl), []).append(least_s / took_s)
      facts |= dict(config=str(config), flops=work.flops,
                    floor_bytes=work.floor_bytes, least_s=least_s,
                    share=least_s / took_s)
    lines.write(what, None, **facts, others=timing.rivals(case, arrays))
  if shares:
    lines.write('all', figure=', '.join(
        f'{op} {impl} {sorted(of_peak)[len(of_peak) // 2]:.0%}'
        for (op, impl), of_peak in shares.items()))


if __name__ == '__main__':
  child.main(run)
