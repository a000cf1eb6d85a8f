"""The device that JAX takes first: its memory, and whether it has cuDNN."""

import jax


def first() -> jax.Device:
    return jax.local_devices()[0]


def memory_bytes() -> int | None:
    """What JAX may take of its memory; None where no one counts, as on a CPU."""
    return (first().memory_stats() or {}).get("bytes_limit")


def peak_bytes() -> int | None:
    """The most that this process ever had there; None where no one counts."""
    return (first().memory_stats() or {}).get("peak_bytes_in_use")


def why_no_cudnn() -> str | None:
    """Why cuDNN's attention is not to be tried; None where it is."""
    platform = first().platform
    return None if platform in ("gpu", "cuda") else f"no cuDNN on {platform}"
