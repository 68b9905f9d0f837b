"""Runs of the shipped policies on four H100, and what the logs say."""

import functools

from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import Slo
from dsjax.placement.api import simulate
from dsjax.policies.named import named
from dsjax.scheduling.events import Flip
from dsjax.simulation import latency

SLO = Slo(0.2, 0.022)
STEP = latency.Affine((0.01, 1e-4, 0.0), (0.01, 1e-6, 1e-4), host_s=0.001,
                      mixed=(0.01, 1e-4, 0.0, 1e-6))
LINK = latency.Link(1e-3, 1e6, 100)
FOUR = 'flexible=1x1,1x1,1x1,1x1'
INSTANCE = InstanceConfig('chunked', 500, 16, 4, 2048, 16)


@functools.cache
def served(text, rate_per_s, requests=600, slo=SLO, placement=FOUR):
  """A run of Llama-3-8B on four H100, published tables, ShareGPT lengths."""
  return simulate(placement, 'llama-3-8b', latency='tables:h100-80g',
                  rate_per_s=rate_per_s, slo=slo, requests=requests, cut=True,
                  max_len=8192, policy=named(text, slo), log=True)


def attainment(*args, **options):
  return served(*args, **options).summary.attainment[0]


def commands(run, kind):
  return [c for _, commands in run.log for c in commands if type(c) is kind]


def late_flips(run, after_s):
  """Seconds of the flips after so many, while requests still come."""
  last_s = run.records[-1].arrival_s
  return [event.time_s for event, answer in run.log for c in answer
          if isinstance(c, Flip) and after_s < event.time_s < last_s]
