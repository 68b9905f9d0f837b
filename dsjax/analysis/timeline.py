"""A run's event log as a Chrome trace, for ui.perfetto.dev.

Data in, data out: a caller writes what `timeline` returns with json.dump.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsjax.analysis import pairing
from dsjax.analysis.recorder import Recorder
from dsjax.scheduling.events import (
  Abort,
  Command,
  Drain,
  Event,
  Flip,
  InstanceDown,
  InstanceUp,
  Migrate,
  MigrateFailed,
  RunDecode,
  RunPrefill,
)

Trace = dict[str, Any]  # what json.dump takes

_INSTANCES, _REQUESTS = 1, 2  # "processes" of the trace
_THERE = 1_000_000  # rows of what instances stamped themselves: behind these
_STAGE = 1000  # rows of further pipeline stages: instance + 1000 * stage
_FAULTS = {InstanceDown: 'lost', InstanceUp: 'there again', Drain: 'drained',
           MigrateFailed: 'hand-off failed', Abort: 'hand-off given up',
           Flip: 'has another role'}


def _row(instance, stage):
  return instance + _STAGE * stage


def _step_name(command):
  tokens = sum(c.stop - c.start for c in command.chunks)
  parts = [f'prefill {tokens} tok'] if tokens else []
  if command.rows:
    parts.append(f'decode x{len(command.rows)}')
  return ' + '.join(parts) or 'empty'


def _step_args(command, step):
  chunks = command.chunks
  return {
      'number': command.number,
      'tick': command.tick + step,
      'rows': len(command.rows),
      'tokens': sum(c.stop - c.start for c in chunks) + len(command.rows),
      'pages': sum(len(x.pages) for x in (*chunks, *command.rows)),
      'prefilled': [c.id for c in chunks],
  }


def _metadata(instances, names):
  yield {'ph': 'M', 'pid': _INSTANCES, 'name': 'process_name',
         'args': {'name': 'instances'}}
  yield {'ph': 'M', 'pid': _REQUESTS, 'name': 'process_name',
         'args': {'name': 'requests'}}
  for row in sorted(instances):
    yield {'ph': 'M', 'pid': _INSTANCES, 'tid': row, 'name': 'thread_name',
           'args': {'name': _name(row, names)}}
    yield {'ph': 'M', 'pid': _INSTANCES, 'tid': row,
           'name': 'thread_sort_index', 'args': {'sort_index': _order(row)}}


def _name(row, names):
  if row >= _THERE:
    return f'{_name(row - _THERE, names)}, as it says'
  stage, i = divmod(row, _STAGE)
  name = names[i] if i < len(names) else f'instance {i}'
  return f'{name}, stage {stage}' if stage else name


def _order(row):
  """Stages of an instance below one another, what it says itself last."""
  there, row = divmod(row, _THERE)
  stage, instance = divmod(row, _STAGE)
  return instance * _STAGE + (_STAGE - 1 if there else stage)


def _request_slices(recorder, spans, us):
  """One async row a request: an outer slice, and its stages inside."""
  for record in recorder.records:
    own = spans.get(record.id)
    if not own:
      continue
    base = {'cat': 'request', 'id': record.id, 'pid': _REQUESTS, 'tid': 0}
    name = f'request {record.id}'
    yield base | {'ph': 'b', 'name': name, 'ts': us(own[0][1]), 'args': {
        'status': record.status, 'prompt_len': record.prompt_len,
        'tokens': len(record.token_s), 'preemptions': record.preemptions}}
    for stage, start_s, stop_s in own:
      if stop_s > start_s:
        yield base | {'ph': 'b', 'name': stage, 'ts': us(start_s)}
        yield base | {'ph': 'e', 'name': stage, 'ts': us(stop_s)}
    yield base | {'ph': 'e', 'name': name, 'ts': us(own[-1][2])}


def _spans(execution, free_s):
  """(step, stage, start, stop) of a command, by when its stages were free.

  Several commands may be in flight; a stage runs them one by one, and a step
  goes through the stages in order. free_s: (instance, stage) -> seconds, kept
  by the caller.
  """
  instance, ends_s = execution.command.instance, execution.steps_s
  inner = len(execution.stages_s) // len(ends_s)
  ready_s = execution.issued_s
  for step, end_s in enumerate(ends_s):
    stops_s = (*execution.stages_s[step * inner:(step + 1) * inner], end_s)
    for stage, stop_s in enumerate(stops_s):
      start_s = max(ready_s, free_s.get((instance, stage), ready_s))
      ready_s = free_s[instance, stage] = max(stop_s, start_s)
      yield step, stage, start_s, ready_s


def bubbles(log: pairing.Log) -> dict[int, float]:
  """The idle share of pipeline stages while their instance had work.

  Returns:
    {instance: 1 - busy seconds of its stages / (stages * seconds with a
    command in flight)}, for instances of several stages.
  """
  free_s, busy_s, open_s, stages = {}, {}, {}, {}
  for ended in pairing.ended(log):
    if not isinstance(ended, pairing.Execution):
      continue
    i = ended.command.instance
    open_s[i] = open_s.get(i, 0.0) + ended.ended_s - ended.started_s
    if ended.done:
      spans = list(_spans(ended, free_s))
      busy_s[i] = busy_s.get(i, 0.0) + sum(b - a for *_, a, b in spans)
      stages[i] = 1 + max(stage for _, stage, *_ in spans)
  return {i: 1 - busy_s[i] / (stages[i] * open_s[i])
          for i in sorted(open_s) if stages.get(i, 1) > 1 and open_s[i] > 0}


def _step_slices(log, us):
  """Slices of the steps, and flow arrows of the migrations."""
  free_s, prefilled = {}, {}
  for ended in pairing.ended(log):
    if not ended.done:
      continue
    if isinstance(ended, pairing.HandOff):
      command = ended.command
      source, prefilled_s = prefilled.get(command.id, (None, 0.0))
      if source == command.source:
        flow = {'cat': 'migrate', 'pid': _INSTANCES,
                'id': f'{command.id}.{command.epoch}', 'name': 'migrate',
                'args': {'tokens': command.num_tokens, 'sent': command.sent}}
        yield flow | {'ph': 's', 'tid': source, 'ts': us(prefilled_s)}
        # Without "bp": the arrow ends at the next slice of the target.
        yield flow | {'ph': 'f', 'tid': command.target,
                      'ts': us(ended.ended_s)}
      continue
    command = ended.command
    instance = command.instance
    for step, stage, start_s, stop_s in _spans(ended, free_s):
      yield {'ph': 'X', 'pid': _INSTANCES, 'tid': _row(instance, stage),
             'cat': 'step', 'name': _step_name(command), 'ts': us(start_s),
             'dur': us(stop_s) - us(start_s),
             'args': _step_args(command, step)}
      for chunk in command.chunks:
        # Just inside the slice: viewers attach an arrow to what is there.
        prefilled[chunk.id] = instance, stop_s - 0.01 * (stop_s - start_s)


def _fault_marks(log, us):
  """A mark on an instance's row for each fault, and for its end."""
  targets = {}
  for event, commands in log:
    for entry in (event, *commands):
      if isinstance(entry, Migrate):
        targets[entry.id, entry.epoch] = entry.target
      elif type(entry) in _FAULTS:
        row = (entry.instance if hasattr(entry, 'instance') else
               targets.get((entry.id, entry.epoch), 0))
        yield {'ph': 'i', 's': 't', 'pid': _INSTANCES, 'tid': row,
               'cat': 'fault', 'name': _FAULTS[type(entry)],
               'ts': us(event.time_s)}


def _stamped(stamps, log, us):
  """Slices of steps and hand-offs as instances saw them."""
  issued = {(c.instance, c.number): c for _, commands in log for c in commands
            if isinstance(c, RunPrefill | RunDecode)}
  for instance, own in stamps.items():
    free_s, cpu_s = log[0][0].time_s if log else float('inf'), None
    own = [stamp for stamp in own if stamp[3] >= free_s]
    for what, number, began_s, ended_s, used_s in own:
      args, name = {'request': number}, f'KV {what}'
      if what == 'step':
        command = issued.get((instance, number))
        if command is None:
          continue  # of another run
        began_s = max(began_s, free_s)
        name, free_s = _step_name(command), ended_s
        args = {'number': number} | ({} if cpu_s is None else {
            'cpu_ms': round(1e3 * (used_s - cpu_s), 3)})
        cpu_s = used_s
      yield {'ph': 'X' if what == 'step' else 'i', 'pid': _INSTANCES,
             'tid': _THERE + instance, 'cat': 'there', 'name': name,
             'ts': us(began_s if what == 'step' else ended_s),
             'args': args} | (
                 {'dur': us(ended_s) - us(began_s)} if what == 'step' else
                 {'s': 't'})


def timeline(log: Sequence[tuple[Event, Iterable[Command]]],
             names: Sequence[str] = (),
             stamps: Mapping[int, Iterable[Any]] | None = None) -> Trace:
  """Chrome trace of a run, for ui.perfetto.dev or chrome://tracing.

  One row an instance, and one for each further pipeline stage, with a slice
  a step, marks for its faults and arrows for the KV that migrates, and one
  row a request with its stages. With several commands in flight on an
  instance, a slice begins where the one before ended.

  Args:
    log: in order.
    names: the name of each instance, by number.
    stamps: (what, number, began_s, ended_s, CPU seconds) of what each process
      stamped itself (Orchestrator.stamps): a row more, so that both sides of
      the border are seen. Of other runs' steps there is no slice.

  Returns:
    A dict ready for json.dump; times in microseconds from the first event.
  """
  start_s = log[0][0].time_s if log else 0.0

  def us(time_s):
    return round((time_s - start_s) * 1e6, 3)

  spans = {}
  recorder = Recorder(lambda id, stage, start, stop: spans.setdefault(
      id, []).append((stage, start, stop)))
  for event, commands in log:
    recorder.observe(event, commands)
  steps = list(_step_slices(log, us))
  steps += _fault_marks(log, us)
  steps += _stamped(stamps or {}, log, us)
  events: list[dict[str, Any]] = [
      *steps, *_request_slices(recorder, spans, us)]
  events.sort(key=lambda e: e['ts'])  # stable: nesting at one time is kept
  instances = {e['tid'] for e in steps} | set(range(len(names)))
  return {'traceEvents': [*_metadata(instances, names), *events],
          'displayTimeUnit': 'ms'}


def merge(traces: Iterable[tuple[str, Trace]]) -> Trace:
  """One trace of several runs, one above the other, each from 0.

  Args:
    traces: the name of each run, and its timeline.
  """
  merged = []
  for run, (name, trace) in enumerate(traces):
    for entry in trace['traceEvents']:
      entry = entry | {'pid': 2 * run + entry['pid']}
      if 'id' in entry:  # arrows and requests: one space for the whole trace
        entry['id'] = f'{name}.{entry["id"]}'
      if entry['name'] == 'process_name':
        entry['args'] = {'name': f'{name}: {entry["args"]["name"]}'}
      merged.append(entry)
  return {'traceEvents': merged, 'displayTimeUnit': 'ms'}
