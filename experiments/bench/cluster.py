"""What it costs that instances are processes, beside one process.

  python -m experiments.bench.cluster --model=smollm2-135m-instruct

One run, of which every figure comes:

  messages   CPU microseconds of the server, and of an instance, for a decode
             command of 8 rows of 16 pages and of 256 rows of 64, when each row
             has a new page since the last (and bytes on the wire);
  host       microseconds of the server's loop a step, requests one by one;
  hand-off   GB/s of KV from dispatch to landing, requests one by one, and of a
             bare pull of as many bytes by jax's transfer server;
  copy       milliseconds of a hand-off, and second token: from the first to it,
             which a slower copy makes later by its own time;
  TTFT, TPOT milliseconds, medians of the same requests.

Other programs, and on few cores the server itself, take from both: compare
within a run. Ctrl-C keeps what was measured.
"""

import statistics
import time
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import transfer
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

import dsjax
from dsjax.config.engine import EngineConfig
from dsjax.runtime.cluster import exchange, messages, page_tables
from dsjax.runtime.cluster.channel import LOOPBACK
from dsjax.scheduling.events import Row, RunDecode
from experiments.bench import kept
from experiments.common import cli
from experiments.common import overrides as configs

FLAGS = {
    'model': cli.Flag('smollm2-135m-instruct', 'See dsjax.load.'),
    'tokens': cli.Flag(512, 'Of a prompt.', low=1),
    'outputs': cli.Flag(16, 'Tokens of an answer.', low=3),
    'requests': cli.Flag(8, 'How many.', low=1),
    'set': (), 'out': cli.Flag(None, 'JSON file for the numbers.', str),
}
CONFIG = EngineConfig(max_len=1024, max_seqs=2, prefill_seqs=1,
                      prefix_cache=False)
SHAPES = ((8, 16), (256, 64))  # rows, pages of each
ROUNDS = 200


def message_cost(rows: int, pages: int) -> tuple[float, ...]:
  """(microseconds at the server, at an instance, bytes) of a decode command
  for each of whose rows a page is new."""
  took, size = {'server': [], 'instance': []}, 0
  before, command = (RunDecode(0, turn, turn, 1, tuple(
      Row(id, 1000, 2000, tuple(range(id * pages, (id + 1) * pages - 1 + turn)))
      for id in range(rows))) for turn in (0, 1))
  for _ in range(ROUNDS):
    here, there = page_tables.PageTables(), page_tables.PageTables()
    there.unpack(here.pack(before))
    began = time.thread_time()  # whatever else the cores do
    data = messages.dump(1, here.pack(command))
    sent = time.thread_time()
    there.unpack(messages.load(data)[1])
    took['server'].append(sent - began)
    took['instance'].append(time.thread_time() - sent)
    size = len(data)
  return (*(statistics.median(s) * 1e6 for s in took.values()), size)


def bare_gb_per_s(num_bytes: int, arrays: int, rounds: int) -> float:
  """GB/s of a pull of so many bytes from this process to itself."""
  device = jax.local_devices(backend='cpu')[0]
  server = transfer.start_transfer_server(
      device.client, f'{LOOPBACK}:0', [f'{LOOPBACK}:0'],
      max_num_parallel_copies=exchange.COPIES,
      transfer_size=exchange.COPY_BYTES)
  connection = server.connect(server.address())
  size = max(1, num_bytes // arrays // 4)
  like = [jax.ShapeDtypeStruct((size,), np.float32, sharding=(
      SingleDeviceSharding(device)))] * arrays
  took = []
  for uuid in range(1, rounds + 1):
    server.await_pull(uuid, [jax.device_put(np.zeros(size, np.float32), device)
                             for _ in range(arrays)])
    began = time.perf_counter()
    jax.block_until_ready(connection.pull(uuid, like))
    took.append(time.perf_counter() - began)
  return size * 4 * arrays / statistics.median(took) / 1e9


def serve(model: dsjax.Model, config: EngineConfig,
          options: types.SimpleNamespace, cluster: str | None
          ) -> dict[str, float]:
  """Serves requests one by one: figures by name."""
  rng = np.random.default_rng(0)
  prompts = rng.integers(3, model.config.vocab_size - 1,
                         (options.requests + 1, options.tokens)).tolist()
  with dsjax.serve(model, 'prefill=1x1,decode=1x1', config, cluster=cluster
                   ) as server:
    server.generate(prompts.pop(), max_tokens=options.outputs, ignore_eos=True)
    before = (server.host_s, server.steps, server.copied_bytes, server.copy_s)
    records = [server.generate(prompt, max_tokens=options.outputs,
                               ignore_eos=True).record for prompt in prompts]
    host_s, steps, copied_bytes, copy_s = (now - then for now, then in zip(
        (server.host_s, server.steps, server.copied_bytes, server.copy_s),
        before, strict=True))
  return {'host_us_per_step': host_s / steps * 1e6,
          'handoff_gb_per_s': copied_bytes / copy_s / 1e9,
          'handoff_bytes': copied_bytes / len(prompts),
          'copy_ms': copy_s / len(prompts) * 1e3,
          'second_token_ms': statistics.median(
              r.token_s[1] - r.token_s[0] for r in records) * 1e3,
          'ttft_ms': statistics.median(r.ttft_s or 0.0 for r in records) * 1e3,
          'tpot_ms': statistics.median(r.tpot_s or 0.0 for r in records) * 1e3}


def measure(options: types.SimpleNamespace, config: EngineConfig,
            results: dict[str, Any]) -> None:
  """Adds to `results` as they come: messages, served, bare_gb_per_s."""
  model = dsjax.load(options.model, config.dtype)
  for rows, pages in SHAPES:
    results['messages'][f'{rows}x{pages}'] = message_cost(rows, pages)
  for name, cluster in (('one process', None), ('processes', 'local')):
    results['served'][name] = serve(model, config, options, cluster)
  results['bare_gb_per_s'] = bare_gb_per_s(
      int(results['served']['processes']['handoff_bytes']),
      2 * model.config.num_layers, options.requests)


def show(console: Console, results: Mapping[str, Any]) -> None:
  """Prints what was measured."""
  say, served = cli.says(console), results['served']
  for shape, (here, there, size) in results['messages'].items():
    say(f'A decode command of {shape} pages: {here:.0f} us at the server, '
        f'{there:.0f} us at an instance, {size:,} bytes')
  if not served:
    return
  table, bare = Table('', *served, 'bare pull'), results['bare_gb_per_s']
  for name in next(iter(served.values())):
    table.add_row(name, *(f'{figures[name]:,.2f}'
                          for figures in served.values()),
                  f'{bare:.2f}' if bare and name == 'handoff_gb_per_s' else '')
  console.print(table)


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Measures, prints a table; returns the exit code."""
  config = configs.override(CONFIG, options.set)
  cli.prepare(2)
  results = {'messages': {}, 'served': {}, 'bare_gb_per_s': None}
  stopped = kept.until_stopped(measure, options, config, results)
  show(console, results)
  return kept.end(console, results, stopped, options, FLAGS)


if __name__ == '__main__':
  cli.main(run, FLAGS, CONFIG)
