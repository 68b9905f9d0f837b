"""A run's event log as a Chrome trace, for ui.perfetto.dev, and as a figure.

Pure rendering; an event log is a list of (event, commands) in order.
"""

import json
import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsjax.analysis.record import STAGES
from dsjax.analysis.recorder import Recorder
from dsjax.scheduling.events import (
  Abort,
  DecodeDone,
  Drain,
  InstanceDown,
  InstanceUp,
  Migrate,
  Migrated,
  MigrateFailed,
  PrefillDone,
  RunDecode,
  RunPrefill,
)
from experiments.common.report import STAGE_COLOURS

_INSTANCES, _REQUESTS = 1, 2  # "processes" of the trace
_FAULTS = {InstanceDown: 'lost', InstanceUp: 'there again', Drain: 'drained',
           MigrateFailed: 'hand-off failed', Abort: 'hand-off given up'}


_STAGE = 1000  # rows of further pipeline stages: instance + 1000 * stage


def _row(instance, stage):
  return instance + _STAGE * stage


def _step_name(command):
  tokens = sum(c.stop - c.start for c in getattr(command, 'chunks', ()))
  parts = [f'prefill {tokens} tok'] if tokens else []
  if command.rows:
    parts.append(f'decode x{len(command.rows)}')
  return ' + '.join(parts) or 'empty'


def _step_args(command, step):
  chunks = getattr(command, 'chunks', ())
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
  stage, i = divmod(row, _STAGE)
  name = names[i] if i < len(names) else f'instance {i}'
  return f'{name}, stage {stage}' if stage else name


def _order(row):
  """Stages of an instance below one another."""
  stage, instance = divmod(row, _STAGE)
  return instance * _STAGE + stage


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


def _spans(event, issued_s, free_s):
  """(step, stage, start, stop) of a command, by when its stages were free.

  Several commands may be in flight; a stage runs them one by one, and a step
  goes through the stages in order. free_s: (instance, stage) -> seconds, kept
  by the caller.
  """
  ends_s = getattr(event, 'steps_s', ()) or (event.time_s,)
  inner = len(event.stages_s) // len(ends_s)
  ready_s = issued_s
  for step, end_s in enumerate(ends_s):
    stops_s = (*event.stages_s[step * inner:(step + 1) * inner], end_s)
    for stage, stop_s in enumerate(stops_s):
      start_s = max(ready_s, free_s.get((event.instance, stage), ready_s))
      ready_s = free_s[event.instance, stage] = max(stop_s, start_s)
      yield step, stage, start_s, ready_s


def bubbles(log):
  """The idle share of pipeline stages while their instance had work.

  Returns:
    {instance: 1 - busy seconds of its stages / (stages * seconds with a
    command in flight)}, for instances of several stages.
  """
  issued, free_s, flying = {}, {}, {}
  busy_s, open_s, since_s, stages = {}, {}, {}, {}
  for event, commands in log:
    if isinstance(event, (PrefillDone, DecodeDone)):
      i = event.instance
      spans = list(_spans(event, issued.pop((i, event.number)), free_s))
      busy_s[i] = busy_s.get(i, 0) + sum(b - a for *_, a, b in spans)
      stages[i] = 1 + max(stage for _, stage, *_ in spans)
      flying[i] -= 1
      if not flying[i]:
        open_s[i] = open_s.get(i, 0) + event.time_s - since_s[i]
    elif isinstance(event, InstanceDown) and flying.pop(event.instance, 0):
      i = event.instance
      open_s[i] = open_s.get(i, 0) + event.time_s - since_s[i]
    for command in commands:
      if isinstance(command, (RunPrefill, RunDecode)):
        i = command.instance
        issued[i, command.number] = event.time_s
        if not flying.get(i):
          since_s[i] = event.time_s
        flying[i] = flying.get(i, 0) + 1
  return {i: 1 - busy_s[i] / (stages[i] * open_s[i])
          for i in sorted(open_s) if stages.get(i, 1) > 1 and open_s[i] > 0}


def _step_slices(log, us):
  """Slices of the steps, and flow arrows of the migrations."""
  pending, free_s, made, moving = {}, {}, {}, {}
  for event, commands in log:
    if isinstance(event, (PrefillDone, DecodeDone)):
      issued_s, command = pending.pop((event.instance, event.number))
      for step, stage, start_s, stop_s in _spans(event, issued_s, free_s):
        yield {'ph': 'X', 'pid': _INSTANCES, 'tid': _row(event.instance,
                                                         stage),
               'cat': 'step', 'name': _step_name(command), 'ts': us(start_s),
               'dur': us(stop_s) - us(start_s),
               'args': _step_args(command, step)}
        for chunk in getattr(command, 'chunks', ()):
          # Just inside the slice: viewers attach an arrow to what is there.
          made[chunk.id] = (event.instance,
                            stop_s - 0.01 * (stop_s - start_s))
    elif isinstance(event, Migrated):
      move = moving.pop((event.id, event.epoch), None)
      if move:
        flow = {'cat': 'migrate', 'pid': _INSTANCES,
                'id': f'{event.id}.{event.epoch}', 'name': 'migrate'}
        yield flow | {'ph': 's', 'tid': move[0], 'ts': us(move[1])}
        # Without "bp": the arrow ends at the next slice of the target.
        yield flow | {'ph': 'f', 'tid': move[2], 'ts': us(event.time_s)}
    for command in commands:
      if isinstance(command, (RunPrefill, RunDecode)):
        pending[command.instance, command.number] = (event.time_s, command)
      elif isinstance(command, Migrate):
        source, made_s = made.get(command.id, (None, None))
        if source == command.source:
          moving[command.id, command.epoch] = (source, made_s, command.target)


def _fault_marks(log, us):
  """A mark on an instance's row for each fault, and for its end."""
  targets = {}
  for event, commands in log:
    for e in (event, *commands):
      if isinstance(e, Migrate):
        targets[e.id, e.epoch] = e.target
      elif type(e) in _FAULTS:
        row = getattr(e, 'instance', None)
        if row is None:
          row = targets.get((e.id, e.epoch), 0)
        yield {'ph': 'i', 's': 't', 'pid': _INSTANCES, 'tid': row,
               'cat': 'fault', 'name': _FAULTS[type(e)],
               'ts': us(event.time_s)}


def timeline(log, names=()):
  """Chrome trace of a run, for ui.perfetto.dev or chrome://tracing.

  One row an instance, and one for each further pipeline stage, with a slice
  a step, marks for its faults and arrows for the KV that migrates, and one
  row a request with its stages. With several commands in flight on an
  instance, a slice begins where the one before ended.

  Args:
    log: [(event, commands), ...] in order.
    names: the name of each instance, by number.

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
  events = steps + list(_request_slices(recorder, spans, us))
  events.sort(key=lambda e: e['ts'])  # stable: nesting at one time is kept
  instances = {e['tid'] for e in steps} | set(range(len(names)))
  return {'traceEvents': [*_metadata(instances, names), *events],
          'displayTimeUnit': 'ms'}


def merge(traces):
  """One trace of several runs, one above the other, each from 0.

  Args:
    traces: [(name, what timeline returned), ...].
  """
  events = []
  for k, (name, trace) in enumerate(traces):
    for e in trace['traceEvents']:
      e = e | {'pid': 2 * k + e['pid']}
      if 'id' in e:  # of arrows and requests: one space for the whole trace
        e['id'] = f'{name}.{e["id"]}'
      if e['name'] == 'process_name':
        e['args'] = {'name': f'{name}: {e["args"]["name"]}'}
      events.append(e)
  return {'traceEvents': events, 'displayTimeUnit': 'ms'}


def save_timeline(path, log, names=()):
  """Writes timeline(log, names) as JSON."""
  pathlib.Path(path).write_text(json.dumps(timeline(log, names)))


def save_lives(path, log, names=(), ids=None):
  """Draws a short run to a PNG: instances above, requests below.

  An instance's row has a box a step and a cross a fault; a request's row has
  its stages.

  Args:
    log, names: as in timeline.
    ids: the requests to draw; None for all.
  """
  trace = timeline(log, names)['traceEvents']
  steps = [e for e in trace if e.get('cat') == 'step']
  faults = [e for e in trace if e.get('cat') == 'fault']
  spans = []
  recorder = Recorder(lambda *span: spans.append(span))
  for event, commands in log:
    recorder.observe(event, commands)
  origin_s = log[0][0].time_s if log else 0.0
  ids = [r.id for r in recorder.records] if ids is None else list(ids)
  rows = sorted({e['tid'] for e in steps + faults} | set(range(len(names))),
                key=_order)
  figure = Figure(figsize=(10, 1.4 + 0.36 * (len(rows) + len(ids))),
                  layout='constrained')
  axes = figure.subplots()
  axes.barh([rows.index(e['tid']) for e in steps],
            [1e-6 * e['dur'] for e in steps],
            left=[1e-6 * e['ts'] for e in steps], height=0.7,
            color=[STAGE_COLOURS['prefill' if e['args']['prefilled'] else
                                 'decode'] for e in steps],
            edgecolor='white', linewidth=0.15)
  axes.plot([1e-6 * e['ts'] for e in faults],
            [rows.index(e['tid']) for e in faults], 'kx', markersize=7)
  spans = [s for s in spans if s[0] in ids]
  axes.barh([len(rows) + ids.index(id) for id, *_ in spans],
            [stop_s - start_s for *_, start_s, stop_s in spans],
            left=[start_s - origin_s for *_, start_s, _ in spans], height=0.5,
            color=[STAGE_COLOURS[stage] for _, stage, *_ in spans])
  labels = [_name(row, names) for row in rows]
  labels += [f'request {id}' for id in ids]
  axes.set_yticks(range(len(labels)), labels)
  axes.set_ylim(len(labels) - 0.4, -0.6)
  axes.axhline(len(rows) - 0.5, color='black', linewidth=0.8)
  axes.set_xlabel('seconds')
  axes.spines[['top', 'right']].set_visible(False)
  figure.legend(handles=[Patch(color=STAGE_COLOURS[s],
                               label=s.replace('_', ' ')) for s in STAGES],
                loc='outside upper center', ncols=5, frameon=False, fontsize=8)
  figure.savefig(path, dpi=100)
