"""Rollouts: the simulator plays the load of late, before a decision.

The load is rounded to steps of STEP first: so a constant load asks one
question only, and the answer is a function of the view.
"""

import dataclasses
import functools
import math

import numpy as np

from dsjax.analysis.metrics import attains
from dsjax.config.engine import InstanceConfig
from dsjax.config.latency import Latency, LinkLike
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.policies.predict import home_roles
from dsjax.policies.static import ONCE_S
from dsjax.scheduling.pace import Paced
from dsjax.scheduling.policy import Load, Policy
from dsjax.scheduling.state import Config
from dsjax.simulation import simulator

STEP = 1.25
LOADED = 1.1  # times the load of late
LIVES = 5  # that a rollout lasts, each as long as objectives allow one
LEAST, MOST = 200, 800  # requests of it


def rounded(load: Load) -> Load:
  """A load in steps of STEP."""
  return Load(*[STEP ** round(math.log(max(value, 1e-6), STEP))
                for value in load])


def settled(latency: Paced) -> Paced:
  """A latency whose corrections are in steps of a tenth."""
  return Paced(latency.base, round(latency.prefill, 1),
               round(latency.decode, 1))


@functools.lru_cache(maxsize=256)
def rollouts(policy: Policy, slo: Slo, configs: tuple[InstanceConfig, ...],
             latencies: tuple[Latency, ...], link: LinkLike, load: Load
             ) -> tuple[float, ...]:
  """The share that attains with 0, 1, ... flexible instances that only
  prefill, at LOADED times the load.

  Lengths are lognormal: prompts of the load's mean and 9th decile, outputs of
  its mean.
  """
  rate_per_s, prompt_len, longest, output_len = load
  life_s = slo.ttft_s + slo.tpot_s * output_len
  n = int(min(max(LIVES * life_s * rate_per_s, LEAST), MOST))
  rng = np.random.default_rng(0)
  spread = math.log(max(longest / prompt_len, 1.01)) / 1.28
  prompts, outputs = [
      np.clip(np.exp(rng.normal(math.log(mean) - sigma**2 / 2, sigma, n)), 1,
              most).astype(int)
      for mean, sigma, most in ((prompt_len, min(spread, 1.5), 8 * longest),
                                (output_len, 0.8, 8 * output_len))]
  times = np.cumsum(rng.exponential(1 / (LOADED * rate_per_s), n))
  sent = [Request(i, float(t), range(int(p)), Sampling(max_tokens=int(o) + 1))
          for i, (t, p, o) in enumerate(zip(times, prompts, outputs,
                                            strict=True))]
  longest_all = max(len(r.prompt) + (r.sampling.max_tokens or 0) for r in sent)
  shares = []
  for prefills in range(len(configs)):
    fixed = dataclasses.replace(
        policy, tick_s=ONCE_S, resize=functools.partial(
            home_roles, prefills=prefills, others='chunked'))
    config = Config(configs, longest_all, depth=1, policy=fixed)
    records = simulator.simulate(config, sent, latencies, link).records
    kept = records[n // 5:]
    shares.append(sum([attains(r, slo) for r in kept]) / len(kept))
  return tuple(shares)
