"""Training over several processes, on JAX's own runtime between them."""
