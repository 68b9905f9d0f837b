"""Workloads and clusters on which policies are compared, and how a table of
them is measured cell by cell."""

import functools
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dsjax.config import zoo
from dsjax.config.checks import require
from dsjax.config.placement import Plan, Slo
from dsjax.placement import candidates
from dsjax.placement.api import make_problem
from dsjax.policies.named import DEADLINES
from experiments.common import cli, provenance
from experiments.common.children import processes

CHUNKS = ('', ':chunk=256', ':chunk=512', ':chunk=1024', ':chunk=2048')
# What is tried of a policy; {k} stands for 1 to all instances but one.
VARIANTS = {
    'static': ('static:prefills={k}',),
    'colocated': ('colocated',),
    'chunked': tuple(f'chunked{chunk}' for chunk in CHUNKS),
    'splitwise': ('splitwise:prefills={k}',),
    'mooncake': ('mooncake:prefills={k}',),
    'llm_d': ('llm_d:prefills={k}:least=256', 'llm_d:prefills={k}:least=1024'),
    'dynamo': ('dynamo:prefills={k}',),
    'arrow': ('arrow:prefills={k}',),
    'taichi': tuple(f'taichi:prefills={{k}}:small={small}'
                    for small in (0, 256, 512)),
    'ecoserve': ('ecoserve',),
    'llumnix': ('llumnix',),
    'dynaserve': ('dynaserve',),
    'ppd': ('ppd:prefills={k}',),
    'planner': ('planner:prefills={k}', 'planner:prefills={k}:by=reactive'),
    'replan': ('replan:prefills={k}',),
    'adaptive': ('adaptive',),
}
# Files of workloads that are no mixtures, in --traces.
TRACES = {'azure-code': 'azure/AzureLLMInferenceTrace_code.csv',
          'azure-conv': 'azure/AzureLLMInferenceTrace_conv.csv',
          'mooncake': 'mooncake/conversation_trace.jsonl'}
MAX_LEN = 8192  # tokens of context, or the model's where that is less
FLAGS = {
    'lengths': cli.Flag(','.join(['sharegpt', 'humaneval', 'longbench',
                                  *TRACES]), 'As experiments.place --lengths, '
                        f'with commas between; of --traces {list(TRACES)}.'),
    'traces': 'traces',
    'minutes': cli.Flag(600.0, 'At most; one process alone ends the cell that '
                        'it measures first.', low=0.0),
    'processes': cli.Flag(os.cpu_count() or 1, 'Beside each other.', low=1),
}


def cluster_name(instances: int, plan: str, latency: str) -> str:
  """A cluster's name in tables."""
  return f'{instances} x {plan} {latency}'


def cluster_of(name: str) -> tuple[int, Plan, str]:
  """(instances, their plan, latency) of a cluster's name in tables.

  Raises:
    InputError.
  """
  parts = re.fullmatch(r'(\d+) x (\S+) (.+)', name)
  require(parts, 'cluster', name, cluster_name(4, '1x1', 'LATENCY'))
  assert parts
  return int(parts[1]), Plan.parse(parts[2], 'cluster'), parts[3]


@functools.lru_cache
def problem_of(model: str, latency: str, lengths: str, process: str, seed: int,
               **more: Any) -> candidates.SearchProblem:
  """The SearchProblem of a workload, without objectives; more: fields."""
  return make_problem(
      model, Slo(1.0, 1.0), lengths, latency, cut=True,
      max_len=min(MAX_LEN, zoo.config(model).max_len),
      process=process, seed=seed, **more)


def variants(policy: str, instances: int) -> list[str]:
  """What is tried of a policy, as policies.load takes it, for the policy's
  name in tables."""
  name = policy.removesuffix(DEADLINES)
  return [text.format(k=k) + policy[len(name):]
          for text in VARIANTS.get(name, (name,))
          for k in (range(1, instances) if '{k}' in text else (1,))]


def workloads(options: Any) -> tuple[dict[str, str], list[str]]:
  """({workload: its lengths}, the traces that are not there).

  Raises:
    InputError: two workloads have the same name.
  """
  there, absent = {}, []
  names = options.lengths.split(',')
  called = [name if name in TRACES else pathlib.Path(name).stem
            for name in names]
  require(len(set(called)) == len(called), '--lengths', options.lengths,
          'workloads of different names')
  for name in names:
    if name not in TRACES:
      there[pathlib.Path(name).stem] = name
      continue
    path = pathlib.Path(options.traces, TRACES[name])
    if path.exists():
      there[name] = str(path)
    else:
      absent.append(f'{name}: no file {path}')
  return there, absent


def measure_all(options: Any, console: Console, measure: Callable[[Any], Any],
                todo: Sequence[Any], of: int, lines: list[Any],
                path: pathlib.Path, words: Callable[[Any], str]) -> str:
  """Measures cells, adds the line of each and saves all lines.

  Args:
    measure: a cell's line; any process may run it.
    of: how many cells were asked for, `todo` and those that are there.
    lines: those that are there, NamedTuples; what is measured is added.
    path: the .csv. words: a line where nobody watches.

  Returns:
    What ended it before its end, or ''.
  """
  most_s, count = 60 * options.minutes, 0
  end_s = time.monotonic() + most_s
  limit = {'timeout': most_s} if options.processes > 1 else {}
  bar = Progress(TextColumn('{task.description}'), BarColumn(),
                 TextColumn('{task.completed}/{task.total}'),
                 TimeElapsedColumn(), console=console, transient=True)
  if not console.is_terminal:
    console.print(f'{len(todo)} of {of} cells to measure')
  try:
    with processes(options.processes) as run_map, bar:
      task = bar.add_task('cells', total=len(todo))
      for line in run_map(measure, todo, **limit):
        lines.append(line)
        provenance.save_csv(path, line._fields, lines)
        bar.advance(task)
        if not console.is_terminal:
          console.print(words(line), soft_wrap=True, highlight=False)
        count += 1
        if time.monotonic() > end_s and count < len(todo):
          return '--minutes'
  except TimeoutError:
    return '--minutes'
  except KeyboardInterrupt:
    return 'Ctrl-C'
  return ''
