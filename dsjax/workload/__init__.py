"""Workloads: arrival times x lengths, traces and prompt files."""

from dsjax.workload.files import (
    MAX_LEN,
    Entry,
    Prompt,
    json_lines,
    read_lengths,
    read_prompts,
)
from dsjax.workload.named import (
    PROCESSES,
    Source,
    arrivals_of,
    lengths_of,
    source,
    wave_of,
)
from dsjax.workload.requests import (
    KINDS,
    arrivals,
    check_requests,
    from_lengths,
    from_prompts,
)

__all__ = ['KINDS', 'MAX_LEN', 'PROCESSES', 'Entry', 'Prompt', 'Source',
           'arrivals', 'arrivals_of', 'check_requests', 'from_lengths',
           'from_prompts', 'json_lines', 'lengths_of', 'read_lengths',
           'read_prompts', 'source', 'wave_of']
