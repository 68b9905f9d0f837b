"""The scheduler: a pure transition from events to commands."""
