"""The engine against the floor: what each layer of the system costs.

  python -m experiments.bench.engine [--peers] [--out=bench.json]

Side by side in one run, on the same cores, SmolLM2-135M in float32:
  (a) an instance's compiled steps against a hand-written plain `jax.jit` loop
      with a dense cache, batch 1 and 8, 256-token prompts;
  (b) the whole server against its bare compiled steps;
  (c) scheduler.step in CPU microseconds, 256 running and 1,000 waiting: without
      a prefix cache, with one, with 100,000 blocks kept, in host memory too;
  (d) KV migration against a plain `jax.device_put` of equal bytes;
  (e) eight requests end to end, by mode; disaggregated, and with as many once
      more and again, beside what its slower phase alone makes of one core;
  (f) with --peers, vLLM, llama.cpp and transformers on the same weights and
      threads, prefill, decode and (e); an environment of theirs is made once;
  (g) with --ops, where the time of an instance's steps goes.
Pairs are timed in turn (A B A B ...); the median of each is reported, with its
quartiles: on a noisy machine only the ratios mean something. Ctrl-C keeps what
was measured.
"""

import collections
import contextlib
import functools
import gzip
import json
import os
import pathlib
import re
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console

from dsjax.checkpoints import checkpoint
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import Request, Sampling
from dsjax.model import sharding
from dsjax.runtime import engine, orchestrator
from dsjax.runtime.steps import abstract_step, seqs_bucket
from dsjax.scheduling.events import (
  Chunk,
  Migrate,
  Row,
  RunDecode,
  RunPrefill,
)
from experiments.bench import kept, scheduler_step
from experiments.bench.dense import Dense
from experiments.bench.scheduler_step import RUNNING, WAITING
from experiments.common import cli, provenance

FLAGS = {
    'out': cli.Flag(None, 'JSON file for the numbers.', str), 'rounds': 5,
    'peers': cli.Flag(False, 'Also run vLLM, llama.cpp, transformers.'),
    'ops': cli.Flag(False, 'Also print where the time of steps goes.'),
    'only': cli.Flag([], 'Parts to run, of a,b,c,d,e,f,g.'),
}

MODEL = 'smollm2-135m-instruct'
PROMPT, STEPS, BATCH, NEW = 256, 24, 8, 64
MORE = 4  # times as many requests
MOVED = 256, 512, 1024, 2048  # tokens
REST_S = 0.2  # until the threads of the one before have stopped spinning
CONFIG = EngineConfig(max_len=512, max_seqs=BATCH, prefill_tokens=1024,
                      prefill_seqs=BATCH, chunk_tokens=256, prefix_cache=False)


def clock(fn: Callable[[], object]) -> float:
  """Seconds of one call, its arrays ready."""
  start = time.perf_counter()
  jax.block_until_ready(fn())
  return time.perf_counter() - start


def in_turn(rounds: int, *fns: Callable[[], object]) -> np.ndarray:
  """Seconds of each function's rounds, timed A B A B after one warm-up."""
  for fn in fns:
    clock(fn)
  return np.array([[clock(fn) for fn in fns] for _ in range(rounds)]).T


# --- ours -------------------------------------------------------------------


def commands(batch: int, steps: int) -> tuple[list[RunPrefill], RunDecode]:
  """The RunPrefill and RunDecode of `batch` prompts, as a scheduler would."""
  pages = -(-(PROMPT + steps + 1) // CONFIG.page_size)
  rows = [tuple(range(b * pages, (b + 1) * pages)) for b in range(batch)]
  each = max(1, CONFIG.prefill_tokens // PROMPT)
  chunks = [Chunk(b, 0, PROMPT, rows[b], True) for b in range(batch)]
  prefills = [RunPrefill(0, 0, tuple(chunks[i:i + each]))
              for i in range(0, batch, each)]
  decode = RunDecode(0, 0, 0, steps, tuple(
      Row(b, PROMPT, steps, rows[b]) for b in range(batch)))
  return prefills, decode


class Ours:
  """An instance driven by hand-made commands: no scheduler, no server."""

  def __init__(self, instance: engine.Engine, batch: int, steps: int = STEPS
               ) -> None:
    self.instance = instance
    self.prefills, self.last = commands(batch, steps)
    for id in range(batch):
      instance.forget(id)
    for id in range(batch):
      instance.admit(id, [1] * PROMPT, PROMPT, Sampling())

  def prefill(self) -> list[jax.Array]:
    return [self.instance.prefill(c)[0][0].token_R for c in self.prefills]

  def decode(self) -> jax.Array:
    return self.instance.decode(self.last)[0][-1].token_R


def bench_steps(loaded: checkpoint.Model, instance: engine.Engine,
                results: list[dict[str, Any]], rounds: int,
                say: Callable[..., None]) -> None:
  shapes = instance.shapes
  params: Any = loaded.params
  plain = sharding.place_params(shapes.layout, shapes.span, shapes.mesh,
                                params)
  for batch in (1, BATCH):
    dense = Dense(loaded.config, plain, batch, PROMPT, STEPS)
    ours = Ours(instance, batch)
    a, b = in_turn(rounds, ours.prefill, dense.prefill)
    add(results, say, f'(a) prefill, batch {batch}', 'tokens/s',
        batch * PROMPT / a, {'plain jit loop': batch * PROMPT / b})
    a, b = in_turn(rounds, ours.decode, dense.decode)
    add(results, say, f'(a) decode, batch {batch}', 'tokens/s',
        batch * STEPS / a, {'plain jit loop': batch * STEPS / b})
    weights = sum(x.nbytes for x in jax.tree.leaves(instance.last.params))
    rate = weights * STEPS / np.median(a) / 1e9
    say(f'    decode reads the weights at {rate:.1f} GB/s; one sum over an '
          f'array of their size: {read_rate(weights):.1f} GB/s')


@functools.cache
def read_rate(size: int) -> float:
  """GB/s of reading `size` bytes once with every core: the floor."""
  x = jnp.ones(size // 4)
  total = jax.jit(jnp.max)
  clock(lambda: total(x))
  return size / min(clock(lambda: total(x)) for _ in range(5)) / 1e9


# --- the whole server -------------------------------------------------------


def workload(server: orchestrator.Orchestrator, count: int, tokens: int
             ) -> list[Request]:
  rng = np.random.default_rng(0)
  first = server.next_id
  return [Request(first + i, 0.0,
                  tuple(rng.integers(100, 40000, PROMPT).tolist()),
                  Sampling(max_tokens=tokens, ignore_eos=True))
          for i in range(count)]


def timed_tokens(server: orchestrator.Orchestrator, count: int, tokens: int
                 ) -> tuple[float, list[list[int]]]:
  """(seconds, tokens) of `count` requests that are all there at once."""
  requests = workload(server, count, tokens)
  start = time.perf_counter()
  server.run(requests)
  took = time.perf_counter() - start
  answers = [list(server.output(request.id).tokens) for request in requests]
  server.requests.clear()
  return took, answers


def serve_all(server: orchestrator.Orchestrator, count: int, tokens: int
              ) -> None:
  """Serves `count` requests, all there at once."""
  timed_tokens(server, count, tokens)


def bench_server(loaded: checkpoint.Model, results: list[dict[str, Any]],
                 rounds: int, say: Callable[..., None]) -> None:
  """A colocated server against the same steps without a server."""
  placement = Placement(colocated=[Plan()])
  with orchestrator.serve(loaded, placement, CONFIG) as server:
    served: Any = server.engines[0]
    instance = engine.Engine(loaded, [served.shapes.mesh], 'colocated', CONFIG)
    for _ in instance.warm():
      pass
    bare = Ours(instance, BATCH)

    def steps():
      bare.prefill()
      return bare.decode()

    ours, floor = in_turn(
        rounds, functools.partial(serve_all, server, BATCH, STEPS + 1), steps)
    count = BATCH * (STEPS + 1)
    add(results, say, '(b) server, colocated, batch 8', 'tokens/s',
        count / ours, {'bare steps': count / floor})


@contextlib.contextmanager
def modes(loaded: checkpoint.Model
          ) -> Iterator[dict[str, orchestrator.Orchestrator]]:
  """A server in each mode, by its name."""
  placements = [Placement(colocated=[Plan()]), Placement(chunked=[Plan()]),
                Placement(prefill=[Plan()], decode=[Plan()])]
  with contextlib.ExitStack() as stack:
    servers = [stack.enter_context(orchestrator.serve(loaded, p, CONFIG))
               for p in placements]
    yield {server.placement.mode: server for server in servers}


def bench_modes(loaded: checkpoint.Model, results: list[dict[str, Any]],
                rounds: int, say: Callable[..., None]) -> None:
  """Eight requests at once, 256-token prompts, 64 output tokens."""
  with modes(loaded) as servers:
    taken = in_turn(rounds, *(
        functools.partial(serve_all, server, BATCH, NEW)
        for server in servers.values()))
    for (mode, server), seconds in zip(servers.items(), taken, strict=True):
      ttft = statistics.median(r.ttft_s or 0.0 for r in server.records[-BATCH:])
      add(results, say, f'(e) 8 x (256 + 64), {mode}, median TTFT {ttft:.2f} s',
          'generated tokens/s', BATCH * NEW / seconds)
    if hasattr(os, 'sched_setaffinity'):
      bench_phases(loaded, servers['disaggregated'], results, rounds, say)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
  """Holds all threads of this process to one core."""
  def hold(cores):
    for thread in pathlib.Path('/proc/self/task').iterdir():
      with contextlib.suppress(ProcessLookupError):  # it has ended
        os.sched_setaffinity(int(thread.name), cores)

  before = os.sched_getaffinity(0)
  hold({min(before)})
  try:
    yield
  finally:
    hold(before)


def bench_phases(loaded: checkpoint.Model, server: orchestrator.Orchestrator,
                 results: list[dict[str, Any]], rounds: int,
                 say: Callable[..., None]) -> None:
  """A disaggregated server beside the slower of its phases alone: as if the
  other took no time and the KV none to move.

  Phases alone have one core, as each has its share of two here. The server has
  both, and an instance may use one that the other leaves idle. Prompts that
  are there at once cannot decode before the first is done: with more of them
  that is a smaller part.
  """
  alone = {}
  for index, role in enumerate(('prefill', 'decode')):
    served: Any = server.engines[index]
    instance = engine.Engine(loaded, [served.where[2][0]], role, CONFIG)
    for _ in instance.warm():
      pass
    alone[role] = getattr(Ours(instance, BATCH, NEW - 1), role)

  def held(phase):
    with one_core():
      return jax.block_until_ready(phase())

  counts = BATCH, MORE * BATCH
  taken = in_turn(
      rounds, *(functools.partial(serve_all, server, count, NEW)
                for count in counts),
      *(functools.partial(held, phase) for phase in alone.values()))
  phases = {role: BATCH * NEW / seconds for role, seconds in zip(
      alone, taken[len(counts):], strict=True)}
  slower = min(phases, key=lambda role: np.median(phases[role]))
  for count, seconds in zip(counts, taken, strict=False):
    add(results, say, f'(e) {count} x (256 + 64), disaggregated',
        'generated tokens/s', count * NEW / seconds,
        {f'{slower} alone, one core': phases[slower]})
  say('    alone on one core: ' + ', '.join(
      f'{role} {np.median(rate):.1f}' for role, rate in phases.items()))


def bench_peers(loaded: checkpoint.Model, instance: engine.Engine,
                results: list[dict[str, Any]], rounds: int,
                say: Callable[..., None]) -> None:
  """Prefill, decode and eight requests end to end, beside the peers'."""
  from experiments.bench import peers
  source, batches = checkpoint.find(MODEL), (1, BATCH)
  with (tempfile.TemporaryDirectory() as folder, modes(loaded) as servers,
        peers.opened(loaded, source, pathlib.Path(folder), batches) as rivals):
    for batch in batches:
      ours, prompts = Ours(instance, batch), [[1] * PROMPT] * batch
      for phase, count, rest in (('prefill', PROMPT, ()),
                                 ('decode', STEPS, (STEPS,))):
        mine = [('dsjax', functools.partial(clock, getattr(ours, phase)))]
        taken, _ = beside(rounds, mine, rivals, (phase, batch, prompts, *rest))
        rates = {name: batch * count / s for name, s in taken.items()}
        add(results, say, f'(f) {phase}, batch {batch}', 'tokens/s',
            rates.pop('dsjax'), rates)
    prompts = [list(r.prompt) for r in workload(servers['chunked'], BATCH, NEW)]
    told = {}

    def serve(mode):
      seconds, told[mode] = timed_tokens(servers[mode], BATCH, NEW)
      return seconds

    taken, tokens = beside(
        rounds, [(mode, functools.partial(serve, mode)) for mode in servers],
        rivals, ('serve', BATCH, prompts, NEW))
    rates = {name: BATCH * NEW / s for name, s in taken.items()}
    for mode in servers:
      add(results, say, f'(f) 8 x (256 + 64), {mode}', 'generated tokens/s',
          rates[mode], {name: rates[name] for name in rates
                        if name not in servers})
    for name, answers in (told | tokens).items():
      same = np.equal(answers, told['colocated']).mean()
      say(f'    {same:.0%} of the tokens of {name} are those of colocated')


def beside(rounds: int, mine: Sequence[tuple[str, Callable[[], float]]],
           rivals: Sequence[Any], request: Sequence[Any]
           ) -> tuple[dict[str, np.ndarray], dict[str, list[list[int]]]]:
  """Seconds of ours and of each rival's answer, in turn, after one warm-up.

  Returns:
    ({name: seconds of each round}, {rival: tokens of the last}).
  """
  tokens = {}

  def ask(rival):
    seconds, answers = rival.ask(*request)
    if answers:
      tokens[rival.name] = answers
    return seconds

  everyone = [*mine, *((r.name, functools.partial(ask, r)) for r in rivals)]
  taken = {name: [] for name, _ in everyone}
  for round in range(rounds + 1):
    for name, run in everyone:
      seconds = run()
      if round:
        taken[name].append(seconds)
      time.sleep(REST_S)
  return {name: np.array(s) for name, s in taken.items()}, tokens


# --- the rest ---------------------------------------------------------------


def bench_scheduler(results: list[dict[str, Any]], say: Callable[..., None]
                    ) -> None:
  """The DecodeDones of busy schedulers, in turn."""
  say(f'(c) scheduler.step, {RUNNING} running, {WAITING:,} waiting: one in '
      'which no row\n    takes a page, and by page one in which most do')
  busy = {name: scheduler_step.Busy(blocks)
          for name, blocks in scheduler_step.CASES.items()}
  for name, taken_us in scheduler_step.times_us(busy).items():
    plain, *_ = taken_us
    for case, values in taken_us.items():
      add(results, say, f'(c) {name}, {case}', 'us', values,
          {plain: taken_us[plain]})


def bench_migrate(loaded: checkpoint.Model, results: list[dict[str, Any]],
                  rounds: int, say: Callable[..., None]) -> None:
  """KV of prompts between two devices, from dispatch until it is in place."""
  config = EngineConfig(max_len=max(MOVED), max_seqs=2, prefix_cache=False)
  placement = Placement(prefill=[Plan()], decode=[Plan()])
  here, there = jax.devices()[:2]
  with orchestrator.serve(loaded, placement, config) as server:
    route, = server.routes.values()
    for tokens in MOVED:
      pages = tokens // config.page_size
      command = Migrate(0, 1, 0, tuple(range(pages)), 1,
                        tuple(range(pages)), tokens)
      shape = (loaded.config.num_kv_heads, pages, config.page_size,
               loaded.config.head_dim)
      layers = 2 * loaded.config.num_layers
      plain = [jax.device_put(jnp.ones(shape), here) for _ in range(layers)]
      stacked = jax.device_put(jnp.ones((layers, *shape)), here)
      ours, put, stack = in_turn(
          rounds,
          lambda command=command: route.start(command).land(),
          lambda plain=plain: jax.device_put(plain, there),
          lambda stacked=stacked: jax.device_put(stacked, there))
      size = stacked.nbytes
      add(results, say, f'(d) migration of {tokens:,} tokens', 'GB/s',
          size / ours / 1e9, {
              'device_put, an array a layer': size / put / 1e9,
              'device_put, one array': size / stack / 1e9})


# Names of calls in HLO, and which kernel each calls.
CALLS = re.compile(r'(ffi_call[.0-9]*) = .*custom_call_target="(dsjax_\w+)"')


def bench_ops(instance: engine.Engine, say: Callable[..., None]) -> None:
  """Where the time of steps goes, by what XLA calls it."""
  for batch in (1, BATCH):
    ours = Ours(instance, batch)
    for phase, steps in (('prefill', len(ours.prefills)), ('decode', STEPS)):
      run = getattr(ours, phase)
      tokens = min(batch * PROMPT, CONFIG.prefill_tokens) * (phase == 'prefill')
      step, args = abstract_step(
          instance.shapes, tokens, 0 if tokens else batch,
          seqs_bucket(instance.capacity, tokens))
      named = dict(CALLS.findall(step.lower(*args).compile().as_text()))
      clock(run)
      with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
          wall = clock(run)
        file, = pathlib.Path(folder).rglob('*.trace.json.gz')
        events = json.loads(gzip.decompress(file.read_bytes()))['traceEvents']
      taken, calls = collections.Counter(), collections.Counter()
      for event in events:
        if op := event.get('args', {}).get('hlo_op'):
          kind = named.get(op, op.split('.')[0])
          taken[kind] += event['dur'] / 1e3 / steps
          calls[kind] += 1
      say(f'(g) {phase}, batch {batch}: {wall * 1e3 / steps:.1f} ms a step, '
          'traced; ms and calls of each op:')
      for kind, spent in taken.most_common(8):
        say(f'    {kind:36} {spent:8.2f}  {calls[kind] / steps:6.0f}')


def spread(values: ArrayLike) -> tuple[float, ...]:
  """(median, lower and upper quartile)."""
  return tuple(np.percentile(np.asarray(values), (50, 25, 75)).tolist())


def text(values: Sequence[float]) -> str:
  """A spread as text."""
  digits = 0 if values[0] >= 1000 else 1
  return '{0:,.{n}f} [{1:,.{n}f}, {2:,.{n}f}]'.format(*values, n=digits)


def add(results: list[dict[str, Any]], say: Callable[..., None], name: str,
        unit: str, values: ArrayLike,
        rivals: Mapping[str, ArrayLike] | tuple[()] = ()) -> None:
  """Takes note of a row: rounds of ours, and of {rival: rounds}."""
  ours = spread(values)
  others = {key: spread(value) for key, value in dict(rivals).items()}
  ratio = ours[0] / max(x[0] for x in others.values()) if others else None
  results.append(dict(name=name, unit=unit, value=ours, rivals=others,
                      ratio=ratio))
  say(f'{name}: {ours[0]:,.1f} {unit}'
      + (f', ratio {ratio:.2f}' if ratio else ''))


def show(results: Sequence[Mapping[str, Any]], say: Callable[..., None]
         ) -> None:
  """Prints one table: medians, quartiles, and the ratio to the best rival."""
  machine = provenance.machine()
  say(f'\n{machine["cpu"]}, {machine["cores"]} cores: medians, quartiles, '
      'ratios')
  for row in results:
    say(f'{row["name"]}, {row["unit"]}')
    for name, value in {'dsjax': row['value'], **row['rivals']}.items():
      ratio = '' if name == 'dsjax' else f'{row["value"][0] / value[0]:8.2f}'
      say(f'    {name:30}{text(value):>28}{ratio}')


def measure(parts: Sequence[str], rounds: int, results: list[dict[str, Any]],
            say: Callable[..., None]) -> None:
  """Adds a row of each part to `results` as it comes."""
  if 'c' in parts:
    bench_scheduler(results, say)
  if set(parts) == {'c'}:
    return
  loaded = checkpoint.load(MODEL)
  instance: Any = None  # of the parts that need one
  if set(parts) & set('afg'):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('model',))
    instance = engine.Engine(loaded, [mesh], 'colocated', CONFIG)
    for name in instance.warm():
      say('    compiled', name)
  if 'a' in parts:
    bench_steps(loaded, instance, results, rounds, say)
  if 'b' in parts:
    bench_server(loaded, results, rounds, say)
  if 'd' in parts:
    bench_migrate(loaded, results, rounds, say)
  if 'e' in parts:
    bench_modes(loaded, results, rounds, say)
  if 'f' in parts:
    bench_peers(loaded, instance, results, rounds, say)
  if 'g' in parts:
    bench_ops(instance, say)


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Runs the parts that are asked for and prints a line each."""
  cli.prepare(2)
  parts = options.only or (list('abcde') + ['f'] * options.peers
                           + ['g'] * options.ops)
  require(set(parts) <= set('abcdefg'), '--only', parts, 'of a,b,c,d,e,f,g')
  results, say = [], cli.says(console)
  stopped = kept.until_stopped(measure, parts, options.rounds, results, say)
  if results:
    show(results, say)
  return kept.end(console, {'rows': results}, stopped, options, FLAGS)


if __name__ == '__main__':
  cli.main(run, FLAGS)
