"""Every interleaving of small worlds with their faults, and random large ones.

  python -m experiments.explore                   all small ones, 50 large ones
  python -m experiments.explore --deep            minutes of 2 cores
  python -m experiments.explore --small=1P2D --more=2 --seconds=600 --large=0
  python -m experiments.explore --small= --large=2000
  python -m experiments.explore --replay=FILE     what it wrote of a violation
  python -m experiments.explore --table           the tables of docs/faults.md

Small worlds are explored to their ends: each move that is possible in each
world that can be reached, with at most so many faults on a path; a world that
was seen before is not entered again. Large ones follow one random schedule
each. What may happen and what must hold after every move is in
experiments.verify.worlds. A schedule that breaks it is shrunk, printed and
written to --out, one JSON line a move; the exit code is then 1.
"""

import dataclasses
import multiprocessing
import pathlib
import random
import time
import types
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsjax.config.checks import InputError, require
from dsjax.config.engine import InstanceConfig
from dsjax.scheduling import lifecycle, scheduler
from dsjax.scheduling.policy import DISTSERVE
from experiments.common import children, cli, policies, provenance, terminal
from experiments.verify import schedules
from experiments.verify.anything import FETCHING, anything
from experiments.verify.links import LinkedRules
from experiments.verify.world import Violation
from experiments.verify.worlds import Rules

# Prompt tokens, most tokens, tokens until EOS (0: none), and where pages are
# kept how many of them others begin with.
STOPS, LONG, TINY, PIECES = (2, 4, 2), (3, 4, 0), (1, 2, 0), (5, 3, 0)


def _world(roles, requests, faults, num_pages=4, max_seqs=2, prefill_tokens=4,
           pp=1, page_size=2, host_pages=0, rules=Rules, **changes):
  instances = tuple(InstanceConfig(
      role, num_pages if role != 'prefill' else 4,
      page_size if role != 'prefill' else 2, max_seqs, prefill_tokens, 2, pp,
      host_pages)
                    for role in roles.split())
  options: dict[str, Any] = {'max_len': 9, 'run_ahead': 2, 'tries': 1}
  options |= changes
  return rules(scheduler.Config(instances, **options), requests), faults


def small_worlds() -> dict[str, tuple[Rules, int]]:
  """{name: (Rules, faults)}: what is explored to the end.

  Instances of a few pages; where rows outgrow them the world is called
  preemption. Prompts of more than prefill_tokens run in pieces. Where
  instances are flexible the policy answers anything allowed.
  """
  two, three = (STOPS, LONG), (STOPS, LONG, TINY)
  grow, tight = ((1, 4, 0), (1, 4, 2)), {'num_pages': 5, 'page_size': 1}
  wide = {'num_pages': 10, 'page_size': 1, 'prefill_tokens': 3}
  # The second prompt is the first one with its answer; the third begins alike.
  turns = ((3, 3, 0, 5), (5, 2, 0, 5), (4, 2, 2, 3))
  # The second needs room, the third begins as the first.
  again = ((5, 1, 0, 5), (7, 2, 0, 0), (5, 2, 2, 5))
  kept = {'prefix_cache': True, 'num_pages': 4, 'prefill_tokens': 5}
  # Of few steps: each message may be late.
  brief, messages = (TINY, (2, 3, 2)), {'rules': LinkedRules}
  # The first prompt is in three chunks, the second, which ends with its first
  # token, in two.
  fetches = {'policy': FETCHING}
  streams, parts = {'stream_kv': True, 'prefill_tokens': 2}, (PIECES, (4, 2, 1))
  return {
      '1P1D': _world('prefill decode', two, 4),
      '1P1D, 3 requests': _world('prefill decode', three, 3),
      '1P1D, pieces': _world('prefill decode', (PIECES, STOPS), 3,
                             num_pages=8, page_size=1, prefill_tokens=3),
      '1P1D, preemption': _world('prefill decode', grow, 3, **tight),
      '1P1D, preemption, depth 1': _world('prefill decode', grow, 3, depth=1,
                                          **tight),
      '1P1D, preemption of rows ahead': _world(
          'prefill decode', ((2, 7, 0), (2, 5, 2)), 3, num_pages=5),
      '1P1D, pp = 2': _world('prefill decode', three, 2, pp=2),
      '1P2D': _world('prefill decode decode', two, 3),
      '2P1D': _world('prefill prefill decode', two, 3),
      '1P2D, one joins': _world('prefill decode decode', two, 2, away=(2,)),
      '2P1D, two join': _world('prefill prefill decode', two, 2,
                               away=(1, 2)),
      '2P2D': _world('prefill prefill decode decode', two, 2),
      '1 colocated, preemption, depth 3': _world(
          'colocated', ((1, 4, 0), (1, 4, 1), TINY), 3, depth=3, **tight),
      '2 colocated': _world('colocated colocated', three, 3),
      '1 chunked, preemption': _world('chunked', (*grow, TINY), 3, **tight),
      '1 chunked, preemption of pieces': _world(
          'chunked', ((1, 6, 5), PIECES, TINY), 3, **wide),
      '2 chunked': _world('chunked chunked', three, 2),
      '2 chunked, pp = 2': _world('chunked chunked', two, 3, pp=2,
                                  prefill_tokens=3),
      '2 flexible': _world('flexible flexible', two, 3,
                           policy=anything(0, splits=False)),
      '2 flexible, preemption': _world(
          'flexible flexible', (*grow, TINY), 2,
          policy=anything(7, splits=False), **tight),
      '1P, 2 flexible': _world(
          'prefill flexible flexible', two, 2,
          policy=anything(4, waits=False, splits=False)),
      '2 flexible, splits': _world('flexible flexible', two, 3,
                                   policy=anything(1)),
      '2 flexible, splits, preemption': _world(
          'flexible flexible', (PIECES, LONG), 2, policy=anything(6), **wide),
      '1P1C, splits': _world('prefill chunked', two, 2, policy=anything(0)),
      '1P, 2 flexible, splits': _world(
          'prefill flexible flexible', two, 2,
          policy=anything(12, waits=False)),
      '1P1D, prefixes': _world('prefill decode', turns, 2, **kept),
      '1P1D, prefixes, smaller pages': _world(
          'prefill decode', turns, 2, page_size=1, **kept | {'num_pages': 7}),
      '1P2D, prefixes': _world('prefill decode decode', turns[:2], 2, **kept),
      '1 colocated, prefixes, preemption': _world(
          'colocated', ((1, 4, 0, 3), (2, 4, 3, 3), (3, 1, 0, 2)), 2,
          prefix_cache=True, **tight),
      '1 chunked, prefixes': _world('chunked', turns, 2, **kept),
      '2 flexible, splits, prefixes': _world(
          'flexible flexible', turns[:2], 2, policy=anything(1), **kept),
      '1P1D, streams': _world('prefill decode', parts, 3, **streams),
      '1P1D, streams, smaller pages': _world(
          'prefill decode', parts, 2, num_pages=8, page_size=1, **streams),
      '1P1D, streams, larger pages': _world(
          'prefill decode', parts, 2, num_pages=3, page_size=4, **streams),
      '1P1D, streams give way': _world(
          'prefill decode', ((1, 7, 0), (5, 2, 0)), 2, num_pages=9,
          page_size=1, **streams),
      '1P1D, streams, pp = 2': _world('prefill decode', parts, 2, pp=2,
                                      **streams),
      '2P1D, streams': _world(
          'prefill prefill decode', (PIECES, (5, 2, 0)), 2, **streams),
      '1P2D, streams': _world('prefill decode decode', parts, 2, **streams),
      '2 flexible, streams': _world(
          'flexible flexible', parts, 2, policy=anything(1),
          **streams | {'prefill_tokens': 3}),
      '1P1D, streams, prefixes': _world(
          'prefill decode', ((3, 3, 0, 6), (7, 2, 0, 6)), 2, prefix_cache=True,
          page_size=1, num_pages=9, **streams),
      '1P1D, host, streams': _world(
          'prefill decode', again[::2], 2, host_pages=2,
          **kept | {'prefill_tokens': 2, 'stream_kv': True}),
      '1P1D, host': _world('prefill decode', again, 2, host_pages=2, **kept),
      '1 colocated, host, preemption': _world(
          'colocated', ((2, 3, 0, 2), (3, 3, 0, 0), (2, 2, 2, 2)), 2,
          host_pages=2, prefix_cache=True, **tight),
      '1 chunked, host of one page': _world(
          'chunked', again, 2, host_pages=1, **kept),
      '2 colocated, host': _world(
          'colocated colocated', ((5, 1, 0, 5), (7, 1, 0, 0), (5, 1, 0, 5)), 2,
          host_pages=2, **kept),
      '1P1D, swaps': _world('prefill decode', grow, 2, host_pages=6, **tight),
      '1P1D, swaps, rows ahead': _world(
          'prefill decode', ((2, 7, 0), (2, 5, 2)), 2, num_pages=5,
          host_pages=3),
      '1P1D, swaps, prefixes': _world(
          'prefill decode', ((3, 5, 0, 2), (4, 5, 2, 2)), 2, host_pages=4,
          prefix_cache=True, prefill_tokens=5),
      '1 chunked, swaps': _world(
          'chunked', ((2, 5, 0), (1, 5, 3)), 2, host_pages=6, num_pages=6,
          page_size=1),
      '1P1D, swaps, streams': _world(
          'prefill decode', ((1, 7, 0), (5, 2, 0)), 2, num_pages=9,
          page_size=1, host_pages=8, **streams),
      '2 flexible, swaps': _world(
          'flexible flexible', (*grow, (3, 2, 0)), 1, host_pages=6,
          policy=anything(7, splits=False), **tight),
      '2P1D, fetches': _world('prefill prefill decode', turns[:2], 2,
                              **kept | fetches),
      '1P1D, fetches, smaller pages': _world(
          'prefill decode', turns, 2, page_size=1,
          **kept | fetches | {'num_pages': 7}),
      '1P1D, fetches, larger pages': _world(
          'prefill decode', turns[:2], 2, page_size=4,
          **kept | fetches | {'num_pages': 3}),
      '2 colocated, fetches, host': _world(
          'colocated colocated', again, 2, host_pages=2, **kept | fetches),
      '2 flexible, all': _world(
          'flexible flexible', turns[:2], 2, host_pages=3, stream_kv=True,
          policy=anything(3, fetches=True), **kept | {'prefill_tokens': 3}),
      '1P, 2 flexible, all': _world(
          'prefill flexible flexible', turns[:2], 1, host_pages=3,
          stream_kv=True, policy=anything(5, fetches=True),
          **kept | {'prefill_tokens': 3}),
      '1P1D, messages': _world('prefill decode', brief[1:], 3, **messages),
      '1P1D, messages, 2 requests': _world('prefill decode', brief, 1,
                                           **messages),
      '1P1D, messages, preemption': _world(
          'prefill decode', ((1, 3, 0), (1, 3, 2)), 1, num_pages=4,
          page_size=1, **messages),
      '1P1D, messages, pp = 2': _world('prefill decode', brief[1:], 2, pp=2,
                                       **messages),
      '1P2D, messages': _world('prefill decode decode', brief[1:], 2,
                               **messages),
      '1 colocated, messages': _world('colocated', brief, 2, **messages),
      '2 flexible, prefixes': _world('flexible flexible', turns[:2], 2,
                                     policy=anything(0, splits=False),
                                     **kept),
  }


def large_world(seed: int) -> tuple[Rules, int]:
  """(Rules, faults) of a seed: 6 to 8 instances of one mode, 60 requests."""
  draw = random.Random(seed)
  mode = draw.choice(('prefill', 'prefill', 'colocated', 'chunked', 'flexible'))
  roles = [mode] * draw.choice((2, 3, 4)) + ['decode'] * 4
  if mode != 'prefill':
    roles = [mode] * draw.choice((6, 8))

  def instance(role):
    size = draw.choice((1, 2, 4))
    seqs = draw.choice((2, 4, 8))
    return InstanceConfig(
        role, -(-draw.choice((24, 40)) // size), size, seqs,
        draw.choice((9, 16)), draw.choice((1, 2, 4)), draw.choice((1, 1, 2)))

  config = scheduler.Config(
      tuple(map(instance, roles)), max_len=24, depth=draw.choice((1, 2, 3)),
      prefill_depth=draw.choice((1, 1, 2)), run_ahead=draw.choice((1, 2, 4)),
      tries=draw.choice((1, 3)),
      policy=anything(seed) if mode == 'flexible' else DISTSERVE)
  requests = []
  for _ in range(60):
    prompt, most = draw.randint(1, 14), draw.randint(1, 12)
    requests.append((prompt, most, draw.choice((0, 0, draw.randint(1, most)))))
  faults = draw.choice((10, 30, 100))
  if draw.random() < 0.5:
    config = dataclasses.replace(config, prefix_cache=True)
    requests = [(prompt, most, eos, draw.randint(0, prompt + most))
                for prompt, most, eos in requests]
    config = dataclasses.replace(config, instances=tuple([dataclasses.replace(
        c, host_pages=draw.choice((0, 3, 12))) for c in config.instances]))
  if draw.random() < 0.5:
    config = dataclasses.replace(config, stream_kv=True)
  if config.prefix_cache and draw.random() < 0.5:
    config = dataclasses.replace(
        config, policy=anything(seed, fetches=True) if mode == 'flexible'
        else FETCHING)
  return Rules(config, requests), faults


# --- the command line ---------------------------------------------------------


class Result(NamedTuple):
  """What one search of a small world, or one walk of a large one, came to.

  whole: nothing was left. violation, moves: what broke, and the schedule.
  """

  kind: str
  name: str
  faults: int
  transitions: int
  worlds: int
  probes: int
  whole: bool
  seconds: float
  violation: str = ''
  moves: tuple = ()


def rules_of(kind: str, name: str, policy: str = 'distserve'
             ) -> tuple[Rules, int]:
  """(Rules, faults) of a job.

  Raises:
    InputError: the world lacks what the policy needs.
  """
  rules, faults = (small_worlds()[name] if kind == 'small'
                   else large_world(int(name)))
  if policy not in ('', DISTSERVE.name):  # else the world's own
    rules = schedules.under(rules, policies.load(policy))
    rules.timed = kind == 'large'
  return rules, faults


def explore(job: tuple[str, str, int, str],
            halt: Callable[[int], object] | None = None) -> Result:
  """The Result of a job: (small | large, name or seed, more faults, policy)."""
  kind, name, more, policy = job
  rules, faults = rules_of(kind, name, policy)
  began, faults, broken, moves = time.process_time(), faults + more, '', ()
  transitions, worlds, whole = 0, 0, False
  try:
    if kind == 'small':
      transitions, worlds, whole = schedules.search(rules, faults, halt)
    else:
      transitions = worlds = schedules.walk(rules, faults, int(name))
      whole = True
  except Violation as error:
    broken, moves = str(error), error.moves
  return Result(kind, name, faults, transitions, worlds, rules.probes, whole,
                time.process_time() - began, broken, moves)


FLAGS = {
    'policy': 'distserve',
    'deep': cli.Flag(False, 'Two faults more on every path, 500 worlds.'),
    'more': cli.Flag(0, 'More faults on a path.', low=0),
    'seconds': cli.Flag(100.0, 'CPU seconds of one small world.', low=0.1),
    'large': cli.Flag(None, 'Random large worlds.', int, low=0),
    'first_seed': cli.Flag(0, 'The first of them.', low=0),
    'small': cli.Flag(None, 'Small worlds whose names begin so; empty: none.',
                      str),
    'processes': cli.Flag(2, 'At a time.', low=1),
    'out': 'out/explore',
    'replay': cli.Flag(None, 'A log to run again.', str),
    'table': cli.Flag(False, 'The life cycle as Markdown.'),
}


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Explores, or replays a log; returns the exit code."""
  if options.table:
    print(lifecycle.drawing())
    return 0
  if options.replay:
    rules, moves = schedules.read_log(pathlib.Path(options.replay),
                                      policies.load(options.policy))
    lines = schedules.story(rules, moves)
    print('\n'.join(lines))
    return int(lines[-1] != schedules.NOTHING)
  results, stopped = _explore(console, _jobs(console, options), options)
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  provenance.save_json(out / 'results.json', {
      'stopped': stopped, 'results': [r._asdict() for r in results]},
                       cli.asked(options, FLAGS))
  console.print(_table(results))
  if stopped:
    console.print('Stopped: what follows is what was known.')
  console.print(
      f'{sum(r.transitions for r in results):,} transitions, '
      f'{sum(r.probes for r in results):,} worlds probed with stale and '
      f'impossible events, {sum(bool(r.violation) for r in results)} '
      f'violations.', soft_wrap=True)
  terminal.written(console, out, 'results.json')
  return report(console, results, out, options.policy) or 130 * stopped


def _jobs(console, options):
  """[(kind, name, more faults, policy)] of what was asked for and the policy
  can do."""
  names = [n for n in small_worlds()
           if options.small is None or options.small and n.startswith(
               options.small)]
  require(names or not options.small, '--small', options.small,
          f'how one of these begins: {list(small_worlds())}')
  more = options.more + 2 * options.deep
  large = options.large
  if large is None:
    large = 500 if options.deep else 50
  policies.load(options.policy)  # a bad one is said here, once
  jobs = ([('small', name, more, options.policy) for name in names]
          + [('large', str(options.first_seed + n), 0, options.policy)
             for n in range(large)])
  left, reason = [], ''
  for job in jobs:
    try:
      rules_of(job[0], job[1], options.policy)
      left.append(job)
    except InputError as error:
      reason = str(error)
  if reason:
    console.print(f'{len(jobs) - len(left)} of {len(jobs)} worlds are left '
                  f'out: {reason}', soft_wrap=True, highlight=False)
  require(left, '--policy', options.policy, 'one that can serve one of these '
          f'worlds ({reason})')
  return left


def _begin(counts, stop):
  """In each process: what the parent reads and says."""
  _shared[:] = [counts, stop]


_shared = []


def _work(seconds, job):
  counts, stop = _shared
  end, before = time.process_time() + seconds, 0

  def halt(transitions):
    nonlocal before
    with counts.get_lock():
      counts.value += transitions - before
    before = transitions
    return stop.is_set() or time.process_time() > end

  if stop.is_set():
    return None
  result = explore(job, halt)
  with counts.get_lock():
    counts.value += max(0, result.transitions - before)
  return result


def _explore(console, jobs, options):
  """([Result], whether Ctrl-C came), with a line of progress."""
  spawn, results = multiprocessing.get_context('spawn'), []
  counts, stop = spawn.Value('q', 0), spawn.Event()
  bar = Progress(TextColumn('{task.description}'), TimeElapsedColumn(),
                 console=console, transient=True)
  with terminal.Interrupts() as interrupts, bar, children.spawned(
      options.processes, _begin, (counts, stop)) as pool:
    line = bar.add_task('starting', total=None)
    tasks = {pool.submit(_work, options.seconds, job) for job in jobs}
    if not console.is_terminal:
      console.print(f'Exploring {len(jobs)} worlds')
    while tasks:
      ended, tasks = futures.wait(tasks, 0.5, futures.FIRST_COMPLETED)
      for result in filter(None, [task.result() for task in ended]):
        results.append(result)
        if result.kind == 'small' and not console.is_terminal:
          console.print(f'{result.name}: {result.transitions:,} transitions')
      if interrupts.seen:
        stop.set()
      bar.update(line, description=f'{len(results)} of {len(jobs)} worlds, '
                 f'{counts.value:,} transitions')
    return results, interrupts.seen


def _table(results):
  table = Table('world', 'faults', 'transitions', 'worlds', 'CPU s',
                'to the end', title='Explored', box=box.SIMPLE,
                collapse_padding=True)
  large = [r for r in results if r.kind == 'large']
  for r in sorted(r for r in results if r.kind == 'small'):
    table.add_row(r.name, str(r.faults), f'{r.transitions:,}', f'{r.worlds:,}',
                  f'{r.seconds:.1f}',
                  'violation' if r.violation else 'yes' if r.whole else 'no')
  if large:
    many, took = sum(r.transitions for r in large), sum(
        r.seconds for r in large)
    table.add_row(f'{len(large)} random large', '10-100', f'{many:,}', '',
                  f'{took:.1f}',
                  'violation' if any(r.violation for r in large) else 'yes')
  return table


def report(console: Console, results: Iterable[Result], out: pathlib.Path,
           policy: str = 'distserve') -> int:
  """Shrinks and writes the first violation; the exit status."""
  broken = next((r for r in results if r.violation), None)
  if broken is None:
    return 0
  console.print(f'{broken.name}: {broken.violation}; shrinking a schedule of '
                f'{len(broken.moves)} moves', soft_wrap=True)
  rules, _ = rules_of(broken.kind, broken.name, policy)
  moves = schedules.shrink(rules, broken.moves)
  schedules.write_log(out / 'violation.jsonl', rules, moves)
  lines = schedules.story(rules, moves)
  print('\n'.join(lines))
  if lines[-1] == schedules.NOTHING:
    console.print('It broke, and once more it does not: a hook answers by '
                  'something that is not in its view.', soft_wrap=True)
  console.print(f'Again: python -m experiments.explore '
                f'--replay={out / "violation.jsonl"} --policy={policy}',
                soft_wrap=True)
  return 1


if __name__ == '__main__':
  cli.main(run, FLAGS)
