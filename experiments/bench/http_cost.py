"""What HTTP costs: the same streams in process and through the server.

  python -m experiments.bench.http_cost --config=demo --streams=16 --rounds=5

One orchestrator serves the same requests four ways, in turn: driven by
Orchestrator.run in this process; through dsjax.http.service, the thread and the
queues behind the server; written to a bare socket, which any server must; and
over HTTP. The last two are streamed to a client in a process of its own, which
counts from when a request is due to when the bytes of a token came. Requests
start a little apart, so that none waits for another's prompt, and write so
much that all of them overlap. Of every round the difference to the run in
process is taken; the table has the median over the rounds, and the least and
the most. Server, client and device share the cores of a CPU machine: CPU time
a token of each is printed too. Aims: below 3 % of TPOT and 5 ms of TTFT.

Exit codes: 0; 2 for bad input; 130 when stopped by Ctrl-C, which keeps the
rounds there are.
"""

import asyncio
import itertools
import json
import pathlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import dsjax
from dsjax import workload
from dsjax.config.checks import require
from dsjax.config.request import Request, Sampling
from dsjax.http.service import Limits, Service
from dsjax.runtime.orchestrator import Orchestrator
from experiments import api
from experiments.bench import kept
from experiments.common import cli
from experiments.common.extras import needs

with needs('serve'):
  from dsjax.http import routes, socket_server
  from dsjax.http.telemetry import Gauges

FLAGS = {
    'config': 'demo', 'set': (),
    'streams': cli.Flag(16, 'At a time.', low=1),
    'tokens': cli.Flag(96, 'Of each.', low=2),
    'gap': cli.Flag(0.5, 'Seconds between their starts.', low=0.0),
    'rounds': 5,
}
WAYS = ('in process', 'service', 'socket', 'HTTP')
LEAD_S = 0.5  # from saying when a round begins to its beginning
# [arrival_s, token times ...] of each stream.
Times: TypeAlias = list[list[float]]


class Cost(NamedTuple):
  """One way in one round: means, and CPU seconds by who used them."""
  ttft_s: float
  tpot_s: float
  cpu_s: dict[str, float]


class Bench:
  """An orchestrator and its ways; each gives (Times, CPU seconds).

  prompts: ids of each stream, which start gap_s apart and write `tokens`.
  """

  def __init__(self, server: Orchestrator, prompts: Sequence[Sequence[int]],
               tokens: int, gap_s: float, limits: Limits) -> None:
    self.server, self.prompts, self.limits = server, prompts, limits
    self.tokens, self.due_s = tokens, [i * gap_s for i in range(len(prompts))]

  def _sampling(self, i):
    return Sampling(max_tokens=self.tokens, seed=i, ignore_eos=True)

  def in_process(self) -> tuple[Times, dict[str, float]]:
    """Orchestrator.run, in this thread."""
    server = self.server
    server.observers.clear()
    requests = [Request(server.next_id + i, due_s, ids, self._sampling(i))
                for i, (ids, due_s) in enumerate(zip(
                    self.prompts, self.due_s, strict=True))]
    before_s = _cpu_s(server.thread)
    records = server.run(requests)
    cpu_s = {'orchestrator': _cpu_s(server.thread) - before_s}
    for record in records:
      server.forget(record.id)
    return [[r.arrival_s, *r.token_s] for r in records], cpu_s

  async def _submit(self, service):
    """The same through a Service, on its event loop."""
    start_s = time.perf_counter() + LEAD_S

    async def submit(i):
      due_s = start_s + self.due_s[i]
      await asyncio.sleep(due_s - time.perf_counter())
      call = service.submit([(self.prompts[i], self._sampling(i))], due_s)
      times = []
      while news := await call.take():
        now_s = time.perf_counter()
        times += [now_s for _, update in news for _ in update.tokens]
      return [due_s, *times]
    return await asyncio.gather(*map(submit, range(len(self.prompts))))

  async def _bare(self, service):
    """An asyncio server that writes a call's updates, and nothing about it."""
    async def answer(reader, writer):
      now_s = time.perf_counter()
      head = await reader.readuntil(b'\r\n\r\n')
      body = json.loads(await reader.readexactly(
          int(head.split(b'Content-Length: ')[1])))
      writer.write(b'HTTP/1.1 200 OK\r\n\r\n')
      call = service.submit([(body['prompt'], self._sampling(body['seed']))],
                            now_s)
      while news := await call.take():
        for _, update in news:
          writer.write(b'data: {%a}\n\n' % update.text)
      writer.close()
    return await asyncio.start_server(answer, '127.0.0.1')

  def _ask(self, client, address):
    """The same through a socket, from another process."""
    start_s = time.perf_counter() + LEAD_S
    jobs = [{'path': '/v1/completions', 'at_s': start_s + due_s, 'body': {
        'model': 'm', 'prompt': list(map(int, ids)), 'seed': i, 'stream': True,
        'max_tokens': self.tokens, 'ignore_eos': True, 'temperature': 0}}
            for i, (ids, due_s) in enumerate(zip(
                self.prompts, self.due_s, strict=True))]
    print(json.dumps({'host': address[0], 'port': address[1], 'jobs': jobs}),
          file=client.stdin, flush=True)
    answer = json.loads(client.stdout.readline())
    return [[job['at_s'], *times] for job, times in zip(
        jobs, answer['times'], strict=True)], answer['cpu_s']

  def served(self, client: subprocess.Popen[str], ways: Sequence[str]
             ) -> dict[str, tuple[Times, dict[str, float]]]:
    """These ways, with a thread of their own: {way: (times, CPU)}."""
    self.server.observers.clear()
    self.server.close = lambda: None  # the service goes, this one stays
    metrics = Gauges('m')
    service = Service(lambda _: self.server, self.limits, metrics)
    http = socket_server.Server(routes.make_app(service, metrics, 'm'), service)
    bound = socket.create_server(('127.0.0.1', 0))
    thread = threading.Thread(target=lambda: asyncio.run(http.serve([bound])))
    thread.start()
    try:
      while service.status == 'starting' or not http.started:
        time.sleep(0.01)
      answers, addresses = {}, {'HTTP': bound.getsockname()}
      bare = asyncio.run_coroutine_threadsafe(self._bare(service),
                                              http.loop).result()
      addresses['socket'] = bare.sockets[0].getsockname()
      for way in ways:
        before = _cpu_s(thread), _cpu_s(self.server.thread)
        client_s = None
        if way == 'service':
          times = asyncio.run_coroutine_threadsafe(
              self._submit(service), http.loop).result()
        else:
          times, client_s = self._ask(client, addresses[way])
        cpu_s = {'event loop': _cpu_s(thread) - before[0],
                 'orchestrator': _cpu_s(self.server.thread) - before[1]}
        answers[way] = times, cpu_s | ({'client': client_s} if client_s else {})
      http.loop.call_soon_threadsafe(bare.close)
      return answers
    finally:
      http.should_exit = True
      thread.join()
      del self.server.close


def _cpu_s(thread):
  return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def measures(times: Times, tokens: int) -> tuple[float, float]:
  """(mean TTFT, mean TPOT), seconds.

  TPOT is from the first to the last token, however many came together.

  Raises:
    InputError: an answer is missing.
  """
  require(all(len(row) > 2 for row in times), 'answers',
          [len(row) - 1 for row in times], f'{tokens} tokens each')
  return (statistics.fmean(row[1] - row[0] for row in times),
          statistics.fmean((row[-1] - row[1]) / (tokens - 1) for row in times))


def rounds(bench: Bench, count: int, client: subprocess.Popen[str]
           ) -> Iterator[dict[str, Cost]]:
  """Yields {way: Cost} a round, in changing order."""
  for i in range(count):
    answers = {}
    for alone in ((True, False) if i % 2 else (False, True)):
      answers |= ({WAYS[0]: bench.in_process()} if alone else bench.served(
          client, WAYS[:0:-1] if i % 2 else WAYS[1:]))
    yield {way: Cost(*measures(times, bench.tokens), cpu_s)
           for way, (times, cpu_s) in answers.items()}


def _spread(values: Sequence[float], scale: float, unit: str) -> str:
  mid = statistics.median(values)
  return (f'{scale * mid:+.2f} {unit} ({scale * min(values):+.2f}, '
          f'{scale * max(values):+.2f})')


def table(rounds: Sequence[dict[str, Cost]], streams: int, tokens: int
          ) -> tuple[Table, dict[str, float]]:
  """(a rich Table, {'tpot_share', 'ttft_s'} that HTTP adds) of the rounds."""
  made = Table(title=f'{streams} streams of {tokens} tokens, {len(rounds)} '
               'rounds: median (least, most)', title_justify='left')
  for name in ('', *WAYS):
    made.add_column(name, justify='right' if name else 'left')
  ttft_s = {way: [costs[way].ttft_s - costs[WAYS[0]].ttft_s
                  for costs in rounds] for way in WAYS}
  share = {way: [costs[way].tpot_s / costs[WAYS[0]].tpot_s - 1
                 for costs in rounds] for way in WAYS}
  for name, field, added, scale, unit in (
      ('TTFT ms', 'ttft_s', ttft_s, 1e3, 'ms'),
      ('TPOT ms', 'tpot_s', share, 1e2, '%')):
    made.add_row(name, *(format(1e3 * statistics.median(
        getattr(costs[way], field) for costs in rounds), '.2f')
                         for way in WAYS))
    made.add_row('  added', '', *(_spread(added[way], scale, unit)
                                  for way in WAYS[1:]))
  for who in ('orchestrator', 'event loop', 'client'):
    made.add_row(f'CPU us a token, {who}', *(
        '-' if who not in rounds[0][way].cpu_s else format(
            1e6 * statistics.median(costs[way].cpu_s[who] for costs in rounds)
            / (streams * tokens), '.0f') for way in WAYS))
  return made, {'ttft_s': statistics.median(ttft_s['HTTP']),
                'tpot_share': statistics.median(share['HTTP']),
                'socket_share': statistics.median(share['socket'])}


def run(options: Any, console: Console) -> int:
  """Measures and prints; returns the exit code."""
  config = api.load(options.config, [
      f'engine.max_seqs={options.streams}', *options.set])
  cli.prepare(config.num_devices, tp=config.tp)
  model = dsjax.load(config.model, config.engine.dtype)
  server = dsjax.serve(model, config.placements[0], config.engine,
                       keep_events=1)
  tokenizer: Any = model.tokenizer  # the demo's model has one
  prompts: list[Any] = list(workload.read_prompts(config.workload.prompts))
  texts = itertools.cycle(p.text or p.messages[-1]['content']
                          for p in prompts)
  bench = Bench(server, [tokenizer.encode(t) for t in
                         itertools.islice(texts, options.streams)],
                options.tokens, options.gap, config.limits)
  measured = []

  def measure(client, bar):
    task = bar.add_task('rounds', total=options.rounds)
    for costs in rounds(bench, options.rounds, client):
      measured.append(costs)
      bar.advance(task)

  with subprocess.Popen(
      [sys.executable, pathlib.Path(__file__).with_name('sse_client.py')],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      start_new_session=True) as client:  # Ctrl-C is for this process alone
    with Progress(console=console, transient=True) as bar:
      stopped = kept.until_stopped(measure, client, bar)
    client.kill()
  if not measured:
    console.print('Stopped before the first round ended.')
    return 130
  made, added = table(measured, options.streams, options.tokens)
  console.print(made)
  console.print(f'HTTP adds {1e2 * added["tpot_share"]:.2f} % to TPOT (aim: '
                f'below 3) and {1e3 * added["ttft_s"]:.2f} ms to TTFT (aim: '
                'below 5). A bare socket adds '
                f'{1e2 * added["socket_share"]:.2f} %.', soft_wrap=True)
  return 130 if stopped else 0


if __name__ == '__main__':
  cli.main(run, FLAGS, api.Api())
