"""DistServe in JAX: disaggregated serving, and the placement that pays."""

from dsjax.answer import Output, RequestFailed
from dsjax.base import (
    EngineConfig,
    InputError,
    ModelConfig,
    Placement,
    Plan,
    Request,
    Sampling,
    Slo,
)
from dsjax.checkpoint import Model, load
from dsjax.orchestrator import Orchestrator, serve

__all__ = [
    'EngineConfig', 'InputError', 'Model', 'ModelConfig', 'Orchestrator',
    'Output', 'Placement', 'Plan', 'Request', 'RequestFailed', 'Sampling',
    'Slo', 'load', 'serve',
]
