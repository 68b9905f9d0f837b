"""The simulator beside NVIDIA's AISimulate, on the requests of one file.

  make aisimulate
  python -m experiments.bench.simulator --only=1P+1D \\
    --aisimulate=.venv-aisimulate/bin/python

Llama 3.1 8B on two H100, prefill and decode apart; the requests of the case
1P+1D. Both read measured tables of that GPU (ours through a fit of four
terms). AISimulate starts for seconds, so its rate is of the requests beyond
the first tenth: of two runs, the difference. Both end with percentiles only.
"""

import json
import pathlib
import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from dsjax.analysis import metrics
from dsjax.config import zoo
from dsjax.config.checks import InputError, parse_json, require
from dsjax.config.placement import Plan, Slo
from dsjax.config.request import Request
from dsjax.scheduling import scheduler
from dsjax.simulation import latency, profiles, simulator

BLOCK = 512  # tokens whose hash the trace tells; all are different
CONFIG = {
    'traffic': {'source': {'type': 'trace', 'format': 'mooncake',
                           'block_size': BLOCK},
                'load': {'type': 'trace_timestamps'}},
    'engine': {
        'mode': 'disaggregated', 'model': 'meta-llama/Meta-Llama-3.1-8B',
        'hardware': 'h100_sxm', 'backend': 'vllm', 'context_length': 8192,
        'workers': {
            'prefill': {'scheduler': {'max_batched_tokens': 2048,
                                      'max_sequences': 16}},
            'decode': {'scheduler': {'max_sequences': 256}}}}}


def lines(sent: Sequence[Request]) -> list[str]:
  """The requests as lines of Mooncake's format."""
  out, blocks = [], 0
  for request in sent:
    more = -(-len(request.prompt) // BLOCK)
    out.append(json.dumps({
        'timestamp': round(1e3 * request.arrival_s),
        'input_length': len(request.prompt),
        'output_length': request.sampling.max_tokens,
        'hash_ids': list(range(blocks, blocks + more))}))
    blocks += more
  return out


def check(python: str, sent: int) -> None:
  """Raises InputError where a Python lacks it, or so few requests are sent
  that no tenth can be told from all."""
  try:
    has_it = subprocess.run(
        [python, '-c', 'import importlib.util as u, sys; '
         'sys.exit(u.find_spec("aisimulate") is None)'], check=False,
        stderr=subprocess.DEVNULL).returncode == 0
  except OSError:
    has_it = False
  require(has_it, '--aisimulate', python,
          'a Python that has AISimulate: make aisimulate')
  require(sent >= 10, '--requests', sent, '10 or more with --aisimulate')


def theirs(python: str, sent: Sequence[Request]) -> tuple[float, Any]:
  """CPU seconds of a run of AISimulate and its summary.

  Raises:
    InputError: it failed, or answered something else.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / 'trace.jsonl').write_text('\n'.join(lines(sent)))
    config = json.loads(json.dumps(CONFIG))
    config['traffic']['source']['paths'] = [str(folder / 'trace.jsonl')]
    (folder / 'config.yaml').write_text(json.dumps(config))  # which YAML reads
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run(
        [python, '-m', 'aisimulate', 'predict', '--config',
         str(folder / 'config.yaml'), '--format', 'json', '--output-dir',
         str(folder / 'out')], check=False, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
  took_s = (after.ru_utime + after.ru_stime - before.ru_utime
            - before.ru_stime)
  if answer.returncode:
    last = (answer.stderr.strip().splitlines() or ['no message'])[-1]
    raise InputError(f'--aisimulate={python!r}: ended with code '
                     f'{answer.returncode}: {last}')
  return took_s, parse_json('AISimulate', answer.stdout)


def ours(config: scheduler.Config, sent: Sequence[Request]
         ) -> tuple[float, metrics.Summary]:
  """CPU seconds of a run of ours and its summary."""
  seconds = profiles.named('tables:h100-80g', zoo.config('llama-3.1-8b'))(
      Plan(1, 1))
  assert seconds  # in the tables
  start_s = time.process_time()
  link = latency.Link(2e-4, 25e9, 131_072)
  records = simulator.simulate(config, sent, seconds, link).records
  summary = metrics.summarize(records, Slo(0.25, 0.1), 1)
  return time.process_time() - start_s, summary


def compare(python: str, config: scheduler.Config, sent: Sequence[Request]
            ) -> str:
  """Requests a CPU second of both, in words."""
  few = len(sent) // 10
  first_s, _ = theirs(python, sent[:few])
  took_s, told = theirs(python, sent)
  our_s, summary = ours(config, sent)
  if took_s <= first_s:
    return (f'AISimulate took {took_s:.1f} s for {len(sent)} requests and '
            f'{first_s:.1f} for {few}: more --requests tell its rate')
  rate, our_rate = (len(sent) - few) / (took_s - first_s), len(sent) / our_s
  return (f'AISimulate {rate:.0f} requests a CPU second beyond its start '
          f'({took_s:.1f} s in all, {first_s:.1f} for {few}), ours '
          f'{our_rate:.0f}: {our_rate / rate:.1f} times. TTFT and TPOT p50, '
          f'ms: {told["median_ttft_ms"]:.1f} and {told["median_tpot_ms"]:.2f}, '
          f'ours {1e3 * summary.ttft_s[0]:.1f} and '
          f'{1e3 * summary.tpot_s[0]:.2f}')
