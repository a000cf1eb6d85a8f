"""Training over several processes with JAX's distributed runtime."""
