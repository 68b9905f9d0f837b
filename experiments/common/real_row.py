"""`experiments.policies --real`: policies on this machine's own devices.

  python -m experiments.policies --real --model=tiny --instances=2 --rate=8

The same requests, once under each policy with its first setting, on the real
engine: flexible instances of one CPU device each. Tokens are counted and
compared, as no policy may change one. Seconds are of this machine, and where
other programs share it, of them too. Policies that predict want --latency=FILE,
which experiments.measure wrote of it.

It prints a line a policy and writes real.csv and real.json. --minutes is looked
at between two policies, and Ctrl-C keeps those that were served.
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import dsjax
from dsjax import workload
from dsjax.analysis import metrics
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request
from dsjax.simulation import profiles
from experiments.common import cli, policies, provenance, terminal

# Small, as every shape is compiled before the first request.
MOST_PREFILL_TOKENS, MAX_SEQS, PREFILL_SEQS = 256, 4, 2


class Row(NamedTuple):
  """A line of real.csv. tokens: generated. equal: every answer is token for
  token that of the first policy. Times in seconds on this machine."""

  policy: str
  requests: int
  tokens: int
  equal: bool
  attained: float
  low: float
  high: float
  ttft_p50_s: float
  ttft_p90_s: float
  tpot_p50_s: float
  tpot_p90_s: float
  goodput_per_device: float


def requests_of(options: Any, model: Model, lengths: str) -> list[Request]:
  """Requests of these lengths, in the model's vocabulary, each cut to half its
  context a side."""
  source = workload.source(lengths, options.seed, options.process)
  if options.rate is None:
    require(workload.wave_of(options.process), '--rate', None,
            'requests a second, with --real')
  times = [r.arrival_s for r in source(options.rate, options.requests)]
  half = model.config.max_len // 2
  return workload.from_lengths(
      source.entries_at(times), len(times), times, model.config.vocab_size,
      options.seed, half, half, in_order=True)[0]


def serve(options: Any, model: Model, text: str, requests: list[Request],
          known: dict[int, tuple[int, ...]]) -> Row:
  """A Row; known: answers of the first policy, which are filled in by it."""
  slo = Slo(options.ttft_s, options.tpot_s)
  placement = Placement(flexible=[Plan()] * options.instances)
  latency = options.latency if profiles.is_file(options.latency) else None
  longest = max(len(r.prompt) + (r.sampling.max_tokens or 0)
                for r in requests)
  max_len = max(16, 1 << (longest - 1).bit_length())
  config = EngineConfig(
      max_len=max_len, max_seqs=MAX_SEQS, prefill_seqs=PREFILL_SEQS,
      prefill_tokens=min(max_len, MOST_PREFILL_TOKENS), prefix_cache=False)
  with dsjax.serve(model, placement, config, latency=latency,
                   policy=policies.load(text, slo)) as server:
    server.run(requests)
    answers = {r.id: tuple(server.output(r.id).tokens)
               for r in server.records if r.status in ('stop', 'length')}
  first = known or answers
  known.update(first)
  summary = metrics.summarize(server.records, slo, options.instances)
  return Row._make((
      text, len(server.records), sum(map(len, answers.values())),
      all(answers[id] == first[id] for id in answers.keys() & first),
      *summary.attainment, *summary.ttft_s[:2], *summary.tpot_s[:2],
      summary.goodput_per_s_device))


def table(rows: list[Row]) -> Table:
  """Policies down."""
  out = Table(title='seconds on this machine')
  for name in ('policy', 'requests', 'tokens', 'equal', 'met both [95 %]',
               'TTFT p50 / p90', 'TPOT p50 / p90', 'per device'):
    out.add_column(name, justify='left' if name == 'policy' else 'right')
  for row in rows:
    out.add_row(
        row.policy, str(row.requests), str(row.tokens),
        'yes' if row.equal else 'NO',
        f'{row.attained:.0%} [{row.low:.0%}, {row.high:.0%}]',
        f'{row.ttft_p50_s:.3f} / {row.ttft_p90_s:.3f}',
        f'{row.tpot_p50_s:.4f} / {row.tpot_p90_s:.4f}',
        f'{row.goodput_per_device:.3g}')
  return out


def run(options: Any, console: Console, texts: list[str],
        asked: Mapping[str, Any], lengths: str) -> int:
  """Serves, shows and writes; texts: a policy each. lengths: of requests, as
  workload.source takes them."""
  cli.prepare(options.instances)
  model = dsjax.load(options.model)
  requests, rows, known = requests_of(options, model, lengths), [], {}
  stopped, end_s = '', time.monotonic() + 60 * options.minutes
  try:
    for text in texts:
      if rows and time.monotonic() > end_s:
        stopped = '--minutes'
        break
      console.print(f'{text}: {len(requests)} requests, which come in '
                    f'{requests[-1].arrival_s:.0f} s', highlight=False)
      rows.append(serve(options, model, text, requests, known))
  except KeyboardInterrupt:
    stopped = 'Ctrl-C'
  console.print(table(rows))
  terminal.stopped(console, stopped)
  out = pathlib.Path(options.out)
  provenance.save_lines(out, 'real', Row, rows, asked, [lengths],
                        key='rows')
  terminal.written(console, out, 'real.csv', 'real.json')
  if stopped == 'Ctrl-C':
    return 130
  return 0 if all(row.equal for row in rows) else 1
