"""Workloads: arrival times x lengths, traces and prompt files."""

from dsjax.workload.files import (
    MAX_LEN,
    Entry,
    Prompt,
    json_lines,
    read_lengths,
    read_prompts,
)
from dsjax.workload.requests import (
    KINDS,
    arrivals,
    from_lengths,
    from_prompts,
)

__all__ = ['KINDS', 'MAX_LEN', 'Entry', 'Prompt', 'arrivals', 'from_lengths',
           'from_prompts', 'json_lines', 'read_lengths', 'read_prompts']
