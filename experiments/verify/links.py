"""Worlds in which each instance is a process: messages to it, and from it.

What the server and an instance tell each other waits in a socket, as long as
one likes. A fault loses the oldest message, doubles it or lets the next one
pass it by, in either direction; or it ends a process, whose last words may come
or not. What must hold is what must hold of every world, and in the end no
process holds an offer or a pull.

Messages have numbers, looked at by the functions of runtime/cluster/channel.py.
What is wrong with one is noticed when it comes, or with the next sign of life
that has a number too: then the instance is lost. Only hand-offs of whole
prompts are modelled.
"""

from typing import Any, NamedTuple

from dsjax.runtime.cluster import channel
from dsjax.scheduling.events import (
  Abort,
  Command,
  InstanceDown,
  Migrate,
  Migrated,
  MigrateFailed,
  RunDecode,
  RunPrefill,
)
from dsjax.scheduling.state import State
from experiments.verify.moves import Moving
from experiments.verify.world import World, need
from experiments.verify.worlds import Rules

WAYS = ('down', 'up')
# Moves of any world that are those of a world of messages too.
SAME = ('arrive', 'burst', 'up', 'gone', 'drain', 'cancel', 'tick')


class Link(NamedTuple):
  """The socket of an instance, and the process at its other end.

  down, up: what is on its way, each message behind its number. sent, heard:
  how many the server has sent and the process has taken; said, told: the same
  of the other way. todo: what the process is to do, in order. pulls: Migrates
  that it waits for. offers, ready: (id, epoch) of what it holds for others, and
  of that what has been read. steps, ended: of the command that is done next,
  those that were told. spoiled: what was sent is not what comes.
  """

  down: tuple = ()
  up: tuple = ()
  sent: int = 0
  heard: int = 0
  said: int = 0
  told: int = 0
  todo: tuple = ()
  pulls: tuple = ()
  offers: frozenset = frozenset()
  ready: frozenset = frozenset()
  steps: int = 0
  ended: tuple = ()
  spoiled: bool = False
  dead: bool = False


DEAD = Link(dead=True)


def is_due(count: int, number: int) -> bool:
  """Whether a message of this number is the next after so many."""
  try:
    channel.unnumbered(count, channel.numbered(number, b''))
  except ValueError:
    return False
  return True


def hand_off(c: Migrate | Abort) -> tuple[int, int]:
  """Which hand-off a command is of."""
  return c.id, c.epoch


class LinkedMoving(Moving):
  """One move of a world of messages, in place."""

  def __init__(self, rules: Any, w: World) -> None:
    super().__init__(rules, w)
    self.links, self.halves = list(w.links), w.halves

  def done(self, faults: int) -> World:
    w = super().done(faults)
    live = {hand_off(c) for c, *_ in w.copies}
    return w._replace(links=tuple(self.links), halves=frozenset([
        half for half in self.halves if half[0] in live]))

  def change(self, i: int, **changes: Any) -> None:
    self.links[i] = self.links[i]._replace(**changes)

  # --- the server -------------------------------------------------------------

  def send(self, i: int, kind: str, c: RunPrefill | RunDecode | Migrate
           ) -> None:
    """What is sent to a process that has ended is sent nowhere."""
    link = self.links[i]
    if not link.dead:
      self.change(i, down=(*link.down, (link.sent, kind, c)),
                  sent=link.sent + 1)

  def issue(self, c: Command) -> None:
    super().issue(c)
    if isinstance(c, RunPrefill | RunDecode):
      self.send(c.instance, 'run', c)
    elif isinstance(c, Migrate):
      self.send(c.source, 'offer', c)
      self.send(c.target, 'pull', c)

  def aborted(self, c: Abort | Migrate, after: State | None) -> None:
    for p in [p for p, *_ in self.copies if hand_off(p) == hand_off(c)]:
      self.drop(p)
    super().aborted(c, after)

  def drop(self, c: Migrate) -> None:
    """A hand-off is given up."""
    self.send(c.target, 'drop', c)
    self.send(c.source, 'withdraw', c)

  def hears(self, i: int) -> None:
    """The server takes a message; what it cannot be loses the instance."""
    link = self.links[i]
    (number, kind, *said), up = link.up[0], link.up[1:]
    if not is_due(link.told, number):
      self.crash(i)
      return
    self.change(i, up=up, told=link.told + 1)
    if kind == 'step':
      self.stepped(i, *said)
    else:
      self.moved(kind, *said)

  def stepped(self, i: int, number: int, sampled: tuple[tuple[int, int], ...]
              ) -> None:
    """A step is told: a token of each of its rows."""
    link, flying = self.links[i], self.w.state.instances[i].inflight
    if not flying or flying[0][0].number != number:
      self.crash(i)
      return
    command, step = flying[0][0], link.steps
    ended = link.ended + self.tell_all(sampled, step)
    if step + 1 < command.steps:
      self.change(i, steps=step + 1, ended=ended)
      self.stopped = []  # the scheduler hears of it with the last step
    else:
      self.stopped = [id for id, _ in ended]
      self.change(i, steps=0, ended=())
      self.ran(i, command, ended)

  def moved(self, half: str, which: tuple[int, int]) -> None:
    """One end of a hand-off says how far it is."""
    flying = [p for p in self.copies if hand_off(p[0]) == which]
    for p in flying:  # else it was given up
      c = p[0]
      self.halves |= {(which, half)}
      if half == 'broken':
        self.drop(c)
        self.copies.remove(p)
        self.events.append(MigrateFailed(self.time_s, *which, 'it broke'))
      elif {(which, 'offered'), (which, 'landed')} <= self.halves:
        self.send(c.source, 'withdraw', c)
        self.copies.remove(p)
        self.events.append(Migrated(self.time_s, *which))

  def crash(self, i: int, steps: int = 0, back: bool = True) -> None:
    """The server loses an instance, and kills what is left of it."""
    del steps  # those that were told
    link = self.links[i]
    self.events.append(InstanceDown(
        self.time_s, i, (self.time_s,) * link.steps, link.ended, back))
    self.changed.add(i)
    self.kv[i] = [None] * len(self.kv[i])
    self.links[i] = DEAD
    for p in [p for p in self.copies if p[0].target == i]:
      self.drop(p[0])
      self.copies.remove(p)

  def up(self, i: int) -> None:
    super().up(i)
    if self.w.state.instances[i].status in ('down', 'gone'):  # else drained
      self.links[i] = Link()

  # --- the process ------------------------------------------------------------

  def say(self, i: int, *message: Any) -> None:
    link = self.links[i]
    self.change(i, up=(*link.up, (link.said, *message)), said=link.said + 1)

  def hear(self, i: int) -> None:
    """The process takes a message; one that is not due ends it."""
    link = self.links[i]
    (number, kind, c), down = link.down[0], link.down[1:]
    if not is_due(link.heard, number):
      self.die(i)
      return
    self.change(i, down=down, heard=link.heard + 1)
    if kind in ('run', 'offer'):
      self.change(i, todo=(*link.todo, (kind, c)))
    if kind == 'offer':
      self.change(i, offers=link.offers | {hand_off(c)})
    elif kind == 'withdraw':
      self.change(i, offers=link.offers - {hand_off(c)},
                  ready=link.ready - {hand_off(c)})
    elif kind == 'pull':
      self.change(i, pulls=(*link.pulls, c))
    elif kind == 'drop':
      self.change(i, pulls=tuple([p for p in link.pulls
                                  if hand_off(p) != hand_off(c)]))

  def run(self, i: int) -> None:
    """The process does what is next, and tells."""
    link = self.links[i]
    (kind, c), todo = link.todo[0], link.todo[1:]
    self.change(i, todo=todo)
    if kind == 'run':
      for step in range(c.steps):
        self.say(i, 'step', c.number, tuple(self.work(i, c, step)))
    elif kind == 'land':
      self.write(i, c.id, c.target_pages, c.hit, c.hit + c.num_tokens, c.hit)
      self.say(i, 'landed', hand_off(c))
    elif hand_off(c) in link.offers:  # it was not withdrawn
      if any([p is c for p, *_ in self.copies]):  # else nobody pulls it
        self.read(i, c.id, c.source_pages, c.hit + c.num_tokens, c.hit)
      self.change(i, ready=link.ready | {hand_off(c)})
      self.say(i, 'offered', hand_off(c))

  def come(self, i: int, *which: int) -> None:
    """A pull has come: it is written behind what was begun before."""
    link = self.links[i]
    c, = [c for c in link.pulls if hand_off(c) == which]
    self.change(i, pulls=tuple([p for p in link.pulls if p is not c]),
                todo=(*link.todo, ('land', c)))

  def breaks(self, i: int, *which: int) -> None:
    """A pull fails."""
    link = self.links[i]
    self.change(i, pulls=tuple([p for p in link.pulls
                                if hand_off(p) != which]))
    self.say(i, 'broken', which)

  def die(self, i: int) -> None:
    """The process ends; what it said before is still on its way."""
    self.change(i, down=(), todo=(), pulls=(), offers=frozenset(),
                ready=frozenset(), dead=True)

  # --- what happens to messages -----------------------------------------------

  def spoil(self, i: int, way: str, changed: tuple) -> None:
    self.change(i, spoiled=True, **{way: changed})

  def lost(self, i: int, way: str) -> None:
    self.spoil(i, way, getattr(self.links[i], way)[1:])

  def doubled(self, i: int, way: str) -> None:
    queue = getattr(self.links[i], way)
    self.spoil(i, way, queue[:1] + queue)

  def passed(self, i: int, way: str) -> None:
    first, second, *others = getattr(self.links[i], way)
    self.spoil(i, way, (second, first, *others))

  def noticed(self, i: int) -> None:
    self.crash(i)


class LinkedRules(Rules):
  """Rules of a world of messages."""

  moving = LinkedMoving

  def first(self, faults: int) -> World:
    start = super().first(faults)
    return start._replace(links=tuple([
        Link() if inst.status == 'up' else DEAD
        for inst in start.state.instances]))

  def moves(self, w: World) -> list[tuple[tuple, int]]:
    possible = [(move, cost) for move, cost in super().moves(w)
                if move[0] in SAME]
    for i, (inst, link) in enumerate(zip(w.state.instances, w.links,
                                         strict=True)):
      if inst.status not in ('up', 'draining'):
        continue
      possible += [((kind, i), 0) for kind, may in (
          ('hear', link.down), ('run', link.todo), ('hears', link.up),
          ('noticed', link.spoiled or link.dead and not link.up)) if may]
      possible += [(('come', i, *hand_off(c)), 0) for c in link.pulls
                   if hand_off(c) in w.links[c.source].ready]
      if w.faults:
        possible += [(('breaks', i, *hand_off(c)), 1) for c in link.pulls]
        possible += [((kind, i), 1) for kind in ('crash', 'die')
                     if not link.dead]
        possible += [((kind, i, way), 1) for way in WAYS for kind, least in (
            ('lost', 1), ('doubled', 1), ('passed', 2))
                     if len(getattr(link, way)) >= least and not link.spoiled]
    if w.faults:
      possible += [(('lease', c.id), 1) for c, *_ in w.copies]
    return possible

  def key(self, w: World) -> int:
    live = {hand_off(c) for c, *_ in w.copies}

    def told(message, number):
      """Without what only counts up."""
      kind, *rest = message
      if kind in ('run', 'step'):
        count = rest[0] if kind == 'step' else rest[0].number
        return kind, number - count, tuple(rest[1:]) * (kind == 'step')
      if kind in ('offered', 'landed', 'broken'):
        return kind, rest[0][0], rest[0] in live
      c, = rest
      return kind, c.id, c.source_pages, c.target_pages, hand_off(c) in live

    return hash((super().key(w), frozenset([
        (half, id) for (id, _), half in w.halves]), tuple([(
            tuple([(n - link.sent, told(m, inst.number))
                   for n, *m in link.down]),
            tuple([(n - link.said, told(m, inst.number))
                   for n, *m in link.up]),
            link.heard - link.sent, link.told - link.said,
            tuple([told(m, inst.number) for m in link.todo]),
            tuple([told(('pull', c), 0) for c in link.pulls]),
            len(link.offers), frozenset([
                (id, (id, epoch) in live) for id, epoch in link.ready]),
            link.steps, link.ended, link.spoiled, link.dead)
            for inst, link in zip(w.state.instances, w.links, strict=True)])))

  def over(self, w: World) -> None:
    super().over(w)
    for i, link in enumerate(w.links):
      need(not (link.down or link.todo or link.up or link.pulls
                or link.offers), 'instance {} holds {}', i, link)
