"""What streamed KV is worth: how soon the second token of a long prompt comes.

  python -m experiments.stream
  python -m experiments.stream --across --prompt_lens=8192 --rate=1
  python -m experiments.stream --real

At each of --prompt_lens the same prompts are served with whole hand-offs
and with streamed KV (engine.stream_kv). Without --rate one comes when the one
before has ended, so nothing but its own copy delays a second token; with
--rate so many come a second. Simulated on --placement; with --real a model
serves them on two devices of this machine, in turn, one after another.

It prints a table and writes stream.csv: tokens, stream, gap_s (first to second
token: median) and gap_p99_s, ttft_s, tpot_s (medians), last_s (predicted: the
copy of the last chunk, or of a whole prompt, and a decode step of one row, with
the host's time of both; 0 with --real), moved (tokens whose KV was moved, of
prompt tokens). Exit codes: 0; 2 for bad input; 130 by Ctrl-C.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

import dsjax
from dsjax.analysis.record import Record
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement import api
from dsjax.simulation import simulator
from experiments.common import cli, provenance, terminal

# What is not given: simulated, and with --real, which takes a minute or two.
SIMULATED = {'prompt_lens': '128,2048,8192', 'requests': 40,
             'model': 'llama-3-8b'}
REAL = {'prompt_lens': '96,384', 'requests': 6,
        'model': 'smollm2-135m-instruct'}
FLAGS = {
    'prompt_lens': cli.Flag(None, 'Tokens of a prompt, with commas between: '
                            f'{SIMULATED["prompt_lens"]}; with --real '
                            f'{REAL["prompt_lens"]}.', str),
    'requests': cli.Flag(None, f'Of each length: {SIMULATED["requests"]}; with '
                         f'--real {REAL["requests"]}.', int, low=1),
    'rate': cli.Flag(0.0, 'A second; 0: one after another.', low=0),
    'answer': cli.Flag(16, 'Tokens.', low=2),
    'model': cli.Flag(None, 'A name in dsjax.config.zoo; with --real, what '
                      f'dsjax.load takes: {SIMULATED["model"]}; '
                      f'{REAL["model"]}.', str),
    'latency': 'tables:h100-80g',
    'placement': 'prefill=1x1,decode=1x1',
    'across': cli.Flag(False, 'KV moves between nodes, not inside one.'),
    'prefill_tokens': cli.Flag(128, 'Of a chunk, with --real.', low=1),
    'seed': 0,
    'real': cli.Flag(False, 'Serve on this machine.'),
    'out': None,
}


class Line(NamedTuple):
  """A line of stream.csv."""

  tokens: int
  stream: bool
  gap_s: float
  gap_p99_s: float
  ttft_s: float
  tpot_s: float
  last_s: float
  moved: float


def line(tokens: int, stream: bool, records: Iterable[Record], last_s: float
         ) -> Line:
  """What the records of a run say."""
  served = [r for r in records if len(r.token_s) > 1]
  gaps_s = [r.itl_s[0] for r in served]
  moved = sum(r.migrated_tokens for r in served)
  gap_s, gap_p99_s = map(float, np.quantile(gaps_s, (0.5, 0.99)))
  return Line(
      tokens, stream, gap_s, gap_p99_s,
      float(np.median([r.ttft_s or 0.0 for r in served])),
      float(np.median([r.tpot_s or 0.0 for r in served])), last_s,
      moved / (tokens * len(served)))


def workload(options: Any, tokens: int) -> list[Request]:
  """Prompts of one length."""
  sampling = Sampling(max_tokens=options.answer, ignore_eos=True)
  if options.rate:
    gaps = np.random.default_rng(options.seed).exponential(
        1 / options.rate, options.requests)
    return [Request(n, arrival_s, range(tokens), sampling)
            for n, arrival_s in enumerate(np.cumsum(gaps).tolist())]
  return [Request(n, 0.0, range(tokens), sampling, after=n - 1 if n else None)
          for n in range(options.requests)]


def simulate(options: Any, tokens: int, stream: bool) -> Line:
  """One run of the prompts of a length."""
  problem = api.make_problem(
      options.model, Slo(1.0, 1.0), [(1, 1)], options.latency,
      max_len=tokens + options.answer, stream_kv=stream)
  config, latencies, link = api.build(
      problem, Placement.parse(options.placement, '--placement'),
      aligned=not options.across)
  apart = link and not all(inst.decodes for inst in config.instances)
  require(apart, '--placement', options.placement,
          'of prefill and decode instances')
  records = simulator.simulate(
      config, workload(options, tokens), latencies, link).records
  chunk = config.instances[0].prefill_tokens
  last = (tokens - 1) % chunk + 1 if stream else tokens
  prefill, decode = latencies[0], latencies[-1]
  return line(tokens, stream, records, prefill.host_s + link.migrate_s(last)
              + decode.host_s + decode.decode_s(1, tokens + 1))


def serve(options: Any, lengths: Sequence[int],
          tell: Callable[..., object]) -> Iterator[Line]:
  """The prompts of each length on a served model, with streams and without
  in turn.

  tell: called with a line of progress.
  """
  model = dsjax.load(options.model)
  draw = np.random.default_rng(options.seed)
  for tokens in lengths:
    tell(f'{tokens} tokens: compiling two servers', begins=True)
    config = EngineConfig(
        max_len=tokens + options.answer, max_seqs=2,
        prefill_tokens=min(options.prefill_tokens, tokens),
        prefix_cache=False)
    with dsjax.serve(model, options.placement, config) as whole, dsjax.serve(
        model, options.placement,
        dataclasses.replace(config, stream_kv=True)) as streamed:
      for n in range(options.requests + 1):  # the first one warms up
        tell(f'{tokens} tokens: {n} of {options.requests + 1} prompts served, '
             'with streams and without', begins=not n)
        prompt = draw.integers(model.config.vocab_size, size=tokens).tolist()
        answers = [server.generate(prompt, max_tokens=options.answer,
                                   ignore_eos=True).tokens
                   for server in (whole, streamed)]
        if answers[0] != answers[1]:
          raise AssertionError(f'other tokens with streams: {answers}')
      for stream, server in ((False, whole), (True, streamed)):
        yield line(tokens, stream, server.records[1:], 0.0)


def table(lines: Iterable[Line]) -> Table:
  """A line a run."""
  out = Table(title='First to second token, TTFT, TPOT in ms; KV moved, of the '
              'prompt')
  for name in ('tokens', 'stream', 'gap', 'p99', 'last copy + step', 'TTFT',
               'TPOT', 'moved'):
    out.add_column(name, justify='right')
  for told in lines:
    out.add_row(
        f'{told.tokens:,}', 'on' if told.stream else 'off',
        f'{1e3 * told.gap_s:.1f}', f'{1e3 * told.gap_p99_s:.1f}',
        f'{1e3 * told.last_s:.1f}' if told.last_s else '-',
        f'{1e3 * told.ttft_s:.0f}', f'{1e3 * told.tpot_s:.1f}',
        f'{told.moved:.0%}')
  return out


def run(options: Any, console: Any) -> int:
  """Runs, shows and writes."""
  for name, value in (REAL if options.real else SIMULATED).items():
    if getattr(options, name) is None:
      setattr(options, name, value)
  given = cli.numbers('--prompt_lens', options.prompt_lens)
  lengths = list(map(int, given))
  require(lengths == given, '--prompt_lens', options.prompt_lens,
          'whole numbers')
  lines: list[Line] = []
  tell, stopped = terminal.now_and_then(console), False
  try:
    if options.real:
      require(not options.rate, '--rate', options.rate,
              '0 with --real: one prompt comes after another')
      cli.prepare(2)
      for told in serve(options, lengths, tell):
        lines.append(told)
    else:
      for tokens in lengths:
        for stream in (False, True):
          lines.append(simulate(options, tokens, stream))
          tell(f'{len(lines)} of {2 * len(lengths)} runs done')
  except KeyboardInterrupt:
    stopped = True
  console.print(table(lines))
  if options.out:
    provenance.save_lines(pathlib.Path(options.out), 'stream', Line, lines,
                          cli.asked(options, FLAGS), [options.latency])
    terminal.written(console, options.out, 'stream.csv', 'stream.json')
  return 130 if stopped else 0


if __name__ == '__main__':
  cli.main(run, FLAGS)
