"""Times the compiled steps of a live engine and fits latencies to them.

Every plan is built on the devices at hand and timed over a grid of batch x
length: prefills, later chunks, decode steps, mixed (chunked) steps, what the
serving loop adds between two steps (host), migrations between each pair of
plans, and how two instances of plan 1x1 slow each other: nothing on devices of
their own, much on the CPU devices of one process. All cells are timed in turn,
round after round, and the median of each counts, so that a busy moment spoils
no single cell. Buckets are part of the result: a batch costs what its compiled
size costs.

With `cluster` instances are processes, as a server has them: steps are those
of a process with its own cores while the other one is idle, and what KV takes
is what it takes over that border. On CPUs, what else takes of their cores is
found from CPU seconds: hand-offs of both ends, and the server, if it has no
core of its own.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsjax.analysis.record import Record
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import Request, Sampling
from dsjax.model import kv_cache, sharding
from dsjax.runtime import engine, orchestrator, slowing
from dsjax.runtime.cluster import local, starting
from dsjax.runtime.grid import (
  STEPS,
  Cells,
  Stopped,
  cells_of,
  context_of,
  in_rounds,
  shapes,
  spread,
  typical,
  typical_s,
)
from dsjax.scheduling.events import Migrate
from dsjax.simulation import contention, fitting, latency, profiles

COMMANDS = 24  # decode steps of a timed run of commands
HAND_OFFS = 8  # of each length, of which CPU seconds are taken
LINK_ROUNDS = 10  # at least: a hand-off takes milliseconds
HOST_TOKENS = 24  # output tokens of the requests that find the host's time
WAITING = 8  # prompts that wait for one before them
ENGINE = EngineConfig(max_len=1024, max_seqs=16, prefill_tokens=512,
                      chunk_tokens=512, prefill_seqs=8, prefix_cache=False)
Report = Callable[[int, int, str], object]  # (done, total, what)


# --- what else takes time ---------------------------------------------------


def host_times(model: Model, config: EngineConfig, plan: Plan, rounds: int,
               cluster: str | None = None) -> tuple[list[float], list[float]]:
  """(seconds from the end of a step until the next runs, CPU seconds of this
  process a step), one a round.

  The first is of prompts that wait for each other, each a step: what they take
  one after another, less that prefill run bare, in turn. Of two processes one
  is away: so the other has as many cores as one that runs alone. The second is
  of a full batch that is served.
  """
  plans = [plan] if cluster is None else [plan, plan]
  config = dataclasses.replace(config, prefill_seqs=1,
                               away=() if cluster is None else (1,))
  batch, prompt = config.max_seqs, min(16, config.prefill_tokens)
  tokens = min(HOST_TOKENS, config.max_len - prompt)
  rng = np.random.default_rng(0)
  added, taken = [], []
  with orchestrator.serve(model, Placement(colocated=plans), config,
                          report=lambda *_: None, cluster=cluster) as server:

    def serve(count: int, most: int) -> list[Record]:
      ids = rng.integers(3, model.config.vocab_size, (count, prompt)).tolist()
      first = server.next_id
      return server.run([Request(
          first + row, 0.0, tuple(prompt_ids),
          Sampling(max_tokens=most, ignore_eos=True))
              for row, prompt_ids in enumerate(ids)])

    def bare_s() -> float:
      with cells_of(server.engines[0]) as cells:
        return cells.seconds(((0, prompt),), 0, 0, WAITING)

    for i in range(rounds + 1):
      before_s, before = time.process_time(), server.steps
      serve(batch, tokens)
      cpu_s = time.process_time() - before_s
      steps = server.steps - before
      ended_s = [record.token_s[0] for record in serve(WAITING + 1, 1)]
      each_s = statistics.median(np.diff(sorted(ended_s)))
      if i:
        taken.append(cpu_s / steps)
        added.append(float(each_s) - server.call(bare_s))
  return added, taken


def transfer_times(source: Any, target: Any,
                   lengths: Sequence[int], rounds: int,
                   tick: Callable[[], object]) -> list[float]:
  """Median seconds of a migration of each length, between idle instances."""
  route = source.route_to(target)
  route.warm()

  def timed(n):
    def run():
      ids = [tuple(range(-(-n // e.capacity.page_size)))
             for e in (source, target)]
      start = time.perf_counter()
      route.start(Migrate(0, 1, 0, ids[0], 1, ids[1], n)).wait()
      return time.perf_counter() - start
    return run
  return in_rounds([timed(n) for n in lengths], rounds, tick)


def hand_off_cpu(source: Any, target: Any, lengths: Sequence[int]
                 ) -> list[tuple[float, float]]:
  """(a, b) of the source and of the target, which are processes: a + b tokens
  CPU seconds of each that a hand-off takes.

  Of some in a row: what an end does once it was told of counts with the next.
  """
  route, taken = source.route_to(target), []
  for n in lengths:
    ids = [tuple(range(-(-n // e.capacity.page_size)))
           for e in (source, target)]
    told = []
    for _ in range(HAND_OFFS + 1):
      route.start(Migrate(0, 1, 0, ids[0], 1, ids[1], n)).wait()
      told.append([end.stamps[-1].cpu_s for end in (source, target)])
    taken.append([(last - first) / HAND_OFFS
                  for first, last in zip(told[0], told[-1], strict=True)])
  lines = []
  for seconds in zip(*taken, strict=True):
    (base_s, token_s), _ = fitting.nonnegative(
        [(1.0, float(n)) for n in lengths], list(seconds))
    lines.append((float(base_s), float(token_s)))
  return lines


# --- side by side -----------------------------------------------------------

BESIDE_ROUNDS = 3  # at least, of several sizes each
TYPICAL_ROUNDS = 9  # at least
NOTICED = 1.03  # a factor below this is noise


def dispatch_s(bare: Cells, config: EngineConfig, rounds: int
               ) -> tuple[float, float]:
  """(a, b): a + b steps seconds that a process, whose steps and dispatches have
  one core, takes more for a command which comes while another runs."""
  _, batch, each = typical(config)['decode']

  def more_s(steps):
    return bare.command_s(batch, each, steps, COMMANDS // steps) - (
        steps * bare.seconds((), batch, each, COMMANDS // STEPS))

  one_s, several_s = (statistics.median(more_s(steps) for _ in range(rounds))
                      for steps in (1, STEPS))
  step_s = min(max(0.0, (several_s - one_s) / (STEPS - 1)), max(0.0, one_s))
  return max(0.0, one_s - step_s), step_s


# --- the whole --------------------------------------------------------------


def buckets_of(config: EngineConfig) -> latency.Buckets:
  """The latency.Buckets of an engine's compiled steps."""
  rows = config.max_seqs
  return latency.Buckets(config.token_buckets(config.prefill_tokens),
                         config.row_buckets,
                         tuple(sorted({-(-rows // 4), rows})))


def build(model: Model, plan: Plan, role: str, config: EngineConfig,
          devices: Sequence[jax.Device]) -> engine.Engine:
  """An Engine of one plan on the first of these devices."""
  placement = Placement(colocated=[plan])
  meshes, = sharding.make_meshes(model.config, placement, devices)
  return engine.Engine(model, meshes, role, config)


def _ticks(report, what, total):
  """A function that tells `report` of one more of `total` when called."""
  done = itertools.count(1)
  report(0, total, what)
  return lambda: report(next(done), total, what)


class _Profiler:
  """What `measure` was asked; each method times one part of it."""

  def __init__(self, model, config, rounds, points, report, devices, apart,
               cluster):
    self.model, self.config, self.rounds = model, config, rounds
    self.grid, self.report = shapes(config, points), report
    self.lengths = spread(config.page_size, config.max_len, points)
    self.devices = devices
    self.apart = devices[apart:]  # for a second instance
    self.stopped, self.cluster, self.processes = False, cluster, []
    self.server_s = 0.0
    self.hand_off: list[tuple[float, float]] = []
    self.typical_s: dict[str, float] = {}
    self.command_s = 0.0, 0.0

  def start(self, placement):
    """The engines of a placement, each a process."""
    made = starting.build(self.model, placement, self.config, engine.Engine,
                          self.cluster, False)
    self.processes += made
    return made

  def close(self):
    """Ends the processes."""
    for process in self.processes:
      process.close()
    self.processes = []

  def engine(self, plan):
    """A warm Engine that has both kinds of step; as a process beside another,
    so that each has cores of its own."""
    tick = _ticks(self.report, f'{plan}: building', 1)
    made = (self.start(Placement(chunked=[plan, plan]))[0] if self.cluster else
            build(self.model, plan, 'chunked', self.config, self.devices))
    tick()
    tick = _ticks(self.report, f'{plan}: compiling', len(made.shapes_needed()))
    for _ in made.warm():
      tick()
    return made

  def cells(self, plan, bare):
    """A fitting.Cell for each cell of the grid."""
    tick = _ticks(self.report, f'{plan}: steps',
                  (self.rounds + 1) * len(self.grid))
    try:
      medians = in_rounds([lambda shape=shape: bare.seconds(*shape)
                           for shape in self.grid], self.rounds, tick)
    except Stopped as stopped:
      medians, self.stopped = stopped.medians, True
    return [fitting.Cell(shape[0], shape[1], context_of(*shape), seconds)
            for shape, seconds in zip(self.grid, medians, strict=True)]

  def affine(self, plan, cells):
    """The latency.Affine of a plan, with the host's time."""
    host, taken = [], []
    try:
      if not self.stopped:
        tick = _ticks(self.report, f'{plan}: host', 1)
        host, taken = host_times(self.model, self.config, plan, self.rounds,
                                 self.cluster)
        tick()
    except KeyboardInterrupt:
      self.stopped = True
    if taken and self.cluster and not local.has_own_core(
        Placement(colocated=[plan, plan])):
      self.server_s = statistics.median(taken)
    return fitting.fit_affine(
        cells, buckets_of(self.config),
        max(0.0, statistics.median(host)) if host else 0.0, plan.pp)

  def link(self, plan, source, to):
    """The latency.Link to a plan; None where noise hides the bandwidth."""
    rounds = max(self.rounds, LINK_ROUNDS)
    tick = _ticks(self.report, f'{plan}: to {to}',
                  (rounds + 1) * len(self.lengths))
    if self.cluster:
      self.close()
      source, target = self.start(Placement(prefill=[plan], decode=[to]))
      for end in (source, target):
        for _ in end.warm():
          pass
    else:
      target = build(self.model, to, 'decode', self.config, self.apart)
    seconds = transfer_times(source, target, self.lengths, rounds, tick)
    if self.cluster and local.visible_gpus() is None and plan == to == Plan():
      self.hand_off = hand_off_cpu(source, target, self.lengths)
    if seconds[-1] <= seconds[0]:
      return None
    return fitting.fit_link(self.lengths, seconds, kv_cache.bytes_per_token(
        self.model.config, self.config.kv_dtype_of('decode'),
        self.model.config.num_layers))

  def contention(self, bare):
    """The Contention of two instances of one device; None: there is none."""
    rounds = max(self.rounds // 2, BESIDE_ROUNDS)
    tick = _ticks(self.report, f'{Plan()}: side by side',
                  (rounds + 1) * slowing.count(self.config))
    if self.cluster:
      other = self.processes[1]  # of the two that `engine` started
      for _ in other.warm():
        pass
    else:
      other = build(self.model, Plan(), 'chunked', self.config, self.apart)
    return slowing.measure(bare, Cells(other), self.config, rounds, tick)

  def shared(self, factors):
    """The whole Contention; None: instances share nothing. factors: of
    `contention`, or None where it was not measured."""
    read_s, write_s = self.hand_off or ((0.0, 0.0),) * 2
    made = contention.Contention(factors.factors if factors else {},
                                 self.server_s, read_s, write_s,
                                 self.command_s)
    some = max(made.factors.values(), default=1.0) >= NOTICED
    return made if some or any((made.server_s, *read_s, *write_s,
                                *made.command_s)) else None


def measure(model: Model, plans: Sequence[Plan], config: EngineConfig = ENGINE,
            rounds: int = 5, points: int = 4, report: Report | None = None,
            name: str | None = None, side_by_side: bool = True,
            devices: Sequence[jax.Device] | None = None,
            cluster: str | None = None
            ) -> tuple[profiles.Profile, dict[Plan, list[fitting.Cell]]]:
  """Profiles every plan: the Profile, and what each cell took.

  Args:
    config: chunk_tokens must be prefill_tokens.
    rounds: timed rounds of every cell. points: lengths of each part of the
      grid, the least and the most included.
    report: called with (done, total, what) as parts of it are done.
    name: the model's, for the profile.
    side_by_side: also measure how two instances of one device slow each
      other, which takes the longest.
    devices: jax.devices() by default; one that is named twice takes two
      instances.
    cluster: as of dsjax.serve: instances are processes.

  Ctrl-C (or `report` raising KeyboardInterrupt) ends it with what was timed:
  a plan counts once a round of its cells is whole.

  Raises:
    InputError: a plan does not fit on the devices, or the config is not as
      described.
    KeyboardInterrupt: nothing was timed by then.
  """
  require(config.chunk_tokens == config.prefill_tokens,
          'EngineConfig.chunk_tokens', config.chunk_tokens,
          f'prefill_tokens={config.prefill_tokens}: one engine measures '
          'both kinds of step')
  require(config.max_len >= 64, 'EngineConfig.max_len', config.max_len,
          '64 or more to measure')
  most = max(plan.num_devices for plan in plans)
  kind, devices = 'cpu', devices or ()
  if cluster is None:
    devices = devices or jax.devices()
    require(2 * most <= len(devices), 'plans', plans,
            f'of at most {len(devices) // 2} devices: migrations need a '
            'source and a target')
    kind = devices[0].device_kind
  elif local.visible_gpus() is not None:
    kind = 'gpu'  # processes have them, and this one does not look
  work = _Profiler(model, config, rounds, points, report or (lambda *_: None),
                   devices, most, cluster)
  cells, models, links, shared = {}, {}, {}, None
  for plan in plans:
    try:
      source = work.engine(plan)
      bare = Cells(source)
      cells[plan] = work.cells(plan, bare)
      models[plan] = work.affine(plan, cells[plan])
      if plan == Plan() and not work.stopped:
        work.typical_s = typical_s(bare, config, contention.KINDS,
                                   max(rounds, TYPICAL_ROUNDS))
        if cluster and local.visible_gpus() is None:
          work.command_s = dispatch_s(bare, config, max(rounds, TYPICAL_ROUNDS))
      if plan == Plan() and side_by_side and not work.stopped:
        shared = work.contention(bare)
      for to in plans if not work.stopped else ():
        if link := work.link(plan, source, to):
          # What comes before it starts is the host's.
          links[plan, to] = dataclasses.replace(link, base_s=max(
              0.0, link.base_s - models[plan].host_s))
    except KeyboardInterrupt:
      work.stopped = True
    finally:
      work.close()
    if work.stopped:
      break
  if not models:
    raise KeyboardInterrupt
  return profiles.Profile(
      name or model.config.name, kind, models, links,
      f'dsjax.runtime.profiling, {rounds} rounds, {config.dtype}, '
      f'jax {jax.__version__}' + f', cluster={cluster}' * bool(cluster)
      + ', stopped by Ctrl-C' * work.stopped,
      work.shared(shared), typical_s=work.typical_s,
      bytes_per_weight=np.dtype(config.dtype).itemsize,
      bytes_per_kv=kv_cache.bytes_per_token(
          model.config, config.kv_dtype_of('decode'), model.config.num_layers
      ) / model.config.kv_bytes_per_token(1)), cells


def profile(model: Model, plans: Sequence[Plan] = (Plan(),),
            config: EngineConfig = ENGINE, rounds: int = 5, points: int = 4,
            report: Report | None = None,
            side_by_side: bool = True) -> profiles.Profile:
  """The Profile of a model on the devices at hand; see `measure`.

  It needs twice the devices of the largest plan, since KV is moved between
  two instances.
  """
  return measure(model, plans, config, rounds, points, report,
                 side_by_side=side_by_side)[0]
