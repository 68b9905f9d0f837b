r"""Sends a workload to any OpenAI-compatible server and reports latencies.

  python -m experiments.load --url=http://localhost:8000 --rate=2 \
    --requests=60 --ttft_s=1.5 --tpot_s=0.15 --out=out/load

Open loop: requests leave at their arrival times whatever has been answered,
and TTFT counts from that time, so a client that falls behind makes the server
look worse, not better (how far it fell behind is printed). Prompts are those
of --prompts (as chat turns, or with --kind=completion as texts), or, with
--lengths, ids without meaning of a trace's lengths. Errors count as misses:
attainment and goodput are over all requests sent. A server that says 429 has
rejected a request, one that hangs up has failed it.

With --turns=4 each arrival begins a chat of four turns: the next prompt follows
the answer of the last, with all that was said before it, after --think_s
seconds on average. A chat ends early where a turn is not answered. Tokens that
the server says were cached are in the records.

Token times are those of the chunks; where usage says that there were more
tokens than chunks, each chunk stands for its share of them (ITL is then not to
be read; --extra='{"stream_options": {"include_usage": true,
"continuous_usage_stats": true}}' counts exactly where a server can). Prints
the tables of experiments.serve and writes records.jsonl, report.png and
summary.json.

Exit codes: 0; 1 if no request was answered; 2 for bad input; 130 when stopped
by Ctrl-C, which keeps what there is.
"""

import asyncio
import collections
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group

from configs.serve import PROMPTS
from dsjax import workload
from dsjax.analysis import metrics
from dsjax.analysis.record import Record
from dsjax.config.checks import InputError, require
from dsjax.config.placement import Slo
from experiments.common import cli, provenance, report, terminal
from experiments.common.extras import needs

with needs('serve'):
  import httpx

FLAGS = {
    'url': cli.Flag('http://127.0.0.1:8000', 'Server.'),
    'model': cli.Flag(None, 'What the server calls it; its first, if not '
                      'given.', str),
    'kind': cli.Flag('chat', 'Of requests.', str,
                     choices=('chat', 'completion')),
    'prompts': cli.Flag(str(PROMPTS), 'A file of prompts.'),
    'turns': cli.Flag(1, 'Of each chat.', low=1, high=1000),
    'think_s': cli.Flag(5.0, 'Mean seconds from an answer to the next turn.',
                        low=0.0),
    'lengths': None,
    'vocab': cli.Flag(1000, 'Ids of --lengths are below it.', low=1),
    'process': 'poisson',
    'rate': cli.Flag(None, 'Requests a second; default: that of a sine or a '
                     'step, else 1.', float),
    'cv': 1.0, 'requests': 24,
    'max_tokens': cli.Flag(64, 'Of an answer.', low=1),
    'seed': 0, 'ttft_s': 2.0, 'tpot_s': 0.15,
    'devices': cli.Flag(1, 'That the server uses.', low=1),
    'timeout': cli.Flag(600.0, 'Seconds without a byte.', low=0.1),
    'extra': cli.Flag('{}', 'JSON added to each body.'),
    'out': None,
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A request to send. body: its JSON. prompt_len: tokens, 0 if unknown.

  turns: that follow its answer, in order; their arrival_s counts from the
  answer before, and their messages come behind all that was said.
  """

  id: int
  arrival_s: float
  path: str
  body: dict[str, Any]
  prompt_len: int
  turns: tuple['Job', ...] = ()


def jobs(kind: str, model: str, arrivals_s: Sequence[float],
         prompts: Sequence[workload.Prompt] = (),
         entries: Sequence[workload.Entry] = (), max_tokens: int | None = 64,
         seed: int = 0, vocab: int = 1000,
         extra: dict[str, Any] | None = None) -> list[Job]:
  """A Job for each arrival time.

  Args:
    kind: 'chat' or 'completion'.
    prompts: workload.Prompts, gone round again when there are more arrivals.
    entries: lengths of each instead: ids below `vocab`, drawn by `seed` (in a
      chat: as many short words), answers of exactly the output length.
    extra: fields added to every body.

  Raises:
    InputError.
  """
  require(kind in ('chat', 'completion'), '--kind', kind,
          "'chat' or 'completion'")
  made, lengths = [], None
  if entries:
    lengths, _ = workload.from_lengths(entries, len(arrivals_s), arrivals_s,
                                       vocab, seed, in_order=True)
  for i, arrival_s in enumerate(arrivals_s):
    body = {'model': model, 'stream': True, 'stream_options': {
        'include_usage': True}, 'max_tokens': max_tokens, 'seed': seed + i}
    if lengths:
      ids, size = lengths[i].prompt, len(lengths[i].prompt)
      body |= {'max_tokens': lengths[i].sampling.max_tokens,
               'ignore_eos': True}
      text = ' '.join('a' if t % 2 else 'b' for t in ids)
      messages = [{'role': 'user', 'content': text}]
      prompt = list(ids)
    else:
      given, size = prompts[i % len(prompts)], 0
      messages = list(given.messages
                      or [{'role': 'user', 'content': given.text}])
      prompt = given.text or '\n'.join(m['content'] for m in messages)
      body['max_tokens'] = given.max_tokens or max_tokens
    body |= {'messages': messages} if kind == 'chat' else {'prompt': prompt}
    path = '/v1/chat/completions' if kind == 'chat' else '/v1/completions'
    made.append(Job(i, arrival_s, path, body | (extra or {}), size))
  return made


def chats(single: Sequence[Job], turns: int, think_s: float, seed: int = 0
          ) -> list[Job]:
  """Jobs of chats: so many of these, in their order, make one.

  The first arrives at its time, the others so long after the answer before as
  a client thinks, exponential with mean think_s.
  """
  pauses_s = np.random.default_rng([seed, 11]).exponential(
      think_s, len(single))
  return [dataclasses.replace(single[first], turns=tuple(
      [dataclasses.replace(job, arrival_s=float(pauses_s[job.id]))
       for job in single[first + 1:first + turns]]))
          for first in range(0, len(single), turns)]


# --- sending ----------------------------------------------------------------


def client(url: str, key: str | None, timeout_s: float
           ) -> httpx.AsyncClient:
  """A client of a server that opens as many connections as it is asked to."""
  return httpx.AsyncClient(
      base_url=_base(url), headers=_headers(key), timeout=timeout_s,
      limits=httpx.Limits(max_connections=None,
                          max_keepalive_connections=None))


def _base(url):
  return url.removesuffix('/').removesuffix('/v1')


def _headers(key):
  return {'Authorization': f'Bearer {key}'} if key else {}


async def events(response: httpx.Response) -> AsyncIterator[Any]:
  """Yields the JSON of a stream's events, up to [DONE]."""
  async for line in response.aiter_lines():
    if line.startswith('data:'):
      data = line[5:].strip()
      if data == '[DONE]':
        return
      yield json.loads(data)


def spread(times: list[float], count: int) -> list[float]:
  """Token times: `count` tokens over the chunks that came at these times.

  0: as many as chunks. Where there are more chunks, the last had no token:
  they told how it ended.
  """
  if not times or count <= len(times):
    return times[:count or None]
  return [times[i * len(times) // count] for i in range(count)]


class Load:
  """One run. records: a Record a job that was due, in seconds since
  `start_s`; lag_s: how late each left; retry_after: {id: that header of a
  refusal}."""

  def __init__(self, client: httpx.AsyncClient) -> None:
    self.client, self.start_s = client, time.perf_counter()
    self.records: list[Record] = []
    self.lag_s: list[float] = []
    self.retry_after: dict[int, str | None] = {}
    self.answers: dict[int, str] = {}  # until they are taken

  @property
  def now(self) -> float:
    return time.perf_counter() - self.start_s

  async def run(self, todo: Sequence[Job],
                on_sent: Callable[['Load'], object] = lambda _: None) -> None:
    """Sends every job at its time and awaits all answers."""
    async with asyncio.TaskGroup() as group:
      for job in sorted(todo, key=lambda job: job.arrival_s):
        await asyncio.sleep(max(0.0, job.arrival_s - self.now))
        self.lag_s.append(self.now - job.arrival_s)
        group.create_task(self.play(job))
        on_sent(self)

  async def play(self, job: Job) -> None:
    """Sends a job now, then each turn after the answer of the last."""
    record = await self.send(job)
    answer = self.answers.pop(job.id, '')
    said = job.body.get('messages', [])
    for turn in job.turns:
      if record.status not in ('stop', 'length'):
        return
      await asyncio.sleep(turn.arrival_s)
      said = [*said, {'role': 'assistant', 'content': answer},
              *turn.body['messages']]
      record = await self.send(dataclasses.replace(
          turn, arrival_s=self.now, body=turn.body | {'messages': said}))
      answer = self.answers.pop(turn.id, '')

  async def send(self, job: Job) -> Record:
    """Sends one job now; its record, in which errors end too."""
    record = Record(job.id, job.arrival_s, job.prompt_len,
                    job.body['max_tokens'])
    self.records.append(record)
    try:
      async with self.client.stream('POST', job.path, json=job.body) as answer:
        if answer.status_code != 200:
          await answer.aread()
          record.status = 'rejected'
          record.reason = f'HTTP {answer.status_code}'
          self.retry_after[job.id] = answer.headers.get('Retry-After')
        else:
          await self._read(answer, record)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError,
            TypeError, AttributeError) as error:
      record.status, record.reason = 'failed', type(error).__name__
    finally:
      record.finish_s = self.now
    return record

  async def _read(self, answer, record):
    times, count, reason, exact, texts = [], 0, None, [], []
    async for event in events(answer):
      if 'error' in event:
        record.status, record.reason = 'failed', 'error in the stream'
        return
      usage = event.get('usage')
      if usage:
        count = usage['completion_tokens']
        record.prompt_len = usage['prompt_tokens']
        record.cached_tokens = (usage.get('prompt_tokens_details') or {}).get(
            'cached_tokens') or 0
        if event.get('choices'):  # continuous_usage_stats
          exact += [self.now] * (count - len(exact))
      for choice in event.get('choices', ()):
        delta = choice.get('delta') or {}
        text = choice.get('text', delta.get('content'))
        # Many servers name the role, with an empty text, before any token.
        if text is not None and not (not text and 'role' in delta):
          times.append(self.now)
          texts.append(text)
        reason = choice.get('finish_reason') or reason
    record.token_s = exact or spread(times, count)
    self.answers[record.id] = ''.join(texts)
    record.status = reason if reason in ('stop', 'length') else 'failed'
    if record.status == 'failed':
      record.reason = f'ended by {reason or "hanging up"}'


async def send_all(url: str, key: str | None, todo: Sequence[Job],
                   timeout_s: float,
                   on_sent: Callable[[Load], object] = lambda _: None) -> Load:
  """Sends jobs to a server: a Load, which on_sent gets as each one leaves."""
  async with client(url, key, timeout_s) as connections:
    sender = Load(connections)
    await sender.run(todo, on_sent)
  return sender


def _said(answer: httpx.Response) -> str:
  """Why a server says no, in its own words if it has some: one that starts
  tells how far it is."""
  try:
    return answer.json()['error']['message']
  except (ValueError, LookupError, TypeError):
    return f'{answer.status_code} {answer.reason_phrase}'


def find_model(url: str, key: str | None) -> str:
  """The first model that a server lists.

  Raises:
    InputError: no server answers there, or not in OpenAI's way.
  """
  path = _base(url) + '/v1/models'
  try:
    answer = httpx.get(path, headers=_headers(key), timeout=10.0)
    if answer.is_error:
      raise ValueError(_said(answer))
    return answer.json()['data'][0]['id']
  except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError,
          TypeError) as error:
    raise InputError(f'--url={url}: {path} does not list a model: '
                     f'{error}') from None


# --- results ----------------------------------------------------------------


def show(console: Console, load: Load, title: str, options: Any
         ) -> metrics.Summary:
  """Prints the tables of a Load, and writes its files to options.out, if
  any; options: of FLAGS."""
  slo = Slo(options.ttft_s, options.tpot_s)
  summary = metrics.summarize(load.records, slo, options.devices)
  compared = [('server', summary, {})]
  tables = Group(*report.tables(compared).renderables[:2])
  why = collections.Counter(r.reason for r in load.records if r.reason)
  lag = metrics.percentiles(load.lag_s)
  closing = ' '.join(filter(None, (
      'Errors: ' + ', '.join(f'{n} {w}' for w, n in why.most_common()) + '.'
      if why else '', f'Requests left {1e3 * lag[0]:.1f} ms late at p50, '
      f'{1e3 * lag[2]:.1f} at p99.')))
  console.print(title, tables, closing, sep='\n', soft_wrap=True)
  if options.out:
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    report.save_records(out / 'records.jsonl', load.records)
    report.save_figure(out / 'report.png', [('server', load.records)], slo,
                       title)
    provenance.save_json(
        out / 'summary.json',
        dataclasses.asdict(summary) | {'errors': dict(why), 'lag_s': lag},
        cli.asked(options, FLAGS), [options.lengths or options.prompts])
    terminal.written(console, out, 'records.jsonl', 'report.png',
                     'summary.json')
  return summary


# --- command line -----------------------------------------------------------


def run(options: Any, console: Console) -> int:
  """Sends, shows and writes; returns the exit code."""
  Slo(options.ttft_s, options.tpot_s)  # bad ones are said before any is sent
  try:
    extra = json.loads(options.extra)
  except ValueError:
    extra = None
  require(isinstance(extra, dict), '--extra', options.extra, 'a JSON object')
  made = (workload.source(options.lengths, options.seed, options.process,
                          options.cv) if options.lengths else None)
  prompts = () if made else workload.read_prompts(options.prompts)
  rate = options.rate
  if rate is None and not workload.wave_of(options.process):
    rate = 1.0
  require(options.turns == 1 or options.kind == 'chat' and not made,
          '--turns', options.turns, '1 with --lengths or --kind=completion')
  times = workload.arrivals_of(
      options.process, rate, -(-options.requests // options.turns),
      options.seed, options.cv, made.entries if made else ())
  entries = made.entries_at(times) if made else ()
  key = os.environ.get('DSJAX_API_KEY') or os.environ.get('OPENAI_API_KEY')
  model = options.model or find_model(options.url, key)
  if options.turns > 1:
    each = [time_s for time_s in times for _ in range(options.turns)]
    todo = chats(jobs('chat', model, each, prompts, (), options.max_tokens,
                      options.seed, options.vocab, extra), options.turns,
                 options.think_s, options.seed)
  else:
    todo = jobs(options.kind, model, times, prompts, entries,
                options.max_tokens, options.seed, options.vocab, extra)
  title = (f'{model} at {options.url}: {options.requests} {options.kind} '
           f'requests, ' + (f'{options.turns} turns a chat, '
                            if options.turns > 1 else '')
           + f'{options.process}, '
           + (f'{rate:g} a second, ' if rate else '')
           + f'seed {options.seed}')
  load, stopped = None, False
  with console.status('sending') as status:
    def sent(now: Load) -> None:
      nonlocal load
      load = now
      status.update(f'{len(now.lag_s)} sent')
    try:
      asyncio.run(send_all(options.url, key, todo, options.timeout, sent))
    except KeyboardInterrupt:
      stopped = True
  if load is None or not load.records:
    console.print('Stopped before anything was sent: nothing to write.')
    return 130
  summary = show(console, load, title, options)
  answered = summary.counts.keys() & {'stop', 'length'}
  return 130 if stopped else 0 if answered else 1


if __name__ == '__main__':
  cli.main(run, FLAGS)
