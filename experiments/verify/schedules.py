"""Schedules of a world: all of them, a random one, one again, a shorter one.

What may happen and what must hold is in experiments.verify.worlds.
"""

import dataclasses
import gc
import itertools
import json
import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dsjax.config.checks import InputError
from dsjax.config.engine import InstanceConfig
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Migrate, Preempt, RunDecode, RunPrefill
from dsjax.scheduling.policy import DISTSERVE, Policy
from dsjax.simulation.latency import Affine, Link
from experiments.verify.links import LinkedRules
from experiments.verify.world import Log, Move, Violation, World, need
from experiments.verify.worlds import Rules

NOTHING = 'nothing broke'
STEP = Affine((0.01, 1e-4, 0.0), (0.01, 1e-6, 1e-4), host_s=0.001,
              mixed=(0.01, 1e-4, 0.0, 1e-6))
LINK = Link(1e-3, 1e6, 100)
ANOTHER = ('the same event, another answer: a hook may keep nothing from one '
           'call for the next')
_TWICE = 8  # worlds, of which one is entered twice: to the same effect
_EVERY = 4096  # transitions between two calls of halt


def search(rules: Rules, faults: int,
           halt: Callable[[int], object] | None = None
           ) -> tuple[int, int, bool]:
  """Depth-first over every world that can be reached.

  A path of moves that comes back to where it was is a violation: so every
  schedule ends, and what waits does so for a bounded number of moves.

  Args:
    halt: called every few thousand transitions with their number; a true
      answer stops.

  Returns:
    (transitions, worlds, whether that is all). Raises Violation.
  """
  gc.disable()  # much is kept, and nothing of it is cyclic
  try:
    return _search(rules, faults, halt)
  finally:
    gc.enable()


def _search(rules, faults, halt):
  w = rules.first(faults)
  mark, transitions = rules.key(w), 0
  twice = rules.config.policy is not DISTSERVE
  seen, on, path = {mark}, {mark}, []
  stack = [(w, rules.moves(w), mark)]
  while stack:
    w, todo, mark = stack[-1]
    if not todo:
      stack.pop()
      on.discard(mark)
      del path[-1:]
      continue
    move, cost = todo.pop()
    transitions += 1
    if halt and not transitions % _EVERY and halt(transitions):
      return transitions, len(seen), False
    try:
      after, log = rules.apply(w, move, cost)
      mark = rules.key(after)
      if mark in seen:
        need(mark not in on, 'no progress: a cycle')
        continue
      rules.check(after)
      if twice and not len(seen) % _TWICE:
        need(rules.apply(w, move, cost) == (after, log), ANOTHER)
      moves = rules.moves(after)
      if all([cost for _, cost in moves]):
        rules.over(after)
    except Exception as error:
      raise _violation(error, [*path, move]) from error
    seen.add(mark)
    on.add(mark)
    stack.append((after, moves, mark))
    path.append(move)
  return transitions, len(seen), True


class Moved(NamedTuple):
  """A move of a schedule, its log, and the worlds before and after it."""

  before: World
  move: Move
  log: Log
  after: World


def wander(rules: Rules, faults: int, seed: int, slow_copies: bool = False,
           timed: bool = False, most: int = 100_000) -> Iterator[Moved]:
  """One random schedule to its end, a Moved at a time.

  In addition to what Rules doubts: no row has a second turn while another
  waits for its first, and some moves are made twice, to the same effect.

  Args:
    faults: how many there may be.
    slow_copies: most hand-offs end when nothing else runs.
    timed: events carry the number of the move as their time, for a log that
      is kept.

  Raises:
    Violation.
  """
  draw, w, path = random.Random(seed), rules.first(faults), []
  turns, rules.timed = _Turns(), timed
  rate, press = draw.choice((0.02, 0.1, 0.3)), draw.choice((0.0, 0.5))
  try:
    while True:
      moves = rules.moves(w)
      free = [m for m in moves if not m[1]]
      if not free:
        rules.over(w)
        return
      need(len(path) < most, 'no progress')
      if slow_copies and draw.random() < 0.9:
        free = [m for m in free if m[0][0] != 'copied'] or free
      may = [m for m in moves if m[1]] if draw.random() < rate else free
      kinds = sorted({m[0][0] for m in may or free})
      kind = draw.choice(kinds)
      if kind == 'gone' and draw.random() < 0.8:
        kind = draw.choice(kinds)  # else soon no instance is left
      if 'arrive' in kinds and draw.random() < press:
        kind = draw.choice([k for k in kinds if k in ('arrive', 'burst')])
      move, cost = draw.choice([m for m in may or free if m[0][0] == kind])
      path.append(move)
      if timed:
        rules.time_s = float(len(path))
      again = draw.random() < 0.1 and repr(w)
      after, log = rules.apply(w, move, cost)
      rules.check(after)
      turns.take(w, log, after)
      if again:
        need((after, log) == rules.apply(w, move, cost), ANOTHER)
        need(repr(w) == again, 'the state that was given has changed')
      yield Moved(w, move, log, after)
      w = after
  except Exception as error:
    raise _violation(error, path) from error


def walk(rules: Rules, faults: int, seed: int) -> int:
  """The number of moves of a random schedule. Raises Violation."""
  timed = rules.config.policy is not DISTSERVE
  return sum(1 for _ in wander(rules, faults, seed, timed=timed))


class _Turns:
  """No row has a second turn while another waits for its first."""

  def __init__(self):
    self.passed = {}  # (id, other): commands of other since the last of id

  def take(self, before, log, after):
    for command in (c for _, commands in log for c in commands):
      if isinstance(command, Preempt | Migrate):
        self.passed = {pair: n for pair, n in self.passed.items()
                       if command.id not in pair}
      elif isinstance(command, RunPrefill | RunDecode) and command.rows:
        turn = {row.id for row in command.rows}
        decoding = [{r.id for r in w.state.instances[command.instance].rows}
                    for w in (before, after)]
        waiting = set.intersection(*decoding) - turn
        self.passed = {pair: n for pair, n in self.passed.items()
                       if pair[0] not in turn}
        for pair in itertools.product(waiting, turn):
          self.passed[pair] = self.passed.get(pair, 0) + 1
          need(self.passed[pair] < 2, 'request {} waits: {}', pair[0], command)


def random_rules(seed: int, count: int,
                 config: scheduler.Config | None = None) -> Rules:
  """Rules of `count` random requests on one to six small instances.

  The instances are of one mode, each of its own sizes; some requests never
  fit. config: the instances instead.
  """
  draw = random.Random(seed)
  config = config or _random_config(draw)
  prompt, most = draw.choice(((16, 4), (16, 10), (4, 18)))
  requests = []
  for _ in range(count):
    limit = draw.randint(1, most)
    end = next((n for n in range(1, limit + 1) if draw.random() < 0.05), 0)
    requests.append((draw.randint(1, prompt), limit, end))
  return Rules(config, requests)


def _random_config(draw):
  mode = draw.choice(('prefill', 'prefill', 'colocated', 'chunked'))
  roles = [mode] * draw.choice((1, 2, 3))
  if mode == 'prefill':
    roles += ['decode'] * draw.choice((1, 2, 3))

  def instance(role):
    size = draw.choice((1, 2, 4))
    return InstanceConfig(
        role, -(-draw.choice((14, 20, 28)) // size), size,
        draw.choice((1, 2, 4) if role == 'chunked' else (1, 4, 8)),
        draw.choice((6, 16, 64)), draw.choice((1, 2, 4)),
        draw.choice((1, 2, 3)))

  return scheduler.Config(tuple(map(instance, roles)), max_len=24,
                          depth=draw.choice((1, 2, 3)),
                          prefill_depth=draw.choice((1, 1, 2)),
                          run_ahead=draw.choice((1, 2, 4)))


def _violation(error, moves):
  text = str(error) or repr(error)
  if not isinstance(error, Violation | AssertionError):
    text = f'{type(error).__name__}: {text}'
  violation = Violation(text)
  violation.moves = tuple(moves)
  return violation


def under(rules: Rules, policy: Policy) -> Rules:
  """The same world under a policy, which may predict: it is told of steps and
  of a link as small as these worlds.

  Raises:
    InputError: the world lacks what the policy needs.
  """
  config = rules.config
  if policy is not DISTSERVE:
    latencies = tuple([dataclasses.replace(STEP, pp=instance.pp)
                       for instance in config.instances])
    policy.check([i.role for i in config.instances], latencies, LINK)
    config = dataclasses.replace(config, policy=policy, latencies=latencies,
                                 link=LINK)
  return type(rules)(config, rules.requests)


# --- replay and shrinking ----------------------------------------------------


def replay(rules: Rules,
           moves: Sequence[Move]) -> tuple[list[tuple[Move, Log]], str]:
  """Runs a schedule, then what has arrived without faults to the end.

  Moves that are not possible when it is their turn are left out; requests may
  arrive in any order. Events of Rules that are timed say the number of their
  move.

  Returns:
    ([(move, its log), ...], what broke or '').
  """
  w, log, end = rules.first(len(moves)), [], 0
  left = iter(moves)
  try:
    while True:
      may = {move: cost for move, cost in rules.moves(w)
             if move[0] not in ('arrive', 'burst')}
      move = next((m for m in left if m in may or _arrives(m, w)), None)
      if move is None:
        move = next((m for m, cost in may.items() if not cost), None)
        end += 1
        need(end < 10_000, 'no progress')
      if move is None:
        rules.over(w)
        return log, ''
      log.append((move, []))
      if rules.timed:
        rules.time_s = float(len(log))
      after, answered = rules.apply(w, move, may.get(move, 0))
      log[-1] = (move, answered)
      if rules.config.policy is not DISTSERVE:
        need(rules.apply(w, move, may.get(move, 0)) == (after, answered),
             ANOTHER)
      w = after
      rules.check(w)
  except Exception as error:
    if hasattr(error, 'log'):
      log[-1] = (log[-1][0], error.log)
    return log, str(_violation(error, ()))


def _arrives(move, w):
  return move[0] in ('arrive', 'burst') and all(
      w.fates[id] is None for id in move[1:])


def shrink(rules: Rules, moves: Sequence[Move],
           most: int = 1000) -> tuple[Move, ...]:
  """A shorter schedule that still breaks something, by delta debugging.

  First whole requests are left out, then halves of the schedule, quarters,
  and so on to single moves, until none can be. At most `most` replays.
  """
  moves, left = tuple(moves), most

  def breaks(less):
    nonlocal moves, left
    if left <= 0 or len(less) == len(moves):
      return False
    left -= 1
    log, broken = replay(rules, less)
    if broken:
      moves = tuple(m for m, _ in log[:len(less)])
    return bool(broken)

  for id in range(len(rules.requests)):
    breaks(tuple(less for m in moves if (less := _without(m, id))))
  size = max(1, len(moves) // 2)
  while left > 0:
    start, before = 0, moves
    while start < len(moves) and left > 0:
      if not breaks(moves[:start] + moves[start + size:]):
        start += size
    if size == 1 and moves == before:
      break
    size = max(1, size // 2)
  return moves


def _without(move, id):
  """A move that does not concern this request; None where it is only that."""
  if move[0] == 'burst' and id in move:
    return 'arrive', sum(move[1:]) - id
  return None if move[0] in _OF_ONE and move[1] == id else move


_OF_ONE = ('arrive', 'cancel', 'copied', 'failed', 'damaged', 'lease', 'lose')


def write_log(path: pathlib.Path, rules: Rules,
              moves: Sequence[Move]) -> None:
  """Writes a schedule so that --replay runs it: JSON lines."""
  log, broken = replay(rules, moves)
  config = dataclasses.asdict(rules.config)
  for field in ('policy', 'latencies', 'link'):  # code, not data: see under
    del config[field]
  lines: list[dict[str, Any]] = [{
      'config': config, 'requests': rules.requests,
      'messages': isinstance(rules, LinkedRules), 'timed': rules.timed}]
  lines += [{'move': move, 'events': [str(e) for e, _ in answered],
             'commands': [str(c) for _, commands in answered
                          for c in commands]}
            for move, answered in log[:len(moves)]]
  lines.append({'violation': broken})
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def read_log(path: pathlib.Path, policy: Policy = DISTSERVE
             ) -> tuple[Rules, tuple[Move, ...]]:
  """(Rules, moves) of a file that write_log wrote, under a policy.

  Raises:
    InputError: it is not one.
  """
  try:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    config = lines[0]['config']
    instances = tuple(InstanceConfig(**c)
                      for c in config.pop('instances'))
    away = tuple(config.pop('away', ()))
    made = LinkedRules if lines[0].get('messages') else Rules
    rules = under(made(scheduler.Config(instances, away=away, **config),
                       lines[0]['requests']), policy)
    rules.timed = lines[0].get('timed', False)
    return rules, tuple([tuple(line['move']) for line in lines
                         if 'move' in line])
  except (KeyError, TypeError, IndexError, ValueError) as error:
    raise InputError(f'--replay={path}: must be a log that this command '
                     f'wrote ({error!r})') from error


def story(rules: Rules, moves: Sequence[Move]) -> list[str]:
  """A schedule in words: lines of moves, events, commands."""
  log, broken = replay(rules, moves)
  shown, lines = len(moves), []
  for n, (move, answered) in enumerate(log):
    if n == shown:
      lines.append('and without faults to the end:')
    told = ', '.join(str(e) for e, _ in answered) or 'no event'
    lines.append(f'{" ".join(map(str, move)):12}{told}')
    lines += [f'{"":12}  -> {c}' for _, commands in answered for c in commands]
  return [*lines, f'violation: {broken}' if broken else NOTHING]
