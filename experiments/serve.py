"""Serves one workload in one mode after another and compares them.

  python -m experiments.serve --config=demo --out=out/demo

--config is the name of a file in configs/ or the path of a .py file; --set
changes a field of it and may be repeated, as in --set=workload.rate_per_s=2
--set=placements=prefill=1x1,decode=1x1/colocated=1x1,1x1; --help lists the
fields. Every mode gets the same requests, seeds, engine and number of devices.

Files in --out: records.jsonl (a request and mode a line), answers.jsonl,
timeline.json (for ui.perfetto.dev), report.png, summary.txt, summary.json,
events-MODE.jsonl (the scheduler's log, which replays).

Ctrl-C keeps what there is. Exit codes: see experiments.common.cli.
"""

import dataclasses
import json
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

import dsjax
from configs.serve import Serve
from dsjax import workload
from dsjax.analysis import attribution, metrics, timeline
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError, require
from dsjax.config.placement import Placement
from dsjax.config.request import Request
from dsjax.runtime.protocols import Engine
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.policy import DISTSERVE, Policy
from experiments.common import (
  cli,
  machine,
  policies,
  provenance,
  report,
  terminal,
)
from experiments.common import overrides as configs

SAMPLES = 3  # answers shown of the first mode
BUSY_CORES = 0.2  # of other programs: more than this spoils a comparison

FLAGS = {'config': None, 'set': (), 'out': None, 'policy': 'distserve',
         'latency': cli.PREDICTS, 'cluster': cli.CLUSTER_FLAG._replace(
             help=cli.CLUSTER_FLAG.help + ' auto: local, where each instance '
             'and the server can have cores of their own.'),
         'compilation_cache': cli.CACHE}


@dataclasses.dataclass
class Result:
  """One mode's run. answers: {request id: Output} of those that ended."""

  mode: str
  placement: Placement
  records: list
  log: list
  answers: dict
  extra: dict
  compiled: int
  stopped: bool
  stamps: dict


# --- requests ---------------------------------------------------------------


def plan_requests(config: Serve
                  ) -> Callable[[Model], tuple[list[Request], int]]:
  """Reads and checks everything that needs no model.

  Returns:
    a function from a Model to (requests, how many were cut).

  Raises:
    InputError.
  """
  w = config.workload
  require(w.lengths or w.process not in ('trace', 'resample'),
          'workload.process', w.process,
          'one that needs no trace, or with --set=workload.lengths=FILE')
  made = (workload.source(w.lengths, w.seed, w.process, w.cv)
          if w.lengths else None)
  entries = made.entries if made else workload.read_prompts(w.prompts)
  drawn = made and (made.mixture or made.parts)
  n = w.requests or (100 if drawn else len(entries))
  times = workload.arrivals_of(
      w.process, w.rate_per_s, n, w.seed, w.cv, made.entries if made else None)

  def make(model):
    if made is None:
      chosen = [entries[i % len(entries)] for i in range(n)]
      requests, cut = _chats(config, model, chosen, times), 0
    else:
      requests, cut = workload.from_lengths(
          made.entries_at(times), n, times, model.config.vocab_size, w.seed,
          w.max_prompt, w.max_output, in_order=True)
    for r in requests:
      _check_length(config, model, r)
    return requests, cut
  return make


def _chats(config, model, prompts, times):
  ids = [model.tokenizer.chat(list(p.messages) if p.messages else
                              [{'role': 'user', 'content': p.text}])
         for p in prompts]
  room = [max(1, config.engine.max_len - len(i)) for i in ids]
  limits = [p.max_tokens or config.sampling.max_tokens or r
            for p, r in zip(prompts, room, strict=True)]
  seed = config.sampling.seed
  sampling = [dataclasses.replace(config.sampling, seed=(seed + i) % 2**32)
              for i in range(len(ids))]
  return workload.from_prompts(ids, times, sampling, limits)


def _check_length(config, model, request):
  most, need = config.engine.max_len, request.sampling.max_tokens
  if len(request.prompt) + need > most:
    raise InputError(
        f'request {request.id}: a prompt of {len(request.prompt)} tokens and '
        f'max_tokens={need} exceed engine.max_len={most} (the context of '
        f'{model.config.name} is {model.config.max_len}); for a trace, '
        'workload.max_prompt and workload.max_output cut lengths')


# --- serving ----------------------------------------------------------------


def serve_mode(config: Serve, mode: str, placement: Placement, model: Model,
               requests: Sequence[Request], screen: terminal.Screen,
               policy: Policy, latency: str | None, cluster: str | None,
               engines: list[Engine]) -> Result:
  """Runs the requests in one mode: a Result, checked.

  engines: a list of those of the mode before, stopped, whose weights are read
  on; then of this one's.

  Raises:
    KeyboardInterrupt: while it warmed up.
    AssertionError: the state is not sound, or the log does not replay.
  """
  screen.begin(mode, placement, len(requests))
  with dsjax.serve(model, placement, config.engine,
                   report=screen.warming, policy=policy,
                   latency=latency, cluster=cluster) as server:
    engines[:] = server.engines
    with machine.compilations() as compiled:
      stopped, others = False, machine.Others()
      try:
        server.run(requests, on_poll=lambda: screen.serving(server))
      except KeyboardInterrupt:
        stopped = True
        server.close()
      finally:
        screen.served()
      cores = others.cores()
  for engine in engines:
    engine.stop()
  scheduler.check(server.state)
  first = event_log.replay(server.scheduler_config, server.log)
  assert first is None, f'{mode}: log entry {first} replays otherwise'
  records = list(server.records)
  answers = {r.id: server.output(r.id) for r in records
             if r.status in ('stop', 'length')}
  extra = {'kv_bytes': server.copied_bytes, 'kv_s': server.copy_s,
           'host_s_per_step': server.host_s / max(1, server.steps),
           'bubbles': timeline.bubbles(server.log),
           'others_cores': cores}
  return Result(mode, placement, records, server.log, answers, extra,
                len(compiled), stopped, server.stamps)


def _show_mode(console, result, requests):
  done, log = len(result.answers), result.log
  console.print(
      f'{result.mode}: {done} of {len(requests)} answered; every page '
      f'returned; {len(log)} events replay to the same commands; '
      f'{result.compiled} programs compiled while serving', soft_wrap=True)


def _show_samples(console, result):
  ended = sorted((r for r in result.records if r.id in result.answers),
                 key=lambda r: r.finish_s)
  for record in ended[:SAMPLES]:
    text = terminal.short(result.answers[record.id].text, console.width - 14)
    console.print(f'  answer {record.id:3d}: {text}', markup=False,
                  highlight=False)


def tokens_agree(results: Sequence[Result]) -> str:
  """A sentence on whether the modes gave the same tokens."""
  first, *others = results
  shared = set(first.answers).intersection(*(r.answers for r in others))
  differ = [i for i in sorted(shared) if any(
      r.answers[i].tokens != first.answers[i].tokens for r in others)]
  if not others or not shared:
    return ''
  if differ:
    return (f'Tokens differ between modes in {len(differ)} of {len(shared)} '
            f'answers: {differ[:10]}.')
  return f'All {len(shared)} answers are equal token for token in all modes.'


def serve_modes(config: Serve, model: Model, requests: Sequence[Request],
                console: Console, policy: Policy = DISTSERVE,
                latency: str | None = None, cluster: str | None = None
                ) -> list[Result]:
  """Runs the requests in every mode of a config, in turn.

  Returns:
    a Result for each mode; when stopped by Ctrl-C, of those that began to
    serve.
  """
  results, engines = [], []
  with terminal.Interrupts() as interrupts, terminal.Screen(
      console, interrupts.halt) as screen:
    for mode, placement in zip(config.modes, config.placements, strict=True):
      try:
        result = serve_mode(config, mode, placement, model, requests, screen,
                            policy, latency, cluster, engines)
      except KeyboardInterrupt:
        break
      results.append(result)
      _show_mode(console, result, requests)
      if len(results) == 1:
        _show_samples(console, result)
      if result.stopped:
        break
  return results


def disturbed(results: Iterable[Result]) -> str:
  """A warning where other programs took cores from a mode, else ''."""
  busy = [f'{r.extra["others_cores"]:.1f} in {r.mode}' for r in results
          if (r.extra['others_cores'] or 0.0) > BUSY_CORES]
  return ('Other programs took cores while this ran (' + ', '.join(busy)
          + '): the comparison is not fair.') if busy else ''


# --- results ----------------------------------------------------------------


def compare(config: Serve, results: Iterable[Result]
            ) -> list[tuple[str, metrics.Summary, dict[str, Any]]]:
  """[(mode, Summary, extra), ...], as report.tables takes it."""
  return [(r.mode, metrics.summarize(r.records, config.slo, config.num_devices,
                                     config.warmup_s),
           r.extra | {'attribution': attributed(config, r)})
          for r in results]


def attributed(config: Serve, result: Result) -> dict[str, Any]:
  """Why requests of a mode missed, after the warm-up: a dict for JSON."""
  fold = attribution.of_log(result.log)
  start_s = min((r.arrival_s for r in result.records), default=0.0)
  kept = [r for r in result.records
          if r.arrival_s >= start_s + config.warmup_s]
  why = attribution.attribute(kept, fold.parts(), config.slo, fold.least())
  return {'causes': why.causes, 'fixes': why.fixes,
          'advice': why.advice}


def save(config: Serve, results: Sequence[Result], title: str, closing: str,
         out: pathlib.Path, options: Mapping[str, Any]) -> None:
  """Writes every file of a run into the folder `out`; options: a dict."""
  compared = compare(config, results)
  read = [config.workload.lengths or config.workload.prompts]
  report.save_records(
      out / 'records.jsonl', [x for r in results for x in r.records],
      [r.mode for r in results for _ in r.records])
  with open(out / 'answers.jsonl', 'w', encoding='utf-8') as file:
    for r in results:
      for id, a in r.answers.items():
        file.write(json.dumps({'mode': r.mode, 'id': id, 'reason': a.reason,
                               'text': a.text, 'tokens': a.tokens},
                              ensure_ascii=False) + '\n')
  traces = []
  for old in out.glob('events-*.jsonl'):
    old.unlink()
  for r in results:
    report.save_log(out / f'events-{r.mode}.jsonl', r.log)
    traces.append((r.mode, timeline.timeline(r.log, r.placement.names,
                                             r.stamps)))
  provenance.save_trace(out / 'timeline.json', timeline.merge(traces), options,
                        read)
  report.save_figure(out / 'report.png', [(r.mode, r.records)
                                          for r in results], config.slo, title)
  with open(out / 'summary.txt', 'w', encoding='utf-8') as file:
    plain = Console(file=file, width=80)
    plain.print(title, report.tables(compared), closing, sep='\n')
  provenance.save_json(out / 'summary.json', {
      'config': dataclasses.asdict(config), 'closing': closing,
      'modes': {mode: dataclasses.asdict(s) | {
          'goodput_per_s_device': s.goodput_per_s_device} | extra
                for mode, s, extra in compared}}, options, read)


def _title(config, requests, cut, devices):
  w = config.workload
  rate = {'burst': 'at once'}.get(
      w.process, f'{w.process}, {w.rate_per_s} a second')
  return (f'{pathlib.Path(config.model).name}, {config.engine.dtype}, '
          f'{devices}. '
          f'{len(requests)} requests, {rate}, seed {w.seed}'
          + (f', {cut} of them cut' if cut else '') +
          f'. SLO: TTFT {config.slo.ttft_s:g} s, TPOT {config.slo.tpot_s:g} s')


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Serves, shows, checks and writes; returns the exit code."""
  require(options.config, '--config', options.config,
          f'given: one of {configs.names()}')
  require(options.out, '--out', options.out, 'given: a folder for the files')
  config = configs.override(configs.load(options.config), options.set)
  require(isinstance(config, Serve), '--config', type(config).__name__,
          'a file whose `config` is a configs.serve.Serve')
  policy = policies.load(options.policy, config.slo)
  cluster = cli.cluster_of(options, config.num_devices)
  out = pathlib.Path(options.out)
  cli.prepare(config.num_devices, options.compilation_cache, config.tp)
  make = plan_requests(config)
  if cluster is None:  # else processes have the devices, and this one none
    available = len(jax.devices())
    require(config.num_devices <= available, 'placements',
            f'{config.num_devices} devices',
            f'of at most the {available} that exist')
  out.mkdir(parents=True, exist_ok=True)
  console.print(f'Loading {config.model}', soft_wrap=True)
  model = dsjax.load(config.model, config.engine.dtype,
                     weights=cluster is None)
  requests, cut = make(model)
  title = _title(
      config, requests, cut,
                 f'{config.num_devices} devices of instances that are processes'
                 if cluster else
                 f'{config.num_devices} {jax.devices()[0].platform} devices')
  console.print(title, soft_wrap=True)
  results = serve_modes(config, model, requests, console, policy,
                        options.latency or None, cluster)
  stopped = len(results) < len(config.modes) or results[-1].stopped
  if not any(r.records for r in results):
    console.print('Stopped before any request was served: nothing to write.')
    return 130
  compared = compare(config, results)
  closing = ' '.join(filter(None, (
      f'Stopped early, in {results[-1].mode}.' if stopped else '',
      report.verdict(compared), tokens_agree(results), disturbed(results))))
  console.print(report.tables(compared))
  console.print(closing, highlight=False)
  for mode, _, extra in compared:
    console.print(f'{mode}: {extra["attribution"]["advice"]}', highlight=False)
  save(config, results, title, closing, out, cli.asked(options, FLAGS))
  terminal.written(console, out, 'records.jsonl', 'answers.jsonl',
                   'timeline.json', 'report.png', 'summary.txt',
                   'summary.json', *(f'events-{result.mode}.jsonl'
                                     for result in results))
  return 130 if stopped else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, Serve())
