r"""A load that shifts, and what policies make of it, segment by segment.

  python -m experiments.replan --out=out/replan
  python -m experiments.replan --process=poisson --rate=60 \
    --lengths=shift:60:sharegpt+longbench

Flexible instances serve a load whose rate (--process=sine:... or step:...) or
lengths (--lengths=shift:...) shift, once under each of --policies, all with the
same requests, in virtual time: `replan` searches for a placement of the
instances again and again and applies the answer by role flips, `adaptive` the
like, `static` keeps a split. A policy with {k} in it is tried with every number
of prefill instances, and the one that attains most is shown.

It prints a line a segment and policy: the load (requests/s, tokens of prompt
and output), the roles at its end, the share that attained both objectives with
its 95 % interval, and flips. Where nothing shifts, flips after the first minute
should be none. A segment is a phase of the period that shifts (a quarter of a
sine), or --segment_s. Below, a line a policy: what attained of all requests
that came after --warmup_s, what attained in the worst segment after it, and how
much more the first is than of the best of the others, on the same requests,
with its 95 % interval. With --predicted=0.8,1.2 policies are served once with
latencies to predict from that are 20 % too short and once 20 % too long.
Virtual time stands still while a policy searches; a server asks in a process of
its own (docs/policies.md). Files in --out: replan.csv, replan.json, replan.png
and .pdf. Exit codes: 0; 2 for bad input; 130 by Ctrl-C.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dsjax.analysis import metrics
from dsjax.config.checks import InputError, is_number, require
from dsjax.config.placement import FIRST_ROLE, Placement, Plan, Slo
from dsjax.placement.api import build, make_problem
from dsjax.scheduling.events import Flip
from dsjax.scheduling.pace import Paced
from dsjax.simulation import simulator
from experiments.common import cli, pictures, policies, provenance, terminal

SHORT = {'prefill': 'P', 'decode': 'D', 'colocated': 'B', 'chunked': 'C'}
MOST = 2**20  # requests
FLAGS = {
    'model': cli.Flag('llama-3-8b', 'A name of dsjax.config.zoo.'),
    'latency': 'tables:h100-80g',
    'plan': cli.Flag('1x1', 'TPxPP of each instance.'),
    'instances': cli.Flag(4, 'Flexible instances.', low=2, high=64),
    'policies': cli.Flag(['static:prefills={k}', 'replan', 'adaptive'],
                         'As --policy, with commas between.'),
    'lengths': 'sharegpt', 'process': 'sine:low=20:high=120:period_s=60',
    'rate': cli.Flag(None, 'Requests a second; of a sine or step the mean, by '
                     'default its own.', float),
    'seconds': cli.Flag(180.0, 'Of the load.', low=1.0),
    'segment_s': cli.Flag(None, 'Seconds of a segment, where nothing shifts; '
                          'by default a sixth of all.', float, low=0.1),
    'warmup_s': cli.Flag(0.0, 'Requests that come before count in no sum.',
                         low=0.0),
    'predicted': cli.Flag(['1'], 'Times what steps take, what policies are '
                          'told that they take.'),
    'ttft_s': 0.192, 'tpot_s': 0.0224, 'seed': 0,
    'out': None,
}


class Segment(NamedTuple):
  """A line of replan.csv: what came in a span of time, and what became of it.

  roles: at its end, a letter an instance: P prefill, D decode, B both
  (colocated), C chunked. flips: in it, those of the start left out.
  """

  policy: str
  start_s: float
  phase: str
  rate_per_s: float
  prompt_len: float
  output_len: float
  roles: str
  flips: int
  attained: float
  low: float
  high: float


class Served(NamedTuple):
  """A run: the policy, its segments, whether each request that counts
  attained, by arrival; (second, Flip) of each."""

  policy: str
  segments: list[Segment]
  hits: list[bool]
  flips: list[tuple[float, Flip]]

  @property
  def attained(self) -> float:
    """The share of the requests that count."""
    return metrics.interval(self.hits)[0]


def factor(text: str) -> float:
  """An item of --predicted."""
  with contextlib.suppress(ValueError):
    if is_number(0.01, 100)(value := float(text)):
      return value
  raise InputError(f'--predicted={text!r}: must be a number from 0.01 to 100')


def spans(options: Any, source: Any) -> list[tuple[float, float, str]]:
  """(start, end, phase) of every segment."""
  names, each_s = ('',), options.segment_s or options.seconds / 6
  if source.phases:
    names = source.phases.names
    each_s = source.phases.period_s / len(names)
  count = math.ceil(options.seconds / each_s - 1e-9)
  return [(n * each_s, min((n + 1) * each_s, options.seconds),
           names[n % len(names)]) for n in range(count)]


def segments(policy: str, parts: Sequence[tuple[float, float, str]],
             records: Sequence[Any], flips: Sequence[tuple[float, Flip]],
             slo: Slo, instances: int) -> list[Segment]:
  """The Segments of a run."""
  roles, lines = [FIRST_ROLE] * instances, []
  left = collections.deque(flips)
  for start_s, end_s, phase in parts:
    own = [r for r in records if start_s <= r.arrival_s < end_s]
    count = 0
    while left and left[0][0] < end_s:
      second, flip = left.popleft()
      roles[flip.instance] = flip.role
      count += second > 0
    mean = [sum(values) / max(len(own), 1) for values in (
        [r.prompt_len for r in own], [r.max_tokens for r in own])]
    lines.append(Segment(
        policy, start_s, phase, round(len(own) / (end_s - start_s), 2),
        round(mean[0], 1), round(mean[1], 1),
        ''.join(SHORT[role] for role in roles), count,
        *(round(x, 4) for x in metrics.attainment(own, slo))))
  return lines


def serve(options: Any, text: str, predicted: float = 1.0) -> Served:
  """A run under a policy; predicted: see --predicted."""
  slo = Slo(options.ttft_s, options.tpot_s)
  plan = Plan.parse(options.plan, '--plan')
  problem = make_problem(
      options.model, slo, options.lengths, options.latency, cut=True,
      max_len=8192, seed=options.seed, process=options.process,
      policy=policies.load(text, slo))
  config, latencies, link = build(
      problem, Placement(flexible=[plan] * options.instances))
  if predicted != 1:
    config = dataclasses.replace(config, link=link, latencies=tuple([
        Paced(own, predicted, predicted) for own in latencies]))
    text += f', {predicted:g} times the latencies'
  source: Any = problem.workload
  n = 64
  while True:  # as many requests as come in these seconds
    sent = source(options.rate, n)
    if sent[-1].arrival_s >= options.seconds or len(sent) < n:
      break
    require(n < MOST, '--process, --rate, --seconds', n,
            f'a load of less than {MOST} requests')
    n *= 2
  sent = [r for r in sent if r.arrival_s < options.seconds]
  require(sent and sent[-1].arrival_s >= options.warmup_s,
          '--rate, --seconds, --warmup_s', len(sent),
          'a load of which a request counts')
  result = simulator.simulate(config, sent, latencies, link, log=True)
  flips = [(event.time_s, command) for event, commands in result.log or ()
           for command in commands if isinstance(command, Flip)]
  hits = [metrics.attains(r, slo) for r in metrics.by_arrival(result.records)
          if r.arrival_s >= options.warmup_s]
  return Served(text, segments(text, spans(options, source), result.records,
                               flips, slo, options.instances), hits, flips)


def best(options: Any, text: str, predicted: float = 1.0) -> Served:
  """The run of a policy; of one with {k}, the run that attains most."""
  numbers = range(1, options.instances) if '{k}' in text else (1,)
  return max((serve(options, text.replace('{k}', str(k)), predicted)
              for k in numbers), key=lambda run: run.attained)


def summary(served: Served, runs: Sequence[Served], warmup_s: float = 0.0
            ) -> dict[str, Any]:
  """What replan.json says of a run beside others. worst: what attained in the
  worst segment of which all requests count, None without one. ahead: share that
  it attains more than the best of the others, low, high."""
  told: dict[str, Any] = {
      'attained': served.attained,
      'worst': min([s.attained for s in served.segments
                    if s.start_s >= warmup_s and not math.isnan(s.attained)],
                   default=None),
      'flips': sum(second > 0 for second, _ in served.flips),
      'flips_after_a_minute': sum(second > 60 for second, _ in served.flips)}
  rivals = [run for run in runs if run is not served]
  if rivals:
    rival = max(rivals, key=lambda run: run.attained)
    told |= {'rival': rival.policy,
             'ahead': metrics.difference(served.hits, rival.hits)}
  return told


def words(served: Served, told: Mapping[str, Any]) -> str:
  """A summary on a line."""
  line = (f'{served.policy}: {told["attained"]:.1%} of {len(served.hits)} '
          'attained')
  if told['worst'] is not None:
    line += f', {told["worst"]:.0%} in the worst segment'
  line += (f'; {told["flips"]} flips, {told["flips_after_a_minute"]} after the '
           'first minute')
  if 'ahead' in told:
    mean, low, high = (100 * share for share in told['ahead'])
    line += (f'; {mean:+.1f} points [{low:+.1f}, {high:+.1f}] beside '
             f'{told["rival"]}')
  return line


def table(runs: Sequence[Served]) -> Table:
  """Segments down, policies across."""
  out = Table(title='share that attained both objectives [95 %], roles, flips')
  for name in ('from', 'phase', 'requests/s', 'prompt', 'output'):
    out.add_column(name, justify='right')
  for run in runs:
    out.add_column(run.policy)
  for each in zip(*(run.segments for run in runs), strict=True):
    first = each[0]
    out.add_row(
        f'{first.start_s:g} s', first.phase, f'{first.rate_per_s:.3g}',
        f'{first.prompt_len:.0f}', f'{first.output_len:.0f}',
        *(f'{_share(s)} {s.roles} {s.flips}' for s in each))
  return out


def _share(segment: Segment) -> str:
  """What attained in a segment, with its interval; - of no request."""
  if math.isnan(segment.attained):
    return '-'
  return f'{segment.attained:.0%} [{segment.low:.0%}, {segment.high:.0%}]'


def draw(path: pathlib.Path, runs: Sequence[Served], end_s: float, title: str
         ) -> None:
  """The load over time; each policy's share that attains; its instances that
  only prefill."""
  figure = Figure(figsize=(8, 6), layout='constrained')
  load, share, split = figure.subplots(3, sharex=True)
  lines = runs[0].segments
  starts = [line.start_s for line in lines]
  load.stairs([line.rate_per_s for line in lines], [*starts, end_s],
              baseline=None, color='black')
  load.set_ylabel('requests/s')
  for number, run in enumerate(runs):
    look = pictures.look(number)
    share.plot(starts, [100 * line.attained for line in run.segments],
               label=run.policy, fillstyle='none', **look)
    split.step(starts, [line.roles.count('P') for line in run.segments],
               where='post', **look, fillstyle='none')
  share.set_ylabel('attained, %')
  split.set_ylabel('instances that\nonly prefill')
  split.yaxis.get_major_locator().set_params(integer=True)
  split.set_xlabel('seconds (start of a segment)')
  share.legend(fontsize=8, frameon=False)
  load.set_title(title, fontsize=9)
  for panel in (load, share, split):
    panel.spines[['top', 'right']].set_visible(False)
  pictures.save(figure, path)


def run(options: Any, console: Console) -> int:
  """Serves, shows and writes."""
  require(options.policies, '--policies', '', 'at least one')
  for text in options.policies:
    policies.load(text.replace('{k}', '1'))  # a bad one is said before a run
  factors = [factor(text) for text in options.predicted]
  require(len(set(factors)) == len(factors), '--predicted',
          ','.join(options.predicted), 'different numbers')
  require(len(set(options.policies)) == len(options.policies), '--policies',
          ','.join(options.policies), 'different policies')
  asked = list(itertools.product(options.policies, factors))
  require(options.warmup_s < options.seconds, '--warmup_s', options.warmup_s,
          f'below --seconds={options.seconds:g}')
  runs, tried, stopped = [], 0, False
  try:
    for text, predicted in asked:
      with console.status(f'serving under {text}'):
        served = best(options, text, predicted)
      tried += 1
      if served.policy in [run.policy for run in runs]:
        console.print(f'{text}: the best is {served.policy}, which is there',
                      highlight=False)
      else:
        runs.append(served)
  except KeyboardInterrupt:
    stopped = True
    console.print(f'Stopped by Ctrl-C: {tried} of {len(asked)} policies.')
  if not runs:
    return 130
  console.print(table(runs))
  told = {served.policy: summary(served, runs, options.warmup_s)
          for served in runs}
  for served in runs:
    console.print(words(served, told[served.policy]), soft_wrap=True,
                  highlight=False)
  if options.out:
    out = pathlib.Path(options.out)
    lines = [line for served in runs for line in served.segments]
    provenance.save_csv(out / 'replan.csv', Segment._fields, lines)
    draw(out / 'replan.png', runs, options.seconds,
         f'{options.model}, {options.instances} x {options.plan} '
         f'{options.latency}, {options.lengths}, {options.process}; simulated')
    provenance.save_json(
        out / 'replan.json', {
            'stopped': stopped, 'policies': told,
            'segments': [line._asdict() for line in lines]},
        cli.asked(options, FLAGS), [options.lengths, options.latency])
    terminal.written(console, out, 'replan.csv', 'replan.json', 'replan.png')
  return 130 if stopped else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
