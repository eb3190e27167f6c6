"""Compute kernels behind plain fronts: `millrace.kernels.ops` is what models call."""
