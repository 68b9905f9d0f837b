"""The serving run without the hardware: a heap of events over scheduler.step.

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
- A migration takes its link for itself and is dispatched like a command.
- Arrivals of one moment are told together (Arrived.more). At one moment
  arrivals come first, then copies, then steps, as in a poll.
- Nothing is known of EOS: every request runs to its max_tokens, which is
  thus its output length.

Leaping. Most completions of a decode command change nothing but counters:
the next command has the same rows. scheduler.quiet says how such a run goes
on, command by command and page by page, in closed form within a command,
until a row ends, pages run short or something else happens to the instance.
Every command is the one that step would have issued, with its boundaries, so
leaping changes no time (an arrival in the middle of a command waits for its
end here as there). With a log or on_event, every event is stepped instead.

Cost: five to seven calls of scheduler.step a request, and 6 us a leapt
command of one row, 17 of 24 rows, its pages and records included.
"""

import collections
import heapq
from typing import NamedTuple

from dsjax import base, metrics, scheduler

_ARRIVED, _MIGRATED, _STEP = range(3)  # order of events of one moment


class Result(NamedTuple):
  """A simulated run.

  Attributes:
    records: one a request, in order of arrival.
    log: (event, commands) pairs, or None.
    steps: calls of scheduler.step; leapt: decode commands without one.
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
             share='pair', on_event=None):
  """Serves a workload in virtual time.

  Args:
    config: a scheduler.Config.
    requests: base.Request values, in any order; only the length of a prompt
      is read.
    latencies: of each instance (or one for all): prefill_s(pieces),
      decode_s(batch, context), decode_line(batch), mixed_s(pieces, batch,
      context), host_s, pp; optionally stage_share, the part of each of the
      pp stages in a step's seconds (equal parts without it).
    link: migrate_s(num_tokens); None where nothing migrates.
    log: keep the event log (and step through every event).
    leap: False steps through every event and adds up every decode step.
    share: 'pair' for a link of its own for every (source, target); 'nic'
      where all copies from one source, and all to one target, queue.
    on_event: None, or called with (state, event, commands) after each step.

  Raises:
    InputError: bad requests or latencies that do not fit the instances.
  """
  return _Run(config, requests, latencies, link, log, leap, share,
              on_event).run()


class _Instance:
  """A virtual instance: when each stage is free, when rows have tokens."""

  def __init__(self, latency, pp):
    self.latency, self.host_s = latency, latency.host_s
    self.shares = getattr(latency, 'stage_share', None) or (1 / pp,) * pp
    base.require(latency.pp == pp and len(self.shares) == pp, 'latency.pp',
                 latency.pp, f'the pp={pp} of its instance')
    self.free_s = [0.0] * pp
    self.token_s = {}  # id -> when its newest token is there (pp > 1)
    self.busy_s = 0.0
    self.line = (0, 0.0, 0.0)  # decode_line of the batch size seen last
    self.due = collections.deque()  # (number, times of its steps) in flight
    self.lane = None  # a quiet run

  def pieces(self, ready_s, command):
    """Times of the end of a prefill or mixed command."""
    pieces = tuple((c.start, c.stop) for c in command.chunks)
    if command.rows:
      batch = len(command.rows)
      context = (sum(r.base for r in command.rows)
                 + batch * (command.tick + 1))
      total_s = self.latency.mixed_s(pieces, batch, context)
    else:
      total_s = self.latency.prefill_s(pieces)
    done_s = self.stages(ready_s, command.rows, total_s)
    if len(self.free_s) > 1:
      self.token_s.update((c.id, done_s) for c in command.chunks if c.last)
    return (done_s,)

  def decode(self, ready_s, command, leap):
    """Completion time of each step of a decode command."""
    batch = len(command.rows)
    context = (sum([r[1] for r in command.rows])
               + batch * (command.tick + 1))
    if not leap:
      times = []
      for step in range(command.steps):
        ready_s = self.stages(
            ready_s, command.rows,
            self.latency.decode_s(batch, context + step * batch))
        times.append(ready_s)
      return tuple(times)
    if len(self.free_s) == 1:
      return self.run(ready_s, batch, context, command.steps)
    a, b = self.coefficients(batch)
    return (self.stages(ready_s, command.rows, a + b * context),)

  def coefficients(self, batch):
    if self.line[0] != batch:
      self.line = (batch, *self.latency.decode_line(batch))
    return self.line[1:]

  def run(self, ready_s, batch, context, steps):
    """Decode steps of the only stage, in closed form."""
    line = self.line
    if line[0] != batch:
      line = self.line = (batch, *self.latency.decode_line(batch))
    _, a, b = line
    start_s = self.free_s[0]
    if ready_s > start_s:
      start_s = ready_s
    if steps == 1:
      times = (start_s + a + b * context,)
    else:
      first, more = a + b * context, b * batch / 2
      times = tuple([start_s + n * first + more * n * (n - 1)
                     for n in range(1, steps + 1)])
    self.free_s[0] = done_s = times[-1]
    self.busy_s += done_s - start_s
    return times

  def stages(self, ready_s, rows, total_s):
    """Sends one step through the stages; when it leaves the last."""
    free_s = self.free_s
    self.busy_s += total_s
    if len(free_s) == 1:
      free_s[0] = max(ready_s, free_s[0]) + total_s
      return free_s[0]
    token_s = self.token_s
    if rows:
      ready_s = max(ready_s, max([token_s.get(r[0], 0.0) for r in rows]))
    for stage, part in enumerate(self.shares):
      if free_s[stage] > ready_s:
        ready_s = free_s[stage]
      ready_s += part * total_s
      free_s[stage] = ready_s
    for row in rows:
      token_s[row[0]] = ready_s
    return ready_s


class _Run:
  """The state of a simulation."""

  def __init__(self, config, requests, latencies, link, log, leap, share,
               on_event):
    count = len(config.instances)
    if not isinstance(latencies, (tuple, list)):
      latencies = (latencies,) * count
    base.require(len(latencies) == count, 'latencies', len(latencies),
                 f'one for each of {count} instances')
    base.require(share in ('pair', 'nic'), 'share', share, "'pair' or 'nic'")
    roles = [c.role for c in config.instances]
    base.require(link is not None or 'decode' not in roles, 'link', link,
                 'given where prefill and decode are apart')
    self.config, self.link, self.share = config, link, share
    self.on_event, self.closed_form = on_event, leap
    self.instances = [_Instance(one, c.pp) for one, c in
                      zip(latencies, config.instances, strict=True)]
    self.may_leap = leap and not log and on_event is None
    self.alone = [role == 'decode' for role in roles]  # no queue of prompts
    self.state, self.recorder = scheduler.init(config), metrics.Recorder()
    self.log = [] if log else None
    self.heap = _arrivals(requests)
    self.links, self.link_s = {}, 0.0
    self.steps = self.leapt = 0

  def run(self):
    """To the end: a Result."""
    heap, pop = self.heap, heapq.heappop
    while heap:
      top = pop(heap)
      if top[1] != _STEP:
        self.settle(top[4])
        self.step(top[4])
      else:
        one = self.instances[top[2]]
        if one.lane is None or not self.leap(one, top):
          self.completed(one, top)
    return Result(self.recorder.records, self.log, self.steps, self.leapt,
                  tuple(i.busy_s for i in self.instances), self.link_s,
                  self.state)

  def completed(self, one, top):
    """An instance's oldest command is done, and the scheduler decides."""
    now_s, _, index, number, decode = top
    self.close(index)
    _, times, _ = one.due.popleft()
    if decode:
      event = base.DecodeDone(now_s, index, number, times)
    else:
      event = base.PrefillDone(now_s, index, number)
    if one.due:  # only the oldest command is in the heap
      number, times, decode = one.due[0]
      heapq.heappush(self.heap, (times[-1], _STEP, index, number, decode))
    self.settle(event)
    self.step(event)

  def step(self, event):
    """One event, its commands and their completions."""
    self.state, commands = scheduler.step(self.config, self.state, event)
    self.steps += 1
    self.recorder.observe(event, commands)
    if self.log is not None:
      self.log.append((event, commands))
    for command in commands:
      if isinstance(command, (base.RunDecode, base.RunPrefill)):
        self.issue(command, event.time_s)
      elif isinstance(command, base.Migrate):
        self.copy(command, event.time_s)
      elif isinstance(command, base.Finish):
        for one in self.instances:
          one.token_s.pop(command.id, None)
    if self.on_event:
      self.on_event(self.state, event, commands)
    if self.may_leap:
      self.open(event, commands)

  def issue(self, command, now_s):
    """Puts a step behind what its instance has to do already."""
    index = command.instance
    one = self.instances[index]
    decode = isinstance(command, base.RunDecode)
    if decode:
      times = one.decode(now_s + one.host_s, command, self.closed_form)
    else:
      times = one.pieces(now_s + one.host_s, command)
    if not one.due:
      heapq.heappush(self.heap, (times[-1], _STEP, index, command.number,
                                 decode))
    one.due.append((command.number, times, decode))

  def copy(self, command, now_s):
    """A migration, behind those that share its link."""
    c = command
    keys = (((c.source, c.target),) if self.share == 'pair'
            else (('from', c.source), ('to', c.target)))
    free_s = max(self.links.get(key, 0.0) for key in keys)
    start_s = max(free_s, now_s + self.instances[c.source].host_s)
    done_s = start_s + self.link.migrate_s(c.num_tokens)
    self.links.update(dict.fromkeys(keys, done_s))
    self.link_s += done_s - start_s
    heapq.heappush(self.heap, (done_s, _MIGRATED, c.id, c.epoch,
                               base.Migrated(done_s, c.id, c.epoch)))

  # --- quiet runs -----------------------------------------------------------

  def settle(self, event):
    """Ends the quiet runs whose pages an event is about to look at."""
    target = None
    if isinstance(event, base.Migrated):
      target = self.state.seqs[event.id].target
    offers = isinstance(event, base.PrefillDone)
    for index, one in enumerate(self.instances):
      if one.lane is not None and (
          index == target or self.state.instances[index].pulls
          or offers and self.alone[index]):
        self.close(index)

  def open(self, event, commands):
    """Ends quiet runs that got a prompt to run; begins what may be one.

    A decode instance always may: what it could not admit it cannot admit
    later, as nothing is released meanwhile. The others only after a
    completion of their own that was answered by a decode command alone, for
    then a waiting prompt has just been refused.
    """
    own = (event.instance if isinstance(event, base.DecodeDone)
           and len(commands) == 1 and isinstance(commands[0], base.RunDecode)
           else -1)
    for index, one in enumerate(self.instances):
      if one.lane is None:
        if self.alone[index] or index == own:
          one.lane = scheduler.quiet(self.config, self.state, index)
      elif self.state.instances[index].queue != one.lane.queue:
        self.close(index)

  def close(self, index):
    """Ends an instance's quiet run, if it is in one."""
    one = self.instances[index]
    if one.lane is not None:
      if one.lane.commands:
        self.state = one.lane.close(self.state)
      one.lane = None

  def leap(self, one, top):
    """Runs on from a completion; False where the scheduler must see it."""
    lane, heap, due = one.lane, self.heap, one.due
    now_s, _, index, number, _ = top
    staged, done = len(one.free_s) > 1, []
    # The first command of a run is shown: its rows may not have been seen
    # together. So is every one of several micro-batches.
    shown = not lane.commands or staged
    while steps := lane.issue():
      batch = lane.batch
      rows = batch.rows
      tick, size = batch.tick - steps, len(rows)
      context = batch.bases + size * (tick + 1)
      if staged:
        a, b = one.coefficients(size)
        times = (one.stages(now_s + one.host_s, rows, a + b * context),)
      else:
        times = one.run(now_s + one.host_s, size, context, steps)
      due.append((lane.number - 1, times, True))
      finished = due.popleft()
      if shown:
        shown = staged
        self.recorder.observe(
            base.DecodeDone(now_s, index, number, finished[1]),
            (base.RunDecode(index, lane.number - 1, tick, steps, rows),))
        self.leapt += 1
      else:
        done.append(finished)
      number, times, _ = due[0]
      now_s = times[-1]
      if heap and heap[0] < (now_s, _STEP, index, number):
        break
    if number == top[3]:
      return False
    if done:
      self.leapt += len(done)
      self.recorder.leapt(index, done, due)
    heapq.heappush(heap, (now_s, _STEP, index, number, True))
    return True


def _arrivals(requests):
  """The heap of a workload's arrivals."""
  requests = sorted(requests, key=lambda r: r.arrival_s)
  heap, seen = [], set()
  for n, r in enumerate(requests):
    base.require(r.id not in seen, 'Request.id', r.id,
                 'different for each request')
    base.require(0 <= r.arrival_s < float('inf'), 'Request.arrival_s',
                 r.arrival_s, 'seconds, 0 or more')
    base.require(r.sampling.max_tokens is not None, 'Sampling.max_tokens',
                 None, 'set in a workload')
    seen.add(r.id)
    more = (n + 1 < len(requests)
            and requests[n + 1].arrival_s == r.arrival_s)
    heap.append((r.arrival_s, _ARRIVED, n, 0, base.Arrived(
        r.arrival_s, r.id, len(r.prompt), r.sampling.max_tokens, more)))
  return heap
