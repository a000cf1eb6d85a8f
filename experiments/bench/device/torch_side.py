"""PyTorch's device, and its timing."""

from collections.abc import Callable
from typing import Any

import torch

from experiments.bench.device.session import Session
from experiments.bench.device.timing import median_seconds


def device(session: Session) -> str | None:
    """Where PyTorch works; None, and a row that says so, where its build has no CUDA."""
    if torch.cuda.is_available():
        return "cuda"
    if session.tiny:
        return "cpu"
    session.skip("torch", f"torch {torch.__version__} finds no CUDA device")
    return None


def wait(result: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(session: Session, run: Callable[[], Any]) -> dict[str, float]:
    return median_seconds(run, session.sizes.least_runs, wait)
