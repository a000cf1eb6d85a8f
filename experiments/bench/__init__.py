"""Benchmarks against other libraries: the same work, alternating, in fresh processes."""
