"""The machine, and its ceilings: the rates of a large matrix product and of a large copy."""

import importlib.metadata
import platform
import shutil
import subprocess

import jax
import jax.numpy as jnp

from experiments.bench.device import accelerator
from experiments.bench.device.session import Row, Session
from experiments.bench.device.timing import compile_timed, median_seconds

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")
_LIBRARIES = ("jax-cuda", "nvidia-cudnn", "nvidia-cublas", "nvidia-nccl", "triton")


def versions() -> dict[str, str]:
    """The versions of Python, of the measured packages, and of the device libraries."""
    known = {"python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in _PACKAGES or name.startswith(_LIBRARIES):
            known[name] = distribution.version
    return dict(sorted(known.items()))


def driver() -> str | None:
    """The version of NVIDIA's driver; None where nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.split("\n")[0].strip() or None) if done.returncode == 0 else None


def machine() -> Row:
    """JAX's device, and the versions of the software."""
    device = accelerator.first()
    return {
        "platform": device.platform,
        "card": device.device_kind,
        "devices": jax.local_device_count(),
        "memory_bytes": accelerator.memory_bytes(),
        "driver": driver(),
        "runtime": device.client.platform_version.split("\n")[0],
        "versions": versions(),
    }


def _product(session: Session) -> Row:
    """2n³ / seconds of an n×n by n×n product of random bf16 numbers, to bf16."""
    n = session.sizes.product
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    program, compiling = compile_timed(jnp.dot, a, b)
    timed = median_seconds(lambda: program(a, b), session.sizes.least_runs)
    rate = 2 * n**3 / timed["seconds"]
    return timed | {"compile_seconds": compiling, "flops_per_second": rate}


def _copy(session: Session) -> Row:
    """Bytes read and written a second, of an array copied on the device."""
    x = jax.random.normal(jax.random.key(0), (session.sizes.copied // 4,))
    program, compiling = compile_timed(jnp.copy, x)
    timed = median_seconds(lambda: program(x), session.sizes.least_runs)
    rate = 2 * x.nbytes / timed["seconds"]
    return timed | {"compile_seconds": compiling, "bytes_per_second": rate}


def run(session: Session) -> None:
    """The machine; and where it has an accelerator, or tiny is asked for, its ceilings."""
    about = session.row("machine", machine)
    if about.get("platform") == "cpu" and not session.tiny:
        return
    n, copied = session.sizes.product, session.sizes.copied
    session.row(f"bf16 product, {n}³", lambda: _product(session))
    session.row(f"copy of {copied / 2**20:g} MiB, read + written", lambda: _copy(session))
