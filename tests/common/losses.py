"""Where a request is when an instance is lost, for tests of every fleet."""

from dsjax.scheduling.events import RunPrefill


def _where(state, stage, side):
  return next((getattr(seq, side) for seq in state.seqs.values()
               if seq.stage == stage), None)


# Where a request is -> the instance that is lost, or None: not yet.
AT = {
    'idle': lambda state: len(state.instances) - 1,
    'queued': lambda state: _where(state, 'queued', 'instance'),
    'prefilling': lambda state: next((
        i for i, instance in enumerate(state.instances)
        if any(isinstance(c, RunPrefill) for c, _ in instance.inflight)),
        None),
    'prefilled': lambda state: _where(state, 'prefilled', 'instance'),
    'source': lambda state: _where(state, 'migrating', 'instance'),
    'target': lambda state: _where(state, 'migrating', 'target'),
    'decoding': lambda state: _where(state, 'decoding', 'instance'),
    'finishing': lambda state: _where(state, 'finishing', 'instance'),
}
