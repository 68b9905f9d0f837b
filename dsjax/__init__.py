"""DistServe in JAX: disaggregated serving, and the placement that pays."""

from dsjax import _kernels_beside as _kernels_beside  # before its importers
from dsjax.checkpoints.checkpoint import Model, load
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request, Sampling
from dsjax.runtime.async_server import AsyncServer, serve_async
from dsjax.runtime.orchestrator import Orchestrator, serve
from dsjax.runtime.output import Output, RequestFailed

__all__ = [
    'AsyncServer', 'EngineConfig', 'InputError', 'Model', 'ModelConfig',
    'Orchestrator', 'Output', 'Placement', 'Plan', 'Request',
    'RequestFailed', 'Sampling', 'Slo', 'load', 'serve', 'serve_async',
]
