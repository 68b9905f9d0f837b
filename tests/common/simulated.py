"""Small simulations: latencies, links, clusters, requests; random ones too."""

import dataclasses
import random

from dsjax.config.engine import InstanceConfig
from dsjax.config.request import Request, Sampling
from dsjax.scheduling import scheduler

PD = ('prefill', 'decode')


@dataclasses.dataclass
class Affine:
  """A latency model: seconds are linear in tokens, rows and context."""

  token_s: float = 0.1
  fixed_s: float = 1.0
  row_s: float = 0.5
  context_s: float = 0.01
  host_s: float = 0.0
  pp: int = 1
  stage_share: tuple = ()

  def prefill_s(self, pieces):
    return sum(self.token_s * (stop - start) for start, stop in pieces)

  def decode_line(self, batch):
    return self.fixed_s + self.row_s * batch, self.context_s

  def decode_s(self, batch, context):
    a, b = self.decode_line(batch)
    return a + b * context

  def mixed_s(self, pieces, batch, context):
    return self.prefill_s(pieces) + self.decode_s(batch, context)


@dataclasses.dataclass
class Link:
  """A link of so many seconds a copy and a token."""

  fixed_s: float = 0.5
  token_s: float = 0.0
  beside: bool = False

  def migrate_s(self, num_tokens):
    return self.fixed_s + self.token_s * num_tokens


def plan(roles, num_pages=64, page_size=4, max_seqs=8, prefill_tokens=32,
         prefill_seqs=4, pp=1, max_len=100, **options):
  return scheduler.Config(tuple(
      InstanceConfig(role, num_pages, page_size, max_seqs,
                          prefill_tokens, prefill_seqs, pp)
      for role in roles), max_len, **options)


def requests(*rows):
  """Requests of (arrival_s, prompt_len, output_len)."""
  return [Request(n, arrival_s, range(prompt), Sampling(max_tokens=output))
          for n, (arrival_s, prompt, output) in enumerate(rows)]


def random_run(seed):
  """A small cluster of any mode and a workload that is hard on its pages."""
  draw = random.Random(seed)
  mode = draw.choice(('disaggregated', 'colocated', 'chunked'))
  if mode == 'disaggregated':
    roles = (['prefill'] * draw.choice((1, 2))
             + ['decode'] * draw.choice((1, 2)))
  else:
    roles = [mode] * draw.choice((1, 2))
  config = plan(roles, num_pages=draw.choice((20, 30, 100)),
                pp=draw.choice((1, 1, 2)), depth=draw.choice((1, 2, 3)),
                run_ahead=draw.choice((1, 4, 32)))
  latency = Affine(draw.uniform(1e-4, 1e-3), draw.uniform(0.003, 0.02), 1e-4,
                   1e-6, draw.choice((0.0, 0.002, 0.03)),
                   config.instances[0].pp)
  rate, now, rows = draw.choice((3, 10, 40)), 0.0, []
  for _ in range(30):
    if draw.random() < 0.8:  # else of the same moment
      now += draw.expovariate(rate)
    rows.append((now, draw.randint(1, 40), draw.randint(1, 40)))
  return config, requests(*rows), latency, Link(0.001, 1e-5)
