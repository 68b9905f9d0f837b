"""What Prometheus reads of a service, and what the live page draws.

Counters and histograms follow the events of the scheduler and the tokens, in
the orchestrator's thread. Queues and pages are read at a scrape, from the
scheduler's state, which is a value: so a scrape costs serving nothing.
docs/grafana.json draws them all.
"""

import collections
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import prometheus_client as prom
from prometheus_client.core import GaugeMetricFamily, Metric

from dsjax.analysis.record import Record
from dsjax.config.version import __version__
from dsjax.runtime.orchestrator import Orchestrator
from dsjax.runtime.orchestrator_thread import Stream
from dsjax.scheduling import lifecycle, prefix_cache
from dsjax.scheduling.events import (
  Command,
  Event,
  Fail,
  Finish,
  Load,
  Loaded,
  Migrate,
  Migrated,
  Offload,
  Preempt,
  RunDecode,
  RunPrefill,
)

SECONDS = (.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60)
SIZES = tuple(2**i for i in range(13))
STAGES = ('queued', 'prefilling', 'prefilled', 'migrating', 'decoding',
          'ending')
_SHOWN = dict.fromkeys(lifecycle.ENDING, 'ending') | lifecycle.SHOWN_AS
RECENT = 500  # finished requests that the live page shows


class Gauges:
  """The observer of a Service, see there. One registry each.

  model: its name, a label of every sample.

  Attributes:
    recent: (when it ended, status, ttft_s, tpot_s, tokens) of the newest
      requests. num_rejected: how many were turned away.
  """

  def __init__(self, model: str) -> None:
    self.model, self.registry = model, prom.CollectorRegistry()
    self._unlabelled = prom.CollectorRegistry()
    self._last_s: dict[int, float] = {}  # by request: when its newest came
    self._coming: dict[int, Load | Migrate] = {}  # by request: kept KV
    self.recent = collections.deque(maxlen=RECENT)
    self.num_rejected = 0
    self._server: Orchestrator | None = None
    self._counted = (0, 0, 0.0, 0.0, 0)  # as of the last look
    self._make_metrics()
    self.registry.register(self)

  def _make_metrics(self) -> None:
    def make(kind, name, text, labels=(), **options):
      return kind(f'dsjax_{name}', text, labels,
                  registry=self._unlabelled, **options)

    def seconds(name, text, labels=()):
      return make(prom.Histogram, f'{name}_seconds', text, labels,
                  buckets=SECONDS)
    count, sizes = prom.Counter, {'buckets': SIZES}
    self.ttft = seconds('ttft', 'Arrival to first token.')
    self.tpot = seconds('tpot', 'Mean time per output token after the first.')
    self.itl = seconds('itl', 'Gaps between successive output tokens.')
    self.request = seconds('request', 'Arrival to end.')
    self.stage = make(count, 'stage_seconds', 'Spent in each stage.',
                      ['stage'])
    self.ended = make(count, 'requests_ended', 'By reason.', ['reason'])
    self.rejected = make(count, 'requests_rejected', 'Turned away, by reason.',
                         ['reason'])
    self.prompt_tokens = make(count, 'prompt_tokens', 'Of prompts read.')
    self.output_tokens = make(count, 'output_tokens', 'As they come.')
    self.hit_tokens = make(count, 'prefix_hit_tokens', 'Of prompts, whose KV '
                           'was kept: not computed (prefill), not moved.',
                           ['instance', 'spared'])
    self.preemptions = make(count, 'preemptions',
                            'Requests that lost their pages.')
    self.migrations = make(count, 'migrations', 'KV caches moved.')
    self.kv_bytes = make(count, 'kv_moved_bytes', 'KV moved, bytes.')
    self.kv_seconds = make(count, 'kv_moved_seconds', 'Seconds of moving KV.')
    self.host_pages = make(count, 'host_pages', 'KV pages copied to host '
                           'memory, or from there.', ['instance', 'copy'])
    self.host_bytes = make(count, 'host_bytes', 'Of these pages, both ways.')
    self.steps = make(count, 'device_steps', 'Steps that devices completed.')
    self.host = make(count, 'host_seconds', 'Host seconds of those steps.')
    self.prefill_tokens = make(prom.Histogram, 'prefill_batch_tokens',
                               'Prompt tokens of a prefill batch.',
                               ['instance'], **sizes)
    self.decode_rows = make(prom.Histogram, 'decode_batch_rows',
                            'Requests of a decode step.', ['instance'],
                            **sizes)

  # --- the orchestrator's thread --------------------------------------------

  def started(self, server: Orchestrator) -> None:
    """The orchestrator is ready; every instance has its series from now."""
    for i in map(str, range(len(server.placement.instances))):
      self.prefill_tokens.labels(i)
      self.decode_rows.labels(i)
      for copy in ('offload', 'load'):
        self.host_pages.labels(i, copy)
    self._server = server

  def observe(self, event: Event, commands: Iterable[Command]) -> None:
    """Folds one event and the commands that answered it.

    Batches count when they are issued, kept KV that is copied when it is there.
    """
    if isinstance(event, Migrated):
      self.migrations.inc()
    if isinstance(event, Migrated | Loaded):
      copy = self._coming.get(event.id)
      if copy and copy.epoch == event.epoch:
        self._hit(self._coming.pop(event.id), copy.num_tokens)
    for command in commands:
      if isinstance(command, Preempt):
        self.preemptions.inc()
      elif isinstance(command, Migrate) and not command.more:
        if command.kept:
          self._coming[command.id] = command
          self._hit(command, command.hit)
        else:
          self.hit_tokens.labels(str(command.target), 'copy').inc(
              command.hit - command.sent)
      elif isinstance(command, Offload | Load):
        instance, kind = str(command.instance), type(command).__name__.lower()
        self.host_pages.labels(instance, kind).inc(len(command.pages))
        if isinstance(command, Load) and not command.row:
          self._coming[command.id] = command
          self._hit(command, command.hit)
      elif isinstance(command, Finish | Fail):
        self._coming.pop(command.id, None)
      elif isinstance(command, RunPrefill | RunDecode):
        instance = str(command.instance)
        if command.chunks:
          self.prefill_tokens.labels(instance).observe(
              sum(chunk.stop - chunk.start for chunk in command.chunks))
          self.hit_tokens.labels(instance, 'prefill').inc(
              sum(chunk.hit for chunk in command.chunks))
        if command.rows:
          rows = self.decode_rows.labels(instance)
          for _ in range(command.steps):
            rows.observe(len(command.rows))

  def _hit(self, copy: Load | Migrate, tokens: int) -> None:
    """Counts tokens of a prompt that need not be computed where kept KV comes
    to."""
    instance = copy.target if isinstance(copy, Migrate) else copy.instance
    self.hit_tokens.labels(str(instance), 'prefill').inc(tokens)

  def wrote(self, stream: Stream, num_tokens: int) -> None:
    """Folds tokens that a request has just got."""
    now_s, last_s = time.perf_counter(), self._last_s.get(stream.id)
    self._last_s[stream.id] = now_s
    self.output_tokens.inc(num_tokens)
    if last_s is None:
      self.prompt_tokens.inc(len(stream.prompt))
      self.ttft.observe(now_s - stream.arrival_s)
      num_tokens, last_s = num_tokens - 1, now_s
    for _ in range(num_tokens):
      self.itl.observe((now_s - last_s) / num_tokens)

  def finished(self, record: Record) -> None:
    """Folds a request that has ended."""
    self._last_s.pop(record.id, None)
    self.ended.labels(record.status).inc()
    self.request.observe(sum(record.stage_s.values()))
    for stage, seconds in record.stage_s.items():
      self.stage.labels(stage).inc(max(0.0, seconds))
    if len(record.token_s) > 1:
      self.tpot.observe(record.tpot_s)
    self.recent.append((time.time(), record.status, record.ttft_s,
                        record.tpot_s, len(record.token_s)))

  # --- the event loop -------------------------------------------------------

  def reject(self, reason: str) -> None:
    """Counts a request that is turned away."""
    self.rejected.labels(reason).inc()
    self.num_rejected += 1

  # --- a scrape or the live page --------------------------------------------

  def _pull(self, server: Orchestrator) -> None:
    """Counts what the orchestrator sums up itself."""
    now = (server.copied_bytes, server.steps, server.copy_s, server.host_s,
           server.host_bytes)
    old, self._counted = self._counted, now
    for metric, new, before in zip(
        (self.kv_bytes, self.steps, self.kv_seconds, self.host,
         self.host_bytes), now, old, strict=True):
      metric.inc(max(0, new - before))

  def text(self) -> bytes:
    """The Prometheus exposition."""
    if self._server:
      self._pull(self._server)
    return prom.generate_latest(self.registry)

  def collect(self) -> Iterator[Metric]:
    """All metrics, with the model (prometheus_client's collector protocol)."""
    for metric in (*self._unlabelled.collect(), *self._now(), self._build()):
      metric.samples = [sample._replace(
          labels={'model': self.model} | sample.labels)
                        for sample in metric.samples]
      yield metric

  def _build(self) -> GaugeMetricFamily:
    """What serves, as the labels of a 1."""
    server, labels = self._server, ('version', 'jax', 'platform', 'mode')
    build = GaugeMetricFamily('dsjax_build_info', 'What serves.',
                              labels=labels)
    build.add_metric(
        [__version__, jax.__version__,
         jax.default_backend(), server.placement.mode if server else ''], 1)
    return build

  def _now(self) -> list[GaugeMetricFamily]:
    """Queue lengths and pages."""
    requests = GaugeMetricFamily(
        'dsjax_requests', 'Requests now, by instance and stage.',
        labels=['instance', 'role', 'stage'])
    owners = GaugeMetricFamily(
        'dsjax_pages', 'KV pages now, by instance and owner.',
        labels=['instance', 'role', 'owner'])
    for i, inst in enumerate(snapshot(self._server)):
      for stage, count in inst['requests'].items():
        requests.add_metric([str(i), inst['role'], stage], count)
      for owner, count in inst['pages'].items():
        owners.add_metric([str(i), inst['role'], owner], count)
    return [requests, owners]


def snapshot(server: Orchestrator | None) -> list[dict[str, Any]]:
  """What every instance holds now, from the scheduler's state.

  Returns:
    [{'role', 'plan', 'status', 'requests': {stage: how many}, 'pages': {owner:
    how many}}, ...]; status as in scheduler.Instance; owner is a stage, 'free'
    or 'kept' (by no request). A page that several requests share counts for
    each. A migrating request owns pages on both sides and counts at its
    source; one that waits for a lost instance counts nowhere. [] without a
    server.
  """
  if server is None:
    return []
  state, instances = server.state, []
  for (role, plan), inst in zip(server.placement.instances, state.instances,
                                strict=True):
    instances.append({'role': role, 'plan': str(plan),
                      'status': inst.status,
                      'requests': dict.fromkeys(STAGES, 0),
                      'pages': {'free': prefix_cache.num_free(inst.pool)
                                - prefix_cache.num_idle(inst.pool),
                                'kept': prefix_cache.num_idle(inst.pool)}
                      | dict.fromkeys(STAGES[1:], 0)})
  for seq in state.seqs.values():
    if seq.instance < 0:
      continue  # it waits for an instance that is to come back
    stage = _SHOWN.get(seq.stage, seq.stage)
    instances[seq.instance]['requests'][stage] += 1
    if seq.pages:
      instances[seq.instance]['pages'][stage] += len(seq.pages)
    if seq.target_pages:
      instances[seq.target]['pages'][stage] += len(seq.target_pages)
  return instances


def flow(server: Orchestrator | None) -> list[tuple[int, str, int, int]]:
  """(id, stage, instance, target or -1) of each request now."""
  if server is None:
    return []
  return [(s.id, _SHOWN.get(s.stage, s.stage), s.instance, s.target)
          for s in server.state.seqs.values()]
