"""DistServe in JAX: disaggregated serving, and the placement that pays.

  model = dsjax.load('smollm2-135m-instruct')
  with dsjax.serve(model, dsjax.Placement.parse('prefill=1x1,decode=1x1')) as s:
    print(s.generate('Why is the sky blue?', max_tokens=32).text)

  print(dsjax.simulate('prefill=2x1,decode=1x1', rate_per_s=4.0))
  print(dsjax.search(devices=3).verdict)

What simulates loads no jax; what serves does so at its first use.

What fewer need has its own home: what hooks of a policy see and answer is in
dsjax.scheduling.policy, devices of several kinds in dsjax.placement.clusters,
hardware and latencies in dsjax.simulation.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dsjax import _kernels_beside as _kernels_beside  # before its importers
from dsjax.analysis.record import Record, rows
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request, Sampling
from dsjax.config.version import __version__ as __version__
from dsjax.placement.api import search, simulate
from dsjax.placement.clusters import Cluster
from dsjax.scheduling.policy import DISTSERVE, Policy, PolicyError
from dsjax.simulation.profiles import Profile

if TYPE_CHECKING:
  from dsjax.checkpoints.checkpoint import Model, load
  from dsjax.runtime.async_server import AsyncServer, serve_async
  from dsjax.runtime.orchestrator import Orchestrator, serve
  from dsjax.runtime.output import Interrupted, Output, RequestFailed
  from dsjax.runtime.profiling import profile

__all__ = [
    'AsyncServer', 'Cluster', 'DISTSERVE', 'EngineConfig', 'InputError',
    'Interrupted', 'Model', 'ModelConfig', 'Orchestrator', 'Output',
    'Placement', 'Plan', 'Policy', 'PolicyError', 'Profile', 'Record',
    'Request', 'RequestFailed', 'Sampling', 'Slo', 'load', 'profile', 'rows',
    'search', 'serve', 'serve_async', 'simulate',
]

# What needs jax is imported when it is first asked for: it takes seconds.
_LAZY = {
    'Model': 'checkpoints.checkpoint', 'load': 'checkpoints.checkpoint',
    'Orchestrator': 'runtime.orchestrator', 'serve': 'runtime.orchestrator',
    'AsyncServer': 'runtime.async_server',
    'serve_async': 'runtime.async_server',
    'Interrupted': 'runtime.output', 'Output': 'runtime.output',
    'RequestFailed': 'runtime.output',
    'profile': 'runtime.profiling',
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  value = getattr(importlib.import_module(f'{__name__}.{_LAZY[name]}'), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
