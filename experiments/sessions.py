"""What a prefix cache is worth: conversations served with one and without.

  python -m experiments.sessions --lengths=chat --rates=2,8
  python -m experiments.sessions --lengths=agent
  python -m experiments.sessions --lengths=conversation_trace.jsonl --rates=3.4
  python -m experiments.sessions --lengths=... --host_gb=64,256
  python -m experiments.sessions --lengths=... --rates=4 --goodput
  python -m experiments.sessions --real

Simulated: at each rate the same requests (sessions, whose turns follow the
answer before; or a trace in Mooncake's format, its times scaled to the rate)
under each of ROUTES, each without a cache and with one, and with each of
--host_gb, host memory of an instance for what its cache evicts.
  random    any prefill instance;
  balanced  the one with the fewest prompt tokens waiting;
  hits      the one where the first token is predicted soonest, what it has
            kept of the prompt not computed again (Mooncake's rule, without
            moving what another has kept); rows go where copy and steps are
            predicted to end soonest.
  global    the same, and what any other instance has kept is copied there
            first where that is predicted to be sooner (all of Mooncake's).
With --goodput the rate at which --target of them attain is sought for each
route and cache, from the first of --rates on: doubled or halved, then bisected
to 5 %. One run a rate, so its interval is that of `attained`.
Real, with --real: a few sessions of a served model on two devices of this
machine, turn by turn, first without and then with the cache. They share a
system prompt of SYSTEM tokens; a turn has NEW more and an answer of ANSWER.

It prints a table and writes sessions.csv: rate_per_s, route, cache, host_gb,
ttft_s (mean), later_ttft_s (of turns after the first; of a trace, of prompts
whose second block came before), p90_ttft_s, tpot_s, cached (loaded: of these,
from host memory) and moved (of prompt tokens), attained, low, high. Exit codes:
0; 2 for bad input; 130 by Ctrl-C.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

import dsjax
from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Slo
from dsjax.config.request import Request
from dsjax.placement import api
from dsjax.policies import mooncake, predict
from dsjax.scheduling.policy import (
  DISTSERVE,
  Fetch,
  RequestView,
  View,
  others,
)
from dsjax.simulation import simulator
from dsjax.workload import sessions
from experiments.common import cli, provenance, terminal

KINDS = {'chat': sessions.CHAT, 'agent': sessions.AGENT}
TURNS, SYSTEM, NEW, ANSWER = 4, 160, 32, 32  # with --real
TOLERANCE, MOST_RUNS = 1.05, 16  # of --goodput
SIMULATED, REAL = 'llama-3-8b', 'smollm2-135m-instruct'  # --model not given
WARMUP = 0.2  # share of the requests that counts in no statistic
FLAGS = {
    'lengths': cli.Flag('chat', f'Of sessions: {", ".join(KINDS)}, or a trace '
                        'with hash_ids.'),
    'rates': '2,8',
    'requests': cli.Flag(2000, 'About so many turns at each rate.', low=50),
    'routes': cli.Flag(['random', 'balanced', 'hits', 'global'], 'Of them.'),
    'model': cli.Flag(None, 'A name in dsjax.config.zoo; with --real, what '
                      f'dsjax.load takes: {SIMULATED}; {REAL}.', str),
    'latency': 'tables:h100-80g',
    'placement': 'prefill=1x1,1x1,decode=1x1,1x1',
    'page_size': cli.Flag(64, 'Tokens.', low=1),
    'host_gb': cli.Flag('', 'With the cache, host memory of an instance.'),
    'pages': cli.Flag(256, 'Of an instance, with --real.', low=1),
    'ttft_s': 1.0, 'tpot_s': 0.05, 'seed': 0,
    'goodput': cli.Flag(False, 'Seek the rate that is sustained.'),
    'target': cli.Flag(0.9, 'Share that attains, with --goodput.', low=0.0),
    'real': cli.Flag(False, 'Serve on this machine.'),
    'sessions': cli.Flag(3, 'With --real.', low=1),
    'out': None,
}


def random_route(view: View, request: RequestView) -> int:
  """Any, drawn by the request's id."""
  draw = np.random.default_rng(request.id)
  return view.prefills[int(draw.integers(len(view.prefills)))].index


def hits_route(view: View, request: RequestView) -> int:
  """Where the first token is predicted soonest."""
  return min(view.prefills, key=lambda i: (
      predict.queue_s(i) + predict.prefill_s(i, request), i.index)).index


def hits_hand_off(view: View, request: RequestView, avoid: int) -> int:
  """Where it is predicted to end soonest, copy included."""
  return min(others(view.decodes, avoid), key=lambda i: (
      predict.rest_s(view, i, request), i.index)).index


def global_route(view: View, request: RequestView) -> int | Fetch:
  """Where the first token is predicted soonest, whoever has its beginning."""
  _, choice = mooncake.soonest(view, request)
  return choice if choice.lender >= 0 else choice.index


ROUTES = {
    'random': dataclasses.replace(DISTSERVE, name='random',
                                  route=random_route),
    'balanced': DISTSERVE,
    'hits': dataclasses.replace(DISTSERVE, name='hits', route=hits_route,
                                hand_off=hits_hand_off),
    'global': dataclasses.replace(DISTSERVE, name='global', fetches=True,
                                  route=global_route,
                                  hand_off=hits_hand_off)}


class Line(NamedTuple):
  """A line of sessions.csv."""

  rate_per_s: float
  route: str
  cache: bool
  host_gb: float
  ttft_s: float
  later_ttft_s: float
  p90_ttft_s: float
  tpot_s: float
  cached: float
  loaded: float
  moved: float
  attained: float
  low: float
  high: float


def workload(options: Any, rate_per_s: float) -> list[Request]:
  """The requests of a rate."""
  kind = KINDS.get(options.lengths)
  if kind is None:
    known = sessions.read_trace(options.lengths)
    span_s = known[-1].arrival_s
    require(span_s > 0, '--lengths', options.lengths,
            'a trace that takes some time')
    speed = rate_per_s * span_s / len(known)
    return [dataclasses.replace(request, arrival_s=request.arrival_s / speed)
            for request in known[:options.requests]]
  count = -(-options.requests // kind.turns)
  gaps = np.random.default_rng([options.seed, 3]).exponential(
      kind.turns / rate_per_s, count)
  return sessions.requests(kind, np.cumsum(gaps).tolist(), options.seed)


def later(work: Sequence[Request]) -> set[int]:
  """Ids of the turns after the first; of a trace, of prompts whose second
  block came before (many share the first)."""
  if any(request.after is not None for request in work):
    return {r.id for r in work if r.after is not None}
  seen: set[int] = set()
  ids = set()
  for request in work:
    if seen.intersection(request.blocks[1:2]):
      ids.add(request.id)
    seen.update(request.blocks[1:2])
  return ids


def line(rate_per_s: float, route: str, cache: bool, host_gb: float, slo: Slo,
         records: Iterable[Record], turns: set[int]) -> Line:
  """What the records of a run say, the first WARMUP of them left out."""
  known = list(records)
  served = [r for r in known[round(WARMUP * len(known)):] if r.token_s]
  require(served, '--requests', len(known), 'enough that some are served')
  ttfts_s = [r.ttft_s or 0.0 for r in served]
  tokens = sum(r.prompt_len for r in served)
  attained = metrics.summarize(served, slo, 1).attainment
  return Line(
      rate_per_s, route, cache, host_gb, statistics.fmean(ttfts_s),
      statistics.fmean([r.ttft_s or 0.0 for r in served if r.id in turns]
                       or [0.0]),
      float(np.quantile(ttfts_s, 0.9)),
      statistics.fmean([r.tpot_s or 0.0 for r in served]),
      sum(r.cached_tokens for r in served) / tokens,
      sum(r.loaded_tokens for r in served) / tokens,
      sum(r.migrated_tokens for r in served) / tokens, *attained)


def simulate(options: Any, rate_per_s: float, work: Sequence[Request],
             route: str, cache: bool, host_gb: float) -> Line:
  """One run of the requests of a rate."""
  slo = Slo(options.ttft_s, options.tpot_s)
  problem = api.make_problem(
      options.model, slo, [(1, 1)], options.latency,
      max_len=max(len(r.prompt) + (r.sampling.max_tokens or 0) for r in work),
      page_size=options.page_size, prefix_cache=cache,
      host_bytes=1e9 * host_gb, policy=ROUTES[route])
  config, latencies, link = api.build(
      problem, Placement.parse(options.placement, '--placement'))
  result = simulator.simulate(config, work, latencies, link)
  return line(rate_per_s, route, cache, host_gb, slo, result.records,
              later(work))


def at_rate(options: Any, route: str, cache: bool, host_gb: float,
            rate_per_s: float) -> Line:
  """One run at a rate."""
  return simulate(options, rate_per_s, workload(options, rate_per_s), route,
                  cache, host_gb)


def goodput(simulated: Callable[[float], Line], rate_per_s: float,
            target: float) -> Iterator[Line]:
  """Runs until the highest rate at which the target attains is known to
  TOLERANCE, or none of MOST_RUNS brackets it; each run's Line.

  simulated: one run at a rate. rate_per_s: of the first.
  """
  passes, fails = 0.0, math.inf
  for _ in range(MOST_RUNS):
    told = simulated(rate_per_s)
    yield told
    if told.attained >= target:
      passes = rate_per_s
    else:
      fails = rate_per_s
    if fails <= TOLERANCE * passes:
      return
    rate_per_s = (2 * passes if fails == math.inf else
                  math.sqrt(passes * fails) if passes else fails / 2)


def sustained(lines: Iterable[Line], target: float) -> Table:
  """The highest rate that attains, a row a route and cache."""
  out = Table(title=f'Sustained: {target:.0%} attain')
  out.add_column('requests/s')
  best: dict[str, dict[str, float]] = {}
  for told in lines:
    rates = best.setdefault(told.route, {})
    rates.setdefault(cache_name(told), 0.0)
    if told.attained >= target:
      rates[cache_name(told)] = max(rates[cache_name(told)], told.rate_per_s)
  for name in next(iter(best.values()), {}):
    out.add_column(f'cache {name}', justify='right')
  for route, rates in best.items():
    out.add_row(route, *(f'{rate:.3g}' for rate in rates.values()))
  return out


def cache_name(told: Line) -> str:
  """off, on, or + GB of host memory."""
  return (f'+{told.host_gb:g}' if told.host_gb else
          'on' if told.cache else 'off')


def serve(options: Any, cache: bool, host_gb: float,
          tell: Callable[..., object]) -> tuple[Line, int, float]:
  """Sessions of a served model, turn by turn: (their Line, KV bytes moved, CPU
  seconds of this process while they were served).

  tell: called with a line of progress.
  """
  model = dsjax.load(options.model)
  config = EngineConfig(max_len=512, max_seqs=4, prefill_tokens=256,
                        num_pages=options.pages, prefix_cache=cache,
                        host_bytes=int(1e9 * host_gb))
  draw = np.random.default_rng(options.seed)
  vocabulary, turns, began_s = model.config.vocab_size, set(), 0.0
  with dsjax.serve(model, 'prefill=1x1,decode=1x1', config) as server:
    system = draw.integers(vocabulary, size=SYSTEM).tolist()
    for count in (1, options.sessions):  # the first one warms up
      began_s = time.process_time()
      prompts = [list(system) for _ in range(count)]
      for turn in range(TURNS):
        tell(f'turn {turn + 1} of {TURNS}')
        for prompt in prompts:
          prompt += draw.integers(vocabulary, size=NEW).tolist()
          answer = server.generate(prompt, max_tokens=ANSWER, ignore_eos=True)
          prompt += answer.tokens
          if turn:
            turns.add(answer.id)
    cpu_s = time.process_time() - began_s
    records = server.records[TURNS:]
    moved = server.copied_bytes
  return line(0.0, 'real', cache, host_gb, Slo(options.ttft_s, options.tpot_s),
              records, turns), moved, cpu_s


def compared(off: Line, on: Line, moved: Sequence[int]) -> str:
  """A run with a cache against the one without, in turn on one machine.

  moved: KV bytes of both.
  """
  less = 1 - on.later_ttft_s / off.later_ttft_s
  return (f'cache {cache_name(on)}: later TTFT {less:.0%} less, '
          f'KV bytes {moved[1] / moved[0]:.0%} of those without, '
          f'{on.cached:.0%} of prompt tokens not computed')


def table(lines: Iterable[Line]) -> Table:
  """A line a run."""
  out = Table(title='TTFT, ms; cached (+ loaded), moved: of prompt tokens; '
              'attained, %; cache: + GB of host memory', box=box.SIMPLE,
              collapse_padding=True)
  for name in ('rate', 'route', 'cache', 'TTFT', 'later', 'p90', 'cached',
               'moved', 'attained [95 %]'):
    out.add_column(name, justify='left' if name == 'route' else 'right')
  for told in lines:
    out.add_row(
        f'{told.rate_per_s:.3g}' if told.rate_per_s else '-', told.route,
        cache_name(told), *(f'{1e3 * seconds:.0f}' for seconds in (
            told.ttft_s, told.later_ttft_s, told.p90_ttft_s)),
        f'{told.cached - told.loaded:.0%}'
        + f'+{told.loaded:.0%}' * bool(told.loaded), f'{told.moved:.0%}',
        f'{100 * told.attained:.0f} [{100 * told.low:.0f}, '
        f'{100 * told.high:.0f}]')
  return out


def run(options: Any, console: Any) -> int:
  """Runs, shows and writes."""
  require(options.lengths in KINDS or pathlib.Path(options.lengths).is_file(),
          '--lengths', options.lengths, f'of {list(KINDS)}, or a file')
  require(0 < options.target < 1, '--target', options.target, 'between 0 and 1')
  require(options.routes, '--routes', '', f'of {list(ROUTES)}')
  if options.model is None:
    options.model = REAL if options.real else SIMULATED
  for name in options.routes:
    require(name in ROUTES, '--routes', name, f'of {list(ROUTES)}')
  sizes_gb = (cli.numbers('--host_gb', options.host_gb) if options.host_gb
              else ())
  caches = [(False, 0.0), (True, 0.0), *((True, size) for size in sizes_gb)]
  lines: list[Line] = []
  moves: list[int] = []
  tell, stopped = terminal.now_and_then(console), False
  try:
    if options.real:
      cli.prepare(2)
      for cache, host_gb in caches:
        tell(f'cache {"on" if cache else "off"}: compiling', begins=True)
        told, moved, cpu_s = serve(options, cache, host_gb, tell)
        lines.append(told)
        moves.append(moved)
        console.print(f'cache {cache_name(told)}: {moved / 1e6:.1f} MB of KV '
                      f'moved, {cpu_s:.1f} CPU s', highlight=False)
      for told, moved in zip(lines[1:], moves[1:], strict=True):
        console.print(compared(lines[0], told, (moves[0], moved)),
                      highlight=False)
    elif options.goodput:
      first, *_ = cli.numbers('--rates', options.rates)
      for route in options.routes:
        for cache, host_gb in caches:
          run_at = functools.partial(at_rate, options, route, cache, host_gb)
          for told in goodput(run_at, first, options.target):
            lines.append(told)
            tell(f'{len(lines)} runs done')
    else:
      for rate_per_s in cli.numbers('--rates', options.rates):
        work = workload(options, rate_per_s)
        for route in options.routes:
          for cache, host_gb in caches:
            lines.append(simulate(options, rate_per_s, work, route, cache,
                                  host_gb))
            tell(f'{len(lines)} runs done')
  except KeyboardInterrupt:
    stopped = True
  console.print(table(lines))
  if options.goodput:
    console.print(sustained(lines, options.target))
  if options.out:
    provenance.save_lines(
        pathlib.Path(options.out), 'sessions', Line, lines, cli.asked(
            options, FLAGS), [options.lengths, options.latency])
    terminal.written(console, options.out, 'sessions.csv', 'sessions.json')
  return 130 if stopped else 0


if __name__ == '__main__':
  cli.main(run, FLAGS)
