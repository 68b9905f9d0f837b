"""What a server does with three times what it can serve, and after.

  python -m experiments.overload --config=demo --out=out/overload

Starts experiments.api in a process of its own (or asks the server at --url)
and goes through four phases: single requests, for the unloaded latency; a
closed loop that keeps it full, for its capacity in requests/s; an open loop at
--factor times that for --seconds; and single requests again from the moment
the last one of the flood was sent, for the time to recover. What keeps the
accepted requests within their objectives, and sends the others away at once
with 429 and Retry-After, is the server's admission. Unless --set says
otherwise, limits.max_open is a request for each place in a decode batch, and
limits.max_ttft_s and max_tpot_s are 0.8 of the objectives.

Aims: 90 % or more of the accepted requests attain both objectives; a 429 comes
within a tenth of a second and says when to come back; nothing else is refused
or fails; within 5 s the latency is as before. Writes records.jsonl,
summary.json and report.png to --out.

Exit codes: 0; 2 for bad input; 130 when stopped by Ctrl-C.
"""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from dsjax import workload
from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import InputError, require
from dsjax.config.placement import Slo
from experiments import api, load
from experiments.common import cli, pictures, provenance, report, terminal
from experiments.common.extras import needs

with needs('serve'):
  import httpx

FLAGS = {
    'config': 'demo', 'set': (),
    'url': cli.Flag(None, 'A server that runs already.', str),
    'factor': cli.Flag(3.0, 'Times its capacity.', low=0.0),
    'seconds': cli.Flag(60.0, 'Of the flood.', low=0.1),
    'full': cli.Flag(30.0, 'Seconds that capacity is measured for.', low=0.1),
    'singles': cli.Flag(8, 'Unloaded requests.', low=1),
    'recover': cli.Flag(10.0, 'Seconds watched after.', low=0.5),
    'out': None,
}
RECOVERED = 1.25  # latencies below this many times the unloaded worst
PAUSE_S = 0.1  # of a client that was refused
MARGIN = 0.8  # of an objective, that admission aims at
PHASES = ('unloaded', 'full', 'flood', 'after')
# (arrival times, seed) -> a Job each.
MakeJobs: TypeAlias = Callable[[Sequence[float], int], list[load.Job]]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a run measured. Times in seconds.

  Attributes:
    capacity_per_s: requests served a second while the server is full.
    records: {phase: [Record, ...]}; arrivals count from the phase's begin.
    refused_s: how long each 429 of the flood took, from when it left.
    with_retry: how many of them had a Retry-After of a second or more.
    other: of the flood, {why: how many} that failed otherwise.
    recovered_s: from the flood's last arrival to the first single request from
      which on all are as fast as unloaded; None: not in this run.
    lag_s: (p50, p90, p99) of how late the client was.
  """

  capacity_per_s: float
  records: dict[str, list[Record]]
  refused_s: list[float]
  with_retry: int
  other: dict[str, int]
  recovered_s: float | None
  lag_s: Sequence[float]

  def accepted(self, phase: str = 'flood') -> list[Record]:
    """Records of a phase that were not sent away with a 429."""
    return [r for r in self.records[phase] if r.reason != 'HTTP 429']


class Overload:
  """The phases against one server."""

  def __init__(self, client: httpx.AsyncClient, make: MakeJobs) -> None:
    self.client, self._make = client, make
    self._seed = itertools.count()

  async def _loop(self, sender: load.Load, more: Callable[[], bool]) -> None:
    """Requests one after another into a Load, while more()."""
    while more():
      job, = self._make((sender.now,), next(self._seed))
      record = await sender.send(job)
      if record.status == 'rejected':
        await asyncio.sleep(PAUSE_S)

  async def single(self, count: int) -> load.Load:
    """`count` requests, one after another."""
    sender = load.Load(self.client)
    await self._loop(sender, lambda: len(sender.records) < count)
    return sender

  async def full(self, seconds: float, clients: int
                 ) -> tuple[load.Load, float]:
    """A closed loop of `clients`; (Load, requests served a second)."""
    sender = load.Load(self.client)
    await asyncio.gather(*(self._loop(sender, lambda: sender.now < seconds)
                           for _ in range(clients)))
    ends = sorted(r.finish_s for r in sender.records if r.finish_s is not None
                  and r.status in ('stop', 'length'))
    require(len(ends) >= 3, 'answers while full', len(ends),
            '3 or more; let --full last longer')
    return sender, (len(ends) - 1) / (ends[-1] - ends[0])

  async def flood(self, rate_per_s: float, seconds: float, recover_s: float
                  ) -> tuple[load.Load, load.Load]:
    """Poisson arrivals for `seconds`, then single requests for `recover_s`."""
    times = workload.arrivals('poisson', rate_per_s,
                              max(1, round(rate_per_s * seconds)), 0, 1.0, None)
    todo = self._make(times, next(self._seed))
    sender = load.Load(self.client)

    async def probe():
      await asyncio.sleep(times[-1] - sender.now)
      after = load.Load(self.client)
      await self._loop(after, lambda: after.now < recover_s)
      return after
    _, after = await asyncio.gather(sender.run(todo), probe())
    return sender, after


def recovery_s(unloaded: Sequence[Record], after: Sequence[Record]
               ) -> float | None:
  """When the latency was as before; see Outcome.recovered_s."""
  served = [record for record in unloaded if record.token_s]
  slowest = Slo(*(RECOVERED * max(getattr(record, field) for record in served)
                  for field in ('ttft_s', 'tpot_s')))
  recovered_s = None
  for record in sorted(after, key=lambda record: record.arrival_s):
    if not metrics.attains(record, slowest):
      recovered_s = None
    elif recovered_s is None:
      recovered_s = record.arrival_s
  return recovered_s


async def measure(url: str, key: str | None, make: MakeJobs, clients: int,
                  singles: int, full_s: float, factor: float, flood_s: float,
                  recover_s: float,
                  say: Callable[[str], object] = lambda text: None) -> Outcome:
  """All phases against a server: an Outcome. say: told what goes on.

  Raises:
    InputError: it does not answer single requests.
  """
  async with load.client(url, key, 600.0) as client:
    run = Overload(client, make)
    say(f'{singles} single requests')
    unloaded = await run.single(singles + 1)
    unloaded.records.pop(0)  # it opened the connection
    wrong = [r.reason for r in unloaded.records if not r.token_s]
    require(not wrong, 'single requests', wrong, 'answered')
    say(f'{clients} clients for {full_s:g} s')
    full, capacity_per_s = await run.full(full_s, clients)
    rate_per_s = factor * capacity_per_s
    say(f'{rate_per_s:.3g} requests/s for {flood_s:g} s')
    flood, after = await run.flood(rate_per_s, flood_s, recover_s)
  reasons = collections.Counter(r.reason for r in flood.records if r.reason)
  del reasons['HTTP 429']
  return Outcome(
      capacity_per_s, {phase: sender.records for phase, sender in zip(
          PHASES, (unloaded, full, flood, after), strict=True)},
      [r.finish_s - r.arrival_s - lag_s for r, lag_s in zip(
          flood.records, flood.lag_s, strict=True)
       if r.finish_s is not None and r.reason == 'HTTP 429'],
      sum((flood.retry_after[r.id] or '').isdigit()
          and flood.retry_after[r.id] != '0' for r in flood.records
          if r.reason == 'HTTP 429'),
      dict(reasons), recovery_s(unloaded.records, after.records),
      metrics.percentiles(flood.lag_s))


# --- results ----------------------------------------------------------------


def _ms(values: Sequence[float | None]) -> str:
  p50, _, p99 = metrics.percentiles([x for x in values if x is not None])
  return f'{1e3 * p50:.0f} / {1e3 * p99:.0f}' if values else '-'


def table(result: Outcome, slo: Slo) -> Table:
  """A rich Table of the phases."""
  made = Table(title=f'capacity {result.capacity_per_s:.3g} requests/s; TTFT '
               f'{slo.ttft_s:g} s, TPOT {slo.tpot_s:g} s',
               title_justify='left')
  made.add_column('')
  for name in PHASES:
    made.add_column(name, justify='right')
  sent = [len(result.records[phase]) for phase in PHASES]
  accepted = [result.accepted(phase) for phase in PHASES]

  def attained(records: Sequence[Record]) -> str:
    share, low, high = metrics.interval(
        [metrics.attains(r, slo) for r in records])
    return f'{100 * share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]'
  for name, cells in (
      ('sent', map(str, sent)),
      ('429', (str(count - len(records)) for count, records in zip(
          sent, accepted, strict=True))),
      ('attained, of the accepted', map(attained, accepted)),
      ('TTFT p50 / p99 ms', (_ms([r.ttft_s for r in records if r.token_s])
                             for records in accepted)),
      ('TPOT p50 / p99 ms', (_ms([r.tpot_s for r in records
                                  if len(r.token_s) > 1])
                             for records in accepted))):
    made.add_row(name, *cells)
  return made


def verdict(result: Outcome, slo: Slo) -> str:
  """Sentences: what was aimed at and what came."""
  hits = [metrics.attains(r, slo) for r in result.accepted()]
  share = 100 * sum(hits) / max(1, len(hits))
  p50, _, p99 = metrics.percentiles(result.refused_s)
  count = len(result.refused_s)
  told = (f'{count} were sent away with 429 after {1e3 * p50:.1f} ms (p50) and '
          f'{1e3 * p99:.1f} ms (p99; aim: below 100), {result.with_retry} of '
          'them with Retry-After.' if count else 'None was sent away.')
  other = ', '.join(f'{n} {why}' for why, n in result.other.items()) or 'none'
  came = ('the latency did not come back in this run' if
          result.recovered_s is None else 'the latency was as before '
          f'{result.recovered_s:.1f} s after the flood')
  sent = len(result.records['flood'])
  return (f'{len(hits)} of {sent} requests of the flood were accepted and '
          f'{share:.0f} % of them attained both objectives '
          f'(aim: 90 or more). {told} Other failures: {other}. Then {came} '
          '(aim: within 5). The client was '
          f'{1e3 * result.lag_s[2]:.1f} ms late at p99.')


def save(result: Outcome, slo: Slo, out: pathlib.Path, title: str,
         options: Any, prompts: str) -> None:
  """Writes records.jsonl, summary.json and report.png to a folder; options:
  of FLAGS. prompts: the file of them."""
  out.mkdir(parents=True, exist_ok=True)
  report.save_records(
      out / 'records.jsonl', [r for phase in PHASES
                              for r in result.records[phase]],
      [phase for phase in PHASES for _ in result.records[phase]])
  provenance.save_json(out / 'summary.json', {
      'capacity_per_s': result.capacity_per_s, 'slo': dataclasses.asdict(slo),
      'accepted': len(result.accepted()),
      'attained': sum(metrics.attains(r, slo) for r in result.accepted()),
      'refused': len(result.refused_s), 'with_retry_after': result.with_retry,
      'refused_s': metrics.percentiles(result.refused_s),
      'other': result.other, 'recovered_s': result.recovered_s,
      'lag_s': result.lag_s}, cli.asked(options, FLAGS), [prompts])
  figure = Figure(figsize=(11, 6.4), layout='constrained')
  ttft, tpot = figure.subplots(2, 1, sharex=True)
  end_s = max(r.arrival_s for r in result.records['flood'])
  shown = [('flood', result.records['flood']), ('after', [
      dataclasses.replace(r, arrival_s=r.arrival_s + end_s,
                          token_s=[t + end_s for t in r.token_s])
      for r in result.records['after']])]
  for axes, field, name in ((ttft, 'ttft_s', 'TTFT'), (tpot, 'tpot_s', 'TPOT')):
    report.over_time(axes, shown, field, getattr(slo, field))
    worst_s = max(getattr(r, field) for r in result.records['unloaded'])
    axes.axhline(worst_s, color='#2f9464', linewidth=1)
    axes.annotate(f'{name} unloaded, at worst', (0, worst_s), fontsize=8,
                  color='#2f9464', xytext=(2, 3), textcoords='offset points')
    axes.axvspan(0, end_s, color='#f2f2ee', zorder=0)
    axes.spines[['top', 'right']].set_visible(False)
  figure.suptitle(title, x=0.01, ha='left', fontsize=10)
  pictures.save(figure, out / 'report.png')


# --- command line -----------------------------------------------------------


@contextlib.contextmanager
def serving(config: str, settings: Sequence[str],
            say: Callable[[str], object]) -> Iterator[str]:
  """Starts experiments.api in another process: its URL, once it is ready.

  Raises:
    InputError: it does not start.
  """
  command = [sys.executable, '-m', 'experiments.api', f'--config={config}',
             '--port=0', *(f'--set={s}' for s in settings)]
  with tempfile.TemporaryFile('w+') as log, subprocess.Popen(
      command, cwd=cli.ROOT, stdout=subprocess.PIPE, stderr=log,
      text=True) as process:
    try:
      assert process.stdout  # a pipe
      line = process.stdout.readline()
      address = re.match(r'(http://\S+)/ ', line)
      if address is None:
        process.wait()
        log.seek(0)
        raise InputError(f'experiments.api={log.read().strip()[-500:]!r}: must '
                         'be able to start')
      url, status = address[1], {'status': 'starting'}
      while status['status'] == 'starting':
        say(status.get('progress') or 'starting')
        time.sleep(0.5)
        require(process.poll() is None, 'experiments.api', 'ended',
                'able to start')
        with contextlib.suppress(httpx.TransportError):
          status = httpx.get(url + '/health', timeout=10.0).json()
      require(status['status'] == 'ready', 'experiments.api',
              status['status'], 'ready')
      yield url
    finally:
      if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
          process.wait(60)
        except subprocess.TimeoutExpired:
          process.kill()


def run(options: Any, console: Console) -> int:
  """Measures, shows and writes; returns the exit code."""
  config = api.load(options.config, options.set)
  places = config.engine.max_seqs * sum(
      role != 'prefill' for role, _ in config.placements[0].instances)
  most = config.limits.max_open or places
  settings = [f'limits.max_open={most}',
              f'limits.max_ttft_s={MARGIN * config.slo.ttft_s}',
              f'limits.max_tpot_s={MARGIN * config.slo.tpot_s}', *options.set]
  prompts = workload.read_prompts(config.workload.prompts)
  key = os.environ.get('DSJAX_API_KEY')
  with console.status('starting') as status, (
      contextlib.nullcontext(options.url) if options.url else
      serving(options.config, settings, status.update)) as url:
    model = load.find_model(url, key)

    def make(times, seed):
      # A request a prompt in turn, so that every phase has all of them.
      turn = prompts[seed % len(prompts):] + prompts[:seed % len(prompts)]
      return load.jobs('chat', model, times, turn, (),
                       config.sampling.max_tokens, seed)
    try:
      result = asyncio.run(measure(
          url.removesuffix('/v1'), key, make, 2 * most, options.singles,
          options.full, options.factor, options.seconds, options.recover,
          status.update))
    except KeyboardInterrupt:
      console.print('Stopped: a run that is not whole says nothing.')
      return 130
  title = (f'{model}: {options.factor:g} times the capacity of '
           f'{result.capacity_per_s:.3g} requests/s for {options.seconds:g} s, '
           f'at most {most} open')
  console.print(title, table(result, config.slo), verdict(result, config.slo),
                sep='\n', soft_wrap=True)
  if options.out:
    save(result, config.slo, pathlib.Path(options.out), title, options,
         config.workload.prompts)
    terminal.written(console, options.out, 'records.jsonl', 'report.png',
                     'summary.json')
  return 0


if __name__ == '__main__':
  cli.main(run, FLAGS, api.Api())
