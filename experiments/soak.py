"""Serves for minutes while instances die and calls go wrong; checks it all.

  python -m experiments.soak --out=out/soak       (SmolLM2, ten minutes)
  python -m experiments.soak --quick --minutes=1 --out=out/soak
  python -m experiments.soak --all --out=out/all  (kept KV comes and goes)
  python -m experiments.soak --flips=60 --out=out/flips   (no faults, flips)

First every job of a small set is served without a fault: its tokens are what
it must give from then on. Then requests for these jobs arrive at random, some
are cancelled, and faults come at random: an instance is killed and started
again, or drained for a while, or a call of its engine goes wrong in one of the
ways of experiments.verify.faults. Half the jobs are greedy, half drawn by a
seed.

Checked: the tokens of every request (of a cancelled one as far as they came),
that no request was lost, that every page and slot came back, that nothing was
compiled, and that the event log replays. Prints a table. Files in --out:
soak.json, soak.png, requests.jsonl, faults.jsonl, events.jsonl.gz.

Added latency of a request that a fault hit: over the median of requests for
the same job that none hit, in the same run. Its bound: for each retry the
longest of lease, stall limit and time until a killed instance is back (a
process: as long as one took, and until its silence was noticed), plus once
more the worst latency without a hit.

With --all, KV is streamed, there is host memory, rows are swapped, what other
instances have kept is fetched, and pages run short; slots of host memory are
to come back too.

With --cluster=local instances are processes, and faults are real: SIGKILL,
SIGSTOP and a socket that is cut, beside kills and drains by hand. What each
process holds at the end is checked too.

With --flips no fault comes: roles of flexible instances flip that often while
--requests are served, and their tokens are compared with those of a server
whose roles stay (experiments.verify.flips), by processes with --cluster. Only
soak.json is written then.

Ctrl-C keeps what there is. Exit codes: see experiments.common.cli.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import random
import signal
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import jax
from absl import logging
from rich.console import Console

import dsjax
from configs.serve import PROMPTS
from dsjax import workload
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement
from dsjax.runtime.orchestrator import Orchestrator
from dsjax.scheduling import event_log, prefix_cache, scheduler
from dsjax.scheduling.events import (
  Command,
  InstanceDown,
  InstanceUp,
  Load,
  Migrate,
  Preempt,
)
from dsjax.scheduling.policy import DISTSERVE
from experiments.common import cli, machine, provenance, terminal
from experiments.common import overrides as configs
from experiments.verify import flips, soak_report
from experiments.verify.anything import FETCHING
from experiments.verify.faults import COPY, KINDS, Injector
from experiments.verify.held import counted

JOBS = 16
SAMPLE_S = 2.0  # between two looks at the memory
MOST_WAITING = 64  # requests: more arrivals than that are not sent
CONFIG = EngineConfig(
    max_len=256, max_seqs=8, prefill_tokens=128, prefill_seqs=4,
    chunk_tokens=64, checksum=True, tries=10, lease_s=5.0, stall_s=20.0,
    silent_s=10.0, restarts=1000)
# With --all, of each of them: pages run short, and prompts go in chunks.
ALL: dict[str, Any] = {'stream_kv': True, 'host_bytes': 2**25, 'num_pages': 24,
                       'prefill_tokens': 32}
QUICK = dataclasses.replace(CONFIG, lease_s=1.0, stall_s=2.0, silent_s=5.0,
                            restart_s=0.2)


FLAGS = {
    'minutes': cli.Flag(10.0, 'How long.', low=0.01),
    'quick': cli.Flag(False, 'Random weights instead of SmolLM2.'),
    'model': cli.Flag('smollm2-135m-instruct', 'See dsjax.load.'),
    'placement': cli.Flag(None, 'prefill=1x1,1x1,decode=1x1,1x1; with --flips '
                          'flexible=1x1,1x1.', str),
    'all': cli.Flag(False, 'Streamed KV, host memory, swapped rows and fetches '
                    'too, in few pages.'),
    'flips': cli.Flag(0, 'Role flips, instead of faults.', low=0),
    'requests': cli.Flag(3060, 'With --flips: how many.', low=flips.JOBS),
    'rate': cli.Flag(None, 'Requests a second; 1, with --quick 20.', float,
                     low=1e-3),
    'faults': cli.Flag(12.0, 'A minute.', low=0.0),
    'cancel': cli.Flag(0.1, 'Share of requests that are cancelled.', low=0.0,
                       high=1.0),
    'back_s': cli.Flag(2.0, 'Most seconds that a killed or drained instance '
                       'is away.', low=0.0),
    'cluster': cli.CLUSTER_FLAG, 'seed': 0, 'set': (), 'out': None,
}


@dataclasses.dataclass
class Sent:
  """A request: its job, and when its client leaves, if it does."""

  job: int
  leaves_s: float | None


def make_jobs(model: Model, config: EngineConfig, seed: int
              ) -> list[tuple[list[int], dict[str, Any]]]:
  """[(prompt ids, parameters)]: the demo's chats, greedy and drawn in turn."""
  rng, jobs = random.Random(seed), []
  tokenizer: Any = model.tokenizer  # SmolLM2 has one
  for i, p in enumerate(workload.read_prompts(str(PROMPTS))):
    ids = tokenizer.chat(list(p.messages) if p.messages else
                               [{'role': 'user', 'content': p.text}])
    tokens = rng.randint(4, 48)
    if len(ids) + tokens <= config.max_len:
      drawn = {'temperature': 0.9, 'seed': i} if i % 2 else {}
      jobs.append((ids, {'max_tokens': tokens, **drawn}))
  return jobs[:JOBS]


def rss_mb() -> float:
  """Resident memory of this process."""
  with open('/proc/self/statm') as file:
    return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def arrays_mb() -> float:
  """What jax arrays hold on devices."""
  return sum(x.nbytes for x in jax.live_arrays()) / 1e6


class Soak:
  """One run.

  Attributes:
    done: a dict a request that has ended. faults: one a fault.
    memory: (seconds, MB) of the process. arrays_mb: on devices, before and,
      once it is settled, after.
  """

  def __init__(self, server: Orchestrator,
               jobs: Sequence[tuple[Sequence[int], Mapping[str, Any]]],
               options: types.SimpleNamespace, rate: float,
               events: TextIO) -> None:
    self.server, self.jobs, self.options = server, jobs, options
    self.rate, self.rng = rate, random.Random(options.seed)
    self.injector, self.sent = Injector(server), {}
    self.done, self.faults, self.memory, self.away = [], [], [], {}
    self.unsent, self.wrong, self.seen = 0, [], 0
    self.methods = [m for m in KINDS if server.routes or m in (
        'prefill', 'decode', 'admit')]
    self.replayed, self.differs, self.events = server.state, 0, events
    self.held = 0  # by processes, at the end
    self.lost_s, self.away_s = {}, 0.0  # when; the longest until it was back
    self.copies = dict.fromkeys(('streamed', 'swapped', 'loaded', 'fetched'), 0)
    server.observers.append(self._observe)

  def _observe(self, event, commands):
    """Replays and writes each event as it comes: a log of hours is long."""
    self.replayed, again = scheduler.step(self.server.scheduler_config,
                                          self.replayed, event)
    self.differs += again != commands
    for command in commands:
      self.count(command)
    if isinstance(event, InstanceDown):
      self.lost_s[event.instance] = event.time_s
    elif isinstance(event, InstanceUp) and event.instance in self.lost_s:
      self.away_s = max(self.away_s, event.time_s - self.lost_s.pop(
          event.instance))
    self.events.write(json.dumps(event_log.encode((event, commands))) + '\n')

  def count(self, command: Command) -> None:
    """Copies other than plain hand-offs."""
    kind = ('fetched' if isinstance(command, Migrate) and command.kept else
            'streamed' if isinstance(command, Migrate) and command.more else
            'swapped' if isinstance(command, Preempt)
            and command.cause == 'swap' else
            'loaded' if isinstance(command, Load) else None)
    if kind:
      self.copies[kind] += 1

  def reference(self) -> None:
    """Serves every job once without a fault, and keeps its tokens."""
    ids = [self.server.submit(p, **params) for p, params in self.jobs]
    while self.server.busy:
      self.server.poll()
    self.want = [tuple(self.server.requests[id].tokens) for id in ids]
    self.leaves_s = max((r.finish_s or 0.0) - r.arrival_s for r in map(
        self.server.forget, ids))
    self.arrays_mb = self.arrays()

  def arrays(self) -> float:
    """MB of this process's arrays; of processes they are not known."""
    return 0.0 if self.options.cluster else arrays_mb()

  def run(self, seconds: float, show: Callable[[], object]) -> None:
    """Serves under faults; show() is called between polls."""
    self.origin = self.server.now
    per_s = self.options.faults / 60
    arrive_s, sample_s = 0.0, 0.0
    fault_s = self.rng.expovariate(per_s) if per_s else float('inf')
    while (now := self.now) < seconds:
      if now >= arrive_s:
        arrive_s += self.rng.expovariate(self.rate)
        self.arrive()
      if now >= fault_s:
        fault_s += self.rng.expovariate(per_s)
        self.break_something()
      if now >= sample_s:
        sample_s = now + SAMPLE_S
        self.memory.append((now, rss_mb()))
      self.turn()
      show()

  @property
  def now(self) -> float:
    return self.server.now - self.origin

  def turn(self) -> None:
    """One poll, and what clients do meanwhile."""
    self.server.poll()
    for id, sent in list(self.sent.items()):
      if self.server.requests[id].finished:
        self.end(id)
      elif sent.leaves_s is not None and self.now >= sent.leaves_s:
        sent.leaves_s = None
        self.server.cancel(id)
    for index, back_s in list(self.away.items()):
      if self.now >= back_s:
        del self.away[index]
        self.restore(index)
    for fault in self.injector.fired[self.seen:]:
      self.note(fault[0], f'{fault[1]}: {fault[2]}')
    self.seen = len(self.injector.fired)

  def restore(self, index: int) -> bool:
    """Whether the instance is there; a fault may have hit it as it started,
    and it is tried again."""
    try:
      self.server.restore(index)
    except RuntimeError as error:
      self.note(index, f'not started: {error}')
      self.away[index] = self.now + self.options.back_s
      return False
    return True

  def arrive(self) -> None:
    """A request, unless too many wait."""
    if len(self.sent) >= MOST_WAITING:
      self.unsent += 1
      return
    job = self.rng.randrange(len(self.jobs))
    leaves_s = (self.now + self.rng.uniform(0, self.leaves_s) / 4 if
                self.rng.random() < self.options.cancel else None)
    prompt, params = self.jobs[job]
    self.sent[self.server.submit(prompt, **params)] = Sent(job, leaves_s)

  def break_process(self) -> None:
    """One fault of a process, at random."""
    index = self.rng.randrange(len(self.server.engines))
    engine: Any = self.server.engines[index]  # a RemoteEngine
    away_s = self.rng.uniform(0, self.options.back_s)
    what = self.rng.choice(('SIGKILL', 'SIGKILL', 'SIGSTOP', 'cut off',
                            'killed', 'drained'))
    if what == 'killed':
      self.server.kill(index, back_s=away_s)
    elif what == 'drained':
      self.server.drain(index)
      self.away[index] = self.now + away_s
    elif engine.pid is None or (
        what == 'SIGSTOP'
        and self.server.state.instances[index].status == 'down'):
      return  # to be started again; or it is given up only after 300 s
    elif what == 'cut off':
      engine.cut()
    else:
      os.kill(engine.pid, getattr(signal, what))
    self.note(index, what)

  def break_something(self) -> None:
    """One fault, at random."""
    if self.options.cluster:
      self.break_process()
      return
    rng, index = self.rng, self.rng.randrange(len(self.server.engines))
    away_s = rng.uniform(0, self.options.back_s)
    self.injector.released = rng.random() < 0.5  # what is stuck: late, or never
    what = rng.choice(('kill', 'kill', 'drain', rng.choice(self.methods),
                       rng.choice(self.methods), rng.choice(self.methods)))
    if what == 'kill':
      self.note(index, 'killed')
      self.server.kill(index, back_s=away_s)
    elif what == 'drain':
      self.note(index, 'drained')
      self.server.drain(index)
      self.away[index] = self.now + away_s
    else:
      role = self.server.engines[index].role
      sides = {'prefill': ('prefill', 'chunked', 'colocated'),
               'decode': ('decode', 'chunked', 'colocated'),
               'gather': ('prefill',), 'scatter': ('decode',),
               COPY: ('decode',)}
      if role in sides.get(what, (role,)):
        self.injector.arm(index, what, rng.choice(KINDS[what]),
                          rng.randint(1, 3))

  def note(self, index: int, what: str) -> None:
    """A fault has happened."""
    self.faults.append({'s': self.now, 'instance': index, 'what': what})

  def end(self, id: int) -> None:
    """A request has ended: checks its tokens and forgets it."""
    job, got = self.sent.pop(id).job, tuple(self.server.requests[id].tokens)
    record, want = self.server.forget(id), self.want[job]
    whole = record.status in ('stop', 'length')
    if got != (want if whole else want[:len(got)]):
      self.wrong.append(id)
    self.done.append({
        'id': id, 'job': job, 'status': record.status,
        'reason': record.reason, 's': record.arrival_s - self.origin,
        'latency_s': (record.finish_s or 0.0) - record.arrival_s,
        'retries': record.retries, 'tokens': len(got)})

  def settle(self) -> None:
    """The end: no more faults, everything starts again, every request ends."""
    self.injector.disarm()
    self.injector.released = True
    for index in range(len(self.server.engines)):
      if not self.restore(index):  # by the last fault
        self.server.restore(index)
    self.away.clear()
    while self.sent or self.server.busy:
      self.turn()
    if self.options.cluster:
      self.ask()
    self.memory.append((self.now, rss_mb()))
    self.arrays_mb = self.arrays_mb, self.arrays()

  def leaked(self) -> int:
    """Pages and slots that have not come back."""
    scheduler.check(self.server.state)
    pools = [pool for inst in self.server.state.instances for pool in (
        inst.pool, *((inst.host.slots,) if inst.host else ()))]
    return sum(pool.num_pages - prefix_cache.num_free(pool)
               for pool in pools) + sum(
                   engine.config.max_seqs - len(engine.spare)
                   for engine in self.server.engines) + self.held

  def ask(self) -> None:
    """Asks each process what it holds, and how often it has compiled."""
    self.held = sum(map(sum, counted(self.server)))


class _Lines:
  """A line now and then of how far it is."""

  def __init__(self, console, soak, seconds, halt):
    self.console, self.soak, self.seconds = console, soak, seconds
    self.halt, self.next_s = halt, 0.0

  def __call__(self):
    self.halt()
    soak = self.soak
    if soak.now >= self.next_s:
      self.next_s = soak.now + 10.0
      self.console.print(
          f'{soak.now:4.0f} of {self.seconds:.0f} s: {len(soak.done)} requests '
          f'ended, {len(soak.sent)} live, {len(soak.faults)} faults, '
          f'{len(soak.wrong)} wrong, {soak.memory[-1][1]:.0f} MB',
          highlight=False)


def run_flips(options: types.SimpleNamespace, console: Console) -> int:
  """Everything with --flips; the exit code."""
  config = configs.override(flips.CONFIG, options.set)
  placement = Placement.parse(options.placement or 'flexible=1x1,1x1',
                              '--placement')
  require(placement.mode == 'flexible' and len(placement.instances) > 1,
          '--placement', placement, 'two flexible instances or more')
  require(options.flips <= options.requests, '--flips', options.flips,
          f'at most --requests, {options.requests}')
  cluster = cli.cluster_of(options)
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  cli.prepare(placement.num_devices, tp=placement.tp)
  model = dsjax.load('tiny' if options.quick else options.model,
                     weights=cluster is None)
  with terminal.Interrupts() as interrupts:
    result = flips.compare(model, placement, config, options,
                           _Progress(console, interrupts.halt), cluster)
  console.print(flips.table(result))
  provenance.save_json(out / 'soak.json', result, cli.asked(options, FLAGS))
  bad = result['failed checks']
  console.print(f'Failed: {", ".join(bad)}.' if bad else
                'Nothing was lost, leaked or wrong.', highlight=False)
  terminal.written(console, out, 'soak.json')
  return 1 if bad else 0


class _Progress:
  """A line now and then of how far a run of flips is."""

  def __init__(self, console, halt):
    self.console, self.halt, self.next = console, halt, 0

  def warming(self, done, total, name):
    """Nothing is said of steps that compile."""
    self.halt()

  def __call__(self, ended, count, flipped):
    self.halt()
    if ended >= self.next or ended == count:
      self.next = 0 if ended == count else ended + count // 10
      self.console.print(f'{ended:,} of {count:,} requests, {flipped} flips',
                         highlight=False)


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Everything; the exit code."""
  require(options.out, '--out', options.out, 'given: a folder')
  if options.flips:
    return run_flips(options, console)
  config = QUICK if options.quick else CONFIG
  config = configs.override(dataclasses.replace(config, **(
      ALL if options.all else {})), options.set)
  placement = Placement.parse(
      options.placement or 'prefill=1x1,1x1,decode=1x1,1x1', '--placement')
  rate = options.rate or (20.0 if options.quick else 1.0)
  require(rate > 0, '--rate', rate, 'requests/s above 0')
  cluster = cli.cluster_of(options)
  require(cluster in (None, 'local'), '--cluster', cluster,
          'local: what is killed are processes of this host')
  out, seconds = pathlib.Path(options.out), options.minutes * 60
  out.mkdir(parents=True, exist_ok=True)
  cli.prepare(placement.num_devices, tp=placement.tp)
  model = dsjax.load('tiny' if options.quick else options.model,
                     weights=cluster is None)
  jobs = make_jobs(model, config, options.seed)
  console.print(f'{model.config.name}, {placement}, {rate:g} requests/'
                f's and {options.faults:g} faults a minute for '
                f'{options.minutes:g} minutes, seed {options.seed}',
                highlight=False)
  with terminal.Interrupts() as interrupts, terminal.Screen(
      console, interrupts.halt) as screen, gzip.open(
          out / 'events.jsonl.gz', 'wt') as events:
    screen.begin('soak', placement, len(jobs))
    with dsjax.serve(model, placement, config, report=screen.warming,
                     keep_events=1, cluster=cluster,
                     policy=FETCHING if options.all else DISTSERVE
                     ) as server, (
                         machine.compilations()) as compiled:
      soak, stopped = Soak(server, jobs, options, rate, events), False
      console.print(f'Serving {len(jobs)} jobs without a fault first')
      soak.reference()
      began = time.perf_counter()
      try:
        soak.run(seconds, _Lines(console, soak, seconds, interrupts.halt))
      except KeyboardInterrupt:
        stopped = True
      soak.settle()
      result = soak_report.summarize(
          soak, time.perf_counter() - began, compiled)
  console.print(soak_report.table(result))
  soak_report.save(out, soak, result, cli.asked(options, FLAGS))
  bad = result['failed checks']
  console.print(f'Failed: {", ".join(bad)}.' if bad else
                'Nothing was lost, repeated, leaked or wrong.',
                highlight=False)
  terminal.written(console, out, 'soak.json', 'soak.png', 'requests.jsonl',
                   'faults.jsonl', 'events.jsonl.gz')
  return 1 if bad else 130 if stopped else 0


if __name__ == '__main__':
  # Each fault warns: they were asked for.
  cli.main(run, FLAGS, CONFIG, verbosity=logging.ERROR)
