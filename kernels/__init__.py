"""Pallas kernels, one file an op. Lowest layer: imports jax only."""
