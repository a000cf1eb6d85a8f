"""The device that JAX takes first: its memory, and whether it has cuDNN."""

import jax


def first() -> jax.Device:
    return jax.local_devices()[0]


def memory_bytes() -> int | None:
    """The bytes that JAX may allocate; None where they are unknown, as on a CPU."""
    return (first().memory_stats() or {}).get("bytes_limit")


def peak_bytes() -> int | None:
    """The peak bytes of this process; None where they are unknown."""
    return (first().memory_stats() or {}).get("peak_bytes_in_use")


def why_no_cudnn() -> str | None:
    """Why cuDNN's attention cannot run; None where it can."""
    platform = first().platform
    return None if platform in ("gpu", "cuda") else f"no cuDNN on {platform}"
