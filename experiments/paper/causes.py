"""Why figures 8 and 9 differ from the paper's: one thing changed at a time.

Every row is a system under the paper's rules, and the same with a change: what
of a distance to the published value it explains. SEEDS short runs each.
"""

import dataclasses
from typing import Any, NamedTuple

from dsjax import workload
from dsjax.analysis import metrics
from dsjax.placement import goodput
from experiments.paper import comparison, end_to_end, plots, reported
from experiments.paper.comparison import Rules, System

SEEDS = 4


class Change(NamedTuple):
  """What is not as the paper's rules have it.

  joint: the same request meets both objectives. long: runs as long as ours,
  without their warm-up. requests: of a run. turns: a decode step takes 50,000
  tokens of context at most. prefill_tokens: of a batch. lengths: see
  workload.source.
  """

  text: str = ''
  joint: bool = False
  long: bool = False
  requests: int | None = None
  turns: bool = True
  prefill_tokens: int | None = None
  lengths: str | None = None


JOINT = Change('the same request meets both', joint=True)
LONG = Change('long runs', long=True)
UNCAPPED = Change('no 50,000 tokens a step', turns=False)
CHECKED = (
    ('13b', 'DistServe', (JOINT, LONG, UNCAPPED)),
    ('66b', 'DistServe', (JOINT, LONG, UNCAPPED)),
    ('66b', 'vLLM', (Change('300 requests', requests=300),
                     Change('1,000 requests', requests=1000))),
    ('175b', 'DistServe', (Change('prefill batches of 2,048 tokens',
                                  prefill_tokens=2048),)),
    ('humaneval', 'vLLM', (Change('all requests 171 + 98 tokens',
                                  lengths='fixed:171x98'),)),
    ('longbench', 'DistServe', (JOINT, LONG)))


def changed(system: System, change: Change) -> System:
  """The System with what the change says of it."""
  if not change.turns:
    system = system._replace(latencies=[x.affine for x in system.latencies])
  if change.prefill_tokens:
    config = system.config
    system = system._replace(config=dataclasses.replace(
        config, instances=tuple(dataclasses.replace(
            x, prefill_tokens=change.prefill_tokens)
                                for x in config.instances)))
  return system


def rate_of(options: Any, name: str, label: str, change: Change, seed: int
            ) -> float:
  """Goodput per device of a system of SYSTEMS, changed."""
  case, rules = reported.CASES[name], Rules('paper', seed, options.quick)
  make, longest = comparison.requests(case, rules, options.traces)
  if change.lengths:
    make = workload.source(change.lengths, seed)
  form, engine, realigned = end_to_end.SYSTEMS[label]
  system = changed(form(rules, case, comparison.problem(
      case.model, case.slo, make, longest, comparison.latency_of(
          case.model, engine, realigned, rules), 3)), change)
  runs = Rules('ours', seed, options.quick) if change.long else rules

  def hits_at(rate, n):
    n = change.requests or comparison.count(runs, system, rate, case.slo,
                                            case.per_gpu)
    seen = comparison.steady(runs, comparison.records(system, make, rate, n))
    return ([metrics.attains(r, case.slo) for r in seen] if change.joint
            else comparison.apart(seen, case.slo))
  return goodput.search(
      hits_at, comparison.TARGET, case.scale_rate,
      1.2 if options.quick else 1.08, 1, 1, goodput.Bisection(
          most_per_s=64 * case.scale_rate,
          least_per_s=case.scale_rate / 64)).rate_per_s


def causes(options: Any) -> dict[str, Any]:
  """Goodput as the paper's rules have it, and with each change."""
  rows, bars = [], []
  seeds = range(options.seed, options.seed + (1 if options.quick else SEEDS))
  for name, label, changes in CHECKED[:1] if options.quick else CHECKED:
    case, spans = reported.CASES[name], []
    title = f'{case.title}: {label}'
    published = case.goodput[('DistServe', 'vLLM').index(label)]
    for change in (Change(), *changes):
      options.tell(f'{title}, {change.text or "paper rules"}')
      rates = [rate_of(options, name, label, change, seed) for seed in seeds]
      spans.append((sum(rates) / len(rates), min(rates), max(rates)))
      bars.append((f'{title}: {change.text or "paper rules"}', published,
                   *spans[-1]))
    before, *after = ('{:.3g} ({:.3g} to {:.3g})'.format(*x) for x in spans)
    rows += [(f'{title}: {change.text}', published, before, text)
             for change, text in zip(changes, after, strict=True)]
  return {'rows': rows, 'bars': bars,
          'columns': ('paper', 'paper rules', 'changed'),
          'why': 'Requests/s per GPU: the mean of '
          f'{len(seeds)} seeds, the least and the most. Changed: the '
          "paper's rules but for what the row says."}


FIGURES = {'causes': (causes, plots.draw_causes)}
