"""Policies at equal rates: does one attain more than the best of the others?

  python -m experiments.equal_rates --cells=out/policies --out=out/equal_rates
  python -m experiments.equal_rates --policies=adaptive,arrow+deadlines

--cells is a folder that experiments.policies wrote. Each model, cluster,
workload and objectives in it that have lines with +deadlines are a cell. Its
rivals are the policies of these lines, but for those in --policies, each with
all the settings that experiments.policies tries: the best in --cells was that
of short runs, and another may attain far more here (--settings=best takes that
one only, in less time). The cell's rate is the highest goodput of the lines, so
the best rival attains about the target (rather less: the highest of several
estimates is mostly too high). At this rate the rivals and the policy under test
serve the same requests, once with each of --seeds, in virtual time. Seeds of
--cells are refused: they chose the rate. A run has as many requests as come in
--seconds, and --requests at least; the first --warmup of them do not count.
Settings that attain 20 points less than the best rival in a run of a quarter of
the length are left out, but for the best of each policy.

It prints a table a model and cluster: what each attained (a rival with its best
setting here; all are in the files), how many points the policy under test is
ahead of the best rival over all seeds, with the 95 % interval, and its flips
between the first and the last request that count. It is `ahead` or `behind`
where the interval excludes 0, else `level`. The interval of each seed is that
of metrics.difference; as seeds are independent, half widths add by their
squares. The best rival is the one that attained most in these very runs. This
favours the rivals: a policy that is level with the best of them may be `behind`
for it. Each interval stands for itself, too: of 40 level cells, up to one is
behind by chance.

Lines of several efforts in --cells count together. Loads that shift are left
out (experiments.replan), and so are workloads that --lengths does not name and
those that have no file. It writes equal_rates.csv as it goes; lines that are
there are kept and not measured again, so a run that was ended by --minutes or
Ctrl-C goes on. Also equal_rates.json, equal_rates.png and .pdf. Exit codes: 0;
2 for bad input; 130 by Ctrl-C.
"""

import pathlib
import re
from typing import Any

from rich.console import Console

from dsjax.config.checks import naming, require
from dsjax.config.placement import Slo
from dsjax.policies.named import DEADLINES
from experiments.common import (
  cli,
  policies,
  policies_report,
  policy_cells,
  provenance,
  terminal,
)
from experiments.common.equal_rates import SETTINGS, Effort, cells, measure
from experiments.common.equal_rates_report import (
  Line,
  counts,
  draw,
  key,
  name_of,
  summary,
  table,
  title_of,
  words,
)

FLAGS = {
    'cells': cli.Flag('out/policies', 'Folder that experiments.policies '
                      'wrote.'),
    'policies': cli.Flag(['adaptive'], 'As --policy, with commas between.'),
    'settings': cli.Flag('all', 'Of the rivals: all that experiments.policies '
                         'tries, or the best in --cells.', choices=SETTINGS),
    'seeds': cli.Flag(['31', '32'], 'Runs of each cell, a seed each.'),
    'seconds': cli.Flag(60.0, 'Of a run, at least.', low=1.0),
    'requests': cli.Flag(2000, 'Of a run, at least.', low=50),
    'warmup': cli.Flag(0.25, 'Share of the requests that do not count.',
                       low=0.0, high=0.9),
    'out': 'out/equal_rates',
    **policy_cells.FLAGS,
}


def rivals_of(options: Any) -> list[policies_report.Line]:
  """The lines of --cells that count.

  Raises:
    InputError: there are none, or --seeds has one of theirs.
  """
  path = pathlib.Path(options.cells, 'policies.csv')
  require(path.exists(), '--cells', options.cells,
          'a folder with a policies.csv of experiments.policies')
  under_test = set(map(name_of, options.policies))
  lines = [line for line in policies_report.read(path, flag='--cells')
           if line.policy.endswith(DEADLINES) and line.goodput_per_device > 0
           and name_of(line.policy) not in under_test]
  require(lines, '--cells', options.cells, f'a folder whose {path.name} has '
          f'lines with {DEADLINES} of policies that are not under test')
  with naming('--cells'):
    for line in lines:
      Slo(line.ttft_s, line.tpot_s)
  used = {int(seed) for line in lines
          for seed in re.findall(r'\bseed=(\d+)', line.effort)}
  require(not used & set(cli.seeds(options.seeds)), '--seeds',
          ','.join(options.seeds), f'without {sorted(used)}: these chose the '
          'settings and rates of --cells')
  return lines


def run(options: Any, console: Console) -> int:
  """Measures, shows and writes."""
  effort = Effort(options.requests, options.seconds, options.warmup,
                  tuple(cli.seeds(options.seeds)))
  require(options.policies, '--policies', '', 'at least one')
  for text in options.policies:
    policies.load(text)  # a bad one is said here, once
  rivals = rivals_of(options)
  there, _ = policy_cells.workloads(options)
  absent = dict.fromkeys(line.workload for line in rivals
                         if line.workload not in there)
  if absent:
    console.print(f'{", ".join(absent)}: left out, not of --lengths or without '
                  'a file', soft_wrap=True, highlight=False)
  with naming(f'--cells={options.cells}'):
    asked = list(cells(rivals, options.policies, there, effort,
                       options.settings))
  require(asked, '--lengths', options.lengths,
          f'a workload of --cells that is there: not {", ".join(absent)}')
  out = pathlib.Path(options.out)
  path = out / 'equal_rates.csv'
  lines = policies_report.read(path, Line)
  known = set(map(key, lines))
  stopped = policy_cells.measure_all(
      options, console, measure,
      [cell for cell in asked if cell.key not in known], len(asked), lines,
      path, words)
  here = {cell.key for cell in asked}
  shown = [line for line in lines if key(line) in here]
  for place in dict.fromkeys(map(title_of, shown)):
    console.print(table([line for line in shown if title_of(line) == place]))
  verdicts = {}
  for policy in dict.fromkeys(line.policy for line in shown):
    own = [line for line in shown if line.policy == policy]
    verdicts[policy] = counts(own)
    console.print(summary(policy, own), soft_wrap=True, highlight=False)
  provenance.save_json(
      out / 'equal_rates.json',
      {'stopped': stopped, 'verdicts': verdicts,
       'cells': [line._asdict() for line in shown]},
      cli.asked(options, FLAGS),
      [pathlib.Path(options.cells, 'policies.csv'), *there.values(),
       *dict.fromkeys(policy_cells.cluster_of(cell.cluster)[2]
                      for cell in asked)])
  if shown:
    draw(out / 'equal_rates.png', shown)
  terminal.stopped(console, stopped)
  terminal.written(console, out, 'equal_rates.json', *[
      'equal_rates.csv', 'equal_rates.png'] * bool(shown))
  return 130 if stopped == 'Ctrl-C' else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
