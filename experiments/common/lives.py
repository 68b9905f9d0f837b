"""The life of each request of a short run, and its instances, as a figure."""

import pathlib
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsjax.analysis import timeline
from dsjax.analysis.record import STAGES
from dsjax.analysis.recorder import Recorder
from dsjax.scheduling.events import Command, Event
from experiments.common import pictures
from experiments.common.report import STAGE_COLOURS


def save_lives(path: str | pathlib.Path,
               log: Sequence[tuple[Event, Iterable[Command]]],
               names: Sequence[str] = (),
               ids: Iterable[int] | None = None) -> None:
  """Draws a short run to a PNG: instances above, requests below.

  An instance's row has a box a step and a cross a fault; a request's row has
  its stages.

  Args:
    log, names: as in timeline.timeline.
    ids: the requests to draw; None for all.
  """
  trace = timeline.timeline(log, names)['traceEvents']
  steps = [e for e in trace if e.get('cat') == 'step']
  faults = [e for e in trace if e.get('cat') == 'fault']
  spans = []
  recorder = Recorder(lambda *span: spans.append(span))
  for event, commands in log:
    recorder.observe(event, commands)
  origin_s = log[0][0].time_s if log else 0.0
  ids = [r.id for r in recorder.records] if ids is None else list(ids)
  order = {e['tid']: e['args']['sort_index'] for e in trace
           if e['name'] == 'thread_sort_index'}
  rows = sorted(order, key=order.__getitem__)
  row_names = {e['tid']: e['args']['name'] for e in trace
               if e['name'] == 'thread_name'}
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
  labels = [row_names[row] for row in rows]
  labels += [f'request {id}' for id in ids]
  axes.set_yticks(range(len(labels)), labels)
  axes.set_ylim(len(labels) - 0.4, -0.6)
  axes.axhline(len(rows) - 0.5, color='black', linewidth=0.8)
  axes.set_xlabel('seconds')
  axes.spines[['top', 'right']].set_visible(False)
  figure.legend(handles=[Patch(color=STAGE_COLOURS[s],
                               label=s.replace('_', ' ')) for s in STAGES],
                loc='outside upper center', ncols=5, frameon=False, fontsize=8)
  pictures.save(figure, path)
