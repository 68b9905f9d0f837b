"""How many requests a CPU second the simulator serves, beside a yardstick.

  python -m experiments.bench.simulator [--requests=5000] [--cprofile]

A 13B-like model (affine latencies of the size of OPT-13B on an A100) under
Poisson arrivals of lognormal lengths, ShareGPT-like. Each case runs three
ways in turn, on the same workload:
  leap      simulator.simulate as it is used;
  step      the same, every completion stepped through the scheduler;
  floor     as many events on a bare heapq as the simulator decides, and a
            Record with its token times a request: nothing is decided. What
            any simulator in plain Python that keeps records costs at least;
  yardstick a tight loop, one event a generated token and nothing else: no
            batches, queues, pages or records. Once in simpy (extra `bench`)
            and once on a bare heapq; simpy is left out if not installed.
The yardstick does not know what placement it runs for: it is the price of
tokens as events. CPU seconds (process_time), the median of --rounds. Ctrl-C
keeps the cases that were measured.
"""

import cProfile
import dataclasses
import heapq
import pstats
import statistics
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from dsjax import workload
from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.engine import InstanceConfig
from dsjax.config.latency import Pieces
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.scheduling import scheduler
from dsjax.simulation import latency, simulator
from experiments.bench import aisimulate, kept
from experiments.common import cli, machine

try:
  import simpy
except ImportError:
  simpy = None

FLAGS = {
    'requests': 5000, 'rounds': 3,
    'cprofile': cli.Flag(False, 'Where leaping spends time.'),
    'aisimulate': cli.Flag(None, 'A Python that has it: see aisimulate.py.',
                           str),
    'only': cli.Flag([], 'Names of cases; all without it.'),
    'out': cli.Flag(None, 'JSON file for the numbers.', str),
}


@dataclasses.dataclass
class Affine:
  """Seconds of a 13B model's steps: fixed, a token, a row, context."""

  pp: int = 1
  host_s: float = 5e-4

  def prefill_s(self, pieces: Pieces) -> float:
    return 0.012 + sum([1.3e-4 * (stop - start) + 4e-9 * (
        stop * stop - start * start) for start, stop in pieces])

  def decode_line(self, batch: int) -> tuple[float, float]:
    return 0.014 + 8e-5 * batch, 5e-7

  def decode_s(self, batch: int, context: float) -> float:
    a, b = self.decode_line(batch)
    return a + b * context

  def mixed_s(self, pieces: Pieces, batch: int, context: float) -> float:
    return (self.prefill_s(pieces) + 8e-5 * batch + 5e-7 * context)


LINK = latency.Link(2e-4, 25e9, 819_200)  # PCIe-like


@dataclasses.dataclass
class Case:
  """A placement and what it is asked to do."""

  roles: tuple
  rate_per_s: float
  mean_output: float = 200
  pp: int = 1
  mean_prompt: float = 200

  def config(self) -> scheduler.Config:
    return scheduler.Config(tuple(
        InstanceConfig(role, 4096, 16, 256,
                            512 if role == 'chunked' else 2048, 16, self.pp)
        for role in self.roles), max_len=8192)


CASES = {
    '1P+1D': Case(('prefill', 'decode'), 6),
    '1P+1D, long outputs': Case(('prefill', 'decode'), 0.5, 2000),
    '1P+1D, light load': Case(('prefill', 'decode'), 0.5),
    '2P+2D': Case(('prefill',) * 2 + ('decode',) * 2, 12),
    'colocated': Case(('colocated',), 4),
    'chunked': Case(('chunked',), 4),
    '1P+1D, pp=2': Case(('prefill', 'decode'), 6, pp=2),
}


def requests(case: Case, n: int, seed: int = 0) -> list[Request]:
  """Poisson arrivals of lognormal lengths (sigma 0.8), cut at 4,000."""
  rng = np.random.default_rng(seed)
  arrival_s = workload.arrivals('poisson', case.rate_per_s, n, seed)
  lens = [np.clip(rng.lognormal(np.log(mean) - 0.32, 0.8, n), 1, 4000)
          for mean in (case.mean_prompt, case.mean_output)]
  return [Request(i, float(t), range(int(p)),
                  Sampling(max_tokens=int(o)))
          for i, (t, p, o) in enumerate(zip(arrival_s, *lens, strict=True))]


def simpy_tokens(sent: Iterable[Request]) -> None:
  """One simpy event a generated token."""
  assert simpy
  env = simpy.Environment()

  def live(request):
    yield env.timeout(request.arrival_s)
    for _ in range(request.sampling.max_tokens):
      yield env.timeout(0.02)

  for request in sent:
    env.process(live(request))
  env.run()


def heap_tokens(sent: Iterable[Request]) -> None:
  """One heapq event a generated token."""
  heap = [(r.arrival_s, r.id, r.sampling.max_tokens) for r in sent]
  heapq.heapify(heap)
  pop, replace = heapq.heappop, heapq.heapreplace
  while heap:
    now_s, id, left = heap[0]
    if left:
      replace(heap, (now_s + 0.02, id, left - 1))
    else:
      pop(heap)


def floor(sent: Sequence[Request], events: int) -> list[Record]:
  """`events` heap events a request, and its Record; nothing is decided."""
  heap = [(r.arrival_s, r.id, 0) for r in sent]
  heapq.heapify(heap)
  pop, replace, records = heapq.heappop, heapq.heapreplace, []
  most = [r.sampling.max_tokens or 0 for r in sent]
  times = [0.02 * i for i in range(max(most))]
  while heap:
    now_s, id, n = heap[0]
    if n < events:
      replace(heap, (now_s + 0.02, id, n + 1))
      continue
    pop(heap)
    request = sent[id]
    record = Record(id, request.arrival_s, len(request.prompt),
                    most[id])
    record.token_s += times[:most[id]]
    records.append(record)
  return records


def clock(fn: Callable[..., Any], *args: Any, **options: Any
          ) -> tuple[float, Any]:
  """(CPU seconds of a call, its answer)."""
  start = time.process_time()
  answer = fn(*args, **options)
  return time.process_time() - start, answer


def measure(case: Case, n: int, rounds: int) -> dict[str, float]:
  """Requests a CPU second by way of running, and what the run was like."""
  sent, config = requests(case, n), case.config()
  args = (config, sent, Affine(case.pp), LINK)
  ways: dict[str, Callable[[], Any]] = {
      'leap': lambda: simulator.simulate(*args),
      'step': lambda: simulator.simulate(*args, leap=False),
      'heapq': lambda: heap_tokens(sent)}
  if simpy:
    ways['simpy'] = lambda: simpy_tokens(sent)
  result = ways['leap']()
  ways['floor'] = lambda: floor(sent, round(result.steps / n))
  times = {way: [] for way in ways}
  for _ in range(rounds):
    for way, fn in ways.items():
      times[way].append(clock(fn)[0])
  rates = {way: n / statistics.median(t) for way, t in times.items()}
  summary = metrics.summarize(result.records, Slo(0.25, 0.1), 1)
  return dict(
      rates, steps=result.steps / n, leapt=result.leapt / n,
      tokens=sum(len(r.token_s) for r in result.records) / n,
      batch=sum(r.stage_s['decode'] for r in result.records)
      / summary.span_s, attainment=summary.attainment[0],
      rate_per_s=case.rate_per_s)


def lines(name: str, r: Mapping[str, float]) -> str:
  """What a measured case prints."""
  yardstick = r.get('simpy', float('nan'))
  return (f'{name:22}{r["leap"]:9.0f}{r["step"]:9.0f}{r["floor"]:9.0f}'
          f'{r["heapq"]:9.0f}{yardstick:9.0f}\n'
          f'  leap {r["leap"] / yardstick:.1f} and floor '
          f'{r["floor"] / yardstick:.1f} of simpy, leap '
          f'{r["leap"] / r["floor"]:.2f} of floor\n'
          f'  a request: {r["steps"]:.1f} steps, {r["leapt"]:.1f} leapt, '
          f'{r["tokens"]:.0f} tokens; {r["batch"]:.1f} decode; '
          f'{r["attainment"]:.0%} attained')


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Runs every case and prints a line each."""
  say = cli.says(console)
  require(set(options.only) <= set(CASES), '--only', options.only,
          f'of {list(CASES)}')
  if options.aisimulate:
    aisimulate.check(options.aisimulate, options.requests)
  results, others = {}, machine.Others()
  say(f'{"requests a CPU second":22}' + ''.join(f'{name:>9}' for name in (
      'leap', 'step', 'floor', 'heapq', 'simpy')))

  def measure_all():
    for name in options.only or CASES:
      results[name] = measure(CASES[name], options.requests, options.rounds)
      say(lines(name, results[name]))
      if options.cprofile:
        profile(CASES[name], options.requests)
    if options.aisimulate:
      say(aisimulate.compare(
          options.aisimulate, CASES['1P+1D'].config(),
          requests(CASES['1P+1D'], options.requests)))
  stopped = kept.until_stopped(measure_all)
  cores = others.cores()
  say('Cores that others used:', '-' if cores is None else f'{cores:.1f}')
  return kept.end(console, results, stopped, options, FLAGS)


def profile(case: Case, n: int) -> None:
  """Prints where a case of n requests spends its time."""
  profiler, sent = cProfile.Profile(), requests(case, n)
  profiler.runcall(simulator.simulate, case.config(), sent, Affine(case.pp),
                   LINK)
  pstats.Stats(profiler).sort_stats('tottime').print_stats(14)


if __name__ == '__main__':
  cli.main(run, FLAGS, simulates=True)
