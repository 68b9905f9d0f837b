"""The serving run without the hardware: a heap of events over scheduler.Run.

The scheduler that serves decides everything; here its commands take virtual
time on virtual instances, and their completions are its next events. Records
and event log are those of a real run.

What orchestrator.py does, and what this models of it:

- A command reaches its device `host_s` after the event that it answers. With
  two commands in flight (scheduler.Config.depth) that hides behind the one
  still running; with one, the device waits for it. Commands of one event do
  not delay each other, though the real host is one thread.
- An instance runs its commands in order, through `pp` stages, each with a
  queue without bound before it. A command enters stage 1 when that is free
  and the tokens it starts from have left the last stage.
- A migration is dispatched like a command. Its pages are read behind what its
  source has in flight, as the steps there own the cache in turn (not where
  link.beside says otherwise); then it takes its link for itself. It lands in
  buffers of its own and delays no step of its target; that its pages are
  written there, before the next step, is part of its own time.
- Instances that share cores slow each other (contention.py): then a step's
  end is known only as the others' steps are, and nothing is leapt over.
- Arrivals of one moment are told together (Arrived.more). At one moment
  arrivals come first, then copies, then steps, as in a poll.
- Nothing is known of EOS: every request runs to its max_tokens, which is
  thus its output length.

Leaping. Most completions of a decode command change nothing but counters:
the next command has the same rows. scheduler.Run.quiet tells such commands in
advance, until a row ends or pages run short; this module gives them their
times, in closed form within a command, and when something else happens to the
instance, or at the end, tells the scheduler and the recorder at once how many
of them there were. Every command is the one that step would have issued, with
its boundaries, so leaping changes no time (an arrival in the middle of a
command waits for its end here as there). With a log or on_event, every event
is applied one by one instead.
"""

import bisect
import collections
import heapq
from typing import NamedTuple

from dsjax.analysis.recorder import Recorder
from dsjax.config.checks import require
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import (
  Arrived,
  DecodeDone,
  Finish,
  Migrate,
  Migrated,
  PrefillDone,
  RunDecode,
  RunPrefill,
)
from dsjax.simulation.contention import Devices, kind_of

_ARRIVED, _MIGRATED, _STEP = range(3)  # order of events of one moment
_NEVER = (float('inf'),)
_REACH = 64  # most commands of a quiet run


class Result(NamedTuple):
  """A simulated run.

  Attributes:
    records: one a request, in order of arrival.
    log: (event, commands) pairs, or None.
    steps: events applied; leapt: decode completions that were leapt over.
    busy_s: seconds of each instance's stages at work, summed over stages.
    link_s: seconds that links were taken, summed.
    state: the scheduler's last.
  """

  records: list
  log: list | None
  steps: int
  leapt: int
  busy_s: tuple[float, ...]
  link_s: float
  state: scheduler.State


def simulate(config, requests, latencies, link=None, log=False, leap=True,
             share='pair', on_event=None, contention=None):
  """Serves a workload in virtual time.

  Args:
    config: a scheduler.Config.
    requests: base.Request values, in any order; only the length of a prompt
      is read.
    latencies: of each instance (or one for all): prefill_s(pieces),
      decode_s(batch, context), decode_line(batch), mixed_s(pieces, batch,
      context), host_s, pp; optionally stage_share, the part of each of the
      pp stages in a step's seconds (equal parts without it).
    link: migrate_s(num_tokens), and beside (see latency.Link); None where
      nothing migrates.
    log: keep the event log (and apply every event).
    leap: False applies every event and adds up every decode step.
    share: 'pair' for a link of its own for every (source, target); 'nic'
      where all copies from one source, and all to one target, queue.
    on_event: None, or called with (state, event, commands) after each step.
    contention: a Contention of the instances, each of one stage; None:
      each has a device of its own.

  Raises:
    InputError: bad requests or latencies that do not fit the instances.
  """
  return _Run(config, requests, latencies, link, log, leap, share, on_event,
              contention).run()


class _Instance:
  """A virtual instance: when each stage is free, when rows have tokens."""

  def __init__(self, latency, pp):
    self.latency, self.host_s = latency, latency.host_s
    self.shares = getattr(latency, 'stage_share', None) or (1 / pp,) * pp
    require(latency.pp == pp and len(self.shares) == pp, 'latency.pp',
            latency.pp, f'the pp={pp} of its instance')
    self.free_s = [0.0] * pp
    self.token_s = {}  # id -> when its newest token is there (pp > 1)
    self.busy_s = 0.0
    self.line = (0, 0.0, 0.0)  # decode_line of the batch size seen last
    self.due = collections.deque()  # (number, times of its steps) in flight
    self.lane, self.serial = None, 0  # a quiet run; newest entry in the heap

  def work(self, command):
    """(kind, seconds of each step) of a command on a device left alone."""
    rows, batch = command.rows, len(command.rows)
    context = sum([r[1] for r in rows]) + batch * (command.tick + 1)
    if type(command) is RunDecode:
      return kind_of((), batch), [
          self.latency.decode_s(batch, context + n * batch)
          for n in range(command.steps)]
    pieces = tuple([(c.start, c.stop) for c in command.chunks])
    return kind_of(pieces, batch), [
        self.latency.mixed_s(pieces, batch, context) if rows
        else self.latency.prefill_s(pieces)]

  def pieces(self, ready_s, command):
    """Times of the end of a prefill or mixed command."""
    _, (total_s,) = self.work(command)
    done_s = self.stages(self.after(ready_s, command.rows), total_s)
    if len(self.free_s) > 1:
      self.token_s.update((c.id, done_s) for c in command.chunks if c.last)
    self.told(command.rows, done_s)
    return (done_s,)

  def decode(self, ready_s, command, leap):
    """Completion time of each step of a decode command."""
    rows = command.rows
    ready_s = self.after(ready_s, rows)
    if leap:
      batch = len(rows)
      context = sum([r[1] for r in rows]) + batch * (command.tick + 1)
      times = self.run(ready_s, batch, context, command.steps)
    else:
      times = []
      for step_s in self.work(command)[1]:
        ready_s = self.stages(ready_s, step_s)
        times.append(ready_s)
    self.told(rows, times[-1])
    return times

  def run(self, ready_s, batch, context, steps):
    """Times of decode steps of the same rows, in closed form."""
    if self.line[0] != batch:
      self.line = (batch, *self.latency.decode_line(batch))
    _, a, b = self.line
    first = a + b * context
    if len(self.free_s) > 1:
      return (self.stages(ready_s, first),)
    start_s = self.free_s[0]
    if ready_s > start_s:
      start_s = ready_s
    if steps == 1:
      times = (start_s + first,)
    else:
      more = b * batch / 2
      times = [start_s + n * first + more * n * (n - 1)
               for n in range(1, steps + 1)]
    self.free_s[0] = done_s = times[-1]
    self.busy_s += done_s - start_s
    return times

  def stages(self, ready_s, total_s):
    """Sends one step through the stages; when it leaves the last."""
    free_s = self.free_s
    self.busy_s += total_s
    for stage, part in enumerate(self.shares):
      if free_s[stage] > ready_s:
        ready_s = free_s[stage]
      ready_s += part * total_s
      free_s[stage] = ready_s
    return ready_s

  def after(self, ready_s, rows):
    """No sooner than the newest token of each row has left the last stage."""
    if len(self.free_s) == 1 or not rows:
      return ready_s
    return max(ready_s, max([self.token_s.get(r[0], 0.0) for r in rows]))

  def told(self, rows, token_s):
    """Each row has a newer token."""
    if len(self.free_s) > 1:
      self.token_s.update(dict.fromkeys([r[0] for r in rows], token_s))


class _Lane:
  """A quiet run of an instance, as far as it was followed.

  quiet: what scheduler.Run.quiet told. due: (number, times of its steps,
  True) of the commands in flight when it began and of those issued since.
  done: how many have completed; each was answered by one. marks: before each
  of these answers and after the last, free_s and busy_s of the instance.
  """

  __slots__ = ('quiet', 'due', 'done', 'marks', 'turns', 'number')

  def __init__(self, one, inst, quiet):
    self.quiet, self.due, self.number = quiet, list(one.due), inst.number
    self.done, self.marks = 0, [(tuple(one.free_s), one.busy_s)]
    self.turns = []  # of a micro-batch: rows; context, token time of its next
    for g in quiet[0]:
      rows, tick = inst.batches[g].rows.values(), inst.batches[g].tick
      self.turns.append([
          len(rows), sum([r[1] for r in rows]) + len(rows) * (tick + 1),
          one.after(0.0, rows)])

  def advance(self, one, index, bound):
    """Completes what is due before `bound`; whether that was all."""
    due, turns, steps = self.due, self.turns, self.quiet[1]
    host_s, count = one.host_s, len(turns)
    for n in range(self.done, len(steps)):
      now_s = due[n][1][-1]
      if now_s >= bound[0] and bound < (now_s, _STEP, index):
        return False
      turn = turns[n % count]
      rows, context, token_s = turn
      ready_s = now_s + host_s
      times = one.run(ready_s if ready_s > token_s else token_s, rows,
                      context, steps[n])
      turn[1], turn[2] = context + steps[n] * rows, times[-1]
      due.append((self.number + n, times, True))
      self.marks.append((tuple(one.free_s), one.busy_s))
      self.done = n + 1
    return True


class _Run:
  """The state of a simulation."""

  def __init__(self, config, requests, latencies, link, log, leap, share,
               on_event, contention):
    count = len(config.instances)
    if not isinstance(latencies, (tuple, list)):
      latencies = (latencies,) * count
    require(len(latencies) == count, 'latencies', len(latencies),
            f'one for each of {count} instances')
    require(share in ('pair', 'nic'), 'share', share, "'pair' or 'nic'")
    decodes = [c.decodes for c in config.instances]
    hands_off = any(decodes) and not all(decodes)
    require(link is not None or not hands_off, 'link', link,
            'given where prefill and decode are apart')
    self.config, self.link, self.share = config, link, share
    self.on_event, self.closed_form = on_event, leap
    self.instances = [_Instance(one, c.pp) for one, c in
                      zip(latencies, config.instances, strict=True)]
    require(not contention or all(c.pp == 1 for c in config.instances),
            'contention', contention, 'None where an instance has '
            'several stages')
    self.devices = contention and Devices(contention, count)
    self.may_leap = not (contention or log or on_event) and leap
    self.loose = []  # instances in a quiet run, off the heap
    self.decoding = [n for n, able in enumerate(decodes) if able]
    self.scheduler = scheduler.Run(config, scheduler.init(config), self.wake)
    self.recorder = Recorder()
    self.log = [] if log else None
    self.heap = _arrivals(requests)
    self.links, self.link_s = {}, 0.0
    self.steps = self.leapt = 0

  def run(self):
    """To the end: a Result."""
    heap, pop = self.heap, heapq.heappop
    while True:
      if self.devices:
        done = self.devices.until(heap[0][0] if heap else float('inf'))
        if done:
          self.ended(*done)
          continue
      if not heap and not self.loose:
        break
      if self.loose:
        self.catch_up()
      self.top = top = pop(heap)
      if top[1] != _STEP:
        self.step(top[4])
      elif top[4] == self.instances[top[2]].serial:  # else void by now
        self.completed(top[0], top[2])
    return Result(self.recorder.records, self.log, self.steps, self.leapt,
                  tuple(self.devices.busy_s if self.devices else
                        [i.busy_s for i in self.instances]), self.link_s,
                  self.scheduler.freeze())

  def completed(self, now_s, index):
    """An instance's oldest command is done."""
    one = self.instances[index]
    if one.lane is not None:
      if one.lane.done < len(one.lane.quiet[1]):
        self.loose.append(index)
        return
      self.close(index, one.lane.done)
    number, times, decode = one.due.popleft()
    if one.due:
      self.expect(index, one.due[0])
    self.told(index, number, times, decode)

  def ended(self, index, command, times):
    """What an instance on shared cores had to do is done."""
    if type(command) is Migrate:
      self.send(command, times[-1])
    else:
      self.told(index, command.number, times,
                type(command) is RunDecode)

  def told(self, index, number, times, decode):
    """The event of a command that is done."""
    if decode:
      self.step(DecodeDone(times[-1], index, number, tuple(times)))
    else:
      self.step(PrefillDone(times[-1], index, number))

  def expect(self, index, due):
    """Puts an instance's next completion to be seen on the heap."""
    one = self.instances[index]
    one.serial += 1
    heapq.heappush(self.heap, (due[1][-1], _STEP, index, due[0], one.serial))

  def step(self, event):
    """One event, its commands and their completions."""
    commands = self.scheduler.apply(event)
    self.steps += 1
    self.recorder.observe(event, commands)
    if self.log is not None:
      self.log.append((event, tuple(commands)))
    for command in commands:
      kind = type(command)
      if kind is RunDecode or kind is RunPrefill:
        self.issue(command, event.time_s)
      elif kind is Migrate:
        self.copy(command, event.time_s)
      elif kind is Finish:
        for one in self.instances:
          if one.token_s:
            one.token_s.pop(command.id, None)
    if self.on_event:
      self.on_event(self.scheduler.freeze(), event, tuple(commands))
    if self.may_leap:
      for index in self.decoding:
        self.open(index)

  def issue(self, command, now_s):
    """Puts a step behind what its instance has to do already."""
    index = command.instance
    one = self.instances[index]
    decode = type(command) is RunDecode
    if self.devices:
      self.devices.add(index, command, *one.work(command),
                       now_s + one.host_s)
      return
    if decode:
      times = one.decode(now_s + one.host_s, command, self.closed_form)
    else:
      times = one.pieces(now_s + one.host_s, command)
    one.due.append((command.number, times, decode))
    if len(one.due) == 1:
      self.expect(index, one.due[0])

  def copy(self, command, now_s):
    """A migration: its pages are read, behind what its source has to do."""
    one = self.instances[command.source]
    ready_s = now_s + one.host_s
    if getattr(self.link, 'beside', False):
      self.send(command, ready_s)
    elif self.devices:
      self.devices.add(command.source, command, None, [0.0], ready_s)
    else:
      self.send(command, max(ready_s, *one.free_s))

  def send(self, c, now_s):
    """What a migration has read, behind what shares its link."""
    keys = (((c.source, c.target),) if self.share == 'pair'
            else (('from', c.source), ('to', c.target)))
    free_s = max(self.links.get(key, 0.0) for key in keys)
    start_s = max(free_s, now_s)
    done_s = start_s + self.link.migrate_s(c.num_tokens)
    self.links.update(dict.fromkeys(keys, done_s))
    self.link_s += done_s - start_s
    heapq.heappush(self.heap, (done_s, _MIGRATED, c.id, c.epoch,
                               Migrated(done_s, c.id, c.epoch)))

  # --- quiet runs -----------------------------------------------------------

  def open(self, index):
    """Begins an instance's quiet run, if nothing has to be decided soon."""
    quiet = self.scheduler.quiet(index, _REACH)
    if quiet is not None:
      one = self.instances[index]
      one.lane = _Lane(one, self.scheduler.instances[index], quiet)

  def catch_up(self):
    """Takes every quiet run to the next event, or to its end."""
    for index in tuple(self.loose):
      one = self.instances[index]
      if one.lane.advance(one, index, self.heap[0] if self.heap else _NEVER):
        self.loose.remove(index)
        self.expect(index, one.lane.due[one.lane.done])

  def wake(self, index):
    """Something else happens now to an instance in a quiet run.

    It may have gone beyond: the end of another's run came before the event
    that it was taken to.
    """
    lane, (now_s, kind, other, *_) = self.instances[index].lane, self.top
    find = (bisect.bisect_right if kind == _STEP and index < other
            else bisect.bisect_left)
    if index in self.loose:
      self.loose.remove(index)
    self.close(index, find(lane.due, now_s, 0, lane.done, key=_end_s))
    self.expect(index, self.instances[index].due[0])

  def close(self, index, count):
    """Ends a quiet run at its completion `count`."""
    one = self.instances[index]
    lane, one.lane = one.lane, None
    flight = len(one.due)
    one.free_s, one.busy_s = list(lane.marks[count][0]), lane.marks[count][1]
    one.due = collections.deque(lane.due[count:count + flight])
    self.scheduler.follow(index, lane.quiet, count)
    self.leapt += count
    first, (order, steps) = [], lane.quiet
    for n, g in enumerate(order[:count]):
      rows = self.scheduler.instances[index].batches[g].freeze()
      first.append((RunDecode(
          index, 0, 0, sum(steps[n:count:len(order)]), rows),
          _end_s(lane.due[n])))
      newest = n + (count - 1 - n) // len(order) * len(order)
      one.told(rows, _end_s(lane.due[flight + newest]))
    if count:
      self.recorder.leapt(index, [d[1] for d in lane.due[:count]], first)


def _end_s(due):
  """When a command is done."""
  return due[1][-1]


def _arrivals(requests):
  """The heap of a workload's arrivals."""
  requests = sorted(requests, key=lambda r: r.arrival_s)
  heap, seen = [], set()
  for n, r in enumerate(requests):
    require(r.id not in seen, 'Request.id', r.id,
            'different for each request')
    require(0 <= r.arrival_s < float('inf'), 'Request.arrival_s',
            r.arrival_s, 'seconds, 0 or more')
    require(r.sampling.max_tokens is not None, 'Sampling.max_tokens',
            None, 'set in a workload')
    seen.add(r.id)
    more = (n + 1 < len(requests)
            and requests[n + 1].arrival_s == r.arrival_s)
    heap.append((r.arrival_s, _ARRIVED, n, 0, Arrived(
        r.arrival_s, r.id, len(r.prompt), r.sampling.max_tokens, more)))
  return heap
